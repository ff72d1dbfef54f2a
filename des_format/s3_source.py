"""A container in S3 as a source of byte ranges."""

from __future__ import annotations

from typing import TYPE_CHECKING

import stamina

from des_format.errors import BadAnswer, CorruptEntry, NoSuchObject, ObjectReplaced, SourceError
from des_format.names import external_keys
from des_format.s3 import RangeAnswer, foreign_errors, get_range, get_tail, translate
from des_format.shards import guess_root
from des_format.source import Tail

if TYPE_CHECKING:
    from collections.abc import Callable

    from mypy_boto3_s3 import S3Client

_DEADLINE_S = 60.0  # for one read, all its tries together


def _temporary(error: Exception) -> bool:
    return isinstance(error, SourceError) and error.temporary


class S3RangeSource:
    """Ranged GETs of one object, each checked and, where the failure may pass, tried again within a minute. Any
    thread."""

    def __init__(self, client: S3Client, bucket: str, key: str) -> None:
        self._client = client
        self._bucket = bucket
        self._key = key
        self._etag: str | None = None
        self._external_etags: dict[str, str] = {}

    @property
    def store(self) -> str:
        return f"{self._client.meta.endpoint_url}/{self._bucket}"

    @property
    def key(self) -> str:
        return self._key

    def version(self) -> None:
        """Nothing: S3 tells an ETag with an answer only."""

    def tail(self, length: int) -> Tail:
        answer = self._get(lambda: get_tail(self._client, self._bucket, self._key, length), self._key)
        self._etag = answer.etag
        return Tail(answer.data, answer.size, answer.etag)

    def pin(self, etag: str) -> None:
        self._etag = etag

    def read(self, start: int, stop: int) -> bytes:
        etag = self._etag
        return self._get(
            lambda: get_range(self._client, self._bucket, self._key, start, stop, if_match=etag), self._key
        ).data

    def external(self, name: str, recorded: object, start: int, stop: int, size: int) -> bytes:
        keys = external_keys(self._key, name, recorded, root=guess_root(self._key))
        for key in keys:
            try:
                answer = self._external_range(key, start, stop)
            except NoSuchObject:
                continue
            except ObjectReplaced as error:
                raise CorruptEntry(f"{self._key}: {name!r}: external object {key} was replaced") from error
            except BadAnswer as error:
                if error.temporary:
                    raise
                # The range does not lie in the object, which is shorter than the index says.
                raise CorruptEntry(
                    f"{self._key}: {name!r}: external object {key}: want {size} bytes: {error}"
                ) from error
            if answer.size != size:
                raise CorruptEntry(
                    f"{self._key}: {name!r}: external object {key}: found {answer.size} bytes, want {size}"
                )
            self._external_etags[key] = answer.etag
            return answer.data
        raise CorruptEntry(f"{self._key}: {name!r}: external object {keys[0]} is missing")

    def _external_range(self, key: str, start: int, stop: int) -> RangeAnswer:
        if start >= stop:  # an empty object: a range cannot be empty, its tail can
            return self._get(lambda: get_tail(self._client, self._bucket, key, 1), key)
        etag = self._external_etags.get(key)
        return self._get(lambda: get_range(self._client, self._bucket, key, start, stop, if_match=etag), key)

    def _get(self, request: Callable[[], RangeAnswer], key: str) -> RangeAnswer:
        for attempt in stamina.retry_context(on=_temporary, attempts=None, timeout=_DEADLINE_S, wait_initial=0.05):
            with attempt:
                try:
                    return request()
                except foreign_errors() as error:
                    raise translate(error, f"{self._bucket}/{key}") from error
        raise AssertionError("a retry loop ends by returning or raising")
