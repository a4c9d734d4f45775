"""The text of an answer while its tokens arrive, in the chunks that llama_cpp streams.

Every byte is looked at once: what has been given out is forgotten. (llama_cpp's own loop puts the
whole answer together again for every token.)
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence


class TextStream:
    """Pieces of tokens in, chunks of text out.

    A chunk is the text of one token, or of the few that make up a character. What may be the
    beginning of a stop string is held back. Bytes that are no UTF-8 are dropped.
    """

    def __init__(self, stops: Sequence[bytes] = ()) -> None:
        self._stops = list(stops)
        self._longest = max(map(len, stops), default=0)
        self._beginnings = {stop[:n] for stop in stops for n in range(1, len(stop) + 1)}
        self._held: list[bytes] = []  # pieces that are not given out yet
        self._tail = b""  # the last bytes of the answer, at most 3
        self._wait = 0  # tokens that the last character still needs, at a byte each

    def add(self, piece: bytes) -> bool:
        """Takes the piece of the next token; whether to look at the text before another one.

        llama_cpp looks at nothing, not at stop strings nor at max_tokens, while it waits for the
        bytes of a character, and counts these as if each were a token: so does this.
        """
        self._held.append(piece)
        self._tail = tail = (self._tail + piece)[-3:]
        if not tail.isascii():
            for place, byte in zip((3, 2, 1), tail, strict=False):
                for length, lead in ((2, 0xC0), (3, 0xE0), (4, 0xF0)):
                    if length > place and byte & lead == lead:
                        self._wait = length - place
        if self._wait:
            self._wait -= 1
            return False
        return True

    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        if not self._stops:
            return False
        held = b"".join(self._held)
        return any(stop in held for stop in self._stops)

    def ready(self) -> list[str]:
        """The chunks that cannot be a part of a stop string any more."""
        held = self._held
        if not self._stops and len(held) == 1 and held[0].isascii():
            self._held = []
            return [held[0].decode()]
        chunks: list[str] = []
        limit = sum(map(len, held)) - self._overlap()
        end = 0
        for pieces, text, whole in _characters(held):
            end += sum(map(len, pieces))
            if end > limit or not whole:
                break
            self._held = self._held[len(pieces) :]
            chunks.append(text)
        return chunks

    def rest(self) -> list[str]:
        """The chunks that are left when the answer has ended, up to the first stop string."""
        held, self._held = self._held, []
        joined = b"".join(held)
        end = min((joined.index(s) for s in self._stops if s in joined), default=len(joined))
        chunks: list[str] = []
        for pieces, text, _ in _characters(held):
            size = sum(map(len, pieces))
            if size >= end:
                chunks.append(b"".join(pieces)[:end].decode("utf-8", "ignore"))
                break
            end -= size
            chunks.append(text)
        return chunks

    def _overlap(self) -> int:
        """Bytes at the end that may begin a stop string."""
        held = b"".join(self._held)
        for n in range(min(self._longest, len(held)), 0, -1):
            if held[-n:] in self._beginnings:
                return n
        return 0


def _characters(pieces: list[bytes]) -> Iterator[tuple[list[bytes], str, bool]]:
    """Groups of pieces that end with a character, their text, and whether it is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    group: list[bytes] = []
    text = ""
    for piece in pieces:
        group.append(piece)
        text += decoder.decode(piece)
        if not decoder.getstate()[0]:
            yield group, text, True
            group, text = [], ""
    if group:
        yield group, text, False
