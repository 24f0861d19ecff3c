"""pyengine: run open multimodal models on your own machine, exactly, fast, and knowing the memory beforehand.

    import pyengine as pe
    model = pe.load("model.gguf")
    print(model.generate("The capital of France is", max_tokens=8, temperature=0))

Names are imported when they are first used, so `import pyengine` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "load": "pyengine.engine",
    "plan": "pyengine.planning",
    "Model": "pyengine.engine",
    "Answer": "pyengine.engine",
    "MemoryPlan": "pyengine.memory",
    "load_tokenizer": "pyengine.tokenizer",
    "Tokenizer": "pyengine.tokenizer",
    "SamplingParams": "pyengine.sampling",
    "Image": "pyengine.image",
    "Video": "pyengine.image",
    "open_image": "pyengine.image",
    "open_video": "pyengine.image",
    "Graph": "pyengine.graph",
    "Tensor": "pyengine.tensor",
    "Dim": "pyengine.tensor",
    "GGUFFile": "pyengine.gguf",
}
_MODULES = ("ops", "nn", "errors")
__all__ = ["__version__", *_WHERE, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"pyengine.{name}")
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'pyengine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
