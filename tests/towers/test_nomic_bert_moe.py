"""nomic-embed-text v2: hidden states and vectors against a reference in torch; its checkpoint's config and names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_nomic_bert_moe
import tiny_towers
from tiny_towers import alone_and_beside, close, compare_states, loaded, TEXTS

import pyengine as pe
from converters.writer import convert
from pyengine.errors import UnsupportedModelError

CONFIG: dict[str, Any] = {
    "architectures": ["NomicBertModel"], "model_type": "nomic_bert", "activation_function": "gelu", "causal": False, "prenorm": False, "qkv_proj_bias": True,
    "mlp_fc1_bias": True, "mlp_fc2_bias": True, "rotary_emb_base": 70.0, "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False, "rotary_emb_scale_base": None,
    "moe_every_n_layers": 2, "moe_top_k": 2, "moe_normalize_expert_weights": False, "expert_choice_router": False, "num_experts": 5, "num_shared_experts": 0,
    "n_embd": 96, "n_head": 6, "n_inner": 104, "n_layer": 4, "n_positions": 300, "max_trained_positions": 300, "layer_norm_epsilon": 1e-5, "vocab_size": 170,
    "type_vocab_size": 1, "use_rms_norm": False}


def checkpoint(folder: Path, **more: Any) -> tuple[Path, Any]:
    """Write a checkpoint with random weights; returns its folder, and what the reference makes of it."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    tiny_towers.save_unigram(folder)
    config, random = {**CONFIG, **more}, torch.Generator().manual_seed(0)
    made = reference_nomic_bert_moe.Model(config)
    with torch.no_grad():
        for name, p in sorted(made.named_parameters()):
            noise = torch.randn(p.shape, generator=random)
            norm = name.endswith("weight") and p.dim() == 1
            p.copy_(norm + 0.3 * noise if p.dim() == 1 else noise if "embeddings" in name else 1.5 * noise / p.shape[1] ** 0.5)
    save_file({name: p.detach().contiguous() for name, p in made.named_parameters()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder, made.eval()


TINY = {"nomic_bert_moe": lambda folder: checkpoint(folder)[0]}


@pytest.mark.parametrize("more", [{}, {"moe_every_n_layers": 3, "moe_top_k": 1, "num_experts": 2}])
def test_states_are_those_of_the_reference(tmp_path: Path, more: dict[str, Any]) -> None:
    folder, theirs = checkpoint(tmp_path / "hf", **more)
    with loaded(folder) as model:
        compare_states(model, theirs, folder)
        alone_and_beside(model)
        states = model.hidden(TEXTS[0])
        close(model.embed(TEXTS[0], normalize=False), states.astype(np.float64).mean(0))
        assert model.n_ctx == 300 and pe.plan(folder / "f32.gguf").total == model.plan.total


@pytest.mark.parametrize("outtype, least", [("f16", 0.9999), ("q8_0", 0.99)])
def test_smaller_formats_stay_near(tmp_path: Path, outtype: str, least: float) -> None:
    """Whose experts a row gets may change where two are alike: the mean of a text does not."""
    folder, _ = checkpoint(tmp_path / "hf", n_embd=128, n_inner=128, n_head=4)
    with loaded(folder) as exact, loaded(folder, outtype) as small:
        assert small.embed(TEXTS[0]) @ exact.embed(TEXTS[0]) > least


def test_what_it_cannot_run_is_refused(tmp_path: Path) -> None:
    for wrong in ({"activation_function": "swiglu"}, {"moe_normalize_expert_weights": True}, {"num_shared_experts": 1}, {"qkv_proj_bias": False},
                  {"expert_choice_router": True}):
        folder, _ = checkpoint(tmp_path / "hf")
        (folder / "config.json").write_text(json.dumps({**CONFIG, **wrong}))
        with pytest.raises(UnsupportedModelError, match=next(iter(wrong))):
            convert(folder, tmp_path / "no.gguf", "f32")
