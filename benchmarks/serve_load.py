"""Load test of the policy server: latency, actions per second, errors, the server's memory; optionally hostile clients.

    python benchmarks/serve_load.py --clients 50 --seconds 60 --hostile --json load.json

Every client sends one of a few frames and instructions, and every action is compared with the one that the policy
predicts in this process: a difference makes the exit status 1. With ``--hostile``, other clients send invalid or slow
requests meanwhile, and their replies are counted. The server is a process of its own on loopback (the demo
policy), or ``--url`` of a running one with the same model.
"""

from __future__ import annotations

import argparse
import base64
import collections
import http.client
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
import torch
from openvla import PolicyClient, load_policy
from openvla.serving.cli import DRAIN_SECONDS
from openvla.serving.client import PolicyServerError
from PIL import Image

# Tasks that the demo policy was trained on: for others it may predict no action.
INSTRUCTIONS = (
    "pick up the milk",
    "pick up the milk and place it in the basket",
    "pick up the alphabet soup and place it in the basket",
)
EPISODE = Path(__file__).parents[1] / "tests" / "fixtures" / "libero_episode"
FRAMES = 4
SIDE = 224
PERCENTILES = (50, 95, 99)
START_SECONDS = 300


class Tally:
    """Thread-safe counters of replies."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.seconds: list[float] = []
        self.statuses: collections.Counter = collections.Counter()
        self.hostile: collections.Counter = collections.Counter()
        self.wrong: list[str] = []

    def good(self, seconds: float, status: str, wrong: str | None = None) -> None:
        """Count a request of a good client."""
        with self.lock:
            self.statuses[status] += 1
            if status == "200":
                self.seconds.append(seconds)
            if wrong:
                self.wrong.append(wrong)

    def bad(self, kind: str, outcome: str) -> None:
        """Count a request of a hostile client."""
        with self.lock:
            self.hostile[f"{kind}: {outcome}"] += 1


def reference_actions() -> list[tuple[np.ndarray, str, np.ndarray]]:
    """Return frames and instructions with the actions that the policy predicts in this process."""
    policy = load_policy()
    frames = []
    for file in sorted(EPISODE.glob("*.jpg"))[:FRAMES]:
        with Image.open(file) as image:
            frames.append(np.asarray(image.convert("RGB").resize((SIDE, SIDE))))
    pairs = [(frame, instruction) for frame in frames for instruction in INSTRUCTIONS]
    return [(frame, text, policy.act(frame, text)) for frame, text in pairs]


def good_client(url: str, references: list, period: float, tally: Tally, stop: threading.Event, seed: int) -> None:
    """Request actions and compare them, until stopped."""
    client, chance = PolicyClient(url, timeout=30, retries=0), random.Random(seed)
    while not stop.is_set():
        frame, instruction, expected_action = chance.choice(references)
        started = time.perf_counter()
        try:
            action = client.act(frame, instruction)
        except PolicyServerError as error:
            tally.good(0.0, str(error.status or type(error.__cause__).__name__))
            stop.wait(0.2)
            continue
        spent = time.perf_counter() - started
        wrong = (
            None
            if np.array_equal(action, expected_action)
            else f"{instruction!r}: {action.tolist()} for {expected_action.tolist()}"
        )
        tally.good(spent, "200", wrong)
        stop.wait(max(0.0, period - spent))


def hostile_client(host: str, port: int, kind: str, tally: Tally, stop: threading.Event) -> None:
    """Send hostile requests of one kind, until stopped."""
    while not stop.is_set():
        try:
            outcome = HOSTILE[kind](host, port)
        except (OSError, http.client.HTTPException) as error:
            outcome = type(error).__name__
        tally.bad(kind, str(outcome))
        stop.wait(0.1)


def posted(body: bytes | dict) -> Callable[[str, int], int]:
    """Return a function that posts an invalid body and returns the status."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body

    def ask(host: str, port: int) -> int:
        connection = http.client.HTTPConnection(host, port, timeout=40)
        try:
            connection.request("POST", "/act", data)
            return connection.getresponse().status
        finally:
            connection.close()

    return ask


def dripped(head: bytes, drip: bytes, seconds: float) -> Callable[[str, int], str]:
    """Return a function that sends a head, then single bytes, until the server closes the connection."""

    def drip_on(host: str, port: int) -> str:
        with socket.create_connection((host, port), timeout=seconds) as connection:
            connection.sendall(head)
            for _ in range(100):
                try:
                    got = connection.recv(4096)
                    return got[9:12].decode() if got else "closed"
                except TimeoutError:
                    connection.sendall(drip)
            return "still open"

    return drip_on


def truncated(host: str, port: int) -> str:
    """Send half a body and disconnect."""
    with socket.create_connection((host, port), timeout=5) as connection:
        connection.sendall(b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n" + b"x" * 5000)
    return "left"


def encoded(array: np.ndarray, dtype: str | None = None) -> dict:
    """Return an array in json_numpy's encoding."""
    data = base64.b64encode(array.tobytes()).decode()
    return {"__numpy__": data, "dtype": dtype or array.dtype.str, "shape": list(array.shape)}


def bomb(side: int = 10000) -> str:
    """Return a PNG of 100 megapixels in a few kilobytes, base64."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    return base64.b64encode(png).decode()


FRAME = np.zeros((8, 8, 3), np.float32)
HEAD = b"POST /act HTTP/1.1\r\nHost: localhost\r\n"
HOSTILE: dict[str, Callable[[str, int], int | str]] = {
    "slow head": dripped(b"POST /act HTTP/1.1\r\n", b"a", 1.0),
    "slow body": dripped(HEAD + b"Content-Length: 1000\r\n\r\n", b" ", 1.0),
    "silence": dripped(b"", b"", 1.0),
    "truncated body": truncated,
    "100 megapixels": posted({"image": bomb(), "instruction": "go"}),
    "20 MB body": posted(b" " * 20 * 2**20),
    "NaN array": posted({"image": encoded(FRAME + np.nan), "instruction": "go"}),
    "object dtype": posted({"image": encoded(FRAME, "|O"), "instruction": "go"}),
    "int64 array": posted({"image": encoded(FRAME.astype(np.int64)), "instruction": "go"}),
    "half a surrogate": posted({"image": encoded(FRAME), "instruction": "go \ud800"}),
    "right-to-left, emoji": posted({"image": encoded(FRAME), "instruction": "\u202eפתח \U0001f9be \x00 </s><pad>"}),
    "deep nesting": posted(b"[" * 200000),
    "a path": posted({"image": "/etc/passwd", "instruction": "go"}),
    "rubbish": posted(b"\xff\xfe\x00"),
}


def start_server() -> tuple[subprocess.Popen, str]:
    """Start ``openvla serve`` on a free port; return the process and its URL."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "openvla", "serve", "--port", str(port), "--max-queue-size", "256"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            PolicyClient(url, timeout=1, retries=0).info()
            return process, url
        except PolicyServerError:
            time.sleep(0.2)
    process.kill()
    raise RuntimeError(f"The server did not start within {START_SECONDS} s.")


def run(args: argparse.Namespace) -> dict:
    """Run the load test and return its report."""
    references = reference_actions()
    process, url = (None, args.url) if args.url else start_server()
    watched = psutil.Process(process.pid) if process else None
    parts, tally, stop = urlsplit(url), Tally(), threading.Event()
    threads = [
        threading.Thread(target=good_client, args=(url, references, args.period, tally, stop, seed))
        for seed in range(args.clients)
    ]
    if args.hostile:
        where = (parts.hostname, parts.port)
        threads += [threading.Thread(target=hostile_client, args=(*where, kind, tally, stop)) for kind in HOSTILE]
    memory, started = [], time.monotonic()
    for thread in threads:
        thread.start()
    while time.monotonic() - started < args.seconds:
        if watched:
            memory.append((round(time.monotonic() - started, 1), watched.memory_info().rss / 2**20))
        time.sleep(min(1.0, args.seconds / 10))
    elapsed = time.monotonic() - started
    stop.set()
    for thread in threads:
        thread.join()
    ended = None
    if process:
        process.send_signal(signal.SIGTERM)
        ended = process.wait(DRAIN_SECONDS)
    return {
        "clients": args.clients,
        "seconds": elapsed,
        "period_seconds": args.period,
        "cpu_count": os.cpu_count(),
        "load_average": os.getloadavg(),
        "torch": torch.__version__,
        "actions": len(tally.seconds),
        "actions_a_second": len(tally.seconds) / elapsed,
        "latency_ms": {
            f"p{p}": float(np.percentile(tally.seconds, p)) * 1000 if tally.seconds else None for p in PERCENTILES
        },
        "statuses": dict(tally.statuses),
        "wrong_answers": tally.wrong,
        "hostile": dict(sorted(tally.hostile.items())),
        "memory_mb": memory,
        "server_exit_status": ended,
    }


def as_table(report: dict) -> str:
    """Return the report as text."""
    latency = "  ".join(f"{name} {value:.0f}" for name, value in report["latency_ms"].items() if value is not None)
    lines = [
        f"clients            {report['clients']} for {report['seconds']:.0f} s, {report['cpu_count']} CPUs",
        f"actions a second   {report['actions_a_second']:.1f} ({report['actions']} actions)",
        f"latency, ms        {latency}",
        f"replies            {report['statuses']}",
        f"wrong answers      {len(report['wrong_answers'])}",
    ]
    held = [megabytes for _, megabytes in report["memory_mb"]]
    if held:
        quarter = max(1, len(held) // 4)
        early, late = np.median(held[quarter : 2 * quarter] or held), np.median(held[-quarter:])
        lines.append(
            f"server memory, MB  {early:.0f} in the second quarter, {late:.0f} in the last, peak {max(held):.0f}"
        )
        lines.append(f"server's end       status {report['server_exit_status']} on SIGTERM")
    lines += [f"hostile            {count:>6} x {outcome}" for outcome, count in report["hostile"].items()]
    return "\n".join(lines)


def main() -> int:
    """Run the load test, print the report, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--period", type=float, default=0.0, help="seconds of a client's control step; 0 asks at once")
    parser.add_argument("--hostile", action="store_true", help="mix in malformed and slow clients")
    parser.add_argument("--url", help="of a server that runs already; without it one is started")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    args = parser.parse_args()
    report = run(args)
    print(as_table(report))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)
    for wrong in report["wrong_answers"][:5]:
        print(f"WRONG: {wrong}", file=sys.stderr)
    return 1 if report["wrong_answers"] or not report["actions"] else 0


if __name__ == "__main__":
    sys.exit(main())
