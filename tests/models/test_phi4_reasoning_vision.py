"""Phi-4-reasoning-vision, of which transformers has the parts: SigLIP 2 at the last layer but one, two products, Phi-3. What holds them together
is described by the authors: whole patches counted and kept within bounds, rows where "<image>" stood, nothing around them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import pyengine as pe
import tiny
from cases import Tokens
from converters import convert
from foreign import Dialect, llama_cpp_files, Saved, Tensors, vision_name
from hollow import Encoder, Full, kv, Tensor, vit_layers
from oracle import encoder_of
from pictures import A, B, DOT, LONG, same, THIN
from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError, UnsupportedModelError
from pyengine.media.image import Image
from pyengine.models.encoders import phi4
from test_phi4mm import Phi4Decoder
from tiny import COMMON

try:
    import transformers
except ImportError:
    transformers = None

pytestmark = pytest.mark.skipif(transformers is None, reason="needs transformers and torch: pip install -r requirements/test.txt")

CASES = ()                  # the parts are not one class of transformers; phi4_multimodal's names the converter

TEMPLATE = """{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant<|im_sep|>' }}{%- endif -%}"""
TOKENS = Tokens(("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|dummy|>"), "<|endoftext|>", "<|im_end|>", "<|dummy|>", TEMPLATE)
VISION = {"hidden_size": 80, "intermediate_size": 100, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 8, "num_patches": 49,
          "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
LEAST, MOST = 12, 40


class Whole:
    """The parts with random weights, and the folder that the authors' code would save."""

    def __init__(self, folder: Path, head: bool = True, **text: Any):
        import torch
        from safetensors.torch import save_file

        folder.mkdir()
        ids = tiny.save_tokenizer("llama-bpe", folder, TOKENS)
        self.text = transformers.Phi3ForCausalLM(transformers.Phi3Config(**{**COMMON, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, **ids, **text}))
        self.tower = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**VISION, vision_use_head=head))
        self.projector = torch.nn.Sequential(torch.nn.Linear(80, 96), torch.nn.GELU(), torch.nn.Linear(96, 96))
        random, made = torch.Generator().manual_seed(5), {}
        parts = {"": self.text, "model.vision_tower.vision_tower.vision_model.": self.tower, "model.mm_projector.": self.projector}
        with torch.no_grad():
            for prefix, part in parts.items():
                part.eval()
                for name, p in part.named_parameters():
                    noise = torch.randn(p.shape, generator=random)
                    norm, table = p.dim() == 1 and "norm" in name and name.endswith("weight"), any(n in name for n in ("embed_tokens", "position", "lm_head"))
                    p.copy_(1 + 0.3 * noise if norm else 0.5 * noise if p.dim() == 1 else noise if table else 1.5 * noise / p[0].numel() ** 0.5)
                    made[prefix + name] = p.detach().clone().contiguous()
        save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
        config = {**self.text.config.to_dict(), "architectures": ["Phi4ForCausalLMV"], "model_type": "phi4-siglip", "mm_projector_type": "mlp2x_gelu",
                  "mm_vision_tower": "google/siglip2-so400m-patch16-naflex", "mm_hidden_size": 80, "min_num_patches": LEAST, "max_num_patches": MOST,
                  "vision_config": {**VISION, "model_type": "siglip2_vision_model"}}
        (folder / "config.json").write_text(json.dumps(config))
        self.folder, self.tokenizer = folder, transformers.AutoTokenizer.from_pretrained(folder)

    def pixels(self, picture: Any, most: int = MOST) -> Any:
        """Return what transformers' processor makes of a picture for as many patches as the authors' asks it for."""
        width, height = picture.size
        wanted = max(min(max(width // 8 * (height // 8), 1), most), LEAST)
        return transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=wanted)(picture, return_tensors="pt")

    def rows(self, picture: Any, most: int = MOST) -> Any:
        """Return a picture's rows."""
        import torch

        made = self.pixels(picture, most)
        with torch.no_grad():
            hidden = self.tower(**made, output_hidden_states=True).hidden_states[-2][0]
            return self.projector(hidden[made["pixel_attention_mask"][0].bool()])

    def logits(self, prompt: list[Any], most: int = MOST) -> np.ndarray:
        """Return logits at each position of a prompt of ids, texts and pictures."""
        import torch

        embed, found = self.text.get_input_embeddings(), []
        with torch.no_grad():
            for part in prompt:
                ids = [part] if isinstance(part, int) else self.tokenizer(part, add_special_tokens=False)["input_ids"] if isinstance(part, str) else None
                found.append(self.rows(part, most) if ids is None else embed(torch.tensor(ids)))
            return self.text(inputs_embeds=torch.cat(found)[None]).logits[0].numpy()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    return Whole(tmp_path_factory.mktemp("phi4") / "hf")


@pytest.fixture(scope="module")
def path(whole: Whole) -> Path:
    return convert(whole.folder, whole.folder.parent / "m.gguf", "f32")


PROMPTS = {"text": [3, 7, "only text here", 9], "one": ["what is ", A, " this?"], "two": [5, A, "and", B, "differ how?", 6],
           "awkward": ["long ", LONG, " thin ", THIN, " dot ", DOT, " end"], "last": ["look at ", A]}


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_are_those_of_the_parts(whole: Whole, path: Path, name: str) -> None:
    want = whole.logits(PROMPTS[name])
    for n_batch in (512, 5):
        same(pe.load(path, n_ctx=256, kv_dtype="f32", n_batch=n_batch).logits(PROMPTS[name]), want)


def test_soft_tokens_and_greedy_text(whole: Whole, path: Path) -> None:
    model = pe.load(path, n_ctx=256, kv_dtype="f32")
    for picture in (A, THIN, DOT):
        same(model.encode_image(picture), whole.rows(picture).numpy())
    same(model.logits([5, pe.open_image(B, max_num_patches=15), 6]), whole.logits([5, B, 6], 15))
    prompt = [5, A, "and", B, 6]
    answer = model.generate(prompt, max_tokens=8, temperature=0, logit_bias=tuple((i, -1e9) for i in model.tokenizer.eog_ids))
    want = whole.logits([*prompt, *answer.tokens])[-len(answer.tokens) - 1 : -1].copy()
    want[:, list(model.tokenizer.eog_ids)] = -np.inf
    assert answer.tokens == want.argmax(-1).tolist() and len(answer.tokens) == 8


def test_pixels_and_grids(whole: Whole, path: Path) -> None:
    """Pictures of many shapes, beside the Pillow processor; sides of the released model too."""
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

    ours, random = encoder_of(path), np.random.default_rng(2)
    for picture in (A, B, LONG, THIN, DOT):
        (view,) = ours.process(Image(np.asarray(picture))).views
        want, n = whole.pixels(picture), view.positions.shape[1]
        assert int(want["pixel_attention_mask"].sum()) == n and want["spatial_shapes"][0].tolist() == list(view.grid[1:])
        got = view.inputs["patches"].reshape(n, 3, 64).transpose(0, 2, 1).reshape(n, -1)
        assert np.array_equal(got, want["pixel_values"][0][:n].numpy())
    for _ in range(300):
        (width, height), most = (int(s) for s in np.exp(random.uniform(0, 8.5, 2))), int(random.integers(1, 3600))
        lines, columns = phi4.largest_grid(width, height, 16, most)
        assert (lines * 16, columns * 16) == get_image_size_for_max_num_patches(height, width, 16, most)


@pytest.mark.parametrize("size, wanted", [(16, 16), (16, 31), (16, 5), (7, 1), (16, 120), (7, 40)])
def test_positions_are_weighed_as_torch_does(size: int, wanted: int) -> None:
    import torch

    want = torch.nn.functional.interpolate(torch.eye(size)[None, :, :, None].repeat(1, 1, 1, 3), (wanted, 3), mode="bilinear", align_corners=False, antialias=True)
    assert np.abs(phi4.triangles(size, wanted) - want[0, :, :, 0].numpy().T).max() <= 2e-6


def test_a_conversation_has_pictures_before_a_line_break(path: Path, whole: Whole) -> None:
    """As the authors' processor writes them: "<image>" and a line break before the question, each piece of text tokenized by itself."""
    model = pe.load(path, n_ctx=256)
    n = len(whole.rows(A))
    text = whole.tokenizer.apply_chat_template([{"role": "user", "content": "<image>\nwhat is it?"}], tokenize=False, add_generation_prompt=True)
    first, last = (whole.tokenizer(chunk, add_special_tokens=False)["input_ids"] for chunk in text.split("<image>"))
    assert model.chat_ids([{"role": "user", "content": [{"type": "image", "image": A}, "what is it?"]}])[-n - len(first) - len(last):] == [*first, *[-1] * n, *last]


def test_keys_and_other_formats(path: Path, whole: Whole, tmp_path) -> None:
    """llama.cpp's pair is read, and weights in other formats are used."""
    meta = pe.load(path, n_ctx=64).file.metadata
    assert [meta[f"clip.vision.{name}"] for name in ("projector_type", "block_count", "image_size", "image_min_pixels", "image_max_pixels")] == [
        "phi4", 3, 56, LEAST * 64, MOST * 64]
    exact = pe.load(path, n_ctx=128).encode_image(A)
    convert(whole.folder, tmp_path / "s.gguf", "f32", split_mmproj=True)
    same(pe.load(tmp_path / "s.gguf", mmproj=tmp_path / "mmproj-s.gguf", n_ctx=128).encode_image(A), exact)
    for outtype, most in (("f16", 4e-3), ("q8_0", 6e-2)):
        close = pe.load(convert(whole.folder, tmp_path / f"{outtype}.gguf", outtype), n_ctx=128).encode_image(A)
        assert 1e-6 < np.sqrt(np.mean((exact - close) ** 2) / np.mean(exact**2)) < most


class Phi4Dialect(Dialect):
    """llama.cpp's `conversion/phi.py`: without the encoder's last layer and norm."""

    model_types, arch, names, projector = ("phi4-siglip",), "phi3", gguf.MODEL_ARCH.PHI3, "phi4"

    def text_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        text = saved.text
        w.add_rope_scaling_orig_ctx_len(text["original_max_position_embeddings"])
        w.add_rope_dimension_count(text["hidden_size"] // text["num_attention_heads"])
        w.add_rope_freq_base(text["rope_parameters"]["rope_theta"])
        w.add_sliding_window(text["sliding_window"] or 0)

    def image_size(self, saved: Saved) -> int:
        return round(saved.vision["num_patches"] ** 0.5) * saved.vision["patch_size"]

    def encoder_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        saved.vision["num_hidden_layers"] -= 1
        super().encoder_keys(w, saved)

    def vision_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        area = saved.vision["patch_size"] ** 2
        w.add_vision_min_pixels(saved.config["min_num_patches"] * area)
        w.add_vision_max_pixels(saved.config["max_num_patches"] * area)
        w.add_vision_use_gelu(True)
        w.add_vision_attention_layernorm_eps(saved.vision["layer_norm_eps"])

    def vision_tensor(self, saved: Saved, source: str, value: np.ndarray, legacy: bool) -> Tensors:
        source, p = source.replace("vision_tower.vision_tower.", "vision_tower."), saved.vision["patch_size"]
        layer = re.search(r"layers\.(\d+)\.", source)
        if layer and int(layer[1]) == saved.vision["num_hidden_layers"] or ".post_layernorm." in source or ".head." in source:
            return
        if source.startswith("mm_projector."):
            yield source.replace("mm_projector.", "mm."), value
        elif source.endswith("patch_embedding.weight"):
            yield vision_name(source), value.reshape(-1, p, p, 3).transpose(0, 3, 1, 2)
        else:
            yield vision_name(source), value


def test_llama_cpps_pair_is_read_as_it_is(whole: Whole, tmp_path) -> None:
    folder = shutil.copytree(whole.folder, tmp_path / "c")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    text, mmproj = llama_cpp_files(folder, tmp_path / "l.gguf", dialect=Phi4Dialect())
    model = pe.load(text, mmproj=mmproj, n_ctx=256, kv_dtype="f32")
    for name in ("two", "awkward"):
        same(model.logits(PROMPTS[name]), whole.logits(PROMPTS[name]))
    same(model.encode_image(A), whole.rows(A).numpy())


def test_variants_of_the_text_model(tmp_path) -> None:
    one = Whole(tmp_path / "hf", head=False, tie_word_embeddings=True, sliding_window=20)
    same(pe.load(convert(one.folder, tmp_path / "m.gguf", "f32"), n_ctx=256, kv_dtype="f32").logits(PROMPTS["two"]), one.logits(PROMPTS["two"]))


def test_what_is_refused(whole: Whole, path: Path, tmp_path) -> None:
    model = pe.load(path, n_ctx=128)
    for media, text in [(pe.open_image(A, max_num_patches=41), "from 1 to 40"), (pe.open_image(A, zoom=2), "has max_num_patches"), ([A] * 2, "not videos")]:
        with pytest.raises(RequestError, match=text):
            model.encode_image(media)
    with pytest.raises(ContextOverflowError, match="positions, but the context holds 9"):
        pe.load(path, n_ctx=9).encode_image(A)
    config = json.loads((whole.folder / "config.json").read_text())
    for change, error, text in [({"mm_projector_type": "linear"}, UnsupportedModelError, "mm_projector_type"), ({"min_num_patches": 50}, InvalidModelError, "50 to 40"),
                                ({"vision_config": {**VISION, "num_patches": 50}}, UnsupportedModelError, "50 position embeddings")]:
        (tmp_path / "c").mkdir(exist_ok=True)
        for file in whole.folder.iterdir():
            (tmp_path / "c" / file.name).write_bytes(file.read_bytes())
        (tmp_path / "c" / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(error, match=text):
            convert(tmp_path / "c", tmp_path / "n.gguf")


def encoder(d_model: int) -> Encoder:
    """So400m with patches of 16 pixels, without its last layer; keys of llama.cpp's projector file."""
    width, d_ff, n = 1152, 4304, 26
    sizes = {"image_size": 256, "patch_size": 16, "embedding_length": width, "feed_forward_length": d_ff, "attention.head_count": 16, "block_count": n,
             "projection_dim": d_model, "image_min_pixels": 256 * 256, "image_max_pixels": 3600 * 256, "attention.layer_norm_epsilon": 1e-6}
    keys = {"clip.has_vision_encoder": True, "clip.projector_type": "phi4", "clip.use_gelu": True, **{f"clip.vision.{k}": v for k, v in sizes.items()}}
    tensors: list[Tensor] = [("v.patch_embd.weight", (width, 3, 16, 16), "F32"), ("v.patch_embd.bias", (width,), "F32"),
                             ("v.position_embd.weight", (256, width), "F32"), ("mm.0.weight", (d_model, width), "F16"), ("mm.0.bias", (d_model,), "F32"),
                             ("mm.2.weight", (d_model, d_model), "F16"), ("mm.2.bias", (d_model,), "F32")]
    return keys, tensors + vit_layers(n, width, d_ff)


class Plain(Phi4Decoder):
    """Without factors of the rotation."""

    def tensors(self, dtype: str) -> Any:
        return (t for t in super().tensors(dtype) if not t[0].startswith("rope_factors"))


def test_the_plan_of_the_published_model(tmp_path) -> None:
    """Its largest picture takes 3600 rows."""
    full = Full(Plain("phi3", 40, 5120, 17920, 40, 10, 128, 100352, 32768), ("<|dummy|>",), encoder)
    path, mmproj = full.write(tmp_path, "phi4-reasoning-vision")
    plan = pe.plan(path, n_ctx=8192, mmproj=mmproj, images=(960, 960))
    assert kv(plan) == {"Full": 40 * 2 * 10 * 128 * 8192 * 2} and plan.picture == 3600
