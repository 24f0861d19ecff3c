"""docs/graphs.md: its VGG16 and its three ways to join a picture with a text are torch's; what they cost is counted."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

import pyengine as pe
from pyengine.errors import GraphError, RequestError

torch = pytest.importorskip("torch", reason="needs torch: pip install -r requirements/test.txt")
nn = torch.nn
CHANNELS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool")
N, SMALL = 7, {"width": 8, "hidden": 40, "classes": 7}


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the page defines, of those examples that compute nothing large."""
    found: dict[str, Any] = {}
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "graphs.md").read_text(), re.S)):
        if number == 0 or "\ndef " in code and "## " not in code and "MOST" not in code:
            exec(compile(code, f"docs/graphs.md, example {number + 1}", "exec"), found)
    return found


class VGG16(nn.Module):
    """torchvision's layers, by its names."""

    def __init__(self, width: int = 64, hidden: int = 4096, classes: int = 1000, channels: int = 3):
        super().__init__()
        layers: list[Any] = []
        for n in CHANNELS:
            if n == "pool":
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers += [nn.Conv2d(channels, int(n) * width // 64, 3, padding=1), nn.ReLU(inplace=True)]
            channels = int(n) * width // 64
        self.features, self.avgpool = nn.Sequential(*layers), nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(nn.Linear(channels * 49, hidden), nn.ReLU(True), nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU(True),
                                        nn.Dropout(), nn.Linear(hidden, classes))

    def forward(self, x: Any) -> tuple[Any, Any]:
        x = self.avgpool(self.features(x)).flatten(1)
        hidden = self.classifier[:-1](x)
        return hidden, self.classifier[-1](hidden)


def build(weights: dict[str, np.ndarray], **sizes: int) -> Any:
    with torch.device("meta"):
        made = VGG16(**sizes).eval()
    made.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()}, assign=True)
    return made


def close(got: np.ndarray, want: Any) -> None:
    want = want.numpy()
    assert got.shape == want.shape and np.abs(got - want).max() <= 1e-5 * np.ptp(want)


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def first(x: np.ndarray) -> Any:
    """Pictures as torch has them."""
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def compiled(names: dict[str, Any], weights: dict[str, np.ndarray], size: tuple[int, int], most: int, device: str = "cpu") -> Any:
    with pe.Graph() as g:
        x = g.input("x", (pe.Dim("n", max=most), *size, 3))
        return g.compile(list(names["vgg16"](weights, x)), device=device, strict=True)


def test_the_numbers_of_vgg16(names: dict[str, Any]) -> None:
    with torch.device("meta"):
        theirs = {name: tuple(p.shape) for name, p in VGG16().named_parameters()}
    assert names["vgg16_shapes"]() == theirs
    assert sum(map(math.prod, theirs.values())) == 138_357_544
    assert sum(len(shape) == 4 for shape in theirs.values()) == 13 and sum(len(shape) == 2 for shape in theirs.values()) == 3


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("size", [(32, 32), (65, 40), (96, 229)])
def test_vgg16_is_torchs(names: dict[str, Any], size: tuple[int, int], device: str) -> None:
    weights = names["random"](names["vgg16_shapes"](**SMALL))
    weights |= {name: noise(i, *w.shape) / 4 for i, (name, w) in enumerate(weights.items()) if w.ndim == 1}
    program, theirs, seen = compiled(names, weights, size, 3, device), build(weights, **SMALL), noise(1, 3, *size, 3)
    for n in (3, 1):
        with torch.no_grad():
            want = theirs(first(seen[:n]))
        for ours, their in zip(program.run(x=seen[:n]), want):
            close(ours, their)


@pytest.mark.slow
def test_the_whole_vgg16_is_torchs(names: dict[str, Any]) -> None:
    weights = names["random"](names["vgg16_shapes"]())
    seen = noise(1, 1, 224, 224, 3)
    with torch.no_grad():
        want = build(weights)(first(seen))
    program = compiled(names, weights, (224, 224), 1)
    for ours, their in zip(program.run(x=seen), want):
        close(ours, their)
    bits = sum(4 * math.prod(w.shape) for w in weights.values())
    assert bits <= program.prepared.weight_bytes <= 1.001 * bits
    assert program.prepared.operations > 2 * 15.4e9                                          # products and sums of the paper's network


def test_files_of_torchvisions_layout_are_read(names: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    theirs = VGG16(**SMALL).eval()
    save_file(theirs.state_dict(), tmp_path / "vgg16.safetensors", metadata={"format": "pt"})
    weights, seen = names["read"](tmp_path / "vgg16.safetensors"), noise(2, 2, 48, 48, 3)
    assert {name: w.shape for name, w in weights.items()} == names["vgg16_shapes"](**SMALL)
    with torch.no_grad():
        close(compiled(names, weights, (48, 48), 2).run(x=seen)[1], theirs(first(seen))[1])
    half = {name: w.astype(np.float16) if w.ndim > 1 else w for name, w in weights.items()}
    program = compiled(names, half, (48, 48), 2)
    rounded = {name: torch.from_numpy(w.astype(np.float32)) for name, w in half.items()}
    theirs.load_state_dict(rounded)
    with torch.no_grad():
        close(program.run(x=seen)[1], theirs(first(seen))[1])
    assert program.prepared.weight_bytes < 0.6 * compiled(names, weights, (48, 48), 2).prepared.weight_bytes


def fused_by_torch(w: dict[str, np.ndarray], beside: dict[str, np.ndarray], seen: np.ndarray, texts: list[list[int]], channels: int) -> list[Any]:
    """Early, late and hybrid: torch's own layers."""
    layer = lambda own, name, x: nn.functional.linear(x, torch.from_numpy(own[f"{name}.weight"]), torch.from_numpy(own[f"{name}.bias"]))  # noqa: E731
    bag = nn.EmbeddingBag.from_pretrained(torch.from_numpy(w["embedding"]), mode="mean")
    text = layer(w, "text", bag(torch.tensor(sum(texts, [])), torch.tensor([len(sum(texts[:i], [])) for i in range(len(texts))]))).relu()
    pictures, part = first(seen), lambda own: {name: a for name, a in own.items() if name.startswith(("features", "classifier"))}  # noqa: E731
    planes = layer(beside, "planes", text)[:, :, None, None].expand(-1, -1, *pictures.shape[2:])
    _, both = build(part(beside), **SMALL, channels=3 + channels)(torch.cat([pictures, planes], 1))
    hidden, scores = build(part(w), **SMALL)(pictures)
    opinion, joint = layer(w, "opinion", text), layer(w, "joint", torch.cat([hidden, text], 1))
    return [both.softmax(1), (scores.softmax(1) + opinion.softmax(1)) / 2, (scores.softmax(1) + opinion.softmax(1) + joint.softmax(1)) / 3]


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_pictures_and_texts_are_joined_as_torch_joins_them(names: dict[str, Any], device: str) -> None:
    d, channels = names["D"], names["CHANNELS"]
    shapes = {**names["vgg16_shapes"](**SMALL), **names["text_shapes"](N), "joint.weight": (N, SMALL["hidden"] + d), "joint.bias": (N,)}
    w = {name: a / 4 for name, a in names["random"](shapes).items()} | {"embedding": noise(9, names["WORDS"], d)}
    beside = names["random"]({**names["vgg16_shapes"](**SMALL, channels=3 + channels), "planes.weight": (channels, d), "planes.bias": (channels,)}, seed=5)
    program = names["fusions"](w, beside, 40, most=4, device=device)
    for texts in ([[7]], [[1, 2, 3], [499], [4, 4, 0, 77, 12, 30]], [[5] * 9, [6, 7], [8], [9, 10, 11]]):
        n, ends = len(texts), np.cumsum([len(t) for t in texts])
        seen = noise(n, n, 40, 40, 3)
        found = program.run(pictures=seen, words=np.array(sum(texts, [])), first=np.array([0, *ends[:-1]]), end=ends)
        with torch.no_grad():
            want = fused_by_torch(w, beside, seen, texts, channels)
        assert len(found) == 3
        for ours, their in zip(found, want):
            close(ours, their)
            assert np.abs(ours.sum(axis=1) - 1).max() < 1e-5


def test_what_is_shared_is_computed_once(names: dict[str, Any]) -> None:
    """The three as one program: a VGG16 for early, one for late and hybrid, one branch of the text."""
    d, channels = names["D"], names["CHANNELS"]
    shapes = {**names["vgg16_shapes"](**SMALL), **names["text_shapes"](N), "joint.weight": (N, SMALL["hidden"] + d), "joint.bias": (N,)}
    beside = {**names["vgg16_shapes"](**SMALL, channels=3 + channels), "planes.weight": (channels, d), "planes.bias": (channels,)}
    prepared = names["fusions"](names["random"](shapes), names["random"](beside), 40).prepared
    steps = [node.op.name for node in prepared.layout.steps]
    assert (steps.count("conv2d"), steps.count("rows"), steps.count("mean_rows")) == (26, 1, 1) and not prepared.fallbacks


def test_a_plan_is_what_is_compiled(names: dict[str, Any]) -> None:
    with pe.Graph() as g:
        x = g.input("x", (pe.Dim("n", max=2), 32, 32, 3))
        hidden, scores = names["vgg16"](names["random"](names["vgg16_shapes"](**SMALL)), x)
    for outputs in (scores, [hidden, scores]):
        plan, prepared = g.plan(outputs, n_threads=2), g.compile(outputs, n_threads=2).prepared
        assert (plan.weight_bytes, plan.arena_bytes, plan.state_bytes) == (prepared.weight_bytes, prepared.arena_bytes, 0)
        assert repr(plan) == repr(prepared) and f"{plan.weight_bytes:,} bytes of weights" in repr(plan)
    widths = [8 * n for n in (1, 1, 2, 2, 4, 4, 4, 8, 8, 8, 8, 8, 8)]
    sides = [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]
    macs = sum(9 * k * n * side**2 for k, n, side in zip([3, *widths], widths, sides)) + 49 * 64 * 40 + 40 * 40 + 40 * 7
    pools = sum(4 * k * side**2 for k, side in ((8, 16), (16, 8), (32, 4), (64, 2), (64, 1))) + 64
    assert g.plan(scores).operations == 2 * (2 * macs + pools)
    for wrong, error in (((None,), GraphError), (([],), GraphError), ((scores, "tpu"), GraphError), ((scores, "cpu", 0), RequestError)):
        with pytest.raises(error):
            g.plan(*wrong)
