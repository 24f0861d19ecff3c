"""Train the demo model on a CPU: bfloat16 products, float32 weights; resumes from its last state.

    python -m converters.demo.train FOLDER --stop-at 09:40
    python -m converters.demo.train FOLDER --weights converters/demo/weights/demo-f16.gguf --seed 2 --first-stage 100

The second goes on from the weights of a file, for new kinds of conversations (LATER): of the others it draws a part, so that they are
kept, and the encoder stays as it is: a process beside the training draws the pictures and encodes them, and albums share a pool of them.
Its first stage teaches the heads that are dropped after training and leaves all weights as they are.

FOLDER gets state.pt (to go on from), log.jsonl, checkpoint/ (transformers' format, averaged weights in float16) and loss.png. The
data of a step depend on the seed and the step only; those of albums also on the pool and on how well they went before. The learning rate is constant and falls linearly to nothing within the last
minutes, so that the end can be set by the clock. Control-C ends at once with what was last saved.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

# on a busy machine, threads that spin while they wait cost ten times the time
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from . import many
from . import model as demo
from .forward import FINDS, MATCHES, Inside, answers, check_forward, rows_of, see
from .pictures import BOXES, FAMILIES, Example
from .pool import Pool


class Part(NamedTuple):
    """What a kind of conversation has of a step after the first stage; of those in `many`, counted in pictures of 16 tokens."""

    conversations: int
    weight: float                       # of the loss: most of an answer with a box, and of "Picture 1", is soon known
    checked: int                        # conversations of a validation


MIX = {"read": Part(36, 2.0, 96), "shapes": Part(18, 4.0, 48), "pick": Part(8, 3.0, 48), "move": Part(4, 1.0, 48),
       "pair": Part(12, 6.0, 48), "form": Part(12, 2.0, 48), "click": Part(32, 10.0, 96),
       "task": Part(6, 6.0, 24),
       "album": Part(64, 6.0, 240), "changes": Part(64, 3.0, 240), "frames": Part(24, 1.0, 192)}
LATER = tuple(many.KINDS)                                   # kinds that came when the others had been learnt
EVERY = {"frames": 3, "changes": 2}                             # of LATER: steps from one to the next
# of the others there is one in a step, in turn: the kind that is forgotten first every second time; and the share of their conversations, 0.5 of the others
FIRST_FORGOTTEN, REPLAY = "read", {"read": 0.9, "pair": 1.0, "click": 0.4}
# pictures of an album or of two: the fewest, the most at last, those of a validation; and by kind the most at first. There is one more as
# soon as GROWN of the answers of a kind's tasks are right, but not within RECENT steps
FEWEST, MOST, USUAL, GROWN, RECENT = 4, 36, 12, 0.82, 10
FIRST_MOST = {"album": 12, "changes": 6}
GROWS_BY = {"album": ("which", "item", "text"), "changes": ("changed",)}
# of the pools, by tokens of a picture: how often a step takes its pictures there, how many there are at first, how many a step adds
POOLS = {16: (5, 512, 24), 25: (1, 96, 16), 36: (2, 96, 16), 64: (1, 64, 8)}
# of albums in a step; what a question has, and what a picture has beside its own
TOKENS, PER_QUESTION, PER_PICTURE = 2600, 20, 4
# of a conversation's pictures with what is beside them, in tokens
LONGEST = 1900
# batches of the other kinds that are kept to be used again, of each; the share of steps that draw a new one
KEPT, NEW = 64, 0.5
# of a step, for the encoder alone: in the first stage and afterwards
FIRST_ROWS, ROWS = {"read": 112, "shapes": 10}, {"read": 64}
PEAK, WARM_UP, DECAY_MINUTES, AVERAGE = 1.2e-3, 100, 14.0, 0.998
ASKED, FOUND = 0.5, 1.0                                     # weights of what answers know halfway of the question, find of the pictures
FACTORS = (1.7, 1.0)                                        # of the rate: Muon's, AdamW's


def a_size(rng: random.Random) -> int:
    """Choose the tokens of a step's pictures, as often as POOLS says."""
    return rng.choices(list(POOLS), [often for often, *_ in POOLS.values()])[0]


def fits(tokens: int) -> int:
    """Return how many pictures of some tokens a conversation can have."""
    return LONGEST // (tokens + PER_PICTURE)


def examples(kind: str, n: int, rng: random.Random, split: str, step: int | None = None, most: int = USUAL) -> list[Example]:
    """Draw n conversations; in training (step) texts to read grow longer with the steps, and frames have up to `most` pictures."""
    if kind in many.KINDS:
        number = USUAL if step is None else rng.randint(FEWEST, most)
        tokens = 16 if step is None else a_size(rng)
        number = min(number, fits(tokens))
        return many.KINDS[kind](rng, split, max(1, 16 * n // (number * tokens)), number, tokens)
    longest = {} if kind != "read" or step is None else {"longest": min(8, 3 + step // 60)}
    return [FAMILIES[kind](rng, split, **longest) for _ in range(n)]


class Steps(IterableDataset):
    """Batches of each step from `first` on.

    same   gives those of one step again and again, to see whether it can be learnt
    fixed  a model whose encoder stays as it is: the steps are of kinds of LATER with a part of the others, and have its rows
    most   int64 by kind of FIRST_MOST, shared with the training, which changes them: pictures of an album or of two
    """

    def __init__(self, seed: int, first: int, first_stage: int, most: dict[str, torch.Tensor], same: bool = False, fixed: Any = None):
        self.seed, self.first, self.first_stage, self.most, self.same, self.fixed = seed, first, first_stage, most, same, fixed
        self.pools: dict[int, Pool] = {}
        self.kept: dict[str, list[demo.Batch]] = defaultdict(list)

    def kinds(self, step: int) -> list[str]:
        """List the kinds of conversations of a step: all but LATER, or those and in turn one of the others."""
        others = [kind for kind in MIX if kind not in LATER]
        if self.fixed is None:
            return others
        others.remove(FIRST_FORGOTTEN)
        due = [kind for kind in LATER if step % EVERY.get(kind, 1) == 0]
        return [*due, others[step // 2 % len(others)] if step % 2 else FIRST_FORGOTTEN]

    def again(self, kind: str, rng: random.Random, step: int) -> demo.Batch:
        """Draw conversations of a kind other than albums with the rows of their pictures, or take some that were drawn before."""
        kept = self.kept[kind]
        if len(kept) >= KEPT // 8 and rng.random() > NEW:
            return rng.choice(kept)
        n = MIX[kind].conversations if kind in LATER else round(MIX[kind].conversations * REPLAY.get(kind, 0.5))
        drawn = examples(kind, n, rng, "train", step, int(self.most["album"]))
        batch = demo.make_batch(drawn, rows_of(self.fixed, list({id(p): p for e in drawn for p in e.pictures}.values())))
        if len(kept) == KEPT:
            del kept[0]
        kept.append(batch)
        return batch

    def pooled(self, kind: str, rng: random.Random) -> demo.Batch:
        """Draw albums out of one of the pools."""
        tokens = a_size(rng)
        pool, (_, at_first, more) = self.pools.setdefault(tokens, Pool("train", tokens)), POOLS[tokens]
        pool.renew(self.fixed, rng, more if pool.shown else at_first)
        number = min(rng.randint(FEWEST, int(self.most[kind])), fits(tokens))
        questions = many.QUESTIONS if kind == "album" else 1
        n = max(1, round(TOKENS / (number * (tokens + PER_PICTURE) + questions * PER_QUESTION)))
        if kind == "album":
            drawn = many.albums(rng, "train", n, number, tokens, pool.some(rng, max(48, n * number)))
        else:
            drawn = [many.two_albums(rng, number, pool.some(rng, 128)) for _ in range(n)]
        return demo.make_batch(drawn, pool.rows)

    def __iter__(self) -> Iterator[dict[str, demo.Batch]]:
        torch.set_num_threads(1)
        step = self.first
        while True:
            rng = random.Random(f"{self.seed} {0 if self.same else step}")
            age = step - self.first_stage
            if self.fixed is not None:
                batches = {kind: self.pooled(kind, rng) if kind in self.most else self.again(kind, rng, step) for kind in self.kinds(step)}
            else:
                rows = (ROWS if age >= 0 else FIRST_ROWS).items()
                batches = {"rows": demo.make_batch([e for t, n in rows for e in examples(t, n, rng, "train")])}
                for kind in self.kinds(step) if age >= 0 else ():
                    batches[kind] = demo.make_batch(examples(kind, MIX[kind].conversations, rng, "train", age))
            yield batches
            step += not self.same


def by_answer(right: torch.Tensor, batch: demo.Batch) -> list[list[float]]:
    """Sort what is said of the answers' tokens [k] by answer, in the order of batch.tasks."""
    known = batch.targets >= 0
    starts = known & ~F.pad(known, (1, 0))[:, :-1]
    spans: list[list[float]] = [[] for _ in batch.tasks]
    for answer, value in zip((starts.flatten().cumsum(0)[known.flatten()] - 1).tolist(), right.tolist()):
        spans[answer].append(float(value))
    return spans


def scores(model: Any, batch: demo.Batch) -> dict[str, list[float]]:
    """Return per task, for each turn, 1 if all tokens of the answer are the likeliest, which greedy decoding would give, else 0."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model.lm_head(answers(model, batch, see(model, batch.patches, batch.grids)).last)
    found = defaultdict(list)
    for task, span in zip(batch.tasks, by_answer(logits.argmax(-1) == batch.targets[batch.targets >= 0], batch), strict=True):
        # a box is right if no digit but a last one is wrong: its share of right tokens says more
        found[task].append(sum(span) / len(span) if task in BOXES + ("click",) else float(all(span)))
    return found


@cache
def validation_batch(kind: str) -> demo.Batch:
    """Draw the conversations of a kind that validations have."""
    return demo.make_batch(examples(kind, MIX[kind].checked, random.Random(f"validation {kind}"), "validation"))


def validate(model: Any) -> dict[str, float]:
    """Return the mean of `scores` on pictures of the validation split."""
    found: dict[str, list[float]] = defaultdict(list)
    for kind in MIX:
        for name, values in scores(model, validation_batch(kind)).items():
            found[name] += values
    return {name: round(sum(v) / len(v), 4) for name, v in found.items()}


class Training:
    """Model, optimizer and averaged weights, which are saved and resumed together."""

    def __init__(self, seed: int):
        self.model, self.reader = demo.make_model(seed).float(), demo.Reader()
        both = [*self.model.named_parameters(), *self.reader.named_parameters()]
        inner = [p for name, p in both if p.dim() == 2 and ("blocks." in name or "layers." in name)]
        rest = [p for _, p in both if not any(p is q for q in inner)]
        self.optimizers = (
            torch.optim.Muon(inner, lr=PEAK, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([{"params": [p for p in rest if p.dim() > 1], "weight_decay": 0.05},
                               {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0}],
                              lr=PEAK, betas=(0.9, 0.98), foreach=True))
        self.parameters, self.step, self.seconds = [p for _, p in both], 0, 0.0
        self.fixed = False                                                     # the encoder
        self.most = {kind: torch.tensor(most).share_memory_() for kind, most in FIRST_MOST.items()}
        self.right, self.grown = dict.fromkeys(self.most, 0.0), dict.fromkeys(self.most, 0)
        self.average = [p.detach().clone() for p in self.model.parameters()]

    def take_weights(self, file: Path) -> None:
        """Begin from the weights of a GGUF file of this model."""
        demo.take_weights(self.model, file)
        self.fixed = True
        self.average = [p.detach().clone() for p in self.model.parameters()]

    def save(self, file: Path) -> None:
        """Write everything that going on needs; the old file stays until the new one is whole."""
        draft = file.with_suffix(".new")
        torch.save({"model": self.model.state_dict(), "reader": self.reader.state_dict(), "average": self.average,
                    "optimizers": [o.state_dict() for o in self.optimizers], "step": self.step, "seconds": self.seconds,
                    "most": self.most}, draft)
        draft.rename(file)

    def load(self, file: Path) -> None:
        """Take up a saved state."""
        state = torch.load(file)
        self.model.load_state_dict(state["model"])
        self.reader.load_state_dict(state["reader"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.average, self.step, self.seconds = state["average"], state["step"], state["seconds"]
        for kind, most in self.most.items():
            most.copy_(state["most"][kind])

    def teach_reader(self, batches: dict[str, demo.Batch], rate: float) -> dict[str, float]:
        """Do one step of the reader alone."""
        for batch in batches.values():
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                inside = answers(self.model, batch, batch.soft)
            with torch.autocast("cpu", torch.bfloat16):
                loss = self.reader.where(inside.rows, batch, self.model.lm_head.weight.detach())
            loss.backward()
        return {"reader": loss.item(), **self.move(rate)}

    def move(self, rate: float) -> dict[str, float]:
        """Move what has gradients."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, 1.0))
        for optimizer, factor in zip(self.optimizers, FACTORS):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return {"norm": norm}

    def update(self, batches: dict[str, demo.Batch], rate: float) -> dict[str, float]:
        """Do one step at a learning rate; return the losses."""
        losses: dict[str, float] = {}
        for task, batch in batches.items():
            soft, seen = batch.soft, torch.tensor(0.0)
            if soft is None:
                with torch.autocast("cpu", torch.bfloat16):
                    soft = see(self.model, batch.patches, batch.grids)
                    seen, share = self.reader(soft, batch, self.model.lm_head.weight)
                losses[f"{task} rows"] = seen.item()
                if task == "rows":
                    losses["glyphs"] = share
                    seen.backward()
                    continue
            with torch.autocast("cpu", torch.bfloat16):
                aims = batch.targets[batch.targets >= 0]
                inside = answers(self.model, batch, soft)
                logits = self.model.lm_head(inside.last).float()
                parts = {"": F.cross_entropy(logits, aims), **self.aims(inside, batch)}
            weights = {"": MIX[task].weight, " asked": ASKED, " shows": FOUND, " numbers": FOUND, " matches": FOUND}
            (0.5 * seen + sum(weights.get(name, 1.0) * part for name, part in parts.items())).backward()
            losses |= {task + name: part.item() for name, part in parts.items()}
            if task in self.most:
                losses |= self.watch(task, logits.argmax(-1) == aims, batch)
        losses |= self.move(rate)
        keep = min(AVERAGE, self.step / (self.step + 10))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.model.parameters()], 1 - keep)
        return losses

    def aims(self, inside: Inside, batch: demo.Batch) -> dict[str, torch.Tensor]:
        """Compute the losses of what lies inside of the decoder, by what they are called."""
        table = self.model.lm_head.weight
        found = {}
        if (batch.found >= 0).any():
            found = dict(zip((" shows", " numbers"), demo.found_losses(inside.scores[FINDS], batch)))
        if (batch.albums == 1).any():
            found |= {" matches": demo.matched_loss(inside.scores[MATCHES], batch), " album": self.reader.which_album(inside.early, batch)}
        return {" where": self.reader.where(inside.rows, batch, table), " asked": self.reader.asked(inside.tokens, batch, table), **found}

    def watch(self, kind: str, right: torch.Tensor, batch: demo.Batch) -> dict[str, float]:
        """Let albums grow when they are answered for; return the shares of right answers by task."""
        found = defaultdict(list)
        for task, span in zip(batch.tasks, by_answer(right, batch), strict=True):
            found[task].append(float(all(span)))
        most, points = self.most[kind], [p for task in GROWS_BY[kind] for p in found[task]]
        if points:
            self.right[kind] += (sum(points) / len(points) - self.right[kind]) / RECENT
        if self.right[kind] > GROWN and self.step >= self.grown[kind] + RECENT and most < MOST:
            most += 1
            self.grown[kind] = self.step
        return {f"{kind} most": int(most), **{f"right {task}": sum(p) / len(p) for task, p in found.items() if p}}

    def averaged(self) -> Any:
        """Return a model with the averaged weights."""
        model = demo.make_model(0).float().eval()
        with torch.no_grad():
            for p, a in zip(model.parameters(), self.average):
                p.copy_(a)
        return model


def draw(log: Path, out: Path) -> None:
    """Draw the losses and the validation's scores of a log."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for task in MIX:
        left.plot([x["step"] for x in lines if task in x], [x[task] for x in lines if task in x], label=task, lw=0.8)
    left.set(yscale="log", xlabel="step", ylabel="loss (nats a token of the answers)", title="training")
    checked = [x for x in lines if "validation" in x]
    for task in checked[-1]["validation"] if checked else ():
        since = [x for x in checked if task in x["validation"]]
        right.plot([x["step"] for x in since], [x["validation"][task] for x in since], label=task, marker=".")
    right.set(xlabel="step", ylabel="share that is right", title="validation (averaged weights)", ylim=(0, 1.02))
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=90)


def main() -> None:
    """Parse arguments and train."""
    parser = argparse.ArgumentParser(prog="python -m converters.demo.train", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=60, help="from now (default: 60)")
    parser.add_argument("--stop-at", metavar="HH:MM", help="local time; instead of --minutes")
    parser.add_argument("--decay", type=float, default=DECAY_MINUTES, help="minutes at the end in which the rate falls")
    parser.add_argument("--first-stage", type=int, default=1000, metavar="STEPS", help="in which only the encoder learns")
    parser.add_argument("--weights", type=Path, help="begin from those of a GGUF file, and learn what is new")
    parser.add_argument("--peak", type=float, default=PEAK, help=f"the learning rate (default: {PEAK})")
    parser.add_argument("--every", type=int, default=250, help="steps between validations")
    parser.add_argument("--overfit", action="store_true", help="the same few conversations again and again: can it learn at all?")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    end = datetime.now() + timedelta(minutes=args.minutes)
    if args.stop_at:
        hours, minutes = map(int, args.stop_at.split(":"))
        end = datetime.now().replace(hour=hours, minute=minutes, second=0)
    training, state, log = Training(args.seed), args.folder / "state.pt", args.folder / "log.jsonl"
    worst = check_forward(training.model, [e for k in MIX for e in examples(k, 2, random.Random(k), "validation")])
    if worst > 1e-4:
        raise SystemExit(f"the forward pass differs from transformers' by {worst}")
    if args.weights:
        training.take_weights(args.weights)
    if state.exists():
        training.load(state)
    steps = Steps(args.seed, training.step, args.first_stage, training.most, args.overfit, training.model if args.weights else None)
    loader = iter(DataLoader(steps, batch_size=None, num_workers=1, prefetch_factor=6))
    size = sum(p.numel() for p in training.model.parameters())
    bar = tqdm(initial=training.step, desc=f"{size} parameters", unit="step", mininterval=5)
    recent: dict[str, list[float]] = defaultdict(list)

    def finish(validation: dict[str, float]) -> None:
        if validation:
            tqdm.write(f"{training.step}: {validation}")
            with log.open("a") as out:
                out.write(json.dumps({"step": training.step, "validation": validation}) + "\n")
        training.save(state)
        demo.save_checkpoint(training.averaged().half(), args.folder / "checkpoint")

    while (left := (end - datetime.now()).total_seconds()) > 0:
        began = time.monotonic()
        warm = 1.0 if training.step < args.first_stage else (training.step - args.first_stage + 1) / WARM_UP
        rate = args.peak * min(1.0, (training.step + 1) / WARM_UP, warm, left / (60 * args.decay))
        heads = args.weights and training.step < args.first_stage
        for name, value in (training.teach_reader(next(loader), PEAK) if heads else training.update(next(loader), rate)).items():
            recent[name].append(value)
        training.seconds += time.monotonic() - began
        bar.update()
        if training.step % 25 == 0:
            means = {name: round(sum(v) / len(v), 4) for name, v in recent.items()}
            recent.clear()
            with log.open("a") as out:
                out.write(json.dumps({"step": training.step, "rate": rate, "seconds": round(training.seconds, 1),
                                      **means}) + "\n")
            tqdm.write(f"{training.step}: {means}")
        if training.step % args.every == 0:
            finish(validate(training.averaged()) if training.step > args.first_stage else {})
    finish(validate(training.averaged()))
    draw(log, args.folder / "loss.png")


if __name__ == "__main__":
    main()
