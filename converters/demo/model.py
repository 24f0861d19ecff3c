"""The demo model: its tokenizer, its configuration, packed batches and the aims that training has beside the answers.

transformers' Qwen2_5_VLForConditionalGeneration, small. Axes: n patches, r merged rows, b conversations, t tokens, s those of pictures,
k tokens of answers, D hidden.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from . import pictures
from .pictures import ALPHABET, COLOURS, GROUP, KEYS, SHAPES, Example, Picture, Turn, processed_size

PATCH, MERGE, FRAMES = 14, 2, 2
MEAN = STD = 0.5
WIDTH = 192
# M-RoPE gives columns the slowest turns of a head: with a usual base, those of 32 elements could not tell neighbours apart. With this base
# all pairs turn so fast that nothing is found 50 positions away by what it is; so YaRN stops the six slowest, from the 10th on, and of the
# others three are left to columns, five to rows
TEXT = {"hidden_size": WIDTH, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10.0, "mrope_section": [2, 5, 9], "factor": 1000.0, "attention_factor": 1.0,
                            "original_max_position_embeddings": 2048, "beta_fast": 83.8, "beta_slow": 82.3}}
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
    found: Tensor                   # int64 [2, b, t]: where an answer is, the picture that it is about in its conversation, from 0, if it
    #                                 is found by what it shows, by its number; else -100
    tasks: list[str]                # of the answers, in their order
    patches: list[Tensor]           # per size: float32 [pictures, n, 3 * 14 * 14], window order is not applied; empty where soft is known
    grids: list[tuple[int, int]]    # per size: rows and columns of merged groups
    rows: Tensor                    # int64 [s]: which row of the encoder's output each image token takes
    glyphs: Tensor                  # int64 [r, QUARTERS]: the character whose centre lies in that quarter from the left; -100 unknown
    things: Tensor                  # int64 [r]: the shape whose centre lies there; -100 unknown
    boxes: Tensor                   # float32 [r, 4]: its box from the group's centre, in groups
    lines: Tensor                   # int64 [r]: the key of a form's line that lies there; -100 none
    numbers: Tensor                 # int64 [s], of image tokens: of the picture in its conversation, from 0
    albums: Tensor                  # int64 [s]: of the first or the second of two albums, 0 or 1, where something lies; -100 elsewhere
    labels: Tensor                  # int64 [2, s]: digits of the number before the picture where something lies; -100 elsewhere
    places: Tensor                  # float32 [r, 2]: column and row of the group's centre in its picture, in groups
    seen: Tensor | None             # bool [b, 1, t, t]: which tokens see which, where turns are apart; None: all before them
    soft: Tensor | None = None      # [r, D]: the encoder's rows, where they are known already


def resized(picture: Picture) -> np.ndarray:
    """Resize a picture's pixels as the processor does (Pillow, bicubic)."""
    size = processed_size(*picture.size)
    image = PIL.Image.fromarray(picture.pixels)
    return np.asarray(image if image.size == size else image.resize(size, PIL.Image.Resampling.BICUBIC))


def grid_of(picture: Picture) -> tuple[int, int]:
    """Return the rows and columns of a picture's groups of 2 x 2 patches."""
    w, h = processed_size(*picture.size)
    return h // GROUP, w // GROUP


def patches(picture: Picture) -> np.ndarray:
    """Cut a picture into patches float32 [n, 3 * 14 * 14], in groups of 2 x 2."""
    pixels = (resized(picture).astype(np.float32) / 255 - MEAN) / STD
    h, w = grid_of(picture)
    x = pixels.reshape(h, MERGE, PATCH, w, MERGE, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return x.reshape(h * w * MERGE * MERGE, -1)


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


class Said(NamedTuple):
    """A conversation in tokens: as the fields of `Batch`, and where each turn begins that stands apart."""

    ids: list[int]
    targets: list[int]
    positions: np.ndarray               # [3, t]
    asked: np.ndarray                   # [7, t]: Batch.asked and Batch.found
    starts: list[int]


def about(example: Example, turn: Turn, number: int) -> tuple[int, int]:
    """Return which picture a turn is about, found by what it shows, and found by the number in the question; -100: none."""
    if example.second:
        return next(n for n, p in enumerate(example.pictures) if n >= example.second and p.marks[0].what in turn.answer), -100
    if example.numbered and turn.answer.startswith("Picture "):
        return int(turn.answer.split()[1]) - 1, -100
    return -100, number - 1 if example.numbered and number > 0 else -100


def conversation(example: Example, grids: Sequence[tuple[int, int]]) -> Said:
    """Write a conversation in tokens, with positions as chat template and get_rope_index make them."""
    tokenizer, encode = make_tokenizer(), _encode
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    ids: list[int] = []
    targets: list[int] = []
    asked: list[list[int]] = []
    nothing = [-100] * (len(NAMED) + 4)
    named = nothing
    coming = iter(enumerate(grids))
    if example.tools:
        ids += encode(f"<|im_start|>system\n{tools_text(example.tools)}<|im_end|>\n")
    starts: list[int] = []
    for turn, shown in zip(example.turns, example.shown()):
        if not (example.apart and starts):
            ids += encode("<|im_start|>user\n<tool_response>\n" if turn.pictures else "<|im_start|>user\n")
        for number, (h, w) in islice(coming, shown):
            ids += encode(example.before[number]) if example.before else ()
            ids += [*encode("<|vision_start|>"), *[pad] * (h * w), *encode("<|vision_end|>")]
        starts += [len(ids)] if example.apart else []
        end = "\n</tool_response>" if turn.pictures else ""
        ids += encode(f"{turn.question}{end}<|im_end|>\n<|im_start|>assistant\n")
        answer = encode(f"{turn.mistaken or turn.answer}<|im_end|>")
        if not turn.pictures:                                                  # else it is what was asked for before
            named = [next((j for j, word in enumerate(words) if f" {word}" in turn.question), -100) for words in NAMED]
            number = next((int(word) for word in turn.question.strip("?").split() if word.isdigit()), -100)
            named += (*digits(number), *about(example, turn, number))
        asked += [nothing] * (len(ids) - len(targets) - 1) + [named] * len(answer)
        targets += [-100] * (len(ids) - len(targets) - 1) + [-100 if turn.mistaken else token for token in answer]
        ids += answer
        ids += encode("\n")
    asked += [nothing] * (len(ids) - len(targets))
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
    return Said(ids, targets, positions, np.array(asked).T, starts)


def digits(number: int) -> tuple[int, int]:
    """Return tens and ones; -100 of a negative number."""
    return divmod(number, 10) if number >= 0 else (-100, -100)


@lru_cache(maxsize=1 << 16)
def _encode(text: str) -> tuple[int, ...]:
    return tuple(make_tokenizer()(text, add_special_tokens=False)["input_ids"])


def make_batch(examples: Sequence[Example], encoded: Mapping[int, Tensor] | None = None) -> Batch:
    """Pack conversations; ids are padded at the end, where causal attention does not see them. A picture that several show is one.

    encoded   the encoder's rows [r, D] by id() of a picture, if they are known for all
    """
    own = {id(p): p for e in examples for p in e.pictures}
    grids = {key: grid_of(p) for key, p in own.items()}
    said = [conversation(e, [grids[id(p)] for p in e.pictures]) for e in examples]
    t = max(len(s.ids) for s in said)
    ids, targets = np.zeros((len(said), t), np.int64), np.full((len(said), t), -100, np.int64)
    positions, asked = np.zeros((3, len(said), t), np.int64), np.full((len(NAMED) + 4, len(said), t), -100, np.int64)
    part = np.zeros((len(said), t), np.int64)                                  # the turn that a token belongs to; 0: all
    for i, s in enumerate(said):
        n = len(s.ids)
        ids[i, :n], targets[i, :n], positions[:, i, :n], asked[:, i, :n] = s.ids, s.targets, s.positions, s.asked
        for start in s.starts:
            part[i, start:] += 1
    sizes = sorted({*grids.values()})
    by_size = [key for g in sizes for key, grid in grids.items() if grid == g]
    first, at = {}, 0
    for key in by_size:
        first[key] = at
        at += grids[key][0] * grids[key][1]
    shown = [(first[id(p)] + np.arange(grids[id(p)][0] * grids[id(p)][1]), n, e) for e in examples for n, p in enumerate(e.pictures)]
    rows = np.concatenate([r for r, *_ in shown])
    aims = [row_targets(own[key], grids[key]) for key in by_size]
    glyphs, things, boxes, lines = (np.concatenate(a) for a in zip(*aims))
    centres = [np.stack(np.divmod(np.arange(h * w), w)[::-1], axis=-1) + 0.5 for h, w in (grids[key] for key in by_size)]
    # of each picture: its place, which of two albums it is in, the digits of its number
    told = [(n, int(n >= e.second) if e.second else -100, *digits(n + 1 if e.numbered else -100)) for _, n, e in shown]
    numbers, albums, *labels = np.repeat(np.array(told, np.int64), [len(r) for r, *_ in shown], axis=0).T
    empty = ~((things > 0) | (glyphs > 0).any(1))[rows]
    albums, labels = np.where(empty, -100, albums), np.where(empty, -100, np.stack(labels))
    stacks = [] if encoded is not None else [
        torch.from_numpy(np.stack([patches(own[key]) for key in by_size if grids[key] == g])) for g in sizes]
    return Batch(*map(torch.from_numpy, (ids, positions, targets, asked[:-2], asked[-2:])),
                 [turn.task for e in examples for turn in e.turns if not turn.mistaken], stacks, sizes,
                 *map(torch.from_numpy, (rows, glyphs, things, boxes, lines, numbers, albums, labels, np.concatenate(centres).astype(np.float32))),
                 _seen(part) if part.any() else None, None if encoded is None else torch.cat([encoded[key] for key in by_size]))


def _seen(part: np.ndarray) -> Tensor:
    """Say which tokens see which, from the part [b, t] that each belongs to: those before them, of their own part or of part 0."""
    turn = torch.from_numpy(part)
    own = (turn[:, :, None] == turn[:, None]) | (turn[:, None] == 0)           # [b, t, t]
    return (own & torch.ones(own.shape[1:], dtype=torch.bool).tril())[:, None]


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
        self.new = nn.Linear(WIDTH, 2)
        self.albums = nn.Linear(WIDTH, 2)

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

    def which_album(self, rows: Tensor, batch: Batch) -> Tensor:
        """Compute the loss of rows before the layer that compares two albums: which of them they are of."""
        known = batch.albums >= 0
        return F.cross_entropy(self.albums(rows[known]).float(), batch.albums[known])

    def where(self, rows: Tensor, batch: Batch, table: Tensor) -> Tensor:
        """Compute the loss of rows halfway through the decoder: which picture they are of, if it is new, edges of a shape's box,
        a line's key.

        Of the edges and of the box's middle, the tens of their pixels. The encoder sees one picture and has relative positions only: the first two are the
        decoder's to find out.
        """
        things, lines = batch.things[batch.rows], batch.lines[batch.rows]
        there, lined = things > 0, lines >= 0
        loss = _digits_loss(self.labels, rows, batch.labels)
        if (first := batch.numbers < NUMBERED).any():
            loss = loss + F.cross_entropy(self.numbers(rows[first]).float(), batch.numbers[first])
        if (second := batch.albums == 1).any():
            found, new = self.new(rows[second]).float(), _is_new(batch)[second].long()
            loss = loss + sum(F.cross_entropy(found[new == n], new[new == n]) for n in new.unique())
        if lined.any():
            loss = loss + _towards(rows[lined], KEYS, lines[lined], table)
        if there.any():
            edges = (batch.boxes + batch.places.repeat(1, 2))[batch.rows][there]
            edges = torch.cat((edges, (edges[:, :2] + edges[:, 2:]) / 2), dim=1)
            tens = (edges * GROUP / 10).long().clamp(0, TENS - 1)
            loss = loss + F.cross_entropy(self.edges(rows[there]).float().view(-1, TENS), tens.view(-1))
        return loss


def _of_token(batch: Batch, values: Tensor) -> Tensor:
    """Lay what is said of image tokens [s] out as the tokens are: [b, t], -100 elsewhere."""
    out = torch.full(batch.ids.shape, -100)
    out[batch.ids == make_tokenizer().convert_tokens_to_ids("<|image_pad|>")] = values
    return out


def _is_new(batch: Batch) -> Tensor:
    """Say of image tokens [s] if they show a shape that is not in the first of two albums."""
    thing = torch.where(batch.albums >= 0, batch.things[batch.rows], -100)
    things, album = (_of_token(batch, x) for x in (thing, batch.albums))
    b, i = torch.nonzero(things >= 0, as_tuple=True)
    old = ((things[b] == things[b, i][:, None]) & (album[b] == 0)).any(1)
    new = torch.zeros_like(things, dtype=torch.bool)
    new[b, i] = ~old
    return new[batch.ids == make_tokenizer().convert_tokens_to_ids("<|image_pad|>")]


def _missed(scores: Tensor, b: Tensor, i: Tensor, there: Tensor) -> Tensor:
    """Compute -log of what attention gives from tokens (b, i) [k] to those that are there [k, t]: the mean, of the head that does it best.

    scores [b, h, t, t]: before the softmax.
    """
    some = there.any(1)
    if not some.any():
        return scores.sum() * 0
    given = scores[b[some], :, i[some]].float().log_softmax(-1)                 # [k, h, t]
    return -given.masked_fill(~there[some][:, None], -torch.inf).logsumexp(-1).mean(0).max()


def found_losses(scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Compute how far answers are from finding the picture that they are about, by what it shows and by its number.

    Of the picture count the rows where something lies. scores [b, h, t, t]: of an attention, before the softmax.
    """
    numbers = _of_token(batch, torch.where((batch.albums >= 0) | (batch.labels[0] >= 0), batch.numbers, -100))
    where = [torch.nonzero(aims >= 0, as_tuple=True) for aims in batch.found]
    shows, by_number = (_missed(scores, b, i, numbers[b] == aims[b, i][:, None]) for aims, (b, i) in zip(batch.found, where))
    return shows, by_number


def matched_loss(scores: Tensor, batch: Batch) -> Tensor:
    """Compute how far shapes of a second album are from finding those like them in the first; scores as in `found_losses`."""
    things, album = (_of_token(batch, x) for x in (batch.things[batch.rows], batch.albums))
    b, i = torch.nonzero(album == 1, as_tuple=True)
    return _missed(scores, b, i, (things[b] == things[b, i][:, None]) & (album[b] == 0))
