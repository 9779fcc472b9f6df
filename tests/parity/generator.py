"""The student against the published code's recorded numbers.

    python -m tests.parity.generator FOLDER        # FOLDER/generator as in the reference data's README

One line a quantity with its error; the exit status is 1 if any is past tolerance, or recorded and not compared.
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

from prd.adapters.convert import (
    convert_published,
    published_config,
    published_layers,
    read_published,
)
from prd.adapters.peta import PetaConfig, SixPlaneBackbone, attach_peta
from prd.generators.triplane_turbo import StudentConfig, TriplaneTurboGenerator
from prd.triplane import TriplaneField, colour_from_features
from tests.parity import CLOSED_FORM, GRADIENT, NETWORK, Recording

GEOMETRY = {
    "radius": 1.0,
    "rotate_planes": "v1",
    "split_channels": "v1",
    "geo_interpolate": "v1",
    "tex_interpolate": "v2",
    "sdf_bias": "sphere",
}


class GeneratorParity:
    """One recorded folder, the student built from it, and the comparisons."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text())
        self.io = Recording("generator", folder / "io.safetensors")
        self.unet = UNet2DConditionModel.from_config(self._json("base_unet_config.json"))
        self.unet.load_state_dict(load_file(folder / "base_unet.safetensors"), strict=True)
        self.vae = AutoencoderKL.from_config(self._json("base_vae_config.json"))
        self.vae.load_state_dict(load_file(folder / "base_vae.safetensors"), strict=True)
        self.unet.requires_grad_(False).eval()
        self.vae.requires_grad_(False).eval()
        scheduler = DDIMScheduler.from_config(self._json("scheduler_config.json"))
        published = load_file(folder / "adapter_state_dict.safetensors")
        self.published = {name: tensor.requires_grad_(True) for name, tensor in published.items()}
        plain = SixPlaneBackbone(self.unet, self.vae, PetaConfig())
        self.layers = published_layers(plain)
        self.native = convert_published(self.published, plain)
        config = StudentConfig(
            latent_size=self.io.tensors["latents_T"].shape[-1],
            head_width=self.published["geometry.sdf_network.layers.0.weight"].shape[0],
            bias_radius=self.meta["geometry_config"]["sdf_bias_params"],
        )
        self.student = TriplaneTurboGenerator(
            self.unet, self.vae, scheduler, published_config(self.published, plain), config
        )
        self.student.load_adapter_state_dict({name: tensor.detach() for name, tensor in self.native.items()})
        self.text = self.io.input("text_embed")
        self.batch = len(self.text)

    def _json(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text())

    def planes(self, name: str) -> Tensor:
        """A recorded tensor [B * 6, 4, h, w] as [B, 6, 4, h, w]."""
        return self.io.input(name).unflatten(0, (self.batch, 6))

    def run(self) -> int:
        with torch.no_grad():
            self.records()
            self.base()
            self.denoise()
            self.sampling()
            self.rollout()
            self.decode()
            self.queries()
        self.normals()
        self.gradients()
        self.eikonal()
        return self.io.finish()

    def records(self) -> None:
        """What is recorded besides the tensors of io.safetensors agrees with it and with what we build."""
        io, meta = self.io, self.meta
        shapes = {name: list(tensor.shape) for name, tensor in io.tensors.items()}
        recorded = {name: entry["shape"] for name, entry in meta["tensors"].items()}
        io.report("meta.json tensors", f"{len(recorded)} names and shapes", ok=shapes == recorded)
        sizes = [meta["batch"], meta["latent_size"], meta["geometry_config"]["space_generator_config"]["output_dim"]]
        built = [self.batch, io.tensors["latents_T"].shape[-1], 2 * self.student.peta.plane_channels]
        io.report("meta.json batch, latent size, channels", f"{built} against {sizes}", ok=built == sizes)
        geometry = {name: meta["geometry_config"][name] for name in GEOMETRY}
        io.report("meta.json geometry", f"{geometry}", ok=geometry == GEOMETRY)
        modules = [entry["module"] for entry in meta["peft_layer_index_to_module"]]
        io.report("meta.json layers", f"{len(modules)} modules", ok=modules == _published_names(self.layers))
        entries = {
            f"geometry.space_generator.peft_layers.layers.{entry['index']}.{name}": list(shape)
            for entry in meta["peft_layer_index_to_module"]
            for name, shape in entry["shapes"].items()
        }
        own = {name: list(t.shape) for name, t in self.published.items() if "peft_layers" in name}
        io.report("meta.json layer shapes", f"{len(entries)} tensors", ok=entries == own)
        for path in sorted(self.folder.glob("*.pth")):
            state = read_published(path)
            same = state.keys() == self.published.keys() and all(
                torch.equal(state[n], self.published[n]) for n in state
            )
            io.report(path.name, f"{len(state)} tensors as in adapter_state_dict.safetensors", ok=same)
        for path in sorted(self.folder.glob("*full_size_keys.json")):
            self._full_size(json.loads(path.read_text()), path.name)

    def _full_size(self, record: dict, name: str) -> None:
        """Every key of a released-layout checkpoint at Stable Diffusion 2.1's size, without its memory."""
        with torch.device("meta"):
            unet = UNet2DConditionModel(
                block_out_channels=(320, 640, 1280, 1280),
                attention_head_dim=(5, 10, 20, 20),
                cross_attention_dim=1024,
                use_linear_projection=True,
            )
            vae = AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
            )
            backbone = SixPlaneBackbone(unet, vae, PetaConfig())
            layers = published_layers(backbone)
            state = {key: torch.empty(shape) for key, shape in record["state_dict"].items()}
            adapted = attach_peta(backbone, published_config(state, backbone))
            converted = convert_published(state, backbone)
            own = {n: p.shape for n, p in adapted.named_parameters() if p.requires_grad}
        modules = [entry["module"] for entry in record["index_to_module"]]
        count = sum(tensor.numel() for key, tensor in state.items() if "peft_layers" in key)
        agree = (
            modules == _published_names(layers)
            and len(layers) == record["num_layers"]
            and count == record["num_peft_params"]
            and {_plain(n): s for n, s in own.items()}
            == {n: t.shape for n, t in converted.items() if not n.startswith("heads.")}
        )
        self.io.report(name, f"{len(layers)} layers, {count} parameters", ok=agree)

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
        io, student = self.io, self.student
        recorded = io.input("ddim.timesteps").tolist()
        timesteps = student.timesteps(len(recorded))
        io.report("ddim.timesteps", f"{timesteps}", ok=timesteps == recorded)
        x, stride = self.planes("latents_T"), len(student.alphas_cumprod) // len(timesteps)
        x0 = x
        for i, t in enumerate(timesteps):
            x0 = student.denoise(x, t, self.text)
            io.compare(f"ddim.step{i}.noise_pred", student.predict(x, t, self.text), NETWORK)
            io.compare(f"ddim.step{i}.pred_original_sample", x0, NETWORK)
            x = student.ddim_step(x, x0, t, t - stride)
            io.compare(f"ddim.step{i}.prev_sample", x, NETWORK)
        final = student.sample_latents(self.text, num_inference_steps=len(timesteps), latents=self.planes("latents_T"))
        io.compare("ddim.final_latents", final, NETWORK)

    def rollout(self) -> None:
        io, student = self.io, self.student
        recorded = io.input("train.timesteps").tolist()
        timesteps = student.timesteps(len(recorded))
        io.report("train.timesteps", f"{timesteps}", ok=timesteps == recorded)
        x0 = self.planes("latents_T")
        for i, t in enumerate(timesteps):
            noisy = student.add_noise(x0, self.planes(f"train.step{i}.noise"), t)
            x0 = student.denoise(noisy, t, self.text)
            io.compare(f"train.step{i}.noisy", noisy, NETWORK)
            io.compare(f"train.step{i}.noise_pred", student.predict(noisy, t, self.text), NETWORK)
            io.compare(f"train.step{i}.x0", x0, NETWORK)

    def decode(self) -> None:
        latents = self.planes("ddim.final_latents")
        seen: list[Tensor] = []
        conv_out = self.student.backbone.decoder.conv_out.modules_to_save["default"]
        hook = conv_out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        self.io.compare("planes", self.student.decode_planes(latents), NETWORK)
        hook.remove()
        full = F.conv2d(seen[0], conv_out.weight, conv_out.bias, padding=1).unflatten(0, (self.batch, 6))
        for name in sorted(self.io.left):
            if match := re.fullmatch(r"forward_decode\.b(\d+)\.planes(\d+(?:and\d+)*)", name):
                planes = [int(plane) for plane in match[2].split("and")]
                self.io.compare(name, full[int(match[1]), planes], NETWORK)

    def field(self, name: str) -> TriplaneField:
        """The field of recorded planes."""
        return TriplaneField(self.io.input(name), self.student.heads, self.student.config.bias_radius)

    def queries(self) -> None:
        io, points = self.io, self.io.input("points")
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
        self._grid(field)
        probe = self.field("probe.planes")
        points = points.expand(len(probe.planes), -1, -1)
        io.compare("probe.enc_geo", probe.geometry_features(points), NETWORK)
        io.compare("probe.enc_tex", probe.texture_features(points), NETWORK)
        io.compare("probe.sdf", probe.sdf(points), NETWORK)
        io.compare("probe.features", probe.colour_features(points), NETWORK)

    def _grid(self, field: TriplaneField) -> None:
        resolution = round(len(self.io.tensors["grid.points"]) ** (1 / 3))
        axis = torch.linspace(-1, 1, resolution)
        self.io.compare("grid.points", torch.cartesian_prod(axis, axis, axis), CLOSED_FORM)
        sdf, _, deformation = field.grid(resolution, rgb=False)
        assert deformation is not None
        self.io.compare("grid.sdf", sdf, NETWORK)
        self.io.compare("grid.deformation", deformation, NETWORK)

    def normals(self) -> None:
        io, points, field = self.io, self.io.input("train_query.points"), self.field("planes")
        sdf, gradient = field.sdf_and_gradient(points)
        io.compare("train_query.sdf", sdf, NETWORK)
        io.compare("train_query.sdf_orig", field.heads.sdf(field.geometry_features(points)), NETWORK)
        io.compare("train_query.features", field.colour_features(points), NETWORK)
        io.compare("train_query.sdf_grad", gradient, GRADIENT)
        io.compare("train_query.normal", F.normalize(gradient, dim=-1), GRADIENT)

    def gradients(self) -> None:
        """d loss / d parameter in the published parametrisation: through the student, then through the conversion."""
        io, student = self.io, self.student
        t = int(io.input("train.timesteps")[1])
        x0 = student.denoise(self.planes("train.step1.noisy"), t, self.text)
        x0.retain_grad()
        field = student.decode(x0)
        field.planes.retain_grad()
        points = io.input("points")
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
        trained |= {_plain(n): p for n, p in student.peft.named_parameters() if p.requires_grad}
        names = [name for name, parameter in trained.items() if parameter.grad is not None]
        torch.autograd.backward([self.native[name] for name in names], [trained[name].grad for name in names])
        expected = load_file(self.folder / "grad_adapter.safetensors")
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
        _, gradient = field.sdf_and_gradient(io.input("eik.points"))
        loss = ((gradient.norm(dim=-1) - 1) ** 2).mean()
        head: nn.Module = self.student.heads.sdf
        named = dict(head.named_parameters())
        planes_grad, *head_grads = torch.autograd.grad(loss, [planes, *named.values()])
        io.compare("eik.loss", loss, GRADIENT)
        io.compare("eik.sdf_grad", gradient, GRADIENT)
        io.compare("eik.d_planes", planes_grad, GRADIENT)
        for name, value in zip(named, head_grads, strict=True):
            io.compare(f"eik.d_sdf_network.layers.{name}", value, GRADIENT)


def _plain(name: str) -> str:
    """The key in a saved adapter of a parameter of the peft model."""
    return name.replace(".modules_to_save.default", "").replace(".default", "")


def _published_names(layers: list[tuple[str, str]]) -> list[str]:
    """The names under which the published code knew the adapted modules."""
    names = []
    for group, module in layers:
        suffix = {"conv_out": ""}.get(group, ".lora_layer" if group.endswith("convolutions") else ".processor")
        names.append(("" if module.startswith("unet.") else "vae.") + module + suffix)
    return names


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds generator/, guidance/, teachers/ and render/")
    return GeneratorParity(parser.parse_args(arguments).folder / "generator").run()


if __name__ == "__main__":
    sys.exit(main())
