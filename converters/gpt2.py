"""GPT-2: `gpt2` in GGUF. Follows transformers `configuration_gpt2.py`; its matrices are [in, out] in the checkpoint (`Conv1D`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from .contract import Entry, converts
from .decoder import Decoder, Tensors

# transformers' GPT2Config where a config.json may be silent
DEFAULTS: dict[str, Any] = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
                            "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
                            "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True, "add_cross_attention": False}


@converts("GPT2LMHeadModel")
class Gpt2(Decoder):
    arch = "gpt2"
    defaults, rope_base = DEFAULTS, 10_000.0
    renames = ((r"^transformer\.", ""),)

    def __init__(self, config: dict[str, Any], file: Path):
        own = {**DEFAULTS, **config}
        same = {"hidden_size": own["n_embd"], "num_hidden_layers": own["n_layer"], "num_attention_heads": own["n_head"],
                "intermediate_size": own["n_inner"] or 4 * own["n_embd"], "max_position_embeddings": own["n_positions"]}
        super().__init__({**config, **same}, file)
        for name, *allowed in (("activation_function", "gelu_new", "gelu_pytorch_tanh"), ("scale_attn_weights", True),
                               ("scale_attn_by_inverse_layer_idx", False), ("add_cross_attention", False)):
            self.config.refuse_unless(name, *allowed)

    def write_keys(self, out: GGUFWriter) -> None:
        self.write_sizes(out, self.d_ff)
        out.add_layer_norm_eps(self.config.need("layer_norm_epsilon"))

    def unused(self) -> set[str]:
        masks = {f"h.{i}.attn.{name}" for i in range(self.n_layers) for name in ("bias", "masked_bias")}       # of old checkpoints
        return super().unused() | masks

    def tensors(self) -> Tensors:
        d = self.d_model
        yield Entry("token_embd.weight", "wte.weight", (self.vocab_size, d))
        yield Entry("position_embd.weight", "wpe.weight", (self.config.count("max_position_embeddings"), d))
        yield from self.both("output_norm", "ln_f")
        if not self.tied:
            yield Entry("output.weight", "lm_head.weight", (self.vocab_size, d))
        for i in range(self.n_layers):
            yield from self.layer(i, f"blk.{i}", f"h.{i}")

    def both(self, name: str, source: str) -> Iterator[Entry]:
        """List a layer norm."""
        for part in ("weight", "bias"):
            yield Entry(f"{name}.{part}", f"{source}.{part}", (self.d_model,))

    def layer(self, i: int, b: str, m: str) -> Tensors:
        d, f = self.d_model, self.d_ff
        yield from self.both(f"{b}.attn_norm", f"{m}.ln_1")
        yield from self.both(f"{b}.ffn_norm", f"{m}.ln_2")
        for name, source, n, k in (("attn_qkv", "attn.c_attn", 3 * d, d), ("attn_output", "attn.c_proj", d, d), ("ffn_up", "mlp.c_fc", f, d),
                                   ("ffn_down", "mlp.c_proj", d, f)):
            yield Entry(f"{b}.{name}.weight", f"{m}.{source}.weight", (n, k), stored=(k, n), turned=True)
            yield Entry(f"{b}.{name}.bias", f"{m}.{source}.bias", (n,))
