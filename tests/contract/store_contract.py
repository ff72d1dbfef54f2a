"""What every store, and every wrapper around one, does: the promises of `desfs.store.base`, a test each."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from desfs.errors import BadAnswer, NoSuchObject, ObjectExists, ObjectReplaced, StoreError
from desfs.store.base import CopyRange, Store

MIB = 1 << 20
ODD_KEYS = (
    "with space",
    " leading and trailing ",
    "ünï/cödé-名前-😀",
    "plus+and&and=and?and#",
    "100%/%41%2F",
    "(round) [square] {curly}",
    "quote'double\"",  # and no backslash, of which SeaweedFS 4.48 makes a slash
    "~tilde/.hidden/.desfs.json",
    "semi;colon:comma,*star|<angle>",
    "tab\there",
    "-dash",
    "a/b/c/d/e/f",
)
BAD_KEYS = ("", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/..", "a/../b", "./a", "nul\0")


def pattern(length: int, seed: int = 0) -> bytes:
    """Bytes in which no two places look alike, so that a shifted answer shows. A shorter one begins a longer one."""
    return hashlib.shake_128(b"%d" % seed).digest(length)


class StoreContract:
    """Subclasses say how the store is made; the place that it stands for is new in every test."""

    @pytest.fixture
    def make_store(self) -> Callable[[], Store]:
        """Makes another store for the same place, each time it is called."""
        raise NotImplementedError

    @pytest.fixture
    def store(self, make_store: Callable[[], Store]) -> Iterator[Store]:
        made = make_store()
        yield made
        made.close()

    # --- put and get ---------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("data", [b"", b"x", pattern(100_000)], ids=len)
    @pytest.mark.parametrize("as_file", [False, True], ids=["bytes", "file"])
    def test_what_is_put_can_be_had(self, store: Store, tmp_path: Path, data: bytes, as_file: bool) -> None:
        """Store an object, durable and whole when this returns [...]; its ETag."""
        (tmp_path / "source").write_bytes(data)
        etag = store.put("dir/key", tmp_path / "source" if as_file else data)
        answer = store.get_tail("dir/key", 1 << 30)
        assert (answer.data, answer.etag, answer.size) == (data, etag, len(data))
        assert etag
        assert '"' not in etag

    def test_a_range_is_exactly_that(self, store: Store) -> None:
        """Exactly the bytes [start, stop) of the object, 0 <= start < stop <= its size."""
        data = pattern(100_000)
        etag = store.put("key", data)
        for start, stop in [(0, 1), (0, 100_000), (99_999, 100_000), (1, 2), (4095, 70_001)]:
            for if_match in (None, etag):
                answer = store.get_range("key", start, stop, if_match=if_match)
                assert answer.data == data[start:stop]
                assert (answer.etag, answer.size) == (etag, len(data))

    @pytest.mark.parametrize(("start", "stop"), [(0, 11), (9, 11), (10, 11), (50, 60)])
    def test_a_range_outside_of_the_object_is_refused_for_good(self, store: Store, start: int, stop: int) -> None:
        """BadAnswer [...], with `temporary` False, when the range does not lie in the object."""
        etag = store.put("key", b"0123456789")
        for if_match in (None, etag):
            with pytest.raises(BadAnswer) as caught:
                store.get_range("key", start, stop, if_match=if_match)
            assert not caught.value.temporary

    def test_a_range_of_an_empty_object_is_refused(self, store: Store) -> None:
        """BadAnswer [...] when the range does not lie in the object."""
        store.put("key", b"")
        with pytest.raises(BadAnswer):
            store.get_range("key", 0, 1)

    @pytest.mark.parametrize(("start", "stop"), [(0, 0), (5, 5), (5, 4), (-1, 3)])
    def test_an_empty_range_is_the_callers_mistake(self, store: Store, start: int, stop: int) -> None:
        """0 <= start < stop."""
        store.put("key", b"0123456789")
        with pytest.raises(ValueError, match="empty or negative"):
            store.get_range("key", start, stop)

    @pytest.mark.parametrize("length", [1, 9, 10, 11, 1 << 30])
    def test_a_tail_is_the_end_or_all(self, store: Store, length: int) -> None:
        """The last `length` bytes (> 0), or the whole object if it is shorter (empty included)."""
        etag = store.put("key", b"0123456789")
        answer = store.get_tail("key", length)
        assert (answer.data, answer.etag, answer.size) == (b"0123456789"[-length:], etag, 10)
        etag = store.put("empty", b"")
        answer = store.get_tail("empty", length)
        assert (answer.data, answer.etag, answer.size) == (b"", etag, 0)

    def test_a_missing_object_is_named(self, store: Store) -> None:
        """Raises NoSuchObject."""
        store.put("dir/key", b"x")
        for key in ("nothing", "dir/nothing", "nothing/nothing", "dir", "dir/key/below", "n" * 300):
            with pytest.raises(NoSuchObject, match=key[:20]):
                store.get_range(key, 0, 1)
            with pytest.raises(NoSuchObject, match=key[:20]):
                store.get_tail(key, 1)

    def test_a_replaced_object_is_not_given_for_the_old_one(self, store: Store) -> None:
        """ObjectReplaced when the object's ETag is not `if_match`."""
        old = store.put("key", b"old old old")
        new = store.put("key", b"new new new", if_absent=False)
        assert new != old
        with pytest.raises(ObjectReplaced):
            store.get_range("key", 0, 3, if_match=old)
        assert store.get_range("key", 0, 3, if_match=new).data == b"new"
        store.delete("key")
        with pytest.raises(NoSuchObject):
            store.get_range("key", 0, 3, if_match=new)

    @pytest.mark.parametrize("as_file", [False, True], ids=["bytes", "file"])
    def test_an_object_is_not_overwritten(self, store: Store, tmp_path: Path, as_file: bool) -> None:
        """Raises ObjectExists (with `if_absent`)."""
        (tmp_path / "source").write_bytes(b"second")
        store.put("key", b"first")
        with pytest.raises(ObjectExists, match="key"):
            store.put("key", tmp_path / "source" if as_file else b"second")
        assert store.get_tail("key", 100).data == b"first"

    def test_an_object_is_overwritten_when_that_is_meant(self, store: Store) -> None:
        store.put("key", b"first")
        for data in (b"second, and longer", b"", b"3"):
            etag = store.put("key", data, if_absent=False)
            answer = store.get_tail("key", 100)
            assert (answer.data, answer.etag) == (data, etag)
        assert len(store.list().objects) == 1

    def test_one_of_many_puts_wins(self, make_store: Callable[[], Store]) -> None:
        """Raises ObjectExists (with `if_absent`); every method may be called from any thread."""
        stores = [make_store(), make_store()]
        for round_ in range(5):

            def put(n: int, key: str = f"round/{round_}") -> str | None:
                try:
                    return stores[n % 2].put(key, pattern(10_000, seed=n))
                except ObjectExists:
                    return None

            with ThreadPoolExecutor(8) as pool:
                etags = list(pool.map(put, range(8)))
            winners = [n for n, etag in enumerate(etags) if etag is not None]
            assert len(winners) == 1
            answer = stores[0].get_tail(f"round/{round_}", 1 << 20)
            assert (answer.data, answer.etag) == (pattern(10_000, seed=winners[0]), etags[winners[0]])
        for each in stores:
            each.close()

    def test_a_large_object(self, store: Store, tmp_path: Path) -> None:
        """A file is streamed; [...] raises ObjectExists (with `if_absent`)."""
        data = pattern(70 * MIB + 12_345)
        (tmp_path / "source").write_bytes(data)
        etag = store.put("large", tmp_path / "source")
        found = store.list().objects[0]
        assert (found.size, found.etag) == (len(data), etag)
        for start, stop in [(16 * MIB - 5, 16 * MIB + 5), (len(data) - 10, len(data)), (64 * MIB - 1, 64 * MIB + 1)]:
            assert store.get_range("large", start, stop, if_match=etag).data == data[start:stop]
        assert store.get_tail("large", len(data)).data == data
        with pytest.raises(ObjectExists):
            store.put("large", tmp_path / "source")
        assert store.put("large", data, if_absent=False)

    def test_a_source_that_is_not_there(self, store: Store, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="cannot read"):
            store.put("key", tmp_path / "gone")
        assert store.list().objects == ()

    # --- keys ----------------------------------------------------------------------------------------------------

    def test_odd_keys_are_keys_like_any_other(self, store: Store) -> None:
        for n, key in enumerate(ODD_KEYS):
            store.put(key, b"%d" % n)
        assert [found.key for found in store.list().objects] == sorted(ODD_KEYS, key=str.encode)
        for n, key in enumerate(ODD_KEYS):
            assert store.get_tail(key, 10).data == b"%d" % n
            assert [found.key for found in store.list(key).objects] == [key]
            etag = store.get_tail(key, 1).etag
            copied = store.copy_ranges("copied/" + key, [CopyRange(key, 0, 1, etag)])
            assert store.get_tail("copied/" + key, 1).etag == copied
            store.delete(key)
            store.delete("copied/" + key)
        assert store.list().objects == ()

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_what_is_no_key_is_refused(self, store: Store, key: str) -> None:
        """Every method refuses other keys with StoreError."""
        calls: list[Callable[[], object]] = [
            lambda: store.put(key, b""),
            lambda: store.get_range(key, 0, 1),
            lambda: store.get_tail(key, 1),
            lambda: store.delete(key),
            lambda: store.copy_ranges(key, [b""]),
            lambda: store.copy_ranges("good", [CopyRange(key, 0, 1, "etag")]),
        ]
        for call in calls:
            with pytest.raises(StoreError, match="cannot be a key"):
                call()
        assert store.list().objects == ()

    # --- list ----------------------------------------------------------------------------------------------------

    def test_a_listing_tells_all_about_an_object(self, store: Store) -> None:
        before_s = time.time()
        etag = store.put("key", b"12345")
        (found,) = store.list().objects
        assert (found.key, found.size, found.etag) == ("key", 5, etag)
        # S3 gives whole seconds, and a file system the time of its last tick.
        assert before_s - 2 < found.mtime_ns / 1e9 < time.time() + 2

    def test_listings_are_in_order_of_the_keys_bytes(self, store: Store) -> None:
        """Objects in ascending key order (UTF-8 bytes), and the common prefixes, each with its trailing `/`."""
        keys = ["a b", "a-b", "a/b", "a0/x", "a/b-c/d", "Z", "é", "z", "a/b.des", "b/c"]
        for key in keys:
            store.put(key, b"")
        assert [found.key for found in store.list().objects] == sorted(keys, key=str.encode)
        folded = store.list(delimiter=True)
        assert [found.key for found in folded.objects] == ["Z", "a b", "a-b", "z", "é"]
        assert folded.prefixes == ("a/", "a0/", "b/")

    def test_a_prefix_is_a_beginning_of_keys(self, store: Store) -> None:
        """All objects whose key starts with `prefix` [...]. With `delimiter`, keys that have a `/` after the prefix are
        folded into `prefixes`."""
        for key in ("day/3f.des", "day/3f-000001.des", "day/big/one", "day/big/two/three", "day2/x", "da", "other/day"):
            store.put(key, b"")

        def listed(prefix: str, *, delimiter: bool) -> tuple[list[str], list[str]]:
            listing = store.list(prefix, delimiter=delimiter)
            return [found.key for found in listing.objects], list(listing.prefixes)

        assert listed("day/", delimiter=True) == (["day/3f-000001.des", "day/3f.des"], ["day/big/"])
        assert listed("day/3f.", delimiter=True) == (["day/3f.des"], [])
        assert listed("day/b", delimiter=True) == ([], ["day/big/"])
        assert listed("day/b", delimiter=False) == (["day/big/one", "day/big/two/three"], [])
        assert listed("da", delimiter=True) == (["da"], ["day/", "day2/"])
        assert listed("day", delimiter=True) == ([], ["day/", "day2/"])
        assert len(listed("", delimiter=False)[0]) == 7

    @pytest.mark.parametrize("prefix", ["nothing", "nothing/", "key/", "dir/key/", "/", "../", "dir//", "dir/../"])
    def test_nothing_under_a_prefix_is_an_empty_listing(self, store: Store, prefix: str) -> None:
        """A prefix that nothing stands under gives an empty listing."""
        store.put("key", b"")
        store.put("dir/key", b"")
        for delimiter in (False, True):
            listing = store.list(prefix, delimiter=delimiter)
            assert (listing.objects, listing.prefixes) == ((), ())

    def test_an_empty_store_lists_nothing(self, store: Store) -> None:
        assert store.list().objects == ()
        assert store.list(delimiter=True).prefixes == ()

    # --- delete --------------------------------------------------------------------------------------------------

    def test_delete_removes_one_object(self, store: Store) -> None:
        """Remove an object; a key that is not there is no error."""
        for key in ("a", "ab", "a0/b"):
            store.put(key, b"")
        store.delete("a")
        store.delete("a")
        for absent in ("nothing", "nothing/below", "a0", "ab/below"):
            store.delete(absent)
        assert [found.key for found in store.list().objects] == ["a0/b", "ab"]
        store.put("a", b"again")
        assert store.get_tail("a", 100).data == b"again"

    # --- copy ----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "plan",
        [
            [],
            [b""],
            [b"only bytes"],
            [(5, 5)],
            [(0, 1)],
            [b"head", (10, 20), b"", (0, 0), (20, 30), (5, 6), b"tail"],
            [(0, 6 * MIB)],
            [(1, 6 * MIB), b"tail"],
            [b"head", (1, 12 * MIB), b"tail"],
            [b"head", (1, 5 * MIB + 10), (7 * MIB, 13 * MIB)],
            [(0, 6 * MIB), (0, 6 * MIB), (1, 2), (3, 4), (2 * MIB, 7 * MIB)],
            [(0, 3 * MIB), (6 * MIB, 9 * MIB), b"x" * 100, (0, 13 * MIB)],
            [pattern(20 * MIB, seed=1), (0, 13 * MIB), pattern(MIB, seed=2)],
        ],
    )
    def test_a_copy_is_its_pieces_in_order(self, store: Store, plan: list[bytes | tuple[int, int]]) -> None:
        """Store an object made of `pieces` in order [...]; its ETag. Pieces may have any size, zero included."""
        data = pattern(13 * MIB)
        source = store.put("source", data)
        pieces = [piece if isinstance(piece, bytes) else CopyRange("source", *piece, source) for piece in plan]
        wanted = b"".join(piece if isinstance(piece, bytes) else data[slice(*piece)] for piece in plan)
        etag = store.copy_ranges("copy", pieces)
        answer = store.get_tail("copy", len(wanted) + 1)
        assert answer.data == wanted
        assert (answer.etag, answer.size) == (etag, len(wanted))

    def test_a_copy_of_several_objects(self, store: Store) -> None:
        sources = {f"s{n}": pattern(5 * MIB + n, seed=n) for n in range(3)}
        etags = {key: store.put(key, data) for key, data in sources.items()}
        pieces = [CopyRange(key, 1, len(data), etags[key]) for key, data in sources.items()]
        store.copy_ranges("copy", [*pieces, b"end"])
        assert store.get_tail("copy", 1 << 30).data == b"".join(data[1:] for data in sources.values()) + b"end"

    @pytest.mark.parametrize("length", [10, 6 * MIB])
    def test_a_copy_does_not_overwrite(self, store: Store, length: int) -> None:
        """Raises ObjectExists (with `if_absent`)."""
        source = store.put("source", pattern(length))
        store.put("copy", b"there")
        with pytest.raises(ObjectExists):
            store.copy_ranges("copy", [CopyRange("source", 0, length, source)])
        assert store.get_tail("copy", 100).data == b"there"
        store.copy_ranges("copy", [CopyRange("source", 0, length, source)], if_absent=False)
        assert store.get_tail("copy", length).data == pattern(length)

    @pytest.mark.parametrize("length", [10, 6 * MIB])
    def test_a_copy_has_the_right_source_or_is_not_made(self, store: Store, length: int) -> None:
        """NoSuchObject or ObjectReplaced for a source, and [...] for a range outside of it."""
        old = store.put("source", pattern(length))
        new = store.put("source", pattern(length, seed=1), if_absent=False)
        for piece, error in (
            (CopyRange("source", 0, length, old), ObjectReplaced),
            (CopyRange("gone", 0, length, old), NoSuchObject),
            (CopyRange("source", 1, length + 1, new), StoreError),
        ):
            with pytest.raises(error, match=piece.key) as caught:
                store.copy_ranges("copy", [piece])
            assert not caught.value.temporary
        assert [found.key for found in store.list().objects] == ["source"]

    # --- the rest ------------------------------------------------------------------------------------------------

    def test_many_threads_may_call(self, store: Store) -> None:
        """Every method may be called from any thread."""

        def work(n: int) -> None:
            data = pattern(1000 + n, seed=n)
            etag = store.put(f"t/{n}", data)
            assert store.get_range(f"t/{n}", 0, len(data), if_match=etag).data == data
            assert store.list(f"t/{n}").objects
            if n % 2:
                store.delete(f"t/{n}")

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(work, range(64)))
        assert len(store.list("t/").objects) == 32

    def test_another_store_of_the_same_place_sees_the_same(self, make_store: Callable[[], Store]) -> None:
        one, two = make_store(), make_store()
        etag = one.put("key", b"bytes")
        assert two.get_range("key", 0, 5, if_match=etag).data == b"bytes"
        assert two.list() == one.list()
        assert two.url == one.url
        one.close()
        two.close()
