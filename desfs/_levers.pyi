from typing import TypedDict

class State(TypedDict):
    bound: bool
    no_open: bool
    no_opendir: bool
    max_background: int
    max_readahead: int
    max_write: int

def enable(max_background: int, /) -> None: ...
def state() -> State: ...
