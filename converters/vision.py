"""What converters of models that see share: the settings of image processors, and the keys `clip.*` of every encoder.

Keys as llama.cpp's `tools/mtmd/clip.cpp` reads them; what it hard-codes stands in further keys of our own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from pyengine.errors import InvalidModelError, UnsupportedModelError

from .checkpoint import Config, malformed_is, read_json, tensors_beside
from .contract import Converter, Entry, FLOAT32, layer_norm, linear
from .decoder import Tensors

# an encoder's activation by transformers' name: clip.use_gelu, clip.use_silu (neither: the "quick" GELU)
ACTIVATIONS = {"gelu_pytorch_tanh": (True, False), "gelu": (True, False), "quick_gelu": (False, False),
               "silu": (False, True)}
GATED = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}     # for `feed_forward`: most gated ones' names
# values of a processor that no key expresses, unless a model's defaults say others
FIXED: dict[str, Any] = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}

# The chat template of models that were trained with instructions as they are.
ONE_INSTRUCTION = """{%- if messages | length != 1 or messages[0]['role'] != 'user' -%}
  {{ raise_exception('this model follows one instruction, without a system message: give one message of a user') }}
{%- endif -%}
{%- set content = messages[0]['content'] -%}
{%- if content is string -%}{{ content | trim }}
{%- else -%}{%- for part in content if part['type'] == 'text' -%}{{ part['text'] | trim }}{%- endfor -%}
{%- endif -%}"""


class TextAndEncoder:
    """A checkpoint of two parts, each with a converter of its own; a subclass makes them."""

    text: Converter
    encoder: Any

    def write_keys(self, out: GGUFWriter) -> None:
        self.text.write_keys(out)
        self.encoder.write_keys(out)

    def unused(self) -> set[str]:
        return self.text.unused() | self.encoder.unused()

    def tensors(self) -> Tensors:
        yield from self.text.tensors()
        yield from self.encoder.tensors()


def image_settings(folder: Path, defaults: dict[str, Any]) -> Config:
    """Return the image processor's settings, from the first file that transformers looks into."""
    return _settings(folder, "image_processor", ("preprocessor_config.json",), defaults)


def video_settings(folder: Path, defaults: dict[str, Any], old: bool = True) -> Config:
    """Return the video processor's settings; `old` checkpoints have one file for pictures and videos."""
    return _settings(folder, "video_processor", ("video_preprocessor_config.json", *(["preprocessor_config.json"] if old else [])), defaults)


def write_video_keys(out: GGUFWriter, videos: Config) -> None:
    """Write how frames are chosen and resized; a rate only where the processor has one."""
    videos.refuse_unless("num_frames", None)
    videos.refuse_unless("cap_pixels_per_frame", None, False)
    least, most = pixel_limits(videos)
    out.add_uint32("clip.vision.video_min_pixels", least)
    out.add_uint32("clip.vision.video_max_pixels", most)
    out.add_uint32("clip.vision.video_min_frames", videos.count("min_frames"))
    out.add_uint32("clip.vision.video_max_frames", videos.count("max_frames"))
    out.add_bool("clip.vision.video_sample_frames", bool(videos.need("do_sample_frames")))
    if videos.get("fps") is not None:
        out.add_float32("clip.vision.video_fps", videos.need("fps"))


def _settings(folder: Path, part: str, files: tuple[str, ...], defaults: dict[str, Any]) -> Config:
    both = folder / "processor_config.json"
    nested = read_json(both).get(part)
    file = both if nested is not None else next((folder / f for f in files if (folder / f).exists()), folder / files[0])
    values = read_json(file) if nested is None else nested
    if not isinstance(values, dict):
        raise InvalidModelError(f"{file}: '{part}' is not a JSON object")
    settings = Config({k: v for k, v in values.items() if v is not None}, {**FIXED, **defaults}, file)
    for name in FIXED:
        settings.refuse_unless(name, settings.defaults[name])
    return settings


def tied_head(root: Config) -> bool:
    """Say whether the head is the embedding. One in the checkpoint is used whatever its config says, as transformers does."""
    headed = any(name.endswith("lm_head.weight") for name in tensors_beside(root.file))
    return not headed and root.get("tie_word_embeddings") is not False


def pixel_limits(settings: Config) -> tuple[int, int]:
    """Return the least and most pixels of a resized picture, in any of the three spellings of these settings."""
    def limit(old: str, new: str) -> int:
        size = settings.get("size")
        values = (settings.get(old), size.get(new), size.get(old), settings.defaults["size"][new])
        value = next(v for v in values if v is not None)
        if type(value) is not int or value < 1:
            raise InvalidModelError(f"{settings.file}: '{old}' is {value!r}; a positive integer is expected")
        return value

    with malformed_is(f"{settings.file}: 'size' is of the wrong kind"):
        return limit("min_pixels", "shortest_edge"), limit("max_pixels", "longest_edge")


def square(config: Config, name: str) -> int:
    """Return the side of a square: one number, or two equal ones. Raises: UnsupportedModelError."""
    value = config.need(name)
    sides = set(value) if isinstance(value, list) else {value}
    side = sides.pop() if len(sides) == 1 else None
    if type(side) is not int or side < 1:
        raise UnsupportedModelError(f"{config.file}: '{name}' is {value}; this converter knows squares")
    return side


def write_encoder_keys(out: GGUFWriter, vision: Config, images: Config, *, projector: str, image_size: int, d_model: int,
                       d_ff: int, n_layers: int, n_heads: int, eps: float, d_text: int) -> None:
    """Write the keys that every encoder has."""
    vision.refuse_unless("hidden_act", *ACTIVATIONS)
    use_gelu, use_silu = ACTIVATIONS[vision.need("hidden_act")]
    out.add_clip_has_vision_encoder(True)
    out.add_clip_projector_type(projector)
    out.add_clip_vision_projector_type(projector)
    out.add_vision_use_gelu(use_gelu)
    out.add_vision_use_silu(use_silu)
    out.add_string("clip.vision.hidden_act", vision.need("hidden_act"))
    out.add_vision_image_size(image_size)
    out.add_vision_patch_size(vision.count("patch_size"))
    out.add_vision_embedding_length(d_model)
    out.add_vision_feed_forward_length(d_ff)
    out.add_vision_block_count(n_layers)
    out.add_vision_head_count(n_heads)
    out.add_vision_projection_dim(d_text)
    out.add_vision_attention_layernorm_eps(eps)
    write_colours(out, images)


def write_colours(out: GGUFWriter, images: Config, arch: str = "clip") -> None:
    """Write what is done with colours, and the filter that resizes."""
    with malformed_is(f"{images.file}: a value is of the wrong kind"):
        for name in ("image_mean", "image_std"):
            values = [float(v) for v in images.need(name)]
            if len(values) != 3:
                raise InvalidModelError(f"{images.file}: '{name}' has {len(values)} values for 3 colours")
            out.add_array(f"{arch}.vision.{name}", values)
        out.add_uint32(f"{arch}.vision.resample", int(images.need("resample")))


def attention(block: str, source: str, width: int, bias: bool = False, out: str = "o_proj",
              row_order: np.ndarray | None = None) -> Iterator[Entry]:
    """List the matrices of the attention of an encoder's layer; `row_order` is that of queries and keys."""
    for name, theirs in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj"), ("attn_out", out)):
        rows = row_order if name in ("attn_q", "attn_k") else None
        yield from linear(f"{block}.{name}", f"{source}.{theirs}", width, width, bias, rows)


def feed_forward(block: str, source: str, width: int, units: int, parts: Mapping[str, str], bias: bool = True) -> Iterator[Entry]:
    """List the feed-forward of an encoder's layer; `parts` has the checkpoint's names by ours, of which ffn_down is the way back.

    In formats of blocks its units are padded to whole ones (So400m has 4304, Qwen2.5-VL 3420). Units of zeros add nothing: all
    activations are 0 at 0, and their columns of ffn_down are 0 too.
    """
    for name, theirs in parts.items():
        shape, axis = ((width, units), 1) if name == "ffn_down" else ((units, width), 0)
        for entry in linear(f"{block}.{name}", f"{source}.{theirs}", *shape, bias):
            yield replace(entry, units=axis if axis < len(entry.shape) else None)


def pre_norm_layer(block: str, source: str, width: int, units: int) -> Iterator[Entry]:
    """List a layer of CLIP's and SigLIP's encoders: a norm before the attention and before a feed-forward of two matrices, biases everywhere."""
    yield from layer_norm(f"{block}.ln1", f"{source}.layer_norm1", width)
    yield from attention(block, f"{source}.self_attn", width, bias=True, out="out_proj")
    yield from layer_norm(f"{block}.ln2", f"{source}.layer_norm2", width)
    yield from feed_forward(block, f"{source}.mlp", width, units, {"ffn_up": "fc1", "ffn_down": "fc2"})


def flat_patches(at: str, width: int, patch: int) -> Iterator[Entry]:
    """List NaFlex's embedding of patches, whose pixels lie y, x, channel in the checkpoint."""
    def by_channel(rows: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(rows.reshape(-1, patch, patch, 3).transpose(0, 3, 1, 2))

    yield Entry("v.patch_embd.weight", f"{at}.patch_embedding.weight", (width, 3, patch, patch), stored=(width, patch * patch * 3), make=by_channel,
                instead=FLOAT32)
    yield Entry("v.patch_embd.bias", f"{at}.patch_embedding.bias", (width,))


def behind_layers(source: str) -> set[str]:
    """Name the tensors of SigLIP's last norm and of the head that pools its rows, which a decoder does not see."""
    both = [f"{name}.{part}" for name in ("post_layernorm", "head.attention.out_proj", "head.layernorm", "head.mlp.fc1", "head.mlp.fc2")
            for part in ("weight", "bias")]
    return {f"{source}.{name}" for name in (*both, "head.probe", "head.attention.in_proj_weight", "head.attention.in_proj_bias")}
