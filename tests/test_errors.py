"""Every error class of the library derives from PrdError and from the built-in error that fits."""

from __future__ import annotations

import builtins
import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import prd
from prd.errors import CheckpointError, ModelMismatch, PrdError

BUILTINS = {error for error in vars(builtins).values() if isinstance(error, type) and issubclass(error, Exception)}
EXTRAS = ("gradio", "shtab", "pxr", "imageio_ffmpeg", "DracoPy", "open_clip")  # packages that may be absent


def error_classes() -> Iterator[type[Exception]]:
    """Exceptions that are defined in prd, each once."""
    for module in pkgutil.walk_packages(prd.__path__, "prd."):
        try:
            names = vars(importlib.import_module(module.name))
        except ModuleNotFoundError as error:
            if error.name not in EXTRAS:
                raise
            continue
        for found in names.values():
            if inspect.isclass(found) and issubclass(found, Exception) and found.__module__ == module.name:
                yield found


def test_every_error_is_a_prd_error_and_a_built_in_one() -> None:
    found = list(error_classes())
    assert len(found) > 10
    assert [error for error in found if not issubclass(error, PrdError)] == []
    bare = [error for error in found if error is not PrdError and not set(error.__mro__) & (BUILTINS - {Exception})]
    assert bare == []


def test_there_is_one_checkpoint_error_under_every_name() -> None:
    from prd.adapters import convert
    from prd.teachers import loading
    from prd.training.run import checkpoints

    assert convert.CheckpointError is loading.CheckpointError is checkpoints.CheckpointError is CheckpointError
    assert issubclass(ModelMismatch, CheckpointError) and issubclass(CheckpointError, ValueError)
