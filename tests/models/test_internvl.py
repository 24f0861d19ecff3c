"""InternVL against transformers: tiles, layer scales, both kinds of norm, the shuffle; the authors' checkpoints; InternLM 2 beside llama."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import pyengine as pe
import tiny
from cases import Case, Converted, Tokens
from converters import convert
from foreign import Dialect, LlamaCpp, Saved, Tensors, vision_name
from hollow import both, Decoder, Encoder, Full, kv, Tensor, vit_layers
from oracle import encoder_of
from pictures import same
from pyengine.errors import ContextOverflowError, RequestError
from pyengine.media.image import Image
from pyengine.models.encoders import internvl
from sight import of_any_backend, Run, Sight
from tiny import COMMON, make_checkpoint

try:
    import transformers
except ImportError:         # the cases are found without it
    transformers = None

pytestmark = pytest.mark.skipif(transformers is None, reason="needs transformers and torch: pip install -r requirements/test.txt")

# What the family's real template does, in other words.
TEMPLATE = """{%- for m in messages -%}
  {{ '<|im_start|>' + m['role'] + '\n' }}
  {%- if m['content'] is string -%}{{ m['content'] }}
  {%- else -%}{%- for part in m['content'] -%}{{ '<IMG_CONTEXT>\n' if part['type'] == 'image' else '<video>\n' if part['type'] == 'video' else part['text'] }}{%- endfor -%}
  {%- endif -%}
  {{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""
TOKENS = Tokens(("<|im_start|>", "<IMG_CONTEXT>", "</img>", "<|im_end|>", "<pad>", "<img>", "<video>"), "<|im_start|>", "<|im_end|>", "<pad>", TEMPLATE,
                {"image_token_id": "<IMG_CONTEXT>"}, named={"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                                                             "video_token": "<video>"})
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class InternVlSight(Sight):
    """Tiles and the whole. Videos need torchvision there: here each frame goes through the processor of pictures, without tiles."""

    model_types, marker = ("internvl",), "<IMG_CONTEXT>"

    def part(self, processor: Any, config: Any, folder: Path, part: Any, **settings: Any) -> tuple[list[int], dict[str, Any]]:
        if not isinstance(part, (list, tuple)):
            return super().part(processor, config, folder, part, **settings)
        made = processor.image_processor(images=list(part), crop_to_patches=False, return_tensors="pt")
        text = processor.replace_video_token({"pixel_values_videos": [made["pixel_values"]]}, 0)
        return processor.tokenizer(text, add_special_tokens=False)["input_ids"], made

    def images(self, config: Any, settings: dict[str, Any]) -> Any:
        side = config.vision_config.image_size[0]
        return transformers.GotOcr2ImageProcessorPil(**{"size": {"height": side, "width": side}, "image_mean": MEAN, "image_std": STD, "crop_to_patches": True,
                                                        "max_patches": 6, **settings})

    def processor(self, folder: Path, config: Any, tokenizer: Any) -> Any:
        from transformers.models.internvl.processing_internvl import InternVLProcessor

        v = config.vision_config
        rows = (v.image_size[0] // v.patch_size[0]) ** 2 * config.downsample_ratio**2
        return of_any_backend(InternVLProcessor)(transformers.GotOcr2ImageProcessorPil.from_pretrained(folder), tokenizer, None, int(rows))

    def run(self, model: Any, tokens: Any, made: list[dict[str, Any]], fps: float | None) -> Run:
        import torch

        if not made:
            return Run({}, [], [], [])
        inputs = {"pixel_values": torch.cat([m["pixel_values"] for m in made])}
        features = [model.model.get_image_features(m["pixel_values"]).pooler_output.flatten(0, 1) for m in made]
        return Run(inputs, features, [m["pixel_values"] for m in made], [])


TEXT = {**COMMON, "max_position_embeddings": 512, "model_type": "qwen2"}
VISION = {"hidden_size": 80, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": [56, 56], "patch_size": [14, 14],
          "attention_bias": True, "layer_scale_init_value": 0.5}
CLIP = {"has_vision_encoder": True, "projector_type": "internvl", "use_silu": False, "use_gelu": True, "hidden_act": "gelu", "image_size": 56,
        "patch_size": 14, "embedding_length": 80, "feed_forward_length": 100, "attention.head_count": 4, "projection_dim": 96, "block_count": 3,
        "resample": 3, "attention.layer_norm_epsilon": np.float32(1e-6), "projector.scale_factor": 2, "preproc_min_tiles": 1, "preproc_max_tiles": 6,
        "image_mean": [np.float32(x) for x in MEAN], "image_std": [np.float32(x) for x in STD]}


class InternVlDialect(Dialect):
    """llama.cpp's `conversion/internvl.py`, which reads the authors' checkpoints; names that transformers gave them are in its tables too."""

    model_types, converters = ("internvl",), ("now",)
    settings = {"vision_config": {"use_mean_pooling": True}}           # the authors' encoders have no norm behind the layers
    arch, names, projector = "qwen2", gguf.MODEL_ARCH.QWEN2, "internvl"

    def text_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        w.add_rope_freq_base(saved.text["rope_parameters"]["rope_theta"])

    def vision_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        w.add_vision_attention_layernorm_eps(saved.vision["layer_norm_eps"])
        w.add_vision_use_gelu(True)
        w.add_vision_projector_scale_factor(int(1 / saved.config["downsample_ratio"]))
        w.add_vision_preproc_min_tiles(saved.images["min_patches"])
        w.add_vision_preproc_max_tiles(saved.images["max_patches"])

    def vision_tensor(self, saved: Saved, source: str, value: np.ndarray, legacy: bool) -> Tensors:
        projector = {"layer_norm": "mlp1.0", "linear_1": "mlp1.1", "linear_2": "mlp1.3"}
        known = re.sub(r"^multi_modal_projector\.(\w+)", lambda m: projector[m[1]], source)
        name = vision_name(re.sub("^vision_tower", "model.vision_tower", known))
        yield name + ".weight" * bool(re.search(r"\.ls\d$|position_embd$", name)), value


class InternVlLlamaCpp(LlamaCpp):
    """It puts the class token behind the patches, but its position before theirs: each patch gets its neighbour's."""

    def adapt(self, mmproj: Path) -> None:
        """Move the class token's position to the end."""
        table = next(t for t in gguf.GGUFReader(mmproj, "r+").tensors if t.name == "v.position_embd.weight")
        table.data[:] = np.roll(table.data, -1, axis=-2)


def full_encoder(d_model: int) -> Encoder:
    """InternViT-300M and its projector, as llama.cpp names them."""
    width, d_ff, n_layers = 1024, 4096, 24
    keys = {"clip.has_vision_encoder": True, "clip.projector_type": "internvl", "clip.use_gelu": True, "clip.vision.image_size": 448,
            "clip.vision.patch_size": 14, "clip.vision.block_count": n_layers, "clip.vision.embedding_length": width,
            "clip.vision.feed_forward_length": d_ff, "clip.vision.attention.head_count": 16, "clip.vision.attention.layer_norm_epsilon": 1e-6,
            "clip.vision.projection_dim": d_model, "clip.vision.projector.scale_factor": 2}
    scales = [(f"v.blk.{i}.{name}.weight", (width,), "F32") for i in range(n_layers) for name in ("ls1", "ls2")]
    tensors: list[Tensor] = [("v.patch_embd.weight", (width, 3, 14, 14), "F16"), ("v.patch_embd.bias", (width,), "F32"), ("v.class_embd", (width,), "F32"),
                             ("v.position_embd.weight", (1025, width), "F32"), *both("mm.model.mlp.0", 4 * width), *vit_layers(n_layers, width, d_ff), *scales]
    for name, shape in (("1", (d_model, 4 * width)), ("3", (d_model, d_model))):
        tensors += [(f"mm.model.mlp.{name}.weight", shape, "F16"), (f"mm.model.mlp.{name}.bias", shape[:1], "F32")]
    return keys, tensors


FULL = Full(Decoder("internlm2", 32, 4096, 14_336, 32, 8, 128, 92_553, 32_768), ("<IMG_CONTEXT>", "<img>", "</img>"), full_encoder, "F16")


def case(kind: str, also: tuple[str, ...] = (), full: dict[str, Full] = {}, **vision: Any) -> Case:
    return Case(kind, "qwen2", "InternVLConfig", "InternVLForConditionalGeneration", "qwen2", {"tie_word_embeddings": False, "downsample_ratio": 0.5}, TEXT,
                {**VISION, **vision}, TOKENS, InternVlSight(), also=also, videos=True, cached_as="qwen2",
                converted=Converted({"general.architecture": "qwen2", "tokenizer.chat_template": TEMPLATE}, clip=CLIP,
                                    clip_tokens={"image_token_id": "<IMG_CONTEXT>", "image_start_token_id": "<img>", "image_end_token_id": "</img>"}),
                dialect=InternVlDialect(), llama_cpp=None if "norm_type" in vision else InternVlLlamaCpp((56, 56)), full=full)


CASES = (case("internvl", ("internlm2", "InternLM2ForCausalLM", "InternVLChatModel"), {"internvl2-8b": FULL}),
         case("internvl_6b", norm_type="rms_norm", use_qk_norm=True, attention_bias=False, use_mean_pooling=False))

SIZES = [(61, 47), (30, 300), (300, 17), (9, 11), (400, 500), (112, 112), (56, 56), (90, 1), (131, 130)]      # width, height
RNG = np.random.default_rng(4)
PICTURES = [RNG.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in SIZES]


def test_pixels_of_tiles(tiny_gguf) -> None:
    path, folder = tiny_gguf("internvl")
    ours, theirs = encoder_of(path), transformers.GotOcr2ImageProcessorPil.from_pretrained(folder)
    inverse = np.argsort(ours.order)
    for pixels in PICTURES:
        tiles = theirs(pixels, return_tensors="np", input_data_format="channels_last")["pixel_values"]
        views = ours.process(Image(pixels)).views
        assert len(views) == len(tiles)
        for view, tile in zip(views, tiles):
            patches = view.inputs["patches"][inverse].reshape(4, 4, 3, 14, 14)
            assert np.array_equal(patches.transpose(2, 0, 3, 1, 4).reshape(3, 56, 56), tile)


def test_grids_are_transformers() -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    for _ in range(2000):
        width, height = (int(s) for s in np.exp(RNG.uniform(0, 8, 2)))
        least, most = sorted(RNG.integers(1, 13, 2).tolist())
        assert internvl.grid(width, height, 448, least, most)[::-1] == get_optimal_tiled_canvas((height, width), (448, 448), least, most)


def test_options_and_what_is_refused(tiny_gguf) -> None:
    path, folder = tiny_gguf("internvl")
    model = pe.load(path, n_ctx=128, kv_dtype="f32")
    assert len(model.encode_image(PICTURES[5])) == 4 * 5 and len(model.encode_image(pe.open_image(PICTURES[5], max_tiles=1))) == 4
    same(model.logits([5, pe.open_image(PICTURES[4], max_tiles=2), 6]), tiny.hf_seen(folder, [5, PICTURES[4], 6], max_patches=2).logits)
    for media, text in [(pe.open_image(PICTURES[0], max_tiles=7), "from 1 to 6"), (pe.open_image(PICTURES[0], pan_and_scan=True), "has max_tiles"),
                        (pe.Video([PICTURES[0]] * 2, num_frames=3), "from 1 to 2"), (pe.Video([PICTURES[0]] * 2, max_tiles=1), "has num_frames")]:
        with pytest.raises(RequestError, match=text):
            model.encode_image(media)
    with pytest.raises(ContextOverflowError, match="5 tiles, 20 positions, but the context holds 12"):
        pe.load(path, n_ctx=12).encode_image(PICTURES[5])
    with pytest.raises(ContextOverflowError, match="4 frames takes 16 positions, but the context holds 12"):
        pe.load(path, n_ctx=12).encode_image([PICTURES[0]] * 4)


def test_frames_are_taken_from_the_middles_as_transformers_does(tiny_gguf) -> None:
    import torch

    for _ in range(500):
        total = int(RNG.integers(1, 5000))
        n = int(RNG.integers(1, min(total, 64) + 1))         # with more the last bits differ from machine to machine
        assert internvl.middles(total, n) == torch.arange(total / n / 2, total, total / n).int().tolist()
    path, folder = tiny_gguf("internvl")
    model, frames = pe.load(path, n_ctx=128, kv_dtype="f32"), [PICTURES[0] // (i + 1) for i in range(7)]
    want = tiny.hf_seen(folder, [5, [frames[i] for i in (1, 3, 5)], 6])
    same(model.logits([5, pe.Video(frames, num_frames=3), 6]), want.logits)


def test_a_conversation_about_a_video(tiny_gguf) -> None:
    """A line for each frame, behind and before the text around them."""
    path, folder = tiny_gguf("internvl")
    messages = [{"role": "user", "content": [{"type": "text", "text": "watch "}, {"type": "video", "video": [PICTURES[0]] * 2},
                                             {"type": "text", "text": "what moves?"}]}]
    soft = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
    text = f"<|im_start|>user\nwatch Frame1: {soft}\nFrame2: {soft}\nwhat moves?<|im_end|>\n<|im_start|>assistant\n"
    want = transformers.AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    model = pe.load(path, n_ctx=128)
    assert model.chat_ids(messages) == [-1 if i == model.tokenizer.id_of("<IMG_CONTEXT>") else i for i in want]


def as_authors(folder: Path) -> None:
    """Rewrite a checkpoint as the authors' remote code saves it: `configuration_internvl_chat.py`, `modeling_intern_vit.py`."""
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    vision, tensors = config["vision_config"], load_file(folder / "model.safetensors")
    renames = [(r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."), (r"^(model\.)?language_model\.(model\.)?(?!lm_head)", "language_model.model."),
               (r"^lm_head", "language_model.lm_head"), (r"^vision_tower\.", "vision_model."), (r"embeddings\.cls_token", "embeddings.class_embedding"),
               (r"position_embeddings$", "position_embedding"), (r"patch_embeddings\.projection", "patch_embedding"), (r"encoder\.layer\.", "encoder.layers."),
               (r"attention\.projection_layer", "attn.proj"), (r"attention\.([qk]_norm)", r"attn.\1"), (r"layernorm_before", "norm1"),
               (r"layernorm_after", "norm2"), (r"lambda_([12])", r"ls\1"), (r"^multi_modal_projector\.layer_norm", "mlp1.0"),
               (r"^multi_modal_projector\.linear_1", "mlp1.1"), (r"^multi_modal_projector\.linear_2", "mlp1.3")]
    made = {}
    for name, value in tensors.items():
        for pattern, new in renames:
            name = re.sub(pattern, new, name)
        made[name] = value
    for i in range(vision["num_hidden_layers"]):
        at = f"vision_model.encoder.layers.{i}."
        for part in ("weight", "bias"):
            made[f"{at}attn.qkv.{part}"] = torch.cat([made.pop(f"{at}attention.{n}_proj.{part}") for n in "qkv"])
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    authors = {"architectures": ["InternVLChatModel"], "llm_config": {**config["text_config"], "architectures": ["Qwen2ForCausalLM"]},
               "vision_config": {**vision, "image_size": 56, "patch_size": 14, "qkv_bias": True, "qk_normalization": False}, "downsample_ratio": 0.5,
               "select_layer": -1, "ps_version": "v2", "min_dynamic_patch": 1, "max_dynamic_patch": 6}
    (folder / "config.json").write_text(json.dumps(authors))


def test_the_authors_checkpoint_is_the_same_model(tmp_path) -> None:
    folder = make_checkpoint("internvl", tmp_path / "c")
    path = convert(folder, tmp_path / "hf.gguf", "f32")
    as_authors(folder)
    theirs, ours = pe.load(convert(folder, tmp_path / "m.gguf", "f32"), n_ctx=128), pe.load(path, n_ctx=128)
    prompt = ["what is ", PICTURES[4], " this?"]
    assert np.array_equal(theirs.logits(prompt), ours.logits(prompt))


def test_internlm2_is_llama_under_other_names(tmp_path) -> None:
    """The authors' code computes what llama's does; q, k and v of a key head lie together (`modeling_internlm2.py`: wqkv)."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint("llama", tmp_path / "c")
    path = convert(folder, tmp_path / "llama.gguf", "f32")
    names = {"model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo", "input_layernorm": "attention_norm",
             "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2"}
    tensors, made = load_file(folder / "model.safetensors"), {}
    for name, value in tensors.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        made[name] = value
    for i in range(3):
        at = f"model.layers.{i}.self_attn."
        q, k, v = (made.pop(f"{at}{n}_proj.weight") for n in "qkv")
        heads = [torch.cat([q[g * 48:(g + 1) * 48], k[g * 16:(g + 1) * 16], v[g * 16:(g + 1) * 16]]) for g in range(2)]     # 3 queries each
        made[f"model.layers.{i}.attention.wqkv.weight"] = torch.cat(heads).contiguous()
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False}))
    out = convert(folder, tmp_path / "m.gguf", "f32")
    ids = np.random.default_rng(0).integers(0, 512, 40).tolist()
    model = pe.load(out, n_ctx=64, kv_dtype="f32")
    assert model.file.metadata["general.architecture"] == "internlm2"
    assert np.array_equal(model.logits(ids), pe.load(path, n_ctx=64, kv_dtype="f32").logits(ids))


def test_internvl2_8b_in_f16_takes_16_gb(full_size, machine) -> None:
    """Two bytes a weight: 7.74 thousand million of InternLM 2.5, 0.34 of the encoder; 256 rows of each of 12 tiles and the whole."""
    machine(64 * 2**30)
    path, mmproj = full_size("internvl2-8b")
    plan = pe.plan(path, n_ctx=8192, mmproj=mmproj, device="cpu")
    d, f, k = 4096, 14_336, 8 * 128
    assert kv(plan) == {"Full": 32 * 8192 * 4096}
    decoder = 2 * (32 * (2 * d * d + 2 * d * k + 3 * d * f) + 2 * 92_553 * d)
    encoder = 2 * (24 * (4 * 1024**2 + 2 * 1024 * 4096) + 2 * d * d) + 4 * 1025 * 1024
    found = plan.of("weights") + plan.of("mapped") + sum(i.nbytes for i in plan.items if i.purpose == "encoder" and "arena" not in i.detail)
    assert abs(found - decoder - encoder) < 16 * 2**20 and 16.0e9 < found < 16.3e9
    assert plan.picture == 256
    kept = pe.plan(path, n_ctx=8192, mmproj=mmproj, images=(1792, 1344, 2), device="cpu")
    assert next(i.nbytes for i in kept.items if "kept" in i.detail) == 2 * 13 * 256 * d * 4
