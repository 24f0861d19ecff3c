"""EmbeddingGemma: Gemma 3's text model that sees in both directions, `gemma-embedding` in GGUF. The layers behind its pooling are `sentence`'s."""

from __future__ import annotations

from gguf import GGUFWriter, PoolingType

from .contract import converts
from .gemma3_text import Gemma3Text


@converts("Gemma3TextModel")
class EmbeddingGemma(Gemma3Text):
    arch = "gemma-embedding"
    renames = ((r"^(?!model\.|lm_head\.)", "model."),)
    both_ways = (True,)
    usual_pooling = PoolingType.MEAN

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_causal_attention(False)
