"""DES v1 containers as a library: thousands of small files in one object, read back by name.

Names that start with an S3 or a Redis in them import boto3 and redis when they are first used, not before.
"""

from des_format.assigned_names import AssignedName, SnowflakeNameConfig, SnowflakeNameGenerator, build_name, parse_name
from des_format.cache import CacheKey, DiskIndexCache, IndexCache, InMemoryIndexCache, RedisIndexCache
from des_format.daily import DailyShardedDesStore
from des_format.errors import (
    BadAnswer,
    CorruptEntry,
    CorruptMeta,
    DesFormatError,
    InvalidAssignedName,
    InvalidEntryName,
    InvalidMeta,
    NamesExhausted,
    NoSuchEntry,
    NoSuchObject,
    NotAContainer,
    ObjectReplaced,
    SizeMismatch,
    SourceError,
    SourceUnavailable,
    UnsupportedEntry,
    WriterClosed,
)
from des_format.index import Entry, Index
from des_format.plan import plan_gets
from des_format.reader import ContainerStats, DesReader, S3DesReader
from des_format.shards import placement_shard, shard_hex, shard_of
from des_format.writer import DesWriter, ExternalStore

__all__ = [
    "AssignedName",
    "BadAnswer",
    "CacheKey",
    "ContainerStats",
    "CorruptEntry",
    "CorruptMeta",
    "DailyShardedDesStore",
    "DesFormatError",
    "DesReader",
    "DesWriter",
    "DiskIndexCache",
    "Entry",
    "ExternalStore",
    "InMemoryIndexCache",
    "Index",
    "IndexCache",
    "InvalidAssignedName",
    "InvalidEntryName",
    "InvalidMeta",
    "NamesExhausted",
    "NoSuchEntry",
    "NoSuchObject",
    "NotAContainer",
    "ObjectReplaced",
    "RedisIndexCache",
    "S3DesReader",
    "SizeMismatch",
    "SnowflakeNameConfig",
    "SnowflakeNameGenerator",
    "SourceError",
    "SourceUnavailable",
    "UnsupportedEntry",
    "WriterClosed",
    "build_name",
    "parse_name",
    "placement_shard",
    "plan_gets",
    "shard_hex",
    "shard_of",
]
