"""NVLM-X and NVLM-H: a Qwen 2 decoder with gated cross-attention layers between its own; pictures in tiles are seen across.

Paper arXiv:2409.11402, sections 3 and 4; gated layers as in Flamingo, arXiv:2204.14198, figure 4. No weights of either were published (those of
NVLM-D were: `encoders/nvlm.py`), so names and what the paper leaves open are ours: which layers, heads of cross-attention as the decoder's, and
the projector of NVLM-D for both.

    NVLM-X   <tile_1> .. <tile_n> <tile_global_thumbnail>: one position a tile. A tag sees its own tile; what follows sees all of them
    NVLM-H   <tile_1> .. <tile_n>: as above; then <tile_global_thumbnail> and the rows of the whole in the sequence, which all layers see

Text before the first picture skips the gated layers, as does all text behind a picture of one tile in NVLM-H, which is the whole alone.
Axes: as in `mllama.py`, whose cross-attention this is, without norms of queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.media.views import View
from pyengine.models import mllama, qwen2
from pyengine.models.architecture import Encoder, EncoderFiles
from pyengine.models.encoders import nvlm
from pyengine.models.llama import FeedForward
from pyengine.nn.batch import Batch


class Vision(nvlm.Vision):
    """Encoder, projector, processor and tags. Nothing about a picture is kept here."""

    def __init__(self, files: EncoderFiles):
        self.hybrid = files.text.get("attention.cross_hybrid", False, bool)
        super().__init__(files)

    def bind_tokens(self, v: Hparams, token: Callable[[str], int]) -> None:
        """Find the ids of the tags, each of which is one token here, and of what a chat template writes for a picture."""
        super().bind_tokens(v, token)
        self.tags = [token(text) for text in nvlm.tags(self.config.tiles[1] + 1)]

    def across_rows(self, n_ctx: int) -> int:
        """Return the rows of a picture of the most tiles that layers see across."""
        return self.rows * (self.config.tiles[1] + (not self.hybrid))

    def positions(self, n: int) -> int:
        """Count the positions of a prompt that a picture of n tiles takes."""
        return n + self.rows * self.hybrid

    def around(self, views: list[View]) -> tuple[str | int | View, ...]:
        """Let tags be the positions of tiles; of the whole only where all is seen across."""
        tags = [*self.tags[: len(views) - 1], self.tags[-1]]
        seen = [replace(view, positions=np.zeros_like(view.positions), advance=1, token=tag, alone=True) for view, tag in zip(views, tags)]
        return (*seen[:-1], tags[-1], views[-1]) if self.hybrid else tuple(seen)


class Model(mllama.Model):
    """An nvlm decoder. `forward` builds the graph of one step; nothing about a request is kept here."""

    block: Any = staticmethod(lambda w, c: qwen2.Block(w, c, FeedForward))
    interleaved = False

    def __init__(self, h: Hparams, w: Weights):
        self.hybrid = h.get("attention.cross_hybrid", False, bool)
        super().__init__(h, w)

    @staticmethod
    def read(h: Hparams, w: Weights) -> qwen2.Config:
        """Read the keys "nvlm.*"."""
        h.refuse(attention__sliding_window="a sliding window")
        return qwen2.Config.read(h, w)

    @classmethod
    def encoders(cls, files: EncoderFiles) -> dict[str, Encoder]:
        """Bind the encoder, where the files hold it."""
        return {"image": Vision(files)}

    def embedded(self, batch: Batch) -> Tensor:
        """Return what the first layer gets [m, D]; rows of the whole are among it where the file says so."""
        return self.embed(batch.ids, batch.media if self.hybrid else None)
