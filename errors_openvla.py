"""Errors that this package raises for users' mistakes: each is an OpenVLAError and also the built-in of its kind.

Whatever else comes out of this package is a bug and keeps its traceback in the ``openvla`` command.
"""

from __future__ import annotations


class OpenVLAError(Exception):
    """A mistake of the user's: the message says what was got, what is allowed and what to do."""


class OpenVLAValueError(OpenVLAError, ValueError):
    """A value that is not allowed."""


class OpenVLATypeError(OpenVLAError, TypeError):
    """An argument of a type that is not taken, or that does not exist."""


class OpenVLAKeyError(OpenVLAError, KeyError):
    """A name that is not among the known ones."""

    def __str__(self) -> str:
        """Return the message as it is; KeyError would quote it."""
        return str(self.args[0]) if self.args else ""


class OpenVLAIndexError(OpenVLAError, IndexError):
    """A number beyond the end."""


class OpenVLAImportError(OpenVLAError, ImportError):
    """An optional package that is missing or too old."""


class OpenVLAFileNotFoundError(OpenVLAError, FileNotFoundError):
    """A file or folder that is not there."""


class OpenVLAFileExistsError(OpenVLAError, FileExistsError):
    """A file or folder that would be overwritten."""
