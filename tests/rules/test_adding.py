"""An architecture is three files: its module, its converter, and its tests with what suites over models need. Nothing lists them."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import cases
from pyengine.models import architectures

TESTS = ROOT / "tests"
HELIUM = {
    "models/helium.py": '''"""Helium: llama's layout."""

from pyengine.models.llama import Model  # noqa: F401
''',
    "converters/helium.py": '''"""Helium: pairs of elements are rotated, as in the file, so no rows change places."""

from converters.contract import converts, linear
from converters.decoder import Decoder


@converts("HeliumForCausalLM")
class Helium(Decoder):
    arch, rope_base = "helium", 1e5
    defaults = {"rms_norm_eps": 1e-8, "tie_word_embeddings": False}

    def layer(self, i, b, m):
        d, f, q, kv = self.d_model, self.d_ff, self.q_width, self.kv_width
        yield self.norm(f"{b}.attn_norm", f"{m}.input_layernorm", d)
        yield self.norm(f"{b}.ffn_norm", f"{m}.post_attention_layernorm", d)
        for name, source, n_out, n_in in (
                ("attn_q", "self_attn.q_proj", q, d), ("attn_k", "self_attn.k_proj", kv, d), ("attn_v", "self_attn.v_proj", kv, d),
                ("attn_output", "self_attn.o_proj", d, q), ("ffn_gate", "mlp.gate_proj", f, d), ("ffn_up", "mlp.up_proj", f, d),
                ("ffn_down", "mlp.down_proj", d, f)):
            yield from linear(f"{b}.{name}", f"{m}.{source}", n_out, n_in)
''',
    "tests/models/test_helium.py": '''"""Helium."""

import numpy as np

from cases import Case, Converted
from tiny import COMMON

CASES = (Case(
    "helium", "helium", "HeliumConfig", "HeliumForCausalLM", "llama-bpe", {**COMMON, "head_dim": 16},
    converted=Converted({
        "block_count": 3, "context_length": 256, "embedding_length": 96, "feed_forward_length": 160, "vocab_size": 512,
        "attention.head_count": 6, "attention.head_count_kv": 2, "attention.key_length": 16, "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": np.float32(1e-8), "rope.freq_base": 1e5}, names="LLAMA")),)
'''}
RUN = """
import sys
from pathlib import Path

import cases
import converters
import pyengine.models
import pytest

new = Path(sys.argv[1])
pyengine.models.__path__.append(str(new / "models"))
converters.__path__.append(str(new / "converters"))
cases.FOLDERS.append(new / "tests/models")
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "helium", *sys.argv[2:]]))
"""
# some of the suites that run over all text models, and how many tests of one model
SUITES = {"tests/contract/test_text_models.py": 7 + 2 + 1, "tests/converters/test_converters.py": 2, "tests/cache/test_sessions.py": 1}


def test_three_files_are_a_new_architecture(tmp_path: Path) -> None:
    """Helium is added here by its three files, and then suites over models test it."""
    pytest.importorskip("transformers", reason="needs transformers and torch: pip install -r requirements/test.txt")
    for name, text in HELIUM.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, TESTS / "support", os.environ.get("PYTHONPATH", ""))))}
    done = subprocess.run([sys.executable, "-c", RUN, str(tmp_path), *SUITES], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    passed, skipped = (int(n) for n in re.search(r"(\d+) passed(?:, (\d+) skipped)?", done.stdout).groups(0))
    assert passed >= sum(SUITES.values()) and skipped <= 1, done.stdout         # without llama.cpp one is skipped


def test_every_architecture_has_its_cases() -> None:
    found = cases.every().values()
    read = {c.arch for c in found} | {c.dialect.ollama_arch for c in found if c.dialect}
    assert set(architectures()) <= read
    assert all((TESTS / "models" / f"test_{c.arch}.py").exists() for c in found)


def test_every_converter_has_its_cases() -> None:
    from converters import supported

    assert set(supported()) <= {c.model_class for c in cases.every().values()}


def test_nothing_lists_models() -> None:
    """Two as examples are no list."""
    kinds = set(cases.every())
    for path in [p for p in TESTS.rglob("*.py") if p.parent.name != "models"]:
        for node in ast.walk(ast.parse(path.read_text())):
            elements = node.elts if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else node.keys if isinstance(node, ast.Dict) else ()
            named = {e.value for e in elements if isinstance(e, ast.Constant)} & kinds
            assert len(named) < 3, f"{path.relative_to(ROOT)}:{node.lineno} lists {sorted(named)}"
