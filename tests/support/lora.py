"""Random LoRA adapters as peft saves them, and the checkpoint that has them merged: W + scale B A, in float32."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TURNED = ("c_attn", "c_proj", "c_fc")          # modules whose weights are [in, out] in a checkpoint: transformers' Conv1D
EMBEDS = ("embed_tokens", "wte")               # modules that are embeddings, if they are asked for
APART = (".experts.", ".linear_attn.")         # no adapters: stacks, and columns that lie in another order in files
ROUTERS = ("gate", "router")                   # of experts: a choice between two that are near turns with the last bit


def read(file: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(file)


def _adaptable(name: str, w: np.ndarray) -> bool:
    """Whether a tensor is a plain matrix of a layer."""
    last = name.removesuffix(".weight").rpartition(".")[2]
    layered = any(part.isdigit() for part in name.split(".")[:-2]) and not any(part in name for part in APART)
    return w.ndim == 2 and name.endswith(".weight") and last not in ROUTERS and layered


def make_adapter(folder: Path, base: Path, targets: Sequence[str] = (), *, seed: int = 0, dtype: str = "float32",
                 ranks: Mapping[str, int] | None = None, within: Sequence[str] = ("",), **config: Any) -> Path:
    """Write an adapter for the matrices of a checkpoint whose modules have these names, or all of its layers; ranks: of modules, instead of r;
    within: what whole names have in them, one of these.
    """
    from safetensors.numpy import save_file

    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(targets), "base_model_name_or_path": str(base), "bias": "none",
                "use_rslora": False, "use_dora": False, "modules_to_save": None, "rank_pattern": dict(ranks or {}), "alpha_pattern": {}, **config}
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    random, tensors = np.random.default_rng(seed), {}
    for name, w in sorted(read(base / "model.safetensors").items()):
        module = name.removesuffix(".weight")
        last = module.rpartition(".")[2]
        if (last not in targets if targets else not _adaptable(name, w)) or not any(part in name for part in within):
            continue
        r = (ranks or {}).get(last, settings["r"])
        n_out, n_in = w.shape[::-1] if last in (*TURNED, *EMBEDS) else w.shape
        if last in EMBEDS:
            tensors[f"base_model.model.{module}.lora_embedding_A"] = random.standard_normal((r, n_in)).astype(dtype)
            tensors[f"base_model.model.{module}.lora_embedding_B"] = (random.standard_normal((n_out, r)) / r).astype(dtype)
            continue
        tensors[f"base_model.model.{module}.lora_A.weight"] = (random.standard_normal((r, n_in)) / n_in**0.5).astype(dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = (random.standard_normal((n_out, r)) / r).astype(dtype)
    assert tensors, f"{base} has none of {targets}"
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What peft multiplies a module's product with."""
    last = module.rpartition(".")[2]
    alpha = config["alpha_pattern"].get(last, config["lora_alpha"])
    return alpha / (rank**0.5 if config["use_rslora"] else rank)


def merge(out: Path, base: Path, adapters: Sequence[tuple[Path, float]]) -> Path:
    """Write the checkpoint with adapters of these scales merged into its matrices."""
    from safetensors.numpy import save_file

    shutil.copytree(base, out)
    tensors = read(base / "model.safetensors")
    for folder, scale in adapters:
        config, low = json.loads((folder / "adapter_config.json").read_text()), read(folder / "adapter_model.safetensors")
        for name, a in low.items():
            if name.endswith((".lora_A.weight", ".lora_embedding_A")):
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight").removesuffix(".lora_embedding_A")
                b = low[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")].astype(np.float64)
                change = scale * scale_of(config, module, a.shape[0]) * (b @ a.astype(np.float64))
                w = tensors[f"{module}.weight"]
                tensors[f"{module}.weight"] = (w + (change.T if module.rpartition(".")[2] in (*TURNED, *EMBEDS) else change)).astype(np.float32)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out
