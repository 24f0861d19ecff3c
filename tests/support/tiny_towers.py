"""Tiny random checkpoints of models that make vectors, labels and scores, and what transformers gives for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import tiny

WORDS = "the quick brown fox jumps over a lazy dog is in it s 1 2 3 4 o clock picture shows and snow what ein fur".split()


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
    made.save(str(folder / "tokenizer.json"))
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("sep", "pad", "unk", "mask", "cls")}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": lowercase, **special}))


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


TEXTS = (*tiny.TEXTS, "", "a", "dog " * 40)
