"""The catalog's tables, and the database's clock. The same for SQLite and Postgres.

Instants are Unix time in ms in integers, so that both databases compare and add them alike.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Date,
    Index,
    Integer,
    MetaData,
    String,
    Table,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from assignment.catalog import ContainerState

SCHEMA_VERSION = 1

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    }
)

# One row per shard of a day, made by its first lease and kept: its token and its generations must never go back.
shard_lease = Table(
    "shard_lease",
    metadata,
    Column("day", Date, primary_key=True),
    Column("shard", String(8), primary_key=True),
    Column("holder", String(255), nullable=False),
    Column("token", BigInteger, nullable=False),
    Column("expires_at_ms", BigInteger, nullable=False),
    Column("previous_holder", String(255)),
    Column("previous_token", BigInteger),
    Column("next_generation", BigInteger, nullable=False),
    CheckConstraint("token >= 1", name="token"),
    CheckConstraint("next_generation >= 1", name="next_generation"),
)

# The row is the commit of its container. No foreign key to the lease: a catalog that is rebuilt from the bucket has
# containers of days that nobody holds a lease for.
container = Table(
    "container",
    metadata,
    Column("object_key", String(1024), primary_key=True),  # 1,024 bytes are the longest key of S3
    Column("day", Date, nullable=False),
    Column("shard", String(8), nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("files", BigInteger, nullable=False),
    Column("etag", String(255), nullable=False),
    Column("token", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    CheckConstraint("size >= 0", name="size"),
    CheckConstraint("files >= 0", name="files"),
    CheckConstraint(f"state IN ({', '.join(repr(str(state)) for state in ContainerState)})", name="state"),
    Index(None, "day", "shard", "generation"),
)

# The state of assignment.sequence, of one node and day.
id_sequence = Table(
    "id_sequence",
    metadata,
    Column("node_id", Integer, primary_key=True, autoincrement=False),
    Column("day", Date, primary_key=True),
    Column("last_ms", BigInteger, nullable=False),
    Column("next_sequence", Integer, nullable=False),
    CheckConstraint("node_id BETWEEN 0 AND 255", name="node_id"),
    CheckConstraint("next_sequence BETWEEN 0 AND 256", name="next_sequence"),
)


class DatabaseNowMs(FunctionElement[int]):
    """The database's clock when the statement runs, not when its transaction began: a statement that had to wait must
    not take a lease that has passed meanwhile for one that holds."""

    type = BigInteger()
    inherit_cache = True


@compiles(DatabaseNowMs, "sqlite")
def _now_ms_sqlite(element: DatabaseNowMs, compiler: SQLCompiler, **_: Any) -> str:
    # unixepoch('subsec') came with 3.42. SQLite reads the clock, in whole ms, once per run of a statement, after it has
    # got its locks; 2440587.5 is the Julian day of 1970-01-01, and a double holds today's to 40 us.
    return "CAST(ROUND((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER)"


@compiles(DatabaseNowMs, "postgresql")
def _now_ms_postgresql(element: DatabaseNowMs, compiler: SQLCompiler, **_: Any) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)"
