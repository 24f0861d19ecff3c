"""Whether there can be a Mac's GPU: asked at each start, so nothing else of Metal is imported for it."""

from __future__ import annotations

import sys
from typing import Any

from pyengine.errors import GraphError


def framework() -> Any:
    """Return pyobjc's Metal. Raises: GraphError saying what to do."""
    if sys.platform != "darwin":
        raise GraphError('device="metal" needs a Mac; here device="metal-emulated" runs the same kernels, slowly, for tests')
    try:
        import Metal
    except ImportError:
        raise GraphError('device="metal" needs pyobjc: pip install pyobjc-framework-Metal') from None
    return Metal
