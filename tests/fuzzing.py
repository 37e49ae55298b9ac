"""What random inputs are made of, and what may become of them: an answer, or an error that this package raises."""

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
from openvla.serving.client import PolicyServerError
from reference import MODULES

ASKED = int(os.environ.get("OPENVLA_FUZZ", "0"))
TOTAL = ASKED or 400
# What a user's mistake is raised as; DatasetError and RequestError are ValueErrors.
ERRORS = (ValueError, KeyError, TypeError, FileNotFoundError, PolicyServerError)


def examples(share: float):
    """Return settings for this share of all inputs: the same ones each time, unless many are asked for."""
    return settings(
        max_examples=max(1, round(TOTAL * share)),
        derandomize=not ASKED,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink] if ASKED else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def ours(error: BaseException) -> bool:
    """Return whether an error comes from a ``raise`` of this package."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    own = Path(frame.filename) in MODULES
    return (
        own
        and isinstance(error, ERRORS)
        and bool(str(error).strip())
        and linecache.getline(frame.filename, frame.lineno).lstrip().startswith("raise")
    )


def answer(function, *arguments, **keywords):
    """Return what a function answers; None where it raises an error of ours. Any other error passes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(*arguments, **keywords)
        except Exception as error:
            if ours(error):
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
    """An array of up to four small dimensions."""
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


def places(tree, path=()):
    """Yield the path of every value in a tree of dictionaries and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def mutated(draw, tree, values=json_junk):
    """A copy of a tree in which one or two values are others, or gone."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 2))):
        known = list(places(tree))
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
    """Serve on loopback, to whatever is asked, the bytes in a list of one: gives (url, list)."""
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
