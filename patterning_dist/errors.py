"""The one error that users are meant to read, and what it says of others."""

from __future__ import annotations


class PatterningError(Exception):
    """Something the user can put right.

    The message is one line: the file, key, chain or node, what was expected there, and what to do. The
    command line prints it without a traceback and exits with code 2.
    """


def first_line(error: object) -> str:
    """The first line of a message, without a full stop; 300 characters at most: libraries quote what they got."""
    line = str(error).strip().partition("\n")[0].rstrip(".")
    return line if len(line) <= 300 else line[:297] + "..."


def last_line(error: object) -> str:
    """The last line of a message, which is where the traceback of another process says what happened."""
    return str(error).strip().splitlines()[-1].strip()[:300] if str(error).strip() else repr(error)
