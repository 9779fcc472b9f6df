"""A pretended accelerator: tensors that say they are on another device, hold numbers in main memory, and do not mix.

with PretendedDevice() as device:
    model.to(device.name)
    ...
    device.reads          # values that were read to the host

Inside the block a tensor that was sent to the device, and all that is computed from it, reports that device. As on a
real one, an operation on tensors of two devices, `.numpy()`, and a generator of the CPU that draws there are errors; a
tensor without axes and indices from main memory are not. What is created inside of operations follows their arguments.
Autocast and memory statistics of a device are not pretended.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

NAME = "xpu:0"  # a device that torch knows by name and no test machine has
READS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "equal", "allclose", "cpu"}
MOVES = {"to", "cpu", "copy_", "set_", "__set__", "_has_compatible_shallow_copy_type"}  # between two devices
INDEXING = {"__getitem__", "__setitem__", "index_put_"}  # by indices from main memory
PLAIN = {"untyped_storage", "data_ptr", "size", "dim", "numel", "stride", "element_size"}


class PretendedDevice:
    """The device, on which a tensor is if its storage is noted here.

    reads  how often a value was read to the host, by the name of the function
    """

    def __init__(self) -> None:
        self.name = NAME
        self.reads: Counter[str] = Counter()
        self.storages: dict[int, Any] = {}  # by address; each is kept, so that none is taken for a later one
        self.working = False  # inside of an operation on the device
        self.modes: list[Any] = []

    def __enter__(self) -> PretendedDevice:
        forget_tables()  # of an earlier one of that name
        self.modes = [_Created(self), _Called(self)]
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)

    def holds(self, value: object) -> bool:
        """Return True if a value is a tensor on the device."""
        with torch._C.DisableTorchFunction():
            return isinstance(value, Tensor) and _address(value) in self.storages

    def take(self, value: Any) -> Any:
        """Note every tensor in a value as one on the device, and return the value."""
        with torch._C.DisableTorchFunction():
            for tensor in tree_iter(value):
                if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                    self.storages[_address(tensor)] = tensor.untyped_storage()
        return value


def forget_tables() -> None:
    """Empty the library's caches, some of which hold tables by the device's name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("prd."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Created(TorchDispatchMode):
    """Notes what is created inside of operations on the device, and in the backward pass from what is there."""

    def __init__(self, device: PretendedDevice) -> None:
        super().__init__()
        self.own = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        backward = torch._C._current_graph_task_id() != -1
        if self.own.working or (backward and any(map(self.own.holds, tree_iter((args, kwargs))))):
            self.own.take(out)
        return out


class _Called(TorchFunctionMode):
    """Answers for the device where Python asks: where tensors are, to be moved, created there, or read."""

    def __init__(self, device: PretendedDevice) -> None:
        super().__init__()
        self.own = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, own = dict(kwargs or {}), self.own
        name = getattr(func, "__name__", "")
        owner = getattr(getattr(func, "__self__", None), "__name__", "")  # of a property's getter
        first = args[0] if args and isinstance(args[0], Tensor) else None
        here = first is not None and own.holds(first)
        if name == "__get__":
            if owner == "device":
                return torch.device(NAME) if here else func(*args)
            return {"is_cpu": False, "is_xpu": True}.get(owner, func(*args)) if here else func(*args)
        if name in PLAIN:
            return func(*args, **kwargs)
        if name == "numpy" and here:
            raise TypeError(f"can't convert {NAME} device type tensor to numpy: use Tensor.cpu() first")
        if here and name in READS:
            own.reads[name] += 1
            if name != "cpu":
                return func(*args, **kwargs)
        if first is not None and name in ("to", "cpu"):
            return self.moved(first, here, args[1:], kwargs, name)
        return self.computed(func, name, args, kwargs)

    def moved(self, tensor: Tensor, here: bool, args: Any, kwargs: dict[str, Any], name: str) -> Tensor:
        """`Tensor.to` and `Tensor.cpu`."""
        own, there = self.own, here
        rest: list[Any] = []
        for value in args:
            if isinstance(value, str | torch.device):
                there = _is_pretended(value)
            elif value is None or isinstance(value, bool):  # no type; whether to wait
                continue
            elif isinstance(value, Tensor):
                there, kwargs["dtype"] = own.holds(value), value.dtype
            else:
                rest.append(value)
        if (asked := kwargs.pop("device", None)) is not None:
            there = _is_pretended(asked)
        there = False if name == "cpu" else there
        own.reads["to"] += int(here and not there and name == "to")
        kwargs.pop("non_blocking", None)
        with torch._C.DisableTorchFunction():
            out = Tensor.to(tensor, *rest, **kwargs) if rest or kwargs else tensor
            if there != here and (out is tensor or _address(out) == _address(tensor)):
                out = tensor.clone()
            if out is not tensor and there:
                own.take(out)
        return out

    def computed(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """Anything else: checked for tensors of two devices, and noted if it is done on this one."""
        own, asked = self.own, kwargs.get("device")
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        places = [own.holds(tensor) for tensor in tensors]
        there = any(places) if asked is None else _is_pretended(asked)
        if asked is not None and there:
            kwargs["device"] = "cpu"
        elif asked is None and places and any(places) and name not in MOVES | INDEXING:
            with torch._C.DisableTorchFunction():
                strange = [
                    t for t, on in zip(tensors, places, strict=True) if not on and t.ndim and t.device.type == "cpu"
                ]
            if strange:
                raise RuntimeError(f"{name}: expected all tensors on one device, found {NAME} and cpu")
        if there and kwargs.get("generator") is not None:
            raise RuntimeError(f"{name}: expected a '{NAME}' generator, found one of the cpu")
        if asked is not None and not there:
            return func(*args, **kwargs)
        before, own.working = own.working, there
        try:
            out = func(*args, **kwargs)
        finally:
            own.working = before
        return own.take(out) if there and name != "__set__" else out


def _is_pretended(device: Any) -> bool:
    return torch.device(device).type == torch.device(NAME).type
