"""What a command does before anything else: its settings, its log, its output."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

from desfs.logs import configure_logs
from desfs.settings import ProgramSettings, load_settings

S = TypeVar("S", bound=ProgramSettings)


def option_name(setting: str) -> str:
    """What the option of a setting is called."""
    return f"--{setting.replace('_', '-')}"


def set_up(kind: type[S], options: Mapping[str, Any]) -> S:
    """The settings of a command that says by itself what it does and what fails: no log lines between its own, unless
    somebody wants them. Raises: UsageError."""
    settings = load_settings(kind, options, option_name)
    wants_log = "log_level" in settings.model_fields_set
    configure_logs(settings if wants_log else settings.model_copy(update={"log_level": "error"}))
    if isinstance(sys.stdout, io.TextIOWrapper):  # names may have what the terminal's encoding has no character for
        sys.stdout.reconfigure(errors="backslashreplace")
    return settings
