"""The queue, the worker and what is kept: nothing is lost, nothing grows, one failure is one job's."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from prd.meshes.files import read_file_mesh
from prd.meshes.options import MeshOptions
from prd.pipelines.auto import load_pipeline
from prd.serving.errors import InvalidField, Loading, QueueFull, Stopping, UnknownJob
from prd.serving.jobs import Jobs
from prd.serving.limits import CLIENTS, RateLimit, RateLimited
from prd.serving.run import bound_socket, run_app
from prd.serving.server import build_app
from prd.serving.service import Service, ServiceConfig
from tests.serving.stub import StubPipeline, asked, started


def test_a_mesh_is_the_same_beside_others_as_alone(random_toybox: Path) -> None:
    """Four prompts in one call; each mesh is, to rounding, what the pipeline makes of the prompt and seed alone."""
    pipe: Any = load_pipeline(random_toybox / "adapter", base=str(random_toybox / "stable_diffusion"))
    service = Service(lambda: pipe, ServiceConfig(batch_size=4))
    options: dict[str, Any] = {"isosurface_resolution": 24, "target_faces": None, "texture_size": None}
    prompts = ["a red cube", "a blue mug", "a red cube", "a green cone"]
    jobs = [service.jobs.submit(asked(text, i, options=MeshOptions(**options))) for i, text in enumerate(prompts)]
    service.start()
    assert all(service.jobs.wait(job, 60) for job in jobs)
    made, alone = [], []
    for job in jobs:
        assert job.status == "done", job.error
        made.append(read_file_mesh(job.files["glb"]).vertices)
        noise = torch.Generator().manual_seed(job.request.seed)
        alone.append(pipe(job.request.prompt, generator=noise, **options).meshes[0].vertices)
    service.close()
    assert not service.jobs.folder.exists()

    def apart(a: Any, b: Any) -> float:
        return max(float(abs(a.min(axis=0) - b.min(axis=0)).max()), float(abs(a.max(axis=0) - b.max(axis=0)).max()))

    assert max(apart(one, other) for one, other in zip(made, alone, strict=True)) < 1e-3
    assert apart(alone[0], alone[2]) > 1e-2  # the same prompt by another seed


def test_waiting_prompts_are_made_in_one_call_and_a_failure_is_one_job_s() -> None:
    service, pipe = started(batch_size=3)
    pipe.gate.clear()
    first = service.submit(asked("a red cube"))
    while not pipe.calls:
        time.sleep(0.01)
    texts = ["a blue cube", "break", "a green cone", "a red mug"]
    others = [service.submit(asked(text)) for text in texts] + [service.submit(asked("a red cube", steps=1))]
    assert [service.jobs.position(job) for job in [first, *others]] == [0, 1, 2, 3, 4, 5]
    pipe.gate.set()
    assert all(service.jobs.wait(job, 30) for job in [first, *others])
    assert pipe.calls[:2] == [["a red cube"], texts[:3]]
    assert pipe.calls[2:5] == [[text] for text in texts[:3]]  # again, each alone
    assert pipe.calls[5:] == [texts[3:], ["a red cube"]]  # another number of steps is another call
    assert [job.status for job in others] == ["done", "failed", "done", "done", "done"]
    assert others[1].error == ("internal_error", "the mesh could not be made; the service's log says why")
    service.close()


def test_a_mesh_between_two_prompts() -> None:
    """Of ATT3D; beside others it has a call of its own, and its file says what it lies between."""
    service, pipe = started(load_pipeline("toybox-att3d"))
    ends = [asked("a red cube"), asked("a blue sphere")]
    between = [asked("a red cube", toward="a blue sphere", share=share) for share in (0.0, 0.5)]
    jobs = [service.submit(request) for request in (ends[0], *between, ends[1])]
    assert all(service.jobs.wait(job, 60) for job in jobs)
    assert [job.status for job in jobs] == ["done"] * 4, [job.error for job in jobs]
    files = [read_file_mesh(job.files["glb"]) for job in jobs]
    sizes = [file.vertices.max(axis=0) - file.vertices.min(axis=0) for file in files]
    assert abs(sizes[1] - sizes[0]).max() < 1e-3
    red, blue = zip(*(file.colors.mean(axis=0)[[0, 2]] for file in files), strict=True)
    assert red[0] > red[2] > red[3] and blue[0] < blue[2] < blue[3]
    assert b'"toward":"a blue sphere","share":0.5' in jobs[2].files["glb"].read_bytes()
    service.close()


def test_a_full_queue_a_service_that_loads_and_one_that_stops_refuse() -> None:
    service = Service(StubPipeline, ServiceConfig(queue=2))
    with pytest.raises(Loading):
        service.submit(asked())
    jobs = [service.jobs.submit(asked()) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 jobs are waiting"):
        service.jobs.submit(asked())
    service.stop()
    assert [job.error and job.error[0] for job in jobs] == ["stopping", "stopping"]
    with pytest.raises(Stopping):
        service.submit(asked())
    service.close()


def test_running_jobs_finish_when_the_service_stops() -> None:
    service, pipe = started(batch_size=1)
    pipe.gate.clear()
    running, waiting = service.submit(asked()), service.submit(asked())
    while not pipe.calls:
        time.sleep(0.01)
    service.stop()
    pipe.gate.set()
    assert service.jobs.wait(running, 30) and running.status == "done"
    assert service.jobs.unreceived and running.files["glb"].is_file()
    assert waiting.status == "failed"
    running.received = True
    assert service.jobs.unreceived
    waiting.received = True
    assert not service.jobs.unreceived
    service.close()


def test_a_cancelled_job_leaves_no_file_and_its_work_is_left_off() -> None:
    service, pipe = started(batch_size=1)
    pipe.gate.clear()
    running, waiting = service.submit(asked()), service.submit(asked("a blue cube"))
    while not pipe.calls:
        time.sleep(0.01)
    service.jobs.cancel(running)
    service.jobs.cancel(waiting)
    pipe.gate.set()
    last = service.submit(asked("a red mug"))
    assert service.jobs.wait(last, 30)
    assert (running.status, waiting.status, last.status) == ("cancelled", "cancelled", "done")
    assert pipe.calls == [["a red cube"], ["a red mug"]]
    assert [path.name for path in service.jobs.folder.iterdir()] == [f"{last.id}.glb"]
    service.jobs.cancel(last)  # finished: forgotten
    with pytest.raises(UnknownJob):
        service.jobs.get(last.id)
    assert list(service.jobs.folder.iterdir()) == []
    service.close()


def done(jobs: Jobs, size: int) -> str:
    job = jobs.submit(asked())
    jobs.take(1)
    path = jobs.folder / f"{job.id}.glb"
    path.write_bytes(bytes(size))
    jobs.complete(job, {"glb": path}, faces=1)
    return job.id


def test_files_are_kept_for_a_time_and_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs(limit=8, keep=60, keep_bytes=1000)
    now = time.monotonic()
    ids = [done(jobs, 400) for _ in range(3)]
    with pytest.raises(UnknownJob, match="60 seconds"):
        jobs.get(ids[0])
    assert jobs.get(ids[1]).files and len(list(jobs.folder.iterdir())) == 2
    ids.append(done(jobs, 5000))  # larger than all that is kept: its client still gets it
    assert jobs.get(ids[-1]).files and len(list(jobs.folder.iterdir())) == 1
    monkeypatch.setattr(time, "monotonic", lambda: now + 3600)
    with pytest.raises(UnknownJob):
        jobs.get(ids[-1])
    assert list(jobs.folder.iterdir()) == []
    jobs.close()


def test_finished_jobs_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prd.serving.jobs.MAX_KEPT", 5)
    jobs = Jobs(limit=8, keep=60, keep_bytes=1000)
    for _ in range(20):
        jobs.cancel(jobs.submit(asked()))
    assert jobs.count()["cancelled"] == 5 and jobs.total["cancelled"] == 20
    jobs.close()


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a\\b", "con", "a red cube/../x", "%2e%2e", "😀" * 99]
)
def test_no_prompt_reaches_a_file_name(name: str) -> None:
    service, _ = started()
    job = service.submit(asked(f"a red cube {name}", formats=("glb", "obj", "stl")))
    assert service.jobs.wait(job, 30)
    names = {path.name for path in service.jobs.folder.iterdir()}
    assert names <= {f"{job.id}.{suffix}" for suffix in ("glb", "obj", "stl")}
    service.close()


def test_a_model_that_cannot_be_loaded_is_said() -> None:
    def load() -> None:
        raise ValueError("model='x': is no model")

    service = Service(load)
    service.start()
    with pytest.raises(ValueError, match="is no model"):
        service.wait_until_loaded()
    with pytest.raises(ValueError, match="is no model"):
        run_app(build_app(service), service, bound_socket("127.0.0.1", 0))
    assert not service.jobs.folder.exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"queue": 0}, "queue=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"keep": -1}, "keep=-1"),
        ({"rate": -1}, "rate=-1"),
    ],
)
def test_sizes_out_of_range_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"{said}: must be an integer of at least"):
        ServiceConfig(**config)


def test_a_request_is_checked_before_it_waits() -> None:
    service, _ = started()
    for request, field in (
        (asked(steps=3), "options.steps"),
        (asked(formats=("fbx",)), "format"),
        (asked(" "), "prompt"),
    ):
        with pytest.raises(InvalidField) as caught:
            service.submit(request)
        assert caught.value.field == field
    service.close()


def test_a_client_s_rate() -> None:
    now = 0.0
    rates = RateLimit(3, lambda: now)
    for _ in range(3):
        rates.take("a")
    with pytest.raises(RateLimited) as caught:
        rates.take("a")
    assert caught.value.retry_after is not None and 20 <= caught.value.retry_after <= 21
    rates.take("b")  # another client
    now = 20.0
    rates.take("a")
    for client in range(2 * CLIENTS):
        rates.take(str(client))
    assert len(rates._buckets) == CLIENTS
    for _ in range(1000):
        RateLimit(0).take("a")
