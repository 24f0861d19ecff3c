"""Qwen2.5-VL in Ollama's dialect: one file, the model of `qwen2vl` under other names.

Source: Ollama, `convert/convert_qwen25vl.go`, `convert/convert_qwen2.go`, `model/models/qwen25vl/*.go`. Text tensors are
llama.cpp's; keys are "qwen25vl.*", with M-RoPE's sections as rope.mrope_section. Of the encoder:

    here                                    llama.cpp
    v.patch_embd_0, v.patch_embd_1          v.patch_embd.weight, v.patch_embd.weight.1
    v.merger.ln_q, v.merger.mlp.0, .2       v.post_ln, mm.0, mm.2
    qwen25vl.vision.*                       clip.vision.*
    vision.fullatt_block_indexes            clip.vision.wa_layer_indexes
    vision.max_pixels                       clip.vision.image_max_pixels
    (the width of v.blk.0.ffn_up)           clip.vision.feed_forward_length

differs: Ollama resizes bilinearly, to at most 2 megapixels; here pictures are processed as the authors' processor does. Ids of
special tokens, mean and deviation are in no key: the tokens are found by their texts, the rest are the authors' constants.
"""

from __future__ import annotations

from pyengine.files.hparams import Hparams
from pyengine.models import qwen2vl
from pyengine.models.architecture import Encoder, EncoderFiles
from pyengine.files.weights import Weights

FULL_LAYERS = (7, 15, 23, 31)        # of a file without the key: model_vision.go, newVisionModel


class Vision(qwen2vl.Vision):
    """qwen2vl's encoder, merger and processor, bound by Ollama's names."""

    slices = ("patch_embd_0.weight", "patch_embd_1.weight")
    merger = ("v.merger.ln_q", "v.merger.mlp.0", "v.merger.mlp.2")

    @staticmethod
    def read(h: Hparams, v: Hparams, w: Weights) -> qwen2vl.VisionConfig:
        """The configuration from "qwen25vl.vision.*"; `v` ("clip.*") has nothing in these files."""
        key = "vision.fullatt_block_indexes"
        numbers = qwen2vl.integers(h, key) if f"{h.arch}.{key}" in h.meta else FULL_LAYERS
        full = tuple(i in numbers for i in range(qwen2vl.n_layers(h, w)))
        return qwen2vl.VisionConfig.make(h, h, w, True, "silu", full)


class Model(qwen2vl.Model):
    """qwen2vl's decoder."""

    @classmethod
    def encoders(cls, files: EncoderFiles) -> dict[str, Encoder]:
        """Bind the encoder, where the files hold it."""
        return {"image": Vision(files)}
