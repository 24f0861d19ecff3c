"""Command line: `python -m converters HF_DIR -o OUT.gguf [--outtype f32|f16|bf16|q8_0] [--split-mmproj] [--no-tokenizer]`, and for a LoRA
adapter `python -m converters ADAPTER_DIR [--base HF_DIR|BASE.gguf] -o OUT.gguf`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pyengine.errors import PyEngineError, RequestError

from . import adapters
from .contract import supported
from .writer import OUTTYPES, convert, mmproj_path


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 0, or 2 after one line about what is wrong."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}", description="Convert a Hugging Face checkpoint folder, or a LoRA adapter's, to one GGUF file.",
        epilog=f"Supported architectures: {', '.join(sorted(supported()))}.")
    parser.add_argument("folder", type=Path, metavar="HF_DIR", help="folder with config.json and safetensors files, or with adapter_config.json")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT.gguf")
    parser.add_argument("--outtype", choices=OUTTYPES, help="type of the matrices (default: the checkpoint's own)")
    parser.add_argument("--split-mmproj", action="store_true",
                        help="write the image encoder to mmproj-OUT.gguf, llama.cpp's two-file form")
    parser.add_argument("--no-tokenizer", action="store_true", help="write no vocabulary")
    parser.add_argument("--base", type=Path, metavar="HF_DIR|BASE.gguf", help="an adapter's base model: its folder, of which config.json is read, "
                        "or a GGUF file of it (default: the folder that the adapter names); of a head that drafts (EAGLE-3), the model's folder")
    args = parser.parse_args(argv)
    try:
        if adapters.is_adapter(args.folder):
            if args.split_mmproj or args.no_tokenizer:
                raise RequestError("--split-mmproj and --no-tokenizer are for models, not for adapters")
            path = adapters.convert_adapter(args.folder, args.base, args.out, args.outtype)
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
            return 0
        path = convert(args.folder, args.out, args.outtype, with_tokenizer=not args.no_tokenizer,
                       split_mmproj=args.split_mmproj, base=args.base)
    except (PyEngineError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    for file in [path, mmproj_path(path)] if args.split_mmproj else [path]:
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
