"""The prompts of `prd generate --prompts`: of a file, of standard input, or of a set that has a name."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from prd.data.prompts import SETS
from prd.data.text_files import SUFFIXES, CorpusError, read_file
from prd.evaluation.inputs import prompt_set
from prd.utils.arguments import expanded_path, prompt_fault, shown
from prd.utils.processes import number_of_processes

STANDARD_INPUT = "-"


def read_prompts(source: str, column: str, split: str) -> list[str]:
    """Return the prompts of a source in their order, repetitions kept, empty ones left out.

    source  a file ending in one of `SUFFIXES`, "-" (lines of standard input), "pig64" or "animal2400"
    column  of a table; split: of a .json file of splits, or of a named set

    Raises CorpusError for what is none of these or cannot be read, and where there is no prompt.
    """
    prompts: Iterable[str | None]
    if source == STANDARD_INPUT:
        prompts = _lines_of_input()
    elif source in SETS:
        prompts = prompt_set(source, split=None if split == "train" else split)
    else:
        path = expanded_path(source, "prompts")
        if not path.is_file():
            names = ", ".join(SETS)
            raise CorpusError(f"prompts={source!r}: no such file; give one, - for standard input, or one of {names}")
        if path.suffix.lower() not in SUFFIXES:
            raise CorpusError(f"prompts={source!r}: unknown suffix; must end in {', '.join(SUFFIXES)}")
        prompts = read_file(path, column=column, split=split, source=source)
    found = [text.strip() for text in prompts if text and text.strip()]
    if not found:
        raise CorpusError(f"prompts={source!r}: holds no prompt; give at least one")
    for number, text in enumerate(found, start=1):
        if fault := prompt_fault(text):
            raise CorpusError(f"prompts={source!r}: prompt {number}, {shown(text)}, {fault}")
    return found


def _lines_of_input() -> Iterable[str]:
    if number_of_processes() > 1:
        raise CorpusError("prompts='-': several processes cannot share standard input; give a file")
    stream: Any = sys.stdin
    if stream is None:
        raise CorpusError("prompts='-': there is no standard input; give a file")
    for number, line in enumerate(getattr(stream, "buffer", stream), start=1):
        if isinstance(line, str):
            yield line
            continue
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise CorpusError(f"prompts='-': line {number} is not UTF-8; give the lines as UTF-8") from None
