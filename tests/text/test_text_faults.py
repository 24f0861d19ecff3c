"""Text: expressions of models' authors, guessed and wrong metadata, what is never drawn, time that grows with the text."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import bert, golden_vocabulary, spm, t5, TEXTS

from pyengine.engine.request import Stops
from pyengine.errors import InvalidModelError, ModelWarning, RequestError
from pyengine.text import specials
from pyengine.text.pretokenizers import PRE
from pyengine.text.tokenizer import Tokenizer
from pyengine.text.vocabulary import BYTE_LETTERS, Kind


def quiet(meta: dict) -> Tokenizer:
    """A tokenizer; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Tokenizer.from_metadata(meta)


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
    characters = ["".join(BYTE_LETTERS[byte] for byte in character.encode()) for character in word]
    merges = list(dict.fromkeys(f"{c[:i]} {c[i]}" for c in characters for i in range(1, len(c)))) + [" ".join(characters)]
    tokens = BYTE_LETTERS + [merge.replace(" ", "") for merge in merges]
    tokenizer = Tokenizer.from_metadata({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.tokens": tokens,
                                         "tokenizer.ggml.merges": merges, "tokenizer.ggml.add_bos_token": False})
    assert tokenizer.tokenize(word) == [len(tokens) - 1]


# ---------------------------------------------------------------------------------------------------------------------
# Files that do not say how words are cut


def bpe_file(specials: dict[int, str] | None = None, **keys: object) -> dict[str, object]:
    """A byte-level vocabulary in which cuts show; `specials` are tokens at ids of their own."""
    merges = ["( a", "1 2", "\u0120 A", "a B"]
    tokens = BYTE_LETTERS + [m.replace(" ", "") for m in merges]
    if specials:
        by_id = dict(specials)
        free = (i for i in range(10**6) if i not in by_id)
        by_id |= {next(free): text for text in tokens}
        tokens = [by_id.get(i, f"[gap{i}]") for i in range(max(by_id) + 1)]
    kinds = [Kind.CONTROL if specials and i in specials else Kind.NORMAL for i in range(len(tokens))]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.token_type": [int(k) for k in kinds], "tokenizer.ggml.add_bos_token": False, **keys}


def tokens_of(meta: dict) -> list[list[int]]:
    tokenizer = quiet(meta)
    return [tokenizer.tokenize(text) for text in ("f(a)", "12", "aB", " A12")]


@pytest.mark.parametrize("said", [{}, {"tokenizer.ggml.pre": "default"}, {"tokenizer.ggml.pre": ""}])
@pytest.mark.parametrize("architecture, tokens, pre", [
    ("llama4", None, "llama4"), ("mistral3", None, "tekken"), ("llama", {3: "[INST]"}, "tekken"), ("llama", {128000: "<|begin_of_text|>"}, "llama-bpe"),
    ("mllama", {128000: "<|begin_of_text|>"}, "llama-bpe"), ("qwen2vl", {151643: "<|endoftext|>"}, "qwen2"), ("phi3", {199999: "<|endoftext|>"}, "gpt-4o"),
])
def test_a_file_that_does_not_say_is_cut_as_its_vocabulary_is(architecture, tokens, pre, said):
    meta = bpe_file(tokens, **{"general.architecture": architecture})
    assert tokens_of({**meta, **said}) == tokens_of({**meta, "tokenizer.ggml.pre": pre})
    assert quiet({**meta, **said}).pre == pre


def test_what_a_file_says_goes_before_its_family():
    assert quiet(bpe_file(**{"general.architecture": "mistral3", "tokenizer.ggml.pre": "llama-bpe"})).pre == "llama-bpe"


@pytest.mark.parametrize("said", [{}, {"tokenizer.ggml.pre": "default"}])
def test_a_guess_is_said_aloud(said):
    with pytest.warns(ModelWarning, match="tokenizer.ggml.pre.*worse"):
        assert Tokenizer.from_metadata(bpe_file(**{"general.architecture": "llama", **said})).pre == "default"


def test_other_kinds_need_no_expression():
    for meta in (spm(), bert(), t5()):
        quiet(meta)


# ---------------------------------------------------------------------------------------------------------------------
# Ids that no token has

ROLES = {"bos": "bos_id", "eos": "eos_id", "unknown": "unk_id", "padding": "pad_id", "seperator": "sep_id", "mask": "mask_id", "eot": "eot_id",
         "eom": "eom_id"}


@pytest.mark.parametrize("key", [*ROLES, "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep", "prefix", "suffix", "middle"])
@pytest.mark.parametrize("wrong", [0, 10**6, -2, -(2**31), 2**32 - 2])
def test_an_id_that_no_token_has_is_ignored_with_a_warning(key, wrong):
    meta = spm()
    n = len(meta["tokenizer.ggml.tokens"])
    without = quiet({k: v for k, v in meta.items() if k != f"tokenizer.ggml.{key}_token_id"})
    with pytest.warns(ModelWarning, match=f"{key}_token_id: .* is ignored"):
        tokenizer = Tokenizer.from_metadata({**meta, f"tokenizer.ggml.{key}_token_id": wrong or n})
    assert all(getattr(tokenizer, name) == getattr(without, name) for name in ROLES.values())
    assert tokenizer.eog_ids == without.eog_ids and tokenizer.tokenize("the world</s>") == without.tokenize("the world</s>")


def test_minus_one_is_no_warning():
    for nothing in (-1, 2**32 - 1):
        assert quiet({**spm(), "tokenizer.ggml.padding_token_id": nothing}).pad_id is None


def test_a_list_of_ends_is_checked_too():
    with pytest.warns(ModelWarning, match="eos_token_ids: 999999 is ignored"):
        tokenizer = Tokenizer.from_metadata({**spm(), "tokenizer.ggml.eos_token_ids": np.array([5, 999999], np.int32)})
    assert 5 in tokenizer.eog_ids and 999999 not in tokenizer.eog_ids


def test_nothing_is_added_where_nothing_is_named():
    meta = {**golden_vocabulary("bpe, gpt-2"), "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 10**6}
    with pytest.warns(ModelWarning, match="add_bos_token: set, but bos_token_id names no token"):
        tokenizer = Tokenizer.from_metadata(meta)
    assert tokenizer.bos_id is None and tokenizer.tokenize("") == []


# ---------------------------------------------------------------------------------------------------------------------
# Special tokens in a text


def with_specials(texts: list[str], kind: Kind = Kind.CONTROL) -> dict[str, object]:
    meta = spm()
    meta["tokenizer.ggml.tokens"] += texts
    meta["tokenizer.ggml.token_type"] += [int(kind)] * len(texts)
    meta["tokenizer.ggml.scores"] += [0.0] * len(texts)
    return meta


@pytest.fixture(params=["few", "many"])
def how_many(request, monkeypatch) -> None:
    """Special tokens are sought by an expression where a text may have few of them, by `tokenizers` where they are many."""
    monkeypatch.setattr(specials, "FEW", 256 if request.param == "few" else 0)


def test_of_overlapping_special_tokens_the_first_is_taken_and_then_the_longest(how_many):
    tokenizer = quiet(with_specials(["<ab>", "<ab>c", "b>cd", "\n\n", "\n\n\n", "<\udce9>", "<é>"]))
    named = [tokenizer.need(t) for t in ("<ab>", "<ab>c", "\n\n", "\n\n\n", "<\udce9>", "<é>")]
    newline = tokenizer.need("<0x0A>")

    def ids(text: str | bytes) -> list[int]:
        return [i for i in tokenizer.tokenize(text, add_special=False) if i in (*named, newline)]

    assert ids("<ab>cd") == [named[1]] and ids("<ab>x<ab>") == [named[0], named[0]]
    assert ids("\n" * 6) == [named[3]] * 2 and ids("\n" * 5) == [named[3], named[2]] and ids("\n" * 7) == [named[3]] * 2 + [newline]
    assert ids(b"<\xe9>") == [named[4]] and ids("<é>") == [named[5]] and ids("\ufdd0<é>") == [named[5]]
    assert not set(tokenizer.tokenize("<ab>c<é>", parse_special=False)) & set(named)


@pytest.mark.parametrize("kind", [Kind.CONTROL, Kind.USER_DEFINED])
def test_special_tokens_are_found_as_by_a_search_for_each(kind, how_many):
    rng = random.Random(2)
    texts = sorted({"<" + "".join(rng.choices("abé\n ", k=rng.randrange(1, 5))) + ">" for _ in range(60)})      # none overlap
    tokenizer = quiet(with_specials(texts, kind))
    for _ in range(100):
        text = "".join(rng.choices([*texts, "a", "<", ">", "é", " ", "\n", "<a"], k=30))
        want: list[str | int] = [text]
        for special in sorted(texts, key=len, reverse=True):
            want = [piece for part in want for piece in (part.replace(special, f"\0{special}\0").split("\0") if isinstance(part, str) else [part])]
            want = [tokenizer.need(p) if p == special else p for p in want]
        assert tokenizer._partition(text, True) == [p for p in want if p != ""]
        assert tokenizer._partition(text, False) == ([p for p in want if p != ""] if kind == Kind.USER_DEFINED else [text])


# ---------------------------------------------------------------------------------------------------------------------
# Time grows with the text, and no faster


def seconds(work: Callable[[], object]) -> float:
    best = np.inf
    for _ in range(3):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def is_linear(work: Callable[[int], Callable[[], object]], n: int) -> None:
    """Four times the size takes less than nine times as long (sixteen is quadratic), but for what is too short to be measured."""
    small, large = seconds(work(n)), seconds(work(4 * n))
    assert large < max(9 * small, 0.2), f"{n}: {small:.3f} s, {4 * n}: {large:.3f} s"


def test_many_special_tokens_in_a_text_take_linear_time():
    def work(n: int) -> Callable[[], object]:
        texts = [f"<{i:06d}>" for i in range(n)]
        tokenizer, text = quiet(with_specials(texts)), "".join(texts)
        assert len(tokenizer.tokenize(text, add_special=False)) == n
        return lambda: tokenizer.tokenize(text)

    is_linear(work, 30_000)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab\n\udce9é", min_size=1, max_size=4), max_size=8, unique=True), st.text("ab\n\udce9éc", max_size=30))
def test_an_expression_and_tokenizers_find_the_same(texts, text):
    found = specials.Specials(dict(enumerate(texts)))
    want = found._split_by_many(text)
    assert found.split(text) == want
    assert "".join(part if isinstance(part, str) else texts[part] for part in want) == text


@pytest.mark.parametrize("text", ["x" * 1_000_000, "".join(f"<{i:06d}" for i in range(100_000))])
def test_special_tokens_that_a_text_lacks_cost_nothing_each(text):
    def work(n: int) -> Callable[[], object]:
        tokenizer = quiet(with_specials([f"<{i:06d}>" for i in range(n)]))
        tokenizer.tokenize("<000000>")
        return lambda: tokenizer._partition(text, True)

    is_linear(work, 20_000)


@pytest.mark.parametrize("name, unit", [
    ("spm", " "), ("spm", b"\xff"), ("spm", "👍"), ("bpe, llama3", "a"), ("bpe, llama3", " \n"), ("bpe, tekken", "e\u0301"), ("bpe, tekken", b"\xe4\xb8"),
    ("bpe, superbpe", "1"), ("bpe, kimi-k2", "漢"), ("gemma4", "\n"), ("t5", "a"), ("t5, merge", " "), ("bert", "a"), ("bert", b"\xff")])
def test_texts_of_one_kind_take_linear_time(name, unit):
    tokenizer = Tokenizer.from_metadata(golden_vocabulary(name))
    is_linear(lambda n: lambda: tokenizer.tokenize(unit * n), 30_000)


@pytest.mark.parametrize("name", ["spm", "bpe, llama3", "bert"])
def test_ids_become_text_in_linear_time(name):
    tokenizer = Tokenizer.from_metadata(golden_vocabulary(name))
    is_linear(lambda n: lambda: tokenizer.detokenize([5, 7, 20] * n), 3000)


def test_many_user_defined_tokens_of_a_unigram_vocabulary_take_linear_time():
    def work(n: int) -> Callable[[], object]:
        meta = t5()
        meta["tokenizer.ggml.tokens"] += (texts := [f"<{i:06d}>" for i in range(n)])
        meta["tokenizer.ggml.token_type"] += [int(Kind.USER_DEFINED)] * n
        meta["tokenizer.ggml.scores"] += [0.0] * n
        tokenizer, text = quiet(meta), "".join(texts)
        assert tokenizer._encoder.encode("<000001>") == [tokenizer.need("<000001>")]
        return lambda: tokenizer.tokenize(text[: 8 * 1000])

    is_linear(work, 2000)


def test_long_pieces_of_a_word_take_linear_time():
    """A token of many letters, and a word that has all of it but the last."""
    def work(n: int) -> Callable[[], object]:
        meta = bert()
        meta["tokenizer.ggml.tokens"][-1] = "a" * 5_000 + "c"
        tokenizer = quiet(meta)
        return lambda: tokenizer.tokenize("a" * n)

    is_linear(work, 20_000)


def charsmap(units: list[int], strings: bytes) -> np.ndarray:
    return np.frombuffer((4 * len(units)).to_bytes(4, "little") + np.array(units, "<u4").tobytes() + strings, np.uint8)


def test_rules_of_a_charsmap_are_bounded():
    """A trie that leads from any letter back to itself, and a replacement as long as the file."""
    back = [ord("a")] * 256                                  # every node has label "a", offset 0: "aaaa..." never leaves
    tokenizer = quiet(t5(precompiled_charsmap=charsmap(back, b"x\0")))
    is_linear(lambda n: lambda: tokenizer.tokenize("a" * n), 3000)
    long = [0] * 512
    long[0] = 1 << 10                                        # the root's offset is 1
    long[1 ^ ord("a")] = 256 << 10 | 1 << 8 | ord("a")       # a rule ends here, its value is at 256 from here
    long[1 ^ ord("a") ^ 256] = 1 << 31
    tokenizer = quiet(t5(precompiled_charsmap=charsmap(long, b"x" * 100_000 + b"\0")))
    with pytest.raises(InvalidModelError, match="at most 256 bytes"):
        tokenizer.tokenize("a")


# ---------------------------------------------------------------------------------------------------------------------
# Stops


def test_a_long_stop_costs_no_more_than_a_short_one():
    def work(n: int) -> Callable[[], object]:
        def run() -> None:
            stops = Stops(["a" * n + "b"])
            for _ in range(3000):
                stops.push("aaa")
        return run

    is_linear(work, 2000)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("ab", min_size=1, max_size=5), max_size=4), st.lists(st.text("abc", max_size=4), max_size=12))
def test_stops_do_not_depend_on_how_a_text_is_cut(stops, pieces):
    text, whole = "".join(pieces), Stops(stops)
    ended = min((i for i in range(len(text) + 1) if any(text[:i].endswith(s) for s in stops)), default=None)
    want = text if ended is None else text[: ended - max(len(s) for s in stops if text[:ended].endswith(s))]
    one = Stops(stops)
    assert "".join(map(whole.push, pieces)) + whole.flush() == one.push(text) + one.flush() == want
    assert whole.found == one.found and (one.found is None) == (ended is None) and (ended is None or one.found in stops)


def test_stops_hold_back_no_more_than_they_must():
    stops = Stops(["</s>", "<|"])
    assert [stops.push(t) for t in ("a<", "/s", "x<", "b</", "s>c")] == ["a", "", "</sx", "<b", ""] and stops.found


@pytest.mark.parametrize("stop", [5, [""], [None], ["a", 3], 1.5, {"a": 1}.items(), True])
def test_stops_of_another_kind_are_refused(stop):
    with pytest.raises(RequestError, match="stop"):
        Stops(stop)
