"""Whatever a new policy holds, the one in force stays until a good one comes, and the mistake is named where it is."""

from pathlib import Path

import pytest
from edge_sides import HERE, THERE, Turns, ask, collect, daemon_over

import router.observe
from edge_agent import policy_file as module
from edge_agent.policies.canary import Limits
from edge_agent.policies.center import PolicyCenter
from edge_agent.policies.history import History
from edge_agent.policies.signer import Signer
from router.policy import InvalidPolicy
from router.privacy.detect import MAX_WORDS
from router.weights import InvalidWeights

GOOD = "mode: only_edge\n"
RULE = "mode: prefer_cloud\nrules:\n  - name: a\n    target: cloud\n    when: "
MANY = "".join(f"  - {{name: r{number}, target: edge, when: {{turns: {number}}}}}\n" for number in range(10_000))
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))

BAD = {
    "no YAML": ("mode: [", 1, "", "not YAML"),
    "nothing": ("", 1, "", "empty"),
    "a comment": ("# mode: only_edge\n", 1, "", "empty"),
    "no text": (b"\xff\xfe\x00", 1, "", "not UTF-8"),
    "a control character": ("mode: only_edge\nfallback: \x07", 2, "", "does not allow"),
    "a bomb": (BOMB, 1, "", "anchors and aliases"),
    "nested": ("mode: " + "[" * 500 + "]" * 500, 1, "mode", "nested"),
    "twice": ("mode: only_edge\nmode: only_cloud", 2, "mode", "written twice"),
    "an unknown field": ("mode: only_edge\nmodus: x", 2, "modus", "did you mean mode?"),
    "an unknown feature": (RULE + "{promt_tokens: 5}", 5, "rules[0].when.promt_tokens", "did you mean prompt_tokens?"),
    "an unknown feature in CEL": (RULE + "'promt_tokens > 5'", 5, "rules[0].when", "did you mean prompt_tokens?"),
    "no CEL": (RULE + "'prompt_tokens >'", 5, "rules[0].when", "at character 16"),
    "nested comprehensions": (RULE + "'[[1]].all(x, x.all(y, y > 0))'", 5, "rules[0].when", "no macros"),
    "a long expression": (RULE + f"'{'code || ' * 200}code'", 5, "rules[0].when", "longer than 1000"),
    "a regex that explodes": (RULE + "model.matches('((a{1000}){1000}){1000}')", 5, "rules[0].when", "regex"),
    "a regex that looks ahead": (RULE + "model.matches('(?=a)+$')", 5, "rules[0].when", "regex"),
    "no number": (RULE + "{prompt_tokens: {'>': .nan}}", 5, "rules[0].when.prompt_tokens", "not a finite number"),
    "no rules": ("mode: only_edge\nrules: []", 2, "rules", "no rule is given"),
    "no rules of a tenant": (
        "mode: only_edge\ntenants:\n  t:\n    rules: []",
        4,
        "tenants.t.rules",
        "no rule is given",
    ),
    "ten thousand rules": ("mode: only_edge\nrules:\n" + MANY, 2, "rules", "larger than 256 KiB"),
    "four thousand rules": (
        "mode: only_edge\nrules:\n" + "".join(MANY.splitlines(True)[:4000]),
        4002,
        "rules[3999].target",
        "more than 20000",
    ),
    "too many rules": ("mode: only_edge\nrules:\n" + "".join(MANY.splitlines(True)[:257]), 2, "rules", "at most 256"),
    "too many words": (
        f"mode: only_edge\nprivacy:\n  words: [{', '.join(['ab'] * (MAX_WORDS + 1))}]",
        3,
        "privacy.words",
        f"at most {MAX_WORDS}",
    ),
    "a long word": (f"mode: only_edge\nprivacy:\n  words: [{'a' * 200}]", 3, "privacy.words[0]", "at most 128"),
    "an invisible word": ('mode: only_edge\nprivacy:\n  words: ["\\u200b\\u200b"]', 3, "privacy.words", "can be seen"),
    "another version": ("version: 2\nmode: only_edge", 1, "version", "must be 1"),
    "a zone that is not": ("mode: only_edge\ntimezone: Europe/Atlantis", 2, "timezone", "no time zone"),
    "too large": ("mode: only_edge\n#" + "x" * (1 << 20), 1, "", "larger than 256 KiB"),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE_S", 0.001)


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_policy_is_named_and_the_one_in_force_stays(tmp_path: Path, name: str) -> None:
    """From the file that is followed and from an administrator alike: line, field and cause; then a request is still
    answered by the policy before, and a good policy is taken up."""
    content, line, field, message = BAD[name]
    file = tmp_path / "policy.yaml"
    file.write_text(GOOD)
    history = History(tmp_path / "policies.db", Signer(b"k" * 32))
    center = PolicyCenter(file, history)
    daemon, before = daemon_over(Turns(HERE), Turns(THERE), center), center.current
    raw = content if isinstance(content, bytes) else content.encode()

    file.write_bytes(raw)
    with pytest.raises(InvalidPolicy) as caught:
        await center.reload()
    errors = [caught.value]
    if isinstance(content, str):
        with pytest.raises(InvalidPolicy) as proposed:
            center.propose(content, "ann", "try")
        errors.append(proposed.value)

    for error in errors:
        assert error.line == line
        assert error.field.startswith(field)
        assert message in str(error)
        assert len(str(error)) < 500
    assert center.current is before
    deltas, failed = await collect(daemon.intake, ask())
    assert failed is None
    assert deltas[0].route is not None
    assert deltas[0].route.target == "edge"
    file.write_text("mode: only_cloud\n")
    assert (await center.reload()).policy.mode == "only_cloud"
    history.close()


ASKING = {
    "goal: {cloud_share: 0.3}": "goal",
    "weights: {quality: 1, second: 0.1}": "weights",
    "rules: [{name: a, when: 'difficulty > 0.5', target: cloud}]": "rules[0].when",
    "tenants: {lab: {goal: {quality: 0.9}}}": "tenants.lab.goal",
    "shadow: {rules: [{name: a, when: {difficulty: {'<': 0.5}}, target: edge}]}": "shadow.rules[0].when",
}


@pytest.mark.parametrize("asking", ASKING)
async def test_a_policy_that_asks_for_what_cannot_be_measured_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asking: str
) -> None:
    """With damaged weights nobody knows a difficulty: who asks for it is refused by line and field, also where it was
    proposed before, and the policy before holds; what does not ask for it is taken as ever."""

    def damaged() -> None:
        raise InvalidWeights("difficulty.npz is no weights file (BadZipFile)", param="path")

    file, source = tmp_path / "policy.yaml", "mode: prefer_edge\n" + asking
    file.write_text(GOOD)
    history = History(tmp_path / "policies.db", Signer(b"k" * 32))
    center = PolicyCenter(file, history)
    kept = center.propose(source, "ann", "try").number
    monkeypatch.setattr(router.observe, "shipped_difficulty", damaged)
    file.write_text(source)
    with pytest.raises(InvalidPolicy, match=r"measured here: difficulty\.npz is no weights file") as caught:
        await center.reload()
    assert (caught.value.line, caught.value.field) == (2, ASKING[asking])
    for refused in (
        lambda: center.propose(source, "ann", "try"),
        lambda: center.activate(kept, "ann", "try"),
        lambda: center.try_out(kept, 10, Limits(), "ann", "try"),
    ):
        with pytest.raises(InvalidPolicy) as caught:
            refused()
        assert (caught.value.line, caught.value.field) == (2, ASKING[asking])
    assert center.policy.mode == "only_edge"
    file.write_text("mode: prefer_cloud\n")
    assert (await center.reload()).policy.mode == "prefer_cloud"
    history.close()
