"""Options that several commands have."""

from __future__ import annotations

import os
from typing import Annotated

from typer import Argument, Option

from pyengine.cli.screen import note
from pyengine.errors import RequestError

N_BATCH = 512                        # tokens at once, unless told otherwise: `programs.sizes`, which starts slower
MOST_THREADS = 4                     # times the processors: more threads than that is a slip of the hand


def check_threads(n: int | None) -> int | None:
    """Refuse and warn of more threads than processors. Raises: RequestError."""
    if n is not None:
        from pyengine.hardware import most_threads

        cpus, usable = os.cpu_count() or 1, most_threads()
        if n > MOST_THREADS * cpus:
            raise RequestError(f"--threads {n}: this machine has {cpus} processors, and more threads than that only wait for each other")
        if n > usable:
            note(f"note: {n} threads on {usable} usable processor{'s' * (usable > 1)} are slower than {usable}")
    return n


def model_names(incomplete: str) -> list[str]:
    """Return the models whose names begin so, for the shell's completion."""
    from pyengine.files.stores import list_models

    begun = incomplete.casefold()
    return [model.name for model in list_models() if model.name.casefold().startswith(begun)]


ModelName = Annotated[str, Argument(metavar="MODEL", show_default=False, autocompletion=model_names, help="A GGUF file, or a name from `list`.")]
Context = Annotated[int | None, Option("--ctx", "-c", min=0, callback=lambda n: n or None, rich_help_panel="Memory and speed", help=(
    "Size of the context in tokens (default, or 0: what the model was trained for, at most 32,768, or what fits)."))]
KvDtype = Annotated[str, Option("--kv-dtype", rich_help_panel="Memory and speed", help=(
    "Format of cached keys and values: f32, f16, bf16, q8_0, q4_0, q4_1, kivi4, kivi2, or keys/values."))]
Threads = Annotated[int | None, Option("--threads", "-t", min=1, callback=check_threads, rich_help_panel="Memory and speed", help=(
    "Number of threads (default: one for each fast physical core)."))]
BatchSize = Annotated[int, Option("--batch", "-b", min=1, rich_help_panel="Memory and speed", help=(
    "Batch size: most tokens processed at once."))]
Mmproj = Annotated[str | None, Option("--mmproj", metavar="FILE", rich_help_panel="Pictures", help=(
    "Vision projector (mmproj) file, for a model in two files (default: the one that is found with a name)."))]
Json = Annotated[bool, Option("--json", help="Write JSON.")]
Devices = Annotated[list[str] | None, Option("--device", metavar="NAME[=SIZE]", rich_help_panel="Memory and speed", help=(
    "cpu, a card (cuda, cuda:1), or a part of main memory (cpu:0=6GiB); layers are divided over several (default: auto); repeatable."))]
EncoderDevice = Annotated[str | None, Option("--encoder-device", metavar="NAME", rich_help_panel="Memory and speed", help=(
    "The device that holds the image encoder (default: the card if it fits, or the first part)."))]
ExpertDevice = Annotated[str | None, Option("--expert-device", metavar="NAME", rich_help_panel="Memory and speed", help=(
    "The device that holds the experts of a mixture (default: with their layers)."))]
Compress = Annotated[str | None, Option("--compress", metavar="POLICY", rich_help_panel="Memory and speed", help=(
    "Keep a part of what was read: look-m, h2o, snapkv .. with settings, look-m:ratio=0.2, or look-m:budget=1024,when=always."))]
InPlace = Annotated[bool, Option("--mmap", rich_help_panel="Memory and speed", help=(
    "Read weights in the file at each step, for models larger than the memory; slower."))]
Speculate = Annotated[int | None, Option("--speculate", min=0, metavar="N", rich_help_panel="Memory and speed", help=(
    "Draft up to N tokens from the text so far, where that is faster; texts are the same (default: 32, or 8 where layers keep states); 0: none."))]
DraftModel = Annotated[str | None, Option("--draft", metavar="MODEL", rich_help_panel="Memory and speed", help=(
    "A small model of the same family, or a head made for this one, that drafts where the text itself has nothing likely; texts are the same."))]
Picture = Annotated[str | None, Option("--picture", metavar="WIDTHxHEIGHT", rich_help_panel="Memory and speed", help=(
    "Largest picture that memory is kept for (default: what the model's processor allows)."))]
Pictures = Annotated[int | None, Option("--pictures", min=0, rich_help_panel="Memory and speed", help=(
    "How many encoded pictures are kept (default: as memory allows); 0: no image encoder."))]
Server = Annotated[str | None, Option("--server", metavar="URL", show_default=False, help=(
    "The server to ask (default: $PYENGINE_SERVER, or http://127.0.0.1:8080); $PYENGINE_API_KEY is sent as its key."))]
Lora = Annotated[list[str] | None, Option("--lora", metavar="FILE", rich_help_panel="Adapters", help="A LoRA adapter (GGUF); repeatable.")]
LoraScaled = Annotated[list[str] | None, Option("--lora-scaled", metavar="FILE:SCALE", rich_help_panel="Adapters", help=(
    "A LoRA adapter with a scale, or several with commas; repeatable."))]
