"""`python -m pyengine.backends.cuda`: see `build`."""

from __future__ import annotations

from pyengine.backends.cuda.build import main

main()
