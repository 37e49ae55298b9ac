"""The ``openvla`` command: a line a subcommand, each a thin call into its room."""

from __future__ import annotations

import argparse
import sys

from . import (
    __version__,
    assemble_model,
    benchmark,
    checkpoint_folder,
    convert_checkpoint,
    finetune,
    inspect_data,
    merge_adapter,
    predict,
    publish,
    rollout,
    serve,
    upgrade_checkpoint,
)
from .checkpoint_folder import verify

COMMANDS = {
    "predict": (predict.add_arguments, predict.run, predict.__doc__),
    "convert": (convert_checkpoint.add_arguments, convert_checkpoint.run, convert_checkpoint.__doc__),
    "upgrade": (upgrade_checkpoint.add_arguments, upgrade_checkpoint.run, upgrade_checkpoint.__doc__),
    "assemble": (assemble_model.add_arguments, assemble_model.run, assemble_model.__doc__),
    "merge": (merge_adapter.add_arguments, merge_adapter.run, merge_adapter.__doc__),
    "finetune": (finetune.add_arguments, finetune.run, finetune.__doc__),
    "evaluate": (rollout.add_arguments, rollout.run, rollout.__doc__),
    "serve": (serve.add_arguments, serve.run, serve.__doc__),
    "verify": (checkpoint_folder.add_verify_arguments, checkpoint_folder.run_verify, verify.__doc__),
    "inspect-data": (inspect_data.add_arguments, inspect_data.run, inspect_data.__doc__),
    "bench": (benchmark.add_arguments, benchmark.run, benchmark.__doc__),
    "publish": (publish.add_arguments, publish.run, publish.__doc__),
}

# What huggingface_hub speaks HTTP with, by version; not all of their errors are OSErrors.
HTTP_CLIENTS = ("httpx", "httpx2", "requests")


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; a user's mistake is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="openvla", description="OpenVLA on every transformers from 4.40.1 on.")
    parser.add_argument("--version", action="version", version=f"openvla {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_arguments, _, description) in COMMANDS.items():
        summary = description.strip().splitlines()[0]
        add_arguments(commands.add_parser(name, help=summary, description=description))
    args = parser.parse_args(argv)
    try:
        return COMMANDS[args.command][1](args)
    except Exception as error:
        if type(error).__module__.split(".")[0] in HTTP_CLIENTS:
            message = f"The connection to the Hub failed, run it again and it goes on where it stopped: {error}"
        elif isinstance(error, (ValueError, KeyError, TypeError, ImportError, OSError)):
            message = error.args[0] if isinstance(error, KeyError) and error.args else error
        else:
            raise
        print(f"openvla {args.command}: {type(error).__name__}: {message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
