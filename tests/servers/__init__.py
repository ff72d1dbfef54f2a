"""Real servers and mounts for tests, benchmarks and the demo: each a context manager that leaves nothing behind.

The kernel ends the servers when the thread that started them dies, so an interrupted run leaves none either. Start them
from a thread that lives as long as they are needed.
"""

from tests.servers.mounts import (
    DROP_COPIED_MOUNTS,
    MountEntry,
    MountPoint,
    abort_connections,
    is_mounted,
    mount_daemons,
    mount_point,
    mount_table,
)
from tests.servers.postgres import POSTGRES_PASSWORD, POSTGRES_USER, PostgresServer, postgres_server
from tests.servers.processes import (
    HOST,
    RUN_VARIABLE,
    ServerError,
    child_process,
    child_processes,
    command_of,
    free_ports,
    is_running,
    processes_with,
    state_of,
)
from tests.servers.redis import RedisServer, redis_server
from tests.servers.s3 import REGION, S3Server, s3_server

__all__ = [
    "DROP_COPIED_MOUNTS",
    "HOST",
    "POSTGRES_PASSWORD",
    "POSTGRES_USER",
    "REGION",
    "RUN_VARIABLE",
    "MountEntry",
    "MountPoint",
    "PostgresServer",
    "RedisServer",
    "S3Server",
    "ServerError",
    "abort_connections",
    "child_process",
    "child_processes",
    "command_of",
    "free_ports",
    "is_mounted",
    "is_running",
    "mount_daemons",
    "mount_point",
    "mount_table",
    "postgres_server",
    "processes_with",
    "redis_server",
    "s3_server",
    "state_of",
]
