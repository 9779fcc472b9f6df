"""Base class of single-pass models: AToM, ATT3D and LATTE3D.

Text embeddings in, a Field out, by `generate`; saving, loading, and the text encoder that a model belongs to.

model.safetensors   every tensor of the model
config.json         its class, its settings, the hash of the weights and of the text encoder's
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

import prd
from prd.errors import ModelMismatch
from prd.fields.protocol import Field
from prd.hub.find import find_model
from prd.hub.shipped import is_shipped, public_encoder
from prd.loading.saved_model import (
    CONFIG,
    OWN_CLASS,
    WEIGHTS,
    check_hash,
    misfits,
    own_class_record,
    read_record,
    read_weights,
    save_model,
)
from prd.loading.weight_hashes import TEXT, same_weights
from prd.rendering.alpha import AlphaModel
from prd.text.encoders import PromptEncoder
from prd.text.loading import encoder_hashes, load_encoder
from prd.utils.arguments import expanded_path
from prd.utils.construction import undrawn_weights

RECORDS = ("_class_name", OWN_CLASS, "_prd_version", "generator", "weights_hash", "text_hash")  # beside the settings


class SinglePassModel(nn.Module):
    """Network from text embeddings to a Field in one pass; a subclass writes `generate` and may name its parts.

    config  the subclass's settings, a frozen dataclass with `text_encoder`, `text_length` and `text_width`: where the
            embeddings come from, and their shape [B, text_length, text_width]
    """

    folder_name: ClassVar[str] = "generator"  # in a run folder
    class_name: ClassVar[str]  # in config.json
    config_class: ClassVar[Any]
    added_settings: ClassVar[frozenset[str]] = frozenset()  # that models saved before lack: their defaults hold
    takes_shapes: ClassVar[bool] = False  # whether `generate` takes point clouds, and `dummy` is one
    shares_text_encoder: ClassVar[bool] = True  # whether a teacher's, if it is the same, may stand for it
    num_estimates = 1  # of a rollout

    def __init__(self, config: Any) -> None:
        super().__init__()
        if config.text_length is None or config.text_width is None:
            raise ValueError(
                f"text_length={config.text_length}, text_width={config.text_width}: must be the shape of the text "
                "encoder's embeddings"
            )
        self.config = config
        self.text_hash: dict[str, str] | None = None  # of the text encoder it was trained with, by precision

    @classmethod
    def for_encoder(cls, config: Any, encoder: PromptEncoder) -> Self:
        """Build a fresh model for the embeddings of this `PromptEncoder`."""
        _, length, width = encoder([""]).shape
        on_disk = not is_shipped(config.text_encoder) and Path(config.text_encoder).expanduser().exists()
        name = "" if on_disk else public_encoder(config.text_encoder)  # as it is saved and shared
        return cls(replace(config, text_encoder=name, text_length=length, text_width=width))

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        num_denoising_steps: int = 1,
        text_dtype: torch.dtype = torch.float32,
        init_from: str | Path | None = None,
    ) -> tuple[Self, PromptEncoder]:
        """Build a model to train and load the text encoder that its config names.

        num_denoising_steps  unused: there is one pass
        text_dtype           of the text encoder's weights
        init_from            a saved model of these settings and this text encoder to start from

        Raises FileNotFoundError without a model there, and ModelMismatch for one of another class, with other
        settings or another text encoder.
        """
        encoder = load_encoder(config.text_encoder, text_dtype)
        hashes = encoder_hashes(encoder)
        model = cls.for_encoder(config, encoder)
        model.text_hash = hashes
        if init_from is not None:
            model._start_from(str(init_from), hashes)
        return model, encoder

    def _start_from(self, init_from: str, hashes: Mapping[str, str]) -> None:
        """Load the weights of a saved model; ModelMismatch if it is not like this one."""
        folder, where = find_model(init_from), f"init_from={init_from!r}"
        if (made := read_record(folder)["_class_name"]) != self.class_name:
            raise ModelMismatch(
                f"{where}: _class_name is {made!r}, expected {self.class_name!r}; give one of that class, or another "
                "model.class"
            )
        saved = type(self).from_pretrained(folder)
        for field in fields(self.config):
            theirs, ours = getattr(saved.config, field.name), getattr(self.config, field.name)
            if theirs != ours and field.name != "text_encoder":
                raise ModelMismatch(f"{where}: its model.{field.name} is {theirs}, not {ours}; set it to that")
        if not saved.fits_encoder(hashes):
            raise ModelMismatch(f"{where}: was trained with another text encoder; set model.text_encoder to that")
        self.load_trained_state_dict(saved.trained_state_dict())

    def rollout(
        self,
        prompt_embeds: Tensor,
        inputs: Mapping[str, Tensor],
        draws: Sequence[torch.Generator],
        *,
        batch_size: int = 1,
        first: bool = True,
    ) -> Iterator[tuple[range, Field]]:
        """Yield (range(1), field) once: there is one estimate per prompt, and nothing is drawn.

        first  whether spectral norms iterate, which they do once per optimiser step. See
               `prd.generators.protocol.Model.rollout`.
        """
        generate: Callable[..., Field] = self.generate  # which takes `inputs` by keyword where there are any
        self.train(first)
        field = generate(prompt_embeds, **inputs)
        self.eval()
        yield range(1), field

    def generate(
        self,
        prompt_embeds: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        *,
        num_inference_steps: int | None = None,
    ) -> Field:
        """Return the field of each prompt, prompt_embeds [B, L, Ct], with gradient where that is enabled.

        Nothing is drawn from `generator` unless a subclass says so, and there are no steps: both are there so that
        every model is called alike.
        """
        raise NotImplementedError(f"{type(self).__name__}.generate: a model says how embeddings become a field")

    def alpha(self) -> AlphaModel | None:
        """Return how the volume renderer reads its fields; None: as the renderer's own config says."""
        return None

    def begin_stage(self, trainable: Sequence[str] | None) -> None:
        """Prepare for a stage that trains these parts (None: all); nothing to do for most."""

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters by the names that a stage of training may give as `trainable`."""
        return {"all": list(self.parameters())}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and deepcopy by settings and tensors: torch pickles no layers with a spectral norm."""
        learns = [parameter.requires_grad for parameter in self.parameters()]
        return _rebuilt, (type(self), self.config, dict(self.state_dict()), self.text_hash, self.training, learns)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return every parameter that requires a gradient."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def check_embeds(self, prompt_embeds: Tensor) -> None:
        """Raise ValueError unless prompt_embeds is [B, text_length, text_width] with B >= 1."""
        expected = (self.config.text_length, self.config.text_width)
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[1:] != expected or not len(prompt_embeds):
            raise ValueError(
                f"prompt_embeds={tuple(prompt_embeds.shape)}: expected [B, {expected[0]}, {expected[1]}], of the text "
                "encoder that it was trained with"
            )

    def fits_encoder(self, hashes: Mapping[str, str]) -> bool:
        """Return True if a text encoder with these `encoder_hashes` may be the one it was trained with."""
        return self.text_hash is None or same_weights(self.text_hash, hashes, TEXT)

    # -- saving and loading ------------------------------------------------------------------------------------------

    def trained_state_dict(self) -> dict[str, Tensor]:
        """Return every tensor by name."""
        return dict(self.state_dict())

    def load_trained_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load `trained_state_dict`; ModelMismatch if a key is missing or extra or a shape differs."""
        if problems := misfits(self.state_dict(), state):
            raise ModelMismatch(f"state does not fit: {'; '.join(problems)}")
        self.load_state_dict(state, strict=True)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the weights and the settings to `folder`; each file appears whole or not at all.

        dtype: of the tensors on disk (float32, bfloat16 or float16), None: as they are
        """

        def record(hashes: dict[str, str]) -> dict[str, Any]:
            return {
                "_class_name": self.class_name,
                **own_class_record(type(self)),
                "_prd_version": prd.__version__,
                "generator": self.class_name.lower(),  # for version 0.1, which asks for it
                **asdict(self.config),
                "text_encoder": public_encoder(self.config.text_encoder),
                "weights_hash": hashes[WEIGHTS],
                "text_hash": self.text_hash,
            }

        save_model(folder, {WEIGHTS: self.state_dict()}, record, dtype=dtype)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load what `save_pretrained` wrote, in float32.

        Raises FileNotFoundError for a missing file, and ModelMismatch for one of another class, a damaged one, and
        keys or shapes that differ.
        """
        folder = expanded_path(folder, "folder")
        record = read_record(folder)
        if record["_class_name"] != cls.class_name:
            raise ModelMismatch(
                f"{folder / CONFIG}: _class_name is {record['_class_name']!r}, expected {cls.class_name!r}"
            )
        known = {field.name for field in fields(cls.config_class)}
        missing, extra = (
            sorted(known - record.keys() - cls.added_settings),
            sorted(record.keys() - known - set(RECORDS)),
        )
        if missing or extra:
            raise ModelMismatch(
                f"{folder / CONFIG}: missing {missing}, extra {extra}; saved by prd {record.get('_prd_version')}, read "
                f"by {prd.__version__}: use the version that saved it"
            )
        settings = _settings(cls, folder, {name: record[name] for name in known & record.keys()})
        state = read_weights(folder / WEIGHTS)
        check_hash(folder / WEIGHTS, record.get("weights_hash"))
        with undrawn_weights():
            model = cls(settings)
        if problems := misfits(model.state_dict(), state):
            raise ModelMismatch(f"{folder / WEIGHTS} does not fit its {CONFIG}: {'; '.join(problems)}")
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
        model.text_hash = record["text_hash"]
        return model.eval()


def _settings(cls: type[SinglePassModel], folder: Path, values: dict[str, Any]) -> Any:
    try:
        return cls.config_class(**values)
    except ValueError as error:
        raise ModelMismatch(f"{folder / CONFIG}: {' '.join(str(error).split())}") from error


def _rebuilt(
    kind: type[SinglePassModel],
    config: Any,
    state: dict[str, Tensor],
    text_hash: dict[str, str] | None,
    training: bool,
    learns: Sequence[bool],
) -> SinglePassModel:
    """The model that was pickled as these, on the device and in the precision of its tensors."""
    with undrawn_weights():
        model = kind(config)
    floats = [tensor for tensor in state.values() if tensor.is_floating_point()]
    model.to(device=floats[0].device, dtype=floats[0].dtype)
    model.load_state_dict(state, strict=True)
    model.text_hash = text_hash
    for parameter, learn in zip(model.parameters(), learns, strict=True):
        parameter.requires_grad_(learn)
    return model.train(training)
