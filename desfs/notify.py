"""What systemd wants to hear of a service: sd_notify(3). Silent where nobody listens."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

import structlog

log = structlog.get_logger(__name__)

_LIMIT_S = 1.0  # for a service manager that is busy to take what it must not miss


class Notifier:
    """Datagrams to the socket that NOTIFY_SOCKET names. A service manager that is gone is no reason to stop serving:
    it is said once in the log."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # sd_notify(3): @ stands for the NUL that abstract addresses begin with.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._has_failed = False
        # sd_watchdog_enabled(3): microseconds, and the process that is meant.
        is_meant = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        limit = environ.get("WATCHDOG_USEC", "") if is_meant and self._address else ""
        self.watchdog_s = int(limit) / 1e6 if limit.isdigit() and int(limit) else None

    def ready(self, status: str) -> None:
        """The service does what it is for."""
        self._send(f"READY=1\nSTATUS={status}\nMAINPID={os.getpid()}")

    def reloading(self) -> None:
        """It reads its settings again; `ready` ends that."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str) -> None:
        """It is ending."""
        self._send(f"STOPPING=1\nSTATUS={status}")

    def alive(self) -> None:
        """To be sent more often than every `watchdog_s`."""
        self._send("WATCHDOG=1", limit_s=0.0)

    def _send(self, message: str, limit_s: float = _LIMIT_S) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(limit_s)
                sock.sendto(message.encode("utf-8", "backslashreplace"), self._address)
        except OSError as error:
            if not self._has_failed:
                log.warning("the service manager does not listen", error=str(error))
            self._has_failed = True
