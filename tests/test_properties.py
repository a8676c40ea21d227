"""How properties are searched: the same examples at every run, and other ones only where somebody asks for them."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DRAWN = """
import json
from hypothesis import given, settings
from hypothesis import strategies as st
{first}
drawn = []

@settings(max_examples=30)
@given(st.integers(), st.text(), st.sets(st.sampled_from("abcd")))
def test_one(number, text, letters):
    drawn.append(repr((number, text, sorted(letters))))

@given(st.integers(0, 1000))
def test_two(value):
    drawn.append(repr(value))

def test_told(request):
    request.config.rootpath.joinpath("drawn.json").write_text(json.dumps(drawn))
"""


def drawn(folder: Path, *options: str, first: str = "", seed: str = "1") -> list[str]:
    folder.mkdir()
    (folder / "test_drawn.py").write_text(DRAWN.format(first=first))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider", *options]
    subprocess.run(
        [*command, "-c", ROOT / "pyproject.toml", "--rootdir", folder, folder / "test_drawn.py"],
        cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    return list(json.loads((folder / "drawn.json").read_text()))


def test_every_run_tries_the_same_and_a_deep_search_more(tmp_path: Path) -> None:
    """Another process, other hashes and more modules of ours loaded before it change no example. `--deep 3` takes three
    times as many, where their number is stated and where it is not, by a seed of its own."""
    one = drawn(tmp_path / "one")
    two = drawn(tmp_path / "two", first="import router.policy, shared.frames", seed="2")
    deep = drawn(tmp_path / "deep", "--deep", "3")

    assert len(one) == 130
    assert one == two
    assert len(deep) == 3 * 130
    assert deep[:30] != one[:30]
