"""Fuyu: persimmon with one product for patches, projector "fuyu" in GGUF.

Follows transformers `configuration_fuyu.py`, `image_processing_pil_fuyu.py`, `processing_fuyu.py`. A checkpoint has no chat template: the
file gets the layout of the processor, of one question. Tokens that the processor writes by their texts are special in the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from pyengine.errors import InvalidModelError, UnsupportedModelError

from .checkpoint import Config, malformed_is
from .contract import converts, linear
from .decoder import Tensors
from .persimmon import DEFAULTS as TEXT
from .persimmon import Persimmon
from .tokenizer import Vocabulary
from .vision import image_settings

# transformers' FuyuConfig and FuyuImageProcessorPil where a checkpoint may be silent
DEFAULTS: dict[str, Any] = {"patch_size": 30, "num_channels": 3, "image_token_id": 71_011, "tie_word_embeddings": False}
IMAGES: dict[str, Any] = {"image_mean": 0.5, "image_std": 0.5, "resample": 2, "size": {"height": 1080, "width": 1920}, "do_pad": True,
                          "padding_value": 1.0, "padding_mode": "constant"}
TEMPLATE = """{%- if messages | length != 1 or messages[0]['role'] != 'user' -%}
  {{ raise_exception('this model answers one question, without a system message: give one message of a user') }}
{%- endif -%}
{%- set content = messages[0]['content'] -%}
{%- if content is string -%}{{ content }}
{%- else -%}
  {%- for part in content if part['type'] == 'image' -%}{{ '|SPEAKER|' }}{%- endfor -%}
  {%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- if add_generation_prompt -%}{{ '<0x04>' }}{%- endif -%}"""


# <0x00> to <0x03> stand around boxes and points, in answers too
TYPES = {**dict.fromkeys(("|SPEAKER|", "|NEWLINE|", "<s>", "<0x04>"), TokenType.CONTROL),
         **dict.fromkeys((f"<0x0{i}>" for i in range(4)), TokenType.USER_DEFINED)}


@converts("FuyuForCausalLM")
class Fuyu(Persimmon):
    renames = ((r"^model\.language_model\.", "model."), (r"^language_model\.model\.", "model."), (r"^language_model\.lm_head\.", "lm_head."),
               (r"^model\.vision_embed_tokens\.", "vision_embed_tokens."))

    def __init__(self, config: dict[str, Any], file: Path):
        r = self.root = Config(config, DEFAULTS, file)
        # older files are flat
        text = r.get("text_config") or {k: config[k] for k in (*TEXT, "rope_theta", "rope_scaling", "partial_rotary_factor") if k in config}
        Config(text, {"model_type": "persimmon"}, file).refuse_unless("model_type", "persimmon")
        super().__init__({**text, "tie_word_embeddings": config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))}, file)
        r.refuse_unless("num_channels", 3)
        self.patch_size, self.image_token = r.count("patch_size"), r.token("image_token_id")
        self.read_images()

    def read_images(self) -> None:
        """Read what the image processor does. Raises: InvalidModelError, UnsupportedModelError for what no key expresses."""
        s = self.images = image_settings(self.root.file.parent, IMAGES)
        s.refuse_unless("do_pad", True)
        s.refuse_unless("padding_mode", "constant")
        with malformed_is(f"{s.file}: a value is of the wrong kind"):
            size = Config(s.need("size"), {}, s.file)
            self.height, self.width = size.count("height"), size.count("width")
            sides = s.get("patch_size") or {"height": self.patch_size, "width": self.patch_size}
            if {sides["height"], sides["width"]} != {self.patch_size} or self.height % self.patch_size or self.width % self.patch_size:
                raise InvalidModelError(f"{s.file}: patches of {sides} in pictures of {self.width} x {self.height} pixels; the model's are of "
                                        f"{self.patch_size}")
            self.padding = int(s.need("padding_value"))
            if self.padding != s.need("padding_value") or not 0 <= self.padding < 256:
                raise UnsupportedModelError(f"{s.file}: 'padding_value' is {s.get('padding_value')!r}; this converter knows whole numbers "
                                            "from 0 to 255")

    def change_vocabulary(self, vocabulary: Vocabulary) -> None:
        vocabulary.chat_template = vocabulary.chat_template or TEMPLATE
        vocabulary.retype(TYPES)

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        out.add_clip_has_vision_encoder(True)
        out.add_clip_projector_type("fuyu")
        out.add_clip_vision_projector_type("fuyu")
        out.add_vision_block_count(0)
        out.add_vision_embedding_length(self.d_model)
        out.add_vision_projection_dim(self.d_model)
        out.add_vision_patch_size(self.patch_size)
        out.add_uint32("clip.vision.preproc_image_height", self.height)
        out.add_uint32("clip.vision.preproc_image_width", self.width)
        out.add_uint32("clip.vision.padding_value", self.padding)
        for name in ("image_mean", "image_std"):
            value = self.images.need(name)
            values = [float(v) for v in (value if isinstance(value, list) else [value] * 3)]
            if len(values) != 3:
                raise InvalidModelError(f"{self.images.file}: '{name}' has {len(values)} values for 3 colours")
            out.add_array(f"clip.vision.{name}", values)
        out.add_uint32("clip.vision.resample", int(self.images.need("resample")))
        out.add_uint32("clip.vision.image_token_id", self.image_token)

    def tensors(self) -> Tensors:
        yield from super().tensors()
        yield from linear("mm.0", "vision_embed_tokens", self.d_model, self.patch_size**2 * 3, bias=True)
