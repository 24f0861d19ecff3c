"""Files that other programs write load unmodified and give transformers' embeddings and logits: llama.cpp's pair, Ollama's file."""

from __future__ import annotations

import numpy as np
import pytest

import pyengine as pe
from converters import convert
from converters.writer import mmproj_path

pytest.importorskip("transformers", reason="pip install transformers torch")

import cases  # noqa: E402
import foreign  # noqa: E402
import tiny  # noqa: E402
from foreign import llama_cpp_logits  # noqa: E402

N_CTX = 256
LAYOUTS = {     # what writes the files of a checkpoint: path of the model, path of its encoder or None
    "ours": lambda folder, out: (convert(folder, out, "f32"), None),
    "ours, split": lambda folder, out: (convert(folder, out, "f32", split_mmproj=True), mmproj_path(out)),
    "llama.cpp": lambda folder, out: foreign.llama_cpp_files(folder, out),
    "llama.cpp, first converters": lambda folder, out: foreign.llama_cpp_files(folder, out, legacy=True),
    "Ollama": lambda folder, out: (foreign.ollama_file(folder, out), None),
    "Ollama, more tokens than rows": lambda folder, out: (foreign.ollama_file(folder, out, extra_tokens=3), None),
}
LLAMA_CPP = [case.kind for case in cases.select(sees=True) if case.llama_cpp and case.dialect and "now" in case.dialect.converters]
CASES = [(case.kind, layout) for case in cases.select(sees=True) if case.dialect for layout in LAYOUTS
         if (case.dialect.ollama_arch or not layout.startswith("Ollama")) and ("now" in case.dialect.converters or layout != "llama.cpp")
         and ("first" in case.dialect.converters or layout != "llama.cpp, first converters")]
WRITTEN = [case.kind for case in cases.select(sees=True) if case.dialect and case.dialect.converters]


def picture(width, height, seed):
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A checkpoint of each kind in float16, which every layout holds exactly, a prompt, and what transformers makes of it.

    Windows and chunks are llama.cpp's. The pictures are within the pixel limits that these files cannot say and that are assumed.
    """
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("checkpoints") / kind
            case = cases.find(kind)
            tiny.make_checkpoint(case, folder, dtype="float16", **case.assumed, **case.dialect.settings)
            parts = [5, "a dog", picture(150, 100, 1), " and ", picture(90, 200, 2), "What is it?"]
            made[kind] = folder, parts, tiny.hf_seen(folder, parts)
        return made[kind]
    return get


def check(model, parts, seen):
    pictures = [p for p in parts if not isinstance(p, (int, str))]
    for image, expected in zip(pictures, seen.features):
        rows = model.encode_image(image)
        assert rows.shape == expected.shape
        assert abs(rows - expected).max() < 1e-4 * np.ptp(expected)
    logits = model.logits(parts)
    assert logits.shape == seen.logits.shape
    assert abs(logits - seen.logits).max() < 1e-4 * np.ptp(seen.logits)
    assert (logits.argmax(1) == seen.logits.argmax(1)).all()


@pytest.mark.parametrize("kind, layout", [pytest.param(*c, marks=pytest.mark.slow) if cases.find(c[0]).cached_as else c for c in CASES])
def test_embeddings_and_logits(kind, layout, models, tmp_path):
    folder, parts, seen = models(kind)
    path, mmproj = LAYOUTS[layout](folder, tmp_path / "m.gguf")
    check(pe.load(path, mmproj=mmproj, n_ctx=cases.find(kind).dialect.n_ctx, kv_dtype="f32"), parts, seen)


@pytest.mark.parametrize("kind, layout", [("gemma3", "Ollama"), ("qwen2_5_vl", "Ollama"), ("gemma3", "llama.cpp"),
                                          ("mistral3", "llama.cpp")])
def test_ollamas_store(kind, layout, models, tmp_path, monkeypatch):
    """One blob with everything, or a blob for the model and one for its projector, found by the model's name."""
    folder, parts, seen = models(kind)
    foreign.ollama_store(tmp_path / "store", "seer:tiny", *LAYOUTS[layout](folder, tmp_path / "m.gguf"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    check(pe.load("seer:tiny", n_ctx=N_CTX, kv_dtype="f32"), parts, seen)


@pytest.mark.parametrize("kind", cases.quick(WRITTEN))
def test_llama_cpps_text_file_alone_is_a_text_model(kind, models, tmp_path):
    folder, parts, _ = models(kind)
    words = [p for p in parts if isinstance(p, (int, str))]
    path, _ = LAYOUTS["llama.cpp"](folder, tmp_path / "m.gguf")
    expected = tiny.hf_seen(folder, words).logits
    found = pe.load(path, n_ctx=N_CTX, kv_dtype="f32").logits(words)
    assert abs(found - expected).max() < 1e-4 * np.ptp(expected)


@pytest.mark.parametrize("kind", cases.quick(LLAMA_CPP))
def test_llama_cpp_itself_reads_the_pair(kind, models, tmp_path):
    """The fixture is what it says it is."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="make peers")
    folder = models(kind)[0]
    path, mmproj = foreign.llama_cpp_files(folder, tmp_path / "m.gguf")
    theirs = cases.find(kind).llama_cpp
    image = picture(*theirs.picture, 3)
    seen = tiny.hf_seen(folder, [image])
    theirs.adapt(mmproj)
    rows, want = theirs.rows(foreign.mtmd_rows(path, mmproj, image)[1], seen), theirs.wanted(seen)
    assert abs(rows - want).max() < theirs.error * np.ptp(want)
    ids = np.random.default_rng(1).integers(0, 390, 60).tolist()
    expected = tiny.hf_seen(folder, ids).logits
    assert abs(llama_cpp_logits(llama_cpp, path, ids) - expected).max() < 2e-4 * np.ptp(expected)
