"""Numbers recorded from the student when it agreed with the published code, for clones without the reference data.

python -m tests.generators.test_golden        # records them again
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from prd.adapters import PetaConfig
from prd.generators import StudentConfig, TriplaneTurboGenerator
from tests.adapters.tiny import tiny_base

GOLDEN = Path(__file__).with_name("golden.json")


def wave(count: int, phase: float) -> Tensor:
    """Values that do not depend on a random number generator, in [-1, 1]."""
    return torch.sin(torch.arange(count, dtype=torch.float64) ** 1.5 + phase).float()


def numbers() -> dict[str, list[float]]:
    unet, vae, scheduler = tiny_base()
    peta = PetaConfig(r=2, plane_channels=3, plane_bias=True)
    student = TriplaneTurboGenerator(unet, vae, scheduler, peta, StudentConfig(latent_size=4, head_width=8))
    with torch.no_grad():
        for phase, (name, parameter) in enumerate(sorted(student.named_parameters())):
            scale = 1.0 if parameter.ndim > 1 else 0.1
            values = scale * wave(parameter.numel(), phase).view(parameter.shape) / max(parameter[0].numel(), 1) ** 0.5
            parameter.copy_(values + 1 if "norm" in name and name.endswith("weight") else values)
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
    return {name: value.detach().flatten().tolist() for name, value in quantities.items()}


def test_numbers_are_those_recorded() -> None:
    recorded, now = json.loads(GOLDEN.read_text()), numbers()
    assert recorded.keys() == now.keys()
    for name, values in recorded.items():
        expected, found = torch.tensor(values), torch.tensor(now[name])
        assert expected.abs().max() > 1e-4, name
        error = (found - expected).abs().max() / expected.abs().max()
        assert error <= 1e-4, f"{name}: relative error {error:.1e}"


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(numbers(), indent=1) + "\n")
