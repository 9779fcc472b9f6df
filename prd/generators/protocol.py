"""The interface of every text-to-3D model: what training, validation, saving and generating ask of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from prd.fields.protocol import Field
from prd.rendering.alpha import AlphaModel
from prd.text.encoders import PromptEncoder


@runtime_checkable
class Model(Protocol):
    """A network (a `torch.nn.Module`) from text embeddings [B, L, Ct] to a Field.

    PRD's model estimates K shapes per training step (Algorithm 1); a single-pass model (AToM, ATT3D, LATTE3D) one. Both
    are trained, validated and saved by the same code.

    config_class  dataclass of the settings that `from_config` takes
    folder_name   name of the folder that a run saves it to
    takes_shapes  whether it takes `points` of a library's shapes, which are annealed to its attribute `dummy` [N, 3]
    shares_text_encoder  whether a teacher's text encoder, if it is the same, may stand for the one of `from_config`;
                  False where that is the frozen base's own
    """

    config_class: ClassVar[type[Any]]
    folder_name: ClassVar[str]
    takes_shapes: ClassVar[bool]
    shares_text_encoder: ClassVar[bool]

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        num_denoising_steps: int = 4,
        text_dtype: torch.dtype = torch.float32,
        init_from: str | Path | None = None,
    ) -> tuple[Self, PromptEncoder]:
        """Build a model to train, on the CPU, and the encoder of its prompts.

        config               an instance of `config_class`
        num_denoising_steps  K estimates per rollout; a single-pass model has one whatever is given
        text_dtype           of a text encoder that is loaded beside the model; one that belongs to a frozen base is in
                             float32, as the base is
        init_from            a saved model whose weights to start from (a shipped name, a run folder, a folder or a Hub
                             id); ValueError if it is of another class, has other settings or another text encoder
        """
        ...

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast it in place, as `torch.nn.Module.to`."""
        ...

    def eval(self) -> Self: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def num_estimates(self) -> int:
        """Number of shapes that `rollout` estimates per prompt: K of PRD, 1 of a single-pass model."""
        ...

    def rollout(
        self,
        prompt_embeds: Tensor,
        inputs: Mapping[str, Tensor],
        draws: Sequence[torch.Generator],
        *,
        batch_size: int = 1,
        first: bool = True,
    ) -> Iterator[tuple[range, Field]]:
        """Yield (ks, field) until all `num_estimates` shapes of a batch of B prompts are estimated, with gradient.

        The field holds the B prompts of estimate ks[0], then those of ks[1], ...; the ks ascend without a gap. The
        caller computes the loss of each field and calls backward(loss / num_estimates) before it asks for the next, so
        that the activations of `batch_size` estimates exist at a time.

        prompt_embeds  [B, L, Ct]
        inputs         what the model takes besides, as `points` [B, N, 3] of a model with `takes_shapes`
        draws          one generator per prompt, on the CPU, that all of its noise is drawn from
        batch_size     estimates decoded in one batch; the gradient is the same however many
        first          whether this is the first micro-batch of an optimiser step (spectral norms iterate once per step)
        """
        ...

    def generate(
        self,
        prompt_embeds: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        *,
        num_inference_steps: int | None = None,
    ) -> Field:
        """Return the Field of B prompts, prompt_embeds [B, L, Ct]. A model may take more by keyword, as `points`.

        generator            of what is drawn: one for the batch, or one per prompt; unused where nothing is drawn
        num_inference_steps  denoising steps; None: as many as the model was trained for. Unused by single-pass models
        """
        ...

    def alpha(self) -> AlphaModel | None:
        """Return how the volume renderer reads this model's fields; None: as the renderer's own config says."""
        ...

    def begin_stage(self, trainable: Sequence[str] | None) -> None:
        """Prepare for a training stage that trains these `parts`; None: all of them."""
        ...

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Return all that can be trained, by the names that a stage may give as `trainable`."""
        ...

    def trained_state_dict(self) -> dict[str, Tensor]:
        """Return every tensor that training changes, by name."""
        ...

    def load_trained_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load a `trained_state_dict`; ValueError, before anything is changed, if a key or a shape differs."""
        ...

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the weights and their config to `folder`; dtype: of the tensors on disk, None: as they are."""
        ...


Generator = Model
