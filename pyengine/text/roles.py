"""Tokens with a role: what begins and ends texts and turns, fill-in-the-middle; by a file's keys, or by the texts of tokens."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pyengine.records import NamedTuple
from pyengine.text.vocabulary import Kind, Vocabulary

# Texts that mark a token's role when the file does not (llama-vocab.cpp, llama_vocab::impl::load). A token found by one
# of these is treated as a control token, whatever type the file gives it.
EOT_TEXTS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>",
             "_<EOT>", "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>")
EOM_TEXTS = ("<|eom_id|>",)
EOG_TEXTS = EOT_TEXTS + EOM_TEXTS + ("<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "</s>", "[EOS]", "<eos>",
                                     "<turn|>", "<|tool_response>", "[e~[")
FIM_TEXTS = {                                      # fill-in-the-middle; the last three also end a generation
    "fim_pre": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
                "<|code_prefix|>", "<|prefix|>"),
    "fim_suf": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
                "<|code_suffix|>", "<|suffix|>"),
    "fim_mid": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
                "<|code_middle|>", "<|middle|>"),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
OLD_FIM_KEYS = {"fim_pre": "prefix", "fim_suf": "suffix", "fim_mid": "middle"}
HARMONY_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")    # gpt-oss: always shown


class Fim(NamedTuple):
    """Ids of the tokens of fill-in-the-middle: [prefix] before [suffix] after [middle], then what stands between is generated.

    repo and separator stand before other files that the model may look at; None where a vocabulary has none.
    """

    prefix: int
    suffix: int
    middle: int
    repo: int | None = None
    separator: int | None = None


class Roles(NamedTuple):
    """Ids of a vocabulary's tokens with a role, None where it has none; `eog` are all that end an answer. fim: None unless all three are there."""

    bos: int | None
    eos: int | None
    unk: int | None
    pad: int | None
    sep: int | None
    mask: int | None
    eot: int | None
    eom: int | None
    eog: frozenset[int]
    fim: Fim | None


def find_roles(vocabulary: Vocabulary, family: str, pre: str | None) -> Roles:
    """Find the tokens with a role: by their keys, by llama.cpp's defaults, by their texts; then what ends text.

    Kinds of tokens that are found by their texts are set in the vocabulary. family: llama, gpt2, gemma4, bert, t5 or clip.
    """
    v = vocabulary
    default = {"llama": {"bos": 1, "eos": 2, "unk": 0}, "t5": {"eos": 1, "unk": 2, "pad": 0},
               "bert": {"bos": 101, "sep": 102, "unk": 100, "pad": 0, "mask": 103},
               "gpt2": {"bos": 11, "eos": 11} if len(v) > 11 and v.kinds[11] == Kind.CONTROL else {}, "gemma4": {}, "clip": {}}[family]
    if family == "clip":                                                       # whose first files name no tokens
        default = {name: i for name, i in (("bos", v.id_of("<|startoftext|>")), *((n, v.id_of("<|endoftext|>")) for n in ("eos", "unk"))) if i is not None}
        for i in default.values():
            v.set_kind(i, Kind.CONTROL)
    if pre in ("chatglm-bpe", "glm4", "glm5"):
        default.pop("bos", None)
    default = {name: i for name, i in default.items() if i < len(v)}

    def role(name: str, key: str) -> int | None:
        found = v.id_at(key)
        return default.get(name) if found is None else found

    named = {"bos": role("bos", "bos_token_id"), "eos": role("eos", "eos_token_id"), "unk": role("unk", "unknown_token_id"),
             "pad": role("pad", "padding_token_id"), "mask": role("mask", "mask_token_id"),
             "sep": role("sep", "seperator_token_id")}                         # the format's spelling
    eot, eom = _by_text(v, "eot", EOT_TEXTS), _by_text(v, "eom", EOM_TEXTS)
    fim = {name: _by_text(v, name, texts) for name, texts in FIM_TEXTS.items()}

    ends = {v.id_of(text) for text in EOG_TEXTS} - {None}
    for i in ends:
        v.set_kind(i, Kind.CONTROL)
    more = v.meta.get("tokenizer.ggml.eos_token_ids")                          # Ollama's files
    if isinstance(more, np.ndarray) and more.dtype.kind in "iu":
        ends |= {i for i in more.ravel().tolist() if v.has("eos_token_ids", i)}
    ends |= {fim["fim_pad"], fim["fim_rep"], fim["fim_sep"], named["eos"], eot, eom} - {None}
    for i in {v.id_of(text) for text in HARMONY_TEXTS} - {None}:
        v.set_kind(i, Kind.USER_DEFINED)
    # "<|end|>" closes a message, not the answer, where the vocabulary has calls and returns (gpt-oss, Solar Open);
    # "</s>" is plain text where it has "<|tool_response>" (Gemma 4).
    has = {v.tokens.text(i): i for i in ends}
    if "<|end|>" in has and (has.keys() >= {"<|return|>", "<|call|>"} or has.keys() >= {"<|return|>", "<|calls|>"}
                             or "<|flush|>" in has and has.keys() & {"<|call|>", "<|calls|>"}):
        ends.discard(has["<|end|>"])
        v.set_kind(has["<|end|>"], Kind.USER_DEFINED)
    if has.keys() >= {"</s>", "<|tool_response>"}:
        ends.discard(has["</s>"])
        v.set_kind(has["</s>"], Kind.NORMAL)
    three = [fim[name] for name in ("fim_pre", "fim_suf", "fim_mid")]
    middle = None if None in three else Fim(*three, fim["fim_rep"], fim["fim_sep"])
    return Roles(**named, eot=eot, eom=eom, eog=frozenset(ends), fim=middle)


def _by_text(v: Vocabulary, name: str, texts: Iterable[str]) -> int | None:
    found = v.id_at(f"{name}_token_id")
    if found is None and name in OLD_FIM_KEYS:
        found = v.id_at(f"{OLD_FIM_KEYS[name]}_token_id")
    if found is None:
        found = next((i for i in map(v.id_of, texts) if i is not None), None)
        if found is not None:
            v.set_kind(found, Kind.CONTROL)
    return found
