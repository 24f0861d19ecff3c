"""Tiny random checkpoints of models that make vectors, labels and scores, and what transformers gives for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyengine as pe
import tiny
from converters.writer import convert
from pyengine.errors import RequestError, UnsupportedModelError

WORDS = "the quick brown fox jumps over a lazy dog is in it s 1 2 3 4 o clock picture shows and snow what ein fur".split()


def save_mpnet(folder: Path) -> None:
    """Write MPNet's tokenizer: WordPiece with the special tokens of RoBERTa but for the unknown one."""
    save_word_piece(folder)
    text = (folder / "tokenizer.json").read_text()
    for old, new in (("CLS", "<s>"), ("SEP", "</s>"), ("PAD", "<pad>"), ("MASK", "<mask>")):
        text = text.replace(f'"[{old}]"', f'"{new}"')
    made = json.loads(text)
    made["post_processor"] = {"type": "RobertaProcessing", **{name: made["post_processor"][name] for name in ("sep", "cls")}, "trim_offsets": True,
                              "add_prefix_space": False}
    (folder / "tokenizer.json").write_text(json.dumps(made))
    special = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "unk": "[UNK]", "mask": "<mask>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MPNetTokenizer", **{f"{name}_token": t for name, t in special.items()}}))


def save_word_piece(folder: Path, n_tokens: int = 160, lowercase: bool = True) -> None:
    """Write a BERT tokenizer whose special tokens have no official ids."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'?-=()+#\u00df\u6587\ud55c"
    pieces = [*letters, *(f"##{c}" for c in letters), *(w for w in WORDS if len(w) > 1)]
    vocab = [f"[unused{i}]" for i in range(3)] + ["[SEP]", "[PAD]", "[UNK]", "[MASK]", "[CLS]"] + pieces
    vocab = list(dict.fromkeys(vocab))[:n_tokens]
    made = Tokenizer(models.WordPiece({t: i for i, t in enumerate(vocab)}, unk_token="[UNK]", max_input_chars_per_word=100))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 7))
    made.add_special_tokens(["[SEP]", "[PAD]", "[UNK]", "[MASK]", "[CLS]"])
    _save(made, folder, "BertTokenizer", **{name: f"[{name.upper()}]" for name in ("sep", "pad", "unk", "mask", "cls")})


def save_byte_level(folder: Path, special: tuple[str, ...] = ("<s>", "<pad>", "</s>", "<unk>"), mask: str = "<mask>", n_tokens: int = 320) -> None:
    """Write RoBERTa's tokenizer: byte-level BPE; the first of `special` begins a text and the third ends it."""
    from tokenizers import AddedToken, models, pre_tokenizers, processors, Tokenizer, trainers

    draft = Tokenizer(models.BPE())
    draft.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    draft.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=n_tokens - 5, special_tokens=list(special), show_progress=False, initial_alphabet=alphabet))
    draft.add_special_tokens([AddedToken(mask, lstrip=True, normalized=False)])
    begin, pad, end, unknown = special
    draft.post_processor = processors.RobertaProcessing((end, draft.token_to_id(end)), (begin, draft.token_to_id(begin)), trim_offsets=True,
                                                        add_prefix_space=False)
    _save(draft, folder, "RobertaTokenizer", bos=begin, cls=begin, eos=end, sep=end, pad=pad, unk=unknown, mask=mask)


def save_unigram(folder: Path, n_tokens: int = 150, begin: str = "<s>", end: str = "</s>", mask: str = "<mask>", albert: bool = False, alone: bool = False) -> None:
    """Write XLM-R's tokenizer, SentencePiece's unigram with a map of characters that sentencepiece made; or ALBERT's, which does more to a text. alone: XLM-R's
    sentencepiece.bpe.model, and nothing else."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as pb
    from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors, Tokenizer

    text = folder / "lines.txt"
    text.write_text("\n".join([*TEXTS, *WORDS, "naive cafe kase"]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(folder / "draft"), vocab_size=n_tokens, model_type="unigram",
                                             hard_vocab_limit=False, minloglevel=2, pad_id=-1)
    proto = pb.ModelProto()
    proto.ParseFromString((folder / "draft.model").read_bytes())
    if alone:
        (folder / "draft.model").rename(folder / "sentencepiece.bpe.model")
    for name in ("lines.txt", "draft.model", "draft.vocab"):
        (folder / name).unlink(missing_ok=True)
    if alone:
        return
    pieces = [(begin, 0.0), ("<pad>", 0.0), (end, 0.0), ("<unk>", 0.0), *((p.piece, p.score) for p in proto.pieces[3:])]
    made = Tokenizer(models.Unigram(pieces, unk_id=3))
    own = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    more = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"'), normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    made.normalizer = normalizers.Sequence([*more, own]) if albert else own
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")])
    made.add_special_tokens([begin, "<pad>", end, "<unk>", AddedToken(mask, lstrip=True)])
    pair = f"{begin} $A {end} $B:1 {end}:1" if albert else f"{begin} $A {end} {end} $B {end}"
    made.post_processor = processors.TemplateProcessing(single=f"{begin} $A {end}", pair=pair, special_tokens=[(begin, 0), (end, 2)])
    _save(made, folder, "AlbertTokenizer" if albert else "XLMRobertaTokenizer", bos=begin, cls=begin, eos=end, sep=end, pad="<pad>", unk="<unk>", mask=mask)


def save_modules(folder: Path, width: int, pooling: str, *, dense: tuple[tuple[int, str, bool], ...] = (), prompts: dict[str, str] | None = None,
                 default: str | None = None, most: int | None = None, normalize: bool = True, old: bool = True) -> list[Any]:
    """Write what sentence-transformers keeps beside a checkpoint; returns the layers behind the pooling, of torch.

    dense: (width, class of torch.nn, whether it has a bias) of each; old: the form of the pooling before version 5
    """
    import torch
    from safetensors.torch import save_file

    kinds, layers, random = ["Transformer", "Pooling", *["Dense"] * len(dense), *["Normalize"] * normalize], [], torch.Generator().manual_seed(5)
    modules = [{"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    for i, kind in enumerate(kinds[1:], 1):
        (folder / f"{i}_{kind}").mkdir(exist_ok=True)
    names = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken", "max": "max_tokens"}
    switches = {f"pooling_mode_{name}": kind == pooling for kind, name in names.items()}
    said = {"word_embedding_dimension": width, **switches, "include_prompt": True} if old else {"embedding_dimension": width, "pooling_mode": pooling}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(said))
    for i, (n, act, bias) in enumerate(dense, 2):
        layer = torch.nn.Linear(width, n, bias=bias)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.randn(p.shape, generator=random) / p.shape[-1] ** 0.5)
        place = "linear" if act == "Identity" else "activation"
        (folder / f"{i}_Dense" / "config.json").write_text(json.dumps({"in_features": width, "out_features": n, "bias": bias,
                                                                       "activation_function": f"torch.nn.modules.{place}.{act}"}))
        save_file({f"linear.{name}": p.detach().contiguous() for name, p in layer.named_parameters()}, folder / f"{i}_Dense" / "model.safetensors")
        layers += [layer, getattr(torch.nn, act)()]
        width = n
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts or {}, "default_prompt_name": default}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": most, "do_lower_case": False}))
    return layers


def pooled(theirs: Any, folder: Path, text: str, pooling: str, layers: list[Any], most: int | None = None) -> Any:
    """Do what sentence-transformers does, but for the length of 1: the text cut at `most` tokens, pooled, and the layers behind it."""
    import torch

    with torch.no_grad():
        ids = words_of(folder)(text, return_tensors="pt", truncation=most is not None, max_length=most)["input_ids"]
        states = theirs(ids).last_hidden_state[0]
        x = {"mean": states.mean(0), "cls": states[0], "lasttoken": states[-1]}[pooling]
        for layer in layers:
            x = layer(x)
    return x


def _save(made: Any, folder: Path, kind: str, **special: str) -> None:
    """Write a tokenizer and its settings. kind: its class; special: tokens by what they are."""
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, **{f"{name}_token": t for name, t in special.items()}}))


def make(model_class: str, config: Any, folder: Path, seed: int = 0, **saved: Any) -> Path:
    """Write a checkpoint with random weights, norms and biases too; returns its folder. saved: arguments of `save_pretrained`."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    model, random = getattr(transformers, model_class)(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=random)
            if p.dim() <= 1:
                p.copy_((1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0) + 0.3 * noise)
            else:
                p.copy_(noise if "embed" in name and p.dim() == 2 else 1.5 * noise / p[0].numel() ** 0.5)
    model.save_pretrained(folder, **saved)
    return folder


def reference(model_class: str, folder: Path) -> Any:
    """Load a checkpoint in transformers, in float32 with plain attention."""
    import torch
    import transformers

    return getattr(transformers, model_class).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def close(got: np.ndarray, want: Any, share: float = 1e-5) -> None:
    """Compare with a tensor of torch: every number within a share of the range."""
    want = np.asarray(want.detach() if hasattr(want, "detach") else want, np.float32)
    assert got.shape == want.shape
    worst = float(np.abs(got - want).max(initial=0))
    assert worst <= share * float(np.abs(want).max(initial=1e-30)), f"{worst} of a range of {np.abs(want).max()}"


def loaded(folder: Path, outtype: str = "f32", **settings: Any) -> Any:
    """Convert a checkpoint and load it."""
    return pe.load(convert(folder, folder / f"{outtype}.gguf", outtype), **settings)


def alone_and_beside(model: Any) -> None:
    """Hold that texts have the same bits alone and side by side."""
    texts = [*TEXTS, *TEXTS[::-1]] * 2
    assert all(np.array_equal(row, model.embed(text)) for row, text in zip(model.embed(texts), texts))


def words_of(folder: Path) -> Any:
    """The tokenizer of transformers."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def compare_states(model: Any, theirs: Any, folder: Path, texts: tuple[str, ...] = ()) -> None:
    """Compare ids and last hidden states of texts with those of a model of transformers, each text alone."""
    import torch

    words = words_of(folder)
    for text in texts or TEXTS:
        ids = words(text)["input_ids"]
        assert model.tokenize(text) == ids, text
        with torch.no_grad():
            close(model.hidden(text), theirs(torch.tensor([ids])).last_hidden_state[0])


def compare_logits(model: Any, theirs: Any, folder: Path) -> None:
    """Compare logits of each position with those of a masked model of transformers, of a text with a mask."""
    import torch

    words = words_of(folder)
    text = f"The quick brown {words.mask_token} jumps over the {words.mask_token}dog."
    ids = words(text)["input_ids"]
    assert model.tokenize(text) == ids and ids.count(words.mask_token_id) == 2
    with torch.no_grad():
        close(model.logits(ids), theirs(torch.tensor([ids])).logits[0])


def compare_scores(model: Any, theirs: Any, folder: Path, texts: tuple[str, ...] = ()) -> None:
    """Compare scores of a text's classes with those of a model of transformers."""
    import torch

    words = words_of(folder)
    for text in texts or TEXTS:
        with torch.no_grad():
            want = theirs(**words(text, return_tensors="pt")).logits[0].numpy()
        got = model.classify(text, activation="none")
        assert list(got) == [theirs.config.id2label[i] for i in np.argsort(-want)]
        close(np.array([got[theirs.config.id2label[i]] for i in range(len(want))], np.float32), want)
        share = np.exp(want - want.max()) / np.exp(want - want.max()).sum() if len(want) > 1 else 1 / (1 + np.exp(-want))
        assert np.allclose(list(model.classify(text).values()), -np.sort(-share), atol=1e-5)


def compare_ranks(model: Any, theirs: Any, folder: Path, most: int, texts: tuple[str, ...] = ()) -> None:
    """Compare scores of pairs of texts with those of a model of transformers, of which some are cut."""
    import torch

    words, query = words_of(folder), "What is in the picture?"
    documents = [*(texts or TEXTS), "fox " * (most + 9), "a quick picture"]
    for first in (query, query * 40):
        got = model.rerank(first, documents)
        assert got.dtype == np.float32 and got.shape == (len(documents),)
        parts = getattr(theirs.config, "type_vocab_size", 1) > 1
        pairs = [words([(first, d)], truncation="longest_first", max_length=most, return_tensors="pt", return_token_type_ids=parts) for d in documents]
        with torch.no_grad():
            close(got, np.array([theirs(**pair).logits[0, 0] for pair in pairs], np.float32))
    assert np.array_equal(model.rerank(query, documents[::-1]), model.rerank(query, documents)[::-1])
    assert model.rerank(query, []).shape == (0,)


def compare_classes(model_class: str, images: str, folder: Path) -> None:
    """Compare classes of pictures with those of a model of transformers that has no texts; it makes no vectors by itself."""
    import torch
    import transformers

    made = getattr(transformers, images).from_pretrained(folder)
    theirs, said = reference(model_class, folder), json.loads((folder / "config.json").read_text())["id2label"]
    with loaded(folder) as model:
        for picture in pictures():
            with torch.no_grad():
                want = theirs(**made(picture, return_tensors="pt")).logits[0].numpy()
            got = model.classify(picture, activation="none")
            close(np.array([got[said[str(i)]] for i in range(len(want))], np.float32), want)
            shares = np.exp(want - want.max()) / np.exp(want - want.max()).sum()
            assert np.allclose([model.classify(picture)[said[str(i)]] for i in range(len(want))], shares, atol=1e-5)
        with pytest.raises(UnsupportedModelError, match="gives scores and no vectors"):
            model.embed(picture)
        assert np.array_equal(model.embed(picture, pooling="mean", normalize=False), model.hidden(picture).astype(np.float64).mean(0).astype(np.float32))
        with pytest.raises(UnsupportedModelError, match="does not compare pictures"):
            model.classify(picture, ["a dog"])
        with pytest.raises(RequestError, match="reads pictures only"):
            model.embed([[1, 2]])


TEXTS = (*tiny.TEXTS, "", "a", "dog " * 40)


HARD = ("A photo of a CAT.", "  two\t\n spaces\u00a0and\u3000more ", "", "caf\u00e9 na\u00efve \u0130stanbul \u03a3\u03a3 \u1e9e", "it's we'll they've o'clock ''s",
        "1234567 3.14 x\u00b2 \u2167", "\u6587\u5b57 \ud55c\uad6d\uc5b4 \u0939\u093f\u0928\u094d\u0926\u0940 \u05e2\u05d1\u05e8\u05d9\u05ea",
        "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 ok",
        "a<|endoftext|>b", "...!!!???--- (what) #tag @name", "e\u0301 \ufb01ne \uff21\uff22", "\ufeffstart\u200bzero", "x" * 90, "a_b\u2581c")


def save_word_bpe(folder: Path, n_tokens: int = 420, as_files: bool = False) -> None:
    """Write CLIP's tokenizer, trained on a few texts: letters, letters that end a word, merges, two special tokens."""
    from transformers import CLIPTokenizer
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, Regex, trainers

    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    trained.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    trained.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"'s|'t|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True),
                                                     pre_tokenizers.ByteLevel(add_prefix_space=False)])
    letters = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator([*TEXTS, *HARD, *WORDS] * 3, trainers.BpeTrainer(vocab_size=n_tokens, show_progress=False, end_of_word_suffix="</w>",
                                                                                  initial_alphabet=sorted(letters)))
    merges = [tuple(m) for m in json.loads(trained.to_str())["model"]["merges"]]
    tokens = [*sorted(letters), *(f"{c}</w>" for c in sorted(letters)), *("".join(m) for m in merges), "<|startoftext|>", "<|endoftext|>"]
    tokens = list(dict.fromkeys(tokens))
    vocab = {t: i for i, t in enumerate(tokens)}
    made = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    made.save_pretrained(folder)
    if as_files:
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(vocab))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")


def pictures() -> list[Any]:
    """Make pictures of noise: wider, higher, of a side, smaller and longer than what encoders see."""
    from PIL import Image

    random = np.random.default_rng(3)
    return [Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((60, 95), (42, 42), (33, 20), (130, 41))]


def processor(name: str, folder: Path) -> Any:
    """Load a processor of pictures that computes with Pillow; it gives their pixels."""
    import transformers

    made = getattr(transformers, name).from_pretrained(folder)
    return lambda images: made(images, return_tensors="pt")["pixel_values"]


def save_canonical_unigram(folder: Path, n_tokens: int = 130) -> None:
    """Write SigLIP's tokenizer, trained on a few texts: a spiece.model alone."""
    import sentencepiece

    texts = [t for t in (*TEXTS, *HARD, *WORDS) if t.strip()] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "spiece"), vocab_size=n_tokens, model_type="unigram", hard_vocab_limit=False, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, normalization_rule_name="nmt_nfkc", character_coverage=0.98, minloglevel=2)
    (folder / "spiece.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SiglipTokenizer", "do_lower_case": True, "eos_token": "</s>",
                                                              "pad_token": "</s>", "unk_token": "<unk>", "model_max_length": 64}))


def save_small_letters(folder: Path, **settings: Any) -> None:
    """Write SigLIP 2's tokenizer: Gemma's with small letters, trained on a few texts."""
    from tokenizers import models, normalizers, Tokenizer, trainers
    from transformers import Siglip2Tokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trained.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "\u2581")])
    trained.train_from_iterator([*TEXTS[:5], *WORDS] * 3, trainers.BpeTrainer(vocab_size=len(special) + 90, special_tokens=special, show_progress=False))
    found = json.loads(trained.to_str())["model"]
    Siglip2Tokenizer(vocab=found["vocab"], merges=[tuple(m) for m in found["merges"]], add_bos_token=False, add_eos_token=True, model_max_length=64,
                     **settings).save_pretrained(folder)


CLIP_IMAGES = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "do_resize": True,
               "do_center_crop": True, "do_normalize": True}
CLIP_OLD = {**CLIP_IMAGES, "size": 42, "crop_size": 42, "feature_extractor_type": "CLIPFeatureExtractor"}
CLIP_NEW = {**CLIP_IMAGES, "size": {"shortest_edge": 45}, "crop_size": {"height": 42, "width": 42}, "image_processor_type": "CLIPImageProcessor"}


def save_clip(folder: Path, act: str, images: dict[str, Any], end: int | None = None, files: bool = False, kind: str = "CLIP") -> Path:
    """Write a CLIP with its tokenizer and what its pictures go through. end: of its configuration; files: vocab.json and merges.txt;
    kind: or "MetaClip2", with XLM-R's tokenizer."""
    import transformers

    folder.mkdir(exist_ok=True)
    if kind == "CLIP":
        save_word_bpe(folder, as_files=files)
    else:
        save_unigram(folder)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)
    config = getattr(transformers, f"{kind}Config")(
        text_config={"vocab_size": len(tokens), "hidden_size": 96, "intermediate_size": 136, "num_hidden_layers": 3, "num_attention_heads": 4,
                     "max_position_embeddings": 77, "hidden_act": act, "projection_dim": 56, "bos_token_id": tokens.bos_token_id,
                     "eos_token_id": tokens.eos_token_id if end is None else end},
        vision_config={"hidden_size": 80, "intermediate_size": 168, "num_hidden_layers": 2, "num_attention_heads": 5, "image_size": 42, "patch_size": 6,
                       "hidden_act": act, "projection_dim": 56}, projection_dim=56)
    make(f"{kind}Model", config, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return folder
