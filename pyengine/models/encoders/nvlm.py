"""NVLM-D: InternViT over tiles as InternVL has it, between tags that are text: which tile it is, in one dimension.

Paper arXiv:2409.11402, sections 4.1 to 4.3. Follows the authors' `modeling_nvlm_d.py` (nvidia/NVLM-D-72B); transformers has no such model.

    prompt: <Image><tile_1> rows of the first tile <tile_2> rows .. <tile_global_thumbnail> rows of the whole </Image>

A picture of one tile is the whole alone. Tags are tokenized with the text around them. The projector has no biases, and as many units as the
decoder's feed-forward. A chat template writes <|vision_pad|> for a picture.
"""

from __future__ import annotations

from collections.abc import Callable

from pyengine.files.hparams import Hparams
from pyengine.media.views import View
from pyengine.models.encoders import internvl
from pyengine.nn.encoder import special_token

MARKER, START, END = "<|vision_pad|>", "<Image>", "</Image>"


def tags(n: int) -> list[str]:
    """Return the tags of n tiles, of which the last is the whole."""
    return [*(f"<tile_{i}>" for i in range(1, n)), "<tile_global_thumbnail>"]


class Vision(internvl.Vision):
    """Encoder, projector, processor and tags. Nothing about a picture is kept here."""

    films = False                    # videos are not taken; their frames are, as pictures

    def bind_tokens(self, v: Hparams, token: Callable[[str], int]) -> None:
        """Find the id of what a chat template writes for a picture; all else is text."""
        self.markers = {"image": (special_token(v, "image", token, MARKER),)}

    def around(self, views: list[View]) -> tuple[str | int | View, ...]:
        """Put a tag before each tile."""
        return START, *(part for pair in zip(tags(len(views)), views) for part in pair), END
