"""A policy as the server holds it: batches that answer as each row alone, details, what is told of the model."""

import json

import numpy as np
import pytest
import torch

for package in ("fastapi", "uvicorn", "msgpack", "websockets", "prometheus_client"):
    pytest.importorskip(package)

from openvla import NoActionError  # noqa: E402
from openvla.serving import policy as served_policy  # noqa: E402
from openvla.serving.requests import parse_json_request  # noqa: E402
from servers import INSTRUCTION, LIMITS, STATE, ask, embedded, picture  # noqa: E402
from ways import ends_at_once  # noqa: E402


def prepared(served, frame, instruction, **options):
    image = np.roll(frame, len(instruction)).tolist()
    body = json.dumps({"image": image, "instruction": instruction, "details": True, **options})
    return served.prepare(parse_json_request(body.encode(), LIMITS))


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 8), (torch.bfloat16, 3)])
def test_a_batch_has_the_tokens_of_each_row_alone(frame, dtype, count):
    served = embedded()
    served.policy.model.to(dtype)
    rows = [prepared(served, frame, f"go {index}") for index in range(count)]
    alone_of_all = [served.predict_batch([row])[0] for row in rows]
    for some in (slice(None), slice(0, None, 4), slice(0, 3)):
        batch, alone = rows[some], alone_of_all[some]
        together = served.predict_batch(batch)
        assert [answer.output.token_ids.tolist() for answer in together] == [
            answer.output.token_ids.tolist() for answer in alone
        ]
        assert [answer.output.actions.tolist() for answer in together] == [
            answer.output.actions.tolist() for answer in alone
        ]
        assert (
            any(answer.batch_size == len(batch) for answer in together) or dtype is torch.bfloat16
        )  # all are close calls


def test_a_close_call_is_answered_again_alone(frame, monkeypatch):
    served = embedded()
    rows = [prepared(served, frame, f"go {index}") for index in range(3)]
    output = served.predict_batch(rows)[0].output
    second, first = np.sort(output.bin_probabilities, axis=-1)[:, -2:].T
    closest = np.log(first / second).min()
    for limit, recomputed in ((closest * 0.99, False), (closest * 1.01, True)):
        monkeypatch.setitem(served_policy.MIN_LOG_PROB_MARGIN, torch.float32, limit)
        assert served.predict_batch(rows)[0].recomputed is recomputed


def test_only_prompts_of_one_length_share_a_batch(frame):
    served = embedded()
    one, other, longer = (prepared(served, frame, text) for text in ("go", "on", "go on"))
    assert one.can_batch_with(other)
    assert not one.can_batch_with(longer)  # padding would change what is computed


def test_one_bad_row_does_not_hurt_the_others(frame):
    served = embedded()
    good, bad = (prepared(served, frame, text) for text in ("go", "on"))
    bad.inputs["pixel_values"] = bad.inputs["pixel_values"] * torch.nan
    answer, failed = served.predict_batch([good, bad])
    assert answer.output.actions.tolist() == served.predict_batch([good])[0].output.actions.tolist()
    assert isinstance(failed, NoActionError)
    assert "not finite" in str(failed)


def test_a_row_of_no_action_does_not_hurt_the_others(frame):
    """A batch, unconstrained, of the row that ends at once, one of action tokens, and one that asks for them."""
    served = embedded()
    served.policy.constrain_actions = False
    rows = [prepared(served, frame, text) for text in ("go", "on")]
    constrained = [prepared(served, frame, text, constrain_actions=True) for text in ("go", "on")]
    assert not rows[0].can_batch_with(constrained[0])
    ends_at_once(served.policy.model, rows[0].inputs)
    alone = [served.predict_batch([row])[0] for row in (*rows, *constrained)]
    assert "ended the sequence after 1 of 7" in str(alone[0])
    together = [*served.predict_batch(rows), *served.predict_batch(constrained)]
    assert [type(answer) for answer in together] == [type(answer) for answer in alone]
    assert [str(answer) for answer in together if isinstance(answer, NoActionError)] == [
        str(answer) for answer in alone if isinstance(answer, NoActionError)
    ]
    assert [answer.output.actions.tolist() for answer in together[2:]] == [
        answer.output.actions.tolist() for answer in alone[2:]
    ]


def test_details(server, chunks, frame):
    body = {"image": picture(frame), "instruction": INSTRUCTION, "details": True}
    details = ask(server, body=body).json
    inputs = server.served.policy.processor(instruction=INSTRUCTION, images=frame)
    output = server.served.policy.model.predict_action(**inputs, return_dict=True, constrain_actions=True)
    for name in ("actions", "normalized_actions", "token_ids", "bin_probabilities", "entropy"):
        assert details[name] == output[name].tolist()
    assert details["gripper"] == output.actions[-1]
    assert details["names"][-1] == "gripper"
    assert details["unnorm_key"] == "untrained"
    assert details["latency_ms"] >= details["model_ms"] > 0
    chunk = ask(chunks, body={**body, "image": [picture(frame)] * 3, "state": STATE.tolist()}).json
    assert np.shape(chunk["actions"]) == (8, 7)
    assert chunk["gripper"] == [action[-1] for action in chunk["actions"]]
    assert chunk["token_ids"] is chunk["bin_probabilities"] is chunk["entropy"] is None


def test_info(server, chunks):
    info = ask(server, "GET", "/info").json
    dataset = info["unnorm_keys"][info["default_unnorm_key"]]
    assert dataset["low"] == [-1.0] * 7
    assert dataset["names"][:2] == ["dx", "dy"]
    assert (info["action_dim"], info["chunk_length"], info["cameras"], info["proprio_dim"]) == (7, 1, 1, None)
    assert info["limits"]["body_bytes"] == LIMITS.body_bytes
    info = ask(chunks, "GET", "/info").json
    assert (info["answer"], info["chunk_length"], info["cameras"], info["proprio_dim"]) == ("l1", 8, 3, 8)
    assert info["constrain_actions"] is None
    body = {"image": [[[[0, 0, 0]] * 2] * 2] * 3, "instruction": "go", "state": STATE.tolist()}
    refused = ask(chunks, body={**body, "constrain_actions": True})
    assert (refused.status, refused.error["field"]) == (422, "constrain_actions")
    assert ask(chunks, body={**body, "constrain_actions": None}).status == 200
    assert info["unnorm_keys"]["lab"]["high"][0] == pytest.approx(0.5)
    assert info["limits"]["max_batch_size"] == 1  # rounding would reach a continuous head's numbers
