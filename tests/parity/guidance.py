"""Score distillation by three teachers against the published code's recorded numbers.

    python -m tests.parity.guidance FOLDER        # FOLDER/guidance, and the teachers of /generator and /teachers

One line a quantity with its error; the exit status is 1 if any is past tolerance, or recorded and not compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from prd.cameras import Cameras, orbit_cameras
from prd.distillation.asd import AsdConfig, asd_loss
from prd.distillation.distill import select_views
from prd.distillation.timesteps import shifted_timesteps
from prd.rendering.views import Views
from prd.teachers import MVDreamConfig, MVDreamTeacher, RichDreamerConfig, RichDreamerTeacher, StableDiffusionTeacher
from prd.teachers.base import UNetTeacher
from prd.teachers.convert import stable_diffusion_scheduler
from prd.utils.checked_types import scheduled
from tests.parity import CLOSED_FORM, GRADIENT, Recording, compared
from tests.parity.teachers import RecordedTeachers

GUIDANCE = 1e-4
WEIGHTINGS: dict[str, Any] = {  # published name -> ours
    "dmd": {"weighting": "dmd", "average_over": "image"},
    "dmd_mv": {"weighting": "dmd", "average_over": "prompt"},
    "uniform": {"weighting": "uniform"},
    "sds": {"weighting": "sds"},
    "sds_sqrt": {"weighting": "sqrt"},
}
TEACHERS = ("mv", "rd", "sd")
T_MIN_OF_TABLES = 20  # of the `tplus.*` tables, by the reference data's README


def recorded_text(width: int) -> dict:
    """A text encoder of the right width that is never run: the recorded embeddings lie in the prompt cache."""
    config = CLIPTextConfig(
        vocab_size=2,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=0,
        eos_token_id=1,
    )
    return {"tokenizer": None, "text_encoder": CLIPTextModel(config)}


def linear(value: float | list[float], step: int, scale: float = 1.0) -> float:
    """A published schedule, a number or [start step, start, end, end step], at a step, times `scale`."""
    if isinstance(value, int | float):
        return value * scale
    first, start, end, last = value
    return scheduled((start * scale, end * scale), step - int(first), int(last) - int(first))


class GuidanceParity:
    """The recorded renderings, cameras and texts, and the three teachers."""

    def __init__(self, folder: Path) -> None:
        self.meta = json.loads((folder / "guidance" / "meta.json").read_text(encoding="utf-8"))
        self.io = io = Recording("guidance", folder / "guidance" / "io.safetensors")
        self.views, batch = self.meta["n_view"], self.meta["n_prompt"]
        self.prompts = [f"prompt {i}" for i in range(batch)]
        elevation, azimuth, relative, fovy = (
            io.input(f"cam.{name}").view(batch, self.views)
            for name in ("elevation_deg", "azimuth_deg", "distance_relative", "fovy_deg")
        )
        distance = relative / torch.tan(torch.deg2rad(fovy) / 2)
        self.cameras = orbit_cameras(elevation, azimuth, distance, fovy)
        base, case = folder / "generator", next(iter(self.meta["cases"]))
        sizes = [io.tensors[f"{case}.{name}.latents"].shape[-1] for name in ("mv", "rd")]
        parts = RecordedTeachers(folder / "teachers", *sizes)  # each case then says its own
        unet = UNet2DConditionModel.from_config(
            json.loads((base / "base_unet_config.json").read_text(encoding="utf-8"))
        )
        unet.load_state_dict(load_file(base / "base_unet.safetensors"), strict=True)
        vae = AutoencoderKL.from_config(json.loads((base / "base_vae_config.json").read_text(encoding="utf-8")))
        vae.load_state_dict(load_file(base / "base_vae.safetensors"), strict=True)
        schedule, text = stable_diffusion_scheduler(), recorded_text(unet.config.cross_attention_dim)
        own_text = recorded_text(parts.rd_unet.config.cross_attention_dim)
        published = RichDreamerConfig(image_range=(0.0, 1.0), resize="area")
        self.teachers: dict[str, UNetTeacher] = {
            "mv": MVDreamTeacher(parts.mv_unet, parts.vae, schedule, config=MVDreamConfig(), **text),
            "rd": RichDreamerTeacher(parts.rd_unet, schedule, config=published, **own_text),
            "sd": StableDiffusionTeacher(unet, vae, schedule, **text),
        }
        for name, cond, uncond in (
            ("mv", "sdmv_cond", "sdmv_uncond_negprompt"),
            ("rd", "rd_cond", "rd_uncond"),
            ("sd", "sdmv_cond", "sd_uncond_empty"),
        ):
            texts = dict(zip(self.prompts, io.input(f"text.{cond}"), strict=True))
            self.teachers[name].prompt_encoder.encoded.update(texts | {"negative": io.input(f"text.{uncond}")})

    def run(self) -> int:
        self.camera_inputs()
        self.shifts()
        first = next(iter(self.meta["cases"].values()))
        for step, recorded in self.meta["schedules"].items():
            self.schedules(f"schedules.{step}", int(step), first["config"], recorded)
        for name, case in self.meta["cases"].items():
            self.schedules(f"{name}.resolved", case["global_step"], case["config"], case["resolved"])
            self.case(name, case)
        return self.io.finish()

    def schedules(self, name: str, step: int, config: dict, recorded: dict) -> None:
        """The limits, guidance scales and weights that the schedules of `config` come to at a training step."""
        for key, expected in recorded.items():
            if key.endswith("_step"):
                value = config[f"{key}_percent"]
                # truncated as published; schedules of timesteps and of fractions may round to either side of a whole
                found = {int(linear(value, step, scale) * 1000 / scale) for scale in (1, 1000)}
                self.io.report(f"{name}.{key}", f"{expected} in {sorted(found)}", ok=expected in found)
            else:
                value = torch.tensor(linear(config[key], step), dtype=torch.float64)
                self.io.check(f"{name}.{key}", value, torch.tensor(expected, dtype=torch.float64), CLOSED_FORM)

    def camera_inputs(self) -> None:
        io, cameras = self.io, self.cameras
        io.compare("cam.c2w", cameras.camera_to_world, CLOSED_FORM)
        io.compare("cam.camera_distances", cameras.distance, CLOSED_FORM)
        io.compare("cam.camera_distances_relative", cameras.relative_distance, CLOSED_FORM)
        for name in ("mv", "rd"):
            vector = self.teachers[name].condition(self.prompts, cameras, "negative").camera
            assert vector is not None
            io.compare(f"cam.{name}_camera_cond", vector, CLOSED_FORM)
            if name == "mv":  # the published code overwrites its cameras with these
                io.compare("cam.c2w_after_inplace_normalisation", vector, CLOSED_FORM)

    def shifts(self) -> None:
        """The largest shift of each table: eta (t - t_min) as in the recipe, eta t, or eta sqrt(t + bias)."""
        t = self.io.input("tplus.t")
        for name in sorted(self.io.left):
            if name.startswith("tplus."):
                schedule, ratio = name.split(".", 2)[1], float(name.split("ratio")[1].removesuffix(".norandom"))
                self.io.compare(name, shift(t, torch.ones(t.shape), ratio, T_MIN_OF_TABLES, schedule), 0)

    def renderings(self, dual: bool) -> tuple[dict[str, Tensor], Views]:
        """The recorded renderings as leaves, and as views, those of a second renderer as more prompts."""
        suffixes = ("", "_2nd") if dual else ("",)
        leaves = {
            f"{name}{suffix}": self.io.input(f"in.{name}{suffix}").clone().requires_grad_()
            for suffix in suffixes
            for name in ("rgb", "normal", "depth")
        }
        rgb, packed, disparity = (
            torch.cat([leaves[f"{name}{suffix}"].unflatten(0, (-1, self.views)) for suffix in suffixes])
            for name in ("rgb", "normal", "depth")
        )
        repeat = len(suffixes)
        cameras = Cameras(self.cameras.camera_to_world.repeat(repeat, 1, 1, 1), self.cameras.fovy.repeat(repeat, 1))
        in_camera = (2 * packed - 1) * packed.new_tensor([-1.0, 1.0, 1.0])  # the packing undone
        normal = torch.einsum("bvij,bvhwj->bvhwi", cameras.camera_to_world[..., :3, :3], in_camera)
        opacity = torch.ones_like(disparity)
        return leaves, Views(rgb, normal, disparity.detach(), disparity, opacity, cameras)

    def case(self, case_name: str, case: dict) -> None:
        leaves, views = self.renderings(case["dual"])
        totals = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        norms: dict[str, Tensor] = {}
        for name, teacher in self.teachers.items():
            gradients, norms[name] = self.teacher_case(f"{case_name}.", name, teacher, case, leaves, views)
            for leaf, gradient in gradients.items():
                totals[leaf] += case["resolved"][f"{name}_weight"] * gradient
        for leaf, total in totals.items():
            if f"{case_name}.total_grad.{leaf}" in self.io.tensors:  # recorded for some cases
                self.io.compare(f"{case_name}.total_grad.{leaf}", total, GRADIENT)
        expected = torch.tensor(case["returned_grad_norm"]).flatten()
        self.io.check(f"{case_name}.returned_grad_norm", returned_norms(norms, case), expected, GUIDANCE)

    def teacher_case(
        self, case: str, name: str, teacher: UNetTeacher, settings: dict, leaves: dict[str, Tensor], views: Views
    ) -> tuple[dict[str, Tensor], Tensor]:
        """One teacher's gradients at the renderings, and the norm of that at its input, [renderers]."""
        io, config = self.io, settings["config"]
        rng, renderers = f"{case}rng.{name}.", 2 if settings["dual"] else 1
        teacher.unet.register_to_config(sample_size=io.tensors[f"{case}{name}.latents"].shape[-1])
        if name == "sd":
            views = select_views(views, self.single_view(case, settings)[:, None])
        x = teacher.encode(views, noise=None if name == "rd" else io.input(f"{rng}vae_noise"))
        io.compare(f"{case}{name}.latents", x, GUIDANCE)
        t, t_plus = self.timesteps(case, name, teacher, settings)

        noise = io.input(f"{rng}noise")
        condition = teacher.condition(self.prompts * renderers, views.cameras, "negative")
        sds = bool(config.get(f"{name}_use_sds", False))
        for part, steps, text in (
            ("noise_pred_text", t, condition),
            ("noise_pred_uncond", t, condition.negative()),
            ("noise_pred_text_second", t_plus, condition),
        ):
            steps = steps.repeat_interleave(teacher.num_views)
            a = teacher.alphas_cumprod[steps].view(-1, 1, 1, 1)
            predicted = teacher.predict_noise(a.sqrt() * x.detach() + (1 - a).sqrt() * noise, steps, text)
            if sds and part.endswith("second"):
                io.input(f"{case}{name}.{part}")  # the noise itself, which is in the gradient
                continue
            io.compare(f"{case}{name}.{part}", predicted, GUIDANCE)

        result = asd_loss(
            teacher,
            x,
            condition,
            t=t,
            noise=noise,
            t_plus=t_plus if config[f"{name}_plus_ratio"] > 0 and not sds else None,
            guidance_scale=linear(config[f"{name}_guidance_scale"], settings["global_step"]),
            config=AsdConfig(
                delta=config["eps"],
                x0_from="clean",
                reference="noise" if sds else "shifted",
                **WEIGHTINGS[config[f"{name}_weighting_strategy"]],  # type: ignore[arg-type]
            ),
        )
        asd_grad = result.gradient * teacher.num_views  # recorded before the division by the number of views
        io.compare(f"{case}{name}.asd_grad", asd_grad, GUIDANCE)
        io.compare(f"{case}{name}.weight", result.weight, GUIDANCE)
        io.compare(f"{case}{name}.loss_value", result.loss.view(renderers, -1).sum(dim=1), GUIDANCE)
        found = torch.autograd.grad(result.loss.sum(), list(leaves.values()), allow_unused=True, retain_graph=True)
        gradients = {leaf: g for leaf, g in zip(leaves, found, strict=True) if g is not None}
        for leaf, gradient in gradients.items():
            io.compare(f"{case}{name}.grad.{leaf}", gradient, GRADIENT)
        return gradients, asd_grad.reshape(renderers, -1).norm(dim=1)

    def single_view(self, case: str, settings: dict) -> Tensor:
        """The view of each prompt that Stable Diffusion is shown, [renderers * prompts]; recorded counting images."""
        first = self.io.input(f"{case}rng.sd.view_idx_raw")
        start = torch.arange(len(self.prompts)) * self.views
        self.io.compare(f"{case}sd.view_idx", first + start, 0)
        if not settings["dual"]:
            return first
        second = self.io.tensors[f"{case}sd.view_idx_2nd"] - start
        if settings["config"]["sd_oppo_side"]:
            second = (first + self.views // 2) % self.views
        self.io.compare(f"{case}sd.view_idx_2nd", second + start, 0)
        return torch.cat([first, second])

    def timesteps(self, case: str, name: str, teacher: UNetTeacher, settings: dict) -> tuple[Tensor, Tensor]:
        """t and t_plus from the recorded draws."""
        io, config, resolved = self.io, settings["config"], settings["resolved"]
        t, u = io.input(f"{case}rng.{name}.t_raw"), io.input(f"{case}rng.{name}.u_plus")
        if not config[f"{name}_plus_random"]:
            u = torch.ones_like(u)
        schedule = config["plus_schedule"]
        schedule = config.get("t_plus_type", "v1") if schedule == "linear" else schedule
        t_plus = shift(t, u, config[f"{name}_plus_ratio"], resolved[f"{name}_min_step"], schedule)
        io.compare(f"{case}{name}.t", t.repeat_interleave(teacher.num_views), 0)
        io.compare(f"{case}{name}.t_plus", t_plus.repeat_interleave(teacher.num_views), 0)
        return t, t_plus


def shift(t: Tensor, u: Tensor, ratio: float, t_min: int, schedule: str) -> Tensor:
    """t_plus of a published schedule: "v1", "v2" (from t_min), "v3", "v4" (from 0), "sqrt" or "sqrt_BIAS"."""
    if schedule.startswith("sqrt"):
        return shifted_timesteps(t, u, ratio, t_min, sqrt_bias=float(schedule.partition("_")[2] or 0))
    return shifted_timesteps(t, u, ratio, t_min if schedule in ("v1", "v2") else 0)


def returned_norms(norms: dict[str, Tensor], case: dict) -> Tensor:
    """The norm the published code logs, [renderers]: with two, it adds returned losses (each the constant 1) instead
    of norms for the multi-view teacher in the first rendering and for Stable Diffusion in both."""
    counted = {name: norm.clone() for name, norm in norms.items()}
    if case["dual"]:
        counted["mv"][0] = 1.0
        counted["sd"][:] = 1.0
    return torch.stack([case["resolved"][f"{name}_weight"] * counted[name] for name in TEACHERS]).sum(dim=0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds generator/, guidance/, teachers/ and render/")
    folder = parser.parse_args(arguments).folder
    return compared(folder, "", lambda original: GuidanceParity(original).run())


if __name__ == "__main__":
    sys.exit(main())
