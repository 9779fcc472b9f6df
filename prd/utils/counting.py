"""Operations and bytes of a computation, counted while it runs: on any device, on the meta device without memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Work:
    """10^12 floating-point operations: of convolutions, and of matrix products.

    They are kept apart for their precision may differ: torch computes convolutions of float32 in TF32 on NVIDIA's
    tensor cores, and matrix products in float32.
    """

    convolutions: float = 0.0
    products: float = 0.0

    @property
    def total(self) -> float:
        return self.convolutions + self.products

    def __add__(self, other: Work) -> Work:
        return Work(self.convolutions + other.convolutions, self.products + other.products)

    def __sub__(self, other: Work) -> Work:
        return self + (-1) * other

    def __rmul__(self, factor: float) -> Work:
        return Work(factor * self.convolutions, factor * self.products)


class LiveBytes(TorchDispatchMode):
    """Bytes of the live tensors made inside the block, and their peak, on any device (the meta device too)."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self.note(value)
        return out

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone(_: Any) -> None:
            self.live -= size
            self.seen.pop(key, None)

        self.seen[key] = weakref.ref(storage, gone)


class Operations(TorchDispatchMode):
    """Floating-point operations of convolutions and of matrix products so far, by torch's formulas.

    torch's own counter keeps the tensors that gradient checkpointing makes anew until the end of the backward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            count = formula(*args, **(kwargs or {}), out_val=out)
            if "convolution" in str(func):
                self.convolutions += count
            else:
                self.products += count
        return out


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


class FusedAttention(torch.autograd.Function):
    """The memory of a fused attention kernel, without its numbers: what it keeps are its inputs and its output."""

    counted = 0.0  # floating-point operations of all calls

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device=query.device)
        ctx.save_for_backward(query, key, value, out)
        FusedAttention.counted += attention_operations(query, key, value)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _ = ctx.saved_tensors
        FusedAttention.counted += 2 * attention_operations(query, key, value)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def attention_operations(query: Tensor, key: Tensor, value: Tensor) -> float:
    """Operations of the two products of attention; query [..., L, d], key and value [..., M, d]."""
    *heads, length, width = query.shape
    return 2.0 * torch.Size(heads).numel() * length * key.shape[-2] * (width + value.shape[-1])


def fused_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """In the place of `F.scaled_dot_product_attention`, which the meta device takes apart."""
    return FusedAttention.apply(query, key, value)


class Counter:
    """Operations and live bytes so far of what runs inside `counting`."""

    def __init__(self, operations: Operations, live: LiveBytes) -> None:
        self.operations, self.bytes = operations, live
        self.before, self.attention = Work(), FusedAttention.counted

    def work(self) -> Work:
        """Operations since the last call."""
        attention = FusedAttention.counted - self.attention
        now = Work(self.operations.convolutions / 1e12, (self.operations.products + attention) / 1e12)
        since, self.before = now - self.before, now
        return since

    def peak(self, call: Callable[[], Any]) -> tuple[int, Any]:
        """Most bytes live during a call beyond those live before it, and the call's result."""
        before = self.bytes.peak = self.bytes.live
        result = call()
        return self.bytes.peak - before, result


@contextmanager
def counting(known: list[Tensor]) -> Iterator[Counter]:
    """Count operations and live bytes; attention is taken as fused kernels compute it, without its numbers.

    known  tensors whose bytes are not counted, as the weights
    """
    with (
        mock.patch.object(F, "scaled_dot_product_attention", fused_attention),
        Operations() as operations,
        LiveBytes(known) as live,
    ):
        yield Counter(operations, live)
