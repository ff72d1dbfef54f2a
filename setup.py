"""Builds desfs._levers, the one extension; everything else is in setup.cfg."""

import shlex
import subprocess

from setuptools import Extension, setup


def extensions() -> list[Extension]:
    """The extension; none where libfuse's headers are not found. It is optional: a mount works without, slower."""
    try:
        flags = {
            kind: shlex.split(subprocess.run(["pkg-config", kind, "fuse3"], stdout=-1, check=True, text=True).stdout)
            for kind in ("--cflags", "--libs")
        }
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"desfs._levers is not built: {error}")
        return []
    return [
        Extension(
            "desfs._levers",
            ["desfs/_levers.c"],
            extra_compile_args=flags["--cflags"],
            extra_link_args=flags["--libs"],
            optional=True,
        )
    ]


setup(ext_modules=extensions())
