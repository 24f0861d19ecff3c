"""Regular expressions that cut a text before byte-pair encoding, by the name that a file gives; and by its vocabulary."""

from __future__ import annotations

from collections.abc import Callable

from pyengine.records import NamedTuple

# ---------------------------------------------------------------------------------------------------------------------
# Pre-tokenizers of the gpt2 kind: expressions in Oniguruma's syntax. Each cuts the parts that the one before left; a
# match is a part, and so is what lies between matches. They are those of each model's tokenizer.json (kimi-k2:
# tokenization_kimi.py), which the model was trained with, and of llama-vocab.cpp for the others.
#
# llama.cpp differs from the authors where its own expressions have no classes by kind of letter and no blanks by code:
#   tekken, gpt-4o and all of their kind, kimi-k2   words are cut before each mark (but not granite-embed-multi-97m's), and
#                                                   letters with case beyond ASCII count as both small and capital
#   kimi-k2                                         words are not cut at capitals; Chinese characters are a list of ranges
#   deepseek-llm, deepseek-coder                    blanks that are within a range of other characters are none of it

_SUFFIX = r"'s|'t|'re|'ve|'m|'ll|'d"
_ANY_SUFFIX = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_HALVED_BLANKS = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4, "1,2")) + r"|\s"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_CJK_KOREAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_ASCII_SIGN = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
# Letters with case, as deepseek-llm's tokenizer.json lists them.
_CASED = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-"
    "\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-"
    "\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80"
    "-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-"
    "\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)


_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _cased_words(suffix: str = "", but: str = "") -> str:
    """Give the expression of words cut where small letters turn into capitals; marks and letters without case are both."""
    upper, lower, start = f"[{_UPPER}{but}]", f"[{_LOWER}{but}]", r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{upper}*{lower}+{suffix}|{start}{upper}+{lower}*{suffix}"


_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = _cased_words() + rf"|\p{{N}}|{_SLASHES}|{_BLANKS}"
_NOT_COMMON_SIGNS = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_GPT2 = rf"{_SUFFIX}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)"
_LLAMA3 = rf"{_ANY_SUFFIX}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_BLANKS}"
_QWEN2 = rf"{_ANY_SUFFIX}|{_WORD}|\p{{N}}|{_SIGNS}|{_BLANKS}"
_DEEPSEEK3 = rf"{_ASCII_SIGN}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+"
_GPT4O = _cased_words(f"(?:{_ANY_SUFFIX})?") + rf"|\p{{N}}{{1,3}}|{_SLASHES}|{_BLANKS}"
_KIMI = _cased_words(f"(?:{_ANY_SUFFIX})?", but=r"&&[^\p{Han}]") + rf"|\p{{N}}{{1,3}}|{_SIGNS}|{_BLANKS}"


class Pre(NamedTuple):
    """What a value of `tokenizer.ggml.pre` stands for."""
    patterns: tuple[str, ...]
    ignore_merges: bool = False                    # a part that is a token as a whole is not merged from its bytes
    add_bos: bool = False                          # when the file does not say


def _table(*rows: tuple[str, Pre]) -> dict[str, Pre]:
    return {name: pre for names, pre in rows for name in names.split()}


PRE = _table(
    ("default", Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    ("gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en jina-v2-code "
     "roberta-bpe mpt olmo jais trillion granite-docling exaone4", Pre((_GPT2,))),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", Pre((r"\p{N}", _GPT2))),
    ("falcon", Pre((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))),
    ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
     Pre((_LLAMA3,), ignore_merges=True, add_bos=True)),
    ("dbrx smaug-bpe chatglm-bpe", Pre((_LLAMA3,))),
    ("glm4 glm5", Pre((_LLAMA3,), ignore_merges=True)),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2", Pre((_QWEN2,))),
    ("qwen35", Pre((rf"{_ANY_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
                    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}",))),
    ("ufakzeka", Pre((rf"{_WORD}|\p{{N}}|{_SIGNS}|{_BLANKS}",))),
    ("laguna", Pre((r"[^\n]+|\n+", _QWEN2))),
    ("minicpm5", Pre((r"\p{N}{1,3}", rf"{_ANY_SUFFIX}|{_WORD}|\p{{N}}+|{_SIGNS}|{_BLANKS}"), ignore_merges=True)),
    ("seed-coder", Pre((rf"{_ANY_SUFFIX}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_BLANKS}",))),
    ("bailingmoe bailingmoe2 llada-moe",
     Pre((rf"{_ANY_SUFFIX}|{_WORD}|\p{{N}}|{_SIGNS}|\s*[\r\n]|\s+(?!\S)|\s+",))),
    ("exaone-moe", Pre((rf"{_ANY_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
                        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",))),
    ("jais-2", Pre((rf"{_ANY_SUFFIX}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|\s*[\r\n]+|{_HALVED_BLANKS}",))),
    ("tekken", Pre((_TEKKEN,), ignore_merges=True, add_bos=True)),
    # tiktoken looks a whole part up before it joins anything, and transformers' TikTokenConverter says so by ignore_merges;
    # differs: llama.cpp joins them
    ("llama4", Pre((_GPT4O,), ignore_merges=True)),
    ("gpt-4o kanana2 talkie minimax-m2", Pre((_GPT4O,))),
    ("granite-embed-multi-97m", Pre((_GPT4O,), ignore_merges=True)),
    ("deepseek-llm", Pre((r"[\r\n]", rf"\s?[{_CASED}]+",
                          "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+\z",
                          _CJK_KOREAN, r"\p{N}+"))),
    ("deepseek-coder", Pre((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_KOREAN, r"\p{N}"))),
    ("deepseek-v3 hunyuan-dense hy_v4 joyai-llm", Pre((r"\p{N}{1,3}", _CJK, rf"{_DEEPSEEK3}[\r\n]*|{_BLANKS}"))),
    ("spark2_5", Pre((r"\p{N}{1,3}", _CJK, rf"{_DEEPSEEK3}|[\r\n]|\s+(?!\S)|\s+", r"\p{N}"))),
    ("poro-chat bloom gpt3-finnish", Pre((_NOT_COMMON_SIGNS,))),
    ("viking", Pre((_NOT_COMMON_SIGNS, r"\p{N}"))),
    ("chameleon", Pre(("<sentinel:[0-9]+>", "IMGIMG[A-I]{1,4}Z", r"[\t\n]|    |  ", r"\p{N}",
                       r"[\p{P}!-/:-@\[-`{-~]", _GPT2), add_bos=True)),
    # llama.cpp has no bound of 100 groups; without one a long number takes quadratic time
    ("superbpe", Pre((r"\p{N}+", r"(?=(?:[0-9]{3}){1,100}(?![0-9]))"))),
    ("kimi-k2", Pre((rf"\p{{Han}}+|{_KIMI}",))),
)


# ---------------------------------------------------------------------------------------------------------------------
# Files that do not say: those of before April 2024 have no name, and Ollama's converter writes "default" for each expression
# that it does not know (convert/tokenizer.go, parseTokenizer), which are all but Llama 3's, Qwen's and DeepSeek's first ones.

OF_ARCHITECTURE = {"llama4": "llama4", "mistral3": "tekken"}       # families with one expression
OF_TOKEN = {                                                       # (text, id): where a family's special tokens begin
    ("<|begin_of_text|>", 128000): "llama-bpe",                    # Llama 3
    ("<|begin_of_text|>", 200000): "llama4",
    ("[INST]", 3): "tekken",                                       # Mistral since Nemo, also as architecture "llama"
    ("<|endoftext|>", 151643): "qwen2",                            # Qwen 1 to 3
    ("<|endoftext|>", 199999): "gpt-4o",                           # o200k
}


def known_pre(architecture: str, id_of: Callable[[str], int | None]) -> str | None:
    """Name the expressions of a vocabulary of byte-level BPE by what it belongs to, None where that is not known."""
    found = [pre for (text, i), pre in OF_TOKEN.items() if id_of(text) == i]
    return OF_ARCHITECTURE.get(architecture) or (found[0] if found else None)
