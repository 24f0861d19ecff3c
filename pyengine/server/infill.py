"""Prompts that ask what stands between two texts, by the vocabulary's own tokens for that."""

from __future__ import annotations

from collections.abc import Sequence

from pyengine.server.fields import FieldError
from pyengine.text.tokenizer import Tokenizer


def laid_out(tokenizer: Tokenizer, prefix: str, suffix: str, field: str, files: Sequence[tuple[str, str]] = ()) -> list[int]:
    """Return the token ids of [prefix] text before [suffix] text after [middle]; control tokens in the texts stay texts.

    files: (name, text) of other files, which come before, as Qwen2.5-Coder reads a repository (arXiv:2409.12186, section 3.2.2):
    [repo] name, then [file] name, newline, text for each of them, the last of them the one that is filled in.
    Raises: FieldError for `field` where the vocabulary has no such tokens.
    """
    fim = tokenizer.fim
    if fim is None:
        raise FieldError(field, "this model was not made to fill in the middle: its vocabulary has no tokens for that")

    def plain(text: str) -> list[int]:
        return tokenizer.tokenize(text, add_special=False, parse_special=False)

    ids = tokenizer.tokenize("")[:1] if tokenizer.add_bos else []
    if files and fim.separator is not None:
        ids += [*([fim.repo, *plain("project\n")] if fim.repo is not None else [])]
        for name, text in files:
            ids += [fim.separator, *plain(f"{name}\n{text}\n")]
        ids += [fim.separator, *plain("this_file\n")]
    elif files:
        raise FieldError("input_extra", "this model reads no other files: its vocabulary has no token that separates them")
    return [*ids, fim.prefix, *plain(prefix), fim.suffix, *plain(suffix), fim.middle]
