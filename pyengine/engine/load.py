"""Load a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyengine.arguments import takes
from pyengine.engine.model import Model
from pyengine.errors import RequestError, shown
from pyengine.files.model_files import open_files
from pyengine.memory.fit import fit, refusal
from pyengine.memory.settings import Settings
from pyengine.programs.bound import bind
from pyengine.programs.sizes import N_BATCH


@takes()
def load(model: str | Path, mmproj: str | Path | None = None, device: Any = "auto", n_ctx: int | None = None, kv_dtype: str = "f16",
         n_threads: int | None = None, n_batch: int = N_BATCH, n_seq: int = 1, images: Any = None,
         encoder_device: str | None = None, expert_device: str | None = None,
         progress: Callable[[int, int], None] | None = None, mmap: bool = False) -> Model:
    """Load a model from a GGUF file, or by a name that `pyengine-run list` shows.

    mmproj: the file of the media encoder, for models in two files (found by itself where `model` is a name).
    device: "cpu", or parts of main memory, {"cpu:0": bytes, "cpu:1": bytes}, over which layers are divided in proportion to
    the free memory of each; the media encoder goes to `encoder_device` of them; `expert_device` takes the experts' weights, and the products that read them, while
    layers stay on the others (default: experts are with their layers).
    n_ctx: positions of the context; default the training context, at most 32,768, or what of it fits beside a margin. n_seq: conversations that are
    served at once, each of up to n_ctx positions. kv_dtype: f32, f16, bf16, q8_0, q4_0, q4_1, or "keys/values" ("q8_0/q4_0").
    n_batch: most rows of one step; it grows to the largest picture that must not be cut. images: (width, height) of the largest
    picture, how many such pictures are kept encoded, or (width, height, number); 0 leaves the encoder out; default what the model's
    processor allows, within a share of the memory. progress(done_bytes, all_bytes) is called while weights are read.
    mmap: True reads weights where the file is mapped, in each step, for models that are larger than the memory: nothing is read or
    packed when it is loaded, and the system keeps of the file what it has room for. Answers are the same; generation is slower.
    Raises: ModelNotFoundError, InvalidModelError, UnsupportedModelError, RequestError; PlanError if it does not fit.
    """
    want = Settings(n_ctx, n_batch, kv_dtype, n_seq, n_threads, images, device, encoder_device, expert_device, mmap)
    want.check()
    if progress is not None and not callable(progress):
        raise RequestError(f"progress: a function of two ints, got {shown(progress)}")
    bound = bind(open_files(model, mmproj), want.pictures)
    fitted = fit(bound, want)
    if not fitted.plan.fits:
        raise refusal(bound, want, fitted)
    return Model(fitted, fitted.layout.prepared.load(progress), progress)
