"""Shard leases, containers and id sequences: the tables of the first embedded catalogs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "shard_lease",
        sa.Column("day", sa.Date, nullable=False),
        sa.Column("shard", sa.String(8), nullable=False),
        sa.Column("holder", sa.String(255), nullable=False),
        sa.Column("token", sa.BigInteger, nullable=False),
        sa.Column("expires_at_ms", sa.BigInteger, nullable=False),
        sa.Column("previous_holder", sa.String(255)),
        sa.Column("previous_token", sa.BigInteger),
        sa.Column("next_generation", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("day", "shard", name=op.f("pk_shard_lease")),
        sa.CheckConstraint("token >= 1", name=op.f("ck_shard_lease_token")),
        sa.CheckConstraint("next_generation >= 1", name=op.f("ck_shard_lease_next_generation")),
    )
    op.create_table(
        "container",
        sa.Column("object_key", sa.String(1024), nullable=False),
        sa.Column("day", sa.Date, nullable=False),
        sa.Column("shard", sa.String(8), nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("files", sa.BigInteger, nullable=False),
        sa.Column("etag", sa.String(255), nullable=False),
        sa.Column("token", sa.BigInteger, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("object_key", name=op.f("pk_container")),
        sa.CheckConstraint("size >= 0", name=op.f("ck_container_size")),
        sa.CheckConstraint("files >= 0", name=op.f("ck_container_files")),
        sa.CheckConstraint(
            "state IN ('uploading', 'committed', 'sealed', 'superseded', 'deleted')", name=op.f("ck_container_state")
        ),
    )
    op.create_index(op.f("ix_container_day_shard_generation"), "container", ["day", "shard", "generation"])
    op.create_table(
        "id_sequence",
        sa.Column("node_id", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("day", sa.Date, nullable=False),
        sa.Column("last_ms", sa.BigInteger, nullable=False),
        sa.Column("next_sequence", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("node_id", "day", name=op.f("pk_id_sequence")),
        sa.CheckConstraint("node_id BETWEEN 0 AND 255", name=op.f("ck_id_sequence_node_id")),
        sa.CheckConstraint("next_sequence BETWEEN 0 AND 256", name=op.f("ck_id_sequence_next_sequence")),
    )


def downgrade() -> None:
    for name in ("id_sequence", "container", "shard_lease"):
        op.drop_table(name)
