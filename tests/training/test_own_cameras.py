"""Teachers of four and of six views, perspective and orthographic, in one run: each is shown what it asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import T2IAdapter, UNet2DConditionModel
from safetensors.torch import save_file

from prd.data.batches import CAMERAS, JITTER, SHADING, TEACHERS
from prd.errors import ConfigError
from prd.hub.shipped import shipped
from prd.rendering.surface import SurfaceRenderer
from prd.rendering.volume import VolumeRenderer
from prd.training import objective
from prd.training.estimate.counts import count_step
from prd.training.recipes import load_config
from prd.training.trainer import Trainer
from prd.utils.counting import weight_bytes
from tests.compare import ROUNDING, relative_difference
from tests.teachers.tiny_mv_adapter import adapter_shapes, computed
from tests.training.test_trainer import SMALL

NO_REGULARIZERS = ["--regularizers.eikonal", "0", "--regularizers.sparsity", "0"]
OFF = ["--teachers.stable_diffusion.enabled", "false", "--teachers.richdreamer.enabled", "false"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter of computed weights for the toy box's Stable Diffusion."""
    base = shipped("toybox", "stable_diffusion")
    assert base is not None
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base / "unet"))
    encoder = T2IAdapter(6, list(unet.config.block_out_channels), unet.config.layers_per_block, 8)
    file = tmp_path_factory.mktemp("adapter") / "mvadapter_t2mv_sd21.safetensors"
    save_file(computed(adapter_shapes(unet, encoder)), file)
    return str(file)


def make(adapter: str | None, *words: str, **settings: Any) -> Trainer:
    own = {"path": "toybox", "adapter": adapter, **settings}
    teacher = [] if adapter is None else ["--teachers.mv_adapter", str(own).replace("'", "")]
    return Trainer(load_config("toybox", [*SMALL, *OFF, "--renderer_schedule", "all", *teacher, *words]))


def gradients(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in trainer.parameters if p.grad is not None])


def test_four_and_six_views_teach_one_model(toybox, adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of MVDream and MV-Adapter: both renderers draw for both, and every gradient is finite."""
    drawn: list[tuple[str, int, bool]] = []
    for kind in (VolumeRenderer, SurfaceRenderer):

        def render(self: Any, field: Any, cameras: Any, *args: Any, kind: Any = kind, was: Any = kind.render) -> Any:
            drawn.append((kind.__name__, cameras.views, cameras.orthographic))
            return was(self, field, cameras, *args)

        monkeypatch.setattr(kind, "render", render)
    trainer = make(adapter, "--num_denoising_steps", "1")
    rows = [trainer.train_step(step) for step in range(2)]
    assert drawn == 2 * [
        (kind, views, views == 6) for kind in ("VolumeRenderer", "SurfaceRenderer") for views in (4, 6)
    ]
    for row in rows:
        assert row["skipped"] == 0 and row["gradient_norm"] > 0
        for renderer in ("volume", "surface"):
            assert row[f"gradient_norm/mvdream/{renderer}"] > 0 and row[f"gradient_norm/mv_adapter/{renderer}"] > 0
        assert not [name for name in row if name.startswith("cosine")]  # they share no pixels
    assert bool(gradients(trainer).isfinite().all())
    assert trainer.frames == 2 * (4 + 6) * 2  # steps, views, renderers


def test_its_gradient_reaches_the_planes(toybox, adapter: str) -> None:
    trainer = make(adapter, "--num_denoising_steps", "1", "--teachers.mvdream.enabled", "false", *NO_REGULARIZERS)
    trainer.train_step(0)
    assert float(gradients(trainer).abs().max()) > 0 and bool(gradients(trainer).isfinite().all())
    assert trainer.frames == 6 * 2  # the run's own cameras show nobody anything


def test_the_other_teachers_learn_nothing_of_it(toybox, adapter: str) -> None:
    """The run's cameras, its draws and its regularisers are those of a run without it."""
    alone, beside = make(None), make(adapter, weight=0)
    first, second = alone.train_step(0), beside.train_step(0)
    own = {"seconds", "frames_per_prompt", "gradient_norm", "teacher_passes"}
    shared = first.keys() & second.keys() - own
    assert {"gradient_norm/mvdream/volume", "eikonal", "opacity"} <= shared
    assert {name: first[name] for name in shared} == {name: second[name] for name in shared}
    assert relative_difference(gradients(beside), gradients(alone)) <= ROUNDING


def test_every_set_of_cameras_has_draws_of_its_own(toybox, adapter: str) -> None:
    trainer = make(adapter, "--num_denoising_steps", "1")
    batch = trainer.draw(0, 0)
    seeds = []
    for shot in trainer.objective.shots:
        estimates = objective.Estimates(trainer.stage.at(0), 0, batch, [0], shot, None, None)  # type: ignore[arg-type]
        for place in (0, 1):
            places = (place,) if place or shot.place else ()
            seeds += [estimates.draws(TEACHERS, *places)[0].initial_seed()]
        seeds += [estimates.draws(stream)[0].initial_seed() for stream in (CAMERAS, JITTER, SHADING)]
    assert [shot.place for shot in trainer.objective.shots] == [0, 1] and len(set(seeds)) == len(seeds) == 10


def test_what_a_run_takes_counts_it(toybox, adapter: str) -> None:
    """`prd train --dry-run`: the teacher as it is loaded, and six views more for each renderer."""
    words = ["--renderer_schedule", "all", *SMALL, *OFF]
    given = f"{{path: toybox, adapter: {adapter}, image_height: 2}}"
    alone, beside = (
        count_step(load_config("toybox", [*words, *own])) for own in ([], ["--teachers.mv_adapter", given])
    )
    found, teacher = beside.teachers["mv_adapter"], make(adapter).parts.teachers["mv_adapter"]
    assert not beside.uncounted and isinstance(teacher, torch.nn.Module)
    assert found.parameters == sum(p.numel() for p in teacher.parameters())
    assert found.weight_bytes + found.text_bytes == weight_bytes(teacher)
    assert found.one_pass.total > beside.teachers["mvdream"].one_pass.total
    for name, renderer in beside.renderers.items():
        before = alone.renderers[name]
        assert renderer.lookup_bytes >= before.lookup_bytes and renderer.work.total > before.work.total
    assert beside.renderers["surface"].lookup_bytes == pytest.approx(2.5 * alone.renderers["surface"].lookup_bytes)


def test_views_of_an_adapter_that_is_not_counted_are(toybox) -> None:
    """MV-Adapter on XL: its network is named as not counted, its six views are counted, and the run's are not."""
    words, xl = [*SMALL, *OFF], ["--teachers.mv_adapter_xl.enabled", "true"]
    without, beside, alone = (
        count_step(load_config("toybox", [*words, *own]))
        for own in ([], xl, [*xl, "--teachers.mvdream.enabled", "false"])
    )
    assert alone.uncounted == beside.uncounted == ("teachers.mv_adapter_xl",) and not alone.teachers
    lookups = [count.renderers["surface"].lookup_bytes for count in (without, beside, alone)]
    assert [size / lookups[0] for size in lookups] == pytest.approx([1, 10 / 4, 6 / 4])


@pytest.mark.parametrize(("nodes", "shared"), [("16", True), ("12", False)], ids=["shared", "own"])
def test_a_surface_is_counted_for_each_set_of_cameras(toybox, nodes: str, shared: bool) -> None:
    """Its nodes too, unless they are the volume's grid, which is sampled once for all."""
    words = [*SMALL, *OFF, "--renderers.surface.grid_resolution", nodes]
    xl = ["--teachers.mv_adapter_xl.enabled", "true"]
    four, both, six = (
        count_step(load_config("toybox", [*words, *own])).renderers
        for own in ([], xl, [*xl, "--teachers.mvdream.enabled", "false"])
    )
    apart = {name: four[name].work.total + six[name].work.total for name in both}
    assert both["volume"].work.total < (1 - 1e-3) * apart["volume"]
    if shared:
        assert both["surface"].work.total < (1 - 1e-3) * apart["surface"]
    else:
        assert both["surface"].work.total == pytest.approx(apart["surface"], rel=1e-6)
        assert both["surface"].kept_bytes == pytest.approx(
            four["surface"].kept_bytes + six["surface"].kept_bytes, abs=2
        )


def test_single_views_may_be_orthographic(toybox) -> None:
    words = ["--teachers.mvdream.enabled", "false", "--teachers.stable_diffusion.enabled", "true"]
    trainer = make(None, *words, "--cameras.projection", "orthographic", "--cameras.views", "2")
    row = trainer.train_step(0)
    assert row["skipped"] == 0 and row["gradient_norm/stable_diffusion/volume"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--cameras.projection", "orthographic"],
            "cameras.projection=orthographic: must be perspective, which mvdream",
        ),
        (["--cameras.views", "6"], "cameras.views=6: must be 4, which mvdream see"),
        (["--cameras.azimuths", "[0, 90]"], "must be one for each of views=4"),
        (
            ["--stages", "[{until: 0.5}, {name: flat, until: 1, cameras: {projection: orthographic}}]"],
            "cameras.projection=orthographic in stage flat: must be perspective, which mvdream",
        ),
        (
            ["--stages", "[{until: 0.5, cameras: {views: 6}}, {until: 1}]"],
            "cameras.views=6 in stage 1: must be 4, which mvdream see",
        ),
    ],
    ids=["projection", "views", "azimuths", "projection-of-a-stage", "views-of-a-stage"],
)
def test_cameras_that_a_teacher_does_not_know_are_refused(toybox, adapter: str, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make(adapter, *words)


def test_a_stage_without_a_teacher_may_have_cameras_that_it_does_not_know(toybox, adapter: str) -> None:
    leaves = "{until: 1, cameras: {projection: orthographic, views: 2}, teachers: {mvdream: {enabled: false}}}"
    trainer = make(adapter, "--stages", f"[{{until: 0.5}}, {leaves}]")
    assert trainer.parts.teachers.keys() == {"mvdream", "mv_adapter"}


def test_own_cameras_of_another_number_are_refused(toybox, adapter: str) -> None:
    trainer = make(adapter)
    trainer.parts.teachers["mv_adapter"].num_views = 4
    with pytest.raises(ConfigError, match="teachers.mv_adapter: its own cameras have views=6, but it sees 4"):
        Trainer(trainer.config, trainer.parts)


def test_another_attribute_of_that_name_is_no_cameras(toybox) -> None:
    """A teacher of the user's own may call anything `cameras`: it is shown the run's."""
    trainer = make(None, "--num_denoising_steps", "1")
    trainer.parts.teachers["mvdream"].cameras = ["left"]  # type: ignore[attr-defined]
    again = Trainer(trainer.config, trainer.parts)
    assert [shot.cameras for shot in again.objective.shots] == [None] and again.objective.views == 4
