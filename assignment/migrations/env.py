"""What Alembic runs for each command: the revisions, over the connection and in the transaction of who called it."""

from __future__ import annotations

from alembic import context

from assignment.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
