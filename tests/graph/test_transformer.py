"""docs/graphs.md: its code runs, and the Transformer of 2017 that it builds is torch's."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from conftest import ROOT


def page() -> list[str]:
    """The section's Python, in order."""
    text = (ROOT / "docs" / "graphs.md").read_text()
    section = text[text.index("## The Transformer of 2017"):].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    found: dict[str, Any] = {}
    exec(compile(page()[0], "docs/graphs.md, example 1", "exec"), found)
    return found


def test_the_examples_run(names: dict[str, Any], capsys: Any) -> None:
    exec(compile(page()[1], "docs/graphs.md, example 2", "exec"), own := dict(names))
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == str(own["target"]) and len(own["target"]) == 9
    assert len(lines) == 8 and all(len(line) == 7 and "@" in line for line in lines)


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_it_is_the_transformer_of_torch(names: dict[str, Any], device: str) -> None:
    torch = pytest.importorskip("torch", reason="needs transformers and torch: pip install -r requirements/test.txt")
    d, h, f, n, v = (names[name] for name in "DHFNV")
    torch.manual_seed(3)
    how = {"d_model": d, "nhead": h, "dim_feedforward": f, "dropout": 0.0, "batch_first": True}
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(**how), n, enable_nested_tensor=False).eval()
    decoder = torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(**how), n).eval()
    embedding = torch.randn(v, d)
    for p in (*encoder.parameters(), *decoder.parameters()):
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3 if p.dim() == 1 else p.shape[-1] ** -0.5)
    weights = {f"{half}.{name}": p.detach().numpy() for half, module in (("encoder", encoder), ("decoder", decoder)) for name, p in module.named_parameters()}
    maps: list[Any] = []
    across = decoder.layers[-1].multihead_attn
    across.register_forward_pre_hook(lambda m, args, kwargs: (args, {**kwargs, "need_weights": True, "average_attn_weights": False}), with_kwargs=True)
    across.register_forward_hook(lambda m, args, out: maps.append(out[1]))

    def embed(ids: list[int]) -> Any:
        place, i = torch.arange(len(ids))[:, None], torch.arange(0, d, 2)
        angle = place / 10_000 ** (i / d)
        return (embedding[ids] * d**0.5 + torch.stack([angle.sin(), angle.cos()], 2).reshape(len(ids), d))[None]

    for source, target in (([4], [1]), ([3, 1, 4, 1, 5, 9, 2, 6], [1, 7, 2]), (list(range(20)) * 3, [5] * 40)):
        with torch.no_grad():
            mask = torch.nn.Transformer.generate_square_subsequent_mask(len(target))
            want = (decoder(embed(target), encoder(embed(source)), tgt_mask=mask)[0] @ embedding.T).numpy()
        program = names["transformer"]({**weights, "embedding": embedding.numpy()}, len(source), device)
        logits, looks = names["run"](program, source, target)
        assert logits.shape == want.shape and np.abs(logits - want).max() <= 1e-5 * np.ptp(want)
        assert np.abs(looks - maps.pop()[0].numpy()).max() < 1e-5 and looks.shape == (h, len(target), len(source))
