"""What Python takes of a streamed token, beside the library.

    python docs/benchmarks/python_costs.py [--tokens N] [MODEL.gguf or SHAPE]...

Every token of Llama.create_completion(stream=True) is timed beside a bare llama_decode of a token,
which is what llama-bench's tg times: on the same context, at the same depth, in turn. The same is
done with llama_cpp's own loops in place of razor_local's. Everything runs in one thread, whose CPU
time counts, and the most likely token is drawn.

History is what has been answered before: its rows in the cache are random, its text is real. Models
with random weights get a vocabulary of made-up words.
"""

from __future__ import annotations

import ctypes
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from razor_local import Llama, evaluation
from razor_local.bench.random_cache import random_state
from razor_local.bench.shape_file import cached_shape_model
from razor_local.bench.shapes import SHAPES
from razor_local.cli.chat import DEFAULT_MODEL
from razor_local.completion import TextStream
from razor_local.llama import C, llama_cpp

HISTORIES = (0, 1000, 6000)
PROMPT = [65, 66, 67]
clock = time.thread_time


class Stock(Llama):
    """llama_cpp's loops on a context of razor_local."""

    eval = llama_cpp.Llama.eval
    generate = llama_cpp.Llama.generate
    sample = llama_cpp.Llama.sample
    reset = llama_cpp.Llama.reset
    _init_sampler = llama_cpp.Llama._init_sampler
    detokenize = llama_cpp.Llama.detokenize
    _create_completion = llama_cpp.Llama._create_completion


# what is timed inside of a token: part, its functions, what they call that is the library's
PARTS = (
    ("text of the answer", [(Stock, "detokenize"), (Llama, "piece"), (TextStream, "add"),
                            (TextStream, "stopped"), (TextStream, "ready")]),
    ("token to the context", [(Stock, "eval"), (evaluation, "eval_batch"),
                              (evaluation, "n_cached")]),
    ("library", [(C, "llama_decode"), (C, "llama_sampler_sample")]),
)  # fmt: skip


class Timer:
    """Adds up the time in functions, without that in other timed functions they call."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((part for part, _ in PARTS), 0.0)
        self._inner = 0.0

    def wrap(self, part: str, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            outer, self._inner = self._inner, 0.0
            start = clock()
            result = function(*args, **kwargs)
            seconds = clock() - start
            self.seconds[part] += seconds - self._inner
            self._inner = outer + seconds
            return result

        return timed

    @contextmanager
    def running(self) -> Iterator[None]:
        places = [(part, *place) for part, where in PARTS for place in where]
        before = [(owner, name, owner.__dict__[name]) for _, owner, name in places]
        try:
            for (part, owner, name), (*_, function) in zip(places, before, strict=True):
                setattr(owner, name, self.wrap(part, function))
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)


def fill(llama: Llama, tokens: list[int]) -> None:
    """Leaves tokens in the context, with random rows in its cache."""
    evaluation.clear_cache(llama)
    llama.eval(tokens[:1])
    if len(tokens) == 1:
        return
    size = C.llama_state_seq_get_size(llama.ctx, 0)
    saved = (ctypes.c_uint8 * size)()
    C.llama_state_seq_get_data(llama.ctx, saved, size, 0)
    state = random_state(llama.plan, len(tokens), bytes(saved))
    data = (ctypes.c_uint8 * len(state)).from_buffer(state)
    assert C.llama_state_seq_set_data(llama.ctx, data, len(state), 0)
    llama.input_ids[: len(tokens)] = tokens
    llama.n_tokens = len(tokens)


def stream(llama: Llama, cls: type[Llama], n_history: int, n_tokens: int) -> Iterator[Any]:
    """A completion by the loops of cls, of which n_history tokens are out already."""
    history = [PROMPT[0] + i % 26 for i in range(n_history)]

    class Ahead(cls):
        def generate(self, tokens: list[int], **options: Any) -> Iterator[int]:
            yield from history
            yield from cls.generate(self, tokens + history, **options)

    fill(llama, (PROMPT + history)[:-1])
    llama.__class__ = Ahead
    run = llama.create_completion(
        PROMPT, max_tokens=n_history + n_tokens + 9, temperature=0, stream=True
    )
    for _ in range(n_history + 3):
        next(run)
    return run


def bare(llama: Llama) -> float:
    """Seconds that a token takes in a loop of llama_decode; the context is as before, then."""
    ids = (C.llama_token * 1)(PROMPT[0])
    start = clock()
    code = C.llama_decode(llama.ctx, C.llama_batch_get_one(ids, 1))
    C.llama_synchronize(llama.ctx)
    seconds = clock() - start
    assert code == 0 and C.llama_memory_seq_rm(llama._ctx.memory, 0, llama.n_tokens, -1)
    return seconds


def compare(llama: Llama, cls: type[Llama], n_history: int, n_tokens: int) -> tuple[float, float]:
    """Medians: seconds of a bare token, streaming over bare."""
    run = stream(llama, cls, n_history, n_tokens)
    pairs = []
    for _ in range(n_tokens):
        seconds = bare(llama)
        start = clock()
        next(run)
        pairs.append((seconds, clock() - start))
    return statistics.median(b for b, _ in pairs), statistics.median(s / b for b, s in pairs)


def parts(llama: Llama, cls: type[Llama], n_history: int, n_tokens: int) -> dict[str, float]:
    """Median seconds of a token by part."""
    run = stream(llama, cls, n_history, n_tokens)
    timer, found = Timer(), []
    with timer.running():
        for _ in range(n_tokens):
            timer.seconds = dict.fromkeys(timer.seconds, 0.0)
            start = clock()
            next(run)
            total = clock() - start
            found.append(timer.seconds | {"the loop": total - sum(timer.seconds.values())})
    return {part: statistics.median(row[part] for row in found) for part in found[0]}


def with_vocabulary(model: Path, path: Path) -> Path:
    """A copy of a model without a tokenizer, with one of made-up words."""
    reader, writer, rng = GGUFReader(model), GGUFWriter(path, "llama"), random.Random(0)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in (
            "general.architecture",
            "tokenizer.ggml.model",
        ):
            is_array = field.types[0] == GGUFValueType.ARRAY
            writer.add_key_value(
                field.name,
                field.contents(),
                field.types[0],
                sub_type=field.types[-1] if is_array else None,
            )
    n = reader.fields["llama.vocab_size"].contents()
    words: set[str] = set()
    while len(words) < n - 3:
        letters = rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))
        words.add("▁" * rng.randint(0, 1) + "".join(letters))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *sorted(words)])
    writer.add_token_scores([0.0] * n)
    writer.add_token_types([2, 3, 3] + [1] * (n - 3))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def open_model(name: str, folder: Path) -> Llama:
    path = Path(name)
    if name in SHAPES:
        path = with_vocabulary(cached_shape_model(name), folder / f"{name}.gguf")
    return Llama(path, n_ctx=8192, n_threads=1, n_threads_batch=1)


@click.command(help=__doc__)
@click.argument("models", nargs=-1)
@click.option("--tokens", default=200, show_default=True, help="That are timed, each time.")
def main(models: tuple[str, ...], tokens: int) -> None:
    C.llama_vocab_is_eog = lambda vocab, token: False  # no answer ends
    with tempfile.TemporaryDirectory() as folder:
        for name in models or (str(DEFAULT_MODEL), "30m", "llama-3.2-1b"):
            llama = open_model(name, Path(folder))
            print(f"\n{Path(name).name}\n")
            print("| history | bare llama_decode | llama_cpp's loop | razor_local's |")
            print("|---|---|---|---|")
            for n in HISTORIES:
                (seconds, stock), (_, ours) = (
                    compare(llama, cls, n, tokens) for cls in (Stock, Llama)
                )
                print(f"| {n:,} | {seconds * 1e3:.2f} ms | {stock:.3f}x | {ours:.3f}x |")
                sys.stdout.flush()
            print("\n| µs per token | " + " | ".join(f"at {n:,}" for n in HISTORIES) + " |")
            print("|---|" + "---|" * len(HISTORIES))
            rows = {n: [parts(llama, cls, n, tokens) for cls in (Stock, Llama)] for n in HISTORIES}
            for part in next(iter(rows.values()))[0]:
                cells = (f"{a[part] * 1e6:,.0f} → {b[part] * 1e6:,.0f}" for a, b in rows.values())
                print(f"| {part} | " + " | ".join(cells) + " |", flush=True)
            llama.__class__ = Llama
            llama.close()


if __name__ == "__main__":
    main()
