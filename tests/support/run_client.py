"""Run cases of `clients.py` in an interpreter that has the packages.

    python run_client.py --list                  packages that are installed: versions and cases
    python run_client.py URL PACKAGE CASE
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, version

import clients
import frameworks  # noqa: F401  which adds its cases
import other_clients  # noqa: F401  which adds its cases


def listed() -> dict[str, dict[str, object]]:
    """Packages that are installed, with their versions and recorded cases."""
    found = {}
    for name, cases in clients.CASES.items():
        try:
            found[name] = {"version": version(name), "cases": [c for c in cases if c not in clients.UNRECORDED]}
        except PackageNotFoundError:
            print(f"{name} is not installed", file=sys.stderr)
    return found


if __name__ == "__main__":
    if sys.argv[1] == "--list":
        print(json.dumps(listed()))
    else:
        url, package, case = sys.argv[1:]
        clients.CASES[package][case](url)
