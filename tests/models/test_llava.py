"""LLaVA 1.5, LLaVA-NeXT, Granite Vision and LLaVA-OneVision against transformers: pixels, tiles, layers that are joined, ends of lines, rows that
are resized."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import pyengine as pe
import tiny
from cases import Case, Converted, Tokens
from foreign import Dialect, llama_keys, llama_turned, LlamaCpp, Saved, Tensors
from hollow import Decoder, Encoder, Full, kv, vit_layers
from oracle import encoder_of
from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError
from pyengine.media.image import Image
from pyengine.media.views import Blend
from pyengine.models.encoders import clip, llava
from pyengine.nn.encoder import bilinear
from sight import ids_of, load_processor, of_any_backend, Run, Seen, Sight
from tiny import COMMON

try:
    import transformers
except ImportError:         # the cases are found without it
    transformers = None

pytestmark = pytest.mark.skipif(transformers is None, reason="needs transformers and torch: pip install -r requirements/test.txt")

# What the family's real template does, in other words: contents are strings or lists of parts.
TEMPLATE = """{{ bos_token }}
{%- for m in messages -%}
  {{ m['role'] | upper + ': ' }}
  {%- if m['content'] is string -%}{{ m['content'] }}
  {%- else -%}{%- for part in m['content'] -%}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{%- endfor -%}
  {%- endif -%}
  {{ eos_token if m['role'] == 'assistant' else ' ' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"""
TOKENS = Tokens(("<s>", "<image>", "</s>", "<pad>"), "<s>", "</s>", "<pad>", TEMPLATE, {"image_token_index": "<image>"})
PINPOINTS = [[42, 84], [84, 42], [84, 84], [126, 42], [42, 126]]


class LlavaSight(Sight):
    """One square of each picture."""

    model_types, towers = ("llava",), ("clip_vision_model", "siglip_vision_model")
    marker, family, name = "<image>", "llava", "Llava"

    def images(self, config: Any, settings: dict[str, Any]) -> Any:
        side = config.vision_config.image_size
        more = {"image_grid_pinpoints": config.image_grid_pinpoints} if hasattr(config, "image_grid_pinpoints") else {}
        made = getattr(transformers, f"{self.name}ImageProcessorPil")
        return made(**{"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, **more, **settings})

    def processor(self, folder: Path, config: Any, tokenizer: Any) -> Any:
        """Its module asks for functions of the torchvision one, which the Pillow one has too."""
        package = f"transformers.models.{self.family}"
        if importlib.util.find_spec("torchvision") is None:
            pillow = importlib.import_module(f"{package}.image_processing_pil_{self.family}")
            sys.modules.setdefault(f"{package}.image_processing_{self.family}", pillow)
        base = getattr(importlib.import_module(f"{package}.processing_{self.family}"), f"{self.name}Processor")
        images = getattr(transformers, f"{self.name}ImageProcessorPil").from_pretrained(folder)
        clip = config.vision_config.model_type == "clip_vision_model"
        return of_any_backend(base)(images, tokenizer, config.vision_config.patch_size, config.vision_feature_select_strategy,
                                    num_additional_image_tokens=int(clip))

    def run(self, model: Any, tokens: Any, made: list[dict[str, Any]], fps: float | None) -> Run:
        import torch

        if not made:
            return Run({}, [], [], [])
        inputs = {"pixel_values": torch.cat([m["pixel_values"] for m in made])}
        return Run(inputs, list(model.model.get_image_features(**inputs).pooler_output), list(inputs["pixel_values"]), [])


class NextSight(LlavaSight):
    """Tiles of each picture, and the whole."""

    model_types, towers = ("llava_next",), ()
    family, name = "llava_next", "LlavaNext"

    def seen(self, model: Any, folder: Path, parts: Any, fps: float | None, **settings: Any) -> Any:
        """Its head is its own since transformers 5, and leaves out the scale of Granite's logits, which GraniteForCausalLM divides by."""
        seen = super().seen(model, folder, parts, fps, **settings)
        return replace(seen, logits=seen.logits / getattr(model.config.text_config, "logits_scaling", 1.0))

    def run(self, model: Any, tokens: Any, made: list[dict[str, Any]], fps: float | None) -> Run:
        import torch

        if not made:
            return Run({}, [], [], [])
        tiles = [m["pixel_values"][0] for m in made]
        most = max(map(len, tiles))
        padded = [torch.nn.functional.pad(t, (0, 0, 0, 0, 0, 0, 0, most - len(t))) for t in tiles]
        inputs = {"pixel_values": torch.stack(padded), "image_sizes": torch.cat([m["image_sizes"] for m in made])}
        return Run(inputs, list(model.model.get_image_features(**inputs).pooler_output), tiles, [])


class OneVisionSight(LlavaSight):
    """Tiles of the only picture, a square of one of several; frames of videos."""

    model_types, towers = ("llava_onevision",), ()
    family, name = "llava_onevision", "LlavaOnevision"

    def images(self, config: Any, settings: dict[str, Any]) -> Any:
        side = config.vision_config.image_size
        return transformers.LlavaOnevisionImageProcessorPil(**{"size": {"height": side, "width": side},
                                                               "image_grid_pinpoints": config.image_grid_pinpoints, **settings})

    def processor(self, folder: Path, config: Any, tokenizer: Any) -> Any:
        base = importlib.import_module("transformers.models.llava_onevision.processing_llava_onevision").LlavaOnevisionProcessor
        images, vision = transformers.LlavaOnevisionImageProcessorPil.from_pretrained(folder), config.vision_config
        return of_any_backend(base)(images, tokenizer, None, (vision.image_size // vision.patch_size) ** 2, config.vision_feature_select_strategy,
                                    vision_aspect_ratio=config.vision_aspect_ratio)

    def seen(self, model: Any, folder: Path, parts: Any, fps: float | None, **settings: Any) -> Any:
        """All pictures are processed together: what each becomes depends on the others. Features are those of each alone."""
        import torch

        config, processor = model.config, load_processor(self, folder, model.config)
        pictures = [p for p in parts if not isinstance(p, (int, str, list))]
        films = [p for p in parts if isinstance(p, list)]
        made = processor.image_processor([pictures], return_tensors="pt") if pictures else {}
        frames = torch.tensor(np.stack([frame_pixels(processor.image_processor, f) for f in films[0]]))[None] if films else None

        def its_ids(part: Any) -> list[int]:
            if isinstance(part, list):
                half = -(-config.vision_config.image_size // config.vision_config.patch_size // 2)
                return [config.video_token_id] * (len(part) * half**2 + 1)
            text = processor.replace_image_token(made, next(i for i, p in enumerate(pictures) if p is part))
            return processor.tokenizer(text, add_special_tokens=False)["input_ids"]

        tokens = torch.tensor([ids_of(parts, processor.tokenizer, its_ids)])
        inputs = {**({"pixel_values_videos": frames} if films else {}), **made}
        with torch.no_grad():
            alone = [processor.image_processor([[p]], return_tensors="pt") for p in pictures]
            features = [model.model.get_image_features(**one).pooler_output[0] for one in alone]
            logits = model(input_ids=tokens, **inputs).logits[0].numpy()
        return Seen(tokens[0].tolist(), logits, [f.numpy() for f in features], list(made["pixel_values"].numpy()) if pictures else [], [])


def frame_pixels(images: Any, frame: Any) -> np.ndarray:
    """Return a frame's pixels as the video processor has them, which needs torchvision: SigLIP's processor does the same with Pillow."""
    same = transformers.SiglipImageProcessorPil(size=dict(images.size), resample=images.resample, image_mean=images.image_mean, image_std=images.image_std)
    return same(frame, return_tensors="np")["pixel_values"][0]


SHORT = (("embeddings.", ""), ("encoder.layers", "blk"), ("self_attn.", "attn_"), ("_proj", ""), ("layer_norm", "ln"), ("layernorm", "ln"),
         ("layrnorm", "ln"), ("mlp.fc1", "ffn_down"), ("mlp.fc2", "ffn_up"), ("embedding", "embd"))


class LlavaDialect(Dialect):
    """llama.cpp's `tools/mtmd/legacy-models/{llava_surgery_v2,convert_image_encoder_to_gguf}.py`, text models by `conversion/{llama,granite}.py`.

    The encoder's config is written by hand: only that of Granite Vision lists layers. Without, llama.cpp leaves the file's last layer out.
    """

    model_types, towers, converters = ("llava", "llava_next"), ("clip_vision_model", "siglip_vision_model"), ("first",)
    settings = {"processor": {"do_pad": True}}                          # LLaVA 1.5, as its authors have it
    arch, names, projector = "llama", gguf.MODEL_ARCH.LLAMA, "mlp"

    def text_arch(self, saved: Saved, legacy: bool) -> str:
        return "granite" if saved.text["model_type"] == "granite" else self.arch

    def text_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        text = saved.text
        if text["model_type"] != "granite":
            llama_keys(w, text)
            return
        llama_keys(w, {**text, "head_dim": None})
        w.add_attention_scale(text["attention_multiplier"])
        w.add_embedding_scale(text["embedding_multiplier"])
        w.add_residual_scale(text["residual_multiplier"])
        w.add_logit_scale(text["logits_scaling"])

    def text_tensor(self, saved: Saved, source: str, value: np.ndarray) -> Tensors:
        yield self.text_name(source), llama_turned(source, value, saved.text)

    def features(self, saved: Saved) -> list[int]:
        """Return the layers whose inputs are taken."""
        found, n = saved.config["vision_feature_layer"], saved.vision["num_hidden_layers"]
        return [i if i >= 0 else n + 1 + i for i in (found if isinstance(found, list) else [found])]

    def encoder_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        """Write all keys; the width behind CLIP's own projection is its, and SigLIP's is 0."""
        vision = saved.vision
        for name, value in (("has_text_encoder", False), ("has_vision_encoder", True), ("has_llava_projector", True)):
            w.add_bool(f"clip.{name}", value)
        w.add_description("image encoder for LLaVA")
        w.add_string("clip.projector_type", self.projector)
        for name, number in (("image_size", vision["image_size"]), ("patch_size", vision["patch_size"]), ("embedding_length", vision["hidden_size"]),
                             ("feed_forward_length", vision["intermediate_size"]), ("projection_dim", vision.get("projection_dim", 0)),
                             ("attention.head_count", vision["num_attention_heads"]), ("block_count", max(self.features(saved)))):
            w.add_uint32(f"clip.vision.{name}", number)
        w.add_float32("clip.vision.attention.layer_norm_epsilon", vision["layer_norm_eps"])
        if saved.kind == "llava_next":
            w.add_array("clip.vision.image_grid_pinpoints", [n for pair in saved.config["image_grid_pinpoints"] for n in pair])
            w.add_string("clip.vision.mm_patch_merge_type", "spatial_unpad")

    def vision_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        if isinstance(saved.config["vision_feature_layer"], list):
            w.add_array("clip.vision.feature_layer", self.features(saved))
        w.add_array("clip.vision.image_mean", saved.images["image_mean"])
        w.add_array("clip.vision.image_std", saved.images["image_std"])
        w.add_bool("clip.use_gelu", saved.vision["hidden_act"] == "gelu")

    def vision_tensor(self, saved: Saved, source: str, value: np.ndarray, legacy: bool) -> Tensors:
        layer = re.search(r"layers\.(\d+)\.", source)
        if layer and int(layer[1]) >= max(self.features(saved)) or "vision_model.post_layernorm" in source or "vision_tower.post_layernorm" in source:
            return
        name = re.sub(r"^vision_tower\.(vision_model\.)?", "v.", source)
        name = re.sub(r"^multi_modal_projector\.linear_([12])", lambda m: f"mm.{2 * int(m[1]) - 2}", name)
        if name.startswith("v."):
            for theirs, short in SHORT:
                name = name.replace(theirs, short)
        yield f"model.{name}" if name == "image_newline" else name, value.squeeze()


class LlavaLlamaCpp(LlamaCpp):
    """It puts the class token behind the patches, but its position before theirs, and leaves the first row out instead of the last."""

    def adapt(self, mmproj: Path) -> None:
        """Move the class token's position to the end."""
        table = next(t for t in gguf.GGUFReader(mmproj, "r+").tensors if t.name == "v.position_embd.weight")
        table.data[:] = np.roll(table.data, -1, axis=-2)

    def rows(self, rows: np.ndarray, seen: Any) -> np.ndarray:
        """Return the rows but the class token's."""
        return rows[:-1]

    def wanted(self, seen: Any) -> np.ndarray:
        """Return the rows but the first."""
        return super().wanted(seen)[1:]


TEXT = {**COMMON, "rms_norm_eps": 1e-5, "max_position_embeddings": 512}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 80, "intermediate_size": 100, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": 42, "patch_size": 14, "hidden_act": "quick_gelu"}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"}
KEYS = {"has_vision_encoder": True, "projector_type": "mlp", "use_silu": False, "image_size": 42, "patch_size": 14, "embedding_length": 80,
        "feed_forward_length": 100, "attention.head_count": 4, "projection_dim": 96, "resample": 3,
        "image_mean": [np.float32(x) for x in clip.MEAN], "image_std": [np.float32(x) for x in clip.STD]}
CLIP_KEYS = {**KEYS, "use_gelu": False, "hidden_act": "quick_gelu", "attention.layer_norm_epsilon": np.float32(1e-5), "block_count": 3,
             "feature_layer": [3]}
TILES = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [n for pair in PINPOINTS for n in pair], "mm_patch_merge_type": "spatial_unpad"}
RENAMES = ((("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."), ("vision_tower.", "model.vision_tower."),
            ("multi_modal_projector.", "model.multi_modal_projector.")),)

LLAVA = Case(
    "llava", "llama", "LlavaConfig", "LlavaForConditionalGeneration", "llama-bpe", {"tie_word_embeddings": False, "vision_feature_layer": -2},
    {**TEXT, "model_type": "llama"}, CLIP, TOKENS, LlavaSight(), cached_as="llama",
    converted=Converted({"general.architecture": "llama", "tokenizer.chat_template": TEMPLATE},
                        clip={**CLIP_KEYS, "image_aspect_ratio": "crop"}, clip_tokens={"image_token_id": "<image>"}, renames=RENAMES),
    dialect=LlavaDialect(), llama_cpp=LlavaLlamaCpp((42, 42)))

NEXT = Case(
    "llava_next", "llama", "LlavaNextConfig", "LlavaNextForConditionalGeneration", "llama-bpe",
    {"tie_word_embeddings": False, "vision_feature_layer": -2, "image_grid_pinpoints": PINPOINTS},
    {**TEXT, "model_type": "mistral", "sliding_window": None}, CLIP, TOKENS, NextSight(), cached_as="llama",
    converted=Converted({"general.architecture": "llama"}, clip={**CLIP_KEYS, **TILES}, clip_tokens={"image_token_id": "<image>"}, renames=RENAMES),
    dialect=LlavaDialect())

GRANITE = Case(
    "granite_vision", "granite", "LlavaNextConfig", "LlavaNextForConditionalGeneration", "gpt-2",
    {"tie_word_embeddings": True, "vision_feature_layer": [-4, -2, -1], "vision_feature_select_strategy": "full", "image_grid_pinpoints": PINPOINTS},
    {**TEXT, "model_type": "granite", "embedding_multiplier": 12.0, "logits_scaling": 6.0, "residual_multiplier": 0.22, "attention_multiplier": 0.2},
    SIGLIP, TOKENS, NextSight(), cached_as="llama",
    converted=Converted(
        {"general.architecture": "granite"},
        clip={**KEYS, **TILES, "use_gelu": True, "hidden_act": "gelu_pytorch_tanh", "attention.layer_norm_epsilon": np.float32(1e-6), "block_count": 4,
              "feature_layer": [1, 3, 4]}, clip_tokens={"image_token_id": "<image>"}, renames=RENAMES),
    dialect=LlavaDialect())

def full_encoder(d_model: int) -> Encoder:
    """LLaVA-OneVision's: SigLIP of 27 layers but the last, 27 x 27 patches of 14 in 384 pixels, 36 shapes of up to 36 tiles."""
    width, d_ff, n_layers, patch, side = 1152, 4304, 26, 14, 384
    keys = {"clip.has_vision_encoder": True, "clip.projector_type": "mlp", "clip.use_gelu": True, "clip.vision.hidden_act": "gelu_pytorch_tanh",
            "clip.vision.image_size": side, "clip.vision.patch_size": patch, "clip.vision.block_count": n_layers,
            "clip.vision.embedding_length": width, "clip.vision.feed_forward_length": d_ff, "clip.vision.attention.head_count": 16,
            "clip.vision.projection_dim": d_model, "clip.vision.attention.layer_norm_epsilon": 1e-6, "clip.vision.image_mean": [0.5] * 3,
            "clip.vision.image_std": [0.5] * 3, "clip.vision.image_aspect_ratio": "anyres_max_9",
            "clip.vision.image_grid_pinpoints": [side * n for y in range(1, 7) for x in range(1, 7) for n in (y, x)]}
    tensors = [("v.patch_embd.weight", (width, 3, patch, patch), "F16"), ("v.patch_embd.bias", (width,), "F32"),
               ("v.position_embd.weight", ((side // patch) ** 2, width), "F32"), *vit_layers(n_layers, width, d_ff),
               ("mm.0.weight", (d_model, width), "F16"), ("mm.0.bias", (d_model,), "F32"), ("mm.2.weight", (d_model, d_model), "F16"),
               ("mm.2.bias", (d_model,), "F32"), ("model.image_newline", (d_model,), "F32")]
    return keys, tensors


# 45 pixels are 3 patches of 14 and 3 pixels that nothing sees; more than 1.21 x 2 tiles are resized
SIDES = [[45, 90], [90, 45], [90, 90], [135, 45], [45, 135], [135, 135], [90, 180], [45, 180]]
ONEVISION_TOKENS = replace(
    TOKENS, special=("<|start|>", "<image>", "<|end|>", "<video>", "<pad>"), bos="<|start|>", eos="<|end|>",
    template=TEMPLATE.replace("{{ bos_token }}\n", ""), ids={"image_token_index": "<image>", "video_token_index": "<video>"})
ONEVISION = Case(
    "llava_onevision", "qwen2", "LlavaOnevisionConfig", "LlavaOnevisionForConditionalGeneration", "qwen2",
    {"tie_word_embeddings": False, "image_grid_pinpoints": SIDES, "vision_aspect_ratio": "anyres_max_2"},
    {**TEXT, "model_type": "qwen2"}, {**SIGLIP, "image_size": 45, "vision_use_head": False}, ONEVISION_TOKENS, OneVisionSight(), cached_as="llama",
    videos=True,
    converted=Converted(
        {"general.architecture": "qwen2"},
        clip={**KEYS, "image_size": 45, "use_gelu": True, "hidden_act": "gelu_pytorch_tanh", "attention.layer_norm_epsilon": np.float32(1e-6),
              "block_count": 4, "feature_layer": [4], "image_aspect_ratio": "anyres_max_2", "image_grid_pinpoints": [n for pair in SIDES for n in pair],
              "mm_patch_merge_type": "spatial_unpad"},
        clip_tokens={"image_token_id": "<image>", "video_token_id": "<video>"}, renames=RENAMES))

ONEVISION_7B = Full(Decoder("qwen2", 28, 3584, 18944, 28, 4, 128, 152064, 32768, biases=True), ("<image>", "<video>"), full_encoder)

CASES = (LLAVA, NEXT, GRANITE, replace(ONEVISION, full={"llava-onevision-7b": ONEVISION_7B}))

SIZES = [(61, 47), (30, 300), (300, 17), (9, 11), (400, 500), (84, 84), (42, 42), (90, 1), (131, 130), (127, 42)]      # width, height
RNG = np.random.default_rng(4)
PICTURES = [RNG.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in SIZES]


def whole(view: Any) -> np.ndarray:
    """Return the pixels of a run as transformers has them."""
    return view.inputs["patches"].reshape(3, 3, 3, 14, 14).transpose(2, 0, 3, 1, 4).reshape(3, 42, 42)


@pytest.mark.parametrize("settings", [{}, {"do_pad": True}, {"image_mean": [0.4, 0.5, 0.45], "image_std": [0.2, 0.25, 0.3], "resample": 2}],
                         ids=["cut", "padded", "others"])
def test_pixels_of_one_square(tiny_gguf, settings) -> None:
    path, folder = tiny_gguf("llava", processor=settings)
    ours, theirs = encoder_of(path), transformers.LlavaImageProcessorPil.from_pretrained(folder)
    for pixels in PICTURES:
        made = theirs(pixels, return_tensors="np", input_data_format="channels_last")
        (view,) = ours.process(Image(pixels)).views
        assert np.array_equal(whole(view), made["pixel_values"][0])


def test_pixels_of_tiles(tiny_gguf) -> None:
    path, folder = tiny_gguf("llava_next")
    ours, theirs = encoder_of(path), transformers.LlavaNextImageProcessorPil.from_pretrained(folder)
    for pixels in PICTURES:
        made = theirs(pixels, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
        views = ours.process(Image(pixels)).views
        tiles = list(made)
        found = [whole(v) for v in views]
        assert np.array_equal(found[0], tiles[0])
        assert all(any(np.array_equal(f, t) for t in tiles[1:]) for f in found[1:])      # tiles of padding alone are never run


def test_rows_are_as_many_as_transformers_counts(tiny_gguf) -> None:
    path, folder = tiny_gguf("llava_next")
    ours = encoder_of(path)
    from transformers import AutoConfig, AutoTokenizer

    theirs = NextSight().processor(folder, AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    for _ in range(500):
        width, height = (int(s) for s in np.exp(RNG.uniform(0, 7, 2)))
        lines, columns = llava.best_grid(width, height, ours.config.grids, 42)
        across, down = llava.unpadded(width, height, columns * 3, lines * 3)
        want = theirs._get_number_of_features(height, width, 42, 42) - 1                 # less the class token
        assert 9 + (lines * 3 - 2 * down) * (columns * 3 - 2 * across + 1) == want, (width, height)


@pytest.mark.parametrize("size, wanted", [((7, 5), (3, 4)), ((3, 3), (2, 2)), ((27, 27), (14, 14)), ((2, 9), (5, 3)), ((1, 1), (2, 1))])
def test_rows_are_resized_as_torch_does(size, wanted) -> None:
    import torch

    rows = RNG.standard_normal((size[0] * size[1], 6)).astype(np.float32)
    grid = torch.tensor(rows.T.reshape(1, 6, *size))
    want = torch.nn.functional.interpolate(grid, wanted, mode="bilinear")[0].numpy().reshape(6, -1).T
    indices, weights = bilinear(size, wanted)
    assert np.allclose((rows[indices] * weights[..., None]).sum(2).reshape(-1, 6), want, rtol=0, atol=1e-6)


def test_a_picture_alone_and_beside_others(tiny_gguf) -> None:
    """What a picture becomes depends on the number of pictures of a prompt, not on that of videos; both are kept."""
    path, folder = tiny_gguf("llava_onevision")
    model, (one, other) = pe.load(path, n_ctx=512, kv_dtype="f32"), PICTURES[4:6]
    alone = model.generate([3, one, 4], max_tokens=1, temperature=0).media[0]
    beside = model.generate([3, one, other, 4], max_tokens=1, temperature=0).media
    assert [m.n_tokens for m in beside] == [10, 10] and beside[0].views == 1 and not beside[0].cached
    assert alone.n_tokens == len(model.encode_image(one)) == 9 + 4 * (3 + 1) and alone.views == 10
    films = model.generate([3, one, [one, one], 4], max_tokens=1, temperature=0).media
    assert films[0].cached and (films[1].kind, films[1].n_tokens, films[1].views) == ("video", 2 * 4 + 1, 2)
    assert model.generate([other, 3, one], max_tokens=1, temperature=0).media[1].cached
    messages = [{"role": "user", "content": [{"type": "image", "image": p} for p in (one, other)]}]
    assert model.chat_ids(messages).count(-1) == 20 and model.chat_ids([{"role": "user", "content": messages[0]["content"][:1]}]).count(-1) == 25


def test_pixels_of_one_vision(tiny_gguf) -> None:
    path, folder = tiny_gguf("llava_onevision")
    ours, theirs = encoder_of(path), transformers.LlavaOnevisionImageProcessorPil.from_pretrained(folder)
    resized = 0
    for pixels in PICTURES:
        done = ours.process(Image(pixels))
        resized += any(isinstance(p, Blend) for p in done.parts)
        made = list(theirs([[pixels]], return_tensors="np", input_data_format="channels_last")["pixel_values"][0][..., :42, :42])
        found = [whole(v) for v in done.views]
        assert np.array_equal(found[0], made[0]) and all(any(np.array_equal(f, t) for t in made[1:]) for f in found[1:])
        (view,) = ours.encoder.process(Image(pixels), ours.limits._replace(pictures=2)).views
        made = theirs([[pixels, pixels]], return_tensors="np", input_data_format="channels_last")["pixel_values"][1][0]
        assert np.array_equal(whole(view), made[..., :42, :42])
    assert 2 <= resized <= len(PICTURES) - 2


def test_what_is_refused(tiny_gguf) -> None:
    path, _ = tiny_gguf("llava_next")
    model = pe.load(path, n_ctx=64, kv_dtype="f32")
    for media, text in [(pe.open_image(PICTURES[0], max_tiles=2), "max_tiles"), ([PICTURES[0]] * 2, "not videos")]:
        with pytest.raises(RequestError, match=text):
            model.encode_image(media)
    with pytest.raises(ContextOverflowError, match="51 positions, but the context holds 40"):
        pe.load(path, n_ctx=40).encode_image(PICTURES[5])
    several = pe.load(tiny_gguf("llava_onevision")[0], n_ctx=64)
    with pytest.raises(ContextOverflowError, match="a video of 16 frames takes 65 positions, .* give fewer frames"):
        several.logits([3, [PICTURES[0]] * 16])
    with pytest.raises(RequestError, match="max_tiles"):
        several.encode_image(pe.Video([PICTURES[0]], max_tiles=2))


def test_a_picture_in_tiles_is_taken_from_the_cache(tiny_gguf) -> None:
    path, folder = tiny_gguf("llava_next")
    model, picture = pe.load(path, n_ctx=128), PICTURES[5]
    answer = model.generate([3, picture, 4], max_tokens=1, temperature=0)
    info = answer.media[0]
    assert (info.views, info.n_tokens, answer.n_prompt) == (5, 51, 53)
    assert answer.n_prompt == len(tiny.hf_seen(folder, [3, picture, 4]).ids)
    again = model.generate([3, picture, 4, 5], max_tokens=1, temperature=0)
    assert again.media[0].cached and again.n_cached == answer.n_prompt and model.stats["image_misses"] == 1


def test_damaged_numbers_are_refused() -> None:
    class Keys:
        def __init__(self, value: list[int]):
            self.value = np.array(value, np.int32)

        def get(self, name: str, default: Any, *kinds: type) -> Any:
            return self.value

        def key(self, name: str) -> str:
            return name

    for value in ([42], [42, 43], [0, 42]):
        with pytest.raises(InvalidModelError, match="pairs of multiples of 42"):
            llava._grids(Keys(value), 42)
    for value in ([5], [-1], []):
        with pytest.raises(InvalidModelError, match="the file has 4 layers"):
            clip.feature_layers(Keys(value), 4)


def test_llava_onevision_7b(full_size, machine) -> None:
    """28 layers with 4 heads of 128; a run has 27 x 27 rows and an end of lines. The most rows of a picture are those of 9 tiles, about."""
    machine(32 * 2**30)
    path, mmproj = full_size("llava-onevision-7b")
    plan = pe.plan(path, n_ctx=32768, mmproj=mmproj)
    assert kv(plan) == {"Full": 32768 * 28 * 4 * 128 * 2 * 2} and plan.picture == 27 * 27 + 1
    encoder = encoder_of(path, mmproj)
    rows = encoder.n_rows(2304, 2304)
    assert rows == 729 + 81 * 82 and encoder.n_rows(384, 384) == 729 + 27 * 28 and encoder.n_rows(1000, 700) == 729 + len(encoder.lines(1000, 700))


# ---- files of other programs -------------------------------------------------------------------------------------------------


def legacy_pair(path: Path, folder: Path) -> tuple[Path, Path]:
    """Write a model as llama.cpp's first converters do (`convert_image_encoder_to_gguf.py`): two files, ffn_up and ffn_down the wrong way
    round, no key of ours, and a text model whose vocabulary has no token for pictures."""
    reader = gguf.GGUFReader(path)
    text, image = gguf.GGUFWriter(folder / "text.gguf", "llama"), gguf.GGUFWriter(folder / "mmproj.gguf", "clip")
    ours = ("feature_layer", "token_id", "hidden_act", "resample", "aspect_ratio", "vision.projector_type")
    for key, f in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key.startswith("clip.") and key.endswith(ours):
            continue
        value = f.contents()
        if key == "tokenizer.ggml.tokens":
            value = ["<unused>" if t == "<image>" else t for t in value]
        (image if key.startswith("clip.") else text).add_key_value(key, value, f.types[0], f.types[-1] if f.types[0] == gguf.GGUFValueType.ARRAY else None)
    image.add_bool("clip.has_llava_projector", True)
    swap = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    for t in reader.tensors:
        sees = t.name.startswith(("v.", "mm.", "model."))
        name = next((t.name.replace(a, b) for a, b in swap.items() if sees and a in t.name), t.name)
        (image if sees else text).add_tensor(name, t.data, raw_dtype=t.tensor_type)
    for out in (text, image):
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
    return folder / "text.gguf", folder / "mmproj.gguf"


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_llama_cpps_first_pairs(tiny_gguf, tmp_path, kind: str) -> None:
    path, _ = tiny_gguf(kind, processor={"do_pad": True} if kind == "llava" else None)
    text, mmproj = legacy_pair(path, tmp_path)
    theirs, ours = pe.load(text, mmproj=mmproj, n_ctx=128), pe.load(path, n_ctx=128)
    prompt = ["what is ", PICTURES[0], " this?"]
    assert np.array_equal(theirs.logits(prompt), ours.logits(prompt))
    messages = [{"role": "user", "content": [{"type": "text", "text": "look:"}, {"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "what?"}]}]
    ids = theirs.chat_ids(messages)
    first = ids.index(-1)
    assert theirs.tokenizer.detokenize(ids[:first]).endswith("look:") or theirs.tokenizer.detokenize(ids[:first]).endswith("look:\n")
    assert set(ids[first:first + ids.count(-1)]) == {-1} and "what?" in theirs.tokenizer.detokenize(ids[first + ids.count(-1):])
