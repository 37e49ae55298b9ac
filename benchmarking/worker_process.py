"""A process that loads a model once and then runs requests, one JSON line each."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO, Any, cast


class WorkerProcess:
    """A process that prints ``READY <json>`` when it has loaded, then ``DONE <json>`` for every line of its stdin.

    Args:
        command: Command line of the process.
        environment: Environment variables; None inherits those of this process.

    Attributes:
        info: The JSON after ``READY``.
    """

    def __init__(self, command: Sequence[Any], environment: Mapping[str, str] | None = None) -> None:
        self.command = [str(word) for word in command]
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._stdin = cast("IO[str]", self.process.stdin)
        self._stdout = cast("IO[str]", self.process.stdout)
        self.info = self._read("READY ")

    def _read(self, prefix: str) -> Any:
        """Return the JSON of the next line with a prefix; other lines are skipped."""
        for line in self._stdout:
            if line.startswith(prefix):
                return json.loads(line[len(prefix) :])
        raise RuntimeError(f"{self.command[1]} ended with status {self.process.wait()}; its error is printed above.")

    def request(self, *arguments: Any) -> Any:
        """Send the arguments as a JSON list and return the JSON result."""
        self._stdin.write(json.dumps(arguments) + "\n")
        self._stdin.flush()
        return self._read("DONE ")

    def stop(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):  # it ended already
            self._stdin.close()
        self.process.wait()
