"""Containers and stores to be verified."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from hashlib import sha256
from pathlib import Path
from random import Random

import google_crc32c

from des_format import DesWriter
from desfs.layout import Layout
from desfs.store.base import Store
from desfs.store.file import FileStore
from desfs.verify import Finding, Summary, Verification
from desfs.verify_container import WINDOW, ContainerCheck, Report
from tests.unit.containers import patched

DAY = "2026-11-20"
KEY = f"{DAY}/0.des"
MIB = 1 << 20
DICE = Random(11)


def packed_meta(data: bytes, number: int = 0) -> dict[str, object]:
    """Metadata with all that a packer writes."""
    return {
        "mtime": Decimal(1_793_495_864_133_007_234 + number).scaleb(-9),
        "mode": 0o644,
        "sha256": sha256(data).hexdigest(),
        "crc32c": f"{google_crc32c.value(data):08x}",
        "id": f"DES_20261120_({number:012X}_00)",
    }


def put(path: Path, files: dict[str, bytes], external: tuple[str, ...] = ()) -> Path:
    """A container as a packer writes it; the payloads of `external` become objects, with the checksums of their
    blocks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with DesWriter(path, external_prefix=f"{path.parent.name}/") as writer:
        for number, (name, data) in enumerate(files.items()):
            writer.add_file(name, data, packed_meta(data, number), force_external=name in external)
    return path


def put_raw(root: Path, raw: bytes, key: str = KEY) -> Path:
    path = root / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return path


def flip(path: Path, at: int) -> None:
    raw = path.read_bytes()
    path.write_bytes(patched(raw, at, bytes([raw[at % len(raw)] ^ 0x01])))


def verify(store: Store | Path, key: str | None = None) -> tuple[list[Finding], Summary]:
    """All findings, and the summary."""
    found: list[Finding] = []
    verification = Verification(FileStore(store) if isinstance(store, Path) else store, found.append)
    summary = verification.store() if key is None else verification.container(key)
    kinds = [finding.kind for finding in found]
    assert (kinds.count("warning"), kinds.count("unverified")) == (summary.warnings, summary.unverified)
    return found, summary


def damage(found: list[Finding]) -> list[tuple[str, str | None, int | None]]:
    return [(each.container, each.entry, each.offset) for each in found if each.kind == "damage"]


def check(root: Path, gets: ThreadPoolExecutor) -> Report:
    """One container, without the store around it."""
    store = FileStore(root)
    (info,) = [info for info in store.list().objects if info.key == KEY]
    return ContainerCheck(store, info, Layout(), gets).run()


LARGE = DICE.randbytes(2 * WINDOW + 3 * MIB)
EXTERNALS = {"large": LARGE, "d/small": b"small", "nothing": b""}


def put_externals(root: Path) -> Path:
    """A store of one container with external objects."""
    put(root / KEY, {**EXTERNALS, "inside": b"inside"}, tuple(EXTERNALS))
    return root
