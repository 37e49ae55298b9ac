"""``openvla serve``: serve a policy over HTTP and WebSocket.

    pip install 'openvla[serve]'
    openvla serve --model my-openvla --port 8000

POST /act            an image and an instruction in, an action or a chunk of actions out: json_numpy as OpenVLA's and
                     OpenVLA-OFT's own servers use it, or plain JSON with base64 PNG or JPEG
websocket /          openpi's protocol, for its unmodified client
GET /                a page to try the policy in a browser
GET /info, /healthz, /metrics, /openapi.json

The server listens on 127.0.0.1 unless --host is given; then use a token too.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ..errors_openvla import OpenVLAImportError, OpenVLAValueError
from ..inference.policy import add_policy_arguments, load_policy_from_args
from ..inference.visual_trace import CoTracker3

TOKEN_VARIABLE = "OPENVLA_SERVE_TOKEN"
MIN_TOKEN_LENGTH = 16
INSTALL_SERVER = "pip install 'openvla[serve]'"
DRAIN_SECONDS = 60.0  # time to complete accepted requests after SIGTERM


@dataclass(frozen=True)
class Limits:
    """Limits of the policy server.

    Attributes:
        body_bytes: Maximum size of one request body.
        image_side: Maximum length of an image's longer side in pixels.
        instruction_characters: Maximum length of an instruction.
        max_queue_size: Maximum number of requests that are accepted and not completed.
        max_batch_size: Maximum number of requests in one forward pass of the model.
        timeout_s: Seconds from a request's arrival to its result; a request may set a shorter time.
        header_seconds: Seconds for a request's head to arrive.
        body_seconds: Seconds for a request's body to arrive.
        max_inflight_bytes: Maximum size of all bodies that are being received.
        connections: Maximum number of open connections.
        max_sessions: Maximum number of sessions, each with the images of an episode's last steps.
    """

    body_bytes: int = 16 * 2**20
    image_side: int = 4096
    instruction_characters: int = 1000
    max_queue_size: int = 64
    max_batch_size: int = 8
    timeout_s: float = 30.0
    header_seconds: float = 5.0
    body_seconds: float = 10.0
    max_inflight_bytes: int = 256 * 2**20
    connections: int = 512
    max_sessions: int = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``openvla serve``."""
    add_policy_arguments(parser, has_episodes=True)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1, this machine only"
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for a free one; default 8000")
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"file with the bearer token that requests must carry; or ${TOKEN_VARIABLE}",
    )
    parser.add_argument(
        "--max-batch-size",
        type=int,
        default=Limits.max_batch_size,
        metavar="N",
        help="maximum number of requests in one forward pass of the model",
    )
    parser.add_argument(
        "--max-queue-size",
        type=int,
        default=Limits.max_queue_size,
        metavar="N",
        help="maximum number of requests at one time; others get a 503",
    )
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=Limits.timeout_s,
        metavar="SECONDS",
        help="seconds from a request's arrival to its action; later is a 504",
    )
    parser.add_argument(
        "--max-sessions",
        type=int,
        default=Limits.max_sessions,
        metavar="N",
        help="maximum number of episodes of which the server keeps images; more are forgotten, the oldest first",
    )
    parser.add_argument(
        "--cotracker",
        type=Path,
        metavar="FILE",
        help="CoTracker3's scaled_offline.pth: draw a TraceVLA's traces, in sessions (its licence: no commercial use)",
    )
    parser.add_argument(
        "--warmup",
        metavar="INSTRUCTION",
        nargs="+",
        default=[],
        help="predict for these instructions first, so that the first frames do not wait for CUDA graphs",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl+C, complete the accepted requests, and return the exit status."""
    limits = limits_from(args)
    token = read_token(args.token_file)
    app = import_server_module("app")
    require_free_port(args.host, args.port)  # before a large model is loaded
    tracker = None if args.cotracker is None else CoTracker3(args.cotracker, args.device)
    policy, name = load_policy_from_args(args, tracker=tracker)
    policy.warm_up(args.warmup)
    batched_policy = import_server_module("policy").BatchedPolicy(policy, name, limits)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    app.serve(batched_policy, host=args.host, port=args.port, token=token)
    return 0


def limits_from(args: argparse.Namespace) -> Limits:
    """Return the limits that the options set.

    Raises:
        OpenVLAValueError: An option is out of range.
    """
    for name in ("max_batch_size", "max_queue_size", "max_sessions", "timeout_s"):
        if not getattr(args, name) > 0:
            raise OpenVLAValueError(f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name)}.")
    if not 0 <= args.port < 65536:
        raise OpenVLAValueError(f"--port must be 0 to 65535, got {args.port}.")
    return Limits(
        max_batch_size=args.max_batch_size,
        max_queue_size=args.max_queue_size,
        max_sessions=args.max_sessions,
        timeout_s=args.timeout_s,
    )


def require_free_port(host: str, port: int) -> None:
    """Raise OSError if the address cannot be listened on."""
    socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()


def read_token(file: Path | None) -> str | None:
    """Return the token from a file, else from the environment variable, else None.

    Raises:
        FileNotFoundError: The file does not exist.
        OpenVLAValueError: The token is too short to be secret, or not one line of printable ASCII.
    """
    token = file.read_text(encoding="utf-8").strip() if file else os.environ.get(TOKEN_VARIABLE)
    if token is None:
        return None
    if len(token) < MIN_TOKEN_LENGTH or not (token.isascii() and token.isprintable() and " " not in token):
        raise OpenVLAValueError(
            f"The token in {file or f'${TOKEN_VARIABLE}'} must be one word of at least {MIN_TOKEN_LENGTH} ASCII "
            "characters; make one with: python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    return token


def import_server_module(name: str) -> ModuleType:
    """Import a module of this folder that needs the packages of the extra ``serve``.

    Raises:
        OpenVLAImportError: A package is missing.
    """
    try:
        return importlib.import_module(f".{name}", __package__)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("openvla"):
            raise
        raise OpenVLAImportError(f"The policy server needs {error.name}: {INSTALL_SERVER}") from error
