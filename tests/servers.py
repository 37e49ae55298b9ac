"""Policy servers on loopback: in a thread of this process, or in a process of their own that signals can reach."""

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
GOOD = {"image": [[[0, 0, 0]] * 2] * 2, "instruction": "go"}
OFT = {**PLATFORMS["libero"], "parallel_decoding": True, "action_head": "l1", "norm_stats": {"lab": STATISTICS}}


def embedded(limits=LIMITS, **overrides):
    """A served policy whose answers a test can hold back: ``gate.clear()``."""
    from openvla.serving.policy import BatchedPolicy

    class Held(BatchedPolicy):
        gate = threading.Event()

        def predict_batch(self, requests):
            assert self.gate.wait(30)
            return super().predict_batch(requests)

    Held.gate.set()
    model, processor = build_tiny(**overrides)
    policy = Policy(model, processor, model.resolve_unnorm_key(), constrain_actions=model.config.action_head is None)
    return Held(policy, "tiny", limits)


class InThread:
    """A server in a thread: ``with InThread(served) as server``."""

    def __init__(self, served, token=None, port=0, host=HOST):
        from openvla.serving.app import build_app
        from openvla.serving.middleware import create_server

        self.served, self.app = served, build_app(served, token=token, host=host)
        self.shared = self.app.state.policy_app
        self.server = create_server(self.app, self.shared.queue, served.limits, HOST, port)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        until(lambda: self.server.started)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://{HOST}:{self.port}"
        return self

    def __exit__(self, *_):
        self.served.gate.set()
        self.server.should_exit = True
        self.thread.join(20)

    def busy(self):
        """Wait until the model has taken what is held: what comes next is not in its batch."""
        held = self.shared.queue._entries
        until(lambda: held and all(place.started for place in list(held.values())))

    def waiting(self, count):
        """Wait until so many requests are held, ready for the model."""
        held = self.shared.queue._entries
        until(lambda: sum(place.item is not None for place in list(held.values())) == len(held) == count)


class InProcess:
    """A forked server with a real end: ``kill`` it with any signal. As torch's data loaders do, it uses one thread."""

    def __init__(self, served, port=0):
        self.socket = socket.create_server((HOST, port))  # so that the port is known, and the server's own
        self.port = self.socket.getsockname()[1]
        self.url = f"http://{HOST}:{self.port}"
        self.socket.close()
        self.process = multiprocessing.get_context("fork").Process(target=self._run, args=(served,), daemon=True)
        self.process.start()
        until(lambda: self.answers(), 60)

    def _run(self, served):
        from openvla.serving.app import serve

        torch.set_num_threads(1)
        serve(served, host=HOST, port=self.port)

    def answers(self):
        try:
            return ask(self, "GET", "/healthz").status == 200
        except OSError:
            return False


def until(condition, seconds=20):
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


class Reply:
    """Status, headers and body; ``json`` is the body read."""

    def __init__(self, response):
        self.status, self.headers, self.body = response.status, dict(response.getheaders()), response.read()

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json["error"]


def ask(server, method="POST", path="/act", body=None, **headers):
    """One request as it is, with no header that was not asked for."""
    connection = http.client.HTTPConnection(HOST, server.port, timeout=30)
    try:
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, data, named, encode_chunked="Transfer-Encoding" in named)
        return Reply(connection.getresponse())
    finally:
        connection.close()


def in_threads(*calls):
    """What each call gives, all made at once."""
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


def encoded(array):
    array = np.asarray(array)
    return {"__numpy__": base64.b64encode(array.tobytes()).decode(), "dtype": array.dtype.str, "shape": array.shape}


def picture(image, form="PNG", **settings):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, form, **settings)
    return base64.b64encode(buffer.getvalue()).decode()


def expected(server, images, instruction=INSTRUCTION, state=None):
    """What the model itself says."""
    policy = getattr(server, "served", server).policy
    inputs = policy.processor(instruction=instruction, images=images)
    return policy.model.predict_action(**inputs, proprio=state, constrain_actions=policy.constrain_actions)


def openpi(server, headers=None):
    """A session of openpi's protocol: the metadata, and a function that sends a frame and gives the reply."""
    import msgpack
    from websockets.sync.client import connect

    def packed(value):
        data = {b"__ndarray__": True, b"data": value.tobytes()}
        return {**data, b"dtype": value.dtype.str, b"shape": value.shape}

    def unpacked(value):
        if b"__ndarray__" in value:
            return np.ndarray(value[b"shape"], value[b"dtype"], value[b"data"])
        return value

    @contextlib.contextmanager
    def session():
        with connect(f"ws://127.0.0.1:{server.port}", compression=None, additional_headers=headers) as socket:

            def infer(frame):
                socket.send(frame if isinstance(frame, (bytes, str)) else msgpack.packb(frame, default=packed))
                reply = socket.recv(timeout=20)
                return reply if isinstance(reply, str) else msgpack.unpackb(reply, object_hook=unpacked)

            yield msgpack.unpackb(socket.recv(timeout=20)), infer

    return session()


def refused_by_websocket(server, **headers):
    from websockets.exceptions import InvalidStatus

    with pytest.raises(InvalidStatus) as refused, openpi(server, headers):
        pass
    return refused.value.response.status_code
