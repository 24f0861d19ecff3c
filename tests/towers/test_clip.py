"""CLIP and MetaCLIP 2: ids, hidden states, vectors, similarities against transformers; clip.cpp's files; what a published one counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import hollow
import numpy as np
import pytest
import tiny_towers

import pyengine as pe
from converters.tokenizer import read_vocabulary
from converters.writer import convert
from pyengine.errors import ContextOverflowError, InvalidModelError, RequestError, UnsupportedModelError
from pyengine.files.dialects import is_projector
from pyengine.files.gguf import GGUFFile
from pyengine.text.words import merges_of, WordBpe


TINY = {"clip": lambda folder: tiny_towers.save_clip(folder, "quick_gelu", tiny_towers.CLIP_NEW)}


@pytest.fixture(scope="module", params=["quick_gelu, old files", "gelu"])
def folder(request: Any, tmp_path_factory: Any) -> Path:
    old = request.param != "gelu"
    act, images, end = ("quick_gelu", tiny_towers.CLIP_OLD, 2) if old else ("gelu", tiny_towers.CLIP_NEW, None)
    return tiny_towers.save_clip(tmp_path_factory.mktemp("clip") / "m", act, images, end, files=old)


@pytest.fixture(scope="module")
def model(folder: Path, tmp_path_factory: Any) -> Any:
    with pe.load(convert(folder, tmp_path_factory.mktemp("gguf") / "clip.gguf", "f32")) as loaded:
        yield loaded


def test_ids_are_those_of_transformers(model: Any, folder: Path) -> None:
    from transformers import CLIPTokenizer

    words = CLIPTokenizer.from_pretrained(folder)
    for text in (*tiny_towers.TEXTS, *tiny_towers.HARD):
        assert model.tokenize(text) == words(text)["input_ids"], text
    assert model.detokenize(model.tokenize("Two  Cats, a dog!", add_special=False)) == "two cats , a dog !"


def test_pictures_are_those_of_transformers(model: Any, folder: Path) -> None:
    theirs, pixels = tiny_towers.reference("CLIPModel", folder), tiny_towers.processor("CLIPImageProcessorPil", folder)
    for picture in tiny_towers.pictures():
        out = theirs.vision_model(pixels(picture))
        tiny_towers.close(model.hidden(picture), out.last_hidden_state[0])                 # the class token, and before the last norm
        want = theirs.visual_projection(out.pooler_output)[0]
        tiny_towers.close(model.embed(picture, normalize=False), want)
        tiny_towers.close(model.embed(picture, pooling="cls", normalize=False), out.last_hidden_state[0, 0])
        tiny_towers.close(model.embed([picture])[0], want / want.norm())


def test_texts_are_those_of_transformers(model: Any, folder: Path) -> None:
    import torch

    theirs = tiny_towers.reference("CLIPModel", folder)
    for text in (t for t in (*tiny_towers.TEXTS, *tiny_towers.HARD[:8]) if len(model.tokenize(t)) <= 77):
        out = theirs.text_model(torch.tensor([model.tokenize(text)]))
        tiny_towers.close(model.hidden(text), out.last_hidden_state[0])
        tiny_towers.close(model.embed(text, normalize=False), theirs.text_projection(out.pooler_output)[0])
        tiny_towers.close(model.embed(text, pooling="eos", normalize=False), out.pooler_output[0])
    texts = ["a dog", "the quick brown fox", "", "dog " * 20]
    assert all(np.array_equal(row, model.embed(text)) for row, text in zip(model.embed(texts), texts))


def test_the_end_token_is_found_by_the_rule_of_the_configuration(model: Any, folder: Path) -> None:
    import torch

    theirs, end = tiny_towers.reference("CLIPModel", folder), model.tokenize("")[-1]
    for ids in ([5, 9, 300, 4], [end, 7, end, 8], [6, 300, end - 1, 2, end, 9]):           # without the end token, with it twice, and in the middle
        tiny_towers.close(model.embed([ids], normalize=False)[0], theirs.text_projection(theirs.text_model(torch.tensor([ids])).pooler_output)[0])


def test_similarities_are_the_models_logits(model: Any, folder: Path) -> None:
    from transformers import CLIPTokenizer

    theirs, words, pixels = (tiny_towers.reference("CLIPModel", folder), CLIPTokenizer.from_pretrained(folder),
                             tiny_towers.processor("CLIPImageProcessorPil", folder))
    texts, images = ["a cat", "the dog is lazy", "2 foxes", "dog " * 120], tiny_towers.pictures()
    given = words(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    want = theirs(**given, pixel_values=pixels(images)).logits_per_image
    tiny_towers.close(model.similarity(images, texts), want)                               # the last text is cut, its end token kept
    shares = model.classify(images[1], texts)
    assert list(shares.values()) == sorted(shares.values(), reverse=True) and abs(sum(shares.values()) - 1) < 1e-9
    assert np.allclose([shares[text] for text in texts], want.softmax(1)[1].detach().numpy(), atol=2e-5)
    assert model.classify(images[1], texts, activation="sigmoid")[texts[0]] == pytest.approx(want.sigmoid()[1, 0].item(), abs=2e-5)
    with pytest.raises(ContextOverflowError, match="longer than the 77"):
        model.embed("dog " * 120)
    with pytest.raises(UnsupportedModelError, match="no classes of its own"):
        model.classify(images[0])
    images[0].save(file := folder / "a.png")
    assert model.classify(file, texts) == model.classify(str(file), texts) == model.classify(images[0], texts)        # a path is a picture
    assert model.similarity([], texts).shape == (0, 4)


def test_four_logits_become_shares_by_a_softmax(model: Any, monkeypatch: Any) -> None:
    logits = {"a cat": 24.7002, "a dog": 22.9636, "a remote control": 22.6053, "a sofa": 21.7112}
    monkeypatch.setattr(type(model), "similarity", lambda self, images, texts: np.array([[logits[text] for text in texts]], np.float32))
    shares = model.classify(tiny_towers.pictures()[0], list(logits))
    assert {name: f"{share:.4f}" for name, share in shares.items()} == {"a cat": "0.7410", "a dog": "0.1305", "a remote control": "0.0912", "a sofa": "0.0373"}


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_metaclip_2(tmp_path: Path, act: str) -> None:
    """XLM-R's tokens, whose end is 2: in CLIP's configurations that stands for the highest id."""
    import torch
    import transformers

    folder = tiny_towers.save_clip(tmp_path / "m", act, tiny_towers.CLIP_NEW, kind="MetaClip2")
    words, pixels = transformers.AutoTokenizer.from_pretrained(folder), tiny_towers.processor("CLIPImageProcessorPil", folder)
    theirs = tiny_towers.reference("MetaClip2Model", folder)
    with pe.load(convert(folder, tmp_path / "m.gguf", "f32")) as model:
        texts = [text for text in (*tiny_towers.TEXTS, *tiny_towers.HARD[:8]) if len(model.tokenize(text)) <= 77]
        for text in texts:
            assert model.tokenize(text) == words(text)["input_ids"] and model.tokenize(text)[-1] == 2
            out = theirs.text_model(torch.tensor([model.tokenize(text)]))
            tiny_towers.close(model.hidden(text), out.last_hidden_state[0])
            tiny_towers.close(model.embed(text, normalize=False), theirs.text_projection(out.pooler_output)[0])
        images, ids = tiny_towers.pictures(), [[0, 9, 2, 30, 60, 2], [30, 60, 7]]                  # the end twice, and missing
        for row in ids:
            tiny_towers.close(model.embed([row], normalize=False)[0], theirs.text_projection(theirs.text_model(torch.tensor([row])).pooler_output)[0])
        given = words(texts, padding=True, return_tensors="pt")
        tiny_towers.close(model.similarity(images, texts), theirs(**given, pixel_values=pixels(images)).logits_per_image)


@pytest.mark.parametrize("kind", ["CLIP", "MetaClip2"])
def test_a_head_of_classes_in_the_place_of_texts(tmp_path: Path, kind: str) -> None:
    import transformers

    vision = {"hidden_size": 80, "intermediate_size": 168, "num_hidden_layers": 2, "num_attention_heads": 5, "image_size": 42, "patch_size": 6}
    config = getattr(transformers, f"{kind}Config")(vision_config=vision, id2label=dict(enumerate("abc")), label2id={})
    folder = tiny_towers.make(f"{kind}ForImageClassification", config, tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps(tiny_towers.CLIP_NEW))
    tiny_towers.compare_classes(f"{kind}ForImageClassification", "CLIPImageProcessorPil", folder)


# -- files ----------------------------------------------------------------------------------------------------------------


def clip_cpp(source: Path, target: Path, part: str = "") -> Path:
    """Write a file as clip.cpp's converter does: no scale, no merges, the feed-forward's matrices under each other's name."""
    read, out = gguf.GGUFReader(source), gguf.GGUFWriter(target, "clip")
    out.add_bool("clip.has_text_encoder", part in ("", "text"))
    out.add_bool("clip.has_vision_encoder", part in ("", "vision"))
    kept = ("clip.text.", "clip.vision.", "clip.use_gelu", "tokenizer.ggml.tokens")
    ours = ("hidden_act", "end_token_id", "resize", "crop", "resample")
    for name, field in read.fields.items():
        if name.startswith(kept) and not name.endswith(ours) and not (part == "vision" and name.startswith(("clip.text", "tokenizer"))):
            hollow.add_keys(out, {name: field.contents()})
    swapped = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    for t in read.tensors:
        if t.name != "logit_scale" and (not part or t.name.startswith(part[0])):
            scope, _, rest = t.name.rpartition("ffn_")
            name = f"{scope}{swapped['ffn_' + rest.split('.')[0]]}.{rest.split('.')[1]}" if scope else t.name
            out.add_tensor(name, t.data.reshape(tuple(int(n) for n in t.shape[::-1])).copy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return target


def test_files_of_clip_cpp_are_read(tmp_path: Path) -> None:
    ours = convert(tiny_towers.save_clip(tmp_path / "m", "quick_gelu", tiny_towers.CLIP_OLD, 2), tmp_path / "ours.gguf", "f32")
    with pe.load(ours) as one, pe.load(clip_cpp(ours, tmp_path / "theirs.gguf")) as other:
        for text in (*tiny_towers.TEXTS[:4], *tiny_towers.HARD):
            assert one.tokenize(text) == other.tokenize(text)
            assert np.array_equal(one.embed(text), other.embed(text))
        picture = tiny_towers.pictures()[0]
        assert np.array_equal(one.hidden(picture), other.hidden(picture))
        cosine = one.embed(picture) @ one.embed("a dog")
        assert other.similarity(picture, "a dog")[0, 0] == pytest.approx(100 * cosine, rel=1e-5)
        with pe.load(clip_cpp(ours, tmp_path / "v.gguf", "vision")) as seeing, pe.load(clip_cpp(ours, tmp_path / "t.gguf", "text")) as reading:
            assert np.array_equal(seeing.embed(picture), one.embed(picture)) and np.array_equal(reading.embed("a dog"), one.embed("a dog"))
            for lone, wrong in ((seeing, [[5, 9]]), (reading, picture)):
                with pytest.raises(RequestError, match="only"):
                    lone.embed(wrong)
            with pytest.raises(UnsupportedModelError, match="compare"):
                seeing.similarity(picture, "a dog")
    assert pe.load_tokenizer(tmp_path / "theirs.gguf").tokenize("a dog") == pe.load_tokenizer(ours).tokenize("a dog")


def test_merges_follow_from_the_order_of_tokens(tmp_path: Path) -> None:
    tiny_towers.save_word_bpe(tmp_path)
    vocabulary = read_vocabulary(tmp_path, {})
    assert [" ".join(pair) for pair in merges_of(vocabulary.tokens)] == vocabulary.merges and len(vocabulary.merges) > 90


def test_merges_of_other_tokens_are_refused() -> None:
    with pytest.raises(InvalidModelError, match="'a x' is not of tokens that there are"):
        WordBpe(["a", "b", "ab", "u"], ["a b", "a x"], "u")
    assert WordBpe(["a", "b</w>", "ab</w>", "u"], ["a b</w>"], "u").encode("AB ab") == [2, 2]


def test_a_projector_is_no_model(tmp_path: Path) -> None:
    path = hollow.write_encoder(tmp_path / "mmproj.gguf", ({"clip.has_vision_encoder": True, "clip.projector_type": "mlp"}, [("mm.0.weight", (8, 8), "F32")]))
    with pytest.raises(UnsupportedModelError, match="'clip' is not supported.*projector for another model"):
        pe.load(path)
    assert is_projector(GGUFFile(path)) and not is_projector(GGUFFile(b32(tmp_path)))


def b32(folder: Path) -> Path:
    """Write the headers of CLIP B/32."""
    def layers(start: str, width: int) -> list[hollow.Tensor]:
        return [(name.replace("v.", start, 1), shape, dtype) for name, shape, dtype in hollow.vit_layers(12, width, 4 * width)]

    tensors = [*layers("t.", 512), *layers("v.", 768), ("t.token_embd.weight", (49408, 512), "F16"), ("t.position_embd.weight", (77, 512), "F32"),
               *hollow.both("t.post_ln", 512), *hollow.both("v.pre_ln", 768), *hollow.both("v.post_ln", 768), ("v.class_embd", (768,), "F32"),
               ("v.patch_embd.weight", (768, 3, 32, 32), "F32"), ("v.position_embd.weight", (50, 768), "F32"),
               ("text_projection.weight", (512, 512), "F16"), ("visual_projection.weight", (512, 768), "F16"), ("logit_scale", (1,), "F32")]
    keys = {"clip.has_text_encoder": True, "clip.has_vision_encoder": True, "clip.text.context_length": 77, "clip.text.embedding_length": 512,
            "clip.text.block_count": 12, "clip.text.attention.head_count": 8, "clip.vision.embedding_length": 768, "clip.vision.block_count": 12,
            "clip.vision.attention.head_count": 12, "clip.vision.image_size": 224, "clip.vision.patch_size": 32, "clip.use_gelu": False,
            "tokenizer.ggml.tokens": [f"t{i}" for i in range(49406)] + ["<|startoftext|>", "<|endoftext|>"]}
    return hollow.write_headers(folder / "b32.gguf", "clip", keys, tensors, 0)


def test_the_parameters_of_b32_and_its_plan(tmp_path: Path, capsys: Any) -> None:
    from pyengine.cli.command import execute
    from pyengine.cli.report.files import describe

    path = b32(tmp_path)
    told = describe(str(path))
    assert told["n_parameters"] == 151_277_313 and told["runs"] and told["encoder"]["block_count"] == 12
    assert told["can"] == ["vectors of text", "vectors of pictures", "pictures compared with text"]
    assert execute(["show", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "151,277,313" in shown and "12 blocks of width 768, patches of 32" in shown and "chat template" not in shown
    plan = pe.plan(path)
    assert plan.n_ctx == 77 and plan.picture == 50 and plan.of("kv") == 0
    assert 250e6 < plan.of("weights") < 265e6                      # F16, without the tokens' rows, which are read where they lie


@pytest.mark.parametrize("change, words", [({"size": {"longest_edge": 42}}, "shortest_edge"), ({"crop_size": {"height": 42, "width": 40}}, "squares"),
                                           ({"do_rescale": False}, "do_rescale"), ({"crop_size": 36}, "36 pixels a side"),
                                           ({"image_processor_type": "ViltImageProcessor"}, "ViltImageProcessor"), ({"size": "42"}, "wrong kind")])
def test_what_it_cannot_run_is_refused(folder: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    file = folder / "preprocessor_config.json"
    kept = file.read_text()
    file.write_text(json.dumps({**json.loads(kept), **change}))
    try:
        with pytest.raises((UnsupportedModelError, InvalidModelError), match=words):
            convert(folder, tmp_path / "m.gguf", "f32")
    finally:
        file.write_text(kept)


def test_old_checkpoints_have_buffers_and_parts(folder: Path, tmp_path: Path, model: Any) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"{name}_model.embeddings.position_ids": torch.arange(n)[None] for name, n in (("text", 77), ("vision", 50))}
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    for name, part in halves.items():
        save_file({n: tensors[n] for n in part}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: name for name, part in halves.items() for n in part}}))
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config_dict"] = {k: config["text_config"][k] for k in config["text_config"]}    # which counts, where it is
    config["text_config"] = {"hidden_size": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("vocab.json", "merges.txt"):
        if (folder / name).exists():
            (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pe.load(convert(tmp_path, tmp_path / "m.gguf", "f32")) as loaded:
        assert np.array_equal(loaded.embed("a dog"), model.embed("a dog"))
        assert np.array_equal(loaded.embed(tiny_towers.pictures()[0]), model.embed(tiny_towers.pictures()[0]))


@pytest.mark.parametrize("device", ["cpu", "cuda-emulated"])
def test_heads_of_any_width(tmp_path: Path, device: str) -> None:
    import torch
    import transformers

    tiny_towers.save_word_bpe(tmp_path)
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)
    sizes = {"num_hidden_layers": 2, "projection_dim": 33}
    text = {"vocab_size": len(tokens), "hidden_size": 54, "intermediate_size": 101, "num_attention_heads": 6, "eos_token_id": tokens.eos_token_id}
    vision = {"hidden_size": 70, "intermediate_size": 99, "num_attention_heads": 7, "image_size": 45, "patch_size": 7}
    tiny_towers.make("CLIPModel", transformers.CLIPConfig(text_config={**text, **sizes}, vision_config={**vision, **sizes}, projection_dim=33), tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**tiny_towers.CLIP_OLD, "size": 45, "crop_size": 45}))
    theirs, pixels = tiny_towers.reference("CLIPModel", tmp_path), tiny_towers.processor("CLIPImageProcessorPil", tmp_path)
    with pe.load(convert(tmp_path, tmp_path / "m.gguf", "f32"), device=device) as odd:
        picture = tiny_towers.pictures()[0]                                                # pixels behind the last whole patch are not seen
        tiny_towers.close(odd.hidden(picture), theirs.vision_model(pixels(picture)).last_hidden_state[0])
        tiny_towers.close(odd.hidden("a lazy dog"), theirs.text_model(torch.tensor([odd.tokenize("a lazy dog")])).last_hidden_state[0])


def test_it_has_no_encoder_to_split_off(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="split off"):
        convert(folder, tmp_path / "m.gguf", "f32", split_mmproj=True)


@pytest.mark.parametrize("outtype, least", [("f16", 0.99999), ("q8_0", 0.999)])
def test_smaller_formats_stay_near(model: Any, folder: Path, tmp_path: Path, outtype: str, least: float) -> None:
    with pe.load(convert(folder, tmp_path / "m.gguf", outtype)) as small:
        for x in (tiny_towers.pictures()[0], "the quick brown fox jumps over the lazy dog"):
            assert small.embed(x) @ model.embed(x) > least
