"""Checks of what users give: integers, texts, places on the disk; the same sentence wherever one is wrong."""

from __future__ import annotations

import errno
import operator
import os
import re
from collections.abc import Sequence
from pathlib import Path

from prd.errors import ConfigError

MAX_SEED = 2**64 - 1  # of a torch.Generator
SHOWN = 80  # characters of a text that messages and previews show
VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([^\W\d]\w*))")


def is_bool(value: object) -> bool:
    """Return True for a truth value of Python, numpy or torch."""
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))


def integer(value: object) -> int | None:
    """Return an integer of Python, numpy or torch (0-d) as Python's; None for anything else, bools among it."""
    if is_bool(value):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):  # the second: of a tensor without data
        return None


def check_int(name: str, value: object, least: int, most: int | None = None, otherwise: str = "") -> int:
    """Return an integer in least..most as Python's; ValueError, ending in what else is allowed, for anything else."""
    found = integer(value)
    if found is not None and least <= found and (most is None or found <= most):
        return found
    allowed = f"of at least {least}" if most is None else f"in {least}..{most}"
    raise ConfigError(f"{name}={value!r}: must be an integer {allowed}{otherwise and f', {otherwise}'}")


def one_or_more(index: int | Sequence[int]) -> list[int]:
    """Return an index or several as a list."""
    one = integer(index)
    return list(index) if one is None else [one]  # type: ignore[arg-type]


def check_seed(name: str, value: object) -> int:
    """Return a seed as Python's integer; ValueError unless a torch.Generator takes it and it is not negative."""
    return check_int(name, value, 0, MAX_SEED)


def shown(value: object) -> str:
    """Return the repr of a value, of a long text its beginning and its length."""
    if isinstance(value, str) and len(value) > SHOWN:
        return f"{value[:SHOWN]!r}... ({len(value)} characters)"
    return repr(value)


def text_fault(text: str) -> str | None:
    """Say what keeps a string from being text that can be encoded and written; None if nothing does."""
    place = text.find("\0")
    if place >= 0:
        return f"holds the NUL character at place {place + 1}; remove it"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds half a character (a lone surrogate) at place {error.start + 1}; give it as UTF-8"
    return None


def prompt_fault(text: str) -> str | None:
    """Say what keeps a string from being a prompt; None if nothing does."""
    return text_fault(text) or (None if text.strip() else "is empty; say what to make")


def check_prompt(name: str, text: object) -> str:
    """Return a prompt; TypeError for what is no string, ValueError for an empty one or one that is not valid text."""
    if not isinstance(text, str):
        raise TypeError(f"{name}={text!r}: must be a string or a list of strings")
    if fault := prompt_fault(text):
        raise ConfigError(f"{name}={shown(text)}: {fault}")
    return text


def place_fault(text: str) -> str | None:
    """Say what keeps a string from naming a place on the disk or the Hub; None if nothing does."""
    if not text.strip():
        return "is empty; give a file, a folder or a Hub id, '.' for the current folder"
    if "\0" in text:
        return "holds the NUL character, which no path has; remove it"
    if "$" in text and not os.path.lexists(text):
        names = [braced or bare for braced, bare in VARIABLE.findall(text)]
        if absent := [variable for variable in names if variable not in os.environ]:
            return f"the environment variable {absent[0]} is not set; set it or correct it"
    try:
        os.lstat(_expand(text))
    except UnicodeEncodeError:
        return text_fault(text)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return "is longer than a name of a file may be; shorten it"
    return None


def _expand(text: str) -> str:
    if "$" in text and not os.path.lexists(text):
        text = VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], text)
    return os.path.expanduser(text)


def expanded(place: str | os.PathLike[str], name: str = "path") -> str:
    """Return a place on the disk with the home folder for a leading ~ and its value for every $NAME and ${NAME}.

    Every other text, as a Hub id, comes back as it is; so does a place that is there under a name with a $. Raises
    ConfigError for a variable that is not set and for what names no place, and TypeError for what is neither a string
    nor a path.
    """
    text = os.fspath(place) if isinstance(place, str | os.PathLike) else None
    if not isinstance(text, str):
        raise TypeError(f"{name}={place!r}: must be a string or a path")
    if fault := place_fault(text):
        raise ConfigError(f"{name}={shown(text)}: {fault}")
    return _expand(text)


def expanded_path(place: str | os.PathLike[str], name: str = "path") -> Path:
    """Return a place on the disk as a path; see `expanded`."""
    return Path(expanded(place, name))


def has_suffix(place: str | os.PathLike[str], suffixes: str | Sequence[str]) -> bool:
    """Return whether a name ends in one of the suffixes (in small letters), in whatever case it is written."""
    return os.fspath(place).lower().endswith(suffixes if isinstance(suffixes, str) else tuple(suffixes))


def check_writable_file(name: str, place: str | os.PathLike[str], suffixes: Sequence[str]) -> Path:
    """Return the path of a file to be written; ValueError for another suffix or where it cannot be written."""
    path = expanded_path(place, name)
    if path.suffix.lower() not in suffixes:
        raise ConfigError(f"{name}={os.fspath(place)!r}: must end in {', '.join(suffixes)}")
    folder = path.absolute().parent
    if path.is_dir():
        raise ConfigError(f"{name}={os.fspath(place)!r}: is a folder; name a file")
    if not folder.is_dir():
        raise ConfigError(f"{name}={os.fspath(place)!r}: the folder {path.parent} is not there; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{name}={os.fspath(place)!r}: the folder {path.parent} cannot be written; name another")
    return path


def check_writable_folder(name: str, place: str | os.PathLike[str]) -> Path:
    """Return the path of a folder that is there and can be written, or can be made; ValueError for any other."""
    path = expanded_path(place, name)
    absolute = path.absolute()
    there = next(folder for folder in (absolute, *absolute.parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise ConfigError(
            f"{name}={os.fspath(place)!r}: {'is' if there == absolute else f'{there} is'} a file; name a folder"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{name}={os.fspath(place)!r}: {there} cannot be written; name another folder")
    return path
