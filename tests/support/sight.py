"""How transformers sees: what its processors and models make of a prompt with pictures. Each architecture has a Sight in its file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Seen:
    """What transformers makes of a prompt in parts: `features` and `pixels` have one entry a picture, crop or video."""
    ids: list[int]
    logits: np.ndarray                          # float32 [n, vocab]
    features: list[np.ndarray]                  # float32 [soft tokens, hidden], as the decoder receives them
    pixels: list[np.ndarray]                    # as the processor has them
    grids: list[tuple[int, int, int]]           # what else it says of each, where it does


@dataclass
class Run:
    """Inputs of a model beside its tokens, and what `Seen` has of their pictures, as tensors."""
    inputs: dict[str, Any]
    features: list[Any]
    pixels: list[Any]
    grids: list[tuple[int, int, int]]


class Sight:
    """An architecture's processors, and how its model takes what they make. The Pillow ones: torchvision is not needed."""

    model_types: tuple[str, ...]                # of a config.json
    towers: tuple[str, ...] = ()                # of its vision_config, where models of one type have several
    auto = "AutoModelForImageTextToText"        # transformers' class that loads its model
    marker: str                                 # what the chat template writes for a picture

    def images(self, config: Any, settings: dict[str, Any]) -> Any:
        """Return the image processor that lies beside a tiny model."""
        raise NotImplementedError

    def processor(self, folder: Path, config: Any, tokenizer: Any) -> Any:
        """Return transformers' processor of a checkpoint."""
        raise NotImplementedError

    def soft(self, config: Any) -> int | None:
        """Return the id in a prompt for each soft token; None if there are none."""
        return config.image_token_id

    def part(self, processor: Any, config: Any, folder: Path, part: Any, **settings: Any) -> tuple[list[int], dict[str, Any]]:
        """Return the ids that a picture or list of frames becomes, and what the processor makes of it."""
        assert not isinstance(part, (list, tuple)), "no videos"
        made = processor(text=self.marker, images=[part], add_special_tokens=False, return_tensors="pt", **settings)
        return made["input_ids"][0].tolist(), made

    def chat(self, processor: Any, text: str, pictures: Sequence[Any]) -> list[int]:
        """Return the ids of a conversation that the chat template has written."""
        return processor(text=[text], images=[list(pictures)], add_special_tokens=False, return_tensors="pt")["input_ids"][0].tolist()

    def run(self, model: Any, tokens: Any, made: list[dict[str, Any]], fps: float | None) -> Run:
        """Return what the model gets for tokens [1, n] with what was made of each picture."""
        raise NotImplementedError

    def seen(self, model: Any, folder: Path, parts: Sequence[Any], fps: float | None, **settings: Any) -> Seen:
        """Run the model on a prompt of ids, texts, pictures and lists of frames."""
        import torch

        processor = load_processor(self, folder, model.config)
        made = []

        def seen_part(part: Any) -> list[int]:
            its, done = self.part(processor, model.config, folder, part, **settings)
            made.append(done)
            return its

        ids = ids_of(parts, processor.tokenizer, seen_part)
        tokens = torch.tensor([ids])
        with torch.no_grad():
            run = self.run(model, tokens, made, fps)
            logits = model(input_ids=tokens, **run.inputs).logits[0].numpy()
        return Seen(ids, logits, [f.numpy() for f in run.features], [p.numpy() for p in run.pixels], run.grids)


def ids_of(parts: Sequence[Any], tokenizer: Any, seen: Callable[[Any], list[int]]) -> list[int]:
    """Return the ids of a prompt of ids, texts, and what is seen, whose ids `seen` returns."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        else:
            ids += tokenizer(part, add_special_tokens=False)["input_ids"] if isinstance(part, str) else seen(part)
    return ids


def sight_of(folder: Path) -> Sight:
    """Return the sight of a checkpoint's architecture."""
    import cases

    config = json.loads((folder / "config.json").read_text())
    tower = config.get("vision_config", {}).get("model_type")
    return next(c.sight for c in cases.every().values() if c.sight and config["model_type"] in c.sight.model_types
                and tower in (c.sight.towers or (tower,)))


def load_processor(sight: Sight, folder: Path, config: Any) -> Any:
    """Return the processor of a checkpoint."""
    from transformers import AutoTokenizer

    return sight.processor(folder, config, AutoTokenizer.from_pretrained(folder))


def of_any_backend(base: type) -> type:
    """Return a processor's class that takes image processors of any backend, and none at all."""

    class Processor(base):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return type(argument)

    return Processor
