"""The HTTP interface: every answer has its form, every wrong request its typed error."""

from __future__ import annotations

import importlib.util
import io
import json
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import trimesh
from fastapi.testclient import TestClient

from prd.cli import main
from prd.errors import ConfigError
from prd.meshes.export import ExportKeywords
from prd.meshes.options import MeshOptions
from prd.serving.requests import OTHER_NAMES, available_formats
from prd.serving.run import bound_socket, hosts_of
from prd.serving.schema import Options
from prd.serving.server import build_app
from prd.serving.service import Service
from tests.serving.stub import SMALL, StubPipeline, started

ASK = {"prompt": "a red cube", "options": SMALL}


@pytest.fixture
def service() -> Iterator[Service]:
    service, _ = started(queue=4, batch_size=2)
    yield service
    service.worker.pipe.gate.set()
    service.close()


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(build_app(service), raise_server_exceptions=False) as client:
        yield client


def gltf_of(data: bytes) -> dict[str, Any]:
    return json.loads(data[20 : 20 + int.from_bytes(data[12:16], "little")])


def test_a_mesh_from_the_request_to_its_file(client: TestClient) -> None:
    answer = client.post("/v1/meshes?wait=30", json={**ASK, "seed": 7})
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/v1/meshes/{job['id']}"
    assert job.items() >= {"status": "done", "prompt": "a red cube", "seed": 7, "format": "glb"}.items()
    assert job.items() >= {"progress": 1.0, "position": 0, "error": None}.items()
    assert 0 < job["faces"] <= 200 and job["seconds"] > 0 and job["file"] == f"/v1/meshes/{job['id']}/file"
    assert client.get(answer.headers["location"]).json() == job
    file = client.get(job["file"])
    assert file.status_code == 200 and file.headers["content-type"] == "model/gltf-binary"
    assert file.headers["content-disposition"] == f'attachment; filename="{job["id"]}.glb"'
    extras = gltf_of(file.content)["asset"]["extras"]
    assert (extras["prompt"], extras["seed"], extras["model"]) == ("a red cube", 7, "stub")


def test_a_seed_is_drawn_and_said(client: TestClient) -> None:
    jobs = [client.post("/v1/meshes?wait=30", json={**ASK, "seed": None}).json() for _ in range(2)]
    assert all(0 <= job["seed"] < 2**31 for job in jobs) and jobs[0]["seed"] != jobs[1]["seed"]
    assert gltf_of(client.get(jobs[0]["file"]).content)["asset"]["extras"]["seed"] == jobs[0]["seed"]


@pytest.mark.parametrize("format", available_formats())
def test_every_format_has_its_media_type_and_can_be_read(format: str, client: TestClient) -> None:
    job = client.post("/v1/meshes?wait=30", json={**ASK, "format": format.upper()}).json()
    assert job["status"] == "done" and job["format"] == format
    file = client.get(job["file"])
    assert file.headers["content-type"] == job["media_type"] and len(file.content) > 1000
    if format in ("glb", "obj", "ply", "stl"):
        assert len(trimesh.load_mesh(io.BytesIO(file.content), file_type=format).faces) == job["faces"]


def test_every_option_of_a_mesh_and_of_its_file_may_be_asked_for() -> None:
    """By its own name or that of the command line, so that none is forgotten."""
    asked = {OTHER_NAMES.get(field.name, field.name) for field in fields(MeshOptions)} - {"on_empty"}
    assert asked | set(ExportKeywords.__annotations__) | {"steps", "vertex_colors"} == Options.model_fields.keys()


def test_a_textured_obj_comes_with_its_material(client: TestClient) -> None:
    textured = {**SMALL, "vertex_colors": False, "texture": 32}
    job = client.post("/v1/meshes?wait=30", json={**ASK, "format": "obj", "options": textured}).json()
    file = client.get(job["file"])
    assert file.headers["content-type"] == "application/zip" and file.headers["content-disposition"].endswith('.zip"')
    names = zipfile.ZipFile(io.BytesIO(file.content)).namelist()
    assert sorted(name.rpartition(".")[2] for name in names) == ["mtl", "obj", "png"]
    assert all(name.startswith(job["id"]) for name in names)


def test_a_file_without_a_texture_is_not_unwrapped(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prd.meshes.mesh.unwrap", lambda *arguments: pytest.fail("unwrapped the mesh"))
    textured = {**SMALL, "vertex_colors": False, "texture": 64}
    job = client.post("/v1/meshes?wait=30", json={**ASK, "format": "stl", "options": textured}).json()
    assert job["status"] == "done" and job["faces"] > 0


WRONG: list[tuple[Any, str, str]] = [
    ({"prompt": ""}, "prompt", "is empty"),
    ({"prompt": "x" * 1001}, "prompt", "at most 1000 characters"),
    ({"prompt": "x\0"}, "prompt", "NUL"),
    ({"prompt": "\ud800"}, "prompt", "lone surrogate"),
    ({"prompt": 5}, "prompt", "valid string"),
    ({}, "prompt", "is missing"),
    ({"prompt": "a", "seed": -1}, "seed", "0..18446744073709551615"),
    ({"prompt": "a", "seed": 2**64}, "seed", "0..18446744073709551615"),
    ({"prompt": "a", "seed": 1.5}, "seed", "valid integer"),
    ({"prompt": "a", "seed": True}, "seed", "valid integer"),
    ({"prompt": "a", "seed": "1"}, "seed", "valid integer"),
    ({"prompt": "a", "format": "fbx"}, "format", "one of glb, obj"),
    ({"prompt": "a", "format": "../x"}, "format", "one of glb, obj"),
    ({"prompt": "a", "colour": "red"}, "colour", "there are prompt, seed, format, options"),
    ({"prompt": "a", "options": 3}, "options", "object"),
    ({"prompt": "a", "options": {"colour": 1}}, "options.colour", "there are faces, texture"),
    ({"prompt": "a", "options": {"output": "/etc/passwd"}}, "options.output", "no such field"),
    ({"prompt": "a", "options": {"on_empty": "flag"}}, "options.on_empty", "no such field"),
    ({"prompt": "a", "options": {"faces": 2}}, "options.faces", "at least 4"),
    ({"prompt": "a", "options": {"faces": "many"}}, "options.faces", "valid integer"),
    ({"prompt": "a", "options": {"target_faces": "many"}}, "options.target_faces", "valid integer"),
    ({"prompt": "a", "options": {"faces": 20, "target_faces": 30}}, "options.target_faces", "given as faces too"),
    ({"prompt": "a", "options": {"texture": "big"}}, "options.texture", "'auto'"),
    ({"prompt": "a", "options": {"texture": 8192}}, "options.texture", "at most 4096"),
    ({"prompt": "a", "options": {"resolution": 512}}, "options.resolution", "at most 256"),
    ({"prompt": "a", "options": {"isosurface_resolution": 1}}, "options.resolution", "2..2048"),
    ({"prompt": "a", "options": {"topology": "torn"}}, "options.topology", "'keep' or 'free'"),
    ({"prompt": "a", "options": {"close_handles": 9}}, "options.close_handles", "0..2"),
    ({"prompt": "a", "options": {"lods": 9}}, "options.lods", "1..8"),
    ({"prompt": "a", "options": {"metallic": 2}}, "options.metallic", "2"),
    ({"prompt": "a", "options": {"compress": "zip"}}, "options.compress", "'draco'"),
    ({"prompt": "a", "options": {"steps": 3}}, "options.steps", "1, 2 or 4"),
    ({"prompt": "a", "options": {"height": "60"}}, "options.height", "as 60mm"),
    ({"prompt": "a", "options": {"up": "x"}}, "options.up", "'y' or 'z'"),
    ({"prompt": "a", "options": {"up": "z"}}, "options.up", "a .glb is +Y up"),
    ({"prompt": "a", "options": {"vertex_colors": True, "texture": 64}}, "options.vertex_colors", "no texture"),
    ({"prompt": "a", "format": "stl", "options": {"lods": 2}}, "options.lods", ".stl holds one mesh"),
    ({"prompt": "a", "format": "obj", "options": {"height": "6cm"}}, "options.height", "no unit of length"),
]


@pytest.mark.parametrize(("body", "field", "said"), WRONG, ids=[str(body)[:60] for body, _, _ in WRONG])
def test_a_wrong_field_is_named(body: Any, field: str, said: str, client: TestClient, service: Service) -> None:
    answer = client.post("/v1/meshes", content=json.dumps(body), headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["field"]) == (422, "invalid_field", field), error
    assert said in error["message"] and "\n" not in error["message"] and len(error["message"]) < 400
    assert str(service.jobs.folder) not in answer.text
    assert service.jobs.waiting == service.jobs.running == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"a red cube"',
        b"\xff\xfe",
        b"[" * 60000,
        b'{"prompt":"a","seed":' + b"9" * 9000 + b"}",
    ],
    ids=lambda body: f"{body[:8]!r}{len(body)}",
)
def test_a_body_that_is_no_object_is_refused(body: bytes, client: TestClient) -> None:
    answer = client.post("/v1/meshes", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (422, "invalid_body")
    answer = client.post("/v1/meshes", content=json.dumps(ASK), headers={"content-type": "text/plain"})  # of a form
    assert (answer.status_code, answer.json()["error"]["type"]) == (422, "invalid_body")


def test_a_large_body_is_refused_whether_or_not_it_says_its_length(client: TestClient) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    for content in (b" " * 100_000, parts()):
        answer = client.post("/v1/meshes", content=content, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/v1/meshes/absent", 404, "unknown_job"),
        ("DELETE", "/v1/meshes/absent", 404, "unknown_job"),
        ("GET", "/v1/meshes/absent/file", 404, "unknown_job"),
        ("GET", "/v1/meshes/absent/events", 404, "unknown_job"),
        ("GET", "/v1/meshes/%2e%2e%2f%2e%2e%2fetc%2fpasswd/file", 404, "not_found"),
        ("GET", "/v1/meshes/..%5c..%5cwin.ini/file", 404, "unknown_job"),
        ("GET", "/elsewhere", 404, "not_found"),
        ("PUT", "/v1/meshes", 405, "method_not_allowed"),
        ("GET", "/v1/meshes/absent?wait=-1", 422, "invalid_field"),
        ("GET", "/v1/meshes/absent?wait=nan", 422, "invalid_field"),
        ("GET", "/v1/meshes/absent?wait=1e9", 422, "invalid_field"),
    ],
)
def test_what_is_not_there_is_a_typed_error(method: str, path: str, status: int, kind: str, client: TestClient) -> None:
    answer = client.request(method, path)
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)


def test_a_full_queue_and_a_rate_say_when_to_try_again(client: TestClient, service: Service) -> None:
    service.worker.pipe.gate.clear()
    answers = [client.post("/v1/meshes", json=ASK) for _ in range(8)]
    full = answers[-1]
    assert (full.status_code, full.json()["error"]["type"]) == (429, "queue_full")
    assert int(full.headers["retry-after"]) >= 1
    taken = [answer for answer in answers if answer.status_code == 202]
    assert [answer.json()["position"] for answer in taken[-4:]] == [1, 2, 3, 4]
    service.worker.pipe.gate.set()
    assert all(client.get(f"{answer.headers['location']}?wait=30").json()["status"] == "done" for answer in taken)
    limited, _ = started(rate=2)
    with TestClient(build_app(limited)) as hasty:
        answers = [hasty.post("/v1/meshes", json=ASK) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [202, 202, 429]
    assert answers[-1].json()["error"]["type"] == "rate_limited" and int(answers[-1].headers["retry-after"]) > 20
    limited.close()


def test_a_file_before_its_job_is_done_and_a_failed_job(client: TestClient, service: Service) -> None:
    service.worker.pipe.gate.clear()
    started_job = client.post("/v1/meshes", json=ASK).json()
    answer = client.get(f"/v1/meshes/{started_job['id']}/file")
    assert (answer.status_code, answer.json()["error"]["type"]) == (409, "not_done")
    cancelled = client.delete(f"/v1/meshes/{started_job['id']}").json()
    assert (cancelled["status"], cancelled["file"]) == ("cancelled", None)
    service.worker.pipe.gate.set()
    failed = client.post("/v1/meshes?wait=30", json={**ASK, "prompt": "break"}).json()
    assert failed["status"] == "failed" and failed["error"]["type"] == "internal_error"
    assert "/somewhere" not in json.dumps(failed)
    answer = client.get(f"/v1/meshes/{failed['id']}/file")
    assert answer.status_code == 409 and failed["error"]["message"] in answer.json()["error"]["message"]


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    blocks = [block.split("\n") for block in text.split("\n\n") if block.startswith("event: ")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def test_events_show_progress_and_end_by_themselves(client: TestClient, service: Service) -> None:
    service.worker.pipe.gate.clear()
    job = client.post("/v1/meshes", json=ASK).json()
    threading.Timer(0.3, service.worker.pipe.gate.set).start()
    with client.stream("GET", f"/v1/meshes/{job['id']}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        events = events_of(stream.read().decode())
    assert [name for name, _ in events[:-1]] == ["progress"] * (len(events) - 1) and events[-1][0] == "done"
    shares = [shown["progress"] for _, shown in events]
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert events[-1][1]["file"] == f"/v1/meshes/{job['id']}/file"
    assert [name for name, _ in events_of(client.get(f"/v1/meshes/{job['id']}/events").text)] == ["done"]
    failed = client.post("/v1/meshes?wait=30", json={**ASK, "prompt": "break"}).json()
    assert [name for name, _ in events_of(client.get(f"/v1/meshes/{failed['id']}/events").text)] == ["failed"]
    assert all(not job.watchers for job in service.jobs._finished.values())


def test_health_and_errors_while_loading_and_stopping() -> None:
    gate = threading.Event()
    service = Service(lambda: gate.wait(30) and StubPipeline())
    with TestClient(build_app(service)) as client:
        service.start()
        for answer in (client.get("/health"), client.post("/v1/meshes", json=ASK), client.get("/v1/model")):
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "loading")
            assert answer.headers["retry-after"] == "5"
        gate.set()
        service.wait_until_loaded()
        while client.get("/health").status_code != 200:
            time.sleep(0.01)
        job = client.post("/v1/meshes?wait=30", json=ASK).json()
        service.stop()
        for answer in (client.get("/health"), client.post("/v1/meshes", json=ASK)):
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "stopping")
        assert client.get(job["file"]).status_code == 200  # what was made can still be read
    service.close()


def test_the_model_the_metrics_and_the_documentation(client: TestClient) -> None:
    model = client.get("/v1/model").json()
    assert (model["name"], model["kind"], model["licence"], model["seeded"]) == (
        "stub",
        "StubPipeline",
        "apache-2.0",
        True,
    )
    assert "cube" in model["words"] and model["formats"] == available_formats()
    assert model["limits"]["prompt_characters"] == 1000 and model["limits"]["queue"] == 4
    client.post("/v1/meshes?wait=30", json=ASK)
    client.get("/v1/meshes/../../etc/passwd")
    text = client.get("/metrics").text
    for line in (
        'prd_requests_total{method="POST",path="/v1/meshes",status="202"} 1',
        'prd_jobs_total{status="done"} 1',
        'prd_jobs{status="queued"} 0',
        "prd_queue_length 0",
        'prd_job_seconds_bucket{le="+Inf"} 1',
        "prd_job_seconds_count 1",
    ):
        assert f"\n{line}\n" in text
    assert "passwd" not in text and "process_resident_memory_bytes " in text
    schema = client.get("/openapi.json").json()
    assert {"/v1/meshes", "/v1/meshes/{id}", "/v1/meshes/{id}/file", "/v1/model", "/health"} <= schema["paths"].keys()
    assert client.get("/docs").status_code == 200


def test_other_sites_may_ask_only_where_that_was_said(client: TestClient, service: Service) -> None:
    headers = {"origin": "https://example.org", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in client.get("/health", headers=headers).headers
    assert client.options("/v1/meshes", headers=headers).status_code == 405
    with TestClient(build_app(service, ["https://example.org"])) as open_client:
        assert (
            open_client.options("/v1/meshes", headers=headers).headers["access-control-allow-origin"]
            == headers["origin"]
        )


def test_a_service_of_this_machine_is_asked_by_its_own_names_alone(service: Service) -> None:
    """So that no site's page can ask it by a name that was made to mean this machine."""
    with bound_socket("127.0.0.1", 0) as bound:
        hosts = hosts_of(bound, "127.0.0.1", ["Prd.Example.org"], ["https://page.example:8443"])
    with TestClient(build_app(service, hosts=hosts), raise_server_exceptions=False) as client:
        for host in (
            *("127.0.0.1", "localhost:8000", "LOCALHOST", "[::1]:8000", "prd.example.org", "page.example:8443"),
        ):
            assert client.get("/health", headers={"host": host}).status_code == 200, host
        for host in ("evil.example", "127.0.0.1.evil.example:8000", "evil.example:localhost", "[::1", "0.0.0.0", ""):
            for path in ("/health", "/v1/model", "/metrics", "/openapi.json", "/elsewhere"):
                answer = client.get(path, headers={"host": host})
                assert (answer.status_code, answer.json()["error"]["type"]) == (403, "unknown_host"), host
        answer = client.post("/v1/meshes", json=ASK, headers={"host": "evil.example"})
        assert answer.status_code == 403 and "host='evil.example'" in answer.json()["error"]["message"]
    assert service.jobs.waiting == service.jobs.running == 0


def test_a_service_for_other_machines_is_asked_by_any_name_unless_some_are_allowed() -> None:
    with bound_socket("0.0.0.0", 0) as bound:
        assert hosts_of(bound, "0.0.0.0") is hosts_of(bound, "0.0.0.0", ["*"]) is None
        named = hosts_of(bound, "0.0.0.0", ["prd.example.org", "[fe80::1]", "10.0.0.7"])
    assert named and {"prd.example.org", "fe80::1", "10.0.0.7", "localhost", "127.0.0.1", "::1"} <= named
    with bound_socket("127.0.0.1", 0) as bound:
        assert hosts_of(bound, "127.0.0.1", ["*"]) is None
        assert "evil.example" not in (hosts_of(bound, "127.0.0.1") or ())
        for wrong in ("http://prd.example.org", "prd.example.org:80", "", "a/b", "::1:x", "a@b", "abc.de:80"):
            with pytest.raises(ConfigError, match="allow-host=.*leave http:// and the port out"):
                hosts_of(bound, "127.0.0.1", [wrong])


def test_warnings_reach_the_job_they_are_about(random_toybox: Any) -> None:
    """Words that the model does not know, and a number of triangles that was not met."""
    from prd.pipelines.auto import load_pipeline

    pipe: Any = load_pipeline(random_toybox / "adapter", base=str(random_toybox / "stable_diffusion"))
    pipe.encoder_name = "toybox"
    service = Service(lambda: pipe)
    with TestClient(build_app(service)) as client:
        service.start()
        service.wait_until_loaded()
        answers = [
            client.post("/v1/meshes", json={**ASK, "prompt": f"a red {word}"}) for word in ("cube", "dragon", "cone")
        ]
        jobs = [client.get(f"{answer.headers['location']}?wait=60").json() for answer in answers]
    assert [any("dragon" in text for text in job["warnings"]) for job in jobs] == [False, True, False]
    service.close()


@pytest.mark.parametrize(("command", "package"), [("serve", "uvicorn"), ("demo", "gradio")])
def test_a_missing_extra_is_one_sentence(
    command: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == package else found(name, *more))
    assert main([command, "--port", "0"]) == 2
    said = f"prd: prd {command}: {package} is not installed; pip install 'prd-3d[{command}]'\n"
    assert capsys.readouterr().err == said
