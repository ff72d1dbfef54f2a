"""desfs/packer/journal.py: what a batch writes down before it does it."""

from __future__ import annotations

from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from desfs.packer.journal import VERSION, Journal, JournalContainer, JournalFile
from desfs.spool import FileState

FILES = st.builds(
    JournalFile,
    id=st.text(max_size=40),
    inode=st.integers(0, 2**64 - 1),
    size=st.integers(0, 2**63 - 1),
    mtime_ns=st.integers(-(2**63), 2**63 - 1),
)
CONTAINERS = st.builds(
    JournalContainer,
    key=st.text(max_size=40),
    day=st.dates(),
    shard=st.text("0123456789abcdef", min_size=1, max_size=8),
    generation=st.integers(1, 2**40),
    token=st.integers(1, 2**40),
    files=st.dictionaries(st.text(min_size=1, max_size=40), FILES, max_size=4),
)


@given(st.lists(CONTAINERS, max_size=4))
def test_what_is_written_is_read(containers: list[JournalContainer]) -> None:
    """Names of every script, times before 1970, numbers of 64 bits: a journal comes back as it was."""
    journal = Journal(VERSION, containers)
    assert Journal.decode(journal.encode()) == journal


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"{}", b'{"version":1}', b'{"version":1,"containers":[{}]}', b"\0" * 100, b'{"version":"1"}'],
)
def test_what_is_no_journal_is_refused(raw: bytes) -> None:
    """A journal that a disk has damaged is never taken for an empty one."""
    with pytest.raises(ValueError, match=r"."):
        Journal.decode(raw)


def test_a_journal_of_another_version_is_refused_with_both_versions() -> None:
    """An older program does not guess what a newer one has meant."""
    with pytest.raises(ValueError, match=f"journal version {VERSION + 1}, want {VERSION}"):
        Journal.decode(Journal(VERSION + 1, []).encode())


def test_a_path_is_found_in_its_container() -> None:
    """What was planned for a file is found again, so that it keeps its day and its id."""
    file = JournalFile("DES_1", 7, 8, 9)
    first = JournalContainer("k1", date(2026, 11, 20), "0", 1, 1, {"a": file})
    second = JournalContainer("k2", date(2026, 11, 20), "1", 1, 1, {"b": JournalFile("DES_2", 1, 2, 3)})
    journal = Journal(VERSION, [first, second])
    assert journal.file_of("a") == (first, file)
    assert journal.file_of("c") is None
    assert file.state == FileState(7, 8, 9)
