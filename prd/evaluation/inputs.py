"""Meshes or pictures of anyone's in a folder, with the captions that a table beside them gives: what is evaluated.

`captions.csv` (columns `file` and `caption`) or `captions.jsonl` (objects with these keys) lists each mesh, each folder
of pictures, or each picture (those of one caption are its views). A caption is never guessed from a file's name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prd.data.compositional import animal2400, pig64
from prd.data.prompt_files import stored_prompts
from prd.data.prompts import PromptsConfig
from prd.data.text_files import CorpusError, csv_rows, lines_of, unique_keys
from prd.errors import ConfigError
from prd.meshes.files import SUFFIXES
from prd.utils.arguments import expanded_path, prompt_fault, shown

TABLES = ("captions.csv", "captions.jsonl")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
REFERENCED = re.compile(rb"^\s*(?:mtllib|map_\w+)\s+(.+?)\s*$", re.MULTILINE)  # of .obj and .mtl
SETS = {"pig64": pig64, "animal2400": animal2400}


class InputError(ConfigError):
    """A folder, table or set of prompts that cannot be evaluated as a whole."""


@dataclass(frozen=True)
class Item:
    """One caption and what was made of it.

    file      as the table names it
    mesh      the mesh's path, None for pictures
    pictures  paths in the order of the views, empty for a mesh
    fault     what was said of it before it could be read, as by a generator that made no mesh; None: nothing
    """

    file: str
    caption: str
    mesh: Path | None = None
    pictures: tuple[Path, ...] = ()
    fault: str | None = None

    def digest(self) -> str:
        """SHA-256 of the files it consists of, and of those that they name; of their names where they are not there."""
        digest = hashlib.sha256()
        for path in self.pictures or ([self.mesh, *_named_by(self.mesh)] if self.mesh else []):
            digest.update(f"{path.suffix.lower()} ".encode())
            if path.is_file():
                with path.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
        if self.fault is not None or not (self.pictures or self.mesh):
            digest.update(f"{self.file} {self.fault}".encode(errors="replace"))
        return digest.hexdigest()


def read_items(folder: str | Path) -> list[Item]:
    """Read the table of a folder, in its order; InputError names what is wrong with it.

    Refused are a folder without a table or with two, a table without rows, a row without file or caption, a file that
    is listed twice and a mesh that is not listed. A file that is not there stays: it is a row that failed.
    """
    folder = expanded_path(folder, "folder")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give one with meshes and {TABLES[0]} (columns file, caption)")
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(tables) != 1:
        has = "has no captions.csv" if not tables else f"has both {' and '.join(TABLES)}"
        raise InputError(
            f"{folder}: {has}; write one table with the columns file and caption (captions are not guessed from names)"
        )
    rows = list(_rows(tables[0]))
    if not rows:
        raise InputError(f"{tables[0]}: is empty; write a row (file, caption) for each mesh")
    seen: dict[str, int] = {}
    for line, file, caption in rows:
        where = f"{tables[0]}, line {line}"
        if not file.strip() or "\0" in file:
            raise InputError(f"{where}: names no file; write its name relative to the folder")
        if fault := prompt_fault(caption):
            raise InputError(f"{where}: the caption of {file} {fault}")
        place = os.path.normpath(file)
        if place in seen:
            raise InputError(f"{where}: {file} is listed twice (before in line {seen[place]}); keep one of the rows")
        seen[place] = line
    listed = {(folder / file).resolve() for _, file, _ in rows}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file() and path.resolve() not in listed:
            raise InputError(
                f"{tables[0]}: {path.relative_to(folder)} has no caption; add a row for it or move it elsewhere"
            )
    return list(_items(folder, rows))


def _items(folder: Path, rows: Sequence[tuple[int, str, str]]) -> Iterator[Item]:
    single: dict[str, list[tuple[str, Path]]] = {}
    for _, file, caption in rows:
        path = folder / file
        if path.suffix.lower() in PICTURES:
            single.setdefault(caption, []).append((file, path))
    for _, file, caption in rows:
        path = folder / file
        if path.suffix.lower() in PICTURES:
            if caption in single:
                views = single.pop(caption)
                yield Item(views[0][0], caption, pictures=tuple(view for _, view in views))
        elif path.is_dir():
            views_of = sorted((p for p in path.iterdir() if p.suffix.lower() in PICTURES), key=natural)
            fault = None if views_of else f"{file}: the folder holds no picture"
            yield Item(file, caption, pictures=tuple(views_of), fault=fault)
        else:
            yield Item(file, caption, mesh=path)


def natural(path: Path) -> list[Any]:
    """Return a key that sorts view_2 before view_10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.name)]


def _rows(table: Path) -> Iterator[tuple[int, str, str]]:
    """Line, file and caption of each row; InputError, with the line, for what is none."""
    try:
        yield from _csv_rows(table) if table.suffix == ".csv" else _jsonl_rows(table)
    except CorpusError as error:
        raise InputError(str(error)) from None


def _csv_rows(table: Path) -> Iterator[tuple[int, str, str]]:
    rows = csv_rows(table)
    _, first = next(rows, (0, None))
    if first is None:
        return
    header = [name.strip() for name in first]
    for name in ("file", "caption"):
        if header.count(name) != 1:
            raise InputError(f"{table}: has the columns {header}; it needs one 'file' and one 'caption'")
    for number, row in rows:
        if row:
            yield number, row[header.index("file")].strip(), row[header.index("caption")].strip()


def _jsonl_rows(table: Path) -> Iterator[tuple[int, str, str]]:
    for number, line in lines_of(table, CorpusError):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=unique_keys)
            file, caption = row["file"], row["caption"]
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise InputError(
                f'{table}, line {number}: is no object {{"file": ..., "caption": ...}} ({error}); write one per line'
            ) from None
        if not isinstance(file, str) or not isinstance(caption, str):
            raise InputError(f"{table}, line {number}: file and caption must be text, are {file!r} and {caption!r}")
        yield number, file.strip(), caption.strip()


def check_captions(items: Sequence[Item], protocol: str) -> None:
    """Raise InputError for a caption given to two items, of which a protocol could not tell which is right."""
    seen: dict[str, str] = {}
    for item in items:
        if item.caption in seen:
            raise InputError(
                f"caption {shown(item.caption)}: is given to {seen[item.caption]} and to {item.file}; the protocol "
                f"{protocol} tells captions apart and needs each once"
            )
        seen[item.caption] = item.file


def prompt_set(name: str, *, split: str | None = None, column: str = "prompt") -> list[str]:
    """Return the prompts of a set by name ("pig64", "animal2400"), a file or a Hub dataset, in their order.

    split  of a named set "train", "unseen" or "test" (default: test, all of them); of others as `prompts.split`

    Raises CorpusError as `prd.data.prompts.load_corpus` does.
    """
    if name in SETS:
        splits = SETS[name]()
        if (split or "test") not in splits:
            raise CorpusError(f"split={split!r}: {name} has {', '.join(splits)}")
        return list(splits[split or "test"])
    return list(stored_prompts(PromptsConfig(source=name, split=split or "train", column=column)))


def _named_by(path: Path) -> list[Path]:
    """The files that an OBJ file names beside it: its materials and their pictures."""
    if path.suffix.lower() != ".obj" or not path.is_file():
        return []
    with path.open("rb") as stream:
        head = stream.read(1 << 16)
    materials = [path.parent / name.decode(errors="replace") for name in REFERENCED.findall(head)]
    found = [material for material in materials if material.is_file()]
    for material in list(found):
        names = REFERENCED.findall(material.read_bytes()[: 1 << 20])
        found += [path.parent / name.decode(errors="replace").split()[-1] for name in names]
    return [file for file in found if file.is_file()]
