"""router.tables: outcome tables as somebody hands them in."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest

from router.difficulty import shipped_difficulty
from router.tables import read
from shared.errors import BadRequest

ROW = {"query": "Why is the sky blue?", "edge": 0, "cloud": 1, "domain": "physics"}


def lines(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def write(path: Path, **columns: list[object]) -> Path:
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_lines_and_columns_say_the_same(tmp_path: Path) -> None:
    """A table is the same in either form, and a folder gives all of its tables by name."""
    lines(tmp_path / "one.jsonl", ROW, "", {**ROW, "score": 0.5})
    write(tmp_path / "two.parquet", query=[ROW["query"]] * 2, edge=[0, 0], cloud=[1.0, 1.0], domain=["physics"] * 2)

    (one, two), others = read(tmp_path)

    assert (one.name, two.name, others) == ("one", "two", [])
    assert [(row.query, row.edge, row.cloud, row.domain) for row in one.rows] == [tuple(ROW.values())] * 2
    assert [row.score for row in two.rows] == [None, None]
    assert two.rows[0] == one.rows[0]


def test_the_tables_of_training_are_known_by_name(tmp_path: Path) -> None:
    """Their columns have other names, and their broken rows are left out, and counted."""
    names = {"weak_score": [0.0, 1.0], "strong_score": [1.0, 1.0], "suspect": [False, True]}
    write(tmp_path / "routellm_mmlu.parquet", query=["a", "b"], domain=["x", "y"], **names)
    write(tmp_path / "other.parquet", query=["a"], rating=[3])
    (tmp_path / "notes.txt").write_text("nothing")

    (table,), others = read(tmp_path)

    assert [(row.query, row.edge, row.cloud) for row in table.rows] == [("a", 0, 1)]
    assert (table.left_out, others) == (1, ["other.parquet"])


def test_own_scores_are_used_where_every_row_has_one(tmp_path: Path) -> None:
    """Else all of them are the weights'."""
    (own, mixed), _ = read_two(tmp_path)

    assert own.scored(shipped_difficulty()).score.tolist() == [0.25, 0.75]
    assert mixed.scored(shipped_difficulty()).score.tolist() == shipped_difficulty().score([ROW["query"]] * 2)


def read_two(folder: Path):
    lines(folder / "a.jsonl", {**ROW, "score": 0.25}, {**ROW, "score": 0.75})
    lines(folder / "b.jsonl", {**ROW, "score": 0.25}, ROW)
    return read(folder)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{", "t.jsonl, line 2: "),
        ({**ROW, "edge": 1.5}, "t.jsonl, line 2: "),
        ({"query": "a", "edge": 1}, "t.jsonl, line 2: .*cloud"),
        ({**ROW, "score": "NaN"}, "t.jsonl, line 2: .*score"),
        ("[" * 5000, "t.jsonl, line 2: "),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: object, said: str) -> None:
    """The file, the line and what is wrong with it."""
    with pytest.raises(BadRequest, match=said) as raised:
        read(lines(tmp_path / "t.jsonl", ROW, bad))
    assert raised.value.param == "outcomes"


def test_what_is_no_table_is_named(tmp_path: Path) -> None:
    """Nothing there, nothing in it, not what its name says, numbers that are none."""
    for name, content in (("e.jsonl", b""), ("x.parquet", b"PAR1 no"), ("x.csv", b"a,b")):
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(BadRequest, match=name):
            read(file)
        file.unlink()
    with pytest.raises(BadRequest, match=r"no \.jsonl and no \.parquet file"):
        read(tmp_path)
    broken = write(tmp_path / "n.parquet", query=["a"], edge=[float("nan")], cloud=[1.0])
    with pytest.raises(BadRequest, match=r"n\.parquet, row 1"):
        read(broken)
