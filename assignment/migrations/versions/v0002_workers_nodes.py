"""Workers, leased node ids, and containers that have a row before they are committed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

# Not Alembic's alter_column, which makes a SQLite table anew: SQLite renames in place since 3.25.
_RENAME = "ALTER TABLE container RENAME COLUMN {} TO {}"


def upgrade() -> None:
    op.execute(_RENAME.format("created_at_ms", "changed_at_ms"))
    op.add_column("container", sa.Column("mark", sa.String(255), nullable=False, server_default=sa.text("''")))
    op.create_index(op.f("ix_container_state_changed_at_ms"), "container", ["state", "changed_at_ms"])
    op.create_table(
        "worker",
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("spool", sa.Text, nullable=False),
        sa.Column("details", sa.Text, nullable=False),
        sa.Column("started_at_ms", sa.BigInteger, nullable=False),
        sa.Column("expires_at_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_worker")),
    )
    op.create_table(
        "node",
        sa.Column("node_id", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("holder", sa.String(255), nullable=False),
        sa.Column("token", sa.BigInteger, nullable=False),
        sa.Column("expires_at_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("node_id", name=op.f("pk_node")),
        sa.CheckConstraint("node_id BETWEEN 0 AND 255", name=op.f("ck_node_node_id")),
        sa.CheckConstraint("token >= 0", name=op.f("ck_node_token")),
    )
    op.create_table(
        "bound_store",
        sa.Column("number", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_bound_store")),
        sa.CheckConstraint("number = 0", name=op.f("ck_bound_store_number")),
    )


def downgrade() -> None:
    # The older program takes every row for a commit.
    op.execute("DELETE FROM container WHERE state NOT IN ('committed', 'sealed')")
    op.drop_index(op.f("ix_container_state_changed_at_ms"), "container")
    op.drop_column("container", "mark")
    op.drop_table("bound_store")
    op.drop_table("node")
    op.drop_table("worker")
    op.execute(_RENAME.format("changed_at_ms", "created_at_ms"))
