"""The ``openvla`` command: a line a subcommand, each a thin call into its room."""

from __future__ import annotations

import argparse
import sys

from . import __version__, predict

COMMANDS = {
    "predict": (predict, "one action from an image and an instruction"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; a user's mistake is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="openvla", description="OpenVLA on every transformers from 4.40.1 on.")
    parser.add_argument("--version", action="version", version=f"openvla {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (room, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=room.__doc__)
        room.add_arguments(command)
    args = parser.parse_args(argv)
    try:
        return COMMANDS[args.command][0].run(args)
    except (ValueError, KeyError, TypeError, ImportError, OSError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"openvla {args.command}: {type(error).__name__}: {message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
