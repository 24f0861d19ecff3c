"""Mistral Small 3.1, Ministral 3 and Pixtral against transformers: pixels, geometry, encoder, decoder; tiny random models, odd sizes and ids."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import foreign
import hollow
import pyengine as pe
import tiny
from cases import Case, Converted, Tokens
from foreign import Dialect, LlamaCpp, Saved, Tensors, turned, vision_name
from hollow import Decoder, Encoder, Full, kv, Tensor
from oracle import encoder_of
from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError, UnsupportedModelError
from pyengine.media.image import Image
from pyengine.models import architectures
from sight import of_any_backend, Run, Sight
from test_llama import interleaved
from tiny import COMMON

try:
    import transformers
except ImportError:         # the cases are found without it
    transformers = None

KIB, GIB = 2**10, 2**30
pytestmark = pytest.mark.skipif(transformers is None, reason="needs transformers and torch: pip install -r requirements/test.txt")

# What the family's real template does, in other words: contents are strings or lists of parts.
TEMPLATE = """{{ bos_token }}
{%- for m in messages -%}
  {%- if m['role'] == 'system' -%}
    {{ '[SYSTEM_PROMPT]' + (m['content'] if m['content'] is string else m['content'][0]['text']) + '[/SYSTEM_PROMPT]' }}
  {%- elif m['role'] == 'user' -%}
    {{ '[INST]' }}
    {%- if m['content'] is string -%}{{ m['content'] }}
    {%- else -%}
      {%- for part in m['content'] -%}
        {%- if part['type'] == 'text' -%}{{ part['text'] }}
        {%- elif part['type'] in ('image', 'image_url') -%}{{ '[IMG]' }}
        {%- else -%}{{ raise_exception('only text and images are supported') }}
        {%- endif -%}
      {%- endfor -%}
    {%- endif -%}
    {{ '[/INST]' }}
  {%- elif m['role'] == 'assistant' -%}
    {{ (m['content'] if m['content'] is string else m['content'][0]['text']) + eos_token }}
  {%- else -%}{{ raise_exception('roles are system, user and assistant') }}
  {%- endif -%}
{%- endfor -%}"""

SPECIAL = Tokens(
    ("[IMG_END]", "<s>", "[INST]", "[IMG]", "</s>", "[SYSTEM_PROMPT]", "[IMG_BREAK]", "[/INST]", "<pad>", "[/SYSTEM_PROMPT]"),
    "<s>", "</s>", "<pad>", TEMPLATE, {"image_token_index": "[IMG]"})


class PixtralSight(Sight):
    """Pictures of any shape, a token behind each line of their rows."""

    model_types, towers = ("mistral3", "llava"), ("pixtral",)         # transformers has Pixtral 12B as a "llava"
    marker = "[IMG]"

    def images(self, config: Any, settings: dict[str, Any]) -> Any:
        vision = config.vision_config
        return transformers.PixtralImageProcessorPil(**{"size": {"longest_edge": vision.image_size}, "patch_size": vision.patch_size,
                                                        **settings})

    def processor(self, folder: Path, config: Any, tokenizer: Any) -> Any:
        """Its module asks for one function of the torchvision one, which the Pillow one has too."""
        package = "transformers.models.pixtral"
        if importlib.util.find_spec("torchvision") is None:
            pillow = importlib.import_module(f"{package}.image_processing_pil_pixtral")
            sys.modules.setdefault(f"{package}.image_processing_pixtral", pillow)
        base = importlib.import_module(f"{package}.processing_pixtral").PixtralProcessor
        images = transformers.PixtralImageProcessorPil.from_pretrained(folder)
        return of_any_backend(base)(images, tokenizer, config.vision_config.patch_size, getattr(config, "spatial_merge_size", 1))

    def run(self, model: Any, tokens: Any, made: list[dict[str, Any]], fps: float | None) -> Run:
        import torch

        pixels = [p for m in made for p in m["pixel_values"]]
        if not pixels:
            return Run({}, [], [], [])
        inputs = {"image_sizes": torch.tensor([p.shape[1:] for p in pixels])}
        height, width = inputs["image_sizes"].amax(0).tolist()                  # as the processor pads pictures given together
        inputs["pixel_values"] = torch.stack([torch.nn.functional.pad(p, (0, width - p.shape[2], 0, height - p.shape[1]))
                                              for p in pixels])
        return Run(inputs, list(model.model.get_image_features(**inputs).pooler_output), pixels, [])


class PixtralDialect(Dialect):
    """llama.cpp's `conversion/mistral3.py` and `conversion/llava.py`; Ollama's `convert/convert_mistral.go`."""

    model_types, towers = ("mistral3", "llava"), ("pixtral",)
    arch, names, projector = "mistral3", gguf.MODEL_ARCH.MISTRAL3, "pixtral"
    ollama_arch = "mistral3"
    ollama_names = (
        ("transformer.layers", "blk"), ("vision_tower", "v"), ("ln_pre", "encoder_norm"), ("attention.q_proj", "attn_q"),
        ("attention.k_proj", "attn_k"), ("attention.v_proj", "attn_v"), ("attention.o_proj", "attn_output"),
        ("attention_norm", "attn_norm"), ("feed_forward.gate_proj", "ffn_gate"), ("feed_forward.down_proj", "ffn_down"),
        ("feed_forward.up_proj", "ffn_up"), ("multi_modal_projector", "mm"))

    def assume(self, saved: Saved) -> None:
        assert saved.vision["hidden_act"] == "silu" and saved.vision["rope_parameters"]["rope_theta"] == 1e4
        assert saved.images["size"] == {"longest_edge": saved.vision["image_size"]} and not saved.text["sliding_window"]

    def text_arch(self, saved: Saved, legacy: bool) -> str:
        return "llama" if legacy or saved.kind == "llava" else self.arch

    def text_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        foreign.llama_keys(w, saved.text)
        if (rope := saved.text["rope_parameters"])["rope_type"] == "yarn":
            w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            w.add_rope_scaling_factor(rope["factor"])
            w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            w.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
            w.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
            w.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
            w.add_attn_temperature_scale(rope["llama_4_scaling_beta"])

    def text_tensor(self, saved: Saved, source: str, value: np.ndarray) -> Tensors:
        yield self.text_name(source), foreign.llama_turned(source, value, saved.text)

    def vision_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        w.add_vision_attention_layernorm_eps(1e-5)
        w.add_vision_use_silu(True)
        if saved.kind == "mistral3":
            w.add_vision_spatial_merge_size(saved.config["spatial_merge_size"])

    def vision_tensors(self, saved: Saved, legacy: bool) -> Tensors:
        yield "v.token_embd.img_break", saved.tensors["model.embed_tokens.weight"][saved.vocabulary().tokens.index("[IMG_BREAK]")]
        yield from super().vision_tensors(saved, legacy)

    def vision_tensor(self, saved: Saved, source: str, value: np.ndarray, legacy: bool) -> Tensors:
        heads = saved.vision["num_attention_heads"]
        yield vision_name(source), turned(value, heads) if re.search(r"\.[qk]_proj\.", source) else value

    def ollama_keys(self, w: gguf.GGUFWriter, saved: Saved) -> tuple[dict[str, int], float | None]:
        """No epsilon of the encoder, no activation; what the config lacks is 0 or empty."""
        text, vision = saved.text, saved.vision
        assert vision["hidden_act"] == "silu" and saved.images["size"] == {"longest_edge": vision["image_size"]}
        w.add_layer_norm_rms_eps(text["rms_norm_eps"])
        foreign.head_sizes(w, text)
        w.add_rope_dimension_count(text["head_dim"])
        w.add_rope_freq_base(text["rope_parameters"]["rope_theta"])
        rope = text["rope_parameters"]
        w.add_string("mistral3.rope.scaling.type", rope["rope_type"])
        for name in ("factor", "beta_fast", "beta_slow", *(("mscale", "mscale_all_dim") if "mscale" in rope else ())):
            w.add_float32(f"mistral3.rope.scaling.{name}", rope.get(name, 0.0))
        if "llama_4_scaling_beta" in rope:
            w.add_uint32("mistral3.rope.scaling.original_context_length", rope["original_max_position_embeddings"])
            w.add_float32("mistral3.rope.scaling_beta", rope["llama_4_scaling_beta"])
        w.add_uint32("mistral3.image_token_index", saved.config["image_token_index"])
        w.add_uint32("mistral3.spatial_merge_size", saved.config["spatial_merge_size"])
        w.add_bool("mistral3.mm.projector_bias", saved.config["multimodal_projector_bias"])
        w.add_string("mistral3.mm.projector_hidden_act", saved.config["projector_hidden_act"])
        w.add_float32("mistral3.vision.rope.freq_base", vision["rope_parameters"]["rope_theta"])
        return {"block_count": vision["num_hidden_layers"], "feed_forward_length": vision["intermediate_size"],
                "image_size": vision["image_size"], "attention.head_count": vision["num_attention_heads"],
                "attention.key_length": vision["head_dim"]}, None


class PixtralLlamaCpp(LlamaCpp):
    """The ends of lines are among its rows, from v.token_embd.img_break."""

    def ids(self, seen: Any, soft: int | None) -> list[int | None]:
        return [*[None] * (len(seen.ids) - 1), seen.ids[-1]]

    def rows(self, rows: np.ndarray, seen: Any) -> np.ndarray:
        return rows[np.array(seen.ids[:-1]) == seen.ids[0]]

    def between(self, rows: np.ndarray, seen: Any) -> tuple[np.ndarray, list[int]]:
        ends = np.array(seen.ids[:-1]) != seen.ids[0]
        assert ends.sum() == 2
        return rows[ends], np.array(seen.ids[:-1])[ends].tolist()


def full_encoder(d_model: int) -> Encoder:
    """Mistral Small 3.1's encoder: keys and tensors of llama.cpp's projector file. Up to 1540 x 1540 pixels, 3025 soft tokens."""
    width, d_ff, n_layers, patch, merge = 1024, 4096, 24, 14, 2
    keys = {"clip.has_vision_encoder": True, "clip.projector_type": "pixtral", "clip.use_silu": True,
            "clip.vision.image_size": 1540,
            "clip.vision.patch_size": patch, "clip.vision.block_count": n_layers, "clip.vision.embedding_length": width,
            "clip.vision.feed_forward_length": d_ff, "clip.vision.attention.head_count": 16,
            "clip.vision.spatial_merge_size": merge,
            "clip.vision.attention.layer_norm_epsilon": 1e-5, "clip.vision.projection_dim": d_model}
    tensors: list[Tensor] = [("v.patch_embd.weight", (width, 3, patch, patch), "F16"), ("v.pre_ln.weight", (width,), "F32"),
                             ("v.token_embd.img_break", (d_model,), "F32"), ("mm.input_norm.weight", (width,), "F32"),
                             ("mm.patch_merger.weight", (width, width * merge**2), "F16"), ("mm.1.weight", (d_model, width), "F16"),
                             ("mm.2.weight", (d_model, d_model), "F16")]
    for i in range(n_layers):
        at = f"v.blk.{i}."
        tensors += [(f"{at}ln1.weight", (width,), "F32"), (f"{at}ln2.weight", (width,), "F32")]
        for name, shape in {**dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_out"), (width, width)), "ffn_gate": (d_ff, width),
                            "ffn_up": (d_ff, width), "ffn_down": (width, d_ff)}.items():
            tensors.append((f"{at}{name}.weight", shape, "F16"))
    return keys, tensors


def pixtral_encoder(d_model: int) -> Encoder:
    """Pixtral 12B's: as above, but for up to 1024 x 1024 pixels, in patches of 16 of which each is a row."""
    keys, tensors = full_encoder(d_model)
    keys |= {"clip.vision.image_size": 1024, "clip.vision.patch_size": 16}
    del keys["clip.vision.spatial_merge_size"]
    tensors = [t for t in tensors if t[0] not in ("mm.input_norm.weight", "mm.patch_merger.weight")]
    return keys, [(name, (*shape[:2], 16, 16), kind) if name == "v.patch_embd.weight" else (name, shape, kind) for name, shape, kind in tensors]


TEXT_CONFIG = {**COMMON, "head_dim": 32, "sliding_window": None, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
               "model_type": "mistral"}
VISION_CONFIG = {"hidden_size": 80, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 4,
                 "image_size": 130, "patch_size": 14, "hidden_act": "silu", "model_type": "pixtral"}

MISTRAL3 = Case(
    "mistral3", "mistral3", "Mistral3Config", "Mistral3ForConditionalGeneration", "tekken", {"tie_word_embeddings": False},
    TEXT_CONFIG, VISION_CONFIG, SPECIAL, PixtralSight(),
    converted=Converted(
        {"general.architecture": "mistral3", "tokenizer.chat_template": TEMPLATE, "tokenizer.ggml.pre": "tekken",
         "mistral3.attention.key_length": 32, "mistral3.rope.freq_base": 1e4},
        absent=("mistral3.attention.sliding_window",),
        clip={"has_vision_encoder": True, "projector_type": "pixtral", "use_gelu": False, "use_silu": True, "hidden_act": "silu",
              "image_size": 130, "longest_edge": 130, "patch_size": 14, "spatial_merge_size": 2, "embedding_length": 80,
              "feed_forward_length": 100, "block_count": 3, "attention.head_count": 4, "projection_dim": 96, "resample": 3,
              "attention.layer_norm_epsilon": np.float32(1e-5), "rope.freq_base": 1e4,
              "image_mean": [np.float32(x) for x in (0.48145466, 0.4578275, 0.40821073)],
              "image_std": [np.float32(x) for x in (0.26862954, 0.26130258, 0.27577711)]},
        clip_tokens={"image_token_id": "[IMG]", "image_break_token_id": "[IMG_BREAK]", "image_end_token_id": "[IMG_END]"},
        renames=((("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."),
                  ("vision_tower.", "model.vision_tower."), ("multi_modal_projector.", "model.multi_modal_projector.")),)),
    dialect=PixtralDialect(), llama_cpp=PixtralLlamaCpp((112, 84)),
    full={"mistral-24b": Full(Decoder("mistral3", 40, 5120, 32768, 32, 8, 128, 131072, 131072),      # Small 3.1
                              ("[IMG]", "[IMG_BREAK]", "[IMG_END]"), full_encoder)})

# Ministral 3: its text alone, and with the encoder. Within a prompt of 100 positions the temperature changes several times.
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 24, "beta_fast": 16.0, "beta_slow": 2.0,
        "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.4}
MINISTRAL_TEXT = {**COMMON, "head_dim": 32, "rms_norm_eps": 1e-5, "rope_parameters": YARN}
MINISTRAL_KEYS = {
    "block_count": 3, "context_length": 256, "embedding_length": 96, "feed_forward_length": 160, "vocab_size": 512, "attention.head_count": 6,
    "attention.head_count_kv": 2, "attention.key_length": 32, "attention.value_length": 32, "attention.layer_norm_rms_epsilon": np.float32(1e-5),
    "rope.dimension_count": 32, "rope.freq_base": 10000.0, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 24, "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0,
    "rope.scaling.attn_factor": np.float32(1 / (0.1 * np.log(4) + 1)), "attention.temperature_scale": np.float32(0.4)}
MINISTRAL = Case(
    "ministral3", "mistral3", "Ministral3Config", "Ministral3ForCausalLM", "tekken", MINISTRAL_TEXT, cached_as="llama",
    variants={"ministral3": {}, "ministral3-mscale": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}},
              "ministral3-window-tied": {"sliding_window": 6, "tie_word_embeddings": True},
              "ministral3-constant": {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.0, "mscale": 0.0}}},
    converted=Converted(MINISTRAL_KEYS, names="MISTRAL3", tensor=interleaved,
                        runs={"ministral3": {}, "ministral3-mscale": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}}}),
    full={"ministral-8b": Full(Decoder("mistral3", 34, 4096, 14336, 32, 8, 128, 131072, 262144,
                                       keys={"rope.scaling.type": "yarn", "rope.scaling.factor": 16.0, "rope.scaling.yarn_log_multiplier": 1.0,
                                             "rope.scaling.original_context_length": 16384, "attention.temperature_scale": 0.1}),
                               ("[IMG]", "[IMG_BREAK]", "[IMG_END]"), full_encoder)})
MINISTRAL_SEES = replace(
    MISTRAL3, kind="mistral3_ministral", text_config={**MINISTRAL_TEXT, "model_type": "ministral3"}, dialect=None, llama_cpp=None, full={}, cached_as="llama",
    converted=replace(MISTRAL3.converted, keys={**MISTRAL3.converted.keys, **{f"mistral3.{k}": v for k, v in MINISTRAL_KEYS.items() if "scal" in k}}))

# Pixtral 12B: no groups of patches; transformers has it as a LLaVA
PIXTRAL = Case(
    "llava_pixtral", "llama", "LlavaConfig", "LlavaForConditionalGeneration", "tekken",
    {"tie_word_embeddings": False, "vision_feature_select_strategy": "full", "vision_feature_layer": -1},
    TEXT_CONFIG, {**VISION_CONFIG, "patch_size": 16}, SPECIAL, PixtralSight(), cached_as="llama",
    converted=replace(
        MISTRAL3.converted, keys={"general.architecture": "llama", "tokenizer.ggml.pre": "tekken", "llama.attention.key_length": 32},
        absent=("llama.attention.sliding_window", "clip.vision.spatial_merge_size"),
        clip={**{k: v for k, v in MISTRAL3.converted.clip.items() if k != "spatial_merge_size"}, "patch_size": 16}),
    full={"pixtral-12b": Full(Decoder("llama", 40, 5120, 14336, 32, 8, 128, 131072, 131072), ("[IMG]", "[IMG_BREAK]", "[IMG_END]"), pixtral_encoder)})

CASES = (MISTRAL3, MINISTRAL, MINISTRAL_SEES, PIXTRAL)

SIZES = [(61, 47), (30, 300), (300, 17), (9, 11), (400, 500), (112, 112), (28, 84), (90, 1), (130, 131)]      # width, height
RNG = np.random.default_rng(4)
PICTURES = [RNG.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in SIZES]
A, B = PICTURES[0], PICTURES[4]


def close(got: np.ndarray, want: np.ndarray, share: float = 2e-5) -> None:
    assert got.shape == want.shape and np.abs(got - want).max() <= share * np.ptp(want)


def pil(pixels: np.ndarray):
    import PIL.Image

    return PIL.Image.fromarray(pixels)


# ---- processor ---------------------------------------------------------------------------------------------------------------


OTHER = {"image_mean": [0.4, 0.5, 0.45], "image_std": [0.2, 0.25, 0.3], "resample": 2, "size": {"longest_edge": 97}}


@pytest.mark.parametrize("settings", [{}, OTHER], ids=["as released", "others"])
@pytest.mark.parametrize("kind, merge, patch", [("mistral3", 2, 14), ("llava_pixtral", 1, 16)])
def test_pixels_are_bit_for_bit_those_of_transformers(tiny_gguf, kind: str, merge: int, patch: int, settings) -> None:
    side = merge * patch
    path, folder = tiny_gguf(kind, processor=settings)
    ours, theirs = encoder_of(path), transformers.PixtralImageProcessorPil.from_pretrained(folder)
    for pixels in PICTURES:
        made = theirs(pixels, patch_size=side, return_tensors="np", input_data_format="channels_last")
        done = ours.process(Image(pixels))
        (view,) = done.views
        _, lines, columns = view.grid
        patches = view.inputs["patches"].reshape(lines, columns, merge, merge, 3, patch, patch).transpose(4, 0, 2, 5, 1, 3, 6)
        assert np.array_equal(patches.reshape(3, lines * side, columns * side), made["pixel_values"][0])
        assert done.size == pixels.shape[1::-1] and done.processed == (columns * side, lines * side)
        assert ours.n_rows(*done.size) == lines * columns == view.positions.shape[1]
        ends = [p for p in done.parts if isinstance(p, int)]
        assert ends == [ours.line_end] * (lines - 1) + [ours.end] and done.parts[-1] == ours.end
        pieces = [(p.start, p.stop) for p in done.parts if not isinstance(p, int)]
        assert pieces == [(i * columns, (i + 1) * columns) for i in range(lines)]


def test_sizes_are_transformers_and_within_the_bound(tiny_gguf) -> None:
    from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size as theirs

    ours = encoder_of(tiny_gguf("mistral3")[0])
    for _ in range(2000):
        height, width = (int(s) for s in np.exp(RNG.uniform(0, 9, 2)))
        longest = int(np.exp(RNG.uniform(2, 8)))
        try:
            lines, columns = ours.grid(width, height, longest)
        except RequestError:
            assert min(height, width) * longest / max(height, width) < 1
            continue
        shape = np.broadcast_to(np.uint8(0), (3, height, width))
        assert (lines * 28, columns * 28) == theirs(shape, (longest, longest), (28, 28), "channels_first")
        assert max(lines, columns) <= -(-longest // 28)


def test_a_smaller_edge_and_what_is_refused(tiny_gguf) -> None:
    path, folder = tiny_gguf("mistral3")
    model = pe.load(path, n_ctx=64, kv_dtype="f32")
    want = tiny.hf_seen(folder, [5, pil(B), 6], size={"longest_edge": 60})
    close(model.logits([5, pe.open_image(B, longest_edge=60), 6]), want.logits)
    for media, text in [
        (pe.open_image(A, pan_and_scan=True), "has longest_edge"),
        (pe.open_image(A, longest_edge=0), "from 1 to 130"),
        (pe.open_image(A, longest_edge=131), "from 1 to 130"),
        (pe.open_image(A, longest_edge=60.0), "whole number"),
        (np.zeros((1, 400, 3), np.uint8), "less than one remains"),
        ([A, A], "not videos"),
    ]:
        with pytest.raises(RequestError, match=text):
            model.encode_image(media)
    with pytest.raises(ContextOverflowError, match="30 positions, but the context holds 20"):       # 5 lines of 5 rows and an end
        pe.load(path, n_ctx=20).encode_image(PICTURES[8])
    small = pe.load(path, n_ctx=64, images=(56, 56))
    assert small.plan.picture == 4 and len(small.encode_image(np.zeros((56, 56, 3), np.uint8))) == 4
    with pytest.raises(RequestError, match=r"takes 6 soft tokens.*up to 4.*images=\(61, 47\)"):
        small.encode_image(A)


def test_lines_of_rows_are_one_run_of_the_encoder(tiny_gguf) -> None:
    """What a request reports, the prompt's places, and the second time from the cache."""
    path, folder = tiny_gguf("mistral3")
    model = pe.load(path, n_ctx=128)
    answer = model.generate([3, A, 4], max_tokens=1, temperature=0)
    info = answer.media[0]
    assert (info.views, info.grids, info.n_tokens, info.processed) == (1, ((1, 2, 3),), 6, (84, 56))
    assert answer.n_prompt == len(tiny.hf_seen(folder, [3, pil(A), 4]).ids) == 1 + 2 * (3 + 1) + 1
    again = model.generate([3, A, 4, 5], max_tokens=1, temperature=0)
    assert again.media[0].cached and again.n_cached == answer.n_prompt and model.stats["image_misses"] == 1
    other = model.generate([3, A[::-1].copy(), 4], max_tokens=1, temperature=0)
    assert other.n_cached <= 3


# ---- encoder and decoder -----------------------------------------------------------------------------------------------------


VARIANTS = {
    "norm of the projector": {"text_config": {"rms_norm_eps": 0.02}},        # the text's epsilon; the encoder's own stays 1e-5
    "gelu": {"vision_config": {"hidden_act": "gelu"}},
    "biases": {"multimodal_projector_bias": True},
    "groups of 3": {"spatial_merge_size": 3, "vision_config": {"patch_size": 9}},
    "no groups": {"spatial_merge_size": 1, "vision_config": {"patch_size": 23}},
    "rope": {"vision_config": {"rope_parameters": {"rope_type": "axial", "rope_theta": 300.0}}},
    "window": {"text_config": {"sliding_window": 6}},                        # smaller than a picture
    "yarn": {"text_config": {"rope_parameters": dict(tiny.ROPES["yarn"])}},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_transformers(tiny_gguf, variant: str) -> None:
    path, folder = tiny_gguf("mistral3", **VARIANTS[variant])
    prompt = [5, pil(A), "and ", pil(PICTURES[1]), pil(PICTURES[3]), " what?", 9]
    want = tiny.hf_seen(folder, prompt)
    model = pe.load(path, n_ctx=128, kv_dtype="f32", n_batch=11)
    got = model.logits(prompt)
    close(got, want.logits)
    assert np.array_equal(got.argmax(-1), want.logits.argmax(-1))
    for part, features in zip((A, PICTURES[1], PICTURES[3]), want.features):
        close(model.encode_image(part), features)


def test_pixtral_12b_as_llama_cpps_pair(tmp_path) -> None:
    """Text "llama", an encoder without merger or norm: one patch a row."""
    folder = tiny.make_checkpoint(PIXTRAL, tmp_path / "c")
    path, mmproj = foreign.llama_cpp_files(folder, tmp_path / "m.gguf")
    prompt = ["see ", pil(A), pil(PICTURES[1]), " and?"]
    want = tiny.hf_seen(folder, prompt)
    model = pe.load(path, mmproj=mmproj, n_ctx=256, kv_dtype="f32", n_batch=50)
    close(model.logits(prompt), want.logits)
    close(model.encode_image(A), want.features[0])
    assert len(want.features[0]) == 4 * 3


# ---- files -------------------------------------------------------------------------------------------------------------------


def test_shared_modules_are_no_architectures() -> None:
    assert "mistral3" in architectures() and not any(name.startswith("_") for name in architectures())


TEXT = Decoder("llama", 1, 64, 96, 4, 2, 16, 64, 256)
TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")


def plan(folder, text=TEXT, without=(), special=TOKENS, **changes):
    """A plan of a decoder beside Pixtral's full-size encoder, in files of headers, with changed keys of the encoder."""
    keys, tensors = full_encoder(text.d_model)
    keys |= {f"clip.{name.replace('__', '.')}": value for name, value in changes.items()}
    path = hollow.write_decoder(folder / "m.gguf", text, special=special)
    return pe.plan(path, mmproj=hollow.write_encoder(folder / "mm.gguf", ({k: v for k, v in keys.items() if k not in without},
                                                                          [t for t in tensors if t[0] not in without])), n_ctx=64)


def test_malformed_files_are_named(tmp_path) -> None:
    assert plan(tmp_path).picture == 64
    for changes, error, text in [
        ({"projector_type": "resampler"}, UnsupportedModelError, "projector_type is 'resampler'; beside 'llama' these are supported: .*pixtral"),
        ({"without": ("clip.projector_type",)}, UnsupportedModelError, "projector_type is ''"),
        ({"vision__attention__head_count": 3}, InvalidModelError, "heads must have"),
        ({"vision__attention__head_count": 512}, InvalidModelError, "heads must have"),
        ({"vision__image_std": [0.1, 0.0, 0.1]}, InvalidModelError, "image_std"),
        ({"vision__image_mean": [0.1, 0.5]}, InvalidModelError, "image_mean"),
        ({"vision__hidden_act": "mish"}, UnsupportedModelError, "activation is 'mish'"),
        ({"vision__block_count": 2**31 - 1}, InvalidModelError, "v.blk.2147483646"),
        ({"vision__resample": 9}, InvalidModelError, "resample"),
        ({"vision__patch_size": 7}, InvalidModelError, "patch_embd"),
        ({"vision__spatial_merge_size": 3}, InvalidModelError, "patch_merger"),
        ({"vision__longest_edge": 0}, InvalidModelError, "longest_edge"),
        ({"without": ("clip.vision.image_size",)}, InvalidModelError, "image_size"),
        ({"without": ("mm.input_norm.weight",)}, InvalidModelError, "mm.input_norm.weight"),
        ({"without": ("v.pre_ln.weight",)}, InvalidModelError, "v.pre_ln.weight"),
        ({"special": TOKENS[:2]}, InvalidModelError, r"\[IMG_END\]"),
    ]:
        with pytest.raises(error, match=text):
            plan(tmp_path, **changes)


@pytest.mark.parametrize("write", [foreign.llama_cpp_files, lambda *given: (foreign.ollama_file(*given, outtype="f32"), None)], ids=["llama.cpp", "Ollama"])
@pytest.mark.parametrize("all_dim", [1.0, 1.6])
def test_ministral_3_of_other_programs(tiny_gguf, tmp_path, write, all_dim: float) -> None:
    """The temperature and yarn's magnitudes under their names; a converted file has the latter in attn_factor."""
    folder = tiny_gguf("mistral3_ministral", text_config={"rope_parameters": {**YARN, "mscale_all_dim": all_dim}})[1]
    path, mmproj = write(folder, tmp_path / "m.gguf")
    prompt = ["see ", pil(A), pil(PICTURES[1]), " and, far behind what rope was trained with?"]
    want = tiny.hf_seen(folder, prompt)
    close(pe.load(path, mmproj=mmproj, n_ctx=256, kv_dtype="f32", n_batch=50).logits(prompt), want.logits)


def test_the_temperature_changes_results(tiny_gguf) -> None:
    """From the position on that rope was trained up to, and not before."""
    ids = list(range(5, 45))
    with_it, without = (pe.load(tiny_gguf("ministral3", rope_parameters={**YARN, "llama_4_scaling_beta": beta})[0], n_ctx=64, kv_dtype="f32").logits(ids)
                        for beta in (0.4, 0.0))
    assert np.array_equal(with_it[:24], without[:24]) and np.abs(with_it[24:] - without[24:]).max() > 0.1


# ---- full size, by hand --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, layers, rows", [("ministral-8b", 34, 55 * 55), ("pixtral-12b", 40, 64 * 64)])
def test_caches_and_largest_pictures(full_size, machine, name: str, layers: int, rows: int) -> None:
    """8 heads of 128 a layer; a picture of 1540 x 1540 in merged patches of 28, and one of 1024 x 1024 in patches of 16."""
    machine(64 * GIB)
    path, mmproj = full_size(name)
    plan = pe.plan(path, n_ctx=8192, mmproj=mmproj)
    assert kv(plan) == {"Full": 8192 * layers * 8 * 128 * 2 * 2} and plan.picture == rows


def test_mistral_small_3_1_24b(full_size, machine) -> None:
    """40 layers with 8 heads of 128: 160 KiB a token. A picture of 1540 x 1540 has 110 x 110 patches, merged to 55 x 55 rows."""
    machine(64 * GIB)
    token = 40 * 8 * 128 * 2 * 2
    assert token == 160 * KIB
    path, mmproj = full_size("mistral-24b")
    plan = pe.plan(path, n_ctx=131_072, mmproj=mmproj)
    assert kv(plan) == {"Full": 131_072 * token} and kv(plan)["Full"] == 20 * GIB
    d, ff, q, k = 5120, 32_768, 32 * 128, 8 * 128
    layer = (d * q + 2 * d * k + q * d + 3 * d * ff) // 32 * 18 + 4 * 2 * d             # Q4_0: 18 bytes a block of 32; norms in f32
    assert layer == 312_647_680
    assert [i.nbytes for i in plan.items if i.purpose == "weights" and i.layer is not None] == [layer] * 40
    head = 131_072 * d // 32 * 18                                                       # as many for the embedding, which is mapped
    rest = {i.purpose: i.nbytes for i in plan.items if i.detail == "embedding, head and norms"}
    assert rest["mapped"] == head and head + 4 * d <= rest["weights"] <= head + 4 * d + 64 * KIB
    v, v_ff, rows = 1024, 4096, 55 * 55
    encoder = 2 * (4 * v * v + 3 * v * v_ff) + 4 * 2 * v                                # f16 matrices, two f32 norms
    assert [i.nbytes for i in plan.items if i.purpose == "encoder" and i.layer is not None] == [encoder] * 24
    projector = 2 * (v * 3 * 14 * 14 + v * 4 * v + d * v + d * d) + 4 * 2 * v           # patches, merger, two products; two norms
    assert 0 <= sum(i.nbytes for i in plan.items if i.detail == "weights of patches, norms and projector") - projector < 4096
    n = 4 * rows
    assert plan.picture == rows and n == (1540 // 14) ** 2 == 12_100
    busiest = 4 * n * (v_ff + v + 64 + 2)                       # the feed-forward's units, its input, angles, intervals
    arena = next(i for i in plan.items if i.detail.startswith("arena, up to"))
    assert busiest == 251_002_400 and busiest < arena.nbytes < 1.3 * busiest            # and what its product works on
    assert 4 * 16 * n * n > 30 * arena.nbytes                                           # scores of 16 heads, as a matrix
    assert any(dict(i.parts).get("patches [12100, 588]") == 4 * n * 588 for i in plan.items if i.purpose == "images")
