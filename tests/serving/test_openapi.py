"""The policy server against its own OpenAPI document, by schemathesis."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

schemathesis = pytest.importorskip("schemathesis")
for package in ("fastapi", "uvicorn", "msgpack", "websockets", "prometheus_client"):
    pytest.importorskip(package)

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import CHECKS, load_all_checks  # noqa: E402

load_all_checks()
# What a document cannot say: that base64 is a picture, that rows are of equal length, that a state fits the model.
REPEATABLE = {"deadline": None, "derandomize": True, "database": None}
BEYOND_THE_DOCUMENT = ("positive_data_acceptance",)


def picture(size):
    buffer = io.BytesIO()
    Image.fromarray(np.full((*size, 3), 99, np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


PICTURES = st.tuples(st.integers(1, 20), st.integers(1, 20)).map(picture)
schemathesis.openapi.format("picture", PICTURES)
schemathesis.openapi.format("array", st.binary(max_size=24).map(lambda data: base64.b64encode(data).decode()))
schemathesis.openapi.format(
    "encoded-request", PICTURES.map(lambda image: json.dumps({"image": image, "instruction": "go"}))
)


@pytest.fixture(scope="module")
def document(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize(
    ("path", "method", "mode", "examples"),
    [
        ("/act", "POST", GenerationMode.POSITIVE, 25),
        ("/act", "POST", GenerationMode.NEGATIVE, 25),
        *((path, "GET", GenerationMode.POSITIVE, 1) for path in ("/info", "/healthz", "/metrics", "/")),
    ],
)
def test_the_document_is_honest(document, path, method, mode, examples):
    excluded = [CHECKS.get_one(name) for name in BEYOND_THE_DOCUMENT]
    seen = set()

    @settings(phases=[Phase.generate], max_examples=examples, suppress_health_check=list(HealthCheck), **REPEATABLE)
    @given(case=document[path][method].as_strategy(generation_mode=mode))
    def ask(case):
        seen.add(case.call_and_validate(excluded_checks=excluded).status_code)

    ask()
    assert mode is GenerationMode.NEGATIVE or 200 in seen or path == "/"
