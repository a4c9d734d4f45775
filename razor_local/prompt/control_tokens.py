"""Keep the text of messages from becoming control tokens, which only the chat template may write.

A template renders its own text and the messages into one string, where "<|im_end|>" in a message
looks like the end of a turn. Such texts in messages are therefore put between two marks before the
template renders them. tokenize() removes the marks and reads the text between them as ordinary
text. A conversation without such texts has no marks, and llama.cpp tokenizes it directly.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import RazorError

if TYPE_CHECKING:
    import llama_cpp

    _Base = llama_cpp.Llama
else:
    _Base = object

# They are random in each process, so that no message can contain them. They consist of digits,
# which templates do not change: by upper, tojson, an escape, or the repr of a list.
BEGIN, END = (f"{secrets.randbelow(10**24):024}" for _ in range(2))
_MARK = re.compile(f"{BEGIN}|{END}")
_WHITESPACE = " \t\n\v\f\r"  # what llama.cpp strips beside tokens with such an attribute


class Control(NamedTuple):
    """A token that text may turn into.

    Attributes:
        lstrip, rstrip: whether white space before and after it is dropped.
        always: whether llama.cpp also recognizes it in plain text (special=False), so that its
            text must be cut.
    """

    token: int
    lstrip: bool
    rstrip: bool
    always: bool


class ControlTexts:
    """The texts that a vocabulary has control tokens for.

    That includes user-defined tokens that look like turn markers, "<|...|>": some models have them
    in place of control tokens. All other user-defined tokens are part of ordinary text.
    """

    def __init__(self, vocab: Any) -> None:
        from llama_cpp import llama_cpp as C

        self.controls: dict[str, Control] = {}
        # A model without a tokenizer has no texts, and asking for one would end the process.
        has_texts = C.llama_vocab_type(vocab) != C.LLAMA_VOCAB_TYPE_NONE
        for token in range(C.llama_vocab_n_tokens(vocab) if has_texts else 0):
            attr = C.llama_vocab_get_attr(vocab, token)
            control = attr & (C.LLAMA_TOKEN_ATTR_CONTROL | C.LLAMA_TOKEN_ATTR_UNKNOWN)
            if not control and not attr & C.LLAMA_TOKEN_ATTR_USER_DEFINED:
                continue
            text = C.llama_vocab_get_text(vocab, token).decode("utf-8", "surrogateescape")
            if text and (control or (text.startswith("<|") and text.endswith("|>"))):
                self.controls[text] = Control(
                    token,
                    bool(attr & C.LLAMA_TOKEN_ATTR_LSTRIP),
                    bool(attr & C.LLAMA_TOKEN_ATTR_RSTRIP),
                    not control,
                )
        # the lengths to try where a text has the first two characters of some of them
        self._lengths: dict[str, list[int]] = {}
        for n in sorted({len(text) for text in self.controls}, reverse=True):
            for prefix in {text[:2] for text in self.controls if len(text) == n}:
                self._lengths.setdefault(prefix, []).append(n)
        prefixes = sorted(self._lengths, key=len, reverse=True)
        self._prefix = re.compile("|".join(map(re.escape, prefixes)) or "(?!)")

    def find(self, text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the positions of control texts in text[start:end], the longest at each place."""
        done = start
        for match in self._prefix.finditer(text, start, end):
            at = match.start()
            if at < done:
                continue
            for n in self._lengths[match[0]]:
                if at + n <= end and text[at : at + n] in self.controls:
                    done = at + n
                    yield at, done
                    break

    def mark(self, value: Any) -> Any:
        """Return a copy of messages, or of a part of them, with the texts in all strings marked."""
        if isinstance(value, str):
            parts, done = [], 0
            for at, end in self.find(value, 0, len(value)):
                parts += [value[done:at], BEGIN, value[at:end], END]
                done = end
            return "".join([*parts, value[done:]]) if parts else value
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([self.mark(item) for item in value])
        return value

    def unmark(self, prompt: str) -> tuple[str, list[tuple[int, int]]]:
        """Return a rendered prompt without marks, and the positions of the marked texts in it.

        Raises RazorError if the template has removed one of the two marks of a text.
        """
        parts: list[str] = []
        marks: list[tuple[int, bool]] = []  # position in the text, whether it is BEGIN
        length = done = 0
        for match in _MARK.finditer(prompt):
            parts.append(prompt[done : match.start()])
            length += len(parts[-1])
            marks.append((length, match[0] == BEGIN))
            done = match.end()
        text = "".join([*parts, prompt[done:]])

        plain: list[tuple[int, int]] = []
        marks.append((len(text), True))  # so that every mark has a next one
        i = 0
        while i < len(marks) - 1:
            (at, begins), (end, begins_next) = marks[i : i + 2]
            if begins and not begins_next and (at == end or text[at:end] in self.controls):
                if at < end:  # otherwise the template dropped the text
                    plain.append((at, end))
                i += 2
                continue
            for control in self.controls:
                if text.startswith(control, at) if begins else text.endswith(control, 0, at):
                    raise RazorError(
                        f"the model's chat template must keep or drop the text {control!r} of a"
                        " message as a whole, but it changes what is around it; remove that text"
                        " from the message"
                    )
            i += 1
        return text, plain

    def split(self, text: str, plain: Sequence[tuple[int, int]]) -> Iterator[int | str]:
        """Yield the control tokens of text and the ordinary text between them, as llama.cpp does.

        The ranges in plain are ordinary text. Those that llama.cpp would still read as a token are
        cut after their first character.
        """
        controls: list[tuple[int, int]] = []
        start = 0
        for at, end in [*plain, (len(text), len(text))]:
            controls += self.find(text, start, at)
            start = end
        cuts = [(at + 1, at + 1) for at, end in plain if self.controls[text[at:end]].always]
        start = 0
        for at, end in sorted(controls + cuts):
            control = self.controls.get(text[at:end])  # None for a cut
            ordinary = text[start:at]
            if control is not None and control.lstrip:
                ordinary = ordinary.rstrip(_WHITESPACE)
            if ordinary:
                yield ordinary
            start = end
            if control is not None:
                yield control.token
                if control.rstrip:
                    start = len(text) - len(text[start:].lstrip(_WHITESPACE))
        if start < len(text):
            yield text[start:]


class PlainMessages(_Base):
    """The part of Llama that reads messages as plain text.

    It does nothing if Llama has another tokenizer than the model's (tokenizer=).
    """

    @cached_property
    def _control_texts(self) -> ControlTexts:
        return ControlTexts(self._model.vocab)

    def mark_plain(self, messages: Any) -> Any:
        """Return a copy of messages for a template to render.

        tokenize() reads the texts of control tokens in its strings as plain text.
        """
        from llama_cpp.llama_tokenizer import LlamaTokenizer

        if type(self.tokenizer_) is not LlamaTokenizer:
            return messages
        return self._control_texts.mark(messages)

    @cached_property
    def _texts_of_controls(self) -> dict[int, str]:
        controls = self._control_texts.controls
        return {control.token: text for text, control in controls.items()}

    def control_text(self, token: int) -> str:
        """Return the text of a control token, "" for other tokens."""
        return self._texts_of_controls.get(token, "")

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Tokenize like the base class, but read texts marked by mark_plain() as plain text.

        Raises RazorError if a template has damaged the marks.
        """
        if not special or (BEGIN.encode() not in text and END.encode() not in text):
            return self._tokens_of(text, add_bos, special)
        controls = self._control_texts
        unmarked, plain = controls.unmark(text.decode("utf-8", "surrogateescape"))
        if not plain:
            data = unmarked.encode("utf-8", "surrogateescape")
            return self._tokens_of(data, add_bos, special)
        tokens = [self.token_bos()] if add_bos and self._adds_bos() else []
        known: dict[str, list[int]] = {}  # the same text repeated many times is tokenized once
        for part in controls.split(unmarked, plain):
            if isinstance(part, int):
                tokens.append(part)
                continue
            if part not in known:
                data = part.encode("utf-8", "surrogateescape")
                known[part] = self._tokens_of(data, False, False)
            tokens += known[part]
        return tokens

    def _tokens_of(self, text: bytes, add_bos: bool, special: bool) -> list[int]:
        from llama_cpp import llama_cpp as C
        from llama_cpp.llama_tokenizer import LlamaTokenizer

        if type(self.tokenizer_) is not LlamaTokenizer:
            return super().tokenize(text, add_bos, special)
        # The base class would allocate room for the trained context each time.
        size = len(text) + 2
        while True:
            tokens = (C.llama_token * size)()
            n = C.llama_tokenize(self._model.vocab, text, len(text), tokens, size, add_bos, special)
            if n >= 0:
                return tokens[:n]
            size = -n

    def _adds_bos(self) -> bool:
        from llama_cpp import llama_cpp as C

        return bool(C.llama_vocab_get_add_bos(self._model.vocab))
