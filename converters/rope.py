"""Rotary positions: two generations of configs, translated to GGUF's keys, tensors and order of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from gguf import GGUFWriter, RopeScalingType

from pyengine.errors import InvalidModelError, UnsupportedModelError

from .checkpoint import Config
from .contract import Constant


def rope_parameters(config: Config, default_base: float, layer_type: str | None = None,
                    base_name: str = "rope_theta", scaled: bool = True, part: bool = False) -> dict[str, Any]:
    """Return `rope_type`, `rope_theta` and the scaling's own values for one kind of layer.

    Two forms are on disk. Since transformers 5: `rope_parameters`, flat or one dict for each layer type. Before:
    `rope_theta` (named `base_name`) and `rope_scaling` with `type` or `rope_type`; `scaled` says whether that scaling
    is meant for this kind of layer. `part`: a part of each head may be rotated, "partial_rotary_factor" of it. Source: modeling_rope_utils.py, `convert_rope_params_to_dict`.
    """
    new = config.get("rope_parameters") or {}
    if layer_type is not None:
        new = new.get(layer_type) or {}
    old = (config.get("rope_scaling") or {}) if scaled else {}
    p = {**new, **old}
    p["rope_type"] = p.get("rope_type", p.get("type", "default"))
    if p.get("rope_theta") is None:
        given = config.get(base_name)
        p["rope_theta"] = default_base if given is None else given
    partial = p.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    p["partial_rotary_factor"] = 1.0 if partial is None else partial
    if p["partial_rotary_factor"] != 1 and not part:
        raise UnsupportedModelError(f"{config.file}: 'partial_rotary_factor' is {partial}; this converter knows 1")
    if p["rope_type"] in ("llama3", "yarn", "longrope"):
        length = config.get("original_max_position_embeddings") or p.get("original_max_position_embeddings")
        p["original_max_position_embeddings"] = length or config.need("max_position_embeddings")
    return p


def write_rope_scaling(out: GGUFWriter, rope: dict[str, Any], config: Config, allowed: tuple[str, ...], whole_ramp: bool = True) -> None:
    """Write the rope.scaling.* keys of one of the `allowed` kinds ("default" is always one). whole_ramp: what the architecture makes of
    yarn's ramp, for which there is no key.

    The factor on cos and sin is (0.1 ln(factor) + 1) x rope.scaling.attn_factor for yarn and rope.scaling.attn_factor
    alone otherwise, as llama.cpp reads these keys; attn_factor is left out where it is 1.
    Source of the values: modeling_rope_utils.py, `_compute_*_parameters`. Raises UnsupportedModelError.
    """
    kind = rope["rope_type"]
    if kind != "default" and kind not in allowed:
        raise UnsupportedModelError(f"{config.file}: rope scaling '{kind}' is not one of {', '.join(allowed)} "
                                    f"that '{out.arch}' files can carry")
    attn_factor = 1.0
    if kind == "linear":
        out.add_rope_scaling_type(RopeScalingType.LINEAR)
        out.add_rope_scaling_factor(_need(rope, "factor", config))
    elif kind == "yarn":
        original = rope["original_max_position_embeddings"]
        factor = rope.get("factor") or config.need("max_position_embeddings") / original
        if factor < 1 or rope.get("truncate", True) is not whole_ramp:
            raise UnsupportedModelError(f"{config.file}: yarn with a factor below 1 or 'truncate': {str(not whole_ramp).lower()} has no key")
        out.add_rope_scaling_type(RopeScalingType.YARN)
        out.add_rope_scaling_factor(factor)
        out.add_rope_scaling_orig_ctx_len(original)
        out.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        out.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)

        def magnitude(m: float) -> float:      # YaRN, arXiv:2309.00071, equation 22
            return 0.1 * m * math.log(factor) + 1.0
        wanted = rope.get("attention_factor")
        if wanted is None:
            top, bottom = rope.get("mscale"), rope.get("mscale_all_dim")
            wanted = magnitude(top) / magnitude(bottom) if top and bottom else magnitude(1.0)
        attn_factor = wanted / magnitude(1.0)
    elif kind == "longrope":
        # no rope.scaling.factor here: llama.cpp would divide the positions by it too
        original = rope["original_max_position_embeddings"]
        factor = rope.get("factor") or config.need("max_position_embeddings") / original
        wanted = rope.get("attention_factor")
        if wanted is None:
            wanted = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        out.add_rope_scaling_type(RopeScalingType.LONGROPE)
        out.add_rope_scaling_orig_ctx_len(original)
        attn_factor = wanted
    if attn_factor != 1.0:
        out.add_rope_scaling_attn_factors(attn_factor)


def rope_tensors(rope: dict[str, Any], config: Config, head_dim: int) -> Iterator[Constant]:
    """List the tensors [head_dim / 2] that divide each rope frequency: llama3's factors, longrope's two sets."""
    def factors(name: str, values: Any) -> Constant:
        array = np.asarray(values, np.float32)
        if array.shape != (head_dim // 2,):
            raise InvalidModelError(f"{config.file}: {name} has shape {array.shape}, expected ({head_dim // 2},)")
        return Constant(f"{name}.weight", array)

    if rope["rope_type"] == "llama3":
        original = rope["original_max_position_embeddings"]
        factor, low, high = (_need(rope, n, config) for n in ("factor", "low_freq_factor", "high_freq_factor"))
        frequency = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
        turns = original * frequency / (2 * math.pi)       # rotations of each pair within the original context
        # below `low` turns: slowed by `factor`; above `high`: untouched; between: a linear blend of the frequencies.
        # Llama 4 has nothing between: `low` is `high`.
        blend = np.clip((turns - low) / (high - low), 0.0, 1.0) if high != low else (turns > high).astype(np.float64)
        yield factors("rope_freqs", 1.0 / ((1.0 - blend) / factor + blend))
    elif rope["rope_type"] == "longrope":
        yield factors("rope_factors_long", _need(rope, "long_factor", config))
        yield factors("rope_factors_short", _need(rope, "short_factor", config))


def _need(rope: dict[str, Any], name: str, config: Config) -> Any:
    if rope.get(name) is None:
        raise InvalidModelError(f"{config.file}: rope scaling '{rope['rope_type']}' needs '{name}'")
    return rope[name]


def interleaved_rows(n_heads: int, head_dim: int) -> np.ndarray:
    """Return the row order that turns half-split rope heads into llama.cpp's interleaved ones.

    Transformers rotates element i of a head with i + d/2; llama.cpp's "norm" rope rotates 2i with 2i + 1:
        rows of a head [a0 a1 .. b0 b1 ..]  ->  [a0 b0 a1 b1 ..]
    """
    head = np.arange(head_dim).reshape(2, head_dim // 2).T.ravel()        # 0 d/2 1 d/2+1 ..
    return (np.arange(n_heads)[:, None] * head_dim + head).ravel()
