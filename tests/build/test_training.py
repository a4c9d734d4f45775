"""The recipe of the built-in model: what its documents hold, and that it trains a model that finds.

The texts are the topics of Python's own help, plain English that is wherever these tests run.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture(scope="module")
def recipe():
    """The modules of models/ that need no PyTorch."""
    sys.path.insert(0, str(MODELS))
    try:
        yield SimpleNamespace(
            data=importlib.import_module("data"), facts=importlib.import_module("facts")
        )
    finally:
        sys.path.remove(str(MODELS))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Three .txt files of about 200 KB."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("texts")
    whole = "\n\n".join(topics[name] for name in sorted(topics))
    for i in range(3):
        part = whole[i * len(whole) // 3 : (i + 1) * len(whole) // 3]
        (folder / f"help-{i}.txt").write_text(part, encoding="utf-8")
    return folder


def letters(text: str) -> tuple[list[int], list[int]]:
    """An encoder without a library: a token a character."""
    return [3 + ord(c) % 1000 for c in text], list(range(1, len(text) + 1))


@pytest.fixture(scope="module")
def rows(recipe, texts):
    train, _ = recipe.data.split_books(recipe.data.load_books(texts))
    return recipe.data.Rows(train, letters, 1024, seed=3)


def test_documents_need_no_torch(recipe):
    for module in (recipe.data, recipe.facts):
        assert not hasattr(module, "torch")


def test_the_shortest_book_is_held_out(recipe, texts):
    books = recipe.data.load_books(texts)
    train, held_out = recipe.data.split_books(books)
    assert len(train) == 2 and len(held_out) == 1
    assert len(held_out[0].text) == min(len(book.text) for book in books)
    assert held_out[0].name not in [book.name for book in train]
    with pytest.raises(ValueError, match="at least two"):
        recipe.data.split_books(books[:1])


def test_a_folder_without_texts_is_refused(recipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="no .txt files"):
        recipe.data.load_books(tmp_path)


def test_gutenberg_head_and_tail_are_left_out(recipe, tmp_path):
    (tmp_path / "a.txt").write_text(
        "\ufeffhead\r\n*** START OF THE PROJECT X ***\r\nIt was late. They left.\r\n"
        "*** END OF THE PROJECT X ***\r\ntail",
        encoding="utf-8",
    )
    (book,) = recipe.data.load_books(tmp_path)
    assert book.text == "It was late. They left."
    assert [book.text[:end] for end in book.ends] == ["It was late.", book.text]


@pytest.mark.parametrize("length", [128, 1000])
def test_rows_are_full_and_depend_on_seed_and_step_alone(recipe, rows, length):
    mix = recipe.data.Mix()
    ids, weights = rows.batch(7, 6, length, mix)
    assert ids.shape == weights.shape == (6, length + 1)
    assert set(np.unique(weights)) <= {np.float32(w) for w in (0, 0.02, 0.1, 1, 4)}
    again = rows.batch(7, 6, length, mix)
    assert np.array_equal(ids, again[0]) and np.array_equal(weights, again[1])
    assert not np.array_equal(ids, rows.batch(8, 6, length, mix)[0])


def test_every_answer_stands_in_the_text_before_its_question(recipe, rows):
    """What is asked can be found: each value in a sentence that also names the key."""
    data, facts = recipe.data, recipe.facts
    rng = np.random.default_rng(0)
    for n_facts in (1, 3, 16):
        for _ in range(40):
            made = facts.make_facts(n_facts, rows.words, rng)
            assert len({fact.key for fact in made}) == n_facts
            pieces = data.needle_chat(rows.books[0], 6000, made, range(n_facts), rng)
            text = "".join(piece for piece, _ in pieces)
            for fact in made:
                wordings = facts.KINDS[fact.kind].facts
                places = []
                for value in fact.values:
                    said = [w.format(k=fact.key, v=value, o=fact.thing) for w in wordings]
                    places.append(min(text.find(s) for s in said if s in text))
                assert places == sorted(places)
                answer = "".join(piece for piece, _ in facts.answer(fact))
                assert max(places) < text.index("<|im_start|>assistant\n")
                assert answer in text[text.index("<|im_start|>assistant\n") :]


def test_rulers_needles_are_asked_and_answered(recipe, rows):
    """Every value that is named stands in the text with its key, those of a key in their order, and
    all of them are named."""
    joint = dense = 0
    for i in range(60):
        rng = np.random.default_rng([8, i])
        pieces = recipe.data.magic_chat(letters, rows.books[0], 4000, 1.0, rows.words, rng)
        said = "".join(text for text, _ in pieces)
        assert len(said) < 6000
        text, _, talk = said.partition("\n\nWhat ")
        line = r"The magic (?:number|id) of (\S+) is (\S+)\."
        hidden: dict[str, list[str]] = {}
        for key, value in re.findall(line, text):
            hidden.setdefault(key, []).append(value)
        talk = talk.replace("<|im_end|>", " ")
        named = {key: [value] for key, value in re.findall(line, talk)}
        for key, values in re.findall(r"The magic (?:number|id)s of (\S+) are (.+?)\.", talk):
            named[key] = re.split(", | and ", values)
        assert named and named == {key: hidden[key] for key in named}
        assert len(named) >= len(re.findall("What (?:is|are)", talk))
        joint += " and " in "".join(re.findall(r"What are all .* in the text", talk))
        dense += text.count("magic") > len(text) / 120
    assert 10 < joint and 10 < dense < 40


def test_some_conversations_begin_with_a_greeting(recipe, rows):
    data = recipe.data
    chats = [rows.document(np.random.default_rng(i), 300, 1.0, data.Mix()) for i in range(200)]
    greetings = {f"<|im_start|>user\n{said}<|im_end|>\n" for said, _ in data.HELLO}
    begun = ["".join(text for text, _ in chat[:3]) in greetings for chat in chats]
    assert 0.03 < np.mean(begun) < 0.2


@pytest.mark.parametrize("source", ["cut", "soup", "refrain"])
def test_a_text_is_about_as_long_as_wanted_and_ends_where_it_says(recipe, rows, source):
    make = getattr(recipe.data, source)
    for seed in range(20):
        n_chars = 50 * (seed + 1)
        text, ends = make(rows.books[0], n_chars, np.random.default_rng(seed))
        assert n_chars / 3 < len(text) < n_chars + 1500
        assert ends[-1] == len(text) and (np.diff(ends) > 0).all()
        assert all(text[end : end + 1].isspace() for end in ends[:-1])
        assert all(text[end - 1].strip() for end in ends)


def test_odd_texts_change_no_row_of_a_mix_without_them(recipe, rows):
    """So that stages without them stay what they were."""
    data = recipe.data
    plain, mixed = data.Mix(), data.Mix(odd=1.0)
    odd = sum(
        not np.array_equal(rows.batch(i, 1, 500, plain)[0], rows.batch(i, 1, 500, mixed)[0])
        for i in range(40)
    )
    assert 10 < odd < 40  # the needle chats, 65 % of the rows


def test_the_key_stands_before_the_value(recipe):
    for kind in recipe.facts.KINDS:
        for wording in (*kind.facts, kind.answer, *filter(None, [kind.answer_many])):
            assert wording.index("{k}") < wording.index("{v}")
        assert bool(kind.questions_many) == bool(kind.answer_many)
        for question in (*kind.questions, *kind.questions_many):
            assert "{k}" in question and "{v}" not in question


def test_weights_mark_the_values_of_answers(recipe, rows):
    """The tokens of weight 4 spell the values asked for, and nothing else."""
    data, facts = recipe.data, recipe.facts
    rng = np.random.default_rng(1)
    made = facts.make_facts(5, rows.words, rng)
    asked = [4, 0, 2]
    pieces = data.needle_chat(rows.books[0], 4000, made, asked, rng)
    text = "".join(piece for piece, _ in pieces)
    ids, weights = data.encode_pieces(pieces, letters)
    assert len(ids) == len(text)
    marked = "".join(c if w == data.VALUE else " " for c, w in zip(text, weights, strict=True))
    found = " ".join(marked.split())
    assert found == " ".join(v for i in asked for v in made[i].values)


def test_reworded_questions_differ_from_the_facts_own_words(recipe, rows):
    data = recipe.data
    kinds = recipe.facts.KINDS
    for reworded in (False, True):
        for i in range(20):
            rng = np.random.default_rng([2, i])
            ids, weights = data.test_document(rows, rng, 2000, 4, reworded)
            assert len(ids) <= 2000 and (weights > 0).any()
    exact = {re.sub(r"\{.\}", "", kind.questions[0]) for kind in kinds}
    others = {re.sub(r"\{.\}", "", q) for kind in kinds for q in kind.questions[1:]}
    assert not exact & others


def test_random_tokens_repeat_and_their_first_copy_costs_nothing(recipe):
    ids, weights = recipe.data.repeated_tokens(300, 1024, np.random.default_rng(4))
    period = int(np.flatnonzero(weights)[0]) - 1
    assert np.array_equal(ids[period:], ids[:-period])
    assert ids.min() >= len(recipe.data.SPECIALS)


def test_the_tokenizer_splits_digits_and_keeps_special_tokens(recipe, texts):
    pytest.importorskip("tokenizers")
    data = recipe.data
    train, _ = data.split_books(data.load_books(texts))
    tokenizer = data.train_tokenizer(train, 1024)
    assert tokenizer.get_vocab_size() == 1024
    assert [tokenizer.token_to_id(token) for token in data.SPECIALS] == [0, 1, 2]
    text = "<|im_start|>user\nThe code is 48213.\n\nIs it?<|im_end|>\n"
    ids, ends = data.encoder(tokenizer)(text)
    tokens = [tokenizer.id_to_token(i) for i in ids]
    assert tokens[0] == "<|im_start|>" and "<|im_end|>" in tokens
    assert [t for t in tokens if t.isdigit()] == list("48213")
    assert tokenizer.decode(ids, skip_special_tokens=False) == text and ends[-1] == len(text)


@pytest.mark.native
def export_and_compare(recipe, run: dict, tokenizer: dict, ids: np.ndarray, path: Path) -> float:
    """Largest difference of llama.cpp's logits on the exported model and PyTorch's."""
    torch = pytest.importorskip("torch")
    export, model = importlib.import_module("export"), importlib.import_module("model")
    from razor_local import Llama

    net = model.Llama(model.Shape(**run["shape"]))
    net.load_state_dict(run["model"])
    with torch.no_grad():
        states = net(torch.from_numpy(ids.astype(np.int64))[None], *net.rope(len(ids)))
        ours = net.head(states)[0].numpy()
    export.write_gguf(run, tokenizer, path, "f32", "test")
    llama = Llama(path, n_ctx=512, logits_all=True, type_k="f32", type_v="f32", flash_attn=False)
    llama.eval(ids.tolist())
    return float(np.abs(llama.scores[: len(ids)] - ours).max())


@pytest.fixture(scope="module")
def tokenizer(recipe, texts):
    pytest.importorskip("tokenizers")
    train, _ = recipe.data.split_books(recipe.data.load_books(texts))
    return json.loads(recipe.data.train_tokenizer(train, 1024).to_str())


def test_llama_cpp_computes_what_pytorch_does(recipe, tokenizer, tmp_path):
    """Untrained, every weight random: RoPE, groups of heads, norms, both tokenizers."""
    torch = pytest.importorskip("torch")
    model = importlib.import_module("model")
    shape = model.Shape(
        1024, n_layer=3, n_embd=96, n_head=4, n_head_kv=2, head_dim=32, n_ff=128, rope_base=1e5
    )
    net = model.Llama(shape, seed=5)
    net.seed_previous((1, 2))
    with torch.no_grad():
        for name, value in net.named_parameters():
            if "norm" in name or name == "head.weight":
                value.copy_(torch.randn(value.shape) * 0.3 + (1 if "norm" in name else 0))
    run = {"model": net.state_dict(), "shape": vars(shape), "length": 512}
    ids = np.random.default_rng(0).integers(3, 1024, 300)
    path = tmp_path / "random.gguf"
    assert export_and_compare(recipe, run, tokenizer, ids, path) <= 1e-3


@pytest.mark.native
def test_llama_cpp_tokenizes_as_the_training_did(recipe, tokenizer, rows, tmp_path):
    pytest.importorskip("torch")
    from tokenizers import Tokenizer

    from razor_local import Llama

    export, model = importlib.import_module("export"), importlib.import_module("model")
    shape = model.Shape(1024, n_layer=1, n_embd=32, n_head=1, n_head_kv=1, head_dim=32, n_ff=32)
    run = {"model": model.Llama(shape).state_dict(), "shape": vars(shape)}
    export.write_gguf(run | {"length": 512}, tokenizer, tmp_path / "a.gguf", "q8_0", "a")
    llama = Llama(tmp_path / "a.gguf", n_ctx=512)
    encode = recipe.data.encoder(Tokenizer.from_str(json.dumps(tokenizer)))
    rng = np.random.default_rng(6)
    for draw in (0.0, 0.11, 0.9, 0.95):  # a book, a story, chats
        pieces = rows.document(rng, 3000, draw, recipe.data.Mix())
        text = "".join(piece for piece, _ in pieces)
        tokens = llama.tokenize(text.encode(), add_bos=False, special=True)
        assert tokens == encode(text)[0]


def test_a_stopped_training_goes_on_as_if_it_never_stopped(recipe, texts, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("tokenizers")
    train, model = importlib.import_module("train"), importlib.import_module("model")
    shape = model.Shape(1024, n_layer=1, n_embd=32, n_head=2, n_head_kv=1, head_dim=32, n_ff=32)
    stages = (
        train.Stage(32, 2, 3 * 64, train.REPETITIONS),
        train.Stage(64, 1, 3 * 64),
    )
    preset = train.Preset(shape, stages, previous=2, warm_up=1)

    def silent(text: str) -> None:
        pass

    whole = train.train(texts, tmp_path / "whole", preset, log=silent)
    assert (whole.step, whole.tokens) == (6, 6 * 64)
    for step in range(1, 7):  # one step each
        part = train.train(texts, tmp_path / "parts", preset, leave_after=0, log=silent)
        assert part.step == step
    saved = [train.load(tmp_path / name / "model")["model"] for name in ("whole", "parts")]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert not list((tmp_path / "parts").glob("*.new"))

    timed = train.train(texts, tmp_path / "timed", preset, minutes=0.02, workers=1, log=silent)
    assert timed.seconds >= 1.2 and (tmp_path / "timed" / "model").is_dir()

    # another preset begins with the end of that run: its weights, tokenizer and steps, own rates
    still = dataclasses.replace(preset, muon=0.0, adam=0.0)
    longer = train.train(texts, tmp_path / "longer", still, start=tmp_path / "whole", log=silent)
    assert (longer.step, longer.tokens) == (12, 6 * 64)
    state = longer.model.state_dict()
    assert all(torch.equal(saved[0][name], state[name]) for name in state)
    wider = dataclasses.replace(still, shape=dataclasses.replace(shape, n_ff=64))
    with pytest.raises(SystemExit, match="whole: its model has another shape"):
        train.train(texts, tmp_path / "wider", wider, start=tmp_path / "whole", log=silent)
    names = [tmp_path / run / "tokenizer.json" for run in ("whole", "longer")]
    assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--preset", "cpu-ruler"], "cpu-ruler goes on from another run: name its folder with"),
        (["--preset", "cpu-long"], "cpu-long goes on from another run: name its folder with"),
        (["--preset", "cpu-long", "--start", "."], "holds no checkpoint, name the folder of a"),
    ],
)
def test_a_training_that_goes_on_from_nothing_is_refused(
    recipe, texts, tmp_path, monkeypatch, capsys, options, said
):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    train = importlib.import_module("train")
    monkeypatch.setattr(sys, "argv", ["train.py", str(texts), "run", *options])
    with pytest.raises(SystemExit) as exit:
        train.main()
    assert exit.value.code == 2 and said in capsys.readouterr().err
    assert not list(tmp_path.glob("run*"))


@pytest.mark.native
@pytest.mark.slow
def test_a_short_training_finds_a_needle_and_runs_in_llama_cpp(recipe, texts, tmp_path):
    """cpu-short reaches its figure; llama.cpp computes what PyTorch does, and answers."""
    pytest.importorskip("torch")
    pytest.importorskip("tokenizers")
    from razor_local import Llama

    train = importlib.import_module("train")
    preset = train.PRESETS["cpu-short"]
    stage = preset.stages[-1]
    lines: list[str] = []
    training = train.train(texts, tmp_path / "run", preset, log=lines.append)
    _, unseen = train.training_rows(texts, tmp_path / "run/tokenizer.json", preset)
    _, found = train.needle(training.model, unseen, stage.length, n=100, seed=7)
    assert found >= train.SHORT_FIGURE, lines[-2:]
    heads = train.induction(training.model)
    assert heads[1:].max() > 0.3  # nobody seeded these

    run = train.load(tmp_path / "run/model")
    tokenizer = json.loads((tmp_path / "run/tokenizer.json").read_text(encoding="utf-8"))
    rng = np.random.default_rng(11)
    ids, _ = recipe.data.test_document(unseen, rng, stage.length, 1, False)
    path = tmp_path / "model.gguf"
    assert export_and_compare(recipe, run, tokenizer, ids, path) <= 1e-3

    llama = Llama(path, n_ctx=512)
    right = 0
    for _ in range(10):
        (fact,) = recipe.facts.make_facts(1, unseen.words, rng, kinds=[0])
        text = "".join(
            piece for piece, _ in recipe.data.text_with_facts(unseen.books[0], 400, [fact], rng)
        )
        question = recipe.facts.question(fact, rng, 0)
        answer = llama.create_chat_completion(
            [{"role": "user", "content": f"{text}\n\n{question}"}], temperature=0, max_tokens=40
        )
        right += fact.values[0] in answer["choices"][0]["message"]["content"]
    assert right >= 10 * train.SHORT_FIGURE - 2
