"""Moving average of the trained weights, which is what a run shows, measures and saves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class WeightAverage:
    """Exponential moving average of parameters.

    parameters  all that any stage trains, in a fixed order
    decay       share of the average that an update keeps, in (0, 1); shorter memory in the first steps
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.tensors: list[Tensor] = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights as they are after optimiser step `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.tensors, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def restart(self, trainable: Sequence[torch.nn.Parameter]) -> None:
        """Set the average of the parameters of a new stage to their values: the stage may have replaced them."""
        chosen = {id(parameter) for parameter in trainable}
        for average, parameter in zip(self.tensors, self.parameters, strict=True):
            if id(parameter) in chosen:
                average.copy_(parameter)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Put the averages in the place of the weights; afterwards the weights are what they were."""
        parameters = list[Tensor](self.parameters)
        weights = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            torch._foreach_copy_(parameters, self.tensors)
            try:
                yield
            finally:
                torch._foreach_copy_(parameters, weights)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the number of their parameter."""
        return {str(i): value for i, value in enumerate(self.tensors)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the averages of `state_dict`, on the device of their parameters."""
        self.tensors = [state[str(i)].to(parameter.device) for i, parameter in enumerate(self.parameters)]
