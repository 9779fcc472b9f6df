"""From a prompt to a mesh, with random weights: determinism, round trips and errors."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from prd import EmptySurfaceError, TriplaneTurbo
from prd.rendering.isosurface import evaluate_grid
from tests.compare import ROUNDING, relative_difference

POINTS = torch.rand(1, 50, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
SMALL = {"isosurface_resolution": 24, "target_faces": 400, "texture_size": None}


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


@pytest.fixture(scope="module")
def pipe(random_toybox):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prd.toybox.ASSETS", random_toybox)
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


def test_the_prompt_matters(pipe):
    one, two = (pipe(p, generator=seeds(3)[0], **SMALL).meshes[0] for p in ("a red cube", "a blue torus on a red cube"))
    assert not same(one, two)


def test_a_batch_with_one_generator_each_equals_single_prompts(pipe):
    prompts = ["a red cube", "a blue mug"]
    together = pipe(prompts, generator=seeds(5, 6), **SMALL)
    assert together.prompts == prompts and len(together.meshes) == 2
    field = together.field.sdf(POINTS.expand(2, -1, -1))
    for i, (prompt, seed) in enumerate(zip(prompts, (5, 6), strict=True)):
        alone = pipe(prompt, generator=seeds(seed), **SMALL)
        torch.testing.assert_close(alone.field.sdf(POINTS)[0], field[i], rtol=0, atol=1e-5)
        assert abs(alone.meshes[0].vertices.mean(0) - together.meshes[i].vertices.mean(0)).max() < 1e-2


def test_what_is_saved_loads_as_the_same_field(toybox, tmp_path):
    pipe = TriplaneTurbo.from_pretrained("toybox")
    with torch.no_grad():
        for parameter in pipe.student.trainable_parameters():
            parameter.add_(0.01)  # not what "toybox" holds
    pipe.save_pretrained(tmp_path / "adapter")
    expected = pipe("a red cube", generator=seeds(1)[0], **SMALL).field
    for place in (tmp_path, tmp_path / "adapter"):  # a run folder, and the adapter itself
        loaded = TriplaneTurbo.from_pretrained(place)
        state = loaded.student.trained_state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in pipe.student.trained_state_dict().items())
        found = loaded("a red cube", generator=seeds(1)[0], **SMALL).field
        assert relative_difference(found.sdf(POINTS), expected.sdf(POINTS)) <= ROUNDING
        assert relative_difference(found.rgb(POINTS), expected.rgb(POINTS)) <= ROUNDING
    original = TriplaneTurbo.from_pretrained("toybox")("a red cube", generator=seeds(1)[0], **SMALL).field
    assert relative_difference(original.sdf(POINTS), expected.sdf(POINTS)) > 100 * ROUNDING


def test_the_stages_are_timed_and_the_texture_is_baked(pipe):
    result = pipe("a red cube", generator=seeds(1)[0], isosurface_resolution=24, target_faces=200, texture_size=64)
    assert list(result.seconds) == ["text", "denoise", "decode", "isosurface", "mesh"]
    assert result.meshes[0].texture.shape[:2] == (64, 64)


@pytest.mark.parametrize("steps", [0, 3, -1, 1001])
def test_a_bad_number_of_steps_is_named(pipe, steps):
    with pytest.raises(ValueError, match=f"num_inference_steps={steps}: must be a positive divisor of 1000"):
        pipe("a red cube", num_inference_steps=steps)


@pytest.mark.parametrize("prompt", [7, None, ["a red cube", 7], b"a red cube"])
def test_a_prompt_that_is_not_text_is_a_type_error(pipe, prompt):
    with pytest.raises(TypeError, match="must be a string or a list of strings"):
        pipe(prompt)


@pytest.mark.parametrize("prompt", ["", "  ", [], ["a red cube", ""]])
def test_an_empty_prompt_is_an_error(pipe, prompt):
    with pytest.raises(ValueError, match="prompt="):
        pipe(prompt)


def test_generators_must_be_one_a_prompt(pipe):
    with pytest.raises(ValueError, match="2 generators for 1 samples"):
        pipe("a red cube", generator=seeds(1, 2))


def test_a_bad_on_empty_is_named(pipe):
    with pytest.raises(ValueError, match="on_empty='ignore'"):
        pipe("a red cube", on_empty="ignore")


def test_a_missing_adapter_says_what_to_give(toybox, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        TriplaneTurbo.from_pretrained(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        TriplaneTurbo.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        TriplaneTurbo.from_pretrained("absent")


def test_an_empty_field_raises_or_is_flagged(pipe, monkeypatch):
    """The second of two shapes has no surface: its signed distance is lifted far above zero."""

    def lifted(*args, **options):
        sdf, deformation = evaluate_grid(*args, **options)
        return sdf + 10 * torch.arange(len(sdf)).view(-1, 1, 1, 1), deformation

    monkeypatch.setattr("prd.text_to_3d.evaluate_grid", lifted)
    prompts = ["a red cube", "a blue mug"]
    with pytest.raises(EmptySurfaceError) as caught:
        pipe(prompts, generator=seeds(1, 2), **SMALL)
    assert caught.value.samples == [1]
    flagged = pipe(prompts, generator=seeds(1, 2), on_empty="flag", **SMALL).meshes
    assert flagged[0] is not None and flagged[1] is None


def test_several_meshes_a_prompt_stand_beside_each_other(pipe):
    many = pipe(
        ["a red cube", "a blue mug"], num_meshes_per_prompt=2, generator=seeds(1, 2, 3, 4), output_type="planes"
    )
    assert many.prompts == ["a red cube"] * 2 + ["a blue mug"] * 2 and many.meshes == []
    for i, (prompt, seed) in enumerate([("a red cube", 1), ("a red cube", 2), ("a blue mug", 3), ("a blue mug", 4)]):
        alone = pipe(prompt, generator=seeds(seed), output_type="planes").planes
        assert (alone[0] - many.planes[i]).abs().max() <= 1e-4 * alone.abs().max()


def test_how_far_to_go_and_the_tuple(pipe):
    options = {"generator": seeds(1)[0], "return_dict": False}
    (planes,) = pipe("a red cube", output_type="planes", **options)
    (field,) = pipe("a red cube", output_type="field", **{**options, "generator": seeds(1)[0]})
    (meshes,) = pipe("a red cube", output_type="mesh", **{**options, "generator": seeds(1)[0]}, **SMALL)
    assert relative_difference(field.planes, planes) <= ROUNDING and planes.shape[:2] == (1, 6)
    assert len(meshes) == 1 and meshes[0].is_watertight


def test_embeddings_and_latents_replace_the_text_and_the_draw(pipe):
    prompts = ["a red cube", "a blue mug"]
    embeds, latents = pipe.encoder(prompts), pipe.student.draw_latents(2, seeds(1)[0])
    expected = pipe(prompts, generator=seeds(1)[0], output_type="planes").planes
    bare = TriplaneTurbo(pipe.student)  # no text encoder at all
    found = bare(prompt_embeds=embeds, latents=latents, output_type="planes")
    assert relative_difference(found.planes, expected) <= ROUNDING and found.prompts == ["", ""]
    with pytest.raises(ValueError, match="without a text encoder; give prompt_embeds= instead"):
        bare("a red cube")
    with pytest.raises(ValueError, match="not both"):
        pipe("a red cube", prompt_embeds=embeds)
    with pytest.raises(ValueError, match=r"prompt_embeds=\(2, 16, 3\): expected \[prompts, tokens, "):
        pipe(prompt_embeds=embeds[..., :3])
    for wrong in (latents[:1], latents[:, :5], latents[0], latents[..., :0]):
        with pytest.raises(ValueError, match=r"latents=\("):
            pipe(prompts, latents=wrong, output_type="planes")


def test_the_callback_sees_every_step_and_may_replace_the_latents(pipe):
    seen = []

    def watch(caller, step, timestep, tensors):
        assert caller is pipe
        seen.append((step, timestep, tensors["latents"].shape))

    plain = pipe("a red cube", generator=seeds(1)[0], output_type="planes", callback_on_step_end=watch).planes
    shape = (1, *pipe.student.draw_latents(1).shape[1:])
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
    embeds, latents = pipe.encoder(["a red cube"]), pipe.student.draw_latents(1)
    for name, value in (("latents", latents), ("prompt_embeds", embeds)):
        others = {"latents": latents, "prompt_embeds": embeds}
        for wrong in (value.tolist(), value.bool()):
            with pytest.raises(TypeError, match=f"{name} is a"):
                pipe(**{**others, name: wrong}, output_type="planes")
        with pytest.raises(ValueError, match=f"{name}: holds NaN"):
            pipe(**{**others, name: value * torch.inf}, output_type="planes")
    for generator in (1, [1], "0"):
        with pytest.raises(TypeError, match="generator="):
            pipe("a red cube", generator=generator, output_type="planes")


def test_planes_that_are_not_finite_are_an_error(pipe, monkeypatch):
    decode = pipe.student.decode

    def broken(latents):
        field = decode(latents)
        field.planes[0, 0, 0, 0, 0] = torch.nan
        return field

    monkeypatch.setattr(pipe.student, "decode", broken)
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
    loud, silent = TriplaneTurbo(pipe.student, pipe.encoder), TriplaneTurbo(pipe.student, pipe.encoder)
    loud.set_progress_bar_config(disable=False)
    silent.set_progress_bar_config(disable=True)
    loud("a red cube", output_type="planes")
    assert "denoise: 100%" in capfd.readouterr().err
    silent("a red cube", output_type="planes")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "options",
    [
        {"num_meshes_per_prompt": 0},
        {"isosurface_resolution": 1},
        {"isosurface_resolution": 24.0},
        {"output_type": "glb"},
        {"keep": "some"},
        {"target_faces": 3},
        {"target_faces": "a"},
        {"texture_size": 0},
    ],
)
def test_arguments_out_of_range_are_named(pipe, options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}: must be"):
        pipe("a red cube", **options)


def test_it_moves_to_half_precision_and_back(toybox):
    pipe = TriplaneTurbo.from_pretrained("toybox")
    exact = pipe("a red cube", generator=seeds(1)[0], output_type="planes").planes
    half = pipe.to(torch.bfloat16)("a red cube", generator=seeds(1)[0], output_type="planes").planes
    assert pipe.dtype == torch.bfloat16 and half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.1 * exact.abs().max()
    assert {p.dtype for n, p in pipe.student.named_parameters() if "heads" not in n} == {torch.bfloat16}
    again = pipe.to("cpu", torch.float32)("a red cube", generator=seeds(1)[0], output_type="planes").planes
    assert pipe.dtype == torch.float32 and (again - exact).abs().max() < (half - exact).abs().max()
    with pytest.raises(ValueError, match="dtype=torch.float64: must be torch.float32"):
        pipe.to(torch.float64)


def test_channels_last_and_fused_give_the_same_planes(toybox):
    pipe = TriplaneTurbo.from_pretrained("toybox")
    exact = pipe("a red cube", generator=seeds(1)[0], output_type="planes").planes
    pipe.to(memory_format=torch.channels_last)
    assert pipe.student.backbone.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    for again in (pipe, pipe.fuse()):
        found = again("a red cube", generator=seeds(1)[0], output_type="planes").planes
        assert (found - exact).abs().max() <= 1e-4 * exact.abs().max()


@pytest.mark.slow
def test_compiled_it_makes_the_same_planes(toybox):
    pipe = TriplaneTurbo.from_pretrained("toybox").fuse()
    exact = pipe("a red cube", generator=seeds(1)[0], output_type="planes").planes
    found = pipe.compile()("a red cube", generator=seeds(1)[0], output_type="planes").planes
    assert (found - exact).abs().max() <= 1e-4 * exact.abs().max()


def test_xformers_is_asked_for_by_name(pipe, monkeypatch):
    """Without it an ImportError says what to do; with it, its function gets [B, L, heads, d]."""
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ImportError, match="prd\\[cuda\\]"):
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
    pipe.student.set_attention(None)
    assert calls and (found - plain).abs().max() <= 1e-4 * plain.abs().max()


def test_unknown_words_and_cut_prompts_are_reported(pipe, caplog):
    pipe("a red dragon", generator=seeds(1)[0], **SMALL)
    assert "never heard of dragon" in caplog.text
    pipe("a red cube " * 10, generator=seeds(1)[0], **SMALL)
    assert "only the first 16 are read" in caplog.text
