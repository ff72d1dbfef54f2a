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
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from assignment.catalog import ContainerState

SCHEMA_VERSION = 2
"""The number of the newest revision in assignment/migrations/versions, which makes the tables below."""

MIGRATE_COMMAND = "desfs catalog migrate"

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

# A container's row, from before its object to some time after it. No foreign key to the lease: a catalog that is
# rebuilt from the bucket has containers of days that nobody holds a lease for.
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
    Column("changed_at_ms", BigInteger, nullable=False),
    Column("mark", String(255), nullable=False, server_default=text("''")),
    CheckConstraint("size >= 0", name="size"),
    CheckConstraint("files >= 0", name="files"),
    CheckConstraint(f"state IN ({', '.join(repr(str(state)) for state in ContainerState)})", name="state"),
    Index(None, "day", "shard", "generation"),
    Index(None, "state", "changed_at_ms"),  # what is `deleted` long enough to be forgotten
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

worker = Table(
    "worker",
    metadata,
    Column("name", String(255), primary_key=True),
    Column("spool", Text, nullable=False),
    Column("details", Text, nullable=False),  # a JSON object
    Column("started_at_ms", BigInteger, nullable=False),
    Column("expires_at_ms", BigInteger, nullable=False),
)

# One row per node id, made when the first id is leased and kept: tokens must never go back. Token 0: never leased.
node = Table(
    "node",
    metadata,
    Column("node_id", Integer, primary_key=True, autoincrement=False),
    Column("holder", String(255), nullable=False),
    Column("token", BigInteger, nullable=False),
    Column("expires_at_ms", BigInteger, nullable=False),
    CheckConstraint("node_id BETWEEN 0 AND 255", name="node_id"),
    CheckConstraint("token >= 0", name="token"),
)

# Alembic's own table, as Alembic makes it: read and stamped without importing Alembic, which takes a while.
revision_table = Table(
    "alembic_version",
    MetaData(),
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)


def revision_name(version: int) -> str:
    """The name that Alembic knows a version of the tables by."""
    return f"{version:04d}"


# The store whose containers these are, in one row, from its first packer on: `id` of its `.desfs.json`.
bound_store = Table(
    "bound_store",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("id", String(64), nullable=False),
    CheckConstraint("number = 0", name="number"),
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
