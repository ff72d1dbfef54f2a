"""`desfs assignment`."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from desfs.cli.exits import EXIT_FAILURE, EXIT_USAGE, fail
from desfs.errors import UsageError

if TYPE_CHECKING:
    from assignment.service_settings import Listener, ServiceSettings
    from desfs.notify import Notifier
    from desfs.settings import AssignmentSettings

_WATCH_S = 5.0  # between two signs of life, at most


def run(options: dict[str, Any]) -> int:
    """Serve until a signal ends it; the exit status."""
    from assignment.client import AssignmentError, InvalidRequest
    from desfs.cli.setup import option_name
    from desfs.logs import configure_logs
    from desfs.notify import Notifier
    from desfs.settings import AssignmentSettings, load_settings

    try:
        settings = load_settings(AssignmentSettings, options, option_name)
        url = catalog_url(settings)
        configure_logs(settings)
        listener, service = _listener(settings), _service(settings)
        asyncio.run(_serve(service, listener, url, Notifier(os.environ)))
    except (UsageError, InvalidRequest) as error:
        return fail(error, EXIT_USAGE)
    except AssignmentError as error:
        return fail(error, EXIT_FAILURE)
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror}" if error.filename else error, EXIT_FAILURE)
    return 0


def catalog_url(settings: AssignmentSettings) -> str:
    """The catalog that is configured. Raises: UsageError when there is none."""
    if settings.catalog is None:
        raise UsageError("no catalog: want --catalog URL, DESFS_CATALOG or catalog in the settings file")
    return settings.catalog.get_secret_value()


async def _serve(service: ServiceSettings, listener: Listener, url: str, notifier: Notifier) -> None:
    import structlog

    from assignment.opening import open_catalog
    from assignment.service_run import serve
    from desfs import __version__

    log = structlog.get_logger(__name__)

    def ready(address: str) -> None:
        log.info("serving", url=address, version=__version__)
        notifier.ready(f"serving {address}")

    def stopping() -> None:
        log.info("ending: requests at hand are answered")
        notifier.stopping("requests at hand are answered")

    watching = asyncio.create_task(_watch(notifier))
    try:
        await serve(service, listener, lambda: open_catalog(url), on_ready=ready, on_stopping=stopping)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def _watch(notifier: Notifier) -> None:
    """Tell the service manager that the event loop turns, if it wants to know."""
    if notifier.watchdog_s is None:
        return
    while True:
        notifier.alive()
        await asyncio.sleep(min(notifier.watchdog_s / 3, _WATCH_S))


def _service(settings: AssignmentSettings) -> ServiceSettings:
    from assignment.service_settings import ServiceSettings

    return ServiceSettings(
        shard_bits=settings.shard_bits,
        holder=settings.holder or f"{socket.gethostname()}:{os.getpid()}",
        timezone=settings.timezone,
        prefix=settings.prefix,
        node_ttl_s=settings.node_ttl,
        tokens=settings.tokens.get_secret_value() if settings.tokens is not None else None,
        token_file=Path(settings.token_file) if settings.token_file is not None else None,
        metrics_need_token=not settings.open_metrics,
        max_body=settings.max_body,
        max_requests=settings.max_requests,
        request_timeout_s=settings.request_timeout,
    )


def _listener(settings: AssignmentSettings) -> Listener:
    """Raises: UsageError."""
    from assignment.service_settings import Listener

    host, colon, port = settings.listen.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"--listen: found {settings.listen!r}, want ADDRESS:PORT, such as 0.0.0.0:8000 or [::]:8000")
    if settings.tls_key is not None and settings.tls_cert is None:
        raise UsageError("--tls-key needs --tls-cert")
    return Listener(
        host=host.removeprefix("[").removesuffix("]"),
        port=int(port),
        tls_cert=Path(settings.tls_cert) if settings.tls_cert is not None else None,
        tls_key=Path(settings.tls_key) if settings.tls_key is not None else None,
    )
