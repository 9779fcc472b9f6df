"""Progress of long work, for whoever shows it: the things that are loaded, and the place within a training step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import Any

from torch import Tensor
from tqdm import tqdm

BAR = "{desc}: |{bar:20}| {n:.3g} of {total:.3g} GB, {elapsed_s:.1f} s"
LINE = "{desc}: {elapsed_s:.1f} s"  # of what has no gigabytes, as what is loaded by other means than ours

_SHOWN = ContextVar("loading is shown", default=False)
_BAR: ContextVar[Any] = ContextVar("bar of what is being loaded", default=None)
_PLACE: ContextVar[dict[str, str] | None] = ContextVar("place within a step", default=None)


# -- loading ----------------------------------------------------------------------------------------------------------


@contextmanager
def shown_loading(on: bool = True) -> Iterator[None]:
    """Context in which each `loading` has a bar, and those of diffusers and transformers, without a name, are silent.

    on  False: nothing of ours is shown either, as in all but one of several processes
    """
    token = _SHOWN.set(on)
    try:
        with silent_libraries():
            yield
    finally:
        _SHOWN.reset(token)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Context in which a thing is loaded: one bar with its name, gigabytes and seconds where loading is shown.

    What is loaded inside of another thing's context counts to that.
    """
    if not _SHOWN.get() or _BAR.get() is not None:
        yield
        return
    with tqdm(desc=name, total=0, unit_scale=1e-9, bar_format=BAR, miniters=0, mininterval=0.5) as bar:
        token = _BAR.set(bar)
        try:
            yield
        finally:
            _BAR.reset(token)
            if not bar.total:
                bar.bar_format = LINE
            bar.refresh()


def counted(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each, counted as loaded when the next one is asked for."""
    bar = _BAR.get()
    if bar is not None:
        bar.total += sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        yield name, tensor
        if bar is not None:
            bar.update(tensor.nbytes)


@contextmanager
def silent_libraries() -> Iterator[None]:
    """Context without the progress bars of diffusers and transformers; those of downloads, which are named, stay."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers_logging

    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    enabled = [library for library in libraries if library.is_progress_bar_enabled()]
    downloads = not hub.are_progress_bars_disabled()  # which transformers switches too
    for library in enabled:
        library.disable_progress_bar()
    if downloads:
        hub.enable_progress_bars()
    try:
        yield
    finally:
        for library in enabled:
            library.enable_progress_bar()
        if not downloads:
            hub.disable_progress_bars()


# -- the place within a step ------------------------------------------------------------------------------------------


def at(**where: str | None) -> None:
    """Note where the work is, by what it is a part of: `at(estimate="estimate 2 of 4", doing="denoising")`.

    None: no longer part of such. Costs nothing where nobody follows it, and reads nothing from a device.
    """
    if (place := _PLACE.get()) is not None:
        for key, value in where.items():
            if value is None:
                place.pop(key, None)
            else:
                place[key] = value


def follow(place: dict[str, str]) -> Token[dict[str, str] | None]:
    """Have `at` of this thread written into `place` from now on; `unfollow` ends it."""
    return _PLACE.set(place)


def unfollow(token: Token[dict[str, str] | None]) -> None:
    """End what `follow` began."""
    _PLACE.reset(token)
