"""The benchmarks' own promises: limits are real work, wrong kernels are found, regressions are told from noise."""

from __future__ import annotations

import copy
import gc
import json
import mmap
import sys
import time
import types

import numpy as np
import pytest

import converters.quantize
from bench import compare, limits, stats, widths
from cbuild import compile_c
from pyengine.dtype import dtype


@pytest.fixture(scope="module")
def native():
    ffi, lib = compile_c(("host/limits.c", "cpu/isa.c") if _is_arm() else ("host/limits.c",), ("host/limits.h",))
    return types.SimpleNamespace(ffi=ffi, lib=lib)


def _is_arm() -> bool:
    import platform

    return platform.machine() in ("aarch64", "arm64")


# ---- limits -------------------------------------------------------------------------------------------------------------


def test_reading_sums_every_word(native) -> None:
    words = np.random.default_rng(0).integers(0, 1 << 60, 4096, np.uint64)
    got = native.lib.pe_limit_read(native.ffi.from_buffer(words), words.nbytes)
    assert got == int(words.sum())                                             # modulo 2^64, on both sides
    assert native.lib.pe_limit_read(native.ffi.from_buffer(words), 64) == int(words[:8].sum())


@pytest.mark.parametrize("isa", ["avx512", "avxvnni", "avx2", "sme", "sve256", "i8mm", "neon", "generic"])
@pytest.mark.parametrize("kind", ["int8", "fp32"])
def test_twice_the_rounds_take_twice_the_time(native, isa: str, kind: str) -> None:
    """A loop that the compiler has removed would not."""
    loop = {"int8": native.lib.pe_limit_int8, "fp32": native.lib.pe_limit_fp32}[kind]
    if loop(isa.encode(), 1) == 0:
        pytest.skip(f"this machine has no {isa}")
    n = 200_000
    assert loop(isa.encode(), 2 * n) == 2 * loop(isa.encode(), n) > n

    def seconds(rounds: int) -> float:
        start = time.perf_counter()
        loop(isa.encode(), rounds)
        return time.perf_counter() - start

    pairs = [(seconds(n), seconds(2 * n)) for _ in range(30)]                  # in turns: a processor's speed changes
    once, twice = (min(times) for times in zip(*pairs))                        # the fastest ones were not interrupted
    assert 1.5 < twice / once < 2.7


def test_an_unknown_instruction_set_has_no_peak(native) -> None:
    assert native.lib.pe_limit_int8(b"sse9", 10) == 0
    assert limits.peak("fp32", "sse9", 1, native=native) == 0


def test_threads_run_at_once_and_give_their_results() -> None:
    seconds, results = limits.together(3, lambda i: (time.sleep(0.05), i)[1])
    assert results == [0, 1, 2]
    assert 0.05 <= seconds < 0.14


# ---- comparison ---------------------------------------------------------------------------------------------------------


def test_summary_is_median_and_half_the_quartile_range() -> None:
    s = stats.summary([1, 2, 3, 4, 100])
    assert (s["median"], s["min"], s["max"]) == (3, 1, 100)
    assert s["spread"] == pytest.approx((4 - 2) / 2 / 3)


def _file(**scores: list[float]) -> dict:
    return {"suite": "kernels", "results": [{"name": k, "score": stats.summary(v)} for k, v in scores.items()]}


def test_a_loss_beyond_noise_is_a_regression() -> None:
    old = _file(steady=[1.0, 1.01, 0.99], noisy=[1.0, 0.7, 1.3], better=[1.0, 1.0, 1.0], gone=[1.0])
    new = _file(steady=[0.9, 0.91, 0.89], noisy=[0.9, 0.8, 1.1], better=[1.2, 1.2, 1.2], fresh=[1.0])
    found = compare.compare(old, new)
    assert [c.name for c in found.regressions] == ["steady"]
    assert (found.only_old, found.only_new, found.failed) == (("gone",), ("fresh",), True)
    assert "regressed steady: 1.000 -> 0.900" in found.text() and "1 better" in found.text()


def test_equal_files_and_small_losses_pass() -> None:
    old, new = _file(a=[1.0, 1.0, 1.0]), _file(a=[0.96, 0.96, 0.96])
    assert not compare.compare(old, copy.deepcopy(old)).failed
    assert not compare.compare(old, new).failed


def test_a_wrong_result_fails_however_fast() -> None:
    old, new = _file(a=[1.0]), _file(a=[2.0])
    new["results"][0]["correct"] = False
    assert compare.compare(old, new).wrong == ("a",)
    assert compare.compare(old, new).failed


def test_files_of_different_suites_are_not_compared() -> None:
    with pytest.raises(ValueError, match="'kernels', the other of 'peers'"):
        compare.compare(_file(), {**_file(), "suite": "peers"})


# ---- kernels ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("pyengine._engine", reason="needs the compiled extension: pip install .")
    from bench import kernels

    return kernels


@pytest.fixture
def small(kernels, monkeypatch):
    """Short samples."""
    monkeypatch.setattr(kernels, "SAMPLE_SECONDS", 1e-4)
    return kernels


def test_every_op_with_a_kernel_has_jobs_and_every_job_its_own_name(kernels) -> None:
    jobs = list(kernels.jobs())
    assert {j.op.name for j in jobs} == {op.name for op in kernels.REGISTRY.values() if not op.view}
    assert len({j.name for j in jobs}) == len(jobs)


def test_every_declared_case_is_right(small, monkeypatch) -> None:
    monkeypatch.setattr(small, "REPEAT", 1)
    found = []
    for job in small.jobs():
        if job.label.startswith("case "):
            found += small.measure(job, "generic", 1)[:1]
    assert [r["name"] for r in found if not r["correct"]] == [] and len(found) > 100


def test_random_blocks_have_moderate_values_in_every_format(kernels) -> None:
    for name in kernels.FORMATS:
        blocks = kernels.random_blocks(dtype(name), (8, 512), np.random.default_rng(0))
        if name in ("F32", "F16", "BF16"):
            continue                                                           # those are normal numbers, not blocks
        values = blocks.values()
        assert values.shape == (8, 512) and np.isfinite(values).all(), name
        assert 1e-3 < np.sqrt(np.mean(values**2)) < 30, name


def test_work_of_a_product_is_counted_by_hand(kernels) -> None:
    job = kernels.linear_job("x", (96, 32), 256, ("Q8_0", "Q4_K"), 3, {"norm": True})
    made = kernels.Copy.make(job, np.random.default_rng(0))
    assert kernels.operations(job, made) == 2 * 3 * 128 * 256
    weights = 96 * 256 // 32 * 34 + 32 * 256 // 256 * 144
    assert kernels.traffic(job, made) == 4 * 3 * 256 + weights + 4 * 256 + 4 * 3 * 128


def test_work_of_experts_is_counted_by_hand(kernels) -> None:
    case = kernels.Case({"x": (3, 256), "w": [(8, 64, 256)] * 2, "chosen": (3, 2)}, {"w": ["Q4_K"] * 2}, {"glu": "silu"})
    job = kernels.Job(kernels.ops.expert_linear, case, "x")
    made = kernels.Copy.make(job, np.random.default_rng(0))
    made.values["chosen"] = np.array([[0, 3], [3, 5], [5, 0]], np.int32)
    assert kernels.operations(job, made) == 2 * 3 * 2 * 64 * 256 * 2           # rows, experts of each, two matrices
    assert kernels.traffic(job, made) == 4 * 3 * 256 + 2 * 3 * 64 * 144 + 4 * 6 + 4 * 6 * 64    # of three experts


def test_work_of_attention_counts_the_keys_that_are_seen(kernels) -> None:
    job = next(j for j in kernels.jobs() if "attention gemma" in j.name and "F16 keys=4096 window=512 m=1" in j.name)
    made = kernels.Copy.make(job, np.random.default_rng(0))
    assert kernels.operations(job, made) == 2 * 4 * 512 * (256 + 256)
    assert kernels.traffic(job, made) - 2 * 512 * 256 * 2 < 64 << 10           # the caches' part is 512 cells, not 4096


@pytest.mark.parametrize("pattern", ["linear case 3x64 40x64 3x40", "rms_norm case 4x640 640 4x640", "cache_append case",
                                     "attention case 9x4x64 1x40x64"])
def test_small_jobs_are_right_and_timed(small, pattern: str) -> None:
    (job,) = [j for j in small.jobs() if j.name.startswith(pattern)]
    (record,) = small.measure(job, "generic", 2)
    assert record["correct"] and record["nmse"] < 1e-10
    assert record["cache"] == "hot" and 0 < record["seconds"]["median"] < 0.1
    bound = limits.Limits("generic", 2, 1e10, 1e11, 1e10)
    assert small.judge(record, bound)["score"]["median"] > 0


def test_cold_runs_walk_through_more_than_the_cache(small, monkeypatch) -> None:
    monkeypatch.setattr(small, "last_level_cache", lambda: 1 << 20)
    job = small.linear_job("x", (512,), 512, ("Q8_0",), 1, {})
    hot, cold = small.measure(job, "generic", 1)
    assert (hot["cache"], cold["cache"]) == ("hot", "cold")
    assert hot["correct"] and cold["correct"]
    timed = small.Timed(job, small.Copy.make(job, np.random.default_rng(0)), 8, "generic", 1)
    assert timed.program.prepared.weight_bytes >= 8 * 512 * 512 // 32 * 34     # copies are not one tensor


def test_a_missing_kernel_is_named_and_not_replaced(small, monkeypatch, capsys) -> None:
    from pyengine.backends import cpu

    monkeypatch.setattr(cpu, "kernels_of", lambda isa: frozenset({"rms_norm"}))
    monkeypatch.setattr(limits, "measure", lambda isa, n, repeat=5, native=None: limits.Limits(isa, n, 1e10, 1e11, 1e10))
    found = small.run(["generic"], 1, "softmax case|rms_norm case 4x640")
    assert {r["op"] for r in found["results"]} == {"rms_norm"} and len(found["missing"]) == 2
    assert "generic has no kernel for softmax" in found["missing"][0]["reason"]


@pytest.mark.parametrize("pattern", ["linear case 3x64 40x64 3x40", "cache_append case"])
def test_a_wrong_result_is_found(small, monkeypatch, pattern: str) -> None:
    (job,) = [j for j in small.jobs() if j.name.startswith(pattern)]
    right = small.expected

    def slightly_wrong(job, made):
        want, part = right(job, made)
        values = want[0] if isinstance(want, list) else want
        values.reshape(-1)[3] += 0.05
        return want, part

    monkeypatch.setattr(small, "expected", slightly_wrong)
    assert not small.measure(job, "generic", 1)[0]["correct"]


def test_the_command_writes_compares_and_draws(small, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'pyengine-local[bench]'")
    from bench.__main__ import main

    monkeypatch.setattr(limits, "measure", lambda isa, n, repeat=5, native=None: limits.Limits(isa, n, 1e10, 1e11, 1e10))
    command = ["kernels", "--only", "softmax case", "--isa", "generic", "-t", "1", "--json", str(tmp_path / "a.json")]
    assert main([*command, "--png", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "a.json").read_text())
    assert len(result["results"]) == 2 and result["machine"]["cores"] >= 1 and result["limits"][0]["read"] == 1e10
    assert (tmp_path / "roofline-generic.png").stat().st_size > 10_000
    for r in result["results"]:
        r["score"] = stats.summary([1e9])                                      # nothing is that fast
    (tmp_path / "old.json").write_text(json.dumps(result))
    assert main([*command, "--compare", str(tmp_path / "old.json")]) == 1
    assert "regressed softmax" in capsys.readouterr().out


# ---- models and peers ---------------------------------------------------------------------------------------------------


def test_work_of_a_model_is_counted_by_hand(kernels, tiny_gguf) -> None:
    import pyengine as pe
    from bench.work import generation_bytes, prompt_operations

    model = pe.load(tiny_gguf("llama")[0], n_ctx=64)
    tensors = model.file.tensors
    products = [t for name, t in tensors.items() if name.endswith(".weight") and len(t.shape) == 2 and name != "token_embd.weight"]
    untied = "output.weight" in tensors
    head = tensors["output.weight" if untied else "token_embd.weight"]
    bulk = sum(t.nbytes for t in tensors.values()) - (tensors["token_embd.weight"].nbytes if untied else 0)
    kv = sum(2 * s.nbytes_max // int(s.shape[1]) for s in model.program.prepared.states if s.ndim == 3) / 2
    got = generation_bytes(model.program, 3)
    extra = 4096 + 64 * 4 * 4                                                  # one row of the table, frequencies
    assert bulk + kv * 2 <= got <= bulk + kv * 2 + extra                       # 1, 2, 3 cells are seen: 2 on average
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("blk."))
    ops = 0
    for name, t in tensors.items():
        if t in products or t is head:
            once = t is head or (name.startswith(f"blk.{last}.") and name.split(".")[2] not in ("attn_k", "attn_v"))
            ops += 2 * int(np.prod(t.shape)) * (1 if once else 10)
    assert prompt_operations(model.program, 10) == ops                         # of the last layer only keys and values of all rows


# d_model 96; rows of q and of k and v; router; units of an expert's three matrices, experts of a row, experts; vocabulary
MIXTURES = {"qwen3moe": (192, 64, 12, 64, 4, 12, 512), "mixtral": (96, 32, 5, 160, 2, 5, 512)}


@pytest.mark.parametrize("kind", MIXTURES)
def test_work_of_a_mixture_is_that_of_the_experts_a_row_uses(kernels, tiny_gguf, kind: str) -> None:
    import pyengine as pe
    from bench.work import generation_bytes, prompt_operations

    model = pe.load(tiny_gguf(kind)[0], n_ctx=64)
    q, kv, router, units, used, n_experts, vocab = MIXTURES[kind]
    rest = 2 * 96 * (2 * q + router + used * 3 * units)    # a row's in a layer, but for keys and values
    assert prompt_operations(model.program, 10) == 2 * 10 * (rest + 2 * 96 * 2 * kv) + rest + 10 * 2 * 96 * 2 * kv + 2 * 96 * vocab
    experts = sum(t.nbytes for name, t in model.file.tensors.items() if "_exps." in name)
    assert experts == 3 * n_experts * 3 * 96 * units * 4
    once = model.file.tensors["token_embd.weight"].nbytes if "output.weight" in model.file.tensors else 0
    read = sum(t.nbytes for t in model.file.tensors.values()) - once - experts + experts * used // n_experts
    read += 3 * 2 * kv * 4 // 2 * 2                                             # f16, 3 layers, 2 cells on average
    read += 3 * (-n_experts % 16) * 96 * 4                                      # rows of routers are filled up to 16
    assert generation_bytes(model.program, 3) == read + 96 * 4 + q // 6 // 2 * 4    # a row of the table, frequencies


def test_a_text_alone_does_no_work_of_layers_that_attend_across(kernels, tiny_gguf) -> None:
    import pyengine as pe
    from bench.work import generation_bytes, prompt_operations

    model = pe.load(tiny_gguf("mllama")[0], n_ctx=64)
    across = {int(i) for i in model.file.metadata["mllama.attention.cross_attention_layers"]}
    rows = {f"blk.{i}." for i in range(model.file.metadata["mllama.block_count"]) if i not in across}
    last = f"blk.{model.file.metadata['mllama.block_count'] - 1}."
    assert last in rows and across
    count = read = 0
    for name, t in model.file.tensors.items():
        if name == "output.weight" or any(name.startswith(b) for b in rows):
            keys = name.removeprefix(last) in ("attn_k.weight", "attn_v.weight")
            once = name == "output.weight" or name.startswith(last) and not keys
            count += 2 * int(np.prod(t.shape)) * (1 if once else 10) * (len(t.shape) == 2)
            read += t.nbytes
    assert prompt_operations(model.program, 10) == count
    kv = sum(2 * int(s.shape[0]) * int(s.shape[2]) * 2 for s in model.program.prepared.states if s.ndim == 3) // 2
    kv = kv * len(rows) // (len(rows) + len(across))
    assert read + 2 * kv <= generation_bytes(model.program, 3) <= read + 2 * kv + 8192


def test_declared_operations_are_sums_over_weights(kernels) -> None:
    """What `work` reads from the registry holds for every op, and an op of another kind shows here."""
    from bench import work

    picked, counted = {}, set()
    for op in kernels.REGISTRY.values():
        picked |= {(op.name, name): by for name in op.args if (by := work.picked_by(op, name))}
        for case in op.cases if op.flops else ():
            many = {n: s if isinstance(s, list) else [] if s is None else [s] for n in op.args for s in (case.shapes.get(n),)}
            args = {n: [work.Sized(s) for s in v] if op.args[n].many else work.Sized(v[0]) if v else None for n, v in many.items()}
            params = {p.name: p.default for p in op.params.values()} | case.params
            whole = work.operations(op, args, params)
            assert whole >= 0 and (whole > 0) == all(all(s) for v in many.values() for s in v), op.name
            weights = work.weights_of(op)
            parts = [work.operations(op, {**args, n: w}, params) for n in weights for w in work.listed(args[n])]
            assert not weights or sum(parts) == whole, op.name
            counted.add(op.name)
    assert picked == {("rows", "table"): "ids", ("expert_linear", "w"): "chosen"}
    assert {(op.name, name) for op in kernels.REGISTRY.values() for name in op.sparse} <= picked.keys()
    assert {"linear", "expert_linear", "matmul", "attention", "rms_norm"} <= counted
    products = {op.name for op in kernels.REGISTRY.values() if work.weights_of(op)} - {"rows"}
    assert products <= counted, "a product with weights declares its operations"


def test_our_worker_measures_and_judges_a_model(kernels, tiny_gguf, monkeypatch, capsys) -> None:
    from bench import peers

    monkeypatch.setattr(limits, "read_bandwidth", lambda n, repeat=5, native=None: 1e10)
    monkeypatch.setattr(limits, "peak", lambda kind, isa, n, repeat=5, native=None: 1e12)
    path = tiny_gguf("llama")[0]
    found = peers.models([path], 1, 32, 8, 2)
    assert [r["name"] for r in found["results"]] == [f"{path.name} pp32", f"{path.name} tg8"]
    facts = found["files"][path.name]["facts"]["pyengine"]
    for r, limit in zip(found["results"], (1e12 / facts["prompt_operations"] * 32, 1e10 / facts["bytes_per_token"])):
        assert len(r["tokens_per_second"]["samples"]) == 2 and r["tokens_per_second"]["min"] > 0
        assert r["score"]["samples"] == pytest.approx([v / limit for v in r["tokens_per_second"]["samples"]])
    assert "of read" in capsys.readouterr().out


def test_parts_of_the_first_token_add_up(tiny_gguf) -> None:
    from bench import peers

    (found,) = peers.first_tokens(tiny_gguf("llama")[0], ["pyengine"], 1, 1)["pyengine"]
    parts = [found[f"{name}_seconds"] for name in ("import", "load", "prompt")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(found["seconds"])


def test_a_folder_says_which_engine_it_holds(tmp_path) -> None:
    from bench import __main__, engines

    for package, kind in engines.PACKAGES.items():
        (tmp_path / kind / package).mkdir(parents=True)
        assert engines.which("other", tmp_path / kind) == [kind, "--folder", str(tmp_path / kind)]
    args = __main__._parser().parse_args(["peers", "m.gguf", "--peer", f"other={tmp_path}"])
    assert dict(args.peer) == {"other": tmp_path}
    with pytest.raises(FileNotFoundError, match="holds none of the packages llama_cpp, ik_llama_cpp"):
        engines.which(*args.peer[0])


def test_a_worker_that_fails_is_an_error(tmp_path) -> None:
    from bench.engines import Engine

    with pytest.raises(RuntimeError, match="pyengine: the worker ended with exit code 1"):
        Engine("pyengine", tmp_path / "missing.gguf", 1)


def test_divergence_of_known_distributions() -> None:
    from bench.quality import divergence

    p, q = np.log(np.array([[0.5, 0.5], [0.9, 0.1]])), np.log(np.array([[0.5, 0.5], [0.5, 0.5]]))
    assert divergence(p, q) == pytest.approx([0, 0.9 * np.log(1.8) + 0.1 * np.log(0.2)])


class Spoken:
    """An engine of four tokens in a turn, which gives each the same probability after every text, and then says `says`."""

    n_vocab = 4

    def __init__(self, name: str, probabilities: list[float], says: int):
        self.name, self.p, self.says = name, probabilities, says

    def call(self, name: str, **arguments):
        match name:
            case "facts":
                return {"add_bos": False, "bos": 0, "eog": [3]}
            case "tokenize":
                return [i % 4 for i in range(len(arguments["text"]))]
            case "log_probabilities":
                np.save(arguments["file"], np.tile(np.log(np.float32(self.p)), (arguments["wanted"], 1)))
            case "greedy":
                return {"tokens": [0, self.says] * (arguments["n"] // 2), "gaps": [0.5] * arguments["n"]}


def test_quality_is_computed_from_the_engines_it_is_given(capsys) -> None:
    from bench import quality

    ours, theirs = Spoken("a", [0.25, 0.25, 0.25, 0.25], 1), Spoken("b", [0.5, 0.25, 0.125, 0.125], 2)
    found = quality.compare(ours, theirs, n_chunks=3)
    assert found["scored_tokens"] == 3 * 255                                   # of each second half all but the first token
    assert found["perplexity"]["a"] == pytest.approx(4)
    nats = 63 * np.log(2) + 64 * np.log(4) + 64 * np.log(8) + 64 * np.log(8)    # 256 in turn, without the first, which is 0
    assert found["perplexity"]["b"] == pytest.approx(np.exp(nats / 255))
    assert found["mean_kl"] == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2))   # 0.5 ln 2 + 0.25 ln 1 + 2 x 0.125 ln 0.5
    assert found["same_token_ids"] and found["greedy_equal"] == 0
    assert {(g["parted_at"], g["gap"]) for g in found["greedy"]} == {(1, 0.5)}
    assert "b's top two are within 0.500 nats" in capsys.readouterr().out
    same = quality.compare(ours, Spoken("b", ours.p, 1), n_chunks=1)
    assert same["max_kl"] == 0 and same["greedy_equal"] == len(quality.PROMPTS)
    theirs.n_vocab = 5
    with pytest.raises(RuntimeError, match="4 logits from a, 5 from b"):
        quality.compare(ours, theirs)


@pytest.mark.slow
def test_both_engines_say_the_same(kernels) -> None:
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python")
    from bench import quality
    from bench.engines import LLAMA, OURS, Engine
    from conftest import real_path

    path = real_path("smollm2")
    with Engine(LLAMA, path, 2, quality.N_CTX) as theirs, Engine(OURS, path, 2, quality.N_CTX) as ours:
        found = quality.compare(ours, theirs, n_chunks=2)
    ours, theirs = found["perplexity"]["pyengine"], found["perplexity"]["llama.cpp"]
    assert abs(ours / theirs - 1) < 0.005 and found["same_token_ids"]
    assert found["mean_kl"] < 6e-3                                             # both round activations: docs/benchmarks.md


# ---- vision -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def vision(kernels, monkeypatch):
    from bench import vision

    monkeypatch.setattr(limits, "peak", lambda kind, isa, n, repeat=5, native=None: 1e12)
    return vision


SMALL_ENCODER = {"layers": 2, "width": 64, "heads": 2, "mlp": 100, "patches": 50, "pixels": 27}


def test_work_of_an_encoder_is_counted_by_hand(vision) -> None:
    work = vision.Shape(**SMALL_ENCODER).operations()
    assert work["patch"] == 2 * 50 * 27 * 64
    assert work["products"] == 2 * 50 * (4 * 64 * 64 + 2 * 64 * 100)
    assert work["attention"] == 2 * (50 * 50 * 32 * 2) * 2                     # scores and values, of two heads
    full = vision.Shape(layers=27).operations()
    assert 27 * (full["products"] + full["attention"]) == pytest.approx(5.455e12, rel=1e-3)
    assert vision.picture_seconds(2.5, 0.5, vision.Shape(layers=2)) == 0.5 + 27


def test_zeros_around_the_mlp_change_nothing(vision) -> None:
    shape, rng = vision.Shape(**SMALL_ENCODER), np.random.default_rng(0)
    weights, patches = vision.random_weights(shape, rng), rng.standard_normal((50, 27)).astype(np.float32)
    padded = {n: vision._padded(a, n, 32) for n, a in weights.items()}
    assert padded["0.up"].shape == (128, 64) and padded["0.up.b"].shape == (128,) and padded["1.down"].shape == (64, 128)
    results = [vision.forward(vision.numpy_functions(w, 2), patches, shape, w["positions"]) for w in (weights, padded)]
    assert vision.error(*results) < 1e-12


@pytest.mark.parametrize("peer", ["torch", None])
def test_an_encoder_is_right_in_every_format(vision, capsys, peer: str | None) -> None:
    """Against PyTorch where it is asked for, else against NumPy."""
    if peer:
        pytest.importorskip("torch", reason="needs PyTorch: pip install torch")
    found = vision.run(2, vision.Shape(**SMALL_ENCODER), 2, [peer] if peer else [])
    shares = [r for r in found["results"] if "nmse" in r]
    assert [r["name"].split()[0] for r in shares] == list(vision.FORMATS)
    assert all(r["correct"] for r in shares)
    assert 1e-9 < shares[-1]["nmse"]                                           # Q8_0 rounds activations: not the same program
    names = [r["name"] for r in found["results"] if "nmse" not in r]
    assert names == [f"{f} / torch" for f in vision.FORMATS if peer] + ["Q8_0 / F32", "Q8_0 / F32, products", "Q8_0 / F32, attention"]
    for name, steps in found["profiles"].items():
        assert {"once linear patch", "linear q+k+v", "attention", "linear up", "unary", "linear down", "layer_norm"} < set(steps)
        assert sum(steps.values()) < np.mean(found["samples"][name])
    assert "a picture is scaled to 27 layers" in capsys.readouterr().out
    json.dumps(found)


def test_a_wrong_encoder_is_found(vision, monkeypatch) -> None:
    right = vision.Ours.call

    def slightly_wrong(self):
        y = right(self)
        y[3, 5] += 0.1
        return y

    monkeypatch.setattr(vision.Ours, "call", slightly_wrong)
    found = vision.run(1, vision.Shape(**SMALL_ENCODER), 1, formats=("F32",))
    assert not found["results"][0]["correct"]


# ---- whole encoders -----------------------------------------------------------------------------------------------------

TINY_TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
TINY_ENCODERS = {
    "gemma3": {"size": (224, 224), "n_ctx": 512,
               "vision": {"hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "image_size": 224},
               "text": {**TINY_TEXT, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64}},
    "qwen2.5-vl": {"size": (168, 112), "n_ctx": 256, "period": 2,
                   "vision": {"depth": 4, "hidden_size": 64, "intermediate_size": 100, "num_heads": 2, "out_hidden_size": 64,
                              "fullatt_block_indexes": [1, 3]},
                   "text": {**TINY_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6,
                                                             "mrope_section": [4, 6, 6]}}},
}


@pytest.fixture(scope="module")
def tiny_encoders(kernels, tmp_path_factory):
    """name -> (Encoder of few numbers, folder with its checkpoint and files of two layers)"""
    from dataclasses import replace

    pytest.importorskip("transformers", reason="needs transformers: pip install transformers torch")
    from bench import encoders

    made = {}
    for name, changes in TINY_ENCODERS.items():
        e = encoders.ENCODERS[name]
        e = replace(e, **{**changes, "vision": {**e.vision, **changes["vision"]}})
        made[name] = e, encoders._write(tmp_path_factory.mktemp("encoders") / name, e, 2, ("F32", "Q8_0"), 0)
    return made


@pytest.mark.parametrize("name", TINY_ENCODERS)
def test_engines_of_encoders_agree(tiny_encoders, name: str) -> None:
    from bench import encoder_worker, encoders

    e, folder = tiny_encoders[name]
    picture = np.load(folder / "picture.npy")
    want = encoder_worker.Torch(folder, "F32", picture, 1, e.n_ctx).encode()
    for format_name in ("F32", "Q8_0"):
        ours = encoder_worker.PyEngine(folder, format_name, picture, 1, e.n_ctx)
        ours.profile(True)
        rms = encoders.relative_rms(ours.encode(), want)
        assert (0 if format_name == "F32" else 1e-3) < rms < encoders.TOLERANCE[format_name]
        steps = ours.steps()
        inside = {label for label, inside, _ in steps if inside}
        outside = {label for label, inside, _ in steps if not inside}
        assert {"attention", "linear ffn_down"} <= inside and "attention" not in outside
        assert any("v.patch_embd" in s for s in outside) and any("mm." in s for s in outside)
        assert sum(s for *_, s in steps) > 0


def test_work_of_whole_encoders_is_counted_by_hand(tiny_encoders) -> None:
    from bench import encoder_worker

    def operations(name: str, format_name: str) -> dict[str, float]:
        e, folder = tiny_encoders[name]
        return encoder_worker.PyEngine(folder, format_name, np.load(folder / "picture.npy"), 1, e.n_ctx).facts()["operations"]

    patch, layer = 2 * 256 * 588 * 64, 2 * 256 * (4 * 64 * 64 + 2 * 64 * 100)
    attention, projection = 4 * 256 * 256 * 64, 2 * 256 * 64 * 64
    norms = 6 * 256 * 64 * 5 + 256 * 64                                        # two a layer and the last; a mean
    assert operations("gemma3", "F32") == {"int8": 0, "float": patch + 2 * layer + projection + norms, "attention": 2 * attention,
                                           "attention_int8": 0}
    n = 12 * 8                                                                 # patches, in windows of 8 x 8 and 4 x 8
    patch, layer = 2 * n * 1176 * 64, 2 * n * (4 * 64 * 64 + 3 * 64 * 128)     # filled up to blocks
    attention = 4 * 64 * (64 * 64 + 32 * 32 + n * n)                           # one layer of windows, one of all
    merger, norm = 2 * n // 4 * (256 * 256 + 256 * 64), 4 * n * 64             # other norms are part of a product
    assert operations("qwen2.5-vl", "Q8_0") == {"int8": 2 * layer + merger, "float": patch + norm, "attention": 0,
                                              "attention_int8": attention}


@pytest.mark.parametrize("name", TINY_ENCODERS)
def test_the_second_question_finds_the_picture(tiny_encoders, name: str) -> None:
    from bench.encoder_worker import Whole

    e, folder = tiny_encoders[name]
    model = Whole(folder, "Q8_0", np.load(folder / "picture.npy"), 1, e.n_ctx)
    for number in range(2):
        first, second = (model.turn(number)[part] for part in ("first", "second"))
        assert first["cached"] == [False] and first["encode_seconds"] > 0
        assert second["cached"] == [True] and second["encode_seconds"] == 0
        assert second["n_cached"] >= first["n_prompt"] - 1 and second["n_prompt"] > first["n_prompt"]


def test_memory_of_pictures_is_watched(tiny_encoders) -> None:
    from pathlib import Path

    from bench.encoder_worker import Watch, Whole, status

    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    gc.collect()                                              # what other tests have left is not let go of meanwhile
    before = status()["anon"]
    with Watch() as watch:
        held = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)       # malloc may have such a piece left
        held.write(bytes(32 << 20))
        end = time.monotonic() + 20
        while watch.peak["anon"] - before <= 30 << 20 and time.monotonic() < end:
            time.sleep(0.01)
        held.close()
    assert watch.peak["anon"] - before > 30 << 20
    e, folder = tiny_encoders["gemma3"]
    model = Whole(folder, "F32", np.load(folder / "picture.npy"), 1, e.n_ctx)
    assert {"encoder"} <= {i["purpose"] for i in model.ready()["plan"]}
    found = model.memory()
    assert found["first"]["rows"] == 256 * 64 * 4 and model.model.stats["image_misses"] == 2


def test_engines_are_judged_by_the_limits_and_each_other(kernels) -> None:
    from bench import encoders

    e = encoders.ENCODERS["gemma3"]
    samples = {("pyengine", "F32"): {"seconds": [2.0, 2.0], "cpu": [4.0, 4.0]},
               ("pyengine", "Q8_0"): {"seconds": [1.0, 1.0], "cpu": [2.0, 1.0]},
               ("llama.cpp", "Q8_0"): {"seconds": [8.0, 6.0], "cpu": [8.0, 8.0]},
               ("torch", "F32"): {"seconds": [5.0, 5.0], "cpu": [9.0, 9.0]}}
    operations = {"F32": {"int8": 0.0, "float": 60.0, "attention": 40.0, "attention_int8": 0.0},
                  "Q8_0": {"int8": 60.0, "float": 30.0, "attention": 0.0, "attention_int8": 20.0}}
    steps = {f: [("linear v.patch_embd", False, 0.4), ("attention", True, 1.0)] for f in operations}
    errors = dict.fromkeys(samples, 0.05)
    found = encoders._judged("x", e, 3, samples, operations, {"int8": 200.0, "fp32": 100.0}, errors, steps, 2)
    by_name = {r["name"]: r for r in found}
    assert by_name["x pyengine F32 share of the peaks"]["score"]["median"] == 0.5
    assert by_name["x pyengine Q8_0 share of the peaks"]["score"]["median"] == pytest.approx(0.7)
    assert by_name["x torch F32 share of the peaks"]["score"]["median"] == 0.2
    assert by_name["x pyengine F32 share of the peaks"]["picture_seconds"] == pytest.approx(0.2 + 1.8 * 9)
    assert not by_name["x pyengine F32 share of the peaks"]["correct"] and by_name["x pyengine Q8_0 share of the peaks"]["correct"]
    assert by_name["x Q8_0 / llama.cpp"]["score"]["samples"] == [8.0, 6.0] and "x F32 / llama.cpp" not in by_name
    faster = by_name["x Q8_0 / torch F32"]
    assert faster["score"]["median"] == 5 and faster["cpu_ratio"]["samples"] == [4.5, 9.0]
    with pytest.raises(SystemExit, match="must be a multiple"):
        encoders.run(["qwen2.5-vl"], 1, 12, 1, [], ["F32"], ["speed"], None, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY_ENCODERS)
def test_encoders_beside_other_engines(tiny_encoders, name: str, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python")
    from bench import encoders

    monkeypatch.setattr(limits, "peak", lambda kind, isa, n, repeat=5, native=None: 1e12)
    e = tiny_encoders[name][0]
    peers, measure = ["torch", "torch-bf16", "llama.cpp"], ["speed", "memory", "turns"]
    found = encoders.run([name], 1, 2, 2, peers, ["F32", "Q8_0"], measure, None, tmp_path, {name: e})
    results = {r["name"].removeprefix(f"{name} "): r for r in found["results"]}
    assert all(r.get("correct", True) for n, r in results.items() if "share" in n)
    assert all(results[f"llama.cpp {f} share of the peaks"]["relative_rms"] < 0.1 for f in ("F32", "Q8_0"))
    assert {f"{f} / {other}" for f in ("F32", "Q8_0") for other in ("torch F32", "torch BF16", "llama.cpp")} <= set(results)
    assert {"Q8_0 planned / resident", "Q8_0 first turn / second turn"} <= set(results)
    assert "own memory" in capsys.readouterr().out
    json.dumps(found)


def test_conversations_together(tiny_gguf, tmp_path, capsys) -> None:
    from bench.__main__ import main

    out = tmp_path / "together.json"
    assert main(["together", str(tiny_gguf("llama")[0]), "-s", "3", "-p", "20", "-n", "5", "-r", "2", "-t", "1", "--json", str(out)]) == 0
    (result,) = json.loads(out.read_text())["results"]
    assert result["conversations"] == 3 and result["correct"] and len(result["score"]["samples"]) == 2
    assert "answers equal" in capsys.readouterr().out


def test_prompt_lookup(tiny_gguf, tmp_path, capsys) -> None:
    from bench.__main__ import main

    out = tmp_path / "lookup.json"
    assert main(["lookup", str(tiny_gguf("llama")[0]), "-n", "12", "-r", "2", "-t", "1", "--json", str(out)]) == 0
    results = json.loads(out.read_text())["results"]
    assert [r["kind"] for r in results] == ["edit", "edit and explain", "question", "free"]
    assert all(r["correct"] and len(r["score"]["samples"]) == 2 and r["accepted"] <= r["drafted"] for r in results)
    assert "answers equal" in capsys.readouterr().out
    assert main(["lookup", str(tiny_gguf("llama")[0]), "-n", "4", "-r", "9", "--seconds", "0", "--kind", "free", "-t", "1", "--json", str(out)]) == 0
    (free,) = json.loads(out.read_text())["results"]
    assert free["kind"] == "free" and len(free["score"]["samples"]) == 1 and free["llama_cpp_ratio"] is None


def test_prompt_lookup_beside_another_server(tiny_gguf, tmp_path, capsys) -> None:
    """The command is told its threads, its places and how to look prompts up; what it says of its times is taken."""
    from bench.__main__ import main

    command, out = tmp_path / "llama-server", tmp_path / "lookup.json"
    command.write_text(f"#!{sys.executable}\n" + """
import http.server, json, sys
on = sys.argv[sys.argv.index("--spec-type") + 1] != "none"
assert sys.argv[sys.argv.index("-t") + 1] == "1" and sys.argv[sys.argv.index("-np") + 1] == "3"

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.told({"status": "ok"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["temperature"] == 0 and body["id_slot"] < 3 and body["cache_prompt"]
        n = body["n_predict"]
        drafts = {"draft_n": 4, "draft_n_accepted": 3} if on else {}
        self.told({"tokens": [1] * n, "timings": {"predicted_n": n, "predicted_ms": 1000 * (n - 1) * (0.25 if on else 0.5), **drafts}})

    def told(self, what):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(what).encode())

    def log_message(self, *args): pass

http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
""")
    command.chmod(0o755)
    assert main(["lookup", str(tiny_gguf("llama")[0]), "-n", "5", "-r", "2", "--kind", "free", "-t", "1", "--llama-server", str(command), "--json", str(out)]) == 0
    (free,) = json.loads(out.read_text())["results"]
    assert free["llama_cpp_ratio"]["median"] == 2 and free["rates"]["llama.cpp plain"]["median"] == 2
    assert "llama.cpp 2.0, with its lookup 4.0: 2.00 x, 9 of 12 accepted" in capsys.readouterr().out


# ---- widths -------------------------------------------------------------------------------------------------------------


def test_a_model_in_16_and_in_4_bits(tiny_gguf, tmp_path) -> None:
    """The narrow file is made from the wide one, or is the model's own where that has 4 bits already."""
    path, _ = tiny_gguf("llama", "f32")
    made = widths.both(path, tmp_path)
    assert widths.bits(made["F16"]) == 16 and widths.bits(made["4 bits"]) < 9 and made["4 bits"].stat().st_size < 0.6 * made["F16"].stat().st_size
    sparse = tmp_path / "narrow.gguf"
    converters.quantize.quantize_file(made["F16"], sparse, "Q4_0")
    assert widths.bits(sparse) < 6 and widths.both(sparse, tmp_path)["4 bits"] == sparse
    found = widths.measured(made, n_threads=1, rounds=1)
    assert found["F16"]["plan_bytes"] > found["4 bits"]["plan_bytes"] and found["4 bits"]["tg64"]["median"] > 0


# ---- vectors of sentences -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_vectors_of_sentences_beside_transformers(tmp_path, capsys) -> None:
    import tiny_towers
    import transformers

    from bench import vectors

    folder = tmp_path / "hf"
    folder.mkdir()
    tiny_towers.save_word_piece(folder)
    tiny_towers.make("BertModel", transformers.BertConfig(vocab_size=160, hidden_size=96, num_hidden_layers=2, num_attention_heads=6, intermediate_size=200), folder)
    found = vectors.run(folder, 1, 6, 2, ["torch"], ("F32", "Q8_0"), 512)
    assert [r["name"] for r in found["results"]] == ["embed pyengine F32", "embed pyengine Q8_0", "embed torch F32"]
    ours = found["results"][0]
    assert ours["correct"] and ours["cosine"] > 0.99999 and ours["over torch"] > 0 and found["tokens"] > 6 * 5 and len(ours["samples"]) == 2
    texts = vectors.sentences(tiny_towers.convert(folder, tmp_path / "m.gguf", "f32"), 50)
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) >= vectors.LEAST and max(lengths) <= vectors.MOST and texts == vectors.sentences(tmp_path / "m.gguf", 50)


@pytest.mark.slow
def test_convolutions_beside_torch(monkeypatch) -> None:
    from bench import convolutions

    monkeypatch.setattr(convolutions, "LAYERS", (("one", 12, 5, 20, 3, 1, 1, 1), ("depthwise", 9, 16, 16, 3, 1, 1, 16)))
    found = convolutions.run(2, True)["results"]
    assert [r["operations"] for r in found] == [2 * 144 * 45 * 20, 2 * 81 * 9 * 16]
    assert all(r["correct"] and r["over torch by time on the cores"] > 0 and len(r["samples"]) == 2 for r in found)
