"""Maps of attention over a picture: panels, colours, where queries look."""

from __future__ import annotations

import numpy as np
import pytest

import pyengine as pe
from pyengine.errors import RequestError
from pyengine.media import maps

GREY = pe.open_image(np.full((60, 120, 3), 128, np.uint8))


def attention(n_queries: int = 3, side: int = 4) -> np.ndarray:
    """Two heads: query i gives half to the class token, and most of the rest to patch i."""
    made = np.full((2, n_queries, 1 + side**2), 0.01, np.float32)
    made[:, :, 0] = 0.5
    for i in range(n_queries):
        made[0, i, 1 + i], made[1, i, 1 + i] = 0.2, 0.4
    return made


def test_where_queries_look() -> None:
    found = maps.looks(GREY, attention(6))
    assert [look.query for look in found] == [0, 1, 2, 3, 4, 5]
    assert all(abs(look.class_token - 0.5) < 1e-6 and abs(look.most - 0.3) < 1e-6 for look in found)
    assert (found[1].x, found[1].y) == (1.5 * 120 / 4, 0.5 * 60 / 4) and (found[5].x, found[5].y) == (1.5 * 120 / 4, 1.5 * 60 / 4)
    assert maps.looks(GREY, attention(6), [5]) == [found[5]]


def test_the_colour_is_where_the_attention_is() -> None:
    one = np.asarray(maps.draw(GREY, attention(), [2]), np.float32)
    assert one.shape == (384, 768, 3)
    cells = one.reshape(4, 96, 4, 192, 3).mean((1, 3, 4))                      # brightness of each patch
    assert cells.argmax() == 2 and cells[0, 2] > 1.2 * np.partition(cells.ravel(), -2)[-2]


def test_a_panel_for_each_query() -> None:
    sheet = np.asarray(maps.draw(GREY, attention(11)))
    assert sheet.shape == (2 * 96 + maps.GAP, 8 * (192 + maps.GAP) - maps.GAP, 3)
    assert np.all(sheet[-40:, -40:] == 255) and np.all(sheet[:, 192 : 192 + maps.GAP] == 255)      # no twelfth panel; a gap
    even = np.asarray(maps.draw(GREY, np.full((1, 2, 5), 0.2, np.float32), [0]))
    assert len(np.unique(even.reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize("made, queries, words", [(attention(), [3], "query 3: there are 3, from 0 to 2"),
                                                  (np.ones((1, 2, 8), np.float32), [], "8 rows is no class token")])
def test_what_is_refused(made: np.ndarray, queries: list[int], words: str) -> None:
    for ask in (maps.draw, maps.looks):
        with pytest.raises(RequestError, match=words):
            ask(GREY, made, queries)
