"""MM1.5: CLIP and a C-Abstractor beside a text model of another name, projector "mm1_5" in GGUF. No weights were published.

A checkpoint has transformers' names of LLaVA for the encoder and the text model, and Honeybee's for the projector, in config.json
(`projector_config`) and in its tensors (`multi_modal_projector.net.0.b1.conv1.conv`; arXiv:2312.06742). Axes: V encoder width, C projector
width, D text width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from pyengine.errors import InvalidModelError, UnsupportedModelError

from .checkpoint import Config
from .clip import Clip
from .contract import FLOAT32, Entry, converts, linear
from .decoder import Tensors
from .llava import Llava
from .vision import image_settings, write_encoder_keys

# Honeybee's projector for 144 rows; the paper's splitting; CLIP's colours
PROJECTOR: dict[str, Any] = {"projector_type": "c-abs", "depth": 3, "mlp_depth": 2, "hidden_size": 1024, "num_query_tokens": 144, "pos_emb": True,
                             "prenorm": False, "num_eos_tokens": 0, "layer_norm_eps": 1e-5}
IMAGES: dict[str, Any] = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3,
                          "min_sub_images": 4, "max_sub_images": 9}
MM = "multi_modal_projector"


class Abstractor:
    """CLIP and its projector."""

    def __init__(self, root: Config, d_text: int):
        """Read the settings below `root` and of the image processor. Raises: InvalidModelError, UnsupportedModelError."""
        file = root.file
        c, self.d_text = Clip(root, root.need("vision_config")), d_text
        if not c.classed or len(c.features) != 1:
            raise UnsupportedModelError(f"{file}: this converter knows one layer of clip_vision_model")
        p = self.projector = Config(root.get("projector_config") or {}, PROJECTOR, file)
        for name, *allowed in (("projector_type", "c-abs"), ("mlp_depth", 2), ("pos_emb", True), ("prenorm", False), ("num_eos_tokens", 0)):
            p.refuse_unless(name, *allowed)
        self.clip, self.image_token = c, root.token("image_token_index", "image_token_id")
        self.inner, self.depth, rows = p.count("hidden_size"), p.count("depth"), p.count("num_query_tokens")
        self.query_side = math.isqrt(rows)
        if self.query_side**2 != rows or self.query_side > c.image_size // c.patch_size:
            raise InvalidModelError(f"{file}: 'num_query_tokens' is {rows}: a square of at most the patches of a sub-image is needed")
        self.images = image_settings(file.parent, IMAGES)

    def write_keys(self, out: GGUFWriter) -> None:
        """Write the keys "clip.*"."""
        c = self.clip
        write_encoder_keys(
            out, c.vision, self.images, projector="mm1_5", image_size=c.image_size, d_model=c.width, d_ff=c.d_ff,
            n_layers=c.taken, n_heads=c.n_heads, eps=c.vision.need("layer_norm_eps"), d_text=self.d_text)
        for name, value in (("query_side", self.query_side), ("embedding_length", self.inner), ("block_count", self.depth)):
            out.add_uint32(f"clip.vision.projector.{name}", value)
        out.add_float32("clip.vision.projector.layer_norm_epsilon", self.projector.need("layer_norm_eps"))
        for name in ("min", "max"):
            out.add_uint32(f"clip.vision.preproc_{name}_tiles", self.images.count(f"{name}_sub_images"))
        out.add_uint32("clip.vision.image_token_id", self.image_token)

    def unused(self) -> set[str]:
        """Return names of tensors that are left out."""
        return self.clip.unused()

    def convolution(self, name: str, source: str, n_out: int, n_in: int, bias: bool = False) -> Iterator[Entry]:
        """List a 1 x 1 convolution as a product."""
        yield Entry(f"{name}.weight", f"{source}.weight", (n_out, n_in), stored=(n_out, n_in, 1, 1), make=lambda a: a.reshape(-1, n_in))
        if bias:
            yield Entry(f"{name}.bias", f"{source}.bias", (n_out,))

    def block(self, b: str, m: str, n_in: int) -> Iterator[Entry]:
        """List a block of the projector."""
        c = self.inner
        yield from self.convolution(f"{b}.conv1", f"{m}.conv1.conv", c, n_in)
        yield Entry(f"{b}.conv2.weight", f"{m}.conv2.conv.weight", (c, 9), stored=(c, 1, 3, 3), make=lambda a: a.reshape(-1, 9), instead=FLOAT32)
        yield from self.convolution(f"{b}.se1", f"{m}.se.fc1", round(n_in / 4), c, True)
        yield from self.convolution(f"{b}.se2", f"{m}.se.fc2", c, round(n_in / 4), True)
        yield from self.convolution(f"{b}.conv3", f"{m}.conv3.conv", c, c)
        norms = [(f"{b}.norm{i}", f"{m}.conv{i}.bn") for i in (1, 2, 3)]
        if n_in != c:
            yield from self.convolution(f"{b}.skip", f"{m}.downsample.conv", c, n_in)
            norms.append((f"{b}.skip_norm", f"{m}.downsample.bn"))
        for name, source in norms:
            for part in ("weight", "bias"):
                yield Entry(f"{name}.{part}", f"{source}.{part}", (c,))

    def tensors(self) -> Tensors:
        """List the tensors of encoder and projector."""
        yield from self.clip.tensors()
        n = (self.clip.image_size // self.clip.patch_size) ** 2
        yield Entry("mm.position_embd.weight", f"{MM}.pos_emb", (1, n, self.clip.width), instead=FLOAT32)
        for stage in (0, 1):
            for i in range(self.depth):
                n_in = self.clip.width if (stage, i) == (0, 0) else self.inner
                yield from self.block(f"mm.net.{stage}.blk.{i}", f"{MM}.net.{2 * stage}.b{i + 1}", n_in)
        yield from linear("mm.0", f"{MM}.readout.0", self.d_text, self.inner, True)
        yield from linear("mm.2", f"{MM}.readout.2", self.d_text, self.d_text, True)


@converts("MM1_5ForConditionalGeneration")
class Mm15(Llava):
    def __init__(self, config: dict[str, Any], file: Path):
        super().__init__({"vision_feature_layer": -1, **config}, file)

    def beside(self, root: Config, tiled: bool) -> Abstractor:
        return Abstractor(root, self.text.d_model)
