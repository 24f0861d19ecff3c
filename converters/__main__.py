"""Command line: `python -m converters HF_DIR -o OUT.gguf [--outtype f32|f16|bf16|q8_0] [--split-mmproj] [--no-tokenizer]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pyengine.errors import PyEngineError

from .contract import supported
from .writer import OUTTYPES, convert, mmproj_path


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 0, or 2 after one line about what is wrong."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}", description="Convert a Hugging Face checkpoint folder to one GGUF file.",
        epilog=f"Supported architectures: {', '.join(sorted(supported()))}.")
    parser.add_argument("folder", type=Path, metavar="HF_DIR", help="folder with config.json and safetensors files")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT.gguf")
    parser.add_argument("--outtype", choices=OUTTYPES, help="type of the matrices (default: the checkpoint's own)")
    parser.add_argument("--split-mmproj", action="store_true",
                        help="write the image encoder to mmproj-OUT.gguf, llama.cpp's two-file form")
    parser.add_argument("--no-tokenizer", action="store_true", help="write no vocabulary")
    args = parser.parse_args(argv)
    try:
        path = convert(args.folder, args.out, args.outtype, with_tokenizer=not args.no_tokenizer,
                       split_mmproj=args.split_mmproj)
    except (PyEngineError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    for file in [path, mmproj_path(path)] if args.split_mmproj else [path]:
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
