"""Outcome tables as a report reads them: which questions, and what the edge's and the cloud's answers were worth.

NAME.jsonl     a line for each question: {"query": "...", "edge": 0, "cloud": 1, "domain": "law", "score": 0.4};
               the last two may be left out, and without a score the shipped weights give one
NAME.parquet   one of the tables the weights are learned from (`router.outcomes.PAIRS`), or columns as above
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import numpy as np

from router.assess import Scored
from router.difficulty import Difficulty
from router.outcomes import PAIRS
from shared.errors import BadRequest

MAX_ROWS: Final = 200_000
MAX_LINE_BYTES: Final = 1 << 20
SUFFIXES: Final = (".jsonl", ".parquet")

Worth = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Row(msgspec.Struct, frozen=True):
    query: str
    edge: Worth
    cloud: Worth
    domain: str = ""
    score: Worth | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """`left_out`: how many rows are not among them, for their labels are broken."""

    name: str
    rows: list[Row]
    left_out: int = 0

    def scored(self, model: Difficulty) -> Scored:
        """With the table's own scores, where every row has one."""
        scores = [row.score for row in self.rows]
        given = [score for score in scores if score is not None]
        said = given if len(given) == len(scores) else model.score([row.query for row in self.rows])
        edge, cloud = (np.array([getattr(row, side) for row in self.rows], float) for side in ("edge", "cloud"))
        return Scored(self.name, edge, cloud, np.array(said, float), [row.domain for row in self.rows])


def read(path: Path) -> tuple[list[Table], list[str]]:
    """The tables in a folder, or the one in a file; and the names of the files that are none. Raises BadRequest naming
    the file and the line that is wrong, OSError."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    tables, others = list[Table](), list[str]()
    for file in files:
        table = _read(file) if file.suffix in SUFFIXES else None
        if table is not None:
            tables.append(table)
        elif file.suffix in SUFFIXES or file == path:
            others.append(file.name)
    if not tables:
        looked = ", ".join(others[:5]) or "no .jsonl and no .parquet file"
        raise BadRequest(f"no outcome table there ({looked})", param="outcomes")
    return tables, others


def _read(file: Path) -> Table | None:
    table = Table(file.stem, list(_lines(file))) if file.suffix == ".jsonl" else _parquet(file)
    if table is not None and not table.rows:
        raise BadRequest(f"{file.name}: no rows", param="outcomes")
    return table


def _lines(file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number in range(1, MAX_ROWS + 2):
            line = lines.readline(MAX_LINE_BYTES)
            if not line:
                return
            if number > MAX_ROWS or (len(line) == MAX_LINE_BYTES and not line.endswith(b"\n")):
                most = f"at most {MAX_ROWS} lines of {MAX_LINE_BYTES} bytes"
                raise BadRequest(f"{file.name}, line {number}: {most}", param="outcomes")
            if line.strip():
                yield _row(line, f"{file.name}, line {number}")


def _row(line: bytes, where: str) -> Row:
    try:
        return msgspec.json.decode(line, type=Row)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"{where}: {error}", param="outcomes") from error


def _parquet(file: Path) -> Table | None:
    """None if its columns are not known here."""
    try:
        import pyarrow.lib
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise BadRequest(f"{file.name}: parquet needs pyarrow: install causeway[train]", param="outcomes") from error
    try:
        opened = parquet.ParquetFile(file)
        if opened.metadata.num_rows > MAX_ROWS:
            raise BadRequest(f"{file.name}: at most {MAX_ROWS} rows", param="outcomes")
        sides = _sides(file.stem, opened.schema_arrow.names)
        if sides is None:
            return None
        wanted = [name for name in ("query", *sides, "domain", "score", "suspect") if name in opened.schema_arrow.names]
        columns = opened.read(columns=wanted).to_pydict()
    except pyarrow.lib.ArrowException as error:
        raise BadRequest(f"{file.name}: {error}", param="outcomes") from error
    return _columns(file, columns, sides)


def _sides(name: str, columns: list[str]) -> tuple[str, str] | None:
    """The columns of the edge and the cloud."""
    known = {pair.table: (pair.weak, pair.strong) for pair in PAIRS}
    sides = known.get(name, ("edge", "cloud"))
    return sides if {"query", *sides} <= set(columns) else None


def _columns(file: Path, columns: dict[str, list[Any]], sides: tuple[str, str]) -> Table:
    rows = list[Row]()
    names = {"query": "query", "edge": sides[0], "cloud": sides[1], "domain": "domain", "score": "score"}
    suspect = columns.get("suspect") or [False] * len(columns["query"])
    for number, broken in enumerate(suspect):
        if broken:
            continue
        values = {field: columns[name][number] for field, name in names.items() if name in columns}
        try:
            rows.append(msgspec.convert(values, Row, strict=False))
        except msgspec.ValidationError as error:
            raise BadRequest(f"{file.name}, row {number + 1}: {error}", param="outcomes") from error
    return Table(file.stem, rows, left_out=sum(map(bool, suspect)))
