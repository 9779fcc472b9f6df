"""Threads are the user's or the machine's, never the launcher's; signals ask and do not kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from prd.training.run import processes
from prd.training.run.processes import StopRequest, choose_threads, threads_of_user

LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def launcher(tmp_path):
    """A launcher's folder in /proc: its environment and its command."""

    def make(environment: bytes, command: bytes = b"accelerate\0launch\0train.py\0"):
        (tmp_path / "environ").write_bytes(environment)
        (tmp_path / "cmdline").write_bytes(command)
        return tmp_path

    return make


def test_the_launchers_one_thread_is_told_from_the_users(launcher, tmp_path):
    assert threads_of_user({}, tmp_path) is None
    assert threads_of_user({"OMP_NUM_THREADS": "1"}, tmp_path) == 1  # no launcher: the user's
    assert threads_of_user(LAUNCHED, tmp_path / "absent") is None
    assert threads_of_user(LAUNCHED, launcher(b"HOME=/root\0")) is None
    assert threads_of_user(LAUNCHED, launcher(b"HOME=/root\0OMP_NUM_THREADS=1\0")) == 1
    asked = b"accelerate\0launch\0--num_cpu_threads_per_process\x001\0train.py\0"
    assert threads_of_user(LAUNCHED, launcher(b"HOME=/root\0", asked)) == 1
    assert threads_of_user({**LAUNCHED, "OMP_NUM_THREADS": "3"}, launcher(b"HOME=/root\0")) == 3


ORPHAN = """
import signal, sys, time
from prd.training.run.processes import StopRequest, end_with_launcher
with StopRequest() as stop:
    print(end_with_launcher(), flush=True)
    while stop.name is None:
        time.sleep(0.01)
    print(stop.name, flush=True)
"""
LAUNCHER = """
import os, subprocess, sys
environment = {**os.environ, **dict(word.split("=") for word in sys.argv[2:])}
subprocess.run([sys.executable, "-c", sys.argv[1]], env=environment)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")
def test_a_run_is_asked_to_stop_when_its_launcher_is_killed():
    words = [sys.executable, "-c", LAUNCHER, ORPHAN, "ACCELERATE_MIXED_PRECISION=no"]
    plain = {name: value for name, value in os.environ.items() if name not in processes.LAUNCHED}
    launcher = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=plain)
    assert launcher.stdout and launcher.stdout.readline() == "True\n"
    launcher.kill()
    assert launcher.stdout.readline() == "SIGTERM\n"  # the child has what the launcher wrote to
    launcher.wait()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")
@pytest.mark.parametrize("other, asked", [(0, []), (1, [signal.SIGTERM])])
def test_a_run_whose_ablation_was_killed_while_it_loaded_is_asked_to_stop(other, asked, monkeypatch):
    """`prd ablate` tells its runs its own process id: another one is their parent by then."""
    sent: list[int] = []
    monkeypatch.setenv(processes.ABLATION, str(os.getppid() + other))
    monkeypatch.setattr(processes, "launched_by", lambda *args: True)
    monkeypatch.setattr(processes.ctypes, "CDLL", lambda *args, **options: SimpleNamespace(prctl=lambda *args: 0))
    monkeypatch.setattr(processes.os, "kill", lambda process, number: sent.append(number))
    assert processes.end_with_launcher() and sent == asked


def test_who_started_a_process_is_a_launcher_if_it_set_what_it_had_not(launcher, tmp_path):
    assert processes.launched_by(LAUNCHED, launcher(b"HOME=/root\0"))
    assert not processes.launched_by(LAUNCHED, launcher(b"HOME=/root\0ACCELERATE_MIXED_PRECISION=no\0"))
    assert not processes.launched_by({"HOME": "/root"}, launcher(b"HOME=/root\0"))
    assert not processes.launched_by(LAUNCHED, tmp_path / "absent")


def test_cores_are_shared_by_the_processes_of_the_machine(monkeypatch):
    monkeypatch.setattr(processes, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert choose_threads(None) == 8 and choose_threads(3) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert choose_threads(None) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert choose_threads(None) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.name is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name == number.name  # the first
    assert signal.getsignal(number) is before
