"""An image encoder of SigLIP So400m's shape, run as one program and beside PyTorch on the same numbers.

27 layers, 1152 wide, 16 heads of 72, MLP 4304, 896 x 896 pixels in 4096 patches of 14 x 14 x 3 (Zhai et al. 2023,
arXiv:2303.15343; Alabdulmohsin et al. 2023, arXiv:2305.13035). Weights are random; layers are all alike, so two of them are run
and a whole picture's time is that of the steps outside the layers and 27 times a layer's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyengine import Graph, ops
from pyengine.backends.cpu import isa
from pyengine.dtype import dtype
from pyengine.graph.tensor import make_leaf, Node

from . import limits
from .blocks import Blocks
from .stats import summary

FORMATS = ("F32", "F16", "BF16", "Q8_0")
TOLERANCE = {"F32": 1e-9, "F16": 1e-9, "BF16": 1e-9, "Q8_0": 1e-3}             # squared error / squared result; 8-bit activations
EPS = 1e-6
PICTURE_LAYERS = 27


@dataclass(frozen=True)
class Shape:
    """Sizes of an encoder. In Q8_0 the MLP is padded with zeros to whole blocks, which changes nothing."""

    layers: int = 2
    width: int = 1152
    heads: int = 16
    mlp: int = 4304
    patches: int = 4096
    pixels: int = 14 * 14 * 3

    def operations(self) -> dict[str, float]:
        """What must be computed, a product and a sum as 2: `patch` once; `products` and `attention` in each layer."""
        m, d = self.patches, self.width
        return {"patch": 2.0 * m * self.pixels * d, "products": 2.0 * m * d * (4 * d + 2 * self.mlp), "attention": 4.0 * m * m * d}


@dataclass(frozen=True)
class Functions:
    """What a forward pass is written with: three engines give three sets."""

    linear: Callable[..., Any]                                                 # x, names of weights -> one result for each
    norm: Callable[..., Any]
    attention: Callable[..., Any]
    gelu: Callable[..., Any]


def forward(f: Functions, x: Any, shape: Shape, positions: Any) -> Any:
    """The encoder, in the order of its paper: patches [m, pixels] to [m, width]."""
    x = f.linear(x, "patch")[0] + positions                                    # a convolution whose windows do not overlap
    for i in range(shape.layers):
        q, k, v = f.linear(f.norm(x, f"{i}.ln1"), f"{i}.q", f"{i}.k", f"{i}.v")
        x = x + f.linear(f.attention(q, k, v), f"{i}.out")[0]
        x = x + f.linear(f.gelu(f.linear(f.norm(x, f"{i}.ln2"), f"{i}.up")[0]), f"{i}.down")[0]
    return f.norm(x, "ln")


def random_weights(shape: Shape, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Matrices, biases (name.b) and norms of moderate size, float32."""
    sizes = {"patch": (shape.width, shape.pixels)}
    for i in range(shape.layers):
        sizes |= {f"{i}.{n}": (shape.width, shape.width) for n in ("q", "k", "v", "out")}
        sizes |= {f"{i}.up": (shape.mlp, shape.width), f"{i}.down": (shape.width, shape.mlp)}
    out: dict[str, np.ndarray] = {"positions": rng.standard_normal((shape.patches, shape.width), np.float32) * 0.1}
    for name, (n, k) in sizes.items():
        out[name] = rng.standard_normal((n, k), np.float32) * np.float32(k**-0.5)
        out[f"{name}.b"] = rng.standard_normal(n, np.float32) * np.float32(0.1)
    for name in ("ln", *(f"{i}.ln{j}" for i in range(shape.layers) for j in (1, 2))):
        out[name] = 1 + rng.standard_normal(shape.width, np.float32) * np.float32(0.1)
        out[f"{name}.b"] = rng.standard_normal(shape.width, np.float32) * np.float32(0.1)
    return out


def _padded(a: np.ndarray, name: str, multiple: int) -> np.ndarray:
    """The MLP's matrices with rows (up) or columns (down) of zeros to a multiple; gelu(0) is 0."""
    kind, axis = name.split(".")[1] if "." in name else "", {"up": 0, "down": 1}
    if kind not in axis or name.endswith("down.b"):
        return a
    width = [(0, 0)] * a.ndim
    width[axis[kind]] = (0, -a.shape[axis[kind]] % multiple)
    return np.pad(a, width)


def quantized(weights: Mapping[str, np.ndarray], format_name: str) -> dict[str, np.ndarray | Blocks]:
    """The matrices in a format, by gguf-py's quantizer; in F16 where a row is not whole blocks (the patches' 588 in Q8_0)."""
    import gguf

    out: dict[str, np.ndarray | Blocks] = {}
    for name, a in weights.items():
        a = _padded(a, name, dtype(format_name).block)
        if a.ndim == 1 or name == "positions":
            out[name] = a
            continue
        d = dtype(format_name if a.shape[1] % dtype(format_name).block == 0 else "F16")
        raw = np.ascontiguousarray(gguf.quants.quantize(a, gguf.GGMLQuantizationType(d.id)))
        out[name] = Blocks(name, d, raw.view(np.uint8).reshape(len(a), -1))
    return out


def plain(weights: Mapping[str, np.ndarray | Blocks]) -> dict[str, np.ndarray]:
    """Dequantized: what the numbers of a format mean, float32."""
    return {n: a.values().astype(np.float32) if isinstance(a, Blocks) else a for n, a in weights.items()}


# ---- three engines --------------------------------------------------------------------------------------------------------


class Ours:
    """The encoder as one program of this engine; `call` runs it, `seconds` is where the time went."""

    def __init__(self, shape: Shape, weights: Mapping[str, np.ndarray | Blocks], patches: np.ndarray, n_threads: int):
        m, heads = shape.patches, shape.heads
        matrix = {n: make_leaf("constant", n, (len(a.raw), a.raw.shape[1] // a.dtype.nbytes * a.dtype.block), a.dtype, a)
                  for n, a in weights.items() if isinstance(a, Blocks)}
        lo, hi = np.zeros(m, np.int32), np.full(m, m, np.int32)
        products = "int8" if _in_blocks(weights) else "float"                  # as the models' encoders choose

        def attention(q: Any, k: Any, v: Any) -> Any:
            q, k, v = (ops.reshape(t, shape=(m, heads, -1)) for t in (q, k, v))
            k, v = (ops.transpose(t, axes=(1, 0, 2)) for t in (k, v))
            return ops.attention(q, k, v, lo, hi, scale=(shape.width // heads) ** -0.5, products=products)

        functions = Functions(
            linear=lambda x, *names: _several(ops.linear(x, [matrix[n] for n in names], [weights[f"{n}.b"] for n in names])),
            norm=lambda x, name: ops.layer_norm(x, weights[name], weights[f"{name}.b"], eps=EPS),
            attention=attention, gelu=lambda x: ops.unary(x, kind="gelu_tanh"))
        with Graph() as g:
            x = g.input("patches", patches.shape)
            self.program = g.compile(forward(functions, x, shape, g.constant(weights["positions"])), n_threads=n_threads)
        self.patches = patches

    def call(self) -> np.ndarray:
        return self.program.run(patches=self.patches)

    def seconds(self) -> dict[str, float]:
        """Seconds of each step since `program.profile(True)`, summed over layers, by op and weights; outer steps as `once ...`."""
        table: dict[str, float] = {}
        for node, seconds in self.program.seconds():
            name = _label(node)
            table[name] = table.get(name, 0.0) + seconds
        return table


def _in_blocks(weights: Mapping[str, Any]) -> bool:
    return any(isinstance(a, Blocks) and a.dtype.block > 1 for a in weights.values())


def _several(t: Any) -> tuple[Any, ...]:
    return t if isinstance(t, tuple) else (t,)


def _label(node: Node) -> str:
    names = [t.name.split(".") for t in node.inputs if t.node.kind == "constant" and t.name]
    outer = names == [["patch"]]
    parts = "+".join(n[-1] for n in names)
    return f"{'once ' if outer else ''}{node.op.name}{' ' + parts if parts else ''}"


def numpy_functions(weights: Mapping[str, np.ndarray], heads: int) -> Functions:
    """Plain NumPy: the reference where there is no PyTorch."""
    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return ops.layer_norm(x, weights[name], weights[f"{name}.b"], eps=EPS)

    def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        out, e = np.empty_like(q), q.shape[1] // heads
        for h in range(heads):
            part = np.s_[:, h * e : (h + 1) * e]
            out[part] = ops.softmax(q[part] @ k[part].T, scale=e**-0.5) @ v[part]
        return out

    return Functions(linear=lambda x, *names: [x @ weights[n].T + weights[f"{n}.b"] for n in names], norm=norm, attention=attention,
                     gelu=lambda x: ops.unary(x, kind="gelu_tanh"))


def torch_functions(weights: Mapping[str, np.ndarray], heads: int) -> Functions:
    """PyTorch's own functions: oneDNN's products and its fused attention."""
    import torch
    from torch.nn import functional as F  # noqa: N812  everybody's name for it

    w = {n: torch.from_numpy(a) for n, a in weights.items()}

    def attention(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (t.view(1, t.shape[0], heads, -1).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).reshape(q.shape[2], -1)

    return Functions(linear=lambda x, *names: [F.linear(x, w[n], w[f"{n}.b"]) for n in names],
                     norm=lambda x, name: F.layer_norm(x, x.shape[-1:], w[name], w[f"{name}.b"], EPS), attention=attention,
                     gelu=lambda x: F.gelu(x, approximate="tanh"))


def torch_call(weights: Mapping[str, np.ndarray], shape: Shape, patches: np.ndarray, n_threads: int) -> Callable[[], np.ndarray]:
    """A forward pass by PyTorch, float32."""
    import torch

    torch.set_num_threads(n_threads)
    functions, x = torch_functions(weights, shape.heads), torch.from_numpy(patches)
    positions = torch.from_numpy(weights["positions"])

    def call() -> np.ndarray:
        with torch.inference_mode():
            return forward(functions, x, shape, positions).numpy()

    return call


# ---- measuring ------------------------------------------------------------------------------------------------------------


def ideal_seconds(shape: Shape, weights: Mapping[str, np.ndarray | Blocks], int8: float, fp32: float) -> float:
    """Time at the machine's peaks: with weights in blocks the layers' products and attention at int8's, everything else at fp32's."""
    work = shape.operations()
    return work["patch"] / fp32 + shape.layers * (work["products"] + work["attention"]) / (int8 if _in_blocks(weights) else fp32)


def picture_seconds(total: float, once: float, shape: Shape) -> float:
    """A whole picture of 27 layers, from a run of fewer and the part of it outside the layers."""
    return once + (total - once) * PICTURE_LAYERS / shape.layers


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.sum(np.square(got - want, dtype=np.float64)) / np.sum(np.square(want, dtype=np.float64)))


def run(n_threads: int, shape: Shape, rounds: int, peers: Sequence[str] = (), formats: Sequence[str] = FORMATS) -> dict[str, Any]:
    """Measure the formats (and PyTorch with F32's weights) in interleaved rounds; every result is checked in the run."""
    rng = np.random.default_rng(0)
    weights, patches = random_weights(shape, rng), rng.uniform(-1, 1, (shape.patches, shape.pixels)).astype(np.float32)
    stored = {name: quantized(weights, name) for name in formats}
    ours = {name: Ours(shape, stored[name], patches, n_threads) for name in formats}
    calls: dict[str, Callable[[], np.ndarray]] = {name: o.call for name, o in ours.items()}
    if "torch" in peers:
        calls["torch"] = torch_call(weights, shape, patches, n_threads)
    errors: dict[str, float] = {}
    for name in formats:                                                       # also warms up
        values = plain(stored[name])
        want = (torch_call(values, shape, patches, n_threads)() if "torch" in peers else
                forward(numpy_functions(values, shape.heads), patches, shape, values["positions"]))
        errors[name] = error(calls[name](), want)
    bounds: dict[str, list[float]] = {"int8": [], "fp32": []}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}                 # of all threads
    for o in ours.values():
        o.program.profile(True)
    for r in range(rounds):
        for kind, values in bounds.items():
            values.append(limits.peak(kind, isa(), n_threads, repeat=5))
        for name in list(calls)[:: 1 if r % 2 == 0 else -1]:
            start, cpu_start = time.perf_counter(), time.process_time()
            calls[name]()
            cpu[name].append(time.process_time() - cpu_start)
            seconds[name].append(time.perf_counter() - start)
    best = {kind: max(values) for kind, values in bounds.items()}              # nothing is faster than a limit
    profiles = {name: {k: v / rounds for k, v in o.seconds().items()} for name, o in ours.items()}
    results = _results(shape, stored, seconds, cpu, n_threads, profiles, errors, best)
    found = {"suite": "vision", "limits": [{"isa": isa(), "n_threads": n_threads, **best}],
             "shape": vars(shape) | shape.operations(), "results": results, "profiles": profiles, "samples": seconds, "cpu_samples": cpu}
    _print(shape, n_threads, rounds, found)
    return found


def _results(shape: Shape, stored: Mapping[str, Any], seconds: Mapping[str, list[float]], cpu: Mapping[str, list[float]],
             n_threads: int, profiles: Mapping[str, dict[str, float]], errors: Mapping[str, float],
             best: Mapping[str, float]) -> list[dict[str, Any]]:
    """Shares of the limits of each format, then ratios round by round. `cpu_share`: of the time that the threads had a CPU."""
    work = shape.operations()
    total = work["patch"] + shape.layers * (work["products"] + work["attention"])
    out = []
    for name, profile in profiles.items():
        ideal, median = ideal_seconds(shape, stored[name], **best), float(np.median(seconds[name]))
        once = sum(v for k, v in profile.items() if k.startswith("once "))
        out.append({"name": f"{name} share of the peaks", "score": summary([ideal / s for s in seconds[name]]),
                    "seconds": summary(seconds[name]), "cpu_share": ideal * n_threads / float(np.median(cpu[name])),
                    "gflops": total / median / 1e9, "layer_seconds": (median - once) / shape.layers,
                    "picture_seconds": picture_seconds(median, once, shape), "nmse": errors[name],
                    "correct": errors[name] <= TOLERANCE[name]})
    for a, b in [(name, "torch") for name in stored] + [("Q8_0", "F32")]:
        if a in seconds and b in seconds:
            out.append({"name": f"{a} / {b}", "score": summary([y / x for x, y in zip(seconds[a], seconds[b])])})
    for what, op in (("products", "linear "), ("attention", "attention")) if {"Q8_0", "F32"} <= set(profiles) else ():
        parts = {name: sum(v for k, v in profiles[name].items() if k.startswith(op)) for name in ("Q8_0", "F32")}
        out.append({"name": f"Q8_0 / F32, {what}", "score": summary([parts["F32"] / parts["Q8_0"]])})
    return out


def _print(shape: Shape, n_threads: int, rounds: int, found: Mapping[str, Any]) -> None:
    best, profiles = found["limits"][0], found["profiles"]
    print(f"{best['isa']}, {n_threads} threads: int8 {best['int8'] / 1e9:.0f} GOP/s, fp32 {best['fp32'] / 1e9:.0f} GOP/s; "
          f"{shape.layers} layers, {rounds} rounds; a picture is scaled to {PICTURE_LAYERS} layers\n"
          f"{'':24} {'share':>14} {'of CPU time':>12} {'ms a layer':>11} {'s a picture':>12} {'GFLOP/s':>9}  error")
    for r in found["results"]:
        score = r["score"]
        if "nmse" in r:
            print(f"{r['name']:24} {score['median']:6.1%} +-{score['spread']:5.1%} {r['cpu_share']:12.1%} "
                  f"{r['layer_seconds'] * 1e3:11.1f} {r['picture_seconds']:12.2f} {r['gflops']:9.1f}  {r['nmse']:.1e}"
                  + ("" if r["correct"] else "  WRONG"))
        else:
            print(f"{r['name']:24} {score['median']:5.2f} x +-{score['spread']:5.1%}")
    print("\n" + f"{'ms of a run':24}" + "".join(f"{name:>10}" for name in profiles))
    for step in dict.fromkeys(k for p in profiles.values() for k in p):
        print(f"{step:24}" + "".join(f"{p.get(step, 0.0) * 1e3:10.1f}" for p in profiles.values()))
    rest = {name: np.mean(found["samples"][name]) - sum(p.values()) for name, p in profiles.items()}
    print(f"{'(not in a step)':24}" + "".join(f"{seconds * 1e3:10.1f}" for seconds in rest.values()))
    for name in set(found["samples"]) - set(profiles):
        print(f"{name} takes {np.median(found['samples'][name]) * 1e3:.1f} ms")
