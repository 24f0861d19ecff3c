"""Molmo against a reference in torch (tests/support/reference_molmo.py): crops, padding, pooling, both decoders, points in answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyengine as pe
import tiny
from cases import Case, Converted, Tokens
from converters import convert
from converters.molmo import TEMPLATE as CONVERTED
from oracle import encoder_of
from pictures import A, B, LONG, picture, same
from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError, UnsupportedModelError
from pyengine.media.image import Image, resize_floats
from pyengine.models.encoders import molmo
from sight import Run, Sight
from tiny import COMMON, make_checkpoint

try:
    import reference_molmo
    reference_molmo.register()
except ImportError:         # the cases are found without torch and transformers
    reference_molmo = None

pytestmark = pytest.mark.skipif(reference_molmo is None, reason="needs transformers and torch: pip install -r requirements/test.txt")

# What the authors' processor makes of a conversation: pictures, a space, roles
TEMPLATE = """{%- set n = namespace(text='') -%}
{%- for m in messages -%}
  {%- set n.text = n.text + ' ' + m['role'].capitalize() + ': ' -%}
  {%- for part in m['content'] -%}
    {%- if part['type'] == 'image' -%}{{ '<|image|>' }}{%- else -%}{%- set n.text = n.text + part['text'] -%}{%- endif -%}
  {%- endfor -%}
{%- endfor -%}
{{ n.text + ' Assistant:' }}"""
# As in the published vocabularies, tokens for pictures lie behind what the output head gives.
TOKENS = Tokens(("<|endoftext|>", "<pad>", "<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>"), None, "<|endoftext|>", "<pad>", TEMPLATE)
N_HEAD = 402                # 400 of the text, the end, padding
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


class MolmoSight(Sight):
    """The whole and crops that overlap."""

    model_types, marker = ("molmo", "molmoe"), "<|image|>"

    def images(self, config: Any, settings: dict[str, Any]) -> Any:
        return reference_molmo.Images(**{"max_crops": 4, "overlap_margins": [2, 2], "base_image_input_size": [56, 56], "image_token_length_w": 4,
                                         "image_token_length_h": 4, "image_patch_size": 7, **settings})

    def processor(self, folder: Path, config: Any, tokenizer: Any) -> Any:
        return reference_molmo.Processor(reference_molmo.Images.from_pretrained(folder), tokenizer)

    def soft(self, config: Any) -> int:
        return N_HEAD + 2

    def run(self, model: Any, tokens: Any, made: list[dict[str, Any]], fps: float | None) -> Run:
        import torch

        places, at = [], torch.nonzero(tokens[0] == self.soft(model.config))[:, 0]
        pictures = [p for m in made for p in m["made"]]
        for _, _, numbers, _ in pictures:
            found = torch.from_numpy(numbers).flatten()
            places.append(torch.where(found >= 0, at[found.clip(0)], -1))
            at = at[int(found.max()) + 1 :]
        inputs = {name: [torch.from_numpy(p[i]) for p in pictures] for i, name in enumerate(("images", "masks"))} | {"places": places}
        x = model.embedded(tokens[0], **inputs)
        features = [x[p[p >= 0].sort().values] for p in places]
        return Run(inputs, features, inputs["images"], [])


TEXT = {"vocab_size": N_HEAD, "embedding_size": N_HEAD, "hidden_size": 96, "intermediate_size": 2 * COMMON["intermediate_size"], "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512, "layer_norm_eps": 1e-6, "rope_theta": 10000.0, "qkv_bias": True,
        "attention_layer_norm": False, "norm_after": False, "vit_layers": [-2, -4], "weight_tying": False, "clip_qkv": None, "layer_norm_type": "rms"}
VISION = {"image_default_input_size": [56, 56], "image_patch_size": 7, "image_emb_dim": 80, "image_num_heads": 4, "image_num_key_value_heads": 4,
          "image_num_layers": 5, "image_mlp_dim": 100, "image_mlp_activations": "quick_gelu", "image_num_pos": 65, "image_norm_eps": 1e-5}
CLIP = {"has_vision_encoder": True, "projector_type": "molmo", "use_silu": False, "use_gelu": False, "hidden_act": "quick_gelu", "image_size": 56,
        "patch_size": 7, "embedding_length": 80, "feed_forward_length": 100, "attention.head_count": 4, "projection_dim": 96, "block_count": 4,
        "resample": 2, "attention.layer_norm_epsilon": np.float32(1e-5), "projector.scale_factor": 2, "preproc_max_tiles": 4, "feature_layer": [4, 2],
        "preproc_overlap_margins": [2, 2], "image_mean": [np.float32(x) for x in MEAN], "image_std": [np.float32(x) for x in STD]}
CLIP_TOKENS = {"image_token_id": "<|image|>", "image_start_token_id": "<im_start>", "image_end_token_id": "<im_end>", "image_row_token_id": "<im_col>"}


def case(kind: str, arch: str, classes: tuple[str, str] = ("MolmoConfig", "MolmoForCausalLM"), base: dict[str, Any] = TEXT, **text: Any) -> Case:
    return Case(kind, arch, *classes, "qwen2", {}, {**base, **text}, VISION, TOKENS, MolmoSight(), cached_as="qwen2",
                converted=Converted({"general.architecture": arch, "tokenizer.chat_template": CONVERTED, "tokenizer.ggml.add_bos_token": True}, clip=CLIP,
                                    clip_tokens=CLIP_TOKENS))


NAMES = {"hidden_size": "d_model", "num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads", "num_hidden_layers": "n_layers",
         "intermediate_size": "mlp_hidden_size"}
TRAINED = {**{NAMES.get(name, name): value for name, value in TEXT.items()}, "qkv_bias": False, "attention_layer_norm": True, "include_bias": False, "rope": True,
           "activation_type": "swiglu", "moe_num_experts": 9, "moe_top_k": 3, "rope_impl": "cockatoo"}
E = ("MolmoEConfig", "OLMoForCausalLM"), TRAINED

CASES = (case("molmo", "qwen2"), case("molmoe", "olmoe", *E), case("molmoe_halves", "olmoe", *E, rope_impl="llama", n_kv_heads=None), case("molmo_o", "olmo2", qkv_bias=False, attention_layer_norm=True, norm_after=True, num_key_value_heads=None))

SIZES = [(61, 47), (30, 300), (300, 17), (9, 11), (400, 500), (112, 112), (56, 56), (90, 1), (28, 28), (131, 28)]      # width, height
RNG = np.random.default_rng(4)
PICTURES = [RNG.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in SIZES]


def test_crops_and_padding(tiny_gguf) -> None:
    path, folder = tiny_gguf("molmo")
    ours, theirs = encoder_of(path), reference_molmo.Images.from_pretrained(folder)
    inverse = np.argsort(ours.order)
    for pixels in PICTURES:
        patches, masks, _, lines = theirs.crops(pixels)
        views = ours.process(Image(pixels)).views
        assert len(views) == len(patches) and ours.n_rows(*pixels.shape[1::-1]) == 16 + lines[0] * lines[1]
        for view, crop, mask in zip(views, patches, masks):
            got = view.inputs["patches"][inverse].reshape(64, 3, 49).swapaxes(1, 2).reshape(64, -1)
            assert np.abs(got - crop).max() <= 2e-6
            assert np.array_equal(view.inputs["padding"][inverse], np.where(mask == 0, 1, np.where(mask < 1, 2, 0)))


def test_the_published_processor_has_the_published_numbers() -> None:
    """Crops of 336 pixels with margins of 4 patches: 672 x 448 pixels take 2 x 3 windows of 16 patches, 20 x 28 rows beside the whole's 144."""
    windows = molmo.grid(672, 448, 224, 112, 12)
    assert windows == (2, 3) and [(n * 16 + 8) // 2 for n in windows] == [20, 28]


def test_floats_are_resized_as_torch_does() -> None:
    import torch

    for pixels in PICTURES:
        for size in ((56, 40), (13, 200), (1, 1)):
            x = pixels.astype(np.float32) / np.float32(255)
            for kind, error in ((torch.float64, 3e-7), (torch.float32, 2e-5)):     # whose weights are as far from exact as places of pixels
                want = torch.nn.functional.interpolate(torch.from_numpy(x).to(kind).permute(2, 0, 1)[None], size, mode="bilinear", antialias=True)
                assert np.abs(resize_floats(x, *size, 2) - want[0].permute(1, 2, 0).numpy()).max() <= error
    with pytest.raises(RequestError, match="resize to 0 x 5"):
        resize_floats(np.zeros((3, 3, 3), np.float32), 5, 0, 2)


def test_options_and_what_is_refused(tiny_gguf) -> None:
    path, folder = tiny_gguf("molmo")
    model = pe.load(path, n_ctx=200, kv_dtype="f32")
    assert len(model.encode_image(PICTURES[4])) == 16 + 6 * 6 and len(model.encode_image(pe.open_image(PICTURES[4], max_crops=1))) == 16 + 16
    same(model.logits([5, pe.open_image(PICTURES[4], max_crops=2), 6]), tiny.hf_seen(folder, [5, PICTURES[4], 6], max_crops=2).logits)
    for media, text in [(pe.open_image(PICTURES[0], max_crops=5), "from 1 to 4"), (pe.open_image(PICTURES[0], max_tiles=2), "has max_crops"),
                        ([PICTURES[0]] * 2, "not videos")]:
        with pytest.raises(RequestError, match=text):
            model.encode_image(media)
    with pytest.raises(ContextOverflowError, match="takes 66 positions, but the context holds 60"):
        pe.load(path, n_ctx=60).encode_image(PICTURES[4])
    with pytest.raises(RequestError, match="outside the vocabulary"):
        model.logits([N_HEAD + 128])
    assert model.logits([N_HEAD + 127]).shape == (1, N_HEAD)                       # read, but never written


def test_a_file_of_its_own_for_the_encoder(tiny_gguf, tmp_path) -> None:
    path, folder = tiny_gguf("molmo_o")
    text = convert(folder, tmp_path / "m.gguf", "f32", split_mmproj=True)
    prompt = ["what ", LONG, " is it"]
    assert np.array_equal(pe.load(text, mmproj=tmp_path / "mmproj-m.gguf", n_ctx=128).logits(prompt), pe.load(path, n_ctx=128).logits(prompt))


@pytest.mark.parametrize("changes, text", [
    ({"norm_after": True}, "'norm_after' is True and 'attention_layer_norm' False"), ({"clip_qkv": 8.0}, "'clip_qkv' is 8.0"),
    ({"weight_tying": True}, "'weight_tying' is True"), ({"moe_num_experts": 64}, "'moe_num_experts' is 64"),
    ({"image_pooling_2d": "stack"}, "'image_pooling_2d' is 'stack'"), ({"layer_norm_type": "default"}, "'layer_norm_type' is 'default'"),
    ({"vision_backbone": {**VISION, "image_num_pos": 64}}, "'image_num_pos' is 64"),
    ({"vision_backbone": {**VISION, "image_model_type": "siglip"}}, "'image_model_type' is 'siglip'")])
def test_what_cannot_be_converted(tmp_path, changes: dict[str, Any], text: str) -> None:
    folder = make_checkpoint("molmo", tmp_path / "c")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UnsupportedModelError, match=text):
        convert(folder, tmp_path / "m.gguf")


@pytest.mark.parametrize("changes, text", [
    ({"norm_after": True}, "this converter knows the second alone, with experts"), ({"include_bias": True}, "'include_bias' is True"),
    ({"moe_shared_expert": True}, "'moe_shared_expert' is True"), ({"vision_backbone": None}, "a text model alone"), ({"moe_num_experts": 0}, "moe_num_experts")])
def test_what_cannot_be_converted_of_molmoe(tmp_path, changes: dict[str, Any], text: str) -> None:
    folder = make_checkpoint("molmoe", tmp_path / "c")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises((UnsupportedModelError, InvalidModelError), match=text):
        convert(folder, tmp_path / "m.gguf")


@pytest.mark.parametrize("changes, text", [
    ({"overlap_margins": [3, 3]}, "'overlap_margins'"), ({"base_image_input_size": [336, 336]}, "encoder of 56 pixels"),
    ({"image_padding_mask": False}, "'image_padding_mask'"), ({"image_token_length_w": 12}, "'image_token_length_w'")])
def test_processors_that_cannot_be_converted(tmp_path, changes: dict[str, Any], text: str) -> None:
    folder = make_checkpoint("molmo", tmp_path / "c", processor=changes)
    with pytest.raises(UnsupportedModelError, match=text):
        convert(folder, tmp_path / "m.gguf")


def test_points_of_an_answer(tiny_gguf) -> None:
    """Percent of the picture that was sent, whatever crops were made of it."""
    model = pe.load(tiny_gguf("molmo")[0], n_ctx=256)
    answer = model.chat([{"role": "user", "content": [{"type": "image", "image": A}, {"type": "image", "image": picture(50, 200)}, "where?"]}], max_tokens=1)
    said = type(answer)('See <points x1="10.0" y1="50.0" x2="95.5" y2="4" alt="two dogs">dogs</points>, <point x="50" y="25" alt="a cat">cat</point>',
                        answer.report)
    assert [(p.label, p.x, p.y, p.image) for p in said.points] == [("dogs", 20.0, 25.0, 1), ("dogs", 191.0, 2.0, 1), ("cat", 100.0, 12.5, 1)]
    assert said.boxes == said.points and [p.x for p in said.boxes_in(0)] == [8.0, 76.4, 40.0] and B.size != A.size
    assert replace(said.points[0], image=0) != said.points[0]


def test_crops_as_published(tmp_path) -> None:
    """Crops of 336 pixels in patches of 14, margins of 4 patches, up to 12 of them, in a small model."""
    processor = {"max_crops": 12, "overlap_margins": [4, 4], "base_image_input_size": [336, 336], "image_token_length_w": 12, "image_token_length_h": 12,
                 "image_patch_size": 14}
    folder = make_checkpoint("molmo", tmp_path / "c", processor=processor, vision_config={"image_default_input_size": [336, 336], "image_patch_size": 14,
                                                                                       "image_num_pos": 577}, text_config={"max_position_embeddings": 4096})
    model = pe.load(convert(folder, tmp_path / "m.gguf", "f32"), n_ctx=1024, kv_dtype="f32")
    prompt = ["see ", picture(500, 700, 3), " it"]
    want = tiny.hf_seen(folder, prompt)
    same(model.encode_image(prompt[1]), want.features[0])
    same(model.logits(prompt), want.logits)
    assert len(want.features[0]) == 144 + 20 * 28                                  # 2 x 3 windows
