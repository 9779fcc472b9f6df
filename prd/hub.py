"""Sharing an adapter: where one is found, the model card that goes with it, and its upload to the Hugging Face Hub."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from prd.generators.adapter_files import ADAPTER_CONFIG, ADAPTER_FILES, STUDENT_CONFIG, read_configs
from prd.toybox import asset

logger = logging.getLogger(__name__)

CARD, FACTS = "README.md", "record.json"
LIBRARY = "prd"
TOYBOX = "toybox"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
METRICS = {"r_at_1": "R@1", "iou": "IoU", "color_error": "colour error", "right_topology": "right topology"}


def find_adapter(
    name_or_path: str | Path,
    revision: str | None = None,
    *,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of an adapter: shipped ("toybox"), on disk (itself or its `adapter` subfolder), or from the Hub.

    Raises FileNotFoundError, also where the Hub has no such repository or revision, or does not show it without token,
    and ValueError for a revision of what is not on the Hub.
    """
    path = Path(name_or_path).expanduser()
    if revision is not None and (str(name_or_path) == TOYBOX or path.exists()):
        raise ValueError(f"revision={revision!r}: {name_or_path} is on this disk and has no revisions; leave it out")
    if str(name_or_path) == TOYBOX:
        return Path(asset("adapter"))
    if path.is_file():
        raise FileNotFoundError(f"{path}: is a file; give the folder it lies in, {path.parent}")
    if path.is_dir():
        for folder in (path, path / "adapter"):
            if (folder / ADAPTER_CONFIG).is_file():
                return folder
        raise FileNotFoundError(f"{path}: holds no adapter_config.json; give a run folder or a saved adapter")
    if not HUB_ID.fullmatch(str(name_or_path)):
        raise FileNotFoundError(f"{name_or_path}: no such folder; give 'toybox', a run folder or a Hub id 'owner/name'")
    try:
        return Path(
            snapshot_download(
                str(name_or_path),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=[*ADAPTER_FILES, FACTS, CARD],
            )
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{name_or_path}: is no folder here, and the Hub did not give it ({type(error).__name__}: {reason})"
        ) from error


def on_hub(base: str) -> bool:
    """Whether a base's name is a Hub id, and neither "toybox" nor a path on this machine."""
    return HUB_ID.fullmatch(base) is not None and not Path(base).exists() and Path(base).suffix != ".safetensors"


def read_facts(folder: Path) -> dict[str, Any]:
    """What is known of a training run: record.json beside the adapter, else the run folder's scores.json, else {}."""
    path = folder / FACTS
    if not path.is_file():
        path = folder.parent / "scores.json"
        if folder.name != "adapter" or not path.is_file():
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


def model_card(folder: Path, name: str, license: str | None, facts: dict[str, Any]) -> ModelCard:
    """The card of the adapter in `folder`; it names no path of this machine."""
    peta, record = read_configs(folder)
    base, shared = record["base"], on_hub(record["base"])
    data: dict[str, Any] = {
        "library_name": LIBRARY,
        "pipeline_tag": "text-to-3d",
        "tags": ["text-to-3d", "triplane", "mesh", "peft", "lora", "progressive-rendering-distillation"],
        "license": license or ("apache-2.0" if base == TOYBOX else "other"),
    }
    if shared:
        data |= {"base_model": base, "base_model_relation": "adapter"}
    if data["license"] == "other":
        data["license_name"] = "license-of-the-base-model"
        if shared:
            data["license_link"] = f"https://huggingface.co/{base}"
    words = {
        "base": f"[{base}](https://huggingface.co/{base})" if shared else BASES.get(base, BASES[""]),
        "revision": f", revision `{record['base_revision']}`" if shared and record["base_revision"] else "",
        "place": "" if shared or base == TOYBOX else ', base="FOLDER_OF_ITS_BASE"',
        "prompt": "a red cube on a blue cylinder" if base == TOYBOX else "a wooden chair with a red cushion",
        "world": TOY_WORLD if base == TOYBOX else "",
        "trained": "full fine-tuning of the U-Net and the decoder" if peta.full else f"PETA of rank {peta.r}",
        "channels": peta.plane_channels,
        "steps": record["num_inference_steps"],
        "size": record["latent_size"],
        "training": _training(facts),
        "license": TOY_LICENSE if base == TOYBOX else BASE_LICENSE,
        "name": name,
        "where": f", in the folder that holds {name.removeprefix('./')}" if name.startswith("./") else "",
    }
    return ModelCard(f"---\n{ModelCardData(**data)}\n---\n\n{TEXT.format(**words)}")


def push_adapter(
    save: Callable[[Path], None],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload PETA adapter",
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
    record = json.loads((folder / STUDENT_CONFIG).read_text(encoding="utf-8"))
    if record["base"] == TOYBOX or on_hub(record["base"]):
        return
    for name, changes in (
        (STUDENT_CONFIG, {"base": "", "base_revision": None}),
        (ADAPTER_CONFIG, {"base_model_name_or_path": None}),
    ):
        written = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**written, **changes}, indent=2) + "\n", encoding="utf-8")


def _training(facts: dict[str, Any]) -> str:
    """Lines of what is known, and a table of what was measured."""
    known = {"train_steps": "optimiser steps", "minutes": "minutes", "seed": "seed"}
    lines = [f"- {label}: {facts[key]}" for key, label in known.items() if isinstance(facts.get(key), int | float)]
    if held_out := facts.get("held_out"):
        lines.append(f"- prompts held out of training: {len(held_out)}")
    measured = {k: v for k, v in (facts.get("measured") or {}).items() if isinstance(v, dict)}
    columns = [key for key in METRICS if any(key in row for row in measured.values())]
    if columns:
        lines += ["", "| | prompts | " + " | ".join(METRICS[key] for key in columns) + " |"]
        lines.append("|" + "---|" * (len(columns) + 2))
        for split, row in measured.items():
            values = " | ".join(f"{row[key]:.2f}" if key in row else "" for key in columns)
            lines.append(f"| {split.replace('_', ' ')} | {row.get('count', '')} | {values} |")
    return "\n".join(lines) if lines else "Nothing is recorded about its training, and no metric was measured."


BASES = {
    TOYBOX: "the toy box that `prd` ships",
    "": "a Stable Diffusion that has no address on the Hub; its weights' hash is in config.json",
}
BASE_LICENSE = (
    "An adapter is made for a base and is of no use without it: the base's own licence, with its rules of use, applies "
    "to what is made with both. Read it on the base's page."
)
TOY_LICENSE = "The toy box's models were trained from nothing for `prd` and come under its licence, Apache-2.0."
TOY_WORLD = """
- It knows the toy box's world alone: six colours, eight shapes, and one of them on a cube or a cylinder. Any other word
  means nothing to it."""
TEXT = """# Text to 3D: a PETA adapter

Turns a sentence into a coloured mesh in {steps} denoising steps. It is {trained}, with a new last convolution of the
decoder and three small heads, on {base}{revision}, trained by
[Progressive Rendering Distillation](https://arxiv.org/abs/2503.21694): six latents of {size} x {size} become six planes
of {channels} channels, and these a signed distance and a colour at every point of a cube.

## Use

With the library `prd` (Python 3.11 or later), which is installed by `pip install .` in a copy of its repository{where}:

```python
import torch
from prd import TriplaneTurbo

pipe = TriplaneTurbo.from_pretrained("{name}"{place})
mesh = pipe("{prompt}", generator=torch.Generator().manual_seed(0)).meshes[0]
mesh.export("mesh.glb")
```

The base is loaded by the name that config.json records, and must have the weights whose hash is recorded there.
`adapter_config.json` and `adapter_model.safetensors` are a peft adapter; `prd.adapters.PetaConfig` is its config class.

## Training

{training}

## Where it fails
{world}
- It was shown pictures, never shapes: sides that its teachers rarely draw may be flat, hollow or repeated (a second
  face on the back).
- Several objects, numbers of things, written words and spatial relations are often confused or merged.
- Thin parts (legs, wires, leaves) may break off or disappear; small loose pieces are removed from the mesh.
- Light and shade of the training pictures may be baked into the colours; there is no material, only colour.
- Some prompts and seeds give no surface at all; `prd` then raises an error instead of returning a substitute.
- Prompts longer than 77 tokens are cut, and what the base has not learnt to draw is not made.

## Licence

{license}
"""
