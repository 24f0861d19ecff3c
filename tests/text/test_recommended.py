"""What a model's files recommend: sampling keys, Ollama's Modelfile, generation_config.json; and rows without a token."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest

import pyengine as pe
from pyengine.engine.language import Language
from pyengine.errors import InvalidModelError, ModelNotFoundError, ModelWarning, RequestError, UnsupportedModelError
from pyengine.files import stores
from pyengine.files.gguf import GGUFFile
from pyengine.files.model_files import open_files
from pyengine.files.stores import find_model, list_models, look_up, Modelfile, read_modelfile
from pyengine.text.sampling import ollama_sampling, Sampler, sampling_defaults, sampling_params, SamplingParams

D, HEADS = 384, 12                     # one row of the embedding for each token, so that a token's state is its own axis
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def write(path: Path, n_padding: int = 0, follows: dict[int, dict[int, float]] | None = None, named: bool = False, **keys: object) -> Path:
    """Write a model of one layer whose attention and feed-forward give nothing: logits are a table, `follows[last token][next]`.

    n_padding: rows of the head beyond the tokens; `named` gives them the names of a converter.
    """
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "A", "B", "C"]
    kinds = [2, 3, 3] + [6] * 256 + [1] * 3
    n = len(tokens) + n_padding
    if named:
        kinds += [5] * n_padding
        tokens += [f"[PAD{i}]" for i in range(len(tokens), n)]
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(64), w.add_embedding_length(D), w.add_block_count(1), w.add_feed_forward_length(32), w.add_head_count(HEADS)
    w.add_head_count_kv(1), w.add_layer_norm_rms_eps(1e-5), w.add_rope_dimension_count(32), w.add_tokenizer_model("llama")
    w.add_token_list(tokens), w.add_token_scores([0.0] * len(tokens)), w.add_token_types(kinds), w.add_add_space_prefix(False)
    w.add_chat_template(TEMPLATE)
    for key, value in keys.items():
        key = f"general.sampling.{key}"
        {int: w.add_int32, float: w.add_float32, str: w.add_string}[type(value)](key, value)
    head = np.zeros((n, D), np.float32)
    for last, table in (follows or {}).items():
        for token, logit in table.items():
            head[token, last] = logit / math.sqrt(D)     # the normed state of a token is sqrt(D) on its axis
    w.add_tensor("token_embd.weight", np.eye(n, D, dtype=np.float32)), w.add_tensor("output.weight", head)
    w.add_tensor("output_norm.weight", np.ones(D, np.float32))
    for name in ("attn_norm", "ffn_norm"):
        w.add_tensor(f"blk.0.{name}.weight", np.ones(D, np.float32))
    for name, shape in {"attn_q": (D, D), "attn_k": (32, D), "attn_v": (32, D), "attn_output": (D, D), "ffn_gate": (32, D), "ffn_up": (32, D),
                        "ffn_down": (D, 32)}.items():
        w.add_tensor(f"blk.0.{name}.weight", np.zeros(shape, np.float32))
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    return path


A, B, C = 259, 260, 261


# ---------------------------------------------------------------------------------------------------------------------
# Rows of the head that no token has


def test_rows_without_a_token_are_never_drawn(tmp_path):
    padding = {C + 1 + i: 9.0 for i in range(30)}
    path = write(tmp_path / "m.gguf", 30, {A: {B: 5, C: 4, **padding}, B: {A: 5, **padding}, C: {A: 5, **padding}})
    model = pe.load(path, n_ctx=64, n_threads=1)
    assert model.n_vocab == C + 31 and model.tokenizer.vocab_size == C + 1
    assert model.generate("A", max_tokens=4, temperature=0) == "BABA"
    for seed in range(20):
        answer = model.generate("A", max_tokens=5, temperature=3.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed, logprobs=40)
        assert all(drawn.token <= C and all(token <= C for token, _ in drawn.top) for drawn in answer.sampled)
    first = model.generate("A", max_tokens=1, temperature=0, logprobs=1).sampled[0]
    assert first.logprob == pytest.approx(-math.log(1 + math.exp(-1) + 259.0 * math.exp(-5) + math.exp(-5)), abs=0.02)     # of tokens alone
    with pytest.raises(RequestError, match="logit_bias"):
        model.generate("A", max_tokens=1, logit_bias={C + 1: 1.0})
    assert model.logits("A").shape[1] == C + 31                                # plain steps give the model's rows


def test_rows_that_a_converter_named_are_drawn(tmp_path):
    """As transformers and llama.cpp do: what has a token, also an unused one, is as likely as the model says."""
    path = write(tmp_path / "m.gguf", 30, {A: {B: 5, C + 30: 9.0}}, named=True)
    model = pe.load(path, n_ctx=64, n_threads=1)
    assert model.n_vocab == model.tokenizer.vocab_size == C + 31
    assert model.generate("A", max_tokens=1, temperature=0).tokens == [C + 30]


# ---------------------------------------------------------------------------------------------------------------------
# Keys general.sampling.*


def test_the_files_settings_are_the_defaults_of_a_model(tmp_path):
    table = {A: {A: 3.0, B: 2.9}, B: {A: 3.0, B: 2.9}}
    plain = pe.load(write(tmp_path / "plain.gguf", follows=table), n_ctx=64, n_threads=1)
    model = pe.load(write(tmp_path / "m.gguf", follows=table, temp=0.0, top_k=20), n_ctx=64, n_threads=1)
    assert plain.sampling_defaults == {} and model.sampling_defaults == {"temperature": 0.0, "top_k": 20}
    assert model.generate("A", max_tokens=8, seed=1) == "A" * 8                                  # greedy
    for given in ({}, {"top_k": 2}):
        assert plain.generate("A", max_tokens=8, seed=1, **given) == model.generate("A", max_tokens=8, seed=1, temperature=0.8, **{"top_k": 40, **given})


def test_keys_have_the_names_of_gguf_py():
    keys = gguf.Keys.General
    meta = {keys.SAMPLING_TEMP: np.float32(0.6).item(), keys.SAMPLING_TOP_K: 20, keys.SAMPLING_TOP_P: np.float32(0.95).item(),
            keys.SAMPLING_MIN_P: 0.0, keys.SAMPLING_PENALTY_REPEAT: np.float32(1.05).item(), keys.SAMPLING_PENALTY_LAST_N: -1,
            keys.SAMPLING_MIROSTAT: 2, keys.SAMPLING_MIROSTAT_TAU: 4.0, keys.SAMPLING_MIROSTAT_ETA: np.float32(0.2).item(),
            keys.SAMPLING_XTC_PROBABILITY: 0.5, keys.SAMPLING_XTC_THRESHOLD: np.float32(0.2).item(), keys.SAMPLING_SEQUENCE: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sampling_defaults(meta)
    more = {"mirostat": 2, "mirostat_tau": 4.0, "mirostat_eta": 0.2, "xtc_probability": 0.5, "xtc_threshold": 0.2}
    assert found == {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "repeat_penalty": 1.05, "repeat_last_n": -1, **more}
    assert sampling_params(found, {"temperature": 0}) == SamplingParams(0, 20, 0.95, 0.0, repeat_penalty=1.05, repeat_last_n=-1, **more)


@pytest.mark.parametrize("key, value", [("temp", -1.0), ("temp", math.nan), ("top_p", 1.5), ("min_p", "0.1"), ("top_k", 2**40), ("top_k", 1.5),
                                        ("penalty_repeat", 0.0), ("penalty_last_n", -2), ("temp", True), ("temp", [1.0]), ("mirostat", 3),
                                        ("xtc_probability", 1.5)])
def test_values_out_of_range_are_ignored_with_a_warning(key, value):
    with pytest.warns(ModelWarning, match="general.sampling.* is ignored"):
        assert sampling_defaults({f"general.sampling.{key}": value, "general.sampling.top_p": 0.9} if key != "top_p" else
                                 {f"general.sampling.{key}": value}).keys() <= {"top_p"}


def test_another_order_of_steps_is_named():
    with pytest.warns(ModelWarning, match="general.sampling.sequence: .*order"):
        assert sampling_defaults({"general.sampling.sequence": "temperature;top_k"}) == {}


def test_all_tokens_by_a_negative_top_k():
    assert sampling_defaults({"general.sampling.top_k": -1}) == {"top_k": 0}


# ---------------------------------------------------------------------------------------------------------------------
# generation_config.json


def converted(tmp_path: Path, config: object) -> dict:
    from converters.generation import write_sampling

    (tmp_path / "generation_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    out = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    write_sampling(tmp_path, out)
    return {key: value.value for key, value in out.kv_data[0].items() if "sampling" in key}


def test_a_converter_writes_the_authors_settings(tmp_path):
    assert converted(tmp_path, {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05, "do_sample": True, "min_p": None}) == {
        "general.sampling.temp": 0.6, "general.sampling.top_k": 20, "general.sampling.top_p": 0.95, "general.sampling.penalty_repeat": 1.05,
        "general.sampling.penalty_last_n": -1}
    assert converted(tmp_path, {"eos_token_id": 2}) == {}


@pytest.mark.parametrize("config", ["{", "[" * 100_000, {"temperature": "0.6"}, {"top_k": 1.5}, {"top_k": True}, {"top_p": [1]}, '{"temperature": NaN}'])
def test_malformed_settings_of_a_checkpoint_are_named(tmp_path, config):
    with pytest.raises(InvalidModelError, match="generation_config.json"):
        converted(tmp_path, config)


# ---------------------------------------------------------------------------------------------------------------------
# Ollama's store


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    for name in ("PYENGINE_MODELS", "OLLAMA_MODELS", "HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stores, "_OLLAMA_SERVICE", str(tmp_path / "service/models"))
    return tmp_path


def ollama(root: Path, name: str, model: bytes | Path = b"GGUF", missing: str = "", **layers: bytes | str | list) -> Path:
    """Put a model into a store: a blob for each layer, a manifest that names them."""
    entries, blobs = [], root / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    for number, (kind, content) in enumerate([("model", model.read_bytes() if isinstance(model, Path) else model), *layers.items()]):
        digest = f"{abs(hash((name, kind))):x}{number}".rjust(64, "0")[:64]
        content = content.encode() if isinstance(content, str) else content if isinstance(content, bytes) else json.dumps(content).encode()
        if kind != missing:
            (blobs / f"sha256-{digest}").write_bytes(content)
        entries.append({"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}"})
    path = root / "manifests/registry.ollama.ai/library" / name / "latest"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"layers": entries}))
    return blobs / entries[0]["digest"].replace(":", "-")


@pytest.mark.skipif(os.sys.platform != "linux", reason="Ollama's service is Linux's")
def test_models_of_the_service_are_found(home):
    own, service = ollama(home / ".ollama/models", "own"), ollama(home / "service/models", "shared")
    ollama(home / "service/models", "own")
    assert find_model("shared") == service and find_model("own") == own
    assert [m.name for m in list_models()] == ["own:latest", "own:latest", "shared:latest"]


def test_a_folder_is_searched_once(home, monkeypatch):
    path = ollama(home / "service/models", "shared")
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "service/models"))
    assert find_model("shared") == path and len(list_models()) == 1


@pytest.mark.skipif(os.sys.platform != "linux" or os.geteuid() == 0, reason="root may read everything")
def test_a_closed_service_is_named(home):
    ollama(home / "service/models", "shared")
    (home / "service").chmod(0)
    try:
        with pytest.raises(ModelNotFoundError, match="group ollama|-G ollama"):
            find_model("shared")
    finally:
        (home / "service").chmod(0o700)


def test_a_damaged_model_is_named_and_no_other(home):
    store = home / ".ollama/models"
    for name in ("one", "two"):
        ollama(store, name, missing="model")
    good = ollama(store, "good")
    with pytest.raises(ModelNotFoundError, match="^'one' is there, but cannot be used: .*one.latest: blob .* is missing$") as error:
        find_model("one")
    assert "two" not in str(error.value)
    with pytest.raises(ModelNotFoundError) as error:
        find_model("three")
    assert "missing" not in str(error.value) and "one" not in str(error.value).replace("none", "")
    assert find_model("good") == good


def test_what_goes_with_a_model_is_read(home):
    store = home / ".ollama/models"
    ollama(store, "pirate", system="You are a pirate.", template="{{ .Prompt }}", params={"temperature": 0, "stop": ["X"], "num_ctx": 2048}, adapter=b"lora",
           license="MIT", messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Arr"}])
    found = read_modelfile(look_up("pirate"))
    assert (found.system, found.template, found.license) == ("You are a pirate.", "{{ .Prompt }}", "MIT")
    assert found.parameters == {"temperature": 0, "stop": ["X"], "num_ctx": 2048} and len(found.adapters) == 1
    assert [m["content"] for m in found.messages] == ["Hi", "Arr"]
    ollama(store, "plain")
    assert read_modelfile(look_up("plain")) == Modelfile() == read_modelfile(look_up(look_up("plain").path))


@pytest.mark.parametrize("layers, says", [
    ({"params": "{"}, "params"), ({"params": "[1]"}, "params"), ({"params": "[" * 100_000}, "params"), ({"messages": "{}"}, "messages"),
    ({"messages": [{"role": 1}]}, "messages"), ({"messages": ["x"]}, "messages"), ({"system": "x" * (stores.MAX_LAYER_BYTES + 1)}, "system.*larger"),
    ({"system": "x", "missing": "system"}, "missing.*system"), ({"template": "x", "missing": "template"}, "missing.*template"),
])
def test_hostile_layers_are_refused(home, layers, says):
    ollama(home / ".ollama/models", "bad", **layers)
    with pytest.raises(InvalidModelError, match=f"bad:latest.*{says}"):
        open_files("bad")
    assert [m.name for m in list_models()] == ["bad:latest"]


def test_a_missing_license_is_no_fault(home):
    ollama(home / ".ollama/models", "x", license="MIT", missing="license")
    assert read_modelfile(look_up("x")).license == ""


def test_a_modelfile_is_used(home):
    path = write(home / "m.gguf", follows={ord("]") + 3: {A: 5.0}, A: {B: 5.0}, B: {C: 5.0}, C: {A: 5.0}}, temp=0.7, top_k=30)
    ollama(home / ".ollama/models", "pirate", model=path, system="S", params={"temperature": 0, "stop": ["C"], "num_ctx": 9, "seed": -1},
           messages=[{"role": "user", "content": "q"}])
    model = pe.load("pirate", n_ctx=64, n_threads=1)
    assert model.sampling_defaults == {"temperature": 0, "top_k": 30} and model.stop_defaults == ("C",)
    assert model.generate("A", max_tokens=5) == "B" and model.generate("A", max_tokens=5, stop=()) == "BCABC"
    assert model.generate("A", max_tokens=3, stop="A") == "BC"
    said = model.detokenize(model.chat_ids([{"role": "user", "content": "A"}]))
    assert said.removeprefix("<s>") == "[system]S[user]q[user]A"
    said = model.detokenize(model.chat_ids([{"role": "system", "content": "T"}, {"role": "user", "content": "A"}]))
    assert said.removeprefix("<s>") == "[user]q[system]T[user]A"


def test_parameters_that_cannot_be_followed_are_named():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ollama_sampling({"temperature": 1, "top_k": 64, "num_gpu": 1, "mirostat": 1, "mirostat_tau": 2.0, "tfs_z": 1, "stop": None}) == {
            "temperature": 1, "top_k": 64, "mirostat": 1, "mirostat_tau": 2.0}
    for wrong in ({"mirostat": 7}, {"unheard_of": 1}, {"temperature": "hot"}, {"logit_bias": []}):
        with pytest.warns(ModelWarning, match=f"{next(iter(wrong))}.* is ignored"):
            assert ollama_sampling(wrong) == {}


def test_stops_of_a_modelfile_are_checked(home):
    meta = GGUFFile(write(home / "m.gguf")).metadata
    assert Language(meta, Modelfile(parameters={"stop": "x"})).stop_defaults == ("x",)
    for wrong in (5, [1], {"a": 1}):
        with pytest.raises(InvalidModelError, match="stop"):
            Language(meta, Modelfile(parameters={"stop": wrong})).stop_defaults


# ---------------------------------------------------------------------------------------------------------------------
# Arguments of another kind


HUGE = 10**5000                        # Python does not print it


@pytest.mark.parametrize("name, values", [
    ("temperature", ["0.5", None, -1, math.nan, math.inf, HUGE, True, [1.0], np.array([0.1, 0.2]), 1j]),
    ("top_p", ["1", 1.1, -0.1, math.nan, True, HUGE]), ("min_p", ["1", 2, math.nan]), ("typical_p", ["1", 2, False]),
    ("top_k", [1.0, 40.5, "40", -1, HUGE, True, None, np.float32(3)]), ("repeat_penalty", [0, 1e-60, "1", HUGE]),
    ("repeat_last_n", [-2, 1.5, HUGE, "64"]), ("presence_penalty", ["0", math.nan, HUGE]), ("frequency_penalty", [None, -math.inf]),
    ("seed", [-1, 2**64, 1.0, "1", True, HUGE]), ("logprobs", [-1, 1.5, True, HUGE, 10**6]),
    ("logit_bias", [5, None, "ab", [1, 2], [(1, 2, 3)], [("1", 0.5)], [(1, "x")], [(-1, 1)], [(1.5, 1)], [(HUGE, 1)], [(1, HUGE)], [(1, math.nan)], {"5": 1.0},
                    [(1, math.inf)], [(True, 1.0)], [(1, np.zeros(2))], [(1, True)]]),
])
def test_settings_of_another_kind_are_refused_by_name(name, values):
    for value in values:
        with pytest.raises(RequestError, match=name):
            Sampler(SamplingParams(**{name: value}), 300)


def test_settings_of_every_number_type_are_taken():
    given = SamplingParams(np.float32(0.5), np.int64(3), 1, seed=np.uint64(2**64 - 1), logit_bias={np.int32(3): np.float16(1), 4: -math.inf, 5: 2})
    assert given.logit_bias == ((3, 1.0), (4, -math.inf), (5, 2.0)) and Sampler(given, 300).sample(np.zeros(300, np.float32)).token == 5


def test_a_setting_that_does_not_exist_is_named_with_what_is_near(tmp_path):
    model = pe.load(write(tmp_path / "m.gguf"), n_ctx=64, n_threads=1)
    for given, near in (({"temp": 0}, "temperature"), ({"topk": 1}, "top_k")):
        with pytest.raises(RequestError, match=f"{next(iter(given))}.*{near}"):
            model.generate("A", **given)
    for wrong in ("5", 1.5, -1, True, HUGE.__neg__(), [1]):
        with pytest.raises(RequestError, match="max_tokens"):
            model.generate("A", max_tokens=wrong)
    for wrong in (5, [1], [""], True):
        with pytest.raises(RequestError, match="stop"):
            model.generate("A", stop=wrong)
    assert model.generate("A", max_tokens=0, stop=None) == ""


@pytest.mark.parametrize("ids", [[1.5], ["1"], "12", [None], [True], [HUGE], [-HUGE], 5, None, np.array([1.0]), [[1]]])
def test_ids_of_another_kind_are_refused(tmp_path, ids):
    tokenizer = pe.load_tokenizer(write(tmp_path / "m.gguf"))
    with pytest.raises(RequestError, match="token|ids"):
        tokenizer.detokenize(ids)


@pytest.mark.parametrize("text", [None, 5, ["a"], bytearray(b"a"), 1.5])
def test_texts_of_another_kind_are_refused(tmp_path, text):
    with pytest.raises(RequestError, match="text"):
        pe.load_tokenizer(write(tmp_path / "m.gguf")).tokenize(text)


@pytest.mark.parametrize("go, differs", [("", False), ("[{{ .Role }}]", False), ("{{ .Prompt }}</s>", True), ("<s>{{ .Prompt }}", True)])
def test_a_template_of_another_form_is_said_aloud(tmp_path, go, differs):
    """The file's own has no special token."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert Language(GGUFFile(write(tmp_path / "m.gguf")).metadata, Modelfile(template=go)).template.source == TEMPLATE
    assert [w.category for w in said] == ([ModelWarning] if differs else [])


@pytest.mark.parametrize("ids", [[1.5], ["1"], [True], [HUGE], [-1], [10**9], None, 5, [None], [[1]], np.array([1.0])])
def test_ids_of_another_kind_are_refused_by_each_step(tmp_path, ids):
    model = pe.load(write(tmp_path / "m.gguf"), n_ctx=64, n_threads=1)
    for step in (model.feed, lambda given: list(model.logit_blocks(given))):
        with pytest.raises(RequestError, match="token id"):
            step(ids)
    if ids != ["1"]:                       # a text is a part of a prompt
        for step in (model.generate, model.logits):
            with pytest.raises(RequestError):
                step(ids)
    assert model.feed(np.array([A, B])).shape == model.feed([A]).shape == (model.n_vocab,)


def test_prompts_of_another_kind_are_refused(tmp_path):
    model = pe.load(write(tmp_path / "m.gguf"), n_ctx=64, n_threads=1)
    for given, name in (({"prompt": None}, "prompt"), ({"prompt": b"A"}, "prompt"), ({"prompt": "A", "images": 5}, "images"),
                        ({"prompt": "A", "images": "a.png"}, "takes no pictures")):          # one picture is a list of one
        with pytest.raises(RequestError, match=name):
            model.generate(**given)
    for prompts in ("AB", 5, None):
        with pytest.raises(RequestError, match="prompts"):
            model.generate_many(prompts)
