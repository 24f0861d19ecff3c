"""peft's folders to adapter files: names, order of rows, scales, and what is refused. That results are right: tests/engine/test_adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora
from converters.__main__ import main
from converters.adapters import convert_adapter
from pyengine.errors import InvalidModelError, RequestError, UnsupportedModelError
from pyengine.files.adapters import asked_for, open_adapter

pytest.importorskip("transformers", reason="needs transformers and torch: pip install -r requirements/test.txt")


@pytest.fixture
def made(tiny_gguf, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A file, its checkpoint, and an adapter for it."""
    path, hf = tiny_gguf("llama")
    return path, hf, lora.make_adapter(tmp_path / "a", hf)


def values(file: Path) -> dict[str, np.ndarray]:
    """All factors times B A, by the name of the weight."""
    return {name: p.factor * p.b.floats() @ p.a.floats() for name, p in open_adapter(asked_for(file)[0]).pairs.items()}


def test_the_command_and_what_stands_in_the_file(made, tmp_path: Path, capsys) -> None:
    path, hf, adapter = made
    assert main([str(adapter), "-o", str(tmp_path / "x.gguf")]) == 0           # the base is the folder that the adapter names
    assert "x.gguf: 0." in capsys.readouterr().out
    found = open_adapter(asked_for(tmp_path / "x.gguf")[0])
    assert found.name == "x" and found.alpha == 8 and found.ranks == [4] and len(found.pairs) == 3 * 7
    assert found.file.metadata["general.architecture"] == "llama" and found.file.metadata["general.name"] == "a"
    low = lora.read(adapter / "adapter_model.safetensors")
    down = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    assert np.array_equal(found.pairs["blk.1.ffn_down.weight"].b.floats(), low[down])
    assert main([str(adapter), "--base", str(path), "-o", str(tmp_path / "y.gguf"), "--outtype", "f16"]) == 0
    y = values(tmp_path / "y.gguf")
    assert all(np.allclose(y[name], value, atol=1e-2) for name, value in values(tmp_path / "x.gguf").items())
    assert main([str(hf), "--base", str(hf), "-o", str(tmp_path / "z.gguf")]) == 2 and "--base" in capsys.readouterr().err
    assert main([str(adapter), "--split-mmproj", "-o", str(tmp_path / "z.gguf")]) == 2 and not (tmp_path / "z.gguf").exists()


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_a_file_of_the_base_is_as_good_as_its_folder(kind: str, tiny_gguf, tmp_path: Path) -> None:
    path, hf = tiny_gguf(kind)
    adapter = lora.make_adapter(tmp_path / "a", hf)
    by_folder, by_file = (values(convert_adapter(adapter, base, tmp_path / f"{i}.gguf")) for i, base in enumerate((hf, path)))
    assert by_folder.keys() == by_file.keys() and all(np.array_equal(by_file[name], v) for name, v in by_folder.items())


def test_a_base_in_the_hubs_cache_is_found(made, tmp_path: Path, monkeypatch) -> None:
    _, hf, adapter = made
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "org/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match="--base.*org/base"):
        convert_adapter(adapter, None, tmp_path / "x.gguf")
    snapshot = tmp_path / "hub/models--org--base/snapshots/abc"
    snapshot.mkdir(parents=True)
    shutil.copy(hf / "config.json", snapshot)
    assert values(convert_adapter(adapter, None, tmp_path / "x.gguf"))


def edited(adapter: Path, out: Path, config: dict[str, Any], tensors: dict[str, Any]) -> Path:
    from safetensors.numpy import save_file

    out.mkdir()
    (out / "adapter_config.json").write_text(json.dumps({**json.loads((adapter / "adapter_config.json").read_text()), **config}))
    low = {**lora.read(adapter / "adapter_model.safetensors"), **tensors}
    save_file({name: value for name, value in low.items() if value is not None}, out / "adapter_model.safetensors")
    return out


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(("config", "tensors", "error", "says"), [
    ({"use_dora": True}, {}, UnsupportedModelError, "DoRA"),
    ({"modules_to_save": ["lm_head", "norm"]}, {}, UnsupportedModelError, r"modules_to_save' is set \(lm_head, norm\)"),
    ({"peft_type": "IA3"}, {}, UnsupportedModelError, "IA3"),
    ({"bias": "all"}, {}, UnsupportedModelError, "'bias' is 'all'"),
    ({"alora_invocation_tokens": [1, 2]}, {}, UnsupportedModelError, "activated"),
    ({"rank_pattern": {"q_proj": 5}}, {}, InvalidModelError, "rank is 5"),
    ({"rank_pattern": {"(": 5}}, {}, InvalidModelError, "regular expression"),
    ({"lora_alpha": "x"}, {}, InvalidModelError, "lora_alpha"),
    ({"r": 0}, {}, InvalidModelError, "above 0"),
    ({}, {f"{Q}.lora_A.weight": None}, InvalidModelError, "has no lora_A"),
    ({}, {f"{Q}.lora_A.weight": np.ones((4, 95), np.float32)}, InvalidModelError, "another base model"),
    ({}, {f"{Q}.lora_magnitude_vector": np.ones(96, np.float32)}, UnsupportedModelError, "DoRA"),
    ({}, {"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 512), np.float32)}, InvalidModelError, "has no lora_B"),
    ({}, {f"base_model.model.model.embed_tokens.lora_embedding_{x}": np.ones(s, np.float32) for x, s in (("A", (4, 500)), ("B", (96, 4)))},
     InvalidModelError, r"weight \(500, 96\)"),
    ({}, {f"base_model.model.model.norm.lora_embedding_{x}": np.ones(s, np.float32) for x, s in (("A", (4, 96)), ("B", (96, 4)))},
     UnsupportedModelError, "output_norm.weight"),
    ({}, {"base_model.model.lm_head.weight": np.ones((512, 96), np.float32)}, UnsupportedModelError, "no matrix of LoRA"),
    ({}, {f"base_model.model.model.embed_tokens.lora_{x}.weight": np.ones(s, np.float32) for x, s in (("A", (4, 96)), ("B", (512, 4)))},
     UnsupportedModelError, "token_embd.weight"),
    ({}, {f"base_model.model.other.lora_{x}.weight": np.ones(s, np.float32) for x, s in (("A", (4, 96)), ("B", (96, 4)))}, UnsupportedModelError, "no product"),
])
def test_what_a_file_cannot_say_is_refused(made, tmp_path: Path, config: dict[str, Any], tensors: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        convert_adapter(edited(made[2], tmp_path / "bad", config, tensors), made[1], tmp_path / "x.gguf")
    assert not list(tmp_path.glob("x.gguf*"))


def test_some_experts_alone_are_refused(tiny_gguf, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    hf = tiny_gguf("qwen3moe")[1]
    adapter = lora.make_adapter(tmp_path / "a", hf, ("q_proj",))
    name = next(n for n in lora.read(hf / "model.safetensors") if "experts" in n and n.endswith("weight") and "gate." not in n)
    rows, columns = lora.read(hf / "model.safetensors")[name].shape[-2:]
    module = f"base_model.model.{name.removesuffix('.weight')}"
    save_file({f"{module}.lora_A.weight": np.ones((4, columns), np.float32), f"{module}.lora_B.weight": np.ones((rows, 4), np.float32)},
              adapter / "adapter_model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"experts.*a part of 'blk.0.ffn_.*_exps.weight'.*all of its"):
        convert_adapter(adapter, hf, tmp_path / "x.gguf")
