"""MODEL [PROMPT], the form that answers, and how a command line is taken to its form.

A first argument that is a command's name is that command; a file of such a name is given as ./plan. What is slow to
import is imported by the command that needs it. Annotations are values here, not texts: Typer reads those of `run` at each start.
"""

import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from pyengine.cli import overview, words
from pyengine.cli.beforehand import ANSWERING
from pyengine.cli.collector import settle
from pyengine.cli.forms import Form, HELP, main_form, ReaderLeft
from pyengine.cli.options import (
    BatchSize, Compress, Context, Devices, DraftModel, EncoderDevice, ExpertDevice, InPlace, KvDtype, Lora, LoraScaled, Mmproj, model_names, N_BATCH, Picture, Pictures,
    Speculate, Threads,
)
from pyengine.cli.screen import complain, note, PROGRAM
from pyengine.errors import ModelNotFoundError, ModelWarning, PyEngineError, RequestError

USAGE_ERROR = 2                      # exit code of everything that the user can mend
NOTHING_DRAWN = 1                    # exit code of --draw when the answer names no boxes
INTERRUPTED = 130                    # exit code after Ctrl-C: 128 + SIGINT, as shells have it
NO_READER = 141                      # exit code when standard output is closed: 128 + SIGPIPE


def _print_version(wanted: bool) -> None:
    if wanted:
        import platform

        from pyengine import __version__
        from pyengine.native import engine

        print(f"{PROGRAM} {__version__} (kernels here: {', '.join(engine.isas())}; Python {platform.python_version()}, "
              f"{platform.system()} {platform.machine()})")
        raise typer.Exit


def _first_words(incomplete: str) -> list[str]:
    return [*(name for name in COMMANDS if name.startswith(incomplete)), *model_names(incomplete)]


def _import_numpy() -> None:
    """Import NumPy with one thread for its BLAS: the others would take a processor each to wait for work that an answer does not have."""
    name = "OPENBLAS_NUM_THREADS"
    if name not in os.environ:
        os.environ[name] = "1"
        try:
            import numpy  # noqa: F401
        finally:
            del os.environ[name]                           # for programs that this one starts


def _sampling(default: str, *names: str, text: str) -> Any:
    """Return an option about the choice of tokens; where it is not given, the model's file decides, and else `default`."""
    return Option(*names, rich_help_panel="Sampling (defaults where the model's file names none)", help=f"{text} (default: {default}).")


@main_form.command(cls=Form, epilog=overview.COMMANDS, context_settings=HELP)
def run(
    model: Annotated[str | None, Argument(metavar="MODEL", show_default=False, autocompletion=_first_words, help=(
        "A GGUF file, or a name from `list`."))] = None,
    prompt: Annotated[list[str] | None, Argument(metavar="PROMPT", show_default=False, help=(
        "The question, in one word or several; paths of pictures in it are shown to a vision model; \"\" asks about pictures alone. What is "
        "piped in comes before it; "
        "- is standard input. Without any of them: a conversation."))] = None,
    model_option: Annotated[str | None, Option("--model", "-m", metavar="MODEL", autocompletion=model_names, help="MODEL, as an option.")] = None,
    prompt_option: Annotated[list[str] | None, Option("--prompt", "-p", metavar="TEXT", help="PROMPT, as an option.")] = None,
    file: Annotated[list[str] | None, Option("--file", "-f", metavar="FILE", help=(
        "A text file that comes before the prompt, or is it; - is standard input; repeatable."))] = None,
    system: Annotated[str | None, Option("--system", metavar="TEXT", help="System message (default: none, or that of an Ollama model).")] = None,
    raw: Annotated[bool, Option("--raw", help="Continue the prompt as plain text, without the chat template.")] = False,
    lines: Annotated[bool, Option("--lines", help="Each line of standard input is a turn of one conversation.")] = False,
    max_tokens: Annotated[int | None, Option("--max-tokens", "-n", min=-1, show_default=False, help=(
        "At most N tokens in an answer; -1: until the model ends it or the context is full (default)."))] = None,
    stop: Annotated[list[str] | None, Option("--stop", metavar="TEXT", help=(
        "A text that ends the answer and is not part of it; repeatable (default: those of an Ollama model)."))] = None,
    image: Annotated[list[str] | None, Option("--image", metavar="FILE", rich_help_panel="Pictures", help=(
        "A picture for the question: a file, a file:// or a data URL; repeatable."))] = None,
    video: Annotated[list[str] | None, Option("--video", metavar="FILE", rich_help_panel="Pictures", help="A video; repeatable.")] = None,
    image_option: Annotated[list[str] | None, Option("--image-option", metavar="NAME=VALUE", rich_help_panel="Pictures", help=(
        "A setting of the model's processor: pan_and_scan=true, max_pixels=500000 ...; repeatable."))] = None,
    video_option: Annotated[list[str] | None, Option("--video-option", metavar="NAME=VALUE", rich_help_panel="Pictures", help=(
        "The same for videos: sample_fps=1 ...; repeatable."))] = None,
    mmproj: Mmproj = None,
    lora: Lora = None,
    lora_scaled: LoraScaled = None,
    server: Annotated[str | None, Option("--server", metavar="URL", help=(
        "Ask a server instead of loading a model: `serve`, or another one with OpenAI's interface; MODEL is one of its names."))] = None,
    api_key: Annotated[str | None, Option("--api-key", metavar="KEY", help="The server's key (default: $PYENGINE_API_KEY).")] = None,
    draw: Annotated[Path | None, Option("--draw", metavar="OUT.png", rich_help_panel="Pictures", help=(
        "Write the last picture with the boxes and points of the answer."))] = None,
    temperature: Annotated[float | None, _sampling("0.8", "--temperature", "--temp", text=(
        "Sampling temperature; 0 always takes the most likely token"))] = None,
    top_k: Annotated[int | None, _sampling("40", "--top-k", text="Keep the K most likely tokens; 0: all")] = None,
    top_p: Annotated[float | None, _sampling("0.95", "--top-p", text=(
        "Nucleus sampling: keep the most likely tokens up to total probability P; 1: off"))] = None,
    min_p: Annotated[float | None, _sampling("0.05", "--min-p", text="Drop tokens less likely than P times the most likely one; 0: off")] = None,
    typical: Annotated[float | None, _sampling("1", "--typical", text="Locally typical sampling up to total probability P; 1: off")] = None,
    repeat_penalty: Annotated[float | None, _sampling("1", "--repeat-penalty", text="Divide logits of recent tokens by X; 1: off")] = None,
    repeat_last_n: Annotated[int | None, _sampling("64", "--repeat-last-n", text=(
        "How many tokens count as recent for the penalties; -1: all"))] = None,
    presence_penalty: Annotated[float | None, _sampling("0", "--presence-penalty", text=(
        "Subtract X from logits of recent tokens; 0: off"))] = None,
    frequency_penalty: Annotated[float | None, _sampling("0", "--frequency-penalty", text=(
        "Subtract X from logits of recent tokens, once for each use; 0: off"))] = None,
    seed: Annotated[int | None, _sampling("another one each time", "--seed", text="Random seed; the same seed gives the same answer")] = None,
    top_n_sigma: Annotated[float | None, _sampling("0", "--top-n-sigma", text=(
        "Keep logits within X standard deviations of the largest; 0: off"))] = None,
    xtc_probability: Annotated[float | None, _sampling("0", "--xtc-probability", text=(
        "How often the top choices are left out, down to the last one that is likely; 0: off"))] = None,
    xtc_threshold: Annotated[float | None, _sampling("0.1", "--xtc-threshold", text="The probability of a top choice")] = None,
    dynatemp_range: Annotated[float | None, _sampling("0", "--dynatemp-range", text=(
        "The temperature goes X below and above by how sure the model is; 0: off"))] = None,
    dynatemp_exponent: Annotated[float | None, _sampling("1", "--dynatemp-exp", text="The power of the entropy in that")] = None,
    mirostat: Annotated[int | None, _sampling("0", "--mirostat", text=(
        "1 or 2: hold the surprise at mirostat_tau, without top_k, top_p and the others; 0: off"))] = None,
    mirostat_tau: Annotated[float | None, _sampling("5", "--mirostat-ent", text="The surprise of a token that mirostat aims at, in bits")] = None,
    mirostat_eta: Annotated[float | None, _sampling("0.1", "--mirostat-lr", text="How fast mirostat follows")] = None,
    dry_multiplier: Annotated[float | None, _sampling("0", "--dry-multiplier", text=(
        "DRY: how much is subtracted from what would prolong a repetition; 0: off"))] = None,
    dry_base: Annotated[float | None, _sampling("1.75", "--dry-base", text="How much more that is for each token that is repeated")] = None,
    dry_allowed_length: Annotated[int | None, _sampling("2", "--dry-allowed-length", text=(
        "Repetitions that are longer lose more than the multiplier"))] = None,
    dry_penalty_last_n: Annotated[int | None, _sampling("64", "--dry-penalty-last-n", text=(
        "How many tokens are searched for repetitions; -1: all"))] = None,
    dry_sequence_breakers: Annotated[list[str] | None, _sampling(r"\n : \" *", "--dry-sequence-breaker", text=(
        "Texts that no repetition reaches over, one each time that it is given; none: there are none"))] = None,
    ctx: Context = None,
    kv_dtype: KvDtype = "f16",
    threads: Threads = None,
    batch: BatchSize = N_BATCH,
    picture: Picture = None,
    pictures_kept: Pictures = None,
    device: Devices = None,
    encoder_device: EncoderDevice = None,
    expert_device: ExpertDevice = None,
    mmap: InPlace = False,
    compress: Compress = None,
    speculate: Speculate = None,
    draft: DraftModel = None,
    json: Annotated[bool, Option("--json", help="Write the whole answer, its tokens, boxes and timings as one JSON object.")] = False,
    jsonl: Annotated[bool, Option("--jsonl", help="Write each piece as a JSON object on a line, and last that of --json.")] = False,
    verbose: Annotated[bool, Option("--verbose", "-v", help="Print timings, memory and image sizes.")] = False,
    version: Annotated[bool, Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> int:
    """Answer PROMPT, or hold a conversation when it is missing."""
    _import_numpy()
    from pyengine.cli import answer, asked, pictures, screen
    from pyengine.cli.report import planned

    typed = [*([] if model_option is None or model is None else [model]), *(prompt or ()), *(prompt_option or ())]
    model = model if model_option is None else model_option
    if model is None and server is None:
        raise RequestError("MODEL is missing: a GGUF file, or a name from `list`")
    if api_key is not None and server is None:
        raise RequestError("--api-key is for --server URL")
    if server is not None:
        from pyengine.cli.talk import remote

        remote.refuse_local({"--raw": raw, "--ctx": ctx is not None, "--kv-dtype": kv_dtype != "f16", "--threads": threads is not None,
                             "--batch": batch != N_BATCH, "--mmproj": mmproj is not None, "--picture": picture is not None,
                             "--pictures": pictures_kept is not None, "--device": bool(device), "--encoder-device": encoder_device is not None,
                             "--expert-device": expert_device is not None, "--mmap": mmap, "--lora": bool(lora), "--lora-scaled": bool(lora_scaled),
                             "--compress": compress is not None, "--speculate": speculate is not None, "--draft": draft is not None})
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical,
             "repeat_penalty": repeat_penalty, "repeat_last_n": repeat_last_n, "presence_penalty": presence_penalty,
             "frequency_penalty": frequency_penalty, "seed": seed, "top_n_sigma": top_n_sigma, "xtc_probability": xtc_probability,
             "xtc_threshold": xtc_threshold, "dynatemp_range": dynatemp_range, "dynatemp_exponent": dynatemp_exponent, "mirostat": mirostat,
             "mirostat_tau": mirostat_tau, "mirostat_eta": mirostat_eta, "dry_multiplier": dry_multiplier, "dry_base": dry_base,
             "dry_allowed_length": dry_allowed_length, "dry_penalty_last_n": dry_penalty_last_n,
             "dry_sequence_breakers": answer.breakers(dry_sequence_breakers) if dry_sequence_breakers else None}
    sampling = {k: v for k, v in given.items() if v is not None}
    if raw and system is not None:
        raise RequestError("--system needs the chat template, which --raw leaves out")
    if json and jsonl:
        raise RequestError("--json and --jsonl: give one of them")
    if lines and (typed or file):
        raise RequestError("--lines reads the questions from standard input, so there is no other PROMPT")
    answer.check_sampling(sampling)
    devices = planned.parse_device(device or ())
    options = {"image": pictures.parse_options(image_option or (), "--image-option"),
               "video": pictures.parse_options(video_option or (), "--video-option")}
    shown = [*(pictures.open_picture(file, options["image"]) for file in pictures.separate(image or ())),
             *(pictures.open_picture(file, options["video"], "video") for file in video or ())]
    question = None if lines else asked.question(typed, file or (), options["image"])
    if question is not None and not any(isinstance(part, str) and part.strip() for part in question.parts):
        question, shown = None, [*shown, *question.found]                # pictures alone wait for a question
    if question is None and shown and typed and not any(map(str.strip, typed)):
        question = asked.Asked([], [], "", "")                           # an empty PROMPT: what a model says of pictures alone
    one = question is not None
    if not one and (json or jsonl or draw):
        raise RequestError(f"{'--json' if json else '--jsonl' if jsonl else '--draw'} needs a PROMPT")
    if not one and not lines and not (sys.stdin is not None and sys.stdin.isatty()):
        asked.refuse_silence(model if server is None else None)
    if draw is not None:
        pictures.check_drawing(draw, [*shown, *question.found])
    recommended = {} if server is not None else answer.recommended(model)
    settings = answer.Settings(sampling, answer.limit(max_tokens if max_tokens is not None else recommended.get("num_predict")),
                               tuple(stop or ()))
    loaded = remote.connect(server, model, api_key or os.environ.get("PYENGINE_API_KEY")) if server is not None else screen.load(
        model, modules=() if raw else ANSWERING, n_ctx=ctx or recommended.get("num_ctx"), kv_dtype=kv_dtype, n_threads=threads, n_batch=batch, mmproj=mmproj,
        images=planned.parse_size(picture, pictures_kept), device=devices, encoder_device=encoder_device, expert_device=expert_device, mmap=mmap,
        adapters=planned.parse_adapters(lora or (), lora_scaled or ()), compress=compress, speculate=speculate, draft=draft)
    if shown or draw is not None:
        pictures.need_encoder(loaded)
    if ctx is not None and ctx > loaded.config.n_ctx_train:
        note(f"note: --ctx {ctx:,} is more than the {loaded.config.n_ctx_train:,} tokens that the model was trained for; beyond them "
             "answers get worse")
    base = not raw and answer.is_base(loaded.file.metadata, loaded.file.path)
    if base and system is not None:
        raise RequestError("--system: the file has no chat template, and its model seems to only continue text")
    if verbose:
        note("the prompt is continued as it is, for --raw" if raw else
             "base model: no chat template, so the prompt is completed as plain text" if base else
             "the prompt goes through the chat template")
    elif base and question is not None and sys.stderr.isatty():
        note("(base model: the file has no chat template, so the prompt is not answered but continued as plain text)")
    code = 0
    if question is None:
        from pyengine.cli.talk import chat

        settle()
        talk = chat.Chat(loaded, settings, system, raw or base, verbose, options)
        chat.run(talk, shown)
    else:
        parts = question.settle(loaded.media is not None, loaded.plan.model)
        turns = [{"role": "system", "content": system}] if system else []
        whole = answer.Question([*turns, answer.user_message([*shown, *parts])], raw or base)
        print_it = answer.print_json if json else answer.print_jsonl if jsonl else answer.print_answer
        found, stopped = print_it(loaded, whole, settings, verbose)
        if stopped:
            code = INTERRUPTED
        elif draw is not None and not pictures.draw(found, [*shown, *question.found], draw):
            code = NOTHING_DRAWN
    if verbose and server is None:
        answer.note_memory(loaded)
    return code


MODES = ("run", "chat")              # what others say for what is meant anyway
COMMANDS = ("pull", "plan", "bench", "perplexity", "serve", "ps", "stop", "show", "list", "hardware", "graph", "attention", "embed", "classify", "index",
            "search")
# Typer carries a click of its own since 0.26; this is the base of its errors about arguments in either case.
_ArgumentError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _call(app: Any, arguments: list[str]) -> Any:
    """Do what the arguments say; a model that is not there is offered, and what was asked is done when it is."""
    try:
        return app(arguments, prog_name=PROGRAM, standalone_mode=False)
    except ModelNotFoundError as error:
        if _meant(error.name or ""):
            raise
        from pyengine.cli import pulling

        pulling.offer(error)
    return app(arguments, prog_name=PROGRAM, standalone_mode=False)


def _commands() -> Any:
    from pyengine.cli.subcommands import commands          # an answer begins sooner without them

    settle()
    return commands


def _form_of(arguments: Sequence[str]) -> tuple[Any, list[str]]:
    """Return the form that the arguments ask for, and its arguments. Raises: RequestError for a command that others have."""
    first, *rest = arguments or ("--help",)
    if first in COMMANDS:
        return _commands(), [first, *rest]
    if first == "ls":
        return _commands(), ["list", *rest]
    if first == "help":
        return (_commands(), [rest[0], "--help"]) if rest and rest[0] in COMMANDS else (main_form, ["--help"])
    if first == "version":
        return main_form, ["--version"]
    if first in MODES:
        return main_form, rest or ["--help"]
    if first in words.COMMANDS and not os.path.isfile(first):
        raise RequestError(f"there is no command {first}: {words.COMMANDS[first]}")
    return main_form, [first, *rest]


@contextmanager
def _notes() -> Iterator[None]:
    """Let what the library warns of be a line on standard error, each once."""
    said: set[str] = set()

    def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
        if not issubclass(category, ModelWarning):
            others(message, category, *rest, **more)
        elif (text := str(message)) not in said:
            said.add(text)
            note(f"note: {words.told(' '.join(text.split()))}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", ModelWarning)
        others, warnings.showwarning = warnings.showwarning, show
        yield


def _close_output() -> None:
    """Let what is still to be written go nowhere, so that the interpreter's end says nothing about a closed pipe."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())


def execute(arguments: Sequence[str]) -> int:
    """Do what the arguments say and return the exit code; errors made on purpose become one line on standard error."""
    try:
        app, left = _form_of(arguments)
        with _notes():
            code = _call(app, left)
    except PyEngineError as error:
        plan_ = getattr(error, "plan", None)                  # what would fit, in options of the command
        if plan_ is not None:
            note(f"{PROGRAM}: {plan_.refusal(options=True)}")
        else:
            complain(f"{error}{_meant(arguments[0]) if isinstance(error, ModelNotFoundError) else ''}")
        if os.environ.get("PYENGINE_DEBUG") == "1":
            traceback.print_exc()
        return USAGE_ERROR
    except _ArgumentError as error:
        complain(f"{error.format_message().rstrip('.')}. `{PROGRAM} --help` says what there is")
        return USAGE_ERROR
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except ReaderLeft:
        _close_output()
        return NO_READER
    return code if isinstance(code, int) else 0


def _meant(first: str) -> str:
    """Name the command that a first argument resembles, for an error about a model of that name."""
    from difflib import get_close_matches

    near = get_close_matches(first, COMMANDS, n=1, cutoff=0.7)
    return f"; the command is called `{near[0]}`" if near and first not in COMMANDS else ""


def complete() -> None:
    """Write what a shell that asks in its environment may complete a line with: with `run` and `chat` as without them."""
    env = os.environ
    line = "_TYPER_COMPLETE_ARGS" if "_TYPER_COMPLETE_ARGS" in env else "COMP_WORDS"
    typed = env.get(line, "").split()
    if len(typed) > 1 and typed[1] in MODES and env.get("COMP_CWORD") != "1":
        env[line] = re.sub(rf"(\s){typed[1]}\s+", r"\1", env[line], count=1)
        env["COMP_CWORD"] = str(int(env.get("COMP_CWORD", "1")) - 1)
    (_commands() if len(typed) > 1 and typed[1] in COMMANDS else main_form)([], prog_name=PROGRAM)
