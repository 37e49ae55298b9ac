"""``openvla serve``: a policy behind HTTP and websocket, for the clients that robots already have.

    pip install 'openvla[serve]'
    openvla serve --model my-openvla --port 8000

POST /act            an image and an instruction in, an action or a chunk out: json_numpy as OpenVLA's and OpenVLA-OFT's
                     own servers speak it, or plain JSON with base64 PNG or JPEG
websocket /          openpi's protocol, for its unchanged client
GET /                a page to try it by hand
GET /info, /healthz, /metrics, /openapi.json

Only this machine can reach it unless --host says otherwise; then give a token too.
"""

from __future__ import annotations

import argparse
import importlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from ..errors_openvla import OpenVLAImportError, OpenVLAValueError
from ..inference.policy import add_policy_arguments, load_policy_from_args

TOKEN_VARIABLE = "OPENVLA_SERVE_TOKEN"
SHORTEST_TOKEN = 16
INSTALL_SERVER = "pip install 'openvla[serve]'"
DRAIN_SECONDS = 60.0  # for what was accepted, once the server is told to stop


@dataclass(frozen=True)
class Limits:
    """What a server takes before it refuses.

    Attributes:
        body_bytes: Of one request.
        image_side: Longer side of an image in pixels.
        instruction_characters: Of one instruction.
        waiting: Requests accepted and not yet answered.
        batch: Requests answered in one pass of the model.
        deadline: Seconds from a request's arrival to its answer; a request may ask for less.
        header_seconds: For a request's head to arrive.
        body_seconds: For its body to arrive.
        reading_bytes: Of all bodies that are arriving.
        connections: Open at one time.
    """

    body_bytes: int = 16 * 2**20
    image_side: int = 4096
    instruction_characters: int = 1000
    waiting: int = 64
    batch: int = 8
    deadline: float = 30.0
    header_seconds: float = 5.0
    body_seconds: float = 10.0
    reading_bytes: int = 256 * 2**20
    connections: int = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``openvla serve``."""
    add_policy_arguments(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1, this machine only"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one; default 8000")
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help=f"bearer token that requests must carry; or ${TOKEN_VARIABLE}"
    )
    parser.add_argument(
        "--batch", type=int, default=Limits.batch, metavar="N", help="most requests in one pass of the model"
    )
    parser.add_argument(
        "--waiting", type=int, default=Limits.waiting, metavar="N", help="most requests at a time; others get a 503"
    )
    parser.add_argument(
        "--deadline", type=float, default=Limits.deadline, metavar="S", help="seconds to an answer; later is a 504"
    )


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl+C, then answer what was accepted; returns the exit status."""
    limits = limits_of(args)
    token = read_token(args.token_file)
    app = require_serve("app")
    # Before a large model is loaded: OSError where the port is taken.
    socket.create_server((args.host, args.port), family=socket.AF_INET6 if ":" in args.host else socket.AF_INET).close()
    policy, name = load_policy_from_args(args)
    served = require_serve("policy").ServedPolicy(policy, name, limits)
    app.serve(served, host=args.host, port=args.port, token=token)
    return 0


def limits_of(args: argparse.Namespace) -> Limits:
    """The limits that the options ask for.

    Raises:
        ValueError: One is out of range.
    """
    for name in ("batch", "waiting", "deadline"):
        if not getattr(args, name) > 0:
            raise OpenVLAValueError(f"--{name} must be above 0, got {getattr(args, name)}.")
    if not 0 <= args.port < 65536:
        raise OpenVLAValueError(f"--port must be 0 to 65535, got {args.port}.")
    return Limits(batch=args.batch, waiting=args.waiting, deadline=args.deadline)


def read_token(file: Path | None) -> str | None:
    """The token of a file, or of the environment; None for none.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is too short to be secret, or no single line of plain text.
    """
    token = file.read_text(encoding="utf-8").strip() if file else os.environ.get(TOKEN_VARIABLE)
    if token is None:
        return None
    if len(token) < SHORTEST_TOKEN or not (token.isascii() and token.isprintable() and " " not in token):
        raise OpenVLAValueError(
            f"The token in {file or f'${TOKEN_VARIABLE}'} must be one word of at least {SHORTEST_TOKEN} ASCII "
            "characters; make one with: python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    return token


def require_serve(room: str):
    """A room of the server.

    Raises:
        ImportError: A package of the extra is missing.
    """
    try:
        return importlib.import_module(f".{room}", __package__)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("openvla"):
            raise
        raise OpenVLAImportError(f"The policy server needs {error.name}: {INSTALL_SERVER}") from error
