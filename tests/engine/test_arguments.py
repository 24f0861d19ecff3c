"""What users give to the library: right values in any of their types are taken, everything else is a RequestError that names the field."""

from __future__ import annotations

import copy
import datetime
import decimal
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, HealthCheck, settings
from hypothesis import strategies as st

import pyengine as pe
from pyengine import ops
from pyengine.arguments import takes
from pyengine.chat.checks import check_messages
from pyengine.chat.template import ChatTemplate
from pyengine.errors import GraphError, ImageError, PyEngineError, RequestError


@pytest.fixture(scope="module")
def model(tiny_gguf):
    return pe.load(tiny_gguf("llama")[0], n_ctx=128, n_threads=1, n_seq=2)


@pytest.fixture(scope="module")
def seeing(tiny_gguf):
    return pe.load(tiny_gguf("gemma3")[0], n_ctx=256, n_threads=1, images=(100, 100))


def user(content: Any = "hello", **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content, **more}]


# -- names ----------------------------------------------------------------------------------------------------------------

def test_arguments_that_are_not_there_are_named_with_the_near_ones(model, tiny_gguf) -> None:
    path = tiny_gguf("llama")[0]
    for call, text in [
        (lambda: model.generate("x", temp=0), "generate: 'temp' is no argument; near: temperature"),
        (lambda: model.generate("x", max_new_tokens=3), "'max_new_tokens' is no argument; near: max_tokens"),
        (lambda: model.generate("x", n_predict=3), "near: max_tokens"),
        (lambda: model.generate("x", repetition_penalty=1.1), "near: repeat_penalty"),
        (lambda: model.generate("x", response_format={}), "'response_format' is no argument; there are prompt, images, max_tokens, stop, temp"),
        (lambda: model.stream("x", top=3), "stream: 'top' is no argument; near: top_k, top_p"),
        (lambda: model.chat(user(), seeds=3), "chat: 'seeds' is no argument; near: seed"),
        (lambda: model.generate_many(["x"], stops=[]), "generate_many: 'stops' is no argument; near: stop"),
        (lambda: model.stream_many(["x"], image=[]), "stream_many: 'image' is no argument"),
        (lambda: model.submit("x", temp=0), "submit: 'temp' is no argument; near: temperature"),
        (lambda: model.submit("x", client=[]), "submit: client is a text"),
        (lambda: model.submit("x", media_policy=5), "media_policy is a MediaPolicy"),
        (lambda: model.feed([1], batch=2), "feed: 'batch' is no argument"),
        (lambda: model.logits(ids=[1]), "logits: 'ids' is no argument; there are prompt"),
        (lambda: pe.SamplingParams(temp=0), "SamplingParams: 'temp' is no argument; near: temperature"),
        (lambda: pe.load(path, num_ctx=64), "load: 'num_ctx' is no argument; near: n_ctx"),
        (lambda: pe.load(path, ctx_size=64), "near: n_ctx"),
        (lambda: pe.plan(path, ctx=64), "plan: 'ctx' is no argument; near: n_ctx"),
        (lambda: pe.load(), "load: 'model' is missing"),
        (lambda: model.generate(), "generate: 'prompt' is missing"),
        (lambda: model.generate("a", prompt="b"), "'prompt' is given twice"),
        (lambda: model.generate("a", (), 1, None, 0.5), "takes at most 4 arguments without a name, got 5"),
    ]:
        with pytest.raises(RequestError) as e:
            call()
        assert text in str(e.value), str(e.value)


def test_faults_inside_of_a_function_stay_what_they_are() -> None:
    @takes()
    def f(a: int, b: int = 1, *, c: int = 2) -> int:
        return a + b + c

    assert f(1) == 4 and f(1, 2) == 5 and f(b=0, a=1) == 3 and f(1, c=0) == 2 and f.__name__ == "f"
    with pytest.raises(TypeError, match="unsupported operand"):
        f(None)


# -- values ---------------------------------------------------------------------------------------------------------------

def test_numbers_of_any_type_are_taken_and_become_plain() -> None:
    got = pe.SamplingParams(temperature=1, top_k=np.int64(3), top_p=np.float32(0.5), min_p=np.float16(0.25), typical_p=np.longdouble(1),
                            repeat_last_n=np.int8(-1), seed=np.uint64(2**63), logit_bias={np.int32(5): np.float32(-np.inf), 6: 1})
    assert got == pe.SamplingParams(1.0, 3, 0.5, 0.25, 1.0, 1.0, -1, seed=2**63, logit_bias=((5, -np.inf), (6, 1.0)))
    assert {type(v) for v in vars(got).values()} == {int, float, tuple}


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty", "frequency_penalty",
                                  "top_k", "repeat_last_n", "seed", "logprobs", "max_tokens"])
@pytest.mark.parametrize("value", [True, np.bool_(False), "1", b"1", [1], float("nan"), float("inf"), 10**400, 1j, decimal.Decimal(1),
                                   np.array(1), np.array([1.0]), np.float16("inf"), np.longdouble("1e4000")], ids=repr)
def test_what_is_no_number_is_refused(model, name: str, value: Any) -> None:
    if isinstance(value, int) and value > 1 and name == "max_tokens":
        return                                               # until the context is full
    with pytest.raises(RequestError, match=name):
        model.generate([1, 2], **{"max_tokens": 1, name: value})


@pytest.mark.parametrize("name", ["top_k", "repeat_last_n", "seed", "logprobs", "max_tokens"])
def test_whole_numbers_are_no_floats(model, name: str) -> None:
    with pytest.raises(RequestError, match=f"{name} must be an integer"):
        model.generate([1, 2], **{"max_tokens": 1, name: 1.0})


def test_settings_of_a_model_are_checked(tiny_gguf) -> None:
    path = tiny_gguf("llama")[0]
    for setting in [{"n_ctx": "64"}, {"n_ctx": 64.0}, {"n_ctx": True}, {"n_ctx": 10**30}, {"n_seq": None}, {"n_batch": None}, {"n_threads": 0},
                    {"n_threads": "2"}, {"kv_dtype": None}, {"kv_dtype": 5}, {"kv_dtype": ["f16"]}, {"device": 5}, {"device": np.zeros(2)},
                    {"device": []}, {"device": {"cpu:0": True}}, {"device": {5: 5}}, {"images": True}, {"images": (True, 2)}, {"images": "big"},
                    {"encoder_device": []}, {"expert_device": {}}, {"mmproj": 5}, {"model": 5}, {"model": None}, {"model": b"a"},
                    {"model": ""}, {"progress": 5}]:
        with pytest.raises(RequestError, match=next(iter(setting))):
            pe.load(**{"model": path, **setting})
        if "progress" not in setting:
            with pytest.raises(RequestError, match=next(iter(setting))):
                pe.plan(**{"model": path, **setting})
    assert pe.load(path, n_ctx=np.int64(32), n_batch=np.int32(8)).n_ctx == 32
    for reader in (pe.load_tokenizer, pe.GGUFFile):
        with pytest.raises(RequestError, match="a path is a text or a path object"):
            reader(0)                                        # not the file that is open under this number


def test_prompts_stops_and_ids_of_the_wrong_type(model) -> None:
    for call, text in [
        (lambda: model.generate(None), "a prompt is a text or a list of parts"),
        (lambda: model.generate(5), "a prompt is a text or a list of parts"),
        (lambda: model.generate(b"x"), "a prompt is a text or a list of parts"),
        (lambda: model.generate({"a": 1}), "a prompt is a text or a list of parts"),
        (lambda: model.generate(["x", None]), r"prompt\[1\]"),
        (lambda: model.generate("x", stop=5), "stop"),
        (lambda: model.generate("x", stop=b"x"), "stop"),
        (lambda: model.generate("x", stop={"x": 1}), "stop"),
        (lambda: model.generate("x", stop=["x", 5]), "stop"),
        (lambda: model.generate_many("x"), "prompts must be a list"),
        (lambda: model.generate_many({"x": 1}), "prompts must be a list"),
        (lambda: model.generate_many(None), "prompts must be a list"),
        (lambda: model.feed([2**31]), "token id"),
        (lambda: model.feed([1.5]), "token id"),
        (lambda: model.feed("12"), "token ids"),
        (lambda: model.feed([1], n_batch=-1), "n_batch"),
        (lambda: model.shift("a", 2), "start"),
        (lambda: list(model.logit_blocks([1], first=-1)), "first"),
        (lambda: list(model.logit_blocks(np.array(5))), "token ids"),
        (lambda: model.detokenize([1.5]), "token"),
        (lambda: model.detokenize(5), "ids"),
        (lambda: model.tokenize(5), "text"),
        (lambda: model.tokenize("x", add_special="no"), "add_special must be True or False"),
        (lambda: model.chat(user(), stream="no"), "stream must be True or False"),
        (lambda: model.save(5), "a path is a text or a path object"),
        (lambda: model.save("x", answer="x"), "answer"),
        (lambda: model.restore(None), "a path is a text or a path object"),
        (lambda: ChatTemplate(5), "a chat template is a text"),
    ]:
        with pytest.raises(RequestError, match=text):
            call()
    assert model.generate("x", stop=None, max_tokens=1, temperature=0).finish in ("stop", "length")


def test_a_feed_of_larger_steps_than_were_planned_is_cut(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=100, n_batch=16, n_threads=1)
    ids = list(range(3, 60))
    want = model.logits(ids)[-1]
    assert np.array_equal(model.feed(ids, n_batch=10**6), want)


# -- conversations --------------------------------------------------------------------------------------------------------

def test_roles_and_empty_conversations(model) -> None:
    for messages, text in [
        ([], "messages: there is none"),
        ((), "messages: there is none"),
        ([{"role": "users", "content": "x"}], r"messages\[0\].role: 'users' is no role; near: user"),
        ([*user(), {"role": "bot", "content": "x"}], r"messages\[1\].role: 'bot' is no role; there are system"),
        (user(None), r"messages\[0\].content: a message of the role 'user' needs one"),
        ([{"role": "user"}], r"messages\[0\].content"),
        ([*user(), {"role": "assistant", "content": None, "tool_calls": []}], r"messages\[1\].content: .* or tool_calls"),
        ([{"role": 5, "content": "x"}], r"messages\[0\].role"),
        (["x"], r"messages\[0\]"),
        (None, "messages"),
        (user(tool_calls=5), r"messages\[0\].tool_calls: a list of tool calls, not int"),
        (user(tool_calls=["x"]), r"messages\[0\].tool_calls\[0\]: a mapping"),
        (user(note=b"x"), r"messages\[0\].note: .* not bytes"),
        (user(note=[{"a": object()}]), r"messages\[0\].note\[0\].a: .* not object"),
        (user(images=5), r"messages\[0\].images"),
        (user([{"type": []}]), r"messages\[0\].content\[0\].type"),
        (user(tool_calls=[{"function": {"name": "f", "arguments": "[" * 100_000}}]), "arguments of a tool call are not JSON"),
    ]:
        for call in (model.chat, model.chat_ids):
            with pytest.raises(RequestError, match=text):
                call(messages)
    assert model.chat_ids([*user(), {"role": "assistant", "content": "x"}])
    check_messages([*user(), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}, {"role": "tool", "content": "5"}], "")


def test_a_role_that_the_template_names_is_a_role(model, monkeypatch) -> None:
    own = "{% for m in messages %}{% if m.role == 'observation' %}[{{ m.content }}]{% endif %}{% endfor %}"
    monkeypatch.setattr(model._language, "template", ChatTemplate(own))
    assert model.chat_ids([{"role": "observation", "content": "x"}]) == model.tokenize("[x]")
    with pytest.raises(RequestError, match="'observatio' is no role"):
        model.chat_ids([{"role": "observatio", "content": "x"}])


def test_tools_are_plain_values(model) -> None:
    deep: Any = []
    for _ in range(300):
        deep = [deep]
    for tools, text in [(5, "tools: a list of tools"), ("x", "tools: a list"), ({"a": 1}, "tools: a list"), ([5], r"tools\[0\]: a mapping"),
                        ([len], "parameter 'obj' has no type hint"), ([{"function": {"x": {1, 2}}}], r"tools\[0\].function.x: .* not set"),
                        ([{"function": datetime.date.today()}], r"tools\[0\].function: .* not date"), ([{"a": deep}], "nested deeper than 200")]:
        with pytest.raises(RequestError, match=text):
            model.chat(user(), tools=tools)


# -- anything -------------------------------------------------------------------------------------------------------------

class Mute:
    """An object that cannot even be shown."""

    def __repr__(self) -> str:
        raise ValueError("no")


LEAVES = (st.none() | st.booleans() | st.integers() | st.integers(-3, 3) | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
          | st.sampled_from([2**31, 2**70, 10**400, "\ud800", "\0", np.float32(0.5), np.float16("nan"), np.longdouble("1e4000"), np.int64(3),
                             np.uint64(2**63), np.bool_(True), np.str_("a"), np.datetime64("2020"), object(), len, decimal.Decimal(1), 1j,
                             Ellipsis, b"\x89PNG", bytearray(b"x"), memoryview(b"x"), range(3), np.zeros(3), np.zeros((2, 2, 3), np.uint8),
                             np.array(5), np.array(["a"]), np.array(None), "user", "text", "image"])
          | st.builds(Mute))
KEYS = st.sampled_from(["role", "content", "type", "text", "image", "images", "url", "image_url", "tool_calls", "function", "arguments", "video",
                        "data", "source", 0, None])
ANY = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.sets(st.integers(0, 3), max_size=2)
                   | st.dictionaries(KEYS, inner, max_size=4), max_leaves=10)
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool", "system", "x"]) | ANY, "content": ANY},
                                          optional={"tool_calls": ANY, "images": ANY, "x": ANY}), max_size=3) | ANY


def short(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a request that does not take long."""
    most = given.get("max_tokens", 1)
    return {**given, "max_tokens": min(most, 2) if isinstance(most, (int, np.integer)) else 1 if most is None else most}


ENTRIES: dict[str, tuple[Any, Callable[[Any, Any], Any]]] = {
    "arguments": (st.dictionaries(st.sampled_from([*pe.SamplingParams.__dataclass_fields__, "stop", "max_tokens", "images"]), ANY, max_size=3),
                  lambda m, x: m.generate([1, 2], **short(x))),
    "prompt": (st.lists(ANY, max_size=3) | ANY, lambda m, x: m.generate(x, max_tokens=1)),
    "images": (st.lists(ANY, max_size=3) | ANY, lambda m, x: m.generate("a", x, max_tokens=1)),
    "prompts": (st.lists(ANY, max_size=2) | ANY, lambda m, x: m.generate_many(x, max_tokens=1)),
    "messages": (MESSAGES, lambda m, x: m.chat(x, max_tokens=1)),
    "tools": (st.lists(ANY, max_size=2) | ANY, lambda m, x: m.chat(user(), tools=x, max_tokens=1)),
    "ids": (ANY, lambda m, x: (m.detokenize(x), m.feed(x), list(m.logit_blocks(x)))),
    "logits": (ANY, lambda m, x: m.logits(x)),
    "hidden": (ANY, lambda m, x: m.hidden(x)),
    "vectors": (st.lists(ANY, max_size=3) | ANY, lambda m, x: m.embed(x)),
    "how": (st.tuples(ANY, ANY), lambda m, x: m.embed("a", *x)),
    "steps": (st.tuples(ANY, ANY), lambda m, x: (m.feed([1], x[0]), m.shift(*x))),
    "picture": (ANY, lambda m, x: m.encode_image(x)),
    "session": (ANY.filter(lambda x: not isinstance(x, str)), lambda m, x: (m.restore(x), m.save(x))),
    "settings": (st.dictionaries(st.sampled_from("mmproj device n_ctx kv_dtype n_threads n_batch n_seq images encoder_device".split()), ANY, max_size=2),
                 lambda m, x: pe.plan(m.file.path, **x)),
    "media": (ANY, lambda m, x: (pe.open_image(x), pe.Image(x), pe.Video(x))),
    "options": (ANY, lambda m, x: (pe.Image(np.zeros((2, 2, 3), np.uint8), x), pe.Video([np.zeros((2, 2, 3), np.uint8)], fps=x))),
    "graph": (st.tuples(ANY, ANY, ANY), lambda m, x: (pe.Graph().input(*x), pe.Graph().constant(x[0]), pe.Graph().compile(x[0], x[1]))),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_anything_is_taken_or_refused_in_words(model, seeing, entry: str) -> None:
    values, call = ENTRIES[entry]

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(values)
    def any_value(value: Any) -> None:
        for m in (model, seeing):
            try:
                call(m, value)
            except PyEngineError as error:
                assert str(error)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                      # of NumPy's, about odd arrays
        any_value()


def test_pixels_options_and_arrays_of_runs() -> None:
    for call, error in [(lambda: pe.Image([[1], [1, 2]]), ImageError), (lambda: pe.Image(np.zeros((2, 2, 3), np.uint8), 5), RequestError)]:
        with pytest.raises(error):
            call()
    with pe.Graph() as g:
        x = g.input("x", (pe.Dim("m", max=4), 3))
        program = g.compile(x + x)
    for wrong in ("text", [[1], [1, 2]], None, {"a": 1}, np.zeros((2, 4))):
        with pytest.raises(GraphError):
            program.run(x=wrong)
    assert program.run(x=[[1, 2, 3]]).tolist() == [[2, 4, 6]]


# -- what is printed ------------------------------------------------------------------------------------------------------

def test_what_is_printed_says_what_it_is(model, seeing) -> None:
    n = sum(t.n_elements for t in model.file.tensors.values())
    assert repr(model) == f"Model(f32.gguf: llama, {n / 1000:.3g}k weights, context 128 x 2)"
    assert repr(model.plan).startswith("MemoryPlan(f32.gguf: context 128 x 2, kv f16, ") and repr(model.plan).endswith("MiB, fits)")
    assert repr(pe.Image(np.zeros((2, 3, 3), np.uint8))) == "Image(3x2)"
    with pe.Graph() as g:
        x, i = g.input("x", (pe.Dim("m", max=4), 3)), g.input("i", (4,), "I32")
        g.state("k", (2, 8))
        y = ops.rows(x, i)
    assert repr(g) == "Graph(x [m, 3], i [4] I32; states: k [2, 8])"
    assert repr(g.compile(y)) == "Program(x [m, 3], i [4] I32 -> [4, 3]; 1 steps)"
    stream = model.stream([1, 2], max_tokens=3, temperature=0, logit_bias=((model.tokenizer.eos_id, -np.inf),))
    assert repr(stream) == "Stream(not begun, 0 tokens)"
    answer = stream.answer()
    assert repr(stream) == "Stream(ended, 3 tokens)" and repr(answer) == f"Answer({str(answer)!r}, 3 tokens, finish='length')"


# -- answers --------------------------------------------------------------------------------------------------------------

def test_an_answer_shows_what_it_knows(model) -> None:
    answer = model.generate([1, 2, 3], max_tokens=4, temperature=0, logprobs=3, logit_bias=((model.tokenizer.eos_id, -np.inf),))
    names = "tokens finish sampled logprobs top_logprobs n_prompt n_cached prompt_seconds seconds media boxes".split()
    assert set(names) <= set(dir(answer)) and all(getattr(type(answer), n).__doc__ for n in names)
    with pytest.raises(AttributeError):
        answer.nothing
    assert answer.n_prompt == 3 and len(answer.tokens) == len(answer.logprobs) == len(answer.top_logprobs) == 4
    logits = model.logits([1, 2, 3, *answer.tokens]).astype(np.float64)[2:6]
    want = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for row, token, logprob, top in zip(want, answer.tokens, answer.logprobs, answer.top_logprobs, strict=True):
        assert abs(logprob - row[token]) < 1e-4
        assert [i for i, _ in top] == np.argsort(-row)[:3].tolist() and np.allclose([p for _, p in top], np.sort(row)[::-1][:3], atol=1e-4)


def test_an_answer_can_be_copied_and_sent(model) -> None:
    answer = model.generate([1, 2, 3], max_tokens=4, temperature=0)
    again = pickle.loads(pickle.dumps(answer))
    assert again == answer and again.tokens == answer.tokens and again.logprobs == answer.logprobs and again.report.conversation is None
    assert copy.copy(answer) is answer and copy.deepcopy([answer])[0] is answer and isinstance(answer.strip(), str)


def test_boxes_of_a_picture_that_is_not_there(seeing) -> None:
    answer = seeing.generate([1, np.zeros((5, 5, 3), np.uint8)], max_tokens=1)
    assert answer.boxes == answer.boxes_in(0) == answer.boxes_in(-1) == []
    for number in (1, -2, "a", 0.0):
        with pytest.raises(RequestError):
            answer.boxes_in(number)


def test_streams_of_many_come_as_they_are_made(model) -> None:
    options = {"max_tokens": 6, "temperature": 0, "logit_bias": ((model.tokenizer.eos_id, -np.inf),)}
    prompts = [[1, 2], [5, 6, 7], [9]]
    want = [model.generate(p, **options) for p in prompts]
    streams = model.stream_many(prompts, **options)
    assert repr(streams) == "Streams(0 of 3 ended)"
    pieces = list(streams)
    assert ["".join(piece for i, piece in pieces if i == n) for n in range(3)] == want
    assert {i for i, _ in pieces[:3]} == {0, 1}              # n_seq is 2: the third waits
    assert streams.answers() == want and [a.tokens for a in streams.answers()] == [a.tokens for a in want]
    begun = model.stream_many(prompts, **options)
    next(begun)
    assert begun.answers() == want


# -- closing --------------------------------------------------------------------------------------------------------------

def test_a_closed_model_says_so(tiny_gguf, tmp_path) -> None:
    path = tiny_gguf("gemma3")[0]
    with pe.load(path, n_ctx=128, n_threads=1, n_seq=3) as model:
        model.encode_image(np.zeros((30, 30, 3), np.uint8))
        running, waiting = model.stream([1, 2], max_tokens=50), model.stream([1, 2], max_tokens=50)
        next(running)
        waiting.begin()
        blocks = model.logit_blocks([1, 2, 3])
        next(blocks)
    assert model.closed and repr(model).endswith(", closed)") and model.plan.fits
    model.close()
    for use in (lambda: model.generate("x"), lambda: model.chat(user()), lambda: model.stream("x"), lambda: model.generate_many(["x"]),
                lambda: model.tokenize("x"), lambda: model.detokenize([1]), lambda: model.logits([1]), lambda: list(model.logit_blocks([1])),
                lambda: model.feed([1]), lambda: model.shift(0, 1), lambda: model.reset(), lambda: model.save(tmp_path / "s"),
                lambda: model.restore(tmp_path / "s"), lambda: model.encode_image(np.zeros((9, 9, 3), np.uint8)), lambda: model.tokenizer,
                lambda: model.template, lambda: model.stats, lambda: model.sampling_defaults, lambda: model.stop_defaults, lambda: model.__enter__(),
                lambda: next(blocks), lambda: list(running), lambda: next(waiting)):
        with pytest.raises(RequestError, match="f32.gguf is closed"):
            use()
    running.close()
    waiting.close()


def test_closing_frees_the_memory(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("gemma3")[0], n_ctx=128, n_threads=1)
    model.encode_image(np.zeros((30, 30, 3), np.uint8))
    stream = model.stream([1, 2], max_tokens=5)
    next(stream)
    owners = [weakref.ref(x) for x in (model.program, model.media, model.media._program, model._runner, model.file)]
    model.close()
    gc.collect()
    assert [owner() for owner in owners] == [None] * len(owners)


def test_closing_ends_what_was_queued(tiny_gguf) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=100, n_threads=1)
    handles = [model.submit([1, 2, i], max_tokens=90, logit_bias={model.tokenizer.eos_id: -np.inf}) for i in range(3, 6)]
    next(handles[0])
    model.close()
    assert all(h.done for h in handles) and handles[2].finish == "cancelled" and handles[2].result() == ""
    with pytest.raises(RequestError, match="is closed"):
        model.submit([1, 2])


def test_a_model_is_not_closed_within_a_step(tiny_gguf, monkeypatch) -> None:
    model = pe.load(tiny_gguf("llama")[0], n_ctx=64, n_threads=1)
    step = model._runner.run

    def closing(work: Any) -> Any:
        with pytest.raises(RequestError, match="a step of the model is being run"):
            model.close()
        return step(work)

    monkeypatch.setattr(model._runner, "run", closing)
    model.generate([1, 2], max_tokens=2)
    assert not model.closed
