"""Open containers in a process of their own each, and print for each what came of it and what it cost.

`python -m tests.unit.bounded CONTAINER…`: one line of JSON each, `seconds` and `peak_rss` (bytes) among it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from typing import Any

from des_format import CorruptEntry, CorruptMeta, DesReader, NotAContainer
from des_format.meta import MetaColumns

ADDRESS_SPACE = 4 * 2**30  # bytes: a backstop, far above what is allowed; libraries reserve more than they use
READ_AT_MOST = 100  # entries, one by one


def outcome(path: str) -> dict[str, Any]:
    """What a reader makes of a container: refused, or what is shown, readable and damaged."""
    try:
        with DesReader(path) as reader:
            index = reader.get_index()
            result: dict[str, Any] = {"count": len(index), "shown": [], "readable": {}, "damaged": {}}
            for row in index.shown()[:READ_AT_MOST].tolist():
                name = index.entry(row).name
                result["shown"].append(name)
                try:
                    result["readable"][name] = len(reader.get_file(name))
                except CorruptEntry as error:
                    result["damaged"][name] = str(error)
                try:
                    reader.get_meta(name)
                except CorruptMeta:
                    pass
            for row in index.problem_rows()[:READ_AT_MOST].tolist():
                assert index.problem(row)
            if reader._opened.meta is not None:
                MetaColumns(index.rows).fill(index, reader._opened.meta, index.footer.meta_start)
            return result
    except NotAContainer as error:
        return {"refused": str(error)}
    except Exception:
        return {"unexpected": traceback.format_exc()}


def main() -> None:
    for path in sys.argv[1:]:
        readable, writable = os.pipe()
        child = os.fork()
        if not child:
            resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
            started = time.perf_counter()
            result = outcome(path)
            result["seconds"] = time.perf_counter() - started
            with os.fdopen(writable, "w") as pipe:
                json.dump(result, pipe)
            os._exit(0)
        os.close(writable)
        with os.fdopen(readable) as pipe:
            text = pipe.read()
        _, _, usage = os.wait4(child, 0)
        result = json.loads(text) if text else {"unexpected": "the process died"}
        print(json.dumps(result | {"peak_rss": usage.ru_maxrss * 1024}), flush=True)


if __name__ == "__main__":
    main()
