"""MobileVLM's projectors in files as llama.cpp's converter writes them, against PyTorch: the papers' layers, written here, between transformers'
CLIP and Llama."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import hollow
import pyengine as pe
import tiny
from hollow import both, Decoder, Encoder, kv, vit_layers
from oracle import encoder_of
from pyengine.errors import InvalidModelError, RequestError
from pyengine.media.image import Image

try:
    import torch
    import transformers
except ImportError:         # what other files take from here needs neither
    torch = transformers = None

pytestmark = pytest.mark.skipif(transformers is None, reason="needs transformers and torch: pip install -r requirements/test.txt")

CASES = ()                  # transformers has no such model
D, V = 96, 80               # widths of the tiny model's text and encoder
SIZES = [(61, 47), (30, 300), (300, 17), (9, 11), (400, 500), (84, 84), (90, 1)]      # width, height
RNG = np.random.default_rng(4)
PICTURES = [RNG.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in SIZES]


# ---- the papers' layers -----------------------------------------------------------------------------------------------------------


def channel_norm(width: int) -> Any:
    """Layer norm over the channels of [b, c, h, w]."""
    class Norm(torch.nn.LayerNorm):
        def forward(self, x: Any) -> Any:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    return Norm(width)


class Gate(torch.nn.Module if torch else object):
    """Squeeze and excitation."""

    def __init__(self, width: int, squeezed: int):
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Conv2d(width, squeezed, 1), torch.nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Any) -> Any:
        return x * torch.nn.functional.hardsigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class Inverted(torch.nn.Module if torch else object):
    """MobileNet V3's block as LDP uses it."""

    def __init__(self, width: int, squeezed: int, stride: int):
        super().__init__()
        nn = torch.nn
        depthwise = nn.Sequential(nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False), channel_norm(width), nn.Hardswish())
        self.block = nn.Sequential(depthwise, Gate(width, squeezed), nn.Sequential(nn.Conv2d(width, width, 1, bias=False), channel_norm(width)))
        self.added = stride == 1

    def forward(self, x: Any) -> Any:
        return x + self.block(x) if self.added else self.block(x)


class Projector(torch.nn.Module if torch else object):
    """LDP or LDPv2 over rows [1, n, V]."""

    def __init__(self, kind: str):
        super().__init__()
        nn = torch.nn
        products = [nn.Linear(V, D), nn.GELU(), nn.Linear(D, D)]
        self.kind = kind
        if kind == "ldp":
            self.mlp = nn.Sequential(nn.Identity(), *products)
            self.mb_block = nn.Sequential(nn.Identity(), Inverted(D, 40, 1), Inverted(D, 40, 2))
        else:
            self.mlp, self.peg = nn.Sequential(*products), nn.Sequential(nn.Conv2d(D, D, 3, 1, 1, groups=D))

    def forward(self, x: Any) -> Any:
        side = round(x.shape[1] ** 0.5)
        x = self.mlp(x).permute(0, 2, 1).reshape(1, D, side, side)
        if self.kind == "ldp":
            x = self.mb_block(x)
        else:
            x = torch.nn.functional.adaptive_avg_pool2d(x, side // 2)
            x = self.peg(x) + x
        return x.flatten(2).permute(0, 2, 1)


def random_projector(kind: str) -> Projector:
    """A projector of random numbers, norms and biases too."""
    projector, generator = Projector(kind).eval(), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in projector.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(0.5 * noise + (p.dim() == 1) if p.dim() == 1 else noise * 1.5 / p[0].numel() ** 0.5)
    return projector


# ---- files ------------------------------------------------------------------------------------------------------------------------


def with_projector(path: Path, out: Path, projector: Projector, squeezed: bool = True) -> Path:
    """Write a LLaVA's file with another projector, under the names and in the shapes of llama.cpp's first converter; convolutions as PyTorch
    has them where not `squeezed`."""
    reader, writer = gguf.GGUFReader(path), gguf.GGUFWriter(out, "llama")
    for key, f in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "clip.vision.image_aspect_ratio"):
            value = projector.kind if key.endswith("projector_type") else f.contents()
            writer.add_key_value(key, value, f.types[0], f.types[-1] if f.types[0] == gguf.GGUFValueType.ARRAY else None)
    for t in reader.tensors:
        if not t.name.startswith("mm."):
            writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    for name, value in projector.state_dict().items():
        writer.add_tensor(f"mm.model.{name}", np.ascontiguousarray(value.squeeze() if squeezed else value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.fixture
def made(tiny_gguf, tmp_path) -> Callable[..., tuple[Path, Path, Projector]]:
    def make(kind: str, side: int = 4, squeezed: bool = True) -> tuple[Path, Path, Projector]:
        path, folder = tiny_gguf("llava", vision_config={"image_size": side * 14}, processor={"do_pad": True})
        projector = random_projector(kind)
        return with_projector(path, tmp_path / f"{kind}-{side}-{squeezed}.gguf", projector, squeezed), folder, projector

    return make


def seen(folder: Path, projector: Projector, parts: list[Any]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits of a prompt of ids and pictures, and their rows: transformers' LLaVA with that projector in its place."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    images, embed = transformers.LlavaImageProcessorPil.from_pretrained(folder), model.get_input_embeddings()
    rows, features = [], []
    with torch.no_grad():
        for part in parts:
            if isinstance(part, int):
                rows.append(embed(torch.tensor([[part]])))
                continue
            pixels = images(part, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
            hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            rows.append(projector(hidden))
            features.append(rows[-1][0].numpy())
        logits = model(inputs_embeds=torch.cat(rows, 1)).logits[0].numpy()
    return logits, features


def close(got: np.ndarray, want: np.ndarray, share: float = 2e-5) -> None:
    assert got.shape == want.shape and np.abs(got - want).max() <= share * np.ptp(want)


@pytest.mark.parametrize("kind, side, squeezed", [("ldp", 4, True), ("ldp", 5, False), ("ldp", 3, True), ("ldpv2", 4, False), ("ldpv2", 6, True)])
def test_logits_are_those_of_pytorch(made, kind: str, side: int, squeezed: bool) -> None:
    path, folder, projector = made(kind, side, squeezed)
    prompt = [5, PICTURES[0], 77, 8, PICTURES[1], PICTURES[3], 30, 9]
    logits, features = seen(folder, projector, prompt)
    assert len(features[0]) == (-(-side // 2)) ** 2
    for n_batch in (512, 5):
        close(pe.load(path, n_ctx=256, kv_dtype="f32", n_batch=n_batch).logits(prompt), logits)
    model = pe.load(path, n_ctx=64)
    for part, want in zip((PICTURES[0], PICTURES[1], PICTURES[3]), features):
        close(model.encode_image(part), want)


def test_pixels_are_those_of_a_padded_square(made) -> None:
    path, folder, _ = made("ldpv2")
    ours, theirs = encoder_of(path), transformers.LlavaImageProcessorPil.from_pretrained(folder)
    for pixels in PICTURES:
        (view,) = ours.process(Image(pixels)).views
        want = theirs(pixels, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
        assert np.array_equal(view.inputs["patches"].reshape(4, 4, 3, 14, 14).transpose(2, 0, 3, 1, 4).reshape(3, 56, 56), want)


def test_what_is_refused(made) -> None:
    with pytest.raises(InvalidModelError, match="5 x 5 patches have no means of 2 x 2"):
        pe.load(made("ldpv2", 5)[0])
    model = pe.load(made("ldp")[0], n_ctx=64)
    for media, words in ((pe.open_image(PICTURES[0], max_tiles=2), "max_tiles"), ([PICTURES[0]] * 2, "not videos")):
        with pytest.raises(RequestError, match=words):
            model.encode_image(media)


# ---- full size --------------------------------------------------------------------------------------------------------------------


def full_encoder(d: int, kind: str) -> Encoder:
    """CLIP L/14 of 336 pixels without its last layer, and a projector."""
    width, d_ff, n_layers, patch, side = 1024, 4096, 23, 14, 24
    keys = {"clip.has_vision_encoder": True, "clip.has_llava_projector": True, "clip.projector_type": kind, "clip.vision.image_size": patch * side,
            "clip.vision.patch_size": patch, "clip.vision.block_count": n_layers, "clip.vision.embedding_length": width,
            "clip.vision.feed_forward_length": d_ff, "clip.vision.attention.head_count": 16, "clip.vision.projection_dim": 768,
            "clip.vision.attention.layer_norm_epsilon": 1e-5}
    first, last = (1, 3) if kind == "ldp" else (0, 2)
    tensors = [("v.patch_embd.weight", (width, 3, patch, patch), "F16"), ("v.class_embd", (width,), "F32"),
               ("v.position_embd.weight", (side**2 + 1, width), "F16"), *both("v.pre_ln", width), *both("v.post_ln", width),
               *vit_layers(n_layers, width, d_ff), (f"mm.model.mlp.{first}.weight", (d, width), "F16"), (f"mm.model.mlp.{first}.bias", (d,), "F32"),
               (f"mm.model.mlp.{last}.weight", (d, d), "F16"), (f"mm.model.mlp.{last}.bias", (d,), "F32")]
    if kind == "ldpv2":
        return keys, [*tensors, ("mm.model.peg.0.weight", (d, 3, 3), "F16"), ("mm.model.peg.0.bias", (d,), "F32")]
    for i in (1, 2):
        at = f"mm.model.mb_block.{i}.block"
        tensors += [(f"{at}.0.0.weight", (d, 3, 3), "F16"), *both(f"{at}.0.1", d), (f"{at}.1.fc1.weight", (d // 4, d), "F16"),
                    (f"{at}.1.fc1.bias", (d // 4,), "F32"), (f"{at}.1.fc2.weight", (d, d // 4), "F16"), (f"{at}.1.fc2.bias", (d,), "F32"),
                    (f"{at}.2.0.weight", (d, d), "F16"), *both(f"{at}.2.1", d)]
    return keys, tensors


@pytest.mark.parametrize("kind", ["ldp", "ldpv2"])
def test_mobilevlm_1_7b(tmp_path, kind: str) -> None:
    """24 layers with 16 heads of 128; 144 rows a picture."""
    path = hollow.write_decoder(tmp_path / "m.gguf", Decoder("llama", 24, 2048, 5632, 16, 16, 128, 32000, 2048))
    plan = pe.plan(path, mmproj=hollow.write_encoder(tmp_path / "mm.gguf", full_encoder(2048, kind)), n_ctx=2048)
    assert kv(plan) == {"Full": 2048 * 24 * 16 * 128 * 2 * 2} and plan.picture == 144
