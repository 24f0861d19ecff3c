"""Tiny checkpoints in other programs' files: llama.cpp's pair (text and mmproj), Ollama's single file, and its store.

Written from those programs' own converters and independently of ours: only the vocabulary is shared. What all architectures have in
common is here; each one's `Dialect` is in its test file. llama.cpp: `conversion/*.py`, names from gguf-py; Ollama:
`convert/convert_*.go`, `convert/reader.go`, and the keys that its published files show. No key of our own.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from converters.tokenizer import Vocabulary, read_vocabulary

if TYPE_CHECKING:
    from sight import Seen

Tensors = Iterable[tuple[str, np.ndarray]]
VISION_NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 99)
text_names = cache(lambda arch: gguf.get_tensor_name_map(arch, 99))            # 60 ms each


class Saved:
    """A checkpoint that sees, as its files have it: configs and tensors under today's names of transformers' modules."""

    def __init__(self, folder: Path):
        from safetensors.torch import load_file

        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.text = self.config.get("text_config") or self.config
        self.vision: dict[str, Any] = self.config["vision_config"]
        self.images = json.loads((folder / "preprocessor_config.json").read_text())
        self.kind: str = self.config["model_type"]
        self.tensors: dict[str, np.ndarray] = {}
        for file in sorted(folder.glob("*.safetensors")):
            for name, value in load_file(file).items():
                name = re.sub(r"^language_model\.(model|lm_head)", r"\1", name)
                name = re.sub(r"^model\.(?!language_model|text_model|embed_tokens|layers|norm)", "", name)
                self.tensors[re.sub(r"^model\.(language_model|text_model)\.", "model.", name)] = value.float().numpy()

    @property
    def dialect(self) -> Dialect:
        """The dialect of its architecture."""
        import cases

        return next(c.dialect for c in cases.every().values() if c.dialect and self.kind in c.dialect.model_types
                    and self.vision.get("model_type") in (c.dialect.towers or (self.vision.get("model_type"),)))

    def vocabulary(self) -> Vocabulary:
        return read_vocabulary(self.folder, {**self.text, **self.config})


class Dialect:
    """How other programs write an architecture's checkpoints. What their files cannot say must have the value that they assume."""

    model_types: tuple[str, ...]                # of a config.json
    towers: tuple[str, ...] = ()                # of its encoder's part, where others have the same; empty: any
    settings: dict[str, Any] = {}               # of a checkpoint with the values that Ollama assumes, if ours differ
    # llama.cpp: the text file's architecture, names of its tensors, and what the encoder's file calls the projector
    arch: str
    names: gguf.MODEL_ARCH
    projector: str
    # names of numbers in configs; of the encoder: feed-forward and width, layers, heads
    vision_sizes = ("intermediate_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    feed_forward = "intermediate_size"          # as the text file's length of it
    converters: tuple[str, ...] = ("now", "first")      # which of llama.cpp's write it
    # Ollama: the file's architecture, if it reads such models, and strings.NewReplacer: at each place the first that fits
    ollama_arch: str | None = None
    ollama_names: tuple[tuple[str, str], ...] = ()
    n_ctx = 256                                 # that holds two pictures

    def assume(self, saved: Saved) -> None:
        """Check what llama.cpp hard-codes of the family."""

    def text_arch(self, saved: Saved, legacy: bool) -> str:
        """Return general.architecture of llama.cpp's text file."""
        return self.arch

    def image_size(self, saved: Saved) -> int:
        """Return the encoder's side in pixels."""
        return side(saved.vision.get("image_size", 560))

    def text_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        """Write the text file's keys beside sizes, head counts and epsilon."""
        raise NotImplementedError

    def text_name(self, source: str) -> str:
        """Return gguf-py's name for a tensor of the text model."""
        name = text_names(self.names).get_name(source, try_suffixes=(".weight", ".bias"))
        assert name is not None, source
        return name

    def text_tensor(self, saved: Saved, source: str, value: np.ndarray) -> Tensors:
        """List what becomes of a tensor of the text model, under llama.cpp's names, which Ollama shares."""
        yield self.text_name(source), value

    def text_tensors(self, saved: Saved) -> Tensors:
        """List the text model's tensors."""
        for source, value in saved.tensors.items():
            if source.startswith(("model.", "lm_head.")):
                yield from self.text_tensor(saved, source, value)

    def encoder_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        """Write the keys of llama.cpp's encoder file that all have."""
        vision, (feed_forward, width, layers, heads) = saved.vision, self.vision_sizes
        w.add_clip_has_vision_encoder(True)
        w.add_vision_projection_dim(saved.text["hidden_size"])
        w.add_vision_image_size(self.image_size(saved))
        w.add_vision_patch_size(side(vision["patch_size"]))
        w.add_vision_embedding_length(vision[width])
        w.add_vision_feed_forward_length(vision[feed_forward])
        w.add_vision_block_count(vision[layers])
        w.add_vision_head_count(vision[heads])
        w.add_vision_image_mean(saved.images["image_mean"])
        w.add_vision_image_std(saved.images["image_std"])
        w.add_clip_projector_type(self.projector)

    def vision_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        """Write the keys of llama.cpp's encoder file that other architectures do not have."""
        raise NotImplementedError

    def vision_tensor(self, saved: Saved, source: str, value: np.ndarray, legacy: bool) -> Tensors:
        """List what becomes of a tensor of the encoder in llama.cpp's file."""
        raise NotImplementedError

    def vision_tensors(self, saved: Saved, legacy: bool) -> Tensors:
        """List the tensors of llama.cpp's encoder file."""
        for source, value in saved.tensors.items():
            if not source.startswith(("model.", "lm_head.")):
                yield from self.vision_tensor(saved, source, value, legacy)

    def ollama_keys(self, w: gguf.GGUFWriter, saved: Saved) -> tuple[dict[str, int], float | None]:
        """Write keys of Ollama's file; return numbers of the encoder, and its epsilon where the file says it under the usual name."""
        raise NotImplementedError

    def ollama_sizes(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        """Write the sizes of the text model."""
        text_sizes(w, saved.text)

    def ollama_text(self, saved: Saved) -> Tensors:
        """List the text model's tensors under Ollama's names."""
        return self.text_tensors(saved)

    def ollama_tensor(self, name: str, value: np.ndarray) -> Tensors:
        """List what becomes of a tensor of the encoder that has got Ollama's name."""
        yield name, value

    def ollama_vision(self, saved: Saved) -> Tensors:
        """List the encoder's tensors under Ollama's names."""
        for source, value in saved.tensors.items():
            if not source.startswith(("model.", "lm_head.")):
                yield from self.ollama_tensor(self.ollama_name(source), value)

    def ollama_name(self, source: str) -> str:
        """Return a tensor's name with all replacements."""
        replacements = dict(self.ollama_names)
        return re.sub("|".join(map(re.escape, replacements)), lambda m: replacements[m.group()], source)

    def ollama_file(self, saved: Saved, out: Path, outtype: str, extra_tokens: int) -> Path:
        """Write a checkpoint as `ollama_file` says."""
        text, vision, arch = saved.text, saved.vision, self.ollama_arch
        w = new_writer(out, arch, outtype)
        self.ollama_sizes(w, saved)
        numbers, epsilon = self.ollama_keys(w, saved)
        for name, value in {**numbers, "embedding_length": vision["hidden_size"], "num_channels": 3,
                            "patch_size": vision["patch_size"]}.items():
            w.add_uint32(f"{arch}.vision.{name}", value)
        if epsilon is not None:
            w.add_float32(f"{arch}.vision.attention.layer_norm_epsilon", epsilon)
        ollama_vocabulary(w, saved.vocabulary(), text["vocab_size"] + extra_tokens, bool(extra_tokens))
        write(w, [*self.ollama_text(saved), *self.ollama_vision(saved)], outtype, conv_too=True)
        return out


def turned(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Return q or k with the halves of each head's rows interleaved: `LlamaModel.permute`."""
    return weight.reshape(n_heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def text_sizes(w: gguf.GGUFWriter, text: dict[str, Any], feed_forward: str = "intermediate_size") -> None:
    """Write the sizes that every text model has."""
    w.add_block_count(text["num_hidden_layers"])
    w.add_context_length(text["max_position_embeddings"])
    w.add_embedding_length(text["hidden_size"])
    if feed_forward in text:
        w.add_feed_forward_length(text[feed_forward])
    w.add_head_count(text["num_attention_heads"])
    w.add_head_count_kv(text["num_key_value_heads"])


def head_sizes(w: gguf.GGUFWriter, text: dict[str, Any]) -> None:
    """Write the sizes of a head."""
    w.add_key_length(text["head_dim"])
    w.add_value_length(text["head_dim"])


def llama_keys(w: gguf.GGUFWriter, text: dict[str, Any]) -> None:
    """Write the keys of `LlamaModel`, which others have too."""
    if text.get("head_dim"):
        head_sizes(w, text)
    w.add_rope_dimension_count(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])
    w.add_rope_freq_base(text["rope_parameters"]["rope_theta"])
    w.add_vocab_size(text["vocab_size"])


def llama_turned(source: str, value: np.ndarray, text: dict[str, Any]) -> np.ndarray:
    """Return a tensor of `LlamaModel`, q and k turned."""
    if re.search(r"\.[qk]_proj\.", source):
        return turned(value, text["num_attention_heads" if ".q_proj." in source else "num_key_value_heads"])
    return value


def side(value: int | list[int]) -> int:
    """Return a size that may be listed for both sides."""
    return value[0] if isinstance(value, list) else value


# --- llama.cpp --------------------------------------------------------------------------------------------------------

def llama_cpp_files(folder: Path, out: Path, outtype: str = "f32", legacy: bool = False, dialect: Dialect | None = None) -> tuple[Path, Path]:
    """Write OUT (text) and mmproj-OUT as llama.cpp's converter does and return both paths.

    `legacy`: as its first converters wrote them, with the encoder's ffn_up and ffn_down the wrong way round; Mistral 3's
    text as "llama"; Llama 4, with the name of a norm that its table has had since Gemma 4. What these files cannot say must have
    the value that llama.cpp assumes: see `Dialect.assume`. `dialect`: of a checkpoint that no case has.
    """
    saved = Saved(folder)
    dialect, text = dialect or saved.dialect, saved.text
    dialect.assume(saved)
    w = new_writer(out, dialect.text_arch(saved, legacy), outtype, "model")
    text_sizes(w, text, dialect.feed_forward)
    w.add_layer_norm_rms_eps(text["rms_norm_eps"])
    dialect.text_keys(w, saved)
    saved.vocabulary().write(w, text["vocab_size"])
    write(w, dialect.text_tensors(saved), outtype)

    path = out.with_name(f"mmproj-{out.name}")
    mmproj = new_writer(path, "clip", outtype, "mmproj" if "now" in dialect.converters else None)
    dialect.encoder_keys(mmproj, saved)
    dialect.vision_keys(mmproj, saved)
    write(mmproj, dialect.vision_tensors(saved, legacy), outtype)
    return out, path


def vision_name(source: str, legacy: bool = False) -> str:
    """Return gguf-py's name for a tensor of an encoder; `legacy`: with ffn_up and ffn_down the wrong way round."""
    name = VISION_NAMES.get_name(source, try_suffixes=(".weight", ".bias"))
    assert name is not None, source
    if legacy and re.search(r"\.ffn_(up|down)\.", name):
        name = name.replace("ffn_up", "ffn_x").replace("ffn_down", "ffn_up").replace("ffn_x", "ffn_down")
    return name


def llama3_factors(text: dict[str, Any]) -> np.ndarray:
    """Divisors of rope's frequencies, as both programs' converters compute them, one by one."""
    rope, dim = text["rope_parameters"], text["head_dim"]
    original = rope["original_max_position_embeddings"]
    low, high = original / rope["low_freq_factor"], original / rope["high_freq_factor"]
    factors = []
    for i in range(0, dim, 2):
        wave = 2 * np.pi * rope["rope_theta"] ** (i / dim)
        if low != high and high <= wave <= low:
            smooth = (original / wave - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
        else:
            factors.append(1 if wave < high else rope["factor"])
    return np.array(factors, np.float32)


# --- Ollama -----------------------------------------------------------------------------------------------------------

def ollama_file(folder: Path, out: Path, outtype: str = "f16", extra_tokens: int = 0) -> Path:
    """Write a checkpoint as one file in Ollama's layout and return its path.

    `extra_tokens`: so many tokens beyond the embedding's rows, as published Gemma 3 files have. They have no template.
    """
    saved = Saved(folder)
    return saved.dialect.ollama_file(saved, out, outtype, extra_tokens)


def ollama_vocabulary(w: gguf.GGUFWriter, v: Vocabulary, n: int, bare: bool) -> None:
    """Write the keys of a tokenizer with `n` tokens; `bare`: without its template."""
    n_pad = n - len(v.tokens)
    w.add_tokenizer_model(v.model)
    w.add_tokenizer_pre(v.pre)
    w.add_token_list(v.tokens + [f"[PAD{i}]" for i in range(len(v.tokens), n)])
    w.add_token_types(v.types + [gguf.TokenType.USER_DEFINED] * n_pad)
    w.add_token_scores((v.scores or [float(i) for i in range(len(v.tokens))]) + [-1.0] * n_pad)
    if v.merges is not None:
        w.add_token_merges(v.merges)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if name in v.special:
            w.add_uint32(f"tokenizer.ggml.{key}_token_id", v.special[name])
            w.add_bool(f"tokenizer.ggml.add_{key}_token", name == "bos" and v.add_bos)
    if v.chat_template is not None and not bare:
        w.add_chat_template(v.chat_template)


def ollama_store(root: Path, name: str, model: Path, projector: Path | None = None) -> Path:
    """Put files into a store as Ollama keeps it, under the library's `name` ("gemma3:tiny"), and return its root."""
    layers = []
    for file, kind in ((model, "model"), (projector, "projector")):
        if file is not None:
            data = file.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            (root / "blobs").mkdir(parents=True, exist_ok=True)
            (root / "blobs" / f"sha256-{digest}").write_bytes(data)
            layers.append({"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}",
                           "size": len(data)})
    model_name, tag = name.split(":")
    manifest = root / "manifests" / "registry.ollama.ai" / "library" / model_name / tag
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers,
                                    "mediaType": "application/vnd.docker.distribution.manifest.v2+json"}))
    return root


# --- files ------------------------------------------------------------------------------------------------------------

TYPES = {"f32": (gguf.GGMLQuantizationType.F32, 0), "f16": (gguf.GGMLQuantizationType.F16, 1)}


def new_writer(path: Path, arch: str, outtype: str, kind: str | None = None) -> gguf.GGUFWriter:
    """Return a writer with the keys that begin every file."""
    writer = gguf.GGUFWriter(path, arch)
    if kind is not None:
        writer.add_type(kind)
    writer.add_file_type(TYPES[outtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def write(writer: gguf.GGUFWriter, tensors: Tensors, outtype: str, conv_too: bool = False) -> None:
    """Write tensors; vectors stay float32 and, but for `conv_too`, so does what touches pixels."""
    for name, value in tensors:
        plain = value.ndim < 2 or (not conv_too and name.startswith(("v.patch_embd", "v.position_embd")))
        dtype = np.float32 if plain or outtype == "f32" else np.float16
        writer.add_tensor(name, np.ascontiguousarray(value, dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- llama.cpp runs what was written ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class LlamaCpp:
    """How llama.cpp sees with an architecture's files."""

    picture: tuple[int, int] = (168, 140)       # width and height that nothing resizes
    assumed: dict[str, Any] = field(default_factory=dict)       # settings under which its constants are those of the checkpoint
    error: float = 2e-3                         # largest of its rows' errors, as a share of their range
    outtypes: tuple[str, ...] = ("f32",)        # in which its rows are compared

    def ids(self, seen: Seen, soft: int | None) -> list[int | None]:
        """Return what it puts in a picture's place: ids, and None for its rows."""
        return [None if i == soft else i for i in seen.ids]

    def adapt(self, mmproj: Path) -> None:
        """Change the encoder's file where llama.cpp would not compute what the checkpoint does."""

    def rows(self, rows: np.ndarray, seen: Seen) -> np.ndarray:
        """Return those of its rows that transformers has too, in transformers' order."""
        return rows

    def wanted(self, seen: Seen) -> np.ndarray:
        """Return transformers' rows that it has too."""
        return np.concatenate([f.reshape(-1, f.shape[-1]) for f in seen.features])             # of a tile each, or of the picture

    def between(self, rows: np.ndarray, seen: Seen) -> tuple[np.ndarray, list[int]]:
        """Return those of its rows that are embeddings of tokens, and the tokens."""
        return rows[:0], []


def llama_cpp_logits(llama_cpp: Any, path: Path, ids: list[int], **options: Any) -> np.ndarray:
    """Return llama.cpp's logits at every position, float32 [n, vocab], with its cache in float32."""
    model = llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=256, n_threads=2, logits_all=True, type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False, verbose=False, **options)
    model.eval(ids)
    return model.scores[:len(ids)].copy()


def mtmd_rows(text: Path, mmproj: Path, picture: Any) -> tuple[list[int | None], np.ndarray]:
    """Return what llama.cpp puts in a picture's place (ids, None for the rows) and the rows [n, width] that it encodes.

    Raises: ValueError if its loader refuses the encoder's file.
    """
    import ctypes

    import llama_cpp
    from llama_cpp import mtmd_cpp as mtmd

    model = llama_cpp.Llama(str(text), n_ctx=256, n_threads=2, verbose=False)
    options = mtmd.mtmd_context_params_default()
    options.use_gpu, options.n_threads, options.warmup, options.print_timings = False, 2, False, False
    options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = mtmd.mtmd_init_from_file(str(mmproj).encode(), model.model, options)
    if not context:
        raise ValueError(f"llama.cpp does not load {mmproj}")
    pixels = np.ascontiguousarray(picture)
    bitmap = mtmd.mtmd_bitmap_init(pixels.shape[1], pixels.shape[0], pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
    chunks, marker = mtmd.mtmd_input_chunks_init(), mtmd.mtmd_default_marker()
    prompt = mtmd.mtmd_input_text(text=marker, text_len=len(marker), add_special=False, parse_special=True)
    assert mtmd.mtmd_tokenize(context, chunks, ctypes.byref(prompt), (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap), 1) == 0
    ids: list[int | None] = []
    rows = []
    for i in range(mtmd.mtmd_input_chunks_size(chunks)):
        chunk = mtmd.mtmd_input_chunks_get(chunks, i)
        n = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
            assert mtmd.mtmd_encode_chunk(context, chunk) == 0
            width = llama_cpp.llama_model_n_embd_inp(model.model)            # DeepStack's parts too
            rows.append(np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(context), (n * width,)).reshape(n, width).copy())
            ids += [None] * n
        else:
            ids += mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(ctypes.c_size_t()))[:n]
    mtmd.mtmd_input_chunks_free(chunks)
    mtmd.mtmd_bitmap_free(bitmap)
    mtmd.mtmd_free(context)
    return ids, np.concatenate(rows)


FORMS = {2: "<H", 4: "<I", 5: "<i", 6: "<f"}                               # of the struct module, by GGUF's types
LIST = 9                                                                   # then come the type of its elements, and their number


def altered(source: Path, out: Path, key: str, value: float) -> Path:
    """Copy a file with another number at a key, or another first number of its list."""
    data = bytearray(source.read_bytes())
    at = data.index(key.encode()) + len(key)
    kind, of = struct.unpack_from("<II", data, at)
    struct.pack_into(FORMS[of if kind == LIST else kind], data, at + (16 if kind == LIST else 4), value)
    out.write_bytes(data)
    return out


def copied(source: Path, out: Path, keys: dict[str, Any], tensor: Callable[[str, np.ndarray], Tensors]) -> Path:
    """Copy a file in float32 with other values of keys, whole numbers or lists, None: without it, and with what `tensor` makes of each of its tensors."""
    reader = gguf.GGUFReader(source)
    w = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key, value in reader.fields.items():
        if not key.startswith("GGUF.") and key not in (*keys, "general.architecture"):
            w.add_key_value(key, value.contents(), value.types[0], value.types[1] if len(value.types) > 1 else None)
    for key, new in keys.items():
        if new is not None:
            (w.add_array if isinstance(new, list) else w.add_uint32)(key, new)
    write(w, [made for t in reader.tensors for made in tensor(t.name, np.array(t.data))], "f32")
    return out
