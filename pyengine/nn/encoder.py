"""What encoders of several architectures share: numbers and tokens of their metadata, and the values of pixels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pyengine.errors import InvalidModelError
from pyengine.files.hparams import Hparams
from pyengine.files.weights import Weights
from pyengine.nn.layers import Linear


def projector_type(v: Hparams) -> str:
    """The name of the encoder and its projector in a file's keys "clip.*"; "" where there is none."""
    return v.get("vision.projector_type", v.get("projector_type", "", str), str)


def n_layers(v: Hparams, w: Weights) -> int:
    """The encoder's layers, the last of which must be in the file."""
    n = v.size("vision.block_count")
    if ("v", "blk", n - 1) not in w:
        raise InvalidModelError(f"{v.arch}.vision.block_count is {n}, but no tensor is named v.blk.{n - 1}")
    return n


def per_channel(v: Hparams, name: str, usual: tuple[float, ...]) -> np.ndarray:
    """Three finite numbers, float32; `usual` without the key. Raises: InvalidModelError."""
    value = np.asarray(v.get(name, np.array(usual), np.ndarray))
    if value.shape != (3,) or value.dtype.kind not in "fiu" or not np.all(np.isfinite(value)):
        raise InvalidModelError(f"{v.arch}.{name} is {value.tolist()}, but three numbers are needed")
    return value.astype(np.float32)


def mean_and_std(v: Hparams, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """What is subtracted from each colour, and what it is then divided by. Raises: InvalidModelError for divisors up to 0."""
    found = per_channel(v, "vision.image_mean", mean), per_channel(v, "vision.image_std", std)
    if not np.all(found[1] > 0):
        raise InvalidModelError(f"{v.arch}.vision.image_std is {found[1].tolist()}: must be above 0")
    return found


def levels(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Values of the 256 levels of each colour, float32 [3, 256]: rescaled in float64, normalized in float32, as by transformers."""
    return ((np.arange(256) * (1 / 255)).astype(np.float32) - mean[:, None]) / std[:, None]


def resample_filter(v: Hparams, usual: int) -> int:
    """Pillow's number of the filter that resizes pictures. Raises: InvalidModelError."""
    found = v.get("vision.resample", usual, int)
    if found not in range(6):
        raise InvalidModelError(f"{v.arch}.vision.resample is {found}, but Pillow's filters are 0 to 5")
    return found


def special_token(v: Hparams, name: str, token: Callable[[str], int], text: str) -> int:
    """A special token's id: from its key, or where there is none by its text."""
    number = v.get(f"vision.{name}_token_id", None, int)
    return token(text) if number is None else number


def attention_products(*projections: Linear) -> str:
    """How an encoder's attention multiplies, for `ops.attention`: bytes where the weights around it are in blocks, whose products
    round activations to 8 bits too; floats elsewhere, so that F32, F16 and BF16 files give the authors' numbers."""
    return "int8" if all(p.weight.dtype.block > 1 for p in projections) else "float"
