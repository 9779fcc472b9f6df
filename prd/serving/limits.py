"""Requests that the service refuses before it reads them: too many of one client, large bodies, names of others."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prd.serving.errors import BodyTooLarge, RateLimited, ServiceError, UnknownHost
from prd.utils.arguments import shown

CLIENTS = 4096  # addresses that are remembered


class RateLimit:
    """A bucket of tokens per client: `rate` requests at once, refilled by `rate` per minute."""

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        """rate: requests per minute and client; 0: no limit."""
        self.rate, self.clock = rate, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> (tokens, when)

    def take(self, client: str) -> None:
        """Take a token of a client's; raises `RateLimited` where there is none."""
        if not self.rate:
            return
        now = self.clock()
        tokens, before = self._buckets.pop(client, (float(self.rate), now))
        tokens = min(self.rate, tokens + (now - before) * self.rate / 60)
        allowed = tokens >= 1
        self._buckets[client] = (tokens - allowed, now)
        while len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        if not allowed:
            seconds = max(1, round((1 - tokens) * 60 / self.rate + 0.5))
            raise RateLimited(
                f"more than {self.rate} requests for meshes in a minute; try again in {seconds} s", retry_after=seconds
            )


class BodyLimit:
    """ASGI middleware: bodies of more than `most` bytes are answered with 413, whether or not they say their length."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.most:
            await _answer(send, self._error())
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > self.most:
                await _answer(send, self._error())
                return
        read = False

        async def replay() -> Message:
            nonlocal read
            if read:
                return await receive()
            read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    def _error(self) -> ServiceError:
        return BodyTooLarge(f"the body is larger than {self.most} bytes; a prompt has at most 1,000 characters")


class HostCheck:
    """ASGI middleware: requests whose `Host` is another than the service's names are answered with 403.

    A browser lets a page ask the site that it came from; where that site's name is made to mean this machine (DNS
    rebinding), the request still says the name.

    hosts  names and addresses, in lower case, without ports and brackets
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if name_of(host) in self.hosts:
            await self.app(scope, receive, send)
        else:
            await _answer(
                send,
                UnknownHost(
                    f"host={shown(host)}: is no name of this service; --allow-host NAME lets it be asked by it"
                ),
            )


def name_of(host: str) -> str:
    """Return the name or address of a `Host` header or an origin, in lower case; "" where it has none."""
    try:
        return urlsplit(host if "://" in host else f"//{host}").hostname or ""
    except ValueError:
        return ""


class Counted:
    """ASGI middleware: counts answers by the route that gave them."""

    def __init__(self, app: ASGIApp, add: Callable[[str, str, int], None]) -> None:
        self.app, self.add = app, add

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        statuses: list[int] = []

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "HEAD", "OPTIONS") else "other"
            path = getattr(scope.get("route"), "path", "other")
            for status in statuses[:1]:
                self.add(method, path, status)


async def _answer(send: Send, error: ServiceError) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send(
        {"type": "http.response.start", "status": error.status, "headers": [*headers, (b"connection", b"close")]}
    )
    await send({"type": "http.response.body", "body": body})
