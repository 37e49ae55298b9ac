"""Batched inference: the same actions as unbatched, failures of single requests, details, ``/info``."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

for package in ("fastapi", "uvicorn", "msgpack", "websockets", "prometheus_client"):
    pytest.importorskip(package)

from minivla import TINY_VQ, set_random_vq  # noqa: E402
from openvla import NoActionError, Policy  # noqa: E402
from openvla.inference.batches import MIN_LOG_PROB_MARGIN  # noqa: E402
from openvla.serving.policy import BatchedPolicy  # noqa: E402
from openvla.serving.requests import parse_json_request  # noqa: E402
from openvla.tiny import build_tiny  # noqa: E402
from predictions import prefer_end_token  # noqa: E402
from servers import INSTRUCTION, LIMITS, STATE, build_policy, encode_picture, send_request  # noqa: E402


def prepare(policy, frame, instruction, **options):
    image = np.roll(frame, len(instruction)).tolist()
    body = json.dumps({"image": image, "instruction": instruction, "details": True, **options})
    return policy.prepare(parse_json_request(body.encode(), LIMITS))


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 8), (torch.bfloat16, 3)])
def test_batched_tokens_equal_unbatched_tokens(frame, dtype, count):
    policy = build_policy()
    policy.policy.model.to(dtype)
    requests = [prepare(policy, frame, f"go {index}") for index in range(count)]
    unbatched_all = [policy.predict_batch([request])[0] for request in requests]
    for selection in (slice(None), slice(0, None, 4), slice(0, 3)):
        batch, unbatched = requests[selection], unbatched_all[selection]
        batched = policy.predict_batch(batch)
        assert [prediction.output.token_ids.tolist() for prediction in batched] == [
            prediction.output.token_ids.tolist() for prediction in unbatched
        ]
        assert [prediction.output.actions.tolist() for prediction in batched] == [
            prediction.output.actions.tolist() for prediction in unbatched
        ]
        assert (
            any(prediction.batch_size == len(batch) for prediction in batched) or dtype is torch.bfloat16
        )  # all are close calls


def test_ambiguous_prediction_is_recomputed_alone(frame, monkeypatch):
    policy = build_policy()
    requests = [prepare(policy, frame, f"go {index}") for index in range(3)]
    output = policy.predict_batch(requests)[0].output
    second, first = np.sort(output.bin_probabilities, axis=-1)[:, -2:].T
    smallest_margin = np.log(first / second).min()
    for limit, recomputed in ((smallest_margin * 0.99, False), (smallest_margin * 1.01, True)):
        monkeypatch.setitem(MIN_LOG_PROB_MARGIN, torch.float32, limit)
        assert policy.predict_batch(requests)[0].recomputed is recomputed


def test_only_prompts_of_equal_length_share_a_batch(frame):
    policy = build_policy()
    one, other, longer = (prepare(policy, frame, text) for text in ("go", "on", "go on"))
    assert one.can_batch_with(other)
    assert not one.can_batch_with(longer)  # padding would change what is computed


def test_not_finite_request_does_not_fail_the_others(frame):
    policy = build_policy()
    good, bad = (prepare(policy, frame, text) for text in ("go", "on"))
    bad.inputs["pixel_values"] = bad.inputs["pixel_values"] * torch.nan
    prediction, failed = policy.predict_batch([good, bad])
    assert prediction.output.actions.tolist() == policy.predict_batch([good])[0].output.actions.tolist()
    assert isinstance(failed, NoActionError)
    assert "not finite" in str(failed)


def test_request_without_action_does_not_fail_the_others(frame):
    """One request ends the sequence at once, one predicts action tokens, two are constrained to them."""
    policy = build_policy()
    policy.policy.constrain_actions = False
    requests = [prepare(policy, frame, text) for text in ("go", "on")]
    constrained = [prepare(policy, frame, text, constrain_actions=True) for text in ("go", "on")]
    assert not requests[0].can_batch_with(constrained[0])
    prefer_end_token(policy.policy.model, requests[0].inputs)
    unbatched = [policy.predict_batch([request])[0] for request in (*requests, *constrained)]
    assert "ended the sequence after 1 of 7" in str(unbatched[0])
    batched = [*policy.predict_batch(requests), *policy.predict_batch(constrained)]
    assert [type(prediction) for prediction in batched] == [type(prediction) for prediction in unbatched]
    assert [str(prediction) for prediction in batched if isinstance(prediction, NoActionError)] == [
        str(prediction) for prediction in unbatched if isinstance(prediction, NoActionError)
    ]
    assert [prediction.output.actions.tolist() for prediction in batched[2:]] == [
        prediction.output.actions.tolist() for prediction in unbatched[2:]
    ]


def test_details(server, chunks, frame):
    body = {"image": encode_picture(frame), "instruction": INSTRUCTION, "details": True}
    details = send_request(server, body=body).json
    inputs = server.policy.policy.processor(instruction=INSTRUCTION, images=frame)
    output = server.policy.policy.model.predict_action(**inputs, return_dict=True, constrain_actions=True)
    for name in ("actions", "normalized_actions", "token_ids", "bin_probabilities", "entropy"):
        assert details[name] == output[name].tolist()
    assert details["gripper"] == output.actions[-1]
    assert details["names"][-1] == "gripper"
    assert details["unnorm_key"] == "untrained"
    assert details["latency_ms"] >= details["model_ms"] > 0
    chunk = send_request(chunks, body={**body, "image": [encode_picture(frame)] * 3, "state": STATE.tolist()}).json
    assert np.shape(chunk["actions"]) == (8, 7)
    assert chunk["gripper"] == [action[-1] for action in chunk["actions"]]
    assert chunk["token_ids"] is chunk["bin_probabilities"] is chunk["entropy"] is None


def test_info(server, chunks):
    info = send_request(server, "GET", "/info").json
    dataset = info["unnorm_keys"][info["default_unnorm_key"]]
    assert dataset["low"] == [-1.0] * 7
    assert dataset["names"][:2] == ["dx", "dy"]
    assert (info["action_dim"], info["chunk_length"], info["cameras"], info["proprio_dim"]) == (7, 1, 1, None)
    assert info["limits"]["body_bytes"] == LIMITS.body_bytes
    info = send_request(chunks, "GET", "/info").json
    assert (info["action_head"], info["chunk_length"], info["cameras"], info["proprio_dim"]) == ("l1", 8, 3, 8)
    assert info["constrain_actions"] is None
    body = {"image": [[[[0, 0, 0]] * 2] * 2] * 3, "instruction": "go", "state": STATE.tolist()}
    refused = send_request(chunks, body={**body, "constrain_actions": True})
    assert (refused.status, refused.error["field"]) == (422, "constrain_actions")
    assert send_request(chunks, body={**body, "constrain_actions": None}).status == 200
    assert info["unnorm_keys"]["lab"]["high"][0] == pytest.approx(0.5)
    assert info["limits"]["max_batch_size"] == 1  # rounding would reach a continuous head's numbers


def test_clients_of_a_tracevla_send_one_frame_or_a_frame_and_its_trace(frame):
    model, processor = build_tiny(trace_prompting=True)
    alone = Policy(model, processor, "untrained", constrain_actions=True)
    served = BatchedPolicy(alone, "tiny", LIMITS)
    traced = np.roll(frame, 5)
    requests = []
    for images in (frame.tolist(), [frame.tolist(), traced.tolist()]):
        body = json.dumps({"image": images, "instruction": "go"})
        requests.append(served.prepare(parse_json_request(body.encode(), LIMITS)))
    expected = [alone.act(frame, "go"), alone.act([Image.fromarray(frame), Image.fromarray(traced)], "go")]
    assert not np.array_equal(*expected)
    assert [served.predict_batch([request])[0].actions.tolist() for request in requests] == [
        action.tolist() for action in expected
    ]
    assert not requests[0].can_batch_with(requests[1])


def test_vq_actions_are_served_as_chunks(frame):
    policy = build_policy(**TINY_VQ)
    set_random_vq(policy.policy.model)
    info = policy.info()
    assert (info.action_dim, info.chunk_length, info.cameras, info.bin_centers) == (7, 4, 1, None)
    requests = [prepare(policy, frame, f"go {index}") for index in range(3)]
    batched = policy.predict_batch(requests)
    alone = [policy.predict_batch([request])[0] for request in requests]
    for one, other in zip(batched, alone):
        assert one.output.actions.shape == (4, 7)
        assert one.output.bin_probabilities.shape == (5, 64)
        assert np.array_equal(one.output.actions, other.output.actions)
    policy.policy.actions = "first"
    first = policy.predict_batch(requests[:1])[0].output.actions
    assert np.array_equal(first, alone[0].output.actions[0])
