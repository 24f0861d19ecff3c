"""CLIP: a text encoder and an image encoder whose vectors are compared (OpenAI's, OpenCLIP's, MetaCLIP 1 and 2).

Radford et al. 2021, arXiv:2103.00020. Follows transformers 5.23 `modeling_clip.py`, `image_processing_pil_clip.py`, `tokenization_clip.py`. Files are
clip.cpp's (github.com/monatis/clip.cpp), which may hold one of the encoders alone; further keys of ours:

    clip.text.hidden_act, clip.vision.hidden_act   transformers' name of the activation; without them "clip.use_gelu" says which of two
    clip.text.end_token_id                         texts are pooled where this token stands first; without it, at their highest id
    clip.vision.resize, clip.vision.crop           how pictures are prepared (see `Preparation`)

Old configurations say `eos_token_id` 2 and pool at the highest id, which is that of the end token in OpenAI's vocabulary. clip.cpp's files leave the scale
of similarities out: 100 is where training stopped it. Last hidden states of a picture have the class token and come before the last norm; the mean of their
patches goes through a head of classes, "cls.output", where a file has one in the place of the projection.
Axes: m rows of all texts, p texts, n rows of a picture, D hidden, V of vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pyengine.errors import InvalidModelError, UnsupportedModelError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Tensor
from pyengine.models.architecture import CLASSES, HIDDEN, Towers, VECTORS
from pyengine.models.encoders.towers import ClassHead, labels_of, PreNormText, rows_of, SquareImage
from pyengine.nn.layers import LayerNorm, Linear
from pyengine.nn.texts import HEAD, Texts

EPS = 1e-5                           # transformers' CLIPTextConfig, for files without the key
SCALE = math.log(100)                # the same of the logarithm of the scale: paper, section 2.5


def projection(w: Weights, width: int) -> Linear:
    """Bind a projection to vectors, without a bias."""
    shape = w.shape("weight")
    if shape is None or len(shape) != 2:
        raise InvalidModelError(f"{w.place}: 'weight' is no matrix of the file")
    return Linear(w, width, shape[0])


class Text(PreNormText):
    """The text encoder: each token sees those before it."""

    pooling, causal = HEAD, True

    def __init__(self, h: Hparams, w: Weights):
        super().__init__(h, w, act="gelu" if h.get("use_gelu", False, bool) else "quick_gelu", eps=EPS)
        self.projection = projection(w["text_projection"], self.width)
        self.d_out = int(self.projection.weight.shape[0])
        self.end = h.get("text.end_token_id", None, int)

    def place(self, ids: Sequence[int]) -> int:
        """Return where the end token stands first, or the first of the highest ids."""
        return int(np.argmax(np.asarray(ids) if self.end is None else np.asarray(ids) == self.end))

    def declare(self, texts: Texts) -> dict[str, Tensor]:
        """Build the graph of one run."""
        x = self.states(texts)                                                             # [m, D]
        return {HIDDEN: x, VECTORS: self.projection(texts.pooled(x, "eos"))}               # [p, V]


class Picture(SquareImage):
    """The image encoder: vectors are made of the class token's row."""

    pooling = HEAD

    def __init__(self, h: Hparams, w: Weights):
        super().__init__(h, w, post_norm=False)
        self.post = LayerNorm(w["v", "post_ln"], self.width, self.eps)
        self.projection = projection(w["visual_projection"], self.width)
        self.d_out = int(self.projection.weight.shape[0])

    def declare(self, g: Graph, rows: int) -> dict[str, Tensor]:
        """Build the graph of one run."""
        x = self.states(g)                                                                 # [n, D]
        return {HIDDEN: x, VECTORS: self.projection(self.post(rows_of(x, 0, 1)))}          # [1, V]


class ClassedPicture(SquareImage):
    """The image encoder with a head of classes."""

    pooling = HEAD

    def __init__(self, h: Hparams, w: Weights):
        super().__init__(h, w, post_norm=False)
        self.d_out, self.head = self.width, ClassHead(w["cls", "output"], self.width)
        self.n_classes = self.head.n_classes

    def declare(self, g: Graph, rows: int) -> dict[str, Tensor]:
        """Build the graph of one run."""
        x = self.states(g)                                                                 # [n, D]
        return {HIDDEN: x, CLASSES: self.head.of_mean(x, np.full(1, self.tower.front, np.int32), np.full(1, self.n, np.int32))}


class Model(Towers):
    """A CLIP model, or one of its encoders."""

    def __init__(self, h: Hparams, w: Weights):
        if "cls" in w:
            self.image = ClassedPicture(h, w)
            self.labels = labels_of(h, self.image.n_classes)
            return
        texts, pictures = h.get("has_text_encoder", False, bool), "visual_projection" in w
        if not (texts or pictures):
            raise UnsupportedModelError("architecture 'clip' is not supported where a file has an encoder and a projector for another model: "
                                        "load that model, with this file as mmproj")
        self.text = Text(h, w) if texts else None
        self.image = Picture(h, w) if pictures else None
        if self.text and self.image and self.text.d_out != self.image.d_out:
            raise InvalidModelError(f"vectors of texts have {self.text.d_out} numbers, those of pictures {self.image.d_out}")
        self.logit_scale = w.optional("logit_scale", (1,))

    def scale(self) -> tuple[float, float]:
        """Return the factor of similarities, and 0."""
        if not (self.text and self.image):
            return super().scale()
        return math.exp(SCALE if self.logit_scale is None else float(self.logit_scale.floats()[0])), 0.0
