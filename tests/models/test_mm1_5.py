"""MM1.5 against a reference in torch (tests/support/reference_mm1_5.py): grids of sub-images, the C-Abstractor's convolutions and averages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyengine as pe
import tiny
from cases import Case, Converted, Tokens
from converters import convert
from pictures import same
from pyengine.errors import ContextOverflowError, PyEngineError, RequestError
from pyengine.models.encoders import mm1_5
from pyengine.nn.convolution import adaptive_average
from sight import Run, Sight
from test_idefics3 import TEMPLATE
from tiny import COMMON, make_checkpoint

try:
    import reference_mm1_5
    reference_mm1_5.register()
except ImportError:         # the cases are found without torch and transformers
    reference_mm1_5 = None

pytestmark = pytest.mark.skipif(reference_mm1_5 is None, reason="needs transformers and torch: pip install -r requirements/test.txt")

ROWS, MEAN, STD = 9, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
TOKENS = Tokens(("<|im_start|>", "<image>", "<end_of_utterance>", "<pad>"), "<|im_start|>", "<end_of_utterance>", "<pad>", TEMPLATE,
                {"image_token_index": "<image>"})


class Processor:
    """A picture in a text becomes places for rows."""

    def __init__(self, images: Any, tokenizer: Any):
        self.images, self.tokenizer = images, tokenizer

    def __call__(self, text: Any, images: Any, add_special_tokens: bool, return_tensors: str, **settings: Any) -> dict[str, Any]:
        import torch

        text, images = (text[0], images[0]) if isinstance(text, list) else (text, images)
        made = [self.images.tiles(i, **settings) for i in images]
        pieces = text.split("<image>")
        text = pieces[0] + "".join("<image>" * (ROWS * len(m)) + piece for m, piece in zip(made, pieces[1:]))
        return {"input_ids": torch.tensor([self.tokenizer(text, add_special_tokens=False)["input_ids"]]), "made": made}


class Mm15Sight(Sight):
    """Sub-images and the whole."""

    model_types, marker = ("mm1_5",), "<image>"

    def images(self, config: Any, settings: dict[str, Any]) -> Any:
        return reference_mm1_5.Images(**{"size": 56, "image_mean": MEAN, "image_std": STD, "min_sub_images": 1, "max_sub_images": 4, **settings})

    def processor(self, folder: Path, config: Any, tokenizer: Any) -> Any:
        return Processor(reference_mm1_5.Images.from_pretrained(folder), tokenizer)

    def soft(self, config: Any) -> int:
        return config.image_token_index

    def run(self, model: Any, tokens: Any, made: list[dict[str, Any]], fps: float | None) -> Run:
        import torch

        pixels = [p for m in made for p in m["made"]]
        features = [model.rows(p).flatten(0, 1) for p in pixels]
        soft = torch.cat([torch.zeros(0, COMMON["hidden_size"]), *features])
        return Run({"soft": soft, "token": self.soft(model.config)}, features, pixels, [])


TEXT = {**COMMON, "rms_norm_eps": 1e-5, "max_position_embeddings": 512}
VISION = {"hidden_size": 80, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56, "patch_size": 7,
          "hidden_act": "quick_gelu"}
PROJECTOR = {"projector_type": "c-abs", "depth": 2, "mlp_depth": 2, "hidden_size": 64, "num_query_tokens": ROWS, "layer_norm_eps": 1e-5}
CLIP = {"has_vision_encoder": True, "projector_type": "mm1_5", "use_silu": False, "use_gelu": False, "hidden_act": "quick_gelu", "image_size": 56,
        "patch_size": 7, "embedding_length": 80, "feed_forward_length": 100, "attention.head_count": 4, "projection_dim": 96, "block_count": 3,
        "resample": 3, "attention.layer_norm_epsilon": np.float32(1e-5), "projector.query_side": 3, "projector.embedding_length": 64,
        "projector.block_count": 2, "projector.layer_norm_epsilon": np.float32(1e-5), "preproc_min_tiles": 1, "preproc_max_tiles": 4,
        "image_mean": [np.float32(x) for x in MEAN], "image_std": [np.float32(x) for x in STD]}

CASES = (Case("mm1_5", "llama", "Mm15Config", "MM1_5ForConditionalGeneration", "smollm", {"projector_config": PROJECTOR, "tie_word_embeddings": False}, TEXT,
              VISION, TOKENS, Mm15Sight(), cached_as="llama",
              converted=Converted({"general.architecture": "llama", "tokenizer.chat_template": TEMPLATE}, clip=CLIP,
                                  clip_tokens={"image_token_id": "<image>"})),)
RNG = np.random.default_rng(4)


def test_grids_cover_or_lose_least() -> None:
    theirs = reference_mm1_5.Images()
    for _ in range(500):
        width, height = (int(s) for s in np.exp(RNG.uniform(0, 8, 2)))
        assert mm1_5.grid(width, height, 378, 4, 9) == theirs.grid(width, height, 378, 4, 9)
    assert mm1_5.grid(756, 756, 378, 4, 9) == (2, 2) and mm1_5.grid(1134, 700, 378, 4, 9) == (2, 3) and mm1_5.grid(9000, 300, 378, 4, 9) == (1, 9)


@pytest.mark.parametrize("side, to", [(27, 12), (8, 3), (5, 5), (4, 1)])
def test_averages_are_those_of_torch(side: int, to: int) -> None:
    import torch

    x = RNG.standard_normal((side * side, 5)).astype(np.float32)
    with pe.Graph() as g:
        y = adaptive_average(g.input("x", x.shape), side, to)
    program = g.compile(y, device="cpu")
    want = torch.nn.AdaptiveAvgPool2d(to)(torch.from_numpy(x.T.reshape(1, 5, side, side)))[0].flatten(1).T.numpy()
    assert np.abs(program.run(x=x) - want).max() <= 1e-6


def test_options_and_what_is_refused(tiny_gguf, tmp_path) -> None:
    path, folder = tiny_gguf("mm1_5")
    picture = RNG.integers(0, 256, (112, 112, 3), dtype=np.uint8)
    model = pe.load(path, n_ctx=128, kv_dtype="f32")
    assert model.encode_image(picture).shape == (5 * ROWS, 96) and len(model.encode_image(pe.open_image(picture, max_tiles=1))) == ROWS
    same(model.logits([5, pe.open_image(picture, max_tiles=2), 6]), tiny.hf_seen(folder, [5, picture, 6], max_tiles=2).logits)
    for media, text in [(pe.open_image(picture, max_tiles=5), "from 1 to 4"), ([picture] * 2, "not videos")]:
        with pytest.raises(RequestError, match=text):
            model.encode_image(media)
    with pytest.raises(ContextOverflowError, match="5 sub-images of 9 positions, but the context holds 40"):
        pe.load(path, n_ctx=40).encode_image(picture)
    folder = make_checkpoint("mm1_5", tmp_path / "c")
    config = json.loads((folder / "config.json").read_text())
    for changes, text in (({"projector_type": "d-abs"}, "'projector_type' is 'd-abs'"), ({"num_query_tokens": 8}, "'num_query_tokens' is 8"),
                          ({"num_eos_tokens": 1}, "'num_eos_tokens' is 1"), ({"mlp_depth": 3}, "'mlp_depth' is 3")):
        (folder / "config.json").write_text(json.dumps({**config, "projector_config": {**PROJECTOR, **changes}}))
        with pytest.raises(PyEngineError, match=text):
            convert(folder, tmp_path / "m.gguf")
