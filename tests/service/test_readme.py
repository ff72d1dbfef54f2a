"""The README's library example runs as printed, and prints what it says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

from tests.servers import S3Server

README = Path(__file__).parents[2] / "README.md"


def test_the_library_example_runs_as_printed(s3: S3Server, tmp_path: Path) -> None:
    """README.md, As a library: each `print` shows what the comment behind it says."""
    example = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert example is not None
    s3.client().create_bucket(Bucket="my-bucket")
    done = subprocess.run(
        [sys.executable, "-c", example[1]],
        cwd=tmp_path,
        env=s3.environ(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    promised = [ast.literal_eval(comment) for comment in re.findall(r"print\(.*\)  # (.*)", example[1])]
    assert len(promised) == 3
    assert [ast.literal_eval(line) for line in done.stdout.splitlines()] == promised
