"""Janus-Pro reading against transformers: pixels, encoder, tokens around a picture; what it draws with is left out."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import pyengine as pe
import tiny
from cases import Case, Converted, Tokens
from converters import convert
from foreign import Dialect, llama_keys, llama_turned, LlamaCpp, Saved, Tensors, vision_name
from hollow import both, Decoder, Encoder, Full, kv, vit_layers
from oracle import encoder_of
from pyengine.errors import InvalidModelError, RequestError, UnsupportedModelError
from pyengine.media.image import Image
from sight import of_any_backend, Run, Sight
from tiny import COMMON

try:
    import transformers
except ImportError:         # the cases are found without it
    transformers = None

pytestmark = pytest.mark.skipif(transformers is None, reason="needs transformers and torch: pip install -r requirements/test.txt")

# What the family's real template does, in other words: contents are strings or lists of parts.
TEMPLATE = """{{ bos_token }}
{%- for m in messages -%}
  {{ {'user': '<|User|>', 'assistant': '<|Assistant|>'}[m['role']] + ': ' }}
  {%- if m['content'] is string -%}{{ m['content'] }}
  {%- else -%}{%- for part in m['content'] -%}{{ '<image_placeholder>' if part['type'] == 'image' else part['text'] }}{%- endfor -%}
  {%- endif -%}
  {{ eos_token if m['role'] == 'assistant' else '\n\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|Assistant|>:' }}{%- endif -%}"""
NAMED = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
SPECIAL = Tokens(("<s>", "<end_of_image>", "<image_placeholder>", "</s>", "<begin_of_image>", "<|User|>", "<|Assistant|>", "<pad>"), "<s>", "</s>",
                 "<pad>", TEMPLATE, {"image_token_id": "<image_placeholder>"}, named=NAMED)


class JanusSight(Sight):
    """One padded square of each picture, between its tokens."""

    model_types, marker = ("janus",), "<image_placeholder>"

    def images(self, config: Any, settings: dict[str, Any]) -> Any:
        side = config.vision_config.image_size
        return transformers.JanusImageProcessorPil(**{"size": {"height": side, "width": side}, "min_size": 7, **settings})

    def processor(self, folder: Path, config: Any, tokenizer: Any) -> Any:
        package = "transformers.models.janus"
        if importlib.util.find_spec("torchvision") is None:
            sys.modules.setdefault(f"{package}.image_processing_janus", importlib.import_module(f"{package}.image_processing_pil_janus"))
        base = importlib.import_module(f"{package}.processing_janus").JanusProcessor
        rows = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        return of_any_backend(base)(transformers.JanusImageProcessorPil.from_pretrained(folder), tokenizer, num_image_tokens=rows)

    def run(self, model: Any, tokens: Any, made: list[dict[str, Any]], fps: float | None) -> Run:
        import torch

        if not made:
            return Run({}, [], [], [])
        inputs = {"pixel_values": torch.cat([m["pixel_values"] for m in made])}
        return Run(inputs, list(model.model.get_image_features(**inputs).pooler_output), list(inputs["pixel_values"]), [])


VISION = {"hidden_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 50, "patch_size": 12, "mlp_ratio": 1.5,
          "projection_dim": 96, "model_type": "janus_vision_model"}
DRAWS = {"embed_dim": 8, "num_embeddings": 24, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1,
         "projection_dim": 96, "image_token_embed_dim": 96}


class JanusDialect(Dialect):
    """llama.cpp's `conversion/januspro.py`."""

    model_types, converters = ("janus",), ("now",)
    settings = {"processor": {"min_size": 14}}                          # of the processor's class, which files do not say
    arch, names, projector = "llama", gguf.MODEL_ARCH.LLAMA, "janus_pro"

    def text_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        llama_keys(w, saved.text)

    def text_tensor(self, saved: Saved, source: str, value: np.ndarray) -> Tensors:
        yield self.text_name(source), llama_turned(source, value, saved.text)

    def encoder_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        vision = saved.vision
        vision["intermediate_size"] = round(vision["hidden_size"] * vision["mlp_ratio"])
        super().encoder_keys(w, saved)

    def vision_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        w.add_vision_attention_layernorm_eps(saved.vision["layer_norm_eps"])
        if saved.vision["hidden_act"] == "gelu":
            w.add_vision_use_gelu(True)

    def vision_tensor(self, saved: Saved, source: str, value: np.ndarray, legacy: bool) -> Tensors:
        part, _, end = source.rpartition(".")
        if source.startswith("vision_model."):
            yield vision_name(f"model.{source}"), value
        elif source.startswith("aligner."):
            yield f"mm.{0 if part == 'aligner.fc1' else int(part.rpartition('.')[2]) + 1}.{end}", value


class JanusLlamaCpp(LlamaCpp):
    """It puts no tokens around a picture."""

    def ids(self, seen: Any, soft: int | None) -> list[int | None]:
        return super().ids(seen, soft)[1:-1]


def full_encoder(d_model: int) -> Encoder:
    """Janus-Pro's encoder, SigLIP-L: keys and tensors of llama.cpp's projector file."""
    width, d_ff, n_layers, patch, side = 1024, 4096, 24, 16, 24
    keys = {"clip.has_vision_encoder": True, "clip.projector_type": "janus_pro", "clip.use_gelu": True, "clip.vision.image_size": patch * side,
            "clip.vision.patch_size": patch, "clip.vision.block_count": n_layers, "clip.vision.embedding_length": width,
            "clip.vision.feed_forward_length": d_ff, "clip.vision.attention.head_count": 16, "clip.vision.projection_dim": d_model,
            "clip.vision.attention.layer_norm_epsilon": 1e-6, "clip.vision.image_mean": [0.5] * 3, "clip.vision.image_std": [0.5] * 3}
    tensors = [("v.patch_embd.weight", (width, 3, patch, patch), "F16"), ("v.patch_embd.bias", (width,), "F32"),
               ("v.position_embd.weight", (side**2, width), "F32"), *both("v.post_ln", width), *vit_layers(n_layers, width, d_ff)]
    for name, shape in (("mm.0", (d_model, width)), ("mm.1", (d_model, d_model))):
        tensors += [(f"{name}.weight", shape, "F16"), (f"{name}.bias", shape[:1], "F32")]
    return keys, tensors


JANUS = Case(
    "janus", "llama", "JanusConfig", "JanusForConditionalGeneration", "deepseek-llm", {"tie_word_embeddings": False, "vq_config": DRAWS},
    {**COMMON, "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "model_type": "llama"}, VISION, SPECIAL, JanusSight(), cached_as="llama",
    converted=Converted(
        {"general.architecture": "llama", "tokenizer.chat_template": TEMPLATE},
        clip={"has_vision_encoder": True, "projector_type": "janus_pro", "use_gelu": True, "use_silu": False, "hidden_act": "gelu", "image_size": 50,
              "patch_size": 12, "embedding_length": 80, "feed_forward_length": 120, "block_count": 3, "attention.head_count": 4, "projection_dim": 96,
              "resample": 3, "attention.layer_norm_epsilon": np.float32(1e-6), "preproc_min_size": 7,
              "image_mean": [np.float32(x) for x in (0.48145466, 0.4578275, 0.40821073)],
              "image_std": [np.float32(x) for x in (0.26862954, 0.26130258, 0.27577711)]},
        clip_tokens={"image_token_id": "<image_placeholder>", "image_start_token_id": "<begin_of_image>", "image_end_token_id": "<end_of_image>"}),
    dialect=JanusDialect(), llama_cpp=JanusLlamaCpp((50, 50)),
    full={"janus-pro-7b": Full(Decoder("llama", 30, 4096, 11008, 32, 32, 128, 102400, 16384), tuple(NAMED.values()), full_encoder)})

CASES = (JANUS,)

SIZES = [(61, 47), (30, 300), (300, 17), (9, 11), (400, 500), (50, 50), (49, 48), (90, 1), (131, 130), (127, 42)]      # width, height
RNG = np.random.default_rng(4)
PICTURES = [RNG.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in SIZES]


def close(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape and np.abs(got - want).max() <= 2e-5 * np.ptp(want)


@pytest.mark.parametrize("settings", [{}, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "min_size": 20}], ids=["cut", "others"])
def test_pixels_are_bit_for_bit_those_of_transformers(tiny_gguf, settings) -> None:
    path, folder = tiny_gguf("janus", processor=settings)
    ours, theirs = encoder_of(path), transformers.JanusImageProcessorPil.from_pretrained(folder)
    for pixels in PICTURES:
        made = theirs(pixels, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
        assert made.shape == (3, 50, 50)
        (view,) = ours.process(Image(pixels)).views
        seen = view.inputs["patches"].reshape(4, 4, 3, 12, 12).transpose(2, 0, 3, 1, 4).reshape(3, 48, 48)
        assert np.array_equal(seen, made[:, :48, :48])


VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "tanh": {"vision_config": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3}},
    "sizes": {"vision_config": {"image_size": 63, "patch_size": 9, "num_attention_heads": 5, "mlp_ratio": 2.0}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_transformers(tiny_gguf, variant: str) -> None:
    path, folder = tiny_gguf("janus", **VARIANTS[variant])
    prompt = [5, PICTURES[0], "and ", PICTURES[1], PICTURES[3], " what?", 9]
    want = tiny.hf_seen(folder, prompt)
    model = pe.load(path, n_ctx=256, kv_dtype="f32", n_batch=11)
    close(model.logits(prompt), want.logits)
    for part, features in zip(prompt[1:5:2], want.features):
        close(model.encode_image(part), features)


def test_what_draws_is_left_out_in_words(tmp_path, capsys) -> None:
    folder = tiny.make_checkpoint("janus", tmp_path / "c")
    capsys.readouterr()
    convert(folder, tmp_path / "m.gguf", "f32")
    assert "the parts that draw pictures" in capsys.readouterr().err


@pytest.mark.parametrize("part, change, error, words", [
    ("vision_config", {"use_qk_norm": True}, UnsupportedModelError, "'use_qk_norm' is True"),
    ("vision_config", {"depth": 3}, UnsupportedModelError, "'depth' is 3"),
    ("vision_config", {"projection_dim": 64}, InvalidModelError, "'projection_dim' is 64"),
    ("text_config", {"model_type": "qwen2"}, UnsupportedModelError, "'model_type' is 'qwen2'")])
def test_configs_that_are_refused(tmp_path, part: str, change: dict[str, Any], error: type, words: str) -> None:
    folder = tiny.make_checkpoint("janus", tmp_path / "c")
    config = json.loads((folder / "config.json").read_text())
    config[part] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=words):
        convert(folder, tmp_path / "m.gguf", "f32")


def test_what_a_request_is_refused(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("janus")[0], n_ctx=64)
    for media, words in ((pe.open_image(PICTURES[0], max_tiles=2), "max_tiles"), ([PICTURES[0]] * 2, "not videos")):
        with pytest.raises(RequestError, match=words):
            model.encode_image(media)


def test_janus_pro_7b(full_size, machine) -> None:
    """30 layers with 32 heads of 128; 576 rows a picture, of 24 x 24 patches."""
    machine(32 * 2**30)
    path, mmproj = full_size("janus-pro-7b")
    plan = pe.plan(path, n_ctx=4096, mmproj=mmproj)
    assert kv(plan) == {"Full": 4096 * 30 * 32 * 128 * 2 * 2} and plan.picture == 576
