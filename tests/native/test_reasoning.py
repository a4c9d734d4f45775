"""What a model thinks before its answer, taken apart while it is generated."""

from __future__ import annotations

import random

import pytest

from razor_local import Llama
from razor_local.chat import Chat
from razor_local.cli.params import DEFAULT_MODEL
from razor_local.prompt.reasoning import Reasoning, Thought
from tests.support.scripted_model import ScriptedModel, render, roles


def kinds(pieces):
    """Neighboring pieces of a kind in one, and whether they are thoughts."""
    joined: list[tuple[bool, str]] = []
    for piece in pieces:
        is_thought = isinstance(piece, Thought)
        if joined and joined[-1][0] == is_thought:
            joined[-1] = (is_thought, joined[-1][1] + piece)
        else:
            joined.append((is_thought, str(piece)))
    return joined


def split_randomly(text, seed):
    rng, at = random.Random(seed), 0
    while at < len(text):
        n = rng.choice([1, 1, 2, 5, 20])
        yield text[at : at + n]
        at += n


CASES = {  # prompt, text, thoughts with their marks, answer
    "no thoughts": ("<a>", "An answer with <think> in it.", "", "An answer with <think> in it."),
    "thoughts": ("", "<think>\nHm.\n</think>\n\nYes.", "<think>\nHm.\n</think>\n\n", "Yes."),
    "white space": ("", "\n <think>Hm.</think>Yes. ", "\n <think>Hm.</think>", "Yes. "),
    "empty thoughts": ("", "<think>\n\n</think>\n\nYes.", "<think>\n\n</think>\n\n", "Yes."),
    "begun by the prompt": ("<a><think>\n", "Hm.</think>Yes.", "Hm.</think>", "Yes."),
    "ended by the prompt": ("<a><think>\n</think>\n\n", "Yes.", "", "Yes."),
    "never ended": ("", "<think>Hm. </thin", "<think>Hm. </thin", ""),
    "marks in thoughts": (
        "",
        "<think>a <think> </ b</think>c",
        "<think>a <think> </ b</think>",
        "c",
    ),
    "a second end": ("", "<think>a</think>b</think>c", "<think>a</think>", "b</think>c"),
    "the beginning of a mark": ("", "<thin", "", "<thin"),
    "another mark": ("", "<thing>x</thing>", "", "<thing>x</thing>"),
    "nothing": ("", "", "", ""),
    "white space alone": ("", " \n", "", " \n"),
}


@pytest.mark.parametrize(("prompt", "text", "thoughts", "answer"), CASES.values(), ids=CASES)
def test_thoughts_and_answer_are_taken_apart(prompt, text, thoughts, answer):
    for seed in range(30):
        reasoning = Reasoning(prompt)
        pieces = [p for part in split_randomly(text, seed) for p in reasoning.add(part)]
        pieces += reasoning.rest()
        assert kinds(pieces) == [(is_t, t) for is_t, t in ((True, thoughts), (False, answer)) if t]
        inner = thoughts.strip().removeprefix("<think>").removesuffix("</think>").strip()
        assert reasoning.reasoning == inner and reasoning.answer == answer
        assert reasoning.rest() == []


def test_pieces_are_given_out_at_once():
    reasoning = Reasoning("")
    assert reasoning.add("<think>") == ["<think>"] and reasoning.add("Hm. <") == ["Hm. "]
    assert reasoning.add("b") == ["<b"] and reasoning.add("</think>") == ["</think>"]
    assert reasoning.add("\n\n") == ["\n\n"] and reasoning.add("Yes") == ["Yes"]
    assert Reasoning("").add("Hello") == ["Hello"]


CHANNELS = [
    "<|channel|>", "analysis", "<|message|>", "Hm", ". <", "b", "<|end|>",
    "<|start|>", "assistant", "<|channel|>", "final", "<|message|>", "Yes", ".",
]  # fmt: skip


def of_channels(tokens):
    reasoning = Reasoning("<|start|>assistant")
    pieces = []
    for token in tokens:
        is_control = token.startswith("<|")
        pieces += reasoning.add_control(token) if is_control else reasoning.add(token)
    return kinds([*pieces, *reasoning.rest()]), reasoning.reasoning, reasoning.answer


def test_channels():
    thoughts = (True, "<think>Hm. <b</think>\n\n")
    assert of_channels(CHANNELS) == ([thoughts, (False, "Yes.")], "Hm. <b", "Yes.")
    assert of_channels(CHANNELS[:5]) == ([(True, "<think>Hm. <")], "Hm. <", "")
    assert of_channels(CHANNELS[9:]) == ([(False, "Yes.")], "", "Yes.")
    assert of_channels(["<|channel|>", "commentary", "<|message|>", "a"]) == (
        [(False, "a")],
        "",
        "a",
    )
    assert of_channels(["a", "<|other|>", "b"]) == ([(False, "ab")], "", "ab")
    assert of_channels(["<think>".replace("<", "<|").replace(">", "|>")]) == ([], "", "")


# -- in a conversation


def chat_with(*answers, template=render, n_ctx=500):
    model = ScriptedModel([answer.encode() + b"\0" for answer in answers], n_ctx)
    return model, Chat(model, template)


THINKING = "<think>\nhm\n</think>\n\nyes"


def test_thoughts_are_no_part_of_the_next_prompt():
    model, chat = chat_with(THINKING, THINKING, "no")
    pieces = list(chat.say("x"))
    assert kinds(pieces) == [(True, "<think>\nhm\n</think>\n\n"), (False, "yes")]
    assert chat.messages[1]["content"] == "yes" and chat.messages[1]["reasoning_content"] == "hm"
    list(chat.say("y"))
    assert bytes(model.cache).decode() == "<u:x><a:yes><u:y><a:" + THINKING
    assert chat.last.n_reused == len("<u:x><a:")
    list(chat.regenerate())
    assert bytes(model.cache).decode() == "<u:x><a:yes><u:y><a:no" and chat.last.n_evaluated == 1
    chat.undo()
    model.answers = [b"ok\0"]
    list(chat.say("z"))
    assert bytes(model.cache).decode() == "<u:x><a:yes><u:z><a:ok"


def test_a_template_that_keeps_thoughts_goes_on_from_the_cache():
    def keeping(messages):
        def written(m):
            thoughts = m.get("reasoning_content")
            return (f"<think>\n{thoughts}\n</think>\n\n" if thoughts else "") + m["content"]

        return "".join(f"<{m['role'][0]}:{written(m)}>" for m in messages) + "<a:"

    model, chat = chat_with(THINKING, "no", template=keeping)
    list(chat.say("x"))
    list(chat.say("y"))
    assert bytes(model.cache).decode() == f"<u:x><a:{THINKING}><u:y><a:no"
    assert chat.last.n_evaluated == len("><u:y><a:")


def test_a_template_that_begins_the_thoughts():
    def opening(messages):
        return render(messages) + "<think>\n"

    model, chat = chat_with("hm\n</think>\n\nyes", "just an answer", "hm", template=opening)
    assert kinds(chat.say("x")) == [(True, "hm\n</think>\n\n"), (False, "yes")]
    assert roles(chat)[-1] == ("assistant", "yes")
    list(chat.say("y"))  # the model did not think, and did not say so
    assert roles(chat)[-1] == ("assistant", "just an answer")
    assert "reasoning_content" not in chat.messages[-1]
    assert bytes(model.cache).decode().startswith("<u:x><a:yes><u:y><a:<think>\njust")
    heard: list[str] = []
    for piece in chat.say("z", stop=lambda: bool(heard)):
        heard.append(piece)
    assert roles(chat)[-1] == ("assistant", "") and chat.messages[-1]["reasoning_content"] == "h"


def test_a_turn_that_ends_within_a_mark_keeps_its_text():
    model, chat = chat_with("</think", "ok")
    assert "".join(chat.say("x")) == "</think" and roles(chat)[-1] == ("assistant", "</think")
    model, chat = chat_with("<think>abc</think>d", n_ctx=500)
    chat.max_tokens = len("<think>abc</thi")
    assert "".join(chat.say("x")) == "<think>abc</thi"
    assert chat.messages[-1]["content"] == "" and chat.last.ended == "length"


def test_channels_of_control_tokens():
    class Channels(ScriptedModel):
        """Tokens from 256 up are control tokens."""

        controls = ("<|channel|>", "<|message|>", "<|end|>", "<|start|>")

        def piece(self, token):
            return b"" if token >= 256 else super().piece(token)

        def is_special(self, token):
            return token >= 256 or super().is_special(token)

        def control_text(self, token):
            return self.controls[token - 256]

    tokens = []
    for part in CHANNELS:
        is_control = part in Channels.controls
        tokens += [256 + Channels.controls.index(part)] if is_control else list(part.encode())
    model = Channels([[*tokens, 0], b"ok\0"], 500)
    chat = Chat(model, render)
    assert kinds(chat.say("x")) == [(True, "<think>Hm. <b</think>\n\n"), (False, "Yes.")]
    assert chat.messages[1]["content"] == "Yes." and chat.last.n_answer == len(tokens)
    list(chat.say("y"))
    assert bytes(model.cache).decode() == "<u:x><a:Yes.><u:y><a:ok"


def test_a_saved_conversation_keeps_its_thoughts():
    model, chat = chat_with(THINKING)
    list(chat.say("x"))
    other = Chat(model, render)
    other.restore(chat.dump())
    assert other.messages == chat.messages


def test_texts_of_control_tokens():
    llama = Llama(DEFAULT_MODEL, vocab_only=True)
    (end,) = llama.tokenize(b"<|im_end|>", add_bos=False, special=True)
    (word,) = llama.tokenize(b" the", add_bos=False)
    assert llama.control_text(end) == "<|im_end|>" and llama.piece(end) == b""
    assert llama.control_text(word) == ""
