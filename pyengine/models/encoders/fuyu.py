"""Fuyu: no encoder, one product of each patch's pixels; pictures at their own size.

Adept's report has no paper. Follows transformers 5.23: `modeling_fuyu.py`, `image_processing_pil_fuyu.py`, `processing_fuyu.py`.

    picture -> shrunk into the largest size, never enlarged -> padded to whole patches, on the right and below
    prompt: a line of rows, |NEWLINE|, a line of rows, |NEWLINE| ..., <s>

The authors' prompts have one picture, which comes first, and end with the token <0x04>, with which an answer begins. Padding has the level
of the processor's `padding_value` (1) before pixels are normalized. Rows of a picture attend causally, and may be cut.
Axes: t patches; D hidden of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError
from pyengine.files.hparams import Hparams
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Dim, Tensor
from pyengine.media.views import Limits, Piece, Processed, View
from pyengine.models.architecture import Encoder, EncoderFiles
from pyengine.nn.encoder import by_table, cut_patches, levels, mean_and_std, only_pictures, resample_filter, special_token
from pyengine.nn.layers import Linear

if TYPE_CHECKING:
    from pyengine.media.image import Image
    from pyengine.media.video import Video

HALF, BILINEAR = (0.5, 0.5, 0.5), 2  # transformers FuyuImageProcessorPil: mean and deviation, Pillow's number of the filter


@dataclass(frozen=True)
class VisionConfig:
    """Numbers of the product and of the image processor, from the metadata."""

    d_out: int                       # of the decoder
    patch: int                       # side in pixels
    height: int                      # of a picture in pixels, at most
    width: int
    padding: int                     # the level of pixels beside a picture
    mean: np.ndarray
    std: np.ndarray
    resample: int

    @classmethod
    def read(cls, h: Hparams, v: Hparams) -> VisionConfig:
        """Read the keys "clip.*". Raises: InvalidModelError."""
        mean, std = mean_and_std(v, HALF, HALF)
        made = cls(d_out=h.size("embedding_length"), patch=v.size("vision.patch_size"), height=v.size("vision.preproc_image_height"),
                   width=v.size("vision.preproc_image_width"), padding=v.get("vision.padding_value", 1, int), mean=mean, std=std,
                   resample=resample_filter(v, BILINEAR))
        if made.height % made.patch or made.width % made.patch or not 0 <= made.padding < 256:
            raise InvalidModelError(f"{v.key('vision')}: pictures of up to {made.width} x {made.height} pixels with padding of {made.padding}: whole "
                                    f"patches of {made.patch} pixels and a level from 0 to 255 are needed")
        return made


class Vision(Encoder):
    """Product, processor and special tokens. Nothing about a picture is kept here."""

    several = False

    def __init__(self, files: EncoderFiles):
        h, v, w, token = files
        c = self.config = VisionConfig.read(h, v)
        self.markers = {"image": (special_token(v, "image", token, "|SPEAKER|"),)}
        self.line_end, self.end = special_token(v, "image_break", token, "|NEWLINE|"), special_token(v, "image_end", token, "<s>")
        self.levels = levels(c.mean, c.std)                                             # [3, 256]
        self.product = Linear(w["mm", 0], 3 * c.patch**2, c.d_out)

    def most_rows(self, n_ctx: int) -> int:
        """Return the rows of the largest picture, which the context must hold."""
        return min(n_ctx, self.config.height // self.config.patch * (self.config.width // self.config.patch))

    def declare(self, g: Graph, rows: int) -> Tensor:
        """Declare the rows [t, D] of "patches" [t, p * p * 3]."""
        return self.product(g.input("patches", (Dim("t", rows), 3 * self.config.patch**2)))

    # -- processor ------------------------------------------------------------------------------------------------------------

    def sizes(self, width: int, height: int) -> tuple[int, int]:
        """Compute (width, height) of a picture after its resize. Raises: RequestError for one of which less than a pixel remains."""
        c = self.config
        if width <= c.width and height <= c.height:
            return width, height
        scale = min(c.height / height, c.width / width)
        w, h = int(width * scale), int(height * scale)
        if not w or not h:
            raise RequestError(f"a picture of {width} x {height} pixels: shrunk into {c.width} x {c.height}, less than one pixel remains of "
                               "its shorter side; cut it")
        return w, h

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Compute (lines, columns) of a picture's patches."""
        w, h = self.sizes(width, height)
        return -(-h // self.config.patch), -(-w // self.config.patch)

    def n_rows(self, width: int, height: int) -> int:
        """Return the soft tokens of a picture of this size."""
        lines, columns = self.grid(width, height)
        return lines * columns

    def process(self, media: Image | Video, limits: Limits) -> Processed:
        """Turn a picture into patches and the tokens at the ends of their lines.

        Raises: ContextOverflowError if its rows exceed the context, RequestError; the latter also for videos and options.
        """
        only_pictures(media)
        width, height = media.size
        lines, columns = self.grid(width, height)
        rows = lines * columns
        if rows + lines + 1 > limits.n_ctx:
            raise ContextOverflowError(f"a picture of {width} x {height} pixels takes {rows + lines + 1} positions, but the context holds "
                                       f"{limits.n_ctx}; load with a larger n_ctx, or make the picture smaller")
        if rows > limits.rows:
            raise RequestError(f"a picture of {width} x {height} pixels takes {rows} soft tokens, but this model was planned for pictures of up "
                               f"to {limits.rows}; make it smaller, or load with images=({width}, {height})")
        places = np.arange(rows, dtype=np.int32)[None]
        view = View(lambda: {"patches": self._patches(media, lines, columns)}, {"t": rows}, places, rows, (1, lines, columns))
        parts: list[int | Piece] = []
        for line in range(lines):
            parts += [Piece(view, line * columns, (line + 1) * columns), self.line_end]
        return Processed((*parts, self.end), media.size, (columns * self.config.patch, lines * self.config.patch))

    def _patches(self, image: Image, lines: int, columns: int) -> np.ndarray:
        """Resize and pad a picture, and cut it: F32 [t, p * p * 3], the colours of a pixel together."""
        from pyengine.media.image import resize                                         # Pillow takes 20 ms to import

        c = self.config
        w, h = self.sizes(*image.size)
        pixels = image.pixels if (w, h) == image.size else resize(image.pixels, h, w, c.resample)
        canvas = np.full((lines * c.patch, columns * c.patch, 3), c.padding, np.uint8)
        canvas[:h, :w] = pixels
        x = by_table(self.levels, cut_patches(canvas, (lines, columns), c.patch))       # [t, 3, p * p]
        return np.ascontiguousarray(x.transpose(0, 2, 1)).reshape(len(x), -1)
