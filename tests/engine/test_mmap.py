"""Weights read in place: the bits of packed ones, nothing held, a model larger than the memory, only the experts that are used."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pyengine as pe
from pyengine.cli.command import execute
from pyengine.errors import PlanError
from pyengine.memory.plan import MIB

SETTINGS: dict[str, Any] = {"n_ctx": 128, "n_batch": 32, "n_threads": 2}
IDS = np.random.default_rng(5).integers(0, 300, 70).tolist()


@pytest.mark.parametrize(("kind", "outtype"), [("llama", "f32"), ("llama", "q8_0"), ("gemma3", "f16"), ("gemma3", "q8_0"),
                                               ("qwen3moe", "q8_0"), ("qwen3moe", "bf16")])
def test_the_same_bits(tiny_gguf, kind: str, outtype: str) -> None:
    path = tiny_gguf(kind, outtype)[0]
    packed, mapped = pe.load(path, **SETTINGS), pe.load(path, **SETTINGS, mmap=True)
    assert packed.logits(IDS).tobytes() == mapped.logits(IDS).tobytes()        # steps of 32 rows and of 6
    for i in IDS[:3]:
        assert packed.feed([i]).tobytes() == mapped.feed([i]).tobytes()
    if packed.media:
        picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8))
        assert packed.encode_image(picture).tobytes() == mapped.encode_image(picture).tobytes()
    size = os.path.getsize(path)
    held = sum(i.nbytes for i in mapped.plan.items if i.purpose in ("weights", "encoder") and "arena" not in i.detail)
    assert held < 0.1 * size < 0.7 * size < mapped.plan.of("mapped") and mapped.program.weights.nbytes == mapped.plan.of("weights")
    assert mapped.program.arena.nbytes == mapped.plan.of("arena")


def test_the_plan_says_what_is_read_in_place(tiny_gguf, machine, capsys) -> None:
    path = tiny_gguf("llama", "q8_0", hidden_size=768, intermediate_size=2048)[0]
    whole, mapped = pe.plan(path, n_ctx=64), pe.plan(path, n_ctx=64, mmap=True)
    assert whole.total - mapped.total > 10 * MIB and "mmap: " in mapped.table() and "mmap" not in whole.table()
    machine((whole.total + mapped.total) // 2)
    with pytest.raises(PlanError) as refused:
        pe.load(path, n_ctx=64)
    found = [a.settings for a in refused.value.plan.alternatives]
    assert {"mmap": True} in found
    model = pe.load(path, n_ctx=64, mmap=True)
    assert model.plan.fits and model.generate(IDS[:5], max_tokens=2, temperature=0)
    assert execute(["plan", str(path), "--ctx", "64", "--mmap"]) == 0
    assert "fits" in capsys.readouterr().out


LIMITED = """
import json, resource, sys
import pyengine as pe
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[2]),) * 2)              # memory that is no file's
try: pe.load(sys.argv[1], n_ctx=64, n_batch=16, n_threads=1); normal = True
except (MemoryError, pe.errors.PlanError): normal = False
m = pe.load(sys.argv[1], n_ctx=64, n_batch=16, n_threads=1, mmap=True)
print(json.dumps({"normal": normal, "tokens": m.generate([1, 2, 3], max_tokens=2, temperature=0).tokens, "mapped": m.plan.of("mapped")}))
"""


def sparse(path: Path, n_layers: int) -> Path:
    """A llama file of layers of 10.6 MiB of zeros in Q8_0, which take no room on the disk."""
    import gguf

    d, ff, vocab = 1024, 2048, 64
    w = gguf.GGUFWriter(path, "llama")
    for name, value in {"block_count": n_layers, "embedding_length": d, "feed_forward_length": ff, "context_length": 512}.items():
        w.add_uint32(f"llama.{name}", value)
    w.add_head_count(8)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_tokenizer_model("llama")
    w.add_token_list([f"t{i}" for i in range(vocab)])
    w.add_token_scores([0.0] * vocab)
    w.add_token_types([1] * vocab)
    shapes = {"token_embd": (vocab, d), "output_norm": (d,)}
    for i in range(n_layers):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in {
            "attn_norm": (d,), "ffn_norm": (d,), "attn_q": (d, d), "attn_k": (d, d), "attn_v": (d, d), "attn_output": (d, d),
            "ffn_gate": (ff, d), "ffn_up": (ff, d), "ffn_down": (d, ff)}.items()}
    for name, shape in shapes.items():
        q8 = len(shape) > 1
        w.add_tensor_info(f"{name}.weight", shape, np.dtype(np.float32), int(np.prod(shape)) // 32 * 34 if q8 else 4 * shape[0],
                          raw_dtype=gguf.GGMLQuantizationType.Q8_0 if q8 else gguf.GGMLQuantizationType.F32)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    w.close()
    size = sum(-(-t.nbytes // 32) * 32 for part in w.tensors for t in part.values())
    os.truncate(path, path.stat().st_size + 64 + size)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts anonymous memory on Linux only")
def test_a_model_larger_than_the_memory(tmp_path: Path) -> None:
    """425 MiB of weights, and at most 300 MiB of memory that the system could not take back."""
    path = sparse(tmp_path / "big.gguf", 40)
    done = subprocess.run([sys.executable, "-c", LIMITED, path, str(300 * MIB)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert not said["normal"] and len(said["tokens"]) == 2 and said["mapped"] > 400 * MIB


def in_memory(model: pe.Model, name: str) -> int:
    """Bytes of a tensor's file, around the tensor, that this process has touched: whole pages of the mapping."""
    view = model.file.view(name)
    begin, end = view.ctypes.data, view.ctypes.data + view.nbytes
    with open("/proc/self/pagemap", "rb") as f:
        f.seek(begin // resource.getpagesize() * 8)
        n = end // resource.getpagesize() - begin // resource.getpagesize() + 1
        return int((np.frombuffer(f.read(8 * n), "<u8") >> 63).sum()) * resource.getpagesize()


@pytest.mark.skipif(not os.path.exists("/proc/self/pagemap"), reason="Linux")
def test_only_the_experts_that_are_used_are_touched(tiny_gguf) -> None:
    path = tiny_gguf("qwen3moe", "q8_0", hidden_size=512, moe_intermediate_size=512, num_experts=16, num_experts_per_tok=1,
                     num_hidden_layers=2)[0]
    model = pe.load(path, **SETTINGS, mmap=True)
    name = "blk.0.ffn_down_exps.weight"
    expert = model.file.tensors[name].nbytes // 16
    around = 2 * 65536                                       # the system maps some pages around one that is read
    assert in_memory(model, name) <= around                  # nothing is read when it is loaded
    model.feed([5])
    assert expert <= in_memory(model, name) + around <= expert + 2 * around
    model.logits(IDS)
    assert in_memory(model, name) > 4 * expert


def test_a_model_of_400_gib_loads(full_size) -> None:
    """Nothing but norms is read of it; a step would take a while."""
    path, _ = full_size("llama-405b")
    model = pe.load(path, n_ctx=64, n_batch=8, mmap=True)
    assert model.plan.of("mapped") > 200 * 1024 * MIB and model.plan.fits and model.plan.of("weights") < 32 * MIB
    model.file.check()
