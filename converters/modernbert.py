"""ModernBERT: `modern-bert` in GGUF. Follows transformers `configuration_modernbert.py`, old configs (a period, two bases of rope) and new ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, PoolingType, RopeScalingType

from pyengine.errors import UnsupportedModelError

from .contract import converts, Entry, linear
from .decoder import Tensors
from .rope import rope_parameters
from .text_encoder import TextEncoder
from .tokenizer import Vocabulary

# transformers' ModernBertConfig where a config.json may be silent
DEFAULTS: dict[str, Any] = {"vocab_size": 50368, "hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22, "num_attention_heads": 12,
                            "hidden_activation": "gelu", "max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "norm_bias": False,
                            "attention_bias": False, "mlp_bias": False, "decoder_bias": True, "classifier_bias": False, "classifier_pooling": "cls",
                            "classifier_activation": "gelu", "local_attention": 128, "global_attn_every_n_layers": 3, "tie_word_embeddings": True}
BASES = (("full_attention", "global_rope_theta", 160_000.0), ("sliding_attention", "local_rope_theta", 10_000.0))


@converts("ModernBertModel", "ModernBertForMaskedLM", "ModernBertForSequenceClassification")
class ModernBert(TextEncoder):
    arch = "modern-bert"
    renames = ((r"^model\.", ""),)
    defaults = DEFAULTS
    masked = "head.dense", "head.norm", "decoder", "decoder.bias"
    classes = "head.dense", "classifier"

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__({{"norm_eps": "layer_norm_eps"}.get(name, name): value for name, value in config.items()}, file)
        c = self.config
        c.refuse_unless("hidden_activation", "gelu", "silu")
        c.refuse_unless("classifier_activation", "gelu")
        c.refuse_unless("classifier_pooling", "cls", "mean")
        c.refuse_unless("norm_bias", False)
        kinds = c.get("layer_types")
        every = c.get("global_attn_every_n_layers")
        self.sliding = [kind == "sliding_attention" for kind in kinds] if kinds else [bool(i % every) for i in range(self.n_layers)]
        ropes = [rope_parameters(c, base, kind, name) for kind, name, base in BASES]
        if any(r["rope_type"] != "default" for r in ropes):
            raise UnsupportedModelError(f"{file}: rope scaling of this architecture has no key")
        self.bases = [r["rope_theta"] for r in ropes]
        self.class_act = c.need("classifier_activation")

    def look(self, names: Any) -> None:
        super().look(names)
        self.has_masked = self.has_masked and not self.has_classes          # both have the same layer

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_sliding_window(self.config.count("local_attention"))
        out.add_sliding_window_pattern(self.sliding)
        out.add_rope_freq_base(self.bases[0])
        out.add_rope_freq_base_swa(self.bases[1])
        out.add_rope_scaling_type(RopeScalingType.NONE)
        out.add_string(f"{self.arch}.hidden_act", self.config.need("hidden_activation"))
        if self.has_classes:
            pooling = {"cls": PoolingType.CLS, "mean": PoolingType.MEAN}[self.config.need("classifier_pooling")]
            out.add_uint32(f"{self.arch}.classifier.pooling_type", pooling)

    def change_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Name llama.cpp's tokenizer of these models."""
        vocabulary.pre = "modern-bert" if vocabulary.pre == "gpt-2" else vocabulary.pre

    def norm(self, name: str, source: str) -> Entry:
        """Return the weight of a norm, which has no bias."""
        return Entry(f"{name}.weight", f"{source}.weight", (self.width,))

    def heads(self) -> Iterator[Entry]:
        d, biased = self.width, bool(self.config.get("classifier_bias"))
        if self.has_masked:
            yield from linear("mlm.dense", "head.dense", d, d, biased)
            yield self.norm("mlm.norm", "head.norm")
            if not self.tied:
                yield Entry("mlm.output.weight", "decoder.weight", (self.vocab_size, d))
            if self.config.get("decoder_bias"):
                yield Entry("mlm.output.bias", "decoder.bias", (self.vocab_size,))
        if self.has_classes:
            yield from linear("cls", "head.dense", d, d, biased)
            yield self.norm("cls.norm", "head.norm")
            yield from linear("cls.output", "classifier", len(self.labels), d, True)

    def tensors(self) -> Tensors:
        d, f, c = self.width, self.d_ff, self.config
        yield Entry("token_embd.weight", "embeddings.tok_embeddings.weight", (self.vocab_size, d))
        yield self.norm("token_embd_norm", "embeddings.norm")
        for i in range(self.n_layers):
            b, m = f"blk.{i}", f"layers.{i}"
            if i:                                            # before the first there is none
                yield self.norm(f"{b}.attn_norm", f"{m}.attn_norm")
            yield from linear(f"{b}.attn_qkv", f"{m}.attn.Wqkv", 3 * d, d, bool(c.get("attention_bias")))
            yield from linear(f"{b}.attn_output", f"{m}.attn.Wo", d, d, bool(c.get("attention_bias")))
            yield self.norm(f"{b}.ffn_norm", f"{m}.mlp_norm")
            yield from linear(f"{b}.ffn_up", f"{m}.mlp.Wi", 2 * f, d, bool(c.get("mlp_bias")))
            yield from linear(f"{b}.ffn_down", f"{m}.mlp.Wo", d, f, bool(c.get("mlp_bias")))
        yield self.norm("output_norm", "final_norm")
        yield from self.heads()
