"""What the library computes does not depend on torch's default dtype, nor on a default device."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from prd.cameras import orbit_cameras
from prd.distillation.draws import draw_normal, draw_uniform
from prd.fields.triplane import TriplaneField, TriplaneHeads
from prd.pipelines.auto import load_pipeline
from prd.rendering.antialias import antialias
from prd.rendering.protocol import SampleDraws
from prd.rendering.rasterize import rasterize
from prd.rendering.surface import SurfaceConfig, SurfaceRenderer
from prd.rendering.volume import VolumeConfig, VolumeRenderer
from prd.splats.renderer import SplatConfig, SplatRenderer
from prd.teachers.stable_diffusion import StableDiffusionTeacher
from prd.toybox.score import grid_points
from prd.toybox.world import ExactField
from prd.training.recipes import load_config
from prd.training.trainer import Trainer
from tests.generators.tiny_single_pass import KINDS, make
from tests.test_import_rules import MODULES, Module

FACTORIES = {
    *("zeros", "ones", "full", "empty", "eye", "tensor", "as_tensor", "scalar_tensor", "Tensor", "FloatTensor"),
    *("rand", "randn", "normal", "arange", "linspace", "logspace"),
}
SWITCHES = {
    "set_default_dtype",
    "get_default_dtype",
    "set_default_device",
    "init_empty_weights",
    "set_default_tensor_type",
}
LAYERS = {"Linear", "Conv1d", "Conv2d", "Conv3d", "LayerNorm", "GroupNorm", "Embedding"}
SWITCHED_IN = {"prd.training.run.isolation"}  # which puts back what a run's parts have set


def places(module: Module) -> Iterator[str]:
    """`module:line: call` of each call that depends on, or sets, a default of torch."""
    built = set()  # calls inside of functions that say what layers are made of
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef) and any("_weights" in ast.unparse(d) for d in node.decorator_list):
            built |= {id(inner) for inner in ast.walk(node)}
    initial = {
        id(inner)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
        for inner in ast.walk(node)
    }
    for line, name, call in module.calls():
        keywords = {keyword.arg for keyword in call.keywords}
        owner = ast.unparse(call.func).rpartition(".")[0]
        found = f"{module.name}:{line}: {ast.unparse(call)[:80]}"
        if owner == "torch" and name in FACTORIES:
            needed = {"dtype"} if id(call) in initial else {"dtype", "device"}  # modules follow the device they are on
            if not needed <= keywords:
                yield found
        elif (name in SWITCHES and module.name not in SWITCHED_IN) or (
            owner == "nn" and name in LAYERS and id(call) not in built and "dtype" not in keywords
        ):
            yield found


def test_every_tensor_names_its_dtype_and_device() -> None:
    assert [place for module in MODULES for place in places(module)] == []


def test_the_rule_finds_what_it_is_for() -> None:
    source = "x = torch.randn(3, device=d)\ny = torch.ones(2, dtype=f)\nz = nn.Linear(1, 2)\ntorch.set_default_dtype(f)"
    assert len(list(places(Module("prd.other", MODULES[0].path, ast.parse(source))))) == 4


@pytest.fixture(params=["float64", "float16"])
def other_default(request: pytest.FixtureRequest) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Call a function under another default dtype."""

    def call(function: Callable[[], Any]) -> Any:
        torch.set_default_dtype(getattr(torch, request.param))
        try:
            return function()
        finally:
            torch.set_default_dtype(torch.float32)

    yield call
    torch.set_default_dtype(torch.float32)


def flat(value: Any) -> list[Tensor]:
    """All tensors in lists and mappings, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [t for item in (value.values() if isinstance(value, dict) else value) for t in flat(item)]


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(2)]


def rendered() -> list[Tensor]:
    """Renderings, with the heads, cameras and draws made anew."""
    torch.manual_seed(0)
    heads = TriplaneHeads(4, 8)
    planes = draw_normal((2, 6, 4, 8, 8), generators())
    angles: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    cameras = orbit_cameras(torch.full((2, 1), 20.0, **angles), torch.full((2, 1), 30.0, **angles), 2.4, 50.0)
    found = [*heads.parameters(), planes, draw_uniform((2, 3), generators()), grid_points(4)]
    for field in (TriplaneField(planes, heads), ExactField(["a red cube", "a blue mug"])):
        for renderer in (
            VolumeRenderer(VolumeConfig(height=8, width=8, num_samples=8, grid_resolution=8)),
            SurfaceRenderer(SurfaceConfig(height=8, width=8, grid_resolution=16)),
            SplatRenderer(SplatConfig(height=8, width=8, grid_resolution=16)),
        ):
            with torch.no_grad():
                views = renderer.render(field, cameras, (8, 8), 0.5, SampleDraws(generators())).views
            found += [views.rgb, views.normal, views.disparity, views.opacity]
    return found


def generated(toybox: Any) -> list[Tensor]:
    """What the pipeline and the single-pass models make, loaded or built anew."""
    pipe: Any = load_pipeline("toybox")
    pipe.set_progress_bar_config(disable=True)
    output = pipe("a red cube", generator=torch.Generator().manual_seed(0), isosurface_resolution=16, target_faces=100)
    found = [output.field.planes, *(torch.as_tensor(m.vertices) for m in output.meshes), *pipe.model.heads.parameters()]
    for kind in KINDS:
        model = make(kind)
        embeds = draw_normal((2, 5, 12), generators())
        with torch.no_grad():
            field = model.generate(embeds)
            found += [*model.state_dict().values(), field.sdf(torch.full((2, 9, 3), 0.3, dtype=torch.float32))]
    return found


def distilled(toybox: Any) -> list[Tensor]:
    """The gradient of a training step from all teachers and renderers."""
    words = ["--num_threads", "1", "--train_batch_size", "1", "--num_denoising_steps", "2", "--report_to", "null"]
    words += ["--renderers.volume.grid_resolution", "16", "--renderers.surface.grid_resolution", "16"]
    trainer = Trainer(load_config("toybox", [*words, "--renderers.volume.num_samples", "8"]))
    trainer.train_step(0)
    return [p.grad if p.grad is not None else p.detach() for p in trainer.parameters]


def check(one: list[Tensor], other: list[Tensor]) -> None:
    assert [t.dtype for t in one] == [t.dtype for t in other]
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_pixels_far_from_the_border(backend: Any, other_default: Any) -> None:
    """Half precision does not hold the centre of pixel 2049."""
    corners = [[[-0.9, -0.9, 0.0, 1.0], [0.95, -0.8, 0.1, 1.0], [0.999, 0.9, 0.2, 1.0]]]
    clip = torch.tensor(corners, dtype=torch.float32, device="cpu")
    faces = torch.tensor([[0, 1, 2]], dtype=torch.long, device="cpu")

    def drawn() -> list[Tensor]:
        fragments = rasterize(clip, faces, 4, 4096, backend=backend)
        colour = fragments.barycentric.contiguous()
        return [fragments.face_index, colour, fragments.depth, antialias(colour, fragments, clip, faces)]

    check(drawn(), other_default(drawn))


def test_renderings(other_default: Any) -> None:
    check(flat(rendered()), flat(other_default(rendered)))


def test_generations(other_default: Any, toybox: Any) -> None:
    check(generated(toybox), other_default(lambda: generated(toybox)))


def test_distillation(other_default: Any, toybox: Any) -> None:
    check(distilled(toybox), other_default(lambda: distilled(toybox)))


def test_teachers(other_default: Any, toybox: Any) -> None:
    def parameters() -> list[Tensor]:
        teacher = StableDiffusionTeacher.from_pretrained(str(toybox / "stable_diffusion"))
        return [*teacher.parameters(), *teacher.buffers(), teacher.alphas_cumprod]

    check(parameters(), other_default(parameters))
