"""What text encoders of several architectures share: layers over several texts, and what stands behind the last hidden states.

Axes: m rows of all texts, p texts, l rows that go through the head of a masked model, D hidden, H heads, E head size, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyengine import ops
from pyengine.dtype import dtype as dtype_of
from pyengine.errors import InvalidModelError, UnsupportedModelError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.tensor import Tensor
from pyengine.nn.encoder import products_of
from pyengine.nn.layers import constant, Embedding, LayerNorm, Linear
from pyengine.nn.texts import CLASSES, HEAD, HIDDEN, LOGITS, pooling_of, POOLINGS, Texts, VECTORS

SCORES = "softmax", "sigmoid", "none"        # what makes probabilities of a head's scores
DENSE = "dense_2", "dense_3", "dense_4"      # llama.cpp's names of sentence-transformers' layers behind the pooling
BETWEEN = "none", "tanh", "relu", "gelu", "silu", "sigmoid"       # their activations, kinds of `ops.unary`

Rotate = Callable[[Tensor], Tensor]


def table(w: Weights, name: str) -> tuple[int, int]:
    """Return the shape of an embedding's matrix [n, width], of whose rows no key can be relied on. Raises: InvalidModelError."""
    shape = w[name].shape("weight")
    if shape is None or len(shape) not in (1, 2):
        raise InvalidModelError(f"{w.place}: '{name}.weight' is no matrix of the file")
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def one_of(h: Hparams, name: str, usual: str, known: Sequence[str]) -> str:
    """Read a word that must be one of those that are known; `usual` without the key. Raises: UnsupportedModelError."""
    found = h.get(name, usual, str)
    if found not in known:
        raise UnsupportedModelError(f"{h.key(name)} is {found!r}; {', '.join(known)} are supported")
    return found


class PartEmbedding:
    """Which part of a pair a row belongs to: a row of a table [n, D] is added to it; where the table has one row, to all."""

    def __init__(self, w: Weights, width: int):
        n, _ = table(w, "token_types")
        self.rows = Embedding(w["token_types"], n, width) if n > 1 else None
        self.all = constant(w["token_types"].tensor("weight", (width,)), dtype_of("F32")) if n == 1 else None

    def __call__(self, x: Tensor, texts: Texts) -> Tensor:                                 # [m, D]
        return x + self.rows(texts.types) if self.rows else x + self.all


class TextAttention:
    """Attention of each row to all of its text, or to what is near. In a file q, k and v may be one matrix.

    window   how many rows on each side are seen; 0: the whole text
    """

    def __init__(self, w: Weights, width: int, n_heads: int, window: int = 0):
        self.n_heads, self.window, self.head_dim = n_heads, window, width // n_heads
        parts = (Linear.several(w["attn_qkv"], width, (width,) * 3) if "attn_qkv" in w
                 else [Linear(w[name], width, width) for name in ("attn_q", "attn_k", "attn_v")])
        self.q, self.k, self.v = parts
        self.out = Linear(w["attn_output"], width, width)
        self.products = products_of(*parts, self.out)

    def __call__(self, x: Tensor, texts: Texts, rotate: Rotate | None = None, **more: Any) -> Tensor:       # [m, D] -> [m, D]
        """Attend. rotate: what is done to queries and keys [m, H, E]; more: arguments of `ops.attention`."""
        q, k, v = (part(x).reshape(-1, self.n_heads, self.head_dim) for part in (self.q, self.k, self.v))   # [m, H, E] each
        q, k = (rotate(q), rotate(k)) if rotate else (q, k)
        products = "float" if more else self.products                                      # those of bytes take nothing else
        return self.out(texts.attend(q, k, v, scale=self.head_dim**-0.5, window=self.window, products=products, **more))


class PostNormBlock:
    """Attention and feed-forward, each added to its input and then normalized. gated: the feed-forward has a third matrix; mixture: what stands in its
    place."""

    def __init__(self, w: Weights, sizes: tuple[int, int, int], eps: float, act: str, gated: bool = False, mixture: Callable[[Tensor], Tensor] | None = None):
        """Bind the weights. sizes: (D, F, H); act: of `ops.unary`."""
        d, d_ff, n_heads = sizes
        self.attention = TextAttention(w, d, n_heads)
        self.norm1, self.norm2 = LayerNorm(w["attn_output_norm"], d, eps), LayerNorm(w["layer_output_norm"], d, eps)
        self.mixture, self.act = mixture, act
        if mixture is None:
            self.gate = Linear(w["ffn_gate"], d, d_ff) if gated else None
            self.up, self.down = Linear(w["ffn_up"], d, d_ff), Linear(w["ffn_down"], d_ff, d)

    def __call__(self, x: Tensor, texts: Texts, rotate: Rotate | None = None, **more: Any) -> Tensor:       # [m, D]
        x = self.norm1(x + self.attention(x, texts, rotate, **more))
        return self.norm2(x + self.feed_forward(x))

    def feed_forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward: x [m, D] -> [m, D]"""
        if self.mixture is not None:
            return self.mixture(x)
        if self.gate is None:
            return self.down(ops.unary(self.up(x), kind=self.act))
        return self.down(ops.unary(self.gate(x), kind=self.act) * self.up(x))


class MaskedHead:
    """Logits of the tokens of rows: norm(act(dense x)), then a matrix that the embedding shares where the file has none."""

    def __init__(self, w: Weights, width: int, eps: float, act: str):
        n, inner = table(w, "token_embd")
        self.dense, self.norm, self.act = Linear(w["mlm.dense"], width, inner), LayerNorm(w["mlm.norm"], inner, eps, biased=None), act
        own = w["mlm.output"]
        self.output = Linear.of((own if "weight" in own else w["token_embd"]).tensor("weight", (n, inner)), own.optional("bias", (n,)))
        self.n = n

    def __call__(self, x: Tensor) -> Tensor:                                               # [l, D] -> [l, n]
        return self.output(self.norm(ops.unary(self.dense(x), kind=self.act)))


class ClassHead:
    """Scores of a text's one row: output(norm(act(dense x))), of which dense and norm may be missing (llama.cpp's `cls`)."""

    def __init__(self, w: Weights, width: int, eps: float, act: str):
        shape = w["cls.output"].shape("weight")
        self.n = 1 if shape is None or len(shape) == 1 else shape[0]
        self.output = Linear(w["cls.output"], width, self.n)
        self.dense, self.act = Linear(w["cls"], width, width) if "cls.weight" in w else None, act
        self.norm = LayerNorm(w["cls.norm"], width, eps, biased=None) if "cls.norm.weight" in w else None

    def __call__(self, x: Tensor) -> Tensor:                                               # [p, D] -> [p, n]
        x = ops.unary(self.dense(x), kind=self.act) if self.dense else x
        return self.output(self.norm(x) if self.norm else x)


class TextHeads:
    """What is made of the last hidden states, as the file has it: vectors of texts, scores of their classes, logits of their tokens.

    pooling   what vectors are made of: one of `POOLINGS`; HEAD where layers stand behind the pooling; "" where there are none
    labels    names of the classes; scores: what makes probabilities of them
    """

    def __init__(self, h: Hparams, w: Weights, width: int, *, act: str = "gelu", eps: float = 1e-12, class_act: str = "tanh", usual: str = "mean"):
        """Bind the weights. act, eps: of the head of a masked model; class_act: of that of classes; usual: pooling of a file that says none.

        Raises: UnsupportedModelError for a pooling that is not known; InvalidModelError.
        """
        said = pooling_of(h)
        if said not in ("", "rank", *POOLINGS[:3]):
            raise UnsupportedModelError(f"{h.key('pooling_type')} is {said}; {', '.join(POOLINGS[:3])} and rank are supported")
        self.classes = ClassHead(w, width, eps, one_of(h, "classifier.hidden_act", class_act, BETWEEN)) if "cls.output" in w else None
        self.masked = MaskedHead(w, width, eps, act) if "mlm" in w else None
        self.classes_of = pooling_of(h, "classifier.pooling_type") or "cls"
        self.rows = said if said != "rank" else ""
        if not self.rows and not self.classes:
            self.rows = usual
        self.dense, self.d_out = self._layers(h, w, width)
        self.pooling = HEAD if self.dense else self.rows
        self.n_classes, self.n_logits = self.classes.n if self.classes else 0, self.masked.n if self.masked else 0
        self.labels = self._labels(h)
        self.scores = one_of(h, "classifier.activation", "sigmoid" if self.n_classes == 1 else "softmax", SCORES)

    def _layers(self, h: Hparams, w: Weights, width: int) -> tuple[list[tuple[Linear, str]], int]:
        """Bind what stands behind the pooling, and what each applies to its result."""
        found = []
        for name in DENSE:
            if name in w:
                shape, act = w[name].shape("weight"), one_of(h, f"{name}_activation", "none", BETWEEN)
                if shape is None or len(shape) != 2 or shape[1] != width:
                    raise InvalidModelError(f"{w.place}: '{name}.weight' has shape {shape}: {width} columns are needed")
                found.append((Linear(w[name], width, shape[0]), act))
                width = shape[0]
        return found, width

    def _labels(self, h: Hparams) -> tuple[str, ...]:
        """Read the names of the classes. Raises: InvalidModelError where they are not as many as there are scores."""
        labels = tuple(h.get("classifier.output_labels", [], list)) if self.classes else ()
        if labels and (len(labels) != self.n_classes or not all(isinstance(label, str) for label in labels)):
            raise InvalidModelError(f"{h.key('classifier.output_labels')} has {len(labels)} labels for {self.n_classes} scores")
        return labels

    def __call__(self, texts: Texts, x: Tensor) -> dict[str, Tensor]:                      # [m, D]
        """Return the outputs of a run: those of `TextTower.declare`."""
        outputs = {HIDDEN: x}
        if self.rows:
            y = texts.pooled(x, self.rows)                                                 # [p, D]
            for layer, act in self.dense:
                y = layer(y) if act == "none" else ops.unary(layer(y), kind=act)
            outputs[VECTORS] = y                                                           # [p, d_out]
        if self.classes:
            outputs[CLASSES] = self.classes(texts.pooled(x, self.classes_of))
        if self.masked:
            outputs[LOGITS] = self.masked(ops.rows(x, texts.wanted))                       # [l, n]
        return outputs
