"""Weights that stay in main memory and are on a device for the time of a call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 256 << 20  # bytes that are copied at once; the host's allocator rounds each up to a power of two
ALIGNMENT = 256  # bytes, of a tensor in a piece


@dataclass(frozen=True)
class _Piece:
    """A block of main memory [bytes], uint8, and the tensors that lie in it from their offsets on."""

    block: Tensor
    tensors: Sequence[tuple[Tensor, int]]

    def is_home(self) -> bool:
        """Return True if every tensor is still where it was put."""
        start = self.block.data_ptr()
        return all(tensor.data_ptr() == start + offset for tensor, offset in self.tensors if tensor.numel())

    def point(self, block: Tensor) -> None:
        """Let every tensor lie in `block`, which is this piece's or a copy of it."""
        for tensor, offset in self.tensors:
            tensor.data = _part(block, offset, tensor)


class MainMemory:
    """Frozen tensors in a few blocks of main memory, page-locked if there is a CUDA device, each copied whole.

    The tensors are moved into the blocks at once; those that are moved elsewhere later are fetched at the next visit.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.pieces = _packed(self.tensors)

    @contextmanager
    def visiting(self, device: torch.device) -> Iterator[None]:
        """Context in which the tensors are on `device`; leaving it copies nothing back."""
        if not all(piece.is_home() for piece in self.pieces):
            self.pieces = _packed(self.tensors)
        try:
            for piece in self.pieces:
                piece.point(piece.block.to(device, non_blocking=True))
            yield
        finally:
            for piece in self.pieces:
                piece.point(piece.block)


def _packed(tensors: Sequence[Tensor]) -> list[_Piece]:
    """The tensors, moved into pieces of main memory one after the other."""
    groups: list[list[tuple[Tensor, int]]] = [[]]
    end = 0
    for tensor in tensors:
        if end and end + tensor.nbytes > PIECE:
            groups.append([])
            end = 0
        groups[-1].append((tensor, end))
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return [_filled(group) for group in groups if group]


def _filled(tensors: Sequence[tuple[Tensor, int]]) -> _Piece:
    """One piece, with the tensors moved into it."""
    size = max(offset + tensor.nbytes for tensor, offset in tensors)
    block = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=torch.cuda.is_available())
    for tensor, offset in tensors:
        part = _part(block, offset, tensor)
        part.copy_(tensor.data)
        tensor.data = part
    return _Piece(block, tensors)


def _part(block: Tensor, offset: int, like: Tensor) -> Tensor:
    """The part of a block that holds a tensor of the shape, type and order of axes of `like`."""
    strides = torch.empty_like(like, device="meta").stride()
    return block[offset : offset + like.nbytes].view(like.dtype).as_strided(like.shape, strides)
