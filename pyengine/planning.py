"""What a model will take, before a byte of its weights is read: the graph of its step, laid out and counted.

    file -> Hparams, Weights -> Model.forward builds one graph -> the backend lays it out -> MemoryPlan

The program that is counted here is the one that `engine` loads and runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyengine import hardware
from pyengine.backends import backend
from pyengine.batch import Batch
from pyengine.cells import Group, group
from pyengine.dtype import DType, dtype as dtype_of
from pyengine.errors import InvalidModelError, RequestError, UnsupportedModelError
from pyengine.gguf import GGUFFile
from pyengine.graph import Graph
from pyengine.hparams import Hparams
from pyengine.kvcache import LayerCache, Policy
from pyengine.locate import find_model
from pyengine.media import encoder_graph
from pyengine.memory import MemoryPlan, PlanItem
from pyengine.models import architecture
from pyengine.sampling import sampler_bytes
from pyengine.tensor import Dim, Tensor
from pyengine.tokenizer import Tokenizer
from pyengine.weights import Weights

KV_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_1": "Q4_1"}
HEAD_BYTES = 32 << 20                # logits of at most this size are computed at once
N_BATCH = 512                        # rows of one step


@dataclass
class Built:
    """A model's graph with what is needed to feed it."""

    arch: Any
    vision: Any              # the media encoder, or None
    graph: Graph
    outputs: list[Tensor]
    groups: list[tuple[Group, str]]      # cells of layers with the same policy, and the name of their inputs
    layers: list[int]                    # number of each layer's group
    kv: list[PlanItem]
    n_ctx: int
    n_batch: int
    n_seq: int
    n_head: int


@dataclass(frozen=True)
class Files:
    """A model's file, and the one that holds its media encoder (often the same)."""

    model: GGUFFile
    mmproj: GGUFFile | None

    @property
    def name(self) -> str:
        return Path(self.model.path).name


def open_files(name: str | Path, mmproj: str | Path | None = None) -> Files:
    paths = find_model(name)
    path, found = paths if isinstance(paths, list) else (paths, None)
    mmproj = mmproj or found
    files = Files(GGUFFile(path), GGUFFile(mmproj) if mmproj else None)
    if files.mmproj and files.mmproj.metadata.need("general.architecture", str) != "clip":
        raise InvalidModelError(f"{mmproj}: general.architecture is {files.mmproj.metadata['general.architecture']!r}; a projector file has 'clip'")
    return files


def _vision(arch: Any, h: Hparams, files: Files, weights: Weights, n_ctx: int) -> Any:
    """The model's media encoder, or None where the files have none or the architecture cannot run it."""
    source = files.mmproj or files.model
    if arch.Vision is None or (files.mmproj is None and "v" not in weights):
        if files.mmproj is not None:
            raise UnsupportedModelError(f"{source.path}: architecture {h.arch!r} has no media encoder here")
        return None

    def token(text: str) -> int:
        found = Tokenizer.from_metadata(files.model.metadata).id_of(text)
        if found is None:
            raise InvalidModelError(f"{files.model.path}: no token {text!r} in the vocabulary, and no key that names it")
        return found

    own = weights if files.mmproj is None else Weights(files.mmproj)
    vision = arch.Vision(h, Hparams(source.metadata, "clip"), own, n_ctx, token)
    if files.mmproj is not None:
        own.finish()
    return vision


def build(files: Files, n_ctx: int, n_batch: int, kv_dtype: str, n_seq: int = 1) -> Built:
    """The graph of one step of this model."""
    h = Hparams(files.model.metadata)
    weights = Weights(files.model)
    arch = architecture(h.arch)(h, weights, n_ctx)
    vision = _vision(arch, h, files, weights, n_ctx)
    unread = ("rope_freqs", "rope_factors_long", "rope_factors_short", *(() if vision and not files.mmproj else ("v", "mm")))
    weights.finish(ignore=unread)
    c = arch.config
    n_batch = min(max(n_batch, n_seq, vision.atomic_rows if vision else 0), n_ctx * n_seq)
    n_head = max(n_seq, min(n_batch, HEAD_BYTES // (4 * c.vocab_size)))
    k_dtype, v_dtype = kv_dtypes(kv_dtype)
    for dtype in (k_dtype, v_dtype):
        if c.head_dim % dtype.block:
            raise UnsupportedModelError(f"kv_dtype={kv_dtype}: blocks of {dtype.block} do not divide a head of {c.head_dim}; use f16")
    g = Graph()
    m, w, l = Dim("m", n_batch), Dim("w", n_batch), Dim("l", n_head)
    media = g.input("media", (Dim("e", n_batch), c.d_model)) if vision else None
    batch = Batch(m, g.input("ids", (m,), "I32"), g.input("positions", (arch.position_axes, m), "I32"),
                  g.input("wanted", (w,), "I32"), g.input("head", (l,), "I32"), media)
    seq, seq_wanted = g.input("seq", (m,), "I32"), g.input("seq_wanted", (w,), "I32")
    numbers: dict[Policy, int] = {}
    groups: list[tuple[Group, str]] = []
    shared: list[list[Tensor]] = []
    caches, kv, layers = [], [], []
    for i, policy in enumerate(arch.cache_policies()):
        if policy not in numbers:
            numbers[policy] = len(groups)
            name = f"{type(policy).__name__.lower()}{len(groups)}"
            groups.append((group(policy, n_ctx, n_batch, n_seq), name))
            shared.append([
                g.input(f"{name}.cells", (m,), "I32"), g.state(f"{name}.table", (n_seq, groups[-1][0].slots), "I32"),
                g.input(f"{name}.lo", (m,), "I32"), g.input(f"{name}.hi", (m,), "I32"),
                g.input(f"{name}.lo_wanted", (w,), "I32"), g.input(f"{name}.hi_wanted", (w,), "I32"),
            ])
        layers.append(numbers[policy])
        own, _ = groups[layers[-1]]
        cells, table, lo, hi, lo_w, hi_w = shared[layers[-1]]
        shape = (c.n_kv_heads, own.n_cells, c.head_dim)
        k, v = g.state(f"blk.{i}.k", shape, k_dtype), g.state(f"blk.{i}.v", shape, v_dtype)
        caches.append(LayerCache(k, v, cells, table, seq, lo, hi, seq_wanted, lo_w, hi_w))
        nbytes = c.n_kv_heads * own.n_cells * (k_dtype.size(c.head_dim) + v_dtype.size(c.head_dim))
        times = f"{n_seq} x " if n_seq > 1 else ""
        kv.append(PlanItem("cpu", "kv", f"{policy}: {times}{own.slots} cells", nbytes))
    logits, hidden = arch.forward(batch, caches)
    return Built(arch, vision, g, [logits, hidden], groups, layers, kv, n_ctx, n_batch, n_seq, n_head)


def kv_dtypes(name: str) -> tuple[DType, DType]:
    """Formats of keys and values: "q8_0" for both, "q8_0/q4_0" for each. Raises: RequestError naming those that there are."""
    k, _, v = name.partition("/")
    for part in (k, v or k):
        if part not in KV_DTYPES:
            raise RequestError(f"kv_dtype={name!r}: use one of {', '.join(KV_DTYPES)}, or two of them as keys/values")
    return dtype_of(KV_DTYPES[k]), dtype_of(KV_DTYPES[v or k])


def model_graph(name: str | Path, n_ctx: int = 4096, mmproj: str | Path | None = None, encoder: bool = False) -> list[Tensor]:
    """The outputs of a model's graph, or of its media encoder's, as its module wrote it."""
    files = open_files(name, mmproj)
    built = build(files, min(n_ctx, Hparams(files.model.metadata).size("context_length")), N_BATCH, "f16")
    if encoder and built.vision is None:
        raise UnsupportedModelError(f"{files.name}: no media encoder")
    return encoder_graph(built.vision) if encoder else built.outputs


def check_settings(device: str, n_ctx: int | None, n_batch: int, kv_dtype: str, n_seq: int) -> str:
    kv_dtypes(kv_dtype)
    if n_seq < 1:
        raise RequestError(f"n_seq={n_seq}: must be at least 1")
    if n_ctx is not None and n_ctx < 1:
        raise RequestError(f"n_ctx={n_ctx}: must be at least 1")
    if n_batch < 1:
        raise RequestError(f"n_batch={n_batch}: must be at least 1")
    if device not in ("auto", "cpu"):
        raise RequestError(f"device={device!r}: models run on 'cpu' ('auto' picks it)")
    return "cpu"


@dataclass(frozen=True)
class Planned:
    """A model laid out, nothing loaded: its step, its media encoder's run (or None), and the count of both."""

    built: Built
    step: Any
    encoder: Any
    image_cache: int         # bytes
    plan: MemoryPlan


def lay_out_model(files: Files, n_ctx: int | None, n_batch: int, kv_dtype: str, n_threads: int | None, n_seq: int) -> Planned:
    """Build, lay out and count; without `n_ctx`, the training context or what fits of it."""
    trained = Hparams(files.model.metadata).size("context_length")
    available = {"cpu": hardware.available_memory()}
    size = n_ctx or trained
    while True:
        built = build(files, size, n_batch, kv_dtype, n_seq)
        prepared = backend("cpu", n_threads=n_threads).prepare(built.outputs)
        encoder, image_cache = None, 0
        extra: list[PlanItem] = []
        if built.vision:
            encoder = backend("cpu", n_threads=n_threads).prepare(encoder_graph(built.vision))
            image_cache = 4 * size * built.arch.config.d_model                 # embeddings of a context full of pictures
            extra = [PlanItem("cpu", "encoder", "weights, from the first picture on", encoder.weight_bytes),
                     PlanItem("cpu", "mapped", "file pages of the encoder", encoder.mapped_bytes),
                     PlanItem("cpu", "encoder", f"arena, {built.vision.max_rows} soft tokens at most", encoder.arena_bytes),
                     PlanItem("cpu", "images", "image cache, at most", image_cache)]
        tables = prepared.state_bytes - sum(i.nbytes for i in built.kv)
        items = [PlanItem("cpu", "weights", "resident", prepared.weight_bytes), PlanItem("cpu", "mapped", "file pages", prepared.mapped_bytes),
                 *built.kv, PlanItem("cpu", "kv", "tables and alignment", tables),
                 PlanItem("cpu", "arena", f"{built.n_batch} rows a step", prepared.arena_bytes),
                 PlanItem("cpu", "sampler", "candidates", n_seq * sampler_bytes(built.arch.config.vocab_size)), *extra]
        plan_ = MemoryPlan(files.name, size, built.n_batch, kv_dtype, tuple(i for i in items if i.nbytes), available)
        if plan_.fits or n_ctx is not None or size <= 256:
            return Planned(built, prepared, encoder, image_cache, plan_)
        size //= 2


def plan(model: str | Path, n_ctx: int | None = None, device: str = "auto", kv_dtype: str = "f16", n_batch: int = N_BATCH,
         n_threads: int | None = None, mmproj: str | Path | None = None, n_seq: int = 1) -> MemoryPlan:
    """Count what a model will take, per device and purpose; reads headers only.

    Raises: ModelNotFoundError, InvalidModelError, UnsupportedModelError, RequestError.
    """
    check_settings(device, n_ctx, n_batch, kv_dtype, n_seq)
    return lay_out_model(open_files(model, mmproj), n_ctx, n_batch, kv_dtype, n_threads, n_seq).plan
