"""Request and response models of the policy server, from which FastAPI makes ``/openapi.json``.

Replies are built from these models. Requests are parsed by ``requests.py``, whose error messages name the field and
what is allowed; the request models describe what it accepts.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict
from pydantic.json_schema import JsonSchemaMode, SkipJsonSchema, models_json_schema

from .cli import Limits
from .requests import MAX_ARRAY_DIMENSIONS, MAX_CAMERAS, MAX_DEADLINE_MS, MAX_STEP, MAX_TEXT_CHARACTERS, NUMERIC_DTYPE

EXAMPLE_PNG = (  # one grey pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGOoBwAAgQCAsiZnOwAAAABJRU5ErkJggg=="
)
EXAMPLE_REQUEST: JsonDict = {"image": EXAMPLE_PNG, "instruction": "pick up the red block"}


class Schema(BaseModel):
    """An object that has no fields other than the declared ones."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())  # model_ms is a field


# --- values -----------------------------------------------------------------------------------------------------------


class EncodedArray(Schema):
    """An array in json_numpy's encoding."""

    data: str = Field(
        alias="__numpy__", description="Bytes of the array in C order, base64.", json_schema_extra={"format": "array"}
    )
    dtype: str = Field(pattern=f"^{NUMERIC_DTYPE}$", description="numpy's name of a numeric dtype.", examples=["<f8"])
    shape: list[Annotated[int, Field(ge=0)]] = Field(
        max_length=MAX_ARRAY_DIMENSIONS, description="Length of every axis.", examples=[[7]]
    )


Picture = Annotated[
    str,
    Field(description="A PNG or JPEG in base64, or a data: URL of one.", json_schema_extra={"format": "picture"}),
]
Byte = Annotated[int, Field(ge=0, le=255)]
Pixel = Byte | Annotated[list[Byte], Field(min_length=1, max_length=4)]
Pixels = Annotated[
    list[Annotated[list[Pixel], Field(min_length=1)]],
    Field(min_length=1, description="Rows of pixels, all rows of the same length."),
]
CameraImage = Picture | Pixels | EncodedArray
Image = CameraImage | Annotated[list[CameraImage], Field(min_length=1, max_length=MAX_CAMERAS)]
ShortText = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARACTERS)]
Action = list[float]
ActionOrChunk = Action | list[Action]


# --- POST /act --------------------------------------------------------------------------------------------------------


class RequestOptions(Schema):
    """Fields that every format of ``POST /act`` has."""

    instruction: str = Field(
        min_length=1,
        max_length=Limits.instruction_characters,
        pattern=r"\S",
        description="What the robot should do; the server puts it into the prompt. Also accepted as `prompt`.",
    )
    state: Annotated[list[float], Field(min_length=1)] | EncodedArray | None = Field(
        default=None,
        description="The robot's state (proprioception) in its own units, for models trained with it. Also accepted as "
        "`proprio`.",
    )
    unnorm_key: ShortText | None = Field(
        default=None, description="Dataset whose statistics un-normalise the action; see /info for the known ones."
    )
    details: bool = Field(
        default=False, description="Reply with an object: action tokens, bin probabilities, entropy, ..."
    )
    constrain_actions: bool | None = Field(
        default=None, description="Choose among action tokens only; the default is the server's, see /info."
    )
    client_id: ShortText | None = Field(default=None, description="Name of the client that sends the frame.")
    latest_only: bool = Field(
        default=False,
        description="Drop this request (409) when a newer one of the same client_id arrives before it is started.",
    )
    session: ShortText | None = Field(
        default=None,
        description="Name of a session, whose earlier images the server keeps, for models that need them; with `step`.",
    )
    step: Annotated[int, Field(ge=0, le=MAX_STEP)] | None = Field(
        default=None,
        description="Number of this frame in the session's episode; 0 begins an episode. A frame that is sent again "
        "has its old number.",
    )
    traced_image: bool = Field(
        default=False, description="With `details`: reply with the image that a TraceVLA was given with its trace, too."
    )
    deadline_ms: Annotated[float, Field(gt=0, lt=MAX_DEADLINE_MS)] | None = Field(
        default=None, description="Milliseconds from arrival to reply, at most the server's timeout_s; later is a 504."
    )


def _remove_default(schema: dict[str, Any]) -> None:
    """Remove the default null from the schema of a field that may be left out but not be null."""
    del schema["default"]


class OpenVLARequest(RequestOptions):
    """Request of a client of OpenVLA's server, or of one that sends plain JSON."""

    model_config = ConfigDict(title="OpenVLA", json_schema_extra={"examples": [EXAMPLE_REQUEST]})

    image: Image = Field(description="The camera image, or a list with the images of several cameras.")


class OFTRequest(RequestOptions):
    """Request of a client of OpenVLA-OFT's server; the reply is a list of actions.

    Every field with `wrist` in its name is a camera image, in the order sent.
    """

    model_config = ConfigDict(title="OpenVLA-OFT")

    full_image: Image = Field(description="The main camera's image.")
    wrist_image: Image | SkipJsonSchema[None] = Field(default=None, json_schema_extra=_remove_default)
    left_wrist_image: Image | SkipJsonSchema[None] = Field(default=None, json_schema_extra=_remove_default)
    right_wrist_image: Image | SkipJsonSchema[None] = Field(default=None, json_schema_extra=_remove_default)


class DoubleEncodedRequest(Schema):
    """Another request as JSON in a string; the reply is JSON in a string too."""

    model_config = ConfigDict(title="Double-encoded")

    encoded: str = Field(description="The request as JSON.", json_schema_extra={"format": "encoded-request"})


class ActionDetails(Schema):
    """An action, or a chunk of actions, and what the model computed; null where the model has no such output."""

    actions: ActionOrChunk = Field(description="In robot units: (action_dim,) or (chunk, action_dim).")
    names: list[str] = Field(description="Name of each action dimension.")
    units: list[str] = Field(description="Unit of each action dimension.")
    normalized_actions: ActionOrChunk | None = Field(description="In [-1, 1]; a continuous head may leave this range.")
    token_ids: list[int] | list[list[int]] | None = Field(description="Predicted action tokens.")
    bin_probabilities: list[Action] | list[list[Action]] | None = Field(
        description="Softmax over the action tokens, for each action dimension."
    )
    entropy: ActionOrChunk | None = Field(description="Entropy of the bin probabilities in nats.")
    gripper: float | Action | None = Field(description="0 closed to 1 open; null if the action has no gripper.")
    unnorm_key: str = Field(description="Dataset whose statistics un-normalised the action.")
    latency_ms: float = Field(description="From the arrival of the request to its action.")
    model_ms: float = Field(description="Time of the forward pass.")
    batch: int = Field(description="Number of requests in the forward pass.")
    recomputed: bool = Field(
        description="True if a token of the batch led by less than rounding, so that the request was predicted alone."
    )
    constrain_actions: bool | None = Field(description="True if the model chose among action tokens only.")
    traced_image: str | None = Field(
        description="PNG in base64 of the frame with its trace; null if it has none, or was not asked for."
    )


ActReply = Annotated[
    Annotated[Action, Field(description="The action, for plain JSON.")]
    | Annotated[list[Action], Field(description="A chunk of actions, for plain JSON.")]
    | EncodedArray
    | Annotated[list[EncodedArray], Field(description="A list of actions, for json_numpy with full_image.")]
    | Annotated[str, Field(description="json_numpy in a string, for a double-encoded request.")]
    | ActionDetails,
    Field(description="The action or chunk of actions in the encoding of the request."),
]


class ErrorDetail(Schema):
    """An error."""

    message: str = Field(description="What was received, what is allowed, what to do.")
    field: str | None = Field(default=None, description="The request's field that is invalid, as the client named it.")
    id: str | None = Field(default=None, description="Identifies the error in the server's log.")
    code: Literal["no_action"] | None = Field(
        default=None, description='"no_action" if the model\'s output is no action; the message says why.'
    )


class ErrorReply(Schema):
    """Body of every reply that is an error."""

    error: ErrorDetail


# --- GET /info, /healthz ----------------------------------------------------------------------------------------------


class DatasetInfo(Schema):
    """Action dimensions of a dataset, and their range in robot units."""

    action_dim: int
    names: list[str] = Field(description="Name of each action dimension.")
    units: list[str] = Field(description="Unit of each action dimension.")
    low: list[float] = Field(description="Smallest action, in robot units.")
    high: list[float] = Field(description="Largest action, in robot units.")
    mask: list[bool] = Field(description="True for dimensions that are un-normalised; the others are passed through.")


class PolicyInfo(Schema):
    """The served model and the server's limits."""

    model: str = Field(description="Folder or Hub id of the checkpoint.")
    action_head: str = Field(description='"tokens", or the kind of the continuous action head.')
    constrain_actions: bool | None = Field(
        description="Default of the request field; null for a model without action tokens."
    )
    default_unnorm_key: str = Field(description="Default of the request field unnorm_key.")
    unnorm_keys: dict[str, DatasetInfo] = Field(description="Datasets whose statistics the model has.")
    action_dim: int = Field(description="Length of an action with the default unnorm_key.")
    chunk_length: int = Field(description="Number of actions in a reply.")
    cameras: int = Field(description="Number of images that a request must have, unless it belongs to a session.")
    images_per_moment: int = Field(description="Number of images of one step: what a request of a session must have.")
    history_length: int = Field(description="Number of steps whose images the model takes.")
    history_padding: str = Field(
        description='What fills an episode\'s first steps: the moment at its "start" or "end".'
    )
    trace_prompting: bool = Field(description="True for a TraceVLA, which takes a frame and the same with its trace.")
    draws_traces: bool = Field(description="True if the server draws traces, for requests of a session.")
    proprio_dim: int | None = Field(description="Length of state; null if the model takes none.")
    bin_centers: list[float] | None = Field(description="Values of the action tokens in [-1, 1].")
    image_size: list[int] = Field(description="Height and width to which images are resized.")
    image_preset: str | None = Field(description="Preprocessing before the image processor.")
    bits: int | None = Field(description="Bits of a quantised weight.")
    quantization: str | None = Field(description="Quantisation method.")
    dtype: str = Field(description="dtype of the computation.")
    device: str = Field(description="Device of the model.")
    limits: Limits = Field(description="Limits of the server.")


class Health(Schema):
    """State of the server."""

    status: Literal["ok", "draining"] = Field(description='"draining" after SIGTERM: accepts no new requests.')
    waiting: int = Field(description="Number of accepted requests without a reply.")
    model: str = Field(description="Folder or Hub id of the checkpoint.")


# --- OpenAPI ----------------------------------------------------------------------------------------------------------

REF_TEMPLATE = "#/components/schemas/{model}"
REQUEST_MODELS = (OpenVLARequest, OFTRequest, DoubleEncodedRequest)
Responses = dict[int | str, dict[str, Any]]  # FastAPI's argument: by status
ERRORS = {
    400: "The body is not JSON.",
    401: "The token is missing or wrong.",
    403: "A host name or origin that may not use this server.",
    404: "This installation has no page.",
    408: "The body arrived too slowly.",
    409: "Dropped for a newer frame of the same client; or it does not continue its session.",
    413: "The body or an image is too large.",
    422: "A field is invalid, and the error names it; or the model's output is no action (code no_action).",
    500: "The server failed; its log has the reason under the id.",
    503: "The queue is full, or the server is draining.",
    504: "Not completed before the deadline.",
}
DESCRIPTION = """Actions of a vision-language-action model: an image and an instruction in, an action out.

`POST /act` takes JSON, whatever its Content-Type: plain, or with arrays in json_numpy's encoding.

The WebSocket at `/` speaks openpi's protocol. The server first sends the content of `/info`. Each binary frame of the
client is a map with the fields of `POST /act`, also prefixed with `observation/`. The reply is a map with `actions`,
float64 (chunk, action_dim), and `server_timing`, or a text message with an error. Maps are msgpack; arrays in them are
in msgpack_numpy's encoding."""


def error_body(
    message: str, field: str | None = None, id: str | None = None, code: Literal["no_action"] | None = None
) -> dict[str, Any]:
    """Return the body of an error reply, ready for JSON."""
    return ErrorReply(error=ErrorDetail(message=message, field=field, id=id, code=code)).model_dump()


def error_responses(*statuses: int) -> Responses:
    """Return the descriptions of error replies, for a route's argument ``responses``."""
    content = {"application/json": {"schema": _reference(ErrorReply)}}
    responses: Responses = {status: {"description": ERRORS[status], "content": content} for status in statuses}
    if 503 in responses:
        responses[503]["headers"] = {"Retry-After": {"schema": {"type": "string"}, "description": "Seconds."}}
    return responses


def act_request_body() -> dict[str, Any]:
    """Return the description of the body of ``POST /act``, for a route's argument ``openapi_extra``."""
    schema = {"anyOf": [_reference(model) for model in REQUEST_MODELS]}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def add_referenced_schemas(document: dict[str, Any]) -> None:
    """Add the schemas to which ``error_responses`` and ``act_request_body`` refer to an OpenAPI document."""
    models: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "validation") for model in REQUEST_MODELS]
    models.append((ErrorReply, "serialization"))
    _, schemas = models_json_schema(models, ref_template=REF_TEMPLATE)
    document["components"]["schemas"].update(schemas["$defs"])


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REF_TEMPLATE.format(model=model.__name__)}
