"""Memory plans: arithmetic spelled out for full-size models, equal to what is allocated, near to what is resident."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import cases
from conftest import REAL, ROOT, real_path
from PIL import Image, ImageFile

import pyengine as pe
from pyengine import hardware
from pyengine.backends import backend
from oracle import step_of
from pyengine.cli.report.planned import draw, parse_device
from pyengine.files.model_files import open_files
from pyengine.memory.layout import ModelLayout
from pyengine.memory.settings import Settings
from pyengine.programs.bound import bind
from pyengine.errors import ImageError, PlanError, RequestError, UnsupportedModelError
from pyengine.files.gguf import GGUFFile
from pyengine.memory.plan import MemoryPlan, PlanItem

KIB, MIB, GIB = 2**10, 2**20, 2**30
FULL = [name for case in cases.every().values() for name in case.full]


@pytest.fixture(scope="module")
def files(full_size) -> dict[str, tuple[Path, Path | None]]:
    """Full-size models in files of headers and holes: (decoder, encoder). What is in their plans, each one's test file says."""
    return {name: full_size(name) for name in FULL}


def some_context(path: Path) -> int:
    """Return the positions of a plan: some thousands, or all that the model's positions are embeddings of."""
    meta = GGUFFile(path).metadata
    return min(8192, meta.need(f"{meta['general.architecture']}.context_length", int))


def test_smaller_pictures_take_less(files, machine) -> None:
    """16,384 soft tokens would take more than an eighth of 8 GiB: the plan admits less, and says so."""
    machine(8 * GIB)
    path, mmproj = files["qwen-7b"]
    plan = pe.plan(path, n_ctx=32_768, mmproj=mmproj)
    run = sum(i.nbytes for i in plan.items if i.detail.startswith("arena, up") or "patches" in i.detail and i.purpose == "images")
    assert 256 <= plan.picture < 16_384 and run < 1.5 * GIB
    assert any(f"pictures of up to {plan.picture:,} image tokens" in n and "images=" in n for n in plan.notes)
    asked = pe.plan(path, n_ctx=32_768, mmproj=mmproj, images=(896, 448))
    assert asked.picture == 32 * 16 and not any("pictures" in n for n in asked.notes)
    kept = pe.plan(path, n_ctx=32_768, mmproj=mmproj, images=(896, 448, 5))
    assert next(i.nbytes for i in kept.items if "kept" in i.detail) == 5 * 512 * 3584 * 4
    blind = pe.plan(path, n_ctx=32_768, mmproj=mmproj, images=0)
    assert blind.picture == 0 and blind.of("encoder") == blind.of("images") == 0
    with pytest.raises(RequestError, match="no media encoder"):
        pe.plan(path, images=(896, 448))
    for wrong in ((0, 5), "large", (1, 2, 3, 4), -1, ()):
        with pytest.raises(RequestError, match="images="):
            pe.plan(path, images=wrong)


@pytest.mark.parametrize("name", FULL)
def test_planning_takes_no_time(files, name: str) -> None:
    """Half a second of the processor's time at most, in a file of 400 GiB and 126 layers too; nothing but headers is read."""
    path, mmproj = files[name]
    size = sum(p.stat().st_size for p in GGUFFile(path).paths)
    assert name != "llama-405b" or size > 400 * 10**9
    seconds, n_ctx = [], some_context(path)
    gc.freeze()                                              # collections do not go through what other tests have left
    for _ in range(3):
        started = time.process_time()
        plan = pe.plan(path, n_ctx=n_ctx, mmproj=mmproj)
        seconds.append(time.process_time() - started)
    gc.unfreeze()
    encoder = sum(i.nbytes for i in plan.items if i.purpose == "encoder" and "arena" not in i.detail) if mmproj is None else 0
    assert plan.of("weights") + plan.of("mapped") + encoder > 0.9 * size
    assert min(seconds) < 0.5, seconds


# ---- every number is made of named parts --------------------------------------------------------------------------------


def check_arithmetic(plan: MemoryPlan, tensors: dict[str, Any]) -> None:
    for i in plan.items:
        assert not (i.parts and i.factors)
        if i.parts:
            assert i.nbytes == sum(n for _, n in i.parts), i
        if i.factors:
            assert i.nbytes == prod(n for _, n in i.factors), i
    named: dict[str, int] = {}
    for i in plan.items:
        if i.purpose in ("weights", "mapped", "encoder") and "headers" not in i.detail and "arena" not in i.detail:
            for name, nbytes in i.parts:
                named[name] = named.get(name, 0) + nbytes
                if name in tensors and i.layer is not None:
                    assert f"blk.{i.layer}." in name
    for name, info in tensors.items():                                   # each tensor of the file is counted
        folded = (".weight.1", "img_break", "v.class_embd", "position_embd.gate", "rope_factors_long.weight", "rope_factors_short.weight",
                  "rope_freqs.weight")  # parts of what another tensor becomes
        assert name in named or name.endswith(folded), name
        if name in named and info.dtype.block > 1:                       # packed in groups of 16 rows; read twice: mapped too
            assert info.nbytes <= named[name] <= 2 * info.nbytes + 16 * info.nbytes // info.shape[0] + 64
    assert plan.total == sum(i.nbytes for i in plan.items if i.purpose != "mapped") == sum(plan.on(d) for d in plan.devices)
    text = plan.explain()
    assert f"{plan.total:>16}  = sum" in text and all(str(i.nbytes) in text for i in plan.items)


def test_every_number_is_made_of_named_parts(files) -> None:
    for path, mmproj in files.values():
        tensors = dict(GGUFFile(path).tensors) | (GGUFFile(mmproj).tensors if mmproj else {})
        asked = {"n_ctx": some_context(path), "n_seq": 3, "mmproj": mmproj}
        try:
            plan = pe.plan(path, kv_dtype="q8_0/f16", **asked)
        except UnsupportedModelError:                                    # heads of 80, which blocks of 32 do not divide
            plan = pe.plan(path, **asked)
        check_arithmetic(plan, tensors)


def test_the_arena_is_what_its_busiest_step_needs(tiny_gguf) -> None:
    layout = backend("cpu", n_threads=1).prepare(step_of(tiny_gguf("gemma3_text")[0], 256, 512).declare()).layout
    need = [scratch + sum(i.size for _, i in layout.lives.values() if i.start <= step <= i.end)
            for step, (_, scratch) in enumerate(layout.scratch)]
    *parts, (last, gaps) = layout.busiest()
    assert sum(n for _, n in parts) == max(need) and last == "gaps and alignment"
    assert gaps == layout.arena_bytes - max(need) >= 0


# ---- what fits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma-12b", "qwen-7b"])
def test_the_largest_context_fits_and_one_more_does_not(files, machine, name: str) -> None:
    path, mmproj = files[name]
    seen = {"mmproj": mmproj, "images": (896, 896)}
    machine(12 * GIB)
    plan = pe.plan(path, n_ctx=8192, n_seq=2, **seen)
    assert plan.fits and 8192 < plan.max_ctx < 128_000
    assert pe.plan(path, n_ctx=plan.max_ctx, n_seq=2, **seen).fits
    assert not pe.plan(path, n_ctx=plan.max_ctx + 64, n_seq=2, **seen).fits       # caches of two grow by pages of 64
    assert plan.max_seq >= 2 and pe.plan(path, n_ctx=8192, n_seq=plan.max_seq, **seen).fits
    assert plan.max_seq == plan.seq_limit or not pe.plan(path, n_ctx=8192, n_seq=plan.max_seq + 1, **seen).fits


def test_the_default_context_has_a_limit_and_a_given_one_has_not(files, machine) -> None:
    path, mmproj = files["gemma-12b"]
    machine(200 * GIB)
    plan = pe.plan(path, mmproj=mmproj)
    assert plan.n_ctx == 32_768 and "context: 32,768 of the 131,072 trained positions, the most unless more is asked for" in plan.table()
    assert plan.max_ctx == 131_072 and "largest context that fits: 131,072, all that the model was trained for" in plan.table()
    assert pe.plan(path, mmproj=mmproj, n_ctx=131_072).n_ctx == 131_072
    assert plan.items == pe.plan(path, mmproj=mmproj, n_ctx=32_768).items
    assert "200,000 is more than the 131,072 positions" in pe.plan(path, n_ctx=200_000).table()


def test_no_context_beyond_the_trained_one_is_proposed(files, machine) -> None:
    path, _ = files["gemma-12b"]
    machine(200 * GIB)
    plan = pe.plan(path, n_ctx=131_073)
    assert plan.fits and plan.n_ctx == 131_073 and plan.max_ctx == 131_072
    machine(60 * GIB)
    plan = pe.plan(path, n_ctx=4_096_000, nearest=True)
    assert not plan.fits and plan.n_ctx == 4_096_000 and plan.max_ctx == 131_072
    assert [a.settings for a in plan.alternatives] == [{"n_ctx": 131_072}]
    machine(10 * GIB)
    plan = pe.plan(path, n_ctx=4_096_000, nearest=True)
    assert not plan.fits and plan.max_ctx < 131_072 and plan.alternatives
    for a in plan.alternatives:
        assert a.settings["n_ctx"] <= 131_072 and pe.plan(path, **a.settings).total == a.total


def test_the_default_context_leaves_a_margin_and_is_a_round_number(files, machine) -> None:
    """A few bytes more or less free give the same number; what is left can hold a picture while it is read."""
    path, mmproj = files["gemma-12b"]
    seen = set()
    for more in (0, 1, 12_345_678):
        machine(10 * GIB + more)
        plan = pe.plan(path, mmproj=mmproj)
        assert plan.fits and plan.total <= 9 * GIB + more and 512 < plan.n_ctx < 32_768
        assert plan.n_ctx % (1 << plan.n_ctx.bit_length() - 3) == 0
        assert f"context: {plan.n_ctx:,} of the 131,072 trained positions, so that 1.00 GiB of the memory stay free" in plan.table()
        seen.add(plan.n_ctx)
    assert len(seen) == 1
    machine(4 * GIB)
    small = pe.plan(files["qwen-7b"][0], n_ctx=512).total
    machine(small + 100 * MIB)                                           # enough, but not for an eighth that stays free
    plan = pe.plan(files["qwen-7b"][0])
    assert plan.fits and plan.n_ctx == 512 and "the least: not even with these" in plan.table()
    machine(2 * GIB)
    plan = pe.plan(path, mmproj=mmproj)
    assert not plan.fits and plan.max_ctx is None and plan.max_seq is None
    assert "and no smaller context of a whole step fits" in plan.table()


def test_a_table_says_first_whether_it_fits_in_units_that_people_read(files, machine) -> None:
    machine(16 * GIB)
    path, mmproj = files["gemma-12b"]
    plan = pe.plan(path, mmproj=mmproj, n_ctx=8192)
    heading, verdict, *rows = plan.table().splitlines()
    assert heading == "gemma-12b.gguf: context 8,192, batch 512, kv f16"
    assert verdict == f"fits: {plan.total / GIB:.2f} GiB of 16.00 GiB available"
    text = "\n".join(rows)
    assert "all 8,192 positions (8 layers)" in text and "window of 1,024: 1,536 positions (40 layers)" in text
    assert "()" not in text and "=" not in text and not any(len(row.split(" MiB")[0].split()[-1]) > 6 for row in rows if " MiB" in row)
    assert [row.split()[0] for row in rows if row[2:3].strip()][:6] == ["weights", "kv", "arena", "sampler", "encoder", "images"]
    in_place = pe.plan(path, n_ctx=8192, mmap=True).table().splitlines()
    assert any(row.startswith("  mapped") and "not counted" in row for row in in_place) and "\n  mapped" not in text
    assert "reading a picture takes more for a moment" in text and plan.decoding == GIB
    assert "reading a picture" not in pe.plan(path, n_ctx=8192).table()
    machine(6 * GIB)
    refused = pe.plan(path, n_ctx=8192, nearest=True)
    assert refused.table().splitlines()[1].startswith("does not fit: ") and refused.advice().startswith("these would fit:") is bool(refused.alternatives)


def test_parts_of_memory_that_are_too_small_say_how_much_would_do(tiny_gguf) -> None:
    path = tiny_gguf("llama")[0]
    need = pe.plan(path, n_ctx=64).total
    one = pe.plan(path, n_ctx=64, device={"cpu:0": MIB}, nearest=True)
    assert not one.fits and one.alternatives[0].settings == {"device": {"cpu:0": -(-need // MIB) * MIB}}
    assert one.alternatives[0].options().startswith(f"--device cpu:0={-(-need // MIB)}MiB: ")
    assert pe.plan(path, n_ctx=64, **one.alternatives[0].settings).fits
    two = pe.plan(path, n_ctx=64, device={"cpu:0": 2 * MIB, "cpu:1": MIB}, nearest=True)
    assert not two.fits and pe.plan(path, n_ctx=64, **two.alternatives[0].settings).fits
    assert one.table().splitlines()[1].endswith("on cpu:0") and "cpu:1" in two.table().splitlines()[1]


def test_a_larger_cache_is_counted_as_if_it_had_been_built(tiny_gguf) -> None:
    """What the searches count is what a plan of these numbers counts."""
    for kind in cases.kinds(own_cache=True):
        bound = bind(open_files(tiny_gguf(kind)[0]))
        layout = ModelLayout(bound, Settings(n_ctx=128, n_batch=16, n_seq=2), hardware.detect())
        for n_ctx, n_seq in ((128, 2), (512, 2), (65, 1), (100, 7), (4, 1), (512, 30)):
            other = ModelLayout(bound, Settings(n_ctx=n_ctx, n_batch=16, n_seq=n_seq), hardware.detect())
            if other.sizes.runs == layout.sizes.runs:
                assert layout.total_at(n_ctx, n_seq) == other.total, (kind, n_ctx, n_seq)


def test_refusals_name_three_things_that_fit(files, machine) -> None:
    path, mmproj = files["qwen-7b"]
    machine(11 * GIB)
    with pytest.raises(PlanError) as caught:
        pe.load(path, mmproj=mmproj, n_ctx=128_000, n_seq=2)
    plan = caught.value.plan
    assert not plan.fits and plan.table() in str(caught.value) and len(plan.alternatives) == 3
    for a in plan.alternatives:
        found = pe.plan(path, mmproj=mmproj, **{"n_ctx": 128_000, "n_seq": 2, **a.settings})
        assert found.fits and found.total == a.total and str(a) in str(caught.value)
    assert len({repr(a.settings) for a in plan.alternatives}) == 3
    with pytest.raises(PlanError) as caught:
        machine(2 * GIB)
        pe.load(path, mmproj=mmproj, n_ctx=4096)
    (alternative,) = caught.value.plan.alternatives
    assert alternative.settings == {"mmap": True} and alternative.options().startswith("--mmap: ")
    with pytest.raises(PlanError) as caught:
        machine(GIB)
        pe.load(path, mmproj=mmproj, n_ctx=65536)
    assert [{**a.settings, "n_ctx": 0} for a in caught.value.plan.alternatives] == [{"mmap": True, "n_ctx": 0}]
    with pytest.raises(PlanError) as caught:
        machine(GIB // 16)
        pe.load(path, mmproj=mmproj, n_ctx=4096)
    assert caught.value.plan.alternatives == () and "fewer bits" in str(caught.value)
    assert f"its weights alone take {caught.value.plan.of('weights') / GIB:.2f} GiB" in str(caught.value)


def test_other_devices_say_what_they_could_hold(files, machine) -> None:
    path, mmproj = files["gemma-27b"]
    machine(64 * GIB, 8 * GIB, 40 * GIB)
    plan = pe.plan(path, n_ctx=8192, mmproj=mmproj)
    cpu, small, large = plan.rooms
    assert (cpu.device, small.device, large.device) == ("cpu", "cuda:0", "cuda:1") and cpu.whole and large.whole and not small.whole
    layer = [i for i in plan.items if i.layer == 61 and i.purpose in ("weights", "kv") and "from the first" not in i.detail]
    each = sum(i.nbytes for i in layer)
    assert large.n_layers == 62 and abs(small.n_layers - (8 * GIB - plan.of("arena") - 262_208 * 5376 // 32 * 18) / each) < 2
    assert f"could hold {small.n_layers} of 62 layers" in plan.table()
    json.dumps(plan.to_json())


def test_plans_may_speak_of_several_devices() -> None:
    items = (PlanItem("cpu", "weights", "a", 5), PlanItem("cuda:0", "weights", "b", 7), PlanItem("cuda:0", "mapped", "c", 100))
    plan = MemoryPlan("m", 8, 8, "f16", items, {"cpu": 5, "cuda:0": 7})
    assert plan.fits and plan.devices == ["cpu", "cuda:0"] and plan.on("cuda:0") == 7
    assert plan.of("weights") == 12 and plan.of("weights", "cpu") == 5
    assert not replace(plan, available={"cpu": 5, "cuda:0": 6}).fits


# ---- planned, allocated, resident -------------------------------------------------------------------------------------------


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", cases.kinds(sees=True))
def test_what_is_allocated_is_what_was_planned(tiny_gguf, kind: str) -> None:
    path = tiny_gguf(kind)[0]
    settings = {"n_ctx": 200, "n_seq": 3, "n_batch": 32, "images": (120, 90, 2)}
    before, model = pe.plan(path, **settings), pe.load(path, **settings)
    assert model.plan.items == before.items
    program = model.program
    assert before.of("weights") == program.weights.nbytes
    assert before.of("kv") == program.state_memory.nbytes
    assert before.of("arena") == program.arena.nbytes
    embedding = model.encode_image(noise(90, 120))
    encoder = model.media._program
    assert before.of("encoder") == encoder.weights.nbytes + encoder.arena.nbytes
    budget = next(i.nbytes for i in before.items if "kept" in i.detail)
    kept = model.stats["image_cache_bytes"]
    assert kept % (4 * len(embedding)) == 0 and kept >= embedding.nbytes      # with what layers get besides
    assert model.media.budget == budget == 2 * kept
    for seed in range(5):
        model.encode_image(noise(90, 120, seed))
        assert model.stats["image_cache_bytes"] <= budget
    assert model.stats["image_cache_bytes"] > 0


def test_a_picture_too_large_for_the_plan_is_refused_with_its_size_and_the_limit(tiny_gguf) -> None:
    path = tiny_gguf("qwen2_5_vl")[0]
    small = pe.load(path, n_ctx=256, images=(112, 84))
    assert small.plan.picture == 12 and len(small.encode_image(noise(84, 112))) == 12
    with pytest.raises(RequestError, match=r"200 x 150 pixels takes \d+ soft tokens.*up to 12, 9408 pixels.*images=\(200, 150\)"):
        small.encode_image(noise(150, 200))
    assert len(pe.load(path, n_ctx=256, images=(200, 150)).encode_image(noise(150, 200))) > 12
    with pytest.raises((RequestError, ImageError)):
        pe.load(path, n_ctx=256, images=0).generate([noise(84, 112), 3])


def test_a_picture_whose_decoding_takes_more_than_is_available_is_refused_before_it_is_decoded(tiny_gguf, tmp_path, monkeypatch) -> None:
    model = pe.load(tiny_gguf("gemma3")[0], n_ctx=128)
    Image.fromarray(noise(300, 400)).save(tmp_path / "a.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    ask = [{"role": "user", "content": [{"type": "image", "image": str(tmp_path / "a.png")}, "what?"]}]
    monkeypatch.setattr(hardware, "available_memory", lambda system=None: 400 * 300 * 7 - 1)
    with pytest.raises(ImageError, match="decoding 400 x 300 pixels takes 0 MiB for a moment, and 0 MiB of memory are available"):
        model.chat(ask, max_tokens=1)
    monkeypatch.undo()
    assert len(model.chat(ask, max_tokens=1).tokens) == 1


def expected(plan: dict[str, Any], used: list[int], encoded: bool) -> int:
    """Bytes that are resident when conversations of `used` tokens have been computed: planned memory, as far as it was touched.

    Of the plan: the process, headers, weights; once a step has run the arena; of the caches the cells in use; once a picture was
    encoded its encoder and the library. Not the sampler's candidates, which live as long as a request.
    """
    total = 0
    for i in plan["items"]:
        touched = i["purpose"] in ("weights", "overhead") or i["detail"] == "headers of files"
        touched |= bool(used) and i["purpose"] == "arena"
        touched |= encoded and (i["purpose"] == "encoder" or i["detail"].startswith("library"))
        if touched:
            total += i["nbytes"]
        elif i["purpose"] == "kv" and i["factors"]:
            heads, cells, nbytes = (n for _, n in i["factors"])
            total += heads * nbytes * sum(min(n, cells // plan["n_seq"]) for n in used)
    return total


def check_resident(path: Path, n_ctx: int, n_seq: int, *flags: str) -> None:
    command = [sys.executable, str(ROOT / "tests/support/resident.py"), str(path), str(n_ctx), str(n_seq), *flags]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    plan, allocated, *phases = map(json.loads, run.stdout.splitlines())
    for purpose, name in (("weights", "weights"), ("arena", "arena"), ("kv", "state")):
        assert allocated[name] == sum(i["nbytes"] for i in plan["items"] if i["purpose"] == purpose)
    assert len(phases) >= 2 + bool(flags)
    for phase in phases:
        want = expected(plan, phase["used"], phase["encoded"])
        assert abs(phase["resident"] - want) <= max(0.03 * want, 20 * MIB), (phase, want)
        assert phase["resident"] <= plan["total"] + 20 * MIB


needs_linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="resident memory is read from Linux's /proc")


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_resident_memory_of_real_models(name: str) -> None:
    check_resident(real_path(name), 8192, 8)


@needs_linux
@pytest.mark.parametrize("kind", cases.kinds(sees=True, own_cache=True))
def test_resident_memory_of_models_that_see(tiny_gguf, kind: str) -> None:
    check_resident(tiny_gguf(kind)[0], 512, 8, "pictures")


# ---- the command ------------------------------------------------------------------------------------------------------------


def test_the_command_shows_explains_and_draws(files, machine, tmp_path, capsys) -> None:
    from pyengine.cli.command import execute

    machine(16 * GIB)
    path, mmproj = map(str, files["gemma-12b"])
    asked = ["plan", path, "--mmproj", mmproj, "--ctx", "8192", "--seq", "2"]
    assert execute([*asked, "--explain"]) == 0
    out = capsys.readouterr().out
    assert ("layers 5, 11, 17, 23, 29, 35, 41, 47: 8 heads x 16384 cells x 1024 bytes (512 of a key, 512 of a value) = 134217728 each"
            in out) and out.count("blk.N.ffn_down.weight") == 2
    assert "context 8,192 x 2 conversations" in out and "\nfits: " in out
    assert execute([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n_seq"] == 2 and found["max_ctx"] > 8192
    assert {i["layer"] for i in found["items"] if i["purpose"] == "kv"} >= set(range(48))
    machine(9 * GIB)
    assert execute([*asked, "--pictures", "0"]) == 0 and "encoder" not in capsys.readouterr().out
    assert execute(["plan", path, "--ctx", "131072", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"] and len(found["alternatives"]) >= 1
    assert execute(["plan", path, "--ctx", "131072"]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith("does not fit: ") and "\n  --ctx " in out and "n_ctx" not in out
    assert execute([path, "a question", "--ctx", "131072"]) == 2 and "\n  --ctx " in capsys.readouterr().err
    assert execute([*asked, "--picture", "896"]) == 2 and "WIDTHxHEIGHT" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    machine(16 * GIB)
    assert execute([*asked, "--png", str(tmp_path / "plan.png")]) == 0
    shown = capsys.readouterr()
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG") and "total" in shown.out
    assert shown.err == f"wrote {tmp_path / 'plan.png'}\n"
    assert execute([*asked, "--png", str(tmp_path / "no/plan.png")]) == 2 and "No such file" in capsys.readouterr().err


def test_drawing_without_matplotlib_says_what_is_missing(files, monkeypatch, capsys, tmp_path) -> None:
    from pyengine.cli.command import execute

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert execute(["plan", str(files["gemma-12b"][0]), "--ctx", "512", "--png", str(tmp_path / "a.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("given, nbytes", [("6GiB", 6 * GIB), ("6G", 6 * GIB), ("6gb", 6 * 10**9), ("1.5m", 3 * MIB // 2), ("7", 7), ("2 KiB", 2048),
                                           ("3TB", 3 * 10**12)])
def test_sizes_of_devices(given: str, nbytes: int) -> None:
    assert parse_device([f"cpu:0={given}"]) == {"cpu:0": nbytes}


@pytest.mark.parametrize("given, message", [(["cpu:0=6XB"], "6XB is no number of bytes"), (["cpu:0=6GiB", "cpu:0=1GiB"], "cpu:0 is given twice"),
                                            (["cpu:0=6GiB", "cpu:1"], "each has its bytes"), (["cpu:0="], "each has its bytes")])
def test_sizes_that_are_none(given: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_device(given)


def test_a_plans_picture_has_one_hue_a_purpose_and_the_first_device_on_top(tiny_gguf, monkeypatch, tmp_path) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: drawn.append(self))
    draw(pe.plan(tiny_gguf("llama")[0], n_ctx=64, device={"cpu:0": 48 * MIB, "cpu:1": 8 * MIB}), tmp_path / "a.png")
    axes = drawn[0].axes[0]
    low, high = axes.get_ylim()
    assert low > high and axes.get_yticklabels()[0].get_text().startswith("cpu:0")
    legend = drawn[0].legends[0]
    colours = {}
    for text, handle in zip(legend.get_texts(), legend.legend_handles):
        colours.setdefault(text.get_text().split(":")[0], []).append(handle.get_facecolor())
    assert len(colours) > 3 and all(len(set(same)) == len(same) for same in colours.values())
    assert len({c for same in colours.values() for c in same}) == sum(map(len, colours.values()))
