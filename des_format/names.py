"""Which names may stand in a container, and where an external payload is kept. Pure."""

from __future__ import annotations

from des_format.errors import InvalidEntryName
from des_format.layout import BIG_FILES_FOLDER, MAX_NAME

MAX_COMPONENT = 255  # bytes; NAME_MAX of Linux: a longer component cannot be shown
MAX_PATH = 4095  # bytes; PATH_MAX of Linux less its NUL
STRICT_FORBIDDEN = '/\\:*?"<>|'  # what the first writers of the format refuse


def name_problem(name: bytes) -> str | None:
    """Why a reader must not show an entry of this name, or None. The order of the checks is that of the reasons'
    weight."""
    if not name:
        return "the name is empty"
    if len(name) > MAX_PATH:  # before all that looks at every byte
        return f"the name has more than the {MAX_PATH} bytes of a path"
    if b"\0" in name:
        return f"the name has a NUL at byte {name.index(0)}"
    try:
        name.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"the name is not UTF-8 at byte {error.start}"
    if name.startswith(b"/"):
        return "the name is an absolute path"
    for component in name.split(b"/"):
        if not component:
            return "the name has an empty component"
        if component in (b".", b".."):
            return f"the name has a component {component.decode()!r}"
        if len(component) > MAX_COMPONENT:
            return f"the name has a component of {len(component)} bytes, more than {MAX_COMPONENT}"
    return None


def check_writable(name: str, *, strict: bool = False) -> bytes:
    """The name as the bytes that an index record holds.

    Names that no mount could show (components over 255 bytes, paths over 4,095) are refused as well: what cannot be
    read back is not written. `strict` also refuses the characters that the format's first writers refuse.

    Raises: InvalidEntryName with the reason.
    """
    try:
        raw = name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidEntryName(f"{name!r}: not UTF-8 at character {error.start}") from None
    if strict:
        for position, character in enumerate(name):
            if character in STRICT_FORBIDDEN:
                raise InvalidEntryName(f"{name!r}: {character!r} at character {position} is refused by strict_names")
    if len(raw) > MAX_NAME:
        raise InvalidEntryName(f"{name[:80]!r}…: the name has {len(raw)} bytes, more than {MAX_NAME}")
    problem = name_problem(raw)
    if problem is not None:
        raise InvalidEntryName(f"{name[:80]!r}: {problem}")
    return raw


def external_key(container_key: str, name: str) -> str:
    """Where every v1 reader looks for the payload of an external entry: `{folder of the
    container}/_bigFiles/{name}`."""
    folder, slash, _ = container_key.rpartition("/")
    return f"{folder}{slash}{BIG_FILES_FOLDER}/{name}"


def external_keys(container_key: str, name: str, recorded: object = None, *, root: str = "") -> list[str]:
    """The keys under which the payload of an external entry may lie, in the order to try.

    `recorded` is `external_key` of the entry's META, relative to the store's root `root` ("" or ending in `/`) or with
    it. It is used only if it is a plain key that lies in a `_bigFiles/` folder below `root` and ends in the entry's
    name; the rule's key comes after it, for stores that were copied to another place.
    """
    by_rule = external_key(container_key, name)
    # surrogatepass: JSON can hold lone surrogates, which no key can; name_problem finds them.
    if not isinstance(recorded, str) or name_problem(recorded.encode("utf-8", "surrogatepass")) is not None:
        return [by_rule]
    components = recorded.split("/")
    if BIG_FILES_FOLDER not in components[:-1]:
        return [by_rule]
    inside = "/".join(components[components.index(BIG_FILES_FOLDER) + 1 :])
    if inside != name and not inside.endswith(f"/{name}"):
        return [by_rule]
    key = recorded if recorded.startswith(root) else root + recorded
    # Under the rule's own name it may have been copied along with its store; elsewhere in the folder it is a version of
    # its own, and what lies at the rule's place another one.
    return [key, by_rule] if inside == name and key != by_rule else [key]
