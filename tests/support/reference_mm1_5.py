"""MM1.5 in torch from its papers (arXiv:2409.20566, arXiv:2312.06742): CLIP and the decoder are transformers', the C-Abstractor is written here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image as Pillow
from torch import nn

from tiny import OWN


class Mm15Config(transformers.PretrainedConfig):
    model_type = "mm1_5"

    def __init__(self, text_config: dict[str, Any] | None = None, vision_config: dict[str, Any] | None = None, **values: Any):
        super().__init__(**values, text_config={"model_type": "llama", **(text_config or {})}, vision_config={"model_type": "clip_vision_model",
                                                                                                            **(vision_config or {})})


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of [b, c, h, w]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv(n_in: int, n_out: int, eps: float, size: int = 1, groups: int = 1) -> nn.ModuleDict:
    return nn.ModuleDict({"conv": nn.Conv2d(n_in, n_out, size, padding=size // 2, groups=groups, bias=False), "bn": ChannelNorm(n_out, eps)})


class Block(nn.Module):
    """RegNet's block with squeeze and excitation, groups of one channel."""

    def __init__(self, n_in: int, n: int, eps: float):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv(n_in, n, eps), conv(n, n, eps, 3, n), conv(n, n, eps)
        self.se = nn.ModuleDict({"fc1": nn.Conv2d(n, round(n_in / 4), 1), "fc2": nn.Conv2d(round(n_in / 4), n, 1)})
        if n_in != n:
            self.downsample = conv(n_in, n, eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def run(part: nn.ModuleDict, y: torch.Tensor) -> torch.Tensor:
            return part["bn"](part["conv"](y))

        silu = nn.functional.silu
        y = silu(run(self.conv2, silu(run(self.conv1, x))))
        y = run(self.conv3, y * self.se["fc2"](silu(self.se["fc1"](y.mean((2, 3), keepdim=True)))).sigmoid())
        return silu(y + (run(self.downsample, x) if hasattr(self, "downsample") else x))


class MM1_5ForConditionalGeneration(transformers.PreTrainedModel):      # noqa: N801
    config_class = Mm15Config

    def __init__(self, config: Mm15Config):
        super().__init__(config)
        text = {k: v for k, v in config.text_config.items() if k != "model_type"}
        vision = transformers.CLIPVisionConfig(**{k: v for k, v in config.vision_config.items() if k != "model_type"})
        self.vision_tower, self.language_model = transformers.CLIPVisionModel(vision), transformers.LlamaForCausalLM(transformers.LlamaConfig(**text))
        p, v = config.projector_config, vision.hidden_size
        c, eps, d = p["hidden_size"], p["layer_norm_eps"], self.language_model.config.hidden_size
        stages = [nn.ModuleDict({f"b{i + 1}": Block(v if s == i == 0 else c, c, eps) for i in range(p["depth"])}) for s in (0, 1)]
        side = math.isqrt(p["num_query_tokens"])
        self.multi_modal_projector = nn.Module()
        self.multi_modal_projector.net = nn.ModuleList([stages[0], nn.AdaptiveAvgPool2d(side), stages[1]])
        self.multi_modal_projector.readout = nn.Sequential(nn.Linear(c, d), nn.SiLU(), nn.Linear(d, d))
        self.multi_modal_projector.pos_emb = nn.Parameter(torch.zeros(1, (vision.image_size // vision.patch_size) ** 2, v))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Random values are the test's."""

    def rows(self, pixels: torch.Tensor) -> torch.Tensor:
        """Sub-images [t, 3, s, s] -> rows [t, q, D]."""
        x = self.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:] + self.multi_modal_projector.pos_emb
        x = x.transpose(1, 2).unflatten(2, (math.isqrt(x.shape[1]), -1))
        for part in self.multi_modal_projector.net:
            for block in part.values() if isinstance(part, nn.ModuleDict) else (part,):
                x = block(x)
        return self.multi_modal_projector.readout(x.flatten(2).transpose(1, 2))

    def forward(self, input_ids: torch.Tensor, soft: torch.Tensor, token: int) -> Any:
        x = self.language_model.get_input_embeddings()(input_ids)
        if len(soft):
            x[input_ids == token] = soft
        return SimpleNamespace(logits=self.language_model(inputs_embeds=x).logits)


def register() -> None:
    """Let the classes be found by their names."""
    OWN.update({"Mm15Config": Mm15Config, "MM1_5ForConditionalGeneration": MM1_5ForConditionalGeneration})
    transformers.AutoConfig.register("mm1_5", Mm15Config, exist_ok=True)
    transformers.AutoModelForImageTextToText.register(Mm15Config, MM1_5ForConditionalGeneration, exist_ok=True)


class Images:
    """Settings of the image processor, and what it does."""

    def __init__(self, **settings: Any):
        self.settings = settings

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(self.settings))

    @classmethod
    def from_pretrained(cls, folder: Path) -> Images:
        return cls(**json.loads((Path(folder) / "preprocessor_config.json").read_text()))

    def within(self, width: int, height: int, w: int, h: int) -> tuple[int, int]:
        if w / width < h / height:
            return w, min(math.ceil(height * (w / width)), h)
        return min(math.ceil(width * (h / height)), w), h

    def grid(self, width: int, height: int, r: int, least: int, most: int) -> tuple[int, int]:
        """(lines, columns): least padding among those that cover the picture, else least resolution lost."""
        best, found = (2, math.inf, 0, 0), (1, 1)
        for lines in range(1, most + 1):
            for columns in range(1, most + 1):
                if not least <= lines * columns <= most:
                    continue
                w, h = self.within(width, height, columns * r, lines * r)
                covers = lines * r >= height and columns * r >= width
                loss = lines * columns * r * r - w * h if covers else abs(width * height - w * h)
                best, found = min((best, found), ((not covers, loss, lines * columns, lines), (lines, columns)))
        return found

    def tiles(self, picture: Any, max_tiles: int | None = None) -> torch.Tensor:
        """Return sub-images and the whole [t, 3, r, r]."""
        s, picture = self.settings, Pillow.fromarray(np.asarray(picture))
        r, most = s["size"], max_tiles or s["max_sub_images"]
        lines, columns = self.grid(*picture.size, r, min(s["min_sub_images"], most), most)
        mean, std = (np.array(s[f"image_{name}"], np.float32) for name in ("mean", "std"))

        def padded(w: int, h: int) -> np.ndarray:
            new = self.within(*picture.size, w, h)
            canvas = Pillow.new("RGB", (w, h), tuple(int(m * 255) for m in s["image_mean"]))
            canvas.paste(picture.resize(new, Pillow.Resampling.BICUBIC), ((w - new[0]) // 2, (h - new[1]) // 2))
            return (np.asarray(canvas).astype(np.float32) / 255 - mean) / std

        whole = padded(columns * r, lines * r)
        parts = [whole[y * r : (y + 1) * r, x * r : (x + 1) * r] for y in range(lines) for x in range(columns)]
        parts += [padded(r, r)] * (len(parts) > 1)
        return torch.from_numpy(np.stack(parts).astype(np.float32)).permute(0, 3, 1, 2)
