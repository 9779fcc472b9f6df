"""`prd serve` and `prd demo` before their first request: what fails leaves no files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from prd.cli import INTERRUPTED, main
from tests.serving.stub import started


def interrupted(*arguments: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_a_page_whose_model_is_not_there_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio", reason="needs the extra `demo`")
    assert main(["demo", "--port", "0", "--model", "nosuch"]) == 2
    assert "nosuch" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "where"),
    [("demo", "prd.serving.service.Service.wait_until_loaded"), ("serve", "prd.serving.server.build_app")],
)
def test_an_interrupt_before_the_first_request_leaves_no_folder(
    command: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gradio" if command == "demo" else "uvicorn", reason=f"needs the extra `{command}`")
    monkeypatch.setattr("prd.serving.service.Service.start", lambda service: None)
    monkeypatch.setattr(where, interrupted)
    assert main([command, "--port", "0"]) == INTERRUPTED
    assert not list(tmp_path.iterdir())


def test_a_page_takes_no_files_and_no_large_bodies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason="needs the extra `demo`")
    from fastapi.testclient import TestClient

    from prd.serving.demo import build_demo

    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # put back afterwards
    service, _ = started()
    with TestClient(build_demo(service), raise_server_exceptions=False) as client:
        assert client.get("/").status_code == client.get("/config").status_code == 200
        for path in ("/gradio_api/upload", "/gradio_api/upload/", "/gradio_api/upload?upload_id=1", "/upload"):
            answer = client.post(path, files={"files": ("a.bin", b"x" * 1000)})
            assert answer.status_code in (404, 405), path
            assert path == "/upload" or answer.json()["error"]["type"] == "not_found"
        for path in ("/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/run/make", "/v1/meshes"):
            answer = client.post(path, content=b" " * 100_000)
            assert (answer.status_code, answer.json()["error"]["type"]) == (413, "body_too_large")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    service.close()
