"""Qwen2-VL and Qwen2.5-VL against transformers: pixels, positions, encoder, decoder; tiny random models, odd sizes and ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

import pyengine as pe
import tiny
from cases import Case, Converted, Tokens
from foreign import Dialect, LlamaCpp, Saved, vision_name
from foreign import Tensors as NamedTensors
from converters import convert
from hollow import Decoder, Encoder, Full, kv, Tensor
from pictures import A
from sight import of_any_backend, Run, Sight
from tiny import COMMON

from pyengine.nn.batch import Batch
from pyengine.dtype import dtype
from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError, UnsupportedModelError
from pyengine.files.dialects import translate
from pyengine.files.gguf import GGUFFile
from pyengine.backends.graph import Graph
from pyengine.files.hparams import Hparams
from pyengine.media.image import Image
from pyengine.media.video import Video
from oracle import Planned
from pyengine.nn.cache import LayerCache
from pyengine.models import model_class
from pyengine.models.architecture import EncoderFiles
from pyengine.models.qwen2vl import most_rows, smart_resize
from pyengine.graph.tensor import Dim
from pyengine.files.weights import Weights

try:
    import torch
    import transformers
except ImportError:         # the cases are found without them
    torch = transformers = None

KIB, GIB = 2**10, 2**30
pytestmark = pytest.mark.skipif(transformers is None, reason="needs transformers and torch: pip install -r requirements/test.txt")


# ---- the cases ------------------------------------------------------------------------------------------------------------------


# What the family's real template does, in other words: contents are strings or lists of parts.
TEMPLATE = """{%- set ns = namespace(images=0, videos=0) -%}
{%- for m in messages -%}
  {%- if loop.first and m['role'] != 'system' -%}
    {{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
  {%- endif -%}
  {{ '<|im_start|>' + m['role'] + '\n' }}
  {%- if m['content'] is string -%}{{ m['content'] }}
  {%- else -%}
    {%- for part in m['content'] -%}
      {%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
        {%- set ns.images = ns.images + 1 -%}
        {{ ('Picture ' ~ ns.images ~ ': ' if add_vision_id else '') + '<|vision_start|><|image_pad|><|vision_end|>' }}
      {%- elif part['type'] == 'video' or 'video' in part -%}
        {%- set ns.videos = ns.videos + 1 -%}
        {{ ('Video ' ~ ns.videos ~ ': ' if add_vision_id else '') + '<|vision_start|><|video_pad|><|vision_end|>' }}
      {%- else -%}{{ part['text'] }}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""

TOKENS = Tokens(
    ("<|video_pad|>", "<|im_end|>", "<|vision_end|>", "<|im_start|>", "<|image_pad|>", "<|endoftext|>",
     "<|vision_start|>", "<|box_start|>", "<|box_end|>"), None, "<|im_end|>", "<|endoftext|>", TEMPLATE,
    {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
     "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"})


class QwenSight(Sight):
    """`Seen.pixels` are patches [n, 3 * T * p * p], its grids frames, rows and columns of patches. Videos need no torchvision here."""

    model_types = ("qwen2_vl", "qwen2_5_vl")
    marker = "<|vision_start|><|image_pad|><|vision_end|>"

    def images(self, config: Any, settings: dict[str, Any]) -> Any:
        vision = config.vision_config
        return transformers.Qwen2VLImageProcessorPil(**{
            "patch_size": vision.patch_size, "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size, "min_pixels": 56 * 56, "max_pixels": 224 * 224, **settings})

    def processor(self, folder: Path, config: Any, tokenizer: Any) -> Any:
        images = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder)
        return of_any_backend(transformers.Qwen2VLProcessor)(images, tokenizer, None)

    def part(self, processor: Any, config: Any, folder: Path, part: Any, **settings: Any) -> tuple[list[int], dict[str, Any]]:
        if not isinstance(part, (list, tuple)):
            ids, made = super().part(processor, config, folder, part, **settings)
            return ids, {"kind": "image", "pixels": made["pixel_values"], "grid": made["image_grid_thw"][0].tolist()}
        patches, grid = video_patches(processor.image_processor, folder, part)
        n = int(np.prod(grid)) // config.vision_config.spatial_merge_size ** 2
        ids = [config.vision_start_token_id, *[config.video_token_id] * n, config.vision_end_token_id]
        return ids, {"kind": "video", "pixels": torch.tensor(patches), "grid": grid}

    def run(self, model: Any, tokens: Any, made: list[dict[str, Any]], fps: float | None) -> Run:
        config = model.config
        inputs: dict[str, Any] = {
            "mm_token_type_ids": ((tokens == config.image_token_id) + 2 * (tokens == config.video_token_id)).int()}
        features: dict[str, Any] = {}
        for kind, name, run in (("image", "pixel_values", model.model.get_image_features),
                                ("video", "pixel_values_videos", model.model.get_video_features)):
            its = [m for m in made if m["kind"] == kind]
            if its:
                inputs[name], grid = torch.cat([m["pixels"] for m in its]), torch.tensor([m["grid"] for m in its])
                inputs[f"{kind}_grid_thw"] = grid
                features[kind] = iter(run(inputs[name], grid).pooler_output)
                if kind == "video" and config.model_type == "qwen2_5_vl":
                    # 24: what VideoMetadata.sampled_fps says of frames without a rate
                    inputs["second_per_grid_ts"] = torch.full((len(its),), config.vision_config.temporal_patch_size / (fps or 24))
        return Run(inputs, [next(features[m["kind"]]) for m in made], [m["pixels"] for m in made], [tuple(m["grid"]) for m in made])


def video_patches(images: Any, folder: Path, frames: Sequence[Any]) -> tuple[np.ndarray, list[int]]:
    """Return a video's patches [n, 3 * T * p * p] and grid: frames as the image processor has them, T to a patch."""
    settings = folder / "video_preprocessor_config.json"
    size = json.loads(settings.read_text())["size"] if settings.exists() else dict(images.size)
    t, p = images.temporal_patch_size, images.patch_size
    single = [images(images=[f], size=size, return_tensors="np") for f in frames]
    _, rows, columns = single[0]["image_grid_thw"][0].tolist()
    # the image processor fills a patch with T copies of its picture: one of each frame is kept; the last frame is repeated
    kept = [s["pixel_values"].reshape(-1, 3, t, p * p)[:, :, 0] for s in single]
    kept += [kept[-1]] * (-len(kept) % t)
    patches = np.concatenate([np.stack(kept[i:i + t], axis=2).reshape(rows * columns, -1) for i in range(0, len(kept), t)])
    return patches, [len(kept) // t, rows, columns]


class Qwen2Dialect(Dialect):
    """llama.cpp's `conversion/qwenvl.py`. Qwen2-VL's feed-forward length is the width of the text model, as its converter writes it."""

    model_types = ("qwen2_vl",)
    arch, names, projector = "qwen2vl", gguf.MODEL_ARCH.QWEN2VL, "qwen2vl_merger"
    vision_sizes = ("hidden_size", "embed_dim", "depth", "num_heads")

    def assume(self, saved: Saved) -> None:
        vision = saved.vision
        assert vision["spatial_merge_size"] == vision["temporal_patch_size"] == 2 and vision.get("window_size", 112) == 112
        full = vision.get("fullatt_block_indexes", [])
        assert not full or full == list(range(full[0], vision["depth"], full[0] + 1))

    def text_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        rope = saved.text["rope_parameters"]
        w.add_rope_freq_base(rope["rope_theta"])
        w.add_rope_dimension_sections([*rope["mrope_section"], 0])

    def vision_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        w.add_vision_attention_layernorm_eps(1e-6)

    def vision_tensor(self, saved: Saved, source: str, value: np.ndarray, legacy: bool) -> NamedTensors:
        if source == "visual.patch_embed.proj.weight":
            yield "v.patch_embd.weight", value[:, :, 0]
            yield "v.patch_embd.weight.1", value[:, :, 1]
        elif ".qkv." in source:
            for part, third in zip("qkv", np.split(value, 3)):
                yield vision_name(source.replace(".qkv.", f".{part}."), legacy), third
        else:
            yield vision_name(source, legacy), value


class Qwen25Dialect(Qwen2Dialect):
    """The same with windows; Ollama's `convert/convert_qwen25vl.go`."""

    model_types = ("qwen2_5_vl",)
    projector = "qwen2.5vl_merger"
    vision_sizes = ("intermediate_size", "hidden_size", "depth", "num_heads")
    ollama_arch = "qwen25vl"
    ollama_names = (("visual", "v"), ("blocks", "blk"), ("attn.proj", "attn_out"), ("norm1", "ln1"), ("norm2", "ln2"),
                    ("mlp.down_proj", "ffn_down"), ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"))

    def vision_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        super().vision_keys(w, saved)
        w.add_vision_use_silu(True)
        w.add_vision_n_wa_pattern(saved.vision["fullatt_block_indexes"][0] + 1)

    def ollama_keys(self, w: gguf.GGUFWriter, saved: Saved) -> tuple[dict[str, int], float | None]:
        text, vision = saved.text, saved.vision
        w.add_layer_norm_rms_eps(text["rms_norm_eps"])
        w.add_rope_freq_base(text["rope_parameters"]["rope_theta"])
        w.add_array("qwen25vl.rope.mrope_section", text["rope_parameters"]["mrope_section"])
        w.add_float32("qwen25vl.vision.rope.freq_base", 1e4)
        w.add_array("qwen25vl.vision.fullatt_block_indexes", vision["fullatt_block_indexes"])
        return {"block_count": vision["depth"], "spatial_merge_size": vision["spatial_merge_size"],
                "spatial_patch_size": 0, "window_size": vision["window_size"],
                "temporal_patch_size": vision["temporal_patch_size"], "attention.head_count": vision["num_heads"]}, 1e-6

    def ollama_tensor(self, name: str, value: np.ndarray) -> NamedTensors:
        if "patch_embed.proj" in name:
            for i in range(2):      # [out, 3, 1, p, p], then without the 1
                yield name.replace("patch_embed.proj", f"patch_embd_{i}"), value[:, :, i]
        elif "attn.qkv" in name:
            for part, third in zip("qkv", np.split(value, 3)):
                yield name.replace("attn.qkv", f"attn_{part}"), third
        else:
            yield name, value


def full_encoder(d_model: int) -> Encoder:
    """Qwen2.5-VL's encoder: keys and tensors of llama.cpp's projector file. At most 16,384 soft tokens a picture."""
    width, d_ff, n_layers, patch = 1280, 3420, 32, 14
    keys = {"clip.has_vision_encoder": True, "clip.projector_type": "qwen2.5vl_merger", "clip.use_silu": True,
            "clip.vision.image_size": 560,
            "clip.vision.patch_size": patch, "clip.vision.block_count": n_layers, "clip.vision.embedding_length": width,
            "clip.vision.feed_forward_length": d_ff, "clip.vision.attention.head_count": 16, "clip.vision.n_wa_pattern": 8,
            "clip.vision.attention.layer_norm_epsilon": 1e-6, "clip.vision.projection_dim": d_model}
    group = 4 * width
    tensors: list[Tensor] = [("v.patch_embd.weight", (width, 3, patch, patch), "F16"),
                             ("v.patch_embd.weight.1", (width, 3, patch, patch), "F16"), ("v.post_ln.weight", (width,), "F32"),
                             ("mm.0.weight", (group, group), "F16"), ("mm.0.bias", (group,), "F32"),
                             ("mm.2.weight", (d_model, group), "F16"), ("mm.2.bias", (d_model,), "F32")]
    for i in range(n_layers):
        at = f"v.blk.{i}."
        tensors += [(f"{at}ln1.weight", (width,), "F32"), (f"{at}ln2.weight", (width,), "F32")]
        for name, shape in {**dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_out"), (width, width)), "ffn_gate": (d_ff, width),
                            "ffn_up": (d_ff, width), "ffn_down": (width, d_ff)}.items():
            tensors += [(f"{at}{name}.weight", shape, "F16"), (f"{at}{name}.bias", shape[:1], "F32")]
    return keys, tensors


FULL = Decoder("qwen2vl", 28, 3584, 18944, 28, 4, 128, 152064, 128000, biases=True,
               keys={"rope.dimension_sections": np.array([16, 24, 24, 0], np.int32)})
FULL_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

TEXT_CONFIG = {**COMMON, "vocab_size": 520, "max_position_embeddings": 512,
               "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
FILE = {"general.architecture": "qwen2vl", "qwen2vl.rope.dimension_sections": [2, 3, 3, 0], "tokenizer.chat_template": TEMPLATE,
        "qwen2vl.vocab_size": 520}
CLIP = {"has_vision_encoder": True, "image_size": 560, "patch_size": 14, "embedding_length": 80, "projection_dim": 96,
        "attention.head_count": 4, "attention.layer_norm_epsilon": np.float32(1e-6), "spatial_merge_size": 2,
        "temporal_patch_size": 2, "rope.freq_base": 1e4, "resample": 3, "image_min_pixels": 3136,
        "image_max_pixels": 50176, "video_min_pixels": 3136, "video_max_pixels": 50176, "video_min_frames": 4,
        "video_max_frames": 768, "video_sample_frames": False,
        "image_mean": [np.float32(x) for x in (0.48145466, 0.4578275, 0.40821073)],
        "image_std": [np.float32(x) for x in (0.26862954, 0.26130258, 0.27577711)]}
CLIP_TOKENS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "image_start_token_id": "<|vision_start|>",
               "image_end_token_id": "<|vision_end|>"}
RENAMES = ((("model.", "model.language_model."), ("visual.", "model.visual.")),
           (("model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")))
ASSUMED = {"vision_config": {"window_size": 112}}
YARN = {"text_config": {"rope_parameters": {**TEXT_CONFIG["rope_parameters"], "rope_type": "yarn", "factor": 8.0,
                                           "original_max_position_embeddings": 64}}}

# Patch and window sizes give windows of 2 x 2 merged patches, cut at the edges of most pictures.
QWEN25 = Case(
    "qwen2_5_vl", "qwen2vl", "Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", "qwen2", {},
    {**TEXT_CONFIG, "rms_norm_eps": 1e-6},
    {"depth": 4, "hidden_size": 80, "intermediate_size": 100, "num_heads": 4, "out_hidden_size": 96,
     "window_size": 56, "fullatt_block_indexes": [1, 3], "tokens_per_second": 3},
    TOKENS, QwenSight(), mrope=True, videos=True,
    converted=Converted(
        FILE, clip={**CLIP, "projector_type": "qwen2.5vl_merger", "use_gelu": False, "use_silu": True, "hidden_act": "silu",
                    "block_count": 4, "feed_forward_length": 100, "tokens_per_second": 3.0, "window_size": 112,
                    "wa_layer_indexes": [1, 3], "n_wa_pattern": 2},
        clip_tokens=CLIP_TOKENS, renames=RENAMES, runs={"qwen2_5_vl": ASSUMED, "qwen2_5_vl-yarn": YARN}),
    dialect=Qwen25Dialect(), llama_cpp=LlamaCpp(assumed=ASSUMED),
    full={"qwen-7b": Full(FULL, FULL_TOKENS, full_encoder), "qwen-7b-f16": Full(FULL, FULL_TOKENS, full_encoder, "F16")})

QWEN2 = Case(
    "qwen2_vl", "qwen2vl", "Qwen2VLConfig", "Qwen2VLForConditionalGeneration", "qwen2", {"tie_word_embeddings": True}, TEXT_CONFIG,
    {"depth": 3, "embed_dim": 80, "hidden_size": 96, "num_heads": 4, "mlp_ratio": 2},
    TOKENS, QwenSight(), mrope=True, videos=True, cached_as="qwen2_5_vl",
    converted=Converted(
        FILE, clip={**CLIP, "projector_type": "qwen2vl_merger", "use_gelu": False, "use_silu": False, "hidden_act": "quick_gelu",
                    "block_count": 3, "feed_forward_length": 160},
        clip_tokens=CLIP_TOKENS, renames=RENAMES, runs={"qwen2_vl": {}, "qwen2_vl-untied": {"tie_word_embeddings": False}}),
    dialect=Qwen2Dialect(), llama_cpp=LlamaCpp())

CASES = (QWEN25, QWEN2)


# ---- another tiny model, bound by itself ------------------------------------------------------------------------------------------

N_CTX = 400
PIXELS = {"min_pixels": 2000, "max_pixels": 30000}                             # about 8 to 104 rows of 12 x 2 pixels
IDS = {"image_token_id": 77, "video_token_id": 91, "vision_start_token_id": 5, "vision_end_token_id": 33}
TEXT = {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 1, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "mrope_section": [3, 2, 3]}}
VISION = {"qwen2_5_vl": {"depth": 4, "hidden_size": 40, "intermediate_size": 52, "num_heads": 2, "out_hidden_size": 48, "patch_size": 6,
                         "window_size": 44, "fullatt_block_indexes": [0, 2], "tokens_per_second": 3},
          "qwen2_vl": {"depth": 3, "embed_dim": 40, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 2, "patch_size": 6}}
SIZES = [(61, 47), (30, 400), (300, 17), (9, 11), (400, 500), (96, 96), (36, 12), (200, 1)]     # width, height
RNG = np.random.default_rng(4)
PICTURES = [RNG.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in SIZES]

TEXT_NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
              "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm",
              "input_layernorm": "attn_norm"}
VISION_NAMES = {"attn.proj": "attn_out", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
                "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down", "norm1": "ln1", "norm2": "ln2"}
OUTER = {"llama.cpp": ({0: "v.patch_embd.weight", 1: "v.patch_embd.weight.1"}, {"ln_q": "v.post_ln", "mlp.0": "mm.0", "mlp.2": "mm.2"}),
         "ollama": ({0: "v.patch_embd_0.weight", 1: "v.patch_embd_1.weight"},
                    {"ln_q": "v.merger.ln_q", "mlp.0": "v.merger.mlp.0", "mlp.2": "v.merger.mlp.2"})}


def tensors(model, dialect: str, swapped: bool = False) -> dict[str, np.ndarray]:
    """The model's tensors by the names of a dialect. `swapped`: ffn_up and ffn_down exchanged, as llama.cpp's first converter did."""
    slices, merger = OUTER[dialect]
    out = {}
    for name, p in model.state_dict().items():
        a, kind = p.detach().float().numpy(), name.rpartition(".")[2]
        if ".visual." in name:
            part = name.split(".visual.")[1].rpartition(".")[0]
            if part == "patch_embed.proj":
                out |= {slices[i]: a[:, :, i] for i in range(2)}
            elif part.startswith("merger."):
                out[f"{merger[part[7:]]}.{kind}"] = a
            else:
                _, i, part = part.split(".", 2)
                if part == "attn.qkv":
                    out |= {f"v.blk.{i}.attn_{n}.{kind}": x for n, x in zip("qkv", np.split(a, 3))}
                else:
                    n = VISION_NAMES[part]
                    n = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}.get(n, n) if swapped else n
                    out[f"v.blk.{i}.{n}.{kind}"] = a
        elif ".layers." in name:
            i, part = name.split(".layers.")[1].rpartition(".")[0].split(".", 1)
            out[f"blk.{i}.{TEXT_NAMES[part]}.{kind}"] = a
        else:
            out[{"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[name.split(".")[-2]] + "." + kind] = a
    return out


def keys(model, dialect: str) -> dict[str, object]:
    """Metadata of a dialect."""
    arch = {"llama.cpp": "qwen2vl", "ollama": "qwen25vl"}[dialect]
    t, v = model.config.text_config, model.config.vision_config
    qwen25 = model.config.model_type == "qwen2_5_vl"
    out: dict[str, object] = {
        "block_count": t.num_hidden_layers, "context_length": 512, "embedding_length": t.hidden_size, "vocab_size": t.vocab_size,
        "feed_forward_length": t.intermediate_size, "attention.head_count": t.num_attention_heads, "rope.freq_base": 1e5,
        "attention.head_count_kv": t.num_key_value_heads, "attention.layer_norm_rms_epsilon": t.rms_norm_eps}
    vision = {"block_count": v.depth, "embedding_length": v.hidden_size if qwen25 else v.embed_dim, "attention.head_count": v.num_heads,
              "patch_size": v.patch_size, "spatial_merge_size": v.spatial_merge_size, "attention.layer_norm_epsilon": 1e-6}
    sections = TEXT["rope_parameters"]["mrope_section"]
    if dialect == "ollama":
        out |= {"rope.mrope_section": sections, "vision.fullatt_block_indexes": v.fullatt_block_indexes,
                "vision.window_size": v.window_size, "vision.temporal_patch_size": 2, "vision.max_pixels": PIXELS["max_pixels"]}
        return {f"{arch}.{k}": x for k, x in (out | {f"vision.{k}": x for k, x in vision.items()}).items()}
    vision |= {"projector_type": "qwen2.5vl_merger" if qwen25 else "qwen2vl_merger", "image_mean": [0.4, 0.5, 0.45],
               "image_std": [0.2, 0.25, 0.3], "feed_forward_length": v.intermediate_size if qwen25 else v.embed_dim * v.mlp_ratio,
               "hidden_act": v.hidden_act, "image_min_pixels": PIXELS["min_pixels"], "image_max_pixels": PIXELS["max_pixels"],
               "image_token_id": 77, "video_token_id": 91, "image_start_token_id": 5, "image_end_token_id": 33}
    if qwen25:
        vision |= {"window_size": v.window_size, "wa_layer_indexes": v.fullatt_block_indexes, "tokens_per_second": 3.0}
    out["rope.dimension_sections"] = [*sections, 0]
    return {f"{arch}.{k}": x for k, x in out.items()} | {f"clip.vision.{k}": x for k, x in vision.items()}


def write(path: Path, meta: dict[str, object], arrays: dict[str, np.ndarray], vision_format: str = "F32") -> Path:
    writer = gguf.GGUFWriter(path, next(iter(meta)).split(".")[0])
    for key, value in meta.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool, list: writer.add_array}
        add[type(value)](key, value)
    for name, a in arrays.items():
        a = np.ascontiguousarray(a)
        if vision_format != "F32" and name.startswith(("v.", "mm.")) and a.ndim > 1:
            kind = gguf.GGMLQuantizationType[vision_format if a.ndim == 2 else "F16"]
            a = gguf.quants.quantize(a, kind)
            writer.add_tensor(name, a, raw_dtype=kind)
        else:
            writer.add_tensor(name, a)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def bind(path: Path, n_ctx: int = N_CTX, rows: int | None = None) -> SimpleNamespace:
    """The architecture and its encoder, bound to a file, every tensor of which must be used."""
    file = translate(GGUFFile(path))
    h, v, w = Hparams(file.metadata), Hparams(file.metadata, "clip"), Weights(file)
    text = model_class(h.arch)(h, w)
    special = {"<|image_pad|>": 77, "<|video_pad|>": 91, "<|vision_start|>": 5, "<|vision_end|>": 33}
    encoder = text.encoders(EncoderFiles(h, v, w, special.__getitem__))["image"]
    w.finish()
    return SimpleNamespace(text=text, vision=Planned(encoder, n_ctx, rows), file=file)


def random_model(kind: str, **vision):
    config = {"qwen2_5_vl": transformers.Qwen2_5_VLConfig, "qwen2_vl": transformers.Qwen2VLConfig}[kind]
    model = {"qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration, "qwen2_vl": transformers.Qwen2VLForConditionalGeneration}[kind]
    model = model._from_config(config(text_config=TEXT, vision_config=VISION[kind] | vision, **IDS), attn_implementation="eager")
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=g)
            gain = name.endswith(".weight") and p.dim() == 1
            p.copy_(1 + 0.3 * noise if gain else 0.4 * noise if p.dim() == 1 else 1.5 * noise / p[0].numel() ** 0.5)
    return model.float().eval()


@pytest.fixture(scope="module", params=[c.kind for c in CASES])
def pair(request, tmp_path_factory):
    """A model of transformers and the same one bound to a GGUF file with llama.cpp's names."""
    hf = random_model(request.param)
    path = write(tmp_path_factory.mktemp("qwen") / f"{request.param}.gguf", keys(hf, "llama.cpp"), tensors(hf, "llama.cpp"))
    return SimpleNamespace(hf=hf, path=path, kind=request.param, **vars(bind(path)))


def encode(vision, views, device: str = "cpu") -> np.ndarray:
    g = Graph()
    program = g.compile(vision.declare(g), device=device)
    return np.concatenate([program.run(**view.inputs).copy() for view in views])


def hf_pixels(pictures, kind: str, **settings):
    processor = transformers.Qwen2VLImageProcessorPil(**{
        "patch_size": 6, "image_mean": [0.4, 0.5, 0.45], "image_std": [0.2, 0.25, 0.3], **PIXELS, **settings})
    out = processor(pictures, return_tensors="pt", input_data_format="channels_last")          # a height of 1 or 3 would be ambiguous
    return out["pixel_values"], out["image_grid_thw"]


def hf_video(frames: np.ndarray):
    """Pixels of a video as the image processor would give them for frames in pairs: transformers' own needs torchvision."""
    frames = [*frames, *frames[-1:]][: len(frames) + len(frames) % 2]
    flat = [hf_pixels([f], "") for f in frames]
    pairs = [torch.stack([a[0].view(len(a[0]), 3, 2, 36)[:, :, 0], b[0].view(len(b[0]), 3, 2, 36)[:, :, 0]], 2).flatten(1)
             for a, b in zip(flat[::2], flat[1::2])]
    grid = flat[0][1].clone()
    grid[0, 0] = len(pairs)
    return torch.cat(pairs), grid


def close(got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    assert got.shape == want.shape and np.ptp(want) > 0
    assert np.abs(got - want).max() <= tolerance * np.ptp(want), np.abs(got - want).max() / np.ptp(want)


def in_raster_order(view, patches: np.ndarray) -> np.ndarray:
    """Patches as transformers has them before its encoder."""
    if "order" not in view.inputs:
        return patches
    return patches.reshape(view.axes["t"], 4, -1)[view.inputs["order"]].reshape(len(patches), -1)


# ---- processor ------------------------------------------------------------------------------------------------------------------


def test_pixels_are_transformers(pair) -> None:
    for picture in PICTURES:
        want, grid = hf_pixels([picture], pair.kind)
        done = pair.vision.process(Image(picture))
        (view,) = done.views
        assert np.array_equal(in_raster_order(view, view.inputs["patches"]), want.numpy())
        assert view.grid == (1, int(grid[0, 1]) // 2, int(grid[0, 2]) // 2)
        assert done.parts[0] == 5 and done.parts[-1] == 33 and len(done.parts) == 3
        assert done.size == picture.shape[1::-1] and done.processed == (int(grid[0, 2]) * 6, int(grid[0, 1]) * 6)


def test_sizes_are_transformers_and_within_the_bound() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

    rng = np.random.default_rng(3)
    for _ in range(3000):
        height, width = (int(s) for s in np.exp(rng.uniform(0, 9, 2)))
        if max(height, width) > 200 * min(height, width):
            continue
        factor = int(rng.choice([12, 28, 56]))
        least, most = sorted(int(s) for s in np.exp(rng.uniform(3, 14, 2)))
        h, w = smart_resize(height, width, factor, least, most)
        assert (h, w) == theirs(height, width, factor, least, most)
        assert h * w // factor**2 <= most_rows(least, most, factor)


def test_options_change_limits_and_others_are_refused(pair) -> None:
    small = pair.vision.process(Image(PICTURES[4], {"max_pixels": 5000}))
    want, _ = hf_pixels([PICTURES[4]], pair.kind, max_pixels=5000)
    assert len(small.views[0].inputs["patches"]) == len(want) < len(hf_pixels([PICTURES[4]], pair.kind)[0])
    for media, text in [
        (Image(PICTURES[0], {"pan_and_scan": True}), "pan_and_scan"),
        (Image(PICTURES[0], {"sample_fps": 1.0}), "sample_fps"),
        (Image(PICTURES[0], {"min_pixels": 0}), "min_pixels"),
        (Image(PICTURES[4], {"max_pixels": 45000}), "planned for pictures of up to"),
        (Image(PICTURES[0][:1].repeat(9, axis=1)), "200 times"),
        (Video([PICTURES[0]], sample_fps=0), "sample_fps"),
    ]:
        with pytest.raises(RequestError, match=text):
            pair.vision.process(media)
    for media in (Video([PICTURES[4]] * 40), Image(PICTURES[4], {"max_pixels": 10**6})):
        with pytest.raises(ContextOverflowError, match="context holds 400"):
            pair.vision.process(media)


def test_sampling_is_transformers(pair, tmp_path) -> None:
    def theirs(total: int, fps: float, wanted: float) -> np.ndarray:          # sample_frames, with torch's arithmetic
        most = min(768, total) // 2 * 2
        n = int(min(max(total / fps * wanted, 4), most, total) / 2) * 2
        return torch.arange(0, total, total / n).int().numpy()

    for total in (2, 3, 5, 17, 48, 101, 240, 3001):
        for fps in (1.0, 12.5, 24.0, 29.97, 60.0):
            assert np.array_equal(pair.vision.sample(total, fps, 2.0), theirs(total, fps, 2.0))
    assert pair.vision.sample(1, 24.0, 2.0).tolist() == [0]
    frames = [np.full((24, 24, 3), i, np.uint8) for i in range(30)]
    sampled = pair.vision.process(Video(frames, fps=10.0, sample_fps=2.0)).views[0]
    assert sampled.grid[0] == 3                                                # 3 seconds, 6 frames
    chosen = pair.vision.process(Video([frames[i] for i in range(0, 30, 5)], fps=2.0)).views[0]
    listed = keys(pair.hf, "llama.cpp") | {"clip.vision.video_sample_frames": True, "clip.vision.video_fps": 2.0}
    always = bind(write(tmp_path / "m.gguf", listed, tensors(pair.hf, "llama.cpp"))).vision
    assert np.array_equal(always.process(Video(frames, fps=10.0)).views[0].inputs["patches"], sampled.inputs["patches"])
    assert always.process(Video(frames[:8])).views[0].grid[0] == 4             # without a rate nothing can be sampled
    assert np.array_equal(sampled.inputs["patches"], chosen.inputs["patches"]) and np.array_equal(sampled.positions, chosen.positions)


# ---- positions --------------------------------------------------------------------------------------------------------------------


def prompt(vision, media) -> tuple[list[int], np.ndarray, list]:
    """Ids as transformers wants them, our positions, and the processed media, of text between media."""
    ids, columns, at, done = [], [], 0, [vision.process(m) for m in media]
    for i, d in enumerate(done):
        for part in (9, 12, *d.parts, 40 + i):
            if isinstance(part, int):
                ids.append(part)
                columns.append(np.full((3, 1), at))
                at += 1
            else:
                n = part.positions.shape[1]
                ids += [vision.soft_video if isinstance(media[i], Video) else vision.soft] * n
                columns.append(part.positions + at)
                at += part.advance
    return ids, np.concatenate(columns, axis=1), done


def hf_positions(hf, ids, pictures, videos, seconds):
    types = torch.tensor([[1 if i == 77 else 2 if i == 91 else 0 for i in ids]])
    extra = {"second_per_grid_ts": torch.tensor(seconds)} if hf.config.model_type == "qwen2_5_vl" and seconds else {}
    return hf.model.get_rope_index(torch.tensor([ids]), types, image_grid_thw=torch.cat(pictures) if pictures else None,
                                   video_grid_thw=torch.cat(videos) if videos else None, **extra)[0][:, 0].numpy()


@pytest.mark.parametrize(("frames", "fps"), [(1, None), (2, 2.0), (3, 0.7), (4, 2.0), (5, 1.3), (5, None)])
def test_positions_are_transformers(pair, frames: int, fps: float | None) -> None:
    clip = RNG.integers(0, 256, (frames, 30, 44, 3), dtype=np.uint8)
    media = [Image(PICTURES[0]), Video(list(clip), fps=fps), Image(PICTURES[1])]
    ids, positions, done = prompt(pair.vision, media)
    grids = [torch.tensor([[d.views[0].grid[0], d.views[0].grid[1] * 2, d.views[0].grid[2] * 2]]) for d in done]
    want = hf_positions(pair.hf, ids, [grids[0], grids[2]], [grids[1]], [2 / (fps or 24)])
    assert np.array_equal(positions, want)
    assert done[1].views[0].grid[0] == (frames + 1) // 2


# ---- encoder ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_embeddings_are_transformers(pair, device: str) -> None:
    pictures = PICTURES if device == "cpu" else PICTURES[:2]
    pixels, grid = hf_pixels(pictures, pair.kind)
    with torch.no_grad():
        want = pair.hf.model.get_image_features(pixels, grid).pooler_output
    views = [pair.vision.process(Image(p)).views[0] for p in pictures]
    for view, rows in zip(views, want):
        close(encode(pair.vision, [view], device), rows.numpy(), 1e-5)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
def test_videos_are_transformers_in_one_run_or_several(pair, frames: int) -> None:
    clip = RNG.integers(0, 256, (frames, 50, 70, 3), dtype=np.uint8)
    pixels, grid = hf_video(clip)
    with torch.no_grad():
        want = pair.hf.model.get_video_features(pixels, grid).pooler_output[0].numpy()
    done = pair.vision.process(Video(list(clip), fps=2.0))
    assert len(done.views) == 1 and np.array_equal(in_raster_order(done.views[0], done.views[0].inputs["patches"]), pixels.numpy())
    close(encode(pair.vision, done.views), want, 1e-5)
    narrow = bind(pair.path, rows=len(want) // done.views[0].grid[0]).vision      # one time step a run
    parts = narrow.process(Video(list(clip), fps=2.0)).views
    assert len(parts) == done.views[0].grid[0]
    assert np.array_equal(np.concatenate([p.positions for p in parts], axis=1), done.views[0].positions)
    assert [p.advance for p in parts] == [0] * (len(parts) - 1) + [done.views[0].advance]
    close(encode(narrow, parts), want, 1e-5)


@pytest.mark.parametrize(("form", "tolerance"), [("F16", 2e-3), ("BF16", 2e-2)])
def test_weights_in_other_formats(pair, tmp_path, form: str, tolerance: float) -> None:
    path = write(tmp_path / "m.gguf", keys(pair.hf, "llama.cpp"), tensors(pair.hf, "llama.cpp"), form)
    views = pair.vision.process(Image(PICTURES[0])).views
    got, want = encode(bind(path).vision, views), encode(pair.vision, views)
    assert 0 < np.abs(got - want).max() < tolerance * np.ptp(want)


def test_weights_in_blocks_of_8_bits(tmp_path) -> None:
    hf = random_model("qwen2_5_vl", hidden_size=64, intermediate_size=96, num_heads=4)
    f32, q8 = (bind(write(tmp_path / f"{form}.gguf", keys(hf, "llama.cpp"), tensors(hf, "llama.cpp"), form)).vision for form in ("F32", "Q8_0"))
    views = f32.process(Image(PICTURES[0])).views
    got, want = encode(q8, views), encode(f32, views)
    assert 0 < np.abs(got - want).max() < 0.05 * np.ptp(want)


@pytest.mark.parametrize("kind", [c.kind for c in CASES])
def test_converted_checkpoints(tiny_gguf, kind: str) -> None:
    path, folder = tiny_gguf(kind)
    ours = bind(path).vision
    config = transformers.AutoConfig.from_pretrained(folder)
    assert (ours.soft, ours.soft_video) == (config.image_token_id, config.video_token_id)
    assert ours.markers["image"] == (config.vision_start_token_id, config.image_token_id, config.vision_end_token_id)
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder)
    out = processor([PICTURES[4]], return_tensors="pt")
    hf = transformers.AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        want = hf.model.get_image_features(out["pixel_values"], out["image_grid_thw"]).pooler_output[0].numpy()
    close(encode(ours, ours.process(Image(PICTURES[4])).views), want, 1e-5)


def test_ollamas_dialect(tmp_path) -> None:
    hf = random_model("qwen2_5_vl")
    ours = bind(write(tmp_path / "o.gguf", keys(hf, "ollama"), tensors(hf, "ollama"))).vision
    processor = transformers.Qwen2VLImageProcessorPil(patch_size=6, max_pixels=PIXELS["max_pixels"])
    out = processor([PICTURES[0]], return_tensors="pt")
    with torch.no_grad():
        want = hf.model.get_image_features(out["pixel_values"], out["image_grid_thw"]).pooler_output[0].numpy()
    done = ours.process(Image(PICTURES[0]))
    assert (done.parts[0], ours.soft, ours.soft_video, done.parts[2]) == (5, 77, 91, 33)
    close(encode(ours, done.views), want, 1e-5)


def test_llama_cpps_first_files(tmp_path) -> None:
    """feed_forward_length is 0, and ffn_up and ffn_down are exchanged (tools/mtmd/legacy-models/qwen2_vl_surgery.py)."""
    hf = random_model("qwen2_vl")
    meta = keys(hf, "llama.cpp") | {"clip.vision.feed_forward_length": 0, "clip.projector_type": "qwen2vl_merger"}
    for name in ("projector_type", "hidden_act", "spatial_merge_size"):
        del meta[f"clip.vision.{name}"]
    old = bind(write(tmp_path / "old.gguf", meta, tensors(hf, "llama.cpp", swapped=True))).vision
    new = bind(write(tmp_path / "new.gguf", keys(hf, "llama.cpp"), tensors(hf, "llama.cpp"))).vision
    views = new.process(Image(PICTURES[0])).views
    assert np.array_equal(encode(old, views), encode(new, views))


def test_malformed_files_are_named(pair, tmp_path) -> None:
    arrays = tensors(pair.hf, "llama.cpp")
    for changes, error, text in [
        ({"clip.vision.projector_type": "mlp"}, UnsupportedModelError, "projector_type is 'mlp'"),
        ({"clip.vision.attention.head_count": 3}, InvalidModelError, "heads"),
        ({"clip.vision.image_std": [0.1, 0.0, 0.1]}, InvalidModelError, "image_std"),
        ({"clip.vision.image_mean": [0.1, 0.5]}, InvalidModelError, "image_mean"),
        ({"clip.vision.hidden_act": "mish"}, UnsupportedModelError, "hidden_act"),
        ({"clip.vision.temporal_patch_size": 3}, UnsupportedModelError, "temporal_patch_size"),
        ({"clip.vision.block_count": 2**31 - 1}, InvalidModelError, "v.blk.2147483646"),
        ({"clip.vision.resample": 9}, InvalidModelError, "resample"),
        ({"clip.vision.patch_size": 7}, InvalidModelError, "patch_embd"),
        ({"qwen2vl.rope.dimension_sections": [3, 2, 2, 0]}, InvalidModelError, "dimension_sections"),
        ({"qwen2vl.rope.dimension_sections": [3.0, 2.0, 3.0]}, InvalidModelError, "dimension_sections"),
    ]:
        with pytest.raises(error, match=text):
            bind(write(tmp_path / "bad.gguf", keys(pair.hf, "llama.cpp") | changes, arrays))


@pytest.mark.parametrize("kind", [c.kind for c in CASES])
def test_a_flat_config_of_early_checkpoints_gives_the_same_file(kind: str, tmp_path) -> None:
    folder = tiny.make_checkpoint(kind, tmp_path / "c", tie_word_embeddings=True)
    expected = convert(folder, tmp_path / "a.gguf").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    text = {k: v for k, v in config.pop("text_config").items() if k not in ("rope_parameters", "layer_types", "model_type")}
    vision = {k: v for k, v in config["vision_config"].items() if k != "rope_parameters"}
    (folder / "config.json").write_text(json.dumps({
        **config, **text, "vision_config": {**vision, "in_chans": 3, "spatial_patch_size": 14}, "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}))
    assert convert(folder, tmp_path / "a.gguf").read_bytes() == expected


# ---- decoder ----------------------------------------------------------------------------------------------------------------------


def decode(text, ids: np.ndarray, positions: np.ndarray, media: np.ndarray) -> np.ndarray:
    """Logits at every position, in one step on the CPU backend with a float32 cache."""
    g, c, n = Graph(), text.config, len(ids)
    m = Dim("m", n)
    batch = Batch(n, g.input("ids", (m,), "I32"), g.input("positions", (text.position_axes, m), "I32"),
                  g.input("media", (Dim("e", max(1, len(media))), c.d_model)))
    rows = {name: g.input(name, (m,), "I32") for name in ("cells", "seq", "lo", "hi")}
    table = g.constant(np.arange(n, dtype=np.int32)[None])
    caches = [LayerCache(*(g.state(f"{i}.{s}", (c.n_kv_heads, n, c.head_dim), dtype("F32")) for s in "kv"), table, rows["cells"],
                         rows["seq"], rows["lo"], rows["hi"]) for i in range(c.n_layers)]
    program = g.compile(text.logits(text.forward(batch, caches)))
    index = np.arange(n, dtype=np.int32)
    lo, hi = text.policies()[0].visible(index)
    return program.run(ids=ids, positions=positions.astype(np.int32), media=media, cells=index, seq=index * 0, lo=lo, hi=hi)


def test_logits_are_transformers(pair) -> None:
    clip = RNG.integers(0, 256, (3, 30, 44, 3), dtype=np.uint8)
    media = [Image(PICTURES[0]), Video(list(clip), fps=0.9), Image(PICTURES[2])]
    ids, positions, done = prompt(pair.vision, media)
    pixels, grid = hf_pixels([PICTURES[0], PICTURES[2]], pair.kind)
    moving, moving_grid = hf_video(clip)
    extra = {"second_per_grid_ts": torch.tensor([2 / 0.9])} if pair.kind == "qwen2_5_vl" else {}
    with torch.no_grad():
        want = pair.hf(input_ids=torch.tensor([ids]), pixel_values=pixels, image_grid_thw=grid, pixel_values_videos=moving,
                       video_grid_thw=moving_grid, mm_token_type_ids=torch.tensor([[1 if i == 77 else 2 if i == 91 else 0 for i in ids]]),
                       attention_mask=torch.ones(1, len(ids), dtype=torch.int64), **extra).logits[0].numpy()
    rows = np.concatenate([encode(pair.vision, d.views) for d in done])
    ids, soft = np.array(ids, np.int32), np.isin(ids, (77, 91))
    ids[soft] = -1 - np.arange(soft.sum())
    close(decode(pair.text, ids, positions, rows), want, 1e-5)


def test_text_alone_is_transformers(pair) -> None:
    ids = RNG.integers(0, 70, 40).astype(np.int32)
    with torch.no_grad():
        want = pair.hf(input_ids=torch.tensor(ids[None]).long()).logits[0].numpy()
    close(decode(pair.text, ids, np.tile(np.arange(40), (3, 1)), np.zeros((1, 48), np.float32)), want, 1e-5)


# ---- whole ------------------------------------------------------------------------------------------------------------------------


def test_an_encoder_in_blocks_of_256(tiny_gguf, tmp_path) -> None:
    """Q4_K needs rows of 256. Beside the same weights as F32, only activations are rounded, to 8 bits as with Q8_0."""
    from converters.quantize import quantize_file

    path = tiny_gguf("qwen2_5_vl", vision_config={"hidden_size": 256, "intermediate_size": 512, "num_heads": 8})[0]
    small, wide = tmp_path / "q4_k.gguf", tmp_path / "f32.gguf"
    quantize_file(path, small, "Q8_0", vision="Q4_K")
    quantize_file(small, wide, "F32")
    formats = {t.dtype.name for name, t in pe.GGUFFile(small).tensors.items() if name.startswith("v.blk.") and name.endswith("weight")}
    assert "Q4_K" in formats
    exact, close = (pe.load(p, n_ctx=128).encode_image(A) for p in (wide, small))
    assert 1e-4 < np.sqrt(np.mean((exact - close) ** 2) / np.mean(exact**2)) < 6e-2


def test_qwen2_5_vl_7b(full_size, machine) -> None:
    """28 layers with 4 heads of 128: 56 KiB a token. The encoder's largest picture has 16,384 soft tokens."""
    machine(64 * GIB)
    token = 28 * 4 * 128 * 2 * 2
    assert token == 56 * KIB
    path, mmproj = full_size("qwen-7b")
    plan = pe.plan(path, n_ctx=131_072, mmproj=mmproj)
    assert kv(plan) == {"Full": 131_072 * token} and kv(plan)["Full"] == 7 * GIB
    assert plan.picture == 28 * 28 * 16_384 // 28**2
    group = 4 * 1280
    merger = 2 * (group * group + 3584 * group) + 4 * (group + 3584 + 1280)         # f16 matrices, f32 biases and norm
    patches = 4 * 1280 * 2 * 3 * 14 * 14                                            # made from two slices: float32
    assert sum(i.nbytes for i in plan.items if i.detail == "weights of patches, norms and projector") - merger - patches < 4096
    layer = 2 * (4 * 1280**2 + 3 * 1280 * 3420) + 4 * (2 * 1280 + 4 * 1280 + 2 * 3420 + 1280)
    padded = [i.nbytes for i in plan.items if i.purpose == "encoder" and i.layer is not None]
    assert len(padded) == 32 and set(padded) == {padded[0]} and layer <= padded[0] < 1.01 * layer    # rows in groups of 16
    f32 = 4 * 4 * 16_384 * 3 * 2 * 14 * 14                                          # patches of four to a soft token
    assert any(dict(i.parts).get("patches [65536, 1176]") == f32 for i in plan.items if i.purpose == "images")


def test_qwen2_5_vl_7b_in_f16_takes_15_gib(full_size, machine) -> None:
    """Two bytes a weight: 7.6 thousand million of the decoder, 0.7 of the encoder."""
    machine(64 * GIB)
    path, mmproj = full_size("qwen-7b-f16")
    plan = pe.plan(path, n_ctx=8192, mmproj=mmproj, device="cpu")
    d, f, kv_width = 3584, 18_944, 4 * 128
    decoder = 2 * (28 * (2 * d * d + 2 * d * kv_width + 3 * d * f) + 2 * 152_064 * d)
    encoder = 2 * (32 * (4 * 1280**2 + 3 * 1280 * 3420) + (4 * 1280) ** 2 + 4 * 1280 * d)
    found = plan.of("weights") + plan.of("mapped") + sum(i.nbytes for i in plan.items if i.purpose == "encoder" and "arena" not in i.detail)
    assert abs(found - decoder - encoder) < 32 * 2**20 and 15 * GIB < found < 15.6 * GIB
