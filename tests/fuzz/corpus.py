"""Small right inputs, made here: GGUF files of tiny models, pictures in every format, templates, checkpoints, a store's files."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import hollow
import numpy as np
from mutators import FLOATS, NUMBERS, TEXTS, spoilt_text

from pyengine.dtype import dtype

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
FORMS = {0: "B", 1: "b", 2: "H", 3: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class Spec:
    """A GGUF file, right or not: keys (name, type, value; an array's value is its element type and elements), tensors (name, axes
    with the slowest first, format's number, bytes), and what the header says of their numbers."""

    keys: tuple[tuple[str, int, Any], ...]
    tensors: tuple[tuple[str, tuple[int, ...], int, bytes], ...]
    version: int = 3
    claimed: tuple[int, int] = (0, 0)                         # tensors and keys beyond those that are there
    shifts: dict[str, int] = field(default_factory=dict)      # bytes by which an offset is wrong

    def write(self) -> bytes:
        out = [b"GGUF", struct.pack("<IQQ", self.version, max(0, len(self.tensors) + self.claimed[0]), max(0, len(self.keys) + self.claimed[1]))]
        for name, kind, value in self.keys:
            out += [_string(name), struct.pack("<I", kind), _value(kind, value)]
        offset = 0
        for name, axes, form, data in self.tensors:
            place = max(0, offset + self.shifts.get(name, 0))
            out += [_string(name), struct.pack(f"<I{len(axes)}Q", len(axes), *(a % 2**64 for a in reversed(axes))), struct.pack("<IQ", form % 2**32, place)]
            offset += -(-len(data) // 32) * 32
        head = b"".join(out)
        return head + bytes(-len(head) % 32) + b"".join(data + bytes(-len(data) % 32) for *_, data in self.tensors)


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _string(value)
    if kind == ARRAY:
        inner, elements = value
        return struct.pack("<IQ", inner, len(elements)) + b"".join(_value(inner, e) for e in elements)
    with np.errstate(all="ignore"):
        if kind in (F32, 12):
            return np.array(value, np.float64).astype(np.float32 if kind == F32 else np.float64).tobytes()
    size = struct.calcsize(FORMS[kind])
    return (int(value) % (1 << 8 * size)).to_bytes(size, "little")


def typed(value: Any) -> tuple[int, Any]:
    """A Python value as GGUF writes it."""
    if isinstance(value, bool):
        return BOOL, value
    if isinstance(value, int):
        return (U32, value) if value >= 0 else (I32, value)
    if isinstance(value, float):
        return F32, value
    if isinstance(value, str):
        return STRING, value
    return ARRAY, (typed(value[0])[0] if value else STRING, list(value))


def byte_letters() -> list[str]:
    """GPT-2's letters for the 256 bytes, in the order of its vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


def vocabulary(kind: str) -> dict[str, Any]:
    """The tokenizer's keys, of each kind that is read."""
    specials = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
    if kind == "gpt2":
        merges = ["h e", "l l", "he ll", "Ġ t", "o n", "\u00c3 \u00a9"]
        tokens = [*byte_letters(), *(m.replace(" ", "") for m in merges), *specials]
        return {"model": kind, "pre": "llama-bpe", "tokens": tokens, "merges": merges, "token_type": [1] * (len(tokens) - 4) + [3] * 4,
                "bos_token_id": len(tokens) - 4, "eos_token_id": len(tokens) - 3, "add_bos_token": True}
    pieces = ["▁", "h", "e", "l", "o", "he", "ll", "▁t", "hell", "é", "a", "b", " "]
    if kind == "bert":
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"▁{c}" for c in "helotab"), *"helotab", "▁hello", "llo"]
        return {"model": kind, "tokens": words, "token_type": [3] * 5 + [1] * (len(words) - 5), "bos_token_id": 2, "eos_token_id": 3,
                "unknown_token_id": 1, "seperator_token_id": 3, "padding_token_id": 0, "cls_token_id": 2, "mask_token_id": 4}
    tokens = ["<unk>", *specials, *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    types = [2, *[3] * 4, *[6] * 256, *[1] * len(pieces)]
    scores = [0.0] * 5 + [0.0] * 256 + [-float(i) for i in range(len(pieces))]
    return {"model": kind, "tokens": tokens, "token_type": types, "scores": scores, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
            "add_bos_token": True, "add_space_prefix": True}


def model_spec(arch: str, vocab: str, form: str = "Q8_0", **more: Any) -> Spec:
    """A tiny model with seeded weights."""
    said = vocabulary(vocab)
    decoder = hollow.Decoder(arch, 2, 32, 64, 2, 1, 16, len(said["tokens"]), 128, tied=True, **more)
    keys = {"general.architecture": arch, "general.name": "tiny", **decoder.metadata(), "general.sampling.temp": 0.7,
            **{f"tokenizer.ggml.{name}": value for name, value in said.items()}, "tokenizer.chat_template": TEMPLATE}
    rng = np.random.default_rng(1)
    tensors = []
    for name, shape, kind in decoder.tensors(form):
        t, x = dtype(kind), rng.standard_normal(shape).astype(np.float32) / 8
        if t.block == 1:
            data = x.astype(t.numpy).tobytes()
        else:                                                 # Q8_0: a scale in half precision and 32 codes
            blocks = x.reshape(-1, 32)
            scale = np.abs(blocks).max(1, keepdims=True) / 127
            data = b"".join(d.astype(np.float16).tobytes() + q.tobytes() for d, q in zip(scale, np.rint(blocks / scale).astype(np.int8)))
        tensors.append((name, shape, t.id, data))
    return Spec(tuple((name, *typed(value)) for name, value in keys.items()), tuple(tensors))


def model_specs() -> list[Spec]:
    norms = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
    return [model_spec("llama", "gpt2"), model_spec("qwen2", "gpt2", "F16", biases=True),
            model_spec("gemma3", "llama", norms=norms, head_norms=True, keys={"attention.sliding_window": 16})]


def vocabulary_specs() -> list[Spec]:
    """Files of a vocabulary alone."""
    return [Spec(tuple((name, *typed(value)) for name, value in
                       {"general.architecture": "llama", **{f"tokenizer.ggml.{k}": v for k, v in vocabulary(kind).items()}}.items()), ())
            for kind in ("gpt2", "llama", "bert", "t5")]


def spoilt_spec(rng: Random, spec: Spec) -> Spec:
    """Wrong keys, values, types and tensors, in a file whose lengths are right."""
    for _ in range(1 << rng.randrange(3)):
        keys, tensors = list(spec.keys), list(spec.tensors)
        i, j = rng.randrange(len(keys)) if keys else 0, rng.randrange(len(tensors)) if tensors else 0
        match rng.randrange(12):
            case 0 if keys:
                del keys[i]
            case 1 if keys:
                keys[i] = (spoilt_text(rng, keys[i][0], TEXTS)[:80] or "x", *keys[i][1:])
            case 2 if keys:
                keys.append(keys[i] if rng.random() < 0.5 else (rng.choice(keys)[0], *keys[i][1:]))
            case 3 | 4 | 5 | 6 if keys:
                keys[i] = (keys[i][0], *spoilt_value(rng, *keys[i][1:]))
            case 7 if keys:
                keys[i] = (keys[i][0], *spoilt_value(rng, rng.choice((U32, I32, F32, BOOL, STRING, U64)), None))
            case 8 if tensors:
                name, axes, form, data = tensors[j]
                axes = tuple(a if rng.random() < 0.6 else rng.choice((0, 1, a - 1, a + 1, 2 * a, rng.choice(NUMBERS))) for a in axes)
                tensors[j] = (name, rng.choice((axes, axes[::-1], axes[1:], (1, *axes), (*axes, 1, 1))), form, data)
            case 9 if tensors:
                name, axes, form, data = tensors[j]
                tensors[j] = (name, axes, rng.choice((0, 1, 2, 8, 10, 12, 14, 20, 24, 26, 30, 39, form, rng.choice(NUMBERS))), data)
            case 10 if tensors:
                name, axes, form, data = tensors[j]
                match rng.randrange(4):
                    case 0:
                        del tensors[j]
                    case 1:
                        tensors[j] = (rng.choice(tensors)[0] if rng.random() < 0.5 else spoilt_text(rng, name, TEXTS)[:80], axes, form, data)
                    case 2:
                        tensors[j] = (name, axes, form, data[: rng.randrange(len(data) + 1)])
                    case 3:                                   # numbers that are none
                        tensors[j] = (name, axes, form, bytes(rng.choice((0x7F, 0xFF, 0x80, 0))) * 0 + bytes([rng.choice((0xFF, 0x7F, 0x7C))]) * len(data))
            case 11:
                spec = replace(spec, claimed=(rng.choice((0, 1, -1, 2**40)), rng.choice((0, 1, -1, 2**40))), version=rng.choice((1, 2, 3, 3, 4)),
                               shifts={tensors[j][0]: rng.choice((-32, 32, 1, 2**40))} if tensors else {})
        spec = replace(spec, keys=tuple(keys), tensors=tuple(tensors))
    return spec


def spoilt_value(rng: Random, kind: int, value: Any) -> tuple[int, Any]:
    if kind == STRING:
        return kind, rng.choice(TEXTS) if value is None or rng.random() < 0.5 else spoilt_text(rng, value, TEXTS)
    if kind == ARRAY:
        inner, elements = value
        elements = list(elements)
        match rng.randrange(5):
            case 0:
                elements = elements[: rng.randrange(len(elements) + 1)]
            case 1:
                elements += elements[-rng.randrange(1, 5) :]
            case 2 | 3:
                for _ in range(rng.randrange(1, 6)):
                    at = rng.randrange(len(elements)) if elements else 0
                    elements[at : at + 1] = [spoilt_value(rng, inner, elements[at] if elements else None)[1]]
            case 4:
                inner = rng.choice((U32, I32, F32, STRING))
                elements = [spoilt_value(rng, inner, None)[1] for _ in range(min(len(elements), 300))]
        return kind, (inner, elements)
    if kind in (F32, 12):
        return kind, rng.choice((*FLOATS, rng.random() * 10))
    if kind == BOOL:
        return kind, rng.choice((0, 1, 1, 2))
    near = [] if value is None else [value + 1, value - 1, 2 * value, value // 2]
    return rng.choice((kind, kind, U64, I32)), rng.choice((*NUMBERS, -1, *near, *near))


def pictures() -> Iterator[bytes]:
    """A small picture in every format and mode."""
    from PIL import Image, features

    rng = np.random.default_rng(2)
    rgb = Image.fromarray(rng.integers(0, 255, (9, 13, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"

    def saved(image: Any, kind: str, **options: Any) -> bytes:
        image.save(out := io.BytesIO(), kind, **options)
        return out.getvalue()

    for mode in ("RGB", "RGBA", "L", "LA", "P", "1"):
        yield saved(rgb.convert(mode), "PNG", **({"transparency": 3} if mode == "P" else {}))
    yield saved(Image.fromarray(rng.integers(0, 65535, (9, 13), np.uint16)), "PNG", exif=exif.tobytes())
    yield from (saved(rgb, "JPEG", exif=exif.tobytes()), saved(rgb, "JPEG", progressive=True), saved(rgb.convert("CMYK"), "JPEG"))
    yield from (saved(rgb, "GIF", save_all=True, append_images=[rgb.rotate(90)]), saved(rgb, "BMP"), saved(rgb.convert("P"), "BMP"))
    for compression in ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        yield saved(rgb, "TIFF", compression=compression)
    yield from (saved(rgb, "WEBP", lossless=True), saved(rgb.convert("RGBA"), "WEBP", exif=exif.tobytes()))
    if features.check("avif"):
        yield saved(rgb, "AVIF")


def checkpoint() -> dict[str, Any]:
    """A tiny Llama in Hugging Face's form: a file's name and its JSON (or its bytes as latin letters)."""
    letters = byte_letters()
    vocab = {token: i for i, token in enumerate([*letters, "he", "ll"])}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
              "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(vocab) + 2, "max_position_embeddings": 128,
              "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "bos_token_id": len(vocab), "eos_token_id": [len(vocab) + 1],
              "torch_dtype": "float32", "hidden_act": "silu", "rope_scaling": None}
    shapes = {"model.embed_tokens.weight": [len(vocab) + 2, 32], "model.norm.weight": [32]}
    for name, shape in {"self_attn.q_proj": [32, 32], "self_attn.k_proj": [16, 32], "self_attn.v_proj": [16, 32], "self_attn.o_proj": [32, 32],
                        "mlp.gate_proj": [64, 32], "mlp.up_proj": [64, 32], "mlp.down_proj": [32, 64], "input_layernorm": [32],
                        "post_attention_layernorm": [32]}.items():
        shapes[f"model.layers.0.{name}.weight"] = shape
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at := at + 2 * int(np.prod(shape))]}
    added = [{"id": len(vocab) + i, "content": t, "special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
             for i, t in enumerate(("<s>", "</s>"))]
    tokenizer = {"version": "1.0", "added_tokens": added, "normalizer": None,
                 "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
                 "post_processor": None, "decoder": {"type": "ByteLevel"},
                 "model": {"type": "BPE", "dropout": None, "unk_token": None, "byte_fallback": False, "vocab": vocab, "merges": ["h e", ["l", "l"]]}}
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE, "add_bos_token": True,
                "added_tokens_decoder": {str(a["id"]): {"content": a["content"], "special": True} for a in added}, "tokenizer_class": "LlamaTokenizer"}
    return {"config.json": config, "tokenizer.json": tokenizer, "tokenizer_config.json": settings, "safetensors": header,
            "generation_config.json": {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "eos_token_id": [1, 2]},
            "special_tokens_map.json": {"bos_token": "<s>"}}


def store() -> dict[str, Any]:
    """What Ollama keeps of a model: the manifest and its small layers by kind."""
    kinds = ("model", "template", "system", "params", "messages", "license")
    layers = [{"mediaType": f"application/vnd.ollama.image.{kind}", "digest": "sha256:" + f"{i:x}" * 64, "size": 100} for i, kind in enumerate(kinds, 1)]
    return {"manifest": {"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json", "config": layers[0], "layers": layers},
            "template": "{{ .System }} {{ .Prompt }}", "system": "You are brief.", "license": "MIT",
            "params": {"stop": ["</s>", "x"], "temperature": 0.5, "num_ctx": 64, "top_k": 10, "seed": 1, "repeat_last_n": -1, "mirostat": 0},
            "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")
