"""The policy server's OpenAPI document: complete, and honest by schemathesis."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

schemathesis = pytest.importorskip("schemathesis")
for package in ("fastapi", "uvicorn", "msgpack", "websockets", "prometheus_client"):
    pytest.importorskip(package)

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from openvla.serving.requests import KNOWN_FIELDS, PROPRIO_FIELDS  # noqa: E402
from openvla.serving.schemas import EXAMPLE_REQUEST, OFTRequest, OpenVLARequest  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import CHECKS, load_all_checks  # noqa: E402
from servers import send_request  # noqa: E402

load_all_checks()
REPEATABLE = {"deadline": None, "derandomize": True, "database": None}
# A schema cannot require that base64 is a picture, that rows are of equal length, that a state fits the model.
EXCLUDED_CHECKS = ("positive_data_acceptance",)


def encode_picture(size):
    buffer = io.BytesIO()
    Image.fromarray(np.full((*size, 3), 99, np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


PICTURES = st.tuples(st.integers(1, 20), st.integers(1, 20)).map(encode_picture)
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
def test_replies_conform_to_the_document(document, path, method, mode, examples):
    excluded = [CHECKS.get_one(name) for name in EXCLUDED_CHECKS]
    statuses = set()

    @settings(phases=[Phase.generate], max_examples=examples, suppress_health_check=list(HealthCheck), **REPEATABLE)
    @given(case=document[path][method].as_strategy(generation_mode=mode))
    def send(case):
        statuses.add(case.call_and_validate(excluded_checks=excluded).status_code)

    send()
    assert mode is GenerationMode.NEGATIVE or 200 in statuses or path == "/"


@pytest.fixture(scope="module")
def raw_document(server):
    return send_request(server, "GET", "/openapi.json").json


def test_every_route_documents_its_errors_as_json(raw_document):
    assert set(raw_document["paths"]) == {"/act", "/info", "/healthz", "/metrics", "/"}
    for path, operations in raw_document["paths"].items():
        for operation in operations.values():
            errors = {status: reply for status, reply in operation["responses"].items() if status >= "400"}
            assert "403" in errors
            for status, reply in errors.items():
                name = "Health" if (path, status) == ("/healthz", "503") else "ErrorReply"
                schema = {"$ref": f"#/components/schemas/{name}"}
                assert reply["content"] == {"application/json": {"schema": schema}}, (path, status)


def test_every_reference_of_the_document_exists(raw_document):
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(raw_document)))
    assert {"OpenVLARequest", "OFTRequest", "DoubleEncodedRequest", "ErrorReply"} <= references
    assert references == set(raw_document["components"]["schemas"])


def test_every_object_is_closed_and_described(raw_document):
    for name, schema in raw_document["components"]["schemas"].items():
        assert schema["additionalProperties"] is False, name
        assert schema["description"], name


def test_request_models_have_the_fields_of_the_parser():
    """Synonyms are named in descriptions, and wrist cameras are fields of OpenVLA-OFT alone."""
    fields = OpenVLARequest.model_fields | OFTRequest.model_fields
    wrist_fields = {"wrist_image", "left_wrist_image", "right_wrist_image"}
    assert set(fields) - wrist_fields == set(KNOWN_FIELDS) - {"prompt", "proprio"}
    assert "`prompt`" in fields["instruction"].description
    assert "`proprio`" in fields[PROPRIO_FIELDS[0]].description


def test_example_request_is_accepted(server):
    reply = send_request(server, body=EXAMPLE_REQUEST)
    assert (reply.status, len(reply.json)) == (200, 7)
