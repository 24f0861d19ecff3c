"""Gemma 4's assistants, which draft for a Gemma 4: its layers without keys and values, between two projections.

`gemma4-assistant` in GGUF. Follows transformers `configuration_gemma4_assistant.py`; keys and names as llama.cpp's `conversion/gemma.py` has
them, without the table of clusters of tokens. Axes: D hidden, B hidden of the model that it drafts for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from .checkpoint import Config
from .contract import converts, linear
from .decoder import Tensors
from .gemma4_text import Gemma4Text

# transformers' Gemma4AssistantConfig where a config.json may be silent
DEFAULTS: dict[str, Any] = {"backbone_hidden_size": 1536, "tie_word_embeddings": True}


@converts("Gemma4AssistantForCausalLM")
class Gemma4Assistant(Gemma4Text):
    arch = "gemma4-assistant"
    leaves: Sequence[tuple[str, str]] = (
        (r"^masked_embedding\.", "the table of clusters of tokens is left out, as llama.cpp leaves it: drafts are chosen from all tokens"),)

    def __init__(self, config: dict[str, Any], file: Path):
        root = Config(config, DEFAULTS, file)
        super().__init__({"hidden_size_per_layer_input": 0, **root.need("text_config"), "tie_word_embeddings": root.need("tie_word_embeddings")}, file)
        self.d_decoder = root.count("backbone_hidden_size")
        for name, value in (("hidden_size_per_layer_input", 0), ("enable_moe_block", False), ("use_double_wide_mlp", False)):
            self.config.refuse_unless(name, value)

    def read_own(self) -> int:
        """Return 0: all layers read the decoder's caches."""
        return 0

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_embedding_length_out(self.d_decoder)
        out.add_nextn_predict_layers(self.n_layers)

    def tensors(self) -> Tensors:
        yield from super().tensors()
        yield from linear("nextn.pre_projection", "pre_projection", self.d_model, 2 * self.d_decoder)
        yield from linear("nextn.post_projection", "post_projection", self.d_decoder, self.d_model)
