"""The texts and questions of evals: facts where they are said to be, prompts as long as asked for,
answers that can be worked out again from the text alone."""

from __future__ import annotations

import re
import time
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from razor_local.cli.params import DEFAULT_MODEL
from razor_local.errors import RazorError, UnsupportedError
from razor_local.evals import needle, ruler
from razor_local.evals.haystack import FolderText, MadeText, _without_blanks
from razor_local.evals.needle import KINDS, NeedleSettings
from razor_local.evals.questions import TURN_SLACK, Prompts, message
from razor_local.evals.ruler import TASKS, RulerSettings

LONGEST_SENTENCE = 64  # tokens of the built-in text with the small vocabulary


@pytest.fixture(scope="module")
def prompts():
    return Prompts(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Of a model without a chat template."""
    path = tmp_path_factory.mktemp("model") / "plain.gguf"
    data = DEFAULT_MODEL.read_bytes()
    path.write_bytes(data.replace(b"tokenizer.chat_template", b"tokenizer.chat_absent__"))
    return Prompts(path)


def samples_of(prompts, **changes):
    given = {"lengths": (1024,), "samples": 1, "kinds": KINDS} | changes
    return needle.make_samples(NeedleSettings(**given), MadeText(), prompts)


def test_a_model_without_a_template_gets_plain_text(prompts, plain) -> None:
    messages = [
        {"role": role, "content": text}
        for role, text in (("user", "A?"), ("assistant", "B."), ("user", "C?"))
    ]
    assert plain.render(messages) == "A?\nAnswer:B.\n\nC?\nAnswer:"
    assert prompts.render(messages) != plain.render(messages)
    for some in (plain, prompts):
        grown = some.n_turn("C?") - TURN_SLACK
        n = len(some.model.tokenize(some.render(messages).encode(), add_bos=False, special=True))
        assert abs(n - some.n_prompt("A?") - grown) <= 2


def test_a_tokenizer_that_makes_no_tokens_ends_with_an_error(prompts, monkeypatch) -> None:
    monkeypatch.setattr(prompts, "count", lambda _: 0)
    with pytest.raises(RazorError, match="the tokenizer makes only 0 tokens of 1,001 pieces"):
        samples_of(prompts, kinds=("single",))


def test_a_model_without_a_tokenizer_is_refused(tiny) -> None:
    from tests.support.tiny_models import TinySpec

    with pytest.raises(UnsupportedError, match="has no tokenizer"):
        Prompts(tiny(TinySpec("llama", 1, 2, 1, 32)))


# -- haystacks


def test_made_text_is_endless_plain_and_seeded() -> None:
    pieces = [p for p, _ in zip(MadeText().pieces(Random(1)), range(4000), strict=False)]
    assert pieces == [p for p, _ in zip(MadeText().pieces(Random(1)), range(4000), strict=False)]
    assert pieces[:50] != [p for p, _ in zip(MadeText().pieces(Random(2)), range(50), strict=False)]
    for piece in pieces:
        assert re.fullmatch(r"[A-Z][a-zA-Z ',]+\.(?: |\n\n)", piece), piece
    assert len(set(pieces)) > 2500  # few sentences come again
    assert "secret" not in "".join(pieces) and "MILLER" in MadeText()


def test_a_folder_is_read_as_sentences_in_paragraphs(tmp_path) -> None:
    (tmp_path / "b.txt").write_bytes(b"Caf\xe9 time. It was late.")  # Latin-1
    (tmp_path / "a.txt").write_text(
        "It broke\r\nhere. “Did it?” she said!\r\n\r\n\r\nNext one", encoding="utf-8"
    )
    (tmp_path / "c.md").write_text("not this")
    text = FolderText(tmp_path)
    pieces = list(text.pieces(Random(0)))
    assert sorted(p.strip() for p in pieces) == [
        "Café time.",
        "It broke here.",
        "It was late.",
        "Next one",
        "she said!",
        "“Did it?”",
    ]
    assert "café TIME" in text and "not this" not in text
    assert {p for p in pieces if p.endswith("\n\n")} == {"she said!\n\n", "Next one\n\n"}
    start = {pieces[0] for pieces in (list(text.pieces(Random(i))) for i in range(40))}
    assert len(start) == 6


def test_folders_without_texts_are_told(tmp_path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(RazorError, match="no .txt files|is not a folder"):
            FolderText(folder)
    (tmp_path / "a.txt").write_text("One. Two. Three.")
    with pytest.raises(RazorError, match="the texts have .* tokens, expected"):
        needle.make_samples(
            NeedleSettings((1024,), kinds=("single",)),
            FolderText(tmp_path),
            Prompts(DEFAULT_MODEL),
        )


# -- needles


@given(
    depth=st.sampled_from([0, 10, 25, 50, 75, 100]),
    length=st.integers(500, 3000),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=25, deadline=None)
def test_a_needle_stands_at_its_depth_in_a_text_of_its_length(prompts, depth, length, seed) -> None:
    one, reworded = samples_of(
        prompts, lengths=(length,), depths=(depth,), seed=seed, kinds=("single", "reworded")
    )
    assert one.text == reworded.text and one.questions != reworded.questions
    (question,), (value,) = one.questions, one.questions[0].answers
    assert one.text.count(value) == 1
    # the statement with the value in it, found without the templates
    statement = next(s for s in re.split(r"(?<=\.)\s+", one.text) if value in s)
    name = question.text.rstrip("?").split()[-1]
    assert name in statement and name in reworded.questions[0].text
    before, _, behind = one.text.partition(statement)
    n_before, n_behind = prompts.count(before), prompts.count(behind)
    off = n_before - depth / 100 * (n_before + n_behind)
    assert abs(off) <= LONGEST_SENTENCE, (n_before, n_behind)
    for sample in (one, reworded):
        n = prompts.n_prompt(message(sample.text, sample.questions[0].text))
        assert length - sample.max_tokens - 2 * LONGEST_SENTENCE <= n <= length - sample.max_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_every_question_can_be_answered_from_the_text(prompts, plain, kind) -> None:
    for some in (prompts, plain):
        for sample in samples_of(some, kinds=(kind,), lengths=(2048,), samples=2):
            for question in sample.questions:
                name = next(n for n in needle.NAMES if n in question.text)
                told = [s for s in re.split(r"(?<=\.)\s+", sample.text) if name in s]
                values = [v for s in told for v in re.findall(r"\d+", s)]
                assert sorted(values) == sorted(question.answers)
            n_facts = {"keys": 8, "questions": 8, "values": 3}.get(kind, 1)
            assert len(set(re.findall(r"\d+", sample.text))) == n_facts
            assert len(sample.questions) == (3 if kind == "questions" else 1)


def test_samples_are_the_same_for_the_same_seed_and_differ_else(prompts) -> None:
    one = samples_of(prompts, samples=2, seed=4)
    assert one == samples_of(prompts, samples=2, seed=4)
    # a kind does not depend on which others are asked for, nor on other lengths
    assert [s for s in one if s.task == "keys"] == samples_of(
        prompts, samples=2, seed=4, kinds=("keys",)
    )
    longer = samples_of(prompts, samples=2, seed=4, lengths=(700, 1024))
    assert [s for s in longer if s.length == 1024] == one
    texts = [s.text for s in (*one, *samples_of(prompts, samples=2, seed=5))]
    assert len(set(texts)) == len(texts) - 2 * 2 * 5  # single and reworded share theirs


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kinds": ("double",)}, "'double' is not a kind of needle; expected single"),
        ({"depths": (101,)}, "depth 101 is not a percentage"),
        ({"facts": 2}, "the number of facts in a text is 2, expected 3 to"),
        ({"lengths": (100,)}, "the facts and the question alone take"),
    ],
)
def test_needles_that_cannot_be_made_are_told(prompts, changes, text) -> None:
    with pytest.raises(RazorError, match=text):
        samples_of(prompts, **changes)


# -- RULER


def ruler_samples(prompts, task, length=2048, **changes):
    settings = RulerSettings((length,), (task,), **({"samples": 2} | changes))
    return ruler.make_samples(settings, MadeText(), prompts)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1500, 6000])
def test_ruler_fills_its_length(prompts, task, length) -> None:
    found = ruler_samples(prompts, task, length)
    for sample in found:
        n = prompts.n_prompt(message(sample.text, sample.questions[0].text))
        room = length - sample.max_tokens
        assert n == sample.n_prompt and room - 120 <= n <= room
    assert found[0].text != found[1].text
    assert found == ruler_samples(prompts, task, length)


@pytest.mark.parametrize("task", [task for task in TASKS if task.startswith("niah")])
def test_ruler_needles_can_be_answered_from_the_text(prompts, task) -> None:
    for sample in ruler_samples(prompts, task):
        (question,) = sample.questions
        pairs = re.findall(r"The magic (?:number|id) of (\S+) is (\S+)\.", sample.text)
        keys = [key for key, _ in pairs]
        asked = re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)+", question.text)
        assert tuple(sorted(question.answers)) == tuple(sorted(v for k, v in pairs if k in asked))
        assert len(question.answers) == (4 if task in ("niah_multivalue", "niah_multiquery") else 1)
        if task in ("niah_multikey_2", "niah_multikey_3"):
            assert len(pairs) > 15 and len(set(keys)) == len(keys)
            rest = re.sub(r"The magic (number|id) of \S+ is \S+\.\s*", "", sample.text)
            assert rest.strip() == ruler.INTRO
        else:
            n = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}.get(task, 1)
            assert len(pairs) == n
        assert sum("-" in value for _, value in pairs) == len(pairs) * task.endswith("_3")


def test_variables_can_be_traced(prompts) -> None:
    for sample in ruler_samples(prompts, "vt", samples=5):
        (question,) = sample.questions
        (value,) = re.findall(r"\d{5}", question.text)
        holds: dict[str, str] = {}
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", sample.text):
            holds[name] = holds.get(source, source)  # in the order of the text
        assert {name for name, v in holds.items() if v == value} == set(question.answers)
        assert len(question.answers) == 5


@pytest.mark.parametrize("length", [1500, 6000])
def test_words_can_be_counted(prompts, length) -> None:
    for sample in ruler_samples(prompts, "cwe", length):
        body = sample.text.split("\n\n")[1]
        words = Counter(re.findall(r"\d+\. ([a-z]+)", body))
        often, seldom = (10, 1) if length < 4096 else (30, 3)
        assert set(sample.questions[0].answers) == {w for w, n in words.items() if n == often}
        assert set(words.values()) == {often, seldom}
        numbers = [int(n) for n in re.findall(r"(\d+)\.", body)]
        assert numbers == list(range(1, words.total() + 1))
    for sample in ruler_samples(prompts, "fwe", length):
        words = Counter(w for w in sample.text.split("\n\n")[1].split() if w != "...")
        (_, _), *others = words.most_common(4)
        assert [w for w, _ in words.most_common(3)] == list(sample.questions[0].answers)
        assert others[1][1] > others[2][1]


def test_ruler_that_cannot_be_made_is_told(prompts) -> None:
    with pytest.raises(RazorError, match="'qa_1' is not a task of RULER; expected niah_single_1"):
        RulerSettings((1024,), ("qa_1",))
    for task in TASKS:
        with pytest.raises(RazorError, match=f"{task} at 100 tokens: .*use larger lengths"):
            ruler_samples(prompts, task, 100)


@given(st.text("ab \t\n", max_size=60))
def test_blank_lines_are_emptied(text):
    text = text.strip()
    assert _without_blanks(text) == re.sub(r"[ \t]*\n[ \t]*(?=\n)", "\n", text)


def test_blanks_take_linear_time():
    start = time.monotonic()
    assert _without_blanks("a" + " " * 2_000_000 + "b") == "a" + " " * 2_000_000 + "b"
    assert time.monotonic() - start < 5
