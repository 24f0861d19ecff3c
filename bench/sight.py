"""What a model that sees answers about the demo's synthetic pictures: scores by types of weights and caches, beside transformers.

The pictures are drawn afresh from a seed, of the test split: words, numbers, layouts and fonts that training has not seen
(converters/demo/pictures.py). A conversation is held to its end with the model's own answers. Scores: share of answers that
are exactly right; for boxes, intersection over union with the true box in pixels of the original. Intervals are of 95%: Wilson's
for shares (Wilson 1927, doi:10.1080/01621459.1927.10502953), the normal one for means of boxes; turns count as independent.
"""

from __future__ import annotations

import random
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .beside import converters

if TYPE_CHECKING:
    from converters.demo.pictures import Example

pictures = converters("demo.pictures")
MAX_TOKENS = 96
TYPES = ("F32", "F16", "Q8_0", "Q4_0")
CACHES = ("f32", "f16", "q8_0", "q4_0")
Z = 1.96
Say = Callable[[list[dict[str, Any]], list[dict[str, object]]], str]       # of messages and tools: the answer as it was written, calls too


def draw(n: int, seed: int, families: Sequence[str] = tuple(pictures.FAMILIES)) -> list[Example]:
    """Draw n conversations of each family from the test split."""
    return [pictures.FAMILIES[name](random.Random(f"quality {seed} {name} {i}"), "test") for name in families for i in range(n)]


def hold(say: Say, examples: Sequence[Example]) -> list[list[str]]:
    """Ask each conversation's questions in turn; the answers go into what is said before the next one."""
    out = []
    for example in examples:
        messages: list[dict[str, Any]] = []
        left = iter(example.pictures)
        for turn, n in zip(example.turns, example.shown()):
            shown = pictures.shown_parts(example, [{"type": "image", "image": p.pixels} for p in islice(left, n)])
            messages.append({"role": turn.role, "content": [*shown, {"type": "text", "text": turn.question}]})
            messages.append({"role": "assistant", "content": say(messages, example.functions())})
        out.append([m["content"] for m in messages[1::2]])
    return out


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Compute the intersection over union of two boxes (x1, y1, x2, y2)."""
    shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return shared / (sum(areas) - shared) if sum(areas) > shared else 0.0


def scores(examples: Sequence[Example], answers: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    """Compute each task's points: 1 or 0 for an answer that is right or not, a box's overlap with the true one, 1 for a click inside it."""
    from pyengine.chat.boxes import find_boxes

    points = defaultdict(list)
    for example, said in zip(examples, answers, strict=True):
        for turn, answer in zip(example.turns, said, strict=True):
            if turn.task == "click":
                points["click"].append(float(clicked(example, answer)))
                continue
            if turn.task not in pictures.BOXES:
                points[turn.task].append(float(answer == turn.answer))
                continue
            picture = example.pictures[0]
            asked = turn.question.removeprefix("Where is the ").removesuffix("?")
            true = next(m.box for m in picture.marks if m.what == asked)
            found = [b for b in find_boxes(answer, picture.size, pictures.processed_size(*picture.size)) if hasattr(b, "x2")]
            points[turn.task].append(overlap((found[0].x1, found[0].y1, found[0].x2, found[0].y2), true) if found else 0.0)
    return points


def clicked(example: Example, answer: str) -> bool:
    """Say whether a call clicks inside of the box of what a conversation's first question names."""
    picture = example.pictures[0]
    x1, y1, x2, y2 = next(m.box for m in picture.marks if example.turns[0].question == f"Click the {m.what}.")
    found = re.fullmatch(re.escape(pictures.call_text(action="left_click", coordinate=[0, 0])).replace("0", r"(\d+)"), answer)
    if found is None:
        return False
    x, y = (int(n) * own / seen for n, own, seen in zip(found.groups(), picture.size, pictures.processed_size(*picture.size)))
    return x1 <= x <= x2 and y1 <= y <= y2


def interval(points: Sequence[float]) -> tuple[float, float]:
    """Compute the 95% confidence interval of the mean."""
    n, mean = len(points), float(np.mean(points))
    if set(points) <= {0.0, 1.0}:
        centre, half = mean + Z * Z / (2 * n), Z * np.sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n))
        low, high = ((centre + sign * half) / (1 + Z * Z / n) for sign in (-1, 1))
    else:
        half = Z * float(np.std(points, ddof=1)) / np.sqrt(n)
        low, high = mean - half, mean + half
    return float(max(0.0, low)), float(min(1.0, high))


def with_weights(file: Path, kind: str, out: Path) -> Path:
    """Write a copy whose matrices have another type; those of rows that are no multiple of its block, and what is F32, stay."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants

    reader, target = GGUFReader(file), GGMLQuantizationType[kind]
    writer = GGUFWriter(out, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            inner = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    block = quants.GGML_QUANT_SIZES[target][0]
    for t in reader.tensors:
        values = quants.dequantize(t.data, t.tensor_type)
        if t.tensor_type == GGMLQuantizationType.F32 or values.shape[-1] % block:
            writer.add_tensor(t.name, values.astype(np.float32) if t.tensor_type == GGMLQuantizationType.F32 else t.data,
                              raw_dtype=t.tensor_type)
        else:
            writer.add_tensor(t.name, quants.quantize(values.astype(np.float32), target), raw_dtype=target)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def ours(file: Path, kv: str, n_threads: int) -> Say:
    """Return a function that gives pyengine's greedy answers."""
    import pyengine

    model = pyengine.load(file, n_ctx=1024, kv_dtype=kv, n_threads=n_threads)
    return lambda messages, tools: written(model, messages, tools)


def written(model: Any, messages: list[dict[str, Any]], tools: list[dict[str, object]]) -> str:
    """Return a model's greedy answer as it wrote it: a call is part of its text."""
    if not tools:
        return str(model.chat(messages, temperature=0, max_tokens=MAX_TOKENS))
    shown = [part["image"] for m in messages for part in m["content"] if not isinstance(part, str) and part["type"] == "image"]
    bare = [{**m, "content": m["content"] if isinstance(m["content"], str) else
             [{k: v for k, v in part.items() if k != "image"} for part in m["content"]]} for m in messages]
    text = model.template.render(bare, tools=tools)
    return str(model.generate(text, images=shown, temperature=0, max_tokens=MAX_TOKENS))


def theirs(checkpoint: Path) -> Say:
    """Return a function that gives transformers' greedy answers, computed in float32 on the CPU from the checkpoint's weights."""
    import PIL.Image
    import torch
    import transformers

    torch.set_num_threads(1)                                    # rows are short: more threads only wait for each other
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(checkpoint)
    hole = "<|vision_start|><|image_pad|><|vision_end|>"

    def say(messages: list[dict[str, Any]], tools: list[dict[str, object]]) -> str:
        shown = [PIL.Image.fromarray(part["image"]) for m in messages if not isinstance(m["content"], str)
                 for part in m["content"] if part["type"] == "image"]
        seen = processor(images=shown, return_tensors="pt")
        pieces = tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False, add_generation_prompt=True).split(hole)
        text = pieces[0]
        for (_, h, w), piece in zip(seen["image_grid_thw"].tolist(), pieces[1:], strict=True):
            text += hole.replace("<|image_pad|>", "<|image_pad|>" * (h * w // 4)) + piece
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        kinds = (ids == model.config.image_token_id).int()
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **seen,
                                 max_new_tokens=MAX_TOKENS, do_sample=False)
        return tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)

    return say


def run(file: Path, n_threads: int, n: int, seed: int, types: Sequence[str], caches: Sequence[str],
        checkpoint: Path | None = None) -> dict[str, Any]:
    """Measure the file's scores with other types of weights (the cache in f16) and with other caches (its own weights).

    With a checkpoint: also transformers' scores, and how many turns it answers like F32 weights and cache.
    """
    examples, results, answers = draw(n, seed), [], {}
    print(f"{file.name}: {n} conversations of each family, seed {seed}")

    def note(name: str, say: Say) -> None:
        began = time.monotonic()
        answers[name] = hold(say, examples)
        seconds = time.monotonic() - began
        line = []
        for task, points in sorted(scores(examples, answers[name]).items()):
            low, high = interval(points)
            mean = float(np.mean(points))
            line.append(f"{task} {mean:.1%} [{low:.1%}, {high:.1%}]")
            results.append({"name": f"{name} {task}", "score": {"median": mean, "spread": (high - low) / 2 / mean if mean else 0.0},
                            "interval": [low, high], "turns": len(points)})
        print(f"  {name:<24} {'  '.join(line)}  ({seconds:.0f} s)", flush=True)

    found: dict[str, Any] = {"suite": "quality", "file": file.name, "seed": seed, "results": results}
    with tempfile.TemporaryDirectory() as folder:
        for kind in types:
            made = with_weights(file, kind, Path(folder, f"{kind}.gguf"))
            note(f"weights {kind}", ours(made, "f16", n_threads))
        for kv in caches:
            note(f"cache {kv}", ours(file, kv, n_threads))
        if checkpoint:
            exact = with_weights(file, "F32", Path(folder, "exact.gguf"))
            note("transformers F32", theirs(checkpoint))
            note("F32, cache f32", ours(exact, "f32", n_threads))
            a, b = ([x for said in answers[name] for x in said] for name in ("transformers F32", "F32, cache f32"))
            found["equal"] = [sum(x == y for x, y in zip(a, b)), len(a)]
            print(f"  equal to transformers' greedy answers: {found['equal'][0]} of {len(a)}")
    return found
