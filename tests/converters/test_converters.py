"""Converted files against their checkpoints: read back with gguf-py, and run by llama.cpp beside transformers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from converters import convert, gemma3_text, llama, llama4, mixtral, qwen2, qwen3, qwen3moe
from converters.__main__ import main
from converters.rope import interleaved_rows
from converters.tokenizer import pre_tokenizer_name
from pyengine.errors import InvalidModelError, PyEngineError, UnsupportedModelError

transformers = pytest.importorskip("transformers", reason="pip install transformers torch")

import cases  # noqa: E402
import tiny  # noqa: E402
from foreign import llama_cpp_logits  # noqa: E402
from tiny import ROPES, make_checkpoint  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TEXT = cases.kinds(sees=False)
NORMAL, CONTROL, USER_DEFINED, UNUSED = (int(getattr(gguf.TokenType, n))
                                         for n in ("NORMAL", "CONTROL", "USER_DEFINED", "UNUSED"))


def read(path):
    """Return a file's keys, its tensors in float32, and the type of each tensor."""
    reader = gguf.GGUFReader(path)
    keys = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("GGUF.")}
    values = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    return keys, values, {t.name: t.tensor_type.name for t in reader.tensors}


def stored(folder):
    """Return the checkpoint's tensors as transformers' own library reads them, in float32."""
    from safetensors.torch import load_file

    return {name: t.float().numpy() for file in sorted(folder.glob("*.safetensors"))
            for name, t in load_file(file).items()}


def edit(file, **changes):
    """Change values of a JSON file; None removes one."""
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One checkpoint of each kind, shared by tests that do not change it."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = make_checkpoint(kind, tmp_path_factory.mktemp(kind) / "checkpoint")      # llama.cpp looks for "phi3" in names
        return made[kind]
    return get


# --- which architectures ----------------------------------------------------------------------------------------------

def test_tools_are_no_converters():
    """Looking for converters loads none of the tools, nor what only tools need."""
    code = ("import sys; from converters import supported; supported(); "
            "print(*sorted({'.'.join(m.split('.')[:2]) for m in sys.modules if m.startswith('converters.')}))")
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    packages = {p.parent.name for p in (ROOT / "converters").glob("*/__init__.py")}
    assert {"quantize", "weights", "demo"} <= packages
    assert {m.removeprefix("converters.") for m in loaded} == {
        p.stem for p in (ROOT / "converters").glob("*.py") if not p.stem.startswith("_")}


EXAMPLE = """
from .contract import converts
from .llama import Llama


@converts({names})
class Example(Llama):
    arch = "example"
"""


def test_a_module_is_all_that_an_architecture_needs(checkpoints, tmp_path, monkeypatch):
    import converters
    from converters import contract

    converters.supported()                                  # what is there registers itself once
    monkeypatch.setattr(converters, "__path__", [*converters.__path__, str(tmp_path)])
    monkeypatch.setattr(contract, "_CONVERTERS", dict(contract._CONVERTERS))
    (tmp_path / "example.py").write_text(EXAMPLE.format(names='"ExampleForCausalLM"'))
    try:
        assert converters.supported()["ExampleForCausalLM"].arch == "example"
        folder = make_checkpoint("llama", tmp_path / "c")
        edit(folder / "config.json", architectures=["ExampleForCausalLM"])
        assert read(convert(folder, tmp_path / "m.gguf"))[0]["general.architecture"] == "example"
        (tmp_path / "again.py").write_text(EXAMPLE.format(names='"ExampleForCausalLM"'))
        with pytest.raises(TypeError, match="ExampleForCausalLM is converted by both converters.example and converters.again"):
            converters.supported()
    finally:
        for name in ("example", "again"):
            sys.modules.pop(f"converters.{name}", None)
            converters.__dict__.pop(name, None)


# --- keys -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", TEXT)
def test_keys(kind, checkpoints, tmp_path):
    keys, _, _ = read(convert(checkpoints(kind), tmp_path / "m.gguf", "f16"))
    arch, expected = cases.find(kind).arch, cases.find(kind).converted.keys
    assert {k.removeprefix(f"{arch}."): v for k, v in keys.items() if k.startswith(f"{arch}.")} == expected
    assert {k: v for k, v in keys.items() if k.startswith("general.")} == {
        "general.architecture": arch, "general.type": "model", "general.name": "checkpoint", "general.file_type": 1,
        "general.quantization_version": 2}


@pytest.mark.parametrize("defaults, config_class", [
    (llama.DEFAULTS, "LlamaConfig"), (qwen2.DEFAULTS, "Qwen2Config"), (gemma3_text.DEFAULTS, "Gemma3TextConfig"),
    (llama4.TEXT, "Llama4TextConfig"),
    ({k: v for k, v in llama.DEFAULTS.items() if not k.endswith("_bias")}, "MistralConfig"),
    ({k: v for k, v in mixtral.Mixtral.defaults.items() if not k.endswith("_bias")}, "MixtralConfig"),
    (qwen3.DEFAULTS, "Qwen3Config"), (qwen3moe.DEFAULTS, "Qwen3MoeConfig"), ({"sliding_window": llama.MISTRAL_WINDOW}, "MistralConfig")])
def test_defaults_are_those_of_transformers(defaults, config_class):
    config_class = getattr(transformers, config_class)
    assert {name: getattr(config_class, name) for name in defaults} == defaults


def test_rope_bases_are_those_of_transformers():
    assert llama.ROPE_BASE == qwen2.ROPE_BASE == transformers.LlamaConfig.default_theta
    assert transformers.Qwen2Config.default_theta == qwen2.ROPE_BASE
    assert transformers.MixtralConfig.default_theta == mixtral.Mixtral.rope_base
    assert transformers.Llama4TextConfig.default_theta == llama4.ROPE_BASE
    assert transformers.Gemma3TextConfig.default_theta == {"global": gemma3_text.GLOBAL_BASE,
                                                           "local": gemma3_text.LOCAL_BASE}


@pytest.mark.parametrize("rope", ["default", "llama3", "linear", "yarn"])
def test_old_and_new_config_give_the_same_file(rope, tmp_path):
    new_rope = ROPES.get(rope, {"rope_type": "default", "rope_theta": 5e5})
    folder = make_checkpoint("llama", tmp_path / "c", rope_parameters=dict(new_rope))
    new = convert(folder, tmp_path / "new.gguf").read_bytes()
    old = {k: v for k, v in new_rope.items() if k not in ("rope_theta", "rope_type")}
    edit(folder / "config.json", rope_parameters=None, head_dim=None, rope_theta=new_rope["rope_theta"],
         rope_scaling={"type": rope, **old} if old else None)
    assert convert(folder, tmp_path / "old.gguf").read_bytes() == new


def test_old_and_new_gemma_config_give_the_same_file(tmp_path):
    rope = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0}}
    folder = make_checkpoint("gemma3_text", tmp_path / "c", rope_parameters=rope)
    new = convert(folder, tmp_path / "new.gguf")
    keys = read(new)[0]
    assert (keys["gemma3.rope.freq_base"], keys["gemma3.rope.freq_base_swa"]) == (2e6, 2e4)
    assert (keys["gemma3.rope.scaling.type"], keys["gemma3.rope.scaling.factor"]) == ("linear", 8.0)
    edit(folder / "config.json", rope_parameters=None, rope_theta=2e6, rope_local_base_freq=2e4, layer_types=None,
         rope_scaling={"rope_type": "linear", "factor": 8.0}, sliding_window_pattern=6)
    assert convert(folder, tmp_path / "old.gguf").read_bytes() == new.read_bytes()


def test_gemma_pattern_scale_and_caps_come_from_the_config(tmp_path):
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    folder = make_checkpoint("gemma3_text", tmp_path / "c", num_hidden_layers=3, layer_types=kinds,
                             query_pre_attn_scalar=50, attn_logit_softcapping=40.0, final_logit_softcapping=25.0)
    keys = read(convert(folder, tmp_path / "m.gguf"))[0]
    assert keys["gemma3.attention.sliding_window_pattern"] == [False, True, True]
    assert keys["gemma3.attention.scale"] == np.float32(50 ** -0.5)
    assert (keys["gemma3.attn_logit_softcapping"], keys["gemma3.final_logit_softcapping"]) == (40, 25)
    edit(folder / "config.json", layer_types=None, sliding_window_pattern=2)
    keys = read(convert(folder, tmp_path / "m.gguf"))[0]
    assert keys["gemma3.attention.sliding_window_pattern"] == [True, False, True]


def test_windows_of_qwen2_and_mistral(tmp_path):
    folder = make_checkpoint("qwen2", tmp_path / "q", use_sliding_window=True, sliding_window=9, max_window_layers=2)
    for change in ({}, {"layer_types": None}):      # once as a list, once from max_window_layers
        edit(folder / "config.json", **change)
        keys = read(convert(folder, tmp_path / "q.gguf"))[0]
        assert keys["qwen2.attention.sliding_window"] == 9
        assert keys["qwen2.attention.sliding_window_pattern"] == [False, False, True]
    folder = make_checkpoint("mistral", tmp_path / "m", sliding_window=None)
    assert not any("sliding" in key for key in read(convert(folder, tmp_path / "m.gguf"))[0])


def scaling(folder, out):
    return {k.removeprefix("llama.rope.scaling."): v for k, v in read(convert(folder, out))[0].items()
            if ".rope.scaling." in k}


def test_rope_scaling_keys(tmp_path):
    def keys(**rope):
        folder = make_checkpoint("llama", tmp_path / "c", rope_parameters=rope)
        return scaling(folder, tmp_path / "m.gguf")

    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 64, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0}
    assert keys(**ROPES["linear"]) == {"type": "linear", "factor": 4.0}
    assert keys(**ROPES["llama3"]) == {}
    assert keys(**ROPES["yarn"]) == {**yarn, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0}
    magnitude = 0.1 * np.log(4) + 1
    assert keys(**ROPES["yarn-attn"]) == {**yarn, "attn_factor": np.float32(0.8 / magnitude)}
    mscale = {**ROPES["yarn-attn"], "attention_factor": None, "mscale": 0.7, "mscale_all_dim": 0.5}
    wanted = (0.07 * np.log(4) + 1) / (0.05 * np.log(4) + 1)        # DeepSeek's form of the same factor
    assert keys(**mscale) == {**yarn, "attn_factor": np.float32(wanted / magnitude)}
    assert keys(**ROPES["longrope"]) == {"type": "longrope", "original_context_length": 64,
                                         "attn_factor": np.float32((1 + np.log(4) / np.log(64)) ** 0.5)}


def test_llama3_factors_are_the_ratio_of_transformers_frequencies(tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    folder = make_checkpoint("llama", tmp_path / "c", rope_parameters=dict(ROPES["llama3"]))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](transformers.AutoConfig.from_pretrained(folder))
    plain = 5000.0 ** (-np.arange(0, 16, 2) / 16)
    factors = read(convert(folder, tmp_path / "m.gguf"))[1]["rope_freqs.weight"]
    assert factors[0] == 1 and factors[-1] == 8 and ((factors > 1) & (factors < 8)).any()
    np.testing.assert_allclose(plain / factors, scaled.numpy(), rtol=1e-6)


def test_longrope_factors(tmp_path):
    folder = make_checkpoint("llama", tmp_path / "c", rope_parameters=dict(ROPES["longrope"]))
    values = read(convert(folder, tmp_path / "m.gguf"))[1]
    for which in ("long", "short"):
        assert np.array_equal(values[f"rope_factors_{which}.weight"], np.float32(ROPES["longrope"][f"{which}_factor"]))


# --- tensors ----------------------------------------------------------------------------------------------------------

def expected_tensors(kind, folder):
    """Apply the rules of an architecture, which its case has, to a checkpoint; names are gguf-py's where it has none of its own."""
    config = json.loads((folder / "config.json").read_text())
    converted, tensors = cases.find(kind).converted, stored(folder)
    # gguf-py knows the names of an expert's matrix without its number
    parts = {name: re.sub(r"experts\.\d+\.", "experts.", name) for name in tensors if re.search(r"experts\.\d+\.", name)}
    if parts:
        n = config.get("num_experts") or config["num_local_experts"]
        stacks = {whole: np.stack([tensors[whole.replace("experts.", f"experts.{e}.")] for e in range(n)])
                  for whole in set(parts.values())}
        tensors = {**{n: v for n, v in tensors.items() if n not in parts}, **stacks}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[converted.names], 7)
    for source, value in tensors.items():
        found = converted.tensor(source, value, config)
        for name, part in found if isinstance(found, list) else [found]:
            yield name or names.get_name(source, try_suffixes=(".weight", ".bias")), part


VARIANTS = {name: (case.kind, config) for case in cases.select(sees=False)
            for name, config in ({case.kind: {}} if case.converted.tensors is None else case.converted.tensors).items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensors(variant, tmp_path):
    kind, overrides = VARIANTS[variant]
    folder = make_checkpoint(kind, tmp_path / "c", **overrides)
    _, values, types = read(convert(folder, tmp_path / "m.gguf", "f32"))
    expected = dict(expected_tensors(kind, folder))
    assert sorted(values) == sorted(expected)
    assert ("output.weight" in values) == ("lm_head.weight" in stored(folder))
    for name, value in expected.items():
        assert values[name].shape == value.shape and np.array_equal(values[name], value), name
    assert set(types.values()) == {"F32"}


def test_interleaved_rows_by_hand():
    assert interleaved_rows(2, 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.mark.parametrize("outtype, error", [("f32", 0), ("f16", 2 ** -11), ("bf16", 2 ** -8), ("q8_0", 1 / 127)])
def test_types(outtype, error, tmp_path):
    # d_ff of 100 is no multiple of 32: ffn_down's rows cannot be q8_0
    folder = make_checkpoint("qwen2", tmp_path / "c", intermediate_size=100)
    keys, values, types = read(convert(folder, tmp_path / "m.gguf", outtype))
    assert keys["general.file_type"] == {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}[outtype]
    for name, value in expected_tensors("qwen2", folder):
        wanted = "F32" if value.ndim == 1 else outtype.upper()
        if outtype == "q8_0" and "ffn_down" in name:
            wanted = "F16"
        assert types[name] == wanted, name
        scale = abs(value).max() if wanted == "Q8_0" else abs(value)
        assert (abs(values[name] - value) <= error * scale + 1e-7).all(), name
        if wanted in ("F16", "BF16", "Q8_0"):
            assert not np.array_equal(values[name], value), "the source must need rounding, or this test says nothing"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_sources_keep_their_values(dtype, tmp_path):
    folder = make_checkpoint("llama", tmp_path / "c", dtype=dtype)
    short = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    for outtype, matrix in ((None, short), ("f32", "F32")):
        _, values, types = read(convert(folder, tmp_path / "m.gguf", outtype))
        assert types["blk.0.attn_q.weight"] == matrix and types["blk.0.attn_norm.weight"] == "F32"
        for name, value in expected_tensors("llama", folder):
            assert np.array_equal(values[name], value), (outtype, name)


def test_shards_give_the_same_file(checkpoints, tmp_path):
    from safetensors.torch import load_file, save_file

    whole, folder = checkpoints("gemma3_text"), tmp_path / "checkpoint"
    make_checkpoint("gemma3_text", folder, max_shard_size="200KB")
    shards = list(folder.glob("model-*.safetensors"))
    assert len(shards) > 3 and not (folder / "model.safetensors").exists()
    expected = convert(whole, tmp_path / "a.gguf").read_bytes()
    assert convert(folder, tmp_path / "b.gguf").read_bytes() == expected

    extra = load_file(shards[0]) | {"model.surplus": next(iter(load_file(shards[0]).values())).clone()}
    save_file(extra, shards[0])                             # in a shard, but not in the index
    with pytest.raises(UnsupportedModelError, match="model.surplus"):
        convert(folder, tmp_path / "b.gguf")
    shards[0].unlink()
    with pytest.raises(InvalidModelError, match=shards[0].name):
        convert(folder, tmp_path / "b.gguf")


def test_row_chunks_do_not_show(checkpoints, tmp_path, monkeypatch):
    expected = [convert(checkpoints("llama"), tmp_path / "a.gguf", t).read_bytes() for t in ("f16", "q8_0")]
    monkeypatch.setattr("converters.writer.CHUNK", 7 * 96 + 5)
    assert [convert(checkpoints("llama"), tmp_path / "a.gguf", t).read_bytes() for t in ("f16", "q8_0")] == expected


def peak_memory(*arguments):
    """Run the command with these arguments and return its peak resident memory in bytes."""
    script = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
              "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    done = subprocess.run([sys.executable, "-c", script, sys.executable, "-m", "converters", *arguments], cwd=ROOT,
                          check=True, stdout=subprocess.PIPE)
    return int(done.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024)


def test_peak_memory(tmp_path):
    """300 MB of tensors, the largest 100 MB: the peak stays under twice that plus 200 MB, interpreter included."""
    from safetensors.numpy import save_file

    folder, (v, d, f) = tmp_path / "c", (24576, 1024, 4096)
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": v, "hidden_size": d, "intermediate_size": f,
              "num_hidden_layers": 3, "num_attention_heads": 8, "head_dim": 128, "max_position_embeddings": 64,
              "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens": (v, d), "model.norm": (d,)}
    for i in range(3):
        m = f"model.layers.{i}"
        shapes |= {f"{m}.input_layernorm": (d,), f"{m}.post_attention_layernorm": (d,)}
        shapes |= {f"{m}.self_attn.{p}_proj": (d, d) for p in "qkvo"}
        shapes |= {f"{m}.mlp.gate_proj": (f, d), f"{m}.mlp.up_proj": (f, d), f"{m}.mlp.down_proj": (d, f)}
    save_file({f"{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()},
              folder / "model.safetensors")
    assert (folder / "model.safetensors").stat().st_size > 295e6

    peak = peak_memory(folder, "-o", tmp_path / "m.gguf", "--outtype", "f16", "--no-tokenizer")
    assert peak < 2 * v * d * 4 + 200e6         # measured: 55 MB
    assert (tmp_path / "m.gguf").stat().st_size > 148e6


# --- tokenizers -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", tiny.TOKENIZERS)
def test_vocabulary(name, tmp_path):
    folder = make_checkpoint("llama", tmp_path / "c", tokenizer=name)
    keys = {k.removeprefix("tokenizer.ggml."): v for k, v in read(convert(folder, tmp_path / "m.gguf"))[0].items()}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    vocabulary, types = tokenizer.get_vocab(), keys["token_type"]
    n = len(vocabulary)
    assert 300 < n < 512 == len(keys["tokens"]) == len(types)
    assert keys["tokens"][:n] == sorted(vocabulary, key=vocabulary.get)
    assert keys["tokens"][n:] == [f"[PAD{i}]" for i in range(n, 512)] and set(types[n:]) == {UNUSED}
    special = {vocabulary[t] for t in ("<|start|>", "<|stop|>", "<|fill|>", "<|turn|>")}
    assert {i for i in range(n) if types[i] == CONTROL} == special
    assert {i for i in range(n) if types[i] == USER_DEFINED} == {vocabulary["<tool>"]}
    assert keys["bos_token_id"] == vocabulary["<|start|>"] and keys["eos_token_id"] == vocabulary["<|stop|>"]
    assert keys["padding_token_id"] == vocabulary["<|fill|>"]
    assert keys["add_bos_token"] == (name not in ("qwen2", "qwen35")) and keys["add_eos_token"] is False
    assert keys["tokenizer.chat_template"] == cases.CHAT_TEMPLATE
    if name == "spm":
        assert (keys["model"], keys["pre"], keys["add_space_prefix"]) == ("llama", "default", False)
        assert types[0x0A] == gguf.TokenType.BYTE and keys["tokens"][0x0A] == "<0x0A>"
        assert keys["tokens"][types.index(gguf.TokenType.UNKNOWN)] == "<unk>" and "merges" not in keys
    else:
        merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
        assert (keys["model"], keys["pre"]) == ("gpt2", name) and "scores" not in keys
        assert keys["merges"] == [" ".join(m) for m in merges]


SAMPLES = ("Hello world, it's 12345 foxes!  Two  spaces\n\n\nnew\tlines", "  lead", "한국어 中文 🙂 naïve",
           "def add(a):\n        return 1", "The dog<tool> a<|stop|>b", "THE DOG'LL", "x" * 30 + "  ", "")


@pytest.mark.parametrize("name", tiny.TOKENIZERS)
def test_llama_cpp_gives_the_tokens_of_transformers(name, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="make peers")
    folder = make_checkpoint("llama", tmp_path / "c", tokenizer=name)
    path = convert(folder, tmp_path / "m.gguf")
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in SAMPLES:
        assert model.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"], text


def test_pre_tokenizers_as_transformers_builds_them(tmp_path):
    """Other people's copies of the same regexes, so that a typing error here or in tiny.py shows."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    for tokenizer_class, name in (("GPT2Tokenizer", "gpt-2"), ("Qwen2Tokenizer", "qwen2"), ("Qwen3_5Tokenizer", "qwen35")):
        tokenizer = getattr(transformers, tokenizer_class)(vocab={"a": 0}, merges=[]).backend_tokenizer
        assert pre_tokenizer_name(json.loads(tokenizer.to_str()), tmp_path) == name
    splits = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping",
                                 reason="transformers since 5.20 has it").GGUF_PRE_TOKENIZER_SPLITS
    for name in ("llama-bpe", "dbrx", "qwen2", "tekken"):
        tokenizer = Tokenizer(models.BPE(ignore_merges=name in ("llama-bpe", "tekken")))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(splits[name]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        assert pre_tokenizer_name(json.loads(tokenizer.to_str()), tmp_path) == name


@pytest.mark.parametrize("tokenizer_class, options, prefix", [
    ("GemmaTokenizer", {}, False), ("LlamaTokenizer", {}, True), ("LlamaTokenizer", {"add_prefix_space": False}, False),
    ("LlamaTokenizer", {"legacy": True}, True)])
def test_sentencepiece_classes_of_transformers(tokenizer_class, options, prefix, tmp_path):
    folder = make_checkpoint("llama", tmp_path / "c", tokenizer=None)
    vocabulary = {"<pad>": 0, "<unk>": 1, "\u2581": 2, "a": 3, "b": 4, "ab": 5, "\u2581ab": 6}
    vocabulary |= {f"<0x{i:02X}>": 7 + i for i in range(256)}
    merges = [("a", "b"), ("\u2581", "ab")]
    bos, eos = {"GemmaTokenizer": ("<bos>", "<eos>"), "LlamaTokenizer": ("<s>", "</s>")}[tokenizer_class]
    tokenizer = getattr(transformers, tokenizer_class)(vocab=vocabulary, merges=merges, **options)
    tokenizer.save_pretrained(folder)
    keys = {k.removeprefix("tokenizer.ggml."): v for k, v in read(convert(folder, tmp_path / "m.gguf"))[0].items()}
    tokens = keys["tokens"]
    assert (keys["model"], keys["add_space_prefix"]) == ("llama", prefix)
    assert tokens[:263] == list(vocabulary) and keys["scores"][3:7] == [-2, -2, 0, -1]
    assert (tokens[keys["bos_token_id"]], tokens[keys["eos_token_id"]]) == (bos, eos)
    assert [keys["add_bos_token"], keys["add_eos_token"]] == [
        bool(tokenizer("ab")["input_ids"][0] == tokenizer.bos_token_id), False]


def train_sentencepiece(file, **options):
    import sentencepiece

    with open(file, "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(tiny.TEXTS * 4), model_writer=f, vocab_size=340, minloglevel=2,
            hard_vocab_limit=False, **{"model_type": "bpe", "byte_fallback": True, **options})
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


@pytest.mark.parametrize("prefix", [True, False])
def test_tokenizer_model(prefix, tmp_path):
    folder = make_checkpoint("llama", tmp_path / "c", tokenizer=None, eos_token_id=None, bos_token_id=None)
    model = train_sentencepiece(folder / "tokenizer.model", add_dummy_prefix=prefix, pad_id=5, bos_id=3, eos_id=4,
                                unk_id=0, user_defined_symbols=["\u2581\u2581", "<box>"], control_symbols=["<turn>"],
                                normalization_rule_name="identity", remove_extra_whitespaces=False)
    n = model.vocab_size()
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "old",
        "added_tokens_decoder": {str(n): {"content": "<new>", "special": True}}}))
    path = convert(folder, tmp_path / "m.gguf")
    keys = {k.removeprefix("tokenizer.ggml."): v for k, v in read(path)[0].items()}
    tokens, types = keys["tokens"], keys["token_type"]
    kinds = {t: gguf.TokenType(types[tokens.index(t)]).name
             for t in ("<unk>", "<s>", "</s>", "<turn>", "  ", "<box>", "<0x41>", "<new>", "\u2581", f"[PAD{n + 1}]")}
    assert kinds == {"<unk>": "UNKNOWN", "<s>": "CONTROL", "</s>": "CONTROL", "<turn>": "CONTROL",
                     "  ": "USER_DEFINED", "<box>": "USER_DEFINED", "<0x41>": "BYTE", "<new>": "CONTROL",
                     "\u2581": "NORMAL", f"[PAD{n + 1}]": "UNUSED"}
    assert keys["scores"][:n] == [model.get_score(i) for i in range(n)] and len(keys["scores"]) == 512
    assert (keys["bos_token_id"], keys["eos_token_id"], keys["padding_token_id"]) == (3, 4, 0)
    assert keys["add_space_prefix"] is prefix and keys["add_bos_token"] is True
    assert keys["tokenizer.chat_template"] == "old"

    llama_cpp = pytest.importorskip("llama_cpp", reason="make peers")
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    # llama.cpp adds the leading space again after each user-defined token, SentencePiece does not
    for text in ("The quick fox", "Käse 한 🙂", *(() if prefix else ("a  b", "x<box>y"))):
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == model.encode(text), text


def test_more_end_tokens_and_named_templates(tmp_path):
    folder = make_checkpoint("qwen2", tmp_path / "c")
    ids = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    edit(folder / "generation_config.json", eos_token_id=[ids["<|stop|>"], ids["<|turn|>"], ids["<tool>"]])
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools!")
    keys = read(convert(folder, tmp_path / "m.gguf"))[0]
    assert keys["tokenizer.ggml.eos_token_id"] == ids["<|stop|>"]
    assert keys["tokenizer.ggml.eot_token_id"] == ids["<|turn|>"]
    assert keys["tokenizer.ggml.eom_token_id"] == ids["<tool>"]
    assert keys["tokenizer.chat_template"] == cases.CHAT_TEMPLATE
    assert keys["tokenizer.chat_template.tool_use"] == "tools!"
    edit(folder / "generation_config.json", eos_token_id=[1, 2, 3, 4, ids["<|stop|>"]])
    with pytest.raises(UnsupportedModelError, match="4 end tokens"):
        convert(folder, tmp_path / "m.gguf")


def test_no_tokenizer(tmp_path, capsys):
    folder = make_checkpoint("llama", tmp_path / "c", tokenizer=None)
    capsys.readouterr()
    convert(folder, tmp_path / "bare.gguf")
    assert capsys.readouterr().err == f"warning: {folder}: no tokenizer; the file takes and gives token ids only\n"
    assert main([str(folder), "-o", str(tmp_path / "m.gguf"), "--no-tokenizer"]) == 0
    assert capsys.readouterr().err == ""
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "bare.gguf").read_bytes()
    keys = read(tmp_path / "m.gguf")[0]
    assert {k: v for k, v in keys.items() if k.startswith("tokenizer.")} == {"tokenizer.ggml.model": "none"}
    assert keys["llama.vocab_size"] == 512
    (folder / "vocab.json").write_text("{}")                # half a tokenizer is no reason to go on without one
    with pytest.raises(InvalidModelError, match="--no-tokenizer"):
        convert(folder, tmp_path / "m.gguf")


# --- what is refused --------------------------------------------------------------------------------------------------

def tokenizer_json(**changes):
    def change(folder):
        edit(folder / "tokenizer.json", **changes)
    return change


def config_json(**changes):
    def change(folder):
        edit(folder / "config.json", **changes)
    return change


def retensor(change):
    """Rewrite the tensors of model.safetensors."""
    def rewrite(folder):
        from safetensors.numpy import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return rewrite


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:len(data) // 2])


def add_model_token(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["far"] = 10 ** 9
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def both_ends(folder):
    edit(folder / "tokenizer.json", post_processor={"type": "TemplateProcessing", "pair": [], "special_tokens": {},
         "single": [{"SpecialToken": {"id": "<|turn|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]})


SPLIT = {"type": "Split", "pattern": {"Regex": r"\p{Han}+"}, "behavior": "Isolated", "invert": False}
REFUSED = {
    "architecture": (config_json(architectures=["BloomForCausalLM"]), UnsupportedModelError,
                     "BloomForCausalLM is not supported; supported: .*GPT2LMHeadModel, Gemma2ForCausalLM, Gemma3"),
    "no config": (lambda f: (f / "config.json").unlink(), InvalidModelError, "config.json: missing"),
    "config not json": (lambda f: (f / "config.json").write_text("{"), InvalidModelError, "config.json: not JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), InvalidModelError, "neither model.safetensors"),
    "cut weights": (cut, InvalidModelError, "must end at byte"),
    "garbage weights": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 99), InvalidModelError, "length"),
    "odd header": (lambda f: (f / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b'{"a":[]}'),
                   InvalidModelError, "malformed safetensors header"),
    "unknown tensor": (retensor(lambda t: t.update({"model.layers.0.mlp.extra.weight": t["model.norm.weight"]})),
                       UnsupportedModelError, "no place for tensor 'model.layers.0.mlp.extra.weight'"),
    "missing tensor": (retensor(lambda t: t.pop("model.norm.weight")), InvalidModelError,
                       "tensor 'model.norm.weight' missing"),
    "wrong shape": (config_json(intermediate_size=161), InvalidModelError, r"has shape \(160, 96\), .* \(161, 96\)"),
    "integers": (retensor(lambda t: t.update({"model.norm.weight": np.ones(96, np.int8)})), UnsupportedModelError,
                 "'model.norm.weight' is I8"),
    "missing value": (config_json(hidden_size=None), InvalidModelError, "'hidden_size' is missing"),
    "activation": (config_json(hidden_act="relu"), UnsupportedModelError, "'hidden_act' is 'relu'"),
    "dynamic rope": (config_json(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), UnsupportedModelError,
                     "rope scaling 'dynamic'"),
    "partial rope": (config_json(partial_rotary_factor=0.5), UnsupportedModelError, "'partial_rotary_factor' is 0.5"),
    "yarn untruncated": (config_json(rope_parameters={**ROPES["yarn"], "truncate": False}), UnsupportedModelError,
                         "truncate"),
    "short longrope": (config_json(rope_parameters={**ROPES["longrope"], "long_factor": [1.0]}), InvalidModelError,
                       r"rope_factors_long has shape \(1,\), expected \(8,\)"),
    "no rope factor": (config_json(rope_parameters={"rope_type": "linear"}), InvalidModelError, "needs 'factor'"),
    "float16 overflow": (retensor(lambda t: t["model.embed_tokens.weight"].__setitem__((3, 4), 1e6)),
                         UnsupportedModelError, "'token_embd.weight' has values that float16 cannot hold"),
    "pre-tokenizer": (tokenizer_json(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        SPLIT, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}), UnsupportedModelError,
                      r"no known pre-tokenizer has the steps \['split \\\\p\{Han\}\+', 'bytes'\]"),
    "pre-tokenizer kind": (tokenizer_json(pre_tokenizer={"type": "Whitespace"}), UnsupportedModelError, "Whitespace"),
    "bytes without regex": (tokenizer_json(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False,
                                                          "use_regex": False}), UnsupportedModelError, r"\['bytes'\]"),
    "normalizer": (tokenizer_json(normalizer={"type": "Lowercase"}), UnsupportedModelError, "'Lowercase'"),
    "word level": (tokenizer_json(model={"type": "WordLevel", "vocab": {}}), UnsupportedModelError, "'WordLevel' tokenizer"),
    "unigram's steps": (tokenizer_json(model={"type": "Unigram", "vocab": [["<unk>", 0.0]], "unk_id": 0}, normalizer={"type": "Strip"}),
                        UnsupportedModelError, "Strip"),
    "template": (both_ends, UnsupportedModelError, r"template adds \['<\|turn\|>', None\]"),
    "special token": (lambda f: edit(f / "tokenizer_config.json", eos_token="<nowhere>"), InvalidModelError,
                      "eos_token '<nowhere>' is not in the vocabulary"),
    "small embedding": (config_json(vocab_size=300), InvalidModelError, "300"),
    "far token": (add_model_token, InvalidModelError, "token ids reach 1000000000"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path, capsys):
    folder = make_checkpoint("llama", tmp_path / "c")
    assert main([str(folder), "-o", str(tmp_path / "good.gguf"), "--outtype", "f16"]) == 0
    change, error, words = REFUSED[case]
    change(folder)
    with pytest.raises(error, match=words) as caught:
        convert(folder, tmp_path / "m.gguf", "f16")
    capsys.readouterr()
    assert main([str(folder), "-o", str(tmp_path / "m.gguf"), "--outtype", "f16"]) == 2
    assert capsys.readouterr().err == f"error: {caught.value}\n"
    assert sorted(p.name for p in tmp_path.glob("*.gguf*")) == ["good.gguf"], "nothing half-written stays behind"


JUNK = (None, -1, 0, 2 ** 40, 0.5, "", "x", [], [1], {}, {"type": "x"}, True)


def nodes(value):
    """List every (container, key) of a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from nodes(value[key])


@pytest.mark.parametrize("kind, name", [("llama", "config.json"), ("gemma3_text", "config.json"),
                                        ("llama", "tokenizer.json"), ("gemma3_text", "tokenizer.json"),
                                        ("qwen2", "tokenizer_config.json"), ("llama", "model.safetensors")])
def test_damaged_files_never_crash(kind, name, tmp_path):
    """Put junk into each place of a file in turn: a conversion succeeds or says in our own words what is wrong."""
    folder = make_checkpoint(kind, tmp_path / "c")
    file = folder / name
    data = file.read_bytes()
    start, end = (8, 8 + int.from_bytes(data[:8], "little")) if name == "model.safetensors" else (0, len(data))
    random = np.random.default_rng(3)
    n_places, outcomes = len(list(nodes(json.loads(data[start:end])))), set()
    for _ in range(60):
        value = json.loads(data[start:end])
        container, key = list(nodes(value))[random.integers(n_places)]
        container[key] = JUNK[random.integers(len(JUNK))]
        header = json.dumps(value).encode()
        length = len(header).to_bytes(8, "little") if start else b""
        file.write_bytes(length + header + data[end:])
        try:
            convert(folder, tmp_path / "m.gguf")
            outcomes.add("converted")
        except PyEngineError:
            outcomes.add("refused")
    assert "refused" in outcomes
    file.write_bytes(data)
    convert(folder, tmp_path / "m.gguf")


@pytest.mark.parametrize("change, words", [
    ({"attention_bias": True}, "attention_bias"), ({"use_bidirectional_attention": True}, "bidirectional"),
    ({"hidden_activation": "silu"}, "hidden_activation"),
    ({"rope_parameters": {"full_attention": dict(ROPES["yarn"])}}, "'yarn' is not one of linear"),
    ({"rope_parameters": {"sliding_attention": dict(ROPES["linear"])}}, "sliding layers")])
def test_gemma_refuses(change, words, tmp_path):
    folder = make_checkpoint("gemma3_text", tmp_path / "c")
    edit(folder / "config.json", **change)
    with pytest.raises(UnsupportedModelError, match=words):
        convert(folder, tmp_path / "m.gguf")


@pytest.mark.parametrize("change", [{"norm_topk_prob": False}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}])
def test_qwen_experts_refuse(change, tmp_path):
    folder = make_checkpoint("qwen3moe", tmp_path / "c", **change)
    with pytest.raises(UnsupportedModelError, match=next(iter(change))):
        convert(folder, tmp_path / "m.gguf")


def test_other_tokenizer_models_are_refused(tmp_path):
    folder = make_checkpoint("llama", tmp_path / "c", tokenizer=None)
    train_sentencepiece(folder / "tokenizer.model", model_type="word")
    with pytest.raises(UnsupportedModelError, match="WORD"):
        convert(folder, tmp_path / "m.gguf")
    (folder / "tokenizer.model").write_bytes(b"\xff" * 40)
    with pytest.raises(PyEngineError, match="not a SentencePiece model"):
        convert(folder, tmp_path / "m.gguf")


# --- llama.cpp runs what we write -------------------------------------------------------------------------------------

RUNS = {name: (case.kind, config) for case in cases.select(sees=False) for name, config in case.llama_cpp_runs.items()}


@pytest.mark.parametrize("run", RUNS)
def test_llama_cpp_gives_the_logits_of_transformers(run, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="make peers")
    kind, overrides = RUNS[run]
    overrides = {k: dict(v) if isinstance(v, dict) else v for k, v in overrides.items()}
    folder = make_checkpoint(kind, tmp_path / "c", **overrides)
    ids = np.random.default_rng(1).integers(0, 512, 100).tolist()       # far beyond Gemma's window of 6
    expected = tiny.hf_logits(folder, ids)
    # llama.cpp reads yarn's betas from the file for some architectures only
    yarn = overrides.get("rope_parameters", {})
    found = llama_cpp_logits(llama_cpp, convert(folder, tmp_path / "m.gguf", "f32"), ids,
                             yarn_beta_fast=yarn.get("beta_fast", 32.0), yarn_beta_slow=yarn.get("beta_slow", 1.0))
    error = abs(found - expected) / np.ptp(expected)
    assert error.max() < cases.find(kind).converted.error              # measured: 3e-6
    assert (found.argmax(1) == expected.argmax(1)).all()


@pytest.mark.parametrize("kind, outtype", [(case.kind, case.converted.narrow) for case in cases.select(sees=False) if case.converted.narrow])
def test_llama_cpp_reads_the_narrow_types(kind, outtype, checkpoints, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="make peers")
    ids = np.random.default_rng(2).integers(0, 512, 40).tolist()
    expected = tiny.hf_logits(checkpoints(kind), ids)
    found = llama_cpp_logits(llama_cpp, convert(checkpoints(kind), tmp_path / "m.gguf", outtype), ids)
    assert np.sqrt(np.mean((found - expected) ** 2)) < 0.05 * expected.std()
