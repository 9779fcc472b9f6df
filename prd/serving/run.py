"""Run the service's application until a signal, or the model's failure, ends it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, NoReturn

import uvicorn

from prd.errors import ConfigError
from prd.serving.limits import name_of
from prd.utils.arguments import check_int

if TYPE_CHECKING:
    from prd.serving.service import Service

LINGER = 5.0  # seconds in which clients may still read what became of the last jobs after a signal
LOCAL = ("localhost", "127.0.0.1", "::1")  # names of this machine on itself
FORCED = 128 + 2  # exit status after a second signal, as shells report SIGINT


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens later; ConfigError where the address is taken or not of this machine."""
    check_int("port", port, 0, 65535)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"host={host!r}: is no address of this machine ({error}); 127.0.0.1 is, for it alone"
        ) from None
    if sys.platform != "win32":  # where it would share the port with another program
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen()
    except OSError as error:
        bound.close()
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"port={port}: cannot be opened on {host} ({reason}); name another, 0 takes a free one"
        ) from None
    return bound


def url_of(bound: socket.socket) -> str:
    """Return the address of a bound socket as one writes it into a browser."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def hosts_of(
    bound: socket.socket, host: str, allowed: Sequence[str] = (), origins: Sequence[str] = ()
) -> frozenset[str] | None:
    """Return the names by which a service may be asked, in lower case; None: any.

    host     that the socket was bound by
    allowed  further names or addresses; "*" is any
    origins  of pages that may ask it; their names are allowed

    Other machines ask a socket that is bound for them by names that are not known here: without `allowed` it has any.
    Raises ConfigError for an allowed name that is none.
    """
    named = {_checked_host(text) for text in allowed}
    address = bound.getsockname()[0].partition("%")[0]
    if "*" in named or not (named or ip_address(address).is_loopback):
        return None
    return frozenset({*LOCAL, address, host.lower(), *named, *map(name_of, origins)} - {""})


def _checked_host(text: str) -> str:
    """Return an allowed name as a `Host` header's is read; ConfigError for one with a port or a scheme."""
    name = text.lower().removeprefix("[").removesuffix("]")
    if name != "*" and name_of(f"[{name}]" if ":" in name else name) != name or not name:
        raise ConfigError(
            f"allow-host={text!r}: must be a name or an address alone, as prd.example.org; leave http:// and the port "
            "out; '*' is any"
        )
    return name


def run_app(app: Any, service: Service, bound: socket.socket) -> int:
    """Answer requests until SIGINT or SIGTERM; returns the exit status.

    After the first signal new jobs are refused, waiting ones fail, running ones finish, and what became of them can be
    read for some seconds; a second signal ends the process at once with the status `FORCED`. Raises what loading the
    model raised.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    server = Server(config, service)
    server.run(sockets=[bound])
    if service.worker.failure is not None:
        service.jobs.close()
        raise service.worker.failure
    if service.worker.is_alive():  # loading
        _end_at_once(service, 0)
    service.close()
    return 0


def _end_at_once(service: Service, status: int) -> NoReturn:
    """Remove the service's files and end the process: Python would wait for torch on the worker's thread, or crash."""
    service.jobs.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Server(uvicorn.Server):
    """uvicorn's server, which a signal lets finish what runs."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self.ending: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()

        def handle(number: int, frame: Any) -> None:
            loop.call_soon_threadsafe(self.end)  # not here: the lock of the jobs may be held by this thread

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self.ending is not None:  # the process is about to end: Ctrl-C would only interrupt Python's tidying up
                signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end(self) -> None:
        """Begin to stop; a second time: end the process."""
        if self.ending is None:
            self.service.stop()
            self.ending = asyncio.get_running_loop().create_task(self._finish())
        else:
            print("prd: ended at once by a second signal; running jobs are lost", file=sys.stderr)
            _end_at_once(self.service, FORCED)

    async def _finish(self) -> None:
        while self.service.is_busy:
            await asyncio.sleep(0.05)
        deadline = asyncio.get_running_loop().time() + LINGER
        while self.service.jobs.unreceived and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.service.worker.failure is not None
