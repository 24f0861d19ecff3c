"""OPT: what all models must do is in tests/contract; this file declares what it does it with."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import pyengine as pe
import tiny
from cases import Case, Converted
from converters import convert
from hollow import Full, kv, PlainDecoder
from pyengine.errors import UnsupportedModelError

KEYS = {"block_count": 3, "context_length": 256, "embedding_length": 96, "feed_forward_length": 160, "vocab_size": 512,
        "attention.head_count": 6, "attention.layer_norm_epsilon": np.float32(1e-5), "hidden_activation": "relu", "pre_norm": True}
NAMES = {"embed_tokens": "token_embd", "embed_positions": "position_embd", "final_layer_norm": "output_norm", "project_in": "token_embd_proj",
         "project_out": "output_proj"}
LAYER = {"self_attn_layer_norm": "attn_norm", "final_layer_norm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_output", "fc1": "ffn_up", "fc2": "ffn_down"}
NARROW = {"do_layer_norm_before": False, "word_embed_proj_dim": 64}


def named(name: str, value: np.ndarray, config: dict[str, Any]) -> tuple[str | None, np.ndarray]:
    """The head is tied; two rows of the table of positions are left out."""
    own, _, kind = name.removeprefix("model.").removeprefix("decoder.").rpartition(".")
    if own.startswith("layers."):
        _, layer, own = own.split(".", 2)
        return f"blk.{layer}.{LAYER[own]}.{kind}", value
    return f"{NAMES[own]}.{kind}", value[2:] if own == "embed_positions" else value


CASES = (Case(
    "opt", "opt", "OPTConfig", "OPTForCausalLM", "gpt-2",
    {"vocab_size": 512, "hidden_size": 96, "word_embed_proj_dim": 96, "ffn_dim": 160, "num_hidden_layers": 3, "num_attention_heads": 6,
     "max_position_embeddings": 256}, cached_as="llama",
    variants={"opt": {}, "opt-behind": NARROW, "opt-plain": {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu",
                                                             "tie_word_embeddings": False}},
    converted=Converted(KEYS, names="LLAMA", tensor=named, tensors={"opt": {}, "opt-behind": NARROW}, runs={}),
    full={"opt-6.7b": Full(PlainDecoder("opt", 32, 4096, 16384, 32, 32, 128, 50272, 2048, tied=True, positions=True, keys={
        "attention.layer_norm_epsilon": 1e-5, "pre_norm": True, "hidden_activation": "relu"}))}),)


@pytest.mark.parametrize("config", [{}, NARROW], ids=["wide", "narrow"])
def test_hidden_states_are_those_of_transformers(tiny_gguf, config: dict[str, Any]) -> None:
    import torch
    from transformers import OPTForCausalLM

    path, folder = tiny_gguf("opt", **config)
    ids = np.random.default_rng(1).integers(0, 512, 40).tolist()
    theirs = OPTForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        states = theirs.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].numpy()
    got = pe.load(path, n_ctx=64, kv_dtype="f32").hidden(ids)
    if config:                                  # transformers' last one is narrow already, the one before it lacks the last layer
        with torch.no_grad():
            got = theirs.model.decoder.project_out(torch.tensor(got)).numpy()
            states = theirs.model(torch.tensor([ids])).last_hidden_state[0].numpy()
    assert got.shape == states.shape and np.abs(got - states).max() <= 1e-5 * np.ptp(states)


@pytest.mark.parametrize("change", [{"_remove_final_layer_norm": True}, {"activation_function": "tanh"}])
def test_configs_that_are_refused(tmp_path, change: dict[str, Any]) -> None:
    folder = tiny.make_checkpoint("opt", tmp_path / "c")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnsupportedModelError, match=next(iter(change))):
        convert(folder, tmp_path / "m.gguf", "f32")


def test_opt_6_7b(full_size) -> None:
    """32 layers with 32 heads of 128."""
    path, _ = full_size("opt-6.7b")
    plan = pe.plan(path, n_ctx=2048)
    assert kv(plan) == {"Full": 2048 * 32 * 32 * 128 * 2 * 2}
