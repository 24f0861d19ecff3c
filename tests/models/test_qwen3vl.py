"""Qwen3-VL against transformers: the grid of positions, features behind the first layers, positions that take turns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import pyengine as pe
import tiny
from cases import Case, Converted
from foreign import Dialect, head_sizes, LlamaCpp, Saved, Tensors, vision_name
from hollow import both, Decoder, Encoder, Full, kv, Tensor
from oracle import encoder_of
from pictures import same
from pyengine.errors import ContextOverflowError, RequestError
from pyengine.media.image import Image
from sight import of_any_backend, Seen
from test_qwen2vl import QwenSight, TOKENS
from tiny import COMMON

try:
    import transformers
except ImportError:         # the cases are found without it
    transformers = None

pytestmark = pytest.mark.skipif(transformers is None, reason="needs transformers and torch: pip install -r requirements/test.txt")


class Qwen3Sight(QwenSight):
    """Videos are pairs of frames, each behind its time."""

    model_types = ("qwen3_vl", "qwen3_vl_moe")

    def images(self, config: Any, settings: dict[str, Any]) -> Any:
        return super().images(config, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **settings})

    def processor(self, folder: Path, config: Any, tokenizer: Any) -> Any:
        from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

        return of_any_backend(Qwen3VLProcessor)(transformers.Qwen2VLImageProcessorPil.from_pretrained(folder), tokenizer, None)

    def seen(self, model: Any, folder: Path, parts: Sequence[Any], fps: float | None, **settings: Any) -> Seen:
        self.fps = fps
        return super().seen(model, folder, parts, fps, **settings)

    def part(self, processor: Any, config: Any, folder: Path, part: Any, **settings: Any) -> tuple[list[int], dict[str, Any]]:
        import torch

        if not isinstance(part, (list, tuple)):
            return super().part(processor, config, folder, part, **settings)
        patches, grid = video_patches(processor.image_processor, part)
        times = processor._calculate_timestamps(list(range(len(part))), self.fps or 24, 2)
        ids: list[int] = []
        for at in times:
            ids += [*processor.tokenizer(f"<{at:.1f} seconds>", add_special_tokens=False)["input_ids"], config.vision_start_token_id,
                    *[config.video_token_id] * (grid[1] * grid[2] // 4), config.vision_end_token_id]
        return ids, {"kind": "video", "pixels": torch.tensor(patches), "grid": grid}


def video_patches(images: Any, frames: list[Any]) -> tuple[np.ndarray, list[int]]:
    """Patches and grid of a video, frames of the size that transformers' video processor gives them and patches as its image processor has them."""
    from PIL import Image as Pillow
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    first = np.asarray(frames[0])
    h, w = smart_resize(max(2, len(frames)), *first.shape[:2], 2, 2 * images.patch_size, images.size["shortest_edge"], images.size["longest_edge"])
    resized = [np.asarray(Pillow.fromarray(np.asarray(f)).resize((w, h), Pillow.Resampling.BICUBIC)) for f in frames]
    single = [images(images=[f], do_resize=False, return_tensors="np") for f in resized]
    _, rows, columns = single[0]["image_grid_thw"][0].tolist()
    kept = [s["pixel_values"].reshape(-1, 3, 2, images.patch_size**2)[:, :, 0] for s in single]
    kept += [kept[-1]] * (len(kept) % 2)
    patches = np.concatenate([np.stack(kept[i : i + 2], axis=2).reshape(rows * columns, -1) for i in range(0, len(kept), 2)])
    return patches, [len(kept) // 2, rows, columns]


TEXT = {**COMMON, "head_dim": 32, "vocab_size": 520, "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [5, 5, 4]}}
VISION = {"depth": 4, "hidden_size": 80, "intermediate_size": 100, "num_heads": 4, "out_hidden_size": 96, "patch_size": 14, "num_position_embeddings": 36,
          "deepstack_visual_indexes": [0, 2]}
CLIP = {"has_vision_encoder": True, "projector_type": "qwen3vl_merger", "use_gelu": True, "use_silu": False, "hidden_act": "gelu_pytorch_tanh",
        "image_size": 84, "patch_size": 14, "embedding_length": 80, "feed_forward_length": 100, "block_count": 4, "attention.head_count": 4,
        "attention.layer_norm_epsilon": np.float32(1e-6), "projection_dim": 96, "spatial_merge_size": 2, "rope.freq_base": 1e4, "resample": 3,
        "is_deepstack_layers": [True, False, True, False], "video_min_pixels": 65536, "video_max_pixels": 90000, "video_min_frames": 4,
        "video_max_frames": 768, "video_sample_frames": True, "video_fps": np.float32(2), "image_min_pixels": 65536, "image_max_pixels": 90000, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CLIP_TOKENS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "image_start_token_id": "<|vision_start|>", "image_end_token_id": "<|vision_end|>"}


class Qwen3Dialect(Dialect):
    """llama.cpp's `conversion/qwen3vl.py`: limits of pixels are not in the file. Ollama's `convert/convert_qwen3vl.go` as it was."""

    model_types, converters = ("qwen3_vl",), ("now",)
    arch, names, projector = "qwen3vl", gguf.MODEL_ARCH.QWEN3VL, "qwen3vl_merger"
    vision_sizes = ("intermediate_size", "hidden_size", "depth", "num_heads")
    ollama_arch = "qwen3vl"
    ollama_names = (("visual", "v"), ("patch_embed.proj", "patch_embed"), ("blocks", "blk"), ("attn.qkv", "attn_qkv"), ("attn.proj", "attn_out"),
                    ("deepstack_merger_list", "deepstack_merger"))

    def assume(self, saved: Saved) -> None:
        assert saved.vision["temporal_patch_size"] == 2 and saved.text["rms_norm_eps"] == 1e-6

    def image_size(self, saved: Saved) -> int:
        return round(saved.vision["num_position_embeddings"] ** 0.5) * saved.vision["patch_size"]

    def text_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        rope = saved.text["rope_parameters"]
        head_sizes(w, saved.text)
        w.add_rope_freq_base(rope["rope_theta"])
        w.add_rope_dimension_sections([*rope["mrope_section"], 0])
        w.add_num_deepstack_layers(len(saved.vision.get("deepstack_visual_indexes", [])))

    def vision_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        vision = saved.vision
        w.add_vision_use_gelu(True)
        w.add_vision_spatial_merge_size(vision["spatial_merge_size"])
        w.add_vision_attention_layernorm_eps(saved.text["rms_norm_eps"])
        w.add_vision_is_deepstack_layers([i in vision.get("deepstack_visual_indexes", []) for i in range(vision["depth"])])

    def vision_tensor(self, saved: Saved, source: str, value: np.ndarray, legacy: bool) -> Tensors:
        part, _, end = source.rpartition(".")
        own = {"visual.merger.norm": "v.post_ln", "visual.merger.linear_fc1": "mm.0", "visual.merger.linear_fc2": "mm.2"}
        for k, layer in enumerate(saved.vision.get("deepstack_visual_indexes", [])):
            own |= {f"visual.deepstack_merger_list.{k}.{theirs}": f"v.deepstack.{layer}.{name}"
                    for theirs, name in (("norm", "norm"), ("linear_fc1", "fc1"), ("linear_fc2", "fc2"))}
        if source == "visual.patch_embed.proj.weight":
            yield "v.patch_embd.weight", value[:, :, 0]
            yield "v.patch_embd.weight.1", value[:, :, 1]
        else:
            yield f"{own[part]}.{end}" if part in own else vision_name(source), value

    def ollama_keys(self, w: gguf.GGUFWriter, saved: Saved) -> tuple[dict[str, int], float | None]:
        text, vision, size = saved.text, saved.vision, saved.images["size"]
        head_sizes(w, text)
        w.add_layer_norm_rms_eps(text["rms_norm_eps"])
        w.add_rope_freq_base(text["rope_parameters"]["rope_theta"])
        w.add_array(f"{self.ollama_arch}.rope.mrope_section", text["rope_parameters"]["mrope_section"])
        return self.ollama_vision_keys(w, vision, saved.images, size)

    def ollama_vision_keys(self, w: gguf.GGUFWriter, vision: dict[str, Any], images: dict[str, Any], size: dict[str, int]) -> Any:
        arch = self.ollama_arch
        w.add_float32(f"{arch}.vision.rope.freq_base", 1e4)
        if vision.get("deepstack_visual_indexes"):
            w.add_array(f"{arch}.vision.deepstack_visual_indexes", vision["deepstack_visual_indexes"])
        for name in ("image_mean", "image_std"):
            w.add_array(f"{arch}.vision.{name}", images[name])
        return {"block_count": vision["depth"], "spatial_merge_size": vision["spatial_merge_size"], "temporal_patch_size": 2,
                "attention.head_count": vision["num_heads"], "shortest_edge": size["shortest_edge"], "longest_edge": size["longest_edge"]}, 1e-6

    def ollama_tensor(self, name: str, value: np.ndarray) -> Tensors:
        if name == "v.patch_embed.weight":                                     # [V, 3, 2, p, p] with the first two as one
            yield name, value.reshape(-1, *value.shape[2:])
        elif "attn_qkv" in name:
            yield from ((name.replace("attn_qkv", f"attn_{part}"), third) for part, third in zip("qkv", np.split(value, 3)))
        else:
            yield name, value


class Qwen3MoeDialect(Qwen3Dialect):
    """The same with experts, whose matrices are turned."""

    model_types, arch, names = ("qwen3_vl_moe",), "qwen3vlmoe", gguf.MODEL_ARCH.QWEN3VLMOE
    ollama_arch = "qwen3vlmoe"

    def text_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        super().text_keys(w, saved)
        w.add_expert_count(saved.text["num_local_experts"])
        w.add_expert_used_count(saved.text["num_experts_per_tok"])
        w.add_expert_feed_forward_length(saved.text["moe_intermediate_size"])

    def text_tensor(self, saved: Saved, source: str, value: np.ndarray) -> Tensors:
        base = source.rpartition(".")[0]
        if source.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate", "up"), np.split(value, 2, axis=1 if value.shape[2] == saved.text["hidden_size"] else 2)):
                yield self.text_name(f"{base}.{part}_proj.weight"), self.upright(saved, half, saved.text["hidden_size"])
        elif source.endswith("experts.down_proj"):
            yield self.text_name(f"{source}.weight"), self.upright(saved, value, saved.text["moe_intermediate_size"])
        else:
            yield from super().text_tensor(saved, source, value)

    def ollama_keys(self, w: gguf.GGUFWriter, saved: Saved) -> tuple[dict[str, int], float | None]:
        """The width of an expert is not said."""
        w.add_expert_count(saved.text["num_local_experts"])
        w.add_expert_used_count(saved.text["num_experts_per_tok"])
        w.add_bool("qwen3vlmoe.norm_top_k_prob", True)
        return super().ollama_keys(w, saved)

    def upright(self, saved: Saved, value: np.ndarray, n_in: int) -> np.ndarray:
        """Return matrices [experts, out, in], however the checkpoint has them."""
        return value if value.shape[2] == n_in else value.swapaxes(1, 2)


PIXELS = {"processor": {"min_pixels": 65_536, "max_pixels": 90_000}}          # the least of published checkpoints, which is assumed


class Qwen3LlamaCpp(LlamaCpp):
    """Rows have all parts in llama.cpp too; transformers gives those of the layers apart."""

    def rows(self, rows: np.ndarray, seen: Any) -> np.ndarray:
        """Return what stands for the tokens."""
        return rows[:, : seen.features[0].shape[-1]]

    def between(self, rows: np.ndarray, seen: Any) -> tuple[np.ndarray, list[int]]:
        """Return no rows: all are the picture's."""
        return self.rows(rows, seen)[:0], []


def full_encoder(d_model: int) -> Encoder:
    """Qwen3-VL 8B's encoder: keys and tensors of llama.cpp's projector file."""
    width, d_ff, n_layers, patch, deep = 1152, 4304, 27, 16, (8, 16, 24)
    keys = {"clip.has_vision_encoder": True, "clip.projector_type": "qwen3vl_merger", "clip.use_gelu": True, "clip.vision.image_size": 768,
            "clip.vision.patch_size": patch, "clip.vision.block_count": n_layers, "clip.vision.embedding_length": width,
            "clip.vision.feed_forward_length": d_ff, "clip.vision.attention.head_count": 16, "clip.vision.attention.layer_norm_epsilon": 1e-6,
            "clip.vision.projection_dim": d_model, "clip.vision.is_deepstack_layers": [i in deep for i in range(n_layers)]}
    wide = 4 * width
    tensors: list[Tensor] = [("v.patch_embd.weight", (width, 3, patch, patch), "F16"), ("v.patch_embd.weight.1", (width, 3, patch, patch), "F16"),
                             ("v.patch_embd.bias", (width,), "F32"), ("v.position_embd.weight", (48 * 48, width), "F32"), *both("v.post_ln", width)]
    for name, first, second in (("", "mm.0", "mm.2"), *((f"v.deepstack.{i}.norm", f"v.deepstack.{i}.fc1", f"v.deepstack.{i}.fc2") for i in deep)):
        tensors += [*(both(name, wide) if name else ()), (f"{first}.weight", (wide, wide), "F16"), (f"{first}.bias", (wide,), "F32"),
                    (f"{second}.weight", (d_model, wide), "F16"), (f"{second}.bias", (d_model,), "F32")]
    for i in range(n_layers):
        at = f"v.blk.{i}."
        tensors += [*both(f"{at}ln1", width), *both(f"{at}ln2", width)]
        for name, shape in {"attn_qkv": (3 * width, width), "attn_out": (width, width), "ffn_up": (d_ff, width), "ffn_down": (width, d_ff)}.items():
            tensors += [(f"{at}{name}.weight", shape, "F16"), (f"{at}{name}.bias", shape[:1], "F32")]
    return keys, tensors


FULL = Full(Decoder("qwen3vl", 36, 4096, 12_288, 32, 8, 128, 151_936, 262_144, head_norms=True,
                    keys={"rope.dimension_sections": np.array([24, 20, 20, 0], np.int32), "n_deepstack_layers": 3}),
            ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"), full_encoder)


def case(kind: str, arch: str, name: str, text: dict[str, Any], full: dict[str, Full] = {}) -> Case:
    return Case(kind, arch, f"{name}Config", f"{name}ForConditionalGeneration", "qwen2", {"tie_word_embeddings": False}, {**TEXT, **text}, VISION, TOKENS,
                Qwen3Sight(), mrope=True, videos=True, cached_as="qwen2_5_vl",
                converted=Converted({"general.architecture": arch, f"{arch}.rope.dimension_sections": [5, 5, 4, 0], f"{arch}.n_deepstack_layers": 2},
                                    clip=CLIP, clip_tokens=CLIP_TOKENS), dialect=Qwen3MoeDialect() if arch == "qwen3vlmoe" else Qwen3Dialect(),
                llama_cpp=Qwen3LlamaCpp((280, 252), PIXELS), full=full)


CASES = (case("qwen3_vl", "qwen3vl", "Qwen3VL", {}, {"qwen3-vl-8b": FULL}),)

SIZES = [(61, 47), (30, 300), (300, 17), (9, 11), (400, 500), (112, 112), (36, 12), (56, 28)]      # width, height
RNG = np.random.default_rng(4)
PICTURES = [RNG.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in SIZES]


def test_pixels_are_bit_for_bit_those_of_transformers(tiny_gguf) -> None:
    path, folder = tiny_gguf("qwen3_vl")
    ours, theirs = encoder_of(path), transformers.Qwen2VLImageProcessorPil.from_pretrained(folder)
    for pixels in PICTURES:
        made = theirs(pixels, return_tensors="np", input_data_format="channels_last")
        (view,) = ours.process(Image(pixels)).views
        assert np.array_equal(view.inputs["patches"], made["pixel_values"])
        assert [1, *(2 * n for n in view.grid[1:])] == made["image_grid_thw"][0].tolist()


def test_the_grid_of_positions_is_interpolated_as_transformers_does(tiny_gguf) -> None:
    import torch
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    ours = encoder_of(tiny_gguf("qwen3_vl")[0])
    for pixels in PICTURES:
        (view,) = ours.process(Image(pixels)).views
        indices, weights = get_vision_interpolation_indices_and_weights(torch.tensor([[1, 2 * view.grid[1], 2 * view.grid[2]]]), 6, align_corners=True,
                                                                       spatial_merge_size=2)
        inputs = view.inputs
        assert np.array_equal(np.stack([inputs[f"tap{i}"] for i in range(4)], 1), indices.numpy())
        assert np.array_equal(np.concatenate([inputs[f"weight{i}"] for i in range(4)], 1), weights.numpy())


def test_options_and_what_is_refused(tiny_gguf) -> None:
    path, folder = tiny_gguf("qwen3_vl")
    model = pe.load(path, n_ctx=128, kv_dtype="f32")
    want = tiny.hf_seen(folder, [5, PICTURES[4], 6], max_pixels=10_000)
    same(model.logits([5, pe.open_image(PICTURES[4], max_pixels=10_000), 6]), want.logits)
    for media, text in [(pe.open_image(PICTURES[0], pan_and_scan=True), "max_pixels"), (pe.Video([PICTURES[0]] * 600), "positions"),
                        (pe.Video([PICTURES[0]] * 4, sample_fps=0), "sample_fps"), (pe.Video([PICTURES[0]] * 4, max_pixels=0), "max_pixels")]:
        with pytest.raises((RequestError, ContextOverflowError), match=text):
            model.encode_image(media)


def test_qwen3_vl_8b_by_hand(full_size, machine) -> None:
    """4 KiB a token and layer in f16; a row of a picture has four parts of 4096, for the token and the first three layers."""
    machine(64 * 2**30)
    path, mmproj = full_size("qwen3-vl-8b")
    plan = pe.plan(path, n_ctx=32_768, mmproj=mmproj, images=(1024, 768, 3), device="cpu")
    d, f, q, k = 4096, 12_288, 32 * 128, 8 * 128
    assert kv(plan) == {"Full": 36 * 32_768 * 4096}
    decoder = (36 * (2 * d * q + 2 * d * k + 3 * d * f) + 2 * 151_936 * d) // 32 * 18
    assert abs(plan.of("weights") + plan.of("mapped") - decoder) < 24 * 2**20
    width, wide = 1152, 4 * 1152
    layer = 2 * (4 * width**2 + 2 * width * 4304) + 4 * (4 * width + 4 * width + 4304 + width)
    layers = [i.nbytes for i in plan.items if i.purpose == "encoder" and i.layer is not None]
    assert len(layers) == 27 and set(layers) == {layers[0]} and layer <= layers[0] < 1.01 * layer
    mergers = 4 * 2 * (wide * wide + d * wide)
    rest = sum(i.nbytes for i in plan.items if i.purpose == "encoder" and i.layer is None and "arena" not in i.detail)
    assert mergers < rest < mergers + 24 * 2**20                        # patches of two slices and positions in f32: 17.7 MB
    assert plan.picture == 32 * 24 and next(i.nbytes for i in plan.items if "kept" in i.detail) == 3 * 768 * 4 * d * 4


FRAMES = [RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8) for _ in range(6)]


@pytest.mark.parametrize(("n", "fps"), [(2, None), (3, None), (4, 1.5), (6, 12.0)])
def test_a_video_is_pairs_of_frames_behind_their_times(tiny_gguf, n: int, fps: float | None) -> None:
    """Timestamps, positions, features behind the first layers, an odd number of frames; text around, and a picture beside it."""
    path, folder = tiny_gguf("qwen3_vl", processor={})
    frames = FRAMES[:n]
    with pe.load(path, n_ctx=512, kv_dtype="f32") as model:
        for prompt in ([5, frames, 6, 7], [5, PICTURES[0], frames, 9, frames, 4]):
            want = tiny.hf_seen(folder, prompt, fps=fps)
            # with a rate, a list is sampled where the processor says so: here all are taken
            ours = [pe.Video(p, fps=fps, sample_fps=fps) if isinstance(p, list) and fps else p for p in prompt]
            same(model.logits(ours), want.logits)


def test_sizes_and_chosen_frames_are_those_of_transformers(tiny_gguf) -> None:
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    from pyengine.models.qwen3vl import video_resize

    for n, height, width in ((2, 40, 60), (3, 700, 30), (5, 1080, 1920), (64, 9, 700), (7, 333, 444)):
        for least, most in ((4096, 25_165_824), (131_072, 786_432)):
            assert video_resize(n, height, width, 32, least, most) == smart_resize(n, height, width, 2, 32, least, most)
