"""JSON schemas: each one is enforced completely, or refused.

llama_cpp's converter ignores keywords that it does not know, and those beside the one that it
takes. Schemas are checked here and brought into the forms that it converts correctly.
"""

from __future__ import annotations

import graphlib
import json
import re
from collections.abc import Callable
from itertools import combinations
from typing import Any, NoReturn
from urllib.parse import unquote

from .errors import RazorError

MAX_REPETITIONS = 900  # llama.cpp takes 999 nested optional items, which the converter writes
MAX_DEPTH = 64
ANY = {"type": "value"}  # what the converter calls any JSON value
_ANNOTATIONS = {
    "title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated",
    "readOnly", "writeOnly", "$defs", "definitions",
}  # fmt: skip
_OF_TYPE = {  # the keywords that each type has
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"pattern", "format", "minLength", "maxLength"},
    "integer": set[str](),
    "number": set[str](),
    "boolean": set[str](),
    "null": set[str](),
}
_ALONE = ("$ref", "allOf", "anyOf", "oneOf", "const", "enum")
_FORMATS = ("date", "time", "date-time", "uuid", "uuid1", "uuid2", "uuid3", "uuid4", "uuid5")
_IS: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: _is_number(value) and value == value // 1,
    "number": lambda value: _is_number(value),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "value": lambda value: True,
}


def read_schema(what: str, schema: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a JSON schema in the forms that llama_cpp converts, and its definitions by reference.

    Raises RazorError if a part of the schema cannot be enforced.

    Args:
        what: where the schema comes from, for errors
    """
    return _Reader(what, schema).read()


def refuse(what: str, why: str) -> NoReturn:
    """Raise the RazorError for a schema that cannot be enforced."""
    raise RazorError(f"the JSON schema of {what} cannot be converted to a grammar: {why}")


class _Reader:
    def __init__(self, what: str, schema: Any) -> None:
        self.what = what
        self.root = schema
        self.names: dict[str, str] = {}  # references of the converter, by those of the schema
        self.definitions: dict[str, Any] = {}
        self.edges: dict[str, set[str]] = {}  # references whose values begin with that of another
        self.exclusive: list[tuple[str, list[Any]]] = []  # place and alternatives of each oneOf

    def refuse(self, place: str, why: str) -> NoReturn:
        refuse(self.what, f"{place or '#'}: {why}")

    def read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        if not isinstance(self.root, dict):
            refuse(self.what, f"it is {_kind(self.root)}, expected an object")
        try:
            text = json.dumps(self.root, allow_nan=False)
            self.root = json.loads(text)  # Python allows keys that are not texts, and tuples
        except RecursionError:
            refuse(self.what, f"it is nested more than {MAX_DEPTH} levels deep")
        except (TypeError, ValueError) as error:
            refuse(self.what, f"it is not JSON ({error})")
        self.prefix = "schema"  # begins no rule that the converter names after a property
        while self.prefix in text.lower():
            self.prefix += "x"
        schema = self.schema(self.root, "#", "", 0)
        try:
            graphlib.TopologicalSorter(self.edges).prepare()
        except graphlib.CycleError as error:
            self.refuse(error.args[1][0], '"$ref" leads back to itself')
        for place, alternatives in self.exclusive:
            for one, other in combinations(alternatives, 2):
                if not self.disjoint(one, other, 0):
                    self.refuse(place, '"oneOf" has alternatives that may overlap; use "anyOf"')
        # JSON without more than that is an object
        return {"type": "object"} if schema == ANY else schema, self.definitions

    def schema(self, schema: Any, place: str, holder: str, depth: int) -> dict[str, Any]:
        """Return a part of the schema in a form that the converter enforces.

        Args:
            holder: the reference whose value begins with a value of this part, "" if none
        """
        if schema is True:
            return ANY
        if schema is False:
            self.refuse(place, "false allows no value")
        if not isinstance(schema, dict):
            self.refuse(place, f"{_kind(schema)} is not a schema, expected an object")
        if depth > MAX_DEPTH:
            refuse(self.what, f"it is nested more than {MAX_DEPTH} levels deep")
        found = {key: value for key, value in schema.items() if key not in _ANNOTATIONS}
        known = {"type", *_ALONE}.union(*_OF_TYPE.values())
        for key in found:
            if key not in known:
                self.refuse(place, f'"{key}" is not supported')
        for key in _ALONE:
            if key in found:
                allowed = {key} | ({"type"} if key in ("const", "enum") else set())
                if key == "allOf":
                    allowed |= {"type", "properties", "required"}
                for other in found:
                    if other not in allowed:
                        self.refuse(place, f'"{other}" is not supported beside "{key}"')
        if "$ref" in found:
            return {"$ref": self.reference(found["$ref"], place, holder, depth)}
        if "allOf" in found:
            members = self.list_of(found, "allOf", place)
            if len(members) == 1 and len(found) == 1:
                return self.schema(members[0], f"{place}/allOf/0", holder, depth + 1)
            # "implied": the schema does not refuse other types, though its grammar does
            return self.object(self.members(found, place, (place,), set()), depth) | {
                "implied": True
            }
        for key in ("anyOf", "oneOf"):
            if key in found:
                alternatives = [
                    self.schema(one, f"{place}/{key}/{i}", holder, depth + 1)
                    for i, one in enumerate(self.list_of(found, key, place))
                ]
                if key == "oneOf":
                    self.exclusive.append((place, alternatives))
                return {"anyOf": alternatives}
        types = self.types(found, place)
        if "const" in found or "enum" in found:
            values = [found["const"]] if "const" in found else self.list_of(found, "enum", place)
            for value in values:
                if types and not any(_IS[name](value) for name in types):
                    written = json.dumps(value)
                    self.refuse(place, f'{written} in "enum" or "const" contradicts "type"')
            return {"enum": values}
        if not types:
            types = [name for name, keys in _OF_TYPE.items() if keys & found.keys()]
            if not types:
                return ANY
            if len(types) > 1:
                self.refuse(place, f'"type" is missing beside keywords of {" and ".join(types)}')
            return self.typed(found, types[0], place, depth) | {"implied": True}
        for key in found:
            if key != "type" and not any(key in _OF_TYPE[name] for name in types):
                self.refuse(place, f'"{key}" is not supported for the type {" or ".join(types)}')
        alternatives = [self.typed(found, name, place, depth) for name in types]
        return alternatives[0] if len(alternatives) == 1 else {"anyOf": alternatives}

    def typed(self, found: dict[str, Any], name: str, place: str, depth: int) -> dict[str, Any]:
        found = {key: value for key, value in found.items() if key in _OF_TYPE[name]}
        if name == "object":
            return self.object([(found, place)], depth)
        if name == "array":
            return self.array(found, place, depth)
        if name == "string" and found:
            return self.string(found, place)
        return {"type": name}

    def types(self, found: dict[str, Any], place: str) -> list[str]:
        types = found.get("type", [])
        types = types if isinstance(types, list) else [types]
        for name in types:
            if not isinstance(name, str) or name not in _OF_TYPE:
                expected = ", ".join(_OF_TYPE)
                self.refuse(place, f'"type" is {json.dumps(name)}, expected one of {expected}')
        if "type" in found and not types:
            self.refuse(place, '"type" is an empty list')
        return types

    def list_of(self, found: dict[str, Any], key: str, place: str) -> list[Any]:
        value = found[key]
        if not isinstance(value, list) or not value:
            self.refuse(place, f'"{key}" is {_kind(value)}, expected a list of one item or more')
        return value

    def reference(self, ref: Any, place: str, holder: str, depth: int) -> str:
        target, ref = self.target(ref, place)
        self.edges.setdefault(holder, set()).add(ref)
        if ref not in self.names:
            name = f"#/$defs/{self.prefix}{len(self.names)}"
            self.names[ref] = name
            self.definitions[name] = self.schema(target, ref, ref, depth + 1)
        return self.names[ref]

    def target(self, ref: Any, place: str) -> tuple[Any, str]:
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            self.refuse(
                place, f'"$ref" is {ref!r}, expected a path in the schema such as "#/$defs/a"'
            )
        target = self.root
        for part in unquote(ref).split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict) and part in target:
                target = target[part]
            elif isinstance(target, list) and part.isdecimal() and int(part) < len(target):
                target = target[int(part)]
            else:
                self.refuse(place, f'"$ref" is {ref!r}, which the schema does not have')
        return target, unquote(ref)

    def members(
        self, found: dict[str, Any], place: str, within: tuple[str, ...], seen: set[str]
    ) -> list[Any]:
        """Return the object schemas that an allOf combines, with their places.

        Args:
            within: places of the schemas that combine this one
            seen: places of schemas that were referred to; it grows
        """
        parts = [({key: value for key, value in found.items() if key != "allOf"}, place)]
        for i, member in enumerate(self.list_of(found, "allOf", place)):
            at, chain = f"{place}/allOf/{i}", within
            while isinstance(member, dict) and "$ref" in member:
                for key in member:
                    if key != "$ref" and key not in _ANNOTATIONS:
                        self.refuse(at, f'"{key}" is not supported beside "$ref"')
                member, at = self.target(member["$ref"], at)
                if at in chain:
                    self.refuse(at, '"$ref" leads back to itself')
                chain = (*chain, at)
                if at in seen:
                    member = {}
                seen.add(at)
            if not isinstance(member, dict):
                self.refuse(at, f"{_kind(member)} is not supported in an allOf")
            member = {key: value for key, value in member.items() if key not in _ANNOTATIONS}
            for key in member:
                if key not in ("type", "properties", "required", "allOf"):
                    self.refuse(at, f'"{key}" is not supported in an allOf of several schemas')
            if len(seen) + at.count("/allOf/") > MAX_DEPTH:
                refuse(self.what, f"it is nested more than {MAX_DEPTH} levels deep")
            parts += self.members(member, at, chain, seen) if "allOf" in member else [(member, at)]
        return parts

    def object(self, parts: list[tuple[dict[str, Any], str]], depth: int) -> dict[str, Any]:
        """Return the schema of an object that has the properties of several schemas."""
        properties: dict[str, Any] = {}
        required: list[tuple[str, str]] = []
        for found, place in parts:
            if self.types(found, place) not in ([], ["object"]):
                self.refuse(
                    place, '"type" is not "object", which an allOf of several schemas needs'
                )
            given = found.get("properties", {})
            if not isinstance(given, dict):
                self.refuse(place, f'"properties" is {_kind(given)}, expected an object')
            for name, value in given.items():
                if name in ("", "*"):
                    self.refuse(place, f'a property with the name "{name}" is not supported')
                if name in properties:
                    self.refuse(place, f'the property "{name}" is in two schemas of an allOf')
                at = f"{place}/properties/{name}"
                properties[name] = self.schema(value, at, "", depth + 1)
            names = found.get("required", [])
            if not isinstance(names, list):
                self.refuse(place, f'"required" is {_kind(names)}, expected a list')
            required += [(name, place) for name in names]
        for name, place in required:
            if not isinstance(name, str) or name not in properties:
                self.refuse(
                    place, f'"required" has {json.dumps(name)}, which is not in "properties"'
                )
        found, place = parts[0]
        others = found.get("additionalProperties", True)
        if others is not True and others is not False:
            at = f"{place}/additionalProperties"
            others = self.schema(others, at, "", depth + 1)
            if properties and others != ANY:
                self.refuse(
                    place, 'a schema in "additionalProperties" is not supported beside "properties"'
                )
        if properties:  # and no others: a grammar does not know which names are taken
            names = [name for name, _ in required]
            return {"type": "object", "properties": properties, "required": names}
        return {"type": "object", "additionalProperties": others}

    def array(self, found: dict[str, Any], place: str, depth: int) -> dict[str, Any]:
        least, most = self.bounds(found, "minItems", "maxItems", place)
        items = found.get("items", True)
        key = "items" if isinstance(items, list) else "prefixItems"
        prefix = found.get(key, [])
        if not isinstance(prefix, list):
            self.refuse(place, f'"{key}" is {_kind(prefix)}, expected a list')
        if prefix:
            if "items" in found and "prefixItems" in found and not isinstance(items, bool):
                self.refuse(place, '"items" is not supported beside "prefixItems"')
            if not least <= len(prefix) <= (len(prefix) if most is None else most):
                self.refuse(
                    place, f'"minItems" or "maxItems" contradicts the {len(prefix)} of "{key}"'
                )
            read = [
                self.schema(one, f"{place}/{key}/{i}", "", depth + 1)
                for i, one in enumerate(prefix)
            ]
            return {"type": "array", "prefixItems": read}
        if items is False or items == []:
            self.refuse(place, f'"items" is {json.dumps(items)}, expected a schema')
        read_items = self.schema(items, f"{place}/items", "", depth + 1)
        read_most = {} if most is None else {"maxItems": most}
        return {"type": "array", "items": read_items, "minItems": least, **read_most}

    def string(self, found: dict[str, Any], place: str) -> dict[str, Any]:
        for key in ("pattern", "format"):
            for other in found:
                if key in found and other != key:
                    self.refuse(place, f'"{other}" is not supported beside "{key}"')
        if "pattern" in found:
            return {"type": "string", "pattern": self.pattern(found["pattern"], place)}
        if "format" in found:
            if found["format"] not in _FORMATS:
                expected = ", ".join(_FORMATS)
                self.refuse(
                    place, f'"format" is {json.dumps(found["format"])}, expected one of {expected}'
                )
            return {"type": "string", "format": found["format"]}
        least, most = self.bounds(found, "minLength", "maxLength", place)
        read = {"type": "string", "minLength": least}
        return read | ({} if most is None else {"maxLength": most})

    def bounds(
        self, found: dict[str, Any], min_key: str, max_key: str, place: str
    ) -> tuple[int, int | None]:
        for key in (min_key, max_key):
            value = found.get(key, 0)
            if not _IS["integer"](value) or value < 0:
                self.refuse(place, f'"{key}" is {json.dumps(value)}, expected a whole number')
            if value > MAX_REPETITIONS:
                self.refuse(
                    place, f'"{key}" is {value}, the largest supported is {MAX_REPETITIONS}'
                )
        least, most = int(found.get(min_key, 0)), found.get(max_key)
        if most is not None and least > most:
            self.refuse(place, f'"{min_key}" is {least}, which is more than "{max_key}" ({most})')
        return least, None if most is None else int(most)

    def pattern(self, pattern: Any, place: str) -> str:
        try:
            return _Pattern(pattern).read()
        except ValueError as error:
            self.refuse(place, f'"pattern" {error}')

    def disjoint(self, one: Any, other: Any, depth: int) -> bool:
        """Return whether surely no value follows both schemas, which schema() returned."""
        if depth > 12:
            return False
        for a, b in ((one, other), (other, one)):
            if "$ref" in a:
                return self.disjoint(self.definitions[a["$ref"]], b, depth + 1)
            if "anyOf" in a:
                return all(self.disjoint(each, b, depth + 1) for each in a["anyOf"])
        if "enum" in one and "enum" in other:
            return not any(value in other["enum"] for value in one["enum"])
        is_implied = "implied" in one or "implied" in other
        if is_implied and not one.get("type") == other.get("type") == "object":
            return False
        if "enum" in one:
            return not any(_IS[other["type"]](value) for value in one["enum"])
        if "enum" in other:
            return self.disjoint(other, one, depth + 1)
        types = {one["type"], other["type"]}
        if types == {"object"}:
            common = set(one.get("required", ())) & set(other.get("required", ()))
            return any(
                self.disjoint(one["properties"][name], other["properties"][name], depth + 1)
                for name in common
            )
        return len(types) == 2 and "value" not in types and types != {"integer", "number"}


class _Pattern:
    """A regular expression, brought into the form that the converter writes correctly.

    read() raises ValueError for what it does not support.
    """

    CLASSES = {
        "d": [("0", "9")],
        "w": [("0", "9"), ("A", "Z"), ("_", "_"), ("a", "z")],
        "s": [(" ", " ")],  # JSON escapes the others
    }
    ESCAPED = [("\0", "\x1f"), ('"', '"'), ("\\", "\\")]  # in strings of JSON

    def __init__(self, pattern: Any) -> None:
        if not isinstance(pattern, str) or len(pattern) < 2:
            raise ValueError(f"is {pattern!r}, expected a text that begins with ^ and ends with $")
        if pattern[0] != "^" or pattern[-1] != "$" or pattern[:-1].endswith("\\"):
            raise ValueError(f"is {pattern!r}, expected one that begins with ^ and ends with $")
        self.text = pattern[1:-1]
        self.at = 0

    def read(self) -> str:
        out: list[str] = []
        largest = [1]  # in each open group: the product of nested repetitions
        last = 0  # that of the item that a quantifier would repeat, 0: there is none
        while self.at < len(self.text):
            char = self.next()
            quantifier = re.compile(r"\{([0-9]+)(?:(,)([0-9]*))?\}").match(self.text, self.at - 1)
            if char in "*+?" or quantifier:
                if not last:
                    raise ValueError(f"has {char!r} without an item that it repeats")
                if quantifier:
                    char, self.at = quantifier[0], quantifier.end()
                    last *= self.times(quantifier)
                    if last > MAX_REPETITIONS:
                        raise ValueError(
                            f"has {last} repetitions in {char}, the largest number supported is"
                            f" {MAX_REPETITIONS}, in nested groups that of their product"
                        )
                out.append(char)
                largest[-1] = max(largest[-1], last)
                last = 0
                continue
            if char == "(":
                if self.text.startswith("?:", self.at):
                    self.at += 2
                elif self.text.startswith("?", self.at):
                    raise ValueError("has '(?', expected groups that begin with ( or (?:")
                largest.append(1)
                last = 0
            elif char in ")|":
                if len(largest) == 1:
                    raise ValueError(f"has {char!r} outside a group")
                if out[-1] in ("(", "|"):
                    raise ValueError("has an empty group or alternative")
                last = largest.pop() if char == ")" else 0
                largest[-1] = max(largest[-1], last)
            else:
                char = self.item(char)
                last = 1
            out.append(char)
        if len(largest) > 1:
            raise ValueError("has '(' without ')'")
        return "^" + "".join(out) + "$"

    def next(self) -> str:
        if self.at >= len(self.text):
            raise ValueError("ends inside a character class or escape")
        self.at += 1
        return self.text[self.at - 1]

    def times(self, quantifier: re.Match[str]) -> int:
        if max(map(len, quantifier.groups(""))) > 9:
            raise ValueError(f"has more than {MAX_REPETITIONS} repetitions")
        least = int(quantifier[1])
        most = int(quantifier[3]) if quantifier[3] else max(least, 1) if quantifier[2] else least
        if least > most or not most:
            raise ValueError(f"has {quantifier[0]}, expected bounds in order, above 0")
        return most

    def item(self, char: str) -> str:
        if char == ".":
            return self.written([("\n", "\n"), ("\r", "\r"), ("\u2028", "\u2029")], True)
        if char == "[":
            return self.set_of_chars()
        if char == "\\":
            return self.written(self.escape(), False)
        if char in "^$]{}":
            raise ValueError(f"has {char!r} inside; write \\{char} if it is part of the text")
        if char in '"' or char < " " or "\ud800" <= char <= "\udfff":
            raise ValueError(f"has {char!r}, which strings of JSON cannot contain as it is")
        return char

    def escape(self) -> list[tuple[str, str]]:
        char = self.next()
        if char.isalnum() and char not in self.CLASSES:
            raise ValueError(f"has \\{char}, expected \\d, \\w, \\s or an escaped punctuation mark")
        return self.CLASSES.get(char, [(char, char)])

    def set_of_chars(self) -> str:
        negated = self.text.startswith("^", self.at)
        self.at += negated
        ranges: list[tuple[str, str]] = []
        while (char := self.next()) != "]":
            if negated and self.text.startswith("s", self.at) and char == "\\":
                raise ValueError("has \\s in a negated character class, which is not supported")
            found = self.escape() if char == "\\" else [(char, char)]
            follows = self.text[self.at : self.at + 2]
            if len(follows) == 2 and follows[0] == "-" and follows[1] != "]":
                self.at += 1
                char = self.next()
                end = self.escape() if char == "\\" else [(char, char)]
                if any(a != b for a, b in found + end) or end < found:
                    raise ValueError("has a range of characters that is not in order")
                found = [(found[0][0], end[0][0])]
            ranges += found
        if not ranges:
            raise ValueError("has an empty character class")
        return self.written(ranges, negated)

    def written(self, ranges: list[tuple[str, str]], negated: bool) -> str:
        """Return a character class without the characters that are escaped in JSON."""
        points = [(ord(low), ord(high)) for low, high in ranges]
        for low, high in ((ord(low), ord(high)) for low, high in self.ESCAPED):
            if negated:
                points.append((low, high))
            else:
                parts = [[(a, min(b, low - 1)), (max(a, high + 1), b)] for a, b in points]
                points = [(a, b) for part in parts for a, b in part if a <= b]
        if not points:
            raise ValueError("has a quotation mark, backslash or control character, not supported")
        written = "".join(
            _point(low) if low == high else f"{_point(low)}-{_point(high)}" for low, high in points
        )
        return f"[{'^' if negated else ''}{written}]"


def _point(code: int) -> str:
    if chr(code).isascii() and chr(code).isalnum():
        return chr(code)
    return f"\\x{code:02X}" if code < 0x100 else f"\\U{code:08X}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    if isinstance(value, (dict, list)) and not value:
        return f"an empty {'object' if isinstance(value, dict) else 'list'}"
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value, default=repr)
