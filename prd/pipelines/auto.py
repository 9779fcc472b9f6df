"""Load a saved model without knowing its class."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from prd.errors import ConfigError, ModelMismatch
from prd.hub.find import find_model
from prd.loading.saved_model import CONFIG, OWN_CLASS, read_record
from prd.pipelines.base import TextTo3DPipeline
from prd.pipelines.latte3d import LATTE3D
from prd.pipelines.single_pass import ATT3D, AToM, SinglePassPipeline
from prd.pipelines.triplane_turbo import TriplaneTurbo
from prd.utils.dtypes import accepts_torch_dtype
from prd.utils.imports import lies_in, load_class

PIPELINES: dict[str, Any] = {  # by the class that config.json names
    "TriplaneTurbo": TriplaneTurbo,
    **{pipe.model_class.class_name: pipe for pipe in (AToM, ATT3D, LATTE3D)},
}


@accepts_torch_dtype
def load_pipeline(name_or_path: str | Path, *, model_class: type | None = None, **options: Any) -> TextTo3DPipeline:
    """Load the pipeline of a saved model, whichever it is; `options` as its own `from_pretrained` takes them.

    model_class  of a model of one's own, derived from `SinglePassModel` or a model of the library; None: the class
                 whose import path the saved folder holds, if this is on disk and does not hold the class's code

    Raises ModelMismatch for a model whose class is neither the library's, nor given, nor can be imported.
    """
    hub = {key: options[key] for key in ("token", "cache_dir", "local_files_only") if key in options}
    folder = find_model(name_or_path, options.get("revision"), **hub)
    record = read_record(folder)
    name = record["_class_name"]
    if model_class is None and OWN_CLASS in record:
        model_class = _own_class(record[OWN_CLASS], folder, name_or_path)
    if model_class is None and name not in PIPELINES:
        known = ", ".join(map(repr, PIPELINES))
        raise ModelMismatch(
            f"{folder / CONFIG}: _class_name is {name!r}, expected {known}; update prd if it is newer, or pass "
            "model_class= if it is your own"
        )
    pipeline = PIPELINES.get(name, SinglePassPipeline)
    if model_class is not None:
        pipeline = _pipeline_of(model_class, pipeline)
    load = pipeline.from_pretrained
    if unknown := sorted(options.keys() - inspect.signature(load).parameters.keys()):
        raise ValueError(f"{unknown[0]}={options[unknown[0]]!r}: {name} takes no such option; leave it out")
    return load(name_or_path, **options)


def _pipeline_of(model_class: type, pipeline: Any) -> Any:
    """A pipeline like this one, for models of a class of the user's own; ModelMismatch unless it is one of its kind."""
    kind = pipeline.model_class
    if not isinstance(model_class, type) or not issubclass(model_class, kind):
        raise ModelMismatch(f"model_class={model_class!r}: must be a class derived from {kind.__name__}")
    return type(model_class.__name__, (pipeline,), {"model_class": model_class, "__doc__": model_class.__doc__})


def _own_class(path: Any, folder: Path, name_or_path: str | Path) -> type:
    """The class that a saved folder names by its import path; none is imported for, or from, what was downloaded."""
    where = f"{name_or_path}: is of the class {path!r}, which is not prd's"
    remedy = "import it yourself and pass it as load_pipeline(..., model_class=)"
    place = Path(name_or_path).expanduser()
    if not place.exists():
        raise ModelMismatch(
            f"{where}, and no class is imported because a download names it; {remedy}, or give the folder of a copy on "
            "this disk"
        )
    if not isinstance(path, str):
        raise ModelMismatch(f"{folder / CONFIG}: {OWN_CLASS}={path!r}: must be an import path; save the model again")
    if lies_in(path, place):
        raise ModelMismatch(f"{where}, and no code is imported from the folder of a model; {remedy}")
    try:
        return load_class(path, key=OWN_CLASS)
    except ConfigError as error:
        raise ModelMismatch(
            f"{where} and cannot be imported here ({error}); {remedy}, or add its module's folder to PYTHONPATH"
        ) from error
