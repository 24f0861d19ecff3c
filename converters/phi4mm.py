"""Phi-4-multimodal: phi3 with SigLIP over squares, projector "phi4mm" in GGUF.

Follows transformers `configuration_phi4_multimodal.py`, `image_processing_phi4_multimodal.py`. The released models see with a low-rank change of
the decoder's matrices (LoRA): the folder `vision-lora` beside transformers' files, `lora_A.vision` and `lora_B.vision` in Microsoft's own. It is
added to the matrices of the file. differs: the authors' code leaves it out where a prompt has no picture. Everything of sound is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from pyengine.errors import InvalidModelError, UnsupportedModelError

from .checkpoint import Config, malformed_is, read_json
from .contract import FLOAT32, Entry, LowRank, converts, linear
from .decoder import Tensors
from .phi3 import DEFAULTS as TEXT
from .phi3 import Phi3
from .tokenizer import Vocabulary
from .vision import behind_layers, image_settings, pre_norm_layer, write_encoder_keys

# transformers' Phi4MultimodalConfig, Phi4MultimodalVisionConfig and Phi4MultimodalImageProcessor where a checkpoint may be silent
DEFAULTS: dict[str, Any] = {**TEXT, "vocab_size": 200_064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
                            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
VISION: dict[str, Any] = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "num_channels": 3,
                          "image_size": 448, "patch_size": 14, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "crop_size": 448,
                          "image_token_id": 200_010, "feature_layer": -2}
IMAGES: dict[str, Any] = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": {"height": 448, "width": 448}, "dynamic_hd": 36}
BILINEAR = 2                         # of the squares; the processor's `resample` is that of the whole
BICUBIC = 3
# before the authors' template, which takes texts only: pictures become their token where they stand, nothing between
PARTS = """{%%- set shown = namespace(messages=[]) -%%}
{%%- for m in messages -%%}
  {%%- set text -%%}
    {%%- if m['content'] is string -%%}{{ m['content'] }}
    {%%- else -%%}{%%- for part in m['content'] -%%}{{ %s if part['type'] == 'image' else part['text'] }}{%%- endfor -%%}
    {%%- endif -%%}
  {%%- endset -%%}
  {%%- set shown.messages = shown.messages + [dict(m, content=text)] -%%}
{%%- endfor -%%}
{%%- set messages = shown.messages -%%}
"""
ADAPTER = "vision-lora"
EMBED = "model.embed_tokens_extend.image_embed"
CHANGED = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


@converts("Phi4MultimodalForCausalLM", "Phi4MMForCausalLM")
class Phi4Multimodal(Phi3):
    defaults = DEFAULTS
    renames = ((r"\.base_layer\.weight$", ".weight"), (r"^base_model\.model\.(.*\.lora_[AB])\.weight$", r"\1.vision.weight"),
               (r"\.img_projection\.0\.", ".img_projection_up."), (r"\.img_projection\.2\.", ".img_projection_down."),
               (r"\.glb_GN$", ".global_img_feature_extensor"), (r"\.sub_GN$", ".sub_img_feature_extensor"))
    leaves = ((r"^model\.embed_tokens_extend\.audio_embed\.|\.lora_[AB]\.speech\.", "the encoder of sound and its change of the decoder are left out: "
               "the file takes texts and pictures"),)

    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__(config, file)
        r = self.root = Config(config, {}, file)
        v = self.vision = Config(r.get("vision_config") or {}, VISION, file)
        v.refuse_unless("num_channels", 3)
        self.v_model, self.v_ff, self.v_layers, self.v_heads, self.image_size, self.patch_size = (v.count(n) for n in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"))
        if self.image_size % self.patch_size or self.image_size // self.patch_size % 2 or v.need("crop_size") != self.image_size:
            raise UnsupportedModelError(f"{file}: squares of {v.need('crop_size')!r} pixels for an encoder of {self.image_size} with patches of "
                                        f"{self.patch_size}; this converter knows equal ones with an even number of patches a side")
        layer = v.need("feature_layer")
        self.taken = layer if layer >= 0 else self.v_layers + 1 + layer
        if not 1 <= self.taken <= self.v_layers:
            raise InvalidModelError(f"{file}: 'feature_layer' is {layer} for {self.v_layers} layers")
        s = self.images = image_settings(file.parent, IMAGES)
        s.refuse_unless("resample", None, BICUBIC)
        with malformed_is(f"{s.file}: 'size' is of the wrong kind"):
            if {s.need("size")["height"], s.need("size")["width"]} != {self.image_size}:
                raise UnsupportedModelError(f"{s.file}: 'size' is {s.need('size')!r} for an encoder of {self.image_size} pixels")
        self.more_files: tuple[Path, ...] = ()
        self.change = self.read_change(file.parent / ADAPTER)
        self.notes = (("the low-rank change for pictures is added to the decoder, for texts alone too" if self.change else
                       f"no low-rank change for pictures ({ADAPTER}/ or 'vision_lora'): the decoder is taken as it is, and the released "
                       "models see badly without it"),)

    def read_change(self, folder: Path) -> tuple[int, float] | None:
        """Return rank and scale of the low-rank change that pictures need, None without one. Raises: UnsupportedModelError."""
        own = self.root.get("vision_lora")
        adapter = read_json(folder / "adapter_config.json")
        if own is None and not adapter:
            return None
        if adapter:
            a = Config(adapter, {"use_dora": False, "use_rslora": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}}, folder / "adapter_config.json")
            for name, *allowed in (("use_dora", False), ("use_rslora", False), ("bias", "none"), ("rank_pattern", {}, None), ("alpha_pattern", {}, None)):
                a.refuse_unless(name, *allowed)
            self.more_files = (folder / "adapter_model.safetensors",)
        else:
            a = Config(own, {}, self.root.file)
        return a.count("r"), float(a.need("lora_alpha")) / a.count("r")

    def change_vocabulary(self, vocabulary: Vocabulary) -> None:
        template, token = vocabulary.chat_template, self.vision.token("image_token_id")
        if isinstance(template, str) and "image" not in template and token < len(vocabulary.tokens):
            vocabulary.chat_template = PARTS % repr(vocabulary.tokens[token]) + template

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        images = Config({**self.images.values, "resample": BILINEAR}, self.images.defaults, self.images.file)
        write_encoder_keys(
            out, self.vision, images, projector="phi4mm", image_size=self.image_size, d_model=self.v_model, d_ff=self.v_ff, n_layers=self.taken,
            n_heads=self.v_heads, eps=self.vision.need("layer_norm_eps"), d_text=self.d_model)
        out.add_uint32("clip.vision.preproc_max_tiles", self.images.count("dynamic_hd"))
        out.add_uint32("clip.vision.image_token_id", self.vision.token("image_token_id"))

    def unused(self) -> set[str]:
        behind = {entry.source for i in range(self.taken, self.v_layers) for entry in self.encoder_layer(i)}
        return super().unused() | behind | behind_layers(f"{EMBED}.img_processor")

    def layer(self, i: int, b: str, m: str) -> Tensors:
        for entry in super().layer(i, b, m):
            own = entry.source.removeprefix(f"{m}.").removesuffix(".weight")
            if self.change and own in CHANGED:
                rank, scale = self.change
                low, high = (f"{m}.{own}.lora_{part}.vision.weight" for part in "AB")
                entry = replace(entry, change=LowRank(low, high, rank, scale))
            yield entry

    def encoder_layer(self, i: int) -> Iterator[Entry]:
        """List a layer of the encoder."""
        return pre_norm_layer(f"v.blk.{i}", f"{EMBED}.img_processor.encoder.layers.{i}", self.v_model, self.v_ff)

    def tensors(self) -> Tensors:
        yield from super().tensors()
        v, d, p, n, at = self.v_model, self.d_model, self.patch_size, (self.image_size // self.patch_size) ** 2, f"{EMBED}.img_processor.embeddings"
        yield Entry("v.patch_embd.weight", f"{at}.patch_embedding.weight", (v, 3, p, p), instead=FLOAT32)
        yield Entry("v.patch_embd.bias", f"{at}.patch_embedding.bias", (v,))
        yield Entry("v.position_embd.weight", f"{at}.position_embedding.weight", (n, v), instead=FLOAT32)
        for i in range(self.taken):
            yield from self.encoder_layer(i)
        yield from linear("mm.0", f"{EMBED}.img_projection_up", d, v, bias=True)
        yield from linear("mm.2", f"{EMBED}.img_projection_down", d, d, bias=True)
        yield Entry("mm.glb_sep", f"{EMBED}.global_img_feature_extensor", (1, 1, v))
        yield Entry("mm.sub_sep", f"{EMBED}.sub_img_feature_extensor", (1, 1, 1, v))
