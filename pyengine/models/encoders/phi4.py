"""Phi-4-reasoning-vision's encoder: SigLIP 2 over the patches of a picture's own shape (NaFlex), two products with a GELU between.

Paper arXiv:2502.14786 (SigLIP 2). Follows the authors' remote code (`Siglip2ImageProcessorNoUpscale`, `processing_phi4_visionr.py`) with
transformers 5.23's `modeling_siglip2.py`, `image_processing_pil_siglip2.py`.

    picture -> its whole patches counted, from 256 to 3600 -> the largest size of its shape with at most as many -> encoder -> projector
    prompt: rows, nothing around them

The square grid of position embeddings is interpolated to a picture's (bilinear, smoothed where it shrinks): a product, as weights do not
depend on embeddings. Rows are taken behind the last layer but one; files hold no further layers. differs from llama.cpp, which keeps the
sides of a picture whose number of patches fits, and interpolates positions and GELU otherwise.
Axes: n patches, which are rows; V hidden; D hidden of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pyengine import ops
from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import DerivedRef, Weights
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Dim, Tensor
from pyengine.media.views import Limits, Processed, View
from pyengine.models.architecture import Encoder, EncoderFiles
from pyengine.nn.encoder import (
    by_table, common, cut_patches, EncoderBlock, EncoderConfig, levels, only_pictures, special_token, whole_option)
from pyengine.nn.grids import largest_grid, triangles
from pyengine.nn.layers import constant, Linear, PatchEmbedding

if TYPE_CHECKING:
    from pyengine.media.image import Image
    from pyengine.media.video import Video

HALF, BILINEAR = (0.5, 0.5, 0.5), 2  # transformers Siglip2ImageProcessorPil: mean and deviation, Pillow's number of the filter
EPS = 1e-6


@dataclass(frozen=True)
class VisionConfig(EncoderConfig):
    """Numbers of one encoder, its projector and its image processor, from the metadata."""

    side: int                        # of the position embeddings' grid
    least: int                       # patches of a picture
    most: int

    @classmethod
    def read(cls, h: Hparams, v: Hparams, w: Weights) -> VisionConfig:
        """Read the keys "clip.*". Raises: InvalidModelError, UnsupportedModelError."""
        patch = v.size("vision.patch_size")
        least, most = (v.size(f"vision.image_{name}_pixels") // patch**2 for name in ("min", "max"))
        if not 1 <= least <= most:
            raise InvalidModelError(f"{v.key('vision')}: pictures of {least} to {most} patches")
        return cls(
            **common(h, v, w, gelu="gelu_pytorch_tanh", eps=EPS, colours=(HALF, HALF), resample=BILINEAR),
            side=v.size("vision.image_size") // patch, least=least, most=most)


class Vision(Encoder):
    """Encoder, projector and processor. Nothing about a picture is kept here."""

    def __init__(self, files: EncoderFiles):
        h, v, w, token = files
        c = self.config = VisionConfig.read(h, v, w)
        try:
            self.markers = {"image": (special_token(v, "image", token, "<image>"),)}
        except InvalidModelError:                                                       # the authors' vocabulary has no token for pictures
            self.markers = {"image": ()}
        self.levels = levels(c.mean, c.std)                                             # [3, 256]
        v_, mm = w["v"], w["mm"]
        self.patch = PatchEmbedding(v_["patch_embd"], c.width, 3, c.patch)
        position = v_["position_embd"].tensor("weight", (c.side**2, c.width))
        self.position = constant(DerivedRef(position.name, (c.width, c.side**2), (position,), lambda a: a.T))
        self.blocks = [EncoderBlock(v_["blk", i], c) for i in range(c.n_layers)]
        self.first, self.second = Linear(mm[0], c.width, c.d_out), Linear(mm[2], c.d_out, c.d_out)

    def most_rows(self, n_ctx: int) -> int:
        """Return the rows of the largest picture, which the context must hold."""
        return min(n_ctx, self.config.most)

    def grid(self, width: int, height: int, most: int) -> tuple[int, int]:
        """Compute (lines, columns) of a picture's patches."""
        c = self.config
        own = max(width // c.patch * (height // c.patch), 1)
        return largest_grid(width, height, c.patch, max(min(own, most), min(c.least, most)))

    def n_rows(self, width: int, height: int) -> int:
        """Return the soft tokens of a picture of this size."""
        lines, columns = self.grid(width, height, self.config.most)
        return lines * columns

    def declare(self, g: Graph, rows: int) -> Tensor:
        """Declare the rows [n, D] of "patches" [n, 3 * p * p], with weights of all position embeddings for each."""
        c, n = self.config, Dim("n", rows)
        lo, hi = (g.input(name, (n,), "I32") for name in ("lo", "hi"))
        x = self.patch(g.input("patches", (n, 3 * c.patch**2)))                         # [n, V]
        x = x + ops.linear(g.input("blend", (n, c.side**2)), [self.position])[0]
        for block in self.blocks:
            x = block(x, lo, hi)
        return self.second(ops.gelu(self.first(x)))                                     # [n, D]

    # -- processor ------------------------------------------------------------------------------------------------------------

    def process(self, media: Image | Video, limits: Limits) -> Processed:
        """Turn a picture into the encoder's inputs.

        Option: max_num_patches. Raises: ContextOverflowError if its rows exceed the context, RequestError; the latter also for videos and
        other options.
        """
        only_pictures(media, "max_num_patches")
        width, height = media.size
        lines, columns = self.grid(width, height, whole_option(media, "max_num_patches", self.config.most))
        rows = lines * columns
        if rows > limits.n_ctx:
            raise ContextOverflowError(f"a picture of {width} x {height} pixels takes {rows} positions, but the context holds {limits.n_ctx}; "
                                       "load with a larger n_ctx, or give a smaller max_num_patches")
        if rows > limits.rows:
            raise RequestError(f"a picture of {width} x {height} pixels takes {rows} soft tokens, but this model was planned for pictures of up to "
                               f"{limits.rows}; give a smaller max_num_patches, or load with images=({width}, {height})")
        places = np.arange(rows, dtype=np.int32)[None]
        view = View(lambda: self._inputs(media, lines, columns), {"n": rows}, places, rows, (1, lines, columns))
        return Processed((view,), media.size, (columns * self.config.patch, lines * self.config.patch))

    def _inputs(self, image: Image, lines: int, columns: int) -> dict[str, np.ndarray]:
        """Resize a picture, cut it, and weigh the position embeddings."""
        from pyengine.media.image import resize                                         # Pillow takes 20 ms to import

        c, n = self.config, lines * columns
        x = cut_patches(resize(image.pixels, lines * c.patch, columns * c.patch, c.resample), (lines, columns), c.patch)
        blend = np.einsum("ya,xb->yxab", triangles(c.side, lines), triangles(c.side, columns)).reshape(n, c.side**2)
        lo, hi = np.zeros(n, np.int32), np.full(n, n, np.int32)
        return {"patches": by_table(self.levels, x).reshape(n, -1), "blend": blend, "lo": lo, "hi": hi}
