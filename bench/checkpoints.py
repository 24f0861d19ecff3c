"""Random models that see, with encoders of true size: a Hugging Face checkpoint, and llama.cpp's pairs of files made from it.

Every engine then gets the same numbers: transformers from the checkpoint, ours and llama.cpp from files that this project's
converter wrote (text and mmproj apart).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .beside import converters

SHARD = 1 << 28                                                                # numbers in one file of a checkpoint
THIN: dict[str, Any] = {"num_hidden_layers": 1, "intermediate_size": 256}      # a text model that is there because it must be
QUESTIONS = ("What is there in the picture?", "And which colour does it have?")
REPLY = "It shows a small cat that sleeps on a red sofa."
ROPE = {"rope_type": "default", "rope_theta": 1e6}


@dataclass(frozen=True)
class Encoder:
    """An encoder of true size, the text model that it feeds, and the picture that it is measured with.

    config, model   transformers' classes; `layers` and `heads` name keys of its vision config
    period          layers repeat with this period: an encoder of fewer layers has a multiple of it
    size            (width, height) in pixels, which the image processor leaves as they are
    special         its own tokens: key of the config -> text; marker: what a chat template writes for a picture
    """

    config: str
    model: str
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    layers: str
    period: int
    size: tuple[int, int]
    n_ctx: int
    special: Mapping[str, str]
    marker: str

    @property
    def gemma(self) -> bool:
        return self.config == "Gemma3Config"

    @property
    def depth(self) -> int:
        """Layers at true size."""
        return int(self.vision[self.layers])


QWEN = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>"}
ENCODERS = {
    "gemma3": Encoder(                                                         # google/gemma-3-4b-it: SigLIP So400m/14 at 896
        "Gemma3Config", "Gemma3ForConditionalGeneration",
        {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 896,
         "patch_size": 14, "vision_use_head": False},
        {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 1024},
        "num_hidden_layers", 1, (896, 896), 1024,
        {"boi_token_index": "<start_of_image>", "eoi_token_index": "<end_of_image>", "image_token_index": "<image_soft_token>"},
        "<start_of_image>"),
    "qwen2.5-vl": Encoder(                                                     # Qwen/Qwen2.5-VL-3B-Instruct
        "Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration",
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048, "window_size": 112,
         "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2},
        {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
         "num_key_value_heads": 2, "rope_parameters": {**ROPE, "mrope_section": [16, 24, 24]}},
        "depth", 8, (1120, 840), 2048, QWEN, "<|vision_start|><|image_pad|><|vision_end|>"),
}


def picture(encoder: Encoder, seed: int = 0) -> np.ndarray:
    """A picture of waves and some noise, uint8 [h, w, 3], of the size that the encoder sees."""
    width, height = encoder.size
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 64
    waves = [np.sin(a * x + b * y + c) for a, b, c in rng.uniform(-3, 3, (9, 3))]
    out = np.stack([sum(waves[3 * i : 3 * i + 3]) * 40 + 128 for i in range(3)], axis=-1)
    return np.clip(out + rng.normal(0, 12, out.shape), 0, 255).astype(np.uint8)


def write(encoder: Encoder, folder: Path, layers: int, formats: tuple[str, ...], text_layers: int = 0,
          vocab_size: int = 1024) -> None:
    """Write a random checkpoint to `folder`/hf and the pair `folder`/FORMAT.gguf, mmproj-FORMAT.gguf of each format.

    layers: of the encoder. text_layers: of the text model at its true width; 0 makes one thin layer. Files that are there stay.
    """
    source = folder / "hf"
    if not (source / "config.json").exists():
        _checkpoint(encoder, source, layers, text_layers, vocab_size)
    for name in formats:
        if not (folder / f"{name}.gguf").exists():
            converters().convert(source, folder / f"{name}.gguf", name.lower(), split_mmproj=True)


def _checkpoint(encoder: Encoder, folder: Path, layers: int, text_layers: int, vocab_size: int) -> None:
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    ids = _save_tokenizer(folder, encoder)
    text = {**encoder.text, **({"num_hidden_layers": text_layers} if text_layers else THIN), "vocab_size": vocab_size,
            "tie_word_embeddings": True, "eos_token_id": ids["<eos>"], "bos_token_id": ids["<eos>"], "pad_token_id": ids["<eos>"]}
    vision = {**encoder.vision, encoder.layers: layers}
    config = getattr(transformers, encoder.config)(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **{key: ids[t] for key, t in encoder.special.items()})
    config.architectures = [encoder.model]
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in getattr(transformers, encoder.model)(config).state_dict().items()}
    shapes.pop("lm_head.weight", None)                                         # tied
    _save_random(folder, shapes, torch.bfloat16 if text_layers else torch.float32)
    if encoder.gemma:
        size = {"height": encoder.size[1], "width": encoder.size[0]}
        transformers.Gemma3ImageProcessorPil(size=size).save_pretrained(folder)
    else:
        transformers.Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 1280).save_pretrained(folder)
    config.save_pretrained(folder)                                             # last: a folder with a config is whole


def _save_random(folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: Any) -> None:
    """Matrices whose products keep the size of their input; norms near 1, biases and embeddings small."""
    import torch
    from safetensors.torch import save_file

    random, index, n = torch.Generator().manual_seed(0), {}, 0
    for name, shape in sorted(shapes.items()):
        index[name] = f"model-{n // SHARD}.safetensors"
        n += math.prod(shape)
    for file in sorted(set(index.values())):
        tensors = {}
        for name in (n for n in index if index[n] == file):
            noise = torch.randn(shapes[name], generator=random)
            if noise.ndim == 1:
                norm = name.endswith(".weight") and ("norm" in name or "ln_q" in name)
                noise = noise * 0.1 + (1.0 if norm else 0.0)
            elif "embed_tokens" not in name:
                noise *= 0.2 if "position" in name else math.prod(noise.shape[1:]) ** -0.5
            tensors[name] = noise.to(dtype)
        save_file(tensors, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


TEMPLATE = """{%- for m in messages -%}<|turn|>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] -%}
{{ 'MARKER' if p['type'] == 'image' else p['text'] }}{%- endfor %}{% endif %}<eos>
{% endfor %}{% if add_generation_prompt %}<|turn|>assistant
{% endif %}"""


def _save_tokenizer(folder: Path, encoder: Encoder) -> dict[str, int]:
    """A byte-level vocabulary with the words of the questions, <eos>, <|turn|> and the model's own tokens; returns their ids.

    The words are tokens, as they are in real vocabularies: a question of ten words is about ten rows.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]              # llama.cpp wants a merge
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<eos>", "<|turn|>", *encoder.special.values()]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    words = sorted(set(re.findall(r" ?\w+", " ".join([*QUESTIONS, REPLY]))) | {"user", "assistant"})
    tokenizer.add_tokens([AddedToken(w, special=False, normalized=False) for w in words])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>",
                            chat_template=TEMPLATE.replace("MARKER", encoder.marker)).save_pretrained(folder)
    return {t: tokenizer.token_to_id(t) for t in special}
