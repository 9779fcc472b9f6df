"""Model cards: what is written beside weights that are shared."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from prd.generators.adapter_files import read_configs
from prd.generators.single_pass import read_record

LIBRARY = "prd"
TOYBOX = "toybox"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
METRICS = {"r_at_1": "R@1", "iou": "IoU", "color_error": "colour error", "right_topology": "right topology"}


def on_hub(base: str) -> bool:
    """Whether a base's name is a Hub id, and neither "toybox" nor a path on this machine."""
    return HUB_ID.fullmatch(base) is not None and not Path(base).exists() and Path(base).suffix != ".safetensors"


def model_card(folder: Path, name: str, license: str | None, facts: dict[str, Any]) -> ModelCard:
    """The card of the generator in `folder`; it names no path of this machine."""
    if read_record(folder)["_class_name"] in PAPERS:
        return _single_pass_card(folder, name, license, facts)
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


def _single_pass_card(folder: Path, name: str, license: str | None, facts: dict[str, Any]) -> ModelCard:
    record = read_record(folder)
    kind, encoder = record["_class_name"], record["text_encoder"]
    toy, shared = encoder == TOYBOX, on_hub(encoder)
    data: dict[str, Any] = {
        "library_name": LIBRARY,
        "pipeline_tag": "text-to-3d",
        "tags": ["text-to-3d", "mesh", kind.lower()],
        "license": license or ("apache-2.0" if toy else "other"),
    }
    if data["license"] == "other":
        data["license_name"] = "license-of-the-teachers"
    words = {
        "kind": kind,
        "paper": PAPERS[kind],
        "encoder": f"[{encoder}](https://huggingface.co/{encoder})" if shared else ENCODERS.get(encoder, ENCODERS[""]),
        "place": "" if shared or toy else ', text_encoder="FOLDER_OF_ITS_TEXT_ENCODER"',
        "prompt": "a red cube" if toy else "a wooden chair with a red cushion",
        "world": TOY_WORLD if toy else "",
        "training": _training(facts),
        "license": TOY_LICENSE if toy else TEACHERS_LICENSE,
        "name": name,
        "where": f", in the folder that holds {name.removeprefix('./')}" if name.startswith("./") else "",
    }
    return ModelCard(f"---\n{ModelCardData(**data)}\n---\n\n{SINGLE_PASS_TEXT.format(**words)}")


def _training(facts: dict[str, Any]) -> str:
    """Lines of what is known, and a table of what was measured."""
    known = {"train_steps": "optimiser steps", "frames_per_prompt": "rendered frames a prompt", "minutes": "minutes"}
    known["seed"] = "seed"
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
PAPERS = {
    "AToM": "[AToM](https://arxiv.org/abs/2402.00867)",
    "ATT3D": "[ATT3D](https://arxiv.org/abs/2306.07349)",
    "LATTE3D": "[LATTE3D](https://arxiv.org/abs/2403.15385)",
}
ENCODERS = {
    TOYBOX: "the text encoder of the toy box that `prd` ships",
    "": "a text encoder that has no address on the Hub; its hash is in config.json",
}
TEACHERS_LICENSE = (
    "What it makes it has learnt from its teachers' pictures: their own licences, with their rules of use, apply. Read "
    "them on the teachers' pages."
)
SINGLE_PASS_TEXT = """# Text to 3D: {kind}

Turns a sentence into a coloured mesh in one pass. It is a generator after {paper}, trained from pictures of
text-to-image teachers by score distillation; its prompts are encoded by {encoder}.

## Use

With the library `prd` (Python 3.11 or later), which is installed by `pip install .` in a copy of its repository{where}:

```python
from prd import {kind}

pipe = {kind}.from_pretrained("{name}"{place})
mesh = pipe("{prompt}").meshes[0]
mesh.export("mesh.glb")
```

`model.safetensors` holds every weight of the generator; the text encoder is loaded by the name in config.json and must
be the one whose hash is recorded there.

## Training

{training}

## Where it fails
{world}
- It gives one shape a prompt: there is no noise to draw another.
- It knows its training prompts and what lies between them; other prompts give a mixture of these.
- Light and shade of the training pictures may be baked into the colours; there is no material, only colour.
- Some prompts give no surface at all; `prd` then raises an error instead of returning a substitute.

## Licence

{license}
"""
