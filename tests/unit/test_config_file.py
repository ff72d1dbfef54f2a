"""docs/operations.md, Settings: the TOML file, the environment, the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from desfs.errors import UsageError
from desfs.settings import (
    SECTIONS,
    MountSettings,
    PackerSettings,
    StoreSettings,
    load_settings,
    read_config,
    unknown_variables,
)

ROOT = Path(__file__).parents[2]


def name_of(name: str) -> str:
    return f"mount option {name}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "desfs.toml"
    path.write_text('region = "eu-west-1"\nrefresh = 5\n[mount]\nmemory = "64M"\nrefresh = 7\n[packer]\nsettle = 1\n')
    return path


def test_each_program_gets_what_is_for_all_and_its_own(file: Path) -> None:
    """docs/operations.md: Keys outside of tables hold for every program, those in its table win."""
    assert read_config(str(file), MountSettings) == {"region": "eu-west-1", "refresh": 7, "memory": "64M"}
    assert read_config(str(file), PackerSettings) == {"region": "eu-west-1", "settle": 1}
    assert read_config(str(file), StoreSettings) == {"region": "eu-west-1"}


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/operations.md: The command line wins over DESFS_* variables, those over the file."""
    settings = load_settings(MountSettings, {"config": str(file)}, name_of)
    assert (settings.region, settings.refresh, settings.memory) == ("eu-west-1", 7, 64 << 20)
    monkeypatch.setenv("DESFS_REFRESH", "8")
    assert load_settings(MountSettings, {"config": str(file)}, name_of).refresh == 8
    assert load_settings(MountSettings, {"config": str(file), "refresh": "9"}, name_of).refresh == 9
    monkeypatch.setenv("DESFS_CONFIG", str(file))
    assert load_settings(MountSettings, {}, name_of).memory == 64 << 20
    monkeypatch.setenv("DESFS_CONFIG", "")  # none
    assert load_settings(MountSettings, {}, name_of).memory == 256 << 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("refesh = 5\n", "refesh is no setting; did you mean refresh?"),
        ("[mount]\nsettle = 5\n", r"\[mount\] settle is no setting"),
        ("[monut]\nrefresh = 5\n", r"monut is no setting; did you mean mount\?"),
        ("mount = 5\n", r"mount is a table: \[mount\]$"),
        (
            'assignment = "http://assignment:8000"\n',
            r"assignment is a table: \[assignment\]; the setting assignment belongs into \[packer\]$",
        ),
        ("refresh = \n", r"line 1, column 11"),
        ("refresh = 0\n", "refresh: Input should be greater than 0"),
        ('config = "other"\n', "config is no setting"),
        ("umask = 0o999\n", "line 1"),
        ("uid = -3\n", "uid: "),
    ],
)
def test_what_makes_no_sense_is_named_with_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "desfs.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"{path}: .*{message}"):
        load_settings(MountSettings, {"config": str(path)}, name_of)


def test_the_documented_files_and_the_examples_make_sense(tmp_path: Path) -> None:
    """Those that are commented out in the examples too."""
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/operations.md").read_text(encoding="utf-8"), re.DOTALL)
    examples = [path.read_text(encoding="utf-8") for path in (ROOT / "systemd/examples").glob("*.toml")]
    assert (len(blocks), len(examples)) == (2, 4)
    for text in (*blocks, *examples, *(re.sub(r"^#(?! |$)", "", each, flags=re.MULTILINE) for each in examples)):
        path = tmp_path / "desfs.toml"
        path.write_text(text, encoding="utf-8")
        for kind in SECTIONS.values():
            needed = {"older_than": "90d"} if "older_than" in kind.model_fields else {}
            load_settings(kind, {"config": str(path), **needed}, name_of)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"settings file .*none: No such file"):
        load_settings(MountSettings, {"config": f"{tmp_path}/none"}, name_of)
    (tmp_path / "bytes").write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"settings file .*bytes: "):
        load_settings(MountSettings, {"config": f"{tmp_path}/bytes"}, name_of)


def test_octal_numbers_and_flags_may_be_written_as_such(tmp_path: Path) -> None:
    path = tmp_path / "desfs.toml"
    path.write_text('umask = 0o022\nallow_other = true\nmemory = 1000\n[mount]\ncache_size = "2G"\n')
    settings = load_settings(MountSettings, {"config": str(path)}, name_of)
    assert (settings.umask, settings.allow_other, settings.memory, settings.cache_size) == (0o22, True, 1000, 2 << 30)


def test_variables_that_nobody_reads_are_said_with_the_nearest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/operations.md: A DESFS_* variable that is no setting is said in the log."""
    assert unknown_variables() == []
    monkeypatch.setenv("DESFS_REFESH", "5")
    monkeypatch.setenv("DESFS_SETTLE", "5")
    assert unknown_variables() == ["DESFS_REFESH in the environment is no setting; did you mean DESFS_REFRESH?"]
