"""A model that answers from a list, for tests of conversations."""

from __future__ import annotations

from razor_local.chat import Chat
from razor_local.llama import Prefill


class ScriptedModel:
    """A model whose tokens are bytes and whose answers come from a list.

    "<" and ">" are special tokens, and b"\\0" ends an answer.
    """

    def __init__(self, answers, n_ctx=200):
        self.answers = [list(answer) for answer in answers]
        self._n_ctx = n_ctx
        self.cache: list[int] = []
        self.n_evaluated = 0
        self.stop_after = None  # tokens of a prefill

    @property
    def n_tokens(self):
        return len(self.cache)

    def n_ctx(self):
        return self._n_ctx

    def tokenize(self, text, add_bos=True, special=False):
        assert not add_bos and special
        return list(text)

    def n_ctx_train(self):
        return 1024

    def mark_plain(self, messages):
        return messages

    def piece(self, token):
        return bytes([token])

    def is_end(self, token):
        return token == 0

    def is_special(self, token):
        return token in b"<>"

    def request(self, make):
        return make(self)

    def prefill(self, tokens, progress=None, stop=None):
        keep = 0
        while keep < min(len(tokens) - 1, len(self.cache)) and tokens[keep] == self.cache[keep]:
            keep += 1
        self.cache = tokens[:keep]
        while len(self.cache) < len(tokens):
            if stop and stop():
                return Prefill(keep, len(self.cache) - keep, False)
            self.cache.append(tokens[len(self.cache)])
            if progress:
                progress(len(self.cache), len(tokens), "reading the prompt")
        return Prefill(keep, len(tokens) - keep, True)

    def generate(self, tokens, **sampling):
        self.sampling = sampling
        assert self.cache == list(tokens), "the prompt must be evaluated before generate()"
        for token in self.answers.pop(0):
            yield token
            assert len(self.cache) < self._n_ctx, "a token was evaluated beyond the context"
            self.cache.append(token)


def render(messages):
    turns = "".join(f"<{m['role'][0]}:{m['content']}>" for m in messages)
    return turns + "<a:"


def make(answers, **kwargs):
    n_ctx = kwargs.pop("n_ctx", 200)
    model = ScriptedModel([a if isinstance(a, bytes) else a.encode() for a in answers], n_ctx)
    return model, Chat(model, render, **kwargs)


def roles(chat):
    return [(m["role"], m["content"]) for m in chat.messages]
