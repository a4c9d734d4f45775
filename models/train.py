"""Train the model.

    python models/train.py TEXTS RUN --preset cpu
    python models/train.py TEXTS LONGER --preset cpu-long --start RUN

TEXTS is a folder of public-domain .txt files. RUN is a folder for tokenizer.json, train.log,
checkpoint/ (from which the same command resumes) and finally model/, which export.py reads.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from data import VALUE, Mix, Rows, encoder, load_books, split_books, test_document, train_tokenizer
from model import Llama, Shape
from muon import Muon, has_bf16


@dataclass(frozen=True)
class Stage:
    length: int
    batch: int
    tokens: float  # of the whole stage
    mix: Mix = Mix()


@dataclass(frozen=True)
class Preset:
    """All settings of a training except the texts.

    Attributes:
        previous: number of query heads of layer 0 that are initialized to attend 1, 2, ... tokens
            back. All other heads form by training.
        muon: learning rate of matrices.
        adam: learning rate of all other parameters; embeddings have 5 times this rate.
        warm_up: steps until the full rate.
        decay: share of the tokens, at the end, over which the rates fall to 0.
        power: exponent of this fall (2: a parabola).
    """

    shape: Shape
    stages: tuple[Stage, ...]
    previous: int = 4
    muon: float = 0.01
    adam: float = 0.004
    warm_up: int = 30
    decay: float = 0.4
    power: float = 2
    seed: int = 1


M = 1e6
# On repetitions alone, induction heads form within 350,000 tokens. In the mix they had not formed
# after a million. Everything else is learned on top of them.
REPETITIONS = Mix(repeats=0.85, books=0.05, stories=0.0)
LONG = Mix(repeats=0.12, books=0.08, odd=0.25)
# With one row per step, a row counts as much as a whole batch of short rows.
FACTS = Mix(repeats=0.08, books=0.04, stories=0.03, odd=0.2)
# More questions in other words than the facts', and RULER's needles.
ALL = Mix(repeats=0.06, books=0.04, stories=0.03, odd=0.2, magic=0.35, exact=0.45)
PRESETS = {
    "cpu-short": Preset(
        shape=Shape(1024, n_layer=4, n_ff=384),
        stages=(
            Stage(64, 16, 0.5 * M, REPETITIONS),
            Stage(128, 16, 0.8 * M),
            Stage(256, 8, 0.8 * M),
        ),
    ),
    "cpu": Preset(
        shape=Shape(1024, n_layer=6, n_ff=384),
        stages=(
            Stage(64, 16, 0.6 * M, REPETITIONS),
            Stage(128, 16, 1.5 * M),
            Stage(256, 8, 2.7 * M),
            Stage(512, 8, 2.5 * M, LONG),
            Stage(1024, 4, 2 * M, LONG),
            Stage(2048, 2, 1.4 * M, LONG),
            Stage(4096, 1, 0.8 * M, LONG),
            Stage(8192, 1, 0.6 * M, LONG),
        ),
        decay=0.92,
        power=3,
    ),
    # continues a model of `cpu`, whose rates are almost 0 when the long texts begin
    "cpu-long": Preset(
        shape=Shape(1024, n_layer=6, n_ff=384),
        stages=(
            Stage(1024, 4, 1.6 * M, FACTS),
            Stage(2048, 2, 1.7 * M, FACTS),
            Stage(4096, 1, 1.8 * M, FACTS),
            Stage(8192, 1, 1.1 * M, FACTS),
        ),
        muon=0.0015,
        adam=0.0006,
        decay=0.5,
        power=1,
    ),
    "gpu": Preset(
        shape=Shape(2048, n_layer=8, n_embd=384, n_head=8, n_head_kv=4, n_ff=768),
        stages=(
            Stage(128, 256, 10 * M, REPETITIONS),
            Stage(256, 256, 40 * M),
            Stage(512, 128, 60 * M),
            Stage(1024, 64, 80 * M),
            Stage(2048, 32, 80 * M),
            Stage(4096, 16, 80 * M),
            Stage(8192, 8, 80 * M),
            Stage(16384, 4, 60 * M),
            Stage(32768, 2, 20 * M),
        ),
    ),
}
# and once more, with RULER's needles
PRESETS["cpu-ruler"] = replace(
    PRESETS["cpu-long"],
    stages=(
        Stage(1024, 4, 1.4 * M, ALL),
        Stage(2048, 2, 1.4 * M, ALL),
        Stage(4096, 1, 1.4 * M, ALL),
        Stage(8192, 1, 0.9 * M, ALL),
    ),
)
GOES_ON = {"cpu-long", "cpu-ruler"}  # presets whose rates are for a trained model

# the goal of cpu-short: values found at 256 tokens, for one fact and a question in its words
SHORT_FIGURE = 0.5


class Schedule:
    """The stage and the learning rates of a training, which depend on the part done.

    The part is that of the preset's tokens or, with `minutes`, that of the time, so that a
    training ends on time on a machine of unknown speed.
    """

    def __init__(self, preset: Preset, minutes: float | None):
        self.preset, self.minutes = preset, minutes
        self.ends = np.cumsum([stage.tokens for stage in preset.stages])
        self.total = float(self.ends[-1])

    def part(self, tokens: float, seconds: float) -> float:
        return tokens / self.total if self.minutes is None else seconds / 60 / self.minutes

    def stage(self, part: float) -> Stage:
        i = int(np.searchsorted(self.ends, part * self.total, side="right"))
        return self.preset.stages[min(i, len(self.ends) - 1)]

    def rate(self, part: float, step: int) -> float:
        """Return the factor of all learning rates, which rises, stays constant and falls to 0."""
        up = min(1.0, (step + 1) / self.preset.warm_up)
        return up * min(1.0, max(0.0, 1 - part) / self.preset.decay) ** self.preset.power


# ---- measuring -------------------------------------------------------------------------------


@torch.no_grad()
def needle(
    model: Llama,
    rows: Rows,
    length: int,
    n_facts: int = 1,
    reworded: bool = False,
    n: int = 20,
    seed: int = 99,
) -> tuple[float, float]:
    """Ask one question about each of n texts of `length` tokens with n_facts facts of a kind.

    Returns the share of answers that greedy decoding would give, and the share of correct values:
    every token must be the most likely one after the tokens before it.
    """
    device = model.embed.weight.device
    cos, sin = model.rope(length, device)
    whole = values = 0
    for i in range(n):
        rng = np.random.default_rng([seed, length, n_facts, reworded, i])
        ids, weights = test_document(rows, rng, length, n_facts, reworded)
        asked = np.flatnonzero(weights[1:] > 0)
        tokens = torch.from_numpy(ids[:-1].astype(np.int64))[None].to(device)
        states = model(tokens, cos[: len(ids) - 1], sin[: len(ids) - 1])[0, asked]
        right = model.head(states).argmax(-1).cpu().numpy() == ids[1:][asked]
        whole += right.all()
        values += right[weights[1:][asked] == VALUE].all()
    return float(whole / n), float(values / n)


@torch.no_grad()
def induction(model: Llama, period: int = 64, repeats: int = 4) -> np.ndarray:
    """Return the induction score of each head on repeated random tokens: [layer, query head].

    It is the attention to the tokens after earlier copies, as a mean over queries from 0 to 1.
    """
    block = np.random.default_rng(5).integers(3, model.shape.n_vocab, (2, period))
    ids = torch.from_numpy(np.tile(block, (1, repeats))).to(model.embed.weight.device)
    n = period * repeats
    query, key = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    hits = ((query - key) % period == period - 1) & (query > key) & (query >= period)
    scores = np.zeros((model.shape.n_layer, model.shape.n_head))

    def see(layer: int, attention: torch.Tensor) -> None:
        hit = (attention.float().cpu() * hits).sum(-1)
        scores[layer] = hit[..., period:].mean((0, 2)).numpy()

    model.attention(ids, see)
    return scores


def measure(model: Llama, rows: Rows, stage: Stage, n: int) -> str:
    """Return a log line: correct answers / values by number of facts (r: reworded)."""
    parts = [f"needle at {stage.length}:"]
    for n_facts in (1, 2, 8):
        if stage.length >= 100 * n_facts:
            for reworded in (False, True):
                right = needle(model, rows, stage.length, n_facts, reworded, n)
                parts.append("{}{} {:.2f}/{:.2f} ".format(n_facts, "r" * reworded, *right))
    scores = induction(model)
    best = sorted(np.ndenumerate(scores), key=lambda item: -item[1])[:6]
    parts.append("induction " + " ".join(f"{layer}.{head} {s:.2f}" for (layer, head), s in best))
    return " ".join(parts)


# ---- files -----------------------------------------------------------------------------------

PART = 15 << 20  # bytes of a file, below the limits of mail and repositories


def save(folder: Path, value: object) -> None:
    """Save a torch file in parts, completely or not at all."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    data = buffer.getbuffer()
    new, old = folder.with_suffix(".new"), folder.with_suffix(".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for i in range(0, len(data), PART):
        (new / f"part-{i // PART:02d}").write_bytes(data[i : i + PART])
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path, device: str = "cpu") -> dict:
    """Load the result of save()."""
    data = b"".join(part.read_bytes() for part in sorted(folder.glob("part-*")))
    return torch.load(io.BytesIO(data), map_location=device, weights_only=True)


# ---- training --------------------------------------------------------------------------------

Batch = tuple[np.ndarray, np.ndarray]  # of Rows.batch()
_rows: Rows  # of a worker process


def _start_worker(texts: Path, tokenizer: Path, preset: Preset) -> None:
    global _rows
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    _rows = training_rows(texts, tokenizer, preset)[0]


def make_batch(rows: Rows, step: int, stage: Stage) -> Batch:
    return rows.batch(step, stage.batch, stage.length, stage.mix)


def _work(step: int, stage: Stage) -> Batch:
    return make_batch(_rows, step, stage)


def training_rows(texts: Path, tokenizer: Path, preset: Preset) -> tuple[Rows, Rows]:
    """Make the rows of the training books, and those of the book that is held out."""
    from tokenizers import Tokenizer

    train, held_out = split_books(load_books(texts))
    n_vocab = preset.shape.n_vocab
    if not tokenizer.exists():
        train_tokenizer(train, n_vocab).save(str(tokenizer))
    encode = encoder(Tokenizer.from_file(str(tokenizer)))
    rows = Rows(train, encode, n_vocab, preset.seed)
    unseen = Rows(held_out, encode, n_vocab, preset.seed)
    unseen.words = rows.words
    return rows, unseen


class Training:
    """The model, its optimizers and the progress of the training."""

    def __init__(self, preset: Preset, device: str):
        self.preset, self.device = preset, device
        self.model = Llama(preset.shape, preset.seed)
        offsets = tuple(range(1, preset.previous + 1))
        self.model.seed_previous(offsets)
        self.model.to(device)
        matrices, embeddings, others = self.model.parts()
        adam = [
            {"params": embeddings, "lr": 5 * preset.adam},
            {"params": others, "lr": preset.adam},
        ]
        self.optimizers = (
            Muon(matrices, preset.muon),
            torch.optim.Adam(adam, betas=(0.9, 0.95), fused=True),
        )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["full_lr"] = group["lr"]
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        # On a CPU compiling takes a minute per length and saves only a tenth of the time.
        self.loss = (
            self.model.loss if device == "cpu" else torch.compile(self.model.loss, dynamic=False)
        )
        self.rope = self.model.rope(preset.stages[0].length, device)

    def learn(self, batch: Batch, stage: Stage, rate: float):
        """Take one step and return the loss before it."""
        ids, weights = batch
        if len(self.rope[0]) != stage.length:
            self.rope = self.model.rope(stage.length, self.device)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * rate
        fast = has_bf16(self.device)
        with torch.autocast(self.device, torch.bfloat16) if fast else nullcontext():
            loss = self.loss(
                torch.from_numpy(ids.astype(np.int64)).to(self.device, non_blocking=True),
                torch.from_numpy(weights).to(self.device, non_blocking=True),
                *self.rope,
            )
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += weights[:, 1:].size
        return loss.detach()

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }

    def resume(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]

    def go_on_from(self, state: dict) -> None:
        """Continue from the end of another training, at this preset's rates.

        The count of steps continues, so that no row is used twice. Raises ValueError if the model
        has another shape.
        """
        shapes = [
            {name: value.shape for name, value in model.items()}
            for model in (self.model.state_dict(), state["model"])
        ]
        if shapes[0] != shapes[1]:
            raise ValueError("its model has another shape than this preset's")
        rates = [[g["full_lr"] for g in o.param_groups] for o in self.optimizers]
        self.resume(state)
        for optimizer, group_rates in zip(self.optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, group_rates, strict=True):
                group["full_lr"] = rate
        self.tokens, self.seconds = 0, 0.0


def batches(
    training: Training, schedule: Schedule, make: Callable[[int, Stage], Future], ahead: int
) -> Iterator[tuple[Batch, Stage]]:
    """Yield the batches of the current stage, made some steps ahead by workers, until it ends."""
    waiting: deque[tuple[Future, Stage]] = deque()
    step, tokens = training.step, training.tokens
    while True:
        while len(waiting) <= ahead:
            part = schedule.part(tokens, training.seconds)
            if part >= 1:
                break
            stage = schedule.stage(part)
            waiting.append((make(step, stage), stage))
            step, tokens = step + 1, tokens + stage.batch * stage.length
        if not waiting:
            return
        future, stage = waiting.popleft()
        yield future.result(), stage


def in_this_process(rows: Rows) -> Callable[[int, Stage], Future]:
    def make(step: int, stage: Stage) -> Future:
        future: Future = Future()
        future.set_result(make_batch(rows, step, stage))
        return future

    return make


def train(
    texts: Path,
    run: Path,
    preset: Preset,
    *,
    minutes: float | None = None,
    leave_after: float | None = None,
    workers: int = 0,
    start: Path | None = None,
    log: Callable[[str], None] = print,
) -> Training:
    """Train from the start or from a checkpoint.

    Args:
        leave_after: minutes after which to stop with a checkpoint.
        start: the run of another preset of the same shape, from whose end to continue.
    """
    run.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(preset.seed)
    tokenizer = run / "tokenizer.json"
    if start is not None and not tokenizer.exists():
        shutil.copy(start / "tokenizer.json", tokenizer)
    rows, unseen = training_rows(texts, tokenizer, preset)
    training, schedule = Training(preset, device), Schedule(preset, minutes)
    if (run / "checkpoint").exists():
        training.resume(load(run / "checkpoint", device))
    elif start is not None:
        try:
            training.go_on_from(load(start / "checkpoint", device))
        except ValueError as error:
            raise SystemExit(f"cannot continue from {start}: {error}") from error
    n_parameters = sum(p.numel() for p in training.model.parameters())
    precision = "bf16" if has_bf16(device) else "fp32"
    threads = torch.get_num_threads()
    log(f"{n_parameters / M:.2f}M parameters, {device}, {precision}, {threads} threads")
    log(json.dumps(asdict(preset)))
    log(f"from step {training.step}, {training.tokens / M:.2f}M tokens")

    pool = None
    make = in_this_process(rows)
    if workers:
        start = (texts, tokenizer, preset)
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, start)
        make = lambda step, stage: pool.submit(_work, step, stage)  # noqa: E731

    began, before = time.monotonic(), training.seconds
    marks = dict.fromkeys(("line", "measured", "saved"), began)
    losses: list[torch.Tensor] = []
    tokens, pause = 0, 180.0
    stage = schedule.stage(0)
    for batch, stage in batches(training, schedule, make, 2 * workers):
        part = schedule.part(training.tokens, training.seconds)
        rate = schedule.rate(part, training.step)
        losses.append(training.learn(batch, stage, rate))
        tokens += batch[1][:, 1:].size
        now = time.monotonic()
        training.seconds = before + now - began
        if now - marks["line"] > 20:
            speed = tokens / (now - marks["line"])
            loss = torch.stack(losses).mean()
            log(
                f"step {training.step}  {training.tokens / M:.2f}M tokens  {part:.0%}"
                f"  length {stage.length}  loss {loss:.3f}  {speed:.0f} tokens/s  rate {rate:.2f}"
            )
            marks["line"], losses, tokens = now, [], 0
        if now - marks["measured"] > pause:
            log(measure(training.model, unseen, stage, 10))
            marks["measured"] = time.monotonic()
            took = marks["measured"] - now
            marks["line"] += took
            pause = max(180, 20 * took)  # long texts take long
        if now - marks["saved"] > 180:
            save(run / "checkpoint", training.state())
            marks["saved"] = time.monotonic()
        if leave_after is not None and now - began > 60 * leave_after:
            break
    if pool:
        pool.shutdown(cancel_futures=True)
    training.seconds = before + time.monotonic() - began
    save(run / "checkpoint", training.state())
    if schedule.part(training.tokens, training.seconds) >= 1:
        log(measure(training.model, unseen, stage, min(20, max(4, 20480 // stage.length))))
        log(f"done: {training.tokens / M:.2f}M tokens in {training.seconds / 60:.1f} minutes")
        result = {
            "model": training.model.state_dict(),
            "shape": asdict(preset.shape),
            "length": stage.length,
        }
        save(run / "model", result)
    else:
        log(f"left at step {training.step}: the same command goes on")
    return training


def changed(preset: Preset, settings: list[str]) -> Preset:
    """Return the preset with changed fields, given as NAME=VALUE, of itself or its shape."""
    for setting in settings:
        name, _, value = setting.partition("=")
        for field, owner in (("shape", preset.shape), ("", preset)):
            if name in ("shape", "stages") or not hasattr(owner, name):
                continue
            new = replace(owner, **{name: type(getattr(owner, name))(value)})
            preset = replace(preset, **{field: new}) if field else new
            break
        else:
            raise SystemExit(f"--set {setting}: no such setting")
    return preset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path, help="folder of public-domain .txt files")
    parser.add_argument("run", type=Path, help="folder for the results")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting"
    )
    parser.add_argument(
        "--start", type=Path, metavar="RUN", help="begin with the end of another run"
    )
    parser.add_argument(
        "--minutes", type=float, help="for the whole training, instead of the preset's tokens"
    )
    parser.add_argument(
        "--leave-after", type=float, metavar="MINUTES", help="stop, the same command goes on"
    )
    parser.add_argument("--threads", type=int, help="of a CPU training")
    parser.add_argument("--workers", type=int, help="processes that make documents")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.workers is None:
        args.workers = max(1, (os.cpu_count() or 2) - 2) if torch.cuda.is_available() else 0
    if args.start is None and args.preset in GOES_ON and not (args.run / "checkpoint").is_dir():
        parser.error(f"{args.preset} goes on from another run: name its folder with --start RUN")
    for name in ("checkpoint", "tokenizer.json"):
        if args.start is not None and not (args.start / name).exists():
            parser.error(f"--start: {args.start} holds no {name}, name the folder of a run")
    args.run.mkdir(parents=True, exist_ok=True)
    with open(args.run / "train.log", "a", encoding="utf-8") as file:
        began = time.monotonic()

        def log(text: str) -> None:
            line = f"{time.monotonic() - began:7.1f}s  {text}"
            for out in (file, sys.stderr):
                print(line, file=out, flush=True)

        train(
            args.texts,
            args.run,
            changed(PRESETS[args.preset], args.set),
            minutes=args.minutes,
            leave_after=args.leave_after,
            workers=args.workers,
            start=args.start,
            log=log,
        )


if __name__ == "__main__":
    main()
