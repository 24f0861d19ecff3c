"""Load a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pyengine.arguments import takes
from pyengine.engine.model import Model
from pyengine.errors import PlanError, RequestError, shown
from pyengine.files.model_files import open_files
from pyengine.hardware.facts import Hardware
from pyengine.memory.fit import fit, Fitted, refusal
from pyengine.memory.held import deciding, Held, promised
from pyengine.memory.settings import Settings
from pyengine.memory.towers import TowersLayout
from pyengine.programs.bound import bind, Bound, with_draft
from pyengine.programs.sizes import N_BATCH
from pyengine.records import dataclass


@dataclass(frozen=True)
class Candidate:
    """A model's files, opened and bound, with what is asked for: what `load` has before it decides on sizes."""

    bound: Bound
    want: Settings

    @classmethod
    def open(cls, model: str | Path, mmproj: str | Path | None = None, adapters: Any = None, draft: str | Path | None = None, **settings: Any) -> Candidate:
        """Open a model; settings are the fields of `Settings`. Raises as `load`, but for PlanError."""
        want = Settings(**settings)
        want.check()
        return cls(with_draft(bind(open_files(model, mmproj, adapters), want.pictures), draft), want)

    def fit(self, machine: Hardware | None = None, held: Sequence[Held] | None = None) -> Fitted:
        """Decide on sizes: see `pyengine.memory.fit.fit`."""
        return fit(self.bound, self.want, machine, held)

    def refusal(self, fitted: Fitted, held: Sequence[Held] | None = None) -> PlanError:
        """Make the error for a plan that does not fit, with what would."""
        return refusal(self.bound, self.want, fitted, held)

    def load(self, progress: Callable[[int, int], None] | None = None) -> Any:
        """Load it. Raises: PlanError if it does not fit beside the other models of this process."""
        with ExitStack() as until_loaded:
            with deciding:
                fitted = self.fit()
                if fitted.plan.fits:
                    until_loaded.enter_context(promised(fitted.plan))
            if not fitted.plan.fits:
                raise self.refusal(fitted)
            return fill(fitted, progress)


@takes()
def load(model: str | Path, mmproj: str | Path | None = None, device: Any = "auto", n_ctx: int | None = None, kv_dtype: str = "f16",
         n_threads: int | None = None, n_batch: int = N_BATCH, n_seq: int = 1, images: Any = None,
         encoder_device: str | None = None, expert_device: str | None = None,
         progress: Callable[[int, int], None] | None = None, mmap: bool = False, adapters: Any = None, compress: Any = None,
         speculate: Any = None, draft: str | Path | None = None) -> Any:
    """Load a model from a GGUF file, or by a name that `pyengine-run list` shows: a `Model`, or an `EncoderModel` (of vectors and scores).

    mmproj: the file of the media encoder, for models in two files (found by itself where `model` is a name).
    device: "cpu"; a card, "cuda" or "cuda:1"; several, ["cuda:0", "cpu"] or {"cuda:0": bytes, "cpu": None}, where cards are filled before the
    CPU; or parts of main memory, {"cpu:0": bytes, "cpu:1": bytes}. Layers are divided in proportion to the free memory of each of a kind; the media
    encoder goes to `encoder_device` (default: the card if it fits); `expert_device` takes the experts' weights, and the products that read
    them, while layers stay on the others (default: experts are with their layers). "auto": cards that can be used, as far as the model fits, else the CPU.
    n_ctx: positions of the context; default the training context, at most 32,768, or what of it fits beside a margin. n_seq: conversations that are
    served at once, each of up to n_ctx positions; models of encoders have none. kv_dtype: f32, f16, bf16, q8_0, q4_0, q4_1, kivi4, kivi2, or "keys/values" ("q8_0/q4_0").
    n_batch: most rows of one step; it grows to the largest picture that must not be cut. images: (width, height) of the largest
    picture, how many such pictures are kept encoded, or (width, height, number); 0 leaves the encoder out; default what the model's
    processor allows, within a share of the memory. progress(done_bytes, all_bytes) is called while weights are read.
    mmap: True reads weights where the file is mapped, in each step, for models that are larger than the memory: nothing is read or
    packed when it is loaded, and the system keeps of the file what it has room for. Answers are the same; generation is slower.
    adapters: LoRA adapters, files of llama.cpp's: a path, a list of paths and (path, scale), or a mapping of names to these; requests may
    give other scales. Weights stay as they are: each row of a step has its own mix.
    compress: a policy by which conversations keep some of their cells, `pe.LookM(ratio=0.2)` or its text "look-m:ratio=0.2"; requests may
    give another one that needs no more of attention, or False. With when="always" there are no more cells than its budget and a fifth.
    speculate: tokens that are likely to follow, found in the prompt and the answer so far, are computed beside the next one, where that is
    faster: texts are the same. False: none; a number: so many at most; requests may say otherwise. Where layers keep states, each of
    these tokens takes one, of all conversations together: 8 unless a number is given.
    draft: a small model of the same tokens, or a head made for this one, by path or name, that drafts where the text itself has nothing that is
    likely to follow.
    Raises: ModelNotFoundError, InvalidModelError, UnsupportedModelError, RequestError; PlanError if it does not fit beside the other
    models of this process.
    """
    if progress is not None and not callable(progress):
        raise RequestError(f"progress: a function of two ints, got {shown(progress)}")
    return Candidate.open(model, mmproj, adapters, draft, n_ctx=n_ctx, n_batch=n_batch, kv_dtype=kv_dtype, n_seq=n_seq, n_threads=n_threads, images=images,
                          device=device, encoder_device=encoder_device, expert_device=expert_device, mmap=mmap, compress=compress,
                          speculate=speculate).load(progress)


def fill(fitted: Fitted, progress: Callable[[int, int], None] | None = None) -> Any:
    """Allocate what a plan counts, read the weights, and return the model."""
    if isinstance(fitted.layout, TowersLayout):
        from pyengine.engine.towers import EncoderModel                        # decoders load faster

        return EncoderModel(fitted.layout, fitted.plan, progress)
    return Model(fitted, fitted.layout.prepared.load(progress), progress)
