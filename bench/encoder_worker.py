"""One engine with one encoder in a process of its own: `python -m bench.encoder_worker ENGINE FOLDER FORMAT PICTURE.npy -t N`.

Lines of JSON come in and go out, as with `bench.worker`. An encoding is timed from the processed picture (patches, pixel values)
to the rows for the decoder, in each engine by its own entry point for that; what a processor does is not in it.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoints import QUESTIONS, REPLY
from .worker import own_stdout, serve


def load(folder: Path, format_name: str, n_threads: int, n_ctx: int) -> Any:
    """The pair of files as one model of this project."""
    import pyengine as pe

    return pe.load(folder / f"{format_name}.gguf", mmproj=folder / f"mmproj-{format_name}.gguf", n_ctx=n_ctx, n_threads=n_threads)


class PyEngine:
    """This project: the encoder's program as `load` planned it, on what the model's own processor made."""

    def __init__(self, folder: Path, format_name: str, picture: np.ndarray, n_threads: int, n_ctx: int):
        from pyengine.media.image import open_image

        model = load(folder, format_name, n_threads, n_ctx)
        self.view = model.media.process(open_image(picture)).views[0]
        self.program = model.media.prepared.load()

    def encode(self) -> np.ndarray:
        return self.program.run(**self.view.inputs)[0]

    def facts(self) -> dict[str, Any]:
        """Operations by the limit that binds them, and the instruction set."""
        from .work import encoder_operations

        return {"isa": self.program.prepared.isa, "operations": encoder_operations(self.program, self.view)}

    def profile(self, on: bool) -> None:
        self.program.profile(on)

    def steps(self) -> list[tuple[str, bool, float]]:
        """Name of each step, whether it is one of a layer's, and its seconds since `profile`."""
        timed = self.program.seconds()
        names = [[t.name for t in node.inputs if t.node.kind == "constant" and t.name] for node, _ in timed]
        inside = [i for i, n in enumerate(names) if any(t.startswith("v.blk.") for t in n)]
        short = [sorted({re.sub(r"^v\.blk\.\d+\.|\.(weight|bias)$", "", t) for t in n}) for n in names]
        return [(" ".join([node.op.name, "+".join(s)]).strip(), inside[0] <= i <= inside[-1], seconds)
                for i, ((node, seconds), s) in enumerate(zip(timed, short))]


class Torch:
    """transformers' modules with PyTorch's fused attention, in the format's floats: F32, F16 or BF16."""

    def __init__(self, folder: Path, format_name: str, picture: np.ndarray, n_threads: int, n_ctx: int):
        import torch
        import transformers
        from PIL import Image

        torch.set_num_threads(n_threads)
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[format_name]
        model, report = transformers.AutoModelForImageTextToText.from_pretrained(
            folder / "hf", attn_implementation="sdpa", dtype=dtype, output_loading_info=True)
        if lost := [*report["missing_keys"], *report["unexpected_keys"]]:
            raise RuntimeError(f"transformers does not find its tensors: {lost[:3]}")
        model.eval()
        gemma = model.config.model_type == "gemma3"
        kind = transformers.Gemma3ImageProcessorPil if gemma else transformers.Qwen2VLImageProcessorPil
        made = kind.from_pretrained(folder / "hf")(images=[Image.fromarray(picture)], return_tensors="pt")
        self.inputs = [made["pixel_values"].to(dtype), *([] if gemma else [made["image_grid_thw"]])]
        self.features = model.model.get_image_features

    def encode(self) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self.features(*self.inputs).pooler_output[0].float().numpy()

    def facts(self) -> dict[str, Any]:
        import torch

        return {"build": torch.__config__.show()}


class LlamaCpp:
    """llama.cpp's mtmd through the C functions that llama-cpp-python exposes, with its own settings."""

    def __init__(self, folder: Path, format_name: str, picture: np.ndarray, n_threads: int, n_ctx: int):
        from llama_cpp import llama_cpp as api
        from llama_cpp import mtmd_cpp as mtmd

        self.mtmd, self._quiet = mtmd, api.llama_log_callback(lambda level, text, data: None)
        for quiet in (api.llama_log_set, mtmd.mtmd_log_set, mtmd.mtmd_helper_log_set):
            quiet(self._quiet, None)
        api.llama_backend_init()
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        model = api.llama_model_load_from_file(str(folder / f"{format_name}.gguf").encode(), params)
        if not model:
            raise SystemExit(f"llama.cpp does not load {folder / format_name}.gguf")
        options = mtmd.mtmd_context_params_default()
        options.use_gpu, options.n_threads, options.warmup, options.print_timings = False, n_threads, False, False
        self.context = mtmd.mtmd_init_from_file(str(folder / f"mmproj-{format_name}.gguf").encode(), model, options)
        if not self.context:
            raise SystemExit(f"llama.cpp does not load {folder / f'mmproj-{format_name}.gguf'}")
        self.width, self.system = api.llama_model_n_embd(model), api.llama_print_system_info().decode().strip()
        pixels = np.ascontiguousarray(picture)
        data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd.mtmd_bitmap_init(pixels.shape[1], pixels.shape[0], data)
        chunks, marker = mtmd.mtmd_input_chunks_init(), mtmd.mtmd_default_marker()
        prompt = mtmd.mtmd_input_text(text=marker, text_len=len(marker), add_special=False, parse_special=True)
        if mtmd.mtmd_tokenize(self.context, chunks, ctypes.byref(prompt), (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap), 1):
            raise RuntimeError("mtmd_tokenize failed")
        found = [mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks))]
        (self.chunk,) = [c for c in found if mtmd.mtmd_input_chunk_get_type(c) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE]

    def encode(self) -> np.ndarray:
        if self.mtmd.mtmd_encode_chunk(self.context, self.chunk):
            raise RuntimeError("mtmd_encode_chunk failed")
        n = self.mtmd.mtmd_input_chunk_get_n_tokens(self.chunk)
        rows = self.mtmd.mtmd_get_output_embd(self.context)
        return np.ctypeslib.as_array(rows, (n * self.width,)).reshape(n, self.width).copy()

    def facts(self) -> dict[str, Any]:
        return {"system": self.system}


ENGINES = {"pyengine": PyEngine, "torch": Torch, "llama.cpp": LlamaCpp}


class Worker:
    """The requests to an engine."""

    def __init__(self, engine: Any):
        self.engine = engine

    def ready(self) -> dict[str, Any]:
        return self.engine.facts()

    def encode(self, file: str = "") -> dict[str, float]:
        """Seconds of one encoding, and of all threads on CPUs; with `file` the rows are saved there."""
        start, cpu = time.perf_counter(), time.process_time()
        rows = self.engine.encode()
        out = {"cpu": time.process_time() - cpu, "seconds": time.perf_counter() - start}
        if file:
            np.save(file, rows)
        return out

    def profile(self, on: bool) -> None:
        self.engine.profile(on)

    def steps(self) -> list[tuple[str, bool, float]]:
        return self.engine.steps()


# ---- a whole model of ours: memory and turns ------------------------------------------------------------------------------


def status() -> dict[str, int]:
    """Bytes that are resident now: memory of the process's own ("anon") and pages of files ("file"); Linux only."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[f"Rss{name.capitalize()}"].split()[0]) << 10 for name in ("anon", "file")}


class Watch(threading.Thread):
    """The highest `status` while a block runs, looked at 500 times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = status(), threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.peak = {name: max(n, self.peak[name]) for name, n in status().items()}

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.join()
        self.peak = {name: max(n, self.peak[name]) for name, n in status().items()}


class Whole:
    """A model of this project with its text part; pictures go the way that a user's go."""

    def __init__(self, folder: Path, format_name: str, picture: np.ndarray, n_threads: int, n_ctx: int):
        self.model, self.picture = load(folder, format_name, n_threads, n_ctx), picture

    def ready(self) -> dict[str, Any]:
        return {"plan": self.model.plan.to_json()["items"], "total": self.model.plan.total}

    def _picture(self, number: int) -> np.ndarray:
        """A picture of the same size that was not seen yet."""
        return np.roll(self.picture, number, axis=1)

    def memory(self) -> dict[str, Any]:
        """Resident bytes: before, at the peak of and after a first and a second picture."""
        from pyengine.media.image import open_image

        self.model.media.process(open_image(self._picture(9)))          # imports, and what malloc keeps
        out: dict[str, Any] = {"before": status()}
        for number, name in enumerate(("first", "second")):
            picture = self._picture(number)
            with Watch() as watch:
                rows = self.model.encode_image(picture)
            out[name] = {"peak": watch.peak, "after": status(), "rows": rows.nbytes}
            del rows
        return out

    def turn(self, number: int) -> dict[str, Any]:
        """Seconds to the first token of a question about a new picture, and of a second question about the same."""
        picture = self._picture(number)
        messages: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "image", "image": picture},
                                                                       {"type": "text", "text": QUESTIONS[0]}]}]
        out: dict[str, Any] = {}
        for name in ("first", "second"):
            start = time.perf_counter()
            report = self.model.chat(messages, max_tokens=1).report
            out[name] = {"seconds": time.perf_counter() - start, "n_prompt": report.n_prompt, "n_cached": report.n_cached,
                         "cached": [m.cached for m in report.media], "encode_seconds": sum(m.encode_seconds for m in report.media),
                         "process_seconds": sum(m.process_seconds for m in report.media)}
            messages += [{"role": "assistant", "content": REPLY}, {"role": "user", "content": QUESTIONS[1]}]
        return out


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.encoder_worker", description=__doc__)
    parser.add_argument("engine", choices=[*ENGINES, "whole"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("format")
    parser.add_argument("picture", type=Path)
    parser.add_argument("-t", "--threads", type=int, required=True)
    parser.add_argument("--ctx", type=int, required=True)
    args = parser.parse_args()
    answers, settings = own_stdout(), (args.folder, args.format, np.load(args.picture), args.threads, args.ctx)
    serve(Whole(*settings) if args.engine == "whole" else Worker(ENGINES[args.engine](*settings)), answers)


if __name__ == "__main__":
    main()
