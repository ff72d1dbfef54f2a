"""`make install`: docs/operations.md, Install. With DESTDIR, so that the machine stays as it is."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.mount.mounting import run
from tests.mount.stores import pack_tree

ROOT = Path(__file__).parents[2]
INSTALL_S = 100.0
# A folder that Debian keeps empty: a test mounts there what was installed, in a namespace of its own. /usr/local may
# have the interpreter that runs the tests.
PREFIX = Path("/srv")
VENV = PREFIX / "lib/desfs"


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make as a user does: what the make that may run the tests hands down is no business of this one."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=INSTALL_S,
        check=False,
        umask=0o077,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program as it is put into a package. What it depends on is downloaded by no test: it is borrowed from the
    environment that runs the tests."""
    target = tmp_path_factory.mktemp("install") / "package"
    tools = (f"PYTHON={sys.executable}", f"MANUAL_PYTHON={sys.executable}", "PIP_FLAGS=--no-deps")
    done = make("install", f"DESTDIR={target}", f"PREFIX={PREFIX}", *tools)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def borrowing(installed: Path) -> Path:
    """The installation, able to import what it depends on."""
    (packages,) = below(installed, VENV).glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return installed


def below(target: Path, path: Path) -> Path:
    """Where a path of the machine is in the package."""
    return target / path.relative_to("/")


def contents(target: Path) -> list[Path]:
    """All that the package has, but for what is in the virtual environment."""
    venv = below(target, VENV)
    return sorted(path for path in target.rglob("*") if not path.is_relative_to(venv))


def files_of(target: Path) -> set[str]:
    return {str(path.relative_to(target)) for path in contents(target) if path.is_file() and not path.is_symlink()}


def test_the_program_and_the_helpers_of_mount_are_links_to_where_they_will_be(installed: Path) -> None:
    links = {str(path.relative_to(installed)): os.readlink(path) for path in contents(installed) if path.is_symlink()}
    assert links == {
        "srv/bin/desfs": "/srv/lib/desfs/bin/desfs",
        "sbin/mount.desfs": "/srv/lib/desfs/bin/mount.desfs",
        "sbin/mount.fuse.desfs": "/srv/lib/desfs/bin/mount.desfs",
    }


def test_units_users_folders_and_documents_are_in_place(installed: Path) -> None:
    found = files_of(installed)
    documents = {path for path in found if path.endswith(".md")}
    assert found - documents == {
        "srv/lib/systemd/system/desfs-assignment@.service",
        "srv/lib/systemd/system/desfs-mount@.service",
        "srv/lib/systemd/system/desfs-packer@.service",
        "srv/lib/systemd/system/desfs-seal@.service",
        "srv/lib/systemd/system/desfs-seal@.timer",
        "srv/lib/sysusers.d/desfs.conf",
        "srv/lib/tmpfiles.d/desfs.conf",
        "srv/share/bash-completion/completions/desfs",
        "srv/share/fish/vendor_completions.d/desfs.fish",
        "srv/share/man/man1/desfs.1",
        "srv/share/man/man8/mount.desfs.8",
        "srv/share/zsh/site-functions/_desfs",
        "srv/share/doc/desfs/examples/assignment.env",
        "srv/share/doc/desfs/examples/assignment.toml",
        "srv/share/doc/desfs/examples/mnt-des.automount",
        "srv/share/doc/desfs/examples/mnt-des.mount",
        "srv/share/doc/desfs/examples/mount.env",
        "srv/share/doc/desfs/examples/mount.toml",
        "srv/share/doc/desfs/examples/packer.env",
        "srv/share/doc/desfs/examples/packer.toml",
        "srv/share/doc/desfs/examples/seal.env",
        "srv/share/doc/desfs/examples/seal.toml",
    }
    assert "srv/share/doc/desfs/operations.md" in documents
    assert (installed / "srv/share/man/man1/desfs.1").read_text().startswith(".TH DESFS 1 ")
    assert "complete_bash" in (installed / "srv/share/bash-completion/completions/desfs").read_text()


def test_units_run_the_installed_program(installed: Path) -> None:
    for unit in (installed / "srv/lib/systemd/system").iterdir():
        text = unit.read_text()
        assert unit.suffix == ".timer" or "\nExecStart=/srv/bin/desfs " in text
        assert "\nDocumentation=file:/srv/share/doc/desfs/operations.md\n" in text
        assert "@BINDIR@" not in text
        assert "@DOCDIR@" not in text


def test_nothing_names_the_place_where_the_package_was_made(installed: Path) -> None:
    """Links, scripts, compiled modules and records alike."""
    place = os.fsencode(installed)

    def names_it(path: Path) -> bool:
        if path.is_symlink():
            return place in os.fsencode(os.readlink(path))
        return path.is_file() and place in path.read_bytes()

    assert [str(path.relative_to(installed)) for path in installed.rglob("*") if names_it(path)] == []
    assert (below(installed, VENV) / "bin/desfs").read_text().startswith(f"#!{VENV}/bin/python")


def test_every_user_may_run_it(installed: Path) -> None:
    """The umask of who installs it does not matter; here it lets nobody else in."""

    def is_open(path: Path) -> bool:
        mode = path.stat().st_mode
        wanted = 0o555 if path.is_dir() or mode & stat.S_IXUSR else 0o444
        return mode & wanted == wanted

    assert [str(path) for path in installed.rglob("*") if not path.is_symlink() and not is_open(path)] == []


def test_it_was_built_with_the_extension(installed: Path) -> None:
    assert len(list(below(installed, VENV).glob("lib/python*/site-packages/desfs/_levers.*.so"))) == 1


def test_it_runs_from_where_the_package_was_made(borrowing: Path) -> None:
    """A virtual environment finds itself by its interpreter, wherever that is."""
    venv = below(borrowing, VENV)
    found = run([venv / "bin/python", "-c", "import desfs; print(desfs.__file__)"], cwd=borrowing)
    assert Path(found.decode().strip()).is_relative_to(venv)
    assert run([venv / "bin/python", venv / "bin/desfs", "--version"], cwd=borrowing).startswith(b"desfs 0.")


def test_it_mounts_from_where_it_will_be(borrowing: Path, tmp_path: Path) -> None:
    """The link of mount(8)'s helper, the script's first line and the interpreter, as on a machine that has the package:
    in a mount namespace in which what was installed is where it belongs."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source/hello.txt").write_text("hello\n")
    pack_tree(tmp_path / "source", tmp_path / "store", "2026-11-20")
    (tmp_path / "mnt").mkdir()
    script = (
        'set -e; mount --bind "$1/srv" /srv\n'
        '"$(readlink "$1/sbin/mount.desfs")" "file://$2/store" "$2/mnt" -o ro\n'
        'cat "$2/mnt/2026-11-20/hello.txt"\n'
        '"$(readlink "$1/srv/bin/desfs")" umount "$2/mnt"\n'
    )
    assert run(["unshare", "--mount", "sh", "-c", script, "sh", borrowing, tmp_path]) == b"hello\n"


def test_uninstall_leaves_what_was_there_before(tmp_path: Path) -> None:
    target = tmp_path / "package"
    assert make("install-units", "install-documents", f"DESTDIR={target}").returncode == 0
    # What install-program makes: it takes the longest, and the other tests have it.
    manual = ("share/man/man1/desfs.1", "share/man/man8/mount.desfs.8", "share/zsh/site-functions/_desfs")
    for file in (*manual, "share/bash-completion/completions/desfs", "share/fish/vendor_completions.d/desfs.fish"):
        (target / "usr/local" / file).parent.mkdir(parents=True, exist_ok=True)
        (target / "usr/local" / file).write_text("")
    for link in ("usr/local/bin/desfs", "sbin/mount.desfs", "sbin/mount.fuse.desfs"):
        (target / link).parent.mkdir(parents=True, exist_ok=True)
        (target / link).symlink_to("/usr/local/lib/desfs/bin/desfs")
    (target / "usr/local/lib/desfs/bin").mkdir(parents=True)
    (target / "usr/local/lib/desfs/bin/desfs").write_text("")
    (target / "usr/local/lib/desfs/pyvenv.cfg").write_text("")
    (target / "usr/local/bin/other").write_text("")
    done = make("uninstall", f"DESTDIR={target}")
    assert (done.returncode, done.stderr) == (0, "")
    left = [path for path in target.rglob("*") if path.is_symlink() or not path.is_dir()]
    assert left == [target / "usr/local/bin/other"]


def test_every_place_can_be_another(tmp_path: Path) -> None:
    """PREFIX, which is /usr/local, moves all of it but the helper of mount(8); each place has a variable of its own."""
    assert make("install-units", f"DESTDIR={tmp_path}").returncode == 0
    assert files_of(tmp_path) == {
        "usr/local/lib/systemd/system/desfs-assignment@.service",
        "usr/local/lib/systemd/system/desfs-mount@.service",
        "usr/local/lib/systemd/system/desfs-packer@.service",
        "usr/local/lib/systemd/system/desfs-seal@.service",
        "usr/local/lib/systemd/system/desfs-seal@.timer",
        "usr/local/lib/sysusers.d/desfs.conf",
        "usr/local/lib/tmpfiles.d/desfs.conf",
    }
    target = tmp_path / "other"
    places = ("PREFIX=/usr", "SYSTEMD_UNIT_DIR=/lib/systemd/system", "DOCDIR=/usr/share/doc/desfs-doc")
    assert make("install-units", "install-documents", f"DESTDIR={target}", *places).returncode == 0
    assert "\nExecStart=/usr/bin/desfs " in (target / "lib/systemd/system/desfs-mount@.service").read_text()
    assert (target / "usr/lib/sysusers.d/desfs.conf").is_file()
    assert (target / "usr/share/doc/desfs-doc/operations.md").is_file()
