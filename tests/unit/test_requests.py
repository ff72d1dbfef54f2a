"""docs/operations.md, /.desfs/stats: the requests that are open."""

from __future__ import annotations

from desfs.requests import OpenRequest, OpenRequests


def test_the_oldest_is_the_one_that_began_first_and_is_still_open() -> None:
    now = 100.0
    requests = OpenRequests(lambda: now)
    assert requests.oldest() is None
    assert requests.state() == {"open": 0, "oldest_seconds": 0.0}
    first = requests.begin("read")
    now = 101.0
    requests.begin("lookup")
    now = 103.5
    assert requests.oldest() == OpenRequest("read", 3.5)
    assert requests.state() == {"open": 2, "oldest_seconds": 3.5}
    assert requests.state(but_youngest=True) == {"open": 1, "oldest_seconds": 3.5}
    requests.end(first)
    assert requests.all() == [OpenRequest("lookup", 2.5)]


def test_when_idle_calls_at_once_or_with_the_last_answer() -> None:
    requests = OpenRequests()
    calls: list[str] = []
    requests.when_idle(lambda: calls.append("at once"))
    assert calls == ["at once"]
    first, second = requests.begin("read"), requests.begin("read")
    requests.when_idle(lambda: calls.append("later"))
    requests.end(second)
    assert calls == ["at once"]
    requests.end(first)
    assert calls == ["at once", "later"]
