"""Rules about imports that import-linter cannot express; the others are in setup.cfg."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("des_format", "desfs", "assignment")
MODULES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# No I/O, no clock, no event loop: what these compute depends on their arguments alone.
PURE = frozenset(
    {
        "des_format/layout.py",
        "des_format/errors.py",
        "des_format/names.py",
        "des_format/shards.py",
        "des_format/codec.py",
        "des_format/blocks.py",
        "des_format/checksum.py",
        "des_format/index.py",
        "des_format/packed_meta.py",
        "des_format/plan.py",
        "desfs/changes.py",
        "desfs/folders.py",
        "desfs/tree.py",
        "desfs/fuse_options.py",
        "desfs/inode.py",
        "desfs/amounts.py",
        "desfs/window.py",
        "desfs/packer/batch.py",
        "assignment/sequence.py",
    }
)
EFFECTS = frozenset(
    {
        *(
            "asyncio",
            "concurrent",
            "ctypes",
            "fcntl",
            "http",
            "io",
            "logging",
            "mmap",
            "multiprocessing",
            "os",
            "queue",
        ),
        *("random", "secrets", "select", "selectors", "shutil", "signal", "socket", "sqlite3", "ssl", "subprocess"),
        *("tempfile", "threading", "time", "urllib", "uuid"),
    }
)
# Arithmetic on arrays, and text that is JSON.
PURE_LIBRARIES = frozenset({"numpy", "msgspec", "xxhash", "google_crc32c"})


def imported(path: Path) -> Iterator[str]:
    """The top-level packages that a module imports, inside functions too."""
    for node in ast.walk(ast.parse((ROOT / path).read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_module_has_two_event_loops(path: Path) -> None:
    assert not {"trio", "asyncio"} <= set(imported(path))


@pytest.mark.parametrize("path", [path for path in MODULES if str(path) in PURE], ids=str)
def test_pure_modules_have_no_effects(path: Path) -> None:
    foreign = {name for name in imported(path) if name not in sys.stdlib_module_names and name not in PACKAGES}
    assert foreign <= PURE_LIBRARIES
    assert not EFFECTS & set(imported(path))
