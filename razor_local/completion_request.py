"""Completion requests: checked, and put into the form that the library understands."""

from __future__ import annotations

import json
import random
import re
import secrets
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ContextFullError, RazorError, StateError, option
from .json_schema import read_schema, refuse

if TYPE_CHECKING:
    from llama_cpp.llama_grammar import LlamaGrammar

_ANY_SEED = (-1, 0xFFFF_FFFF)  # llama.cpp's LLAMA_DEFAULT_SEED: another one each time
# chat handlers in which the model can choose a tool, and the tool_choice that they read as "auto"
_CALLING = {
    "chatml-function-calling": "auto",
    "functionary": None,
    "functionary-v1": None,
    "functionary-v2": None,
}
_SAMPLING = (  # arguments that create_completion() and generate() have in common
    "top_k", "top_p", "min_p", "typical_p", "tfs_z", "mirostat_mode", "mirostat_tau",
    "mirostat_eta", "frequency_penalty", "presence_penalty", "repeat_penalty",
    "stopping_criteria", "grammar",
)  # fmt: skip
# of a rule of a grammar: its literals and character classes, its groups and repetitions, and the
# rules that it names. llama.cpp repeats no group of more than 2,000 of them.
_QUOTED = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]')
_GROUPS = re.compile(r"[(?*+]")
_NAMES = re.compile(r"[A-Za-z0-9-]+")
_MAX_RULE = 2000


def read_stops(stop: str | Iterable[str] | None) -> list[bytes]:
    """Return the stop strings of a request. Raises RazorError if they are none."""
    stops: Iterable[Any] = [] if stop is None else [stop] if isinstance(stop, str) else stop
    try:
        stops = list(stops)
    except TypeError:
        stops = [stop]
    for one in stops:
        if not isinstance(one, str) or not one:
            raise RazorError(f"stop contains {one!r}, expected non-empty strings")
    return [one.encode("utf-8", "surrogatepass") for one in stops]


def read_chat_request(
    request: dict[str, Any], reads_parts: bool, chat_format: str = ""
) -> dict[str, Any]:
    """Return the arguments of create_chat_completion() in the forms that llama_cpp understands.

    Args:
        request: all arguments by name.
        reads_parts: True if messages may contain parts other than text, such as images.
        chat_format: the name of the chat handler.

    Raises:
        RazorError: an argument is not understood, or contradicts another one.
    """
    request = dict(request)
    if not reads_parts:
        messages = request["messages"]
        if not isinstance(messages, (list, tuple)) or not messages:
            raise RazorError(f"messages is {messages!r}, expected a list of one message or more")
        request["messages"] = [_read_message(message) for message in messages]
    request["stop"] = [stop.decode() for stop in read_stops(request.get("stop"))]
    grammar = _read_response_format(request.pop("response_format", None))
    if grammar is not None and request.get("grammar") is not None:
        raise RazorError("grammar and response_format both constrain the answer; pass one of them")
    request["grammar"] = grammar or request.get("grammar")
    _check_tools(request, chat_format)
    return request


def _read_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RazorError(
            f"{message!r} is not a message; expected a dict such as"
            ' {"role": "user", "content": "Hello"}'
        )
    content = message.get("content")
    what = f"the content of the {message['role']} message"
    if isinstance(content, list):
        texts: list[Any] = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            for part in content
        ]
        for part, text in zip(content, texts, strict=True):
            if not isinstance(text, str):
                kind = part.get("type") if isinstance(part, dict) else part
                raise RazorError(f"{what} has a part of the type {kind!r}, this model reads text")
        content = "\n".join(texts)
    if isinstance(content, str):
        _check_text(what, content)
    elif content is not None or not (message.get("tool_calls") or message.get("function_call")):
        raise RazorError(f"{what} is {content!r}, expected text")
    return {**message, "content": content}


def _read_response_format(response_format: Any) -> Any:
    """Return the grammar of a response_format, None if it does not constrain the answer."""
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, dict) else response_format
    if kind == "text":
        return None
    if kind == "json_object":
        schema = response_format.get("schema", {"type": "object"})
    elif kind == "json_schema":
        schema = response_format.get("json_schema")
        schema = schema.get("schema") if isinstance(schema, dict) else None
        if schema is None:
            raise RazorError(
                "response_format has no json_schema.schema, expected"
                ' {"type": "json_schema", "json_schema": {"schema": {…}}}'
            )
    else:
        raise RazorError(
            f"response_format is of the type {kind!r}, expected text, json_object or json_schema"
        )
    return grammar_of("response_format", schema)


def _check_tools(request: dict[str, Any], chat_format: str) -> None:
    """Raise RazorError if a tool call that the request forces cannot follow its schema.

    llama_cpp would allow any JSON instead. functions and function_call are the older names of tools
    and tool_choice. If both are given, the older ones take precedence.
    """
    choice = request.get("function_call") or request.get("tool_choice")
    functions = request.get("functions")
    if functions is None:
        tools = [tool for tool in request.get("tools") or () if isinstance(tool, dict)]
        functions = [tool.get("function") for tool in tools]
    functions = [function for function in functions if isinstance(function, dict)]
    names = [function.get("name") for function in functions]
    words = {"auto", "none", _CALLING.get(chat_format) or "auto"}
    if isinstance(choice, str) and choice not in words:
        name = "function_call" if request.get("function_call") else "tool_choice"
        raise RazorError(
            f"{name} is {choice!r}, expected auto, none, or the tool to call, such as"
            ' {"type": "function", "function": {"name": "NAME"}}'
        )
    if isinstance(choice, dict):
        chosen = [choice.get("function", choice).get("name")]
        if names and chosen[0] not in names:
            name = "function_call" if request.get("function_call") else "tool_choice"
            raise RazorError(f"{name} names {chosen[0]!r}, expected one of the tools {names}")
    elif chat_format in _CALLING and choice in ("auto", _CALLING[chat_format]):
        chosen = names  # the model chooses, and its choice is then forced
    else:
        return
    for function in functions:
        if function.get("name") in chosen:
            gbnf_of(f"parameters of {function.get('name')!r}", function.get("parameters"))


def replace_gbnf() -> None:
    """Make the chat handlers of llama_cpp convert the schemas of tools as grammar_of() does.

    Schemas that grammar_of() refuses are still converted by llama_cpp. Requests that force a tool
    with such a schema are refused earlier.
    """
    from llama_cpp import llama_grammar

    original = llama_grammar.json_schema_to_gbnf

    def json_schema_to_gbnf(schema: str, prop_order: list[str] | None = None) -> str:
        try:
            return gbnf_of("a tool", json.loads(schema))
        except RazorError:
            return str(original(schema, prop_order))

    llama_grammar.json_schema_to_gbnf = json_schema_to_gbnf


def grammar_of(what: str, schema: Any) -> LlamaGrammar:
    """Return the grammar of a JSON schema. Raises RazorError if it cannot enforce the schema.

    Args:
        what: where the schema comes from, for errors
    """
    from llama_cpp.llama_grammar import LlamaGrammar

    return LlamaGrammar.from_string(gbnf_of(what, schema), verbose=False)


def gbnf_of(what: str, schema: Any) -> str:
    """Return the text of grammar_of()'s grammar. Raises the same errors."""
    from llama_cpp.llama_grammar import PRIMITIVE_RULES, STRING_FORMAT_RULES, SchemaConverter

    class Converter(SchemaConverter):
        def _format_literal(self, literal: str) -> str:
            """Quote JSON for a grammar. The base class does not escape backslashes."""
            with suppress(UnicodeEncodeError):  # a lone surrogate stays escaped
                text = json.dumps(json.loads(literal), ensure_ascii=False)
                text.encode()
                literal = text
            return '"' + literal.replace("\\", "\\\\").replace('"', '\\"') + '"'

    read, definitions = read_schema(what, schema)
    make: Any = Converter  # its methods have no types
    converter = make(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
    converter._refs = definitions
    # present from the start, so that no rule of a property takes their names
    for name, rule in (PRIMITIVE_RULES | STRING_FORMAT_RULES).items():
        converter._rules[name] = rule.content
    try:
        converter.visit(read, "")
    except RecursionError:
        refuse(what, "it has too many optional properties in one object, or too deep a pattern")
    # the rule allows line breaks and other control characters, which JSON escapes
    char = converter._rules["char"]
    converter._rules["char"] = char.replace(r'[^"\\]', r'[^"\\\x00-\x1F]')
    for rule in converter._rules.values():
        bare = _QUOTED.sub(" ", rule)
        if len(_GROUPS.findall(bare)) + len(set(_NAMES.findall(bare))) > _MAX_RULE:
            refuse(what, "it has too many optional properties or repetitions in one place")
    return str(converter.format_grammar())


def _with_logit_bias(llama: Any, request: dict[str, Any]) -> list[Any]:
    """Return the logits processors of a request, its logit_bias the last of them.

    The base class fails at tokens that do not exist while it samples, and drops both beside each
    other.
    """
    processors = request["logits_processor"] or []
    if callable(processors) and not isinstance(processors, list):
        processors = [processors]
    if not request["logit_bias"]:
        return list(processors)
    tokens = [int(token) for token in request["logit_bias"]]
    bias = np.array([float(value) for value in request["logit_bias"].values()], np.float32)
    llama._check_tokens(tokens)

    def add_bias(input_ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        logits[tokens] += bias
        return logits

    return [*processors, add_bias]


def read_prompt(llama: Any, prompt: Any, suffix: Any) -> list[int]:
    """Return the tokens of a prompt, put together as llama_cpp does.

    A text is between BOS (or CLS) and EOS (or SEP) if the model's tokenizer adds them. llama_cpp
    does not know the model's tokens for filling in before a suffix, and takes token 0 for them.

    Args:
        llama: a Llama from inside a request.
        prompt: a text or a list of tokens.
        suffix: the text behind the one to fill in, None: the prompt is continued.

    Raises:
        ContextFullError: the prompt does not fit.
        RazorError: an argument is not understood.
    """
    if isinstance(prompt, str):
        _check_text("the prompt", prompt)
        tokens = llama.tokenize(prompt.encode(), False, suffix is None) if prompt else []
    elif isinstance(prompt, (list, tuple, np.ndarray)):
        tokens = [_token(llama, token) for token in prompt]
    else:
        raise RazorError(
            f"the prompt is of the type {type(prompt).__name__}, expected a text or a list of"
            " tokens"
        )
    if suffix is not None:
        behind = _suffix_tokens(llama, suffix)
        parts = ([0], behind, [0], tokens) if llama.spm_infill else ([0], tokens, [0], behind)
        tokens = [*(token for part in parts for token in part), 0]
    if isinstance(prompt, str) or suffix is not None:
        model = llama._model
        cls, sep = model.token_cls(), model.token_sep()
        begin = cls if cls != -1 else llama.token_bos()
        if model.add_bos_token() and begin != -1:
            tokens = [begin, *tokens]
        if model.add_eos_token() or sep != -1:
            tokens = [*tokens, sep if sep != -1 else llama.token_eos()]
    if len(tokens) >= llama._n_ctx:
        raise ContextFullError(
            f"the prompt has {len(tokens)} tokens and the context holds {llama.n_ctx()}, of which"
            f" an answer needs one at least; use a larger {option('n_ctx')} or a shorter prompt"
        )
    return tokens


def _suffix_tokens(llama: Any, suffix: Any) -> list[int]:
    if not isinstance(suffix, str):
        raise RazorError(f"suffix is {suffix!r}, expected a text or None")
    _check_text("the suffix", suffix)
    if not suffix:
        return []
    if llama.metadata.get("tokenizer.ggml.add_space_prefix", "true") != "true":
        return list(llama.tokenize(suffix.encode(), False, False))
    # so that the tokenizer adds no space before the suffix
    return list(llama.tokenize(f"☺{suffix}".encode(), False, False)[2:])


def read_sampling(llama: Any, request: dict[str, Any], prompt: list[int]) -> dict[str, Any]:
    """Return the arguments of generate() for a request.

    Args:
        llama: a Llama from inside a request.
        request: the arguments of create_completion().
        prompt: its tokens. A state of set_cache() that holds more of them is loaded.

    Raises:
        RazorError: an argument is not understood.
    """
    seed = request["seed"]
    if seed is not None and (not isinstance(seed, (int, np.integer)) or isinstance(seed, bool)):
        raise RazorError(f"seed is {seed!r}, expected a whole number or None")
    if seed is None and llama._seed in _ANY_SEED:
        seed = secrets.randbits(31)
    processors = _with_logit_bias(llama, request)
    if llama.verbose:
        llama._ctx.reset_timings()
    if llama.cache:
        _load_cached(llama, prompt)
    if seed is None:  # the next request has another seed, in a sequence that a program can repeat
        seed = random.Random(llama._seed).randint(0, 2**32)
        llama.set_seed(seed)
    return {name: request[name] for name in _SAMPLING} | {
        "temp": request["temperature"],
        "logits_processor": processors,
        "seed": seed % 2**32,
    }


def _load_cached(llama: Any, prompt: list[int]) -> None:
    from llama_cpp import Llama

    def n_same(tokens: np.ndarray) -> int:
        return int(Llama.longest_token_prefix(tokens.tolist(), prompt))

    def tell(what: str) -> None:
        if llama.verbose:
            print(f"Llama._create_completion: {what}", file=sys.stderr)

    try:
        state = llama.cache[prompt]
    except KeyError:
        return tell("cache miss")
    if n_same(state.input_ids) > n_same(llama._input_ids):
        with suppress(StateError):  # one of another context counts as not found
            llama.load_state(state)
        tell("cache hit")


def _check_text(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RazorError(
            f"{what} has a lone surrogate ({text[error.start]!r}) at character {error.start}; fix"
            " the decoding or replace it"
        ) from None


def _token(llama: Any, token: Any) -> int:
    if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
        raise RazorError(f"the prompt has {token!r} as a token, expected whole numbers")
    llama._check_token(int(token))
    return int(token)
