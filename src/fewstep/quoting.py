"""Text from files in messages: quoted, cut, and without what a terminal would obey.

An escape sequence in the name of a tensor can move the cursor, change the title of a window or
hide the line that warns. Python's `repr` writes all such characters as escapes.
"""

SHOWN = 80  # characters of one name


def quoted(foreign: object, most: int = SHOWN) -> str:
    """A name or value from a file, as a message shows it.

    Only text and plain numbers are shown. Other objects may be nested so that writing them takes
    for ever, so of those only the type is named.
    """
    if isinstance(foreign, str | bytes):
        return repr(foreign[:most]) + ("..." if len(foreign) > most else "")
    if foreign is None or isinstance(foreign, bool | float):
        return str(foreign)
    if isinstance(foreign, int):
        return str(foreign) if abs(foreign) < 1 << 62 else "a large number"
    return f"an object of type {type(foreign).__name__}"


def listed(names: list[str], most: int = 6) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(plain(name) for name in names[:most]) + more


def plain(text: str, most: int = SHOWN) -> str:
    """Text on one line, without quotes where it needs none; cut."""
    cut = text if len(text) <= most else f"{text[: most - 3]}..."
    return cut if cut.isprintable() else printable(cut, keep="")


def printable(text: str, keep: str = "\n") -> str:
    """Text whose unprintable characters, but those to keep, are written as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)
