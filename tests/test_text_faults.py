"""Text: expressions of models' authors, guessed and wrong metadata, what is never drawn, time that grows with the text."""

from __future__ import annotations

import random

import pytest
from test_tokenizer import golden_vocabulary, TEXTS

from pyengine.text.pretokenizers import PRE
from pyengine.text.tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# Expressions as the authors write them. o200k_base (tiktoken, openai_public.py) is also Llama 4's tokenizer.json, and tekken is that
# of Mistral Small 3.1 (tekken.json, "pattern"); kimi-k2: tokenization_kimi.py of Kimi-K2-Instruct; deepseek-llm-7b's tokenizer.json.

CASE = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
KIMI = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def words(upper: str, lower: str, suffix: str) -> str:
    return rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{suffix}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{suffix}"


AUTHORS = {
    "tekken": [rf"{words(*CASE, '')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BLANKS}"],
    "llama4": [rf"{words(*CASE, SUFFIX)}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BLANKS}"],
    "gpt-4o": [rf"{words(*CASE, SUFFIX)}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BLANKS}"],
    "kimi-k2": [rf"[\p{{Han}}]+|{words(*KIMI, SUFFIX)}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{BLANKS}"],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
}
MARKS = ["\u0928\u0940", "\u0645\u064e", "\u0e17\u0e35", "e\u0301", "क्षत्रिय दुनिया", "שָׁלוֹם", "e\u0301É aÉ ÉA Éa ǅx ʰA ªB", "ÀÉÎ'S ß'd",
         "Ünïcödé ÀÉÎ", "a\u0301B\u0302c", "\u0301", "々〇漢字Kanji漢", "中文ABc", "a\u3000b\u2003c\u1680d\u2028e", "f(a) aB 12 1234"]


def author_parts(patterns: list[str], text: str) -> list[str]:
    from tokenizers import pre_tokenizers, Regex

    cut = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(p), "isolated") for p in patterns])
    return [part for part, _ in cut.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", AUTHORS)
def test_texts_are_cut_by_the_authors_expression(name):
    from tokenizers import pre_tokenizers, Regex

    ours = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(p), "isolated") for p in PRE[name].patterns])
    rng = random.Random(1)
    letters = "".join(MARKS) + "aAbB'sS /\n\r.1"
    texts = [t for t in TEXTS if isinstance(t, str)] + MARKS + ["".join(rng.choices(letters, k=30)) for _ in range(500)]
    for text in texts:
        assert [part for part, _ in ours.pre_tokenize_str(text)] == author_parts(AUTHORS[name], text), text


@pytest.mark.parametrize("name", ["tekken", "llama4", "kimi-k2"])
@pytest.mark.parametrize("word", MARKS[:4])
def test_a_mark_stays_with_its_letter(name, word):
    """Merges that make characters of bytes, and the word of its characters, do so: nothing cuts before a mark."""
    from pyengine.text.vocabulary import BYTE_LETTERS

    characters = ["".join(BYTE_LETTERS[byte] for byte in character.encode()) for character in word]
    merges = list(dict.fromkeys(f"{c[:i]} {c[i]}" for c in characters for i in range(1, len(c)))) + [" ".join(characters)]
    tokens = BYTE_LETTERS + [merge.replace(" ", "") for merge in merges]
    tokenizer = Tokenizer.from_metadata({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.tokens": tokens,
                                         "tokenizer.ggml.merges": merges, "tokenizer.ggml.add_bos_token": False})
    assert tokenizer.tokenize(word) == [len(tokens) - 1]
