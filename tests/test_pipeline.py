"""From a prompt to a mesh, with random weights: determinism, round trips and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prd import EmptySurfaceError, TriplaneTurbo

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
        found = TriplaneTurbo.from_pretrained(place)("a red cube", generator=seeds(1)[0], **SMALL).field
        assert torch.equal(found.sdf(POINTS), expected.sdf(POINTS))
        assert torch.equal(found.rgb(POINTS), expected.rgb(POINTS))
    original = TriplaneTurbo.from_pretrained("toybox")("a red cube", generator=seeds(1)[0], **SMALL).field
    assert not torch.equal(original.sdf(POINTS), expected.sdf(POINTS))


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
    with pytest.raises(ValueError, match="2 generators for 1 prompts"):
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
    field_type = type(pipe("a red cube", generator=seeds(0)[0], **SMALL).field)
    plain = field_type.grid

    def lifted(self, *args, **kwargs):
        sdf, *rest = plain(self, *args, **kwargs)
        sdf = sdf.clone()
        sdf[1:] += 10
        return sdf, *rest

    plain_sdf = field_type.sdf

    def lifted_sdf(self, points):
        sdf = plain_sdf(self, points).clone()
        sdf[1:] += 10
        return sdf

    monkeypatch.setattr(field_type, "grid", lifted)
    monkeypatch.setattr(field_type, "sdf", lifted_sdf)
    prompts = ["a red cube", "a blue mug"]
    with pytest.raises(EmptySurfaceError) as caught:
        pipe(prompts, generator=seeds(1, 2), **SMALL)
    assert caught.value.samples == [1]
    flagged = pipe(prompts, generator=seeds(1, 2), on_empty="flag", **SMALL).meshes
    assert flagged[0] is not None and flagged[1] is None


def test_unknown_words_and_cut_prompts_are_reported(pipe, caplog):
    pipe("a red dragon", generator=seeds(1)[0], **SMALL)
    assert "never heard of dragon" in caplog.text
    pipe("a red cube " * 10, generator=seeds(1)[0], **SMALL)
    assert "only the first 16 are read" in caplog.text
