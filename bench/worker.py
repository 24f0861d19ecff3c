"""One engine with one model in a process of its own, that measures what it is asked: `python -m bench.worker ENGINE MODEL`.

Requests come as lines of JSON on standard input ({"call": name, ...arguments}), answers go to standard output. All engines are
driven by the same calls: a prompt is evaluated from an empty cache in batches of 512 and gives the logits of its last token; in
generation each token is one evaluation that gives logits, without sampling (llama-bench's definitions of pp and tg).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

import numpy as np

N_BATCH = 512
FIRST_PROMPT = "The capital of France is"


class PyEngine:
    """This project."""

    @staticmethod
    def imports() -> None:
        import pyengine.engine.load  # noqa: F401

    def __init__(self, path: str, n_threads: int, n_ctx: int):
        import pyengine as pe

        self.model = pe.load(path, n_threads=n_threads, n_ctx=n_ctx, n_batch=N_BATCH)
        self.n_vocab = self.model.n_vocab

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        return self.model.tokenize(text, add_special=special)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self.model.detokenize(ids)

    def reset(self) -> None:
        self.model.reset()

    def evaluate(self, ids: Sequence[int], wanted: int = 1) -> np.ndarray:
        """Append ids; returns logits [wanted, vocab] of the last `wanted` of them, valid until the next call."""
        if wanted > 1:                                                         # from an empty cache only
            blocks = self.model.logit_blocks(list(ids), first=len(ids) - wanted)
            return np.concatenate([rows.copy() for _, rows in blocks])
        return self.model.feed(ids, N_BATCH)[None]

    def facts(self, n_prompt: int, n_generate: int) -> dict[str, Any]:
        """What the limits are compared with: bytes that generating a token reads, operations on weights of a prompt."""
        from .work import generation_bytes, prompt_operations

        program = self.model.program
        return {"bytes_per_token": generation_bytes(program, n_generate), "prompt_operations": prompt_operations(program, n_prompt),
                "isa": program.prepared.isa, "planned_bytes": self.model.plan.total}


class LlamaCpp:
    """llama.cpp through the C functions that llama-cpp-python exposes; settings are those of its own programs."""

    @staticmethod
    def imports() -> None:
        import llama_cpp  # noqa: F401

    def __init__(self, path: str, n_threads: int, n_ctx: int):
        self.api = api = self._library()
        api.llama_backend_init()
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        self._adjust(params)
        self.model = api.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {path}")
        self.vocab = api.llama_model_get_vocab(self.model)
        self.n_vocab = api.llama_vocab_n_tokens(self.vocab)
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = n_ctx, N_BATCH, N_BATCH
        settings.n_threads = settings.n_threads_batch = n_threads
        self._settle(settings)
        self.context = api.llama_init_from_model(self.model, settings)
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context of {n_ctx} for {path}")
        self.batch = api.llama_batch_init(N_BATCH, 0, 1)
        self.n_past = 0

    def _library(self) -> Any:
        """The C functions."""
        from llama_cpp import llama_cpp as api

        self._quiet = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self._quiet, None)
        return api

    def _adjust(self, params: Any) -> None:
        """Set what is not the library's default for a model."""

    def _settle(self, settings: Any) -> None:
        """Settings of the context that are not the library's defaults."""
        settings.swa_full = False                                              # as llama-cli and llama-bench set it

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        data = text.encode()
        out = (self.api.llama_token * (len(data) + 8))()
        n = self.api.llama_tokenize(self.vocab, data, len(data), out, len(out), special, False)
        if n < 0:
            raise RuntimeError(f"llama.cpp wants {-n} tokens for {len(data)} bytes")
        return list(out[:n])

    def detokenize(self, ids: Sequence[int]) -> str:
        buffer = ctypes.create_string_buffer(64 * (len(ids) + 1))
        tokens = (self.api.llama_token * len(ids))(*ids)
        n = self.api.llama_detokenize(self.vocab, tokens, len(ids), buffer, len(buffer), False, True)
        return buffer.raw[: max(n, 0)].decode("utf-8", "replace")

    def reset(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)
        self.n_past = 0

    def evaluate(self, ids: Sequence[int], wanted: int = 1) -> np.ndarray:
        """As PyEngine.evaluate; the wanted rows must lie in the last batch."""
        batch = self.batch
        for start in range(0, len(ids), N_BATCH):
            part = ids[start : start + N_BATCH]
            last = start + N_BATCH >= len(ids)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, self.n_past + i, 1, 0
                batch.logits[i] = last and i >= len(part) - wanted
            batch.n_tokens = len(part)
            if self.api.llama_decode(self.context, batch):
                raise RuntimeError("llama_decode failed")
            self.n_past += len(part)
        rows = self.api.llama_get_logits(self.context)                         # waits for the result
        return np.ctypeslib.as_array(rows, shape=(wanted, self.n_vocab))

    def facts(self, n_prompt: int, n_generate: int) -> dict[str, Any]:
        """What the library was built with."""
        v = self.vocab
        return {"system": self.api.llama_print_system_info().decode().strip(), "bos": self.api.llama_vocab_bos(v),
                "add_bos": bool(self.api.llama_vocab_get_add_bos(v)),
                "eog": [i for i in range(self.n_vocab) if self.api.llama_vocab_is_eog(v, i)]}


class IkLlama(LlamaCpp):
    """ik_llama.cpp through ik-llama-cpp-python: an older llama.cpp's functions under the same names, some with other arguments.

    Weights are repacked as they are loaded and attention is fused, which its programs do when asked (-rtr 1 -fa 1).
    """

    @staticmethod
    def imports() -> None:
        import ik_llama_cpp  # noqa: F401

    def __init__(self, path: str, n_threads: int, n_ctx: int):
        super().__init__(path, n_threads, n_ctx)
        self.vocab = self.model                                                # its text functions take the model

    def _library(self) -> Any:
        from ik_llama_cpp import _ctypes_api as api

        api.llama_get_logits = api._lib.llama_get_logits                       # not among its bindings
        api.llama_get_logits.argtypes, api.llama_get_logits.restype = [ctypes.c_void_p], ctypes.POINTER(ctypes.c_float)
        api._lib.llama_print_system_info.restype = ctypes.c_char_p
        return api

    def _adjust(self, params: Any) -> None:
        params.repack_tensors = True

    def _settle(self, settings: Any) -> None:
        settings.flash_attn = True

    def detokenize(self, ids: Sequence[int]) -> str:
        buffer, out = ctypes.create_string_buffer(256), b""
        for i in ids:
            n = self.api.llama_token_to_piece(self.vocab, i, buffer, len(buffer), 0, True)
            out += buffer.raw[: max(n, 0)]
        return out.decode("utf-8", "replace")

    def reset(self) -> None:
        self.api.llama_kv_cache_clear(self.context)
        self.n_past = 0

    def facts(self, n_prompt: int, n_generate: int) -> dict[str, Any]:
        return {"system": self.api._lib.llama_print_system_info().decode().strip()}


ENGINES = {"pyengine": PyEngine, "llama.cpp": LlamaCpp, "ik_llama.cpp": IkLlama}


class Worker:
    """The requests. Seconds are measured here, so that pipes cost nothing."""

    def __init__(self, engine: PyEngine | LlamaCpp):
        self.engine = engine

    def ready(self) -> dict[str, Any]:
        return {"n_vocab": self.engine.n_vocab}

    def facts(self, n_prompt: int, n_generate: int) -> dict[str, Any]:
        return self.engine.facts(n_prompt, n_generate)

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        return self.engine.tokenize(text, special)

    def prompt(self, ids: list[int]) -> float:
        """Seconds for a prompt from an empty cache."""
        self.engine.reset()
        start = time.perf_counter()
        self.engine.evaluate(ids)
        return time.perf_counter() - start

    def generate(self, ids: list[int]) -> float:
        """Seconds for these tokens one by one from an empty cache."""
        self.engine.reset()
        start = time.perf_counter()
        for token in ids:
            self.engine.evaluate([token])
        return time.perf_counter() - start

    def greedy(self, ids: list[int], n: int) -> dict[str, Any]:
        """The n likeliest next tokens in turn, and by how much (nats) each was likelier than the second."""
        self.engine.reset()
        logits, tokens, gaps = self.engine.evaluate(ids)[0], [], []
        for _ in range(n):
            second, first = np.partition(logits, -2)[-2:]
            tokens.append(int(logits.argmax()))
            gaps.append(float(first - second))
            logits = self.engine.evaluate([tokens[-1]])[0]
        return {"tokens": tokens, "gaps": gaps}

    def log_probabilities(self, ids: list[int], wanted: int, file: str) -> None:
        """Log-probabilities after each of the last `wanted` tokens, saved as float32 [wanted, vocab]."""
        self.engine.reset()
        x = self.engine.evaluate(ids, wanted)
        top = x.max(axis=-1, keepdims=True)
        np.save(file, x - (top + np.log(np.exp(x - top).sum(axis=-1, keepdims=True, dtype=np.float64))).astype(np.float32))


def first_token(engine: str, path: str, n_threads: int) -> dict[str, Any]:
    """Seconds from before the engine is imported until its first token is text, and the shares of its parts.

    The interpreter and NumPy, which every engine's Python package needs, are there before.
    """
    start = time.perf_counter()
    ENGINES[engine].imports()
    imported = time.perf_counter()
    e = ENGINES[engine](path, n_threads, N_BATCH)
    loaded = time.perf_counter()
    text = e.detokenize([int(e.evaluate(e.tokenize(FIRST_PROMPT))[0].argmax())])
    end = time.perf_counter()
    return {"seconds": end - start, "import_seconds": imported - start, "load_seconds": loaded - imported,
            "prompt_seconds": end - loaded, "text": text}


def own_stdout() -> TextIO:
    """Standard output for answers alone; what libraries print goes to standard error from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def serve(worker: Any, answers: TextIO) -> None:
    """Say `worker.ready()`, then answer requests by calls of its methods until standard input ends."""
    print(json.dumps(worker.ready()), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(worker, request.pop("call"))(**request)), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.worker", description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("-t", "--threads", type=int, required=True)
    parser.add_argument("--ctx", type=int, default=N_BATCH)
    parser.add_argument("--first-token", action="store_true")
    parser.add_argument("--folder", help="holds the engine's package; default: the installed one")
    args = parser.parse_args()
    if args.folder:
        sys.path.insert(0, args.folder)
    answers = own_stdout()
    if args.first_token:
        print(json.dumps(first_token(args.engine, args.model, args.threads)), file=answers, flush=True)
        return
    serve(Worker(ENGINES[args.engine](args.model, args.threads, args.ctx)), answers)


if __name__ == "__main__":
    main()
