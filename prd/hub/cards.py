"""Model cards: what is written beside weights that are shared. Their text is in templates/*.md."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from prd.generators.adapter_files import CLASS_NAME, read_configs
from prd.hub.find import METRICS
from prd.hub.shipped import about, is_shipped, public_base, public_encoder
from prd.loading.saved_model import OWN_CLASS, read_record
from prd.text.trained_prompts import KEY

LIBRARY = "prd"
PROMPT = "a wooden chair with a red cushion"
BASE = "a base that has no address on the Hub; its weights' hash is in config.json"
BASE_LICENSE = (
    "An adapter is made for a base and is of no use without it: the base's own licence, with its rules of use, applies "
    "to what is made with both. Read it on the base's page."
)
ENCODER = "a text encoder that has no address on the Hub; its hash is in config.json"
TEACHERS_LICENSE = (
    "What it makes it has learnt from its teachers' pictures: their own licences, with their rules of use, apply. Read "
    "them on the teachers' pages."
)
PAPERS = {
    "AToM": "[AToM](https://arxiv.org/abs/2402.00867)",
    "ATT3D": "[ATT3D](https://arxiv.org/abs/2306.07349)",
    "LATTE3D": "[LATTE3D](https://arxiv.org/abs/2403.15385)",
}


def model_card(folder: Path, name: str, license: str | None, training_metadata: dict[str, Any]) -> ModelCard:
    """Return the card of the model in `folder`; it names no path of this machine."""
    if read_record(folder)["_class_name"] != CLASS_NAME:
        return _single_pass_card(folder, name, license, training_metadata)
    peta, record = read_configs(folder)
    base = public_base(record["base"], record["base_revision"])
    known, shared = about(base), base != "" and not is_shipped(base)
    data: dict[str, Any] = {
        "library_name": LIBRARY,
        "pipeline_tag": "text-to-3d",
        "tags": ["text-to-3d", "triplane", "mesh", "peft", "lora", "progressive-rendering-distillation"],
        "license": license or known.get("license", "other"),
    }
    if shared:
        data |= {"base_model": base, "base_model_relation": "adapter"}
    if data["license"] == "other":
        data["license_name"] = "license-of-the-base-model"
        if shared:
            data["license_link"] = f"https://huggingface.co/{base}"
    words = {
        "base": _link(base) if shared else f"{known['title']} that `prd` ships" if "title" in known else BASE,
        "revision": f", revision `{record['base_revision']}`" if shared and record["base_revision"] else "",
        "place": "" if shared or known else ', base="FOLDER_OF_ITS_BASE"',
        "prompt": known.get("prompt", PROMPT),
        "trained": "full fine-tuning of the network and the decoder" if peta.full else f"PETA of rank {peta.r}",
        "channels": peta.plane_channels,
        "steps": record["num_inference_steps"],
        "size": record["latent_size"],
        "license": known.get("license_text", BASE_LICENSE),
    }
    return _card("adapter", data, {**words, **_common(name, known, training_metadata)})


def _single_pass_card(folder: Path, name: str, license: str | None, training_metadata: dict[str, Any]) -> ModelCard:
    record = read_record(folder)
    kind, encoder = record["_class_name"], public_encoder(record["text_encoder"])
    known, shared = about(encoder), encoder != "" and not is_shipped(encoder)
    data: dict[str, Any] = {
        "library_name": LIBRARY,
        "pipeline_tag": "text-to-3d",
        "tags": ["text-to-3d", "mesh", kind.lower()],
        "license": license or known.get("license", "other"),
    }
    if data["license"] == "other":
        data["license_name"] = "license-of-the-teachers"
    shipped_encoder = f"the text encoder of {known.get('title')} that `prd` ships"
    words = {
        "kind": kind,
        **_origin(kind, record.get(OWN_CLASS)),
        "encoder": _link(encoder) if shared else shipped_encoder if "title" in known else ENCODER,
        "place": "" if shared or known else ', text_encoder="FOLDER_OF_ITS_TEXT_ENCODER"',
        "prompt": known.get("single_pass_prompt", PROMPT),
        "license": known.get("license_text", TEACHERS_LICENSE),
    }
    return _card("single_pass", data, {**words, **_common(name, known, training_metadata)})


def _origin(kind: str, own_class: str | None) -> dict[str, str]:
    """The words of where a single-pass model's class comes from, and how it is loaded."""
    if kind in PAPERS and own_class is None:
        return {
            "origin": f"after {PAPERS[kind]}",
            "imports": f"from prd import {kind}",
            "load": f"{kind}.from_pretrained(",
        }
    module, _, name = (own_class or "MODULE_OF_ITS_MAKER.CLASS").rpartition(".")
    return {
        "origin": f"of its maker's own class `{module}.{name}`",
        "imports": f"from {module} import {name}\nfrom prd import load_pipeline",
        "load": f"load_pipeline(model_class={name}, name_or_path=",
    }


def _link(repository: str) -> str:
    return f"[{repository}](https://huggingface.co/{repository})"


def _common(name: str, known: dict[str, Any], training_metadata: dict[str, Any]) -> dict[str, str]:
    """The words that every template has places for."""
    return {
        "limits": f"\n- {known['limits']}" if "limits" in known else "",
        "training": _training(training_metadata),
        "name": name,
        "where": f", in the folder that holds {name.removeprefix('./')}" if name.startswith("./") else "",
    }


def _card(template: str, data: dict[str, Any], words: dict[str, Any]) -> ModelCard:
    text = (resources.files("prd.hub") / "templates" / f"{template}.md").read_text(encoding="utf-8")
    return ModelCard(f"---\n{ModelCardData(**data)}\n---\n\n{text.format(**words)}")


def _training(metadata: dict[str, Any]) -> str:
    """Lines of what is known, and a table of what was measured."""
    known = {"train_steps": "optimiser steps", "frames_per_prompt": "rendered frames per prompt", "minutes": "minutes"}
    known["seed"] = "seed"
    lines = [f"- {label}: {metadata[key]}" for key, label in known.items() if type(metadata.get(key)) in (int, float)]
    if KEY in metadata:
        lines.append(f"- prompts it was trained on: {metadata[KEY]['prompts']}")
    if held_out := metadata.get("held_out"):
        lines.append(f"- prompts held out of training: {len(held_out)}")
    measured = {k: v for k, v in (metadata.get("measured") or {}).items() if isinstance(v, dict)}
    columns = [key for key in METRICS if any(key in row for row in measured.values())]
    if columns:
        lines += ["", "| | prompts | " + " | ".join(METRICS[key] for key in columns) + " |"]
        lines.append("|" + "---|" * (len(columns) + 2))
        for split, row in measured.items():
            values = " | ".join(f"{row[key]:.2f}" if key in row else "" for key in columns)
            lines.append(f"| {split.replace('_', ' ')} | {row.get('count', '')} | {values} |")
    return "\n".join(lines) if lines else "Nothing is recorded about its training, and no metric was measured."
