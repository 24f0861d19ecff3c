"""Gemma 4: heads of two sizes, caches that later layers share, per-layer embeddings, experts beside the dense feed-forward.

What all models must do is in tests/contract; this file declares what it does it with, and has what is special here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import foreign
import pyengine as pe
import tiny
from cases import Case, Converted, Tokens
from converters import convert
from converters.writer import mmproj_path
from foreign import Dialect, Saved, Tensors
from hollow import Decoder, Encoder as HollowEncoder, Full, kv, Tensor
from pictures import A, B, picture, same
from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError, UnsupportedModelError
from sight import of_any_backend, Run, Sight
from tiny import COMMON

# What the family's real template does, in other words: contents are strings or lists of parts.
TEMPLATE = """{{ bos_token }}
{%- for m in messages -%}
  {{ '<|turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' }}
  {%- if m['content'] is string -%}{{ m['content'] | trim }}
  {%- else -%}
    {%- for part in m['content'] -%}
      {%- if part['type'] in ('image', 'video') -%}{{ '<|' + part['type'] + '|>' }}
      {%- else -%}{{ part['text'] | trim }}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{ '<turn|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|turn>model\\n' }}{%- endif -%}"""

TOKENS = Tokens(
    ("<image|>", "<|video|>", "<bos>", "<|turn>", "<pad>", "<|image>", "<eos>", "<turn|>", "<|image|>", "<|audio>", "<audio|>", "<|audio|>"),
    "<bos>", "<eos>", "<pad>", TEMPLATE,
    {"boi_token_id": "<|image>", "eoi_token_id": "<image|>", "image_token_id": "<|image|>", "video_token_id": "<|video|>"}, ("\n\n",),
    {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>", "boa_token": "<|audio>", "eoa_token": "<audio|>",
     "audio_token": "<|audio|>"})


class Gemma4Sight(Sight):
    """Pictures of up to 70 soft tokens. Videos need torchvision there: here frames go through the processor of pictures."""

    model_types = ("gemma4",)
    marker = "<|image|>"

    def images(self, config: Any, settings: dict[str, Any]) -> Any:
        from transformers import Gemma4ImageProcessorPil

        vision = config.vision_config
        return Gemma4ImageProcessorPil(**{"patch_size": vision.patch_size, "pooling_kernel_size": vision.pooling_kernel_size, "max_soft_tokens": 70,
                                          **settings})

    def processor(self, folder: Path, config: Any, tokenizer: Any) -> Any:
        from transformers import Gemma4ImageProcessorPil, Gemma4Processor

        return of_any_backend(Gemma4Processor)(None, Gemma4ImageProcessorPil.from_pretrained(folder), tokenizer, None)

    def part(self, processor: Any, config: Any, folder: Path, part: Any, **settings: Any) -> tuple[list[int], dict[str, Any]]:
        if not isinstance(part, (list, tuple)):
            ids, made = super().part(processor, config, folder, part, **settings)
            return ids, {"kind": "image", "pixels": made["pixel_values"], "positions": made["image_position_ids"]}
        return self.video(processor, part, settings.get("rate"))

    def video(self, processor: Any, frames: Sequence[Any], fps: float | None) -> tuple[list[int], dict[str, Any]]:
        """Return the ids that all frames of a list become, and their patches: the processor of videos takes 70 soft tokens."""
        from transformers.video_utils import VideoMetadata

        made = processor.image_processor(images=list(frames), max_soft_tokens=70, return_tensors="pt")
        about = VideoMetadata(total_num_frames=len(frames), fps=fps, frames_indices=list(range(len(frames))))
        text = processor.replace_video_token({"num_soft_tokens_per_video": made["num_soft_tokens_per_image"][:1].tolist(), "video_metadata": [about]}, 0)
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids, {"kind": "video", "pixels": made["pixel_values"], "positions": made["image_position_ids"]}

    def run(self, model: Any, tokens: Any, made: list[dict[str, Any]], fps: float | None) -> Run:
        import torch

        config, run = model.config, model.model.get_image_features
        inputs: dict[str, Any] = {"mm_token_type_ids": ((tokens == config.image_token_id) + 2 * (tokens == config.video_token_id)).int()}
        for kind, pixels, positions in (("image", "pixel_values", "image_position_ids"), ("video", "pixel_values_videos", "video_position_ids")):
            its = [m for m in made if m["kind"] == kind]
            if its:
                inputs |= {pixels: torch.cat([m["pixels"] for m in its]), positions: torch.cat([m["positions"] for m in its])}
            if its and kind == "video":
                inputs["num_frames_per_video"] = torch.tensor([len(m["pixels"]) for m in its])
        features = [torch.cat(list(run(m["pixels"], m["positions"]).pooler_output)) for m in made]
        return Run(inputs, features, [m["pixels"][m["positions"][..., 0] >= 0] for m in made], [])


class Gemma4Dialect(Dialect):
    """llama.cpp's `conversion/gemma.py`: no budget, activation, padding or direction, and an epsilon that is written as 1e-6.
    Ollama's `convert/convert_gemma4.go`.
    """

    model_types, converters = ("gemma4",), ()       # the test below writes with its own settings
    ollama_arch, n_ctx = "gemma4", 1024
    arch, names, projector = "gemma4", gguf.MODEL_ARCH.GEMMA4, "gemma4v"
    assumed = {"vision_config": {"rms_norm_eps": 1e-6, "position_embedding_size": 850}, "processor": {"max_soft_tokens": 280},
               "text_config": {"pad_token_id": 0}}
    settings = assumed

    def assume(self, saved: Saved) -> None:
        assert saved.images["max_soft_tokens"] == 280 and saved.vision["rms_norm_eps"] == 1e-6 and saved.text["pad_token_id"] == 0
        assert saved.text["use_bidirectional_attention"] == "vision" and saved.vision["pooling_kernel_size"] == 3

    def text_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        text, rope = saved.text, saved.text["rope_parameters"]
        slides = [kind == "sliding_attention" for kind in text["layer_types"]]
        wide = next(iter(text["per_layer_config"].values()))["head_dim"]
        w.add_rope_freq_base(rope["full_attention"]["rope_theta"])
        w.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        w.add_sliding_window(text["sliding_window"])
        w.add_sliding_window_pattern(slides)
        w.add_shared_kv_layers(text["num_kv_shared_layers"])
        w.add_embedding_length_per_layer_input(text["hidden_size_per_layer_input"])
        for add, n in ((w.add_key_length, wide), (w.add_value_length, wide), (w.add_key_length_swa, text["head_dim"]),
                       (w.add_value_length_swa, text["head_dim"]), (w.add_rope_dimension_count, wide), (w.add_rope_dimension_count_swa, text["head_dim"])):
            add(n)
        n_own, n = text["num_hidden_layers"] - text["num_kv_shared_layers"], text["intermediate_size"]
        w.add_feed_forward_length([n * (1 + (i >= n_own)) for i in range(text["num_hidden_layers"])])
        w.add_final_logit_softcapping(text["final_logit_softcapping"])

    def text_tensor(self, saved: Saved, source: str, value: np.ndarray) -> Tensors:
        found = named(source, value, saved.text)
        for name, part in found if isinstance(found, list) else [found]:
            yield name or self.text_name(source), part

    def vision_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        w.add_vision_attention_layernorm_eps(1e-6)

    def vision_tensor(self, saved: Saved, source: str, value: np.ndarray, legacy: bool) -> Tensors:
        name = f"model.{source}".replace("model.vision_tower.encoder.", "vision_model.model.").replace(".linear.weight", ".weight")
        name += ".weight" if name.endswith("position_embedding_table") else ""
        if name.endswith("input_proj.weight"):
            p = int((value.shape[1] // 3) ** 0.5)
            value = value.reshape(-1, p, p, 3).transpose(0, 3, 1, 2)
        found = foreign.VISION_NAMES.get_name(name, try_suffixes=(".weight", ".bias", ".input_max", ".input_min", ".output_max", ".output_min"))
        assert found is not None, source
        yield found, value.reshape(1) if value.ndim == 0 else value

    def ollama_sizes(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        foreign.text_sizes(w, saved.text, "none")                   # the feed-forwards' widths are below

    def ollama_keys(self, w: gguf.GGUFWriter, saved: Saved) -> tuple[dict[str, int], float | None]:
        vision = saved.vision
        self.text_keys(w, saved)
        w.add_layer_norm_rms_eps(saved.text["rms_norm_eps"])
        return {"block_count": vision["num_hidden_layers"], "feed_forward_length": vision["intermediate_size"],
                "attention.head_count": vision["num_attention_heads"], "projector.scale_factor": 3}, 1e-6

    def ollama_vision(self, saved: Saved) -> Tensors:
        """Names are llama.cpp's; bounds come once more, in one tensor, and a part of the encoder of sounds may be there."""
        made = dict(self.vision_tensors(saved, legacy=False))
        names = [f"v.blk.{i}.{name}" for i in range(saved.vision["num_hidden_layers"]) for name in LINEARS] + ["mm.input_projection"]
        bounds = [made.get(f"{name}.{bound}", np.zeros(1))[0] for name in names for bound in ("input_min", "input_max", "output_min", "output_max")]
        yield from made.items()
        yield "v.clamp_data", np.array(bounds, np.float32)
        yield "a.conv1d.0.weight", np.ones((2, 3), np.float32)


LINEARS = ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_gate", "ffn_up", "ffn_down")
NAMES = {"post_attention_layernorm.": "post_attention_norm", "pre_feedforward_layernorm.": "ffn_norm", "post_feedforward_layernorm.": "post_ffw_norm",
         "layer_scalar": "layer_output_scale"}
SCALES = {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"}


def named(name: str, value: np.ndarray, config: dict[str, Any]) -> Any:
    """llama.cpp's converter names these itself; experts' gate and up are apart here. Frequencies that do not turn are divided by 1e30."""
    if name == "model.norm.weight":
        size = next(iter(config["per_layer_config"].values()))["head_dim"]
        part = config["rope_parameters"]["full_attention"]["partial_rotary_factor"]
        turned = int(size * part / 2)
        return [("output_norm.weight", value), ("rope_freqs.weight", np.array([1.0] * turned + [1e30] * (size // 2 - turned), np.float32))]
    layer = f"blk.{name.split('.')[2]}." if "layers" in name else ""
    if name.endswith("gate_up_proj"):
        gate, up = np.split(value, 2, axis=1)
        return [(f"{layer}ffn_gate_exps.weight", gate), (f"{layer}ffn_up_exps.weight", up)]
    found = next((f"{ours}.weight" for theirs, ours in NAMES.items() if theirs in name), None)
    found = next((ours for theirs, ours in SCALES.items() if name.endswith(theirs)), found)
    found = "ffn_down_exps.weight" if name.endswith("experts.down_proj") else found
    return found and layer + found, value


LAYERS = [*["sliding_attention"] * 4, "full_attention", "sliding_attention", "full_attention"]
TEXT_CONFIG = {**COMMON, "num_hidden_layers": 7, "layer_types": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "global_head_dim": 64,
               "sliding_window": 6, "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 32, "num_kv_shared_layers": 2,
               "use_double_wide_mlp": True, "final_logit_softcapping": 30.0}
DENSE = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "use_double_wide_mlp": False, "attention_k_eq_v": True,
         "num_global_key_value_heads": 1}
KINDS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
EXPERTS = {**DENSE, "num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
           "enable_moe_block": True, "num_experts": 9, "top_k_experts": 3, "moe_intermediate_size": 64}

TEXT = Case(
    "gemma4_text", "gemma4", "Gemma4TextConfig", "Gemma4ForCausalLM", "spm", TEXT_CONFIG, ring=True, also=("Gemma4AssistantForCausalLM",),         # which tests/engine/test_heads.py tests
    buffer=lambda name: (1.0, 0.3) if name.endswith("layer_scalar") else None,
    shallow={"num_hidden_layers": 3, "num_kv_shared_layers": 1, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    variants={"gemma4": {}, "gemma4-dense": {**DENSE, "final_logit_softcapping": None}, "gemma4-experts": EXPERTS,
              "gemma4-shared": {"num_hidden_layers": 6, "num_kv_shared_layers": 3, "layer_types": KINDS, "use_double_wide_mlp": False,
                                "rope_parameters": {
                                    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 5e4},
                                    "sliding_attention": {"rope_type": "default", "rope_theta": 3e3}}}},
    converted=Converted(
        {"block_count": 7, "context_length": 256, "embedding_length": 96, "feed_forward_length": [160] * 5 + [320] * 2, "vocab_size": 512,
         "attention.head_count": 4, "attention.head_count_kv": [2] * 7, "attention.key_length": 64, "attention.value_length": 64,
         "attention.key_length_swa": 32, "attention.value_length_swa": 32, "rope.dimension_count": 64, "rope.dimension_count_swa": 32,
         "attention.layer_norm_rms_epsilon": np.float32(1e-6), "attention.sliding_window": 6, "attention.shared_kv_layers": 2,
         "attention.sliding_window_pattern": [True] * 4 + [False, True, False], "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4,
         "embedding_length_per_layer_input": 32, "final_logit_softcapping": 30.0},
        names="GEMMA4", tensor=named, error=2e-4, tensors={"gemma4_text": {}, "gemma4-untied": {"tie_word_embeddings": False}, "gemma4-experts": EXPERTS},
        runs={"gemma4": {}, "gemma4-dense": DENSE, "gemma4-experts": EXPERTS}))


@dataclass(frozen=True)
class LargeDecoder(Decoder):
    """One without per-layer embeddings: five sliding layers, then one global, whose keys are values and whose heads are twice as wide.

    Numbers of layers are those by which llama.cpp knows 31B and 26B-A4B; widths and heads are assumed.
    """

    n_global_heads: int = 0
    window: int = 1024
    n_experts: int = 0
    d_expert: int = 0

    def heads(self, i: int) -> tuple[int, int]:
        return (self.n_kv_heads, self.head_dim) if (i + 1) % 6 else (self.n_global_heads, 2 * self.head_dim)

    def tensors(self, dtype: str) -> Iterator[Tensor]:
        d, n, f = self.d_model, self.n_experts, self.d_expert
        yield "token_embd.weight", (self.vocab_size, d), dtype
        yield "output_norm.weight", (d,), "F32"
        yield "rope_freqs.weight", (self.head_dim,), "F32"
        for i in range(self.n_layers):
            heads, e = self.heads(i)
            shapes = {"attn_q": (self.n_heads * e, d), "attn_k": (heads * e, d), "attn_output": (d, self.n_heads * e),
                      "ffn_gate": (self.d_ff, d), "ffn_up": (self.d_ff, d), "ffn_down": (d, self.d_ff)}
            shapes |= {"attn_v": (heads * e, d)} if (i + 1) % 6 else {}
            shapes |= {"ffn_gate_up_exps": (n, 2 * f, d), "ffn_down_exps": (n, d, f)} if n else {}
            yield from ((f"blk.{i}.{name}.weight", shape, dtype) for name, shape in shapes.items())
            vectors = {"attn_norm": d, "post_attention_norm": d, "ffn_norm": d, "post_ffw_norm": d, "attn_q_norm": e, "attn_k_norm": e, "layer_output_scale": 1}
            vectors |= {"pre_ffw_norm_2": d, "post_ffw_norm_1": d, "post_ffw_norm_2": d} if n else {}
            yield from ((f"blk.{i}.{name}.weight", (width,), "F32") for name, width in vectors.items())
            if n:
                yield f"blk.{i}.ffn_gate_inp.weight", (n, d), "F32"
                yield f"blk.{i}.ffn_gate_inp.scale", (d,), "F32"
                yield f"blk.{i}.ffn_down_exps.scale", (n,), "F32"

    def metadata(self) -> dict[str, Any]:
        heads = [self.heads(i) for i in range(self.n_layers)]
        own = {"attention.head_count_kv": [n for n, _ in heads], "attention.key_length": 2 * self.head_dim, "attention.value_length": 2 * self.head_dim,
               "attention.key_length_swa": self.head_dim, "attention.value_length_swa": self.head_dim, "attention.sliding_window": self.window,
               "attention.sliding_window_pattern": [bool((i + 1) % 6) for i in range(self.n_layers)], "embedding_length_per_layer_input": 0,
               "attention.shared_kv_layers": 0, "final_logit_softcapping": 30.0}
        own |= {"expert_count": self.n_experts, "expert_used_count": 8, "expert_feed_forward_length": self.d_expert} if self.n_experts else {}
        return {**super().metadata(), **{f"{self.arch}.{name}": value for name, value in own.items()}}


def large_encoder(d_model: int) -> HollowEncoder:
    """Keys and tensors of llama.cpp's projector file: 27 layers of width 1152, 10,240 places on each axis."""
    width, d_ff, n_layers = 1152, 4304, 27
    keys = {"clip.has_vision_encoder": True, "clip.projector_type": "gemma4v", "clip.vision.image_size": 224, "clip.vision.patch_size": 16,
            "clip.vision.block_count": n_layers, "clip.vision.embedding_length": width, "clip.vision.feed_forward_length": d_ff,
            "clip.vision.attention.head_count": 16, "clip.vision.attention.layer_norm_epsilon": 1e-6, "clip.vision.projection_dim": d_model}
    tensors: list[Tensor] = [("v.patch_embd.weight", (width, 3, 16, 16), "F32"), ("v.position_embd.weight", (2, 10_240, width), "F32"),
                             ("mm.input_projection.weight", (d_model, width), "F16"), ("v.std_bias", (width,), "F32"), ("v.std_scale", (width,), "F32")]
    for i in range(n_layers):
        shapes = {**dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_out"), (width, width)), "ffn_gate": (d_ff, width), "ffn_up": (d_ff, width),
                  "ffn_down": (width, d_ff)}
        tensors += [(f"v.blk.{i}.{name}.weight", shape, "F16") for name, shape in shapes.items()]
        tensors += [(f"v.blk.{i}.{name}.weight", (n,), "F32") for name, n in (
            ("ln1", width), ("ln2", width), ("attn_post_norm", width), ("ffn_post_norm", width), ("attn_q_norm", 72), ("attn_k_norm", 72))]
    return keys, tensors


FULL_TOKENS = ("<|image>", "<image|>", "<|image|>", "<|video|>")


def buffer(name: str) -> tuple[float, float] | None:
    """Bounds that are met, and numbers that scale whole layers and soft tokens."""
    ends = {"layer_scalar": (1.0, 0.3), "std_bias": (0.0, 0.5), "std_scale": (1.0, 0.3), "_min": (-1.5, 0.3), "_max": (1.5, 0.3)}
    return next((found for end, found in ends.items() if name.endswith(end)), None)


SEEING = Case(
    "gemma4", "gemma4", "Gemma4Config", "Gemma4ForConditionalGeneration", "spm", {"audio_config": None},
    {**TEXT_CONFIG, "max_position_embeddings": 512, "use_bidirectional_attention": "vision"},
    {"hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 24,
     "patch_size": 4, "position_embedding_size": 230, "use_clipped_linears": True, "standardize": True, "rms_norm_eps": 1e-5},
    TOKENS, Gemma4Sight(), ring=True, videos=True, cached_as="gemma3", buffer=buffer,
    converted=Converted(
        {"general.architecture": "gemma4", "tokenizer.chat_template": TEMPLATE, "tokenizer.ggml.model": "gemma4"},
        clip={"has_vision_encoder": True, "projector_type": "gemma4v", "use_gelu": True, "use_silu": False, "image_size": 224,
              "hidden_act": "gelu_pytorch_tanh", "patch_size": 4, "embedding_length": 72, "feed_forward_length": 100, "block_count": 3,
              "attention.head_count": 3, "projection_dim": 96, "image_mean": [0.0] * 3, "image_std": [1.0] * 3, "resample": 3,
              "attention.layer_norm_epsilon": np.float32(1e-5), "projector.scale_factor": 3, "rope.freq_base": 100.0, "max_soft_tokens": 70,
              "video_max_soft_tokens": 70, "num_frames": 32, "bidirectional": True},
        clip_tokens={"image_token_id": "<|image|>", "video_token_id": "<|video|>", "image_start_token_id": "<|image>",
                     "image_end_token_id": "<image|>"}),
    dialect=Gemma4Dialect(),
    full={"gemma4-31b": Full(LargeDecoder("gemma4", 60, 5376, 21504, 32, 16, 256, 262144, 262144, n_global_heads=4), FULL_TOKENS, large_encoder),
          "gemma4-26b-a4b": Full(LargeDecoder("gemma4", 30, 2816, 2112, 16, 8, 256, 262144, 262144, n_global_heads=2, n_experts=128, d_expert=704),
                                 FULL_TOKENS, large_encoder)})

CASES = (TEXT, SEEING)


# ---- files of llama.cpp -------------------------------------------------------------------------------------------------


def test_llama_cpps_pair_is_read_as_it_is(tmp_path) -> None:
    """Budgets, the activation and the direction are what its files leave out."""
    folder = tiny.make_checkpoint("gemma4", tmp_path / "c", seed=3, dtype="float16", **Gemma4Dialect.assumed)
    path, mmproj = foreign.llama_cpp_files(folder, tmp_path / "m.gguf")
    prompt = [5, "a dog", A, " and ", B, "What is it?"]
    seen = tiny.hf_seen(folder, prompt)
    model = pe.load(path, mmproj=mmproj, n_ctx=1024, kv_dtype="f32")
    assert len(seen.features[0]) > 250
    same(model.logits(prompt), seen.logits)
    for image, rows in zip((A, B), seen.features):
        same(model.encode_image(image), rows)


def test_llama_cpp_sees_as_transformers_does_with_our_pair(tiny_gguf, tmp_path) -> None:
    pytest.importorskip("llama_cpp", reason="make peers")
    folder = tiny_gguf("gemma4")[1]
    path = convert(folder, tmp_path / "m.gguf", "f32", split_mmproj=True)
    image = picture(84, 120, 3)                                     # 7 x 10 soft tokens: nothing is resized
    seen = tiny.hf_seen(folder, [image])
    ids, rows = foreign.mtmd_rows(path, mmproj_path(path), image)
    assert ids == [seen.ids[0], *[None] * 70, seen.ids[-1]]
    assert np.abs(rows - seen.features[0]).max() < 2e-3 * np.ptp(seen.features[0])


def test_gate_and_up_of_experts_in_one_tensor(tiny_gguf, tmp_path) -> None:
    """As in llama.cpp's files."""
    path, folder = tiny_gguf("gemma4_text", **EXPERTS)
    reader, joined = gguf.GGUFReader(path), tmp_path / "joined.gguf"
    out, parts = gguf.GGUFWriter(joined, "gemma4"), {t.name: t.data for t in reader.tensors}
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            kind = field.types[0]
            out.add_key_value(key, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    for name, data in parts.items():
        if "ffn_gate_exps" in name:
            name, data = name.replace("gate_exps", "gate_up_exps"), np.concatenate([data, parts[name.replace("gate", "up")]], axis=1)
        if "ffn_up_exps" not in name:
            out.add_tensor(name, data)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    ids = np.random.default_rng(0).integers(0, 512, 50).tolist()
    want, got = (pe.load(p, n_ctx=64, kv_dtype="f32").logits(ids) for p in (path, joined))
    assert np.abs(got - want).max() <= 1e-6 * np.ptp(want)


# ---- caches -------------------------------------------------------------------------------------------------------------


def test_layers_that_share_have_no_cache(tiny_gguf) -> None:
    """5 of 7 layers have one: 4 of a window of 6 and steps of 16 with heads of 32, and a global one with heads of 64; f16, 2 heads."""
    plan = pe.plan(tiny_gguf("gemma4_text")[0], n_ctx=200, n_batch=16)
    assert {i.layer: i.nbytes for i in plan.items if i.purpose == "kv" and i.layer is not None} == {
        **dict.fromkeys(range(4), 2 * (6 + 16) * 2 * 32 * 2), 4: 2 * 200 * 2 * 64 * 2}


def test_a_cache_is_where_its_readers_are(tiny_gguf) -> None:
    """Two parts of the machine: layers from the first owner on are on one of them, and results are the same."""
    path, ids = tiny_gguf("gemma4_text")[0], np.random.default_rng(0).integers(0, 512, 50).tolist()
    model = pe.load(path, n_ctx=64, kv_dtype="f32", device={"cpu:0": 64 << 20, "cpu:1": 64 << 20})
    assert np.array_equal(model.logits(ids), pe.load(path, n_ctx=64, kv_dtype="f32").logits(ids))
    weights = {i.layer: i.device for i in model.plan.items if i.purpose == "weights" and i.layer is not None}
    assert len({weights[i] for i in range(3, 7)}) == 1 and len(set(weights.values())) == 2


def test_conversations_with_pictures_side_by_side(tiny_gguf) -> None:
    """Each gives what it gives alone: pages of global layers, rings of sliding ones, readers of both."""
    path, _ = tiny_gguf("gemma4")
    prompts = [[5, A, "and", B, 6], ["what is ", A, "?"], [3, 7, "only text"]]
    alone = [pe.load(path, n_ctx=256).generate(p, max_tokens=6, temperature=0).tokens for p in prompts]
    together = pe.load(path, n_ctx=256, n_seq=3).generate_many(prompts, max_tokens=6, temperature=0)
    assert [a.tokens for a in together] == alone


def test_pictures_of_the_smallest_models_are_causal(tiny_gguf) -> None:
    """Rows may then be cut, and see nothing behind them."""
    path, folder = tiny_gguf("gemma4", text_config={"use_bidirectional_attention": None})
    prompt = [5, A, "and", B, 6]
    model = pe.load(path, n_ctx=256, n_batch=7, kv_dtype="f32")
    assert model.n_batch == 7
    same(model.logits(prompt), tiny.hf_seen(folder, prompt).logits)


# ---- pictures and videos ------------------------------------------------------------------------------------------------


def test_budgets_are_those_of_the_processor(tiny_gguf) -> None:
    settings = {"vision_config": {"position_embedding_size": 500}, "processor": {"max_soft_tokens": 140}}
    path, folder = tiny_gguf("gemma4", **settings)
    model = pe.load(path, n_ctx=256, kv_dtype="f32")
    for image, budget in ((picture(40, 170), 70), (picture(2, 300), 70), (picture(4000, 7), 140), (picture(84, 120), 70), (A, 140)):
        want = tiny.hf_seen(folder, [3, image, 4], max_soft_tokens=budget)
        same(model.encode_image(pe.open_image(image, max_soft_tokens=budget)), want.features[0])
    same(model.logits([3, pe.open_image(A, max_soft_tokens=140), 4]), want.logits)
    for wrong in (71, 280, "many"):
        with pytest.raises(RequestError, match="max_soft_tokens"):
            model.encode_image(pe.open_image(A, max_soft_tokens=wrong))
    with pytest.raises(ContextOverflowError, match="context holds"):
        pe.load(path, n_ctx=64).encode_image(A)


@pytest.mark.parametrize("fps", [None, 0.5, 30.0])
def test_frames_stand_behind_their_times(tiny_gguf, fps: float | None) -> None:
    path, folder = tiny_gguf("gemma4")
    frames = [picture(60, 90, seed) for seed in range(3)]
    want = tiny.hf_seen(folder, [3, frames, 4], rate=fps)
    model = pe.load(path, n_ctx=300, kv_dtype="f32")
    same(model.logits([3, pe.Video(frames, fps=fps), 4]), want.logits)
    answer = model.generate([3, pe.Video(frames, fps=fps, num_frames=2), 4], max_tokens=1, temperature=0)
    assert answer.media[0].kind == "video" and answer.media[0].n_tokens * 3 == want.ids.count(model.media.encoder.markers["video"][0]) * 2
    with pytest.raises(RequestError, match="num_frames"):
        model.generate([pe.Video(frames, num_frames=4)], max_tokens=1)


# ---- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config, words", [
    ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"), ({"attention_bias": True}, "attention_bias"),
    ({"rope_parameters": {"full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
                          "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}}, "rope of sliding layers")])
def test_configs_that_have_no_key(tmp_path, config: dict[str, Any], words: str) -> None:
    folder = tiny.make_checkpoint("gemma4_text", tmp_path / "c", **config)
    with pytest.raises(UnsupportedModelError, match=words):
        convert(folder, tmp_path / "m.gguf")


@pytest.mark.parametrize("key, value", [("attention.shared_kv_layers", 6), ("attention.shared_kv_layers", 9), ("rope.dimension_count_swa", 34)])
def test_keys_that_no_model_can_have(tiny_gguf, tmp_path, key: str, value: int) -> None:
    from pyengine.files.gguf import GGUFFile
    from pyengine.files.hparams import Hparams
    from pyengine.files.weights import Weights
    from pyengine.models.gemma4 import Model

    file = GGUFFile(tiny_gguf("gemma4_text")[0])
    h = Hparams(file.metadata)
    read = h.get
    h.get = lambda name, *more: value if name == key else read(name, *more)         # type: ignore[method-assign]
    with pytest.raises(InvalidModelError, match=key):
        Model(h, Weights(file))


# ---- full-size models, by hand ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, n_full, full_head, n_sliding, sliding_heads", [("gemma4-31b", 10, 4, 50, 16), ("gemma4-26b-a4b", 5, 2, 25, 8)])
def test_the_largest_models_at_131072_tokens(full_size, name: str, n_full: int, full_head: int, n_sliding: int, sliding_heads: int) -> None:
    """Caches of f16: global layers hold all positions with few heads of 512, the others a window of 1024 and a step of 512 rows."""
    path, mmproj = full_size(name)
    plan = pe.plan(path, n_ctx=131_072, mmproj=mmproj)
    assert kv(plan) == {"Full": n_full * 131_072 * full_head * 512 * 2 * 2, "Sliding": n_sliding * (1024 + 512) * sliding_heads * 256 * 2 * 2}
    assert sum(i.nbytes for i in plan.items if i.purpose == "encoder" and i.layer is not None) == 27 * (
        2 * (4 * 1152**2 + 3 * 1152 * 4304) + 4 * (4 * 1152 + 2 * 80))         # norms of 72 numbers fill lines of 64 bytes


def test_weights_of_the_dense_one(full_size) -> None:
    d, f = 5376, 21_504
    plan = pe.plan(full_size("gemma4-31b")[0], n_ctx=4096)
    found = {i.layer: i.nbytes for i in plan.items if i.purpose == "weights" and i.layer is not None}
    sliding, full = (d * q + v * d * k + q * d + 3 * d * f for q, k, v in ((32 * 256, 16 * 256, 2), (32 * 512, 4 * 512, 1)))
    for layer, matrices, e in ((0, sliding, 256), (5, full, 512)):
        assert found[layer] == matrices // 32 * 18 + 4 * (4 * d + 2 * e) + 64       # Q4_0; norms in f32; a number in a line of 64 bytes
