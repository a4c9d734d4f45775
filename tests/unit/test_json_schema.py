"""JSON schemas: what is refused, and that no keyword is ignored."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from razor_local.errors import RazorError
from razor_local.json_schema import MAX_REPETITIONS, read_schema

TOO_MANY = MAX_REPETITIONS + 1


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def tagged(name: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"kind": {"const": name}}, "required": ["kind"]}


REFUSED = [
    ([], "it is an empty list, expected an object"),
    (True, "it is true, expected an object"),
    (5, "it is 5, expected an object"),
    (None, "it is null, expected an object"),
    ({"const": float("nan")}, "it is not JSON"),
    (nested(100), "it is nested more than 64 levels deep"),
    (nested(1000), "it is nested more than 64 levels deep"),
    ({"type": "string", "maxLength": TOO_MANY}, f'#: "maxLength" is {TOO_MANY}, the largest'),
    ({"type": "string", "minLength": TOO_MANY}, f'#: "minLength" is {TOO_MANY}, the largest'),
    ({"maxItems": 100_000}, '"maxItems" is 100000, the largest supported is 900'),
    ({"pattern": "^(a|b){1,20000}$"}, "has 20000 repetitions in {1,20000}, the largest"),
    ({"pattern": "^((a{30}){30}b){2}$"}, "has 1800 repetitions in {2}, the largest"),
    ({"minLength": 3, "maxLength": 2}, '"minLength" is 3, which is more than "maxLength" (2)'),
    ({"type": "string", "maxLength": -1}, '"maxLength" is -1, expected a whole number'),
    ({"properties": {"a": {}}, "required": ["b"]}, '"required" has "b", which is not in'),
    ({"type": "object", "required": ["a"]}, '"required" has "a", which is not in "properties"'),
    ({"type": "integer", "enum": [1, "a"]}, '"a" in "enum" or "const" contradicts "type"'),
    ({"enum": [1], "maxLength": 3}, '"maxLength" is not supported beside "enum"'),
    ({"enum": []}, '"enum" is an empty list'),
    ({"anyOf": [{}], "type": "string"}, '"type" is not supported beside "anyOf"'),
    ({"anyOf": [{}, {"minimum": 1}]}, '#/anyOf/1: "minimum" is not supported'),
    ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, '"oneOf" has alternatives that may'),
    ({"oneOf": [{"type": "null"}, {"maxLength": 2}]}, '"oneOf" has alternatives that may overlap'),
    ({"oneOf": [tagged("a"), tagged("a")]}, '"oneOf" has alternatives that may overlap'),
    ({"allOf": [{"type": "string"}, {"maxLength": 3}]}, '"maxLength" is not supported in an allOf'),
    ({"$ref": "#"}, '#: "$ref" leads back to itself'),
    ({"allOf": [{"$ref": "#"}, {}]}, '#: "$ref" leads back to itself'),
    ({"$ref": "#/$defs/a"}, "which the schema does not have"),
    ({"$ref": "https://example.org/x"}, "expected a path in the schema"),
    (
        {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {}]}}},
        '#/$defs/a: "$ref" leads back to itself',
    ),
    (
        {"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"not": {}}}},
        '#/$defs/a: "not" is not supported',
    ),
    ({"type": "string", "format": "email"}, '"format" is "email", expected one of date'),
    ({"type": "string", "format": "date", "maxLength": 1}, '"maxLength" is not supported beside'),
    ({"type": "string", "maxItems": 1}, '"maxItems" is not supported for the type string'),
    ({"maxLength": 1, "maxItems": 1}, '"type" is missing beside keywords of array and string'),
    ({"type": "value"}, '"type" is "value", expected one of'),
    ({"properties": {"": {}}}, 'a property with the name "" is not supported'),
    ({"properties": {"a": {}}, "additionalProperties": {"type": "null"}}, "a schema in"),
    ({"prefixItems": [{}, {}], "maxItems": 1}, 'contradicts the 2 of "prefixItems"'),
    ({"items": False}, '"items" is false, expected a schema'),
    ({"properties": {"a": False}}, "#/properties/a: false allows no value"),
    *(
        ({"pattern": pattern}, '"pattern" ')
        for pattern in (
            5, "a", "^a\\$", "^(?=a)b$", "^a|b$", "^()$", "^(a|)$", "^(a$", "^a)$", "^a**$", "^[a$",
            "^[]$", "^[b-a]$", "^a{2,1}$", "^a{0}$", "^a{99999999999999}$", "^\\b$", '^"$',
            "^[\\\\]$", "^a^$", "^*$", "^\n$", "^[^\\s]$",
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "told"), REFUSED)
def test_what_cannot_be_enforced_is_refused(schema: Any, told: str) -> None:
    with pytest.raises(RazorError, match=re.escape(told)) as error:
        read_schema("x", schema)
    said = str(error.value)
    assert said.startswith("the JSON schema of x cannot be converted to a grammar: ")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("schema", "read"),
    [
        ({}, {"type": "object"}),
        ({"title": "t", "type": "null", "$comment": "c"}, {"type": "null"}),
        ({"items": {}},
         {"type": "array", "items": {"type": "value"}, "minItems": 0, "implied": True}),
        ({"type": ["string", "null"], "maxLength": 2}, {"anyOf": [
            {"type": "string", "minLength": 0, "maxLength": 2}, {"type": "null"}]}),
        ({"oneOf": [{"enum": [1]}, {"const": 2}]}, {"anyOf": [{"enum": [1]}, {"enum": [2]}]}),
        ({"allOf": [{"enum": [1]}]}, {"enum": [1]}),
        ({"allOf": [{"$ref": "#/$defs/a"}] * 2, "$defs": {"a": {"properties": {"b": {}}}}},
         {"type": "object", "properties": {"b": {"type": "value"}}, "required": [],
          "implied": True}),
        ({"properties": {"a": True}, "additionalProperties": True},
         {"type": "object", "properties": {"a": {"type": "value"}}, "required": [],
          "implied": True}),
        ({"type": "string", "pattern": r"^(?:\d\.[^a]|.)$"},
         {"type": "string", "pattern": '^([0-9][\\x2E][^a\\x00-\\x1F\\x22\\x5C]|[^\\x0A\\x0D'
          "\\U00002028-\\U00002029\\x00-\\x1F\\x22\\x5C])$"}),
        ({"type": "string", "pattern": "^[ -~]$"},
         {"type": "string", "pattern": "^[\\x20-\\x21\\x23-\\x5B\\x5D-\\x7E]$"}),
    ],
)  # fmt: skip
def test_forms_that_the_converter_understands(schema: Any, read: Any) -> None:
    assert read_schema("x", schema)[0] == read


def test_alternatives_that_exclude_each_other() -> None:
    for others in ([tagged("a"), tagged("b")], [{"type": "string"}, {"type": "null"}]):
        assert len(read_schema("x", {"oneOf": others})[0]["anyOf"]) == 2


def test_a_definition_may_contain_itself() -> None:
    node = {"properties": {"next": {"anyOf": [{"$ref": "#/$defs/schema"}, {"type": "null"}]}}}
    read, definitions = read_schema("x", {"$ref": "#/$defs/schema", "$defs": {"schema": node}})
    (name,) = definitions
    assert read == {"$ref": name} and name != "#/$defs/schema"


# what may surround a part of a schema; the place of the part is appended to that of the whole
AROUND = {
    "/items": lambda part: {"type": "array", "items": part, "maxItems": 3},
    "/prefixItems/1": lambda part: {"type": "array", "prefixItems": [{"type": "null"}, part]},
    "/properties/a": lambda part: {"type": "object", "properties": {"b": {}, "a": part}},
    "/additionalProperties": lambda part: {"type": "object", "additionalProperties": part},
    "/anyOf/0": lambda part: {"anyOf": [part, {"const": 1}]},
    "/allOf/0": lambda part: {"allOf": [part], "description": "d"},
}
CONSTRAINTS = (
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "uniqueItems",
    "contains", "minProperties", "maxProperties", "patternProperties", "propertyNames", "not", "if",
    "then", "else", "dependentRequired", "dependentSchemas", "unevaluatedProperties",
    "unevaluatedItems", "additionalItems", "minContains", "$dynamicRef", "nullable", "no such",
)  # fmt: skip


@given(
    st.lists(st.sampled_from(list(AROUND)), max_size=12),
    st.sampled_from(CONSTRAINTS),
    st.sampled_from(
        [{}, {"type": "integer"}, {"enum": [1]}, {"$ref": "#/$defs/a"}, {"anyOf": [{}]}]
    ),
    st.booleans(),
)
def test_no_keyword_is_ignored(
    places: list[str], constraint: str, part: dict[str, Any], is_defined: bool
) -> None:
    def whole(part: dict[str, Any]) -> dict[str, Any]:
        definitions = {"a": {"type": "null"}, "b": part}
        schema = {"$ref": "#/$defs/b"} if is_defined else part
        for place in reversed(places):
            schema = AROUND[place](schema)
        return {**schema, "$defs": definitions}

    read_schema("x", whole(part))
    place = "#/$defs/b" if is_defined else "#" + "".join(places)
    with pytest.raises(RazorError, match=re.escape(f'{place}: "{constraint}" is not supported')):
        read_schema("x", whole({**part, constraint: 1}))
