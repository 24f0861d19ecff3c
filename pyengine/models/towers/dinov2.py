"""DINOv2: ViT with a scale for each element of what layers add, gated feed-forwards in its largest size, and positions resized to the picture's grid.

Oquab et al. 2023, arXiv:2304.07193; Darcet et al. 2023, arXiv:2309.16588, for registers. Follows transformers 5.23 `modeling_dinov2.py`,
`modeling_dinov2_with_registers.py`, `image_processing_pil_bit.py`. The head of classes reads the class token beside the mean of the patches. Registers, "v.register_embd", stand
behind the class token. The token of masked patches is left out. Axes: n rows of a picture, D hidden.
"""

from __future__ import annotations

import numpy as np

from pyengine import ops
from pyengine.graph.tensor import Tensor
from pyengine.models.encoders.towers import rows_of
from pyengine.models.towers import vit


class Picture(vit.Picture):
    """The image encoder and its head of classes, where the file has one."""

    any_grid, parts = True, 2

    def summary(self, x: Tensor) -> Tensor:
        """Build what the head reads of the last hidden states [n, D]."""
        patches = ops.mean_rows(x, np.full(1, self.tower.front, np.int32), np.full(1, self.n, np.int32))     # [1, D]
        return ops.concat([rows_of(x, 0, 1), patches], axis=1)                             # [1, 2 D]


class Model(vit.Model):
    """A DINOv2 model."""

    kind = Picture
