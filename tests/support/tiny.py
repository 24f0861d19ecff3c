"""Tiny random Hugging Face checkpoints, made in the test with a fixed seed, and transformers' results for them.

`cases.py` finds which there are. Sizes are odd on purpose (d_model no multiple of 256, fewer key heads than query heads), every
parameter is random, norms and biases too, and no special token has its official id: what a converter or a model gets wrong shows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import cases
from cases import Case, Tokens
from sight import load_processor, Seen, sight_of

TEXTS = (
    "The quick brown fox jumps over the lazy dog. It's 1234 o'clock, isn't it?",
    "def add(a, b):\n    return a + b  # adds\n\n\nprint(add(12, 345))\n",
    "Ein Käse für 12,50 € – naïve café; 한국어 문장, 中文句子, العربية. 🙂",
    "What is in the picture? The picture shows a dog and a fox in the snow.",
)

# Scalings of rope that the llama layout knows, as `rope_parameters`; each changes what happens within 100 positions.
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
             "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-attn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
                  "attention_factor": 0.8},
    "longrope": {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0,
                 "original_max_position_embeddings": 64, "short_factor": [1.0 + 0.1 * i for i in range(8)],
                 "long_factor": [1.0 + 0.7 * i for i in range(8)]},
}

# What the configs of most kinds have in common; d_model 96, d_ff 160 and head_dim 16 or 32 suit q8_0's 32.
COMMON = {"vocab_size": 512, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3,
          "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256}

# classes of models that transformers does not have, by name: those of tests/support/reference_*.py
OWN: dict[str, type] = {}


def make_checkpoint(kind: str | Case, folder: str | Path, seed: int = 0, *, dtype: str = "float32",
                    max_shard_size: str = "1GB", tokenizer: str | None = "default",
                    processor: dict[str, Any] | None = None, **config_overrides: Any) -> Path:
    """Write a tiny random checkpoint and return its folder.

    `kind` is a case or its name; `dtype` is float32, float16 or bfloat16; `tokenizer` is a key of TOKENIZERS, "default" for
    the case's own, or None for none; the rest overrides the config, e.g. `rope_parameters=ROPES["yarn"]`.
    Cases that see take `text_config` and `vision_config`, which override single values, and `processor`, settings of
    the image processor that is saved beside the model.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()        # tests read what commands write to stderr
    case = cases.find(kind) if isinstance(kind, str) else kind
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = case.config
    if tokenizer is not None:
        ids = save_tokenizer(case.tokenizer if tokenizer == "default" else tokenizer, folder, case.tokens)
    else:
        ids = {**{name: 500 + i for i, name in enumerate(case.tokens.ids)}, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if case.sees:
        special = {name: ids.pop(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if case.across:                     # the picture's token is the first that the output head does not have
            special["vocab_size"] = ids["image_token_index"]
        inner = {name.removeprefix("vision_config."): ids.pop(name) for name in list(ids) if name.startswith("vision_config.")}
        text = {"text_config": {**case.text_config, **special, **config_overrides.pop("text_config", {})}} if case.text_config else special
        config = {**config, **text,
                  "vision_config": {**case.vision_config, **inner, **config_overrides.pop("vision_config", {})}}
    config_class, model_class = (OWN.get(name) or getattr(transformers, name) for name in (case.config_class, case.model_class))
    config = config_class(**{**config, **ids, **config_overrides})
    model = model_class(config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=random)
            if p.dim() == 1 and name.endswith(".weight") and any(part in name for part in ("norm", "ln_q", "ln_pre")):
                p.copy_(case.norm_mean(name) + 0.3 * noise)
            elif p.dim() == 1:
                p.copy_(0.5 * noise)
            elif p.dim() == 2 and ("embed" in name.replace("embed_tokens_extend.image_embed", "") or "lm_head" in name):
                p.copy_(noise)
            else:
                fan_in = p.shape[case.experts_axis] if p.dim() == 3 else p[0].numel()
                p.copy_(1.5 * noise / fan_in ** 0.5)                    # attention that is far from uniform
        saved = model.state_dict()
        for name, b in sorted(model.named_buffers()):
            if name in saved and (found := case.buffer(name)):
                b.copy_(found[0] + found[1] * torch.randn(b.shape, generator=random))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    if case.sees:
        case.sight.images(config, processor or {}).save_pretrained(folder)
    return folder


def hf_logits(folder: str | Path, ids: list[int]) -> np.ndarray:
    """Return transformers' logits, float32 [n, vocab], computed in float32 with plain attention."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def hf_seen(folder: str | Path, parts: Sequence[Any], fps: float | None = None, **settings: Any) -> Seen:
    """Run transformers in float32, with plain attention, on a prompt of ids, texts, pictures and lists of frames.

    Texts are tokenized by themselves, with nothing added; a picture becomes what the processor (the Pillow one) makes of
    the text that the chat template writes for it; `settings` go to that processor. `fps` is the rate of a video's frames.
    """
    import torch
    import transformers

    sight = sight_of(Path(folder))
    model = getattr(transformers, sight.auto).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    return sight.seen(model, Path(folder), parts, fps, **settings)


def hf_chat_ids(folder: str | Path, messages: Sequence[dict[str, Any]], pictures: Sequence[Any]) -> list[int]:
    """Return the ids that transformers makes of a conversation with pictures; -1 for each soft token."""
    from transformers import AutoConfig

    config, sight = AutoConfig.from_pretrained(folder), sight_of(Path(folder))
    processor = load_processor(sight, Path(folder), config)
    template = processor.tokenizer.chat_template
    text = processor.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    return [-1 if i == sight.soft(config) else i for i in sight.chat(processor, text, pictures)]


# --- tokenizers -------------------------------------------------------------------------------------------------------

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
          r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
          r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_SUFFIXED = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
             r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
             r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_IDEOGRAPHS = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# regexes before byte-level BPE (none: the ByteLevel step's own), whether digits are cut singly, ignore_merges
TOKENIZERS: dict[str, tuple[tuple[str, ...], bool, bool] | None] = {
    "gpt-2": ((), False, False),
    "smollm": ((), True, False),
    "qwen2": ((_CONTRACTIONS + r"\p{N}" + _TAIL,), False, False),
    "qwen35": ((_CONTRACTIONS.replace(r"\p{L}+|", r"[\p{L}\p{M}]+|") + r"\p{N}" + _TAIL.replace(r"\p{L}\p{N}", r"\p{L}\p{M}\p{N}"),), False, False),
    "llama-bpe": ((_CONTRACTIONS + r"\p{N}{1,3}" + _TAIL,), False, True),
    "dbrx": ((_CONTRACTIONS + r"\p{N}{1,3}" + _TAIL,), False, False),
    "tekken": ((_CASED,), False, True),
    "llama4": ((_SUFFIXED,), False, True),
    # the real one's first class goes on through all cased scripts
    "deepseek-llm": (("[\r\n]", "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf]+",
                      "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", "\\s+$", _IDEOGRAPHS),
                     True, False),
    "deepseek-coder": (("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _IDEOGRAPHS), True, False),
    "spm": None,                        # SentencePiece-like: visible spaces, byte fallback
}


def save_tokenizer(name: str, folder: Path, f: Tokens = Tokens()) -> dict[str, int | None]:
    """Train a tokenizer on TEXTS, save it as a checkpoint's tokenizer, and return the config's special token ids."""
    from tokenizers import AddedToken
    from tokenizers.normalizers import NFC
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = _train_spm() if TOKENIZERS[name] is None else _train_byte_level(*TOKENIZERS[name])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in f.special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in f.added])
    if name in ("qwen2", "qwen35"):     # the only ones that normalize text, and that add no bos
        tokenizer.normalizer = NFC()
    else:
        tokenizer.post_processor = TemplateProcessing(single=f"{f.bos} $A", pair=f"{f.bos} $A {f.bos} $B",
                                                      special_tokens=[(f.bos, tokenizer.token_to_id(f.bos))])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=f.bos, eos_token=f.eos, pad_token=f.pad,
                            chat_template=f.template, extra_special_tokens=f.named or {}).save_pretrained(folder)
    special = {"bos_token_id": f.bos, "eos_token_id": f.eos, "pad_token_id": f.pad, **f.ids}
    return {key: token and tokenizer.token_to_id(token) for key, token in special.items()}


def _train_byte_level(regexes: tuple[str, ...], digits: bool, ignore_merges: bool) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    steps: list[Any] = [pre_tokenizers.Split(Regex(r), "isolated") for r in regexes]
    steps += [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not regexes))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def _train_spm() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def finish(model: models.BPE) -> Tokenizer:
        t = Tokenizer(model)
        t.normalizer = normalizers.Replace(" ", "\u2581")
        t.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        t.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
        return t

    draft = finish(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    # words are cut at visible spaces for training only: unlike SentencePiece, the trainer would learn whole sentences
    draft.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    draft.train_from_iterator(TEXTS[:2], trainers.BpeTrainer(vocab_size=150, show_progress=False))
    learned = json.loads(draft.to_str())["model"]
    pieces = [f"<0x{i:02X}>" for i in range(256)] + ["<unk>"] + sorted(learned["vocab"], key=learned["vocab"].get)
    return finish(models.BPE({p: i for i, p in enumerate(pieces)}, [tuple(m) for m in learned["merges"]],
                             unk_token="<unk>", byte_fallback=True, fuse_unk=True))
