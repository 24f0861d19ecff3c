"""`python -m pyengine.backends.cuda`: see `build`."""

from __future__ import annotations

from pyengine.backends.cuda.build import main
from pyengine.backends.cuda.library import BUILT

main(BUILT)
