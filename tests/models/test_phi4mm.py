"""Phi-4-multimodal against transformers: squares, means, separators, the picture's edge; the change of the decoder that pictures need."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pyengine as pe
import tiny
from cases import Case, Converted, Tokens
from converters import convert
from hollow import Decoder, Encoder, Full, kv, Tensor, vit_layers
from oracle import encoder_of
from pictures import A, B, LONG, same, THIN
from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError, UnsupportedModelError
from pyengine.media.image import Image, resize
from pyengine.models.encoders import phi4mm
from sight import Run, Sight
from tiny import COMMON, ROPES

try:
    import transformers
except ImportError:         # the cases are found without it
    transformers = None

pytestmark = pytest.mark.skipif(transformers is None, reason="needs transformers and torch: pip install -r requirements/test.txt")

# What the family's real template does, in other words, with parts.
TEMPLATE = """{%- for m in messages -%}
  {{ '<|' + m['role'] + '|>' }}
  {%- if m['content'] is string -%}{{ m['content'] }}
  {%- else -%}{%- for part in m['content'] -%}{{ '<|endoftext10|>' if part['type'] == 'image' else part['text'] }}{%- endfor -%}
  {%- endif -%}
  {{ '<|end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"""
TOKENS = Tokens(("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|endoftext10|>"), "<|endoftext|>", "<|end|>", "<|endoftext|>", TEMPLATE,
                {"vision_config.image_token_id": "<|endoftext10|>"})


def theirs() -> Any:
    """Return transformers' image processor's class, whose only form is torchvision's; here Pillow resizes, as in the authors' code."""
    import torch

    def resized(x: Any, size: list[int]) -> Any:
        return torch.from_numpy(resize(np.ascontiguousarray(x.numpy().transpose(1, 2, 0)), *size, 2).transpose(2, 0, 1).copy())

    def pad(x: Any, sides: list[int], fill: list[int]) -> Any:
        _, _, right, below = sides
        return torch.nn.functional.pad(x, (0, right, 0, below), value=fill[0])

    name = "transformers.models.phi4_multimodal.image_processing_phi4_multimodal"
    made = {}
    if importlib.util.find_spec("torchvision") is None:
        made = {full: ModuleType(full) for full in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2")}
        made["torchvision.transforms.v2"].functional = SimpleNamespace()
    with pytest.MonkeyPatch.context() as patch:
        for full, module in made.items():
            patch.setitem(sys.modules, full, module)
        module = importlib.import_module(name)
    module.tvF = SimpleNamespace(resize=resized, pad=pad)
    return module.Phi4MultimodalImageProcessor


def processed(pixels: Any, size: int, patch: int, most: int) -> dict[str, Any]:
    """Return what transformers' processor makes of a picture."""
    import torch

    def normalized(x: Any, *_: Any) -> Any:
        return (x.to(torch.float32) / 255 - 0.5) / 0.5

    def squeezed(x: Any, size: Any, **_: Any) -> Any:
        return torch.nn.functional.interpolate(x[None], (size.height, size.width), mode="bicubic", align_corners=False)[0]

    kind = theirs()
    self = SimpleNamespace(rescale_and_normalize=normalized, resize=squeezed)
    for method in ("dynamic_preprocess", "find_closest_aspect_ratio", "pad_to_max_num_crops", "pad_mask_to_max_num_crops"):
        setattr(self, method, getattr(kind, method).__get__(self))
    found = kind._preprocess(self, [torch.from_numpy(np.asarray(pixels).transpose(2, 0, 1).copy())], True, SimpleNamespace(height=size, width=size), 3, True,
                             1 / 255, True, [0.5] * 3, [0.5] * 3, patch, most, None)
    return dict(found)


class Processor:
    """transformers' processor, with as many tokens for a picture as it has rows in squares of any size: its own count is for 448 pixels."""

    def __init__(self, tokenizer: Any, config: Any):
        self.tokenizer, v = tokenizer, config.vision_config
        self.size, self.patch, self.token = v.image_size, v.patch_size, v.image_token_id

    def of(self, picture: Any, **settings: Any) -> tuple[list[int], dict[str, Any]]:
        made = processed(picture, self.size, self.patch, settings.get("dynamic_hd", 6))
        mask, side = made["image_attention_mask"][0][1:], self.size // self.patch
        height, width = made["image_sizes"][0].tolist()
        whole = mask.reshape(height // self.size, width // self.size, side, side).transpose(1, 2).flatten(2).flatten(0, 1)[::2, ::2]
        rows, columns = int(whole[:, 0].sum()), int(whole[0].sum())
        made["n"] = rows * (columns + 1) + 1 + side // 2 * (side // 2 + 1)
        return [self.token] * made["n"], made


class Phi4Sight(Sight):
    """Squares, and the whole."""

    model_types, marker, auto = ("phi4_multimodal",), "<|endoftext10|>", "AutoModelForMultimodalLM"

    def images(self, config: Any, settings: dict[str, Any]) -> Any:
        """Its class cannot be made without torchvision: what it saves is written."""
        side = config.vision_config.image_size
        values = {"image_processor_type": "Phi4MultimodalImageProcessor", "size": {"height": side, "width": side}, "dynamic_hd": 6, **settings}
        return SimpleNamespace(save_pretrained=lambda folder: (folder / "preprocessor_config.json").write_text(json.dumps(values)))

    def processor(self, folder: Path, config: Any, tokenizer: Any) -> Any:
        return Processor(tokenizer, config)

    def soft(self, config: Any) -> int:
        return config.vision_config.image_token_id

    def part(self, processor: Any, config: Any, folder: Path, part: Any, **settings: Any) -> tuple[list[int], dict[str, Any]]:
        assert not isinstance(part, (list, tuple)), "no videos"
        return processor.of(part, **settings)

    def chat(self, processor: Any, text: str, pictures: Sequence[Any]) -> list[int]:
        begin, *rest = text.split(self.marker)
        for picture, piece in zip(pictures, rest, strict=True):
            begin += self.marker * len(processor.of(picture)[0]) + piece
        return processor.tokenizer(begin, add_special_tokens=False)["input_ids"]

    def run(self, model: Any, tokens: Any, made: list[dict[str, Any]], fps: float | None) -> Run:
        import torch

        if not made:
            return Run({}, [], [], [])
        embed, token = model.model.embed_tokens_extend.image_embed, self.soft(model.config)
        names = ("image_pixel_values", "image_sizes", "image_attention_mask")
        features = [embed(torch.full((1, m["n"]), token), torch.zeros(1, m["n"], model.config.hidden_size), *(m[name] for name in names))[0] for m in made]
        most = max(m["image_pixel_values"].shape[1] for m in made)

        def joined(name: str, value: float) -> Any:
            return torch.cat([torch.nn.functional.pad(m[name], (0, 0) * (m[name].dim() - 2) + (0, most - m[name].shape[1]), value=value) for m in made])

        inputs = {"image_pixel_values": joined(names[0], 0.0), "image_sizes": torch.cat([m["image_sizes"] for m in made]),
                  "image_attention_mask": joined(names[2], 1.0)}
        return Run(inputs, features, [m["image_pixel_values"] for m in made], [])


AUDIO = {"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2, "ext_pw_out_channel": 16,
         "depthwise_separable_out_channel": 16, "nemo_conv_channels": 4, "audio_token_id": 511}
TEXT = {**COMMON, "max_position_embeddings": 512, "tie_word_embeddings": True,
        "audio_config": AUDIO}
LONGROPE = {"rope_parameters": {**ROPES["longrope"], "partial_rotary_factor": 0.75, "short_factor": [1.0 + 0.1 * i for i in range(6)],
                                "long_factor": [1.0 + 0.7 * i for i in range(6)]}, "original_max_position_embeddings": 64}
VISION = {"hidden_size": 80, "intermediate_size": 100, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 56, "crop_size": 56, "patch_size": 14}
CLIP = {"has_vision_encoder": True, "projector_type": "phi4mm", "use_silu": False, "use_gelu": True, "hidden_act": "gelu_pytorch_tanh", "image_size": 56,
        "patch_size": 14, "embedding_length": 80, "feed_forward_length": 100, "attention.head_count": 4, "projection_dim": 96, "block_count": 3,
        "resample": 2, "attention.layer_norm_epsilon": np.float32(1e-6), "preproc_max_tiles": 6, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


class Phi4Decoder(Decoder):
    """q, k and v in one matrix, gate and up in another."""

    def tensors(self, dtype: str) -> Any:
        q, kv_width = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        for name, shape, kind in super().tensors(dtype):
            if ".attn_q." in name:
                yield name.replace("attn_q", "attn_qkv"), (q + 2 * kv_width, shape[1]), kind
            elif ".ffn_up." in name:
                yield name, (2 * self.d_ff, self.d_model), kind
            elif not any(part in name for part in (".attn_k.", ".attn_v.", ".ffn_gate.")):
                yield name, shape, kind
        for name in ("long", "short"):
            yield f"rope_factors_{name}.weight", (48,), "F32"


def encoder(d_model: int) -> Encoder:
    """So400m over squares of 448 pixels, without its last layer."""
    width, d_ff, n = 1152, 4304, 26
    sizes = {"image_size": 448, "patch_size": 14, "embedding_length": width, "feed_forward_length": d_ff, "attention.head_count": 16, "block_count": n,
             "projection_dim": d_model, "preproc_max_tiles": 36, "attention.layer_norm_epsilon": 1e-6}
    keys = {"clip.has_vision_encoder": True, "clip.projector_type": "phi4mm", "clip.use_gelu": True, **{f"clip.vision.{k}": v for k, v in sizes.items()}}
    tensors: list[Tensor] = [("v.patch_embd.weight", (width, 3, 14, 14), "F32"), ("v.patch_embd.bias", (width,), "F32"),
                             ("v.position_embd.weight", (1024, width), "F32"), ("mm.0.weight", (d_model, width), "F16"), ("mm.0.bias", (d_model,), "F32"),
                             ("mm.2.weight", (d_model, d_model), "F16"), ("mm.2.bias", (d_model,), "F32"), ("mm.glb_sep", (width,), "F32"),
                             ("mm.sub_sep", (width,), "F32")]
    return keys, tensors + vit_layers(n, width, d_ff)


CASES = (Case(
    "phi4_multimodal", "phi3", "Phi4MultimodalConfig", "Phi4MultimodalForCausalLM", "qwen2", TEXT, {}, VISION, TOKENS, Phi4Sight(), also=("Phi4MMForCausalLM", "Phi4ForCausalLMV"), cached_as="llama",
    converted=Converted({"general.architecture": "phi3", "tokenizer.chat_template": TEMPLATE}, clip=CLIP, clip_tokens={"image_token_id": "<|endoftext10|>"}),
    full={"phi4-multimodal": Full(Phi4Decoder("phi3", 32, 3072, 8192, 24, 8, 128, 200064, 131072, tied=True, keys={
        "rope.dimension_count": 96, "rope.scaling.original_context_length": 4096, "rope.scaling.attn_factor": 1.19}), ("<|endoftext10|>",), encoder)}),)

SIZES = [(61, 47), (30, 300), (300, 27), (9, 11), (400, 500), (112, 112), (56, 56), (100, 31), (131, 130), (1, 1)]      # width, height
RNG = np.random.default_rng(4)
PICTURES = [RNG.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in SIZES]


@pytest.mark.parametrize("most", [6, 2])
def test_pixels_of_squares(tiny_gguf, most: int) -> None:
    """Squares to a rounding of the last bit, the whole to some of them: sums of the filter are in another order."""
    path, _ = tiny_gguf("phi4_multimodal")
    ours = encoder_of(path)
    for pixels in PICTURES:
        want = processed(pixels, 56, 14, most)
        found = ours.process(Image(pixels, {"dynamic_hd": most}))
        whole = found.views[-1] if len(found.views) == 1 else max(found.views, key=lambda v: found.parts[-1].view is v)
        squares = [v for v in found.views if v is not whole]
        masks = want["image_attention_mask"][0].numpy().astype(bool)
        theirs = [(x, mask) for x, mask in zip(want["image_pixel_values"][0].numpy(), masks)]
        kept = [theirs[0], *((x, mask) for x, mask in theirs[1:] if mask.any())]
        assert len(kept) == len(squares) + 1
        for view, (x, mask), bound in zip([whole, *squares], kept, (1e-5, *[2e-7] * len(squares))):
            there = mask.reshape(-1)
            cut = x.reshape(3, 4, 14, 4, 14).transpose(1, 3, 0, 2, 4).reshape(16, -1)
            assert np.abs(view.inputs["patches"] - cut[np.argsort(~there, kind="stable")]).max() <= bound
            assert set(view.inputs["hi"]) == {there.sum()} and view.grid[1:] == (mask.any(1).sum(), mask.any(0).sum())


def test_grids_and_rows_are_those_of_transformers() -> None:
    """Also with the numbers of the released model, whose count the processor knows itself."""
    kind = theirs()
    c = SimpleNamespace(square=448, side=32, patch=14, half=16)
    for _ in range(300):
        width, height = (int(s) for s in np.exp(RNG.uniform(3, 9.5, 2)))
        if -(-width // 448) * -(-height // 448) > 36:
            ratios = sorted({(i, j) for n in range(1, 37) for i in range(1, n + 1) for j in range(1, n + 1) if i * j <= 36}, key=lambda r: r[0] * r[1])
            want = kind.find_closest_aspect_ratio(None, width / height, ratios, width, height, 448)
            assert phi4mm.best_grid(width, height, 448, 36) == want
    for width, height in [(100, 90), (448, 448), (449, 448), (1000, 300), (640, 1700)]:
        want = processed(np.zeros((height, width, 3), np.uint8), 448, 14, 36)["num_img_tokens"]
        fit = phi4mm.Fit(c, width, height, 36)
        assert [fit.rows_h * (fit.rows_w + 1) + 1 + 16 * 17] == want


@pytest.mark.parametrize("config", [{"vision_config": {"feature_layer": -1}}, {"vision_config": {"feature_layer": 1}}, {"sliding_window": 30},
                                    {"tie_word_embeddings": False, "num_key_value_heads": 6}])
def test_variants(tiny_gguf, config: dict[str, Any]) -> None:
    path, folder = tiny_gguf("phi4_multimodal", **config)
    want = tiny.hf_seen(folder, [5, A, "and", THIN, 6])
    model = pe.load(path, n_ctx=256, kv_dtype="f32", n_batch=5)
    same(model.logits([5, A, "and", THIN, 6]), want.logits)
    same(model.encode_image(THIN), want.features[1])


def test_longrope_goes_by_the_length_of_the_context(tiny_gguf) -> None:
    """Up to the original 64 positions the short factors, beyond it the long ones: in transformers for a prompt, here for a context."""
    path, folder = tiny_gguf("phi4_multimodal", **LONGROPE)
    short, long = [5, A, "and", THIN, 6], [5, A, "and", THIN, "differ how? " * 3, B, 6]
    for prompt, n_ctx in ((short, 64), (long, 256)):
        want = tiny.hf_seen(folder, prompt).logits
        assert (len(want) > 64) == (n_ctx > 64)
        same(pe.load(path, n_ctx=n_ctx, kv_dtype="f32").logits(prompt), want)


def test_options_and_what_is_refused(tiny_gguf, tmp_path) -> None:
    path, folder = tiny_gguf("phi4_multimodal")
    model = pe.load(path, n_ctx=128, kv_dtype="f32")
    want = tiny.hf_seen(folder, [5, LONG, 6], dynamic_hd=2)
    same(model.logits([5, pe.open_image(LONG, dynamic_hd=2), 6]), want.logits)
    for media, text in [(pe.open_image(A, dynamic_hd=7), "from 1 to 6"), (pe.open_image(A, max_tiles=2), "has dynamic_hd"), ([A] * 2, "not videos"),
                        (np.zeros((500, 3, 3), np.uint8), "less than 10 pixels remain")]:
        with pytest.raises(RequestError, match=text):
            model.encode_image(media)
    with pytest.raises(ContextOverflowError, match="positions, but the context holds 9"):
        pe.load(path, n_ctx=9).encode_image(A)
    for config, error, text in [({"vision_config": {"image_size": 42, "crop_size": 42}, "processor": {"size": {"height": 42, "width": 42}}},
                                 UnsupportedModelError, "even number"),
                                ({"processor": {"size": {"height": 56, "width": 112}}}, UnsupportedModelError, "'size' is"),
                                ({"vision_config": {"feature_layer": -6}}, InvalidModelError, "feature_layer"),
                                ({"processor": {"resample": 0}}, UnsupportedModelError, "resample")]:
        with pytest.raises(error, match=text):
            convert(tiny.make_checkpoint("phi4_multimodal", tmp_path / "c", **config), tmp_path / "m.gguf")


def test_the_authors_template_gets_pictures_where_they_stand(tmp_path) -> None:
    """It takes texts only, in which their users write the picture's place; their examples have nothing between it and the question."""
    folder = tiny.make_checkpoint("phi4_multimodal", tmp_path / "c")
    theirs = ("{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
    path = convert(folder, tmp_path / "own.gguf", "f32")
    (folder / "chat_template.jinja").write_text(theirs)
    model, own = (pe.load(p, n_ctx=128) for p in (convert(folder, tmp_path / "m.gguf", "f32"), path))
    messages = [{"role": "user", "content": [{"type": "image", "image": A}, "what is it?"]}, {"role": "assistant", "content": "a dog {{ x }}"},
                {"role": "user", "content": [{"type": "text", "text": "sure? <|end|>"}, {"type": "image", "image": B}]}]
    assert model.chat_ids(messages) == own.chat_ids(messages) and model.chat_ids(messages[:1])[:3] == [model.tokenizer.need("<|user|>"), -1, -1]
    assert model.chat_ids([{"role": "user", "content": "hi"}]) == own.chat_ids([{"role": "user", "content": "hi"}])


def test_sound_is_left_out_and_said(tmp_path, capsys) -> None:
    folder = tiny.make_checkpoint("phi4_multimodal", tmp_path / "c")
    path = convert(folder, tmp_path / "m.gguf", "f32")
    err = capsys.readouterr().err
    assert "the encoder of sound" in err and "no low-rank change for pictures" in err
    model = pe.load(path, n_ctx=64)
    with pytest.raises(RequestError, match="audio"):
        model.chat([{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}]}])


def changed(folder: Path) -> dict[str, Any]:
    """Return random low-rank factors by the names of their matrices, and add them to a checkpoint's own."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors, random, factors = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(3), {}
    for name, value in tensors.items():
        if ".layers." in name and name.startswith("model.layers") and name.endswith("proj.weight"):
            low, high = (torch.randn(shape, generator=random) / 8 for shape in ((5, value.shape[1]), (value.shape[0], 5)))
            factors[name.removesuffix(".weight")] = low, high
            tensors[name] = (value + 3.2 * (high @ low)).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return factors


def test_the_change_that_pictures_need_is_added(tmp_path, capsys) -> None:
    """Beside transformers' files, and within the authors': `lora_alpha` 16 of rank 5."""
    from safetensors.torch import load_file, save_file

    plain, whole = (tiny.make_checkpoint("phi4_multimodal", tmp_path / name) for name in ("plain", "whole"))
    factors = changed(whole)
    want = tiny.hf_seen(whole, [5, A, "and", B, 6])
    (plain / "vision-lora").mkdir()
    (plain / "vision-lora" / "adapter_config.json").write_text(json.dumps({"r": 5, "lora_alpha": 16}))
    save_file({f"base_model.model.{name}.lora_{part}.weight": f.contiguous() for name, both in factors.items() for part, f in zip("AB", both)},
              plain / "vision-lora" / "adapter_model.safetensors")
    path = convert(plain, tmp_path / "m.gguf", "f32")
    assert "is added to the decoder, for texts alone too" in capsys.readouterr().err
    same(pe.load(path, n_ctx=256, kv_dtype="f32").logits([5, A, "and", B, 6]), want.logits)

    tensors, made = load_file(plain / "model.safetensors"), {}
    for name, value in tensors.items():
        own = name.removesuffix(".weight")
        for old, new in ((".img_projection_up.", ".img_projection.0."), (".img_projection_down.", ".img_projection.2."),
                         ("global_img_feature_extensor", "glb_GN"), ("sub_img_feature_extensor", "sub_GN")):
            name = name.replace(old, new)
        made[f"{own}.base_layer.weight" if own in factors else name] = value
    for name, both in factors.items():
        for part, factor in zip("AB", both):
            made[f"{name}.lora_{part}.vision.weight"] = factor.contiguous()
            made[f"{name}.lora_{part}.speech.weight"] = (factor * 2).contiguous()
    save_file(made, plain / "model.safetensors", metadata={"format": "pt"})
    (plain / "vision-lora" / "adapter_config.json").unlink()
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "architectures": ["Phi4MMForCausalLM"], "vision_lora": {"r": 5, "lora_alpha": 16, "dp": 0.0}}))
    want_bytes = pe.load(path, n_ctx=64).logits([5, 6, 7])
    assert np.array_equal(pe.load(convert(plain, tmp_path / "n.gguf", "f32"), n_ctx=64).logits([5, 6, 7]), want_bytes)
    (plain / "vision-lora" / "adapter_config.json").write_text(json.dumps({"r": 5, "lora_alpha": 16, "use_dora": True}))
    with pytest.raises(UnsupportedModelError, match="use_dora"):
        convert(plain, tmp_path / "n.gguf", "f32")


def test_the_plan_of_the_published_model(full_size) -> None:
    path, mmproj = full_size("phi4-multimodal")
    plan = pe.plan(path, n_ctx=4096, mmproj=mmproj)
    assert kv(plan) == {"Full": 32 * 2 * 8 * 128 * 4096 * 2} and plan.picture == 258
