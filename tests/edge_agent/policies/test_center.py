"""The policy in force: files, versions, trials, and what holds after a restart."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from edge_sides import ask

from edge_agent import policy_file as module
from edge_agent.policies.canary import Limits
from edge_agent.policies.center import NoHistory, PolicyCenter
from edge_agent.policies.history import History
from edge_agent.policies.signer import Signer
from router.policy import InvalidPolicy
from shared.errors import BadRequest, NotFound, RequestConflict
from shared.telemetry import RequestFinished

EDGE, CLOUD, HERE = "mode: prefer_edge\n", "mode: prefer_cloud\n", "mode: only_edge\n"


class Place:
    """A state folder and perhaps a policy's file; `center()` is a start of the daemon."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: list[History] = []

    def center(self, file: str | None = None) -> PolicyCenter:
        path = None
        if file is not None:
            path = self.folder / "policy.yaml"
            path.write_text(file)
        self.close()
        self._open.append(History(self.folder / "policies.db", Signer(b"k" * 32)))
        return PolicyCenter(path, self._open[-1])

    def close(self) -> None:
        while self._open:
            self._open.pop().close()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(module, "SETTLE_S", 0.001)
    place = Place(tmp_path)
    yield place
    place.close()


def test_a_proposal_is_kept_and_changes_nothing(place: Place) -> None:
    """It is in force once somebody activates it, and stays so after a restart."""
    center = place.center()
    version = center.propose(CLOUD, "anna", "faster")
    assert (version.number, center.policy.mode, center.current.name) == (1, "prefer_edge", "default")

    center.activate(1, "bert", "agreed")

    assert (center.policy.mode, center.current.version) == ("prefer_cloud", 1)
    assert place.center().policy.mode == "prefer_cloud"


def test_an_invalid_proposal_is_refused_by_line(place: Place) -> None:
    """And leaves nothing behind."""
    center = place.center()
    with pytest.raises(InvalidPolicy, match="policy:2"):
        center.propose("mode: prefer_edge\nmod: x", "anna", "oops")
    assert center.history.versions() == []


@pytest.mark.parametrize("why", ["", "  ", "x" * 501])
def test_every_act_says_why(place: Place, why: str) -> None:
    """A history without reasons is worth little."""
    center = place.center()
    for act in (
        lambda: center.propose(CLOUD, "anna", why),
        lambda: center.activate(0, "anna", why),
        lambda: center.roll_back("anna", why),
        lambda: center.try_out(0, 5, Limits(), "anna", why),
    ):
        with pytest.raises(BadRequest) as caught:
            act()
        assert caught.value.param == "why"
    assert center.history.acts() == []


def test_rolling_back_returns_to_the_version_before(place: Place) -> None:
    """Down to the built-in policy; and again is forth."""
    center = place.center()
    for mode in (CLOUD, HERE):
        center.activate(center.propose(mode, "anna", "try").number, "anna", "go")

    assert center.roll_back("anna", "worse").policy.mode == "prefer_cloud"
    assert center.roll_back("anna", "no, better").policy.mode == "only_edge"
    assert [act.action for act in center.history.acts()][:2] == ["rollback", "rollback"]
    center.activate(0, "anna", "start anew")
    assert center.current.name == "default"
    with pytest.raises(NotFound):
        center.activate(9, "anna", "no such")


async def test_a_changed_file_is_a_version_and_what_came_last_holds(place: Place) -> None:
    """A file that is the same as at the last start does not undo what was activated since."""
    center = place.center(EDGE)
    assert (center.current.version, center.history.versions()[0].who) == (1, "file")
    center.activate(center.propose(CLOUD, "anna", "try").number, "anna", "go")
    assert place.center(EDGE).policy.mode == "prefer_cloud"

    again = place.center(HERE)
    assert (again.policy.mode, again.current.version) == ("only_edge", 3)

    (place.folder / "policy.yaml").write_text(CLOUD)
    await again.reload()
    assert (again.policy.mode, again.current.version) == ("prefer_cloud", 4)
    await again.reload()
    assert len(again.history.versions()) == 4
    (place.folder / "policy.yaml").write_text("mode: [")
    with pytest.raises(InvalidPolicy):
        await again.reload()
    assert (again.policy.mode, again.failures) == ("prefer_cloud", 1)


def test_a_lost_history_sends_nothing_away(place: Place) -> None:
    """Nobody knows whether the lost policy kept everything here, so this one does; a file speaks for itself."""
    center = place.center()
    center.activate(center.propose(HERE, "anna", "private").number, "anna", "go")
    place.close()
    for file in place.folder.glob("policies.db*"):
        file.unlink()
    (place.folder / "policies.db").write_bytes(b"\x00damaged" * 1000)

    center = place.center()
    assert (center.policy.mode, center.current.name) == (
        "only_edge",
        "only_edge: the history of policies was damaged",
    )
    (place.folder / "policies.db").write_bytes(b"\x00damaged" * 1000)
    assert place.center(CLOUD).policy.mode == "prefer_cloud"


def test_without_a_history_the_file_alone_decides(tmp_path: Path) -> None:
    """And whoever asks for versions is told why there are none."""
    center = PolicyCenter(None, None)
    assert center.policy.mode == "prefer_edge"
    with pytest.raises(NoHistory):
        center.propose(CLOUD, "anna", "try")


def served(center: PolicyCenter, count: int, *, failed: bool = False) -> int:
    """So many conversations, one request each; returns how many the canary decided."""
    taken = 0
    for number in range(count):
        request = ask(f"question {number}", id=f"r{number}")
        taken += center.policy_for(request) is not center.policy
        outcome = "error" if failed else "done"
        code = "upstream_failed" if failed else None
        center(RequestFinished(request.id, "auto", outcome, 0.1, first_token_s=0.1, error_code=code))
    return taken


def test_a_canary_decides_its_share_and_each_conversation_as_a_whole(place: Place) -> None:
    """The others keep the policy in force; activation makes it everybody's."""
    center = place.center()
    number = center.propose(CLOUD, "anna", "try").number
    center.try_out(number, 20, Limits(), "anna", "a fifth")

    assert 120 < served(center, 1000) < 280
    assert center.canary is not None
    decided = {center.policy_for(ask("the same words", id=str(n))).mode for n in range(20)}
    assert len(decided) == 1
    center.activate(number, "anna", "good")
    assert (center.policy.mode, center.canary) == ("prefer_cloud", None)
    with pytest.raises(RequestConflict, match="in force already"):
        center.try_out(number, 5, Limits(), "anna", "again")


def test_a_canary_that_breaks_its_limits_is_withdrawn_by_itself(place: Place) -> None:
    """The history says by whom and why; the policy in force was never touched."""
    center = place.center()
    center.try_out(center.propose(CLOUD, "anna", "try").number, 50, Limits(), "anna", "half")

    taken = served(center, 200, failed=True)

    assert taken == 20
    assert (center.canary, center.policy.mode) == (None, "prefer_edge")
    last = center.history.acts()[0]
    assert (last.action, last.who, last.why) == ("end_canary", "guard", "20 of 20 requests failed, more than 5.0%")


def test_rolling_back_a_canary_withdraws_it_and_no_more(place: Place) -> None:
    """The policy in force stays; who is still on the way is no longer counted."""
    center = place.center()
    center.try_out(center.propose(CLOUD, "anna", "try").number, 100, Limits(), "anna", "all")
    assert center.policy_for(ask(id="late")).mode == "prefer_cloud"

    assert center.roll_back("bert", "enough").policy.mode == "prefer_edge"
    center(RequestFinished("late", "auto", "error", 1.0, error_code="upstream_failed"))

    assert center.canary is None
    assert place.center().policy.mode == "prefer_edge"
