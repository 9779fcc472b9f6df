"""Prompts from files and from the Hub, prepared once and then mapped from disk.

Preparation strips the prompts, leaves out empty ones and repetitions, and writes the rest as Arrow into the cache of
`datasets` (HF_DATASETS_CACHE). Later runs map that file: they neither read the source again nor hold its text.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prd.errors import ConfigError
from prd.hub.shipped import shipped_benchmarks
from prd.utils.files import write_atomic

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from prd.data.prompts import PromptsConfig

logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".parquet")
BATCH = 8192  # prompts read, written and tokenized at a time
LAYOUT = 1  # of a prepared folder; another number prepares again
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class CorpusError(ConfigError):
    """A corpus that cannot be used: absent, unreadable, without the column or split asked for, or without a prompt."""


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
    import datasets
    from filelock import FileLock

    key = source_key(config)
    cache = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "prd-prompts"
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:24]
    if prompts := _whole(folder):
        return prompts
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if prompts := _whole(folder):
            return prompts
        if folder.is_dir():
            logger.warning("%s: the prepared prompts are damaged; preparing them again", folder)
            shutil.rmtree(folder)
        _prepare(config, folder)
    return StoredPrompts(folder)


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
    path = Path(source).expanduser()
    misplaced = path.suffix and path.parent.is_dir()  # a file's name in a folder of ours is no Hub id
    place: list[Any]
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise CorpusError(f"prompts.source={source!r}: unknown suffix; must end in {', '.join(SUFFIXES)}")
        if config.split != "train" and path.suffix != ".json":
            raise CorpusError(f"prompts.split={config.split!r}: {source} has no splits; leave it 'train'")
        status = path.stat()
        place = [str(path.resolve()), status.st_size, status.st_mtime_ns]
    elif HUB_ID.fullmatch(source) and path.suffix not in SUFFIXES and not path.exists() and not misplaced:
        place = [source, config.revision]
    else:
        raise CorpusError(
            f"prompts.source={source!r}: must be {', '.join(map(repr, shipped_benchmarks()))}, 'pig64', 'animal2400', "
            f"an existing file ending in {', '.join(SUFFIXES)}, a Hub dataset 'owner/name', or a benchmark's import "
            "path"
        )
    return json.dumps([LAYOUT, *place, config.column, config.split, sorted(set(config.held_out))])


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
    path = Path(config.source).expanduser()
    on_disk = path.is_file()
    try:
        if on_disk and path.suffix == ".json":
            yield from _read_json(path, config)
        elif not on_disk or path.stat().st_size:
            yield from _read_table(path if on_disk else None, config)
    except ConfigError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # of pyarrow, pandas, fsspec, datasets, the Hub: they share no class
        reason = " ".join(str(error).split())[:300]
        what = "cannot be read" if on_disk else "is no file here, and as a Hub dataset cannot be read"
        raise CorpusError(f"prompts.source={config.source!r}: {what} ({type(error).__name__}: {reason})") from error


def _read_json(path: Path, config: PromptsConfig) -> Iterator[list[str | None]]:
    """A prompt library: a list of strings, or a mapping of splits to such lists."""
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(content, dict):
        if config.split not in content:
            raise CorpusError(f"prompts.split={config.split!r}: {config.source} has the splits {sorted(content)}")
        content = content[config.split]
    if not isinstance(content, list) or not all(isinstance(p, str) for p in content):
        raise CorpusError(
            f"prompts.source={config.source!r}: must hold a list of strings, or a mapping of splits to such lists"
        )
    for start in range(0, len(content), BATCH):
        yield content[start : start + BATCH]


def _read_table(path: Path | None, config: PromptsConfig) -> Iterator[list[str | None]]:
    """Text, JSONL, CSV and Parquet files, and datasets of the Hub (path None), streamed by `datasets`."""
    import pyarrow as pa
    from datasets import Features, Value, load_dataset_builder

    column, split = config.column, config.split if path is None else "train"
    options: dict[str, Any] = {"data_files": str(path)}
    if path is None:
        builder = load_dataset_builder(config.source, revision=config.revision)
    elif path.suffix == ".txt":
        column = "text"
        builder = load_dataset_builder("text", encoding="utf-8-sig", **options)
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as stream:
            header = next(csv.reader(stream), [])
        _check_column(column, header, config.source)
        plain = Features({name: Value("string") for name in header})  # or 007 becomes 7
        kept_as_is = {"encoding": "utf-8-sig", "keep_default_na": False}  # or "None" is no prompt
        builder = load_dataset_builder("csv", features=plain, **kept_as_is, **options)
    else:
        builder = load_dataset_builder({".jsonl": "json", ".parquet": "parquet"}[path.suffix], **options)
    data = builder.as_streaming_dataset(split=split)
    if data.column_names is not None:
        _check_column(column, data.column_names, config.source)
        if hasattr(builder.config, "columns"):  # Parquet, whose other columns (images, say) need not be read
            builder.config.columns = [column]
            data = builder.as_streaming_dataset(split=split)
        data = data.select_columns([column])
    for table in data.with_format("arrow").iter(BATCH):
        _check_column(column, table.column_names, config.source)
        texts = table.column(column)
        if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type) or pa.types.is_null(texts.type)):
            raise CorpusError(f"prompts.column={column!r}: holds {texts.type} in {config.source}, not text")
        yield texts.to_pylist()


def _check_column(column: str, columns: Sequence[str], source: str) -> None:
    if column not in columns:
        raise CorpusError(f"prompts.column={column!r}: {source} has the columns {list(columns)}; name one of them")
