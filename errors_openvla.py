"""Errors for users' mistakes: each is an ``OpenVLAError`` and the built-in exception of its kind.

Any other exception from this package is a bug; the ``openvla`` command shows its traceback.
"""

from __future__ import annotations


class OpenVLAError(Exception):
    """Base class; the message says what was got, what is allowed and what to do."""


class OpenVLAValueError(OpenVLAError, ValueError):
    """A value that is not allowed."""


class OpenVLATypeError(OpenVLAError, TypeError):
    """An argument of a type that is not allowed, or that does not exist."""


class OpenVLAKeyError(OpenVLAError, KeyError):
    """A name that is not among the known ones."""

    def __str__(self) -> str:
        """Return the message without the quotes that KeyError adds."""
        return str(self.args[0]) if self.args else ""


class OpenVLAIndexError(OpenVLAError, IndexError):
    """An index out of range."""


class OpenVLAImportError(OpenVLAError, ImportError):
    """An optional package that is missing or too old."""


class OpenVLAFileNotFoundError(OpenVLAError, FileNotFoundError):
    """A file or folder that does not exist."""


class OpenVLAFileExistsError(OpenVLAError, FileExistsError):
    """A file or folder that would be overwritten."""
