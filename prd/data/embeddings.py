"""Text embeddings computed once: `prd embed` writes them, training looks them up.

    prd embed --source prompts.csv --encoder BASE --encoder RICHDREAMER --output embeddings
    prd train --config ... --prompts.source prompts.csv --prompts.embeddings embeddings

The folder holds a folder for every text encoder, named by the digest of its weights and tokenizer:

    manifest.json            which encoder, which texts, how many rows a shard has; written first
    shard-00000.safetensors  embeds [rows, L, Ct] in the encoder's own precision
    index.npy                [3, texts], uint64: digests of the texts, sorted, and their rows; written last

A shard is there whole or not at all: the same command goes on where it was killed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from prd.errors import ConfigError
from prd.text.encoders import PromptEncoder
from prd.text.loading import encoder_digest
from prd.utils.arguments import expanded_path
from prd.utils.files import replace_file, write_atomic

SHARD_BYTES = 256 << 20
CHECKED = 1000  # prompts of a corpus that are looked up before training starts
OPEN_SHARDS = 64
REMEMBERED = 256  # embeddings held in memory: a step asks for the same ones many times, an epoch for all


class EmbeddingsError(ConfigError):
    """Embeddings that cannot be used: absent, unfinished, of another encoder or of other prompts."""


def text_keys(texts: Iterable[str]) -> np.ndarray:
    """Digests [2, n], uint64, of n texts."""
    data = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
    return np.ascontiguousarray(np.frombuffer(data, dtype="<u8").reshape(-1, 2).T)


@torch.no_grad()
def embed(texts: Sequence[str], encoder: PromptEncoder, output: str | Path, *, name: str, batch_size: int = 32) -> Path:
    """Encode texts into a folder of `output`, or go on with one that was begun; returns that folder.

    name: what the encoder is called in messages. Raises EmbeddingsError if the folder was begun for other texts, if
    another process writes it, and if the disk has no room for what is missing.
    """
    digest = encoder_digest(encoder)
    folder = expanded_path(output, "output") / digest[:16]
    row = encoder.encode([texts[0]])  # [1, L, Ct]
    row_bytes = row.numel() * row.element_size()
    keys = text_keys(texts)
    manifest = {
        "encoder": digest,
        "name": name,
        "dtype": str(row.dtype).removeprefix("torch."),
        "shape": list(row.shape[1:]),
        "texts": len(texts),
        "texts_digest": hashlib.sha256(keys.tobytes()).hexdigest(),
        "shard_rows": max(1, SHARD_BYTES // row_bytes),
    }
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            _begin(folder, manifest)
            _encode_shards(texts, encoder, folder, manifest, batch_size, row_bytes)
            order = np.lexsort((keys[1], keys[0]))
            index = np.stack([keys[0][order], keys[1][order], order.astype(np.uint64)])
            replace_file(folder / "index.npy", functools.partial(_save_array, index))
    except Timeout:
        raise EmbeddingsError(f"output={str(output)!r}: another process is writing {folder.name} there") from None
    return folder


def _encode_shards(
    texts: Sequence[str],
    encoder: PromptEncoder,
    folder: Path,
    manifest: dict[str, Any],
    batch_size: int,
    row_bytes: int,
) -> None:
    """Write the shards that are not there yet."""
    rows = manifest["shard_rows"]
    missing = [i for i in range(math.ceil(len(texts) / rows)) if not _is_whole(folder / _shard(i))]
    need, free = sum(min(rows, len(texts) - i * rows) for i in missing) * row_bytes, shutil.disk_usage(folder).free
    if need > free:
        raise EmbeddingsError(f"output={str(folder.parent)!r}: {need / 1e9:.1f} GB to write, {free / 1e9:.1f} GB free")
    for i in tqdm(missing, desc=f"embed {manifest['name']}: {need / 1e9:.2f} GB", unit="shard"):
        part = texts[i * rows : (i + 1) * rows]
        embeds = [encoder.encode(list(part[j : j + batch_size])).cpu() for j in range(0, len(part), batch_size)]
        replace_file(folder / _shard(i), functools.partial(save_file, {"embeds": torch.cat(embeds)}))


class StoredEmbeddings:
    """The embeddings of one encoder, read from disk when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _manifest(folder)
        self.index = np.load(folder / "index.npy", mmap_mode="r")  # [3, texts]
        self._open = functools.lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    def row(self, text: str) -> int | None:
        """The row of a text, None if it is not among them."""
        first, second = text_keys([text])[:, 0]
        place = int(np.searchsorted(self.index[0], first))
        while place < self.index.shape[1] and self.index[0, place] == first:
            if self.index[1, place] == second:
                return int(self.index[2, place])
            place += 1
        return None

    def find(self, text: str) -> Tensor | None:
        """The embedding [L, Ct] of a text, None if it is not among them."""
        row = self.row(text)
        if row is None:
            return None
        shard, place = divmod(row, int(self.manifest["shard_rows"]))
        return self._open(shard)[place : place + 1][0]

    def _open_shard(self, shard: int) -> Any:
        path = self.folder / _shard(shard)
        try:
            return safe_open(path, framework="pt").get_slice("embeds")
        except (OSError, SafetensorError) as error:
            raise EmbeddingsError(f"{path}: cannot be read ({error}); delete it and run `prd embed` again") from error


class StoredPromptEncoder(PromptEncoder):
    """An encoder whose texts are looked up; those that are not stored (negative prompts, views) it encodes itself."""

    def __init__(self, encoder: PromptEncoder, stored: StoredEmbeddings) -> None:
        super().__init__(encoder.tokenizer, encoder.model, cache_size=REMEMBERED)
        self.encoder, self.stored, self.tokenizers = encoder, stored, encoder.tokenizers
        self.memory, self.visited = encoder.memory, encoder.visited

    @property
    def configs(self) -> tuple[Any, ...]:
        return self.encoder.configs

    @property
    def length(self) -> int:
        return self.encoder.length

    def pooled(self, prompts: Sequence[str], embeds: Tensor) -> Tensor:
        """Return the encoder's own pooled embeddings of prompts from theirs."""
        return self.encoder.pooled(prompts, embeds)

    def compute(self, prompts: list[str]) -> Tensor:
        """Return `encode` of some prompts in main memory [n, L, Ct]."""
        return self.encode(prompts).cpu()  # the model visits the device only if a text is not stored

    def encode(self, prompts: list[str]) -> Tensor:
        """Last hidden states [n, L, Ct] of n prompts."""
        rows = [self.stored.find(prompt) for prompt in prompts]
        absent = [prompt for prompt, row in zip(prompts, rows, strict=True) if row is None]
        with self.visiting() if absent else nullcontext():
            encoded = iter(self.encoder.encode(absent) if absent else ())
        device = self.device
        return torch.stack([next(encoded) if row is None else row.to(device) for row in rows])


class Embeddings:
    """Text embeddings that `prd embed` wrote, for each of its encoders.

    Raises EmbeddingsError if the folder holds none that is finished.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = expanded_path(folder, "prompts.embeddings")
        begun = sorted(path.parent for path in self.folder.glob("*/manifest.json"))
        if not begun:
            raise EmbeddingsError(f"prompts.embeddings={str(folder)!r}: holds no embeddings; write them by `prd embed`")
        unfinished = [path for path in begun if not (path / "index.npy").is_file()]
        if unfinished:
            raise EmbeddingsError(
                f"prompts.embeddings={str(folder)!r}: those of {_manifest(unfinished[0])['name']} are unfinished; run "
                "the same `prd embed` again"
            )
        self.stored = {path.name: StoredEmbeddings(path) for path in begun}

    def check_covers(self, prompts: Sequence[str]) -> None:
        """Raises EmbeddingsError if one of CHECKED prompts, spread over the corpus, is not stored for every encoder."""
        places = {i * len(prompts) // CHECKED for i in range(CHECKED)}
        for prompt in (prompts[place] for place in sorted(places)):
            for stored in self.stored.values():
                if stored.row(prompt) is None:
                    raise EmbeddingsError(
                        f"prompts.embeddings={str(self.folder)!r}: {prompt!r} of prompts.source is not among those of "
                        f"{stored.manifest['name']}; run `prd embed` with the same source, column and split"
                    )

    def encoder(self, encoder: PromptEncoder, whose: str) -> StoredPromptEncoder:
        """`encoder`, whose texts are looked up here. Raises EmbeddingsError if they were made by another one."""
        digest = encoder_digest(encoder)
        stored = self.stored.get(digest[:16])
        if stored is None or stored.manifest["encoder"] != digest:
            made = ", ".join(f"{s.manifest['name']} in {s.manifest['dtype']}" for s in self.stored.values())
            raise EmbeddingsError(
                f"prompts.embeddings={str(self.folder)!r}: made by other text encoders ({made}) than the {whose}'s in "
                f"{str(encoder.model.dtype).removeprefix('torch.')}; run `prd embed --encoder` with it too"
            )
        return StoredPromptEncoder(encoder, stored)


def _shard(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _begin(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, or check that the one there is the same but for the encoder's name."""
    if (folder / "manifest.json").is_file():
        there = _manifest(folder)
        if {**there, "name": ""} != {**manifest, "name": ""}:
            raise EmbeddingsError(
                f"output={str(folder.parent)!r}: holds {there['texts']} other texts of this encoder; name a new folder"
            )
        return
    write_atomic(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise EmbeddingsError(f"{folder}/manifest.json: is no JSON ({error}); delete {folder}, embed again") from error


def _is_whole(path: Path) -> bool:
    """Return True if a shard is there; its header says how long the file must be."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _save_array(array: np.ndarray, path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, array)
