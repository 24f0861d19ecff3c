"""Turn Hugging Face checkpoints into GGUF files in llama.cpp's dialect: `python -m converters HF_DIR -o OUT.gguf`.

One module of this package is one architecture (`llama`, `qwen2`, `gemma3_text`, `gemma3`, `qwen2_vl`, `mistral3`); `base` reads
checkpoints and writes files, `tokenizer` translates vocabularies, `vision` the settings of image processors. Nothing
here is imported by `pyengine` at run time.
"""

from __future__ import annotations

from .base import convert, supported

__all__ = ["convert", "supported"]
