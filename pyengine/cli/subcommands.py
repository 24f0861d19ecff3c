"""The commands beside MODEL [PROMPT]; what is slow to import is imported by the command that needs it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from pyengine.cli import classifying as classifying, embedding as embedding, finding as finding, looking as looking         # each adds its own to `commands`
from pyengine.cli.forms import commands, Form
from pyengine.cli.options import (
    BatchSize, check_threads, Compress, Context, Devices, DraftModel, EncoderDevice, ExpertDevice, InPlace, Json, KvDtype, Lora, LoraScaled, Mmproj, model_names,
    ModelName, N_BATCH, Picture, Pictures, Server, Speculate, Threads,
)
from pyengine.errors import RequestError


@commands.command(cls=Form)
def pull(
    name: Annotated[str, Argument(metavar="NAME", show_default=False, help=(
        "hf.co/org/repo or org/repo, with :QUANT, for Hugging Face; model:tag or ollama.com/user/model:tag for Ollama's registry."))],
    yes: Annotated[bool, Option("--yes", "-y", help="Ask nothing, and fetch also what does not run here.")] = False,
) -> int:
    """Fetch a model into the store where `list` and other programs find it."""
    from pyengine.cli import pulling

    return pulling.pull(name, yes)


@commands.command(cls=Form)
def plan(
    model: ModelName,
    ctx: Context = None,
    seq: Annotated[int, Option("--seq", "--parallel", "-s", min=1, help="Conversations at once, each with the whole context.")] = 1,
    kv_dtype: KvDtype = "f16",
    batch: BatchSize = N_BATCH,
    picture: Picture = None,
    pictures: Pictures = None,
    threads: Threads = None,
    mmproj: Mmproj = None,
    device: Devices = None,
    encoder_device: EncoderDevice = None,
    expert_device: ExpertDevice = None,
    mmap: InPlace = False,
    compress: Compress = None,
    draft: DraftModel = None,
    lora: Lora = None,
    lora_scaled: LoraScaled = None,
    explain: Annotated[bool, Option("--explain", help="Print the arithmetic, term by term.")] = False,
    png: Annotated[Path | None, Option("--png", metavar="FILE", help="Draw it as stacked bars.")] = None,
    json: Json = False,
) -> int:
    """Say how much memory a model needs, by device and purpose, without loading it; exit code 0 if it fits, 1 if not."""
    from pyengine.cli import answer, screen
    from pyengine.cli.report import planned as shown
    from pyengine.memory import fit

    images = shown.parse_size(picture, pictures)
    n_ctx = ctx or answer.recommended(model).get("num_ctx")
    found = fit.plan(model, n_ctx=n_ctx, kv_dtype=kv_dtype, n_batch=batch, n_threads=threads, mmproj=mmproj, n_seq=seq, images=images,
                          nearest=True, device=shown.parse_device(device or ()), encoder_device=encoder_device,
                          expert_device=expert_device, mmap=mmap, adapters=shown.parse_adapters(lora or (), lora_scaled or ()), compress=compress,
                          draft=draft)
    if png is not None:
        shown.draw(found, png)
    if json:
        screen.show_json(found.to_json())
        return 0 if found.fits else shown.DOES_NOT_FIT
    if explain:
        screen.show(found.explain() + "\n")
    return shown.show_plan(found)


@commands.command(cls=Form)
def bench(
    model: ModelName,
    prompt: Annotated[str, Option("--prompt", "--n-prompt", "-p", metavar="N,..", help="Tokens of the tests ppN; 0: none of them.")] = "512",
    generate: Annotated[str, Option("--generate", "--n-gen", "-n", metavar="N,..", help="Tokens of the tests tgN; 0: none.")] = "128",
    depth: Annotated[str, Option("--depth", "--n-depth", "-d", metavar="N,..", help="Tokens in the context before each test.")] = "0",
    repetitions: Annotated[int, Option("--repetitions", "-r", min=1, help="Runs of each, after one to warm up.")] = 5,
    threads: Annotated[str | None, Option("--threads", "-t", metavar="N,..", help="Numbers of threads (default: one for each fast "
                                          "physical core).")] = None,
    kv_dtype: KvDtype = "f16",
    batch: BatchSize = N_BATCH,
    mmproj: Mmproj = None,
    device: Devices = None,
    expert_device: ExpertDevice = None,
    mmap: InPlace = False,
    lora: Lora = None,
    lora_scaled: LoraScaled = None,
    profile: Annotated[bool, Option("--profile", help="Time each op in one more run of each test.")] = False,
    json: Json = False,
) -> None:
    """Measure tokens per second by llama-bench's definitions; prints a Markdown table."""
    from pyengine.cli import screen
    from pyengine.cli.report import measured, planned

    prompts, generated = measured.parse_numbers("-p", prompt), measured.parse_numbers("-n", generate)
    depths = measured.parse_numbers("-d", depth)
    tests = [(p, n, d) for d in depths for p, n in (*((p, 0) for p in prompts if p), *((0, n) for n in generated if n))]
    if not tests:
        raise RequestError("bench: -p 0 and -n 0 leave nothing to measure")
    settings = {"kv_dtype": kv_dtype, "n_batch": batch, "mmproj": mmproj, "device": planned.parse_device(device or ()),
                "expert_device": expert_device, "mmap": mmap, "adapters": planned.parse_adapters(lora or (), lora_scaled or ())}
    found = list(measured.results(model, tests, measured.parse_threads(threads, check_threads), repetitions, profile, settings))
    if json:
        screen.show_json([{**result.to_json(), "n_tokens": result.n_tokens, "depth": result.depth, **about}
                          for about, results in found for result in results])
    else:
        measured.show_results(found)


@commands.command(cls=Form)
def perplexity(
    model: ModelName,
    file: Annotated[str, Option("--file", "-f", show_default=False, help="The text; - reads it from standard input.")],
    ctx: Annotated[int, Option("--ctx", "-c", min=4, help="Tokens of a chunk.")] = 512,
    chunks: Annotated[int | None, Option("--chunks", min=1, help="Most chunks that count; default: all.")] = None,
    threads: Threads = None,
    kv_dtype: KvDtype = "f16",
    batch: BatchSize = N_BATCH,
    lora: Lora = None,
    lora_scaled: LoraScaled = None,
    json: Json = False,
) -> None:
    """Measure how well a model predicts a text, by llama-perplexity's definition."""
    import time

    from pyengine.cli import screen
    from pyengine.cli.report.planned import parse_adapters
    from pyengine.measure.perplexity import perplexity as measure

    try:
        text = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise RequestError(f"-f {file}: {error.strerror}") from None
    adapters = parse_adapters(lora or (), lora_scaled or ())
    loaded = screen.load(model, n_ctx=ctx, kv_dtype=kv_dtype, n_threads=threads, n_batch=batch, adapters=adapters)
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


@commands.command(cls=Form)
def show(
    model: ModelName,
    mmproj: Mmproj = None,
    template: Annotated[bool, Option("--template", help="Print the chat template only.")] = False,
    system: Annotated[bool, Option("--system", help="Print the system text only (of an Ollama model).")] = False,
    parameters: Annotated[bool, Option("--parameters", help="Print the recommended sampling and an Ollama model's parameters only.")] = False,
    license: Annotated[bool, Option("--license", help="Print the license only.")] = False,
    json: Json = False,
) -> None:
    """Say what a model's file holds and what it can do: sizes, formats, tokenizer, sampling, metadata."""
    from pyengine.cli import screen
    from pyengine.cli.report import files

    asked = {"template": template, "system": system, "parameters": parameters, "license": license}
    if any(asked.values()):
        part, *more = [name for name, wanted in asked.items() if wanted]
        text = files.part_of(model, part)
        if more:
            raise RequestError(f"--{part} and --{more[0]}: each is printed alone")
        if text is None:
            raise RequestError(f"{model}: {files.MISSING[part]}")
        screen.show(text)
    elif json:
        screen.show_json(files.describe(model, mmproj))
    else:
        files.show_model(model, mmproj)


@commands.command("list", cls=Form)
def list_models(
    verbose: Annotated[bool, Option("--verbose", "-v", help="Show where each is kept, too.")] = False,
    json: Json = False,
) -> None:
    """Show the models that can be named on this machine."""
    from pyengine.cli import screen
    from pyengine.cli.report import files

    if json:
        screen.show_json(files.models())
    else:
        files.show_models(verbose)


@commands.command(cls=Form)
def hardware(json: Json = False) -> None:
    """Say what this machine has: memory, cores, caches, GPUs, and what of it a model can use."""
    from pyengine.cli import screen
    from pyengine.cli.report import machine

    found = machine.detect()
    if json:
        screen.show_json(found.to_json())
    else:
        machine.show_hardware(found)


@commands.command(cls=Form)
def graph(model: ModelName, dot: Annotated[bool, Option("--dot", help="Graphviz text: pipe it into `dot -Tsvg`.")] = False,
          no_passes: Annotated[bool, Option("--no-passes", help="The graph as the model wrote it, before fusion.")] = False) -> None:
    """Print the graph of a model's step, as text or for Graphviz."""
    from pyengine.cli.report.graph import listing

    print(listing(model, dot, not no_passes))


@commands.command(cls=Form)
def serve(
    model: Annotated[list[str] | None, Argument(metavar="[MODEL...]", show_default=False, autocompletion=model_names, help=(
        "Files, or names from `list`: loaded at once, and kept. Without any: --any."))] = None,
    any_model: Annotated[bool, Option("--any", help="Serve every model that `list` shows, each loaded when it is asked for.")] = False,
    keep_alive: Annotated[str, Option("--keep-alive", metavar="TIME", help=(
        "How long a model that was loaded so stays after its last use: 300, 5m, 1h; -1: for ever."))] = "5m",
    host: Annotated[str, Option("--host", help="Address to listen at; 0.0.0.0 is every one of this machine.")] = "127.0.0.1",
    port: Annotated[int, Option("--port", min=0, max=65535)] = 8080,
    seq: Annotated[int, Option("--seq", "-s", min=1, help="Requests worked on at once, each with the whole context.")] = 4,
    api_key: Annotated[list[str] | None, Option("--api-key", metavar="KEY", help=(
        "A key that requests must bring (default: $PYENGINE_API_KEY); repeatable."))] = None,
    allow_host: Annotated[list[str] | None, Option("--allow-host", metavar="NAME", help="A name that this server goes by; repeatable.")] = None,
    allow_origin: Annotated[list[str] | None, Option("--allow-origin", metavar="URL", help="A web page that may ask; repeatable.")] = None,
    tls_cert: Annotated[Path | None, Option("--tls-cert", metavar="FILE", help="Certificate (PEM), to serve by TLS.")] = None,
    tls_key: Annotated[Path | None, Option("--tls-key", metavar="FILE", help="Its key.")] = None,
    timeout: Annotated[float | None, Option("--timeout", min=0.001, metavar="SECONDS", help="Time that one answer may take (default: any).")] = None,
    allow_pull: Annotated[bool, Option("--allow-pull", help="Fetch models for requests: Ollama's /api/pull. Writes to the disk.")] = False,
    allow_url_images: Annotated[bool, Option("--allow-url-images", help="Fetch pictures by http and https, from public addresses only.")] = False,
    ctx: Context = None,
    kv_dtype: KvDtype = "f16",
    threads: Threads = None,
    batch: BatchSize = N_BATCH,
    mmproj: Mmproj = None,
    picture: Picture = None,
    pictures: Pictures = None,
    compress: Compress = None,
    speculate: Speculate = None,
    draft: DraftModel = None,
    lora: Lora = None,
    lora_scaled: LoraScaled = None,
) -> None:
    """Answer over HTTP, by OpenAI's, Ollama's and Anthropic's interfaces."""
    from pyengine.cli import serving
    from pyengine.cli.report import planned

    if (tls_cert is None) != (tls_key is None):
        raise RequestError("--tls-cert and --tls-key go together")
    adapters = planned.parse_adapters(lora or (), lora_scaled or ())
    for name, given in (("--mmproj", mmproj), ("--lora", adapters), ("--draft", draft)):
        if given is not None and len(model or ()) != 1:
            raise RequestError(f"{name} goes with one model")
    keys = api_key or [key for key in (os.environ.get("PYENGINE_API_KEY"),) if key]
    options: dict[str, Any] = {"n_ctx": ctx, "kv_dtype": kv_dtype, "n_threads": threads or serving.default_threads(), "n_batch": batch, "mmproj": mmproj, "n_seq": seq,
               "images": planned.parse_size(picture, pictures), "adapters": adapters, "compress": compress, "speculate": speculate, "draft": draft}
    asked = serving.Asked(model or (), any_model or not model, options, serving.keep_alive(keep_alive))
    access = {"api_keys": keys, "hosts": allow_host or (), "origins": allow_origin or ()}
    serving.serve(asked, host, port, access, (timeout, allow_pull, allow_url_images), (str(tls_cert), str(tls_key)) if tls_cert else None)


@commands.command(cls=Form)
def ps(server: Server = None, json: Json = False) -> None:
    """Show the models that a server has in memory, and when they go."""
    from pyengine.cli import running

    running.ps(server, json)


@commands.command(cls=Form)
def stop(model: Annotated[str, Argument(metavar="MODEL", show_default=False, help="A name that `ps` shows.")], server: Server = None) -> None:
    """Let a server unload a model, as soon as its requests have ended."""
    from pyengine.cli import running

    running.stop(model, server)
