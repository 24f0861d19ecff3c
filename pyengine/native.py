"""The compiled library: `engine` (pybind11: memory, pools, programs), and `ffi`, `lib` (cffi: flat C functions).

The flat functions are those of csrc/dequant.h, csrc/sampling.h and csrc/cpu/pack.h; `_abi.h` beside this file is their text,
written by the build.
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

from pyengine.errors import PyEngineError

try:
    from pyengine import _engine as engine
except ImportError as error:                                                   # not built, or built for another Python
    raise PyEngineError(f"pyengine's compiled part is missing or does not load ({error}); build it with `pip install .`") from error

ffi = FFI()
ffi.cdef((Path(engine.__file__).parent / "_abi.h").read_text())
lib = ffi.dlopen(engine.__file__)
