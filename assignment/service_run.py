"""The service as a process: its socket, TLS, signals, and its end. Asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator

import structlog
import uvicorn

from assignment.assigner import Assigner
from assignment.catalog import Catalog
from assignment.errors import InvalidRequest
from assignment.service import build_app
from assignment.service_settings import Listener, ServiceSettings

log = structlog.get_logger(__name__)

_ENDING = (signal.SIGTERM, signal.SIGINT)
# Beyond the service's own limit of a request: what is still under way then is cut off.
_GRACE_S = 5
_BACKLOG = 1024


async def serve(
    settings: ServiceSettings,
    listener: Listener,
    open_catalog: Callable[[], Awaitable[Catalog]],
    *,
    on_ready: Callable[[str], None] = lambda url: None,
    on_stopping: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT, which let the requests at hand end and release the node id; a second one ends them
    at once. For the main thread. `on_ready` gets the URL, once requests are taken.

    Raises InvalidRequest for what cannot be listened with, or on an address that others reach without a token; OSError
    for an address that is taken; what opening the catalog raises, unless that is temporary.
    """
    if settings.tokens is None and settings.token_file is None:
        listener.check_open_to_all()
    assigner = Assigner(settings, open_catalog)
    config = uvicorn.Config(
        build_app(settings, assigner),
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        server_header=False,
        ssl_certfile=listener.tls_cert,
        ssl_keyfile=listener.tls_key,
        timeout_graceful_shutdown=round(settings.request_timeout_s) + _GRACE_S,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise InvalidRequest(f"TLS certificate {listener.tls_cert}: {error.strerror or error}") from error
    with _bound(listener) as bound:
        host, port = bound.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        server = _Server(config, lambda: on_ready(f"http{'s' * config.is_ssl}://{shown}:{port}"), on_stopping)
        with _ended_by_signals(server):
            async with assigner:
                await server.serve(sockets=[bound])


class _Server(uvicorn.Server):
    """Ends by our handlers: uvicorn's would raise the signal again before the caller has cleaned up."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None], on_stopping: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._on_stopping = on_stopping

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_stopping()
        await super().shutdown(sockets)


@contextlib.contextmanager
def _ended_by_signals(server: uvicorn.Server) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if server.should_exit:
            server.force_exit = True
            for task in server.server_state.tasks:
                task.cancel()
            for connection in server.server_state.connections:
                connection.transport.close()
        server.should_exit = True

    for number in _ENDING:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in _ENDING:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _bound(listener: Listener) -> Iterator[socket.socket]:
    """A listening socket."""
    try:
        found = socket.getaddrinfo(listener.host, listener.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise InvalidRequest(f"cannot listen on {listener.host!r}: {error.strerror}") from error
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{listener.host}:{listener.port}") from error
        bound.listen(_BACKLOG)
        bound.setblocking(False)
        yield bound
