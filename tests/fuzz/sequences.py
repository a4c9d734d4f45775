"""Random operations on contexts with several sequences, each compared with a context of its own.

    python -m tests.fuzz.sequences --operations 100000
    python -m tests.fuzz.sequences --operations 100000 tiny     # some models

The texts of a model branch off a common one, and its rewind logs are drawn, as in
tests/fuzz/memories.py.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from razor_local.model_file import ModelFile
from tests.fuzz import memories
from tests.fuzz.memories import (
    ARCHS,
    HAS_PROC,
    N_TOKENS,
    PARAMS,
    Finding,
    Log,
    choose_log,
    draw_operation,
    draw_plan,
    full_disk,
    is_plain,
    lose_log_file,
    make_texts,
    noise,
    path_of,
    with_log,
)
from tests.support import runner
from tests.support.runner import Context, Model
from tests.support.sequences import N_SEQ, Sequences, Text

# operation -> how often it is drawn
OPERATIONS = {
    "decode": 40, "decode_more": 25, "roll_back": 16, "remove": 4, "remove_from_all": 4,
    "remove_part": 2, "keep": 1, "clear": 1, "copy": 8, "copy_part": 2, "save": 6, "load": 6,
    "load_damaged": 3, "abort": 6, "decode_on_a_full_disk": 1, "lose_log": 1, "restart": 1,
}  # fmt: skip


class Fuzzer:
    """One context of a model with several sequences, and what each of them must compute."""

    def __init__(self, arch: str, seed: int, flash_attn: bool) -> None:
        path = path_of(arch)
        self.name = f"{arch}, flash attention {'on' if flash_attn else 'off'}, seed {seed}"
        self.rng = random.Random(f"{arch} {seed} {flash_attn}")
        self.done: Counter[str] = Counter()
        self.steps: list[str] = []
        self.hybrid = ModelFile(path).shape.recurrent_bytes > 0
        self.params = PARAMS | {"flash_attn": flash_attn, "n_batch": 1024}
        self.model = Model(path)
        self.plan = draw_plan(self.rng, self.model)
        self.texts = []
        for tokens in make_texts(path, self.rng):
            with Context(self.model, with_log(self.plan, Log("ram")), **self.params) as ctx:
                self.texts.append(Text(tokens, ctx.decode(tokens)))
                self.log_bytes = ctx.stats().rewind_bytes
        self.limit = noise(self.model, self.texts[0].tokens, self.params)
        self.plain = is_plain(path)
        self.open()
        # bytes, whether of all sequences, the text and the number of tokens of each
        self.states: list[tuple[bytes, bool, list[Text], list[int]]] = []

    def open(self) -> None:
        self.log = choose_log(self.rng, self.log_bytes)
        razor = with_log(self.plan, self.log)
        self.seqs = Sequences(self.model, razor, self.texts, **self.params)
        self.ctx = self.seqs.ctx
        self.logged = [self.log.complete] * N_SEQ  # since the sequence was empty

    def close(self) -> None:
        self.ctx.close()
        self.model.close()

    # -- operations --

    def step(self) -> None:
        operation = draw_operation(self.rng, OPERATIONS, self.log)
        n = len(self.steps)
        getattr(self, operation)()
        if fault := self.log.fault(self.ctx):
            self.fail(fault)
        if self.seqs.lengths() != self.seqs.held:
            self.fail(f"the sequences hold {self.seqs.lengths()} tokens, not {self.seqs.held}")
        self.done[operation] += len(self.steps) > n  # else there was nothing to do
        self.steps = self.steps[-30:]

    def decode(self, most: int = 4) -> None:
        order = self.order(most)
        if not order:
            self.remove()
            return
        self.note(f"decode {Counter(order)}")
        try:
            error = self.seqs.decode(order)
        except RuntimeError as e:
            self.fail(str(e))
        if not error <= self.limit:
            self.fail(f"logits differ by {error:.3g}, {self.limit:.3g} is accepted")

    def decode_more(self) -> None:
        self.decode(120)

    def roll_back(self) -> None:
        s = self.rng.randrange(N_SEQ)
        n = self.seqs.held[s]
        p0 = max(0, n - self.rng.randint(1, self.rng.choice([40, N_TOKENS])))
        possible = self.ctx.seq(s).n_rollback
        self.note(f"remove from {p0} in {s}")
        if self.ctx.seq_rm(p0, seq_id=s):
            self.cut(s, p0)
        elif p0 == 0 or self.must_go_back(s, n - p0 <= possible):
            self.fail(f"a rollback was refused, although {possible} tokens can be removed")

    def must_go_back(self, s: int, possible: bool) -> bool:
        if self.log.damaged:
            return False  # that the log cannot be read is noticed when it is read
        return possible or (self.plain and self.logged[s])

    def remove(self) -> None:
        s = self.rng.randrange(N_SEQ)
        self.note(f"remove {s}")
        if not self.ctx.seq_rm(-1, -1, seq_id=s):
            self.fail("a sequence was not removed")
        self.cut(s, 0)

    def remove_from_all(self) -> None:
        p0 = max(0, self.rng.choice(self.seqs.held) - self.rng.randint(0, 30))
        self.note(f"remove from {p0} in all")
        held = self.seqs.held
        possible = all(n - p0 <= self.ctx.seq(s).n_rollback for s, n in enumerate(held))
        if self.ctx.seq_rm(p0, seq_id=-1):
            for s in range(N_SEQ):
                self.cut(s, min(p0, held[s]))
        elif possible and p0 <= max(held) and not self.log.damaged:
            self.fail("a rollback was refused, although each sequence can go back")

    def remove_part(self) -> None:
        """Try to remove tokens that are not at the end, which must be refused."""
        s = self.rng.randrange(N_SEQ)
        n = self.seqs.held[s]
        if n < 3:
            return
        p0 = self.rng.randrange(n - 1)
        p1 = self.rng.randrange(p0 + 1, n)
        self.note(f"remove {p0} to {p1} in {s}")
        if self.ctx.seq_rm(p0, p1, seq_id=s):
            self.fail("a part in the middle was removed")

    def keep(self) -> None:
        s = self.rng.randrange(N_SEQ)
        self.note(f"keep {s}")
        self.ctx.seq_keep(s)
        for other in set(range(N_SEQ)) - {s}:
            self.cut(other, 0)

    def clear(self) -> None:
        self.note("clear")
        self.ctx.clear(self.rng.random() < 0.5)
        for s in range(N_SEQ):
            self.cut(s, 0)

    def copy(self) -> None:
        source, target = self.rng.sample(range(N_SEQ), 2)
        self.note(f"copy {source} to {target}")
        self.ctx.seq_cp(source, target)
        self.seqs.text[target] = self.seqs.text[source]
        self.logged[target] = self.logged[source]
        self.cut(target, self.seqs.held[source])

    def copy_part(self) -> None:
        source, target = self.rng.sample(range(N_SEQ), 2)
        if self.seqs.held[source] < 2:
            return
        self.note(f"copy a part of {source} to {target}")
        self.ctx.seq_cp(source, target, 0, 1)
        self.cut(target, 0)
        try:
            self.ctx.decode_sequences(self.seqs.batch([target]))
        except RuntimeError:
            pass
        else:
            self.fail("a copy of a part was decoded")
        if not self.ctx.seq_rm(-1, -1, seq_id=target):
            self.fail("a sequence was not removed")

    def save(self) -> None:
        whole, s = self.rng.random() < 0.3, self.rng.randrange(N_SEQ)
        self.note("save all" if whole else f"save {s}")
        state = self.ctx.save(whole, s)
        text, held = list(self.seqs.text), list(self.seqs.held)
        self.states.append(
            (state, whole, text if whole else [text[s]], held if whole else [held[s]])
        )
        self.states = self.states[-5:]

    def load(self) -> None:
        if not self.states:
            return
        state, whole, text, held = self.rng.choice(self.states)
        first = 0 if whole else self.rng.randrange(N_SEQ)
        self.note(f"load {held} to {'all' if whole else first}")
        if not self.ctx.load(state, whole, first):
            self.fail(f"a state was refused: {runner.last_error()}")
        self.seqs.text[first : first + len(text)] = text
        for s, n in enumerate(held, first):
            self.logged[s] = False
            self.cut(s, n)

    def load_damaged(self) -> None:
        """A state that ends too early changes nothing, or leaves its sequences empty."""
        if not self.states:
            return
        state, whole, _, held = self.rng.choice(self.states)
        first = 0 if whole else self.rng.randrange(N_SEQ)
        end = self.rng.randrange(16, len(state) - 1)
        self.note(f"load {end} bytes of {len(state)} to {'all' if whole else first}")
        if self.ctx.load(state[:end], whole, first):
            self.fail("a state that ends too early was taken")
        loaded = range(first, first + len(held))
        if not any(self.seqs.lengths()[s] for s in loaded):
            for s in loaded:
                self.cut(s, 0)

    def abort(self) -> None:
        order = self.order(200)
        if not order:
            return
        nodes = self.rng.randint(0, 1500)
        self.note(f"decode {Counter(order)}, abort after {nodes} nodes")
        held = list(self.seqs.held)
        self.ctx.abort_after(nodes)
        try:
            error = self.seqs.decode(order)
        except RuntimeError:
            error = 0.0
        finally:
            self.ctx.abort_after(None)
        if not error <= self.limit:
            self.fail(f"logits differ by {error:.3g}, {self.limit:.3g} is accepted")
        now = self.seqs.lengths()
        lost = [s for s in range(N_SEQ) if now[s] < held[s]]
        for s in range(N_SEQ):
            if now[s] > held[s] + order.count(s) or (s in lost and now[s] > 0):
                self.fail(f"the sequences hold {now} tokens, before there were {held}")
        if len(lost) > 1 and not self.hybrid:
            self.fail(f"several sequences were lost: {now} are left of {held}")
        for s in range(N_SEQ):
            self.cut(s, now[s])

    def decode_on_a_full_disk(self) -> None:
        if HAS_PROC and self.log.place == "disk" and not self.log.damaged:
            self.log.damaged, self.logged = True, [False] * N_SEQ
            with full_disk(self.rng.choice([0, 1, 5000])):
                self.note("full disk")
                self.decode_more()

    def lose_log(self) -> None:
        if HAS_PROC and self.log.place == "disk" and not self.log.damaged:
            self.log.damaged, self.logged = True, [False] * N_SEQ
            self.note("lose the file of the log")
            lose_log_file()

    def restart(self) -> None:
        self.note("restart")
        self.ctx.close()
        self.open()

    # -- the texts --

    def order(self, most: int) -> list[int]:
        """Draw the sequences of the tokens of a batch."""
        order = []
        for s in self.rng.sample(range(N_SEQ), self.rng.randint(1, N_SEQ)):
            order += [s] * min(self.rng.randint(1, most), N_TOKENS - self.seqs.held[s])
        if self.rng.random() < 0.5:
            self.rng.shuffle(order)
        else:
            order.sort()  # then more ubatches hold several sequences
        return order

    def cut(self, s: int, n: int) -> None:
        """Go on after n tokens, with any text that begins with them."""
        held = self.seqs.text[s].tokens[:n]
        self.seqs.text[s] = self.rng.choice([t for t in self.texts if t.tokens[:n] == held])
        self.seqs.held[s] = n
        if n == 0:
            self.logged[s] = self.log.complete

    # -- checks --

    def note(self, text: str) -> None:
        texts = [self.texts.index(text) for text in self.seqs.text]
        self.steps.append(f"texts {texts}, {self.seqs.held} tokens: {text}")

    def fail(self, text: str) -> None:
        raise Finding(
            "\n".join([f"{self.name}: {text}", str(self.plan), str(self.log), *self.steps])
        )


def run(n: int, seed: int = 0, archs: Sequence[str] = ARCHS) -> Counter[str]:
    """Run n operations, distributed evenly over the architectures. Raises Finding."""
    return memories.run(n, seed, archs, Fuzzer)


if __name__ == "__main__":
    memories.main(__doc__, ARCHS, run)
