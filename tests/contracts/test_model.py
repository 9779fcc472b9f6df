"""The contract of `Model`, over every text-to-3D model and one of a user's own: what training and saving rely on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.custom_generator import FilmConfig, FilmModel
from prd.adapters import PetaConfig
from prd.errors import ModelMismatch, PrdError
from prd.fields.protocol import AutogradGradient, Field
from prd.generators import SavedConfig, TriplaneTurboModel
from prd.generators.protocol import Model
from prd.generators.single_pass import SinglePassModel
from prd.generators.triplane_turbo import TriplaneTurboConfig
from tests.adapters.tiny import tiny_base
from tests.compare import ROUNDING, relative_difference
from tests.generators.tiny_single_pass import KINDS, LENGTH, TEXT, WIDTH, make

K = 4


@dataclass(frozen=True)
class BallConfig:
    """The settings of a user's own model."""

    text_encoder: str = "toybox"
    text_length: int | None = None
    text_width: int | None = None
    radius: float = 0.5


class BallField(AutogradGradient):
    def __init__(self, radius: Tensor, color: Tensor) -> None:
        self.radius, self.color = radius, color

    def sdf(self, points: Tensor) -> Tensor:
        return points.norm(dim=-1, keepdim=True) - self.radius[:, None, None]

    def rgb(self, points: Tensor) -> Tensor:
        return self.color[:, None].expand(-1, points.shape[1], -1)


class Ball(SinglePassModel):
    """The least that a single-pass model of a user's own writes: a ball whose size and colour the text decides."""

    class_name = "Ball"
    config_class = BallConfig

    def __init__(self, config: BallConfig) -> None:
        super().__init__(config)
        self.linear = nn.Linear(config.text_width or 0, 4)

    def generate(
        self, prompt_embeds: Tensor, generator: Any = None, *, num_inference_steps: int | None = None
    ) -> BallField:
        self.check_embeds(prompt_embeds)
        out = torch.sigmoid(self.linear(prompt_embeds.mean(dim=1)))
        return BallField(self.config.radius * (0.5 + out[:, 0]), out[:, 1:])


@dataclass(frozen=True)
class Member:
    """A model to test: fresh ones by seed, embeddings for it, how it is loaded, and a config for `from_config`."""

    make: Callable[[int], Any]
    tokens: int
    load: Callable[[Any, Path], Any]
    config: Any

    def embeds(self, count: int) -> Tensor:
        """[count, tokens, 12], row i the same for every count."""
        rows = [torch.randn(self.tokens, WIDTH, generator=torch.Generator().manual_seed(50 + i)) for i in range(count)]
        return torch.stack(rows)


def triplane_turbo(seed: int) -> TriplaneTurboModel:
    sizes = SavedConfig(latent_size=4, head_width=8, base="tiny", num_inference_steps=K)
    model = TriplaneTurboModel(*tiny_base(), PetaConfig(r=2, plane_channels=3), sizes)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def ball(seed: int) -> Ball:
    torch.manual_seed(seed)
    return Ball(BallConfig(text_length=LENGTH, text_width=WIDTH)).eval()


FILM = FilmConfig(width=8, depth=2, frequencies=2)


def film(seed: int) -> FilmModel:
    torch.manual_seed(seed)
    return FilmModel(replace(FILM, **TEXT)).eval()


def load_single_pass(model: SinglePassModel, folder: Path) -> SinglePassModel:
    return type(model).from_pretrained(folder)


UNSIZED = dict.fromkeys(TEXT)  # as a recipe has them: the text encoder says
MEMBERS = {
    "triplane_turbo": Member(
        triplane_turbo,
        77,
        lambda model, folder: TriplaneTurboModel.from_adapter(folder, *tiny_base()),
        TriplaneTurboConfig(base="toybox", rank=2, plane_channels=3, head_width=8, latent_size=8),
    ),
    **{
        kind: Member(lambda seed, kind=kind: make(kind, seed), LENGTH, load_single_pass, replace(config, **UNSIZED))
        for kind, (_, config) in KINDS.items()
    },
    "own": Member(ball, LENGTH, load_single_pass, BallConfig()),
    "custom": Member(film, LENGTH, load_single_pass, FILM),
}
each = pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS.keys())


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def points(batch: int) -> Tensor:
    return (torch.rand(1, 40, 3, generator=torch.Generator().manual_seed(2)) * 1.8 - 0.9).expand(batch, -1, -1)


def values(field: Field, batch: int) -> Tensor:
    """Signed distance and colour [B, N, 4] at the same points of every sample."""
    return torch.cat([field.sdf(points(batch)), field.rgb(points(batch))], dim=-1)


def state(model: Model) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.trained_state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@each
def test_it_is_a_model(member: Member) -> None:
    model = member.make(0)
    assert isinstance(model, Model) and isinstance(model, nn.Module) and not model.training
    assert model.num_estimates == (K if isinstance(model, TriplaneTurboModel) else 1)
    assert isinstance(model.folder_name, str) and isinstance(member.config, model.config_class)
    assert model.device == torch.device("cpu") and model.dtype == torch.float32


@each
@pytest.mark.parametrize("batch_size", [1, 2, 3, 9])
def test_a_rollout_yields_every_estimate_once_in_order(member: Member, batch_size: int) -> None:
    model, found = member.make(0), []
    for ks, field in model.rollout(member.embeds(2), {}, generators(1, 2), batch_size=batch_size):
        assert 1 <= len(ks) <= batch_size
        found += list(ks)
        estimates = values(field, len(ks) * 2)
        assert estimates.shape == (len(ks) * 2, 40, 4) and estimates.requires_grad
        estimates.sum().backward()  # before the next is asked for
    assert found == list(range(model.num_estimates)) and not model.training


@each
def test_the_gradient_of_a_rollout_does_not_depend_on_how_estimates_are_batched(member: Member) -> None:
    def gradients(batch_size: int) -> dict[str, Tensor]:
        model = member.make(0)
        for ks, field in model.rollout(member.embeds(2), {}, generators(1, 2), batch_size=batch_size):
            loss = values(field, 2 * len(ks)).square().flatten(1).mean(dim=1).view(len(ks), 2).mean(dim=1).sum()
            (loss / model.num_estimates).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}

    one, all_together = gradients(1), gradients(K)
    assert one and one.keys() == all_together.keys()
    for name, expected in one.items():
        tolerance = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(all_together[name], expected, rtol=1e-3, atol=tolerance, msg=name)


@each
def test_a_rollout_of_a_prompt_does_not_depend_on_its_company(member: Member) -> None:
    model = member.make(0)
    with torch.no_grad():
        together = [values(field, 2)[1] for _, field in model.rollout(member.embeds(2), {}, generators(1, 2))]
        alone = [values(field, 1)[0] for _, field in model.rollout(member.embeds(2)[1:], {}, generators(2))]
    assert len(together) == len(alone) == model.num_estimates
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@each
def test_only_the_first_rollout_of_a_step_moves_what_iterates(member: Member) -> None:
    """Spectral norms iterate once per optimiser step, however the step is shared out; nothing else ever moves."""
    model = member.make(0)
    before = state(model)
    for _ in model.rollout(member.embeds(2), {}, generators(1, 2), first=False):
        assert same(state(model), before)
    for _ in model.rollout(member.embeds(2), {}, generators(1, 2), first=True):
        pass
    moved = [name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])]
    assert bool(moved) == hasattr(model, "mapping") and all(name.endswith(("_u", "_v")) for name in moved)


@each
def test_inputs_that_it_does_not_take_are_refused(member: Member) -> None:
    model = member.make(0)
    with pytest.raises((TypeError, ValueError), match="clouds"):
        list(model.rollout(member.embeds(1), {"clouds": torch.zeros(1, 3, 3)}, generators(1)))
    if model.takes_shapes:
        (found,) = model.rollout(member.embeds(1), {"points": points(1)}, generators(1))
        assert found[0] == range(1) and model.dummy.shape[1] == 3


@each
def test_generating_is_deterministic_and_every_prompt_is_its_own(member: Member) -> None:
    model, embeds = member.make(0), member.embeds(3)
    with torch.no_grad():
        together = values(model.generate(embeds, generators(1, 2, 3)), 3)
        assert torch.equal(values(model.generate(embeds, generators(1, 2, 3)), 3), together)
        for i in range(3):
            alone = values(model.generate(embeds[i : i + 1], generators(1 + i)), 1)[0]
            torch.testing.assert_close(alone, together[i], rtol=1e-4, atol=1e-4)
        assert (together[0] - together[1]).abs().max() > 1e-4  # prompts matter
        trained = model.generate(embeds, generators(1, 2, 3), num_inference_steps=model.num_estimates)
        # None: as many steps as it was trained for
        assert relative_difference(values(trained, 3), together) <= ROUNDING
        values(model.generate(embeds[:1], num_inference_steps=2), 1)  # all take the argument


@each
def test_its_state_comes_back_and_another_is_refused_before_anything_changes(member: Member) -> None:
    model, other = member.make(0), member.make(5)
    original = state(other)
    name = next(name for name, tensor in original.items() if "lora_" not in name and tensor.is_floating_point())
    for wrong, message in (
        ({}, "missing"),
        ({**state(model), "odd": torch.zeros(1)}, r"extra \['odd'\]"),
        ({**state(model), name: torch.zeros(2, 1, 2)}, r"is \[2, 1, 2\], expected \["),
        ({**state(model), name: torch.full_like(original[name], torch.nan)}, "hold values that are no finite numbers"),
    ):
        with pytest.raises(ModelMismatch, match=message) as error:
            other.load_trained_state_dict(wrong)
        assert isinstance(error.value, PrdError) and same(state(other), original)
    assert not same(state(model), original)
    other.load_trained_state_dict(state(model))
    assert same(state(other), state(model))
    embeds = member.embeds(2)
    with torch.no_grad():
        expected = values(model.generate(embeds, generators(1, 2)), 2)
        assert relative_difference(values(other.generate(embeds, generators(1, 2)), 2), expected) <= ROUNDING


@each
def test_what_is_saved_loads_as_the_same_field(member: Member, tmp_path: Path) -> None:
    model, embeds = member.make(0), member.embeds(2)
    model.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # nothing is left aside
    loaded = member.load(model, tmp_path)
    assert loaded.config == model.config and same(state(loaded), state(model)) and not loaded.training
    with torch.no_grad():
        expected = values(model.generate(embeds, generators(1, 2)), 2)
        assert torch.equal(values(loaded.generate(embeds, generators(1, 2)), 2), expected)
        model.save_pretrained(tmp_path / "half", dtype=torch.float16)
        half = values(member.load(model, tmp_path / "half").generate(embeds, generators(1, 2)), 2)
    assert 0 < (half - expected).abs().max() < 0.05
    sizes = [
        sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (tmp_path, tmp_path / "half")
    ]
    assert sizes[1] < 0.8 * sizes[0]
    with pytest.raises(ValueError, match="dtype=torch.int8: must be torch.float32"):
        model.save_pretrained(tmp_path, dtype=torch.int8)
    assert same(state(member.load(model, tmp_path)), state(model))  # as it was


@each
def test_a_damaged_folder_is_named(member: Member, tmp_path: Path) -> None:
    model = member.make(0)
    for name in sorted(path.name for path in _saved(model, tmp_path / "whole").iterdir()):
        path = _saved(model, tmp_path / name) / name
        path.unlink()
        with pytest.raises(FileNotFoundError, match=f"{name}: is missing"):
            member.load(model, path.parent)
        path.write_bytes(b"{")
        with pytest.raises(ModelMismatch, match=f"{name}: (is no JSON|is not a whole|is not the file)"):
            member.load(model, path.parent)


def _saved(model: Model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@each
def test_its_parts_are_all_that_is_trained_and_each_once(member: Member) -> None:
    model = member.make(0)
    named = [parameter for part in model.parts().values() for parameter in part]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for p in named} == {id(p) for p in wanted} and len(named) == len(wanted) > 0
    model.begin_stage(None)
    model.begin_stage(list(model.parts())[-1:])
    assert model.alpha() is None or callable(model.alpha())


@each
def test_embeddings_of_another_shape_are_named(member: Member) -> None:
    model, embeds = member.make(0), member.embeds(2)
    for wrong in (embeds[..., :3], embeds[0], embeds[:, :, :, None]):
        shape = ", ".join(map(str, wrong.shape))
        with pytest.raises(ValueError, match=rf"prompt_embeds=\({shape}\): expected \["):
            model.generate(wrong, None)


@each
def test_it_is_built_from_its_config_and_starts_from_saved_weights(
    member: Member, toybox: Path, tmp_path: Path
) -> None:
    model_class = type(member.make(0))
    torch.manual_seed(0)
    model, encoder = model_class.from_config(member.config, num_denoising_steps=2)
    assert model.num_estimates == (2 if model_class is TriplaneTurboModel else 1)
    values(model.generate(encoder(["a red cube"])), 1)
    with torch.no_grad():
        for parameters in model.parts().values():
            parameters[-1].add_(0.25)
    model.save_pretrained(tmp_path)
    again, _ = model_class.from_config(member.config, init_from=tmp_path)
    assert same(state(again), state(model))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        model_class.from_config(member.config, init_from="nowhere")
    other = MEMBERS["own" if model_class is TriplaneTurboModel else "triplane_turbo"]
    foreign, _ = type(other.make(0)).from_config(other.config)
    foreign.save_pretrained(tmp_path / "foreign")
    with pytest.raises((ModelMismatch, FileNotFoundError)):
        model_class.from_config(member.config, init_from=tmp_path / "foreign")
    changed = next(name for name in ("head_width", "width", "radius") if hasattr(member.config, name))
    value = getattr(member.config, changed) * 2
    with pytest.raises(ModelMismatch):
        model_class.from_config(replace(member.config, **{changed: value}), init_from=tmp_path)
