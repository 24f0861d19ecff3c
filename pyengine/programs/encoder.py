"""A run of a media encoder."""

from __future__ import annotations

from typing import Any

from pyengine.graph.graph import Graph
from pyengine.graph.tensor import Tensor


def encoder_graph(vision: Any) -> list[Tensor]:
    """The outputs of the graph of one run of an encoder."""
    return [vision.encode(Graph())]
