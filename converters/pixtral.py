"""Pixtral's encoder beside a text model, projector "pixtral" in GGUF: what Mistral Small 3.1, Ministral 3 and Pixtral 12B share.

Follows transformers `configuration_pixtral.py`, `image_processing_pil_pixtral.py`, `processing_pixtral.py`. Rows of q and k are permuted
as llama.cpp has them. Axes: V encoder width, F its feed-forward width, D text width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gguf import GGUFWriter

from pyengine.errors import InvalidModelError, UnsupportedModelError

from .checkpoint import Config, malformed_is, read_json
from .contract import FLOAT32, Entry, linear
from .rope import interleaved_rows
from .tokenizer import special_ids
from .vision import GATED, attention, feed_forward, image_settings, write_encoder_keys

# transformers' PixtralVisionConfig, PixtralProcessor and PixtralImageProcessorPil where a checkpoint may be silent
VISION: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                          "num_channels": 3, "image_size": 1024, "patch_size": 16, "hidden_act": "gelu"}
IMAGES: dict[str, Any] = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
                          "resample": 3, "size": {"longest_edge": 1024}}
TOKENS = {"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}       # PixtralProcessor's
EPS, ROPE_BASE = 1e-5, 10_000.0     # of the encoder: modeling_pixtral.py has no setting for the first


class Pixtral:
    """The encoder and its projector; `merge` patches at each side become one row, through a merger where there is one."""

    def __init__(self, root: Config, d_text: int, vocab_size: int, merge: int | None = None):
        """Read the settings below `root`. merge: None without a merger. Raises: InvalidModelError, UnsupportedModelError."""
        self.root, self.d_text, self.vocab_size, self.merge, file = root, d_text, vocab_size, merge, root.file
        root.refuse_unless("vision_feature_layer", -1)
        root.refuse_unless("projector_hidden_act", "gelu")
        v = self.vision = Config(root.need("vision_config"), VISION, file)
        v.refuse_unless("num_channels", 3)
        self.v_model, self.v_ff, self.v_layers, self.v_heads, self.patch_size, self.image_size = (v.count(n) for n in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size"))
        if self.v_model % (4 * self.v_heads):
            raise InvalidModelError(f"{file}: 'num_attention_heads' is {self.v_heads} for an encoder of width {self.v_model}: "
                                    "heads must have a multiple of 4 elements")
        rope = v.get("rope_parameters") or {}
        if rope.get("rope_type", "axial") not in ("axial", "default"):
            raise UnsupportedModelError(f"{file}: rope '{rope['rope_type']}' of the encoder; this converter knows 'axial'")
        self.v_rope_base = float(rope.get("rope_theta") or v.get("rope_theta") or ROPE_BASE)
        self.biases = bool(root.need("multimodal_projector_bias"))
        self.image_token = root.token("image_token_index", "image_token_id")
        self.read_tokens()

    def read_tokens(self) -> None:
        """Find the two other tokens, of which only the texts are in a checkpoint's settings. Raises: InvalidModelError."""
        file = self.root.file
        processor = Config(read_json(file.parent / "processor_config.json"), TOKENS, file.parent / "processor_config.json")
        for name, value in (("patch_size", self.patch_size), ("spatial_merge_size", self.merge or 1)):
            processor.refuse_unless(name, value, None)
        texts = [processor.need(name) for name in TOKENS]
        with malformed_is(f"{file.parent}: a value of the tokenizer's files is of the wrong kind"):
            self.line_end, self.image_end = special_ids(file.parent, texts)
        if self.line_end >= self.vocab_size:
            raise InvalidModelError(f"{file}: token {texts[0]!r} is {self.line_end}, but the embedding has {self.vocab_size} rows")

    def write_keys(self, out: GGUFWriter) -> None:
        """Write the keys "clip.*"."""
        images = image_settings(self.root.file.parent, IMAGES)
        size = images.need("size")
        longest = size.get("longest_edge") if isinstance(size, dict) else size
        if type(longest) is not int or not 0 < longest < 2**31:
            raise UnsupportedModelError(f"{images.file}: 'size' is {size!r}; this converter knows 'longest_edge', in pixels")
        write_encoder_keys(
            out, self.vision, images, projector="pixtral", image_size=self.image_size, d_model=self.v_model, d_ff=self.v_ff,
            n_layers=self.v_layers, n_heads=self.v_heads, eps=EPS, d_text=self.d_text)
        if self.merge:
            out.add_vision_spatial_merge_size(self.merge)
        out.add_float32("clip.vision.rope.freq_base", self.v_rope_base)
        out.add_uint32("clip.vision.longest_edge", longest)
        for name, token in (("image", self.image_token), ("image_break", self.line_end), ("image_end", self.image_end)):
            out.add_uint32(f"clip.vision.{name}_token_id", token)

    def unused(self) -> set[str]:
        """Return names of tensors that are left out: none."""
        return set()

    def tensors(self) -> Iterator[Entry]:
        """List the encoder's tensors."""
        v, d, p, f = self.v_model, self.d_text, self.patch_size, self.v_ff
        rows = interleaved_rows(self.v_heads, v // self.v_heads)
        # llama.cpp's mtmd puts this row between the lines itself
        yield Entry("v.token_embd.img_break", "model.embed_tokens.weight", (d,), stored=(self.vocab_size, d),
                    first_row=self.line_end)
        yield Entry("v.patch_embd.weight", "vision_tower.patch_conv.weight", (v, 3, p, p), instead=FLOAT32)
        yield Entry("v.pre_ln.weight", "vision_tower.ln_pre.weight", (v,))
        for i in range(self.v_layers):
            b, m = f"v.blk.{i}", f"vision_tower.transformer.layers.{i}"
            yield Entry(f"{b}.ln1.weight", f"{m}.attention_norm.weight", (v,))
            yield from attention(b, f"{m}.attention", v, row_order=rows)
            yield Entry(f"{b}.ln2.weight", f"{m}.ffn_norm.weight", (v,))
            yield from feed_forward(b, f"{m}.feed_forward", v, f, GATED, bias=False)
        if self.merge:
            yield Entry("mm.input_norm.weight", "multi_modal_projector.norm.weight", (v,))
            yield from linear("mm.patch_merger", "multi_modal_projector.patch_merger.merging_layer", v, v * self.merge**2)
        yield from linear("mm.1", "multi_modal_projector.linear_1", d, v, self.biases)
        yield from linear("mm.2", "multi_modal_projector.linear_2", d, d, self.biases)
