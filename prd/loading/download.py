"""Files fetched of a Hub repository: configs of a model's parts, and the first variant there is of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from prd.errors import MissingFile
from prd.hub.shipped import HUB_ID
from prd.loading.weights import STEMS, visible_files

VARIANTS = ["*.fp16*", "*.bf16*", "*non_ema*"]


def download(name: str, patterns: list[str], hub: dict[str, Any], ignore: list[str] = VARIANTS) -> Path:
    """The folder of a Hub id's files in the cache, .../snapshots/COMMIT.

    hub  `revision`, `token`, `cache_dir` and `local_files_only` of the Hub

    Raises FileNotFoundError where the Hub does not give it.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=ignore, **hub))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise MissingFile(
            f"{name}: is no folder here, and the Hub did not give it ({type(error).__name__}: {reason})"
        ) from error


def may_be_hub_id(name: str) -> bool:
    """Return True for 'owner/name' by its form; whether the Hub has it is not asked."""
    return HUB_ID.fullmatch(name) is not None


def download_weights(name: str, parts: Sequence[str], others: list[str], hub: dict[str, Any]) -> Path:
    """Fetch the weights of parts of a Hub id, plain, else in the first half precision there is; returns its folder.

    parts   subfolders, "" for the repository's own
    others  patterns of what is fetched beside them
    """
    starts = {part: [f"{part}/{stem}" if part else stem for stem in STEMS] for part in parts}
    ends = (".safetensors", ".json")
    configs = [f"{part}/config.json" if part else "config.json" for part in parts]
    weights = [f"{start}*{end}" for part in parts for start in starts[part] for end in ends]
    path = download(name, [*configs, *weights, *others], hub)
    for variant in ("fp16", "bf16"):
        if without := [part for part in parts if not _has_weights(path / part)]:
            patterns = [f"{start}*.{variant}*{end}" for part in without for start in starts[part] for end in ends]
            download(name, patterns, hub, [])
    return path


def _has_weights(folder: Path) -> bool:
    return folder.is_dir() and any(path.suffix == ".safetensors" for path in visible_files(folder))
