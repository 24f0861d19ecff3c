"""Words that people bring along: commands and options of Ollama, llama.cpp and others, and the library's names in the command's own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pyengine.errors import RequestError

# First words that are commands elsewhere, and what there is here instead.
_LIST = "nothing is kept by name here: models are files, which `list` shows"
COMMANDS = {
    "server": "`pyengine-run serve MODEL` is the server",
    "rm": f"{_LIST}; remove the file, with Ollama's models `ollama rm`, with Hugging Face's `hf cache`",
    "cp": f"{_LIST}; copy the file",
    "create": f"{_LIST}; options set the system message and the sampling, and a Modelfile's are followed where Ollama keeps them",
    "push": "nothing is uploaded",
    "signin": "there are no accounts",
    "signout": "there are no accounts",
    "embedding": "`embed MODEL TEXT...` prints vectors",
    "embeddings": "`embed MODEL TEXT...` prints vectors",
    "convert": "`python -m pyengine.converters HF_DIR -o OUT.gguf` converts a checkpoint",
    "quantize": "`python -m pyengine.converters.quantize IN.gguf OUT.gguf Q4_K_M` makes a file smaller",
    "generate": "one answer is `pyengine-run MODEL PROMPT`",
    "complete": "`pyengine-run MODEL --raw PROMPT` completes a text",
    "completion": "`pyengine-run MODEL --raw PROMPT` completes a text",
    "tokenize": "the library does it: pyengine.load_tokenizer(file).tokenize(text)",
    "info": "`show MODEL` says what is in a file",
}

# Options by which others name what is here under another name. They hold where the command has that one, and no own one of the name.
ALIASES = {
    "--n-predict": "--max-tokens", "--predict": "--max-tokens", "--num-predict": "--max-tokens", "--max-new-tokens": "--max-tokens",
    "--ctx-size": "--ctx", "--num-ctx": "--ctx", "--n-ctx": "--ctx", "--max-model-len": "--ctx", "--context-length": "--ctx",
    "--batch-size": "--batch", "--num-thread": "--threads", "--n-threads": "--threads",
    "-sys": "--system", "--system-prompt": "--system", "-s": "--seed", "-r": "--stop", "--reverse-prompt": "--stop",
    "--typical-p": "--typical", "--top-nsigma": "--top-n-sigma", "--dynatemp-exponent": "--dynatemp-exp", "--mirostat-tau": "--mirostat-ent",
    "--mirostat-eta": "--mirostat-lr", "-mm": "--mmproj", "--images": "--image", "--cache-type": "--kv-dtype", "--prompt-file": "--file",
    "-md": "--draft", "--model-draft": "--draft",
}

_GPU = ("layers go to cards as far as their memory holds them (`pyengine-run hardware` shows them): --device cuda, --device cuda:1, or "
        "--device cuda:0=6GiB --device cpu")
_HUB = "a model of Hugging Face is named as MODEL, org/repo:Q4_K_M; `pull` fetches it"
_TEMPLATE = "the file's own chat template is used; --raw leaves it out"
_GRAMMAR = "in a conversation, `/format FILE` holds answers to a JSON schema; the library and the server take grammars, too"
_THINK = "in a conversation, `/think` says whether the model thinks, and `/set thinking` how that is shown"
_DRAFT = "--draft MODEL drafts by a second model; --speculate N says how many tokens a draft has, 0 none"
_MAPPED = "weights are read into memory, in the layout that the kernels want; without --mmap they always are"
_SAMPLER = "the sampler has no such step; --help lists those that it has"
_ORDER = "the order of the sampler's steps is fixed: docs/library.md names it"
_ROPE = "the scaling of positions is the one that the file names"
_LOGS = "nothing is logged but what --verbose says"
HINTS = {
    **dict.fromkeys(("-sm", "--split-mode", "-ts", "--tensor-split", "-ot", "--override-tensor", "-dev"), _GPU),
    **dict.fromkeys(("-ncmoe", "--n-cpu-moe", "-cmoe", "--cpu-moe"), "--device cuda:0 --device cpu --expert-device cpu keeps experts on the CPU"),
    **dict.fromkeys(("-hf", "-hfr", "--hf-repo", "-hff", "--hf-file", "-hft", "--hf-token"), _HUB),
    **dict.fromkeys(("-mu", "--model-url"), "nothing is fetched by its address; give a file or a name"),
    **dict.fromkeys(("-ub", "--ubatch-size"), "steps have one size here: --batch"),
    **dict.fromkeys(("-tb", "--threads-batch"), "prompts and answers take the same threads: --threads"),
    **dict.fromkeys(("-fa", "--flash-attn"), "attention always works so; leave it out"),
    **dict.fromkeys(("-cnv", "--conversation", "-i", "--interactive"), "a conversation is what starts without a PROMPT"),
    **dict.fromkeys(("-no-cnv", "--no-conversation"), "--raw continues a text without the chat template"),
    **dict.fromkeys(("-st", "--single-turn"), "with a PROMPT there is one answer anyway"),
    **dict.fromkeys(("--jinja", "--no-jinja", "--chat-template", "--chat-template-file"), _TEMPLATE),
    **dict.fromkeys(("--no-mmap", "--mlock"), _MAPPED),
    **dict.fromkeys(("--grammar", "--grammar-file", "--json-schema", "-j", "--format"), _GRAMMAR),
    **dict.fromkeys(("--think", "--hidethinking", "--reasoning-budget", "--reasoning-format"), _THINK),
    **dict.fromkeys(("--draft-max", "--draft-n", "--draft-min", "--draft-p-min"), _DRAFT),
    **dict.fromkeys(("--audio",), "no sound is heard yet"),
    **dict.fromkeys(("--tfs", "--logit-bias", "--adaptive-target", "--adaptive-decay"), _SAMPLER),
    **dict.fromkeys(("--samplers", "--sampling-seq", "--sampler-seq"), _ORDER),
    **dict.fromkeys(("--rope-scaling", "--rope-scale", "--rope-freq-base", "--rope-freq-scale"), _ROPE),
    **dict.fromkeys(("--no-display-prompt", "--log-disable", "--verbose-prompt", "--simple-io", "-co", "--color", "--no-perf"), _LOGS),
    **dict.fromkeys(("-e", "--escape"), "your shell can write escapes: $'a\\nb'"),
    **dict.fromkeys(("--context-shift", "--no-context-shift", "--keep"), "an answer ends where the context is full; --ctx makes it larger"),
    **dict.fromkeys(("-np", "--parallel"), "the command answers one conversation; `plan` has --seq, the library n_seq"),
    **dict.fromkeys(("--keepalive", "--keep-alive"), "no model stays loaded when its command has ended"),
    **dict.fromkeys(("--nowordwrap", "--insecure"), "there is nothing to switch off; leave it out"),
    **dict.fromkeys(("--kv-bits", "--kv-cache-dtype"), "--kv-dtype q8_0 or q4_0 keeps keys and values smaller"),
    **dict.fromkeys(("--gpu-memory-utilization", "--tensor-parallel-size"), _GPU),
}
_LAYERS, _MAIN = ("-ngl", "--gpu-layers", "--n-gpu-layers", "--num-gpu"), ("-mg", "--main-gpu")
MANY_LAYERS = 99                     # of a model that shall be on a card altogether, as people write it
_KEYS, _VALUES = ("-ctk", "--cache-type-k"), ("-ctv", "--cache-type-v")


def translated(arguments: Sequence[str], options: Mapping[str, bool]) -> list[str]:
    """Return a command's arguments with other programs' options under the names that they have here.

    options: the names of the command's own, and whether each takes a value; a value is never taken for an option.
    Raises: RequestError for an option that has nothing like it here, saying what there is.
    """
    found: list[str] = []
    cached: dict[bool, str] = {}                               # formats of keys (True) and values (False)
    left = list(arguments)
    while left:
        argument = left.pop(0)
        if argument == "--":
            return [*found, *_kv(cached), argument, *left]
        name, equals, value = argument.partition("=") if argument.startswith("--") else (argument, "", "")
        if name not in options and name in (*_KEYS, *_VALUES) and "--kv-dtype" in options:
            if not equals and not left:
                raise RequestError(f"{name}: needs a format, as q8_0")
            cached[name in _KEYS] = value if equals else left.pop(0)
            continue
        if name not in options and name in (*_LAYERS, *_MAIN) and "--device" in options:
            if not equals and not left:
                raise RequestError(f"{name}: needs a number")
            found += _card(name, value if equals else left.pop(0))
            continue
        if name not in options and ALIASES.get(name) in options:
            name = ALIASES[name]
        elif name not in options and name in HINTS:
            raise RequestError(f"there is no option {name}: {HINTS[name]}")
        found.append(f"{name}{equals}{value}")
        if options.get(name) and not equals and left:
            found.append(left.pop(0))
    return [*found, *_kv(cached)]


def _card(name: str, value: str) -> list[str]:
    """Return the device that a number of layers on a card means, or the number of a card. Raises: RequestError."""
    if name in _MAIN and value.isdecimal():
        return ["--device", f"cuda:{value}"]
    if name in _LAYERS and value == "0":
        return ["--device", "cpu"]
    if name in _LAYERS and (value in ("all", "auto", "-1") or value.isdecimal() and int(value) >= MANY_LAYERS):
        return [] if value == "auto" else ["--device", "cuda"]
    raise RequestError(f"{name} {value}: {_GPU}; 0 is --device cpu, {MANY_LAYERS} and more or all is --device cuda")


def _kv(cached: Mapping[bool, str]) -> list[str]:
    return ["--kv-dtype", f"{cached.get(True, 'f16')}/{cached.get(False, 'f16')}"] if cached else []


# The library's arguments in its messages, and what the command calls them.
_TOLD = [(re.compile(pattern), said) for pattern, said in (
    (r"models run on 'cpu' \('auto' picks it\), or on parts of it: \{'cpu:0': bytes, \.\.\}", "models run on cpu, or on parts of its memory: "
     "--device cpu:0=6GiB"),
    (r"is no part of main memory; give \{'cpu:0': bytes, 'cpu:1': bytes\}", "is no part of main memory; give cpu:0=6GiB, cpu:1=2GiB"),
    (r"\bimages=\((?:width, height, number|\w+, \w+, \w+)\)", "--picture WIDTHxHEIGHT --pictures NUMBER"),
    (r"\bimages=\(width, height\)", "--picture WIDTHxHEIGHT"),
    (r"\bimages=\((\d+), ?(\d+)\)", r"--picture \1x\2"),
    (r"\bimages=(?=[\d(\[])", "--pictures "),
    (r"\bmmproj=", "--mmproj FILE"),
    (r"\bmmap=True\b", "--mmap"),
    (r"\bspeculate(?==|:)", "--speculate"),
    (r"\bdraft=None\b", "without --draft"),
    (r"(?<![\w/.-])draft(?=: )", "--draft"),
    (r"\b(kv_dtype|n_ctx|n_batch|n_threads|n_seq|encoder_device|expert_device|device|compress)=", lambda m: f"{_OPTIONS[m[1]]} "),
    (r"(?<![\w/.-])(kv_dtype|n_ctx|n_batch|n_threads|n_seq|encoder_device|expert_device)(?![\w/.-])", lambda m: _OPTIONS[m[1]]),
    (r"\bload with\b", "use"),
)]
_OPTIONS = {"kv_dtype": "--kv-dtype", "n_ctx": "--ctx", "n_batch": "--batch", "n_threads": "--threads", "n_seq": "--seq", "device": "--device",
            "encoder_device": "--encoder-device", "expert_device": "--expert-device", "compress": "--compress"}


def told(text: str) -> str:
    """Return a message of the library with its arguments named as the command's options."""
    for pattern, said in _TOLD:
        text = pattern.sub(said, text)
    return text
