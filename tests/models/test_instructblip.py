"""InstructBLIP against transformers: a Q-Former that reads the prompt's text, in a vocabulary of its own, beside Vicuna and OPT."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest

import pyengine as pe
import test_blip2 as blip2
import tiny
from cases import Case, Converted, Tokens
from converters import convert
from converters.blip_2 import READS
from converters.vision import ONE_INSTRUCTION
from hollow import both, Decoder, Encoder, Full, kv
from oracle import encoder_of
from pictures import A, B, same
from pyengine.backends import backend
from pyengine.errors import InvalidModelError, RequestError
from pyengine.graph.graph import Graph
from sight import load_processor, of_any_backend, Run, Seen
from tiny import COMMON
from tiny_towers import save_word_piece

try:
    import transformers
except ImportError:         # the cases are found without it
    transformers = None

pytestmark = pytest.mark.skipif(transformers is None, reason="needs transformers and torch: pip install -r requirements/test.txt")

N_QUERIES, N_WORDS = blip2.N_QUERIES, 160
TOKENS = Tokens(("<s>", "</s>", "<pad>", "<image>"), "<s>", "</s>", "<pad>", ONE_INSTRUCTION, {"image_token_index": "<image>"})


class Saved:
    """An image processor, and the vocabulary that a checkpoint has beside its own."""

    def __init__(self, images: Any):
        self.images = images

    def save_pretrained(self, folder: Path) -> None:
        self.images.save_pretrained(folder)
        (folder / READS).mkdir()
        save_word_piece(folder / READS, N_WORDS)


class InstructSight(blip2.Blip2Sight):
    """As BLIP-2's; the text of a prompt is read by the Q-Former too. Soft tokens are those of a picture without text."""

    model_types = ("instructblip",)

    def images(self, config: Any, settings: dict[str, Any]) -> Any:
        return Saved(super().images(config, settings))

    def processor(self, folder: Path, config: Any, tokenizer: Any) -> Any:
        images = transformers.BlipImageProcessorPil.from_pretrained(folder)
        own = transformers.AutoTokenizer.from_pretrained(folder / READS)
        return of_any_backend(transformers.InstructBlipProcessor)(images, tokenizer, own, num_query_tokens=config.num_query_tokens)

    def seen(self, model: Any, folder: Path, parts: Any, fps: float | None, **settings: Any) -> Seen:
        self.read = load_processor(self, folder, model.config).qformer_tokenizer
        self.text = "".join(p for p in parts if isinstance(p, str))
        return super().seen(model, folder, parts, fps, **settings)

    def run(self, model: Any, tokens: Any, made: list[dict[str, Any]], fps: float | None) -> Run:
        import torch

        pixels = torch.cat([m["pixel_values"] for m in made])
        words, none = (torch.tensor([self.read(text)["input_ids"]] * len(pixels)) for text in (self.text, ""))
        return Run({"pixel_values": pixels, "qformer_input_ids": words}, list(model.get_image_features(pixels, none).pooler_output), list(pixels), [])


def full_encoder(d_model: int) -> Encoder:
    """BLIP-2's, with BERT's vocabulary and a feed-forward of text in all layers but the last."""
    keys, tensors = blip2.full_encoder(d_model)
    tensors += [("mm.token_embd.weight", (30523, 768), "F32"), ("mm.position_embd.weight", (512, 768), "F32")]
    for i in range(11):
        b = f"mm.proj_blk.{i}.ffn_text"
        tensors += [*blip2.weighted(f"{b}_up", 3072, 768), *blip2.weighted(f"{b}_down", 768, 3072), *both(f"{b}_norm", 768)]
    return {**keys, "clip.projector_type": "instructblip"}, tensors


# tokens themselves are compared by what texts become
WORDS = {"model": "bert", "pre": "default", "tokens": ANY, "token_type": ANY, "unknown_token_id": 5, "seperator_token_id": 3, "padding_token_id": 4,
         "mask_token_id": 6, "bos_token_id": 7, "add_bos_token": True, "add_eos_token": False, "max_input_chars_per_word": 100,
         "normalizer.lowercase": True, "normalizer.strip_accents": True}
TEXT = {**COMMON, "model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 512}
CASES = (Case(
    "instructblip", "llama", "InstructBlipConfig", "InstructBlipForConditionalGeneration", "spm",
    {"num_query_tokens": N_QUERIES, "qformer_config": {**blip2.QFORMER, "vocab_size": N_WORDS, "max_position_embeddings": 90}}, TEXT,
    blip2.VISION, TOKENS, InstructSight(), cached_as="llama",
    messages=[{"role": "user", "content": [{"type": "image", "image": A}, {"type": "text", "text": "what is unusual in it?\n"}]}],
    converted=Converted(
        {"general.architecture": "llama", "tokenizer.chat_template": ONE_INSTRUCTION},
        clip={**blip2.CASES[0].converted.clip, "projector_type": "instructblip",
              **{f"qformer.tokenizer.ggml.{name}": value for name, value in WORDS.items()}}, clip_tokens={"image_token_id": "<image>"}),
    full={"instructblip-vicuna-7b": Full(Decoder("llama", 32, 4096, 11008, 32, 32, 128, 32001, 2048), ("<unk>", "</s>", "<image>"), full_encoder)}),)


@pytest.mark.parametrize("text", ["", "What is in the picture? It's a dog - and snow.", "fox " * 80])
def test_every_hidden_state_is_that_of_transformers(tiny_gguf, text: str) -> None:
    """The queries and the text behind each layer, what the queries attended to, and the soft tokens."""
    import torch

    path, folder = tiny_gguf("instructblip")
    theirs = transformers.InstructBlipForConditionalGeneration.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder / READS)(text)["input_ids"]
    pixels, ids = blip2.pixels_of(folder, A), torch.tensor([words])
    with torch.no_grad():
        picture = theirs.vision_model(pixels).last_hidden_state
        made = theirs.qformer(input_ids=ids, query_embeds=theirs.query_tokens, encoder_hidden_states=picture, output_hidden_states=True,
                              output_attentions=True)
        soft = theirs.get_image_features(pixels, ids).pooler_output
    ours, model = encoder_of(path), pe.load(path, n_ctx=128)
    assert model.media.language.tokenizer.tokenize(text) == words
    (view,) = ours.encoder.process(pe.open_image(A), ours.limits._replace(words=tuple(words))).views
    g = Graph()
    rows, states, _ = ours.states(g)
    found = backend("cpu").compile([rows, *states, ours.projection(states[-1])]).run(**view.inputs)
    wanted = [picture, *made.hidden_states[:-1], made.hidden_states[-1][:, :N_QUERIES], soft]
    for got, want in zip(found, wanted, strict=True):
        same(got, want[0].numpy())
    maps = model.attention([A, text]) if text else model.attention(A)
    assert list(maps) == ["qformer.0", "qformer.2", "qformer.4"]
    for got, want in zip(maps.values(), made.cross_attentions, strict=True):
        assert got.shape == (5, N_QUERIES, 10) and np.abs(got - want[0].numpy()).max() <= 1e-5


def test_instructions_go_on_as_transformers(tiny_gguf) -> None:
    import torch

    path, folder = tiny_gguf("instructblip")
    model = pe.load(path, n_ctx=128, kv_dtype="f32")
    theirs = transformers.InstructBlipForConditionalGeneration.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    processor = InstructSight().processor(folder, theirs.config, transformers.AutoTokenizer.from_pretrained(folder))
    rows = []
    for text in ("what is unusual in it?", "a fox"):
        made = processor(images=[A], text=text, return_tensors="pt")
        with torch.no_grad():
            want = theirs.generate(**made, max_new_tokens=12, do_sample=False)[0].tolist()
        answer = model.generate(text, images=[A], max_tokens=12, temperature=0)
        prompt = made["input_ids"][0].tolist()
        assert answer.n_prompt == len(prompt) == N_QUERIES + len(model.tokenize(text)) and not answer.media[0].cached
        assert len(answer.tokens) > 1 and answer.tokens == want[len(prompt):][: len(answer.tokens)]
        same(model.logits([A, *prompt[N_QUERIES:]]), hf_logits(theirs, made))
        rows.append(model.generate(text, images=[A], max_tokens=1, temperature=0).media[0])
    assert rows[0].cached and rows[0].digest != rows[1].digest


def hf_logits(model: Any, made: Any) -> np.ndarray:
    """Logits of a prompt whose text is ids, of which the Q-Former reads nothing."""
    import torch

    none = torch.tensor([[7, 3]])                          # [CLS] [SEP]
    with torch.no_grad():
        return model(input_ids=made["input_ids"], pixel_values=made["pixel_values"], qformer_input_ids=none).logits[0].numpy()


def test_what_is_refused(tiny_gguf, tmp_path) -> None:
    model = pe.load(tiny_gguf("instructblip")[0], n_ctx=256)
    with pytest.raises(RequestError, match="92 words of its own for a picture, and has positions for 90"):
        model.generate("fox " * 90, images=[A], max_tokens=1)
    with pytest.raises(RequestError, match="one picture and texts, got 2 pictures"):
        model.attention([A, "and", B])
    with pytest.raises(Exception, match="one instruction"):
        model.chat([{"role": "system", "content": "be kind"}, {"role": "user", "content": "what?"}])
    folder = tiny.make_checkpoint("instructblip", tmp_path / "c")
    for file in (folder / READS).iterdir():
        file.unlink()
    with pytest.raises(InvalidModelError, match="no BERT vocabulary"):
        convert(folder, tmp_path / "m.gguf", "f32")


def test_beside_opt_in_two_files(tmp_path) -> None:
    """The Q-Former's vocabulary lies in the encoder's file."""
    folder = tiny.make_checkpoint("instructblip", tmp_path / "c", text_config=blip2.TEXT)
    convert(folder, tmp_path / "one.gguf", "f32")
    convert(folder, tmp_path / "two.gguf", "f32", split_mmproj=True)
    mmproj = next(p for p in tmp_path.glob("*mmproj*"))
    one, two = pe.load(tmp_path / "one.gguf", n_ctx=64, kv_dtype="f32"), pe.load(tmp_path / "two.gguf", n_ctx=64, kv_dtype="f32", mmproj=mmproj)
    prompt = [A, "what is it?"]
    assert np.array_equal(one.logits(prompt), two.logits(prompt))
    same(one.logits(prompt), tiny.hf_seen(folder, prompt).logits)


def test_instructblip_vicuna_7b(full_size, machine) -> None:
    """32 layers with 32 heads of 128; the encoder's run has room for 512 words beside the 32 queries."""
    machine(32 * 2**30)
    path, mmproj = full_size("instructblip-vicuna-7b")
    plan = pe.plan(path, n_ctx=2048, mmproj=mmproj)
    assert kv(plan) == {"Full": 2048 * 32 * 32 * 128 * 2 * 2} and plan.picture == 32
    assert encoder_of(path, mmproj).words.most == 512
