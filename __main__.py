"""Run the ``openvla`` command; each subcommand is a module that is imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import re
import sys

from . import __version__
from .errors_openvla import OpenVLAError

# Subcommand: its module with add_arguments() and run(), and a line for --help.
COMMANDS = {
    "predict": ("inference.predict", "predict one action from an image and an instruction"),
    "convert": ("convert_checkpoint", "convert a checkpoint to a folder that loads with from_pretrained, or back"),
    "upgrade": ("conversion.upgrade", "write a saved folder with today's code and configuration, weights untouched"),
    "assemble": ("conversion.assemble", "assemble an untrained model from vision towers and a language model"),
    "merge": ("conversion.merge", "merge an adapter into its base"),
    "finetune": ("training.finetune", "fine-tune a model on a dataset"),
    "train-vq": ("training.train_vq", "train a VQ autoencoder of action chunks (MiniVLA)"),
    "evaluate": ("evaluation.cli", "evaluate a policy in the LIBERO simulator"),
    "serve": ("serving.cli", "serve a policy over HTTP and WebSocket"),
    "verify": ("conversion.verify", "check every file and tensor of a converted folder"),
    "inspect-data": ("training.inspect_data", "summarise a dataset and check its recorded numbers"),
    "convert-data": ("data.convert", "write a dataset of any format as LeRobot v3"),
    "bench": ("benchmarking.benchmark", "measure the speed of a model on this machine"),
    "publish": ("conversion.publish", "upload a folder to the Hugging Face Hub"),
}

# The HTTP libraries of huggingface_hub, by version; not all of their errors are OSErrors.
HTTP_CLIENTS = ("httpx", "httpx2", "requests")


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """Return the parser; only the chosen subcommand is imported and has its options."""
    parser = argparse.ArgumentParser(prog="openvla", description="OpenVLA on every transformers from 4.40.1 on.")
    parser.add_argument("--version", action="version", version=f"openvla {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        command.add_argument("--traceback", action="store_true", help="show the traceback of every error")
        if name == chosen:
            implementation = importlib.import_module(f".{module}", __package__)
            command.description = implementation.__doc__
            command.set_defaults(run=implementation.run)
            implementation.add_arguments(command)
    return parser


def describe(error: Exception) -> str | None:
    """Return one line for an error that is not a bug: the user's, the system's (files, disk) or the network's."""
    if type(error).__module__.split(".")[0] in HTTP_CLIENTS:
        return f"The connection to the Hub failed, run it again and it goes on where it stopped: {error}"
    if isinstance(error, (OpenVLAError, OSError)) or type(error).__module__ == f"{__package__}.serving.client":
        return _without_worker_traceback(error)
    return None


def _without_worker_traceback(error: Exception) -> str:
    """Return an error's message; of one from a DataLoader worker, whose message is a traceback, the original one."""
    message = str(error)
    if not re.match(r"Caught \w+ in DataLoader worker process", message):
        return message
    name = re.escape(type(error).__name__)
    return re.split(rf"^(?:[\w.]+\.)?{name}: ", message, flags=re.MULTILINE)[-1].strip()


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; a user's mistake is one line on stderr and exit status 2, a bug a traceback and status 1."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser(argv[0] if argv else None).parse_args(argv)
    run, traceback = args.run, args.traceback
    del args.run, args.traceback  # the rest is the subcommand's own
    try:
        return run(args)
    except Exception as error:
        message = describe(error)
        if message is None or traceback:
            raise  # Python prints the traceback and exits with status 1
        print(f"openvla {args.command}: {type(error).__name__}: {message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
