"""Saved conversations: messages and KV cache in one file, docs/format.md describes it.

A loaded session continues where it was saved: the model reads only new messages.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from .common.files import data_folder, make_private_folder, new_file
from .common.inputs import open_input
from .errors import RazorError, StateError
from .state import belongs_to

if TYPE_CHECKING:
    from .chat import Chat
    from .llama import Llama

SUFFIX = ".session"
MAX_JSON = 1 << 30  # bytes
_MAGIC = b"rzrsess1"
_HEAD = struct.Struct("<8sQIQ16s")
_NAME = re.compile(r"\w[\w .+-]{0,59}(?<![ .])")  # letters and digits of any language
# of a plan, what decides whether a KV cache can be loaded, and what errors call it
_PLAN = {
    "active": "razor",
    "retrieval_kv_heads": "retrieval heads",
    "window": "window",
    "sink_tokens": "sink tokens",
    "compensation": "compensation",
    "type_k": "type of keys",
    "type_v": "type of values",
    "type_k_local": "type of local keys",
    "type_v_local": "type of local values",
    "flash_attn": "flash attention",
    "n_ctx": "context",
}


@dataclass(frozen=True)
class Session:
    """A saved conversation.

    chat: what Chat.restore() takes. model: its name and file. plan: see _PLAN, {} for a cache that
    no plan describes. saved: seconds since 1970. n_tokens: in the cache. n_bytes: of the file.
    """

    name: str
    chat: dict[str, Any]
    model: dict[str, str]
    plan: dict[str, Any]
    saved: float
    n_tokens: int
    n_bytes: int


def folder() -> Path:
    """Return the folder of the user's sessions."""
    return data_folder() / "sessions"


def path_of(name: str) -> Path:
    """Return the path of a session. Raises RazorError for an invalid name."""
    if not _NAME.fullmatch(name):
        raise RazorError(
            f"{name!r} cannot be the name of a session: use up to 60 letters, digits, spaces and"
            " any of - _ . +, with a letter or digit first"
        )
    return folder() / f"{name}{SUFFIX}"


def names() -> list[str]:
    """Return the names of all sessions, sorted."""
    if not folder().is_dir():
        return []
    found = (path.name.removesuffix(SUFFIX) for path in folder().glob(f"*{SUFFIX}"))
    return sorted(filter(_NAME.fullmatch, found))


def remove(name: str) -> None:
    """Remove a session. Raises RazorError if it does not exist, OSError."""
    path = path_of(name)
    try:
        path.unlink()
    except FileNotFoundError:
        raise _missing(name) from None


def save(name: str, llama: Llama, chat: Chat) -> Session:
    """Save the conversation, and replace an existing session of that name.

    The file is either complete or unchanged, even if the process is killed. Raises RazorError,
    OSError.
    """
    path = path_of(name)
    state = llama.save_state()
    content: dict[str, Any] = {
        "chat": chat.dump(),
        "model": _model(llama),
        "plan": _plan(llama),
        "saved": round(time.time(), 1),
    }
    data = json.dumps(content).encode()
    tokens = np.asarray(state.input_ids[: state.n_tokens], "<i4").tobytes()
    sizes = len(data), state.n_tokens, len(state.llama_state)
    head = _HEAD.pack(_MAGIC, *sizes, _digest(*sizes, data))
    n_bytes = len(head) + len(data) + len(tokens) + len(state.llama_state)
    make_private_folder(path.parent)
    with new_file(path, n_bytes, private=True) as file:
        for part in (head, data, tokens, state.llama_state):
            file.write(part)
    return Session(name=name, n_tokens=state.n_tokens, n_bytes=n_bytes, **content)


def read(name: str) -> Session:
    """Return a session without its cache. Raises RazorError, OSError."""
    with _open(name) as file:
        return _read(name, file)[0]


def load(name: str, llama: Llama, chat: Chat, messages_only: bool = False) -> Session:
    """Continue a session. If that fails, the conversation does not change.

    Args:
        messages_only: whether to leave out the cache, which allows another model or other options;
            the next message then reads the whole conversation

    Raises:
        RazorError: there is no such session, its file is damaged, or it was saved with another
            model or another plan.
    """
    with _open(name) as file:
        session, n_state = _read(name, file)
        if messages_only:
            for message in session.chat["messages"]:
                message.pop("tokens", None)  # of that model's vocabulary
            chat.restore(session.chat)
            return session
        tokens = np.frombuffer(file.read(4 * session.n_tokens), "<i4").astype(np.intc)
        sealed = file.read(n_state)
    from llama_cpp import LlamaState

    if not belongs_to(sealed, llama):
        raise _refusal(session, _other_model(session, llama))
    before = chat.dump()
    try:
        chat.restore(session.chat)
        state = LlamaState(
            input_ids=tokens,
            scores=np.empty((0, 1), np.single),
            n_tokens=session.n_tokens,
            llama_state=sealed,
            llama_state_size=len(sealed),
            seed=llama._seed,
        )
        llama.load_state(state)
    except BaseException as error:
        chat.restore(before)
        if isinstance(error, StateError):
            why = str(error).removeprefix("the state cannot be loaded: ")
            other = _other_plan(session, llama)
            if other is not None:
                raise _refusal(session, other) from error
            raise StateError(
                f"session {name} cannot be loaded ({why}); read its messages again with"
                f" '/load {name} --messages'"
            ) from error
        raise
    return session


def _refusal(session: Session, why: str) -> StateError:
    return StateError(
        f"session {session.name} {why}, or read its messages again with"
        f" '/load {session.name} --messages'"
    )


def _other_model(session: Session, llama: Llama) -> str:
    """Return what differs from the model that a session was saved with, and what to do."""
    there, here = (
        f"{model['name']} ({model['file']})" if model["name"] else model["file"]
        for model in (session.model, _model(llama))
    )
    if there == here:
        return f"was saved with other weights of {here}, another adapter or another RoPE: use those"
    return f"was saved with {there}, this is {here}: start with that model"


def _other_plan(session: Session, llama: Llama) -> str | None:
    """Return what differs from the plan that a session was saved with, and what to do."""
    there, here = session.plan, _plan(llama)
    keys = [key for key in _PLAN if there.get(key) != here.get(key)]
    if not keys:
        return None
    if keys[0] == "active":  # all others follow from it
        keys = keys[:1]

    def shown(value: Any) -> str:
        if value is None:
            return "same as for other heads"  # a type of local heads
        return ("on" if value else "off") if isinstance(value, bool) else str(value)

    differences = ", ".join(
        f"{_PLAN[key]} {shown(there.get(key))}, here {shown(here.get(key))}" for key in keys
    )
    return f"was saved with another plan ({differences}): start with the options that it had then"


def _plan(llama: Llama) -> dict[str, Any]:
    plan = llama.plan.to_dict() if llama.plan is not None else {}
    if llama.plan is not None and not llama.plan.has_local_types:  # as in earlier sessions
        del plan["type_k_local"], plan["type_v_local"]
    return {key: plan[key] for key in _PLAN if key in plan}


def _model(llama: Llama) -> dict[str, str]:
    """The name and the file of a model; its weights are compared by the seal of the state."""
    return {
        "name": llama.metadata.get("general.name", "")[:300],
        "file": Path(llama.model_path).name,
    }


def _missing(name: str) -> RazorError:
    others = f"there are: {', '.join(names())}" if names() else "none has been saved yet"
    return RazorError(f"there is no session {name}; {others}")


def _damaged(name: str, why: str) -> RazorError:
    return RazorError(f"the file of session {name} is damaged ({why}); remove it and save again")


def _open(name: str) -> BinaryIO:
    try:
        return open_input(path_of(name), "a saved session")
    except FileNotFoundError:
        raise _missing(name) from None


def _read(name: str, file: BinaryIO) -> tuple[Session, int]:
    """Return a session and the bytes of its state; file is then before its tokens."""
    n_bytes = file.seek(0, 2)
    file.seek(0)
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size or not head.startswith(_MAGIC):
        raise _damaged(name, "it does not begin as a session does")
    _, n_json, n_tokens, n_state, digest = _HEAD.unpack(head)
    expected = _HEAD.size + n_json + 4 * n_tokens + n_state
    if n_bytes != expected or n_json > MAX_JSON:
        raise _damaged(name, f"it has {n_bytes} bytes instead of {expected}")
    data = file.read(n_json)
    if _digest(n_json, n_tokens, n_state, data) != digest:
        raise _damaged(name, "its messages are not those that were saved")
    try:
        content = json.loads(data)
        session = Session(name=name, n_tokens=n_tokens, n_bytes=n_bytes, **content)
        fine = all(isinstance(message, dict) for message in session.chat["messages"])
        fine = fine and session.model.keys() == {"name", "file"} and isinstance(session.plan, dict)
        if not fine or not isinstance(session.saved, (int, float)):
            raise ValueError
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise _damaged(name, "it does not hold what a session does") from None
    return session, n_state


def _digest(n_json: int, n_tokens: int, n_state: int, data: bytes) -> bytes:
    digest = hashlib.blake2b(struct.pack("<QIQ", n_json, n_tokens, n_state), digest_size=16)
    digest.update(data)
    return digest.digest()
