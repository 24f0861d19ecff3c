"""A loaded model that makes vectors, labels and scores of texts and pictures, and writes nothing: BERT, CLIP, SigLIP and their kin.

Texts go side by side into runs of the text encoder, without padding; a picture is a run of its own.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyengine.arguments import iterates, switch, takes
from pyengine.backends.base import Progress
from pyengine.engine.language import Language, ReadsText
from pyengine.engine.closed import Closed, weights_in_words
from pyengine.engine.model import Model
from pyengine.engine.prompts import media_of, token_ids
from pyengine.engine.ranks import check_asked, Ranked
from pyengine.engine.vectors import unit
from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError, shown, UnsupportedModelError
from pyengine.files.hparams import Hparams
from pyengine.media.views import Limits
from pyengine.memory.held import forget, Held, planned_bytes, register
from pyengine.memory.plan import MemoryPlan
from pyengine.memory.towers import TowersLayout
from pyengine.models.architecture import CLASSES, HIDDEN, ImageTower, LOGITS, TextTower, VECTORS
from pyengine.nn.texts import HEAD, POOLINGS
from pyengine.programs.encoder import fill
from pyengine.programs.towers import Text, TextRun
from pyengine.text.tokenizer import Tokenizer

class Given(NamedTuple):
    """What a run gave of one text or picture: hidden states [n, width], and its own row of each other output, by name."""

    hidden: np.ndarray
    rows: Mapping[str, np.ndarray]
    at: int


def shares(a: int, b: int, room: int) -> tuple[int, int]:
    """Return how many tokens of two texts of a and b tokens stay where there is room for so many: the longer one loses first (`longest_first` of
    `tokenizers`, utils/truncation.rs)."""
    if a + b <= room:
        return a, b
    low = min(a, b)
    high = max(low, room - low) if low <= room else low
    if low + high > room:
        low, high = room // 2, room - room // 2
    return (low, high) if a <= b else (high, low)


def told_apart(names: Sequence[str]) -> list[str]:
    """Return names of classes of which no two are the same: those that several have, or none, get the class's number."""
    times = Counter(names)
    return [f"class {i}" if not name else name if times[name] == 1 else f"{name} (class {i})" for i, name in enumerate(names)]


def is_text(x: Any) -> bool:
    """Say whether an input is a text, or token ids, and no picture."""
    return isinstance(x, str) or isinstance(x, (list, tuple)) and all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in x)


def _named(name: str, make: Callable[..., Any], *of: Any) -> Any:
    """Return what is made of an input; what refuses it says its name, if it has one."""
    try:
        return make(*of)
    except (RequestError, ContextOverflowError) as error:
        if not name:
            raise
        raise type(error)(f"{name}: {error}") from error


class EncoderModel(ReadsText):
    """A model of a text encoder, an image encoder, or both. Made by `load`; `with` closes it at its end.

    n_ctx  the longest text, in tokens; 0 for a model of pictures only
    Several threads may use it: each run waits for the one before it.
    """

    writes = False                   # text, as a `Model` does
    n_seq = 1                        # what else a `Model` has, for those that look at either: nothing here is kept between requests
    media = None

    def __init__(self, layout: TowersLayout, plan: MemoryPlan, progress: Progress | None = None):
        bound = layout.bound
        self.plan, self.closed, self.n_ctx = plan, False, layout.n_ctx
        self._files, self.file, self.towers = bound.files, bound.files.model, bound.model
        self._lock = threading.RLock()
        self._language = Language(self.file.metadata, bound.files.modelfile)
        self._programs = {kind: p.prepared.load(progress) for kind, p in layout.programs.items()}
        self._rows = {kind: p.rows for kind, p in layout.programs.items()}
        self._names = {kind: p.names for kind, p in layout.programs.items()}
        text = self.towers.text
        self._texts = TextRun(text, self._programs["text"], self._names["text"], self._rows["text"]) if text else None
        self._counts = {"prompt_tokens": 0, "steps": 0}
        self._title = f"{bound.files.name}: {Hparams(self.file.metadata).arch}, {weights_in_words(bound.files.opened)} weights"
        register(self)

    def __repr__(self) -> str:
        reads = " and ".join({"text": "text", "image": "pictures"}[kind] for kind in self._rows)
        return f"EncoderModel({self._title}, {'closed' if self.closed else f'reads {reads}'})"

    def __enter__(self) -> EncoderModel:
        if self.closed:
            raise RequestError(f"{self.plan.model} is closed")
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(Model, name):
            raise UnsupportedModelError(f"{self.plan.model} makes vectors and scores and writes no text: it has no {name!r}")
        raise AttributeError(f"'EncoderModel' has no attribute {name!r}")

    def close(self) -> None:
        """Release the memory of the weights, and the files. Every later use is a RequestError; a closed model may be closed again."""
        with self._lock:
            if not self.closed:
                gone: Any = Closed(self.plan.model)
                self.closed = True
                self.file = self.towers = self._files = self._language = self._programs = self._texts = gone
                forget(self)

    def held(self) -> Held | None:
        """Return what the model holds by its plan and how much of that is resident; None once it is closed."""
        programs = self._programs
        if self.closed or isinstance(programs, Closed):
            return None
        planned = planned_bytes(self.plan)
        return Held(self.plan.model, planned, {**planned, "cpu": sum(p.resident() for p in programs.values())})

    @property
    def adapters(self) -> dict[str, float]:
        """There are none: they are for decoders."""
        return {}

    @property
    def stats(self) -> dict[str, int]:
        """Counts since the model was loaded: tokens (of pictures, rows) and runs."""
        return dict(self._counts)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, built from the file when it is first needed. Raises: RequestError for a model of pictures only."""
        self._tower("text")
        return self._language.tokenizer

    # -- texts --------------------------------------------------------------------------------------------------------

    def _tower(self, kind: str) -> Any:
        """Return a tower. Raises: RequestError for one that the model has not, or was loaded without."""
        if kind not in self._rows:
            raise RequestError(f"{self.plan.model} reads {'pictures' if kind == 'text' else 'text'} only, and this is a {'text' if kind == 'text' else 'picture'}")
        return getattr(self.towers, kind)

    def _text(self, x: Any, cut: bool = False, before: str = "") -> Text:
        """Tokenize a text, behind what stands before it, or take token ids as they are. Texts are shortened to what the file says; cut: to
        what there is room for too. Raises: RequestError, ContextOverflowError."""
        tower: TextTower = self._tower("text")
        if not isinstance(x, str):
            ids = token_ids(x, tower.n_ids)
            return self._fitting(Text(tuple(ids), len(ids)), self.n_ctx if cut else 0)
        ids, most = self.tokenize(before + x), self._language.prefixes.max_tokens
        if tower.padded:
            filling = [self._padding] * (self.n_ctx - len(ids))
            ids = [*filling, *ids] if tower.padded == "left" else [*ids, *filling]
        return self._fitting(Text(tuple(ids), len(ids)), min(most or self.n_ctx, self.n_ctx) if most or cut else 0)

    @property
    def _padding(self) -> int:
        found = self.tokenizer.pad_id if self.tokenizer.pad_id is not None else self.tokenizer.eos_id
        if found is None:
            raise InvalidModelError(f"{self.file.path}: tokenizer.ggml.padding_token_id: is missing, and the model reads texts with padding")
        return found

    def _fitting(self, text: Text, most: int) -> Text:
        """Return a text, shortened to the most tokens, of which its end token is one; 0: not shortened. Raises: RequestError, ContextOverflowError."""
        n, ids = len(text.ids), text.ids
        if n == 0:
            raise RequestError("a text without tokens has no hidden states")
        if most and n > most:
            end = ids[-1:] if [ids[-1]] == self.tokenize("")[-1:] else ()
            ids = (*ids[: most - len(end)], *end)
            return Text(ids, len(ids))
        if n > self.n_ctx:
            raise ContextOverflowError(f"a text of {n} tokens is longer than the {self.n_ctx} that the model was loaded for")
        return text

    def _pair(self, first: Sequence[int], second: Sequence[int]) -> Text:
        """Put two texts together as the model reads pairs; the longer one is shortened first, both where that is not enough."""
        begin, end = (around := self.tokenize(""))[:-1], around[-1:]
        between = end * (self.towers.text.separators or (1 if self.tokenizer.model == "bert" else 2))
        room = min(self._language.prefixes.max_tokens or self.n_ctx, self.n_ctx) - len((*begin, *between, *end))
        n = shares(len(first), len(second), room)
        ids = (*begin, *first[: n[0]], *between, *second[: n[1]], *end)
        return Text(ids, len(ids) - len(end) - n[1])

    def _run_texts(self, texts: Iterable[Text]) -> Iterator[Given]:
        """Compute texts, as many at once as a run holds; in order."""
        waiting: list[Text] = []
        for text in texts:
            if waiting and not self._texts.fits(waiting, text):
                yield from self._run_these(waiting)
                waiting = []
            waiting.append(text)
        if waiting:
            yield from self._run_these(waiting)

    def _run_these(self, texts: list[Text]) -> list[Given]:
        with self._lock:
            run = self._texts
            run.run(texts)
            self._count(sum(len(t.ids) for t in texts))
            given, row = [], 0
            others = [name for name in run.numbers if name not in (HIDDEN, LOGITS)]
            for i, text in enumerate(texts):
                n = len(text.ids)
                own = {name: run.read(name, i, 1)[0].copy() for name in others}
                given.append(Given(run.read(HIDDEN, row, n).copy(), own, self.towers.text.place(text.ids)))
                row += n
            return given

    def _count(self, n: int) -> None:
        self._counts["prompt_tokens"] += n
        self._counts["steps"] += 1

    # -- pictures -----------------------------------------------------------------------------------------------------

    def _picture(self, x: Any) -> Given:
        """Compute a picture. Raises: ImageError, RequestError."""
        if x is None or isinstance(x, (bool, int, float, complex, np.generic, Mapping)):
            raise RequestError(f"a text or a picture was expected, not {type(x).__name__}; token ids are a list")
        if isinstance(x, (list, tuple)) and self.towers.text is not None:
            raise RequestError(f"a list in place of a text is its token ids, all of them ints, got {shown(x)}")
        tower: ImageTower = self._tower("image")
        view = tower.process(media_of(x, "image"), Limits(0, self._rows["image"]))
        n = view.positions.shape[1]
        if n > self._rows["image"]:
            raise RequestError(f"a picture of {n} rows exceeds the {self._rows['image']} that this model was planned for; make it smaller, "
                               "or load with images=(width, height) of the largest one")
        with self._lock:
            program, names = self._programs["image"], self._names["image"]
            fill(program, view)
            program.execute(**view.axes)
            self._count(n)
            read = {name: program.read(i, 0, n if name == HIDDEN else 1).copy() for i, name in enumerate(names)}
            return Given(read[HIDDEN], {name: rows[0] for name, rows in read.items() if name != HIDDEN}, 0)

    def _reads(self, x: Any) -> bool:
        """Say whether an input is a text or its ids: a path is a picture to a model that reads no texts."""
        return is_text(x) and not (isinstance(x, str) and self.towers.text is None)

    # -- what is made of them -----------------------------------------------------------------------------------------

    def read(self, items: Sequence[Any], cut: bool = False, name: Callable[[int], str] | None = None) -> list[Given]:
        """Compute texts, token ids and pictures, in order; texts share runs. cut: shorten texts that are too long; name: what errors call an input.

        Raises: ContextOverflowError, RequestError, ImageError.
        """
        found = dict(self._each(items, cut, name=name))
        return [found[i] for i in range(len(items))]

    def _each(self, items: Sequence[Any], cut: bool = False, before: str = "", name: Callable[[int], str] | None = None) -> Iterator[tuple[int, Given]]:
        """Do what `read` does, texts first, with their numbers: a long list's hidden states need not all be kept. No text is computed before
        all of them are tokenized. before: what stands before texts."""
        name = name or (lambda i: f"x[{i}]" if len(items) > 1 else "")
        texts = [i for i, x in enumerate(items) if self._reads(x)]
        yield from zip(texts, self._run_texts([_named(name(i), self._text, items[i], cut, before) for i in texts]))
        yield from ((i, _named(name(i), self._picture, items[i])) for i in sorted({*range(len(items))} - {*texts}))

    @takes()
    def hidden(self, x: Any) -> np.ndarray:
        """Compute the last hidden states of a text, token ids or a picture: float32 [n, width].

        Raises: ContextOverflowError, RequestError, ImageError.
        """
        return self.read([x])[0].hidden

    @takes()
    def embed(self, x: Any, normalize: bool = True, pooling: str | None = None, prompt: str | None = None) -> np.ndarray:
        """Compute the vector of a text or picture, float32 [d], or of each in a list, [n, d].

        x: token ids are a list in the list. normalize: to length 1. pooling: what it is made of, one of `POOLINGS`: the mean of the last hidden states,
        the first or the last of them, the end token's, or the model's own head; None: what the file says. prompt: the name of what the file puts
        before texts ("query", "document", ..); None: what it puts there by itself; "": nothing.
        Raises: ContextOverflowError, RequestError, ImageError; UnsupportedModelError for a head that the model has not.
        """
        normalize = switch("normalize", normalize)
        if pooling is not None and (not isinstance(pooling, str) or pooling not in POOLINGS):
            raise RequestError(f"pooling must be one of {', '.join(POOLINGS)}, got {shown(pooling)}")
        many = isinstance(x, (list, tuple)) and not (x and isinstance(x[0], (int, np.integer)))
        items = list(x) if many else [x]
        each = self._each(items, before=self._language.prefixes.before(prompt))
        found = {i: np.array(self.vector(items[i], given, pooling)) for i, given in each}
        rows = [found[i] for i in range(len(items))]
        if not rows:
            return np.empty((0, next(iter(self.towers.towers.values())).d_out), np.float32)
        if len({len(row) for row in rows}) > 1:
            raise RequestError("x: the vectors of its texts and its pictures have different lengths with this pooling: embed them one by one")
        made = np.stack([unit(row) if normalize else row for row in rows]).astype(np.float32)
        return made if many else made[0]

    def vector(self, item: Any, given: Given, pooling: str | None = None) -> np.ndarray:
        """Return the vector of what a run gave of an item, of any length. Raises: UnsupportedModelError for a head that the model has not."""
        tower = self._tower("text" if self._reads(item) else "image")
        if pooling in (None, tower.pooling) or pooling == HEAD:
            if VECTORS in given.rows and (pooling != HEAD or tower.pooling in (HEAD, "eos")):
                return given.rows[VECTORS]
            if pooling is None:
                raise UnsupportedModelError(f"{self.plan.model} gives scores and no vectors; for those of its hidden states give pooling=, one of mean, cls, last")
            raise UnsupportedModelError(f"{self.plan.model} has no layers that make vectors; its pooling is {tower.pooling!r}")
        if pooling == "mean":
            return given.hidden.astype(np.float64).mean(axis=0)
        return given.hidden[{"cls": 0, "last": len(given.hidden) - 1, "eos": given.at}[pooling]]

    @takes()
    def similarity(self, images: Any, texts: Any) -> np.ndarray:
        """Compare pictures with texts: the model's own logits, float32 [images, texts]; a single one is a list of one.

        Raises: UnsupportedModelError for a model that was not made for this; RequestError, ImageError.
        """
        factor, bias = self.towers.scale()
        pictures, words = (list(x) if isinstance(x, (list, tuple)) else [x] for x in (images, texts))
        if not all(isinstance(text, str) for text in words):
            raise RequestError("similarity: texts are texts")
        if not pictures or not words:
            return np.empty((len(pictures), len(words)), np.float32)
        seen = np.stack([self._picture(x).rows[VECTORS] for x in pictures])
        read = np.stack([given.rows[VECTORS] for _, given in self._each(words, cut=True)])
        return (factor * unit(seen) @ unit(read).T + bias).astype(np.float32)

    @takes()
    def classify(self, image: Any, labels: Sequence[str] | None = None, activation: str | None = None) -> dict[str, float]:
        """Compute how probable each label is, the most probable first: {label: probability}.

        image: a picture, or for a model of texts a text. labels: texts as they are, which are compared with the picture; None: the classes of the file.
        activation: "softmax", "sigmoid" or "none"; None: what the model was trained with. Raises: RequestError, UnsupportedModelError, ImageError.
        """
        if activation is None:
            activation = ("" if labels is not None else self.towers.scores) or ("sigmoid" if self.towers.independent else "softmax")
        if not isinstance(activation, str) or activation not in ("softmax", "sigmoid", "none"):
            raise RequestError(f"activation must be softmax, sigmoid or none, got {shown(activation)}")
        if labels is None:
            pictured = self.towers.image is not None and self.towers.image.n_classes
            scores = (self._picture(image) if pictured else self.read([image])[0]).rows.get(CLASSES)
            if scores is None:
                raise UnsupportedModelError(f"{self.plan.model} has no classes of its own: give labels, texts to compare the picture with")
            names = told_apart(self.towers.labels or [""] * len(scores))
        else:
            if isinstance(labels, str) or not iterates(labels) or not all(isinstance(label, str) for label in labels) or not len(labels):
                raise RequestError(f"labels must be a list of texts, got {shown(labels)}")
            if len(set(labels)) < len(labels):
                raise RequestError(f"labels: {shown(next(label for label, n in Counter(labels).items() if n > 1))} is given twice")
            names, scores = list(labels), self.similarity([image], list(labels))[0]
        x = scores.astype(np.float64)
        if activation == "softmax":
            x = np.exp(x - x.max())
            x /= x.sum()
        elif activation == "sigmoid":
            x = 1 / (1 + np.exp(-x))
        return dict(sorted(zip(names, x.tolist()), key=lambda pair: -pair[1]))

    @takes()
    def rerank(self, query: str, documents: Sequence[str]) -> np.ndarray:
        """Compute how well each document answers a query: float32 [n], the higher the better.

        They are the scores of the model's head, before any activation, as those of sentence-transformers' CrossEncoder with `Identity`; what it would
        apply is `model.towers.scores` ("sigmoid" or "none"). Pairs that are too long are shortened, the longer text first.
        Raises: UnsupportedModelError for a model without a head of one score; RequestError.
        """
        return self.ranked(query, documents).scores

    def ranked(self, query: str, documents: Sequence[str]) -> Ranked:
        """Do what `rerank` does, and count the tokens."""
        tower: TextTower = self._tower("text")
        if tower.n_classes != 1:
            raise UnsupportedModelError(f"{self.plan.model} gives {tower.n_classes or 'no'} scores of a text; to rank texts a model has one")
        documents = check_asked(query, documents)
        first = self.tokenize(query, add_special=False)
        pairs = (self._pair(first, self.tokenize(document, add_special=False)) for document in documents)
        found = [(given.rows[CLASSES][0], len(given.hidden)) for given in self._run_texts(pairs)]
        return Ranked(np.array([score for score, _ in found], np.float32), sum(n for _, n in found))

    @takes()
    def logits(self, ids: Sequence[int] | str) -> np.ndarray:
        """Compute the head's logits of a masked language model, one row a position: float32 [n, n_vocab].

        Raises: UnsupportedModelError for a model without that head; ContextOverflowError, RequestError.
        """
        tower: TextTower = self._tower("text")
        if not tower.n_logits:
            raise UnsupportedModelError(f"{self.plan.model} has no head that predicts tokens")
        text = self._text(ids)
        with self._lock:
            self._texts.run([text])
            return self._texts.logits(0, len(text.ids))
