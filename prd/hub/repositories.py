"""Sharing what was trained: a model's card, and its upload to the Hugging Face Hub."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError

from prd.hub.cards import LIBRARY, model_card
from prd.hub.find import CARD, TRAINING_METADATA
from prd.hub.shipped import HUB_ID

logger = logging.getLogger(__name__)


def write_card(
    folder: Path,
    *,
    name: str | None = None,
    license: str | None = None,
    training_metadata: dict[str, Any] | None = None,
) -> None:
    """Write README.md, unless there is one that was not written here, and record.json if `training_metadata` is known.

    name     what `from_pretrained` is given in the card's usage: a Hub id; None: the folder's own name
    license  of the adapter, as the Hub names it ("openrail++", "apache-2.0", ...); None: that of the base
    """
    if training_metadata:
        (folder / TRAINING_METADATA).write_text(json.dumps(training_metadata, indent=1) + "\n", encoding="utf-8")
    if not _may_write(folder / CARD):
        logger.warning("%s: is kept, for its front matter does not say library_name: %s", folder / CARD, LIBRARY)
        return
    card = model_card(folder, name or f"./{folder.resolve().name}", license, training_metadata or {})
    (folder / CARD).write_text(str(card), encoding="utf-8")


def _may_write(card: Path) -> bool:
    """Return True if there is no card yet, or one of this library's."""
    if not card.is_file():
        return True
    front = re.match(r"---\s*\n(.*?)\n---\s*\n", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    return front is not None and f"library_name: {LIBRARY}" in front[1].splitlines()


def push_model(
    save: Callable[[Path], None],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload text-to-3D weights",
    license: str | None = None,
    training_metadata: dict[str, Any] | None = None,
) -> str:
    """Upload what `save` writes to a folder, with a card, in one commit; returns the commit's address.

    private         of a repository that is made now; None: as the account's default
    revision        branch, made if it is missing; None: main

    Nothing that is uploaded names a place on this machine: a saved model knows a base of this disk by its hash alone. A
    README.md on the Hub that was not written here stays as it is. Raises ValueError for a repo_id that is no
    'owner/name', and the Hub's own errors (OSError).
    """
    if not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id={repo_id!r}: must be 'owner/name'")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save(folder)
        write_card(folder, name=repo_id, license=license, training_metadata=training_metadata)
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
