"""Memory plans: arithmetic spelled out for full-size models, equal to what is allocated, near to what is resident."""

from __future__ import annotations

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
from conftest import REAL, ROOT, real_path

import pyengine as pe
from pyengine import hardware
from pyengine.backends import backend
from oracle import step_of
from pyengine.files.model_files import open_files
from pyengine.memory.layout import ModelLayout
from pyengine.memory.settings import Settings
from pyengine.programs.bound import bind
from pyengine.errors import ImageError, PlanError, RequestError
from pyengine.files.gguf import GGUFFile
from pyengine.hardware.facts import Device
from pyengine.memory.plan import MemoryPlan, PlanItem

hollow = pytest.importorskip("hollow")
pytest.importorskip("gguf")
KIB, MIB, GIB = 2**10, 2**20, 2**30
GEMMA_TOKENS = ("<start_of_image>", "<end_of_image>")
MISTRAL_TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

LLAMA4_TOKENS = ("<|image_start|>", "<|image_end|>", "<|image|>", "<|tile_x_separator|>", "<|tile_y_separator|>")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, tuple[Path, Path | None]]:
    """Full-size models in files of headers and holes: (decoder, encoder)."""
    folder = tmp_path_factory.mktemp("hollow")
    made: dict[str, tuple[Path, Path | None]] = {}
    for name, model in (("gemma-12b", hollow.GEMMA_12B), ("gemma-27b", hollow.GEMMA_27B)):
        made[name] = (hollow.write_decoder(folder / f"{name}.gguf", model, special=GEMMA_TOKENS),
                      hollow.write_encoder(folder / f"mmproj-{name}.gguf", hollow.siglip(model.d_model)))
    made["qwen-7b"] = (hollow.write_decoder(folder / "qwen-7b.gguf", hollow.QWEN_VL_7B, special=QWEN_TOKENS),
                       hollow.write_encoder(folder / "mmproj-qwen-7b.gguf", hollow.qwen_encoder(hollow.QWEN_VL_7B.d_model)))
    made["mistral-24b"] = (hollow.write_decoder(folder / "mistral-24b.gguf", hollow.MISTRAL_SMALL, special=MISTRAL_TOKENS),
                           hollow.write_encoder(folder / "mmproj-mistral-24b.gguf", hollow.pixtral(hollow.MISTRAL_SMALL.d_model)))
    made["llama-vision"] = hollow.write_llama_vision(folder / "llama-vision.gguf"), None
    made["llama-405b"] = hollow.write_decoder(folder / "llama-405b.gguf", hollow.LLAMA_405B, "Q8_0", part_bytes=40 * GIB), None
    made["llama4-scout"] = (hollow.write_decoder(folder / "scout.gguf", hollow.LLAMA_4_SCOUT, special=LLAMA4_TOKENS),
                            hollow.write_encoder(folder / "mmproj-scout.gguf", hollow.llama4_encoder(hollow.LLAMA_4_SCOUT.d_model)))
    return made


@pytest.fixture
def machine(monkeypatch):
    """machine(bytes, gpu bytes...): what every plan takes for the memory of this machine from now on."""
    def set_to(free: int, *gpus: int) -> None:
        found = hardware.detect()
        devices = [replace(found.devices[0], total=free, free=free)]
        devices += [Device("cuda", "test GPU", i, n, n) for i, n in enumerate(gpus)]
        monkeypatch.setattr(hardware, "detect", lambda system=None: replace(found, devices=tuple(devices)))
    return set_to


def kv(plan: MemoryPlan) -> dict[str, int]:
    """Bytes of the caches by kind of layer."""
    found: dict[str, int] = {}
    for i in plan.items:
        if i.purpose == "kv" and i.layer is not None:
            kind = i.detail.partition("(")[0]
            found[kind] = found.get(kind, 0) + i.nbytes
    return found


# ---- full-size models, by hand ----------------------------------------------------------------------------------------


def test_gemma_3_12b_at_131072_tokens(files) -> None:
    """8 KiB a token and layer in f16; 8 layers see everything, 40 a window of 1024, where a naive engine has 48 full ones."""
    token = 8 * 256 * 2 * 2                                              # heads, head size, bytes of f16, keys and values
    assert token == 8 * KIB
    plan = pe.plan(files["gemma-12b"][0], n_ctx=131_072, mmproj=files["gemma-12b"][1])
    assert kv(plan) == {"Full": 8 * 131_072 * token, "Sliding": 40 * (1024 + 512) * token}
    assert kv(plan)["Full"] == 8 * GIB and kv(plan)["Sliding"] == 480 * MIB
    assert 48 * 131_072 * token == 48 * GIB


@pytest.mark.parametrize("n_ctx", [4096, 32_768, 131_072])
def test_windows_cost_the_same_at_any_context(files, n_ctx: int) -> None:
    plan = pe.plan(files["gemma-12b"][0], n_ctx=n_ctx)
    assert kv(plan) == {"Full": 8 * n_ctx * 8 * KIB, "Sliding": 480 * MIB}


def test_gemma_3_27b(files) -> None:
    """62 layers, every sixth of them full; 16 heads of 128."""
    token = 16 * 128 * 2 * 2
    plan = pe.plan(files["gemma-27b"][0], n_ctx=131_072, mmproj=files["gemma-27b"][1])
    assert kv(plan) == {"Full": 10 * 131_072 * token, "Sliding": 52 * (1024 + 512) * token}
    d, ff, q, k = 5376, 21_504, 32 * 128, 16 * 128
    matrices = d * q + 2 * d * k + q * d + 3 * d * ff                    # q, k and v, output, gate and up and down
    layer = matrices // 32 * 18 + 4 * (4 * d + 2 * 128)                  # Q4_0: 18 bytes a block of 32; norms in f32
    assert [i.nbytes for i in plan.items if i.purpose == "weights" and i.layer is not None] == [layer] * 62
    embedding = 262_208 * d // 32 * 18                                   # also the head: once in memory
    rest = sum(i.nbytes for i in plan.items if i.purpose == "weights" and i.layer is None)
    assert embedding + 4 * d <= rest <= embedding + 4 * d + 64 * KIB     # and the tables of rope
    encoder = 27 * (2 * (4 * 1152**2 + 2 * 1152 * 4304) + 4 * (4 * 1152 + 4304 + 1152 + 4 * 1152))
    assert sum(i.nbytes for i in plan.items if i.purpose == "encoder" and i.layer is not None) == encoder


def test_llama_3_2_vision_11b(files, machine) -> None:
    """32 layers see the text, 8 the pictures: 195.4 MiB for one of four tiles, however long the context is."""
    machine(64 * GIB)
    path = files["llama-vision"][0]
    token = 8 * 128 * 2 * 2                                              # heads, head size, bytes of f16, keys and values
    picture = 4 * (40 * 40 + 1)                                          # tiles x (patches of 14 pixels in 560, and the class row)
    assert token == 4 * KIB and picture == 6404
    for n_ctx in (4096, 131_072):
        plan = pe.plan(path, n_ctx=n_ctx, images=1)
        assert kv(plan) == {"Full": 32 * n_ctx * token, "Cross": 8 * picture * token}
        assert kv(plan)["Cross"] == 209_846_272 == 200.125 * MIB
        assert [i.layer for i in plan.items if i.detail.startswith("Cross")] == list(hollow.LLAMA_VISION_ACROSS)
    assert plan.picture == picture
    three = pe.plan(path, n_ctx=4096, images=(1120, 1120, 3))            # three such pictures in a conversation
    assert kv(three)["Cross"] == 3 * kv(plan)["Cross"]
    assert kv(pe.plan(path, n_ctx=4096, images=(500, 500, 3)))["Cross"] == 8 * 3 * 1601 * token        # of one tile each
    blocks = 6 * picture * 8 * (4 * 34 + 4 * 18)                         # 128 elements: 4 blocks of 34 bytes (Q8_0) and 18 (Q4_0)
    assert kv(pe.plan(path, n_ctx=4096, images=6, kv_dtype="q8_0/q4_0"))["Cross"] == 8 * blocks
    pages = -(-picture // 64) * 64                                       # several conversations share pages of 64 cells
    assert kv(pe.plan(path, n_ctx=4096, images=1, n_seq=2))["Cross"] == 2 * 8 * pages * token
    # By default as many pictures as a sixteenth of the memory holds, 8 at most.
    assert kv(pe.plan(path, n_ctx=4096))["Cross"] == 8 * kv(plan)["Cross"]
    machine(12 * GIB)
    assert kv(pe.plan(path, n_ctx=4096))["Cross"] == 3 * kv(plan)["Cross"]
    assert 3 * kv(plan)["Cross"] < 12 * GIB // 16 < 4 * kv(plan)["Cross"]
    # The layers that see pictures have weights of the same sizes as the others, and two norms and two gates more.
    d, ff, heads = 4096, 14_336, 8 * 128
    matrices = (2 * d * d + 2 * d * heads + 3 * d * ff) // 32 * 18       # Q4_0
    weights = {i.layer: i.nbytes for i in plan.items if i.purpose == "weights" and i.layer is not None}
    assert weights[0] == matrices + 4 * 2 * d and weights[3] == matrices + 4 * 2 * d + 2 * 4 * 128 + 2 * 64     # gates: a line each
    assert len(weights) == 40
    blind = pe.plan(path, n_ctx=4096, images=0)
    assert kv(blind) == {"Full": 32 * 4096 * token} and blind.of("encoder") == 0


def test_qwen2_5_vl_7b(files, machine) -> None:
    """28 layers with 4 heads of 128: 56 KiB a token. The encoder's largest picture has 16,384 soft tokens."""
    machine(64 * GIB)
    token = 28 * 4 * 128 * 2 * 2
    assert token == 56 * KIB
    plan = pe.plan(files["qwen-7b"][0], n_ctx=131_072, mmproj=files["qwen-7b"][1])
    assert kv(plan) == {"Full": 131_072 * token} and kv(plan)["Full"] == 7 * GIB
    assert plan.picture == 28 * 28 * 16_384 // 28**2
    group = 4 * 1280
    merger = 2 * (group * group + 3584 * group) + 4 * (group + 3584 + 1280)         # f16 matrices, f32 biases and norm
    patches = 4 * 1280 * 2 * 3 * 14 * 14                                            # made from two slices: float32
    assert sum(i.nbytes for i in plan.items if i.detail == "weights of patches, norms and projector") - merger - patches < 4096
    layer = 2 * (4 * 1280**2 + 3 * 1280 * 3420) + 4 * (2 * 1280 + 4 * 1280 + 2 * 3420 + 1280)
    padded = [i.nbytes for i in plan.items if i.purpose == "encoder" and i.layer is not None]
    assert len(padded) == 32 and set(padded) == {padded[0]} and layer <= padded[0] < 1.01 * layer    # rows in groups of 16
    f32 = 4 * 4 * 16_384 * 3 * 2 * 14 * 14                                          # patches of four to a soft token
    assert any(dict(i.parts).get("patches [65536, 1176]") == f32 for i in plan.items if i.purpose == "images")


def test_mistral_small_3_1_24b(files, machine) -> None:
    """40 layers with 8 heads of 128: 160 KiB a token. A picture of 1540 x 1540 has 110 x 110 patches, merged to 55 x 55 rows."""
    machine(64 * GIB)
    token = 40 * 8 * 128 * 2 * 2
    assert token == 160 * KIB
    path, mmproj = files["mistral-24b"]
    plan = pe.plan(path, n_ctx=131_072, mmproj=mmproj)
    assert kv(plan) == {"Full": 131_072 * token} and kv(plan)["Full"] == 20 * GIB
    d, ff, q, k = 5120, 32_768, 32 * 128, 8 * 128
    layer = (d * q + 2 * d * k + q * d + 3 * d * ff) // 32 * 18 + 4 * 2 * d             # Q4_0: 18 bytes a block of 32; norms in f32
    assert layer == 312_647_680
    assert [i.nbytes for i in plan.items if i.purpose == "weights" and i.layer is not None] == [layer] * 40
    head = 131_072 * d // 32 * 18                                                       # as many for the embedding, which is mapped
    rest = {i.purpose: i.nbytes for i in plan.items if i.detail == "embedding, head and norms"}
    assert rest["mapped"] == head and head + 4 * d <= rest["weights"] <= head + 4 * d + 64 * KIB
    v, v_ff, rows = 1024, 4096, 55 * 55
    encoder = 2 * (4 * v * v + 3 * v * v_ff) + 4 * 2 * v                                # f16 matrices, two f32 norms
    assert [i.nbytes for i in plan.items if i.purpose == "encoder" and i.layer is not None] == [encoder] * 24
    projector = 2 * (v * 3 * 14 * 14 + v * 4 * v + d * v + d * d) + 4 * 2 * v           # patches, merger, two products; two norms
    assert 0 <= sum(i.nbytes for i in plan.items if i.detail == "weights of patches, norms and projector") - projector < 4096
    n = 4 * rows
    assert plan.picture == rows and n == (1540 // 14) ** 2 == 12_100
    busiest = 4 * n * (v_ff + v + 64 + 2)                       # the feed-forward's units, its input, angles, intervals
    arena = next(i for i in plan.items if i.detail.startswith("arena, up to"))
    assert busiest == 251_002_400 and busiest < arena.nbytes < 1.3 * busiest            # and what its product works on
    assert 4 * 16 * n * n > 30 * arena.nbytes                                           # scores of 16 heads, as a matrix
    assert any(dict(i.parts).get("patches [12100, 588]") == 4 * n * 588 for i in plan.items if i.purpose == "images")


def test_llama_4_scout_at_131072_tokens(files, machine) -> None:
    """4 KiB a token and layer in f16; 12 layers see everything, 36 their chunk of 8192, where a naive engine has 48 full ones."""
    machine(96 * GIB)
    token = 8 * 128 * 2 * 2                                              # heads, head size, bytes of f16, keys and values
    assert token == 4 * KIB
    path, mmproj = files["llama4-scout"]
    plan = pe.plan(path, n_ctx=131_072, mmproj=mmproj)
    assert kv(plan) == {"Full": 12 * 131_072 * token, "Chunked": 36 * (8192 + 512) * token}
    assert kv(plan)["Full"] == 6 * GIB and 7.1 * GIB < sum(kv(plan).values()) < 7.2 * GIB
    assert 48 * 131_072 * token == 24 * GIB
    d, q, k, f = 5120, 40 * 128, 8 * 128, 8192
    attention = d * q + 2 * d * k + q * d
    expert = 3 * d * f                                                   # gate, up and down: 126 million weights
    shared = (attention + expert) // 32 * 18 + 4 * 16 * d + 4 * 2 * d    # Q4_0; router and norms in f32
    found = sorted(i.nbytes for i in plan.items if i.purpose == "weights" and i.layer is not None)
    assert found == [shared] * 48 + [16 * expert // 32 * 18] * 48
    rest = sum(i.nbytes for i in plan.items if i.purpose in ("weights", "mapped") and i.layer is None and "headers" not in i.detail)
    assert abs(rest - 2 * (202_048 * d // 32 * 18)) < MIB                # head and embedding
    assert 56 * GIB < plan.of("weights") + plan.of("mapped") < 57 * GIB  # 108 thousand million weights
    encoder = 2 * (4 * 1408**2 + 2 * 1408 * 5632) + 4 * (4 * 1408 + 5632 + 1408 + 4 * 1408)
    assert [i.nbytes for i in plan.items if i.purpose == "encoder" and i.layer is not None] == [encoder] * 34
    assert plan.picture == 24 * 24 // 4 == 144                           # of one tile, which is one run of the encoder
    kept = pe.plan(path, n_ctx=131_072, mmproj=mmproj, images=(1344, 1344, 3))
    assert next(i.nbytes for i in kept.items if "kept" in i.detail) == 3 * 17 * 144 * d * 4          # 4 x 4 tiles and the whole


def test_smaller_pictures_take_less(files, machine) -> None:
    """16,384 soft tokens would take more than an eighth of 8 GiB: the plan admits less, and says so."""
    machine(8 * GIB)
    path, mmproj = files["qwen-7b"]
    plan = pe.plan(path, n_ctx=32_768, mmproj=mmproj)
    run = sum(i.nbytes for i in plan.items if i.detail.startswith("arena, up") or "patches" in i.detail and i.purpose == "images")
    assert 256 <= plan.picture < 16_384 and run < 1.5 * GIB
    assert any(f"pictures of up to {plan.picture} soft tokens" in n and "images=" in n for n in plan.notes)
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


@pytest.mark.parametrize("name", ["gemma-27b", "qwen-7b", "llama-vision", "llama-405b", "llama4-scout"])
def test_planning_takes_no_time(files, name: str) -> None:
    """Half a second of the processor's time at most, in a file of 400 GiB and 126 layers too; nothing but headers is read."""
    path, mmproj = files[name]
    size = sum(p.stat().st_size for p in GGUFFile(path).paths)
    assert name != "llama-405b" or size > 400 * 10**9
    seconds = []
    for _ in range(3):
        started = time.process_time()
        plan = pe.plan(path, n_ctx=8192, mmproj=mmproj)
        seconds.append(time.process_time() - started)
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
        folded = (".weight.1", "img_break", "v.class_embd", "position_embd.gate")      # parts of what another tensor becomes
        assert name in named or name.endswith(folded), name
        if name in named and info.dtype.block > 1:                       # packed in groups of 16 rows; read twice: mapped too
            assert info.nbytes <= named[name] <= 2 * info.nbytes + 16 * info.nbytes // info.shape[0] + 64
    assert plan.total == sum(i.nbytes for i in plan.items if i.purpose != "mapped") == sum(plan.on(d) for d in plan.devices)
    text = plan.explain()
    assert f"{plan.total:>16}  = sum" in text and all(str(i.nbytes) in text for i in plan.items)


def test_every_number_is_made_of_named_parts(files) -> None:
    for path, mmproj in files.values():
        tensors = dict(GGUFFile(path).tensors) | (GGUFFile(mmproj).tensors if mmproj else {})
        check_arithmetic(pe.plan(path, n_ctx=8192, n_seq=3, kv_dtype="q8_0/f16", mmproj=mmproj), tensors)


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


def test_without_a_context_the_largest_that_fits_is_taken_and_named(files, machine) -> None:
    path, mmproj = files["gemma-12b"]
    machine(200 * GIB)
    plan = pe.plan(path, mmproj=mmproj)
    assert plan.n_ctx == 131_072 and "context: 131072 positions, as trained" in plan.table()
    machine(12 * GIB)
    plan = pe.plan(path, mmproj=mmproj)
    assert plan.fits and plan.n_ctx % 256 == 0 and plan.n_ctx < 131_072
    assert f"context: {plan.n_ctx} of the 131072 trained positions" in plan.table()
    assert plan.max_ctx - 256 < plan.n_ctx <= plan.max_ctx
    machine(2 * GIB)
    plan = pe.plan(path, mmproj=mmproj)
    assert not plan.fits and plan.max_ctx is None and plan.max_seq is None


def test_a_larger_cache_is_counted_as_if_it_had_been_built(tiny_gguf) -> None:
    """What the searches count is what a plan of these numbers counts."""
    for kind in ("gemma3_text", "gemma3", "qwen2_5_vl", "mllama"):
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
    assert caught.value.plan.alternatives == () and "fewer bits" in str(caught.value)


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


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl", "qwen2_vl", "mistral3", "mllama"])
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
    assert model.media.budget == budget == 2 * before.picture * embedding.shape[1] * 4
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
@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl", "mllama"])
def test_resident_memory_of_models_that_see(tiny_gguf, kind: str) -> None:
    check_resident(tiny_gguf(kind)[0], 512, 8, "pictures")


# ---- the command ------------------------------------------------------------------------------------------------------------


def test_the_command_shows_explains_and_draws(files, machine, tmp_path, capsys) -> None:
    from pyengine.cli import execute

    machine(16 * GIB)
    path, mmproj = map(str, files["gemma-12b"])
    asked = ["plan", path, "--mmproj", mmproj, "--ctx", "8192", "--seq", "2"]
    assert execute([*asked, "--explain"]) == 0
    out = capsys.readouterr().out
    assert "layer 5: 8 heads x 16384 cells x 1024 bytes (512 of a key, 512 of a value) = 134217728" in out
    assert "context 8192 x 2 conversations" in out and out.endswith("  fits\n")
    assert execute([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n_seq"] == 2 and found["max_ctx"] > 8192
    assert {i["layer"] for i in found["items"] if i["purpose"] == "kv"} >= set(range(48))
    machine(9 * GIB)
    assert execute([*asked, "--pictures", "0"]) == 0 and "encoder" not in capsys.readouterr().out
    assert execute(["plan", path, "--ctx", "131072", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"] and len(found["alternatives"]) >= 1
    assert execute([*asked, "--picture", "896"]) == 2 and "WIDTHxHEIGHT" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    assert execute([*asked, "--png", str(tmp_path / "plan.png")]) == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG") and "total" in capsys.readouterr().out
    assert execute([*asked, "--png", str(tmp_path / "no/plan.png")]) == 2 and "No such file" in capsys.readouterr().err


def test_drawing_without_matplotlib_says_what_is_missing(files, monkeypatch, capsys, tmp_path) -> None:
    from pyengine.cli import execute

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert execute(["plan", str(files["gemma-12b"][0]), "--ctx", "512", "--png", str(tmp_path / "a.png")]) == 2
    assert "pyengine[bench]" in capsys.readouterr().err
