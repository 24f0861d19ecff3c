"""The compiled library: `engine` (pybind11: memory, pools, programs), and `ffi`, `lib` (cffi: flat C functions).

The flat functions are those of the headers that setup.py lists as ABI_HEADERS; `_abi.py` beside this file is made from them by
the build.
"""

from __future__ import annotations

from pyengine.errors import PyEngineError

try:
    from pyengine import _engine as engine
    from pyengine._abi import ffi
except ImportError as error:                                                   # not built, or built for another Python
    raise PyEngineError(f"pyengine's compiled part is missing or does not load ({error}); build it with `pip install .`") from error

lib = ffi.dlopen(engine.__file__)
