"""Where log lines go and how they look."""

from __future__ import annotations

import logging
import logging.handlers
import os
import stat
import sys
from typing import Any

import structlog

from desfs.errors import UsageError
from desfs.settings import ProgramSettings

_SYSLOG = "/dev/log"


def configure_logs(settings: ProgramSettings, *, detached: bool = False) -> None:
    """Send everything, of the libraries too, to stderr or `log_file`; a daemon without a terminal and without a file
    logs to the system's log, where there is one. Called again, it opens a `log_file` that was moved away anew. Raises:
    UsageError for one that cannot be opened."""
    handler: logging.Handler
    if settings.log_file is not None:
        try:
            if os.path.exists(settings.log_file) and stat.S_ISFIFO(os.stat(settings.log_file).st_mode):
                raise UsageError(f"log file {settings.log_file} is a FIFO")  # opening it would wait for its reader
            handler = logging.FileHandler(settings.log_file, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UsageError(f"log file {settings.log_file}: {error.strerror}") from error
        except ValueError as error:  # a NUL in it
            raise UsageError(f"log file {settings.log_file!r}: {error}") from error
    elif detached and os.path.exists(_SYSLOG):
        handler = logging.handlers.SysLogHandler(_SYSLOG, logging.handlers.SysLogHandler.LOG_DAEMON)
        handler.ident = f"desfs[{os.getpid()}]: "
    elif detached:
        handler = logging.NullHandler()
    else:
        handler = logging.StreamHandler(sys.stderr)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=False, pad_event_to=0)
    )
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    before, root.handlers = root.handlers, [handler]
    for each in before:  # after it: a thread that logs meanwhile would open a closed file again
        try:
            each.close()
        except OSError as error:  # of what it had not written yet, to a disk that is full
            root.warning("the log file before could not be closed: %s", error.strerror)
    root.setLevel(settings.log_level.upper())
    # What the SDKs tell of every request is for their own authors.
    for name in ("botocore", "boto3", "urllib3", "s3transfer", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
