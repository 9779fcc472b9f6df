"""Files that are whole or not there, whatever kills the process that writes them, and what is read from them."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prd.errors import ConfigError

logger = logging.getLogger(__name__)

LOCK = ".lock"  # of a folder that one process holds
WAITS = (0.05, 0.1, 0.2, 0.4, 0.8)  # seconds between attempts to take the place of a file that another program holds
UNSUPPORTED = frozenset((errno.EINVAL, errno.ENOTSUP, errno.ENOSYS))  # by file systems that flush nothing on request
NO_FOLDER = frozenset((errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR))  # by systems that flush no folder
RESERVED = re.compile(r"con|prn|aux|nul|conin|conout|com[0-9]|lpt[0-9]")  # by Windows, with any suffix
MOST_LETTERS, MOST_BYTES = 80, 200  # of a name made from a text; file systems take 255 bytes, with the suffix


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file aside, force it to the disk and give it the name `path`, in whose place it comes.

    Where that fails, the file before is as it was and nothing is left aside.
    """
    aside = path.with_name(f".{path.name[: MOST_LETTERS // 2]}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        write(aside)
        flush(aside)
        move(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Write a text: a reader, or a process that starts after this one was killed, meets the old file or this one."""
    replace_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def move(source: Path, target: Path) -> None:
    """Give a file the place of another, or a folder a free place.

    Windows refuses while another program holds one of them open, as one that looks for viruses does: tried again for
    some seconds.
    """
    for seconds in WAITS:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            time.sleep(seconds)
    os.replace(source, target)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk; left to the system where it does not offer that.

    Windows flushes files alone, and through a handle that may write.
    """
    is_folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in (UNSUPPORTED | NO_FOLDER if is_folder else UNSUPPORTED):
            raise


_STRICT = ContextVar("nothing is only shown", default=False)


@contextmanager
def nothing_only_shown() -> Iterator[None]:
    """Context in which `only_shown` raises: a rehearsal looks for what would be a warning."""
    token = _STRICT.set(True)
    try:
        yield
    finally:
        _STRICT.reset(token)


@contextmanager
def only_shown(what: object, *errors: type[Exception]) -> Iterator[None]:
    """Warn, instead of raising, of an OSError (or one of `errors`) while something is written that is only shown.

    For the page, pictures and figures of a run: training must not end because of them.
    """
    expected: tuple[type[Exception], ...] = (OSError, *errors)
    try:
        yield
    except expected as error:
        if _STRICT.get():
            raise
        logger.warning("%s: could not be written (%s); the run goes on", what, " ".join(str(error).split()))


@contextmanager
def folder_lock(folder: Path, name: str, doing: str) -> Iterator[None]:
    """Hold a folder for one process; the system frees it however the process ends.

    name   of the argument that gave the folder
    doing  what the processes do there, as "training"

    Raises ConfigError if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"{name}={str(folder)!r}: another process is {doing} into it; wait until it has ended, or name another "
            "folder"
        ) from None
    except NotImplementedError:
        logger.warning("%s: its file system has no locks: see that no other process is %s into it", folder, doing)
    try:
        yield
    finally:
        lock.release()


def file_stem(text: str, otherwise: str) -> str:
    """Return the letters and digits of a text as a file name, without suffix, that every file system takes.

    It is in lower case, no longer than `MOST_LETTERS` and `MOST_BYTES`, and none of the names that Windows keeps for
    devices; `otherwise` if nothing is left.
    """
    words = re.sub(r"[^\w]+", "_", unicodedata.normalize("NFC", text.lower())).strip("_")[:MOST_LETTERS]
    encoding = sys.getfilesystemencoding()
    stem = words.encode(encoding, "ignore")[:MOST_BYTES].decode(encoding, "ignore").strip("_") or otherwise
    return f"{stem}_" if RESERVED.fullmatch(stem) else stem


def read_json(path: Path, absent: Any) -> Any:
    """Read a JSON file of a run; return `absent` without one, and with a warning if it is damaged.

    For what is shown of a run: training must not end because of it.
    """
    if not path.is_file():
        return absent
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        logger.warning("%s is damaged (%s): left out", path, error)
        return absent
