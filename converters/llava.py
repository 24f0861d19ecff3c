"""LLaVA 1.5, LLaVA-NeXT, Granite Vision and LLaVA-OneVision: a text model of another name with CLIP or SigLIP beside it, projector "mlp" in GGUF. Pixtral 12B,
which transformers has as a LLaVA, with an encoder of its own.

Follows transformers `configuration_llava.py`, `configuration_llava_next.py`, `configuration_llava_onevision.py` and the processors of all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from pyengine.errors import UnsupportedModelError

from .checkpoint import Config
from .clip import Clip
from .contract import Entry, converts, linear, supported
from .decoder import Tensors
from .pixtral import Pixtral
from .vision import image_settings, TextAndEncoder, video_settings

# transformers' LlavaConfig, LlavaNextConfig and image processors where a checkpoint may be silent
DEFAULTS: dict[str, Any] = {"projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
                            "multimodal_projector_bias": True, "image_token_index": 32_000, "tie_word_embeddings": False}
ONEVISION: dict[str, Any] = {**DEFAULTS, "vision_feature_layer": -1, "vision_feature_select_strategy": "full", "image_token_index": 151_646,
                             "video_token_index": 151_647, "vision_aspect_ratio": "anyres_max_9"}
IMAGES: dict[str, Any] = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3,
                          "do_center_crop": True, "do_pad": False, "size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION_PINPOINTS = [[384 * lines, 384 * columns] for lines in range(1, 7) for columns in range(1, 7)]
# text models by their model_type: the class that converts them alone
TEXTS = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "granite": "GraniteForCausalLM", "qwen2": "Qwen2ForCausalLM"}


class Projected:
    """CLIP or SigLIP over one square or over tiles, and a projector of two products."""

    def __init__(self, root: Config, d_text: int, tiled: bool):
        """Read the settings below `root` and of the image processor. Raises: InvalidModelError, UnsupportedModelError."""
        root.refuse_unless("projector_hidden_act", "gelu")
        self.root, self.d_text, self.tiled, self.clip = root, d_text, tiled, Clip(root, root.need("vision_config"))
        self.biases, self.image_token = bool(root.need("multimodal_projector_bias")), root.token("image_token_index", "image_token_id")
        self.images = self.read_images()
        self.aspect = root.get("vision_aspect_ratio") or ("anyres" if tiled else "pad" if self.images.need("do_pad") else "crop")
        self.video_token = root.token("video_token_index", "video_token_id") if root.get("vision_aspect_ratio") else None
        if self.video_token is not None:
            self.check_videos()

    def read_images(self) -> Config:
        """Read what the image processor does. Raises: UnsupportedModelError for what no key expresses."""
        own = self.root.get("vision_aspect_ratio") is not None
        defaults = {"size": {"height": 384, "width": 384}, "image_grid_pinpoints": ONEVISION_PINPOINTS} if own else {"image_grid_pinpoints": PINPOINTS}
        s = image_settings(self.root.file.parent, {**IMAGES, **defaults})
        size = s.need("size")
        sides = {size} if isinstance(size, int) else {size.get("shortest_edge"), size.get("height"), size.get("width")} - {None}
        if sides != {self.clip.image_size}:
            raise UnsupportedModelError(f"{s.file}: 'size' is {size!r} for an encoder of {self.clip.image_size} pixels")
        if not self.tiled and not s.need("do_pad") and not s.need("do_center_crop"):
            raise UnsupportedModelError(f"{s.file}: pictures are neither padded nor cut; this converter knows 'do_pad' and 'do_center_crop'")
        if self.tiled and self.root.get("image_grid_pinpoints") not in (None, s.get("image_grid_pinpoints")):
            raise UnsupportedModelError(f"{s.file}: 'image_grid_pinpoints' differ from those of {self.root.file.name}")
        return s

    def check_videos(self) -> None:
        """Raise UnsupportedModelError where frames are not treated as the whole of a picture."""
        v = video_settings(self.root.file.parent, self.images.defaults)
        for name in ("size", "image_mean", "image_std", "resample"):
            v.refuse_unless(name, self.images.need(name))
        v.refuse_unless("do_sample_frames", False, None)

    def write_keys(self, out: GGUFWriter) -> None:
        """Write the keys "clip.*"."""
        self.clip.write_keys(out, self.images, "mlp", self.d_text)
        out.add_string("clip.vision.image_aspect_ratio", self.aspect)
        if self.tiled:
            out.add_array("clip.vision.image_grid_pinpoints", [int(n) for pair in self.images.need("image_grid_pinpoints") for n in pair])
            out.add_string("clip.vision.mm_patch_merge_type", "spatial_unpad")
        out.add_uint32("clip.vision.image_token_id", self.image_token)
        if self.video_token is not None:
            out.add_uint32("clip.vision.video_token_id", self.video_token)

    def unused(self) -> set[str]:
        """Return names of tensors that are left out."""
        return self.clip.unused()

    def tensors(self) -> Tensors:
        """List the tensors of encoder and projector."""
        yield from self.clip.tensors()
        d = self.d_text
        yield from linear("mm.0", "multi_modal_projector.linear_1", d, self.clip.width * len(self.clip.features), self.biases)
        yield from linear("mm.2", "multi_modal_projector.linear_2", d, d, self.biases)
        if self.tiled:
            yield Entry("model.image_newline", "image_newline", (d,))


@converts("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration", "LlavaOnevisionForConditionalGeneration")
class Llava(TextAndEncoder):
    renames = ((r"^model\.language_model\.", "model."), (r"^language_model\.model\.", "model."), (r"^language_model\.lm_head\.", "lm_head."),
               (r"^model\.(vision_tower|multi_modal_projector|image_newline)\b", r"\1"), (r"^vision_tower\.vision_model\.", "vision_tower."))

    def __init__(self, config: dict[str, Any], file: Path):
        names = config["architectures"]
        r = Config(config, ONEVISION if "LlavaOnevisionForConditionalGeneration" in names else DEFAULTS, file)
        text, tiled = r.need("text_config"), "LlavaForConditionalGeneration" not in names
        kind = text.get("model_type", "llama")
        if kind not in TEXTS:
            raise UnsupportedModelError(f"{file}: the text model is {kind!r}; this converter knows {', '.join(TEXTS)}")
        tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", r.need("tie_word_embeddings")))
        self.text = supported()[TEXTS[kind]]({**text, "architectures": [TEXTS[kind]], "tie_word_embeddings": tied}, file)
        self.arch, self.vocab_size = self.text.arch, self.text.vocab_size
        self.encoder = self.beside(r, tiled)

    def beside(self, root: Config, tiled: bool) -> Any:
        """Read the encoder and the projector that stand beside the text model."""
        if not tiled and root.need("vision_config").get("model_type") == "pixtral":
            root.refuse_unless("vision_feature_select_strategy", "full")
            return Pixtral(root, self.text.d_model, self.vocab_size)
        return Projected(root, self.text.d_model, tiled)
