"""Console output of the commands: what the library logs, a command prints."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

PACKAGE = __name__.split(".")[0]
LOGGERS = (f"{PACKAGE}.conversion", f"{PACKAGE}.convert_checkpoint")


class _PrintHandler(logging.Handler):
    """A handler that prints to the standard output of the moment, which tests and notebooks replace."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record))


@contextmanager
def printed_logs() -> Iterator[None]:
    """Print what the converter logs, from level INFO on, on standard output."""
    handler, loggers = _PrintHandler(), [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.removeHandler(handler)
            logger.setLevel(level)
