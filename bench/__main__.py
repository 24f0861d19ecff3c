"""`python -m bench SUITE`: measure, print, write JSON, compare with an earlier file, draw. `python -m bench -h` lists the suites.

Exit codes: 0; 1 when a result is wrong, a kernel is missing, or --compare finds a regression; 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .machine import describe


def _paths(names: list[str]) -> list[Path]:
    """Find the files to measure by path or by a name of `pyengine-run list`; by default those in models/ where the command runs."""
    if not names:
        found = sorted(Path("models").glob("*.gguf"))
        if not found:
            raise SystemExit("bench: give a model: there is no *.gguf in models/")
        return found
    from pyengine.files.stores import find_model

    out = []
    for name in names:
        path = find_model(name)
        out.append(Path(path[0] if isinstance(path, list) else path))
    return out


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    if args.suite == "kernels":
        from . import kernels
        from pyengine.native import engine

        isas = args.isa or list(engine.isas())
        if unknown := set(isas) - set(engine.isas()):
            raise SystemExit(f"bench: this machine and build have {', '.join(engine.isas())}, not {', '.join(unknown)}")
        return kernels.run(isas, args.threads, args.only)
    if args.suite == "embed":
        from . import vectors

        return vectors.run(args.model, args.threads, args.sentences, args.rounds, args.peers, args.format or vectors.FORMATS, args.rows)
    if args.suite == "convolutions":
        from . import convolutions

        return convolutions.run(args.rounds, bool(args.peers))
    if args.suite == "vision" and args.encoder:
        from . import encoders

        return encoders.run(args.encoder, args.threads, args.layers, args.rounds, args.peers, args.format or encoders.FORMATS,
                            args.measure or ["speed"], args.text_layers, args.files)
    if args.suite == "vision":
        from . import vision

        return vision.run(args.threads, vision.Shape(layers=args.layers or 2), args.rounds, args.peers)
    if args.suite == "quality":
        from . import sight

        (file,) = _paths([args.model])
        return sight.run(file, args.threads, args.number, args.seed, args.weights or sight.TYPES, args.kv or sight.CACHES,
                         args.checkpoint)
    if args.suite == "cache":
        return _measure_cache(args)
    if args.suite == "serving":
        from . import serving

        (file,) = _paths([args.model])
        return serving.run(file, args.seeing, (args.streams, args.seeing_streams), args.minutes, args.llama_server, args.rounds, args.threads)
    if args.suite == "lookup":
        from . import lookup

        (file,) = _paths([args.model])
        return lookup.run(file, args.threads, args.generate, args.rounds, args.seconds, args.llama_server, args.draft, args.kind)
    from . import peers, together, widths

    if args.suite == "widths":
        return widths.run(_paths(args.model), args.threads, args.rounds)
    paths = _paths(args.model)
    if args.suite == "together":
        return together.run(paths, args.threads, args.conversations or [4, 16], args.prompt, args.generate, args.rounds)
    if args.suite == "models":
        return peers.models(paths, args.threads, args.prompt, args.generate, args.rounds)
    return peers.peers(paths, args.threads, args.prompt, args.generate, args.rounds, args.quality, args.engine, dict(args.peer))


def _measure_cache(args: argparse.Namespace) -> dict[str, Any]:
    from . import cache, cache_models

    policies, ratios = args.policy or cache.POLICIES, args.ratio or cache.RATIOS
    if args.speed:
        chosen = [setting for group in cache.settings(args.policy or ["look-m"], ratios).values() for setting in group]
        return cache_models.speeds(args.speed, args.threads, args.depth or cache_models.DEPTHS, chosen, args.kv, args.rounds, args.layers)
    (file,) = _paths([args.model])
    if args.budget:
        return cache_models.perplexities(file, args.threads, args.budget, args.policy or cache_models.POLICIES, args.kv)
    asked_for = {"tasks": args.task or cache.TASKS, "numbers": args.pictures or cache.NUMBERS, "policies": policies, "ratios": ratios}
    return cache.run(file, args.threads, args.number, args.seed, args.kv, asked_for, args.tokens)


def _named_folder(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not name or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=FOLDER, a folder that is there")
    return name, Path(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    suites = parser.add_subparsers(dest="suite", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-t", "--threads", type=int, default=describe()["cores"], help="default: all cores")
    common.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    common.add_argument("--compare", type=Path, metavar="OLD.json", help="name what became slower than there; exit code 1")
    common.add_argument("--png", type=Path, metavar="DIR", help="draw charts")
    kernels = suites.add_parser("kernels", parents=[common], help="every kernel alone, checked against the reference")
    kernels.add_argument("--only", metavar="REGEX", help="jobs whose name matches, such as 'linear format Q4_K'")
    kernels.add_argument("--isa", action="append", help="default: all that this machine has")
    runs = argparse.ArgumentParser(add_help=False)
    runs.add_argument("model", nargs="*", help="GGUF files or names; default: models/*.gguf")
    runs.add_argument("-p", "--prompt", type=int, default=512)
    runs.add_argument("-n", "--generate", type=int, default=128)
    runs.add_argument("-r", "--rounds", type=int, default=5)
    suites.add_parser("models", parents=[common, runs], help="whole models, as a share of the machine's limits")
    peers = suites.add_parser("peers", parents=[common, runs], help="beside llama.cpp and other builds of it")
    peers.add_argument("--quality", action="store_true", help="also perplexity, divergence and greedy texts of both")
    peers.add_argument("--engine", action="append", choices=["pyengine", "llama.cpp"], help="may be repeated; default: both")
    peers.add_argument("--peer", action="append", type=_named_folder, default=[], metavar="NAME=FOLDER",
                       help="another engine: a folder into which pip installed llama_cpp or ik_llama_cpp; repeatable")
    beside = suites.add_parser("together", parents=[common, runs], help="conversations side by side, beside one after the other")
    beside.add_argument("-s", "--conversations", type=int, action="append", metavar="N", help="may be repeated; default: 4 and 16")
    lookup = suites.add_parser("lookup", parents=[common], help="answers with drafts by prompt lookup, beside those without")
    lookup.add_argument("model", help="a GGUF file or name")
    lookup.add_argument("-n", "--generate", type=int, default=128)
    lookup.add_argument("-r", "--rounds", type=int, default=5)
    lookup.add_argument("--seconds", type=float, default=300.0, help="behind which no further round begins, divided among kinds (default: 300)")
    lookup.add_argument("--kind", action="append", default=[], choices=["edit", "edit and explain", "question", "free"], help="may be repeated; default: all")
    lookup.add_argument("--llama-server", type=Path, metavar="FILE", help="llama.cpp's command, to be measured in turns")
    lookup.add_argument("--draft", type=Path, metavar="FILE", help="a draft model, whose answers are measured in the same rounds")
    serving = suites.add_parser("serving", parents=[common], help="the server under load, and beside llama.cpp's")
    serving.add_argument("model", help="a GGUF file or name")
    serving.add_argument("--seeing", type=Path, metavar="FILE", help="a second model, asked about the demo model's pictures")
    serving.add_argument("--streams", type=int, default=64, metavar="N", help="of the first model (default: 64)")
    serving.add_argument("--seeing-streams", type=int, default=16, metavar="N", help="of the second one (default: 16)")
    serving.add_argument("--minutes", type=float, default=15, help="of load; 0: none (default: 15)")
    serving.add_argument("--llama-server", type=Path, metavar="FILE", help="llama.cpp's command, to be measured in turns")
    serving.add_argument("-r", "--rounds", type=int, default=5)
    quality = suites.add_parser("quality", parents=[common], help="the demo model's answers about fresh pictures, by types of weights and caches")
    quality.add_argument("model", help="a GGUF file, best with F32 or F16 weights: other types are made from them")
    quality.add_argument("-n", "--number", type=int, default=200, help="conversations of each of six kinds (default: 200)")
    quality.add_argument("--seed", type=int, default=20_261_121, help="of the pictures")
    quality.add_argument("--weights", action="append", choices=["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0"],
                         help="may be repeated (default: F32, F16, Q8_0, Q4_0)")
    quality.add_argument("--kv", action="append", help="formats of the cache, may be repeated (default: f32, f16, q8_0, q4_0)")
    quality.add_argument("--checkpoint", type=Path, metavar="DIR", help="also transformers' scores, and whether its answers are ours")
    _add_cache(suites, common)
    widths = suites.add_parser("widths", parents=[common], help="16 bits beside 4: bytes, tokens/s, quality, in one table")
    widths.add_argument("model", nargs="*", help="GGUF files or names; default: models/*.gguf")
    widths.add_argument("-r", "--rounds", type=int, default=3)
    embed = suites.add_parser("embed", parents=[common], help="vectors of sentences, beside transformers and llama.cpp")
    embed.add_argument("model", type=Path, help="a folder of sentence-transformers")
    embed.add_argument("-n", "--sentences", type=int, default=1000, help="of 3 to 60 words (default: 1000)")
    embed.add_argument("-r", "--rounds", type=int, default=3)
    embed.add_argument("--rows", type=int, default=512, help="of a run, or of a batch of llama.cpp (default: 512)")
    embed.add_argument("--format", action="append", choices=["F32", "F16", "Q8_0"], help="may be repeated (default: all three)")
    embed.add_argument("--peers", action="append", choices=["torch", "llama.cpp"], default=[], help="also measure, in turns")
    layers = suites.add_parser("convolutions", parents=[common], help="layers of VGG16 and DaViT, one thread, beside PyTorch's")
    layers.add_argument("-r", "--rounds", type=int, default=9)
    layers.add_argument("--peers", action="append", choices=["torch"], default=[], help="also measure, in turns")
    vision = suites.add_parser("vision", parents=[common], help="image encoders: ops in SigLIP So400m's shape, or whole models'")
    vision.add_argument("--encoder", action="append", choices=["gemma3", "qwen2.5-vl"], default=[],
                        help="of a whole model, through its own graph; without it, ops put together here")
    vision.add_argument("--layers", type=int, help="fewer than all; a picture's time is scaled (default: all of a model's; 2 of ops)")
    vision.add_argument("-r", "--rounds", type=int, default=5)
    vision.add_argument("--peers", action="append", choices=["torch", "torch-bf16", "llama.cpp"], default=[],
                        help="also measure, in turns; the last two with --encoder")
    whole = vision.add_argument_group("with --encoder")
    whole.add_argument("--format", action="append", choices=["F32", "F16", "BF16", "Q8_0"], help="default: all four")
    whole.add_argument("--measure", action="append", choices=["speed", "memory", "turns"], help="default: speed")
    whole.add_argument("--text-layers", type=int, metavar="N", help="of the text model whose turns are measured (default: all)")
    whole.add_argument("--files", type=Path, metavar="DIR", help="keep the random models there, and take them from there")
    return parser


def _add_cache(suites: Any, common: argparse.ArgumentParser) -> None:
    cache = suites.add_parser("cache", parents=[common], help="caches that forget: answers about many pictures, time, perplexity")
    cache.add_argument("model", nargs="?", default="converters/demo/weights/demo-many-f16.gguf",
                       help="the demo model of many pictures (default); with --budget any text model")
    cache.add_argument("-n", "--number", type=int, default=50, help="questions of each task and number of pictures (default: 50)")
    cache.add_argument("--seed", type=int, default=20_261_201, help="of the pictures")
    cache.add_argument("--task", action="append", help="may be repeated (default: all)")
    cache.add_argument("--pictures", type=int, action="append", metavar="N", help="of a question, may be repeated (default: 8, 16, 24)")
    cache.add_argument("--tokens", type=int, choices=[16, 25, 36, 64], default=16, help="of a picture (default: 16)")
    cache.add_argument("--policy", action="append", metavar="TEXT", help="look-m:merge=pivotal, h2o and the like, may be repeated (default: all)")
    cache.add_argument("--ratio", type=float, action="append", help="share of the cache, may be repeated (default: 1 to 0.01)")
    cache.add_argument("--kv", default="f16", help="format of the cache (default: f16)")
    cache.add_argument("--budget", type=int, action="append", metavar="CELLS", help="perplexity of a text model with so many; may be repeated")
    cache.add_argument("--speed", action="append", choices=["llava", "qwen"], help="time of a token of random models; may be repeated")
    cache.add_argument("--depth", type=int, action="append", metavar="N", help="tokens of their prompts (default: 4096 to 32768)")
    cache.add_argument("-r", "--rounds", type=int, default=3, help="of --speed")
    cache.add_argument("--layers", type=int, default=4, help="of random models (default: 4)")


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    old = json.loads(args.compare.read_text()) if args.compare else None
    result = {**_measure(args), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
              "machine": {**describe(), "threads": args.threads}}
    if args.json:
        from pyengine.files.writing import written

        args.json.parent.mkdir(parents=True, exist_ok=True)
        with written(args.json) as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())
    if args.png:
        from .charts import draw

        for path in draw(result, args.png):
            print(f"wrote {path}")
    failed = bool(result.get("missing")) or any(not r.get("correct", True) for r in result["results"])
    if old is not None:
        from .compare import compare

        comparison = compare(old, result)
        print(comparison.text())
        failed |= comparison.failed
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
