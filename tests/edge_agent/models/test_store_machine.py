"""The store under any order of pulls, breaks, new versions and removals: a model is whole, or as before, or gone."""

from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from model_origin import Origin, model_bytes, serving

from edge_agent.models.installed import installed, remove
from edge_agent.models.pull import pull
from shared.errors import CausewayError, UnknownModel
from shared.models import stored_file, verify

NAMES = ("a", "b")
CUTS = st.lists(st.integers(0, 3000), max_size=6)


class StoreMachine(RuleBasedStateMachine):
    """Each name has a file at its origin, in versions; `there` is what must lie in the store."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.store = folder / str(len(list(folder.iterdir())))
        self.store.mkdir()
        self.stack = ExitStack()
        self.origins = {name: Origin(self.version(name, 0)) for name in NAMES}
        self.urls = {name: self.stack.enter_context(serving(origin)) for name, origin in self.origins.items()}
        self.versions = dict.fromkeys(NAMES, 0)
        self.there: dict[str, bytes] = {}

    def version(self, name: str, number: int) -> bytes:
        return model_bytes(2000 + 10 * number + NAMES.index(name))

    @rule(name=st.sampled_from(NAMES), cuts=CUTS, statuses=st.lists(st.sampled_from((503, 404, 429)), max_size=2))
    def pull(self, name: str, cuts: list[int], statuses: list[int]) -> None:
        """It comes whole, or an error is raised and nothing has changed; what broke goes on the next time."""
        origin = self.origins[name]
        origin.cut, origin.statuses = list(cuts), list(statuses)
        before, url = len(origin.seen), f"{self.urls[name]}/{name}.gguf"
        try:
            pull(url, store=self.store, told=lambda step: None, env={}, sleep=lambda seconds: None, again=True)
        except CausewayError:
            assert cuts or statuses
        else:
            self.there[name] = origin.content
        finally:
            assert len(origin.seen) - before <= 1 + len(cuts) + len(statuses)
            origin.cut, origin.statuses = [], []

    @rule(name=st.sampled_from(NAMES), tagged=st.booleans())
    def release(self, name: str, tagged: bool) -> None:
        """The origin has another file now; a server without tags must not lead to a mixture either."""
        self.versions[name] += 1
        origin = self.origins[name]
        origin.content = self.version(name, self.versions[name])
        origin.tag = f'"v{self.versions[name]}"' if tagged else None

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name: str) -> None:
        """With all that a broken pull left."""
        partial = (self.store / ".partial" / name).exists()
        try:
            remove(name, store=self.store)
        except UnknownModel:
            assert name not in self.there
            assert not partial
        self.there.pop(name, None)
        assert not (self.store / ".partial" / name).exists()

    @rule(name=st.sampled_from(NAMES), keep=st.integers(0, 2500))
    def tear(self, name: str, keep: int) -> None:
        """A machine that lost its power: the beginning that a pull left is shorter than it was."""
        data = self.store / ".partial" / name / "data"
        if data.exists() and data.stat().st_size > keep:
            with data.open("r+b") as file:
                file.truncate(keep)

    @invariant()
    def what_is_there_is_whole(self) -> None:
        """Every byte of every model, and no other model, and no file that nobody knows."""
        assert [model.manifest.name for model in installed(self.store)] == sorted(self.there)
        for name, content in self.there.items():
            file = stored_file(name, self.store)
            assert file.read_bytes() == content
            verify(file)
        assert {path.stem for path in self.store.iterdir()} <= {*self.there, ".partial"}

    def teardown(self) -> None:
        self.stack.close()


@pytest.mark.hypothesis
def test_no_order_of_events_leaves_half_a_model(tmp_path: Path) -> None:
    """Pulls that break, servers that change, removals and lost power, in any order."""
    limits = settings(max_examples=30, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(lambda: StoreMachine(tmp_path), settings=limits)
