"""Load a saved model without knowing its class."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from prd.errors import ModelMismatch
from prd.hub.find import find_model
from prd.loading.saved_model import CONFIG, read_record
from prd.pipelines.base import TextTo3DPipeline
from prd.pipelines.latte3d import LATTE3D
from prd.pipelines.single_pass import ATT3D, AToM
from prd.pipelines.triplane_turbo import TriplaneTurbo
from prd.utils.dtypes import accepts_torch_dtype

PIPELINES: dict[str, Any] = {  # by the class that config.json names
    "TriplaneTurbo": TriplaneTurbo,
    **{pipe.model_class.class_name: pipe for pipe in (AToM, ATT3D, LATTE3D)},
}


@accepts_torch_dtype
def load_pipeline(name_or_path: str | Path, **options: Any) -> TextTo3DPipeline:
    """Load the pipeline of a saved model, whichever it is; `options` as its own `from_pretrained` takes them."""
    hub = {key: options[key] for key in ("token", "cache_dir", "local_files_only") if key in options}
    folder = find_model(name_or_path, options.get("revision"), **hub)
    name = read_record(folder)["_class_name"]
    if name not in PIPELINES:
        known = ", ".join(map(repr, PIPELINES))
        raise ModelMismatch(f"{folder / CONFIG}: _class_name is {name!r}, expected {known}; update prd if it is newer")
    load = PIPELINES[name].from_pretrained
    if unknown := sorted(options.keys() - inspect.signature(load).parameters.keys()):
        raise ValueError(f"{unknown[0]}={options[unknown[0]]!r}: {name} takes no such option; leave it out")
    return load(name_or_path, **options)
