"""What training, saving and generating ask of a generator, whichever it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prd.fields.protocol import Field


class Generator(Protocol):
    """From text embeddings [B, L, Ct] to a Field.

    PRD's student also denoises and decodes (`prd.distillation.progressive.Student`); the others answer in one pass.
    """

    folder_name: str  # what it is saved as in a run folder

    @property
    def device(self) -> torch.device: ...

    def generate(self, prompt_embeds: Tensor, generator: Any = None) -> Field:
        """The field of each prompt; `generator`: a torch.Generator, or one a prompt, of what is drawn."""
        ...

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """What is trained, by the names that a stage of training may give in `trained`."""
        ...

    def trained_state_dict(self) -> dict[str, Tensor]: ...

    def load_trained_state_dict(self, state: dict[str, Tensor]) -> None: ...

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None: ...
