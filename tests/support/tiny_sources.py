"""Tiny random checkpoints of encoder-decoders, whose prompts an encoder reads, and what transformers gives for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import tiny_towers
from cases import SourceCase

N_TOKENS = 300                       # rows of the embeddings, a few more than there are tokens


def save_unigram(folder: Path, alone: bool = False) -> None:
    """Write a SentencePiece unigram with its map of characters, as T5 has: its own file alone, or transformers' beside it."""
    import io

    import sentencepiece
    from transformers import T5Tokenizer

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in tiny.TEXTS for line in text.splitlines() if line]), model_writer=model, model_type="unigram",
        vocab_size=180, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    (folder / "spiece.model").write_bytes(model.getvalue())
    if alone:
        (folder / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "T5Tokenizer", "extra_ids": 5, "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}))
        return
    T5Tokenizer.from_pretrained(folder, extra_ids=5).save_pretrained(folder)


def save_byte_level(folder: Path) -> None:
    """Write a byte-level BPE with the special tokens of BART."""
    from tokenizers import AddedToken
    from transformers import BartTokenizer

    made = tiny._train_byte_level((), False, False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocab = {t: i for i, t in enumerate(special)}
    model = json.loads(made.to_str())["model"]
    for token in sorted(model["vocab"], key=model["vocab"].get)[: N_TOKENS - len(special)]:
        vocab[token] = len(vocab)
    merges = [tuple(m) for m in model["merges"] if "".join(m) in vocab]
    tokenizer = BartTokenizer(vocab=vocab, merges=merges, mask_token=AddedToken("<mask>", lstrip=True))
    tokenizer.save_pretrained(folder)


SAVE = {"unigram": save_unigram, "byte level": save_byte_level}


def make(case: SourceCase, folder: Path, seed: int = 1, own_head: bool = False, generation: dict[str, Any] | None = None, **overrides: Any) -> Path:
    """Write a checkpoint with random weights, biases and norms too; returns its folder.

    own_head    the head is another matrix than the embedding
    generation  values of its generation_config.json
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    SAVE[case.tokenizer](folder)
    config = getattr(transformers, case.config_class)(**{"vocab_size": N_TOKENS, **case.config, **overrides})
    model, random = getattr(transformers, case.model_class)(config), torch.Generator().manual_seed(seed)
    if own_head:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model._tied_weights_keys = {k: v for k, v in model._tied_weights_keys.items() if not k.startswith("lm_head")}
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=random)
            if p.dim() == 1:
                p.copy_((1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.3 * noise)
            elif any(part in name for part in ("embed", "shared", "lm_head", "relative_attention_bias")):
                p.copy_(noise)
            else:
                p.copy_(1.5 * noise / p.shape[1] ** 0.5 * (case.unscaled(config) if ".q." in name else 1.0))
        for name, b in sorted(model.named_buffers()):
            if name == "final_logits_bias":
                b.copy_(0.5 * torch.randn(b.shape, generator=random))
    for name, value in (generation or {}).items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    return folder


def reference(case: SourceCase, folder: Path) -> Any:
    """Load a checkpoint in transformers, in float32 with plain attention."""
    return tiny_towers.reference(case.model_class, folder)


def states(theirs: Any, source: Sequence[int], ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the encoder's last hidden states and the logits of the decoder's ids."""
    import torch

    with torch.no_grad():
        out = theirs(torch.tensor([list(source)]), decoder_input_ids=torch.tensor([list(ids)]))
    return out.encoder_last_hidden_state[0].numpy(), out.logits[0].numpy()


def written(theirs: Any, source: Sequence[int], max_tokens: int, **settings: Any) -> list[int]:
    """Return the ids that transformers writes for a prompt, without the decoder's first one and without what ends and fills."""
    import torch

    settings = {"num_beams": 1, "do_sample": False, "forced_eos_token_id": None, **settings}
    out = theirs.generate(torch.tensor([list(source)]), max_new_tokens=max_tokens, **settings)[0].tolist()[1:]
    config = theirs.generation_config
    end = config.eos_token_id
    return out[: out.index(end)] if end in out else out
