"""Mistral Small 3.1 and 3.2, Ministral 3: a text model with Pixtral's encoder, which takes pictures at their own size and merges patches.

`mistral3` in GGUF, projector "pixtral". Follows transformers `configuration_mistral3.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


from .checkpoint import Config
from .contract import converts, supported
from .pixtral import Pixtral
from .vision import TextAndEncoder, tied_head

# transformers' Mistral3Config where a checkpoint may be silent
DEFAULTS: dict[str, Any] = {"image_token_index": 10, "projector_hidden_act": "gelu", "vision_feature_layer": -1,
                            "multimodal_projector_bias": False, "spatial_merge_size": 2}
TEXTS = {"mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM"}


@converts("Mistral3ForConditionalGeneration")
class Mistral3(TextAndEncoder):
    arch = "mistral3"
    renames = ((r"^model\.language_model\.", "model."), (r"^language_model\.model\.", "model."),
               (r"^language_model\.lm_head\.", "lm_head."), (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."))

    def __init__(self, config: dict[str, Any], file: Path):
        root = Config(config, DEFAULTS, file)
        text = root.need("text_config")
        kind = Config(text, {"model_type": "mistral"}, file)
        kind.refuse_unless("model_type", *TEXTS)
        name = TEXTS[kind.need("model_type")]
        self.text = supported()[name]({**text, "architectures": [name], "tie_word_embeddings": tied_head(root)}, file)
        self.vocab_size = self.text.vocab_size
        self.encoder = Pixtral(root, self.text.d_model, self.vocab_size, root.count("spatial_merge_size"))
