"""Facts that training hides in texts, the questions about them and the answers.

A kind of fact has a key (whose?) and a value (what?), several wordings of the fact, several of the
question, and one answer, in which the key stands before the value as it does in every wording of
the fact: a model that reads from left to right knows the key when it meets the value. The first
question repeats the words of the first fact (*exact*), all others are *reworded*.

{k} is the key, {v} the value, {o} a thing that belongs to the key.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Generator = np.random.Generator

NAMES = """
Agnes Albert Alfred Amelia Arthur Barbara Basil Beatrice Bernard Bertha Carlo Caroline Cecil
Charles Clara Conrad Cora Cyril Daniel Dora Edgar Edith Edmund Elsa Emil Emma Ernest Esther Eva
Felix Flora Francis Frank George Gerald Gilbert Grace Greta Gustav Hannah Harold Harriet Hector
Helen Henry Hilda Hugo Ida Irene Isaac Isabel Ivan Jacob James Jane Jasper Joan Joseph Julia
Julian Karl Kate Laura Leo Leonard Lionel Louis Louise Lydia Mabel Magnus Marlow Martha Martin
Matilda Maurice Max Mildred Miriam Nathan Nina Nora Norman Olga Oliver Oscar Otto Patrick Paul
Percy Peter Philip Ralph Rebecca Robert Roger Rosa Ruth Samuel Sarah Selma Simon Sophia Stella
Stephen Sybil Theodore Thomas Tobias Ursula Vera Victor Vincent Viola Walter Wanda Wilfred William
Winifred Xavier Yvonne Zelda
""".split()
HEADS = "b br c ch cl d dr f fr g gr h j k kr l m n p pr qu r s sh sk st t tr v w z".split()
HEARTS = "a e i o u a e i o u ai au ea ie oo ou".split()
TAILS = "l n r s t d m nd ck rn ld x th sk ll ss".split()
CITIES = """
Amsterdam Athens Berlin Bern Bombay Boston Brussels Cairo Calcutta Cork Dover Dresden Dublin
Florence Geneva Genoa Hamburg Hull Leeds Lima Lisbon Liverpool London Lyon Madrid Malta Manila
Milan Moscow Munich Naples Nice Oslo Oxford Paris Pisa Plymouth Prague Quebec Riga Rome Sydney
Tokyo Toledo Trieste Turin Utrecht Venice Vienna Warsaw York Zurich
""".split()
COLOURS = """
amber black blue bronze brown copper cream crimson golden green grey indigo ivory lilac olive
orange pink purple red rose scarlet silver turquoise violet white yellow
""".split()
JOBS = """
actor baker barber brewer builder butcher carpenter clerk cook doctor farmer fisherman gardener
glazier hunter judge lawyer mason miller miner nurse painter pilot poet printer sailor singer
smith soldier surgeon tailor teacher waiter weaver writer
""".split()
ANIMALS = """
badger bear beetle canary cat cow crow deer dog donkey dove duck eagle ferret fox frog goat goose
hare hawk hen horse lizard magpie monkey mouse mule otter owl ox parrot pigeon pony rabbit raven
robin sheep snake spider squirrel swan tiger toad tortoise turtle wolf
""".split()
THINGS = """
attic barn boat box cabin carriage cellar chapel chest cottage desk garden gate house library locker
office safe shed ship stable store tower trunk vault wagon warehouse workshop
""".split()


class Fact(NamedTuple):
    kind: int
    key: str
    values: tuple[str, ...]
    thing: str = ""


@dataclass(frozen=True)
class Kind:
    """One kind of fact: a key from `key`, a value from `value`, and the sentences for them."""

    key: str  # person; compound: two words; any of them; label: two words or three; uuid
    value: str  # digits, number, word, year, uuid, or one of VALUES
    facts: Sequence[str]
    questions: Sequence[str]
    answer: str
    # of a fact with several values; without them there is one value only
    questions_many: Sequence[str] = ()
    answer_many: str = ""
    question_joint: str = ""  # for the values of several keys


VALUES = {"city": CITIES, "colour": COLOURS, "job": JOBS, "animal": ANIMALS}

PLAIN = (
    Kind(
        "person",
        "digits",
        (
            "The secret code of {k} is {v}.",
            "{k} uses the secret code {v}.",
            "Nobody but {k} knew the code {v}.",
            "{k}'s secret code is {v}.",
            "The code that {k} has to enter is {v}.",
            "One of the secret codes of {k} is {v}.",
        ),
        (
            "What is the secret code of {k}?",
            "What is {k}'s secret code?",
            "Which code belongs to {k}?",
            "Which secret code does {k} use?",
            "Which secret code belongs to {k}?",
            "Tell me the secret code of {k}, please.",
            "Do you know the code {k} has to enter?",
        ),
        "The secret code of {k} is {v}.",
        ("What are all the secret codes of {k}?", "Which secret codes does {k} have?"),
        "The secret codes of {k} are {v}.",
    ),
    Kind(
        "any",
        "digits",
        (
            "The special magic number for {k} is {v}.",
            "One of the special magic numbers for {k} is: {v}.",
            "For {k} the magic number {v} is used.",
            "{k} has the special magic number {v}.",
        ),
        (
            "What is the special magic number for {k}?",
            "What is the special magic number for {k} mentioned in the provided text?",
            "Which magic number belongs to {k}?",
            "Which magic number does {k} have?",
            "Tell me the magic number for {k}, please.",
        ),
        "The special magic number for {k} is {v}.",
        (
            "What are all the special magic numbers for {k}?",
            "What are all the special magic numbers for {k} mentioned in the provided text?",
        ),
        "The special magic numbers for {k} are {v}.",
    ),
    Kind(
        "person",
        "digits",
        (
            "The pass key to the {o} of {k} is {v}.",
            "The {o} of {k} opens with the pass key {v}.",
            "To open the {o}, {k} needs the pass key {v}.",
            "One of the pass keys to the {o} of {k} is {v}.",
        ),
        (
            "What is the pass key to the {o} of {k}?",
            "How can one open the {o} of {k}?",
            "Which pass key opens {k}'s {o}?",
            "Which pass key fits {k}'s {o}?",
            "With which pass key does the {o} of {k} open?",
        ),
        "The pass key to the {o} of {k} is {v}.",
        ("What are all the pass keys to the {o} of {k}?",),
        "The pass keys to the {o} of {k} are {v}.",
    ),
    Kind(
        "person",
        "word",
        (
            "The favourite word of {k} is {v}.",
            "{k} loves the word {v} more than any other.",
            "Of all words {k} likes {v} best.",
        ),
        (
            "What is the favourite word of {k}?",
            "Which word does {k} like best?",
            "What is {k}'s favourite word?",
            "Which word does {k} love?",
        ),
        "The favourite word of {k} is {v}.",
    ),
    Kind(
        "person",
        "word",
        (
            "Remember that {k} keeps the word {v}.",
            "The word that {k} keeps is {v}.",
            "{k} keeps one word to himself: {v}.",
        ),
        (
            "Which word does {k} keep?",
            "What word is kept by {k}?",
            "What does {k} keep?",
            "Do you remember the word of {k}?",
        ),
        "The word that {k} keeps is {v}.",
    ),
    Kind(
        "person",
        "digits",
        (
            "{k} sleeps in room {v}.",
            "The room of {k} has the number {v}.",
            "They gave {k} room {v}.",
        ),
        (
            "In which room does {k} sleep?",
            "Which room is {k}'s?",
            "What is the number of {k}'s room?",
            "Where does {k} sleep?",
        ),
        "{k} sleeps in room {v}.",
    ),
    Kind(
        "person",
        "city",
        (
            "{k} lives in {v}.",
            "{k} has a house in {v}.",
            "The home of {k} is in {v}.",
            "Years ago {k} moved to {v}.",
        ),
        (
            "Where does {k} live?",
            "In which city does {k} live?",
            "What is the home of {k}?",
            "Where is the house of {k}?",
        ),
        "{k} lives in {v}.",
    ),
    Kind(
        "person",
        "job",
        (
            "{k} works as a {v}.",
            "By trade {k} is a {v}.",
            "{k} earns a living as a {v}.",
        ),
        (
            "What does {k} work as?",
            "What is the trade of {k}?",
            "How does {k} earn a living?",
            "What is {k}'s job?",
        ),
        "{k} works as a {v}.",
    ),
    Kind(
        "person",
        "animal",
        (
            "The pet of {k} is a {v}.",
            "{k} has a tame {v}.",
            "{k} is fond of animals and has a {v}.",
        ),
        (
            "What is the pet of {k}?",
            "Which animal does {k} have?",
            "What kind of pet does {k} have?",
            "Which animal belongs to {k}?",
        ),
        "The pet of {k} is a {v}.",
    ),
    Kind(
        "person",
        "colour",
        (
            "The {o} of {k} is painted {v}.",
            "The colour of {k}'s {o} is {v}.",
            "{k} had the {o} painted {v}.",
        ),
        (
            "What colour is the {o} of {k}?",
            "Which colour has {k}'s {o}?",
            "How is the {o} of {k} painted?",
        ),
        "The {o} of {k} is painted {v}.",
    ),
    Kind(
        "person",
        "year",
        (
            "{k} was born in the year {v}.",
            "The birth of {k} fell in {v}.",
            "{k} came into the world in {v}.",
        ),
        (
            "When was {k} born?",
            "In which year was {k} born?",
            "What is the year of {k}'s birth?",
        ),
        "{k} was born in the year {v}.",
    ),
    Kind(
        "compound",
        "word",
        (
            "The password for {k} is {v}.",
            "{k} asks for the password {v}.",
            "Whoever enters {k} must say the password {v}.",
        ),
        (
            "What is the password for {k}?",
            "Which password does {k} ask for?",
            "What must one say to enter {k}?",
        ),
        "The password for {k} is {v}.",
    ),
)


def _magic(what: str, key: str, value: str) -> Kind:
    return Kind(
        key,
        value,
        (f"The magic {what} of {{k}} is {{v}}.",),
        (f"What is the magic {what} of {{k}} in the text?", f"What is the magic {what} of {{k}}?"),
        f"The magic {what} of {{k}} is {{v}}.",
        (f"What are all the magic {what}s of {{k}} in the text?",),
        f"The magic {what}s of {{k}} are {{v}}.",
        f"What are all the magic {what}s of {{k}} in the text?",
    )


# the needles of `razor-local eval ruler` in its words, with keys of other words
MAGIC = (
    _magic("number", "label", "number"),
    _magic("id", "label", "uuid"),
    _magic("id", "uuid", "uuid"),
)
KINDS = PLAIN + MAGIC


def made_up_name(rng: Generator) -> str:
    """Make up a name of two or three syllables."""
    parts = []
    for _ in range(rng.integers(2, 4)):
        parts.append(HEADS[rng.integers(len(HEADS))] + HEARTS[rng.integers(len(HEARTS))])
    return "".join(parts).capitalize() + TAILS[rng.integers(len(TAILS))]


def make_key(kind: Kind, words: Sequence[str], rng: Generator) -> str:
    if kind.key == "uuid":
        return make_uuid(rng)
    if kind.key == "label":
        return "-".join(words[i] for i in rng.integers(len(words), size=2 + (rng.random() < 0.1)))
    if kind.key == "compound" or (kind.key == "any" and rng.random() < 0.5):
        pair = rng.integers(len(words), size=2)
        joint = "-" if rng.random() < 0.7 else " "
        return joint.join(words[i] for i in pair)
    if rng.random() < 0.5:
        return NAMES[rng.integers(len(NAMES))]
    return made_up_name(rng)


def make_uuid(rng: Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def make_value(kind: Kind, words: Sequence[str], rng: Generator) -> str:
    if kind.value == "digits":
        n = 3 if "room" in kind.answer else rng.integers(4, 8)
        return "".join(str(d) for d in (rng.integers(1, 10), *rng.integers(0, 10, n - 1)))
    if kind.value == "number":
        return str(rng.integers(1_000_000, 10_000_000))
    if kind.value == "uuid":
        return make_uuid(rng)
    if kind.value == "year":
        return str(rng.integers(1600, 2000))
    choice = VALUES.get(kind.value, words)
    return choice[rng.integers(len(choice))]


def make_facts(
    n: int, words: Sequence[str], rng: Generator, kinds: Sequence[int] | None = None
) -> list[Fact]:
    """Make n facts with different keys, so that every question has one answer.

    They are usually of one kind, so that the key decides. kinds: indices into KINDS, by default
    those of PLAIN.
    """
    facts: list[Fact] = []
    taken: set[str] = set()
    kinds = range(len(PLAIN)) if kinds is None else kinds
    one_kind = kinds[rng.integers(len(kinds))] if rng.random() < 0.9 else None
    while len(facts) < n:
        index = kinds[rng.integers(len(kinds))] if one_kind is None else one_kind
        kind = KINDS[index]
        key = make_key(kind, words, rng)
        if key in taken:
            continue
        taken.add(key)
        many = kind.answer_many and rng.random() < 0.3
        values = [make_value(kind, words, rng) for _ in range(rng.integers(2, 5) if many else 1)]
        thing = THINGS[rng.integers(len(THINGS))]
        facts.append(Fact(index, key, tuple(dict.fromkeys(values)), thing))
    return facts


EXACT = 0.7


def draw_wording(n: int, rng: Generator, exact: float) -> int:
    """The share `exact` of the draws, and more, is the first of n wordings, which the answer
    repeats: it is learned first, the others on top of it."""
    return 0 if rng.random() < exact else int(rng.integers(n))


def sentences(fact: Fact, rng: Generator, exact: float = EXACT) -> list[str]:
    """Return the sentences to hide in a text, one for each value."""
    wordings = KINDS[fact.kind].facts
    wording = draw_wording(len(wordings), rng, exact)
    return [wordings[wording].format(k=fact.key, v=v, o=fact.thing) for v in fact.values]


def question(fact: Fact, rng: Generator, wording: int | None = None, exact: float = EXACT) -> str:
    kind = KINDS[fact.kind]
    wordings = kind.questions if len(fact.values) == 1 else kind.questions_many
    if wording is None:
        wording = draw_wording(len(wordings), rng, exact)
    return wordings[wording].format(k=fact.key, o=fact.thing)


def question_joint(facts: Sequence[Fact]) -> str:
    """Ask for the values of several facts of a kind that has a joint question."""
    *names, last = [fact.key for fact in facts]
    return KINDS[facts[0].kind].question_joint.format(k=f"{', '.join(names)} and {last}")


def answer(fact: Fact) -> list[tuple[str, bool]]:
    """Return the pieces of the answer, each with whether it is (part of) the value."""
    kind = KINDS[fact.kind]
    pattern = kind.answer if len(fact.values) == 1 else kind.answer_many
    before, after = pattern.split("{v}")
    pieces = [(before.format(k=fact.key, o=fact.thing), False)]
    for i, value in enumerate(fact.values):
        if i:
            pieces.append((" and " if i == len(fact.values) - 1 else ", ", False))
        pieces.append((value, True))
    return [*pieces, (after, False)]
