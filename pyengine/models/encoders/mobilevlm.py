"""MobileVLM's encoder: CLIP over one padded square, and a projector that joins its rows by convolutions, a quarter of them for the decoder.

Papers arXiv:2312.16886 (MobileVLM, figure 3: LDP), arXiv:2402.03766 (MobileVLM V2, figure 3: LDPv2). Follows the authors'
`mobilevlm/model/vision_projector.py` and, for the blocks, torchvision's `InvertedResidual` of MobileNet V3.

    ldp     product, GELU, product -> block, added to its input -> block with a stride of 2
    ldpv2   product, GELU, product -> means of 2 x 2 rows -> convolution of each channel, added to its input
    block   convolution of each channel -> norm -> hard swish -> each channel times a gate of all rows (squeeze and excitation)
            -> product -> norm

Tensors have llama.cpp's names. differs from the authors: LDPv2 takes means of 2 x 2 rows, as llama.cpp does, where they ask for 12 x 12 rows,
which are the same for all their checkpoints. differs from llama.cpp: GELU is the exact one, as the authors'; pictures are resized by Pillow.
Axes: n rows of the encoder, s x s; V its width; D hidden of the decoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyengine import ops
from pyengine.errors import InvalidModelError
from pyengine.files.weights import Weights
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Tensor
from pyengine.media.views import Limits, Processed, View
from pyengine.models.architecture import Encoder, EncoderFiles
from pyengine.models.encoders.clip import Tower, TowerConfig
from pyengine.models.encoders.llava import MARKER
from pyengine.nn.convolution import DepthwiseConv, pointwise
from pyengine.nn.encoder import only_pictures, projector_type, special_token
from pyengine.nn.layers import LayerNorm, Linear

if TYPE_CHECKING:
    from pyengine.media.image import Image
    from pyengine.media.video import Video

WINDOW = 3                           # side of all convolutions
EPS = 1e-5                           # of the blocks' norms: timm's LayerNormAct2d


class Block:
    """MobileNet V3's block over a grid of rows, without its first product: stride 1 is added to its input, 2 leaves a quarter of the rows."""

    def __init__(self, w: Weights, d: int, stride: int):
        self.conv, self.conv_norm = DepthwiseConv(w["block", 0, 0], d, WINDOW, stride), LayerNorm(w["block", 0, 1], d, EPS)
        squeezed = w["block", 1, "fc1"].shape("weight")
        if not squeezed:
            raise InvalidModelError(f"{w.place}: block.1.fc1.weight is missing")
        self.squeeze, self.excite = pointwise(w["block", 1, "fc1"], d, squeezed[0]), pointwise(w["block", 1, "fc2"], squeezed[0], d)
        self.out, self.out_norm = pointwise(w["block", 2, 0], d, d), LayerNorm(w["block", 2, 1], d, EPS)
        self.added = stride == 1

    def __call__(self, x: Tensor) -> Tensor:                                            # [h, w, D]
        y = self.conv_norm(self.conv(x))
        h, w, d = (int(n) for n in y.shape)
        y = (y * hard_sigmoid(y)).reshape(-1, d)                                        # [h w, D], hard swish
        means = ops.adaptive_avg_pool2d(y.reshape(1, h, w, d), size=(1, 1)).reshape(1, d)
        y = y * hard_sigmoid(self.excite(ops.relu(self.squeeze(means))))
        y = self.out_norm(self.out(y)).reshape(h, w, d)
        return x + y if self.added else y


def hard_sigmoid(x: Tensor) -> Tensor:
    """Compute min(max(x / 6 + 1 / 2, 0), 1)."""
    y = ops.relu(ops.scale(x, factor=1 / 6, offset=0.5))
    return ops.binary(y, np.ones(1, np.float32), kind="min")


class Vision(Encoder):
    """Encoder, projector and processor. Nothing about a picture is kept here."""

    def __init__(self, files: EncoderFiles):
        h, v, w, token = files
        self.tower = Tower(w["v"], TowerConfig.read(v, w))
        self.side, d, mm = self.tower.config.side, h.size("embedding_length"), w["mm", "model"]
        self.second_kind = projector_type(v) == "ldpv2"
        try:
            self.markers = {"image": (special_token(v, "image", token, MARKER),)}
        except InvalidModelError:                                                       # MobileLLaMA's vocabulary has no token for pictures
            self.markers = {"image": ()}
        if self.second_kind:
            if self.side % 2:
                raise InvalidModelError(f"{v.key('vision')}: {self.side} x {self.side} patches have no means of 2 x 2")
            self.first, self.second = Linear(mm["mlp", 0], self.tower.width, d), Linear(mm["mlp", 2], d, d)
            self.conv = DepthwiseConv(mm["peg", 0], d, WINDOW)
        else:
            self.first, self.second = Linear(mm["mlp", 1], self.tower.width, d), Linear(mm["mlp", 3], d, d)
            self.blocks = [Block(mm["mb_block", i], d, stride=i) for i in (1, 2)]

    def most_rows(self, n_ctx: int) -> int:
        """Return the rows of a picture."""
        return (-(-self.side // 2)) ** 2

    def n_rows(self, width: int, height: int) -> int:
        """Return the rows of a picture: as many for each size."""
        return self.most_rows(0)

    def declare(self, g: Graph, rows: int) -> Tensor:
        """Declare the rows [s / 2 x s / 2, D] of "patches" [n, 3 * p * p]."""
        s = self.side
        x = self.tower(g.input("patches", (s**2, 3 * self.tower.config.patch**2)))       # [n, V]
        x = self.second(ops.gelu(self.first(x)))                                        # [n, D]
        d = int(x.shape[1])
        if self.second_kind:
            x = ops.avg_pool2d(x.reshape(1, s, s, d), kernel=(2, 2)).reshape(s // 2, s // 2, d)
            x = self.conv(x) + x
        else:
            x = x.reshape(s, s, d)
            for block in self.blocks:
                x = block(x)
        return x.reshape(-1, d)

    def process(self, media: Image | Video, limits: Limits) -> Processed:
        """Turn a picture into one run over a padded square. Raises: RequestError for videos and options."""
        only_pictures(media)
        rows, tile = self.most_rows(limits.n_ctx), self.tower.config.tile
        view = View(lambda: {"patches": self.tower.patches(self.tower.padded(media.pixels))}, {}, np.arange(rows, dtype=np.int32)[None], rows)
        return Processed((view,), media.size, (tile, tile))
