import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.embedder import Embedder
from edge_agent.embedding import model as model_module
from edge_agent.embedding.model import BATCH_TOKENS, EmbeddingModel, batches
from shared.embeddings import EmbeddingRequest
from shared.errors import BadRequest, ContextTooLong, Overloaded, UnknownModel
from shared.gguf import ModelInvalid


def asked(*inputs: Any, dimensions: int | None = None) -> EmbeddingRequest:
    return EmbeddingRequest(id="r", model="tiny", inputs=inputs, dimensions=dimensions)


@pytest.fixture
async def embedder(tiny_file: Path) -> AsyncIterator[Embedder]:
    one = Embedder(tiny_file, queue=4)
    yield one
    await one.aclose()


async def test_vectors_come_in_order_and_of_length_one(embedder: Embedder) -> None:
    """Texts of many lengths, in batches: each has the vector that it has alone."""
    texts = [
        " ".join(["the", "sky", "egg", "berlin"][: 1 + at % 4] * (1 + at % 5)) + " abc"[at % 4 :] for at in range(150)
    ]
    vectors = await embedder.embed(texts)
    assert vectors.shape == (150, 32)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for at in range(0, 150, 29):
        np.testing.assert_allclose((await embedder.embed([texts[at]]))[0], vectors[at], atol=1e-5)


async def test_tokens_and_their_text_are_the_same_input(embedder: Embedder) -> None:
    """An input may be its tokens; both kinds are counted."""
    made = await embedder(asked("the sky", (2, 4, 6, 3)))
    assert made.vectors[0] == pytest.approx(made.vectors[1], abs=1e-6)
    assert made.prompt_tokens == 8


async def test_dimensions_cut_and_keep_the_length(embedder: Embedder) -> None:
    """The first numbers, of length 1 again; more than there are is an error by the field's name."""
    whole, short = await embedder(asked("the sky")), await embedder(asked("the sky", dimensions=5))
    first = np.array(whole.vectors[0][:5])
    assert short.vectors[0] == pytest.approx(first / np.linalg.norm(first), abs=1e-6)
    with pytest.raises(BadRequest) as caught:
        await embedder(asked("the sky", dimensions=33))
    assert caught.value.param == "dimensions"


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ("the " * 23, ContextTooLong),
        (" " * 9999, ContextTooLong),
        ((2,) * 25, ContextTooLong),
        ((9999,), BadRequest),
    ],
)
async def test_nothing_is_cut_silently(embedder: Embedder, bad: Any, error: type[BadRequest]) -> None:
    """The 71st input is too long: refused by its place, and the next request is served."""
    inputs = ("the",) * 70 + (bad,)
    if isinstance(bad, tuple):
        inputs = ((2, 3),) * 70 + (bad,)
    with pytest.raises(error) as caught:
        await embedder(asked(*inputs))
    assert caught.value.param == "input[70]"
    assert (await embedder(asked("the"))).prompt_tokens == 3


async def test_a_model_that_is_not_there_says_how_to_get_it(tmp_path: Path, tiny_file: Path) -> None:
    """Once it is pulled, the same embedder serves it, without a restart."""
    embedder = Embedder.named("all-minilm", tmp_path)
    file = tmp_path / "all-minilm.onnx"
    assert embedder.model_card() is None
    with pytest.raises(UnknownModel, match="edge-agent pull all-minilm") as caught:
        await embedder.embed(["x"])
    assert caught.value.param == "model"
    shutil.copy(tiny_file, file)
    assert len(await embedder.embed(["x"])) == 1
    card = embedder.model_card()
    assert card is not None
    assert (card.id, card.context_length) == ("all-minilm", 24)
    await embedder.aclose()


def damaged(whole: Path, content: bytes | str, file: Path) -> Path:
    graph = onnx.load(whole)
    del graph.metadata_props[:]
    kinds = {"half": whole.read_bytes()[: whole.stat().st_size // 2], "no tokenizer": graph.SerializeToString()}
    file.write_bytes(kinds[content] if isinstance(content, str) else content)
    return file


@pytest.mark.parametrize("content", [b"", b"garbage", "half", "no tokenizer"])
async def test_a_damaged_file_is_a_typed_error(tmp_path: Path, tiny_file: Path, content: bytes | str) -> None:
    """Not a crash, and not a thread that died: each request hears of it."""
    embedder = Embedder(damaged(tiny_file, content, tmp_path / "broken.onnx"))
    for _ in range(2):
        with pytest.raises(ModelInvalid, match=r"broken\.onnx"):
            await embedder.embed(["x"])
    await embedder.aclose()


class Held:
    """Stands before the model's products: each waits for `let_go`, and is counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.count, self._release = threading.Event(), 0, threading.Event()
        compute: Callable[..., Any] = EmbeddingModel.compute

        def held(model: EmbeddingModel, ids: Any) -> Any:
            self.count += 1
            self.began.set()
            assert self._release.wait(60)
            return compute(model, ids)

        monkeypatch.setattr(EmbeddingModel, "compute", held)

    def let_go(self) -> None:
        self._release.set()


async def test_whoever_leaves_is_not_computed_further(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled in its first of many batches: no second one runs, and its place is free."""
    monkeypatch.setattr(model_module, "BATCH_TOKENS", 4)
    held = Held(monkeypatch)
    long = asyncio.create_task(embedder.embed(["the sky"] * 50))
    await asyncio.to_thread(held.began.wait, 60)
    long.cancel()
    with pytest.raises(asyncio.CancelledError):
        await long
    held.let_go()
    await embedder.embed(["an egg"])
    assert held.count == 2


async def test_a_short_request_waits_for_one_batch_of_a_long_one(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests take turns, batch by batch."""
    monkeypatch.setattr(model_module, "BATCH_TOKENS", 4)
    held = Held(monkeypatch)
    long = asyncio.create_task(embedder.embed(["the sky"] * 50))
    await asyncio.to_thread(held.began.wait, 60)
    short = asyncio.create_task(embedder.embed(["an egg"]))
    await asyncio.sleep(0)
    held.let_go()
    await short
    assert not long.done()
    assert held.count < 10
    assert len(await long) == 50


async def test_more_than_the_queue_holds_is_refused(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fifth of four: 503 with a time to come back, and the four are served."""
    held = Held(monkeypatch)
    four = [asyncio.create_task(embedder.embed([f"the sky {at}"])) for at in range(4)]
    await asyncio.to_thread(held.began.wait, 60)
    with pytest.raises(Overloaded) as caught:
        await embedder.embed(["one more"])
    assert caught.value.retry_after
    held.let_go()
    assert [len(vectors) for vectors in await asyncio.gather(*four)] == [1] * 4


async def test_closed_under_load_everybody_gets_an_answer_or_an_error(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is left hanging, and the thread is gone."""
    monkeypatch.setattr(model_module, "BATCH_TOKENS", 4)
    held = Held(monkeypatch)
    long = asyncio.create_task(embedder.embed(["the sky"] * 50))
    await asyncio.to_thread(held.began.wait, 60)
    closing = asyncio.create_task(embedder.aclose())
    await asyncio.sleep(0)
    held.let_go()
    await closing
    with pytest.raises(Overloaded):
        await long
    with pytest.raises(Overloaded):
        await embedder.embed(["x"])


async def test_an_idle_model_is_unloaded_and_comes_back(tiny_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some time after its last answer, and never while somebody waits; the next request loads it again."""
    embedder = Embedder(tiny_file, keep_s=0.02)
    before = await embedder.embed(["the sky"])
    async with asyncio.timeout(60):
        while embedder.loaded:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    held = Held(monkeypatch)
    again = asyncio.create_task(embedder.embed(["the sky"]))
    await asyncio.to_thread(held.began.wait, 60)
    await asyncio.sleep(0.1)
    assert embedder.loaded
    held.let_go()
    np.testing.assert_array_equal(await again, before)
    await embedder.aclose()


@given(st.lists(st.integers(1, BATCH_TOKENS), max_size=60))
def test_batches_hold_every_text_once_and_no_more_than_fits(lengths: list[int]) -> None:
    """For any lengths."""
    made = list(batches(lengths))
    assert sorted(at for batch in made for at in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[at] for at in batch) <= BATCH_TOKENS for batch in made)
