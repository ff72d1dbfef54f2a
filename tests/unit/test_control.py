"""docs/mount.md, /.desfs/: control files."""

from __future__ import annotations

import json

import pytest

from desfs.control import ControlDirectory
from desfs.errors import IsADirectory, NoSuchPath
from desfs.inode import CONTROL_DIRECTORY, ROOT
from desfs.problems import Problems


def test_a_lookup_makes_the_content_and_reads_show_it_whole() -> None:
    """Contents are made when a file is looked up and stay as they were until the next lookup: a reader that reads in
    pieces sees one version."""
    versions = iter(range(100))
    control = ControlDirectory(lambda name: {"name": name, "version": next(versions)})
    stats = control.lookup(b"stats")
    size = control.size(stats)
    content = control.read(stats)
    assert len(content) == size
    assert json.loads(content) == {"name": "stats", "version": 0}
    assert control.read(stats) == content
    assert control.changed_ns(stats) == control.changed_ns(stats)
    before = control.changed_ns(stats)
    assert control.lookup(b"stats") == stats
    assert json.loads(control.read(stats))["version"] == 1
    assert control.changed_ns(stats) > before


def test_problems_are_lines_and_all_else_is_json() -> None:
    control = ControlDirectory(lambda name: ["one", "two \udcff"] if name == "problems" else ["a"])
    assert control.read(control.lookup(b"problems")) == b"one\ntwo \\udcff\n"
    assert json.loads(control.read(control.lookup(b"containers"))) == ["a"]


def test_an_empty_file_is_empty() -> None:
    control = ControlDirectory(lambda name: [])
    problems = control.lookup(b"problems")
    assert control.size(problems) == 0
    assert control.read(problems) == b""


def test_only_the_four_files_are_there() -> None:
    control = ControlDirectory(lambda name: {})
    assert [name for name, _ in control.files()] == [b"stats", b"containers", b"problems", b"config"]
    with pytest.raises(NoSuchPath):
        control.lookup(b"nothing")
    assert control.owns(CONTROL_DIRECTORY)
    assert all(control.owns(inode) for _, inode in control.files())
    assert not control.owns(ROOT)
    assert not control.owns(control.files()[-1][1] + 1)
    with pytest.raises(IsADirectory):
        control.read(CONTROL_DIRECTORY)


def test_a_problem_is_kept_once_and_forgotten_with_its_container() -> None:
    problems = Problems()
    for _ in range(2):
        problems.report("d/0.des", "damaged")
        problems.report("d/0.des", "d/0.des: named already")
        problems.report("d/\udcff.des", "odd")
    assert problems.lines() == ["d/0.des: damaged", "d/0.des: named already", "d/\\udcff.des: odd"]
    problems.clear("d/0.des")
    problems.clear("d/\udcff.des")
    assert problems.lines() == []


def test_a_damaged_bucket_does_not_fill_the_memory() -> None:
    problems = Problems()
    for number in range(1500):
        problems.report(f"{number}.des", "damaged")
    assert len(problems.lines()) == 1001
    assert problems.lines()[-1] == "and 500 more that were not kept"
