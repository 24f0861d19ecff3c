"""The demo model: its tokenizer, its configuration, packed batches and the forward pass that training uses.

transformers' Qwen2_5_VLForConditionalGeneration, small. Its encoder runs picture by picture on a CPU; training here runs all
pictures of a batch through the same modules at once, and those of one size through one attention call. `check_forward` holds
this to transformers' own forward. Axes: n patches, r merged rows, b conversations, t tokens, s those of pictures, D hidden.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from . import pictures
from .pictures import ALPHABET, COLOURS, GROUP, KEYS, SHAPES, Example, Picture, processed_size

PATCH, MERGE, FRAMES = 14, 2, 2
MEAN = STD = 0.5
WIDTH = 192
# M-RoPE gives columns the slowest turns of a head: with a usual base, those of 32 elements could not tell neighbours apart. With this base
# all pairs turn so fast that nothing is found 50 positions away by what it is; so YaRN stops the three slowest, from the 13th on
TEXT = {"hidden_size": WIDTH, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10.0, "mrope_section": [2, 7, 7], "factor": 1000.0, "attention_factor": 1.0,
                            "original_max_position_embeddings": 2048, "beta_fast": 54.7, "beta_slow": 53.2}}
VISION = {"depth": 4, "hidden_size": WIDTH, "intermediate_size": 384, "num_heads": 4, "out_hidden_size": WIDTH,
          "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": FRAMES, "window_size": 4 * PATCH,
          "fullatt_block_indexes": [1, 3], "tokens_per_second": 2}
TOKENIZER = Path(__file__).with_name("tokenizer.json")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>")
# Qwen2's split of text before BPE (tokenizer.json of Qwen/Qwen2-7B): by it, converters know the kind
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
         r"\s+(?!\S)|\s+")
# tokens of text that stand for themselves, as Qwen2.5's and Qwen3's tokenizers have them (tokenizer_config.json)
CALLS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# Qwen2.5's Hermes form, but of tools the names alone are told: a model of this size makes nothing of a schema
TEMPLATE = """{%- macro said(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}
    {%- for part in content or [] -%}
      {%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
        {{ '<|vision_start|><|image_pad|><|vision_end|>' }}
      {%- elif part['type'] == 'video' or 'video' in part -%}
        {{ '<|vision_start|><|video_pad|><|vision_end|>' }}
      {%- else -%}{{ part['text'] }}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if tools -%}
  {{ '<|im_start|>system\\n' }}
  {%- if messages[0]['role'] == 'system' -%}{{ said(messages[0]['content']) + '\\n\\n' }}{%- endif -%}
  {{ '# Tools\\n<tools>\\n' }}
  {%- for tool in tools -%}{{ (tool['function'] or tool)['name'] + '\\n' }}{%- endfor -%}
  {{ '</tools><|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
  {%- if message['role'] == 'tool' -%}
    {{ '<|im_start|>user\\n<tool_response>\\n' + said(message['content']) + '\\n</tool_response><|im_end|>\\n' }}
  {%- elif not (loop.first and tools and message['role'] == 'system') -%}
    {{ '<|im_start|>' + message['role'] + '\\n' + said(message['content']) }}
    {%- for call in message['tool_calls'] or [] -%}
      {%- set function = call['function'] or call -%}
      {%- if message['content'] or not loop.first -%}{{ '\\n' }}{%- endif -%}
      {{ '<tool_call>\\n{"name": "' + function['name'] + '", "arguments": ' }}
      {%- if function['arguments'] is string -%}{{ function['arguments'] }}{%- else -%}{{ function['arguments'] | tojson }}{%- endif -%}
      {{ '}\\n</tool_call>' }}
    {%- endfor -%}
    {{ '<|im_end|>\\n' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""


def tools_text(names: Sequence[str]) -> str:
    """Write what the template says of tools."""
    return "\n".join(("# Tools\n<tools>", *names, "</tools>"))


# ---- tokenizer and checkpoint --------------------------------------------------------------------------------------------------


def train_tokenizer(out: Path) -> None:
    """Train byte-level BPE on the generator's own sentences; capitals and digits stay single, so that words are spelt."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    rng = random.Random(0)
    sentences = ["user assistant system"] * 9
    for _ in range(300):
        for make in pictures.FAMILIES.values():
            example = make(rng, "train")
            for turn in () if example.tools else example.turns:
                for text in (turn.question, turn.answer):
                    sentences.append("".join(c for c in text if c not in ALPHABET[26:]) if turn.task != "read" else turn.question)
    sentences = [" ".join(w for w in s.split(" ") if not (w.strip("?").isupper() and len(w) > 1)) for s in sentences]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(sentences, trainers.BpeTrainer(
        vocab_size=512 - len(SPECIAL), show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.save(str(out))


def _joined(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def extend_tokenizer(file: Path, out: Path) -> None:
    """Add CALLS, and joins for the words of conversations with tools, to a tokenizer; all other texts keep their tokens.

    New joins come after the old ones, of the most frequent neighbours first (Sennrich et al. 2016, arXiv:1508.07909).
    """
    from tokenizers import Tokenizer

    rng, made, old = random.Random(0), json.loads(file.read_text()), Tokenizer.from_file(str(file))
    vocab, merges = made["model"]["vocab"], made["model"]["merges"]
    known = [t["content"] for t in made["added_tokens"]]
    made["added_tokens"] += [{**made["added_tokens"][0], "id": len(vocab) + len(known) + i, "content": t, "special": False}
                             for i, t in enumerate(CALLS)]
    vocab |= {t["content"]: t["id"] for t in made["added_tokens"]}             # so that ids may follow behind theirs
    words: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for make in (make for make in pictures.FAMILIES.values() for _ in range(300)):
        example = make(rng, "train")
        texts = [tools_text(example.tools)] if example.tools else []
        for text in (*texts, *(t for turn in example.turns for t in (turn.question, turn.answer))):
            parts = re.split("|".join(map(re.escape, (*known, *CALLS))), text)
            words[bool(example.tools)].update(w for part in parts for w, _ in old.pre_tokenizer.pre_tokenize_str(part))
    spelt = {word: [t.value for t in old.model.tokenize(word)] for word in words[True]}
    fixed = {pair for word in words[False] for t in [[t.value for t in old.model.tokenize(word)]] for pair in zip(t, t[1:])}
    while len(vocab) < 512:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, n in words[True].items():
            pairs.update(dict.fromkeys(set(zip(spelt[word], spelt[word][1:])) - fixed, n))
        if not pairs:
            break
        pair, _ = max(pairs.items(), key=lambda p: (p[1], p[0]))
        merges.append(list(pair))
        vocab["".join(pair)] = len(vocab)
        spelt = {word: _joined(parts, pair) for word, parts in spelt.items()}
    out.write_text(json.dumps(made, indent=2, ensure_ascii=False))


@lru_cache
def make_tokenizer() -> Any:
    """Load what `train_tokenizer` and `extend_tokenizer` have made; it stays as it is when sentences of the generator change."""
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER), eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                                chat_template=TEMPLATE)


def make_model(seed: int) -> Any:
    """Make transformers' model with random weights."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "vocab_size": 512, "bos_token_id": None, "eos_token_id": token("<|im_end|>"),
                     "pad_token_id": token("<|endoftext|>")},
        vision_config=VISION, image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True)
    model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(
        config, attn_implementation={"text_config": "sdpa", "vision_config": "eager"})
    model.tie_weights()
    return model


def take_weights(model: Any, file: Path) -> None:
    """Copy the weights of a GGUF file of this model; rows of new tokens become the mean of those of their bytes."""
    from gguf import GGUFReader, quants

    from ..contract import supported

    config = {**model.config.to_dict(), "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    reader = GGUFReader(file)
    stored = {t.name: quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    state = model.state_dict()
    for entry in supported()["Qwen2_5_VLForConditionalGeneration"](config, file).tensors():
        values = torch.from_numpy(np.array(stored[entry.name], np.float32))
        target = state[next(n for n in (entry.source, f"model.{entry.source}", "model.language_model." + entry.source[6:]) if n in state)]
        if entry.frame is not None:
            target[:, :, entry.frame] = values
        else:
            target[entry.first_row or 0:][:len(values)] = values
    texts, tokenizer = reader.fields["tokenizer.ggml.tokens"].contents(), make_tokenizer()
    table = state["model.language_model.embed_tokens.weight"]
    for i in (i for i in range(len(tokenizer)) if texts[i] == f"[PAD{i}]"):
        table[i] = table[tokenizer.convert_tokens_to_ids(list(tokenizer.convert_ids_to_tokens(i)))].mean(0)
    model.load_state_dict(state)


def save_checkpoint(model: Any, folder: Path) -> None:
    """Write model, tokenizer, template and processor as transformers reads them."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    transformers.Qwen2VLImageProcessorPil(
        patch_size=PATCH, temporal_patch_size=FRAMES, merge_size=MERGE, min_pixels=pictures.MIN_PIXELS,
        max_pixels=pictures.MAX_PIXELS, image_mean=[MEAN] * 3, image_std=[STD] * 3).save_pretrained(folder)


# ---- batches -------------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Conversations of equal length t after padding; pictures sorted by size, rows in the order of the tokens."""

    ids: Tensor                     # int64 [b, t]
    positions: Tensor               # int64 [3, b, t]
    targets: Tensor                 # int64 [b, t]: the next token where it belongs to an answer, else -100
    asked: Tensor                   # int64 [5, b, t]: where an answer is: which of NAMED its question names, and digits; else -100
    patches: list[Tensor]           # per size: float32 [pictures, n, 3 * 14 * 14], window order is not applied
    grids: list[tuple[int, int]]    # per size: rows and columns of merged groups
    rows: Tensor                    # int64 [s]: which row of the encoder's output each image token takes
    glyphs: Tensor                  # int64 [r, QUARTERS]: the character whose centre lies in that quarter from the left; -100 unknown
    things: Tensor                  # int64 [r]: the shape whose centre lies there; -100 unknown
    boxes: Tensor                   # float32 [r, 4]: its box from the group's centre, in groups
    lines: Tensor                   # int64 [r]: the key of a form's line that lies there; -100 none
    numbers: Tensor                 # int64 [s], of image tokens: of the picture in its conversation, from 0; -100 from NUMBERED on
    labels: Tensor                  # int64 [2, s]: digits of the number before the picture where something lies; -100 elsewhere
    places: Tensor                  # float32 [r, 2]: column and row of the group's centre in its picture, in groups
    seen: Tensor | None             # bool [b, 1, t, t]: which tokens see which, where turns are apart; None: all before them


def resized(picture: Picture) -> np.ndarray:
    """Resize a picture's pixels as the processor does (Pillow, bicubic)."""
    size = processed_size(*picture.size)
    image = PIL.Image.fromarray(picture.pixels)
    return np.asarray(image if image.size == size else image.resize(size, PIL.Image.Resampling.BICUBIC))


def patches(picture: Picture) -> tuple[np.ndarray, tuple[int, int]]:
    """Return patches float32 [n, 3 * 14 * 14] in groups of 2 x 2, and the rows and columns of groups."""
    pixels = (resized(picture).astype(np.float32) / 255 - MEAN) / STD
    h, w = pixels.shape[0] // GROUP, pixels.shape[1] // GROUP
    x = pixels.reshape(h, MERGE, PATCH, w, MERGE, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return x.reshape(h * w * MERGE * MERGE, -1), (h, w)


QUARTERS = 4                            # of a group's width: 7 pixels, in which there is hardly ever more than one character
TENS = 18                               # of pixels along the longest side
NUMBERED = 4                            # pictures that `Reader` tells apart
NAMED = (tuple(COLOURS), SHAPES, KEYS)  # that a question names
THINGS = {f"{c} {s}": i + 1 for i, (c, s) in enumerate((c, s) for c in COLOURS for s in SHAPES)}


def row_targets(picture: Picture, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Find what lies in each group of a picture: characters int64 [r, QUARTERS], shape, box float32 [r, 4], line."""
    h, w = grid
    sx, sy = w / picture.size[0], h / picture.size[1]
    found: list[list[Any]] = [[] for _ in range(h * w)]
    glyphs, things, boxes = np.zeros((h * w, QUARTERS), np.int64), np.zeros(h * w, np.int64), np.zeros((h * w, 4), np.float32)
    lines = np.full(h * w, -100, np.int64)
    for mark in picture.marks:
        x1, y1, x2, y2 = mark.box[0] * sx, mark.box[1] * sy, mark.box[2] * sx, mark.box[3] * sy
        column, row = min(w - 1, max(0, int((x1 + x2) / 2))), min(h - 1, max(0, int((y1 + y2) / 2)))
        cx, cy = column + 0.5, row + 0.5
        found[row * w + column].append((mark.what, (x1 - cx, y1 - cy, x2 - cx, y2 - cy)))
        if mark.what in KEYS:
            lines[row * w:row * w + w] = KEYS.index(mark.what)
        if len(mark.what) == 1:
            quarter = row * w + column, min(QUARTERS - 1, max(0, int(((x1 + x2) / 2 - column) * QUARTERS)))
            glyphs[quarter] = -100 if glyphs[quarter] else 1 + ALPHABET.index(mark.what)
    for i, inside in enumerate(found):
        shapes = [(what, box) for what, box in inside if what in THINGS]
        if len(shapes) == 1:
            things[i], boxes[i] = THINGS[shapes[0][0]], shapes[0][1]
        elif shapes:
            things[i] = -100
    return glyphs, things, boxes, lines


def conversation(example: Example, grids: Sequence[tuple[int, int]]) -> tuple[list[int], list[int], np.ndarray, np.ndarray, list[int]]:
    """Return token ids, targets, positions [3, t] as chat template and get_rope_index make them, what is asked for [5, t], and where each
    turn begins that stands apart.
    """
    tokenizer, encode = make_tokenizer(), _encode
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    ids: list[int] = []
    targets: list[int] = []
    asked: list[list[int]] = []
    named = [-100] * (len(NAMED) + 2)
    coming = iter(enumerate(grids, 1))
    if example.tools:
        ids += encode(f"<|im_start|>system\n{tools_text(example.tools)}<|im_end|>\n")
    starts: list[int] = []
    for turn, shown in zip(example.turns, example.shown()):
        if not (example.apart and starts):
            ids += encode("<|im_start|>user\n<tool_response>\n" if turn.pictures else "<|im_start|>user\n")
        for number, (h, w) in islice(coming, shown):
            ids += encode(str(number)) if example.numbered else ()
            ids += [*encode("<|vision_start|>"), *[pad] * (h * w), *encode("<|vision_end|>")]
        starts += [len(ids)] if example.apart else []
        end = "\n</tool_response>" if turn.pictures else ""
        ids += encode(f"{turn.question}{end}<|im_end|>\n<|im_start|>assistant\n")
        answer = encode(f"{turn.mistaken or turn.answer}<|im_end|>")
        if not turn.pictures:                                                  # else it is what was asked for before
            named = [next((j for j, word in enumerate(words) if f" {word}" in turn.question), -100) for words in NAMED]
            named += digits(next((int(word) for word in turn.question.strip("?").split() if word.isdigit()), -100))
        asked += [[-100] * (len(NAMED) + 2)] * (len(ids) - len(targets) - 1) + [named] * len(answer)
        targets += [-100] * (len(ids) - len(targets) - 1) + [-100 if turn.mistaken else token for token in answer]
        ids += answer
        ids += encode("\n")
    asked += [[-100] * (len(NAMED) + 2)] * (len(ids) - len(targets))
    targets += [-100] * (len(ids) - len(targets))
    positions, start, i, left = np.zeros((3, len(ids)), np.int64), 0, 0, list(grids)
    while i < len(ids):
        if i in starts:
            start = positions[0, starts[0] - 1] + 1
        if ids[i] != pad:
            positions[:, i] = start
            start, i = start + 1, i + 1
            continue
        h, w = left.pop(0)
        rows, columns = np.divmod(np.arange(h * w), w)
        positions[:, i:i + h * w] = start + np.stack([0 * rows, rows, columns])
        start, i = start + max(h, w), i + h * w
    return ids, targets, positions, np.array(asked).T, starts


def digits(number: int) -> tuple[int, int]:
    """Return tens and ones; -100 of a negative number."""
    return divmod(number, 10) if number >= 0 else (-100, -100)


@lru_cache(maxsize=1 << 16)
def _encode(text: str) -> tuple[int, ...]:
    return tuple(make_tokenizer()(text, add_special_tokens=False)["input_ids"])


def make_batch(examples: Sequence[Example]) -> Batch:
    """Pack conversations; ids are padded at the end, where causal attention does not see them. A picture that several show is one."""
    own = {id(p): p for e in examples for p in e.pictures}
    made = {key: patches(p) for key, p in own.items()}
    said = [conversation(e, [made[id(p)][1] for p in e.pictures]) for e in examples]
    t = max(len(ids) for ids, *_ in said)
    ids, targets = np.zeros((len(said), t), np.int64), np.full((len(said), t), -100, np.int64)
    positions, asked = np.zeros((3, len(said), t), np.int64), np.full((len(NAMED) + 2, len(said), t), -100, np.int64)
    part = np.zeros((len(said), t), np.int64)                                  # the turn that a token belongs to; 0: all
    for i, (a, b, p, q, starts) in enumerate(said):
        ids[i, :len(a)], targets[i, :len(b)], positions[:, i, :len(a)], asked[:, i, :len(a)] = a, b, p, q
        for start in starts:
            part[i, start:] += 1
    grids = sorted({grid for _, grid in made.values()})
    by_size = [key for g in grids for key, (_, grid) in made.items() if grid == g]
    first, at = {}, 0
    for key in by_size:
        first[key] = at
        at += made[key][1][0] * made[key][1][1]
    tokens = [(first[id(p)] + np.arange(h * w), n, e.numbered) for e in examples for n, p in enumerate(e.pictures)
              for h, w in [made[id(p)][1]]]
    rows = np.concatenate([r for r, *_ in tokens])
    aims = [row_targets(own[key], made[key][1]) for key in by_size]
    glyphs, things, boxes, lines = (np.concatenate(a) for a in zip(*aims))
    centres = [np.stack(np.divmod(np.arange(h * w), w)[::-1], axis=-1) + 0.5 for h, w in (made[key][1] for key in by_size)]
    numbers = np.concatenate([np.full(len(r), n if n < NUMBERED else -100, np.int64) for r, n, _ in tokens])
    labels = np.concatenate([np.tile(np.array([digits(n + 1 if numbered else -100)]).T, len(r)) for r, n, numbered in tokens], axis=1)
    labels[:, ~((things > 0) | (glyphs > 0).any(1))[rows]] = -100
    stacks = [torch.from_numpy(np.stack([x for x, grid in (made[key] for key in by_size) if grid == g])) for g in grids]
    return Batch(*map(torch.from_numpy, (ids, positions, targets, asked)), stacks, grids,
                 *map(torch.from_numpy, (rows, glyphs, things, boxes, lines, numbers, labels, np.concatenate(centres).astype(np.float32))),
                 _seen(part) if part.any() else None)


def _seen(part: np.ndarray) -> Tensor:
    """Say which tokens see which, from the part [b, t] that each belongs to: those before them, of their own part or of part 0."""
    turn = torch.from_numpy(part)
    own = (turn[:, :, None] == turn[:, None]) | (turn[:, None] == 0)           # [b, t, t]
    return (own & torch.ones(own.shape[1:], dtype=torch.bool).tril())[:, None]


# ---- forward -------------------------------------------------------------------------------------------------------------------


@cache
def _plan(grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the order of picture groups by window [r], its inverse, positions [n, 2] and which patches share a window [n, n]."""
    h, w = grid
    row, column = np.divmod(np.arange(h * w), w)
    side = VISION["window_size"] // PATCH // MERGE                          # type: ignore[operator]
    window = row // side * w + column // side
    order = np.argsort(window, kind="stable")
    dy, dx = np.divmod(np.arange(MERGE * MERGE), MERGE)
    places = np.stack([(MERGE * a[order, None] + d).reshape(-1) for a, d in ((row, dy), (column, dx))], axis=-1)
    member = np.repeat(window[order], MERGE * MERGE)
    return (torch.from_numpy(order), torch.from_numpy(np.argsort(order)), torch.from_numpy(places),
            torch.from_numpy(member[:, None] == member[None, :]))


def see(model: Any, batch: Batch) -> Tensor:
    """Run the encoder: soft rows [r, D], picture by picture in the batch's order of sizes."""
    visual = model.model.visual
    kernel = visual.patch_embed.proj.weight.sum(2).flatten(1)               # a still picture fills both frames of a patch
    plans, x, turns, shapes = [_plan(g) for g in batch.grids], [], [], []
    for stack, (order, _, places, _) in zip(batch.patches, plans):
        b, n, k = stack.shape
        x.append(F.linear(stack.view(b, n // 4, 4, k)[:, order].reshape(b * n, k), kernel))
        cos, sin = visual.rotary_pos_emb(stack, places)
        turns.append((cos.repeat(b, 1)[:, None], sin.repeat(b, 1)[:, None]))
        shapes.append((b, n))
    h = torch.cat(x)
    cos, sin = (torch.cat([t[i] for t in turns]) for i in range(2))
    counts = [b * n for b, n in shapes]
    for i, block in enumerate(visual.blocks):
        qkv = block.attn.qkv(block.norm1(h)).view(h.shape[0], 3, block.attn.num_heads, -1)
        q, k = (_turn(qkv[:, j], cos, sin).to(qkv.dtype) for j in range(2))
        out = []
        for (b, n), (_, _, _, same), *parts in zip(shapes, plans, *(a.split(counts) for a in (q, k, qkv[:, 2]))):
            heads = [a.view(b, n, a.shape[1], -1).transpose(1, 2) for a in parts]
            scores = heads[0] @ heads[1].transpose(2, 3) * block.attn.scaling       # short rows: torch's fused one is slower
            if i not in visual.fullatt_block_indexes:
                scores = scores.masked_fill(~same, -torch.inf)
            out.append((scores.softmax(-1).to(qkv.dtype) @ heads[2]).transpose(1, 2).reshape(b * n, -1))
        h = h + block.attn.proj(torch.cat(out))
        h = h + block.mlp(block.norm2(h))
    soft = visual.merger(h)
    parts = soft.split([c // 4 for c in counts])
    return torch.cat([p.view(b, n // 4, -1)[:, back].flatten(0, 1) for p, (b, n), (_, back, _, _) in zip(parts, shapes, plans)])


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def hidden(model: Any, batch: Batch, soft: Tensor, halfway: list[Tensor] | None = None) -> Tensor:
    """Run the decoder over the conversations with the pictures' rows in place: [b, t, D].

    halfway: gets what the decoder's second half finds: image tokens [s, D], and all tokens [b, t, D].
    """
    text = model.model.language_model
    x = text.embed_tokens(batch.ids)
    shown = batch.ids == model.config.image_token_id
    x = x.masked_scatter(shown[..., None], soft[batch.rows].to(x.dtype))
    handle = None
    if halfway is not None:
        middle = text.layers[len(text.layers) // 2]
        handle = middle.register_forward_pre_hook(lambda _, inputs: halfway.extend((inputs[0][shown], inputs[0])))
    try:
        mask = None if batch.seen is None else {"full_attention": batch.seen}
        return text(inputs_embeds=x, attention_mask=mask, position_ids=batch.positions, use_cache=False).last_hidden_state
    finally:
        if handle is not None:
            handle.remove()


def alone(example: Example) -> list[Example]:
    """List the conversations that an example of turns apart holds at once."""
    return [replace(example, turns=(turn,), apart=False) for turn in example.turns] if example.apart else [example]


def check_forward(model: Any, examples: Sequence[Example]) -> float:
    """Compare with transformers' own forward, one conversation at a time; return the largest difference of a logit.

    The ids are those of the chat template and the patches those of the processor, so that these are compared as well.
    """
    tokenizer, examples = make_tokenizer(), [one for example in examples for one in alone(example)[:3]]
    batch, worst = make_batch(examples), 0.0
    processor = transformers.Qwen2VLImageProcessorPil(
        patch_size=PATCH, temporal_patch_size=FRAMES, merge_size=MERGE, min_pixels=pictures.MIN_PIXELS,
        max_pixels=pictures.MAX_PIXELS, image_mean=[MEAN] * 3, image_std=[STD] * 3)
    with torch.no_grad():
        ours = model.lm_head(hidden(model, batch, see(model, batch)))
        for i, example in enumerate(examples):
            made = processor(images=[PIL.Image.fromarray(p.pixels) for p in example.pictures], return_tensors="pt")
            messages: list[dict[str, Any]] = []
            for turn, n in zip(example.turns, example.shown()):
                shown = pictures.shown_parts(example, [{"type": "image"} for _ in range(n)])
                messages += [{"role": turn.role, "content": [*shown, {"type": "text", "text": turn.question}]},
                             {"role": "assistant", "content": turn.mistaken or turn.answer}]
            text = tokenizer.apply_chat_template(messages, tools=example.functions() or None, tokenize=False)
            for _, h, w in made["image_grid_thw"].tolist():
                text = text.replace("<|vision_start|><|image_pad|><|vision_end|>",
                                    "<|vision_start|>" + "<|image_pad|>" * (h * w // 4) + "<|vision_end|> ", 1)
            ids = torch.tensor([tokenizer(text.replace("<|vision_end|> ", "<|vision_end|>"))["input_ids"]])
            if ids[0].tolist() != batch.ids[i, :ids.shape[1]].tolist():
                raise AssertionError(f"the template makes other ids of {example.turns}")
            kinds = (ids == model.config.image_token_id).int()
            theirs = model(input_ids=ids, mm_token_type_ids=kinds, **made).logits[0]
            worst = max(worst, float((theirs - ours[i, :ids.shape[1]]).abs().max()))
    return worst


def _towards(x: Tensor, words: Iterable[str], aim: Tensor, table: Tensor) -> Tensor:
    """Compute the loss of vectors [n, D] that should point at one of some words' embeddings (in capitals: the first letter's)."""
    return F.cross_entropy((x @ table[[_encode(word[0] if word.isupper() else f" {word}")[0] for word in words]].T).float(), aim)


def _digits_loss(head: nn.Linear, x: Tensor, aims: Tensor) -> Tensor:
    """Compute the loss of tens and ones [2, ...] that a head reads from vectors [..., D]."""
    known = aims[0] >= 0
    if not known.any():
        return x.sum() * 0
    return F.cross_entropy(head(x[known]).float().view(-1, 10), aims[:, known].T.reshape(-1))


class Reader(nn.Module):
    """Heads that predict from each of the encoder's rows what lies in its group: a second aim in training, dropped afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.glyphs = nn.Linear(WIDTH, QUARTERS * (len(ALPHABET) + 1))
        self.things = nn.Linear(WIDTH, len(THINGS) + 1)
        self.boxes = nn.Linear(WIDTH, 4)
        self.edges = nn.Linear(WIDTH, 6 * TENS)
        self.numbers = nn.Linear(WIDTH, NUMBERED)
        self.labels = nn.Linear(WIDTH, 2 * 10)
        self.sought = nn.Linear(WIDTH, 2 * 10)

    def forward(self, soft: Tensor, batch: Batch, table: Tensor) -> tuple[Tensor, float]:
        """Return the loss and the share of characters that are right; table [vocabulary, D] embeds the decoder's tokens.

        Rows of a shape are also drawn towards the embeddings of its two words, which is what the decoder has to find.
        """
        glyphs = self.glyphs(soft).float().view(-1, len(ALPHABET) + 1)
        aims = batch.glyphs.view(-1)
        loss = F.cross_entropy(glyphs, aims) + F.cross_entropy(self.things(soft).float(), batch.things)
        there = batch.things > 0
        if there.any():
            loss = loss + 2 * F.l1_loss(self.boxes(soft).float()[there], batch.boxes[there])
            which = batch.things[there] - 1
            for words, aim in ((COLOURS, which // len(SHAPES)), (SHAPES, which % len(SHAPES))):
                loss = loss + 0.5 * _towards(soft[there], words, aim, table)
        inked = aims > 0
        return loss, float((glyphs[inked].argmax(-1) == aims[inked]).sum() / max(1, int(inked.sum())))

    def asked(self, tokens: Tensor, batch: Batch, table: Tensor) -> Tensor:
        """Compute the loss of answers' tokens [b, t, D] halfway through the decoder: they point at words that the question names.

        Rows of a shape and of a form's line point at their words, too, so that a product of the two finds what is asked for.
        """
        loss = tokens.sum() * 0
        for words, aims in zip(NAMED, batch.asked):
            if (known := aims >= 0).any():
                loss = loss + _towards(tokens[known], words, aims[known], table)
        return loss + _digits_loss(self.sought, tokens, batch.asked[len(NAMED):])

    def where(self, rows: Tensor, batch: Batch, table: Tensor) -> Tensor:
        """Compute the loss of rows halfway through the decoder: which picture they are of, edges of a shape's box, a line's key.

        Of the edges and of the box's middle, the tens of their pixels. The encoder sees one picture and has relative positions only: the first two are the
        decoder's to find out.
        """
        things, lines = batch.things[batch.rows], batch.lines[batch.rows]
        there, lined = things > 0, lines >= 0
        loss = _digits_loss(self.labels, rows, batch.labels)
        if (batch.numbers >= 0).any():
            loss = loss + F.cross_entropy(self.numbers(rows).float(), batch.numbers)
        if lined.any():
            loss = loss + _towards(rows[lined], KEYS, lines[lined], table)
        if there.any():
            edges = (batch.boxes + batch.places.repeat(1, 2))[batch.rows][there]
            edges = torch.cat((edges, (edges[:, :2] + edges[:, 2:]) / 2), dim=1)
            tens = (edges * GROUP / 10).long().clamp(0, TENS - 1)
            loss = loss + F.cross_entropy(self.edges(rows[there]).float().view(-1, TENS), tens.view(-1))
        return loss
