"""Write a GGUF file again with its matrices in block formats: `python -m converters.quantize IN.gguf OUT.gguf TYPE`.

`mixtures` decides which tensor gets which format, `file` streams the tensors through and copies every key.
"""

from __future__ import annotations

from .file import quantize_file
from .mixtures import choose, Facts, MIXTURES

__all__ = ["MIXTURES", "Facts", "choose", "quantize_file"]
