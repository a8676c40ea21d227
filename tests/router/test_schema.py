"""The JSON Schema of a policy: published beside the example, named there for editors, of one mind with the parser."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.conditions import samples
from router.defaults import default_source
from router.document import read
from router.expression import FUNCTIONS
from router.policy import InvalidPolicy, Policy, json_schema, parse

DEPLOYED = Path(__file__).parents[2] / "deploy"
CHECK = jsonschema.Draft202012Validator(json_schema())


def plain(value: Any) -> Any:
    """A document's value as JSON has it."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def test_it_is_published_as_it_is() -> None:
    """`deploy/policy.schema.json` is what `router schema` prints, and a schema."""
    assert json.loads((DEPLOYED / "policy.schema.json").read_text()) == json_schema()
    jsonschema.Draft202012Validator.check_schema(json_schema())


def test_the_example_names_it_for_editors() -> None:
    """Its first line is what editors look for, and leads to the file beside it."""
    modeline = (DEPLOYED / "policy.yaml").read_text().splitlines()[0]
    before, _, where = modeline.partition("$schema=")
    assert before == "# yaml-language-server: "
    assert (DEPLOYED / where).samefile(DEPLOYED / "policy.schema.json")


@pytest.mark.parametrize(
    "source", [(DEPLOYED / "policy.yaml").read_bytes(), default_source()], ids=["example", "default"]
)
def test_our_own_policies_are_valid_by_it(source: bytes) -> None:
    CHECK.validate(plain(read(source, name="policy").value))


def _resolved(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    return json_schema()["$defs"][schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema


ODD = st.sampled_from([None, True, 0, 1, -1, 0.5, 1e20, "", "a", "edge", "redact", "x" * 1001, [], ["a"], {}, {"a": 1}])
TEXTS = st.sampled_from(
    ["edge", "cloud", "free", "redact", "edge_only", "prefer_edge", "code", "true", "email", "a-1", "EUR"]
)


def _values(schema: Mapping[str, Any], depth: int) -> st.SearchStrategy[Any]:
    """Mostly what a schema asks for, with what it does not know in between."""
    schema = _resolved(schema)
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    if "anyOf" in schema or "oneOf" in schema:
        return st.one_of(*(_values(one, depth) for one in schema.get("anyOf") or schema["oneOf"]))
    match schema.get("type"):
        case "object" if depth:
            return _maps(schema, depth - 1)
        case "array" if depth:
            return st.lists(_values(schema.get("items", {}), depth - 1) | ODD, max_size=3)
        case "number" | "integer":
            return st.integers(0, 40) | st.floats(0.01, 2)
        case "boolean":
            return st.booleans()
        case "null":
            return st.just("null")
        case _:
            return TEXTS | ODD


def _maps(schema: Mapping[str, Any], depth: int) -> st.SearchStrategy[Any]:
    known, more = schema.get("properties", {}), schema.get("additionalProperties")
    fields = {name: _values(one, depth) for name, one in known.items()}
    wanted = {name: fields[name] for name in schema.get("required", ())}
    others = {name: field for name, field in fields.items() if name not in wanted}
    made: st.SearchStrategy[Any] = st.fixed_dictionaries(wanted, optional=others)
    if isinstance(more, Mapping):
        made = st.dictionaries(st.sampled_from(["lab", "a b", "voice"]), _values(more, depth), max_size=2)
    return made


DOCUMENTS = _maps(json_schema(), 4)


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS)
def test_what_the_parser_takes_the_schema_takes(document: dict[str, Any]) -> None:
    """An editor that follows the schema marks nothing that would be accepted."""
    try:
        parse(json.dumps(document))
    except InvalidPolicy:
        return
    assert not list(CHECK.iter_errors(document))


GOOD: dict[str, Any] = {
    "mode": "prefer_edge",
    "label": "redact",
    "timezone": "Europe/Berlin",
    "rules": [{"name": "a", "when": {"turns": {">": 2}, "model": ["auto"], "hour": 5}, "target": "cloud"}],
    "goal": {"cloud_share": 0.3},
    "privacy": {"words": ["Heron"], "kinds": ["email"]},
    "prices": {"cloud": {"input_per_million": 1, "output_per_million": 2, "currency": "EUR"}},
    "budgets": {"day": 1, "key_day": 0.5},
    "classes": {"voice": {"p50_ms": 1, "p95_ms": 2, "p99_ms": 3}},
    "tenants": {"lab": {"mode": "prefer_cloud", "rules": [{"name": "b", "when": "code", "label": "edge_only"}]}},
    "shadow": {"mode": "prefer_cloud"},
}


def _paths(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, item in inner for deeper in _paths(item, (*path, key)))]


def _with(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    if isinstance(value, list):
        return [_with(item, path[1:], new) if at == path[0] else item for at, item in enumerate(value)]
    return value | {path[0]: _with(value.get(path[0]), path[1:], new)}


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(_paths(GOOD)[1:]), ODD)
def test_what_the_schema_refuses_the_parser_refuses(path: tuple[str | int, ...], odd: Any) -> None:
    """One odd value anywhere in a good policy: where the schema objects, so does the parser, and at that field."""
    document = _with(GOOD, path, odd)
    if not list(CHECK.iter_errors(document)):
        return
    with pytest.raises(InvalidPolicy):
        parse(json.dumps(document))


@pytest.mark.parametrize("path", [path for path in _paths(GOOD)[1:] if not isinstance(path[-1], int)], ids=str)
def test_every_misspelled_field_is_marked_by_both(path: tuple[str, ...]) -> None:
    """Where names are fixed, one that does not exist is an error in the editor as it is at the edge."""
    document = _with(GOOD, (*path[:-1], f"{path[-1]}x"), 5)
    assert list(CHECK.iter_errors(document))
    with pytest.raises(InvalidPolicy):
        parse(json.dumps(document))


def test_an_expressions_facts_and_functions_are_in_the_schema() -> None:
    """An editor shows them beside `when`; its examples are valid."""
    written = next(one for one in json_schema()["$defs"]["Rule"]["properties"]["when"]["oneOf"] if "type" in one)
    words = set(re.findall(r"\w+", written["description"]))
    assert set(samples()) | FUNCTIONS <= words
    for example in written["examples"]:
        rule = {"name": "a", "when": example, "target": "edge"}
        assert parse(json.dumps({"mode": "prefer_edge", "rules": [rule]})).rules


def test_editors_can_complete_every_field_and_condition() -> None:
    """Each has a name and words to show with it."""
    schema = json_schema()
    assert set(schema["properties"]) == set(Policy.model_fields)
    assert set(samples()) == set(schema["$defs"]["When"]["properties"])
    described = {"": schema, **schema["$defs"]}
    assert all(one.get("description") for one in described.values())
    fields = {f"{name}.{at}": one for name, kind in described.items() for at, one in kind.get("properties", {}).items()}
    assert len(fields) > 100
    assert [name for name, one in fields.items() if not one.get("description")] == []
    assert parse(json.dumps(GOOD)).mode == "prefer_edge"
    assert not list(CHECK.iter_errors(GOOD))
