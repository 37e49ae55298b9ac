"""Strategies for random inputs, and a call that accepts a result or an error that this package raises."""

import contextlib
import copy
import linecache
import os
import socket
import threading
import traceback
import warnings
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from openvla import OpenVLAError
from openvla.serving.client import PolicyServerError
from reference import MODULES

REQUESTED = int(os.environ.get("OPENVLA_FUZZ", "0"))
TOTAL = REQUESTED or 400
ERRORS = (OpenVLAError, PolicyServerError)


def examples(share: float):
    """Return settings for this share of all inputs: the same inputs in every run, unless OPENVLA_FUZZ sets a number."""
    return settings(
        max_examples=max(1, round(TOTAL * share)),
        derandomize=not REQUESTED,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink] if REQUESTED else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def is_user_error(error: BaseException) -> bool:
    """Return whether an error tells the user of a mistake: an OpenVLAError that this package raises."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return (
        Path(frame.filename) in MODULES
        and isinstance(error, ERRORS)
        and bool(str(error).strip())
        and linecache.getline(frame.filename, frame.lineno).lstrip().startswith("raise")
    )


def result_or_none(function, *args, **kwargs):
    """Return the result of a function; None where it raises a user error. Any other error is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if is_user_error(error):
                return None
            raise


numbers = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, 1, -1, 255, 1e308, -1e308, 5e-324]))
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20), st.binary(max_size=20))
junk = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
json_junk = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.text(max_size=20)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)
DTYPES = ["uint8", "int64", "float32", "float64", "bool", "uint16", "float16", "complex64", "U3", "S3", "O"]


@st.composite
def arrays(draw, dtypes=DTYPES):
    """Draw an array of up to four small dimensions."""
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    shape = draw(
        st.sampled_from(
            [(), (0,), (3,), (7,), (2, 7), (4, 5, 3), (4, 5, 1), (4, 5), (3, 4, 5), (4, 5, 4), (1, 4, 5, 3), (0, 5, 3)]
        )
    )
    if dtype.kind in "OUS":
        return np.full(shape, draw(scalars) if dtype.kind == "O" else "x", dtype)
    values = draw(st.lists(st.floats(width=32) if dtype.kind in "fc" else st.integers(0, 255), min_size=1, max_size=4))
    with np.errstate(all="ignore"):
        return np.resize(np.array(values, np.float64), shape).astype(dtype)


def paths(tree, path=()):
    """Yield the path of every value in a tree of dictionaries and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths(value, (*path, key))


@st.composite
def mutated(draw, tree, values=json_junk):
    """Draw a copy of a tree in which one or two values are replaced or removed."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 2))):
        known = list(paths(tree))
        if not known:
            break
        *path, last = draw(st.sampled_from(known))
        holder = tree
        for key in path:
            holder = holder[key]
        if draw(st.booleans()) and isinstance(holder, dict):
            del holder[last]
        else:
            holder[last] = draw(values)
    return tree


@contextlib.contextmanager
def raw_server():
    """Reply to every request on loopback with the bytes in a list of one; yield (url, list)."""
    replies, listener = [b""], socket.create_server(("127.0.0.1", 0))

    def serve():
        with contextlib.suppress(OSError):  # closed at the end
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(65536)
                    connection.sendall(replies[0])
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):
                        pass

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", replies
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
