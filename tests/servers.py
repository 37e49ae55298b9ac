"""Policy servers on loopback, in a thread of this process or in a forked process, and helpers to send requests."""

import base64
import contextlib
import http.client
import io
import json
import multiprocessing
import socket
import threading
import time

import numpy as np
import pytest
import torch
from openvla import PLATFORMS
from openvla.inference.policy import Policy
from openvla.serving.cli import Limits
from openvla.tiny import build_tiny
from PIL import Image

HOST = "127.0.0.1"
LIMITS = Limits(body_bytes=2**21, header_seconds=1.0, body_seconds=1.0)
STATISTICS = {
    "action": {"q01": [-0.5] * 7, "q99": [0.5] * 7, "mask": [True] * 6 + [False]},
    "proprio": {"q01": [-2.0] * 8, "q99": [2.0] * 8},
}


INSTRUCTION = "open the drawer"
STATE = np.linspace(-1, 1, 8)
VALID_REQUEST = {"image": [[[0, 0, 0]] * 2] * 2, "instruction": "go"}
OFT_CONFIG = {**PLATFORMS["libero"], "parallel_decoding": True, "action_head": "l1", "norm_stats": {"lab": STATISTICS}}


def build_policy(limits=LIMITS, **overrides):
    """Return a BatchedPolicy of a tiny model; while ``gate`` is cleared, its predictions wait."""
    from openvla.serving.policy import BatchedPolicy

    class GatedPolicy(BatchedPolicy):
        gate = threading.Event()

        def predict_batch(self, requests):
            assert self.gate.wait(30)
            return super().predict_batch(requests)

    GatedPolicy.gate.set()
    model, processor = build_tiny(**overrides)
    policy = Policy(model, processor, model.resolve_unnorm_key(), constrain_actions=model.config.action_head is None)
    return GatedPolicy(policy, "tiny", limits)


class ServerThread:
    """A server in a thread: ``with ServerThread(policy) as server``."""

    def __init__(self, policy, token=None, port=0, host=HOST):
        from openvla.serving.app import build_app
        from openvla.serving.middleware import create_server

        self.policy, self.app = policy, build_app(policy, token=token, host=host)
        self.queue = self.app.state.policy_app.queue
        self.server = create_server(self.app, self.queue, policy.limits, HOST, port)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        wait_until(lambda: self.server.started)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://{HOST}:{self.port}"
        return self

    def __exit__(self, *_):
        self.policy.gate.set()
        self.server.should_exit = True
        self.thread.join(20)

    def wait_until_all_started(self):
        """Wait until every request in the queue is in the model's batch: later ones are not in this batch."""
        entries = self.queue._entries
        wait_until(lambda: entries and all(entry.started for entry in list(entries.values())))

    def wait_until_prepared(self, count):
        """Wait until the queue has exactly ``count`` requests, and all of them are prepared."""
        entries = self.queue._entries
        wait_until(lambda: sum(entry.item is not None for entry in list(entries.values())) == len(entries) == count)


class ServerProcess:
    """A server in a forked process, which can be sent any signal; it uses one thread, as torch's data loaders do."""

    def __init__(self, policy, port=0):
        self.socket = socket.create_server((HOST, port))  # so that the port is known, and the server's own
        self.port = self.socket.getsockname()[1]
        self.url = f"http://{HOST}:{self.port}"
        self.socket.close()
        self.process = multiprocessing.get_context("fork").Process(target=self._run, args=(policy,), daemon=True)
        self.process.start()
        wait_until(self.is_healthy, 60)

    def _run(self, policy):
        from openvla.serving.app import serve

        torch.set_num_threads(1)
        serve(policy, host=HOST, port=self.port)

    def is_healthy(self):
        try:
            return send_request(self, "GET", "/healthz").status == 200
        except OSError:
            return False


def wait_until(condition, seconds=20):
    """Wait until a condition is true; fail after some seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.005)


class Reply:
    """Status, headers and body of a reply."""

    def __init__(self, response):
        self.status, self.headers, self.body = response.status, dict(response.getheaders()), response.read()

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json["error"]


def send_request(server, method="POST", path="/act", body=None, **headers):
    """Return the reply to a request that has only the given headers; underscores in their names become hyphens."""
    connection = http.client.HTTPConnection(HOST, server.port, timeout=30)
    try:
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, data, headers, encode_chunked="Transfer-Encoding" in headers)
        return Reply(connection.getresponse())
    finally:
        connection.close()


def start_threads(*calls):
    """Start a thread for each call; return the threads and the list into which they write their results."""
    results = [None] * len(calls)

    def run(index):
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    return threads, results


def encode_array(array):
    """Return an array in json_numpy's encoding."""
    array = np.asarray(array)
    return {"__numpy__": base64.b64encode(array.tobytes()).decode(), "dtype": array.dtype.str, "shape": array.shape}


def encode_picture(image, format="PNG", **options):
    """Return an image as a picture file in base64."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def predict_directly(batched_policy, images, instruction=INSTRUCTION, state=None):
    """Return the action of the model itself, without the server."""
    policy = batched_policy.policy
    inputs = policy.processor(instruction=instruction, images=images)
    return policy.model.predict_action(**inputs, proprio=state, constrain_actions=policy.constrain_actions)


@contextlib.contextmanager
def connect_openpi(server, headers=None):
    """Yield the metadata of openpi's protocol, and a function that sends a frame and returns the reply."""
    import msgpack
    from websockets.sync.client import connect

    def pack_array(value):
        data = {b"__ndarray__": True, b"data": value.tobytes()}
        return {**data, b"dtype": value.dtype.str, b"shape": value.shape}

    def unpack_array(value):
        if b"__ndarray__" in value:
            return np.ndarray(value[b"shape"], value[b"dtype"], value[b"data"])
        return value

    with connect(f"ws://{HOST}:{server.port}", compression=None, additional_headers=headers) as websocket:

        def infer(frame):
            websocket.send(frame if isinstance(frame, (bytes, str)) else msgpack.packb(frame, default=pack_array))
            reply = websocket.recv(timeout=20)
            return reply if isinstance(reply, str) else msgpack.unpackb(reply, object_hook=unpack_array)

        yield msgpack.unpackb(websocket.recv(timeout=20)), infer


def rejected_websocket_status(server, **headers):
    """Return the HTTP status with which a WebSocket connection is rejected."""
    from websockets.exceptions import InvalidStatus

    with pytest.raises(InvalidStatus) as rejected, connect_openpi(server, headers):
        pass
    return rejected.value.response.status_code
