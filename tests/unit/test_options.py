"""docs/mount.md, Options: `-o` lists, settings, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from desfs.errors import UsageError
from desfs.options import OPTION_HELP, parse_options, split_options
from desfs.settings import MountSettings

KNOWN = frozenset(MountSettings.model_fields)


def parsed(*lists: str) -> dict[str, str]:
    return parse_options(list(lists), KNOWN)[0]


@given(st.lists(st.text(min_size=1, max_size=8)))
def test_a_backslash_takes_the_next_character_as_it_is(options: list[str]) -> None:
    """Options are separated by commas; a backslash takes the next character as it is."""
    text = ",".join(option.replace("\\", "\\\\").replace(",", "\\,") for option in options)
    assert split_options(text) == options


def test_empty_options_mean_nothing_and_a_last_backslash_is_refused() -> None:
    assert split_options(",,a,,b,") == ["a", "b"]
    with pytest.raises(UsageError, match="ends in a backslash"):
        split_options("a\\")


def test_the_last_of_a_name_wins_over_several_lists() -> None:
    assert parsed("refresh=5,uid=1", "refresh=7") == {"refresh": "7", "uid": "1"}


def test_words_of_mount_and_fstab_say_nothing() -> None:
    """Mount options are those of mount(8) and FUSE; `rw`, `_netdev`, `nofail`, `x-*` and their kin are accepted."""
    words = (
        "rw,ro,dev,suid,exec,noatime,_netdev,nofail,auto,user,defaults,x-systemd.automount,x-gvfs-name=a,subtype=desfs"
    )
    assert parsed(words) == {}


@pytest.mark.parametrize(
    ("option", "hint"), [("refesh=5", "refresh"), ("alow_other", "allow_other"), ("noatme", "noatime")]
)
def test_an_unknown_option_names_the_nearest_one(option: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"unknown mount option .*did you mean {hint}"):
        parsed(option)


def test_an_unknown_option_passes_when_mount_is_sloppy() -> None:
    """mount(8), -s: tolerate options that are not known."""
    found = parse_options(["a,refresh=5,b=1,strict"], KNOWN, sloppy=True)
    assert found == ({"refresh": "5", "strict": "true"}, ["a", "b"])


def test_an_unknown_option_without_a_neighbour_is_named_alone() -> None:
    with pytest.raises(UsageError, match=r"^unknown mount option 'qqqqqq'$"):
        parsed("qqqqqq=1")


def test_flags_take_no_value_and_settings_need_one() -> None:
    assert parsed("strict,allow_other=false") == {"strict": "true", "allow_other": "false"}
    with pytest.raises(UsageError, match=r"mount option allow_other: found .*, want nothing, true or false"):
        parsed("allow_other=maybe")
    with pytest.raises(UsageError, match="refresh needs a value"):
        parsed("refresh")


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512", 512), ("512M", 512 << 20), ("1.5GiB", 3 << 29), ("2k", 2048), ("1 tb", 1 << 40)],
)
def test_sizes_are_powers_of_1024(text: str, size: int) -> None:
    assert MountSettings.model_validate({"memory": text}).memory == size


@pytest.mark.parametrize(
    "values",
    [
        {"memory": "lots"},
        {"memory": "-1"},
        {"refresh": "0"},
        {"refresh": "soon"},
        {"refresh": "nan"},
        {"refresh": "inf"},
        {"deadline": "0"},
        {"deadline": "nan"},
        {"umask": "9"},
        {"umask": "77777"},
        {"uid": "-1"},
        {"uid": "root"},
        {"uid": "4294967296"},
        {"log_level": "loud"},
        {"addressing_style": "sideways"},
        {"nothing": "1"},
    ],
)
def test_values_that_make_no_sense_are_refused(values: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        MountSettings.model_validate(values)


def test_variables_are_read_and_the_command_line_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything can also stand in `DESFS_*` variables; the command line wins."""
    monkeypatch.setenv("DESFS_REFRESH", "3")
    monkeypatch.setenv("DESFS_UMASK", "027")
    assert MountSettings().refresh == 3
    assert MountSettings().umask == 0o027
    assert MountSettings.model_validate({"refresh": "4"}).refresh == 4


def test_help_names_every_option() -> None:
    """docs/operations.md: `desfs mount --help` lists all options."""
    assert OPTION_HELP.keys() == MountSettings.model_fields.keys()
