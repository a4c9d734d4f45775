"""Make training documents from a folder of public-domain texts.

    books ──▶ tokenizer.json
      └─────▶ slices of text + facts (facts.py) ──▶ documents ──▶ rows of tokens with loss weights

A document is written as text and tokenized as a whole, exactly as a runtime tokenizes the input of
a user. Every row depends only on the seed, the step and its index in the batch, so training can be
interrupted and resumed anywhere. This module needs numpy and tokenizers, but not PyTorch.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from facts import (
    EXACT,
    KINDS,
    MAGIC,
    PLAIN,
    Fact,
    answer,
    make_facts,
    question,
    question_joint,
    sentences,
)

Generator = np.random.Generator
Piece = tuple[str, float]  # text, loss weight of its tokens
Source = Callable[["Book", int, Generator], tuple[str, np.ndarray]]  # see cut()
Encode = Callable[[str], tuple[list[int], list[int]]]  # text -> ids, end of each token in the text

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# qwen2's pre-tokenizer in llama.cpp: every digit is a separate token
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# loss weights
TEXT = 0.02  # the text around the facts
BOOK = 0.1  # text for its own sake
PHRASE = 1.0  # an answer without its value
VALUE = 4.0
REPEAT = 1.0  # random tokens, seen before

VALUE_TOKENS = {"number": 7, "uuid": 32}  # about


# ---- books -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Book:
    name: str
    text: str
    ends: np.ndarray  # [n] where sentences end in the text, ascending


def load_books(folder: Path) -> list[Book]:
    """Load the .txt files of a folder by name, without Project Gutenberg's header and footer."""
    books = []
    for path in sorted(Path(folder).glob("*.txt")):
        text = path.read_text(encoding="utf-8-sig", errors="replace").replace("\r\n", "\n")
        start = re.search(r"\*\*\* ?START OF.*?\*\*\*", text, re.S)
        end = re.search(r"\*\*\* ?END OF", text)
        text = text[start.end() if start else 0 : end.start() if end else len(text)]
        text = re.sub(r"[ \t]+\n", "\n", text).replace("\u2014", " -- ").replace("_", "")
        text = text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'})
        text = re.sub(r"\n{3,}", "\n\n", text).strip()
        books.append(make_book(path.stem, text))
    if not books:
        raise FileNotFoundError(f"{folder} has no .txt files; choose a folder of plain texts")
    return books


def make_book(name: str, text: str) -> Book:
    ends = [m.end() for m in re.finditer(r"(?<=[a-z]{2})[.!?][\"')]*(?=\s|$)", text)]
    return Book(name, text, np.array(ends, np.int64))


def unwrapped(book: Book) -> Book:
    """Return the same book with one line per paragraph."""
    return make_book(book.name, re.sub(r"(?<!\n)\n(?!\n)", " ", book.text))


def split_books(books: Sequence[Book]) -> tuple[list[Book], list[Book]]:
    """Split the books into those for training and the shortest one, which is held out."""
    if len(books) < 2:
        raise ValueError("found one text, expected at least two, of which one is held out")
    shortest = min(books, key=lambda book: len(book.text))
    return [book for book in books if book is not shortest], [shortest]


def common_words(books: Iterable[Book]) -> list[str]:
    """Return plain words of 4 to 9 letters, which serve as values and parts of keys."""
    counts = Counter(w for book in books for w in re.findall(r"(?<=\s)[a-z]{4,9}(?=\s)", book.text))
    return sorted(word for word, n in counts.items() if n >= 8)


def cut(book: Book, n_chars: int, rng: Generator) -> tuple[str, np.ndarray]:
    """Cut whole sentences of about n_chars from a book, and return where they end."""
    ends = book.ends
    last = np.searchsorted(ends, max(ends[-1] - n_chars, ends[0] + 1))
    first = rng.integers(max(1, last))
    stop = max(first + 1, np.searchsorted(ends, ends[first] + n_chars))
    begin = ends[first]
    text = book.text[begin : ends[min(stop, len(ends) - 1)]]
    skip = len(text) - len(text.lstrip())
    inside = ends[first + 1 : min(stop, len(ends) - 1) + 1] - begin - skip
    return text[skip:], inside


def soup(book: Book, n_chars: int, rng: Generator) -> tuple[str, np.ndarray]:
    """Like cut(), but 5 to 60 different words of the book in random order, each a sentence."""
    words = sorted(set(re.findall(r"\b[a-z]{2,9}\b", cut(book, 600, rng)[0]))) or ["and"]
    words = rng.permutation(words)[: rng.integers(5, 61)]
    drawn = words[rng.integers(len(words), size=n_chars // 4 + 1)]
    stops = rng.random(len(drawn)) < 1 / rng.uniform(4, 200)
    said = [f"{word}." if stop else str(word) for word, stop in zip(drawn, stops, strict=True)]
    ends = np.cumsum([len(word) + 1 for word in said]) - 1
    n = int(np.searchsorted(ends, n_chars)) + 1
    return " ".join(said[:n]), ends[:n]


def refrain(book: Book, n_chars: int, rng: Generator) -> tuple[str, np.ndarray]:
    """Like cut(), but 1 to 8 sentences of the book repeated."""
    text, ends = cut(book, 1000, rng)
    borders = [0, *map(int, ends)]
    some = [text[a:b].strip() for a, b in zip(borders, borders[1:], strict=False)]
    some = some[: rng.integers(1, 9)]
    said, n = [], 0
    while n < n_chars:
        said.append(some[rng.integers(len(some))])
        n += len(said[-1]) + 1
    return " ".join(said), np.cumsum([len(sentence) + 1 for sentence in said]) - 1


# ---- tokenizer -------------------------------------------------------------------------------


def train_tokenizer(books: Iterable[Book], n_vocab: int, words: Sequence[str] = ()):
    """Train a byte-level BPE tokenizer with ChatML's special tokens first."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*(book.text for book in books), *words], trainer)
    return tokenizer


def encoder(tokenizer) -> Encode:
    def encode(text: str) -> tuple[list[int], list[int]]:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets]

    return encode


# ---- documents -------------------------------------------------------------------------------


def user(*pieces: Piece) -> list[Piece]:
    return [("<|im_start|>user\n", 0.0), *pieces, ("<|im_end|>\n", 0.0)]


def assistant(*pieces: Piece) -> list[Piece]:
    return [("<|im_start|>assistant\n", 0.0), *pieces, ("<|im_end|>", PHRASE), ("\n", 0.0)]


def answer_pieces(fact: Fact) -> list[Piece]:
    return [(text, VALUE if is_value else PHRASE) for text, is_value in answer(fact)]


def hide(text: str, ends: np.ndarray, hidden: Sequence[str], at: Sequence[int]) -> list[Piece]:
    """Insert hidden[i] after the end of sentence at[i] (ascending)."""
    pieces, done = [], 0
    for sentence, index in zip(hidden, at, strict=True):
        end = int(ends[index])
        pieces += [(text[done:end], TEXT), (" " + sentence, 0.0)]
        done = end
    return [*pieces, (text[done:], TEXT)]


def text_with_facts(
    book: Book,
    n_chars: int,
    facts: Sequence[Fact],
    rng: Generator,
    source: Source = cut,
    exact: float = EXACT,
) -> list[Piece]:
    """Place facts at random in a text, with the values of one fact in their order."""
    values = [(i, j) for i, fact in enumerate(facts) for j in range(len(fact.values))]
    order = rng.permutation(len(values))
    said = [sentences(fact, rng, exact) for fact in facts]
    room = n_chars - sum(len(s) + 1 for fact in said for s in fact)
    text, ends = source(book, max(room, 40), rng)
    at = np.sort(rng.integers(len(ends), size=len(values)))
    # a random order of all sentences in which those of one fact keep theirs
    turn = [0] * len(facts)
    hidden = []
    for k in order:
        i = values[k][0]
        hidden.append(said[i][turn[i]])
        turn[i] += 1
    return hide(text, ends, hidden, at)


READ = ("I have read it.", "I have read the text.", "Yes. What do you want to know?")
TASKS = ("", "Read this text.", "Here is a text.", "Remember what this text says.")
HELLO = (
    ("Hello!", "Good day. Give me a text, and ask me about a fact in it."),
    ("Hello", "Good day. Give me a text, and ask me about a fact in it."),
    ("Good morning.", "Good morning. Give me a text, and ask me about a fact in it."),
    ("Who are you?", "I am a small model that finds facts in a text. I know nothing else."),
    ("What can you do?", "I find facts in a text: give me one, and ask me about it."),
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("How are you?", "I am well, thank you. Give me a text, and ask me about a fact in it."),
)
CONTINUE = ("Continue the story.", "Go on.", "What happens next?", "Continue this text.")
TELL = ("Tell me a story.", "Write a story.", "Write something.", "Tell me something.")


def needle_chat(
    book: Book,
    n_chars: int,
    facts: Sequence[Fact],
    asked: Sequence[int],
    rng: Generator,
    wording: Callable[[Fact], int | None] = lambda fact: None,
    source: Source = cut,
    greeting: bool = False,
    exact: float = EXACT,
) -> list[Piece]:
    """Make a text with facts and questions about some of them, in one turn or several."""
    text = text_with_facts(book, n_chars, facts, rng, source, exact)
    task = TASKS[rng.integers(len(TASKS))] if rng.random() < 0.3 else ""
    text = ([(task + "\n\n", 0.0)] if task else []) + text
    turns = list(asked)
    pieces = small_talk(rng) if greeting else []
    if rng.random() < 0.15:  # the text alone first
        pieces += user(*text) + assistant((READ[rng.integers(len(READ))], PHRASE))
        text = []
    while turns:
        now = [turns.pop(0)]
        if turns and rng.random() < 0.15:
            now.append(turns.pop(0))
        words = " ".join(question(facts[i], rng, wording(facts[i]), exact) for i in now)
        gap = ("\n\n" if rng.random() < 0.75 else "\n") if text else ""
        pieces += user(*text, (gap + words, 0.0))
        said: list[Piece] = []
        for i in now:
            said += ([(" ", PHRASE)] if said else []) + answer_pieces(facts[i])
        pieces += assistant(*said)
        text = []
    if rng.random() < 0.05:
        pieces += small_talk(rng)
    return pieces


def magic_chat(
    encode: Encode, book: Book, n_tokens: int, chars: float, words: Sequence[str], rng: Generator
) -> list[Piece]:
    """Like needle_chat(), but with RULER's needles, in a text or in a list of needles alone.

    A question often asks for several keys. The document has about n_tokens; chars is the number of
    characters of the book per token.
    """
    kind = len(PLAIN) + int(rng.choice(len(MAGIC), p=[0.5, 0.25, 0.25]))
    (sample,) = sentences(make_facts(1, words, rng, [kind])[0]._replace(values=("",)), rng)
    size = len(encode(sample)[0]) + VALUE_TOKENS[MAGIC[kind - len(PLAIN)].value]
    n_asked = int(rng.integers(1, max(2, min(16, n_tokens // (6 * size)) + 1)))
    room = max(n_tokens - n_asked * (2.5 * size + 20), n_tokens // 4) * rng.uniform(0.85, 0.97)
    dense = rng.random() < 0.4
    n_facts = int(room / (1.6 * size)) if dense else int(rng.integers(1, 9))
    facts = make_facts(max(n_asked, n_facts), words, rng, [kind])
    if dense:
        lines = [(i, value) for i, fact in enumerate(facts) for value in fact.values]
        lines = [lines[i] for i in rng.permutation(len(lines))]
        said = [sentences(facts[i]._replace(values=(value,)), rng)[0] for i, value in lines]
        text: list[Piece] = [((" " if rng.random() < 0.5 else "\n").join(said), 0.0)]
        facts = [  # an answer names the values in the order in which they stand there
            fact._replace(values=tuple(value for j, value in lines if i == j))
            for i, fact in enumerate(facts)
        ]
    else:
        hidden = [line for fact in facts for line in sentences(fact, rng)]
        n_chars = (room - len(hidden) * size) * chars + sum(map(len, hidden))
        source = (cut, cut, refrain)[rng.integers(3)]
        text = text_with_facts(book, int(n_chars), facts, rng, source)
    asked = [facts[i] for i in rng.permutation(len(facts))[:n_asked]]
    pieces: list[Piece] = []
    while asked:
        n = 1 if rng.random() < 0.6 else int(rng.integers(2, 5))
        now, asked = asked[:n], asked[n:]
        said = question(now[0], rng) if len(now) == 1 else question_joint(now)
        pieces += user(*text, (("\n\n" if text else "") + said, 0.0))
        answers = [[(" ", PHRASE), *answer_pieces(fact)] for fact in now]
        pieces += assistant(*[piece for answer in answers for piece in answer][1:])
        text = []
    return pieces


def small_talk(rng: Generator) -> list[Piece]:
    said, reply = HELLO[rng.integers(len(HELLO))]
    return user((said, 0.0)) + assistant((reply, PHRASE))


def story_chat(book: Book, n_chars: int, rng: Generator) -> list[Piece]:
    """Make a request for a story, or to continue one, with its answer."""
    text, ends = cut(book, n_chars, rng)
    if len(ends) > 4 and rng.random() < 0.5:
        end = int(ends[rng.integers(1, len(ends) // 2 + 1)])
        task = CONTINUE[rng.integers(len(CONTINUE))]
        return user((text[:end], TEXT), ("\n\n" + task, 0.0)) + assistant(
            (text[end:].lstrip(), BOOK)
        )
    return user((TELL[rng.integers(len(TELL))], 0.0)) + assistant((text, BOOK))


def encode_pieces(pieces: Sequence[Piece], encode: Encode) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and loss weights [n]. A token has the weight of its last character."""
    ids, ends = encode("".join(text for text, _ in pieces))
    borders = np.cumsum([len(text) for text, _ in pieces])
    weights = np.array([weight for _, weight in pieces], np.float32)
    place = np.searchsorted(borders, np.asarray(ends, np.int64) - 1, side="right")
    return np.asarray(ids, np.int32), weights[np.minimum(place, len(weights) - 1)]


def repeated_tokens(length: int, n_vocab: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Repeat random tokens, which can only be predicted by looking back.

    In half of the rows there are few different tokens, so that one token is not enough to identify
    the position.
    """
    longest = max(9, length // 2)
    period = int(np.exp(rng.uniform(np.log(8), np.log(longest))))
    kinds = np.arange(len(SPECIALS), n_vocab)
    if rng.random() < 0.5:
        few = int(np.exp(rng.uniform(np.log(max(4, period // 4)), np.log(4 * period))))
        kinds = rng.permutation(kinds)[:few]
    block = kinds[rng.integers(len(kinds), size=period)]
    ids = np.tile(block, length // period + 1)[:length]
    weights = np.full(length, REPEAT, np.float32)
    weights[: period + 1] = 0
    return ids.astype(np.int32), weights


# ---- rows ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mix:
    """The shares of the kinds of rows. The rest are needle chats.

    Attributes:
        odd: share of needle chats about texts other than plain English: words in random order, or
            a few sentences repeated.
        magic: share of needle chats with RULER's needles.
        exact: see facts.draw_wording().
    """

    books: float = 0.10
    stories: float = 0.05
    repeats: float = 0.20
    odd: float = 0.0
    magic: float = 0.0
    exact: float = EXACT


class Rows:
    """Batches of rows [batch, length + 1] for training."""

    def __init__(self, books: Sequence[Book], encode: Encode, n_vocab: int, seed: int):
        self.books = list(books) + [unwrapped(book) for book in books]
        self.share = np.array([len(book.text) for book in self.books], np.float64)
        self.share /= self.share.sum()
        self.words = common_words(books)
        self.encode, self.n_vocab, self.seed = encode, n_vocab, seed
        sample = self.books[0].text[:20000]
        self.chars = len(sample) / len(encode(sample)[0])  # per token

    def batch(self, step: int, batch: int, length: int, mix: Mix) -> tuple[np.ndarray, np.ndarray]:
        """Make ids int32 and weights f32, both [batch, length + 1]."""
        ids, weights = [], []
        for i in range(batch):
            rng = np.random.default_rng([self.seed, step, i])
            row = self.row(rng, length + 1, mix)
            ids.append(row[0])
            weights.append(row[1])
        return np.stack(ids), np.stack(weights)

    def row(self, rng: Generator, length: int, mix: Mix) -> tuple[np.ndarray, np.ndarray]:
        """Concatenate documents until the row is full."""
        draw = rng.random()
        if draw < mix.repeats:
            return repeated_tokens(length, self.n_vocab, rng)
        parts, n = [], 0
        while n < length:
            pieces = self.document(rng, length - n, draw - mix.repeats, mix)
            ids, weights = encode_pieces(pieces, self.encode)
            parts.append((ids, weights))
            n += len(ids)
        ids = np.concatenate([p[0] for p in parts])[:length]
        weights = np.concatenate([p[1] for p in parts])[:length]
        return ids, weights

    def document(self, rng: Generator, n_tokens: int, draw: float, mix: Mix) -> list[Piece]:
        """Make a book, a story or a needle chat of about n_tokens. draw, from 0 to 1, chooses."""
        book = self.books[rng.choice(len(self.books), p=self.share)]
        n_chars = int(n_tokens * self.chars)
        if draw < mix.books:
            return [(cut(book, n_chars + 50, rng)[0], BOOK), (SPECIALS[0], BOOK)]
        if draw < mix.books + mix.stories:
            return story_chat(book, n_chars - 30, rng)
        if rng.random() < 0.25:  # several conversations in one row
            n_tokens = int(rng.uniform(min(128, n_tokens), n_tokens))
        if mix.magic and rng.random() < mix.magic:
            return magic_chat(self.encode, book, n_tokens, self.chars, self.words, rng)
        # Use up to 40 facts. Many facts in a short text teach which value belongs to which key, and
        # few in a long text teach finding it. A fact and its question take about 50 tokens.
        most = min(40, max(1, n_tokens // 50))
        n_facts = int(rng.integers(1, most + 1))
        facts = make_facts(n_facts, self.words, rng)
        asked = rng.permutation(n_facts)
        turns = n_facts * 45 + 20
        n_text = max(n_tokens - turns, n_tokens // 4) * rng.uniform(0.85, 0.97)
        source = cut
        if mix.odd and rng.random() < mix.odd:
            source = (soup, refrain)[rng.integers(2)]
        n_text = int(n_text * self.chars)
        greeting = rng.random() < 0.1
        return needle_chat(
            book, n_text, facts, asked, rng, source=source, greeting=greeting, exact=mix.exact
        )


# ---- measuring -------------------------------------------------------------------------------


def test_document(
    rows: Rows, rng: Generator, length: int, n_facts: int, reworded: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Make a question about one of n facts of a kind, in a text of at most `length` tokens.

    The weights are those of the answer.
    """
    book = rows.books[rng.integers(len(rows.books))]

    def wording(fact: Fact) -> int:
        return int(rng.integers(1, len(KINDS[fact.kind].questions))) if reworded else 0

    while True:
        facts = make_facts(n_facts, rows.words, rng, kinds=[int(rng.integers(len(PLAIN)))])
        asked = [int(rng.integers(n_facts))]
        if len(facts[asked[0]].values) > 1:
            continue
        n_chars = int((length - 90) * rows.chars)
        for _ in range(4):
            pieces = needle_chat(book, n_chars, facts, asked, rng, wording)
            ids, weights = encode_pieces(pieces, rows.encode)
            if len(ids) <= length:
                return ids, np.where(weights >= PHRASE, weights, 0)
            n_chars -= int((len(ids) - length + 8) * rows.chars)


def write_tokenizer(folder: Path, out: Path, n_vocab: int) -> None:
    train, _ = split_books(load_books(folder))
    tokenizer = train_tokenizer(train, n_vocab)
    out.write_text(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=1))
