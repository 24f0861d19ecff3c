"""`python -m pyengine.cli` is `pyengine-run`."""

from pyengine.cli import main

main()
