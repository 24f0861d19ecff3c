"""The command `pyengine-run`: arguments in, text out. Everything else is in the library.

    pyengine-run MODEL [PROMPT]      one answer, or a conversation
    pyengine-run COMMAND ...         pull, plan, bench, perplexity, show, list, hardware

A first argument that is a command's name is that command; a file of such a name is given as ./plan. What is slow to
import is imported by the command that needs it.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from pyengine.cli.screen import complain, PROGRAM
from pyengine.errors import ModelNotFoundError, PyEngineError, RequestError

USAGE_ERROR = 2                      # exit code of everything that the user can mend
NOTHING_DRAWN = 1                    # exit code of --draw when the answer names no boxes
INTERRUPTED = 130                    # exit code after Ctrl-C: 128 + SIGINT, as shells have it

_COMMANDS = """[bold]Commands[/bold]

pyengine-run pull NAME: fetch a model from Hugging Face or Ollama's registry

pyengine-run plan MODEL: what it will take, per device and purpose

pyengine-run bench MODEL: tokens per second of prompts and generation

pyengine-run perplexity MODEL -f FILE: how well it predicts a text

pyengine-run show MODEL: what its file says

pyengine-run list: the models on this machine

pyengine-run hardware: what this machine has, and what of it can be used

Each takes --help. MODEL is a GGUF file, or a name that `list` shows."""

_settings: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": "rich"}
main_form = typer.Typer(**_settings)
commands = typer.Typer(**_settings)

ModelName = Annotated[str, Argument(metavar="MODEL", show_default=False, help="A GGUF file, or a name from `list`.")]
Prompt = Annotated[str | None, Argument(metavar="PROMPT", show_default=False,
                                        help="The question; - reads standard input. Without it: a conversation.")]
Context = Annotated[int | None, Option("--ctx", "-c", min=1, help="Context; default: as trained, or what fits.")]
KvDtype = Annotated[str, Option("--kv-dtype", help="Format of cached keys and values: f32, f16, bf16, q8_0, q4_0, q4_1, or keys/values.")]
Threads = Annotated[int | None, Option("--threads", "-t", min=1, help="Threads; default: fast physical cores.")]
BatchSize = Annotated[int, Option("--batch", "-b", min=1, help="Most rows of one step.")]
Mmproj = Annotated[str | None, Option("--mmproj", metavar="FILE", help="Its image encoder, if in a file of its own.")]
Json = Annotated[bool, Option("--json", help="Write JSON.")]
Devices = Annotated[list[str] | None, Option("--device", metavar="NAME=SIZE", help=(
    "cpu, or parts of memory that layers are spread over: cpu:0=6GiB; repeatable."))]
EncoderDevice = Annotated[str | None, Option("--encoder-device", metavar="NAME", help="The part that holds the image encoder.")]
ExpertDevice = Annotated[str | None, Option("--expert-device", metavar="NAME", help="The part that holds the layers' experts.")]
N_BATCH = 512


@main_form.command(epilog=_COMMANDS)
def run(
    model: ModelName,
    prompt: Prompt = None,
    image: Annotated[list[str] | None, Option("--image", metavar="FILE",
                                              help="A picture, also as data URL; repeatable.")] = None,
    video: Annotated[list[str] | None, Option("--video", metavar="FILE", help="A video; repeatable.")] = None,
    image_option: Annotated[list[str] | None, Option("--image-option", metavar="NAME=VALUE", help=(
        "Of the model's processor, for pictures: pan_and_scan=true, max_pixels=500000 ...; repeatable."))] = None,
    video_option: Annotated[list[str] | None, Option("--video-option", metavar="NAME=VALUE", help=(
        "The same for videos: sample_fps=1 ...; repeatable."))] = None,
    mmproj: Mmproj = None,
    draw: Annotated[Path | None, Option("--draw", metavar="OUT.png", help=(
        "Write the last picture with the boxes and points of the answer."))] = None,
    system: Annotated[str | None, Option("--system", help="System message.")] = None,
    raw: Annotated[bool, Option("--raw", help="Continue the prompt as it is, without the chat template.")] = False,
    max_tokens: Annotated[int, Option("--max-tokens", "-n", min=-1, help="Of an answer; -1: no limit.")] = 512,
    stop: Annotated[list[str] | None, Option("--stop", help="A text that ends the answer; repeatable.")] = None,
    temperature: Annotated[float | None, Option("--temperature", "--temp", help="0 takes the likeliest token.")] = None,
    top_k: Annotated[int | None, Option("--top-k", help="Draw from the k likeliest.")] = None,
    top_p: Annotated[float | None, Option("--top-p", help="Draw from the likeliest that have p.")] = None,
    min_p: Annotated[float | None, Option("--min-p", help="Draw from those with p times the likeliest's.")] = None,
    typical: Annotated[float | None, Option("--typical", help="Draw from the most typical that have p.")] = None,
    repeat_penalty: Annotated[float | None, Option("--repeat-penalty", help="Divide logits of recent tokens.")] = None,
    repeat_last_n: Annotated[int | None, Option("--repeat-last-n", help="How many are recent; -1: all.")] = None,
    presence_penalty: Annotated[float | None, Option("--presence-penalty", help="Lower recent tokens.")] = None,
    frequency_penalty: Annotated[float | None, Option("--frequency-penalty", help="Lower them each time.")] = None,
    seed: Annotated[int | None, Option("--seed", help="Of the draws; the same seed gives the same answer.")] = None,
    ctx: Context = None,
    kv_dtype: KvDtype = "f16",
    threads: Threads = None,
    batch: BatchSize = N_BATCH,
    device: Devices = None,
    encoder_device: EncoderDevice = None,
    expert_device: ExpertDevice = None,
    json: Json = False,
    verbose: Annotated[bool, Option("--verbose", "-v", help="Say what was seen, how fast, in what memory.")] = False,
) -> int:
    """Answer PROMPT, or hold a conversation when it is missing."""
    from pyengine.cli import answer, chat, pictures, planned, screen

    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical,
                "repeat_penalty": repeat_penalty, "repeat_last_n": repeat_last_n, "presence_penalty": presence_penalty,
                "frequency_penalty": frequency_penalty, "seed": seed}
    settings = answer.Settings({k: v for k, v in sampling.items() if v is not None},
                               None if max_tokens < 0 else max_tokens, tuple(stop or ()))
    if prompt is None and (json or draw):
        raise RequestError(f"{'--json' if json else '--draw'} needs a PROMPT")
    if raw and system is not None:
        raise RequestError("--system needs the chat template, which --raw leaves out")
    answer.check_sampling(settings.sampling)
    devices = planned.parse_device(device or ())
    options = {"image": pictures.parse_options(image_option or (), "--image-option"),
               "video": pictures.parse_options(video_option or (), "--video-option")}
    shown = [*(pictures.open_picture(file, options["image"]) for file in image or ()),
             *(pictures.open_picture(file, options["video"], "video") for file in video or ())]
    if draw is not None:
        pictures.check_drawing(draw, shown)
    text = sys.stdin.read() if prompt == "-" else prompt
    loaded = screen.load(model, n_ctx=ctx, kv_dtype=kv_dtype, n_threads=threads, n_batch=batch, mmproj=mmproj, device=devices,
                         encoder_device=encoder_device, expert_device=expert_device)
    if shown:
        pictures.need_encoder(loaded)
    base = not raw and answer.is_base(loaded.file.metadata, loaded.file.path)
    if base and system is not None:
        raise RequestError("--system: the file has no chat template, and its model seems to only continue text")
    if verbose:
        screen.note("the prompt is continued as it is, for --raw" if raw else
                    "the prompt is continued as it is: no chat template, and no name of one that answers" if base else
                    "the prompt goes through the chat template")
    code = 0
    if text is None:
        talk = chat.Chat(loaded, settings, system, raw or base, verbose, options)
        chat.run(talk, shown)
    else:
        turns = [{"role": "system", "content": system}] if system else []
        question = answer.Question([*turns, answer.user_message([*shown, text])], raw or base)
        found, stopped = (answer.print_json if json else answer.print_answer)(loaded, question, settings, verbose)
        if stopped:
            code = INTERRUPTED
        elif draw is not None and not pictures.draw(found, shown, draw):
            code = NOTHING_DRAWN
    if verbose:
        answer.note_memory(loaded)
    return code


@commands.command()
def pull(
    name: Annotated[str, Argument(metavar="NAME", show_default=False, help=(
        "hf.co/org/repo or org/repo, with :QUANT, for Hugging Face; model:tag or ollama.com/user/model:tag for Ollama's registry."))],
    yes: Annotated[bool, Option("--yes", "-y", help="Ask nothing, and fetch also what does not run here.")] = False,
) -> int:
    """Fetch a model into the store where `list` and other programs find it."""
    from pyengine.cli import pulling

    return pulling.pull(name, yes)


@commands.command()
def plan(
    model: ModelName,
    ctx: Context = None,
    seq: Annotated[int, Option("--seq", "-s", min=1, help="Conversations at once, each with the whole context.")] = 1,
    kv_dtype: KvDtype = "f16",
    batch: BatchSize = N_BATCH,
    picture: Annotated[str | None, Option("--picture", metavar="WIDTHxHEIGHT", help="Largest picture; default: what the processor "
                                          "allows.")] = None,
    pictures: Annotated[int | None, Option("--pictures", min=0, help="Pictures that are kept encoded; 0: no encoder.")] = None,
    threads: Threads = None,
    mmproj: Mmproj = None,
    device: Devices = None,
    encoder_device: EncoderDevice = None,
    expert_device: ExpertDevice = None,
    explain: Annotated[bool, Option("--explain", help="Print the arithmetic, term by term.")] = False,
    png: Annotated[Path | None, Option("--png", metavar="FILE", help="Draw it as stacked bars.")] = None,
    json: Json = False,
) -> None:
    """Say what a model will take, per device and purpose, without loading it."""
    from pyengine.cli import planned as shown, screen
    from pyengine.memory import fit

    images = shown.parse_size(picture, pictures)
    found = fit.plan(model, n_ctx=ctx, kv_dtype=kv_dtype, n_batch=batch, n_threads=threads, mmproj=mmproj, n_seq=seq, images=images,
                          nearest=True, device=shown.parse_device(device or ()), encoder_device=encoder_device,
                          expert_device=expert_device)
    if png is not None:
        shown.draw(found, png)
    if json:
        screen.show_json(found.to_json())
        return
    if explain:
        screen.show(found.explain() + "\n")
    screen.show(found.table())
    screen.show(found.verdict())


@commands.command()
def bench(
    model: ModelName,
    prompt: Annotated[int, Option("--prompt", "-p", min=0, help="Tokens of the test ppN; 0 leaves it out.")] = 512,
    generate: Annotated[int, Option("--generate", "-n", min=0, help="Tokens of the test tgN; 0 leaves it out.")] = 128,
    repetitions: Annotated[int, Option("--repetitions", "-r", min=1, help="Runs of each, after one to warm up.")] = 5,
    threads: Threads = None,
    kv_dtype: KvDtype = "f16",
    batch: BatchSize = N_BATCH,
    profile: Annotated[bool, Option("--profile", help="Time each op in one more run of each test.")] = False,
    json: Json = False,
) -> None:
    """Measure tokens per second by llama-bench's definitions."""
    from pyengine.cli import screen
    from pyengine.measure import speed

    if not prompt and not generate:
        raise RequestError("bench: -p 0 and -n 0 leave nothing to measure")
    loaded = screen.load(model, n_ctx=max(prompt, generate), kv_dtype=kv_dtype, n_threads=threads, n_batch=batch)
    prepared = loaded.program.prepared
    results = speed.measure(loaded, prompt, generate, repetitions, profile)
    about = {"model": loaded.plan.model, "n_threads": prepared.n_threads, "isa": prepared.isa,
             "n_batch": loaded.n_batch, "kv_dtype": kv_dtype}
    if json:
        screen.show_json([{**result.to_json(), "n_tokens": result.n_tokens, **about} for result in results])
        return
    screen.show(f"{loaded.plan.model}: {prepared.n_threads} threads, {prepared.isa}, "
                f"steps of {loaded.n_batch}, kv {kv_dtype}")
    rows = [(f"  {r.test}", f"{r.mean:.2f}", f"+- {r.deviation:.2f} tokens/s") for r in results]
    screen.show_columns(rows, right=(1,))
    for r in results if profile else ():
        spent, wall = sum(t.seconds for t in r.profile), r.profile_seconds
        screen.show(f"\n{r.test}: {spent * 1e3:.1f} ms in ops, {spent / wall:.1%} of {wall * 1e3:.1f} ms")
        times = [(f"  {t.op}", t.weights, f"{t.seconds * 1e3:.2f} ms", f"{t.seconds / wall:.1%}", f"{t.calls} calls")
                 for t in r.profile]
        screen.show_columns(times, right=(2, 3, 4))


@commands.command()
def perplexity(
    model: ModelName,
    file: Annotated[str, Option("--file", "-f", show_default=False, help="The text; - reads it from standard input.")],
    ctx: Annotated[int, Option("--ctx", "-c", min=4, help="Tokens of a chunk.")] = 512,
    chunks: Annotated[int | None, Option("--chunks", min=1, help="Most chunks that count; default: all.")] = None,
    threads: Threads = None,
    kv_dtype: KvDtype = "f16",
    batch: BatchSize = N_BATCH,
    json: Json = False,
) -> None:
    """Measure how well a model predicts a text, by llama-perplexity's definition."""
    import time

    from pyengine.cli import screen
    from pyengine.measure.perplexity import perplexity as measure

    try:
        text = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise RequestError(f"-f {file}: {error.strerror}") from None
    loaded = screen.load(model, n_ctx=ctx, kv_dtype=kv_dtype, n_threads=threads, n_batch=batch)
    started = time.perf_counter()

    def progress(done: int, total: int, value: float) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\r{done} of {total} chunks: {value:.4f}", end=end, file=sys.stderr, flush=True)

    found = measure(loaded, text, ctx, chunks, progress)
    seconds = time.perf_counter() - started
    if json:
        screen.show_json({"perplexity": found.value, "stderr": found.stderr, "n_tokens": found.n_tokens, "n_ctx": ctx,
                          "n_chunks": len(found.chunk_values), "chunks": list(found.chunk_values), "seconds": seconds,
                          "model": loaded.plan.model, "file": file})
    else:
        screen.show(f"perplexity {found.value:.4f} +- {found.stderr:.4f} ({found.n_tokens} tokens in "
                    f"{len(found.chunk_values)} chunks of {ctx}, {seconds:.1f} s)")


@commands.command()
def show(
    model: ModelName,
    mmproj: Mmproj = None,
    template: Annotated[bool, Option("--template", help="Print the chat template only.")] = False,
    json: Json = False,
) -> None:
    """Say what a model's file holds: sizes, formats, tokenizer, metadata."""
    from pyengine.cli import files, screen

    if template:
        if not files.show_template(model):
            raise RequestError(f"{model}: the file has no chat template")
    elif json:
        screen.show_json(files.describe(model, mmproj))
    else:
        files.show_model(model, mmproj)


@commands.command("list")
def list_models(json: Json = False) -> None:
    """Show the models that can be named on this machine."""
    from pyengine.cli import files, screen

    if json:
        screen.show_json(files.models())
    elif not files.show_models():
        screen.note("no models found: `pyengine-run pull NAME` fetches one; or set PYENGINE_MODELS to a folder of GGUF files")


@commands.command()
def hardware(json: Json = False) -> None:
    """Say what this machine has: memory, cores, caches, GPUs, and what of it a model can use."""
    from pyengine.cli import machine, screen

    found = machine.detect()
    if json:
        screen.show_json(found.to_json())
    else:
        machine.show_hardware(found)


@commands.command()
def graph(model: ModelName, dot: Annotated[bool, Option("--dot", help="Graphviz text: pipe it into `dot -Tsvg`.")] = False,
          no_passes: Annotated[bool, Option("--no-passes", help="The graph as the model wrote it, before fusion.")] = False) -> None:
    """Print the graph of a model's step, as text or for Graphviz."""
    from pyengine.cli.graph import listing

    print(listing(model, dot, not no_passes))


COMMANDS = ("pull", "plan", "bench", "perplexity", "show", "list", "hardware", "graph")
# Typer carries a click of its own since 0.26; this is the base of its errors about arguments in either case.
_ArgumentError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _call(app: Any, arguments: list[str]) -> Any:
    """Do what the arguments say; a model that is not there is offered, and what was asked is done when it is."""
    try:
        return app(arguments, prog_name=PROGRAM, standalone_mode=False)
    except ModelNotFoundError as error:
        from pyengine.cli import pulling

        pulling.offer(error)
    return app(arguments, prog_name=PROGRAM, standalone_mode=False)


def execute(arguments: Sequence[str]) -> int:
    """Do what the arguments say and return the exit code; errors made on purpose become one line on standard error."""
    app = commands if arguments and arguments[0] in COMMANDS else main_form
    try:
        code = _call(app, list(arguments) or ["--help"])
    except PyEngineError as error:
        complain(error)
        if os.environ.get("PYENGINE_DEBUG") == "1":
            traceback.print_exc()
        return USAGE_ERROR
    except _ArgumentError as error:
        complain(f"{error.format_message().rstrip('.')}. `{PROGRAM} --help` says what there is")
        return USAGE_ERROR
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    return code if isinstance(code, int) else 0


def main() -> None:
    """Run the command line and end the process with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")      # a terminal that has no such character shows a question mark
    sys.exit(execute(sys.argv[1:]))
