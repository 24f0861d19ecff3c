"""Command line: `python -m converters.quantize IN.gguf OUT.gguf TYPE`."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from pathlib import Path

from pyengine.errors import PyEngineError, RequestError
from pyengine.files.gguf import GGUFFile

from .file import quantize_file, Written
from .mixtures import MIXTURES, PLAIN, VISION

_CLEAR = "\r\x1b[K"                  # the terminal's line


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 0, or 2 after one line about what is wrong."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}",
                                     description="Write a GGUF file again with smaller matrices.",
                                     epilog=f"TYPE is one of {', '.join(MIXTURES)} (Q3_K, Q4_K, Q5_K: their _M).")
    parser.add_argument("source", type=Path, metavar="IN.gguf", help="F32, F16 or BF16 best; any part of a split file will do")
    parser.add_argument("target", type=Path, metavar="OUT.gguf")
    parser.add_argument("mixture", metavar="TYPE")
    parser.add_argument("--vision", default=VISION, metavar="FORMAT",
                        help=f"format of an image encoder's matrices ({VISION}; they follow TYPE where it is F32, F16 or BF16)")
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="all processors without it")
    parser.add_argument("-v", "--verbose", action="store_true", help="list every tensor")
    args = parser.parse_args(argv)
    try:
        if args.threads is not None and args.threads < 1:
            raise RequestError(f"--threads {args.threads}: at least 1 is needed")
        with GGUFFile(args.source) as file:
            total = sum(t.nbytes for t in file.tensors.values())
        told = _Told(args.source, args.target, total, args.verbose)
        written = quantize_file(args.source, args.target, args.mixture, args.vision, args.threads, told)
    except (PyEngineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(_summary(written, args.target))
    return 0


class _Told:
    """What is said meanwhile: a warning with the first matrix that was quantized before, that a file is going to be replaced, every
    tensor if `verbose`, and else at a terminal how far the work is, by bytes read."""

    def __init__(self, source: Path, target: Path, total: int, verbose: bool):
        self._source, self._name, self._total, self._done = source, target.name, total, 0
        self._verbose, self._terminal, self._warned = verbose, not verbose and sys.stderr.isatty(), False
        self._replaced = target if target.exists() else None

    def __call__(self, w: Written) -> None:
        if self._replaced:
            self._note(f"{self._replaced} is there already, and is replaced when the new file is complete")
            self._replaced = None
        if not self._warned and w.dtype != w.info.dtype and w.info.dtype.name not in PLAIN:
            self._warned = True
            self._note(f"warning: {self._source} was quantized before ({w.info.dtype.name}), and quantizing twice costs quality: "
                       "start from an F32, F16 or BF16 file")
        self._done += w.info.nbytes
        if self._verbose:
            print(f"{w.info.name:40} {str(list(w.info.shape)):20} {w.info.dtype} -> {w.dtype}", flush=True)
        elif self._terminal:
            left = f"{self._name}: {self._done / 2**30:.2f} of {self._total / 2**30:.2f} GiB ({self._done * 100 // max(1, self._total)}%)"
            print(f"{_CLEAR}{left if self._done < self._total else ''}", end="", file=sys.stderr, flush=True)

    def _note(self, text: str) -> None:
        print(f"{_CLEAR if self._terminal else ''}{text}", file=sys.stderr, flush=True)


def _summary(written: list[Written], target: Path) -> str:
    """Say how the tensors were written: how many of each format, and which matrices are not in a block format and why."""
    counts = Counter(w.dtype.name for w in written)
    before, after = sum(w.info.nbytes for w in written), sum(w.nbytes for w in written)
    weights = sum(w.info.n_elements for w in written)
    lines = [f"{target}: {before / 2**20:.1f} -> {after / 2**20:.1f} MiB, {8 * after / max(1, weights):.2f} bits a weight; "
             + ", ".join(f"{n} {name}" for name, n in counts.most_common())]
    plain = [w for w in written if len(w.info.shape) > 1 and w.dtype.name in PLAIN and math.prod(w.info.shape[:-1]) > 1]
    if plain and any(w.dtype.name not in PLAIN for w in written):
        lines.append("matrices without blocks: " + ", ".join(f"{w.info.name} {w.dtype} {list(w.info.shape)}" for w in plain))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
