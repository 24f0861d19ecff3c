"""docs/models.md: each model beside transformers, made by running both. `python tests/support/parity.py` from the root of a checkout.

Every case of tests/models is converted from a tiny random checkpoint, and logits at every position of a prompt are compared in float32; of one
that sees, of a prompt with two pictures, and of its soft tokens.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).resolve().parent), str(ROOT / "tests" / "models"),
                str(ROOT / "tests" / "towers"), str(ROOT / "tests" / "engine")]

import cases  # noqa: E402  found through the line above
import pyengine as pe  # noqa: E402
import tiny  # noqa: E402
import tiny_sources  # noqa: E402
import tiny_towers  # noqa: E402
from cases import Case, SourceCase  # noqa: E402
from converters import convert  # noqa: E402
from pictures import A, B  # noqa: E402
from pyengine.files.gguf import GGUFFile  # noqa: E402
from pyengine.memory.fit import DEFAULT_CTX  # noqa: E402

HEAD = """# Models beside transformers

Written by `python tests/support/parity.py`, which runs both on tiny random checkpoints with odd sizes and ids of their own, in float32. The number is
the worst difference of a logit at any position, as a share of the range of all logits; of soft tokens, of their range. The tests
(`tests/contract`, `tests/models`) hold the bounds for more configurations, prompts, cuts, formats and neighbours. "Files" are those that tests
read: a checkpoint of Hugging Face through our converter, llama.cpp's pair of text and mmproj, Ollama's single file. A class with a star is not
of transformers, which has none for this model: it is a reference in torch of our own (`tests/support/reference_*.py`), from paper and checkpoint.

"Plan" is what `pyengine-run plan` counts of published models of this kind: weights with those of the encoder, and caches at the default context
({most:,} positions, or what the model was trained with). Files for it have the published sizes and no data; matrices in the format that is named.

| case | architecture | class of transformers | logits | soft tokens | files | plan: weights + caches |
|---|---|---|---|---|---|---|
"""


SOURCES = """
## Encoder-decoders

The same of models whose prompts an encoder reads: its last hidden states, and logits of the decoder at every position.

| case | architecture | class of transformers | encoder | logits |
|---|---|---|---|---|
"""


TOWERS = """
## Encoders

The same of models that make vectors and scores of texts: last hidden states of several texts, at every position.

| architecture | class of transformers | hidden states |
|---|---|---|
"""


HEADS = """
## Heads that draft

Heads in files of their own (`draft=`): what they say of the next token, and of those behind it as they go on by themselves. A head with a star has
no class in transformers: its reference is ours, in torch (`tests/support/heads.py`), from its paper and the authors' code.

| architecture | beside | reference | logits |
|---|---|---|---|
"""


def share(got: np.ndarray, want: np.ndarray) -> float:
    """Return the worst difference as a share of the range."""
    return float(np.abs(got - want).max() / np.ptp(want))


def measured(case: Case, folder: Path) -> tuple[float, float | None]:
    """Return the worst differences of logits and of soft tokens."""
    checkpoint = tiny.make_checkpoint(case, folder / "hf")
    model = pe.load(convert(checkpoint, folder / "m.gguf", "f32"), n_ctx=256, kv_dtype="f32")
    if not case.sees:
        ids = np.random.default_rng(0).integers(0, 512, 100).tolist()
        return share(model.logits(ids), tiny.hf_logits(checkpoint, ids)), None
    prompt = [5, A, "and", B, "differ how?", 6] if case.several else [5, A, "is how?", 6]
    want = tiny.hf_seen(checkpoint, prompt)
    soft = [share(model.encode_image(picture), features) for picture, features in zip((A, B), want.features)]
    return share(model.logits(prompt), want.logits), max(soft, default=None)


def planned(case: Case, folder: Path) -> str:
    """Return the sizes of the published models that the case knows."""
    found = []
    for name, full in case.full.items():
        path, mmproj = full.write(folder, name)
        plan = pe.plan(path, mmproj=mmproj, device="cpu", n_ctx=min(full.decoder.n_ctx, DEFAULT_CTX))
        weights = plan.of("weights") + plan.of("mapped") + sum(i.nbytes for i in plan.items if i.purpose == "encoder" and "arena" not in i.detail)
        found.append(f"{name}, {full.dtype}: {weights / 2**30:.1f} + {plan.of('kv') / 2**30:.1f} GiB")
    return "; ".join(found)


def row(case: Case) -> str:
    """Run a case and return its row."""
    with tempfile.TemporaryDirectory() as folder:
        logits, soft = measured(case, Path(folder))
        plans = planned(case, Path(folder))
    files = ["Hugging Face", *(["llama.cpp"] if case.dialect else []), *(["Ollama"] if case.dialect and case.dialect.ollama_arch else [])]
    star = r"\*" if case.model_class in tiny.OWN else ""
    return (f"| {case.kind} | `{case.arch}` | {case.model_class}{star} | {logits:.1e} | {'' if soft is None else f'{soft:.1e}'} | {', '.join(files)} | {plans} |\n")


def source_row(case: SourceCase, name: str) -> str:
    """Run a config of an encoder-decoder and return its row."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tiny_sources.make(case, Path(folder) / "hf", **case.variants[name])
        theirs = tiny_sources.reference(case, checkpoint)
        source, ids = rng.integers(5, 180, 100).tolist(), [theirs.config.decoder_start_token_id, *rng.integers(5, 180, 99).tolist()]
        hidden, logits = tiny_sources.states(theirs, source, ids)
        with pe.load(convert(checkpoint, Path(folder) / "m.gguf", "f32"), kv_dtype="f32") as model:
            errors = share(model.hidden(source), hidden), share(model.logits(ids, source=source), logits)
    return f"| {name} | `{case.arch}` | {case.model_class} | {errors[0]:.1e} | {errors[1]:.1e} |\n"


def tower_rows() -> list[str]:
    """Run a plain checkpoint of each architecture of text encoders and return their rows."""
    import test_albert
    import test_bert_family
    import test_gemma_embedding
    import test_modern_bert
    import test_nomic_bert
    import torch

    made = {f"{kind}Model": partial(test_bert_family.checkpoint, kind, "Model") for kind in test_bert_family.KINDS}
    made |= {f"{kind}Model": partial(module.checkpoint, "Model") for kind, module in (("Albert", test_albert), ("ModernBert", test_modern_bert),
                                                                                      ("NomicBert", test_nomic_bert))}
    rows = []
    for name, make in sorted({**made, "Gemma3TextModel": test_gemma_embedding.checkpoint}.items()):
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = make(Path(folder) / "hf")
            theirs, worst = tiny_towers.reference(name, checkpoint), 0.0
            with tiny_towers.loaded(checkpoint) as model:
                for ids in map(model.tokenize, tiny_towers.TEXTS):
                    worst = max(worst, share(model.hidden(ids), theirs(torch.tensor([ids])).last_hidden_state[0].detach().numpy()))
                rows.append(f"| `{model.file.metadata['general.architecture']}` | {name} | {worst:.1e} |\n")
    return sorted(rows)


def head_rows() -> list[str]:
    """Run each head that is in a file of its own, and return their rows."""
    import heads
    import test_heads

    rows = []
    for beside in heads.BESIDE.values():
        with tempfile.TemporaryDirectory() as folder:
            def get(kind: str, folder: str = folder, **config: object) -> tuple[Path, Path]:
                checkpoint = tiny.make_checkpoint(kind, Path(folder) / "model", seed=1, **config)
                return convert(checkpoint, Path(folder) / "m.gguf", "f32"), checkpoint

            pair, text = beside.make(get, Path(folder)), test_heads.ids(44)
            with test_heads.loaded(pair, kv_dtype="f32") as model:
                worst = max(share(got, want) for got, want in zip(test_heads.read(model, text, 40, 64), pair.wanted(text, 40), strict=True))
                arch = model.file.metadata["general.architecture"]
            rows.append(f"| `{GGUFFile(pair.draft).metadata['general.architecture']}` | `{arch}` | {beside.told} | {worst:.1e} |\n")
    return rows


def main() -> None:
    """Write the page."""
    rows = []
    for case in sorted((c for c in cases.every().values() if c.converted), key=lambda c: (c.sees, c.arch, c.kind)):
        rows.append(row(case))
        print(rows[-1], end="", flush=True)
    sources = [source_row(case, name) for case in cases.sources().values() for name in case.variants]
    print("".join(sources), end="", flush=True)
    towers = tower_rows()
    print("".join(towers), end="", flush=True)
    drafting = head_rows()
    print("".join(drafting), end="", flush=True)
    parts = HEAD.format(most=DEFAULT_CTX), rows, SOURCES, sources, TOWERS, towers, HEADS, drafting
    (ROOT / "docs" / "models.md").write_text("".join("".join(part) for part in parts))


if __name__ == "__main__":
    main()
