"""`python -m pyengine` is `pyengine-run`."""

from pyengine.cli import main

main()
