"""Mutating fuzzer of whole model files, in long-lived worker processes.

    python -m tests.fuzz.model_files --read 20000 --run 2000 --seed 1

--read is the number of files for the header reader, the profile and fit. --run is the number of
files that Llama and a turn of Chat use as well. A finding is a signal that ends a worker, an
exception other than RazorError, a message that is not one printable line, output on stderr, or more
than 10 seconds. The file is kept as crash-*.gguf.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

from gguf import GGUFValueType as T

from tests.support.tiny_models import TinySpec, make_model, razor_kv

SECONDS = 10.0
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Finding(AssertionError):
    """A file that ends the process, takes too long, or causes a traceback."""


# -- files


def write_seeds(folder: Path) -> list[Path]:
    """Write small models of several kinds, with tokenizers, templates and profiles."""
    seeds = []
    for i, arch in enumerate(("llama", "qwen2", "qwen3", "gpt2", "deci")):
        n_kv = {"deci": (2, 0, 4), "gpt2": 4}.get(arch, 2)
        spec = TinySpec(arch, 3, 4, n_kv, 32, n_vocab=300, seed=i)
        path = folder / f"seed-{i}.gguf"
        seeds.append(make_model(path, spec, _tokenizer(spec.n_vocab, i) | _profile(spec)))
    return seeds


def _profile(spec: TinySpec) -> dict[str, Any]:
    if spec.arch == "gpt2":
        return {}
    return razor_kv([[i % 2 for i in range(n)] for n in spec.kv_heads], window_min=64)


def _tokenizer(n_vocab: int, kind: int) -> dict[str, Any]:
    """Return a byte-level BPE vocabulary, or one of SentencePiece."""
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    if kind % 2:
        pieces = [f"<0x{b:02X}>" for b in range(256)] + [f"▁w{i}" for i in range(n_vocab)]
        types = [3] * 5 + [6] * 256 + [1] * n_vocab
        keys = {"tokenizer.ggml.model": ("llama", T.STRING)}
    else:
        kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = iter(range(256, 512))
        chars = [chr(b) if b in kept else chr(next(others)) for b in range(256)]
        pieces, types = chars + [f"t{i}" for i in range(n_vocab)], [3] * 5 + [1] * (256 + n_vocab)
        keys = {
            "tokenizer.ggml.model": ("gpt2", T.STRING),
            "tokenizer.ggml.pre": ("gpt-2", T.STRING),
            "tokenizer.ggml.merges": (["a b", "c d"], T.ARRAY),
        }
    tokens = (special + pieces)[:n_vocab]
    return keys | {
        "tokenizer.ggml.tokens": (tokens, T.ARRAY),
        "tokenizer.ggml.scores": ([float(-i) for i in range(n_vocab)], T.ARRAY),
        "tokenizer.ggml.token_type": (types[:n_vocab], T.ARRAY),
        "tokenizer.ggml.bos_token_id": (1, T.UINT32),
        "tokenizer.ggml.eos_token_id": (4, T.UINT32),
        "tokenizer.ggml.unknown_token_id": (0, T.UINT32),
        "tokenizer.chat_template": (TEMPLATE, T.STRING),
        "general.name": ("a model", T.STRING),
    }


EDGES = (0, 1, 2, 3, 7, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
FLOATS = (0.0, -1.0, 1e-45, 1e38, float("inf"), float("-inf"), float("nan"))


def mutate(rng: random.Random, raw: bytes, n_header: int) -> bytes:
    """Change a few bytes, most of them in the header."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        end = n_header if rng.random() < 0.9 else len(data)
        at = rng.randrange(min(end, len(data)))
        kind = rng.randrange(9)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            piece = struct.pack("<Q", rng.choice(EDGES))[: rng.choice((1, 2, 4, 8))]
            data[at : at + len(piece)] = piece
        elif kind == 2:
            data[at : at + 4] = struct.pack("<f", rng.choice(FLOATS))
        elif kind == 3:
            data[at : at + 4] = struct.pack("<I", rng.randrange(14))
        elif kind == 4:
            del data[at : at + rng.randrange(1, 24)]
        elif kind == 5:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 6:
            other = rng.randrange(min(end, len(data)))
            n = rng.randrange(1, 40)
            data[at : at + n] = data[other : other + n]
        elif kind == 7:
            _change_a_value(rng, data)
        elif rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        if not data:
            return bytes(raw[:1])
    return bytes(data)


def _change_a_value(rng: random.Random, data: bytearray) -> None:
    """Change the value of one of the keys that llama.cpp reads, if the file has it."""
    keys = (
        b".attention.head_count", b".attention.head_count_kv", b".block_count",
        b".embedding_length", b".context_length", b".feed_forward_length", b".rope.freq_base",
        b".rope.dimension_count", b"_epsilon", b".attention.key_length", b".vocab_size",
        b"bos_token_id", b"eos_token_id", b"unknown_token_id", b"razor.window_min",
        b"razor.sink_tokens", b"razor.version",
    )  # fmt: skip
    at = data.find(rng.choice(keys))
    if at < 0:
        return
    end = at
    while end < len(data) and data[end] >= 32:
        end += 1
    value = rng.choice((rng.choice(EDGES), rng.randrange(400)))
    data[end + 4 : end + 8] = struct.pack("<I", value & 0xFFFFFFFF)


# -- workers


def read(path: Path) -> None:
    """Read the header, the profile and the plan, and run fit."""
    from razor_local import fit
    from razor_local.model_file import ModelFile
    from razor_local.plan import make_plan

    model_file = ModelFile(path)
    profile = model_file.profile
    make_plan(model_file.shape, profile, 1024)
    with fit.DryModel(path) as model:
        model.need(1024, fit.ContextOptions(profile=profile))


def run(path: Path) -> None:
    """Load a model and run one turn of a conversation."""
    from razor_local import Llama
    from razor_local.chat import Chat, Sampling, chat_template

    with closing(Llama(path, n_ctx=256, n_threads=1, n_threads_batch=1, n_batch=64)) as llama:
        llama.memory()
        chat = Chat(llama, chat_template(llama), sampling=Sampling(temp=0), max_tokens=4)
        list(chat.say("a word <|im_end|> é🙂"))


def work(pipe: Any, stderr: str) -> None:
    """Use the files named on the pipe, and send the results."""
    fd = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 2)
    from razor_local import RazorError

    targets = {"read": read, "run": run}
    while (asked := pipe.recv()) is not None:
        target, path = asked
        try:
            targets[target](Path(path))
            pipe.send(("fine", ""))
        except RazorError as error:
            said = str(error)
            if not said or not said.isprintable():
                pipe.send(("message", said))
            else:
                pipe.send(("refused", said))
        except BaseException:
            pipe.send(("traceback", traceback.format_exc()))


class Worker:
    """A process that uses one file after the other."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder = folder
        self.path, self.stderr = folder / f"{number}.gguf", folder / f"stderr-{number}"
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=work, args=(theirs, os.fspath(self.stderr)), daemon=True
        )
        self.process.start()
        theirs.close()

    def use(self, target: str, data: bytes) -> str:
        """Return the kind of result. Raises Finding."""
        self.path.write_bytes(data)
        self.stderr.write_bytes(b"")
        self.pipe.send((target, os.fspath(self.path)))
        started = time.monotonic()
        if not self.pipe.poll(6 * SECONDS):  # longer, because the machine may be busy
            self.process.kill()
            raise Finding(f"{target}: no answer in {6 * SECONDS:g} s")
        try:
            kind, said = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise Finding(
                f"{target}: the process ended with {self.process.exitcode};"
                f" {self.stderr.read_text(errors='replace')[-600:]}"
            ) from None
        took = time.monotonic() - started
        if kind in ("traceback", "message"):
            raise Finding(f"{target}: {said}")
        if took > SECONDS:
            raise Finding(f"{target}: took {took:.1f} s ({kind}: {said})")
        if self.stderr.stat().st_size:
            raise Finding(f"{target}: wrote to stderr: {self.stderr.read_text(errors='replace')}")
        return kind

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def fuzz(
    n: dict[str, int],
    seed: int,
    keep: Path | None = None,
    go_on: bool = False,
    seconds: float = float("inf"),
) -> Counter[str]:
    """Use n mutated files per target and count the kinds of results.

    Raises Finding, or with go_on prints and counts findings.
    """
    rng = random.Random(seed)
    done: Counter[str] = Counter()
    ends = time.monotonic() + seconds
    shm = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=shm) as name, closing(Worker(Path(name), 0)) as worker:
        seeds = []
        for path in write_seeds(Path(name)):
            raw = path.read_bytes()
            from razor_local.gguf.header import read_header

            seeds.append((raw, read_header(path).data_start))
            for target in n:
                kind = worker.use(target, raw)
                if kind != "fine":
                    raise AssertionError(f"a seed is {kind} by {target}, not used")
        for target, count in n.items():
            for _ in range(count):
                if time.monotonic() > ends:
                    return done
                data = mutate(rng, *rng.choice(seeds))
                try:
                    done[f"{target}: {worker.use(target, data)}"] += 1
                except Finding as finding:
                    if keep is not None:
                        (keep / f"crash-{target}-{sum(done.values())}.gguf").write_bytes(data)
                    if not go_on:
                        raise
                    done[f"{target}: finding"] += 1
                    print(finding, flush=True)
                    if not worker.process.is_alive():
                        worker.start()
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--read", type=int, default=20_000)
    parser.add_argument("--run", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--go-on", action="store_true", help="count findings instead of stopping")
    arguments = parser.parse_args()
    started = time.monotonic()
    done = fuzz(
        {"read": arguments.read, "run": arguments.run}, arguments.seed, Path(), arguments.go_on
    )
    print(f"{sum(done.values()):,} files in {time.monotonic() - started:.0f} s")
    for name, count in sorted(done.items()):
        print(f"{name} {count:,}")
    sys.exit(any("finding" in name for name in done))


if __name__ == "__main__":
    main()
