"""Florence-2: BART beside DaViT, projector "florence2" in GGUF, which llama.cpp does not have.

Follows transformers `configuration_florence2.py`, `processing_florence2.py`. Names and keys "clip.vision.stage.*" are ours. Checkpoints of
transformers' own class and of the authors' code, whose names and numbers of the encoder are other ones.
Axes: C channels of a stage, V those of the last one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, TokenType

from pyengine.errors import UnsupportedModelError

from .bart import Bart
from .checkpoint import Config, malformed_is, read_json
from .contract import FLOAT32, Entry, converts, layer_norm, linear
from .decoder import Tensors
from .tokenizer import Vocabulary
from .vision import feed_forward, image_settings, ONE_INSTRUCTION, TextAndEncoder, write_colours

# transformers' Florence2Config and Florence2VisionConfig where a checkpoint may be silent; processors of these checkpoints say all
DEFAULTS: dict[str, Any] = {"vision_config": {}, "text_config": {}, "tie_word_embeddings": True}
VISION: dict[str, Any] = {
    "in_channels": 3, "depths": [1, 1, 9, 1], "patch_size": [7, 3, 3, 3], "patch_stride": [4, 2, 2, 2], "patch_padding": [3, 1, 1, 1],
    "patch_prenorm": [False, True, True, True], "embed_dim": [128, 256, 512, 1024], "num_heads": [4, 8, 16, 32], "num_groups": [4, 8, 16, 32],
    "window_size": 12, "mlp_ratio": 4.0, "qkv_bias": True, "activation_function": "gelu", "projection_dim": 1024, "max_position_embeddings": 50,
    "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"]}
IMAGES: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3, "do_center_crop": True}
# keys of the file by names of a config.json
STAGE = {"block_count": "depths", "embedding_length": "embed_dim", "kernel_size": "patch_size", "stride": "patch_stride", "padding": "patch_padding",
         "norm_first": "patch_prenorm", "head_count": "num_heads", "group_count": "num_groups"}
# tokens that the authors' code puts behind those of the tokenizer's files (microsoft/Florence-2-base: processing_florence2.py)
ADDED = ["<od>", "</od>", "<ocr>", "</ocr>", *(f"<loc_{i}>" for i in range(1000)),
         *(f"<{end}{name}>" for name in ("cap", "ncap", "dcap", "grounding", "seg") for end in ("", "/")), "<sep>",
         *(f"<{end}{name}>" for name in ("region_cap", "region_to_desciption", "proposal", "poly") for end in ("", "/")), "<and>"]


class Davit:
    """DaViT and the projector behind it."""

    def __init__(self, root: Config, d_text: int):
        """Read the settings below `root` and of the image processor. Raises: InvalidModelError, UnsupportedModelError."""
        given = dict(root.need("vision_config"))
        given.setdefault("embed_dim", given.get("dim_embed", VISION["embed_dim"]))             # the authors' names
        given.setdefault("max_position_embeddings", (given.get("image_pos_embed") or {}).get("max_pos_embeddings", 50))
        v = self.vision = Config(given, VISION, root.file)
        v.refuse_unless("in_channels", 3)
        v.refuse_unless("image_feature_source", VISION["image_feature_source"])
        v.refuse_unless("projection_dim", d_text)
        self.lists = {name: [int(n) for n in v.need(theirs)] for name, theirs in STAGE.items()}
        if len({len(numbers) for numbers in self.lists.values()}) != 1:
            raise UnsupportedModelError(f"{root.file}: 'vision_config' has lists of unequal lengths: {', '.join(STAGE.values())}")
        self.widths, self.d_text, self.root = self.lists["embedding_length"], d_text, root
        s = self.images = image_settings(root.file.parent, IMAGES)
        size = s.need("size")
        self.side = size.get("height")
        if size != {"height": self.side, "width": self.side} or s.get("do_center_crop") and s.get("crop_size") not in (size, self.side):
            raise UnsupportedModelError(f"{s.file}: 'size' is {size} and 'crop_size' {s.get('crop_size')}; this converter knows squares that are not cut")
        self.ignored, self.turned = _ignored(root.file.parent / "processor_config.json"), False

    def look(self, names: Collection[str]) -> None:
        """Find out whether the projection lies transposed, as in the authors' checkpoints."""
        self.turned = "image_projection" in names

    def write_keys(self, out: GGUFWriter) -> None:
        """Write the keys "clip.*"."""
        v = self.vision
        out.add_clip_has_vision_encoder(True)
        out.add_clip_projector_type("florence2")
        out.add_clip_vision_projector_type("florence2")
        out.add_string("clip.vision.hidden_act", v.need("activation_function"))
        out.add_vision_image_size(self.side)
        out.add_vision_projection_dim(self.d_text)
        out.add_uint32("clip.vision.window_size", v.count("window_size"))
        out.add_uint32("clip.vision.position_count", v.count("max_position_embeddings"))
        for name, numbers in self.lists.items():
            out.add_array(f"clip.vision.stage.{name}", numbers)
        write_colours(out, self.images)
        if self.ignored:
            out.add_array("clip.vision.ignored_phrases", self.ignored)
        if any(self.root.get(name) is not None for name in ("image_token_id", "image_token_index")):
            out.add_uint32("clip.vision.image_token_id", self.root.token("image_token_id", "image_token_index"))

    def unused(self) -> set[str]:
        """Return names of tensors that are left out: cosines of times, which follow from the width."""
        return {"multi_modal_projector.visual_temporal_embed.pos_idx_to_embed"}

    def tensors(self) -> Tensors:
        """List the tensors of encoder and projector."""
        n_in = 3
        for i, (width, kernel, first) in enumerate(zip(self.widths, self.lists["kernel_size"], self.lists["norm_first"])):
            b, m = f"v.stage.{i}", f"vision_tower.convs.{i}"
            yield Entry(f"{b}.patch_embd.weight", f"{m}.conv.weight", (width, kernel * kernel * n_in), stored=(width, n_in, kernel, kernel),
                        make=_channels_last, instead={} if i else FLOAT32)
            yield Entry(f"{b}.patch_embd.bias", f"{m}.conv.bias", (width,))
            yield from layer_norm(f"{b}.norm", f"{m}.norm", n_in if first else width)
            for j in range(self.lists["block_count"][i]):
                for half, attention in (("spatial", "window_attn"), ("channel", "channel_attn")):
                    yield from self._half(f"{b}.blk.{j}.{half}", f"vision_tower.blocks.{i}.{j}.{half}_block", attention, width)
            n_in = width
        m, n, most = "multi_modal_projector", self.widths[-1], self.vision.count("max_position_embeddings")
        for name, theirs, size in (("line", "row", n // 2), ("column", "column", n - n // 2)):
            yield Entry(f"mm.{name}_embd.weight", f"{m}.image_position_embed.{theirs}_embeddings.weight", (most, size), instead=FLOAT32)
        [projection] = linear("mm.proj", f"{m}.image_projection", self.d_text, n)
        yield replace(projection, source="image_projection", stored=(n, self.d_text), turned=True) if self.turned else projection
        yield from layer_norm("mm.proj_norm", f"{m}.image_proj_norm", self.d_text)

    def _half(self, b: str, m: str, attention: str, width: int) -> Tensors:
        """List half of a block, b in the file and m in the checkpoint."""
        for name in ("conv1", "conv2"):
            yield Entry(f"{b}.{name}.weight", f"{m}.{name}.weight", (width, 1, 3, 3), instead=FLOAT32)
            yield Entry(f"{b}.{name}.bias", f"{m}.{name}.bias", (width,))
        yield from layer_norm(f"{b}.ln1", f"{m}.norm1", width)
        yield from linear(f"{b}.attn_qkv", f"{m}.{attention}.qkv", 3 * width, width, bool(self.vision.need("qkv_bias")))
        yield from linear(f"{b}.attn_out", f"{m}.{attention}.proj", width, width, True)
        yield from layer_norm(f"{b}.ln2", f"{m}.norm2", width)
        yield from feed_forward(b, f"{m}.ffn", width, int(width * self.vision.need("mlp_ratio")), {"ffn_up": "fc1", "ffn_down": "fc2"})


def _ignored(file: Path) -> list[str]:
    """Read the labels of phrases that name nothing. Raises: InvalidModelError, UnsupportedModelError for quads that are left out."""
    rules = read_json(file).get("post_processor_config") or {}
    with malformed_is(f"{file}: 'post_processor_config' is of the wrong kind"):
        if (rules.get("ocr") or {}).get("AREA_THRESHOLD"):
            raise UnsupportedModelError(f"{file}: 'AREA_THRESHOLD' is {rules['ocr']['AREA_THRESHOLD']}; this converter knows answers whose quads all count")
        return sorted({str(label) for label in (rules.get("phrase_grounding") or {}).get("banned_grounding_tokens", ())})


def _channels_last(weight: np.ndarray) -> np.ndarray:
    """Return a convolution's weight [n, C, k, k] as rows in the order y, x, channel, which may be in blocks."""
    return np.ascontiguousarray(np.moveaxis(weight, 1, 3)).reshape(len(weight), -1)


@converts("Florence2ForConditionalGeneration")
class Florence2(TextAndEncoder):
    renames = (
        (r"^(model\.)?language_model\.(model\.)?(?=encoder|decoder|shared)", "model."), (r"^language_model\.", ""),
        (r"^model\.(?=vision_tower|multi_modal_projector)", ""),
        # the authors' code
        (r"^image_(proj_norm)\.", r"multi_modal_projector.image_\1."), (r"^image_pos_embed\.", "multi_modal_projector.image_position_embed."),
        (r"^visual_temporal_embed\.", "multi_modal_projector.visual_temporal_embed."), (r"^(vision_tower\.convs\.\d+)\.proj\.", r"\1.conv."),
        (r"\.(conv[12])\.fn\.dw\.", r".\1."), (r"\.(?:window|channel)_attn\.norm\.", ".norm1."), (r"\.(window|channel)_attn\.fn\.", r".\1_attn."),
        (r"\.ffn\.norm\.", ".norm2."), (r"\.ffn\.fn\.net\.", ".ffn."))

    def __init__(self, config: dict[str, Any], file: Path):
        root = Config(config, DEFAULTS, file)
        root.refuse_unless("tie_word_embeddings", True)
        self.text = Bart(root.need("text_config"), file)
        self.arch, self.vocab_size = self.text.arch, self.text.vocab_size
        self.encoder = Davit(root, self.text.d_model)

    def look(self, names: Collection[str]) -> None:
        """Find out what the checkpoint has. names: of its tensors."""
        self.text.look(names)
        self.encoder.look(names)

    def change_vocabulary(self, vocabulary: Vocabulary) -> None:
        if "<loc_0>" not in vocabulary.tokens:                  # the authors' code adds them when it runs
            vocabulary.tokens += ADDED
            vocabulary.types += [TokenType.CONTROL] * len(ADDED)
        vocabulary.chat_template = vocabulary.chat_template or ONE_INSTRUCTION
