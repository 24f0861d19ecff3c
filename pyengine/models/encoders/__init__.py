"""Encoders that stand beside text models of another name: which one a file holds is its clip.projector_type (llama.cpp's pairs)."""

from __future__ import annotations

import importlib

from pyengine.errors import UnsupportedModelError
from pyengine.models.architecture import Encoder, EncoderFiles
from pyengine.nn.encoder import projector_type

# projector: module, of which `Vision` is the encoder
ENCODERS = {"aria": "aria", "blip2": "blip2", "florence2": "florence2", "fuyu": "fuyu", "gemma3nv": "mobilenetv5", "idefics3": "idefics3",
            "instructblip": "blip2", "internvl": "internvl", "janus_pro": "janus", "ldp": "mobilevlm", "ldpv2": "mobilevlm", "mlp": "llava",
            "mm1_5": "mm1_5", "molmo": "molmo", "nvlm_d": "nvlm",
            "phi4": "phi4", "phi4mm": "phi4mm", "pixtral": "pixtral"}


def beside(files: EncoderFiles) -> dict[str, Encoder]:
    """Bind the encoder that the file's projector names. Raises: UnsupportedModelError for another one."""
    name = projector_type(files.keys)
    if name not in ENCODERS:
        raise UnsupportedModelError(f"{files.keys.key('projector_type')} is {name!r}; beside {files.text.arch!r} these are supported: "
                                    f"{', '.join(sorted(ENCODERS))}")
    return {"image": importlib.import_module(f"{__name__}.{ENCODERS[name]}").Vision(files)}
