"""`prd serve`: meshes over HTTP. `prd demo`: the same in a browser."""

from __future__ import annotations

import argparse
import importlib.util
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from prd.commands.options import add_model, load_model

if TYPE_CHECKING:
    from prd.serving.service import Service


def add_serve(commands: Any) -> None:
    """Add the command and its options to a parser's commands."""
    serve = commands.add_parser("serve", help="answer prompts with meshes over HTTP")
    _add_service(serve, port=8000)
    serve.add_argument(
        "--rate", type=int, default=600, help="requests for meshes per minute and client, 0: no limit (600)"
    )
    serve.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="of a web page of another site that may ask from a browser; may be repeated, '*' is any (default: none)",
    )


def add_demo(commands: Any) -> None:
    """Add the command and its options to a parser's commands."""
    _add_service(commands.add_parser("demo", help="a page in the browser: type a prompt, see the mesh"), port=7860)


def _add_service(command: argparse.ArgumentParser, port: int) -> None:
    command.add_argument("--port", type=int, default=port, help=f"0: a free one ({port})")
    command.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all (127.0.0.1)")
    command.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="by which a proxy or other machines ask it; may be repeated, '*' is any (default: this machine's own, and "
        "any where --host lets others ask)",
    )
    add_model(command)
    command.set_defaults(steps=None)  # of a request, not of the command
    command.add_argument("--queue", type=int, default=64, help="jobs that may wait (64)")
    command.add_argument("--batch-size", type=int, default=4, help="waiting prompts in one call (4)")
    command.add_argument("--keep", type=int, default=600, metavar="SECONDS", help="how long files are kept (600)")
    command.add_argument("--keep-megabytes", type=int, default=1024, help="of all kept files (1024)")
    command.add_argument("--max-resolution", type=int, default=256, help="nodes per axis that may be asked for (256)")


def run_serve(args: argparse.Namespace) -> int:
    """Run the command until a signal; returns the exit status."""
    _check_installed("serve", "fastapi", "uvicorn")
    from prd.serving.run import bound_socket, hosts_of, run_app, url_of

    bound = bound_socket(args.host, args.port)  # before anything is loaded
    hosts = hosts_of(bound, args.host, args.allow_host, args.allow_origin)
    service = _service(args, args.rate)
    with _given_back_on_failure(service, bound):
        from prd.serving.server import build_app

        app = build_app(service, args.allow_origin, hosts)
        service.start()
    print(f"{url_of(bound)}: loads {args.model}; {url_of(bound)}/docs lists the requests", flush=True)
    return run_app(app, service, bound)


def run_demo(args: argparse.Namespace) -> int:
    """Run the command until a signal; returns the exit status."""
    _check_installed("demo", "gradio")
    from prd.serving.run import bound_socket, hosts_of, run_app, url_of

    bound = bound_socket(args.host, args.port)
    hosts = hosts_of(bound, args.host, args.allow_host)
    service = _service(args, rate=0)
    with _given_back_on_failure(service, bound):
        service.start()
        from prd.serving.demo import build_demo

        service.wait_until_loaded()  # what the page shows depends on the model
        app = build_demo(service, hosts)
    print(f"{url_of(bound)}: shows {args.model}", flush=True)
    return run_app(app, service, bound)


@contextmanager
def _given_back_on_failure(service: Service, bound: socket.socket) -> Iterator[None]:
    """Remove the service's files and close its socket where what precedes its first request fails or is interrupted."""
    try:
        yield
    except BaseException:
        service.stop()
        service.jobs.close()
        bound.close()
        raise


def _check_installed(extra: str, *packages: str) -> None:
    from prd.errors import ConfigError

    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        verb = "is" if len(missing) == 1 else "are"
        raise ConfigError(f"prd {extra}: {' and '.join(missing)} {verb} not installed; pip install 'prd-3d[{extra}]'")


def _service(args: argparse.Namespace, rate: int) -> Service:
    """Return the service of a command, whose model is not loaded yet."""
    from prd.serving.requests import Limits
    from prd.serving.service import Service, ServiceConfig

    config = ServiceConfig(
        queue=args.queue,
        batch_size=args.batch_size,
        keep=args.keep,
        keep_megabytes=args.keep_megabytes,
        rate=rate,
        limits=Limits(resolution=args.max_resolution),
    )
    return Service(partial(_load, args), config)


def _load(args: argparse.Namespace) -> Any:
    """Load the pipeline, on the worker's thread."""
    pipe = load_model(args)
    if pipe.encoder is None:
        raise ValueError(f"model={args.model!r}: has no text encoder, so that it cannot read prompts; name another")
    if pipe.draws_noise:
        pipe.set_progress_bar_config(disable=True)
    return pipe
