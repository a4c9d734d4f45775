"""Separate the reasoning of a model from its answer while both are generated.

Models write their thoughts between <think> and </think>, at the start of an answer. Many chat
templates write the <think> themselves. gpt-oss writes thoughts to a channel, with control tokens:
<|channel|>analysis<|message|>THOUGHTS<|end|><|start|>assistant<|channel|>final<|message|>ANSWER
"""

from __future__ import annotations

BEGIN, END = "<think>", "</think>"
CHANNEL_TOKENS = ("<|channel|>", "<|message|>", "<|end|>", "<|start|>")
THOUGHTS = "analysis"  # the name of that channel


class Thought(str):
    """A piece of a model's thoughts, including their marks."""


class Reasoning:
    """Split generated text into pieces; those that are not part of the answer are Thoughts.

    Together the pieces are the text, with BEGIN and END around the thoughts of a channel.

    Args:
        prompt: the rendered conversation, which may end with BEGIN

    Attributes:
        reasoning, answer: the thoughts and the answer so far, without marks
    """

    def __init__(self, prompt: str) -> None:
        self._held = ""  # text that may be part of a mark
        self._thoughts: list[str] = []
        self._answer: list[str] = []
        self._state = "thinking" if prompt.rstrip().endswith(BEGIN) else "begin"
        self._channel = ""

    @property
    def reasoning(self) -> str:
        return "".join(self._thoughts).strip()

    @property
    def answer(self) -> str:
        return "".join(self._answer)

    def add(self, text: str) -> list[str]:
        """Add the text of one or more tokens; return the pieces that are complete."""
        self._held += text
        pieces: list[str] = []
        while self._held:
            before = self._state, self._held
            pieces += self._step()
            if (self._state, self._held) == before:
                break
        return pieces

    def add_control(self, token: str) -> list[str]:
        """Add a control token by its text."""
        if token in (BEGIN, END):
            return self.add(token)
        if token not in CHANNEL_TOKENS:
            return []
        pieces = self.rest()
        if token == "<|channel|>":
            self._state, self._channel = "channel", ""
        elif token == "<|message|>" and self._state == "channel":
            is_thought = self._channel.strip() == THOUGHTS
            self._state = "channel thoughts" if is_thought else "answer"
            pieces += [Thought(BEGIN)] if is_thought else []
        else:
            if self._state == "channel thoughts":
                pieces.append(Thought(f"{END}\n\n"))
            self._state = "role"
        return pieces

    def rest(self) -> list[str]:
        """Return the text that was held back. No text may follow."""
        held, self._held = self._held, ""
        if not held:
            return []
        return [self._answered(held) if self._state == "begin" else self._thought(held)]

    def _step(self) -> list[str]:
        """Process as much of the held text as is unambiguous."""
        held = self._held
        if self._state == "begin":
            text = held.lstrip()
            if text.startswith(BEGIN):
                self._state, self._held = "thinking", text[len(BEGIN) :]
                return [Thought(held[: len(held) - len(self._held)])]
            if BEGIN.startswith(text):
                return []
            self._state = "answer"
        elif self._state == "thinking":
            at = held.find(END)
            if at >= 0:
                self._state, self._held = "after", held[at + len(END) :]
                thoughts = [self._thought(held[:at])] if at else []
                return [*thoughts, Thought(END)]
            n_kept = next(n for n in range(len(END) - 1, -1, -1) if held.endswith(END[:n]))
            self._held = held[len(held) - n_kept :]
            clear = held[: len(held) - n_kept]
            return [self._thought(clear)] if clear else []
        elif self._state == "after":  # white space between thoughts and answer
            self._held = held.lstrip()
            if self._held:
                self._state = "answer"
            space = held[: len(held) - len(self._held)]
            return [Thought(space)] if space else []
        self._held = ""
        if self._state == "answer":
            return [self._answered(held)]
        if self._state == "channel thoughts":
            return [self._thought(held)]
        if self._state == "channel":
            self._channel += held
        return []  # the name of a channel or of a role

    def _thought(self, text: str) -> Thought:
        self._thoughts.append(text)
        return Thought(text)

    def _answered(self, text: str) -> str:
        self._answer.append(text)
        return text
