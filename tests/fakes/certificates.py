"""Certificates, by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path


def openssl(*words: str | Path) -> None:
    new = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    subprocess.run([*new, *words], check=True, timeout=60, stderr=subprocess.DEVNULL)


def make_certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1 with its key, from an authority whose own certificate is `ca` beside it."""
    ca, ca_key, path = tmp_path / "ca", tmp_path / "ca-key", tmp_path / "server.pem"
    openssl("-subj", "/CN=authority", "-keyout", ca_key, "-out", ca)
    names = ["-subj", "/CN=server", "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=CA:FALSE"]
    openssl("-CA", ca, "-CAkey", ca_key, *names, "-keyout", tmp_path / "key", "-out", tmp_path / "cert")
    path.write_bytes((tmp_path / "key").read_bytes() + (tmp_path / "cert").read_bytes())
    return path
