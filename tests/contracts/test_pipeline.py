"""The contract of text-to-3D pipelines, over all of them: calls, options, errors, copies, files."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import prd
from prd import EmptySurfaceError, Mesh, TextTo3DOutput, TriplaneTurbo
from prd.errors import ModelMismatch
from prd.pipelines.auto import PIPELINES, load_pipeline
from prd.pipelines.base import TextTo3DPipeline
from tests.compare import ROUNDING, relative_difference
from tests.conftest import use_assets
from tests.generators.tiny_single_pass import KINDS, save_run

SMALL: Any = {"isosurface_resolution": 20, "target_faces": 200, "texture_size": None}
POINTS = torch.rand(1, 40, 3, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
PROMPTS = ["a red cube", "a blue mug"]


@pytest.fixture(scope="module", params=["triplane_turbo", *KINDS])
def pipe(request: pytest.FixtureRequest, random_toybox: Path, tmp_path_factory: Any) -> Iterator[TextTo3DPipeline]:
    """Each pipeline with random weights; the toy box's names mean random models."""
    with pytest.MonkeyPatch.context() as patch:
        use_assets(patch, random_toybox)
        name = "toybox"
        if request.param != "triplane_turbo":
            name = str(save_run(request.param, tmp_path_factory.mktemp(request.param)))
        yield load_pipeline(name)


def call(pipe: TextTo3DPipeline, *args: Any, **options: Any) -> Any:
    """The pipeline's answer, from one generator per prompt where it draws noise."""
    if pipe.draws_noise and "generator" not in options:
        prompts = args[0] if args and isinstance(args[0], list) else [0]
        options["generator"] = [torch.Generator().manual_seed(5 + i) for i in range(len(prompts))]
    return pipe(*args, **options)  # type: ignore[operator]


def values(field: Any, batch: int = 1) -> Tensor:
    points = POINTS.expand(batch, -1, -1)
    return torch.cat([field.sdf(points), field.rgb(points)], dim=-1)


def same(one: Mesh, other: Mesh) -> bool:
    names = ("vertices", "faces", "vertex_colors", "vertex_normals")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


def test_prompts_become_meshes_and_the_stages_are_timed(pipe: Any) -> None:
    output = call(pipe, PROMPTS, **{**SMALL, "texture_size": 32})
    assert isinstance(output, TextTo3DOutput) and output.prompts == PROMPTS
    assert list(output.seconds)[0] == "text" and list(output.seconds)[-2:] == ["isosurface", "mesh"]
    for mesh in output.meshes:
        assert isinstance(mesh, Mesh) and mesh.is_watertight
        assert mesh.texture is not None and mesh.texture.shape == (32, 32, 3)
    assert not same(*output.meshes)  # the prompt matters


def test_a_call_is_repeatable_and_a_prompt_is_its_own(pipe: Any) -> None:
    together = call(pipe, PROMPTS, output_type="field").field
    assert torch.equal(values(call(pipe, PROMPTS, output_type="field").field, 2), values(together, 2))
    alone = call(pipe, PROMPTS[0], output_type="field").field
    torch.testing.assert_close(values(alone)[0], values(together, 2)[0], rtol=1e-4, atol=1e-4)


def test_how_far_to_go_and_the_tuple(pipe: Any) -> None:
    allowed = ["mesh", "field", *(["planes"] if isinstance(pipe, TriplaneTurbo) else [])]
    found = {kind: call(pipe, PROMPTS[0], output_type=kind, return_dict=False, **SMALL) for kind in allowed}
    assert all(isinstance(answer, tuple) and len(answer) == 1 for answer in found.values())
    output = call(pipe, PROMPTS[0], output_type="field")
    assert output.meshes == [] and relative_difference(values(output.field), values(found["field"][0])) <= ROUNDING
    assert same(found["mesh"][0][0], call(pipe, PROMPTS[0], **SMALL).meshes[0])
    if "planes" in found:
        assert relative_difference(found["planes"][0], output.planes) <= ROUNDING
    with pytest.raises(ValueError, match=f"output_type='glb': must be one of {', '.join(map(repr, allowed))}"):
        call(pipe, PROMPTS[0], output_type="glb")


@pytest.mark.parametrize(
    "options",
    [
        {"isosurface_resolution": 1},
        {"isosurface_resolution": 24.0},
        {"target_faces": 3},
        {"target_faces": "a"},
        {"texture_size": 0},
        {"texture_size": 9000},
        {"keep": "some"},
        {"on_empty": "ignore"},
        {"coarse_factor": 1},
    ],
    ids=str,
)
def test_mesh_options_are_checked_before_anything_is_computed(pipe: Any, options: dict, monkeypatch: Any) -> None:
    monkeypatch.setattr(pipe, "encoder", lambda prompts: pytest.fail("computed"))
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}: must be ") as error:
        call(pipe, PROMPTS[0], **options)
    assert "\n" not in str(error.value)


def test_integers_of_numpy_and_torch_are_integers(pipe: Any) -> None:
    options = {"isosurface_resolution": np.int64(20), "target_faces": torch.tensor(200), "texture_size": np.int16(32)}
    if pipe.draws_noise:
        options |= {"num_inference_steps": np.int64(4), "num_meshes_per_prompt": torch.tensor(1)}
    (mesh,) = call(pipe, PROMPTS[0], **options).meshes
    assert same(mesh, call(pipe, PROMPTS[0], **{**SMALL, "texture_size": 32}).meshes[0])
    for name in options:
        for wrong in (True, np.bool_(True), torch.tensor(True), np.float64(20)):
            with pytest.raises(ValueError, match=f"{name}=.*: must be a"):
                call(pipe, PROMPTS[0], **{name: wrong})


def test_what_samples_start_from_is_checked_before_anything_is_computed(pipe: Any, monkeypatch: Any) -> None:
    if not pipe.draws_noise:
        pytest.skip("draws nothing")
    monkeypatch.setattr(pipe, "encoder", lambda prompts: pytest.fail("computed"))
    size = pipe.model.config.latent_size
    for options, message in (
        ({"generator": [torch.Generator()]}, "1 generators for 2 samples"),
        ({"generator": 3}, "generator=3: must be a torch.Generator"),
        ({"latents": torch.zeros(1, 6, 4, size, size)}, "expected 2 samples"),
        ({"latents": torch.zeros(2, 3, 4, size, size)}, "latents=.*expected"),
        ({"callback_on_step_end": 3}, "callback_on_step_end=3: must be a function"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            pipe(PROMPTS, **options)


@pytest.mark.parametrize("prompt", ["a \ud800 cube", "a\0b", ["a", "\udcff"], "\u3000\n"], ids=ascii)
def test_a_prompt_that_is_no_valid_text_is_one_sentence(pipe: Any, prompt: Any) -> None:
    with pytest.raises(ValueError, match="^prompt=.*(UTF-8|NUL|empty)") as error:
        pipe(prompt)
    assert "\n" not in str(error.value) and str(error.value).encode()


@pytest.mark.parametrize("prompt", ["a\x1b[31m\x07 cube", "\u7acb\u65b9\u4f53", "\u200b", "\U0001f9ca " * 999], ids=len)
def test_any_other_text_gives_a_field(pipe: Any, prompt: str, caplog: Any) -> None:
    assert values(call(pipe, prompt, output_type="field").field).isfinite().all()
    assert all(len(record.getMessage()) < 500 for record in caplog.records)


def test_mesh_options_reach_the_mesh(pipe: Any) -> None:
    fine = call(pipe, PROMPTS[0], **{**SMALL, "target_faces": None}).meshes[0]
    few = call(pipe, PROMPTS[0], **{**SMALL, "target_faces": 60}).meshes[0]
    near = call(pipe, PROMPTS[0], **{**SMALL, "target_faces": None}, coarse_factor=2).meshes[0]
    assert len(few.faces) < len(fine.faces)
    assert near.volume == pytest.approx(fine.volume, rel=0.02)


def test_an_argument_that_there_is_not_is_named(pipe: Any) -> None:
    with pytest.raises(TypeError, match=f"colour=: {type(pipe).__name__} takes no such argument; leave it out"):
        call(pipe, PROMPTS[0], colour="red")
    for name in () if pipe.draws_noise else ("generator", "num_meshes_per_prompt", "callback_on_step_end"):
        with pytest.raises(TypeError, match=f"{name}=: .* takes no such argument, for it answers in one pass"):
            pipe(PROMPTS[0], **{name: 2})


@pytest.mark.parametrize("prompt", [7, None, ["a red cube", 7], b"a red cube"], ids=str)
def test_a_prompt_that_is_not_text_is_a_type_error(pipe: Any, prompt: Any) -> None:
    with pytest.raises(TypeError, match="must be a string or a list of strings"):
        pipe(prompt)


@pytest.mark.parametrize("prompt", ["", "  ", [], ["a red cube", ""]], ids=str)
def test_an_empty_prompt_is_an_error(pipe: Any, prompt: Any) -> None:
    with pytest.raises(ValueError, match="prompt="):
        pipe(prompt)


def test_embeddings_stand_for_a_prompt(pipe: Any) -> None:
    embeds = pipe.encoder(PROMPTS)
    expected = call(pipe, PROMPTS, output_type="field").field
    bare = type(pipe)(pipe.model)  # no text encoder at all
    draws: Any = {"generator": [torch.Generator().manual_seed(5 + i) for i in range(2)]} if pipe.draws_noise else {}
    found = bare(prompt_embeds=embeds, output_type="field", **draws)
    assert relative_difference(values(found.field, 2), values(expected, 2)) <= ROUNDING and found.prompts == ["", ""]
    with pytest.raises(ValueError, match="without a text encoder; give prompt_embeds= instead"):
        bare("a red cube")
    with pytest.raises(ValueError, match="not both"):
        pipe("a red cube", prompt_embeds=embeds)
    with pytest.raises(ValueError, match=r"prompt_embeds=\(2, 16, 3\): expected \[prompts, tokens, 64\]"):
        pipe(prompt_embeds=embeds[..., :3])
    with pytest.raises(ValueError, match="prompt_embeds: holds NaN"):
        pipe(prompt_embeds=embeds * torch.inf)
    for wrong in (embeds.tolist(), embeds.bool()):
        with pytest.raises(TypeError, match="prompt_embeds is a"):
            pipe(prompt_embeds=wrong)


def test_an_empty_field_raises_or_is_flagged(pipe: Any, monkeypatch: Any) -> None:
    """The second of two shapes has no surface: its signed distance is lifted far above zero."""
    from prd.isosurface import extract

    grid_slabs = extract.grid_slabs

    def lifted(*args: Any, **options: Any) -> Iterator[Any]:
        for sdf, deformation in grid_slabs(*args, **options):
            yield sdf + 100 * torch.arange(len(sdf)).view(-1, 1, 1, 1), deformation

    monkeypatch.setattr(extract, "grid_slabs", lifted)
    with pytest.raises(EmptySurfaceError) as caught:
        call(pipe, PROMPTS, **SMALL)
    assert caught.value.samples == [1]
    flagged = call(pipe, PROMPTS, on_empty="flag", **SMALL).meshes
    assert flagged[0] is not None and flagged[1] is None


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["copy", "pickle"]
)
def test_copies_make_the_same_and_share_nothing(pipe: Any, duplicate: Any) -> None:
    expected = values(call(pipe, PROMPTS[0], output_type="field").field)
    other = duplicate(pipe)
    assert relative_difference(values(call(other, PROMPTS[0], output_type="field").field), expected) <= ROUNDING
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.5)
    assert relative_difference(values(call(other, PROMPTS[0], output_type="field").field), expected) > 10 * ROUNDING
    assert relative_difference(values(call(pipe, PROMPTS[0], output_type="field").field), expected) <= ROUNDING


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["copy", "pickle"]
)
def test_copies_of_a_fused_model_make_the_same(pipe: Any, duplicate: Any) -> None:
    if not hasattr(pipe.model, "fuse"):
        pytest.skip("nothing is fused in a single-pass model")
    fused = copy.deepcopy(pipe)
    fused.model.fuse()
    expected = values(call(fused, PROMPTS[0], output_type="field").field)
    other = duplicate(fused)
    assert other.model.is_fused
    assert torch.equal(values(call(other, PROMPTS[0], output_type="field").field), expected)


def test_what_is_saved_loads_as_the_same_mesh_with_a_card(pipe: Any, tmp_path: Path) -> None:
    changed = copy.deepcopy(pipe)
    with torch.no_grad():
        for parameter in changed.model.trainable_parameters():
            parameter.add_(0.01)  # not what it was loaded from
    changed.training_metadata = {"train_steps": 5, "measured": {"single_seen": {"count": 3, "r_at_1": 0.5}}}
    changed.save_pretrained(tmp_path / "adapter")
    expected = call(changed, PROMPTS[0], **SMALL)
    assert not same(expected.meshes[0], call(pipe, PROMPTS[0], **SMALL).meshes[0])
    for place in (tmp_path, tmp_path / "adapter"):  # a run folder, and the saved model itself
        again = type(pipe).from_pretrained(place)
        assert again.training_metadata == changed.training_metadata
        found = call(again, PROMPTS[0], **SMALL)
        assert same(found.meshes[0], expected.meshes[0])
        assert torch.equal(values(found.field), values(expected.field))
    assert type(load_pipeline(tmp_path)) is type(pipe)
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f"{type(pipe).__name__}.from_pretrained" in card and "| single seen | 3 | 0.50 |" in card
    assert (
        str(tmp_path) not in card
        and json.loads((tmp_path / "adapter/record.json").read_text(encoding="utf-8"))["train_steps"] == 5
    )


def test_another_class_and_a_missing_model_are_named(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "mine")
    name = type(pipe).__name__
    for other in PIPELINES.values():
        if other is not type(pipe):
            with pytest.raises((ModelMismatch, FileNotFoundError)) as error:
                other.from_pretrained(tmp_path / "mine")
            assert name in str(error.value) or "config.json" in str(error.value) and "\n" not in str(error.value)
    for missing, message in (("absent", "no such folder; give one of toybox"), (str(tmp_path), "give a run folder or")):
        with pytest.raises(FileNotFoundError, match=message):
            type(pipe).from_pretrained(missing)
        with pytest.raises(FileNotFoundError, match=message):
            load_pipeline(missing)
    with pytest.raises(ValueError, match="device='cudaa': cannot compute here .* try 'cpu'"):
        type(pipe).from_pretrained(tmp_path / "mine", device="cudaa")
    with pytest.raises(ValueError, match="revision='v1': .* is on this disk"):
        type(pipe).from_pretrained(tmp_path / "mine", revision="v1")
    with pytest.raises(ValueError, match=f"colour='red': {name} takes no such option"):
        load_pipeline(tmp_path / "mine", colour="red")


def test_unknown_words_and_cut_prompts_are_reported(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    call(pipe, "a red dragon", output_type="field")
    assert "'a red dragon': the toy box has never heard of dragon" in caplog.text
    call(pipe, "a red cube " * 10, output_type="field")
    assert "only the first 16 are read" in caplog.text


def test_old_names_are_read_with_a_warning(pipe: Any) -> None:
    old = "student" if isinstance(pipe, TriplaneTurbo) else "generator"
    with pytest.warns(FutureWarning, match=f"pipe.{old} is now called pipe.model"):
        assert getattr(pipe, old) is pipe.model
    with pytest.warns(FutureWarning, match="prd.TriplaneTurboOutput is now called prd.TextTo3DOutput"):
        assert prd.TriplaneTurboOutput is TextTo3DOutput


def test_torch_dtype_is_read_with_a_warning(random_toybox: Path, monkeypatch: Any) -> None:
    use_assets(monkeypatch, random_toybox)
    with pytest.warns(FutureWarning, match="torch_dtype= is now called dtype="):
        assert TriplaneTurbo.from_pretrained("toybox", torch_dtype=torch.bfloat16).dtype == torch.bfloat16  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="give dtype= alone"):
        load_pipeline("toybox", dtype=torch.float32, torch_dtype=torch.float32)
