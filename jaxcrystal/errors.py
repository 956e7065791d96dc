"""The one error that a user caused and can mend: the command line prints its message and nothing else."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message names the file, row or value at fault and says what would have been right."""


def printable(name: object) -> str:
    """A file's name as text, for tables and messages.

    Python keeps those bytes of a name that are no UTF-8 as lone surrogates, which cannot be written: each becomes
    U+FFFD here.
    """
    return str(name).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
