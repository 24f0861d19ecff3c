"""Turn Hugging Face checkpoints into GGUF files in llama.cpp's dialect: `python -m converters HF_DIR -o OUT.gguf`.

A module that declares `@converts(...)` is one architecture, found because it is here. The others are what architectures share:

    checkpoint   config.json and safetensors files, read
    contract     what a converter says
    decoder, rope, vision, tokenizer   what several of them say alike
    writer       the GGUF file

Packages are tools: `quantize` writes a GGUF file in smaller formats, `weights` fetches the models that demo and tests use, `demo`
is a small model of our own. Nothing here is imported by `pyengine` at run time.
"""

from __future__ import annotations

from .contract import supported
from .writer import convert

__all__ = ["convert", "supported"]
