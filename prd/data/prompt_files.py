"""Prompts from files and from the Hub, prepared once and then mapped from disk.

Preparation strips the prompts, leaves out empty ones and repetitions, and writes the rest as Arrow into the cache of
`datasets` (HF_DATASETS_CACHE). Later runs map that file: they neither read the source again nor hold its text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prd.data.text_files import (
    SUFFIXES,
    WITHOUT_COLUMNS,
    CorpusError,
    check_column,
    checked_text,
    read_file,
    texts_of,
)
from prd.errors import ConfigError
from prd.hub.shipped import HUB_ID, shipped_benchmarks
from prd.utils.files import write_atomic

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from prd.data.prompts import PromptsConfig

logger = logging.getLogger(__name__)

BATCH = 8192  # prompts read, written and tokenized at a time
LAYOUT = 2  # of a prepared folder; another number prepares again


@dataclass(frozen=True)
class Counts:
    """Counts of a preparation: prompts kept, and left out because empty, repeated or held out."""

    kept: int
    empty: int
    duplicates: int
    held_out: int


class StoredPrompts(Sequence[str]):
    """The prompts of a prepared folder, mapped from disk: the i-th is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        from datasets import Dataset

        self.folder = folder
        self.table: Dataset = Dataset.from_file(str(folder / "prompts.arrow"))
        self.counts = Counts(**json.loads((folder / "counts.json").read_text(encoding="utf-8")))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        """One prompt, or a list of them for a slice."""
        return self.table[index]["prompt"]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), BATCH):
            yield from self[start : start + BATCH]


def stored_prompts(config: PromptsConfig) -> StoredPrompts:
    """Return the prompts of a file or a Hub dataset without those held out, prepared if they have not been yet.

    Processes that ask at the same time wait for the one that prepares. A changed file (size or time) is another corpus.
    What was prepared and is damaged, as a full disk or a lost machine leaves it, is prepared again with a warning.

    Raises CorpusError; see there.
    """
    from filelock import FileLock

    key = source_key(config)
    cache = _cache()
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:24]
    if prompts := _whole(folder):
        return prompts
    with FileLock(f"{folder}.lock"):
        if prompts := _whole(folder):
            return prompts
        if folder.is_dir():
            logger.warning("%s: the prepared prompts are damaged; preparing them again", folder)
            shutil.rmtree(folder)
        _prepare(config, folder)
    return StoredPrompts(folder)


def _cache() -> Path:
    """The folder of what is prepared; beside other temporary files, with a warning, where it cannot be written."""
    import datasets

    cache = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "prd-prompts"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK | os.X_OK):
            return cache
        reason = f"{cache} is not writable"
    except OSError as error:
        reason = str(error)
    user = os.getuid() if hasattr(os, "getuid") else "user"
    aside = Path(tempfile.gettempdir()) / f"prd-prompts-{user}"
    logger.warning("%s: prompts are prepared in %s; set HF_DATASETS_CACHE to a folder to keep them", reason, aside)
    aside.mkdir(mode=0o700, parents=True, exist_ok=True)
    return aside


def _whole(folder: Path) -> StoredPrompts | None:
    """The prompts of a prepared folder, None if it is not there or holds not as many as were prepared."""
    try:
        prompts = StoredPrompts(folder)
        return prompts if len(prompts) == prompts.counts.kept else None
    except (OSError, ValueError, TypeError):  # of pyarrow, json and Counts
        return None


def count_over_long(prompts: StoredPrompts, tokenizer: PreTrainedTokenizerBase, limit: int) -> int:
    """Count the prompts that have more than `limit` tokens, start and end included; counted once for each tokenizer.

    Only prompts of more bytes than tokens allowed are tokenized: no token of theirs stands for less than a byte.
    """
    from filelock import FileLock
    from tokenizers import Tokenizer

    description = tokenizer.backend_tokenizer.to_str()
    plain = Tokenizer.from_str(description)
    plain.no_truncation()
    plain.no_padding()
    key = hashlib.sha256(f"{limit} {plain.to_str()}".encode()).hexdigest()[:24]
    record = prompts.folder / f"over_long_{key}.json"
    with FileLock(prompts.folder / "over_long.lock"):
        if record.is_file():
            return int(json.loads(record.read_text(encoding="utf-8")))
        special = plain.num_special_tokens_to_add(False)
        count = 0
        for start in range(0, len(prompts), BATCH):
            long = [p for p in prompts[start : start + BATCH] if len(p.encode()) > limit - special]
            count += sum(len(encoding.ids) > limit for encoding in plain.encode_batch_fast(long))
        write_atomic(record, str(count))
        return count


def source_key(config: PromptsConfig) -> str:
    """Return all that decides what a prepared folder holds; CorpusError for a source that is no file and no Hub id."""
    source = config.source
    path = Path(source)
    suffix = path.suffix.lower()
    misplaced = path.suffix and path.parent.is_dir()  # a file's name in a folder of ours is no Hub id
    place: list[Any]
    if path.is_file():
        if suffix not in SUFFIXES:
            raise CorpusError(f"prompts.source={source!r}: unknown suffix; must end in {', '.join(SUFFIXES)}")
        check_unused(config, f"{source} has no columns", "column" if suffix in WITHOUT_COLUMNS else "")
        check_unused(config, f"{source} is on this disk and has no revisions", "revision")
        if config.split != "train" and suffix != ".json":
            raise CorpusError(f"prompts.split={config.split!r}: {source} has no splits; leave it 'train'")
        status = path.stat()
        place = [str(path.resolve()), status.st_size, status.st_mtime_ns]
    elif HUB_ID.fullmatch(source) and suffix not in SUFFIXES and not path.exists() and not misplaced:
        place = [source, config.revision]
    else:
        raise CorpusError(
            f"prompts.source={source!r}: must be {', '.join(map(repr, shipped_benchmarks()))}, 'pig64', 'animal2400', "
            f"an existing file ending in {', '.join(SUFFIXES)}, a Hub dataset 'owner/name', or a benchmark's import "
            "path"
        )
    return json.dumps([LAYOUT, *place, config.column, config.split, sorted(set(config.held_out))])


def check_unused(config: PromptsConfig, why: str, *keys: str) -> None:
    """Raise CorpusError for a setting that has no meaning for the kind of the source, unless it is the default."""
    defaults = {"column": "prompt", "split": "train", "revision": None}
    for key in filter(None, keys):
        if getattr(config, key) != defaults[key]:
            raise CorpusError(f"prompts.{key}={getattr(config, key)!r}: {why}; leave it out")


def _prepare(config: PromptsConfig, folder: Path) -> None:
    """Write `folder`, whole or not at all: prompts.arrow, counts.json."""
    from datasets import Dataset

    aside = folder.with_name(f"{folder.name}.part")  # one at a time: the caller holds the lock
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        with _quiet():
            empty, digests = _copy(_read(config), aside / "all.arrow")
        first = np.zeros(len(digests), dtype=bool)
        first[np.unique(digests, return_index=True)[1]] = True
        everything = Dataset.from_file(str(aside / "all.arrow"))
        missing = set(config.held_out)
        held_out = _keep(everything, first, missing, aside / "prompts.arrow")
        if missing:
            raise CorpusError(
                f"prompts.held_out: {min(missing)!r} is not a prompt of {config.source}; remove or correct it"
            )
        counts = Counts(int(first.sum()) - held_out, empty, len(first) - int(first.sum()), held_out)
        if counts.kept == 0:
            why = "holds no prompt" if not held_out else "no prompt is left after prompts.held_out"
            raise CorpusError(f"prompts.source={config.source!r}: {why}; give at least one")
        del everything
        (aside / "all.arrow").unlink()
        write_atomic(aside / "counts.json", json.dumps(asdict(counts)))
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


_SILENCING = threading.RLock()  # else one thread would leave behind what another has set


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what `datasets` logs of a file it cannot read: the error says it in one sentence."""
    from datasets.utils import logging

    with _SILENCING:
        before = logging.get_verbosity()
        logging.set_verbosity(logging.CRITICAL)
        try:
            yield
        finally:
            logging.set_verbosity(before)


def _copy(batches: Iterator[list[str | None]], path: Path) -> tuple[int, np.ndarray]:
    """Write the prompts that are not empty; returns how many were, and a 16-byte digest of each one written."""
    import pyarrow as pa

    schema = pa.schema({"prompt": pa.string()})
    empty, digests = 0, bytearray()
    with pa.OSFile(str(path), "wb") as stream, pa.ipc.new_stream(stream, schema) as writer:
        for batch in batches:
            prompts = [p for p in (text.strip() for text in batch if text) if p]
            empty += len(batch) - len(prompts)
            digests += b"".join(hashlib.blake2b(p.encode(), digest_size=16).digest() for p in prompts)
            writer.write_batch(pa.record_batch([pa.array(prompts, pa.string())], schema=schema))
    return empty, np.frombuffer(digests, dtype="V16")


def _keep(everything: Dataset, first: np.ndarray, missing: set[str], path: Path) -> int:
    """Write the first of each prompt; those in `missing` are taken from that set instead. Returns how many were."""
    import pyarrow as pa

    wanted, taken = frozenset(missing), 0
    schema = pa.schema({"prompt": pa.string()})
    with pa.OSFile(str(path), "wb") as stream, pa.ipc.new_stream(stream, schema) as writer:
        for start in range(0, len(everything), BATCH):
            prompts = everything.data.table.slice(start, BATCH).column("prompt").filter(first[start : start + BATCH])
            if wanted:
                texts = prompts.to_pylist()
                found = wanted.intersection(texts)
                missing -= found
                taken += len(found)
                prompts = pa.array([p for p in texts if p not in found], pa.string())
            prompts = prompts.combine_chunks() if isinstance(prompts, pa.ChunkedArray) else prompts
            writer.write_batch(pa.record_batch([prompts], schema=schema))
    return taken


def _read(config: PromptsConfig) -> Iterator[list[str | None]]:
    """The prompts of a source as they stand there, in lists of at most BATCH."""
    path = Path(config.source)
    on_disk = path.is_file()
    try:
        if on_disk:
            prompts = read_file(path, column=config.column, split=config.split, source=config.source)
            while batch := list(itertools.islice(prompts, BATCH)):
                yield batch
        else:
            yield from _read_hub(config)
    except ConfigError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # of pyarrow, pandas, fsspec, datasets, the Hub: they share no class
        reason = " ".join(str(error).split())[:300]
        what = "cannot be read" if on_disk else "is no file here, and as a Hub dataset cannot be read"
        raise CorpusError(f"prompts.source={config.source!r}: {what} ({type(error).__name__}: {reason})") from error


def _read_hub(config: PromptsConfig) -> Iterator[list[str | None]]:
    """A dataset of the Hub, streamed by `datasets`."""
    from datasets import load_dataset_builder

    column, source = config.column, config.source
    builder = load_dataset_builder(source, revision=config.revision)
    data = builder.as_streaming_dataset(split=config.split)
    if data.column_names is not None:
        check_column(column, data.column_names, source)
        if hasattr(builder.config, "columns"):  # Parquet, whose other columns (images, say) need not be read
            builder.config.columns = [column]
            data = builder.as_streaming_dataset(split=config.split)
        data = data.select_columns([column])
    row = 0
    for table in data.with_format("arrow").iter(BATCH):
        check_column(column, table.column_names, source)
        texts = texts_of(table.column(column), column, source)
        where = f"prompts.column={column!r}: {source}, row"
        yield [checked_text(text, f"{where} {row + i}") for i, text in enumerate(texts, start=1)]
        row += len(texts)
