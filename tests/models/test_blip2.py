"""BLIP-2 against transformers: pixels, every hidden state, maps of attention, soft tokens before BOS, captions and answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyengine as pe
import tiny
from cases import Case, Converted, Tokens
from converters import convert
from converters.blip_2 import TEMPLATE
from hollow import both, Encoder, Full, kv, PlainDecoder, Tensor
from oracle import encoder_of
from pictures import A, B, DOT, LONG, same, THIN
from pyengine.backends import backend
from pyengine.errors import RequestError, UnsupportedModelError
from pyengine.graph.graph import Graph
from sight import of_any_backend, Run, Seen, Sight

try:
    import transformers
except ImportError:         # the cases are found without it
    transformers = None

pytestmark = pytest.mark.skipif(transformers is None, reason="needs transformers and torch: pip install -r requirements/test.txt")

N_QUERIES = 5
TOKENS = Tokens(("</s>", "<pad>", "<image>"), "</s>", "</s>", "<pad>", TEMPLATE, {"image_token_index": "<image>"})


class Blip2Sight(Sight):
    """One square of each picture, before all of the text."""

    model_types, marker = ("blip-2",), ""

    def images(self, config: Any, settings: dict[str, Any]) -> Any:
        side = config.vision_config.image_size
        return transformers.BlipImageProcessorPil(**{"size": {"height": side, "width": side}, **settings})

    def processor(self, folder: Path, config: Any, tokenizer: Any) -> Any:
        images = transformers.BlipImageProcessorPil.from_pretrained(folder)
        return of_any_backend(transformers.Blip2Processor)(images, tokenizer, num_query_tokens=config.num_query_tokens)

    def chat(self, processor: Any, text: str, pictures: Sequence[Any]) -> list[int]:
        """The processor knows one picture: the others' rows are added."""
        ids = processor(text=text.replace("<image>", ""), images=[pictures[0]])["input_ids"][0]
        return [ids[0]] * N_QUERIES * (len(pictures) - 1) + ids

    def run(self, model: Any, tokens: Any, made: list[dict[str, Any]], fps: float | None) -> Run:
        import torch

        inputs = {"pixel_values": torch.cat([m["pixel_values"] for m in made])}
        return Run(inputs, list(model.get_image_features(**inputs).pooler_output), list(inputs["pixel_values"]), [])

    def seen(self, model: Any, folder: Path, parts: Any, fps: float | None, **settings: Any) -> Seen:
        """Without a picture its text model is asked."""
        if all(isinstance(p, (int, str)) for p in parts):
            ids = [i for p in parts for i in ([p] if isinstance(p, int) else self.tokens(folder, p))]
            import torch

            with torch.no_grad():
                return Seen(ids, model.language_model(torch.tensor([ids])).logits[0].numpy(), [], [], [])
        return super().seen(model, folder, parts, fps, **settings)

    def tokens(self, folder: Path, text: str) -> list[int]:
        return transformers.AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]


def weighted(name: str, n_out: int, n_in: int) -> list[Tensor]:
    """A product with a bias."""
    return [(f"{name}.weight", (n_out, n_in), "F16"), (f"{name}.bias", (n_out,), "F32")]


def full_encoder(d_model: int) -> Encoder:
    """BLIP-2's: ViT-g of 39 layers over 16 x 16 patches, a Q-Former as large as BERT base."""
    v, v_ff, n_layers, q, q_ff = 1408, 6144, 39, 768, 3072
    keys: dict[str, Any] = {
        "has_vision_encoder": True, "projector_type": "blip2", "vision.hidden_act": "gelu", "vision.image_size": 224, "vision.patch_size": 14,
        "vision.block_count": n_layers, "vision.embedding_length": v, "vision.feed_forward_length": v_ff, "vision.attention.head_count": 16,
        "vision.projection_dim": d_model, "vision.attention.layer_norm_epsilon": 1e-6, "vision.qformer.block_count": 12, "vision.qformer.query_count": 32,
        "vision.qformer.embedding_length": q, "vision.qformer.feed_forward_length": q_ff, "vision.qformer.attention.head_count": 12,
        "vision.qformer.cross_attention_frequency": 2, "vision.qformer.attention.layer_norm_epsilon": 1e-12}
    tensors: list[Tensor] = [("v.patch_embd.weight", (v, 3, 14, 14), "F16"), ("v.patch_embd.bias", (v,), "F32"), ("v.class_embd", (v,), "F32"),
                             ("v.position_embd.weight", (257, v), "F32"), *both("v.post_ln", v), ("mm.proj_query", (32, q), "F32"),
                             *both("mm.proj_norm", q), *weighted("mm.proj_linear", d_model, q)]
    for i in range(n_layers):
        b = f"v.blk.{i}."
        tensors += [*both(f"{b}ln1", v), *both(f"{b}ln2", v), *weighted(f"{b}attn_qkv", 3 * v, v), *weighted(f"{b}attn_out", v, v),
                    *weighted(f"{b}ffn_up", v_ff, v), *weighted(f"{b}ffn_down", v, v_ff)]
    for i in range(12):
        b = f"mm.proj_blk.{i}."
        for name, width in (("self_attn", q), *([] if i % 2 else [("cross_attn", v)])):
            tensors += [*(t for part, n in (("q", q), ("k", width), ("v", width), ("out", q)) for t in weighted(f"{b}{name}_{part}", q, n)),
                        *both(f"{b}{name}_norm", q)]
        tensors += [*weighted(f"{b}ffn_up", q_ff, q), *weighted(f"{b}ffn_down", q, q_ff), *both(f"{b}ffn_norm", q)]
    return {f"clip.{name}": value for name, value in keys.items()}, tensors


TEXT = {"model_type": "opt", "vocab_size": 512, "hidden_size": 96, "word_embed_proj_dim": 96, "ffn_dim": 160, "num_hidden_layers": 3,
        "num_attention_heads": 6, "max_position_embeddings": 512}
VISION = {"hidden_size": 80, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 45, "patch_size": 14}
QFORMER = {"hidden_size": 60, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 5, "cross_attention_frequency": 2}
OPT_2_7B = PlainDecoder("opt", 32, 2560, 10240, 32, 32, 80, 50304, 2048, tied=True, positions=True,
                      keys={"attention.layer_norm_epsilon": 1e-5, "pre_norm": True, "hidden_activation": "relu"})

CASES = (Case(
    "blip2", "opt", "Blip2Config", "Blip2ForConditionalGeneration", "gpt-2", {"num_query_tokens": N_QUERIES, "qformer_config": QFORMER},
    TEXT, VISION, TOKENS, Blip2Sight(), cached_as="llama",
    converted=Converted(
        {"general.architecture": "opt", "opt.pre_norm": True, "tokenizer.chat_template": TEMPLATE},
        clip={"has_vision_encoder": True, "projector_type": "blip2", "use_gelu": True, "use_silu": False, "hidden_act": "gelu", "image_size": 45,
              "patch_size": 14, "embedding_length": 80, "feed_forward_length": 100, "block_count": 3, "attention.head_count": 4, "projection_dim": 96,
              "resample": 3, "attention.layer_norm_epsilon": np.float32(1e-6), "qformer.block_count": 5, "qformer.query_count": 5,
              "qformer.embedding_length": 60, "qformer.feed_forward_length": 96, "qformer.attention.head_count": 5,
              "qformer.cross_attention_frequency": 2, "qformer.attention.layer_norm_epsilon": np.float32(1e-12), "qformer.hidden_act": "gelu",
              "image_mean": [np.float32(x) for x in (0.48145466, 0.4578275, 0.40821073)],
              "image_std": [np.float32(x) for x in (0.26862954, 0.26130258, 0.27577711)]},
        clip_tokens={"image_token_id": "<image>"}),
    full={"blip2-opt-2.7b": Full(OPT_2_7B, ("</s>", "<image>"), full_encoder)}),)


def theirs_of(folder: Path) -> Any:
    import torch

    return transformers.Blip2ForConditionalGeneration.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def pixels_of(folder: Path, picture: Any) -> Any:
    return transformers.BlipImageProcessorPil.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("settings", [{}, {"image_mean": [0.5] * 3, "image_std": [0.2, 0.25, 0.3], "resample": 2}], ids=["usual", "others"])
def test_pixels_are_bit_for_bit_those_of_transformers(tiny_gguf, settings: dict[str, Any]) -> None:
    path, folder = tiny_gguf("blip2", processor=settings)
    ours = encoder_of(path)
    for picture in (A, B, LONG, THIN, DOT):
        (view,) = ours.process(pe.open_image(picture)).views
        seen = view.inputs["patches"].reshape(3, 3, 3, 14, 14).transpose(2, 0, 3, 1, 4).reshape(3, 42, 42)
        assert np.array_equal(seen, pixels_of(folder, picture)[0, :, :42, :42].numpy())


@pytest.mark.parametrize("config", [{}, {"vision_config": {"qkv_bias": False, "hidden_act": "gelu_pytorch_tanh", "image_size": 56}, "qformer_config": {
    **QFORMER, "cross_attention_frequency": 3, "num_hidden_layers": 4, "hidden_act": "relu"}}], ids=["usual", "others"])
def test_every_hidden_state_is_that_of_transformers(tiny_gguf, config: dict[str, Any]) -> None:
    """All rows of the picture behind the norm, the queries behind each layer, what they attended to, and the soft tokens."""
    import torch

    path, folder = tiny_gguf("blip2", **config)
    theirs, pixels = theirs_of(folder), pixels_of(folder, A)
    with torch.no_grad():
        picture = theirs.vision_model(pixels).last_hidden_state
        made = theirs.qformer(query_embeds=theirs.query_tokens, encoder_hidden_states=picture, output_hidden_states=True, output_attentions=True)
        soft = theirs.get_image_features(pixels).pooler_output
    ours = encoder_of(path).encoder
    (view,) = ours.process(pe.open_image(A), None or encoder_of(path).limits).views
    g = Graph()
    rows, states, _ = ours.states(g)
    found = backend("cpu").compile([rows, *states, ours.projection(states[-1])]).run(**view.inputs)
    for got, want in zip(found, [picture, *made.hidden_states, soft], strict=True):
        same(got, want[0].numpy())
    maps = pe.load(path, n_ctx=64).attention(A)
    every = config.get("qformer_config", QFORMER)["cross_attention_frequency"]
    assert list(maps) == [f"qformer.{i}" for i in range(0, len(ours.layers), every)]
    for got, want in zip(maps.values(), made.cross_attentions, strict=True):
        assert got.dtype == np.float32 and got.shape == (5, N_QUERIES, picture.shape[1])
        assert np.abs(got - want[0].numpy()).max() <= 1e-5 and np.allclose(got.sum(-1), 1, atol=1e-5)


def test_maps_are_computed_when_they_are_asked_for(tiny_gguf) -> None:
    """They are a second turn of the encoder's program, and change nothing in the first one."""
    path, _ = tiny_gguf("blip2")
    model = pe.load(path, n_ctx=64)
    rows = model.encode_image(A)
    program = model.media._program
    program.outputs[1][:] = -1
    model.encode_image(B)
    assert np.all(program.outputs[1] == -1) and model.media.prepared.layout.turns[1][0] > 0
    first = model.attention(A)
    assert np.array_equal(model.encode_image(A), rows) and np.array_equal(model.attention(A)["qformer.2"], first["qformer.2"])
    assert not np.array_equal(model.attention(B)["qformer.2"], first["qformer.2"])


def test_captions_and_answers_go_on_as_transformers(tiny_gguf) -> None:
    """Rows of the picture, BOS, the text: with an empty one and with a question."""
    import torch

    path, folder = tiny_gguf("blip2")
    model, theirs = pe.load(path, n_ctx=128, kv_dtype="f32"), theirs_of(folder)
    processor = Blip2Sight().processor(folder, theirs.config, transformers.AutoTokenizer.from_pretrained(folder))
    for text in ("", "Question: how many cats are there? Answer:"):
        made = processor(images=[A], text=text, return_tensors="pt")
        assert made["input_ids"][0].tolist() == [theirs.config.image_token_id] * N_QUERIES + model.tokenize(text)
        alone = {"pixel_values": made["pixel_values"]} if not text else made
        with torch.no_grad():
            want = theirs.generate(**alone, max_new_tokens=12, do_sample=False)[0].tolist()
        answer = model.generate(text, images=[A], max_tokens=12, temperature=0)
        assert answer.n_prompt == N_QUERIES + len(model.tokenize(text))
        assert len(answer.tokens) > 1 and str(answer) == processor.tokenizer.decode(want[answer.n_prompt:], skip_special_tokens=True)
    asked = model.chat_ids([{"role": "user", "content": [{"type": "text", "text": "how many cats are there?"}, {"type": "image", "image": A}]}])
    assert asked == [-1] * N_QUERIES + model.tokenize("Question: how many cats are there? Answer:")
    assert model.chat_ids([{"role": "user", "content": [{"type": "image", "image": A}]}]) == [-1] * N_QUERIES + model.tokenize("")


def test_checkpoints_without_a_token_for_pictures(tmp_path) -> None:
    """Those of before: rows before the text's embeddings, which is the same."""
    folder = tiny.make_checkpoint("blip2", tmp_path / "c")
    convert(folder, tmp_path / "new.gguf", "f32")
    config = json.loads((folder / "config.json").read_text())
    del config["image_token_index"]
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = folder / name
        file.write_text(file.read_text().replace("<image>", "<other>"))
    convert(folder, tmp_path / "old.gguf", "f32")
    old, new = (pe.load(tmp_path / f"{name}.gguf", n_ctx=128) for name in ("old", "new"))
    assert old.media.encoder.markers == {"image": ()}
    prompt = "Question: what? Answer:"
    answers = [m.generate(prompt, images=[A], max_tokens=8, temperature=0) for m in (old, new)]
    assert answers[0].tokens == answers[1].tokens and answers[0].n_prompt == N_QUERIES + len(new.tokenize(prompt))
    messages = [{"role": "user", "content": [{"type": "image", "image": A}, {"type": "text", "text": "what?"}]}]
    assert old.chat_ids(messages) == new.chat_ids(messages)


@pytest.mark.parametrize("part, change, words", [
    ("qformer_config", {"use_qformer_text_input": True}, "'use_qformer_text_input' is True"),
    ("text_config", {"model_type": "gpt2"}, "the text model is 'gpt2'"),
    ("text_config", {"word_embed_proj_dim": 48}, "'word_embed_proj_dim' is 48"),
    ("vision_config", {"image_size": 56}, "'size' is .* for an encoder of 56 pixels")])
def test_configs_that_are_refused(tmp_path, part: str, change: dict[str, Any], words: str) -> None:
    folder = tiny.make_checkpoint("blip2", tmp_path / "c")
    config = json.loads((folder / "config.json").read_text())
    config[part] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=words):
        convert(folder, tmp_path / "m.gguf", "f32")


def test_what_a_request_is_refused(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("blip2")[0], n_ctx=64)
    for media, words in ((pe.open_image(A, max_tiles=2), "max_tiles"), ([A] * 2, "not videos")):
        for ask in (model.encode_image, model.attention):
            with pytest.raises(RequestError, match=words):
                ask(media)
    with pytest.raises(UnsupportedModelError, match="no maps of attention"):
        pe.load(tiny_gguf("llava")[0], n_ctx=64).attention(A)
    with pytest.raises(UnsupportedModelError, match="no image encoder"):
        pe.load(tiny_gguf("opt")[0], n_ctx=64).attention(A)


def test_blip2_opt_2_7b(full_size, machine) -> None:
    """32 layers with 32 heads of 80; 32 rows a picture; 3.74 thousand million weights."""
    machine(32 * 2**30)
    path, mmproj = full_size("blip2-opt-2.7b")
    plan = pe.plan(path, n_ctx=2048, mmproj=mmproj)
    assert kv(plan) == {"Full": 2048 * 32 * 32 * 80 * 2 * 2} and plan.picture == 32
    encoder = encoder_of(path, mmproj)
    assert encoder.n_rows(640, 480) == 32 and encoder.maps == tuple(f"qformer.{i}" for i in range(0, 12, 2))
