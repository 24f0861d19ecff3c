"""Mistral Small 3.1 and 3.2 whole: llama's decoder beside Pixtral's encoder, with a patch merger.

Follows transformers 5.23 `modeling_mistral3.py`; `pixtral` has the encoder. Files: ours and llama.cpp's of this name (with the
encoder in keys "clip.*"; llama.cpp's first converters called the text "llama"), and Ollama's, whose names are its own
(`convert/convert_mistral.go`, `model/models/mistral3/*.go`):

    here                                      llama.cpp
    v.patch_conv, v.encoder_norm              v.patch_embd, v.pre_ln
    v.blk.N.attn_norm, ffn_norm, attn_output  v.blk.N.ln1, ln2, attn_out
    mm.norm, mm.patch_merger.merging_layer    mm.input_norm, mm.patch_merger
    mm.linear_1, mm.linear_2                  mm.1, mm.2
    mistral3.vision.*                         clip.vision.*
    spatial_merge_size                        clip.vision.spatial_merge_size

There q and k of the encoder keep transformers' halves, while those of the decoder have their rows permuted as llama's. The
encoder's activation is in no key: it is SiLU. differs: Ollama resizes bilinearly; here pictures are processed as transformers does.

Ministral 3, which has the same name in files, scales attention with the position and its rope by a second rule; it is refused.
"""

from __future__ import annotations


from pyengine.files.hparams import Hparams
from pyengine.models import encoders, llama
from pyengine.models.architecture import Encoder, EncoderFiles
from pyengine.models.encoders import pixtral
from pyengine.files.weights import Weights

OLLAMA = pixtral.Names("patch_conv", "encoder_norm", "attn_norm", "ffn_norm", "attn_output", "norm", "patch_merger.merging_layer",
                        "linear_1", "linear_2", interleaved=False)
MERGE = 2                            # of a file without the key: model.go, newMultiModalProjector
TEMPERATURE = "attention that is scaled with the position (Ministral 3)"
MAGNITUDE = "rope scaling with a magnitude of its own (Ministral 3)"


class Vision(pixtral.Vision):
    """The encoder by Ollama's names."""

    names = OLLAMA

    def __init__(self, files: EncoderFiles):
        super().__init__(files._replace(keys=files.text))                      # "clip.*" has nothing in these files

    @staticmethod
    def read(h: Hparams, v: Hparams, w: Weights) -> pixtral.VisionConfig:
        """The configuration from "mistral3.vision.*"."""
        act = h.get("mm.projector_hidden_act", "gelu", str)
        return pixtral.VisionConfig.make(h, h, w, "silu", act, h.size("spatial_merge_size", MERGE))


class Model(llama.Model):
    """llama's decoder."""

    @classmethod
    def encoders(cls, files: EncoderFiles) -> dict[str, Encoder]:
        """Bind the encoder, in the dialect that the file's keys are written in."""
        ollama = f"{files.text.arch}.vision.block_count" in files.text.meta
        return {"image": Vision(files)} if ollama else encoders.beside(files)

    def __init__(self, h: Hparams, w: Weights):
        h.refuse(attention__temperature_scale=TEMPERATURE, rope__scaling_beta=TEMPERATURE,       # llama.cpp's name, Ollama's
                 rope__scaling__yarn_log_multiplier=MAGNITUDE, rope__scaling__mscale_all_dim=MAGNITUDE)
        super().__init__(h, w)
