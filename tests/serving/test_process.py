"""`prd serve` as a process of its own, with the shipped model: signals, ports, hostile prompts, two at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.stub import SMALL

pytestmark = pytest.mark.slow

LOADING = 300.0  # seconds: torch is imported and the model loaded, on a machine with other work
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


class Running:
    """A `prd serve` of this test, and its temporary folder."""

    def __init__(self, folder: Path, *words: str) -> None:
        command = [sys.executable, "-m", "prd.cli", "serve", "--port", "0", *words]
        self.folder = folder
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(folder)},
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split(": ")[0]

    def ask(self, path: str, body: Any = None, method: str | None = None) -> tuple[int, Any]:
        """Return status and body of an answer, read from JSON where it is that."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                text, status, kind = answer.read(), answer.status, answer.headers["content-type"]
        except urllib.error.HTTPError as error:
            text, status, kind = error.read(), error.code, error.headers["content-type"]
        return status, json.loads(text) if kind == "application/json" else text

    def wait(self) -> Running:
        """Wait until the model is loaded."""
        deadline = time.monotonic() + LOADING
        while time.monotonic() < deadline:
            if self.ask("/health")[0] == 200:
                return self
            time.sleep(0.2)
        raise TimeoutError("the model was not loaded")

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; returns the exit status and what was printed on standard error."""
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=120)
        return self.process.returncode, said


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    running: list[Running] = []

    def started(*words: str) -> Running:
        folder = tmp_path / f"tmp{len(running)}"
        folder.mkdir()
        running.append(Running(folder, *words))
        return running[-1]

    yield started
    for one in running:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


@POSIX
def test_two_services_answer_hostile_prompts_and_stop_when_told(start: Callable[..., Running], tmp_path: Path) -> None:
    first, second = start("--batch-size", "1"), start("--model", "toybox-att3d")
    assert first.ask("/health")[1]["error"]["type"] == "loading"
    first.wait(), second.wait()
    assert first.url != second.url
    assert second.ask("/v1/model")[1].items() >= {"name": "toybox-att3d", "kind": "ATT3D", "seeded": False}.items()
    before = {path.name for path in tmp_path.rglob("*")}
    for prompt in (
        "../../etc/passwd",
        "/etc/passwd",
        "$(touch x); `touch x`",
        "a red cube\r\nSet-Cookie: x=y",
        "{0.__class__}",
    ):
        status, job = first.ask("/v1/meshes?wait=120", {"prompt": prompt, "options": SMALL})
        assert (status, job["status"], job["prompt"]) == (202, "done", prompt)
        status, data = first.ask(job["file"])
        assert status == 200 and data[:4] == b"glTF"
        made = {path.name for path in tmp_path.rglob("*")} - before
        before |= made
        assert made == {f"{job['id']}.glb"}
    status, job = second.ask("/v1/meshes?wait=120", {"prompt": "a red cube", "format": "stl", "options": SMALL})
    assert (status, job["status"]) == (202, "done")

    for _ in range(5):  # clients that go away while they listen
        with socket.create_connection(("127.0.0.1", int(first.url.rpartition(":")[2]))) as gone:
            gone.sendall(f"GET /v1/meshes/{job['id']}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    jobs = [
        first.ask("/v1/meshes", {"prompt": "a red mug", "options": SMALL | {"resolution": 128}})[1] for _ in range(6)
    ]
    deadline = time.monotonic() + 60
    while first.ask(f"/v1/meshes/{jobs[0]['id']}")[1]["status"] == "queued" and time.monotonic() < deadline:
        time.sleep(0.02)
    first.process.send_signal(signal.SIGTERM)
    states, files = [], []
    for job in jobs:
        states.append(first.ask(f"/v1/meshes/{job['id']}?wait=60")[1])
        if states[-1]["status"] == "done":
            files.append(first.ask(states[-1]["file"])[1])
    assert states[0]["status"] == "done" and all(data[:4] == b"glTF" for data in files)
    assert [state["error"] and state["error"]["type"] for state in states[-4:]] == ["stopping"] * 4
    _, said = first.process.communicate(timeout=120)
    assert first.process.returncode == 0, said
    assert "Traceback" not in said
    assert second.end(signal.SIGINT)[0] == 0
    assert not [*first.folder.glob("prd-*"), *second.folder.glob("prd-*")]


@POSIX
def test_a_service_that_loads_stops_at_once_and_a_wrong_address_is_one_sentence(start: Callable[..., Running]) -> None:
    loading = start()
    port = loading.url.rpartition(":")[2]
    assert loading.ask("/v1/meshes", {"prompt": "a red cube"})[0] == 503
    for words, said in (
        (["--port", port], f"prd: port={port}: cannot be opened on 127.0.0.1"),
        (["--port", "70000"], "prd: port=70000: must be an integer in 0..65535"),
        (["--host", "no.such.host.invalid"], "prd: host='no.such.host.invalid': is no address of this machine"),
    ):
        command = [sys.executable, "-m", "prd.cli", "serve", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOADING)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(said) and len(done.stderr.splitlines()) == 1
    status, text = loading.end(signal.SIGTERM)
    assert status == 0 and "Traceback" not in text
    assert not list(loading.folder.glob("prd-*"))


@POSIX
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "with a running job"])
def test_a_second_signal_ends_at_once_with_one_line(start: Callable[..., Running], busy: bool) -> None:
    service = start().wait()
    if busy:
        job = service.ask("/v1/meshes", {"prompt": "a red mug", "options": SMALL | {"resolution": 256}})[1]
        deadline = time.monotonic() + 60
        while service.ask(f"/v1/meshes/{job['id']}")[1]["status"] == "queued" and time.monotonic() < deadline:
            time.sleep(0.02)
    service.process.send_signal(signal.SIGINT)
    while busy and service.ask("/v1/meshes", {"prompt": "a red cube"})[0] != 503:  # until the first is heard
        time.sleep(0.02)
    status, said = service.end(signal.SIGINT)
    lines = said.splitlines()
    if busy:
        assert status == 130 and lines == ["prd: ended at once by a second signal; running jobs are lost"]
    else:  # it may have ended before the second
        assert status in (0, 130) and len(lines) == (status == 130)
    assert not list(service.folder.glob("prd-*"))
