"""The contracts between an architecture's module and the engine: `Architecture`, a decoder, the `Encoder`s that stand beside it, and the
`SourceEncoder` in front of one; `Towers`, a model that makes vectors, labels and scores of texts and pictures.

Weights are bound once, when a model is made; nothing of it depends on sizes. What a plan decides (contexts, rows, the largest
picture) comes as arguments, so one model serves any number of plans. Nothing is assigned to these objects from outside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, TYPE_CHECKING

import numpy as np

from pyengine.cache.policy import Cross, Full, Policy
from pyengine.errors import UnsupportedModelError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Tensor
from pyengine.nn.ahead import Ahead
from pyengine.nn.batch import Batch, Source
from pyengine.nn.rope import Rope, Rotary
from pyengine.nn.text_encoder import TextHeads
from pyengine.nn.texts import CLASSES, HIDDEN, LOGITS, Texts, VECTORS
from pyengine.records import NamedTuple

if TYPE_CHECKING:
    from pyengine.media.image import Image
    from pyengine.media.video import Video
    from pyengine.media.views import Limits, Processed, View


class EncoderFiles(NamedTuple):
    """What encoders are bound from.

    text     keys of the decoder; keys: those of the encoder ("clip.*")
    weights  "v.*" and "mm.*"
    token    gives the id of a special token's text
    """

    text: Hparams
    keys: Hparams
    weights: Weights
    token: Callable[[str], int]


class Task(NamedTuple):
    """What a prompt asks that is a task's name: a sentence, in which "{input}" is what stands behind the name; and how the answer names
    places of the picture, one of the ways of `chat/regions`; "": it names none."""

    sentence: str
    regions: str = ""


class Encoder(ABC):
    """Pictures (later sounds, texts) to rows that a decoder reads.

    kind         "image", "audio" or "text"
    markers      ids that a chat template writes for one medium, by "image" or "video": all of them are what `Processed.parts` replaces;
                 none where the vocabulary has no token for them
    atomic_rows  most rows of a span that must not be cut at a batch boundary; 0 without such spans
    counts       what a picture becomes depends on whether the prompt has others
    leads        pictures stand before all of a text, the token that begins it included
    vocabulary   what stands before the keys of a vocabulary of its own, by which it reads a prompt's text (`Limits.words`); "": it reads none
    maps         names of the maps of attention that it can show, where a picture is one run; none of others
    several      a prompt may have more than one picture
    points       answers name places of a picture as points (`chat/boxes`)
    tasks        what prompts ask that are names of tasks; none of models that are asked in words
    ignored      labels of phrases that name nothing in a picture
    """

    kind: ClassVar[str] = "image"
    markers: Mapping[str, tuple[int, ...]]
    atomic_rows: int = 0
    counts: bool = False
    leads: ClassVar[bool] = False
    vocabulary: str = ""
    maps: tuple[str, ...] = ()
    several: ClassVar[bool] = True
    points: ClassVar[bool] = False
    tasks: ClassVar[Mapping[str, Task]] = MappingProxyType({})
    ignored: tuple[str, ...] = ()

    @abstractmethod
    def most_rows(self, n_ctx: int) -> int:
        """Return the most rows that one run can be asked for with contexts of n_ctx positions."""

    def across_rows(self, n_ctx: int) -> int:
        """Return the most rows of one picture that layers see across, where it takes several runs."""
        return self.most_rows(n_ctx)

    @abstractmethod
    def n_rows(self, width: int, height: int) -> int:
        """Return the rows of a picture of width x height pixels, at most."""

    @abstractmethod
    def process(self, media: Image | Video, limits: Limits) -> Processed:
        """Turn a medium into the encoder's runs and what stands around their rows, on the host.

        Raises: RequestError for what the model does not take, and beyond the limits; ContextOverflowError.
        """

    @abstractmethod
    def declare(self, graph: Graph, rows: int) -> Tensor:
        """Build the graph of one run of at most `rows` rows: declares the inputs that `View.inputs` names, returns F32 [rows, media_width]."""

    def declare_maps(self, graph: Graph, rows: int) -> list[Tensor]:
        """Build the same graph; returns those rows and, for each name of `maps`, F32 [heads, queries, keys] after softmax."""
        return [self.declare(graph, rows)]


class SourceEncoder(ABC):
    """Text, and what encoders made of pictures in it, to rows that all layers of a decoder see across.

    start   the id that the decoder begins with
    forced  ids that an answer begins with
    """

    start: int
    forced: tuple[int, ...] = ()

    @abstractmethod
    def forward(self, source: Source) -> Tensor:
        """Build the graph of a run; returns last hidden states F32 [m, d_model], after the final norm."""


class Architecture(ABC):
    """What a module's class `Model` offers to the engine.

    config         has n_layers, d_model, n_kv_heads, head_dim, vocab_size
    position_axes  rows of `batch.positions` (3 with M-RoPE)
    rope           the rotary embedding of queries and keys, where `ropes` is not written anew
    absolute       positions are added to embeddings: keys cannot be moved to others
    media_id       the id that stands for media rows in `batch.texts`
    ahead          a head that predicts further tokens, for drafts, where the file has one
    without        what of the file drafts elsewhere and is left out here, in words; "": nothing
    source         the encoder that prompts go to, of an encoder-decoder: pictures' rows too, and `Cross(everywhere=True)` layers see its rows
    """

    config: Any
    position_axes: ClassVar[int] = 1
    absolute: ClassVar[bool] = False
    media_id: int = 0
    source: SourceEncoder | None = None
    ahead: Ahead | None = None
    without: str = ""
    rope: Rotary

    @abstractmethod
    def __init__(self, h: Hparams, w: Weights):
        """Bind the weights. Raises: InvalidModelError, UnsupportedModelError."""

    @classmethod
    def encoders(cls, files: EncoderFiles) -> dict[str, Encoder]:
        """Bind the encoders that the files hold, by kind; none for an architecture without."""
        return {}

    @property
    def media_width(self) -> int:
        """Numbers of an encoder's row: those that stand for a token, and what layers get besides."""
        return self.config.d_model

    @property
    def n_ids(self) -> int:
        """Ids that a prompt may have: rows of the embedding, which may be more than those of the output head."""
        return self.config.vocab_size

    @abstractmethod
    def policies(self) -> list[Policy]:
        """Return what each layer's attention needs. The plan says how many encoder rows `Cross` holds."""

    def cache_shapes(self) -> list[tuple[int, int]]:
        """Return each layer's (key/value heads, elements of a head)."""
        return [(self.config.n_kv_heads, self.config.head_dim)] * self.config.n_layers

    def cache_owners(self) -> list[int]:
        """Return the number of the layer whose keys and values each layer reads: its own, or an earlier one's with the same policy and
        shape. Layers that read another one's have no cache."""
        return list(range(self.config.n_layers))

    def cached_layers(self) -> list[int]:
        """Return the layer that each cache belongs to, where a layer has several: it attends to itself and across. `policies`, `cache_shapes`,
        `cache_owners`, `ropes` and the caches of `forward` are lists by cache."""
        return list(range(self.config.n_layers))

    def ropes(self, n_ctx: int) -> list[Rope]:
        """Return the rotary embedding of each layer's keys: they can be rotated by further positions."""
        return [self.rope.at(n_ctx)] * self.config.n_layers

    @abstractmethod
    def forward(self, batch: Batch, caches: list[Any]) -> Tensor:
        """Build the graph of one step for all its rows; returns last hidden states [m, d_model], after the final norm.

        caches: a `LayerCache` each, None for layers that read another one's; for layers that attend across a `CrossCache`, or None
        without an encoder. Decoders that heads read more of tell `batch.noted` what each layer takes, `batch.left` how it leaves its cache.
        """

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Build the output head: last hidden states [l, d_model] to logits [l, vocab]."""


class EncoderDecoder(Architecture):
    """An architecture whose decoder's layers have two caches each: of the tokens before, and of its encoder's rows. Nothing rotates."""

    source: SourceEncoder

    def policies(self) -> list[Policy]:
        """Return what the two attentions of each layer need."""
        return [Full(), Cross(everywhere=True)] * self.config.n_layers

    def cached_layers(self) -> list[int]:
        """Return the layer of each cache."""
        return [i // 2 for i in range(2 * self.config.n_layers)]

    def cache_shapes(self) -> list[tuple[int, int]]:
        """Return (heads, elements of a head) of each cache."""
        return [(self.config.n_kv_heads, self.config.head_dim)] * (2 * self.config.n_layers)

    def cache_owners(self) -> list[int]:
        """Return the numbers of the caches: each is its own."""
        return list(range(2 * self.config.n_layers))

    def ropes(self, n_ctx: int) -> list[Rope]:
        """Return rotary embeddings that rotate nothing."""
        return [Rope(np.empty(0, np.float32), 1.0, False)] * (2 * self.config.n_layers)


class TextTower(ABC):
    """Texts to hidden states and what is made of them, without caches: each run reads whole texts.

    width      numbers of a last hidden state; d_out: of a vector
    n_ids      rows of the embedding; n_ctx: the longest text, in tokens
    pooling    what vectors are made of, one of `POOLINGS`; "head": by layers of the model's own
    causal     a row sees what stands before it only
    windows    widths of layers that see a window: so many rows on each side
    n_classes  scores of a text, 0 without such a head; n_logits: of a row that goes through the head of a masked model
    separators tokens between the parts of a pair; 0: one where the vocabulary is WordPiece, two elsewhere
    padded     where padding makes every text n_ctx tokens long, "left" or "right", for models that were trained to see it; "" elsewhere
    """

    width: int
    d_out: int
    n_ids: int
    n_ctx: int
    pooling: str
    causal: ClassVar[bool] = False
    windows: tuple[int, ...] = ()
    n_classes: int = 0
    n_logits: int = 0
    separators: ClassVar[int] = 0
    padded: str = ""

    def place(self, ids: Sequence[int]) -> int:
        """Return which of a text's positions stands for it: the first, or the last where the pooling is "last"."""
        return len(ids) - 1 if self.pooling == "last" else 0

    @abstractmethod
    def declare(self, texts: Texts) -> dict[str, Tensor]:
        """Build the graph of one run: HIDDEN [m, width] and, where the model has them, VECTORS [p, d_out] of texts, CLASSES [p, n_classes],
        LOGITS [l, n_logits] of the rows that are wanted."""


class SentenceTower(TextTower):
    """A text tower whose vectors, scores and logits are made by what stands in its file behind the layers. heads: that."""

    heads: TextHeads

    def hold(self, heads: TextHeads) -> None:
        """Keep what stands behind the layers."""
        self.heads, self.pooling, self.d_out = heads, heads.pooling, heads.d_out
        self.n_classes, self.n_logits = heads.n_classes, heads.n_logits

    def place(self, ids: Sequence[int]) -> int:
        """Return which of a text's positions stands for it."""
        return len(ids) - 1 if self.heads.rows == "last" else 0


class ImageTower(ABC):
    """Pictures to hidden states and what is made of them, one picture a run.

    width, d_out, n_classes, pooling: as of a `TextTower`
    """

    width: int
    d_out: int
    pooling: str
    n_classes: int = 0

    @abstractmethod
    def most_rows(self) -> int:
        """Return the most rows that a picture becomes."""

    @abstractmethod
    def n_rows(self, width: int, height: int) -> int:
        """Return the rows of a picture of width x height pixels, at most."""

    @abstractmethod
    def process(self, media: Image, limits: Limits) -> View:
        """Turn a picture into the inputs of a run, on the host. Raises: RequestError for what the model does not take."""

    @abstractmethod
    def declare(self, graph: Graph, rows: int) -> dict[str, Tensor]:
        """Build the graph of one run of at most `rows` rows: declares the inputs that `View.inputs` names; returns as `TextTower.declare`,
        of the one picture."""


class Towers(ABC):
    """What a module's class `Model` offers that makes vectors, labels and scores, and no text.

    text, image  None for a model without
    labels       names of the classes, as many as there are; () where the file names none
    independent  scores of labels are probabilities each for itself (a sigmoid), not together (a softmax)
    scores       what makes probabilities of the scores of its own classes: "softmax", "sigmoid" or "none"; "": as of labels
    """

    text: TextTower | None = None
    image: ImageTower | None = None
    labels: tuple[str, ...] = ()
    independent: bool = False
    scores: str = ""

    @abstractmethod
    def __init__(self, h: Hparams, w: Weights):
        """Bind the weights. Raises: InvalidModelError, UnsupportedModelError."""

    def read_texts(self, tower: SentenceTower) -> None:
        """Take a text tower with its classes."""
        self.text, self.labels, self.scores = tower, tower.heads.labels, tower.heads.scores

    @property
    def towers(self) -> dict[str, TextTower | ImageTower]:
        """Those that there are, by "text" and "image"."""
        return {kind: tower for kind, tower in (("text", self.text), ("image", self.image)) if tower is not None}

    def scale(self) -> tuple[float, float]:
        """Return (factor, bias) of the similarity of a picture and a text whose vectors have length 1. Reads the file.

        Raises: UnsupportedModelError for a model that compares none.
        """
        raise UnsupportedModelError("this model does not compare pictures with texts: it has no scale of similarities")
