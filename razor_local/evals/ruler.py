"""The synthetic tasks of RULER (Hsieh et al., 2024, arXiv 2404.06654), generated here.

    niah_single_1..3    one fact: in repeated sentences, in a text, in a text with a uuid as value
    niah_multikey_1..3  one of four facts; the whole text is facts; the same with uuids
    niah_multivalue     all four values of one key
    niah_multiquery     the values of four keys in one question
    vt                  the names of five variables that are assigned to each other in a chain
    cwe                 the ten most common words of a list
    fwe                 the three most common coded words of a text

Task names, sizes and scoring are RULER's, but wordings and word lists are not. The prompts contain
no worked example and no beginning of the answer. RULER's two question answering tasks need data
sets and are left out.
"""

from __future__ import annotations

import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from random import Random
from typing import Any

from ..common.progress import Progress, silent
from ..errors import RazorError
from .haystack import Haystack
from .questions import Prompts, Question, Sample, fit_text, message

N_NEEDLES = 4  # of multikey_1, multivalue and multiquery
N_VARIABLES = 5  # of vt: four hops
N_COMMON = 10  # words of cwe
COMMON, UNCOMMON = 30, 3  # occurrences of the common words and of the others
SHORT = 4096  # tokens; in shorter contexts these are divided by three
FWE_ALPHA = 2.0  # the frequency of the word of rank r is proportional to r ** -alpha
FWE_ASKED = (2, 3, 4)  # ranks of the words; rank 1 is the dots

INTRO = "Pay attention to what is hidden in the following text: there will be a question about it."
NOISE = (
    "The meadow is quiet and the clouds go by.",
    "There is nothing here to see.",
    "Time passes, and one day is like the next.",
)
ADJECTIVES = (
    "amber bitter brave brittle calm careful clever cloudy crimson curious distant dusty eager "
    "early empty faithful fancy fearless frozen gentle giant golden grateful hollow honest humble "
    "icy idle jolly keen lively lonely lucky mellow merry mighty modest nimble noble old pale "
    "patient plain polite proud quick quiet rapid rare restless rosy rough rusty sharp silent "
    "silver simple sleepy slender smooth solid steady stormy sturdy sunny swift tender tidy tiny "
    "tough vivid warm wild wise witty young"
).split()
NOUNS = (
    "acorn anchor apple arrow barrel basket beacon bell bridge brook bucket button candle canyon "
    "castle cedar chapel cherry chimney clover cottage crown dagger desert drum eagle ember "
    "falcon feather fence ferry fiddle flame forest fountain garden glacier hammer harbor hazel "
    "helmet heron island ivy jacket kettle ladder lantern lemon lily marble meadow mirror "
    "mountain needle nest oak ocean olive orchard otter owl pebble pepper pillow planet prairie "
    "pumpkin quill rabbit raven ribbon river saddle shadow shell spoon squirrel statue stone "
    "summit thimble thunder timber tower trumpet tulip tunnel turtle valley velvet violin wagon "
    "walnut willow window"
).split()


@dataclass(frozen=True)
class RulerSettings:
    """The settings of RULER.

    Attributes:
        lengths: tokens of the contexts.
        tasks: some of TASKS.
        samples: samples per length and task.
        max_tokens: maximum tokens of an answer, by default RULER's.
    """

    lengths: tuple[int, ...]
    tasks: tuple[str, ...] = ()
    samples: int = 10
    max_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                raise RazorError(f"{task!r} is not a task of RULER; expected {', '.join(TASKS)}")


def make_samples(
    settings: RulerSettings,
    haystack: Haystack,
    prompts: Prompts,
    progress: Progress | None = None,
) -> list[Sample]:
    """Make all samples, ordered by length.

    They depend only on the settings, the haystack and the model's tokenizer. Raises RazorError if a
    task does not fit a length.
    """
    cells = [
        (length, task, index)
        for length in settings.lengths
        for task in settings.tasks
        for index in range(settings.samples)
    ]
    report = progress or silent
    samples = []
    for i, (length, task, index) in enumerate(cells):
        report(i, len(cells), "writing the texts")
        make, n_answer = TASKS[task]
        n_answer = settings.max_tokens or n_answer
        rng = Random(f"{settings.seed}/{task}/{length}/{index}")
        try:
            text, question, n_prompt = make(
                _Room(prompts, haystack, length, length - n_answer), rng
            )
        except RazorError as error:
            raise RazorError(f"{task} at {length:,} tokens: {error}") from None
        samples.append(Sample(task, length, None, index, text, (question,), n_answer, n_prompt))
    return samples


def score(sample: Sample, answers: Sequence[str]) -> float:
    """Return RULER's string_match_all: the share of the expected strings in the answer."""
    answer, expected = answers[0].lower(), sample.questions[0].answers
    return sum(text.lower() in answer for text in expected) / len(expected)


@dataclass(frozen=True)
class _Room:
    """The material of a prompt, and the number of tokens it may have."""

    prompts: Prompts
    haystack: Haystack
    length: int
    n_tokens: int

    def fit(
        self,
        pieces: Callable[[], Iterator[str]],
        facts: Sequence[tuple[float, str]],
        question: Question,
    ) -> tuple[str, Question, int]:
        facts = [(-1.0, f"{INTRO}\n\n"), *facts]
        text, n_prompt = fit_text(self.prompts, pieces, facts, question.text, self.n_tokens)
        return text, question, n_prompt

    def fill(self, make: Callable[[int], str], question: Question) -> tuple[str, Question, int]:
        """Call make(n) with the largest n that fits."""

        def size(n: int) -> int:
            return self.prompts.n_prompt(message(make(n), question.text))

        low, high = 0, 1
        if size(0) > self.n_tokens:
            raise RazorError(
                f"the task takes {size(0):,} tokens, but the answer leaves"
                f" {max(self.n_tokens, 0):,}; use larger lengths"
            )
        while size(high) <= self.n_tokens:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if size(middle) <= self.n_tokens else (low, middle)
        text = make(low)
        return text, question, self.prompts.n_prompt(message(text, question.text))


# -- needles


def _noise(rng: Random) -> Iterator[str]:
    for i in count():
        yield NOISE[i % len(NOISE)] + (" " if (i + 1) % len(NOISE) else "\n")


def _keys(rng: Random) -> Iterator[str]:
    """Yield different keys without end, such as gentle-river."""
    seen: set[str] = set()
    while True:
        # Use more words once half of the keys with two are taken.
        n = 1 + (len(seen) > len(ADJECTIVES) * len(NOUNS) // 2)
        key = "-".join([*rng.sample(ADJECTIVES, n), rng.choice(NOUNS)])
        if key not in seen:
            seen.add(key)
            yield key


def _uuids(rng: Random) -> Iterator[str]:
    while True:
        yield str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _numbers(rng: Random) -> Iterator[str]:
    """Yield different numbers of seven digits without end."""
    seen: set[str] = set()
    while True:
        value = str(rng.randrange(1_000_000, 10_000_000))
        if value not in seen:
            seen.add(value)
            yield value


def _needle(kind: str, key: str, value: str) -> str:
    return f"The magic {kind} of {key} is {value}."


def _niah(
    room: _Room,
    rng: Random,
    *,
    pieces: str = "text",
    keys: Callable[[Random], Iterator[str]] = _keys,
    values: Callable[[Random], Iterator[str]] = _numbers,
    n_keys: int = 1,
    n_values: int = 1,
    n_asked: int = 1,
) -> tuple[str, Question, int]:
    """Make a task that hides facts in "noise", "text", or "needles" of the same kind (pieces)."""
    kind = "number" if values is _numbers else "id"
    key_stream, value_stream = keys(rng), values(rng)
    chosen = [(key, list(islice(value_stream, n_values))) for key in islice(key_stream, n_keys)]
    facts = [(rng.random(), _needle(kind, key, v)) for key, some in chosen for v in some]
    asked = chosen[:n_asked]
    names = _listed([key for key, _ in asked])
    question = Question(
        f"What is the magic {kind} of {names} in the text?"
        if len(facts) == 1 or n_keys > 1 and n_asked == 1
        else f"What are all the magic {kind}s of {names} in the text?",
        tuple(value for _, some in asked for value in some),
    )
    seed = rng.getrandbits(64)
    taken = {key for key, _ in chosen}

    def hide() -> Iterator[str]:
        again = Random(seed)
        if pieces == "noise":
            return _noise(again)
        if pieces == "text":
            return room.haystack.pieces(again)
        return (
            f"{_needle(kind, key, value)}\n"
            for key, value in zip(keys(again), values(again), strict=False)
            if key not in taken and value not in question.answers
        )

    return room.fit(hide, facts, question)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# -- tracing and counting


def _variables(room: _Room, rng: Random) -> tuple[str, Question, int]:
    names: list[str] = []
    while len(names) < N_VARIABLES:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    value = str(rng.randrange(10_000, 100_000))
    lines = [f"VAR {names[0]} = {value}."]
    lines += [f"VAR {b} = VAR {a}." for a, b in zip(names, names[1:], strict=False)]
    facts = list(zip(sorted(rng.random() for _ in lines), lines, strict=True))
    question = Question(
        f"Which variables have the value {value}, assigned directly or through other variables?"
        f" Name all {N_VARIABLES} of them.",
        tuple(names),
    )
    return room.fit(lambda: _noise(rng), facts, question)


def _words(rng: Random) -> Iterator[str]:
    """Yield different pronounceable words without a meaning, without end."""
    seen: set[str] = set()
    while True:
        n = 2 + (len(seen) > 3000)
        word = "".join(
            rng.choice("bdfghklmnprstvz")
            + rng.choice("aeiou")
            + rng.choice(("", "", "n", "r", "l"))
            for _ in range(n)
        )
        if word not in seen:
            seen.add(word)
            yield word


def _common_words(room: _Room, rng: Random) -> tuple[str, Question, int]:
    often, seldom = COMMON, UNCOMMON
    if room.length < SHORT:
        often, seldom = COMMON // 3, UNCOMMON // 3
    words, seed = _words(rng), rng.getrandbits(64)
    common = list(islice(words, N_COMMON))
    others: list[str] = []

    def make(n: int) -> str:
        others.extend(islice(words, max(n - len(others), 0)))
        entries = common * often + others[:n] * seldom
        Random(seed).shuffle(entries)
        listed = " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1))
        return f"This is a numbered list of words, in which some stand more often.\n\n{listed}"

    question = Question(
        f"Which {N_COMMON} words stand most often in the list? Name all {N_COMMON} of them.",
        tuple(common),
    )
    return room.fill(make, question)


def _frequent_words(room: _Room, rng: Random) -> tuple[str, Question, int]:
    seed = rng.getrandbits(64)
    coded: list[str] = ["..."]

    def make(n: int) -> str:
        counts = _zipf_counts(n)
        while len(coded) < len(counts):
            word = "".join(rng.choices(string.ascii_lowercase, k=6))
            if word not in coded:
                coded.append(word)
        entries = [word for word, times in zip(coded, counts, strict=False) for _ in range(times)]
        Random(seed).shuffle(entries)
        return f"Count how often each coded word stands in this text.\n\n{' '.join(entries)}"

    make(max(FWE_ASKED) ** 2 * 4)  # the asked words are drawn
    question = Question(
        "Which three coded words stand most often in the text? Leave out the dots.",
        tuple(coded[rank - 1] for rank in FWE_ASKED),
    )
    text, question, n_prompt = room.fill(make, question)
    words = text.split()
    least = min(words.count(word) for word in question.answers)
    if least <= max((words.count(word) for word in coded[max(FWE_ASKED) :]), default=0):
        raise RazorError("the text is too short to rank frequent words; use larger lengths")
    return text, question, n_prompt


def _zipf_counts(n: int) -> list[int]:
    """Return the frequencies of the words of rank 1, 2 and so on in about n words, down to 1."""
    first = n / sum(rank**-FWE_ALPHA for rank in range(1, 2001))
    counts: list[int] = []
    while (times := round(first * (len(counts) + 1) ** -FWE_ALPHA)) and len(counts) < 2000:
        counts.append(times)
    return counts


def _task(**options: Any) -> Callable[[_Room, Random], tuple[str, Question, int]]:
    return lambda room, rng: _niah(room, rng, **options)


# name: (generator, tokens of an answer)
TASKS: dict[str, tuple[Callable[[_Room, Random], tuple[str, Question, int]], int]] = {
    "niah_single_1": (_task(pieces="noise"), 128),
    "niah_single_2": (_task(), 128),
    "niah_single_3": (_task(values=_uuids), 128),
    "niah_multikey_1": (_task(n_keys=N_NEEDLES), 128),
    "niah_multikey_2": (_task(pieces="needles"), 128),
    "niah_multikey_3": (_task(pieces="needles", keys=_uuids, values=_uuids), 128),
    "niah_multivalue": (_task(n_values=N_NEEDLES), 128),
    "niah_multiquery": (_task(n_keys=N_NEEDLES, n_asked=N_NEEDLES), 128),
    "vt": (_variables, 64),
    "cwe": (_common_words, 120),
    "fwe": (_frequent_words, 64),
}
