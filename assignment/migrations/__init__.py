"""The catalog's tables from one revision to another, by Alembic, which takes its time to import: import this late."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection

from assignment.errors import CatalogTooNew, InvalidRequest
from assignment.schema import SCHEMA_VERSION, revision_name

_VERSIONS = {"base": 0, "head": SCHEMA_VERSION} | {revision_name(n): n for n in range(1, SCHEMA_VERSION + 1)}


def migrate_tables(connection: Connection, label: str, revision: str) -> int:
    """Bring the tables up or down to a revision (`base`: none, `head`: the newest), in the connection's transaction.

    Returns the version that they have then; `label` names the catalog in messages. The caller keeps others from doing
    the same at the same time. Raises InvalidRequest for a revision that there is not; CatalogTooNew when the tables
    have one that this program does not know.
    """
    wanted = _VERSIONS.get(revision)
    if wanted is None:
        raise InvalidRequest(f"revision: found {revision!r}, want one of {', '.join(sorted(_VERSIONS))}")
    current = MigrationContext.configure(connection).get_current_revision() or "base"
    found = _VERSIONS.get(current)
    if found is None:
        raise CatalogTooNew(
            f"{label}: found a catalog of revision {current}, want {revision_name(SCHEMA_VERSION)} or older"
        )
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    (command.upgrade if wanted > found else command.downgrade)(config, revision if wanted else "base")
    return wanted
