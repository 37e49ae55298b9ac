"""What the policy server's OpenAPI document says of bodies and replies."""

from __future__ import annotations

from typing import Any

NUMBER, TEXT, WHOLE = {"type": "number"}, {"type": "string"}, {"type": "integer"}
NULL = {"type": "null"}


def listed(items: dict[str, Any], **bounds: int) -> dict[str, Any]:
    """An array of something."""
    return {"type": "array", "items": items, **bounds}


def either(*schemas: dict[str, Any]) -> dict[str, Any]:
    """One of several."""
    return {"anyOf": list(schemas)}


def fields(properties: dict[str, Any], required: list[str], **more: Any) -> dict[str, Any]:
    """An object with no other fields than these."""
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False, **more}


ENCODED_ARRAY = fields(
    {
        "__numpy__": {"type": "string", "format": "array", "description": "base64 of the bytes, C order"},
        "dtype": {"type": "string", "pattern": "^[<>|=]?([ui][1248]|f[248])$"},
        "shape": listed({"type": "integer", "minimum": 0}, maxItems=4),
    },
    ["__numpy__", "dtype", "shape"],
    description="An array as json_numpy writes it.",
)
BYTE = {"type": "integer", "minimum": 0, "maximum": 255}
ROWS = listed(listed(either(BYTE, listed(BYTE, minItems=1, maxItems=4)), minItems=1), minItems=1)
ONE_IMAGE = either(
    {"type": "string", "format": "picture", "description": "base64 of a PNG or JPEG, or a data: URL of one"},
    {**ROWS, "description": "rows of pixels of equal length"},
    ENCODED_ARRAY,
)
IMAGE = either(ONE_IMAGE, listed(ONE_IMAGE, minItems=1, maxItems=16))
INSTRUCTION = {"type": "string", "minLength": 1, "maxLength": 1000, "pattern": "\\S"}
STATE = either(listed(NUMBER, minItems=1), ENCODED_ARRAY, NULL)
FLAG = {"type": "boolean", "default": False}
KEY = either({"type": "string", "minLength": 1, "maxLength": 200}, NULL)
OPTIONS = {
    "unnorm_key": {**KEY, "description": "whose statistics give robot units; see /info"},
    "details": {**FLAG, "description": "answer with an object: bins, entropy and so on"},
    "constrain_actions": either(
        {"type": "boolean", "description": "choose among action tokens only; left out, the server's own, see /info"},
        NULL,
    ),
    "client_id": {**KEY, "description": "whose frame it is"},
    "latest_only": {
        **FLAG,
        "description": "drop this frame (409) when a newer one of client_id arrives before its turn",
    },
    "deadline_ms": either({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e9}, NULL),
}
ACT_REQUEST = either(
    fields(
        {"image": IMAGE, "instruction": INSTRUCTION, "state": STATE, **OPTIONS},
        ["image", "instruction"],
        title="OpenVLA",
    ),
    fields(
        {
            "full_image": IMAGE,
            "wrist_image": IMAGE,
            "left_wrist_image": IMAGE,
            "right_wrist_image": IMAGE,
            "state": STATE,
            "instruction": INSTRUCTION,
            **OPTIONS,
        },
        ["full_image", "instruction"],
        title="OpenVLA-OFT: the reply is a list of actions",
    ),
    fields({"encoded": {"type": "string", "format": "encoded-request"}}, ["encoded"], title="one of these as a string"),
)

ACTION = listed(NUMBER)
PER_ACTION = either(ACTION, listed(ACTION))
DETAILS = fields(
    {
        "actions": PER_ACTION,
        "names": listed(TEXT),
        "units": listed(TEXT),
        "normalized_actions": PER_ACTION,
        "token_ids": either(listed(WHOLE), listed(listed(WHOLE)), NULL),
        "bin_probabilities": either(listed(ACTION), listed(listed(ACTION)), NULL),
        "entropy": either(PER_ACTION, NULL),
        "gripper": either(NUMBER, ACTION, NULL),
        "unnorm_key": TEXT,
        "latency_ms": NUMBER,
        "model_ms": NUMBER,
        "batch": WHOLE,
        "answered_again": {"type": "boolean"},
        "constrain_actions": either({"type": "boolean"}, NULL),
    },
    ["actions", "names", "units", "gripper", "unnorm_key", "latency_ms"],
)
ACT_REPLY = either(
    {**ACTION, "description": "the action, for plain JSON"},
    {**listed(ACTION), "description": "a chunk of actions"},
    ENCODED_ARRAY,
    {**listed(ENCODED_ARRAY), "description": "a chunk, for json_numpy with full_image"},
    {**TEXT, "description": "json_numpy in a string, for {encoded}"},
    DETAILS,
)
CODE = {"enum": ["no_action"], "description": "what the model gave is no action; the message says why"}
ERROR = fields(
    {
        "error": fields(
            {"message": TEXT, "field": either(TEXT, NULL), "id": either(TEXT, NULL), "code": either(CODE, NULL)},
            ["message"],
        )
    },
    ["error"],
)


def replies(**schemas: Any) -> dict[int | str, dict[str, Any]]:
    """Responses by status, ``_200=(description, schema)``."""
    return {
        int(status[1:]): {"description": description, "content": {"application/json": {"schema": schema}}}
        for status, (description, schema) in schemas.items()
    }


GUARD_ERRORS = replies(_401=("No token, or a wrong one.", ERROR), _403=("A page or host name that may not ask.", ERROR))
AGAIN = {"Retry-After": {"schema": {"type": "string"}, "description": "seconds"}}
ACT = {
    "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": ACT_REQUEST}}}},
    "responses": {
        **replies(
            _200=("The action, in the encoding of the request.", ACT_REPLY),
            _400=("The body is no JSON.", ERROR),
            _408=("The body came too slowly.", ERROR),
            _409=("Dropped for a newer frame of the same client.", ERROR),
            _413=("The body or an image is too large.", ERROR),
            _422=("A field is wrong, and the error names it; or the model gave no action: code no_action.", ERROR),
            _500=("The server failed; the log says why under the id.", ERROR),
            _503=("Too many are waiting, or the server is draining.", ERROR),
            _504=("Not answered within the deadline.", ERROR),
        ),
        **GUARD_ERRORS,
    },
}
ACT["responses"][503]["headers"] = AGAIN
INFO = {"responses": {**replies(_200=("The model and what the server takes.", {"type": "object"})), **GUARD_ERRORS}}
HEALTH = fields({"status": {"enum": ["ok", "draining"]}, "waiting": WHOLE, "model": TEXT}, ["status", "waiting"])
HEALTHZ = {
    "responses": {
        **replies(_200=("It serves.", HEALTH), _503=("It answers what it has and takes nothing new.", HEALTH)),
        403: GUARD_ERRORS[403],
    }
}
PLAIN = {"text/plain": {"schema": TEXT}}
METRICS = {"responses": {200: {"description": "For Prometheus.", "content": PLAIN}, **GUARD_ERRORS}}
PAGE = {
    "responses": {
        200: {"description": "A page to try the model by hand.", "content": {"text/html": {"schema": TEXT}}},
        403: GUARD_ERRORS[403],
        **replies(_404=("This build has no page.", ERROR)),
    }
}
