"""Idefics3 and SmolVLM: llama with SigLIP over tiles, projector "idefics3" in GGUF.

Follows transformers `configuration_idefics3.py`, `configuration_smolvlm.py`, `image_processing_pil_idefics3.py`. Keys and names as llama.cpp's
`conversion/smolvlm.py` has them. Axes: V encoder width, F its feed-forward width, D text width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from pyengine.errors import InvalidModelError, UnsupportedModelError

from .checkpoint import Config, malformed_is
from .contract import FLOAT32, Entry, converts, linear
from .decoder import Tensors
from .llama import Llama
from .vision import attention, feed_forward, image_settings, video_settings, write_encoder_keys

# transformers' SmolVLMConfig, SmolVLMVisionConfig and SmolVLMImageProcessorPil where a checkpoint may be silent
DEFAULTS: dict[str, Any] = {"scale_factor": 2, "image_token_id": 128_257, "tie_word_embeddings": False}
VISION: dict[str, Any] = {"hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16, "num_channels": 3,
                          "image_size": 224, "patch_size": 32, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
IMAGES: dict[str, Any] = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 1, "size": {"longest_edge": 1456},
                          "max_image_size": {"longest_edge": 364}, "do_image_splitting": True}


@converts("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration")
class Idefics3(Llama):
    renames = ((r"^model\.text_model\.", "model."), (r"^model\.(vision_model|connector)\.", r"\1."))

    def __init__(self, config: dict[str, Any], file: Path):
        r = self.root = Config(config, DEFAULTS, file)
        text = r.need("text_config")
        Config(text, {"model_type": "llama"}, file).refuse_unless("model_type", "llama")
        tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        super().__init__({**text, "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tied}, file)
        v = self.vision = Config(r.need("vision_config"), VISION, file)
        v.refuse_unless("num_channels", 3)
        self.v_model, self.v_ff, self.v_layers, self.v_heads, self.image_size, self.patch_size = (v.count(n) for n in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"))
        self.group, self.image_token = r.count("scale_factor"), r.token("image_token_id", "image_token_index")
        if self.image_size // self.patch_size % self.group:
            raise InvalidModelError(f"{file}: {self.image_size // self.patch_size} patches along a side are no groups of {self.group}")
        s = self.images = image_settings(file.parent, IMAGES)
        if s.need("max_image_size").get("longest_edge") != self.image_size:
            raise UnsupportedModelError(f"{s.file}: 'max_image_size' is {s.need('max_image_size')!r} for an encoder of {self.image_size} pixels")
        self.videos = self.read_videos() if "SmolVLMForConditionalGeneration" in config["architectures"] else None

    def read_videos(self) -> Config:
        """Read what the video processor does. Raises: UnsupportedModelError where frames are not treated as pictures without tiles."""
        v = video_settings(self.root.file.parent, {**IMAGES, "video_sampling": {}, "num_frames": None, "fps": None, "do_sample_frames": False})
        for name in ("image_mean", "image_std", "resample", "max_image_size"):
            v.refuse_unless(name, self.images.need(name))
        return v

    def write_video_keys(self, out: GGUFWriter, videos: Config) -> None:
        """Write how many frames are taken, of a second too, and their longer side before they are squeezed."""
        own = videos.need("video_sampling")
        with malformed_is(f"{videos.file}: a setting of videos is of the wrong kind"):
            size, frames, fps = own.get("video_size", videos.need("size")), own.get("max_frames", videos.get("num_frames")), own.get("fps", videos.get("fps"))
            out.add_uint32("clip.vision.video_preproc_image_size", int(size["longest_edge"]))
            out.add_bool("clip.vision.video_sample_frames", bool(videos.get("do_sample_frames")))
            if frames is not None:
                out.add_uint32("clip.vision.video_max_frames", int(frames))
            if fps is not None:
                out.add_float32("clip.vision.video_fps", float(fps))

    def write_keys(self, out: GGUFWriter) -> None:
        super().write_keys(out)
        write_encoder_keys(
            out, self.vision, self.images, projector="idefics3", image_size=self.image_size, d_model=self.v_model, d_ff=self.v_ff,
            n_layers=self.v_layers, n_heads=self.v_heads, eps=self.vision.need("layer_norm_eps"), d_text=self.d_model)
        out.add_vision_projector_scale_factor(self.group)
        out.add_vision_preproc_image_size(int(self.images.need("size")["longest_edge"]))
        out.add_bool("clip.vision.image_splitting", bool(self.images.need("do_image_splitting")))
        out.add_uint32("clip.vision.image_token_id", self.image_token)
        if self.videos is not None:
            self.write_video_keys(out, self.videos)

    def both(self, name: str, source: str) -> Iterator[Entry]:
        """List a layer norm."""
        for part in ("weight", "bias"):
            yield Entry(f"{name}.{part}", f"{source}.{part}", (self.v_model,))

    def tensors(self) -> Tensors:
        yield from super().tensors()
        v, p, n, at = self.v_model, self.patch_size, (self.image_size // self.patch_size) ** 2, "vision_model.embeddings"
        yield Entry("v.patch_embd.weight", f"{at}.patch_embedding.weight", (v, 3, p, p), instead=FLOAT32)
        yield Entry("v.patch_embd.bias", f"{at}.patch_embedding.bias", (v,))
        yield Entry("v.position_embd.weight", f"{at}.position_embedding.weight", (n, v), instead=FLOAT32)
        for i in range(self.v_layers):
            b, m = f"v.blk.{i}", f"vision_model.encoder.layers.{i}"
            yield from self.both(f"{b}.ln1", f"{m}.layer_norm1")
            yield from attention(b, f"{m}.self_attn", v, bias=True, out="out_proj")
            yield from self.both(f"{b}.ln2", f"{m}.layer_norm2")
            yield from feed_forward(b, f"{m}.mlp", v, self.v_ff, {"ffn_up": "fc1", "ffn_down": "fc2"})
        yield from self.both("v.post_ln", "vision_model.post_layernorm")
        yield from linear("mm.model.fc", "connector.modality_projection.proj", self.d_model, v * self.group**2)
