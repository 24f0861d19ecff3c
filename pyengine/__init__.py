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
DISTRIBUTION = "pyengine-local"              # what pip installs; `pyengine` on PyPI is another project

_WHERE = {
    "load": "pyengine.engine.load",
    "plan": "pyengine.memory.fit",
    "Model": "pyengine.engine.model",
    "EncoderModel": "pyengine.engine.towers",
    "Answer": "pyengine.engine.answer",
    "MemoryPlan": "pyengine.memory.plan",
    "load_tokenizer": "pyengine.text.tokenizer",
    "Tokenizer": "pyengine.text.tokenizer",
    "SamplingParams": "pyengine.text.sampling",
    "Image": "pyengine.media.image",
    "Video": "pyengine.media.video",
    "open_image": "pyengine.media.image",
    "open_video": "pyengine.media.video",
    "Graph": "pyengine.backends.graph",
    "Tensor": "pyengine.graph.tensor",
    "Dim": "pyengine.graph.tensor",
    "GGUFFile": "pyengine.files.gguf",
    "LookM": "pyengine.cache.compression.attention",
    "H2O": "pyengine.cache.compression.attention",
    "SnapKV": "pyengine.cache.compression.attention",
    "RoCo": "pyengine.cache.compression.attention",
    "StreamingLLM": "pyengine.cache.compression.attention",
    "VLCache": "pyengine.cache.compression.layers",
    "MEDA": "pyengine.cache.compression.layers",
    "Diverse": "pyengine.cache.compression.diverse",
    "compression_of": "pyengine.cache.compression.written",
}
_MODULES = ("ops", "nn", "errors")
__all__ = ["__version__", "DISTRIBUTION", *_WHERE, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"pyengine.{name}")
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'pyengine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
