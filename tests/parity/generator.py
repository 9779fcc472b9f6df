"""The student against the published code's recorded numbers.

    python -m tests.parity.generator FOLDER        # FOLDER/generator as in the reference data's README

One line a quantity with its error; the exit status is 1 if any is past tolerance, or recorded and not compared, and 2
if the folder lacks or garbles what is needed. Nothing is presumed of its sizes: they are read off what is recorded.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from prd.adapters.convert import convert_published, published_config, published_layers
from prd.adapters.peta import PetaConfig, SixPlaneBackbone
from prd.fields.triplane import TriplaneField, colour_from_features
from prd.generators.triplane_turbo import SavedConfig, TriplaneTurboModel
from tests.parity import CLOSED_FORM, GRADIENT, NETWORK, Recording, compared
from tests.parity.generator_records import compare_records, plain


class GeneratorParity:
    """One recorded folder, the student built from it, and the comparisons."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; give the one that holds generator/")
        self.folder = folder
        self.files = {"io.safetensors"}  # of tensors, that were read
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.io = Recording("generator", folder / "io.safetensors")
        self.unet = UNet2DConditionModel.from_config(self._json("base_unet_config.json"))
        self.unet.load_state_dict(self._tensors("base_unet.safetensors"), strict=True)
        self.vae = AutoencoderKL.from_config(self._json("base_vae_config.json"))
        self.vae.load_state_dict(self._tensors("base_vae.safetensors"), strict=True)
        self.unet.requires_grad_(False).eval()
        self.vae.requires_grad_(False).eval()
        self.scheduler = DDIMScheduler.from_config(self._json("scheduler_config.json"))
        published = self._tensors("adapter_state_dict.safetensors")
        self.published = {name: tensor.requires_grad_(True) for name, tensor in published.items()}
        plain = SixPlaneBackbone(self.unet, self.vae, PetaConfig())
        self.layers = published_layers(plain)
        self.native = convert_published(self.published, plain)
        config = SavedConfig(
            latent_size=self.io.tensors["latents_T"].shape[-1],
            head_width=self.published["geometry.sdf_network.layers.0.weight"].shape[0],
            bias_radius=self.meta["geometry_config"]["sdf_bias_params"],
        )
        self.student = TriplaneTurboModel(
            self.unet, self.vae, self.scheduler, published_config(self.published, plain), config
        )
        self.student.load_trained_state_dict({name: tensor.detach() for name, tensor in self.native.items()})
        self.text = self.io.input("text_embed")
        self.batch = len(self.text)

    def _json(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def _tensors(self, name: str) -> dict[str, Tensor]:
        self.files.add(name)
        return load_file(self.folder / name)

    def planes(self, name: str) -> Tensor:
        """A recorded tensor [B * 6, 4, h, w] as [B, 6, 4, h, w]."""
        return self.io.input(name).unflatten(0, (self.batch, 6))

    def run(self) -> int:
        with torch.no_grad():
            compare_records(self)
            self.base()
            self.denoise()
            self.sampling()
            self.rollout()
            self.decode()
            self.queries()
        self.normals()
        self.gradients()
        self.eikonal()
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self.files:
                self.io.report(path.name, "recorded, but not read", ok=False)
        return self.io.finish()

    def base(self) -> None:
        io = self.io
        noisy, t, text = (io.input(f"base.{name}") for name in ("unet_in", "unet_t", "text"))
        io.compare("base.unet_out", self.unet(noisy, t, text).sample, NETWORK)
        io.compare("base.vae_dec_out", self.vae.decode(io.input("base.vae_latent")).sample, NETWORK)
        posterior = self.vae.encode(io.input("base.vae_image")).latent_dist
        io.compare("base.vae_enc_mean", posterior.mean, NETWORK)
        io.compare("base.vae_enc_logvar", posterior.logvar, NETWORK)

    def denoise(self) -> None:
        latents = self.planes("latents_T")
        for name in sorted(self.io.left):
            if not (match := re.fullmatch(r"(denoise|denoise_text4d|denoise_base_only)\.t(\d+)", name)):
                continue
            kind, t = match[1], int(match[2])
            if kind == "denoise_base_only":
                out = self.unet(latents.flatten(0, 1), t, self.text.repeat_interleave(6, dim=0)).sample
            else:
                text = self.text if kind == "denoise" else self.io.input("text_embed_4d")
                out = self.student.predict(latents, t, text)
            self.io.compare(name, out, NETWORK)

    def sampling(self) -> None:
        """Each DDIM step from the recorded result of the one before, and then all of them in one call."""
        io, student = self.io, self.student
        recorded, total = io.input("ddim.timesteps").tolist(), len(student.alphas_cumprod)
        count, stride = len(recorded), total // len(recorded)
        timesteps = [total - 1 - i * stride for i in range(count)]
        io.report("ddim.timesteps", f"{timesteps}", ok=timesteps == recorded)
        x = x0 = self.planes("latents_T")
        for i, t in enumerate(timesteps):
            x0 = student.denoise(x, t, self.text)
            io.compare(f"ddim.step{i}.noise_pred", student.predict(x, t, self.text), NETWORK)
            io.compare(f"ddim.step{i}.pred_original_sample", x0, NETWORK)
            x = student.ddim_step(x, x0, t, t - stride)
            if t < stride and self.scheduler.config["set_alpha_to_one"]:
                x = x0
            io.compare(f"ddim.step{i}.prev_sample", x, NETWORK)
            x = self.planes(f"ddim.step{i}.prev_sample")
        io.compare("ddim.final_latents", x0, NETWORK)
        if total % count == 0:
            final = student.sample_latents(self.text, num_inference_steps=count, latents=self.planes("latents_T"))
            expected = self.planes("ddim.final_latents")
            io.check(f"ddim.final_latents of {student.timesteps(count)}", final, expected, count * NETWORK)

    def rollout(self) -> None:
        """Each step of the training roll-out from the recorded x0 of the one before."""
        io, student = self.io, self.student
        x0 = self.planes("latents_T")
        for i, t in enumerate(io.input("train.timesteps").tolist()):
            noisy = student.add_noise(x0, self.planes(f"train.step{i}.noise"), t)
            io.compare(f"train.step{i}.noisy", noisy, NETWORK)
            noisy = self.planes(f"train.step{i}.noisy")
            io.compare(f"train.step{i}.noise_pred", student.predict(noisy, t, self.text), NETWORK)
            io.compare(f"train.step{i}.x0", student.denoise(noisy, t, self.text), NETWORK)
            x0 = self.planes(f"train.step{i}.x0")

    def decode(self) -> None:
        latents = self.planes("ddim.final_latents")
        seen: list[Tensor] = []  # of conv_out: all rows at once, or row by row
        conv_out = self.student.backbone.decoder.conv_out.modules_to_save["default"]
        hook = conv_out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        self.io.compare("planes", self.student.decode_planes(latents), NETWORK)
        hook.remove()
        for name in sorted(self.io.left):
            if match := re.fullmatch(r"forward_decode\.b(\d+)\.planes(\d+(?:and\d+)*)", name):
                planes = [6 * int(match[1]) + int(plane) for plane in match[2].split("and")]
                rows = torch.cat(seen)[planes]
                self.io.compare(name, F.conv2d(rows, conv_out.weight, conv_out.bias, padding=1), NETWORK)

    def field(self, name: str, count: int | None = None) -> TriplaneField:
        """The field of recorded planes, of the first `count` samples if it is given."""
        planes = self.io.input(name)
        if count is not None:
            planes = samples(planes, count)
        return TriplaneField(planes, self.student.heads, self.student.config.bias_radius)

    def points(self, name: str) -> Tensor:
        """Recorded points [B, N, 3]."""
        return samples(self.io.input(name), self.batch)

    def queries(self) -> None:
        io, points = self.io, self.points("points")
        field = self.field("planes")
        sdf, deformation = field.sdf_and_deformation(points)
        features = field.colour_features(points)
        for name, value in {
            "enc_geo": field.geometry_features(points),
            "enc_tex": field.texture_features(points),
            "field.sdf": sdf,
            "field.deformation": deformation,
            "query.sdf": sdf,
            "forward_sdf": field.sdf(points),
            "query.features": features,
            "query.color": colour_from_features(features),
        }.items():
            io.compare(name, value, NETWORK)
        for name in sorted(io.left):
            if match := re.fullmatch(r"export\.features\.b(\d+)", name):
                io.compare(name, features[int(match[1])], NETWORK)
        self._grid()
        count = io.tensors["probe.sdf"].numel() // points.shape[1]
        probe, points = self.field("probe.planes", count), samples(points, count)
        io.compare("probe.enc_geo", probe.geometry_features(points), NETWORK)
        io.compare("probe.enc_tex", probe.texture_features(points), NETWORK)
        io.compare("probe.sdf", probe.sdf(points), NETWORK)
        io.compare("probe.features", probe.colour_features(points), NETWORK)

    def _grid(self) -> None:
        nodes = self.io.tensors["grid.points"].shape[-2]
        resolution = round(nodes ** (1 / 3))
        axis = torch.linspace(-1, 1, resolution)
        self.io.compare("grid.points", torch.cartesian_prod(axis, axis, axis), CLOSED_FORM)
        field = self.field("planes", self.io.tensors["grid.sdf"].numel() // nodes)
        sdf, _, deformation = field.grid(resolution, rgb=False)
        assert deformation is not None
        self.io.compare("grid.sdf", sdf, NETWORK)
        self.io.compare("grid.deformation", deformation, NETWORK)

    def normals(self) -> None:
        io, points, field = self.io, self.points("train_query.points"), self.field("planes")
        sdf, gradient = field.sdf_and_gradient(points)
        io.compare("train_query.sdf", sdf, NETWORK)
        io.compare("train_query.sdf_orig", field.heads.sdf(field.geometry_features(points)), NETWORK)
        io.compare("train_query.features", field.colour_features(points), NETWORK)
        io.compare("train_query.sdf_grad", gradient, GRADIENT)
        io.compare("train_query.normal", F.normalize(gradient, dim=-1), GRADIENT)

    def gradients(self) -> None:
        """d loss / d parameter in the published parametrisation: through the student, then through the conversion."""
        io, student = self.io, self.student
        timesteps = io.input("train.timesteps").tolist()
        step = min(1, len(timesteps) - 1)
        x0 = student.denoise(self.planes(f"train.step{step}.noisy"), timesteps[step], self.text)
        x0.retain_grad()
        field = student.decode(x0)
        field.planes.retain_grad()
        points = self.points("points")
        sdf, deformation = field.sdf_and_deformation(points)
        features = field.colour_features(points)
        terms = {"w_sdf": sdf, "w_feat": features, "w_def": deformation}
        weights = {name: io.input(f"grad.{name}") for name in terms}
        loss = sum((value.reshape(weights[name].shape) * weights[name]).sum() for name, value in terms.items())
        assert isinstance(loss, Tensor)
        loss.backward()
        assert x0.grad is not None and field.planes.grad is not None
        io.compare("grad.loss", loss, GRADIENT)
        io.compare("grad.d_x0", x0.grad, GRADIENT)
        io.compare("grad.d_planes", field.planes.grad, GRADIENT)
        trained = {f"heads.{n}": p for n, p in student.heads.named_parameters()}
        trained |= {plain(n): p for n, p in student.peft.named_parameters() if p.requires_grad}
        names = [name for name, parameter in trained.items() if parameter.grad is not None]
        torch.autograd.backward([self.native[name] for name in names], [trained[name].grad for name in names])
        expected = self._tensors("grad_adapter.safetensors")
        own = {name: tensor.grad for name, tensor in self.published.items() if tensor.grad is not None}
        left = (own.keys() ^ expected.keys()) - {"geometry.bbox"}
        io.report("grad_adapter names", f"{len(expected)} gradients, unmatched {sorted(left)}", ok=not left)
        for name in sorted(own.keys() & expected.keys()):
            io.check(f"grad_adapter {name}", own[name], expected[name], GRADIENT)
        student.zero_grad()

    def eikonal(self) -> None:
        """A loss on the field's gradient, and its (second-order) gradients in the planes and the sdf head."""
        io = self.io
        planes = io.input("planes").clone().requires_grad_(True)
        field = TriplaneField(planes, self.student.heads, self.student.config.bias_radius)
        _, gradient = field.sdf_and_gradient(self.points("eik.points"))
        loss = ((gradient.norm(dim=-1) - 1) ** 2).mean()
        head: nn.Module = self.student.heads.sdf
        named = dict(head.named_parameters())
        planes_grad, *head_grads = torch.autograd.grad(loss, [planes, *named.values()])
        io.compare("eik.loss", loss, GRADIENT)
        io.compare("eik.sdf_grad", gradient, GRADIENT)
        io.compare("eik.d_planes", planes_grad, GRADIENT)
        for name, value in zip(named, head_grads, strict=True):
            io.compare(f"eik.d_sdf_network.layers.{name}", value, GRADIENT)


def samples(tensor: Tensor, count: int) -> Tensor:
    """The first `count` samples of [B, ...]; a single sample is shared by all."""
    return tensor.expand(count, *tensor.shape[1:]) if len(tensor) == 1 else tensor[:count]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds generator/, guidance/, teachers/ and render/")
    folder = parser.parse_args(arguments).folder
    return compared(folder, "generator", lambda original: GeneratorParity(original).run())


if __name__ == "__main__":
    sys.exit(main())
