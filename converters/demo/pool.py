"""Pictures that the albums of many training steps share, with the rows that a fixed encoder makes of them."""

from __future__ import annotations

import random
from typing import Any

from torch import Tensor

from . import many
from .forward import rows_of

SIZE = 4096                             # pictures of one size, at most


class Pool:
    """Pictures of one size; once there are SIZE of them, new ones take the place of others."""

    def __init__(self, split: str, tokens: int):
        self.split, self.tokens, self.drawn = split, tokens, 0
        self.shown: list[many.Shown] = []
        self.rows: dict[int, Tensor] = {}

    def renew(self, model: Any, rng: random.Random, n: int) -> None:
        """Draw and encode n new pictures (of every eight: six shapes, a text and a form)."""
        new = many.draw_pool(rng, self.split, n, many.SIDES[self.tokens])
        self.rows |= rows_of(model, [s.picture for s in new])
        for shown in new:
            if len(self.shown) < SIZE:
                self.shown.append(shown)
            else:
                place = self.drawn % SIZE
                del self.rows[id(self.shown[place].picture)]
                self.shown[place] = shown
            self.drawn += 1

    def some(self, rng: random.Random, n: int) -> list[many.Shown]:
        """Choose n pictures, of each kind as many as there are of it on average; of the rarest at least four."""
        kinds = [self.shown[i::len(many.MAKES)] for i in range(len(many.MAKES))]
        return [s for kind in kinds for s in rng.sample(kind, min(len(kind), max(4, n // len(kinds))))]
