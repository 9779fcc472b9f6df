"""Prompts of files on this disk, read exactly or refused with the line: text, CSV, JSON, JSONL and Parquet."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prd.errors import ConfigError
from prd.utils.arguments import shown, text_fault

BOMS = (  # the longer ones first, which begin as others do
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".parquet")
WITHOUT_COLUMNS = (".txt", ".json")
BATCH = 8192  # rows of a Parquet file at a time
KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


class CorpusError(ConfigError):
    """A corpus that cannot be used: absent, unreadable, without the column or split asked for, or without a prompt."""


def read_file(path: Path, *, column: str, split: str, source: str) -> Iterator[str | None]:
    """Yield the prompts of a file as they stand there, None or "" for an empty one.

    column  of a table; split: of a .json file of splits; source: the file as the user named it, for messages

    Raises CorpusError, with the line, for what is no text in UTF-8 (or in UTF-16 or UTF-32 with a byte order mark), a
    row with other fields than its header, and a value that is no text.
    """
    suffix = path.suffix.lower()
    if suffix == ".txt":
        for _, line in lines_of(path, CorpusError):
            yield line
    elif suffix == ".csv":
        yield from _read_csv(path, column, source)
    elif suffix == ".json":
        yield from _read_json(path, split, source)
    elif suffix == ".jsonl":
        yield from _read_jsonl(path, column, source)
    else:
        yield from _read_parquet(path, column, source)


def lines_of(path: Path, error: type[ConfigError]) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file, each with its number from 1 and its end as it stands there.

    A line ends with LF, CR or CRLF. Raises `error`, with the line, for one that is no text.
    """
    with path.open("rb") as stream:
        start = stream.read(4)
    encoding = next((name for bom, name in BOMS if start.startswith(bom)), "utf-8-sig")
    number = 0
    with path.open(encoding=encoding, errors="surrogateescape", newline="") as lines:
        while True:
            number += 1
            try:
                line = lines.readline()
                line.encode()
            except UnicodeError:
                name = "UTF-8" if encoding == "utf-8-sig" else encoding.upper()
                raise error(f"{path}, line {number}: is not {name}; save the file as UTF-8") from None
            if not line:
                return
            if "\0" in line:
                raise error(f"{path}, line {number}: holds a NUL character, which is no text; save the file as UTF-8")
            yield number, line


def check_column(column: str, columns: Sequence[str], source: str) -> None:
    """Raise CorpusError unless a table has one column of this name."""
    if column not in columns:
        other = next((sign for sign in (";", "\t") if len(columns) == 1 and sign in columns[0]), None)
        remedy = f"separate the columns by commas, not by {other!r}" if other else "name one of them"
        raise CorpusError(f"prompts.column={column!r}: {source} has the columns {list(columns)}; {remedy}")
    if list(columns).count(column) > 1:
        raise CorpusError(f"prompts.column={column!r}: {source} has {list(columns).count(column)} columns of this name")


def checked_text(value: Any, where: str) -> str | None:
    """Return a value that is text or null; CorpusError, which begins with `where`, for any other."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise CorpusError(f"{where}: holds {KINDS.get(type(value), type(value).__name__)}, not text")
    if fault := text_fault(value):
        raise CorpusError(f"{where}: {shown(value)} {fault}")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of JSON's pairs; ValueError for a key that it has twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a CSV file, each with the number of its first line; of blank ones an empty list.

    The first is the header. Raises CorpusError, with the line, for what is no CSV and for a row of another length.
    """
    rows = csv.reader((line for _, line in lines_of(path, CorpusError)), strict=True)
    width: int | None = None
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            remedy = "close every quote, and double those in a text"
            if "field limit" in str(error):
                remedy = f"a text has at most {csv.field_size_limit():,} characters; shorten it, or {remedy}"
            raise CorpusError(f"{path}, line {number}: is no CSV ({error}); {remedy}") from None
        if width is None:
            width = len(row)
        elif not any(field.strip() for field in row):
            row = []
        elif len(row) != width:
            raise CorpusError(
                f"{path}, line {number}: has {len(row)} fields, the header {width}; put prompts that hold a comma in "
                "quotes"
            )
        yield number, row


def _read_csv(path: Path, column: str, source: str) -> Iterator[str | None]:
    rows = csv_rows(path)
    _, header = next(rows, (0, None))
    if header is None:
        return
    check_column(column, header, source)
    for _, row in rows:
        yield row[header.index(column)] if row else None


def _read_json(path: Path, split: str, source: str) -> Iterator[str | None]:
    """A prompt library: a list of strings, or a mapping of splits to such lists."""
    text = "".join(line for _, line in lines_of(path, CorpusError))
    if not text.strip():
        return
    try:
        content = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"prompts.source={source!r}: is no JSON ({error}); correct it") from None
    if isinstance(content, dict):
        if split not in content:
            raise CorpusError(f"prompts.split={split!r}: {source} has the splits {sorted(content)}")
        content = content[split]
    elif split != "train":
        raise CorpusError(f"prompts.split={split!r}: {source} is one list without splits; leave it 'train'")
    if not isinstance(content, list):
        raise CorpusError(
            f"prompts.source={source!r}: must hold a list of strings, or a mapping of splits to such lists"
        )
    for place, value in enumerate(content, start=1):
        yield checked_text(value, f"prompts.source={source!r}: must hold a list of strings; entry {place}")


def _read_jsonl(path: Path, column: str, source: str) -> Iterator[str | None]:
    for number, line in lines_of(path, CorpusError):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise CorpusError(
                f"{path}, line {number}: is no JSON object ({error}); write one object per line"
            ) from None
        if not isinstance(row, dict):
            raise CorpusError(f"{path}, line {number}: is no JSON object; write one per line, as {{{column!r}: ...}}")
        check_column(column, list(row), f"{source}, line {number}")
        yield checked_text(row[column], f"prompts.column={column!r}: {source}, line {number}")


def _read_parquet(path: Path, column: str, source: str) -> Iterator[str | None]:
    import pyarrow.parquet as pq

    if not path.stat().st_size:
        return
    with pq.ParquetFile(path) as table:
        check_column(column, table.schema_arrow.names, source)
        number = 0
        for batch in table.iter_batches(BATCH, columns=[column]):
            for value in texts_of(batch.column(batch.schema.names.index(column)), column, source):
                number += 1
                yield checked_text(value, f"prompts.column={column!r}: {source}, row {number}")


def texts_of(values: Any, column: str, source: str) -> list[str | None]:
    """Return the texts of a column of Arrow, plain or by dictionary; CorpusError for one of another type."""
    import pyarrow as pa

    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise CorpusError(f"prompts.column={column!r}: holds {values.type} in {source}, not text")
    return values.to_pylist()
