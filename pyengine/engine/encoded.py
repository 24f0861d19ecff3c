"""Pictures and videos on their way into a prompt: processed on the host, encoded once, kept while there is room.

The encoder is a program of its own. Its weights are read when the first picture comes; a model that is used for text only never
loads them.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from pyengine import hardware
from pyengine.backends.base import Prepared, Program, Progress
from pyengine.cache.cells import Cells
from pyengine.errors import ImageError, RequestError, UnsupportedModelError
from pyengine.media.views import Blend, Limits, Piece, Processed, View, views_of
from pyengine.models.architecture import Encoder
from pyengine.programs import encoder
from pyengine.programs.rows import MediaSegment

if TYPE_CHECKING:
    from pyengine.engine.language import Language
    from pyengine.media.image import Image
    from pyengine.media.video import Video

Part = str | int | MediaSegment


@dataclass(frozen=True)
class MediaInfo:
    """What became of one picture or video of a request.

    kind        "image" or "video"
    size        (width, height) of the original in pixels
    processed   (width, height) that the encoder saw; a point (x, y) of it is (x * size[0] / processed[0], ...) of the original
    n_tokens    soft tokens in the prompt
    views       runs of the encoder (crops, tiles)
    grids       (frames, rows, columns) of soft tokens of each view, where the model has them
    cached      found in the image cache: nothing was encoded
    process_seconds, encode_seconds: on the host, and in the encoder
    digest      hex of sha256 over pixels and options
    """

    kind: str
    size: tuple[int, int]
    processed: tuple[int, int]
    n_tokens: int
    views: int
    grids: tuple[tuple[int, int, int], ...]
    cached: bool
    process_seconds: float
    encode_seconds: float
    digest: str


@dataclass(frozen=True)
class _Entry:
    parts: tuple[Part, ...]
    info: MediaInfo
    nbytes: int


class EncodedMedia:
    """A model's media encoder and its image cache.

    prepared    its run as the backend planned it
    limits      what the plan leaves for one medium
    budget      bytes of embeddings that are kept; least recently used go first, those that a conversation of `cells` holds last
    language    has the vocabulary of an encoder that reads the prompt's text
    """

    def __init__(self, encoder: Encoder, prepared: Prepared, limits: Limits, budget: int, cells: Cells,
                 progress: Progress | None = None, language: Language | None = None):
        self.encoder, self.prepared, self.limits, self.budget, self.cells, self.language = encoder, prepared, limits, budget, cells, language
        self._program: Program | None = None
        self._progress = progress
        self._cache: OrderedDict[bytes, _Entry] = OrderedDict()
        self._lock = threading.Lock()
        self.stats = {"image_hits": 0, "image_misses": 0, "image_cache_bytes": 0}

    @property
    def loaded(self) -> bool:
        """Whether the encoder's weights are in memory."""
        return self._program is not None

    def resident(self) -> int:
        """Return the bytes of the encoder and of kept pictures that are in memory already."""
        program = self._program
        return self.stats["image_cache_bytes"] + (program.resident() if program is not None else 0)

    def process(self, media: Image | Video, pictures: int = 1, text: str = "") -> Processed:
        """Process a picture or video of a prompt with so many pictures and this text within the plan's limits, without encoding it. Raises
        as the model's processor does."""
        return self.encoder.process(media, self.limits._replace(pictures=pictures, words=self._words(text)))

    def _words(self, text: str) -> tuple[int, ...]:
        """Return a prompt's text in the encoder's own vocabulary; nothing where it has none."""
        return () if self.language is None else tuple(self.language.tokenizer.tokenize(text))

    def judge(self, sketch: Image | Video, pictures: int = 1, text: str = "") -> None:
        """Raise what the processor raises for a picture or video of that size and with those options: nothing was decoded yet.

        Raises: ImageError too, for a picture whose decoding takes more than the memory that is available now; no plan counts it.
        """
        from pyengine.media.image import PixelsWanted, Sketch                        # Pillow takes 20 ms to import

        if isinstance(sketch, Sketch) and sketch.decoding > (free := hardware.available_memory()):
            raise ImageError(f"decoding {sketch.size[0]} x {sketch.size[1]} pixels takes {sketch.decoding >> 20} MiB for a moment, and "
                             f"{free >> 20} MiB of memory are available; make the picture smaller first")
        try:
            self.process(sketch, pictures, text)
        except PixelsWanted:                                                   # it has looked at all else
            pass

    def get(self, media: Image | Video, pictures: int = 1, text: str = "") -> tuple[tuple[Part, ...], MediaInfo]:
        """Return what stands in a prompt with so many pictures and this text for a picture or video, with embeddings, and how it came about.

        Raises: ImageError, RequestError from the model's processor.
        """
        from hashlib import sha256                                             # OpenSSL takes 2 ms to load

        digest = media.digest
        if self.encoder.counts and pictures > 1:
            digest = sha256(digest + b"several").digest()
        if self.language is not None:
            digest = sha256(digest + np.array(self._words(text), np.int32).tobytes()).digest()
        with self._lock:                                     # one encoder, one cache: another thread waits
            entry = self._cache.get(digest)
            if entry is None:
                self.stats["image_misses"] += 1
                entry = self._encode(media, pictures, text, digest)
                self._keep(digest, entry)
                return entry.parts, entry.info
            self._cache.move_to_end(digest)
            self.stats["image_hits"] += 1
            return entry.parts, replace(entry.info, cached=True, process_seconds=0.0, encode_seconds=0.0)

    def attention(self, media: Image | Video, text: str = "") -> dict[str, np.ndarray]:
        """Encode a picture, of a prompt with this text, and return what its layers attended to: float32 [heads, queries, keys] by name; nothing is kept.

        Raises: UnsupportedModelError for an encoder that shows none; ImageError, RequestError from the model's processor.
        """
        if not self.encoder.maps:
            raise UnsupportedModelError("this model's image encoder shows no maps of attention; those with queries over a whole picture do")
        if text and self.language is None:
            raise RequestError("this model's image encoder reads no text: what it attends to depends on the picture alone")
        with self._lock:
            (view,) = self.process(media, text=text).views
            return encoder.maps(self._loaded(), view, self.encoder.maps)

    def _encode(self, media: Image | Video, pictures: int, text: str, digest: bytes) -> _Entry:
        """Process and encode a picture or video that is not in the cache."""
        from hashlib import sha256                                             # OpenSSL takes 2 ms to load

        from pyengine.media.video import Video                                 # Pillow takes 20 ms to import

        started = time.perf_counter()
        processed, encoding, made = self.process(media, pictures, text), 0.0, []
        done: dict[View, np.ndarray] = {}
        for i, p in enumerate(processed.parts):
            if isinstance(p, (View, Piece, Blend)):
                for view in views_of(p):
                    if view not in done:
                        done[view], seconds = self._encoded(view)
                        encoding += seconds
                p = _segment(p, [done[view] for view in views_of(p)], sha256(digest + i.to_bytes(4, "little")).digest(), digest)
            made.append(p)
        parts, views = tuple(made), processed.views
        segments = [p for p in parts if isinstance(p, MediaSegment)]
        info = MediaInfo("video" if isinstance(media, Video) else "image", processed.size, processed.processed,
                         sum(map(len, segments)), len(views), tuple(v.grid for v in views if v.grid), False,
                         time.perf_counter() - started - encoding, encoding, digest.hex())
        return _Entry(parts, info, sum(s.embedding.nbytes for s in segments))

    def _keep(self, digest: bytes, entry: _Entry) -> None:
        def total() -> int:
            return sum(e.nbytes for e in self._cache.values())

        in_use = self.cells.media()
        for used in (False, True):
            for old in [d for d in self._cache if (d in in_use) == used]:
                if total() + entry.nbytes > self.budget:
                    del self._cache[old]
        if entry.nbytes <= self.budget:
            self._cache[digest] = entry
        self.stats["image_cache_bytes"] = total()

    def _encoded(self, view: View) -> tuple[np.ndarray, float]:
        """Return a view's rows, and the seconds that the encoder took; its inputs are made here and gone again before the next
        view's."""
        loading = time.perf_counter()
        program = self._loaded()
        loading = time.perf_counter() - loading
        rows = view.positions.shape[1]
        if rows > self.limits.rows:
            raise ImageError(f"a picture of {rows} soft tokens exceeds the {self.limits.rows} that this model was planned for; "
                             "make it smaller, or load with images=(width, height) of the largest one")
        started = time.perf_counter()
        return encoder.run(program, view), loading + time.perf_counter() - started

    def _loaded(self) -> Program:
        """Return the encoder's program, whose weights are read when it is first needed."""
        if self._program is None:
            self._program = self.prepared.load(self._progress)
        return self._program


def _segment(part: View | Piece | Blend, rows: list[np.ndarray], digest: bytes, source: bytes) -> MediaSegment:
    """Make what stands in a prompt for a view, a piece of one or a blend of several, whose rows are `rows`."""
    if isinstance(part, View):
        return MediaSegment(rows[0], part.positions, part.advance, part.grid, part.causal, part.atomic, digest, part.token, source,
                            part.alone)
    view = views_of(part)[0]
    embedding = part.of(rows) if isinstance(part, Blend) else rows[0][part.start : part.stop]
    n = len(embedding)
    positions = np.broadcast_to(np.arange(n, dtype=np.int32), (len(view.positions), n))
    return MediaSegment(embedding, positions, n, view.grid, view.causal, view.atomic, digest, source=source)
