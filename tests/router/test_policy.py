import json

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.clauses import Breaker, Rule
from router.conditions import Range, When
from router.policy import InvalidPolicy, Policy, json_schema, parse

RULE = "mode: prefer_edge\nrules:\n  - name: a\n    target: cloud\n    when:\n      "  # a condition lands on line 6


def problems(source: str) -> list[tuple[int, str, str]]:
    with pytest.raises(InvalidPolicy) as caught:
        parse(source, name="policy.yaml")
    return [(problem.line, problem.field, problem.message) for problem in caught.value.problems]


def test_everything_that_can_be_written():
    """A full policy arrives field by field."""
    policy = parse("""
        version: 1
        mode: prefer_cloud
        fallback: none
        expected_output_tokens: 99
        first_token_timeout_s: 2.5
        max_round_trip_ms: 500
        breaker: {consecutive_failures: 5, window: 10, failure_ratio: 0.3,
                  cool_down_s: 1, max_cool_down_s: 9, probe_timeout_s: 4}
        rules:
          - name: first
            when: {prompt_tokens: {">": 800, "<=": 900}, code: true, label: free, model: [auto, b], turns: 3}
            target: cloud
            fallback: false
          - name: last
            target: edge
    """)
    assert policy == Policy(
        mode="prefer_cloud",
        fallback="none",
        expected_output_tokens=99,
        first_token_timeout_s=2.5,
        max_round_trip_ms=500.0,
        breaker=Breaker(
            consecutive_failures=5,
            window=10,
            failure_ratio=0.3,
            cool_down_s=1.0,
            max_cool_down_s=9.0,
            probe_timeout_s=4.0,
        ),
        rules=(
            Rule(
                name="first",
                when=When(
                    prompt_tokens=Range(**{">": 800, "<=": 900}),
                    code=True,
                    label="free",
                    model=("auto", "b"),
                    turns=Range(**{"==": 3}),
                ),
                target="cloud",
                fallback=False,
            ),
            Rule(name="last", target="edge"),
        ),
    )


def test_only_the_mode_is_required():
    """An empty or cut-off file is never mistaken for the defaults."""
    assert parse("mode: only_edge") == Policy(mode="only_edge")
    assert problems("{}") == [(1, "mode", "is required")]


@pytest.mark.parametrize(
    ("source", "line", "field", "message"),
    [
        ("mode: prefer_edg", 1, "mode", "must be 'prefer_edge', 'only_edge', 'prefer_cloud' or 'only_cloud'"),
        ("\n\nmode: no", 3, "mode", "must be 'prefer_edge'"),
        ("mode: only_edge\nversion: 2", 2, "version", "must be 1"),
        ("mode: only_edge\nfallback: cloud", 2, "fallback", "must be 'edge' or 'none'"),
        ("mode: only_edge\nrule: []", 2, "rule", "did you mean rules?"),
        ("mode: only_edge\nzzz: 1", 2, "zzz", "known here: version, mode,"),
        ("mode: only_edge\nrules: 5", 2, "rules", "must be a list"),
        ("mode: only_edge\nrules:\n- 5", 3, "rules[0]", "must be a map"),
        ("- 5", 1, "", "must be a map"),
        ("mode: only_edge\nexpected_output_tokens: 0", 2, "expected_output_tokens", "greater than or equal to 1"),
        ("mode: only_edge\nexpected_output_tokens: 1.5", 2, "expected_output_tokens", "a whole number"),
        ("mode: only_edge\nexpected_output_tokens: '5'", 2, "expected_output_tokens", "a whole number"),
        ("mode: only_edge\nfirst_token_timeout_s: -1", 2, "first_token_timeout_s", "greater than 0"),
        ("mode: only_edge\nmax_round_trip_ms: true", 2, "max_round_trip_ms", "a number"),
        ("mode: only_edge\nmax_round_trip_ms: 1e309", 2, "max_round_trip_ms", "not a finite number"),
        (
            "mode: only_edge\nprivacy: {personal: maybe}",
            2,
            "privacy.personal",
            "must be 'free', 'redact' or 'edge_only'",
        ),
        ("mode: only_edge\nprivacy: {kinds: [emial]}", 2, "privacy.kinds", "no kind emial; did you mean email?"),
        ("mode: only_edge\nprivacy: {kinds: []}", 2, "privacy.kinds", "at least 1 item"),
        ("mode: only_edge\nprivacy: {regions: [XX]}", 2, "privacy.regions", "no region XX"),
        ("mode: only_edge\nprivacy: {words: [a]}", 2, "privacy.words[0]", "at least 2 characters"),
        ("mode: only_edge\nprivacy: {persnal: free}", 2, "privacy.persnal", "did you mean personal?"),
        ("mode: only_edge\ngoal: {}", 2, "goal", "give either cloud_share or quality"),
        ("mode: only_edge\ngoal: {quality: 0.5, cloud_share: 0.5}", 2, "goal", "give either cloud_share or quality"),
        ("mode: only_edge\ngoal: {quality: 1.5}", 2, "goal.quality", "less than 1"),
        ("mode: only_edge\nbreaker:\n  windw: 3", 3, "breaker.windw", "did you mean window?"),
        ("mode: only_edge\nbreaker:\n  window: 0", 3, "breaker.window", "greater than or equal to 1"),
        ("mode: only_edge\nbreaker:\n  failure_ratio: 1.1", 3, "breaker.failure_ratio", "less than or equal to 1"),
        ("mode: only_edge\nbreaker: {cool_down_s: 99}", 2, "breaker", "max_cool_down_s is less than cool_down_s"),
        ("mode: only_edge\nrules:\n- target: edge", 3, "rules[0].name", "is required"),
        ("mode: only_edge\nrules:\n- name: a", 3, "rules[0].target", "is required"),
        ("mode: only_edge\nrules:\n- name: A b\n  target: edge", 3, "rules[0].name", "must match"),
        ('mode: only_edge\nrules:\n- name: "a\\r\\nx: y"\n  target: edge', 3, "rules[0].name", "must match"),
        ('mode: only_edge\nrules:\n- name: "a\\n"\n  target: edge', 3, "rules[0].name", "must match"),
        ("mode: only_edge\nrules:\n- name: a\n  target: moon", 4, "rules[0].target", "must be 'edge' or 'cloud'"),
        ("mode: only_edge\nrules:\n- name: a\n  target: cloud", 4, "rules[0].target", "only_edge never sends"),
        ("mode: only_cloud\nrules:\n- name: a\n  target: edge", 4, "rules[0].target", "only_cloud never sends"),
        (RULE + "promt_tokens: 5", 6, "rules[0].when.promt_tokens", "did you mean prompt_tokens?"),
        (RULE + "prompt_tokens: '800'", 6, "rules[0].when.prompt_tokens", 'number or limits such as {">": 800}'),
        (RULE + "prompt_tokens: true", 6, "rules[0].when.prompt_tokens", "must be a number or limits"),
        (RULE + "prompt_tokens: [1, 2]", 6, "rules[0].when.prompt_tokens", "must be a number or limits"),
        (RULE + "prompt_tokens: 1e16", 6, "rules[0].when.prompt_tokens", "less than or equal to 1000000000000000"),
        (RULE + "prompt_tokens: .inf", 6, "rules[0].when.prompt_tokens", "not a finite number"),
        (RULE + "prompt_tokens: {}", 6, "rules[0].when.prompt_tokens", "no limit given"),
        (RULE + "prompt_tokens: {'=>': 5}", 6, "rules[0].when.prompt_tokens.=>", "did you mean"),
        (RULE + "prompt_tokens: {'>': x}", 6, "rules[0].when.prompt_tokens.>", "must be a number"),
        (RULE + "prompt_tokens: {'>': 5, '<': 5}", 6, "rules[0].when.prompt_tokens", "no number can be > 5 and < 5"),
        (RULE + "prompt_tokens: {'==': 5, '<': 4}", 6, "rules[0].when.prompt_tokens", "no number can be < 4 and == 5"),
        (RULE + "prompt_tokens: {'>=': 5, '<': 5}", 6, "rules[0].when.prompt_tokens", "no number can be"),
        (RULE + "prompt_tokens:", 6, "rules[0].when.prompt_tokens", "a value is missing"),
        (RULE + "code: 1", 6, "rules[0].when.code", "must be true or false"),
        (RULE + "code: yes", 6, "rules[0].when.code", "must be true or false"),
        (RULE + "label: secret", 6, "rules[0].when.label", "must be 'free', 'redact' or 'edge_only'"),
        (RULE + "model: []", 6, "rules[0].when.model", "at least one"),
        (RULE + "model: 5", 6, "rules[0].when.model", "must be a list"),
        (RULE + "model:\n        - ok\n        - no t", 8, "rules[0].when.model[1]", "must match"),
        (RULE + "turns: 1\n  - name: a\n    target: edge", 7, "rules[1].name", "rules[0] has this name"),
        (
            "mode: only_edge\nrules:\n- name: a\n  target: edge\n- name: b\n  target: edge",
            5,
            "rules[1]",
            "never reached: rules[0] has no conditions",
        ),
    ],
)
def test_a_mistake_is_named_with_line_and_field(source, line, field, message):
    """The one thing wrong is the one thing reported, where it stands."""
    [(found_line, found_field, found_message)] = problems(source)
    assert (found_line, found_field) == (line, field)
    assert message in found_message


def test_all_mistakes_are_told_at_once_in_order():
    """An administrator mends a file in one go."""
    source = RULE + "code: 1\n      trns: 2\nbreaker: {window: x}\nmodus: y"
    assert [(line, field) for line, field, _ in problems(source)] == [
        (6, "rules[0].when.code"),
        (7, "rules[0].when.trns"),
        (8, "breaker.window"),
        (9, "modus"),
    ]


def test_error_text():
    """The message alone leads to the spot, and says how many more there are."""
    with pytest.raises(InvalidPolicy) as caught:
        parse(RULE + "prompt_tokens: '800'\n      turns: x", name="policy.yaml")
    said = str(caught.value)
    assert said.startswith("policy.yaml:6: rules[0].when.prompt_tokens: must be a number")
    assert said.endswith("(and 1 more)")
    assert caught.value.column == 7


def test_too_many_rules():
    """The number of rules is bounded, for each is tried on each request."""
    rules = "".join(f"- {{name: r{number}, target: edge, when: {{turns: 1}}}}\n" for number in range(257))
    [(line, field, message)] = problems("mode: only_edge\nrules:\n" + rules)
    assert (line, field) == (2, "rules")
    assert "at most 256" in message


@pytest.mark.parametrize(
    ("limits", "inside", "outside", "said"),
    [
        ({">": 5}, [5.1, 6], [5, 4], "> 5"),
        ({">=": 5}, [5, 6], [4.9], ">= 5"),
        ({"<": 5}, [4.9, -1], [5], "< 5"),
        ({"<=": 5}, [5, -1], [5.1], "<= 5"),
        ({"==": 5}, [5, 5.0], [4, 6], "== 5"),
        ({">": 1, "<=": 2.5}, [2, 2.5], [1, 3], "> 1 and <= 2.5"),
        ({">=": 123456789}, [123456789], [123456788], ">= 123456789"),
    ],
)
def test_range(limits, inside, outside, said):
    """Limits include or exclude their ends as in arithmetic, and print as written."""
    written = Range(**limits)
    assert all(written.holds(value) for value in inside)
    assert not any(written.holds(value) for value in outside)
    assert str(written) == said


def test_a_policy_cannot_be_changed():
    """One policy is shared by all requests; a new one replaces it whole."""
    policy = Policy(mode="only_edge")
    with pytest.raises(pydantic.ValidationError):
        policy.mode = "only_cloud"
    with pytest.raises(AttributeError):
        policy.rules.append(Rule(name="x", target="edge"))


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
KEYS = st.sampled_from(["mode", "rules", "name", "when", "target", "breaker", "turns", "model", ">", "version", "code"])
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYS, TREES, max_size=6))
def test_parsing_is_total(tree):
    """Whatever the shape of the document, parse returns a Policy or raises InvalidPolicy: hot reload can trust it."""
    try:
        outcome = parse(json.dumps(tree))
    except InvalidPolicy as error:
        outcome = error.problems
    assert outcome


def test_json_schema_names_every_field():
    """The published schema knows what the parser knows, so that editors complete and complain alike."""
    schema = json_schema()
    when = schema["$defs"]["When"]
    assert set(when["properties"]) == {field.alias or name for name, field in When.model_fields.items()}
    assert set(schema["properties"]) == set(Policy.model_fields)
    assert schema["required"] == ["mode"]
    assert not schema["additionalProperties"]
    assert not when["additionalProperties"]
    assert all("description" in condition for condition in when["properties"].values())
    json.dumps(schema)
