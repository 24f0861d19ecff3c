"""Conversations whose cells are compressed: what stays is what the papers' equations say, the budget is exact, and nobody else moves a bit of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

import cases
import pyengine as pe
import tiny_sources
from answers import told
from converters.writer import convert
from pyengine.cache import eviction
from pyengine.cache.cells import Conversation
from pyengine.cache.compression.base import Compression
from pyengine.errors import ContextOverflowError, RequestError, SessionError, UnsupportedModelError
from pyengine.media.policy import MediaPolicy
from pyengine.programs.rows import lay_out_rows

IDS = np.random.default_rng(5).integers(0, 300, 200).tolist()
SETTINGS: dict[str, Any] = {"n_ctx": 256, "n_batch": 32, "kv_dtype": "f32"}
SEEING = ("qwen2_vl", "gemma3")                               # M-RoPE; pictures that see themselves, and layers that slide


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (50, 70, 3), dtype=np.uint8))


def prompt(kind: str, n: int = 100) -> list[Any]:
    seen = [picture(1), 8, picture(2)] if cases.find(kind).sees else []
    return [*IDS[: n // 2], *seen, *IDS[n // 2 : n]]


def ask(model: Any, parts: list[Any], n: int = 8, **more: Any) -> Any:
    never = tuple((i, -1e9) for i in model.tokenizer.eog_ids)
    return model.generate(parts, max_tokens=n, temperature=0.7, seed=1, logit_bias=never, **more)


class Seen:
    """What each layer held before and after a compression."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.found: list[dict[str, Any]] = []
        original = eviction.Content.compress

        def compress(content: eviction.Content, new: np.ndarray, n_threads: int) -> None:
            keys, values = content.layer.states
            before = [s.gather(content.old).view(np.float32) for s in (keys, values)]
            original(content, new, n_threads)
            after = [s.gather(new).view(np.float32) for s in (keys, values)]
            self.found.append({"layer": content.layer.number, "sums": content.statistics, "text": content.is_text, "before": before, "after": after,
                               "tokens": content.tokens, "queries": content.queries, "place": len(content.s), "kept": content.s.kept[content.layer.number]})

        monkeypatch.setattr(eviction.Content, "compress", compress)


def look_m(sums: np.ndarray, text: np.ndarray, budget: int, recent: float = 0.5) -> list[int]:
    """Choose one head's tokens by LOOK-M's equations 3 and 4: text first, then what was attended to, and the last ones."""
    n, m = len(sums), max(1, int(recent * budget))
    scores = [float(s) + (float(max(sums)) if is_text else 0.0) for s, is_text in zip(sums, text)]
    best = sorted(range(n - m), key=lambda j: (-scores[j], j))[: budget - m]
    return sorted([*best, *range(n - m, n)])


def pivotal(kept: list[int], keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge one head's evicted rows by LOOK-M's equations 5 and 7, in float64."""
    keys, values = keys.astype(np.float64), values.astype(np.float64)
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    homes: dict[int, list[int]] = {c: [] for c in kept}
    for e in set(range(len(keys))) - set(kept):
        homes[kept[int(np.argmax(unit[kept] @ unit[e]))]].append(e)
    out = [np.stack([(x[c] + sum((x[e] + x[c]) / 2 for e in sorted(homes[c]))) / (1 + len(homes[c])) for c in kept]) for x in (keys, values)]
    return out[0], out[1]


@pytest.mark.parametrize("kind", ["llama", *SEEING])
def test_what_stays_is_what_the_paper_says(tiny_gguf, monkeypatch, kind: str) -> None:
    seen, policy = Seen(monkeypatch), pe.LookM(ratio=0.3, merge="pivotal")
    model = pe.load(tiny_gguf(kind)[0], compress=policy, **SETTINGS)
    answer = ask(model, prompt(kind), 1)
    n, layers = answer.n_prompt, [layer.number for layer in eviction.compressed(model._runner.store)]
    assert [f["layer"] for f in seen.found] == layers and layers
    budget = int(0.3 * n)
    for f in seen.found:
        for h in range(len(f["kept"])):
            kept = look_m(f["sums"][h, :, 0], f["text"][h], budget)
            assert f["kept"][h].tolist() == kept
            for found, wanted in zip((f["after"][0][h], f["after"][1][h]), pivotal(kept, f["before"][0][h], f["before"][1][h])):
                np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    held = model.cells_held()
    assert (held.n_tokens, held.n_cells) == (n, budget)
    if cases.find(kind).sees:
        assert not seen.found[0]["text"].all() and seen.found[0]["text"].any()


@pytest.mark.parametrize("kind", ["llama", *SEEING])
@pytest.mark.parametrize("policy", [pe.LookM(ratio=0.3), pe.H2O(budget=37), pe.SnapKV(ratio=0.25, window=8), pe.RoCo(ratio=0.3),
                                    pe.StreamingLLM(ratio=0.3), pe.LookM(budget=90, when="always"), pe.SnapKV(budget=90, when="always")], ids=repr)
def test_results_do_not_depend_on_cuts_threads_and_neighbours(tiny_gguf, kind: str, policy: Compression) -> None:
    path, results = tiny_gguf(kind)[0], []
    for settings in ({}, {"n_batch": 7, "n_threads": 1}, {"n_batch": 256, "n_threads": 2}, {"n_seq": 3}):
        model = pe.load(path, compress=policy, **{**SETTINGS, **settings})
        if "n_seq" in settings:
            streams = [model.stream([*IDS[k : k + 60]], max_tokens=30, temperature=0) for k in (3, 40)]
            for stream in streams:
                next(stream, None)
        results.append(told(ask(model, prompt(kind), 40)))
        model.close()
    assert results.count(results[0]) == len(results)


@pytest.mark.parametrize("policy", [pe.LookM(ratio=0.99999), pe.H2O(budget=1000, when="always"), pe.RoCo(budget=250)], ids=repr)
def test_a_budget_for_all_changes_nothing(tiny_gguf, policy: Compression) -> None:
    path = tiny_gguf("llama")[0]
    plain = told(ask(pe.load(path, **SETTINGS), prompt("llama"), 8))
    model = pe.load(path, compress=policy, **SETTINGS)
    found = told(ask(model, prompt("llama"), 8))
    assert (found == plain) is (policy.ratio is None)        # 0.99999 of 100 is 99
    assert told(ask(model, prompt("llama"), 8, compress=False)) == plain


def test_the_budget_holds_while_prompt_and_answer_grow(tiny_gguf, monkeypatch) -> None:
    policy = pe.LookM(budget=50, when="always")
    model = pe.load(tiny_gguf("llama")[0], compress=policy, **SETTINGS)
    cells, most = model._runner.cells, []
    extend = type(cells).extend

    def watched(self: Any, s: Conversation, n: int, *args: Any, **more: Any) -> Any:
        found = extend(self, s, n, *args, **more)
        most.append(self.filled(0, s) + n)
        return found

    monkeypatch.setattr(type(cells), "extend", watched)
    answer = ask(model, IDS[:150], 90)
    assert len(answer.tokens) == 90 and max(most) == 60 == cells.groups[0].slots
    assert model.cells_held().n_tokens == 239 and 50 <= model.cells_held().n_cells <= 60
    assert model.plan.of("kv") < pe.plan(tiny_gguf("llama")[0], **SETTINGS).of("kv") / 3
    with pytest.raises(ContextOverflowError, match="60"):
        ask(model, IDS[:150], 1, compress=False)
    assert model.logits(IDS[:150]).shape[0] == 150           # plain steps, too
    with pytest.raises(RequestError, match="smaller budget"):
        ask(model, IDS[:20], 1, compress=pe.H2O(budget=60, when="always"))


@pytest.mark.parametrize("kind", SEEING)
@pytest.mark.parametrize("policy", [pe.SnapKV(budget=30, when="always", window=4), pe.VLCache(budget=30, when="always"), pe.VLCache(budget=30, when="always", window=3)],
                         ids=repr)
def test_cells_are_let_go_of_between_pictures(tiny_gguf, monkeypatch, kind: str, policy: Compression) -> None:
    parts = [*IDS[:25], *(part for i in range(5) for part in (picture(i), IDS[i], IDS[i + 1])), *IDS[25:60]]
    path, places, compress = tiny_gguf(kind)[0], [], eviction.compress

    def watched(store: Any, s: Conversation, *args: Any) -> None:
        places.append(len(s))
        compress(store, s, *args)

    monkeypatch.setattr(eviction, "compress", watched)
    seen, found = Seen(monkeypatch), []
    for settings in ({}, {"n_batch": 6, "n_threads": 1}, {"n_batch": 256, "n_threads": 2}):
        places.clear()
        seen.found.clear()
        model = pe.load(path, compress=policy, **{**SETTINGS, **settings})
        found.append((told(ask(model, parts, 20)), list(places), [f["kept"].tolist() for f in seen.found]))
        rows, bounds = lay_out_rows(model._prompts.prompt(parts).segments, model._axes), model._runner.bounds
        limit = bounds.limit(model._runner.cells.conversations[0])[0]
        model.close()
    assert found.count(found[0]) == 3
    filled, done = 0, 0
    for place in places:                                     # where the next picture does not fit; never within one that does
        filled, done = filled + place - done, place
        within = [(first, len(m)) for first, m in rows.media if first <= place < first + len(m)]
        assert filled == limit or within and within[0][0] == place and filled + within[0][1] > limit
        assert not within or within[0][0] == place or within[0][1] > limit - 30
        filled = 30
    for f in seen.found:                                     # each row that counts gives one to all keys together
        place = f["place"]
        begun = max((first for first, _ in rows.media if first < place), default=0)
        before = max((p for p in places if p < place), default=0)
        n = place - max(before, place - policy.window if policy.window else 0, begun if isinstance(policy, pe.VLCache) else 0)
        np.testing.assert_allclose(f["sums"][..., 0].sum(1), n * f["queries"], rtol=1e-4)


@pytest.mark.parametrize("policy", [pe.LookM(ratio=0.3), pe.LookM(budget=40, when="always")], ids=repr)
def test_a_conversation_goes_on(tiny_gguf, policy: Compression) -> None:
    model = pe.load(tiny_gguf("llama")[0], compress=policy, n_seq=2, **SETTINGS)
    first = ask(model, IDS[:100])
    longer = [*IDS[:100], *first.tokens[:-1], *IDS[100:130]]
    second = ask(model, longer)
    assert second.n_cached == 107                            # all that the caches have of it
    again = ask(model, IDS[:100])
    assert again.n_cached == 0 and told(again) == told(first)                  # a prompt is read anew: its end is needed
    if policy.when == "prompt":
        assert ask(model, longer, compress=False).n_cached == 0                # a compressed prefix is another prefix
    assert ask(model, longer, compress=pe.H2O(budget=41, when=policy.when)).n_cached == 0
    other = ask(model, [*IDS[:90], *IDS[150:170]])
    assert other.n_cached == 0


def test_pages_are_given_back(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama")[0], compress=pe.LookM(ratio=0.2), n_seq=2, **{**SETTINGS, "n_ctx": 512})
    cells = model._runner.cells
    free = len(cells._free[0])
    ask(model, IDS + IDS[:100], 1)
    assert free - len(cells._free[0]) == 1                   # 60 of 300 tokens
    model.reset()
    assert len(cells._free[0]) == free


def test_an_interrupted_prompt_is_read_anew(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama")[0], compress=pe.SnapKV(ratio=0.3, window=8), n_seq=2, **SETTINGS)
    want = told(ask(model, IDS[:150]))
    model.reset()
    stream = model.stream(IDS[:120])
    stream.begin()
    stream.advance()                                         # a part of it
    assert 0 < len(model._runner.cells.conversations[0]) < 120
    stream.close()
    assert model._runner.cells.conversations and told(ask(model, IDS[:150])) == want


@pytest.mark.parametrize("kv_dtype", ["f16", "bf16", "q8_0", "q8_0/q4_0"])
def test_formats_of_the_cache(tiny_gguf, kv_dtype: str) -> None:
    path, settings = tiny_gguf("gemma3_text")[0], {**SETTINGS, "kv_dtype": kv_dtype}
    model, whole = pe.load(path, compress=pe.H2O(ratio=0.5), **settings), pe.load(path, **settings)
    states = []
    for one in (model, whole):
        ask(one, IDS[:100], 1)
        layer = next(layer for layer in one._runner.store.layers if one._runner.cells.groups[layer.group].policy.whole)
        s = one._runner.cells.conversations[0]
        cells = one._runner.cells.cells_of(layer.group, s, np.arange(one._runner.cells.filled(layer.group, s)))
        states.append((s.kept.get(layer.number), [state.gather(cells) for state in layer.states]))
    (kept, small), (_, full) = states
    for a, b in zip(small, full):                            # not a byte of what stays is changed
        assert a.shape[1] == 50 and (a == np.take_along_axis(b, kept[..., None], 1)).all()
    assert told(ask(pe.load(path, compress=pe.LookM(ratio=0.5), **settings), IDS[:100]))


@pytest.mark.parametrize(("policy", "kind"), [(pe.LookM(ratio=0.3), "gemma3"), (pe.LookM(budget=80, when="always"), "qwen2_vl"), (pe.StreamingLLM(ratio=0.3), "llama")])
def test_sessions(tiny_gguf, tmp_path, policy: Compression, kind: str) -> None:
    path = tiny_gguf(kind)[0]
    model = pe.load(path, compress=policy, **SETTINGS)
    first = ask(model, prompt(kind))
    assert model.save(tmp_path / "a", first) == (tmp_path / "a").stat().st_size
    longer = [*prompt(kind), *first.tokens, *IDS[:20]]
    on = ask(model, longer)
    other = pe.load(path, compress=policy, **{**SETTINGS, "n_seq": 2})
    n = other.restore(tmp_path / "a")
    again = ask(other, longer)
    assert again.n_cached == on.n_cached == n == first.n_prompt + 7 and told(again) == told(on)
    with pytest.raises(SessionError, match="compress="):
        pe.load(path, **SETTINGS).restore(tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    for at in range(40, len(data), len(data) // 50):
        (tmp_path / "b").write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
        with pytest.raises(SessionError):
            other.restore(tmp_path / "b")


def test_a_model_is_laid_out_anew_for_another_policy(tiny_gguf) -> None:
    path = tiny_gguf("llama")[0]
    want = told(ask(pe.load(path, compress=pe.RoCo(ratio=0.3), **SETTINGS), IDS[:100]))
    model = pe.load(path, **SETTINGS)
    plain, kv = told(ask(model, IDS[:100])), model.plan.of("kv")
    assert model.compression is None and told(ask(model, IDS[:100], compress="roco:ratio=0.3")) == want
    assert model.plan.of("kv") > kv and model.compression is None and told(ask(model, IDS[:100])) == plain
    assert told(ask(model, IDS[:100], compress={"policy": "roco", "ratio": 0.3})) == want
    handle = model.submit(IDS[:50], max_tokens=3, compress=pe.H2O(ratio=0.5))
    assert len(handle.result().tokens) == 3
    with pytest.raises(RequestError, match="load it with"):
        model.submit(IDS[:50], compress=pe.VLCache(ratio=0.5), media_policy=MediaPolicy())
    more = model.submit(IDS[:150], max_tokens=50)
    with pytest.raises(RequestError, match="at work"):
        model.submit(IDS[:50], compress=pe.VLCache(ratio=0.5))
    more.cancel()
    more.result()
    found = model.submit(IDS[:100], compress=pe.VLCache(ratio=0.5), max_tokens=8, temperature=0).result()
    assert told(found) == told(model.generate(IDS[:100], compress=pe.VLCache(ratio=0.5), max_tokens=8, temperature=0))


def test_laying_out_anew_keeps_what_the_model_was_loaded_for(tiny_gguf, monkeypatch) -> None:
    path = tiny_gguf("llama")[0]
    plain = pe.load(path, **SETTINGS)
    whole, steps = told(ask(plain, IDS[:150])), plain.stats["steps"]
    assert told(ask(plain, IDS[:150], compress=pe.LookM(budget=50, when="always"))) != whole
    assert told(ask(plain, IDS[:150])) == whole and plain.stats["steps"] > 2 * steps      # a context of cells is still there
    model = pe.load(path, compress=pe.RoCo(ratio=0.3), **SETTINGS)
    want = told(ask(model, IDS[:150]))
    late = model.stream(IDS[:150])
    ask(model, IDS[:150], compress=pe.VLCache(ratio=0.3))
    with pytest.raises(RequestError, match="ask again"):
        late.answer()
    assert told(ask(model, IDS[:150])) == want               # of another layout, which comes back
    blocks = model.logit_blocks(IDS[:100])
    next(blocks)
    with pytest.raises(RequestError, match="at work"):
        ask(model, IDS[:50], compress=pe.VLCache(ratio=0.3))
    blocks.close()
    run_on, failed = type(model)._run_on, []

    def fails(self: Any, *args: Any) -> None:
        if not failed:
            failed.append(1)
            raise MemoryError
        run_on(self, *args)

    monkeypatch.setattr(type(model), "_run_on", fails)
    with pytest.raises(MemoryError):
        ask(model, IDS[:50], compress=pe.VLCache(ratio=0.3))
    assert told(ask(model, IDS[:150])) == want


def test_a_beginning_of_an_answer_is_gone_on_from(tiny_gguf) -> None:
    path, policy = tiny_gguf("llama")[0], pe.LookM(ratio=0.3)
    model = pe.load(path, compress=policy, n_seq=2, **SETTINGS)
    waiting = model.stream(IDS[:10], max_tokens=50)
    next(waiting)
    ask(model, IDS[20:180])                                  # leaves its sums in the second row
    waiting.close()
    for s in list(model._runner.cells.conversations):
        model._runner.cells.drop(s)
    never = tuple((i, -1e9) for i in model.tokenizer.eog_ids)
    stream = model.stream(IDS[:100], max_tokens=60, temperature=0.7, seed=1, logit_bias=never)
    while len(stream.report.tokens) < 20:
        next(stream)
    longer = [*IDS[:100], *stream.report.tokens[:5], *IDS[100:180]]
    answer = ask(model, longer)
    assert answer.n_cached == 105 and answer.report.conversation.row == 1
    alone = pe.load(path, compress=policy, **SETTINGS)
    ask(alone, IDS[:100], 6)
    want = ask(alone, longer)
    assert want.n_cached == 105 and told(answer) == told(want)


def test_states_are_not_gone_on_from_before_a_compression(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("qwen3_next")[0], compress=pe.SnapKV(budget=12, window=2), n_seq=3, **SETTINGS)
    first = ask(model, IDS[:100], 30)
    assert ask(model, [*IDS[:97], *IDS[100:120]]).n_cached == 0
    found = []
    for _ in range(2):
        answer = ask(model, [*IDS[:100], *first.tokens[:5], *IDS[100:120]])
        assert answer.n_cached == 100                        # the state behind the prompt, where it was compressed
        found.append(told(answer))
        model.reset()
        ask(model, IDS[:100], 1)
    assert found[0] == found[1]


def test_requests_that_have_no_cells_do_not_end_others(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama")[0], compress=pe.LookM(budget=50, when="always"), n_seq=2, **SETTINGS)
    want = told(ask(model, IDS[:20], 30))
    handle = model.submit(IDS[:20], max_tokens=30, temperature=0.7, seed=1, logit_bias=tuple((i, -1e9) for i in model.tokenizer.eog_ids))
    with pytest.raises(ContextOverflowError, match="60"):
        model.submit(IDS[:61], compress=False)
    grown = model.submit(IDS[:50], max_tokens=60, compress=False, temperature=0, logit_bias=tuple((i, -1e9) for i in model.tokenizer.eog_ids))
    assert len(grown.result().tokens) == 11 and grown.report.finish == "length"           # 60 cells, and a token that takes none
    assert told(handle.result()) == want
    assert model.hidden(IDS[:150]).shape[0] == 150 and model.embed([IDS[:150]]).shape[0] == 1
    with pytest.raises(RequestError, match="smaller budget"):
        model.submit(IDS[:20], compress=pe.H2O(budget=1000))


def test_a_budget_leaves_room_for_a_picture_in_one_step(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("gemma3")[0], compress=pe.LookM(budget=20, when="always"), **SETTINGS)
    assert model._runner.bounds.atom == 4
    assert ask(model, prompt("gemma3"), 30).tokens
    with pytest.raises(RequestError, match="in one step"):
        ask(model, prompt("gemma3"), 30, compress=pe.LookM(budget=21, when="always"))


@pytest.mark.parametrize("kind", ["gemma3n", "qwen3_next"] + ["mllama"])
def test_a_row_gives_one_to_all_keys_together(tiny_gguf, monkeypatch, kind: str) -> None:
    seen = Seen(monkeypatch)
    model = pe.load(tiny_gguf(kind)[0], compress=pe.RoCo(ratio=0.3), **SETTINGS)
    n = ask(model, IDS[:90], 1).n_prompt
    layers = eviction.compressed(model._runner.store)
    assert seen.found and (kind != "gemma3n" or any(layer.readers > 1 for layer in layers))
    for f, layer in zip(seen.found, layers):                 # the mean of the layers that share these keys
        np.testing.assert_allclose(f["sums"][..., 0].sum(1), n * layer.queries, rtol=1e-4)


def test_a_window_is_counted_anew_where_all_was_kept(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama")[0], compress=pe.SnapKV(budget=60, window=8), **SETTINGS)
    first = ask(model, IDS[:50], 1)
    layer, s = eviction.compressed(model._runner.store)[0], first.report.conversation
    assert model.cells_held().n_cells == 50 and not layer.sums.gather(eviction.cells_of_sums(model._runner.store, s, layer)).any()


def test_a_layer_that_gets_most_cells_has_room_to_grow(tiny_gguf, monkeypatch) -> None:
    policy = pe.VLCache(budget=40, when="always")
    monkeypatch.setattr(pe.VLCache, "budgets", lambda self, statistics, *args: [40 * len(statistics), *[1] * (len(statistics) - 1)])
    model = pe.load(tiny_gguf("llama", num_hidden_layers=8)[0], compress=policy, **{**SETTINGS, "n_ctx": 1024})
    answer = ask(model, IDS * 3, 100)
    s, cells = answer.report.conversation, model._runner.cells
    assert len(answer.tokens) == 100 and cells.groups[0].slots == 192
    assert cells.filled(0, s) > 180 and sum(cells.filled(i, s) for i in range(8)) <= 8 * 48


def test_what_cannot_be_compressed_says_so(tiny_gguf, tmp_path) -> None:
    folder = tiny_sources.make(next(iter(cases.sources().values())), tmp_path / "hf")
    with pytest.raises(UnsupportedModelError, match="no layers"):
        pe.load(convert(folder, tmp_path / "reads.gguf", "f32"), compress=pe.H2O(ratio=0.5))
    for wrong in (0.2, True, "best", {"policy": "best"}, ["h2o"]):
        with pytest.raises(RequestError):
            pe.load(tiny_gguf("llama")[0], compress=wrong)
    model = pe.load(tiny_gguf("llama")[0], compress=pe.H2O(ratio=0.5), **SETTINGS)
    first = ask(model, IDS[:60])
    with pytest.raises(RequestError, match="compressed"):
        model._runner.store.shift(first.report.conversation, 3, 5)


def test_a_step_that_fails_leaves_no_half_compressed_conversation(tiny_gguf, monkeypatch) -> None:
    model = pe.load(tiny_gguf("llama")[0], compress=pe.H2O(ratio=0.5), n_seq=2, **SETTINGS)
    want = told(ask(model, IDS[:60]))
    model.reset()
    original, calls = eviction.Content.compress, []

    def fails(content: eviction.Content, new: np.ndarray, n_threads: int) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(content, new, n_threads)

    monkeypatch.setattr(eviction.Content, "compress", fails)
    with pytest.raises(KeyboardInterrupt):
        ask(model, IDS[:60])
    assert not model._runner.cells.conversations and len(model._runner.cells._free[0]) == len(model._runner.cells._refs[0])
    assert told(ask(model, IDS[:60])) == want


def test_plans_say_what_rests(tiny_gguf) -> None:
    plan = pe.plan(tiny_gguf("llama")[0], compress="look-m:ratio=0.2", **SETTINGS)
    assert any("51 cells" in note for note in plan.notes)
