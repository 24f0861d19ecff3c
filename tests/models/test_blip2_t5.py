"""BLIP-2 and InstructBLIP with Flan-T5 against transformers: a picture's rows stand before the text in the encoder of an encoder-decoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import pyengine as pe
import test_blip2 as blip2
import test_instructblip as instructblip
import tiny
from cases import Case
from converters import convert
from converters.blip_2 import READS
from hollow import Decoder, Full, Tensor
from pictures import A, B, same
from pyengine.errors import RequestError
from tiny_sources import save_unigram

try:
    import transformers
except ImportError:         # the cases are found without it
    transformers = None

pytestmark = pytest.mark.skipif(transformers is None, reason="needs transformers and torch: pip install -r requirements/test.txt")

TEXT = {"model_type": "t5", "vocab_size": 512, "d_model": 56, "d_kv": 20, "d_ff": 88, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 3,
        "relative_attention_num_buckets": 16, "relative_attention_max_distance": 40, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0,
        "tie_word_embeddings": False}
ENDS = {"eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0}        # a caption begins behind what T5's texts end with
KINDS = {"blip2": ("Blip2", blip2.CASES[0]), "instructblip": ("InstructBlip", instructblip.CASES[0])}
QUESTION = "Question: what is in the picture? Answer:"


@dataclass
class Made:
    """A checkpoint, its file, transformers' model and processor."""

    folder: Path
    path: Path
    theirs: Any
    processor: Any

    def inputs(self, text: str, picture: Any = A) -> Any:
        return self.processor(images=[picture], text=text, return_tensors="pt")


def soften(file: Path) -> None:
    """Make T5's random queries as small as trained ones are, whose scores are not scaled."""
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    save_file({name: w * TEXT["d_kv"] ** -0.5 if name.startswith("language_model.") and ".q." in name else w for name, w in weights.items()}, file,
              {"format": "pt"})


@pytest.fixture(scope="module", params=KINDS)
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    family, other = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param) / "hf"
    folder.mkdir()
    save_unigram(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    case = Case(request.param, "t5", other.config_class, other.model_class, "", other.config, TEXT, blip2.VISION, blip2.TOKENS, other.sight)
    tiny.make_checkpoint(case, folder, tokenizer=None, text_config=ENDS, image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    soften(folder / "model.safetensors")
    theirs = getattr(transformers, other.model_class).from_pretrained(folder, attn_implementation="eager").eval()
    processor = other.sight.processor(folder, theirs.config, tokenizer)
    return Made(folder, convert(folder, folder.parent / "model.gguf", "f32"), theirs, processor)


@pytest.fixture(scope="module")
def model(made: Made) -> Any:
    with pe.load(made.path, n_ctx=256, kv_dtype="f32") as loaded:
        yield loaded


@pytest.mark.parametrize("text", ["", QUESTION, "a dog and a fox in the snow " * 3])
def test_encoder_and_decoder_at_every_position(made: Made, model: Any, text: str) -> None:
    """Rows of the picture, the text, and what ends it; the bias by distance goes through all of them."""
    import torch

    inputs = made.inputs(text)
    ids = [0, 30, 12, 7, 99, 5]
    with torch.no_grad():
        out = made.theirs(**inputs, decoder_input_ids=torch.tensor([ids]), output_hidden_states=True)
    read = inputs["input_ids"][0].tolist()
    assert read[blip2.N_QUERIES:] == model.tokenize(text) and read[-1] == 1
    source = [A, text, 1] if text else [A, 1]
    same(model.logits(ids, source=source), out.logits[0].numpy())
    same(model.hidden(source), out.language_model_outputs.encoder_last_hidden_state[0].numpy())


def test_captions_and_answers_go_on_as_transformers(made: Made, model: Any) -> None:
    import torch

    for text in ("", QUESTION, "what is it"):
        inputs = made.inputs(text)
        alone = {name: inputs[name] for name in ("pixel_values", "qformer_input_ids") if name in inputs} if not text else inputs
        with torch.no_grad():
            want = made.theirs.generate(**alone, max_new_tokens=10, do_sample=False, num_beams=1)[0].tolist()[1:]
        answer = model.generate(text, images=[A], max_tokens=10, temperature=0)
        want = want[: want.index(1)] if 1 in want else want
        assert len(want) > 1 and answer.tokens[: len(want)] == want
        assert answer.media[0].n_tokens == blip2.N_QUERIES
    other = model.generate(QUESTION, images=[B], max_tokens=10, temperature=0)
    assert other.media[0].digest != answer.media[0].digest


def test_beams_find_what_transformers_finds(made: Made, model: Any) -> None:
    import torch

    with torch.no_grad():
        want = made.theirs.generate(**made.inputs(QUESTION), max_new_tokens=8, do_sample=False, num_beams=3)[0].tolist()[1:]
    answer = model.generate(QUESTION, images=[A], max_tokens=8, n_beams=3)
    want = want[: want.index(1)] if 1 in want else want
    assert len(want) > 1 and answer.tokens[: len(want)] == want


def test_conversations(made: Made, model: Any) -> None:
    """One question, in the form that the authors have for each model."""
    messages = [{"role": "user", "content": [{"type": "image", "image": A}, {"type": "text", "text": "what is in the picture?"}]}]
    asked = "what is in the picture?" if (made.folder / READS).exists() else QUESTION
    said, plain = (model.chat(messages, max_tokens=6, temperature=0), model.generate(asked, images=[A], max_tokens=6, temperature=0))
    assert said.tokens == plain.tokens and len(plain.tokens) > 1


def test_maps_of_attention(made: Made, model: Any) -> None:
    assert list(model.attention(A)) == ["qformer.0", "qformer.2", "qformer.4"]
    with pytest.raises(RequestError, match="source="):
        model.logits([A, "what"])


def test_text_alone(made: Made, model: Any) -> None:
    import torch

    ids, source = [0, 30, 12], [9, 30, 12, 7, 1]
    with torch.no_grad():
        want = made.theirs.language_model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([ids])).logits[0].numpy()
    same(model.logits(ids, source=source), want)


@dataclass(frozen=True)
class T5Decoder(Decoder):
    """Both halves of Flan-T5: gated feed-forwards, a bias by distance in the first layer of each, a head of its own."""

    def tensors(self, dtype: str) -> Iterator[Tensor]:
        d, width, f = self.d_model, self.n_heads * self.head_dim, self.d_ff
        yield "token_embd.weight", (self.vocab_size, d), dtype
        yield "output.weight", (self.vocab_size, d), dtype
        for half, parts in (("enc", ("attn",)), ("dec", ("attn", "cross_attn"))):
            yield f"{half}.output_norm.weight", (d,), "F32"
            yield f"{half}.blk.0.attn_rel_b.weight", (32, self.n_heads), "F32"
            for b in (f"{half}.blk.{i}" for i in range(self.n_layers)):
                for name in parts:
                    yield from ((f"{b}.{name}_{part}.weight", (width, d), dtype) for part in "qkv")
                    yield f"{b}.{name}_o.weight", (d, width), dtype
                for name, shape in (("ffn_gate", (f, d)), ("ffn_up", (f, d)), ("ffn_down", (d, f))):
                    yield f"{b}.{name}.weight", shape, dtype
                yield from ((f"{b}.{name}_norm.weight", (d,), "F32") for name in (*parts, "ffn"))


def test_blip2_flan_t5_xl(tmp_path: Path, machine: Any) -> None:
    """24 layers a half with 32 heads of 64; 32 rows a picture."""
    machine(32 * 2**30)
    decoder = T5Decoder("t5", 24, 2048, 5120, 32, 32, 64, 32128, 512, keys={
        "decoder_block_count": 24, "attention.relative_buckets_count": 32, "decoder_start_token_id": 0})
    path, mmproj = Full(decoder, ("<pad>", "</s>", "<image>"), blip2.full_encoder).write(tmp_path, "blip2-flan-t5-xl")
    plan = pe.plan(path, n_ctx=512, mmproj=mmproj)
    caches = [i.nbytes for i in plan.items if i.purpose == "kv" and i.layer is not None]
    assert plan.fits and plan.picture == 32 and caches == [plan.n_seq * 512 * 32 * 64 * 2 * 2] * 48      # each layer's own, and across
