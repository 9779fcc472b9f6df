"""What TriplaneTurbo has besides the contract of pipelines: noise, steps, callbacks, precision, speed."""

from __future__ import annotations

import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from prd import TriplaneTurbo
from tests.compare import ROUNDING, relative_difference
from tests.conftest import use_assets

SMALL: dict[str, Any] = {"isosurface_resolution": 24, "target_faces": 400, "texture_size": None}


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


@pytest.fixture(scope="module")
def pipe(random_toybox):
    with pytest.MonkeyPatch.context() as patch:
        use_assets(patch, random_toybox)
        return TriplaneTurbo.from_pretrained("toybox")


def same(a, b) -> bool:
    return (
        np.array_equal(a.vertices, b.vertices)
        and np.array_equal(a.faces, b.faces)
        and np.array_equal(a.vertex_colors, b.vertex_colors)
    )


def test_the_same_seed_gives_the_identical_mesh_and_another_does_not(pipe):
    first, again, other = (pipe("a red cube", generator=seeds(n)[0], **SMALL).meshes[0] for n in (3, 3, 4))
    assert same(first, again)
    assert not same(first, other)
    assert len(first.faces) > 100


@pytest.mark.parametrize("steps", [0, 3, -1, 1001])
def test_a_bad_number_of_steps_is_named(pipe, steps):
    with pytest.raises(ValueError, match=f"num_inference_steps={steps}: must be a positive divisor of 1000"):
        pipe("a red cube", num_inference_steps=steps)


def test_generators_must_be_one_a_prompt(pipe):
    with pytest.raises(ValueError, match="2 generators for 1 samples"):
        pipe("a red cube", generator=seeds(1, 2))


def test_several_meshes_a_prompt_stand_beside_each_other(pipe):
    many = pipe(
        ["a red cube", "a blue mug"], num_meshes_per_prompt=2, generator=seeds(1, 2, 3, 4), output_type="planes"
    )
    assert many.prompts == ["a red cube"] * 2 + ["a blue mug"] * 2 and many.meshes == []
    for i, (prompt, seed) in enumerate([("a red cube", 1), ("a red cube", 2), ("a blue mug", 3), ("a blue mug", 4)]):
        alone = pipe(prompt, generator=seeds(seed), output_type="planes").planes
        assert (alone[0] - many.planes[i]).abs().max() <= 1e-4 * alone.abs().max()


def test_latents_replace_the_draw(pipe):
    prompts = ["a red cube", "a blue mug"]
    latents = pipe.model.draw_latents(2, seeds(1)[0])
    expected = pipe(prompts, generator=seeds(1)[0], output_type="planes")
    assert relative_difference(pipe(prompts, latents=latents, output_type="planes").planes, expected.planes) <= ROUNDING
    assert list(expected.seconds) == ["text", "denoise", "decode"] and expected.planes.shape[:2] == (2, 6)
    for wrong in (latents[:1], latents[:, :5], latents[0], latents[..., :0]):
        with pytest.raises(ValueError, match=r"latents=\("):
            pipe(prompts, latents=wrong, output_type="planes")


def test_the_callback_sees_every_step_and_may_replace_the_latents(pipe):
    seen = []

    def watch(caller, step, timestep, tensors):
        assert caller is pipe
        seen.append((step, timestep, tensors["latents"].shape))

    plain = pipe("a red cube", generator=seeds(1)[0], output_type="planes", callback_on_step_end=watch).planes
    shape = (1, *pipe.model.draw_latents(1).shape[1:])
    assert seen == [(0, 999, shape), (1, 749, shape), (2, 499, shape), (3, 249, shape)]
    other = pipe(
        "a red cube",
        generator=seeds(1)[0],
        output_type="planes",
        callback_on_step_end=lambda *call: {"latents": torch.zeros_like(call[3]["latents"])},
    ).planes
    assert relative_difference(other, plain) > 100 * ROUNDING


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (torch.zeros(1), TypeError),
        ({"latent": torch.zeros(1)}, TypeError),
        ({"latents": None}, TypeError),
        ({"latents": torch.zeros(2, 6, 4, 8, 8)}, ValueError),
        ({"latents": torch.full((1, 6, 4, 8, 8), torch.nan)}, ValueError),
    ],
)
def test_a_callback_s_answer_is_checked(pipe, answer, error):
    with pytest.raises(error, match="callback_on_step_end"):
        pipe("a red cube", output_type="planes", callback_on_step_end=lambda *call: answer)


def test_what_is_no_tensor_or_not_finite_is_named(pipe):
    latents = pipe.model.draw_latents(1)
    for wrong in (latents.tolist(), latents.bool()):
        with pytest.raises(TypeError, match="latents is a"):
            pipe("a red cube", latents=wrong, output_type="planes")
    with pytest.raises(ValueError, match="latents: holds NaN"):
        pipe("a red cube", latents=latents * torch.inf, output_type="planes")
    with pytest.raises(ValueError, match="num_meshes_per_prompt=0: must be"):
        pipe("a red cube", num_meshes_per_prompt=0)
    for generator in (1, [1], "0"):
        with pytest.raises(TypeError, match="generator="):
            pipe("a red cube", generator=generator, output_type="planes")


def test_planes_that_are_not_finite_are_an_error(pipe, monkeypatch):
    decode = pipe.model.decode

    def broken(latents):
        field = decode(latents)
        field.planes[0, 0, 0, 0, 0] = torch.nan
        return field

    monkeypatch.setattr(pipe.model, "decode", broken)
    with pytest.raises(FloatingPointError, match="'a red cube'.*float32"):
        pipe("a red cube", output_type="planes")


@pytest.mark.parametrize(("k", "timesteps"), [(1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249])])
def test_the_timesteps_of_k_steps(pipe, k, timesteps):
    seen = []
    pipe(
        "a red cube",
        num_inference_steps=k,
        output_type="planes",
        callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(timestep),
    )
    assert seen == timesteps


def test_the_progress_bar_can_be_silenced(pipe, capfd):
    loud, silent = TriplaneTurbo(pipe.model, pipe.encoder), TriplaneTurbo(pipe.model, pipe.encoder)
    loud.set_progress_bar_config(disable=False)
    silent.set_progress_bar_config(disable=True)
    loud("a red cube", output_type="planes")
    assert "denoise: 100%" in capfd.readouterr().err
    silent("a red cube", output_type="planes")
    assert capfd.readouterr().err == ""


def test_it_moves_to_half_precision_and_back(toybox):
    pipe = TriplaneTurbo.from_pretrained("toybox")
    exact = pipe("a red cube", generator=seeds(1)[0], output_type="planes").planes
    half = pipe.to(torch.bfloat16)("a red cube", generator=seeds(1)[0], output_type="planes").planes
    assert pipe.dtype == torch.bfloat16 and half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.1 * exact.abs().max()
    assert {p.dtype for n, p in pipe.model.named_parameters() if "heads" not in n} == {torch.bfloat16}
    again = pipe.to("cpu", torch.float32)("a red cube", generator=seeds(1)[0], output_type="planes").planes
    assert pipe.dtype == torch.float32 and (again - exact).abs().max() < (half - exact).abs().max()
    with pytest.raises(ValueError, match="dtype=torch.float64: must be torch.float32"):
        pipe.to(torch.float64)


def test_channels_last_and_fused_give_the_same_planes(toybox):
    pipe = TriplaneTurbo.from_pretrained("toybox")
    exact = pipe("a red cube", generator=seeds(1)[0], output_type="planes").planes
    pipe.to(memory_format=torch.channels_last)
    assert pipe.model.backbone.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    for again in (pipe, pipe.fuse()):
        found = again("a red cube", generator=seeds(1)[0], output_type="planes").planes
        assert (found - exact).abs().max() <= 1e-4 * exact.abs().max()


COMPILED = """
import sys
import torch
from prd import TriplaneTurbo

adapter, base, found = sys.argv[1:]
pipe = TriplaneTurbo.from_pretrained(adapter, base=base).fuse()
for place in ("exact", "compiled"):
    planes = pipe("a red cube", generator=torch.Generator().manual_seed(1), output_type="planes").planes
    torch.save(planes, f"{found}/{place}.pt")
    pipe.compile()
"""


@pytest.mark.slow
def test_compiled_it_makes_the_same_planes(random_toybox, tmp_path):
    """In a process of its own: torch's compiler imports distutils, which setuptools, once imported, replaces."""
    places = [str(random_toybox / "adapter"), str(random_toybox / "stable_diffusion"), str(tmp_path)]
    subprocess.run([sys.executable, "-c", COMPILED, *places], check=True, timeout=1200)
    exact, found = (torch.load(tmp_path / f"{place}.pt") for place in ("exact", "compiled"))
    assert (found - exact).abs().max() <= 1e-4 * exact.abs().max()


def test_xformers_is_asked_for_by_name(pipe, monkeypatch):
    """Without it an ImportError says what to do; with it, its function gets [B, L, heads, d]."""
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ImportError, match="pip install xformers"):
        pipe.enable_xformers_memory_efficient_attention()
    plain = pipe("a red cube", generator=seeds(1)[0], output_type="planes").planes
    calls = []

    def memory_efficient_attention(query, key, value):
        calls.append(query.shape)
        swap = (x.transpose(1, 2) for x in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*swap).transpose(1, 2)

    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(
            sys.modules, name, types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
        )
    pipe.enable_xformers_memory_efficient_attention()
    found = pipe("a red cube", generator=seeds(1)[0], output_type="planes").planes
    pipe.model.set_attention(None)
    assert calls and (found - plain).abs().max() <= 1e-4 * plain.abs().max()
