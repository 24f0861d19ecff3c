"""Tiny checkpoints in other programs' files: llama.cpp's pair (text and mmproj), Ollama's single file, and its store.

Written from those programs' own converters and independently of ours: only the vocabulary is shared. llama.cpp:
`conversion/gemma.py`, `conversion/qwenvl.py`, `conversion/mistral3.py`, `conversion/llava.py`, `conversion/llama4.py`, names from
gguf-py; Ollama: `convert/convert_gemma3.go`, `convert/convert_qwen25vl.go`, `convert/convert_mistral.go`,
`convert/convert_mllama.go`, `convert/convert_llama.go`, `convert/convert_llama4.go`, `convert/reader.go`, and the keys that its
published files show. No key of our own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from converters.tokenizer import Vocabulary, read_vocabulary

Tensors = Iterable[tuple[str, np.ndarray]]
PIXTRAL = ("mistral3", "llava")         # of the kinds that are written here; transformers has Pixtral 12B as a "llava"


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
                self.tensors[re.sub(r"^model\.language_model\.", "model.", name)] = value.float().numpy()

    def text_tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """List the text model's tensors under llama.cpp's names, which Ollama shares; Gemma's norms hold 1 + w."""
        archs = {"gemma3": gguf.MODEL_ARCH.GEMMA3, "llama4": gguf.MODEL_ARCH.LLAMA4, "mistral3": gguf.MODEL_ARCH.MISTRAL3,
                 "llava": gguf.MODEL_ARCH.LLAMA}
        names = gguf.get_tensor_name_map(archs.get(self.kind, gguf.MODEL_ARCH.QWEN2VL), 99)
        if self.kind == "llama4" and self.text["rope_parameters"]["rope_type"] == "llama3":
            yield "rope_freqs.weight", _llama3_factors(self.text)
        for source, value in self.tensors.items():
            if not source.startswith(("model.", "lm_head.")):
                continue
            if ".experts." in source:       # [experts, in, out]; gate and up side by side
                parts = zip(("gate_proj", "up_proj"), np.split(value, 2, axis=2)) if "gate_up" in source else [("down_proj", value)]
                for part, matrices in parts:
                    name = names.get_name(f"{source.rpartition('.')[0]}.{part}")
                    assert name is not None, source
                    yield f"{name}.weight", matrices.swapaxes(1, 2)
                continue
            name = names.get_name(source, try_suffixes=(".weight", ".bias"))
            assert name is not None, source
            if self.kind == "gemma3":
                for theirs, ours in (("post_attention_layernorm", "post_attention_norm"),
                                     ("pre_feedforward_layernorm", "ffn_norm"),
                                     ("post_feedforward_layernorm", "post_ffw_norm")):
                    if theirs in source:
                        name = f"blk.{source.split('.')[2]}.{ours}.weight"
                value = value + 1 if "norm" in source else value
            if self.kind in PIXTRAL and re.search(r"\.[qk]_proj\.", source):
                value = turned(value, self.text["num_attention_heads" if ".q_proj." in source else "num_key_value_heads"])
            yield name, value

    def vocabulary(self) -> Vocabulary:
        return read_vocabulary(self.folder, {**self.text, **self.config})


def turned(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Return q or k with the halves of each head's rows interleaved: `LlamaModel.permute`."""
    return weight.reshape(n_heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


# --- llama.cpp --------------------------------------------------------------------------------------------------------

def llama_cpp_files(folder: Path, out: Path, outtype: str = "f32", legacy: bool = False) -> tuple[Path, Path]:
    """Write OUT (text) and mmproj-OUT as llama.cpp's converter does and return both paths.

    `legacy`: as its first converters wrote them, with the encoder's ffn_up and ffn_down the wrong way round; Mistral 3's
    text as "llama"; Llama 4, with the name of a norm that its table has had since Gemma 4. What these files cannot say must have
    the value that llama.cpp assumes: see `_assumed`.
    """
    saved = Saved(folder)
    _assumed(saved)
    mistral = saved.kind in PIXTRAL
    archs = {"gemma3": "gemma3", "llama4": "llama4", "mistral3": "llama" if legacy else "mistral3", "llava": "llama"}
    arch = archs.get(saved.kind, "qwen2vl")
    text = _writer(out, arch, outtype, "model")
    _text_keys(text, saved)
    saved.vocabulary().write(text, saved.text["vocab_size"])
    _write(text, saved.text_tensors(), outtype)

    path = out.with_name(f"mmproj-{out.name}")
    mmproj, vision = _writer(path, "clip", outtype, "mmproj"), saved.vision
    gemma, first, llama = (saved.kind == kind for kind in ("gemma3", "qwen2_vl", "llama4"))
    mmproj.add_clip_has_vision_encoder(True)
    mmproj.add_vision_projection_dim(saved.text["hidden_size"])
    mmproj.add_vision_image_size(vision.get("image_size", 560))
    mmproj.add_vision_patch_size(vision["patch_size"])
    mmproj.add_vision_embedding_length(vision["embed_dim" if first else "hidden_size"])
    # Qwen2-VL's is the width of the text model, which is what llama.cpp's converter writes
    mmproj.add_vision_feed_forward_length(vision["hidden_size" if first else "intermediate_size"])
    mmproj.add_vision_block_count(vision["num_hidden_layers" if gemma or mistral or llama else "depth"])
    mmproj.add_vision_head_count(vision["num_attention_heads" if gemma or mistral or llama else "num_heads"])
    mmproj.add_vision_image_mean(saved.images["image_mean"])
    mmproj.add_vision_image_std(saved.images["image_std"])
    mmproj.add_clip_projector_type({"gemma3": "gemma3", "llama4": "llama4", "qwen2_vl": "qwen2vl_merger",
                                    **dict.fromkeys(PIXTRAL, "pixtral")}.get(saved.kind, "qwen2.5vl_merger"))
    mmproj.add_vision_attention_layernorm_eps(vision["layer_norm_eps"] if gemma else 1e-5 if mistral or llama else 1e-6)
    if llama:
        mmproj.add_vision_use_gelu(True)
        mmproj.add_vision_projector_scale_factor(int(1 / vision["pixel_shuffle_ratio"]))
    elif gemma:
        mmproj.add_vision_use_gelu(True)
        pool = vision["image_size"] // vision["patch_size"] // int(saved.config["mm_tokens_per_image"] ** 0.5)
        if pool != 4:
            mmproj.add_vision_projector_scale_factor(pool)
    elif mistral:
        mmproj.add_vision_use_silu(True)
        if saved.kind == "mistral3":
            mmproj.add_vision_spatial_merge_size(saved.config["spatial_merge_size"])
    elif not first:
        mmproj.add_vision_use_silu(True)
        mmproj.add_vision_n_wa_pattern(vision["fullatt_block_indexes"][0] + 1)
    _write(mmproj, _pixtral_tensors(saved) if mistral else _clip_tensors(saved, legacy), outtype)
    return out, path


def _assumed(saved: Saved) -> None:
    """Check what llama.cpp hard-codes of these families."""
    vision, text = saved.vision, saved.text
    if saved.kind == "gemma3":
        assert text["query_pre_attn_scalar"] == text["head_dim"] and saved.images["image_mean"] == [0.5] * 3
        assert [k == "full_attention" for k in text["layer_types"]] == [i % 6 == 5 for i in range(text["num_hidden_layers"])]
        assert text["rope_parameters"]["sliding_attention"]["rope_theta"] == 1e4
    elif saved.kind in PIXTRAL:
        assert vision["hidden_act"] == "silu" and vision["rope_parameters"]["rope_theta"] == 1e4
        assert saved.images["size"] == {"longest_edge": vision["image_size"]} and not text["sliding_window"]
    elif saved.kind == "llama4":
        assert [bool(r) for r in text["no_rope_layers"]] == [i % 4 != 3 for i in range(text["num_hidden_layers"])]
        assert text["attention_chunk_size"] == text["floor_scale"] == 8192 and text["attn_scale"] == 0.1
        assert text["use_qk_norm"] == (text["num_local_experts"] != 128) and vision["rope_parameters"]["rope_theta"] == 1e4
    else:
        assert vision["spatial_merge_size"] == vision["temporal_patch_size"] == 2 and vision.get("window_size", 112) == 112
        full = vision.get("fullatt_block_indexes", [])
        assert not full or full == list(range(full[0], vision["depth"], full[0] + 1))


def _text_keys(out: gguf.GGUFWriter, saved: Saved) -> None:
    text = saved.text
    out.add_block_count(text["num_hidden_layers"])
    out.add_context_length(text["max_position_embeddings"])
    out.add_embedding_length(text["hidden_size"])
    if saved.kind != "llama4":
        out.add_feed_forward_length(text["intermediate_size"])
    out.add_head_count(text["num_attention_heads"])
    out.add_head_count_kv(text["num_key_value_heads"])
    out.add_layer_norm_rms_eps(text["rms_norm_eps"])
    rope = text["rope_parameters"]
    if saved.kind == "gemma3":
        out.add_key_length(text["head_dim"])
        out.add_value_length(text["head_dim"])
        out.add_rope_freq_base(rope["full_attention"]["rope_theta"])
        out.add_sliding_window(text["sliding_window"])
    elif saved.kind in PIXTRAL:
        out.add_key_length(text["head_dim"])
        out.add_value_length(text["head_dim"])
        out.add_rope_dimension_count(text["head_dim"])
        out.add_rope_freq_base(rope["rope_theta"])
        out.add_vocab_size(text["vocab_size"])
    elif saved.kind == "llama4":
        out.add_key_length(text["head_dim"])
        out.add_value_length(text["head_dim"])
        out.add_rope_freq_base(rope["rope_theta"])
        out.add_rope_dimension_count(text["head_dim"])
        out.add_feed_forward_length(text["intermediate_size_mlp"])
        out.add_expert_feed_forward_length(text["intermediate_size"])
        out.add_expert_count(text["num_local_experts"])
        out.add_expert_used_count(text["num_experts_per_tok"])
        out.add_interleave_moe_layer_step(text["interleave_moe_layer_step"])
    else:
        out.add_rope_freq_base(rope["rope_theta"])
        out.add_rope_dimension_sections([*rope["mrope_section"], 0])


def _pixtral_tensors(saved: Saved) -> Iterator[tuple[str, np.ndarray]]:
    names, heads = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 99), saved.vision["num_attention_heads"]
    line_end = saved.vocabulary().tokens.index("[IMG_BREAK]")
    for source, value in saved.tensors.items():
        if source == "model.embed_tokens.weight":
            yield "v.token_embd.img_break", value[line_end]
        elif not source.startswith(("model.", "lm_head.")):
            yield names.get_name(source, try_suffixes=(".weight", ".bias")), (
                turned(value, heads) if re.search(r"\.[qk]_proj\.", source) else value)


def _llama3_factors(text: dict[str, Any]) -> np.ndarray:
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


def _clip_tensors(saved: Saved, legacy: bool) -> Iterator[tuple[str, np.ndarray]]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 99)
    for source, value in saved.tensors.items():
        if source.startswith(("model.", "lm_head.")):
            continue
        if source == "visual.patch_embed.proj.weight":
            yield "v.patch_embd.weight", value[:, :, 0]
            yield "v.patch_embd.weight.1", value[:, :, 1]
            continue
        parts = [("", value)]
        if ".qkv." in source:
            parts = list(zip("qkv", np.split(value, 3)))
        for part, array in parts:
            known = re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", source)
            known = known.replace(".qkv.", f".{part}.").replace("_projection_weight", "_projection.weight")
            if source == "multi_modal_projector.linear_1.weight":
                yield "mm.model.fc.weight", array
                continue
            if known.endswith("positional_embedding_vlm"):
                known += ".weight"
            name = names.get_name(known, try_suffixes=(".weight", ".bias"))
            assert name is not None, source
            if saved.kind == "llama4":
                name = name if legacy else name.replace("attn_post_norm", "ln2")
            elif legacy and re.search(r"\.ffn_(up|down)\.", name):
                name = name.replace("ffn_up", "ffn_x").replace("ffn_down", "ffn_up").replace("ffn_x", "ffn_down")
            yield name, array + 1 if "soft_emb_norm" in name else array


# --- Ollama -----------------------------------------------------------------------------------------------------------

OLLAMA_NAMES = {        # strings.NewReplacer: at each place the first that fits; text names are llama.cpp's
    "gemma3": (("vision_tower.vision_model.embeddings", "v"), ("vision_tower.vision_model", "v"),
               ("vision_tower.embeddings", "v"), ("vision_tower", "v"), ("encoder.layers", "blk"),
               ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v"),
               ("self_attn.out_proj", "attn_output"), ("input_projection_weight", "input_projection.weight"),
               ("multi_modal_projector", "mm")),
    "llama4": (("model.layers", "blk"), ("input_layernorm", "attn_norm"), ("self_attn.q_proj", "attn_q"),
               ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"),
               ("post_attention_layernorm", "ffn_norm"), ("vision_model", "v"), ("multi_modal_projector", "mm"),
               ("patch_embedding.linear", "patch_embedding")),
    "qwen2_5_vl": (("visual", "v"), ("blocks", "blk"), ("attn.proj", "attn_out"), ("norm1", "ln1"), ("norm2", "ln2"),
                   ("mlp.down_proj", "ffn_down"), ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up")),
    "mistral3": (("transformer.layers", "blk"), ("vision_tower", "v"), ("ln_pre", "encoder_norm"),
                 ("attention.q_proj", "attn_q"), ("attention.k_proj", "attn_k"), ("attention.v_proj", "attn_v"),
                 ("attention.o_proj", "attn_output"), ("attention_norm", "attn_norm"),
                 ("feed_forward.gate_proj", "ffn_gate"), ("feed_forward.down_proj", "ffn_down"),
                 ("feed_forward.up_proj", "ffn_up"), ("multi_modal_projector", "mm")),
    "mllama": (("lm_head", "output"), ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("model.layers", "blk"),
               ("input_layernorm", "attn_norm"), ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"),
               ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"), ("mlp.gate_proj", "ffn_gate"),
               ("mlp.down_proj", "ffn_down"), ("mlp.up_proj", "ffn_up"), ("post_attention_layernorm", "ffn_norm"),
               ("language_model.", ""), ("gate_attn", "attn_gate"), ("gate_ffn", "ffn_gate"), ("cross_attn.", "cross_attn_"),
               ("vision_model", "v"), ("class_embedding", "class_embd"), ("patch_embedding", "patch_embd"),
               ("gated_positional_embedding.tile_embedding", "tile_position_embd"),
               ("gated_positional_embedding.embedding", "position_embd.weight"), ("gated_positional_embedding", "position_embd"),
               ("embedding.weight", "weight"), ("pre_tile_positional_embedding", "pre_tile_position_embd"),
               ("post_tile_positional_embedding", "post_tile_position_embd"), ("layernorm_pre", "pre_ln"),
               ("layernorm_post", "post_ln"), ("global_transformer.layers", "global.blk"), ("transformer.layers", "blk"),
               ("mlp.fc1", "ffn_up"), ("mlp.fc2", "ffn_down"), ("multi_modal_projector", "mm.0")),
}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)         # imageproc.ClipDefaultMean, ClipDefaultSTD
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def ollama_file(folder: Path, out: Path, outtype: str = "f16", extra_tokens: int = 0) -> Path:
    """Write a gemma3, llama4, qwen2_5_vl, mistral3 or mllama checkpoint as one file in Ollama's layout and return its path.

    `extra_tokens`: so many tokens beyond the embedding's rows, as published Gemma 3 files have. They have no template.
    """
    saved = Saved(folder)
    if saved.kind == "mllama":
        return _ollama_across(saved, out, outtype, extra_tokens)
    text, vision, gemma = saved.text, saved.vision, saved.kind == "gemma3"
    arch = "qwen25vl" if saved.kind == "qwen2_5_vl" else saved.kind
    w = _writer(out, arch, outtype)
    w.add_block_count(text["num_hidden_layers"])
    w.add_context_length(text["max_position_embeddings"])
    w.add_embedding_length(text["hidden_size"])
    w.add_feed_forward_length(text["intermediate_size"])
    w.add_head_count(text["num_attention_heads"])
    w.add_head_count_kv(text["num_key_value_heads"])
    eps = None          # of the encoder, where the file says it under the usual name
    if gemma:           # no norm epsilon, no rope bases: Ollama's constants
        assert text["rms_norm_eps"] == 1e-6 and saved.images["image_mean"] == [0.5] * 3
        w.add_key_length(text["head_dim"])
        w.add_value_length(text["head_dim"])
        w.add_sliding_window(text["sliding_window"])
        w.add_uint32("gemma3.mm.tokens_per_image", saved.config["mm_tokens_per_image"])
        numbers = {"block_count": vision["num_hidden_layers"], "feed_forward_length": vision["intermediate_size"],
                   "image_size": vision["image_size"], "attention.head_count": vision["num_attention_heads"]}
        eps = vision["layer_norm_eps"]
    elif saved.kind == "mistral3":      # no epsilon of the encoder, no activation; what the config lacks is 0 or empty
        assert vision["hidden_act"] == "silu" and saved.images["size"] == {"longest_edge": vision["image_size"]}
        w.add_layer_norm_rms_eps(text["rms_norm_eps"])
        w.add_key_length(text["head_dim"])
        w.add_value_length(text["head_dim"])
        w.add_rope_dimension_count(text["head_dim"])
        w.add_rope_freq_base(text["rope_parameters"]["rope_theta"])
        w.add_string("mistral3.rope.scaling.type", text["rope_parameters"]["rope_type"])
        for name in ("factor", "beta_fast", "beta_slow"):
            w.add_float32(f"mistral3.rope.scaling.{name}", 0.0)
        w.add_uint32("mistral3.image_token_index", saved.config["image_token_index"])
        w.add_uint32("mistral3.spatial_merge_size", saved.config["spatial_merge_size"])
        w.add_bool("mistral3.mm.projector_bias", saved.config["multimodal_projector_bias"])
        w.add_string("mistral3.mm.projector_hidden_act", saved.config["projector_hidden_act"])
        w.add_float32("mistral3.vision.rope.freq_base", vision["rope_parameters"]["rope_theta"])
        numbers = {"block_count": vision["num_hidden_layers"], "feed_forward_length": vision["intermediate_size"],
                   "image_size": vision["image_size"], "attention.head_count": vision["num_attention_heads"],
                   "attention.key_length": vision["head_dim"]}
    elif saved.kind == "llama4":        # the dense layers' width has a key of its own; nothing about chunks and temperature
        _assumed(saved)
        w.add_layer_norm_rms_eps(text["rms_norm_eps"])
        w.add_rope_freq_base(text["rope_parameters"]["rope_theta"])
        w.add_rope_dimension_count(text["hidden_size"] // text["num_attention_heads"])
        w.add_key_length(text["head_dim"])
        w.add_value_length(text["head_dim"])
        for name, key in (("intermediate_size", "intermediate_size_mlp"), ("intermediate_size_moe", "intermediate_size"),
                          ("expert_count", "num_local_experts"), ("expert_used_count", "num_experts_per_tok"),
                          ("interleave_moe_layer_step", "interleave_moe_layer_step")):
            w.add_uint32(f"llama4.{name}", text[key])
        w.add_bool("llama4.use_qk_norm", text["use_qk_norm"])
        w.add_float32("llama4.vision.rope.freq_base", vision["rope_parameters"]["rope_theta"])
        w.add_float32("llama4.vision.layer_norm_epsilon", vision["norm_eps"])
        w.add_float32("llama4.vision.pixel_shuffle_ratio", vision["pixel_shuffle_ratio"])
        numbers = {"block_count": vision["num_hidden_layers"], "feed_forward_length": vision["intermediate_size"],
                   "image_size": vision["image_size"], "attention.head_count": vision["num_attention_heads"]}
    else:
        w.add_layer_norm_rms_eps(text["rms_norm_eps"])
        w.add_rope_freq_base(text["rope_parameters"]["rope_theta"])
        w.add_array("qwen25vl.rope.mrope_section", text["rope_parameters"]["mrope_section"])
        numbers = {"block_count": vision["depth"], "spatial_merge_size": vision["spatial_merge_size"],
                   "spatial_patch_size": 0, "window_size": vision["window_size"],
                   "temporal_patch_size": vision["temporal_patch_size"], "attention.head_count": vision["num_heads"]}
        w.add_float32("qwen25vl.vision.rope.freq_base", 1e4)
        w.add_array("qwen25vl.vision.fullatt_block_indexes", vision["fullatt_block_indexes"])
        eps = 1e-6
    for name, value in {**numbers, "embedding_length": vision["hidden_size"], "num_channels": 3,
                        "patch_size": vision["patch_size"]}.items():
        w.add_uint32(f"{arch}.vision.{name}", value)
    if eps is not None:
        w.add_float32(f"{arch}.vision.attention.layer_norm_epsilon", eps)
    _ollama_vocabulary(w, saved.vocabulary(), text["vocab_size"] + extra_tokens, bool(extra_tokens))
    _write(w, [*saved.text_tensors(), *_ollama_vision(saved)], outtype, conv_too=True)
    return out


def _ollama_vision(saved: Saved) -> Iterator[tuple[str, np.ndarray]]:
    replacements = dict(OLLAMA_NAMES[saved.kind])
    pattern = re.compile("|".join(map(re.escape, replacements)))
    for source, value in saved.tensors.items():
        if source.startswith(("model.", "lm_head.")):
            continue
        name = pattern.sub(lambda m: replacements[m.group()], source)
        if "patch_embed.proj" in name:
            for i in range(2):      # [out, 3, 1, p, p], then without the 1
                yield name.replace("patch_embed.proj", f"patch_embd_{i}"), value[:, :, i]
        elif "attn.qkv" in name:
            for part, third in zip("qkv", np.split(value, 3)):
                yield name.replace("attn.qkv", f"attn_{part}"), third
        else:
            shifted = saved.kind == "gemma3" and not name.startswith("v.") and name.endswith("_norm.weight")
            yield name, value + 1 if shifted else value


def _ollama_across(saved: Saved, out: Path, outtype: str, extra_tokens: int) -> Path:
    """Llama 3.2 Vision, as `convert_mllama.go` writes it: heads become interleaved in the encoder and in cross-attention too.

    With `extra_tokens`, under the names of the published file, which `model_vision.go` reads: its feed-forward is exchanged.
    """
    text, vision = saved.text, saved.vision
    assert (saved.images["image_mean"], saved.images["image_std"]) == (list(CLIP_MEAN), list(CLIP_STD))
    assert vision["hidden_act"] == "gelu"
    w = _writer(out, "mllama", outtype)
    w.add_block_count(text["num_hidden_layers"])
    w.add_context_length(text["max_position_embeddings"])
    w.add_embedding_length(text["hidden_size"])
    w.add_feed_forward_length(text["intermediate_size"])
    w.add_head_count(text["num_attention_heads"])
    w.add_head_count_kv(text["num_key_value_heads"])
    w.add_layer_norm_rms_eps(text["rms_norm_eps"])
    w.add_rope_dimension_count(text["hidden_size"] // text["num_attention_heads"])
    rope = text["rope_parameters"]
    w.add_rope_freq_base(rope["rope_theta"])
    w.add_array("mllama.attention.cross_attention_layers", text["cross_attention_layers"])
    for name, key in (("block_count", "num_hidden_layers"), ("global.block_count", "num_global_layers"),
                      ("embedding_length", "hidden_size"), ("feed_forward_length", "intermediate_size"),
                      ("attention.head_count", "attention_heads"), ("image_size", "image_size"), ("patch_size", "patch_size"),
                      ("max_num_tiles", "max_num_tiles"), ("num_channels", "num_channels")):
        w.add_uint32(f"mllama.vision.{name}", vision[key])
    w.add_float32("mllama.vision.attention.layer_norm_epsilon", vision["norm_eps"])
    # Ollama keeps the state before a layer of this number, as the authors do; the checkpoint's own transformers the one behind it
    w.add_array("mllama.vision.intermediate_layers_indices", [i + 1 for i in vision["intermediate_layers_indices"]])
    _ollama_vocabulary(w, saved.vocabulary(), text["vocab_size"] + 8 + extra_tokens, bool(extra_tokens))
    replacements = dict(OLLAMA_NAMES["mllama"])
    pattern = re.compile("|".join(map(re.escape, replacements)))
    heads = {"attn_q": text["num_attention_heads"], "attn_k": text["num_key_value_heads"]}
    if not extra_tokens:                                    # convert_llama.go: the suffixes attn_q_proj and attn_k_proj
        heads |= {f"cross_{name}_proj": n for name, n in heads.items()}
    length, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wave = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, 16, 2) / 16)
    smooth = (length / wave - low) / (high - low)
    factors = np.where(wave < length / high, 1.0, np.where(wave > length / low, factor, 1 / ((1 - smooth) / factor + smooth)))
    tensors = [("rope_freqs.weight", factors)]
    for source, value in saved.tensors.items():
        name = pattern.sub(lambda m: replacements[m.group()], source)
        if name == "v.position_embd.gate":
            tensors += [(name, 1 - np.tanh(value)), ("v.tile_position_embd.gate", np.tanh(value))]
            continue
        part = name.split(".")[-2] if "." in name else ""
        if part in heads:
            n = vision["attention_heads"] if name.startswith("v.") else heads[part]
            value = value.reshape(n, 2, len(value) // n // 2, -1).swapaxes(1, 2).reshape(value.shape)
        if name.startswith("v.") and extra_tokens:
            for theirs, published in (("attn_norm", "ln1"), ("ffn_norm", "ln2"), ("attn_output", "attn_out"), ("ffn_up", "ffn_"),
                                      ("ffn_down", "ffn_up"), ("ffn_.", "ffn_down.")):
                name = name.replace(theirs, published)
        gated = name.startswith("v.") and name.endswith(("tile_position_embd.gate", "attn_gate", "ffn_gate"))
        tensors.append((name, np.tanh(value) if gated else value))
    _write(w, tensors, outtype, conv_too=True)
    return out


def _ollama_vocabulary(w: gguf.GGUFWriter, v: Vocabulary, n: int, bare: bool) -> None:
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


def _writer(path: Path, arch: str, outtype: str, kind: str | None = None) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, arch)
    if kind is not None:
        writer.add_type(kind)
    writer.add_file_type(TYPES[outtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def _write(writer: gguf.GGUFWriter, tensors: Tensors, outtype: str, conv_too: bool = False) -> None:
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

def llama_cpp_logits(llama_cpp: Any, path: Path, ids: list[int], **options: Any) -> np.ndarray:
    """Return llama.cpp's logits at every position, float32 [n, vocab], with its cache in float32."""
    model = llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=256, n_threads=2, logits_all=True, type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False, verbose=False, **options)
    model.eval(ids)
    return model.scores[:len(ids)].copy()


def llama4_order(rows: np.ndarray) -> np.ndarray:
    """Put the rows that llama.cpp makes of a tile of Llama 4 into transformers' order: it goes through columns, not through rows.

    Its pixel shuffle (`clip.cpp`, `build_llama4`) leaves out the last of transformers' two transpositions.
    """
    side = int(len(rows) ** 0.5)
    return rows[np.arange(len(rows)).reshape(side, side).T.reshape(-1)]


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
            width = llama_cpp.llama_model_n_embd(model.model)
            rows.append(np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(context), (n * width,)).reshape(n, width).copy())
            ids += [None] * n
        else:
            ids += mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(ctypes.c_size_t()))[:n]
    mtmd.mtmd_input_chunks_free(chunks)
    mtmd.mtmd_bitmap_free(bitmap)
    mtmd.mtmd_free(context)
    return ids, np.concatenate(rows)
