"""Numbers recorded from the student when it agreed with the published code, for clones without the reference data.

python -m tests.generators.test_golden        # records them again
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from prd.adapters import PetaConfig, SixPlaneBackbone
from prd.adapters.convert import convert_published, published_config
from prd.fields.triplane import TriplaneField
from prd.generators import SavedConfig, TriplaneTurboModel
from tests.adapters.test_convert import published_state
from tests.adapters.tiny import tiny_base
from tests.parity.generator_records import plain

GOLDEN = Path(__file__).with_name("golden.json")


def wave(count: int, phase: float) -> Tensor:
    """Values that do not depend on a random number generator, in [-1, 1]."""
    return torch.sin(torch.arange(count, dtype=torch.float64) ** 1.5 + phase).float()


def fill(named: Iterable[tuple[str, Tensor]]) -> None:
    """Give every weight values of its own, of the size a trained one would have."""
    with torch.no_grad():
        for phase, (name, parameter) in enumerate(sorted(named)):
            scale = 1.0 if parameter.ndim > 1 else 0.1
            values = scale * wave(parameter.numel(), phase).view(parameter.shape) / max(parameter[0].numel(), 1) ** 0.5
            parameter.copy_(values + 1 if "norm" in name and name.endswith("weight") else values)


def numbers() -> dict[str, list[float]]:
    unet, vae, scheduler = tiny_base()
    peta = PetaConfig(r=2, plane_channels=3, plane_bias=True)
    student = TriplaneTurboModel(unet, vae, scheduler, peta, SavedConfig(latent_size=4, head_width=8))
    fill(student.named_parameters())
    latents, text = wave(2 * 6 * 4 * 16, 0.5).view(2, 6, 4, 4, 4), wave(2 * 77 * 12, 0.25).view(2, 77, 12)
    points = wave(2 * 5 * 3, 0.125).view(2, 5, 3)
    x0 = student.denoise(latents, 499, text)
    field = student.decode(x0)
    sdf, gradient = field.sdf_and_gradient(points)
    colour, deformation = field.rgb(points), field.sdf_and_deformation(points)[1]
    ((gradient.norm(dim=-1) - 1).square().mean() + sdf.mean() + colour.mean() + deformation.mean()).backward()
    grads = [parameter.grad.norm() for _, parameter in sorted(student.named_parameters()) if parameter.requires_grad]
    sampled = student.sample_latents(text, latents=latents)
    quantities = {
        "x0": x0[:, :, 0, 1, 2],
        "planes": field.planes[:, :, 1, 3, 4],
        "sdf": sdf,
        "sdf_gradient": gradient[:, 0],
        "rgb": colour[:, 0],
        "deformation": deformation[:, 0],
        "parameter_gradient_norms": torch.stack(grads)[::20],
        "sampled": sampled[:, :, 1, 2, 0],
    }
    quantities |= of_the_network(student, latents, text) | of_the_field(student, points) | published(latents, text)
    return {name: value.detach().flatten().tolist() for name, value in quantities.items()}


@torch.no_grad()
def of_the_network(student: TriplaneTurboModel, latents: Tensor, text: Tensor) -> dict[str, Tensor]:
    """The base alone, predictions, and the steps of sampling and of training."""
    unet, post_quant_conv = student.backbone.unet, student.backbone.post_quant_conv
    with student.peft.disable_adapter():
        base = unet(latents.flatten(0, 1), 501, encoder_hidden_states=text).sample
    texts = wave(2 * 6 * 77 * 12, 0.75).view(2, 6, 77, 12)
    noise = wave(latents.numel(), 0.375).view(latents.shape)
    x0 = student.denoise(latents, 749, text)
    return {
        "base": base[::4, :, 1, 2],
        "post_quant_conv": post_quant_conv(latents.flatten(0, 1))[::4, :, 1, 2],
        "prediction": student.predict(latents, 3, text)[:, :, 0, 1, 2],
        "prediction_of_six_texts": student.predict(latents, 501, texts)[:, :, 0, 1, 2],
        "noisy": student.add_noise(x0, noise, 499)[:, :, 2, 1, 3],
        "previous": student.ddim_step(latents, x0, 749, 499)[:, :, 3, 0, 1],
        "last_previous": student.ddim_step(latents, x0, 249, -1)[:, :, 3, 0, 1],
    }


def of_the_field(student: TriplaneTurboModel, points: Tensor) -> dict[str, Tensor]:
    """Lookups, heads and dense grid on given planes, and the second-order gradients of the eikonal loss."""
    planes = wave(2 * 6 * 3 * 5 * 7, 0.625).view(2, 6, 3, 5, 7).requires_grad_(True)
    field = TriplaneField(planes, student.heads, student.config.bias_radius)
    sdf, _, deformation = field.grid(4, rgb=False)
    assert deformation is not None
    _, gradient = field.sdf_and_gradient(points)
    loss = (gradient.norm(dim=-1) - 1).square().mean()
    of_planes, *of_head = torch.autograd.grad(loss, [planes, *student.heads.sdf.parameters()])
    return {
        "geometry_features": field.geometry_features(points)[:, 0],
        "texture_features": field.texture_features(points)[:, 0],
        "colour_features": field.colour_features(points)[:, 0],
        "grid_sdf": sdf[:, 1, 2],
        "grid_deformation": deformation[:, 1, 2, 3],
        "eikonal_of_planes": of_planes.flatten(2).norm(dim=-1),
        "eikonal_of_sdf_head": torch.stack([grad.norm() for grad in of_head]),
    }


def published(latents: Tensor, text: Tensor) -> dict[str, Tensor]:
    """A checkpoint of the published layout: its planes, and the gradients in its own parametrisation."""
    unet, vae, scheduler = tiny_base()
    fill([*unet.named_parameters(), *vae.named_parameters()])
    backbone = SixPlaneBackbone(unet, vae, PetaConfig(plane_channels=3))
    state = published_state(backbone)
    box = state.pop("geometry.bbox")
    fill(state.items())
    leaves = {name: tensor.detach().requires_grad_(True) for name, tensor in state.items()}
    converted = convert_published({**leaves, "geometry.bbox": box}, backbone)
    peta = published_config({**leaves, "geometry.bbox": box}, backbone)
    student = TriplaneTurboModel(unet, vae, scheduler, peta, SavedConfig(latent_size=4, head_width=8))
    student.load_trained_state_dict({name: tensor.detach() for name, tensor in converted.items()})
    planes = student.decode_planes(student.denoise(latents, 749, text))
    (planes * wave(planes.numel(), 0.875).view(planes.shape)).sum().backward()
    trained = {f"heads.{name}": parameter for name, parameter in student.heads.named_parameters()}
    trained |= {plain(name): parameter for name, parameter in student.peft.named_parameters()}
    own = {name: parameter for name, parameter in trained.items() if parameter.grad is not None}
    torch.autograd.backward([converted[name] for name in own], [own[name].grad for name in own])
    grads = [tensor.grad.norm() for _, tensor in sorted(leaves.items()) if tensor.grad is not None]
    return {"published_planes": planes[:, :, 1, 3, 4], "published_gradient_norms": torch.stack(grads)[::8]}


def test_numbers_are_those_recorded() -> None:
    recorded, now = json.loads(GOLDEN.read_text(encoding="utf-8")), numbers()
    assert recorded.keys() == now.keys()
    for name, values in recorded.items():
        expected, found = torch.tensor(values), torch.tensor(now[name])
        assert expected.abs().max() > 1e-4, name
        error = (found - expected).abs().max() / expected.abs().max()
        assert error <= 1e-4, f"{name}: relative error {error:.1e}"


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(numbers(), indent=1) + "\n", encoding="utf-8")
