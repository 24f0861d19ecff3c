"""Janus-Pro's encoder of pictures that are read: SigLIP over one padded square, its last norm, two products with a GELU between.

Paper arXiv:2501.17811. Follows transformers 5.23: `modeling_janus.py` (JanusVisionModel, JanusVisionAlignerMLP), `processing_janus.py`,
`image_processing_pil_janus.py`. What the model draws with (its codebook, that one's head and aligner) is not in files: only text is generated.

    picture -> its longer side as long as the square's, padded with the mean colour -> a row for each patch
    prompt: <begin_of_image>, rows, <end_of_image>

Keys and names as in llama.cpp's `conversion/januspro.py`. differs from llama.cpp: GELU is the exact one, padding has the mean colour, which is
127 in the published checkpoints, both as transformers.
Axes: n patches, V hidden; D hidden of the decoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyengine import ops
from pyengine.errors import InvalidModelError
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Tensor
from pyengine.media.views import Limits, Processed, View
from pyengine.models.architecture import Encoder, EncoderFiles
from pyengine.models.encoders.clip import Tower, TowerConfig
from pyengine.nn.encoder import only_pictures, special_token
from pyengine.nn.layers import Linear

if TYPE_CHECKING:
    from pyengine.media.image import Image
    from pyengine.media.video import Video

LEAST = 14                           # pixels of the shorter side: transformers JanusImageProcessorPil.min_size
TOKENS = (("image", "<image_placeholder>"), ("image_start", "<begin_of_image>"), ("image_end", "<end_of_image>"))


class Vision(Encoder):
    """Encoder, projector and processor. Nothing about a picture is kept here."""

    def __init__(self, files: EncoderFiles):
        h, v, w, token = files
        c = TowerConfig.read(v, w)
        self.tower, d = Tower(w["v"], c, post_norm=True), h.size("embedding_length")
        self.least = v.size("vision.preproc_min_size", LEAST)
        if self.least > c.tile:
            raise InvalidModelError(f"{v.key('vision.preproc_min_size')} is {self.least} for squares of {c.tile} pixels")
        self.first, self.second = Linear(w["mm", 0], self.tower.width, d), Linear(w["mm", 1], d, d)
        marker, self.start, self.end = (special_token(v, name, token, text) for name, text in TOKENS)
        self.markers = {"image": (marker,)}

    def most_rows(self, n_ctx: int) -> int:
        """Return the rows of a picture."""
        return self.tower.config.side**2

    def n_rows(self, width: int, height: int) -> int:
        """Return the rows of a picture: as many for each size."""
        return self.most_rows(0)

    def declare(self, g: Graph, rows: int) -> Tensor:
        """Declare the rows [n, D] of "patches" [n, 3 * p * p]."""
        c = self.tower.config
        x = self.tower(g.input("patches", (c.side**2, 3 * c.patch**2)))                 # [n, V]
        return self.second(ops.unary(self.first(x), kind=c.act))                        # [n, D]

    def process(self, media: Image | Video, limits: Limits) -> Processed:
        """Turn a picture into one run over a padded square, between its tokens. Raises: RequestError for videos and options."""
        only_pictures(media)
        rows, tile = self.most_rows(limits.n_ctx), self.tower.config.tile
        view = View(lambda: {"patches": self.tower.patches(self._square(media.pixels))}, {}, np.arange(rows, dtype=np.int32)[None], rows)
        return Processed((self.start, view, self.end), media.size, (tile, tile))

    def _square(self, pixels: np.ndarray) -> np.ndarray:
        """Resize a picture, then pad it."""
        from pyengine.media.image import resize                                         # Pillow takes 20 ms to import

        c, (height, width) = self.tower.config, pixels.shape[:2]
        scale = c.tile / max(height, width)
        return self.tower.on_square(resize(pixels, max(round(height * scale), self.least), max(round(width * scale), self.least), c.resample))
