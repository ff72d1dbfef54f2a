from typing import TypedDict

from des_format.codec import Buffer

class State(TypedDict):
    bound: bool
    no_open: bool
    no_opendir: bool
    max_background: int
    max_readahead: int
    max_write: int

def enable(max_background: int, /) -> None: ...
def state() -> State: ...
def store_pages(
    data: Buffer, files: Buffer, pages: bytearray, skip: int, mark: int, /
) -> tuple[int, int, int, int]: ...
