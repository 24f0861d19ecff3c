"""NVLM-D, -X and -H against a reference in torch (tests/support/reference_nvlm.py): tags, gated layers, the whole in the sequence or beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compare_nvlm
import pyengine as pe
from cases import Case, Converted, Tokens
from converters import convert
from pictures import A, B, LONG, picture
from pyengine.errors import ContextOverflowError, InvalidModelError, PyEngineError, UnsupportedModelError
from sight import Run, Sight
from test_internvl import MEAN, STD, TEXT
from test_internvl import TEMPLATE as CHAT
from tiny import make_checkpoint

try:
    import reference_nvlm
    import transformers
    reference_nvlm.register()
except ImportError:         # the cases are found without torch and transformers
    transformers = None

pytestmark = pytest.mark.skipif(transformers is None, reason="needs transformers and torch: pip install -r requirements/test.txt")

PAD, WHOLE, N = "<|vision_pad|>", "<tile_global_thumbnail>", 4      # rows of a tile
TEMPLATE = CHAT.replace("<IMG_CONTEXT>", PAD)
COMMON_TOKENS = ("<|im_start|>", PAD, "<|im_end|>", "<pad>")
TAGS = (*(f"<tile_{i}>" for i in range(1, 7)), WHOLE)
WORDS = Tokens(COMMON_TOKENS, "<|im_start|>", "<|im_end|>", "<pad>", TEMPLATE)
TAGGED = Tokens((*COMMON_TOKENS, *TAGS), "<|im_start|>", "<|im_end|>", "<pad>", TEMPLATE)


class Processor:
    """A picture in a text becomes tags and places for rows."""

    def __init__(self, folder: Path, tokenizer: Any, kind: str):
        self.images, self.tokenizer, self.kind = transformers.GotOcr2ImageProcessorPil.from_pretrained(folder), tokenizer, kind

    def expanded(self, n: int) -> str:
        tags = [*TAGS[: n - 1], WHOLE]
        if self.kind == "NVLM_D":
            return "<Image>" + "".join(tag + PAD * N for tag in tags) + "</Image>"
        return "".join(tags) + PAD * N * (self.kind == "NVLM_H")

    def __call__(self, text: Any, images: Any, add_special_tokens: bool, return_tensors: str, **settings: Any) -> dict[str, Any]:
        import torch

        text, images = (text[0], images[0]) if isinstance(text, list) else (text, images)
        made = [self.images(i, return_tensors="pt", **settings)["pixel_values"] for i in images]
        pieces = text.split(PAD)
        whole = pieces[0] + "".join(self.expanded(len(m)) + piece for m, piece in zip(made, pieces[1:]))
        return {"input_ids": torch.tensor([self.tokenizer(whole, add_special_tokens=False)["input_ids"]]), "made": made}


class NvlmSight(Sight):
    """Tiles and the whole."""

    marker = PAD

    def __init__(self, kind: str):
        self.kind, self.model_types = kind, (kind,)

    def images(self, config: Any, settings: dict[str, Any]) -> Any:
        side = config.vision_config["image_size"]
        return transformers.GotOcr2ImageProcessorPil(**{"size": {"height": side, "width": side}, "image_mean": MEAN, "image_std": STD, "crop_to_patches": True,
                                                        "max_patches": 6, **settings})

    def processor(self, folder: Path, config: Any, tokenizer: Any) -> Any:
        self.ids = dict(zip((PAD, *TAGS), tokenizer.convert_tokens_to_ids([PAD, *TAGS])))
        return Processor(folder, tokenizer, self.kind)

    def soft(self, config: Any) -> int | None:
        return self.ids[PAD]

    def run(self, model: Any, tokens: Any, made: list[dict[str, Any]], fps: float | None) -> Run:
        import torch

        pixels = [p for m in made for p in m["made"]]
        rows = [model.rows(p) for p in pixels]
        features = [r.flatten(0, 1) for r in rows]
        none = torch.zeros(0, model.language_model.config.hidden_size)
        in_line = {"NVLM_D": rows, "NVLM_X": [], "NVLM_H": [r[-1:] for r in rows]}[self.kind]
        beside = {"NVLM_D": [], "NVLM_X": rows, "NVLM_H": [r[:-1] for r in rows]}[self.kind]
        soft, seen = (torch.cat([none, *(r.flatten(0, 1) for r in part)]) for part in (in_line, beside))
        return Run({"soft": soft, "seen": seen, "sees": torch.from_numpy(self.sees(tokens[0].tolist(), len(seen))), "pad": self.ids[PAD]}, features, pixels, [])

    def sees(self, ids: list[int], rows: int) -> np.ndarray:
        """Which rows beside the sequence each position sees: a tag those of its tile, what follows those of the last tags side by side."""
        tags = {self.ids[t] for t in (TAGS if self.kind == "NVLM_X" else TAGS[:-1])} if self.kind != "NVLM_D" else set()
        sees, start, end = np.zeros((len(ids), rows), bool), 0, 0
        for i, token in enumerate(ids):
            if token in tags:
                start, end = (start if i and ids[i - 1] in tags else end), end + N
                sees[i, end - N : end] = True
            else:
                sees[i, start:end] = True
        return sees


VISION = {"hidden_size": 80, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56, "patch_size": 14,
          "layer_norm_eps": 1e-6, "hidden_act": "gelu", "norm_type": "rms_norm", "qkv_bias": False, "qk_normalization": True, "num_channels": 3}
CLIP = {"has_vision_encoder": True, "projector_type": "nvlm_d", "use_silu": False, "use_gelu": True, "hidden_act": "gelu", "image_size": 56,
        "patch_size": 14, "embedding_length": 80, "feed_forward_length": 100, "attention.head_count": 4, "projection_dim": 96, "block_count": 3,
        "resample": 3, "attention.layer_norm_epsilon": np.float32(1e-6), "projector.scale_factor": 2, "preproc_min_tiles": 1, "preproc_max_tiles": 6,
        "image_mean": [np.float32(x) for x in MEAN], "image_std": [np.float32(x) for x in STD]}
SETTINGS = {"downsample_ratio": 0.5, "ps_version": "v2", "use_thumbnail": True, "dynamic_image_size": True, "max_dynamic_patch": 6, "min_dynamic_patch": 1,
            "select_layer": -1}
# the text of tags is many tokens of this vocabulary
SHORT = {"text": [3, "only text", 9], "one": ["what is ", A, " this?"], "two": [5, A, "and", B, "differ how?", 6], "dot": ["a ", picture(1, 1), " end"]}


def case(kind: str, name: str, tokens: Tokens, arch: str = "nvlm", **more: Any) -> Case:
    keys = {"general.architecture": arch, "tokenizer.chat_template": TEMPLATE}
    if arch == "nvlm":
        keys |= {"nvlm.attention.cross_attention_layers": [1, 4], "nvlm.attention.cross_hybrid": name == "NVLM_H", "nvlm.block_count": 6}
    layers = {"cross_attention_layers": [1, 3]} if arch == "nvlm" else {}
    return Case(kind, arch, {"NVLM_D": "NvlmConfig", "NVLM_X": "NvlmXConfig", "NVLM_H": "NvlmHConfig"}[name], name, "qwen2", {**SETTINGS, **layers},
                {**TEXT, "rms_norm_eps": 1e-6, "num_hidden_layers": 4 if layers else 3}, VISION, tokens, NvlmSight(name),
                cached_as={"nvlm_d": "qwen2", "nvlm_x": "mllama", "nvlm_h": ""}[kind], converted=Converted(keys, clip=CLIP, clip_tokens={"image_token_id": PAD}), **more)


CASES = (case("nvlm_d", "NVLM_D", WORDS, "qwen2", prompts=SHORT), case("nvlm_x", "NVLM_X", TAGGED), case("nvlm_h", "NVLM_H", TAGGED))


def test_a_tag_sees_its_own_tile(tiny_gguf) -> None:
    """Logits at a tag do not change with the tiles before it; what follows the tags sees all."""
    model = pe.load(tiny_gguf("nvlm_x")[0], n_ctx=64, kv_dtype="f32")
    pixels = np.array(LONG)
    other = pixels.copy()
    other[:, :30] = 255 - other[:, :30]                                            # in the first tile
    a, b = (np.asarray(model.encode_image(p)) for p in (pixels, other))
    changed = [np.abs(a[i : i + N] - b[i : i + N]).max() > 1e-4 for i in range(0, len(a), N)]
    assert changed[0] and changed[-1] and not any(changed[1:-1]) and len(changed) > 3


def test_rows_and_what_is_refused(tiny_gguf, tmp_path) -> None:
    shown = np.array(picture(112, 112))                                            # four tiles and the whole
    for kind, n in (("nvlm_x", 5), ("nvlm_h", 5 + N)):
        model = pe.load(tiny_gguf(kind)[0], n_ctx=64, kv_dtype="f32")
        assert model.logits([3, shown, 4]).shape[0] == n + 2 and model.encode_image(shown).shape == (5 * N, 96)
    with pytest.raises(ContextOverflowError, match="5 tiles, 9 positions, but the context holds 8"):
        pe.load(tiny_gguf("nvlm_h")[0], n_ctx=8).encode_image(shown)
    with pytest.raises(PyEngineError, match="the prompt's 8 tiles have 32 encoder rows, but a conversation holds 20"):
        pe.load(tiny_gguf("nvlm_h")[0], n_ctx=64, images=(400, 400, 1)).logits([shown, shown, 4])
    folder = make_checkpoint("nvlm_x", tmp_path / "c")
    config = json.loads((folder / "config.json").read_text())
    for changes, kind, text in (({"cross_attention_layers": [3, 1]}, InvalidModelError, "rising numbers below 4"), ({"ps_version": "v1"}, UnsupportedModelError, "'v1'"),
                                ({"cross_attention_layers": None}, InvalidModelError, "'cross_attention_layers' is missing"),
                                ({"use_thumbnail": False}, UnsupportedModelError, "'use_thumbnail' is False")):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(kind, match=text):
            convert(folder, tmp_path / "m.gguf")


def test_the_page_that_compares_them(tmp_path) -> None:
    """docs/nvlm.md is what the script writes, and its caches by hand: 80 layers keep the sequence, 10 the rows beside it, 4 KiB a row and layer."""
    assert compare_nvlm.page() == (compare_nvlm.ROOT / "docs" / "nvlm.md").read_text()
    d, x, h = (compare_nvlm.counted(kind, tmp_path) for kind in "DXH")
    tiles, rows, text = 6, 256, 64
    assert [c.positions for c in (d, x, h)] == [(tiles + 1) * rows + text, tiles + 1 + text, tiles + 1 + rows + text]
    assert [c.cache for c in (d, x, h)] == [4096 * (80 * c.positions + 10 * beside) for c, beside in ((d, 0), (x, 7 * rows), (h, 6 * rows))]
    assert d.encoder == x.encoder == h.encoder and d.prompt > 5 * h.prompt > 20 * x.prompt and x.weights == h.weights > d.weights
