"""docs/nvlm.md: NVLM-D, -X and -H side by side on one picture, counted and not measured: `python tests/support/compare_nvlm.py` from the root.

The decoders have the sizes of Qwen2-72B, the encoder those of InternViT-6B-448px, in files of headers without data: positions come from the processor,
bytes of caches and weights from the plan, operations from the step's graph as the ops declare them.
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).resolve().parent)]

import pyengine as pe  # noqa: E402  found through the line above
from bench.work import of_node, operations  # noqa: E402
from hollow import both, Decoder, kv, Tensor, write_headers  # noqa: E402
from pyengine.dtype import dtype  # noqa: E402
from pyengine.files.model_files import open_files  # noqa: E402
from pyengine.graph.graph import topological  # noqa: E402
from pyengine.media.image import Sketch  # noqa: E402
from pyengine.media.views import Limits, View  # noqa: E402
from pyengine.programs import encoder as encoders  # noqa: E402
from pyengine.programs.bound import bind, Bound  # noqa: E402
from pyengine.programs.sizes import Sizes  # noqa: E402
from pyengine.programs.step import Step  # noqa: E402

SIZE, TEXT, N_CTX = (1344, 896), 64, 4096           # the picture (width, height), tokens of the question, positions of the cache
EVERY = 8                                           # a gated layer stands before each so many of the decoder's
QWEN = Decoder("qwen2", 80, 8192, 29_568, 64, 8, 128, 152_064, 32_768, biases=True)
TOKENS = ("<|vision_pad|>", *(f"<tile_{i}>" for i in range(1, 7)), "<tile_global_thumbnail>")
ENCODER = {"n_layers": 45, "width": 3200, "d_ff": 12_800, "heads": 25, "tile": 448, "patch": 14}


@dataclass(frozen=True)
class Counted:
    """One of the three: numbers of the picture and the question together."""

    positions: int              # in the sequence, without the text of NVLM-D's tags
    beside: int                 # encoder rows that gated layers see
    cache: int                  # bytes of keys and values, f16
    weights: int                # bytes of the decoder's weights, Q4_0
    prompt: float               # operations of the decoder
    encoder: float              # of the encoder
    token: float                # of one more token of the decoder


def encoder_file(d: int, units: int) -> tuple[dict[str, Any], list[Tensor]]:
    """Keys and tensors of InternViT and the projector."""
    e = ENCODER
    v, n = e["width"], (e["tile"] // e["patch"]) ** 2
    keys = {"clip.has_vision_encoder": True, "clip.projector_type": "nvlm_d", "clip.vision.image_size": e["tile"],
            "clip.vision.patch_size": e["patch"], "clip.vision.embedding_length": v, "clip.vision.feed_forward_length": e["d_ff"],
            "clip.vision.block_count": e["n_layers"], "clip.vision.attention.head_count": e["heads"], "clip.vision.projection_dim": d,
            "clip.vision.attention.layer_norm_epsilon": 1e-6, "clip.use_gelu": True, "clip.vision.preproc_max_tiles": 6}
    tensors: list[Tensor] = [("v.class_embd", (v,), "F32"), ("v.position_embd.weight", (n + 1, v), "F32"),
                             ("v.patch_embd.weight", (v, 3, e["patch"], e["patch"]), "F32"), ("v.patch_embd.bias", (v,), "F32")]
    for i in range(e["n_layers"]):
        b = f"v.blk.{i}"
        tensors += [(f"{b}.{name}.weight", (v,), "F32") for name in ("ln1", "ln2", "attn_q_norm", "attn_k_norm", "ls1", "ls2")]
        tensors += [(f"{b}.{name}.weight", (v, v), "F16") for name in ("attn_q", "attn_k", "attn_v", "attn_out")]
        tensors += [(f"{b}.attn_out.bias", (v,), "F32"), (f"{b}.ffn_up.weight", (e["d_ff"], v), "F16"), (f"{b}.ffn_up.bias", (e["d_ff"],), "F32"),
                    (f"{b}.ffn_down.weight", (v, e["d_ff"]), "F16"), (f"{b}.ffn_down.bias", (v,), "F32")]
    tensors += [*both("mm.model.mlp.0", 4 * v), ("mm.model.mlp.1.weight", (units, 4 * v), "F16"), ("mm.model.mlp.3.weight", (d, units), "F16")]
    return keys, tensors


def decoder_file(kind: str) -> tuple[str, dict[str, Any], list[Tensor]]:
    """Architecture, keys and tensors of a decoder; gated layers have what `models/nvlm.py` binds."""
    tokens = [*TOKENS, *(str(i) for i in range(QWEN.vocab_size - len(TOKENS)))]
    keys = {**QWEN.metadata(), "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": ["0 1"], "tokenizer.ggml.token_type": [3] * len(TOKENS) + [1] * (len(tokens) - len(TOKENS))}
    if kind == "D":
        return "qwen2", keys, list(QWEN.tensors("Q4_0"))
    d, kv_width, tensors = QWEN.d_model, QWEN.n_kv_heads * QWEN.head_dim, []
    for name, shape, format_ in QWEN.tensors("Q4_0"):
        blk, _, rest = name.partition(".")
        number, _, own = rest.partition(".")
        tensors.append((f"blk.{int(number) + int(number) // EVERY + 1}.{own}" if blk == "blk" else name, shape, format_))
    across = list(range(0, QWEN.n_layers + QWEN.n_layers // EVERY, EVERY + 1))
    for i in across:
        b = f"blk.{i}"
        tensors += [(f"{b}.{name}.weight", shape, "Q4_0") for name, shape in (
            ("cross_attn_q_proj", (d, d)), ("cross_attn_k_proj", (kv_width, d)), ("cross_attn_v_proj", (kv_width, d)), ("cross_attn_o_proj", (d, d)),
            ("ffn_gate", (QWEN.d_ff, d)), ("ffn_up", (QWEN.d_ff, d)), ("ffn_down", (d, QWEN.d_ff)))]
        tensors += [(f"{b}.{name}.weight", (d,), "F32") for name in ("attn_norm", "ffn_norm")]
        tensors += [(f"{b}.cross_attn_{name}", (1,), "F32") for name in ("attn_gate", "mlp_gate")]
    keys = {name.replace("qwen2.", "nvlm."): value for name, value in keys.items()}
    return "nvlm", {**keys, "tokenizer.ggml.pre": "qwen2", "nvlm.block_count": QWEN.n_layers + len(across),
                    "nvlm.attention.cross_attention_layers": np.array(across, np.int32), "nvlm.attention.cross_hybrid": kind == "H"}, tensors


def total(outputs: Iterable[Any], **dims: int) -> float:
    """Operations of a graph with these numbers of rows."""
    sizes, n = defaultdict(int, dims), 0.0
    for node in topological(list(outputs)):
        if node.op is not None and node.op.flops:
            n += operations(node.op, of_node(node, sizes), dict(node.params))
    return n


def counted(kind: str, folder: Path) -> Counted:
    """Count one of the three."""
    arch, keys, tensors = decoder_file(kind)
    path = write_headers(folder / f"{kind}.gguf", arch, keys, tensors, 0)
    mmproj = write_headers(folder / f"mmproj-{kind}.gguf", "clip", *encoder_file(QWEN.d_model, QWEN.d_ff), 0)
    bound: Bound = bind(open_files(path, mmproj))
    image = bound.image
    views = [p for p in image.process(Sketch(SIZE, {}), Limits(N_CTX, image.most_rows(N_CTX))).parts if isinstance(p, View)]
    beside = sum(v.positions.shape[1] for v in views if v.token is not None)
    soft = sum(v.positions.shape[1] for v in views if v.token is None)
    positions = soft + sum(v.token is not None for v in views) + (kind == "H") + TEXT
    seeing = positions if beside else 0
    f16 = dtype("F16")
    step = Step(bound.model, Sizes(positions, positions, 1, 1, f16, f16, {image.kind: image.most_rows(N_CTX)}, beside)).declare()
    prompt = total(step.outputs, m=positions, w=1, l=1, e=soft, s=seeing) + (total(step.outputs, c=beside) if beside else 0)
    plan = pe.plan(path, mmproj=mmproj, n_ctx=N_CTX, images=(*SIZE, 1))
    cells, layers = kv(plan), [i for i in plan.items if i.program == "step" and i.purpose in ("weights", "mapped")]
    return Counted(positions, beside, cells["Full"] * positions // N_CTX + cells.get("Cross", 0), sum(i.nbytes for i in layers), prompt,
                   len(views) * total([encoders.declare(image, image.most_rows(N_CTX)).outputs[0]]), total(step.outputs, m=1, w=1, l=1, s=min(1, seeing)))


HEAD = """# NVLM: three ways into one decoder

Written by `python tests/support/compare_nvlm.py`: counted from graphs and plans of files without data, not measured. The decoder has the sizes of
Qwen2-72B in Q4_0 with keys and values in f16, the encoder those of InternViT-6B; NVLM-X and NVLM-H have ten gated layers, one before every eighth of
the decoder's. The picture has {w} x {h} pixels: six tiles and the whole, 256 rows each; the question {text} tokens. NVLM-D's tags are text, whose
tokens are left out. Attention counts all keys of the picture and the question for each row. Only NVLM-D's weights were published.

| | NVLM-D | NVLM-X | NVLM-H |
|---|---|---|---|
"""


def page() -> str:
    """Return the page."""
    with tempfile.TemporaryDirectory() as folder:
        found = [counted(kind, Path(folder)) for kind in "DXH"]
    rows = (("positions in the sequence", [f"{c.positions:,}" for c in found]), ("encoder rows beside it", [f"{c.beside:,}" for c in found]),
            ("keys and values, MiB", [f"{c.cache / 2**20:,.1f}" for c in found]), ("weights of the decoder, GiB", [f"{c.weights / 2**30:,.2f}" for c in found]),
            ("encoder, 10^12 operations", [f"{c.encoder / 1e12:,.1f}" for c in found]), ("decoder, prompt, 10^12 operations", [f"{c.prompt / 1e12:,.1f}" for c in found]),
            ("decoder, one more token, 10^9 operations", [f"{c.token / 1e9:,.1f}" for c in found]))
    head = HEAD.format(w=SIZE[0], h=SIZE[1], text=TEXT)
    return head + "".join(f"| {name} | {' | '.join(values)} |\n" for name, values in rows)


if __name__ == "__main__":
    (ROOT / "docs" / "nvlm.md").write_text(page())
