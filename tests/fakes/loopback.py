"""An HTTP server of the tests in a thread of its own."""

from __future__ import annotations

import ssl
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path


class Loopback:
    """Serves until it is stopped; with a `certificate`, a PEM file that has the key too, it speaks TLS."""

    def __init__(self, server: ThreadingHTTPServer, name: str, certificate: Path | None) -> None:
        self._server = server
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        self._thread = threading.Thread(target=server.serve_forever, args=(0.01,), name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take no more connections."""
        self._server.shutdown()
        self._thread.join()
