"""The structs, magics, flags and limits of DES v1 (the format's document: docs/format.md)."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

HEADER_MAGIC = b"DESHEAD1"
FOOTER_MAGIC = b"DESFOOT1"
VERSION = 1

HEADER = Struct("<8sB7x")  # magic, version; reserved: written as zero, ignored when read
NAME_LENGTH = Struct("<H")
RECORD = Struct("<QQQQI")  # data_offset, data_length, meta_offset, meta_length, flags; stands after the name
FOOTER = Struct("<8sB7xQQQQQQQ")  # magic, version, (start, length) of DATA, META and INDEX, file_count

MIN_CONTAINER = HEADER.size + FOOTER.size
MIN_RECORD = NAME_LENGTH.size + 1 + RECORD.size  # a one-byte name

EXTERNAL = 1
COMPRESSED = 2
ENCRYPTED = 4
DELETED = 8

MAX_NAME = 0xFFFF  # bytes: the name's length is a u16
MAX_META = 10 * 1024 * 1024  # bytes per entry

BIG_FILE_THRESHOLD = 100 * 1024 * 1024  # bytes; at least so many are stored as an object of their own
BIG_FILES_FOLDER = "_bigFiles"


class Footer(NamedTuple):
    """The three regions as absolute extents, and the number of index records."""

    data_start: int
    data_length: int
    meta_start: int
    meta_length: int
    index_start: int
    index_length: int
    file_count: int
