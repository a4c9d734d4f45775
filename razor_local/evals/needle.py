"""Needle in a haystack: facts hidden at chosen depths of a text, and questions about them.

    single      one fact and one question in its words
    reworded    the same text with a question in other words
    keys        several facts of one kind and a question about one of them
    values      several numbers for one name, all of which the answer must name
    questions   several facts and several questions in one conversation

An answer is right if it contains the number, and not only as part of a longer one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from ..common.progress import Progress, silent
from ..errors import RazorError
from .haystack import Haystack
from .questions import Prompts, Question, Sample, fit_text

KINDS = ("single", "reworded", "keys", "values", "questions")
N_FACTS = 8  # of keys
N_VALUES = 3
N_QUESTIONS = 3
MAX_TOKENS = 64  # of an answer

NAMES = (
    "Marlow", "Ingrid", "Tobias", "Selma", "Anton", "Beatrix", "Cyril", "Dagmar", "Edgar",
    "Fenella", "Gideon", "Hedwig", "Ivo", "Jolanda", "Konrad", "Leona", "Magnus", "Nadia",
    "Oswald", "Petra", "Quentin", "Rosalind", "Silvan", "Tamara", "Ulric", "Viola", "Wendell",
    "Xenia", "Yvette", "Zoltan", "Agatha", "Bruno", "Camilla", "Dorian", "Estelle", "Felix",
    "Greta", "Hugo", "Isolde", "Jasper", "Klara", "Lucian", "Mirabel", "Norbert", "Odette",
    "Pascal", "Rufus", "Sabina", "Theodor", "Ursula", "Victor", "Wilma",
)  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """The wordings of one kind of fact, where {key} is a name and {value} a number.

    Attributes:
        one_of, all_of: statement and question where one name has several values.
    """

    statement: str
    question: str
    reworded: tuple[str, ...]
    one_of: str
    all_of: str


FACTS = (
    Fact(
        "The secret code of {key} is {value}.",
        "What is the secret code of {key}?",
        ("Tell me the secret code of {key}, please.", "Which secret code belongs to {key}?"),
        "One of the secret codes of {key} is {value}.",
        "What are all the secret codes of {key}?",
    ),
    Fact(
        "The special magic number for {key} is {value}.",
        "What is the special magic number for {key}?",
        ("Which magic number does {key} have?", "Tell me the magic number for {key}, please."),
        "One of the special magic numbers for {key} is {value}.",
        "What are all the special magic numbers for {key}?",
    ),
    Fact(
        "The pass key to the house of {key} is {value}.",
        "What is the pass key to the house of {key}?",
        ("With which pass key does the house of {key} open?", "Which pass key fits {key}'s house?"),
        "One of the pass keys to the house of {key} is {value}.",
        "What are all the pass keys to the house of {key}?",
    ),
)


@dataclass(frozen=True)
class NeedleSettings:
    """The settings of the needle task.

    Attributes:
        lengths: tokens of the contexts.
        depths: positions of the fact, in percent of the text.
        kinds: some of KINDS.
        samples: texts per length and depth.
        facts: facts in a text with several.
        max_tokens: tokens of an answer.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0, 25, 50, 75, 100)
    kinds: tuple[str, ...] = KINDS
    samples: int = 5
    facts: int = N_FACTS
    max_tokens: int = MAX_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise RazorError(f"{kind!r} is not a kind of needle; expected {', '.join(KINDS)}")
        for depth in self.depths:
            if not 0 <= depth <= 100:
                raise RazorError(f"depth {depth:g} is not a percentage from 0 to 100")
        if not N_QUESTIONS <= self.facts <= len(NAMES):
            raise RazorError(
                f"the number of facts in a text is {self.facts}, expected {N_QUESTIONS} to"
                f" {len(NAMES)}"
            )


def make_samples(
    settings: NeedleSettings,
    haystack: Haystack,
    prompts: Prompts,
    progress: Progress | None = None,
) -> list[Sample]:
    """Make all samples, ordered by length and text.

    They depend only on the settings, the haystack and the model's tokenizer. Raises RazorError if
    the facts do not fit a length, or the haystack is too short.
    """
    cells = [
        (length, depth, index)
        for length in settings.lengths
        for depth in settings.depths
        for index in range(settings.samples)
    ]
    report = progress or silent
    samples = []
    for i, cell in enumerate(cells):
        report(i, len(cells), "writing the texts")
        samples += _Cell(settings, haystack, prompts, *cell).samples()
    return samples


@dataclass(frozen=True)
class _Cell:
    """The samples of one length, depth and index."""

    settings: NeedleSettings
    haystack: Haystack
    prompts: Prompts
    length: int
    depth: float
    index: int

    def samples(self) -> list[Sample]:
        kinds = self.settings.kinds
        samples = self.single(kinds) if {"single", "reworded"} & set(kinds) else []
        for kind in ("keys", "values", "questions"):
            if kind in kinds:
                samples.append(getattr(self, kind)())
        return samples

    def single(self, kinds: Sequence[str]) -> list[Sample]:
        """Make one text with one or two questions, each in a separate conversation."""
        rng = self._rng("single")
        fact, key = rng.choice(FACTS), rng.choice(NAMES)
        (value,) = self._numbers(rng, 1)
        wordings = {
            "single": fact.question.format(key=key),
            "reworded": rng.choice(fact.reworded).format(key=key),
        }
        statement = fact.statement.format(key=key, value=value)
        longest = max(wordings.values(), key=self.prompts.count)
        text = self._text(rng, [(self.depth / 100, statement)], longest)
        return [
            self._sample(kind, text, Question(words, (value,)))
            for kind, words in wordings.items()
            if kind in kinds
        ]

    def keys(self) -> Sample:
        rng = self._rng("keys")
        facts, questions = self._several(rng)
        text = self._text(rng, facts, questions[0].text)
        return self._sample("keys", text, questions[0])

    def questions(self) -> Sample:
        rng = self._rng("questions")
        facts, questions = self._several(rng)
        questions = questions[:N_QUESTIONS]
        rng.shuffle(questions)
        room = sum(self.prompts.n_turn(question.text) for question in questions[1:])
        room += self.settings.max_tokens * len(questions[1:])
        text = self._text(rng, facts, questions[0].text, room)
        return self._sample("questions", text, *questions)

    def values(self) -> Sample:
        rng = self._rng("values")
        fact, key = rng.choice(FACTS), rng.choice(NAMES)
        values = self._numbers(rng, N_VALUES)
        facts = [(d, fact.one_of.format(key=key, value=v)) for d, v in self._depths(rng, values)]
        question = Question(fact.all_of.format(key=key), tuple(values))
        return self._sample("values", self._text(rng, facts, question.text), question)

    def _several(self, rng: Random) -> tuple[list[tuple[float, str]], list[Question]]:
        """Make facts of one kind about different names, and the questions about them."""
        fact = rng.choice(FACTS)
        keys = rng.sample(NAMES, self.settings.facts)
        values = self._numbers(rng, self.settings.facts)
        placed = self._depths(rng, list(zip(keys, values, strict=True)))
        facts = [(d, fact.statement.format(key=key, value=value)) for d, (key, value) in placed]
        questions = [
            Question(fact.question.format(key=key), (value,))
            for key, value in zip(keys, values, strict=True)
        ]
        return facts, questions

    def _rng(self, task: str) -> Random:
        names = (self.settings.seed, task, self.length, self.depth, self.index)
        return Random("/".join(map(str, names)))

    def _numbers(self, rng: Random, n: int) -> list[str]:
        """Draw different numbers of five digits that the haystack does not contain."""
        found: list[str] = []
        while len(found) < n:
            value = str(rng.randrange(10_000, 100_000))
            if value not in found and value not in self.haystack:
                found.append(value)
        return found

    def _depths(self, rng: Random, items: Sequence[Any]) -> list[tuple[float, Any]]:
        """Place the first item at the depth, and the others anywhere."""
        depths = [self.depth / 100, *(rng.random() for _ in items[1:])]
        return list(zip(depths, items, strict=True))

    def _text(
        self, rng: Random, facts: list[tuple[float, str]], question: str, room: int = 0
    ) -> tuple[str, int]:
        seed = rng.getrandbits(64)
        return fit_text(
            self.prompts,
            lambda: self.haystack.pieces(Random(seed)),
            facts,
            question,
            self.length - self.settings.max_tokens - room,
        )

    def _sample(self, task: str, text: tuple[str, int], *questions: Question) -> Sample:
        return Sample(
            task=task,
            length=self.length,
            depth=self.depth,
            index=self.index,
            text=text[0],
            questions=questions,
            max_tokens=self.settings.max_tokens,
            n_prompt=text[1],
        )


def score(sample: Sample, answers: Sequence[str]) -> float:
    """Return the share of questions whose answer contains all expected numbers."""
    right = [
        all(re.search(rf"(?<!\d){re.escape(value)}(?!\d)", answer) for value in question.answers)
        for question, answer in zip(sample.questions, answers, strict=True)
    ]
    return sum(right) / len(right)
