"""Sharing what was trained: where a generator is found, its facts and card, and its upload to the Hugging Face Hub."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from prd.generators.adapter_files import ADAPTER_CONFIG, ADAPTER_FILES, STUDENT_CONFIG
from prd.generators.single_pass import WEIGHTS
from prd.hub.cards import HUB_ID, LIBRARY, METRICS, TOYBOX, model_card, on_hub
from prd.toybox import asset

logger = logging.getLogger(__name__)

CARD, FACTS = "README.md", "record.json"
SHIPPED = {  # the generators of the toy box and their folders among its assets
    TOYBOX: "adapter",
    "toybox-atom": "atom",
    "toybox-att3d": "att3d",
    "toybox-latte3d": "latte3d",
}
IN_RUNS = ("adapter", "generator")  # what a run saves its generator as


def find_generator(
    name_or_path: str | Path,
    revision: str | None = None,
    *,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a saved generator: shipped ("toybox", ...), on disk (itself or in a run folder), or from the Hub.

    Raises FileNotFoundError, also where the Hub has no such repository or revision, or does not show it without token,
    and ValueError for a revision of what is not on the Hub.
    """
    path = Path(name_or_path).expanduser()
    if revision is not None and (str(name_or_path) in SHIPPED or path.exists()):
        raise ValueError(f"revision={revision!r}: {name_or_path} is on this disk and has no revisions; leave it out")
    if str(name_or_path) in SHIPPED:
        return Path(asset(SHIPPED[str(name_or_path)]))
    if path.is_file():
        raise FileNotFoundError(f"{path}: is a file; give the folder it lies in, {path.parent}")
    if path.is_dir():
        for folder in (path, *(path / name for name in IN_RUNS)):
            if any((folder / name).is_file() for name in (ADAPTER_CONFIG, WEIGHTS)):
                return folder
        raise FileNotFoundError(
            f"{path}: holds neither {ADAPTER_CONFIG} nor {WEIGHTS}; give a run folder or a saved generator"
        )
    if not HUB_ID.fullmatch(str(name_or_path)):
        raise FileNotFoundError(
            f"{name_or_path}: no such folder; give one of {', '.join(SHIPPED)}, a run folder or a Hub id 'owner/name'"
        )
    try:
        return Path(
            snapshot_download(
                str(name_or_path),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=[*ADAPTER_FILES, WEIGHTS, FACTS, CARD],
            )
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{name_or_path}: is no folder here, and the Hub did not give it ({type(error).__name__}: {reason})"
        ) from error


def read_facts(folder: Path) -> dict[str, Any]:
    """What is known of a training run: record.json beside the weights, else the run folder's scores.json, else {}."""
    path = folder / FACTS
    if not path.is_file():
        path = folder.parent / "scores.json"
        if folder.name not in IN_RUNS or not path.is_file():
            return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if path.name != FACTS:
            facts = {"measured": {name: part["summary"] for name, part in facts.items()}}
        _check_facts(facts)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        logger.warning("%s: is ignored, for it is no record of a training run (%s)", path, error)
        return {}
    return facts


def _check_facts(facts: object) -> None:
    """TypeError or ValueError unless the model card can be written of these facts."""
    if not isinstance(facts, dict):
        raise TypeError(f"it holds a {type(facts).__name__}, not an object")
    measured, held_out = facts.get("measured"), facts.get("held_out")
    if not isinstance(held_out, list | None) or not isinstance(measured, dict | None):
        raise TypeError("held_out must be a list and measured an object")
    for name, row in (measured or {}).items():
        if not isinstance(row, dict) or any(type(row[key]) not in (int, float) for key in METRICS if key in row):
            raise TypeError(f"measured {name!r} must hold numbers by name")


def write_card(
    folder: Path, *, name: str | None = None, license: str | None = None, facts: dict[str, Any] | None = None
) -> None:
    """Write README.md, unless there is one that was not written here, and record.json if `facts` are known.

    name     what `from_pretrained` is given in the card's usage: a Hub id; None: the folder's own name
    license  of the adapter, as the Hub names it ("openrail++", "apache-2.0", ...); None: that of the base
    """
    if facts:
        (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if not _may_write(folder / CARD):
        logger.warning("%s: is kept, for its front matter does not say library_name: %s", folder / CARD, LIBRARY)
        return
    card = model_card(folder, name or f"./{folder.resolve().name}", license, facts or {})
    (folder / CARD).write_text(str(card), encoding="utf-8")


def _may_write(card: Path) -> bool:
    """Whether there is no card yet, or one of this library's."""
    if not card.is_file():
        return True
    front = re.match(r"---\s*\n(.*?)\n---\s*\n", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    return front is not None and f"library_name: {LIBRARY}" in front[1].splitlines()


def push_generator(
    save: Callable[[Path], None],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload text-to-3D weights",
    license: str | None = None,
    facts: dict[str, Any] | None = None,
) -> str:
    """Upload what `save` writes to a folder, with a card, in one commit; returns the commit's address.

    private         of a repository that is made now; None: as the account's default
    revision        branch, made if it is missing; None: main

    A base that is a path on this machine is not named in what is uploaded, and a README.md on the Hub that was not
    written here stays as it is. Raises ValueError for a repo_id that is no
    'owner/name', and the Hub's own errors (OSError).
    """
    if not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id={repo_id!r}: must be 'owner/name'")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save(folder)
        _forget_local_base(folder)
        write_card(folder, name=repo_id, license=license, facts=facts)
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        try:
            if not _may_write(Path(api.hf_hub_download(repo_id, CARD, revision=revision, local_dir=folder / ".there"))):
                (folder / CARD).unlink()
        except EntryNotFoundError:
            pass  # there is none yet
        shutil.rmtree(folder / ".there", ignore_errors=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
        )
    return str(commit.commit_url)


def _forget_local_base(folder: Path) -> None:
    """Leave out of what is uploaded where on this machine the base, or the text encoder, is."""
    record = json.loads((folder / STUDENT_CONFIG).read_text(encoding="utf-8"))
    key = "base" if "base" in record else "text_encoder"
    if record[key] == TOYBOX or on_hub(record[key]):
        return
    changes: list[tuple[str, dict[str, Any]]] = [(STUDENT_CONFIG, {key: ""})]
    if key == "base":
        changes = [
            (STUDENT_CONFIG, {key: "", "base_revision": None}),
            (ADAPTER_CONFIG, {"base_model_name_or_path": None}),
        ]
    for name, values in changes:
        written = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**written, **values}, indent=2) + "\n", encoding="utf-8")
