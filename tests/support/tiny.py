"""Tiny random Hugging Face checkpoints, made in the test with a fixed seed, and transformers' results for them.

Sizes are odd on purpose (d_model no multiple of 256, fewer key heads than query heads), every parameter is random,
norms and biases too, and no special token has its official id: what a converter or a model gets wrong shows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

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

# transformers classes, tokenizer and config of each kind; d_model 96, d_ff 160 and head_dim 16 or 32 suit q8_0's 32
_COMMON = {"vocab_size": 512, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3,
           "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256}
_KINDS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", "llama-bpe", {**_COMMON, "rms_norm_eps": 1e-5}),
    "mistral": ("MistralConfig", "MistralForCausalLM", "tekken",
                {**_COMMON, "head_dim": 32, "sliding_window": 6, "rms_norm_eps": 1e-5}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", "llama-bpe",
                {**_COMMON, "rms_norm_eps": 1e-5, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", "qwen2", {**_COMMON, "tie_word_embeddings": True}),
    "qwen3moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", "qwen2",
                 {**_COMMON, "head_dim": 32, "num_experts": 12, "num_experts_per_tok": 4, "moe_intermediate_size": 64,
                  "norm_topk_prob": True}),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", "spm", {
        **_COMMON, "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "sliding_window": 6, "query_pre_attn_scalar": 32}),
}
# Kinds that see pictures: as above, with text and vision configs; what is left out of a vision config is transformers'
# default. Patch and window sizes give windows of 2 x 2 merged patches, cut at the edges of most pictures.
_QWEN_TEXT = {**_COMMON, "vocab_size": 520, "num_key_value_heads": 2, "max_position_embeddings": 512,
              "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
_SEEING: dict[str, tuple[str, str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("Gemma3Config", "Gemma3ForConditionalGeneration", "spm", {"mm_tokens_per_image": 4},
               {**_KINDS["gemma3_text"][3], "max_position_embeddings": 512},
               {"hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 3,
                "image_size": 56, "patch_size": 14, "layer_norm_eps": 1e-5, "vision_use_head": False}),
    "qwen2_5_vl": ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", "qwen2", {},
                   {**_QWEN_TEXT, "rms_norm_eps": 1e-6},
                   {"depth": 4, "hidden_size": 80, "intermediate_size": 100, "num_heads": 4, "out_hidden_size": 96,
                    "window_size": 56, "fullatt_block_indexes": [1, 3], "tokens_per_second": 3}),
    # cross-attention between self-attention and next to it; 3 patches along a tile, so that tiles have padding
    "mllama": ("MllamaConfig", "MllamaForConditionalGeneration", "llama-bpe", {},
               {**_COMMON, "num_hidden_layers": 6, "cross_attention_layers": [1, 3, 4], "max_position_embeddings": 512,
                "rope_parameters": ROPES["llama3"], "rms_norm_eps": 1e-5},
               {"hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 4, "num_global_layers": 2, "attention_heads": 3,
                "image_size": 44, "patch_size": 14, "intermediate_layers_indices": [0, 2], "vision_output_dim": 216,
                "norm_eps": 1e-4}),
    "qwen2_vl": ("Qwen2VLConfig", "Qwen2VLForConditionalGeneration", "qwen2", {"tie_word_embeddings": True}, _QWEN_TEXT,
                 {"depth": 3, "embed_dim": 80, "hidden_size": 96, "num_heads": 4, "mlp_ratio": 2}),
    "mistral3": ("Mistral3Config", "Mistral3ForConditionalGeneration", "tekken", {"tie_word_embeddings": False},
                 {**_KINDS["mistral"][3], "sliding_window": None, "max_position_embeddings": 512, "model_type": "mistral"},
                 {"hidden_size": 80, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 4,
                  "image_size": 130, "patch_size": 14, "hidden_act": "silu", "model_type": "pixtral"}),
    # chunks of 24 and steps of temperature every 10 tokens; layers 1 and 3 have experts, layer 3 no positions
    "llama4": ("Llama4Config", "Llama4ForConditionalGeneration", "llama4", {},
               {**_COMMON, "vocab_size": 520, "num_hidden_layers": 5, "head_dim": 16, "max_position_embeddings": 512,
                "intermediate_size": 64, "intermediate_size_mlp": 160, "num_local_experts": 5, "interleave_moe_layer_step": 2,
                "attention_chunk_size": 24, "floor_scale": 10, "attn_scale": 0.4, "rms_norm_eps": 1e-5,
                "rope_parameters": {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 16.0, "low_freq_factor": 1.0,
                                    "high_freq_factor": 1.0, "original_max_position_embeddings": 64}},
               {"hidden_size": 80, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56,
                "patch_size": 14, "projector_input_dim": 72, "projector_output_dim": 72, "vision_output_dim": 72}),
}
# Pixtral 12B: no groups of patches; read from llama.cpp's pair, without a converter of ours
_PAIRED = {"pixtral": ("LlavaConfig", "LlavaForConditionalGeneration", "tekken",
                       {"tie_word_embeddings": False, "vision_feature_select_strategy": "full", "vision_feature_layer": -1},
                       _SEEING["mistral3"][4], {**_SEEING["mistral3"][5], "patch_size": 16})}
# settings under which llama.cpp's constants are those of the checkpoint
LLAMA_CPP: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"vision_config": {"window_size": 112}},
    "llama4": {"text_config": {"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1}},
}
_KINDS["llama4_text"] = ("Llama4TextConfig", "Llama4ForCausalLM", "llama4", {
    **_SEEING["llama4"][4], **LLAMA_CPP["llama4"]["text_config"], "num_hidden_layers": 4})
KINDS = tuple(_KINDS)
SEEING_KINDS = tuple(_SEEING)
LLAMA_CPP_KINDS = tuple(kind for kind in _SEEING if kind != "mllama")      # those that see there


def make_checkpoint(kind: str, folder: str | Path, seed: int = 0, *, dtype: str = "float32",
                    max_shard_size: str = "1GB", tokenizer: str | None = "default",
                    processor: dict[str, Any] | None = None, **config_overrides: Any) -> Path:
    """Write a tiny random checkpoint and return its folder.

    `kind` is one of KINDS or SEEING_KINDS, or "pixtral"; `dtype` is float32, float16 or bfloat16; `tokenizer` is a key of
    TOKENIZERS, "default" for the kind's own, or None for none; the rest overrides the config, e.g. `rope_parameters=ROPES["yarn"]`.
    Kinds that see take `text_config` and `vision_config`, which override single values, and `processor`, settings of
    the image processor that is saved beside the model.
    """
    import torch
    import transformers

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {**_KINDS, **_SEEING, **_PAIRED}
    seeing = kind not in _KINDS
    config_class, model_class, usual_tokenizer, config = kinds[kind][:4]
    family = {"pixtral": "mistral3"}.get(kind, kind if kind in _FAMILIES else "qwen2_vl") if seeing else "plain"
    if tokenizer is not None:
        ids = save_tokenizer(usual_tokenizer if tokenizer == "default" else tokenizer, folder, family)
    else:
        ids = {**{name: 500 + i for i, name in enumerate(_FAMILIES[family].ids)},
               "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if seeing:
        text, vision = kinds[kind][4:]
        special = {name: ids.pop(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if kind == "mllama":                # the picture's token is the first that the output head does not have
            special["vocab_size"] = ids["image_token_index"]
        config = {**config, "text_config": {**text, **special, **config_overrides.pop("text_config", {})},
                  "vision_config": {**vision, **config_overrides.pop("vision_config", {})}}
    config = getattr(transformers, config_class)(**{**config, **ids, **config_overrides})
    model = getattr(transformers, model_class)(config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=random)
            if p.dim() == 1 and name.endswith(".weight") and any(part in name for part in ("norm", "ln_q", "ln_pre")):
                # Gemma's own norms multiply by 1 + weight
                centre = 0.0 if kind.startswith("gemma3") and "vision_tower" not in name else 1.0
                p.copy_(centre + 0.3 * noise)
            elif p.dim() == 1:
                p.copy_(0.5 * noise)
            elif p.dim() == 2 and ("embed" in name or "lm_head" in name):
                p.copy_(noise)
            else:
                fan_in = p.shape[1 if kind.startswith("llama4") else 2] if p.dim() == 3 else p[0].numel()       # experts
                p.copy_(1.5 * noise / fan_in ** 0.5)                    # attention that is far from uniform
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    if seeing:
        _image_processor(kind, config, processor or {}).save_pretrained(folder)
    return folder


def _image_processor(kind: str, config: Any, settings: dict[str, Any]) -> Any:
    import transformers

    vision = config.vision_config
    size = {"height": getattr(vision, "image_size", 0), "width": getattr(vision, "image_size", 0)}
    if kind == "mllama":
        return transformers.MllamaImageProcessorPil(**{
            "size": size, "max_image_tiles": vision.max_num_tiles, "image_mean": [0.48, 0.45, 0.4], "image_std": [0.26, 0.27, 0.28],
            **settings})
    if kind == "gemma3":
        return transformers.Gemma3ImageProcessorPil(**{"size": size, **settings})
    if kind in ("mistral3", "pixtral"):
        size = {"longest_edge": vision.image_size}
        return transformers.PixtralImageProcessorPil(**{"size": size, "patch_size": vision.patch_size, **settings})
    if kind == "llama4":
        return _llama4_images()(**{"size": {"height": vision.image_size, "width": vision.image_size}, **settings})
    return transformers.Qwen2VLImageProcessorPil(**{
        "patch_size": vision.patch_size, "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size, "min_pixels": 56 * 56, "max_pixels": 224 * 224, **settings})


@cache
def _llama4_images() -> Any:
    """Return transformers' Llama4ImageProcessor, which is a torchvision one only, with Pillow's resizing.

    What it takes from torchvision is written out here: padding with zeros, and normalization in the picture's own dtype.
    """
    import sys
    import types
    from unittest import mock

    import torch
    from PIL import Image
    from transformers import image_processing_backends  # noqa: F401  looks for torchvision, before there seems to be one

    def pad(images: Any, padding: Sequence[int], fill: Sequence[int]) -> Any:
        assert not any(fill) and not any(padding[:2])
        return torch.nn.functional.pad(images, (0, padding[2], 0, padding[3]))

    v2 = types.ModuleType("torchvision.transforms.v2")
    v2.functional = types.SimpleNamespace(pad=pad)
    names = ("torchvision", "torchvision.transforms")
    with mock.patch.dict(sys.modules, {**{n: types.ModuleType(n) for n in names}, v2.__name__: v2}):
        from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor

    class Llama4Images(Llama4ImageProcessor):
        def resize(self, image: Any, size: Any, resample: Any = None, **_: Any) -> Any:
            pictures = [Image.fromarray(i.permute(1, 2, 0).numpy()).resize((size.width, size.height), resample) for i in image]
            return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])

        def normalize(self, image: Any, mean: Any, std: Any, **_: Any) -> Any:
            mean, std = (torch.tensor(x, dtype=image.dtype).view(-1, 1, 1) for x in (mean, std))
            return (image - mean) / std

    return Llama4Images


def hf_logits(folder: str | Path, ids: list[int]) -> np.ndarray:
    """Return transformers' logits, float32 [n, vocab], computed in float32 with plain attention."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


@dataclass
class Seen:
    """What transformers makes of a prompt in parts: `features` and `pixels` have one entry a picture, crop or video."""
    ids: list[int]
    logits: np.ndarray                          # float32 [n, vocab]
    features: list[np.ndarray]                  # float32 [soft tokens, hidden], as the decoder receives them
    pixels: list[np.ndarray]                    # Gemma, Mistral [3, h, w]; Llama 4 [tiles, 3, h, w]; Qwen [patches, 3 * T * p * p]
    grids: list[tuple[int, int, int]]           # Qwen: frames, rows and columns of patches


def hf_seen(folder: str | Path, parts: Sequence[Any], fps: float | None = None, **settings: Any) -> Seen:
    """Run transformers in float32, with plain attention, on a prompt of ids, texts, pictures and lists of frames.

    Texts are tokenized by themselves, with nothing added; a picture becomes what the processor (the Pillow one) makes of
    the text that the chat template writes for it; `settings` go to that processor. `fps` is the rate of a video's frames.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    config, family = model.config, model.config.model_type
    gemma, llama, mistral = family == "gemma3", family == "llama4", family in ("mistral3", "llava")
    if family == "mllama":
        return _seen_across(model, folder, parts, **settings)
    ids: list[int] = []
    pixels: dict[str, list[Any]] = {"image": [], "video": []}
    order: list[tuple[str, int]] = []
    grids: dict[str, list[Any]] = {"image": [], "video": []}
    processor = _processor(folder, config)
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
            continue
        if isinstance(part, str):
            ids += processor.tokenizer(part, add_special_tokens=False)["input_ids"]
            continue
        kind = "video" if isinstance(part, (list, tuple)) else "image"
        if kind == "video":
            patches, grid = _video_patches(processor.image_processor, folder, part)
            n = int(np.prod(grid)) // config.vision_config.spatial_merge_size ** 2
            ids += [config.vision_start_token_id, *[config.video_token_id] * n, config.vision_end_token_id]
            made = {"pixel_values": torch.tensor(patches), "image_grid_thw": torch.tensor([grid])}
        else:
            text = (processor.boi_token if gemma else "<|image|>" if llama else "[IMG]" if mistral
                    else "<|vision_start|><|image_pad|><|vision_end|>")
            made = processor(text=text, images=[part], add_special_tokens=False, return_tensors="pt", **settings)
            ids += made["input_ids"][0].tolist()
        order += [(kind, len(pixels[kind]) + i) for i in range(len(made["pixel_values"]) if gemma else 1)]
        pixels[kind] += list(made["pixel_values"]) if gemma or mistral else [made["pixel_values"]]
        grids[kind] += [] if gemma or llama or mistral else made["image_grid_thw"].tolist()

    tokens = torch.tensor([ids])
    features: dict[str, list[Any]] = {"image": [], "video": []}
    inputs: dict[str, Any] = {}
    with torch.no_grad():
        if gemma:
            inputs["token_type_ids"] = (tokens == config.image_token_id).long()
            if pixels["image"]:
                inputs["pixel_values"] = torch.stack(pixels["image"])
                features["image"] = list(model.model.get_image_features(inputs["pixel_values"]).pooler_output)
        elif mistral:
            if pixels["image"]:
                inputs["image_sizes"] = torch.tensor([p.shape[1:] for p in pixels["image"]])
                height, width = inputs["image_sizes"].amax(0).tolist()          # as the processor pads pictures given together
                inputs["pixel_values"] = torch.stack([torch.nn.functional.pad(p, (0, width - p.shape[2], 0, height - p.shape[1]))
                                                      for p in pixels["image"]])
                features["image"] = list(model.model.get_image_features(**inputs).pooler_output)
        elif llama:
            pixels["image"] = [p.float() for p in pixels["image"]]              # numbers that bfloat16 holds
            if pixels["image"]:
                inputs["pixel_values"] = torch.cat(pixels["image"])
                rows = [model.get_image_features(p, return_dict=True).last_hidden_state.flatten(0, 1) for p in pixels["image"]]
                features["image"] = [model.multi_modal_projector(r) for r in rows]
        else:
            inputs["mm_token_type_ids"] = ((tokens == config.image_token_id) + 2 * (tokens == config.video_token_id)).int()
            for kind, name, run in (("image", "pixel_values", model.model.get_image_features),
                                    ("video", "pixel_values_videos", model.model.get_video_features)):
                if pixels[kind]:
                    inputs[name], grid = torch.cat(pixels[kind]), torch.tensor(grids[kind])
                    inputs[f"{kind}_grid_thw"] = grid
                    features[kind] = list(run(inputs[name], grid).pooler_output)
            if pixels["video"] and config.model_type == "qwen2_5_vl":
                # 24: what VideoMetadata.sampled_fps says of frames without a rate
                seconds = config.vision_config.temporal_patch_size / (fps or 24)
                inputs["second_per_grid_ts"] = torch.full((len(pixels["video"]),), seconds)
        logits = model(input_ids=tokens, **inputs).logits[0].numpy()
    return Seen(ids, logits, [features[kind][i].numpy() for kind, i in order],
                [pixels[kind][i].numpy() for kind, i in order],
                [tuple(grids[kind][i]) for kind, i in order if grids[kind]])


def _seen_across(model: Any, folder: str | Path, parts: Sequence[Any], **settings: Any) -> Seen:
    """`hf_seen` of a model with cross-attention: `features` are the rows of real tiles; `grids` (aspect ratio, tiles, rows of one).

    Rows before the first picture: transformers lets them see every tile, empty ones too, and leaves out the feed-forward only.
    The authors' code multiplies attention's result by the same mask, and so does this.
    """
    import torch
    from transformers.models.mllama import modeling_mllama as modeling
    from transformers.models.mllama import processing_mllama as processing

    config, processor = model.config, _processor(folder, model.config)
    ids: list[int] = []
    pictures = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        elif isinstance(part, str):
            ids += processor.tokenizer(part, add_special_tokens=False)["input_ids"]
        else:
            ids.append(config.image_token_index)
            pictures.append(part)
    if not pictures:
        with torch.no_grad():
            return Seen(ids, model(input_ids=torch.tensor([ids])).logits[0].numpy(), [], [], [])
    made = processor.image_processor([pictures], return_tensors="pt", **settings)
    tiles = made.pop("num_tiles")
    sparse = processing.get_cross_attention_token_mask(ids, config.image_token_index)
    mask = processing.convert_sparse_cross_attention_mask_to_dense([sparse], tiles, config.vision_config.max_num_tiles, len(ids))
    sees = torch.tensor(mask.any(axis=(2, 3))).float()[:, :, None]              # [1, n, 1]
    for m in model.modules():
        if isinstance(m, modeling.MllamaTextCrossAttention) and not sees.all():
            m.register_forward_hook(lambda m, args, out: (out[0] * sees, *out[1:]))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), cross_attention_mask=torch.tensor(mask), **made).logits[0].numpy()
        rows = model.model.multi_modal_projector(model.model.vision_model(**made).last_hidden_state)[0].numpy()
    return Seen(ids, logits, [f[:n].reshape(-1, f.shape[-1]) for f, n in zip(rows, tiles[0])],
                [p[:n].numpy() for p, n in zip(made["pixel_values"][0], tiles[0])],
                [(int(i), n, rows.shape[2]) for i, n in zip(made["aspect_ratio_ids"][0], tiles[0])])


def hf_chat_ids(folder: str | Path, messages: Sequence[dict[str, Any]], pictures: Sequence[Any]) -> list[int]:
    """Return the ids that transformers makes of a conversation with pictures; -1 for each soft token."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    processor = _processor(folder, config)
    template = processor.tokenizer.chat_template
    text = processor.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    made = processor(text=[text], images=[list(pictures)], add_special_tokens=False, return_tensors="pt")
    soft = None if config.model_type == "mllama" else config.image_token_id      # there the picture's token is one of the prompt's
    return [-1 if i == soft else i for i in made["input_ids"][0].tolist()]


def _processor(folder: str | Path, config: Any) -> Any:
    """Return transformers' processor with its Pillow backend and, for Qwen, without videos, which need torchvision."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if config.model_type == "gemma3":
        return transformers.Gemma3Processor(transformers.Gemma3ImageProcessorPil.from_pretrained(folder), tokenizer,
                                            image_seq_length=config.mm_tokens_per_image)
    if config.model_type in ("mistral3", "llava"):
        images = transformers.PixtralImageProcessorPil.from_pretrained(folder)
        return _pixtral_processor()(images, tokenizer, config.vision_config.patch_size, getattr(config, "spatial_merge_size", 1))

    if config.model_type == "mllama":
        return transformers.MllamaProcessor(transformers.MllamaImageProcessorPil.from_pretrained(folder), tokenizer)
    if config.model_type == "llama4":
        class Llama4(transformers.Llama4Processor):
            def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
                return type(argument)

        return Llama4(_llama4_images().from_pretrained(folder), tokenizer)

    class Processor(transformers.Qwen2VLProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return type(argument)

    return Processor(transformers.Qwen2VLImageProcessorPil.from_pretrained(folder), tokenizer, None)


def _pixtral_processor() -> type:
    """Return transformers' PixtralProcessor for image processors of any backend.

    Its module asks for one function of the torchvision one, which the Pillow one has too.
    """
    import importlib.util
    import sys

    package = "transformers.models.pixtral"
    if importlib.util.find_spec("torchvision") is None:
        pillow = importlib.import_module(f"{package}.image_processing_pil_pixtral")
        sys.modules.setdefault(f"{package}.image_processing_pixtral", pillow)
    base = importlib.import_module(f"{package}.processing_pixtral").PixtralProcessor

    class Processor(base):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return type(argument)

    return Processor


def _video_patches(images: Any, folder: str | Path, frames: Sequence[Any]) -> tuple[np.ndarray, list[int]]:
    """Return a video's patches [n, 3 * T * p * p] and grid: frames as the image processor has them, T to a patch."""
    settings = Path(folder) / "video_preprocessor_config.json"
    size = json.loads(settings.read_text())["size"] if settings.exists() else dict(images.size)
    t, p = images.temporal_patch_size, images.patch_size
    single = [images(images=[f], size=size, return_tensors="np") for f in frames]
    _, rows, columns = single[0]["image_grid_thw"][0].tolist()
    # the image processor fills a patch with T copies of its picture: one of each frame is kept; the last frame is repeated
    kept = [s["pixel_values"].reshape(-1, 3, t, p * p)[:, :, 0] for s in single]
    kept += [kept[-1]] * (-len(kept) % t)
    patches = np.concatenate([np.stack(kept[i:i + t], axis=2).reshape(rows * columns, -1) for i in range(0, len(kept), t)])
    return patches, [len(kept) // t, rows, columns]


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
CHAT_TEMPLATE = "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|stop|>{% endfor %}"
# What the families' real templates do, in other words: contents are strings or lists of parts.
GEMMA_TEMPLATE = """{{ bos_token }}
{%- set first = messages[0] -%}
{%- set rest = messages[1:] if first['role'] == 'system' else messages -%}
{%- set preface = (first['content'] if first['content'] is string else first['content'][0]['text']) + '\n\n'
    if first['role'] == 'system' else '' -%}
{%- for m in rest -%}
  {%- if (m['role'] == 'user') != loop.index0 is even -%}
    {{ raise_exception('roles must alternate user/assistant/user/...') }}
  {%- endif -%}
  {{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + (preface if loop.first else '') }}
  {%- if m['content'] is string -%}{{ m['content'] | trim }}
  {%- else -%}
    {%- for part in m['content'] -%}
      {{ '<start_of_image>' if part['type'] == 'image' else part['text'] | trim }}
    {%- endfor -%}
  {%- endif -%}
  {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""
LLAMA_TEMPLATE = """{{ bos_token }}
{%- for m in messages -%}
  {{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}
  {%- if m['content'] is string -%}{{ m['content'] | trim }}
  {%- else -%}
    {%- for part in m['content'] -%}
      {{ '<|image|>' if part['type'] == 'image' else part['text'] | trim }}
    {%- endfor -%}
  {%- endif -%}
  {{ '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"""
QWEN_TEMPLATE = """{%- set ns = namespace(images=0, videos=0) -%}
{%- for m in messages -%}
  {%- if loop.first and m['role'] != 'system' -%}
    {{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
  {%- endif -%}
  {{ '<|im_start|>' + m['role'] + '\n' }}
  {%- if m['content'] is string -%}{{ m['content'] }}
  {%- else -%}
    {%- for part in m['content'] -%}
      {%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
        {%- set ns.images = ns.images + 1 -%}
        {{ ('Picture ' ~ ns.images ~ ': ' if add_vision_id else '') + '<|vision_start|><|image_pad|><|vision_end|>' }}
      {%- elif part['type'] == 'video' or 'video' in part -%}
        {%- set ns.videos = ns.videos + 1 -%}
        {{ ('Video ' ~ ns.videos ~ ': ' if add_vision_id else '') + '<|vision_start|><|video_pad|><|vision_end|>' }}
      {%- else -%}{{ part['text'] }}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""

MISTRAL_TEMPLATE = """{{ bos_token }}
{%- for m in messages -%}
  {%- if m['role'] == 'system' -%}
    {{ '[SYSTEM_PROMPT]' + (m['content'] if m['content'] is string else m['content'][0]['text']) + '[/SYSTEM_PROMPT]' }}
  {%- elif m['role'] == 'user' -%}
    {{ '[INST]' }}
    {%- if m['content'] is string -%}{{ m['content'] }}
    {%- else -%}
      {%- for part in m['content'] -%}
        {%- if part['type'] == 'text' -%}{{ part['text'] }}
        {%- elif part['type'] in ('image', 'image_url') -%}{{ '[IMG]' }}
        {%- else -%}{{ raise_exception('only text and images are supported') }}
        {%- endif -%}
      {%- endfor -%}
    {%- endif -%}
    {{ '[/INST]' }}
  {%- elif m['role'] == 'assistant' -%}
    {{ (m['content'] if m['content'] is string else m['content'][0]['text']) + eos_token }}
  {%- else -%}{{ raise_exception('roles are system, user and assistant') }}
  {%- endif -%}
{%- endfor -%}"""
LLAMA4_TEMPLATE = """{{ bos_token }}
{%- for m in messages -%}
  {{ '<|header_start|>' + m['role'] + '<|header_end|>\n\n' }}
  {%- if m['content'] is string -%}{{ m['content'] }}
  {%- else -%}
    {%- for part in m['content'] -%}{{ '<|image|>' if part['type'] == 'image' else part['text'] }}{%- endfor -%}
  {%- endif -%}
  {{ '<|eot|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|header_start|>assistant<|header_end|>\n\n' }}{%- endif -%}"""


@dataclass(frozen=True)
class _Family:
    """Special tokens of a family of models: `ids` maps names of a config.json to them, `added` are not special."""
    special: tuple[str, ...]
    bos: str | None
    eos: str
    pad: str
    template: str
    ids: dict[str, str]
    added: tuple[str, ...] = ("<tool>",)
    named: dict[str, str] | None = None         # the tokenizer's own attributes


_FAMILIES = {
    "plain": _Family(("<|start|>", "<|stop|>", "<|fill|>", "<|turn|>"), "<|start|>", "<|stop|>", "<|fill|>",
                     CHAT_TEMPLATE, {}),
    "gemma3": _Family(
        ("<end_of_image>", "<image_soft_token>", "<bos>", "<start_of_turn>", "<pad>", "<start_of_image>", "<eos>",
         "<end_of_turn>"), "<bos>", "<eos>", "<pad>", GEMMA_TEMPLATE,
        {"boi_token_index": "<start_of_image>", "eoi_token_index": "<end_of_image>",
         "image_token_index": "<image_soft_token>"}, ("\n\n", "\n\n\n"),
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}),
    "mistral3": _Family(
        ("[IMG_END]", "<s>", "[INST]", "[IMG]", "</s>", "[SYSTEM_PROMPT]", "[IMG_BREAK]", "[/INST]", "<pad>", "[/SYSTEM_PROMPT]"),
        "<s>", "</s>", "<pad>", MISTRAL_TEMPLATE, {"image_token_index": "[IMG]"}),
    "mllama": _Family(      # the picture's token comes last
        ("<|end_header_id|>", "<|finetune_right_pad_id|>", "<|begin_of_text|>", "<|eot_id|>", "<|python_tag|>",
         "<|start_header_id|>", "<|image|>"), "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>", LLAMA_TEMPLATE,
        {"image_token_index": "<|image|>"}, ()),
    "qwen2_vl": _Family(
        ("<|video_pad|>", "<|im_end|>", "<|vision_end|>", "<|im_start|>", "<|image_pad|>", "<|endoftext|>",
         "<|vision_start|>", "<|box_start|>", "<|box_end|>"), None, "<|im_end|>", "<|endoftext|>", QWEN_TEMPLATE,
        {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
         "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}),
    "llama4": _Family(
        ("<|image_end|>", "<|begin_of_text|>", "<|tile_y_separator|>", "<|patch|>", "<|eot|>", "<|image_start|>",
         "<|header_start|>", "<|tile_x_separator|>", "<|header_end|>", "<|image|>", "<|finetune_right_pad|>"), "<|begin_of_text|>",
        "<|eot|>", "<|finetune_right_pad|>", LLAMA4_TEMPLATE,
        {"boi_token_index": "<|image_start|>", "eoi_token_index": "<|image_end|>", "image_token_index": "<|patch|>"}),
}


def save_tokenizer(name: str, folder: Path, family: str = "plain") -> dict[str, int | None]:
    """Train a tokenizer on TEXTS, save it as a checkpoint's tokenizer, and return the config's special token ids."""
    from tokenizers import AddedToken
    from tokenizers.normalizers import NFC
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    f = _FAMILIES[family]
    tokenizer = _train_spm() if TOKENIZERS[name] is None else _train_byte_level(*TOKENIZERS[name])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in f.special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in f.added])
    if name == "qwen2":                 # the only one that normalizes text, and that adds no bos
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
