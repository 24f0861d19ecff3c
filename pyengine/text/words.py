"""Byte-pair encoding of words whose last letter is marked, CLIP's tokenizer: small letters, blanks as one, no pairs across words."""

from __future__ import annotations

from collections.abc import Sequence

from pyengine.errors import InvalidModelError
from pyengine.text.vocabulary import lenient

END = "</w>"                         # behind the last letter of a word, in tokens
# What a word is: transformers `tokenization_clip.py`; the rest, blanks, is left out
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class WordBpe:
    """The encoder of texts: normalized (NFC, runs of blanks, small letters), cut into words, the letters of each joined by rank of the merges.

    merges  pairs with a blank between, the first first; None: those that the order of the tokens says
    unk     the token of what has none
    Raises: InvalidModelError for merges of other tokens.
    """

    def __init__(self, tokens: Sequence[str], merges: Sequence[str] | None, unk: str):
        from tokenizers import models, normalizers, pre_tokenizers, Regex
        from tokenizers import Tokenizer as Pipeline

        pairs, ids = [tuple(merge.split(" ")) for merge in merges] if merges is not None else merges_of(tokens), {t: i for i, t in enumerate(tokens)}
        if wrong := next((pair for pair in pairs if not ids.keys() >= {*pair, "".join(pair)}), None):
            raise InvalidModelError(f"tokenizer.ggml.merges: {' '.join(wrong)!r} is not of tokens that there are")
        self._pipeline = Pipeline(models.BPE(ids, pairs, unk_token=unk, fuse_unk=False, continuing_subword_prefix="", end_of_word_suffix=END))
        self._pipeline.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
        self._pipeline.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])

    def encode(self, text: str) -> list[int]:
        return self._pipeline.encode(lenient(text), add_special_tokens=False).ids


def merges_of(tokens: Sequence[str]) -> list[tuple[str, str]]:
    """Find the merges of a vocabulary that was made by them, in their order: a token is the pair that those before it leave of its letters."""
    rank: dict[tuple[str, str], int] = {}
    known = set(tokens)
    for token in tokens:
        word = token.removesuffix(END)
        parts = [*word[:-1], word[-1:] + (END if word != token else "")]
        while len(parts) > 2:
            best = min(((rank[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in rank), default=None)
            if best is None:
                break
            parts[best[1] : best[1] + 2] = ["".join(parts[best[1] : best[1] + 2])]
        if len(parts) == 2 and known.issuperset(parts):
            rank[parts[0], parts[1]] = len(rank)
    return list(rank)
