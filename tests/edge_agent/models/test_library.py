"""Several models behind one door: loaded when asked for, shared, kept while they work, gone when nobody wants them."""

import asyncio
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from edge_sides import HERE, Local
from edge_sides import ask as request
from fakes import ScriptedAnswer
from model_origin import model_bytes
from waiting import HANG_S, until

from edge_agent.backends.llama import LlamaBackend
from edge_agent.errors import ModelBusy, NotEnoughMemory
from edge_agent.models.installed import remove
from edge_agent.models.library import Library
from edge_agent.models.memory import OVERHEAD_BYTES, Memory, machine_memory
from edge_agent.models.pull import pull
from edge_agent.models.residents import Rules
from shared.errors import CausewayError, Overloaded, UnknownModel, UpstreamFailed
from shared.gguf import ModelInvalid
from shared.models import stored_file
from shared.schemas import ChatRequest, Delta, Sampling

ONE = OVERHEAD_BYTES + (1 << 20)
"""What a tiny model takes, and a little more."""
MIDNIGHT = datetime(2030, 1, 1, tzinfo=UTC)


class Model(Local):
    """A backend that can be loaded; `gate` holds the load up, `fault` breaks it."""

    def __init__(self, path: Path, shelf: "Shelf") -> None:
        super().__init__(ScriptedAnswer(HERE[0], shelf.pause, *HERE[1:]))
        self.path, self.shelf = path, shelf
        shelf.made.append(path.stem)

    async def start(self) -> None:
        self.shelf.loading.set()
        await self.shelf.gate.wait()
        if self.shelf.fault is not None:
            raise self.shelf.fault
        self.shelf.alive.append(self.path.stem)
        assert len(self.shelf.alive) <= self.shelf.fit, "more are loaded than memory holds"

    async def aclose(self) -> None:
        if self.path.stem in self.shelf.alive:
            self.shelf.alive.remove(self.path.stem)


class Shelf:
    """A store with the models `default`, `a`, `b` and `c`, memory for `fit` of them, and a clock set by hand."""

    def __init__(self, folder: Path, fit: int) -> None:
        self.store, self.fit, self.now = folder / "store", fit, 0.0
        self.made: list[str] = []
        self.alive: list[str] = []
        self.fault: Exception | None = None
        self.gate, self.loading, self.pause = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.gate.set()
        self.pause.set()
        for at, name in enumerate(("default", "a", "b", "c")):
            path = folder / f"{name}.gguf"
            path.write_bytes(model_bytes(100 + at))
            pull(str(path), store=self.store, told=lambda step: None)

    def library(self, rules: Rules | None = None) -> Library:
        return Library(
            stored_file("default", self.store),
            self.store,
            lambda path, _: Model(path, self),
            memory=Memory(total=100 * ONE, available=lambda: 100 * ONE, limit=self.fit * ONE),
            rules=rules or Rules(slots=1, queue=2),
            clock=lambda: self.now,
            wall_clock=lambda: MIDNIGHT + timedelta(seconds=self.now),
        )


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path, fit=2)


async def ask(library: Library, model: str) -> list[Delta]:
    async with aclosing(library.answer(request(model=model))) as deltas:
        return [delta async for delta in deltas]


def short(model: str) -> ChatRequest:
    return ChatRequest(id="r", model=model, prompt="One two three", sampling=Sampling(temperature=0, max_tokens=3))


async def begun(library: Library, model: str) -> "asyncio.Task[list[Delta]]":
    """A request that is being answered, and is held there by `pause`."""
    task = asyncio.create_task(ask(library, model))
    await until(lambda: any(found.name == model and found.loaded_at and found.running for found in library.loaded()))
    return task


async def test_a_model_is_loaded_at_its_first_request_and_shared(shelf: Shelf) -> None:
    """Five at once share one load, and later ones find it there; a name of nobody's means the default."""
    library = shelf.library(Rules(slots=2, queue=3))
    await library.start()

    answers = await asyncio.gather(*(ask(library, "a") for _ in range(5)))
    for name in ("a", "auto", "edge", "gone-to-the-cloud"):
        await ask(library, name)

    assert answers == [list(HERE)] * 5
    assert shelf.made == ["default", "a"]
    assert [found.name for found in library.loaded()] == ["a", "default"]
    await library.aclose()
    assert shelf.alive == []


async def test_what_is_idle_is_unloaded_and_the_default_stays(shelf: Shelf) -> None:
    """After `keep_s`, counted from its last answer; what is still answering stays too."""
    library = shelf.library(Rules(keep_s=60))
    await library.start()
    await ask(library, "a")
    assert library.loaded()[0].expires_at == MIDNIGHT + timedelta(seconds=60)
    shelf.now = 59
    await library.expire()
    assert shelf.alive == ["default", "a"]
    shelf.pause.clear()
    answering = await begun(library, "a")
    shelf.now = 1000
    await library.expire()
    assert shelf.alive == ["default", "a"]
    shelf.pause.set()
    await answering
    await library.expire()
    assert shelf.alive == ["default", "a"]

    shelf.now = 1060
    await library.expire()

    assert shelf.alive == ["default"]
    await library.aclose()


@pytest.mark.parametrize("seconds", [0.0, 10.0, None])
async def test_a_request_can_say_how_long_its_model_stays(shelf: Shelf, seconds: float | None) -> None:
    """Before it is loaded or after; the next load knows nothing of it."""
    library = shelf.library(Rules(keep_s=60))
    library.keep("a", seconds)
    library.keep("../nobody", seconds)
    await ask(library, "a")
    shelf.now = 10
    await library.expire()
    assert shelf.alive == ([] if seconds is not None else ["a"])
    library.keep("a", 5)
    await ask(library, "a")
    shelf.now = 15
    await library.expire()

    assert shelf.alive == []
    await ask(library, "a")
    assert library.loaded()[0].expires_at == MIDNIGHT + timedelta(seconds=15 + 60)
    await library.aclose()


async def test_the_watch_unloads_by_itself(shelf: Shelf) -> None:
    """As soon as it is due, without being asked."""
    library = shelf.library(Rules(keep_s=0))
    watching = asyncio.create_task(library.watch())

    await ask(library, "a")
    await until(lambda: not shelf.alive)

    assert shelf.made == ["a"]
    watching.cancel()
    await library.aclose()


async def test_the_least_recently_used_makes_room(shelf: Shelf) -> None:
    """Memory for two: the third takes the place of the one that was used longest ago."""
    library = shelf.library()
    for now, name in enumerate(("a", "b", "a", "c")):
        shelf.now = now
        await ask(library, name)

    assert sorted(shelf.alive) == ["a", "c"]
    await library.aclose()


async def test_what_answers_is_never_evicted(shelf: Shelf) -> None:
    """A third model is refused while both others answer, typed and with a time to come back; afterwards it fits."""
    library = shelf.library()
    shelf.pause.clear()
    answers = [await begun(library, "a"), await begun(library, "b")]

    with pytest.raises(Overloaded) as raised:
        await ask(library, "c")
    shelf.pause.set()

    assert raised.value.retry_after
    assert await asyncio.gather(*answers) == [list(HERE)] * 2
    assert await ask(library, "c") == list(HERE)
    await library.aclose()


async def test_what_can_never_fit_evicts_nobody(tmp_path: Path) -> None:
    """It is refused by name, with the numbers, and costs nobody else anything."""
    shelf = Shelf(tmp_path, fit=2)
    library = shelf.library()
    await ask(library, "a")
    stored_file("b", shelf.store).with_suffix(".json").unlink()
    big = tmp_path / "b.gguf"
    big.write_bytes(model_bytes(2 * ONE // 100))
    pull(str(big), store=shelf.store, told=lambda step: None)
    library._memory = Memory(total=100 * ONE, available=lambda: 100 * ONE, limit=ONE)

    with pytest.raises(NotEnoughMemory, match=r"b needs 0\.2 GB"):
        await ask(library, "b")

    assert shelf.alive == ["a"]
    await library.aclose()


async def test_a_load_that_fails_is_its_own_requests_error(shelf: Shelf) -> None:
    """All that waited for it get it, typed; the model beside it answers on; the next request tries again."""
    library = shelf.library()
    await ask(library, "a")
    for fault, error in ((ModelInvalid("broken"), ModelInvalid), (RuntimeError("x"), UpstreamFailed)):
        shelf.fault = fault
        failed = await asyncio.gather(ask(library, "b"), ask(library, "b"), return_exceptions=True)
        assert [type(result) for result in failed] == [error, error]
        assert await ask(library, "a") == list(HERE)
    shelf.fault = None

    assert await ask(library, "b") == list(HERE)
    assert shelf.made == ["a", "b", "b", "b"]
    await library.aclose()


async def test_who_leaves_while_it_loads_leaves_it_to_the_others(shelf: Shelf) -> None:
    """One of two goes away: the load goes on. Too many waiting are refused."""
    library = shelf.library(Rules(slots=1, queue=1))
    shelf.gate.clear()
    leaving, staying = asyncio.create_task(ask(library, "a")), asyncio.create_task(ask(library, "a"))
    await asyncio.wait_for(shelf.loading.wait(), HANG_S)
    with pytest.raises(Overloaded, match="wait"):
        await ask(library, "a")
    leaving.cancel()
    await asyncio.wait((leaving,))
    shelf.gate.set()

    assert leaving.cancelled()
    assert await staying == list(HERE)
    assert shelf.made == ["a"]
    await library.aclose()


async def test_a_stopped_model_ends_its_answers_first(shelf: Shelf) -> None:
    """Idle it is gone at once; answering, after the last one; what is not there is said."""
    library = shelf.library()
    shelf.pause.clear()
    answering = await begun(library, "a")

    assert await library.stop("a") is False
    shelf.pause.set()
    assert await answering == list(HERE)
    assert await library.stop("a") is True
    with pytest.raises(UnknownModel, match="not loaded"):
        await library.stop("a")
    await library.aclose()


async def test_a_stopped_default_comes_back_when_asked(shelf: Shelf) -> None:
    """And counts as available in between: its next request loads it."""
    library = shelf.library()
    await library.start()
    await library.stop("default")
    assert library.loaded() == []
    assert library.reading().available

    await ask(library, "auto")

    assert shelf.made == ["default", "default"]
    await library.aclose()


async def test_looking_loads_nothing(shelf: Shelf) -> None:
    """Readings, cards, and a token count by whoever only decides; a count that is asked for does load."""
    library = shelf.library()

    view = library.named("a")
    assert (view.model_card().id, view.model_card().context_length) == ("a", 64)
    assert (view.reading().available, view.reading().queue_depth, view.reading().slots) == (True, 0, 1)
    assert [card.id for card in library.model_cards()] == ["default", "a", "b", "c"]
    assert library.named("auto").model_card().id == library.named("nobody").model_card().id == "default"
    with pytest.raises(Overloaded):
        await view.count_tokens(request(model="a"))
    assert shelf.made == []

    assert await library.count_tokens(request(model="a")) == 5
    assert await library.named("a").count_tokens(request(model="a")) == 5
    await library.aclose()


async def test_a_loaded_model_cannot_be_removed(shelf: Shelf) -> None:
    """Until it is unloaded; by force it answers on from the file that has no name any more."""
    library = shelf.library()
    await ask(library, "a")

    with pytest.raises(ModelBusy):
        remove("a", store=shelf.store)
    await library.stop("a")
    remove("a", store=shelf.store)

    assert library.named("a").model_card().id == "default"
    await library.aclose()


@pytest.mark.parametrize("name", ["default", "a"])
async def test_a_model_is_known_by_the_bytes_that_answer(shelf: Shelf, name: str, tmp_path: Path) -> None:
    """Pulled anew while it is loaded, it bears the old file's digest until it is loaded again: caches go by that."""
    library = shelf.library()
    await ask(library, name)
    before = library.named(name).model_card().digest
    path = tmp_path / f"{name}.gguf"
    path.write_bytes(model_bytes(500))
    fresh = pull(str(path), store=shelf.store, told=lambda step: None, again=True).manifest.sha256
    loaded = library.named(name).model_card().digest
    await library.stop(name)
    absent = library.named(name).model_card().digest
    await ask(library, name)

    assert before not in ("", fresh)
    assert (loaded, absent, library.named(name).model_card().digest) == (before, fresh, fresh)
    await library.aclose()


async def test_a_file_that_changed_on_disk_is_not_loaded(shelf: Shelf) -> None:
    """S-10: its manifest vouches for other bytes; native code never sees it."""
    library = shelf.library()
    file = stored_file("a", shelf.store)
    file.write_bytes(file.read_bytes()[:-1] + b"x")

    with pytest.raises(ModelInvalid, match="not what was pulled"):
        await ask(library, "a")

    assert shelf.made == []
    await library.aclose()


async def test_closing_ends_what_waits(shelf: Shelf) -> None:
    """A load under way is given up, its requests get a typed error, and nothing new is let in."""
    library = shelf.library()
    shelf.gate.clear()
    waiting = asyncio.create_task(ask(library, "a"))
    await asyncio.wait_for(shelf.loading.wait(), HANG_S)

    await library.aclose()
    await library.aclose()

    with pytest.raises(CausewayError, match="stopping"):
        await waiting
    with pytest.raises(Overloaded, match="stopping"):
        await ask(library, "b")
    assert shelf.alive == []


@pytest.mark.model
async def test_two_real_models_side_by_side(model_path: Path, tmp_path: Path) -> None:
    """The same weights under two names, each with a runtime of its own: both answer, one is unloaded."""
    store = tmp_path / "store"
    for name in ("one", "two"):
        pull(str(model_path), store=store, told=lambda step: None, name=name)
    library = Library(
        stored_file("one", store),
        store,
        lambda path, slots: LlamaBackend(path, slots=slots, context=256, threads=1),
        memory=machine_memory(None),
        rules=Rules(slots=1, context=256),
    )
    await library.start()
    asked = short("two")

    text = "".join([delta.text async for delta in library.answer(asked)])

    assert text
    assert [(found.name, found.context_length) for found in library.loaded()] == [("one", 256), ("two", 256)]
    assert await library.stop("two")
    assert "".join([delta.text async for delta in library.answer(short("auto"))]) == text
    await library.aclose()
