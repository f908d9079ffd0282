"""The one error that users are meant to read."""

from __future__ import annotations


class PatterningError(Exception):
    """Something the user can put right.

    The message is one line: the file, key, chain or node, what was expected there, and what to do. The
    command line prints it without a traceback and exits with code 2.
    """
