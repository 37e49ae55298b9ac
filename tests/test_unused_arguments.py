"""Every argument is used, or refused with a message that names it and says what to do."""

import ast
import inspect

import numpy as np
import openvla
import pytest
import torch
from openvla import OpenVLAForActionPrediction, load_policy
from openvla.adapters.lora import SAVE_KEYWORDS
from openvla.adapters.parallel_decoding import set_action_config
from openvla.conversion.hub_upload import push_to_hub
from openvla.data.torch_dataset import TorchDatasetReader
from openvla.tiny import build_tiny
from openvla.training.collator import ActionCollator
from reference import MODULES, module_name

# Parameters of callbacks that others call: an ASGI server's lifespan, a signal handler.
NOT_READ = {"serving.app.PolicyApp.lifespan": {"app"}, "serving.app.build_app.handle_http_error": {"request"}}
NOT_READ |= {"serving.middleware.DrainingServer.handle_exit": {"frame"}}
NOT_READ |= {"benchmarking.reference.preprocessing_stages.preprocess": {"_"}}  # a stage takes an index of an input
NOT_READ |= {"data.torch_dataset.TorchDatasetReader.digest": {"times"}}  # data in memory has no files


def functions(node, owner):
    """Yield name and node of every function below a node; methods of a Protocol have no body and are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef) and any(getattr(base, "id", "") == "Protocol" for base in child.bases):
            continue
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = f"{owner}.{child.name}"
            if not isinstance(child, ast.ClassDef):
                yield name, child
            yield from functions(child, name)


def unread(function):
    """Return the names of parameters that the body does not read."""
    arguments = function.args
    names = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    names += [argument.arg for argument in (arguments.vararg, arguments.kwarg) if argument]
    read = {node.id for part in function.body for node in ast.walk(part) if isinstance(node, ast.Name)}
    return set(names) - read - {"self", "cls"}


def test_unread_parameters_are_detected():
    tree = ast.parse("class A:\n    def f(self, a, *b, c=1, **d):\n        return a")
    assert [(name, unread(function)) for name, function in functions(tree, "m")] == [("m.A.f", {"b", "c", "d"})]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_every_parameter_is_read(path):
    for name, function in functions(ast.parse(path.read_text(encoding="utf-8")), module_name(path).replace("/", ".")):
        abstract = any(getattr(decorator, "id", "") == "abstractmethod" for decorator in function.decorator_list)
        private = function.name.startswith("_") and function.name not in ("__init__", "__call__")
        if not abstract and not private:
            assert unread(function) == NOT_READ.get(name, set()), name


@pytest.fixture(scope="module")
def inputs(tiny, frames):
    return tiny.processor(instruction="open the drawer", images=frames["noise"])


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    tiny.model.save_pretrained(path)
    tiny.processor.save_pretrained(path)
    return path


# Every public callable with **kwargs: a call with an unknown keyword, or the reason why that is not refused.
CALLS = {
    "AutoModelForVision2Seq.from_config": lambda t, folder: openvla.AutoModelForVision2Seq.from_config(
        t.model.config, no=1
    ),
    "AutoModelForVision2Seq.from_pretrained": lambda t, folder: openvla.AutoModelForVision2Seq.from_pretrained(
        folder, no=1
    ),
    "OpenVLAForActionPrediction.from_pretrained": lambda t, folder: OpenVLAForActionPrediction.from_pretrained(
        folder, no=1
    ),
    "PrismaticPreTrainedModel.from_pretrained": lambda t, folder: OpenVLAForActionPrediction.from_pretrained(
        folder, no=1
    ),
    "enable_parallel_decoding": lambda t, folder: t.model.enable_parallel_decoding(no=1),
    "load_lora": lambda t, folder: t.model.load_lora(folder, trainabel=True),
    "OpenVLAForActionPrediction.generate": lambda t, folder: t.model.generate(**t.inputs, no=1),
    "PrismaticForConditionalGeneration.generate": lambda t, folder: t.model.generate(**t.inputs, no=1),
    "OpenVLAForActionPrediction.predict_action": lambda t, folder: t.model.predict_action(**t.inputs, no=1),
    "PushToHub.push_to_hub": lambda t, folder: t.model.push_to_hub("me/robot", no=1),
    "push_to_hub": lambda t, folder: push_to_hub(t.processor, "me/robot", no=1),
    "PrismaticForConditionalGeneration.resize_token_embeddings": lambda t, folder: t.model.resize_token_embeddings(
        9, no=1
    ),
    "state_dict": lambda t, folder: t.model.state_dict(no=1),
    "to": lambda t, folder: t.model.to("cpu", no=1),
    "OpenVLAImageProcessor.__call__": lambda t, folder: t.processor.image_processor(
        np.zeros((8, 8, 3), np.uint8), no=1
    ),
    "OpenVLAConfig.__init__": "transformers keeps fields of a configuration that it does not know",
    "PrismaticConfig.__init__": "as OpenVLAConfig's",
    "OpenVLAImageProcessor.__init__": "as OpenVLAConfig's",
    "AutoProcessor.from_pretrained": "transformers hands keywords to processor and tokenizer, which keep unknown ones",
    "OpenVLAProcessor.from_pretrained": "as AutoProcessor's",
    "OpenVLAForActionPrediction.save_pretrained": "transformers' own, but for adapters (below)",
    "PrismaticPreTrainedModel.save_pretrained": "transformers' own",
    "OpenVLAImageProcessor.save_pretrained": "transformers' own",
    "OpenVLAProcessor.save_pretrained": "transformers' own, or push_to_hub's",
    "OpenVLAProcessor.batch_decode": "the tokenizer's own",
    "OpenVLAProcessor.decode": "the tokenizer's own",
}


def public_callables():
    """Yield functions and methods of this package that its public names reach."""
    for name in openvla.__all__:
        public = getattr(openvla, name)
        members = [inspect.getattr_static(public, member) for member in dir(public)]
        for function in members if inspect.isclass(public) else [public]:
            function = getattr(function, "__func__", function)
            is_ours = inspect.isfunction(function) and function.__module__.startswith("openvla")
            if is_ours and (not function.__name__.startswith("_") or function.__name__ in ("__init__", "__call__")):
                yield function


def test_every_public_callable_with_kwargs_is_listed():
    names = set()
    for function in public_callables():
        if any(
            parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(function).parameters.values()
        ):
            names.add(function.__qualname__)
    assert names == set(CALLS)


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if callable(call)])
def test_unknown_keyword_is_refused(name, tiny, inputs, folder):
    tiny.inputs = inputs
    with pytest.raises((TypeError, ValueError), match=r"\bno\b|trainabel"):
        CALLS[name](tiny, folder)


def test_unknown_field_of_the_action_config_is_refused(tiny):
    with pytest.raises(ValueError, match="Unknown field 'no'"):
        set_action_config(tiny.model.config, no=1)


ZEROS = [0.0] * 7


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"draft": ZEROS, "fast": False}, "draft has no effect on this call: fast is False. Leave draft out"),
        ({"draft": ZEROS, "use_cache": False}, "draft has no effect on this call: .* without a cache"),
        ({"draft": ZEROS, "do_sample": True}, "draft has no effect on this call: tokens are sampled"),
        ({"draft": ZEROS, "num_beams": 2}, "draft has no effect on this call: tokens are sampled, searched"),
        ({"fast": True, "do_sample": True}, "fast=True has no effect on this call"),
        ({"fast": True, "use_cache": False}, "fast=True has no effect on this call"),
        ({"generator": torch.Generator()}, "generator: only for a diffusion head"),
        ({"num_inference_steps": 3}, "num_inference_steps: only for a diffusion head"),
        ({"proprio": ZEROS}, "trained without proprio; leave it out"),
        ({"max_new_tokens": 7}, "leave out max_new_tokens"),
    ],
)
def test_unused_arguments_of_token_by_token_prediction(kwargs, message, tiny, inputs):
    with pytest.raises(ValueError, match=message):
        tiny.model.eval().predict_action(**inputs, constrain_actions=True, **kwargs)


def test_draft_is_refused_in_training_mode(inputs):
    model, _ = build_tiny()
    with pytest.raises(ValueError, match="draft has no effect on this call: the model is in training mode"):
        model.train().predict_action(**inputs, constrain_actions=True, draft=ZEROS)


@pytest.fixture(scope="module")
def parallel(frames):
    """Return by action head: a model, its inputs for prediction, and a training batch."""
    by_head = {}
    for head in (None, "l1", "diffusion"):
        answer = {"action_dim": 7, "chunk_length": 2, "parallel_decoding": True, "action_head": head}
        model, processor = build_tiny(**answer)
        steps = [{"image": frames["noise"], "action": np.full(7, 0.1 * i), "episode_index": 0} for i in range(3)]
        fields = {"cameras": ["image"], "action": ["action"], "instruction_text": "go"}
        key = next(iter(model.norm_stats))
        step = TorchDatasetReader(steps, key, fields)[0].step(0, 2)
        batch = ActionCollator(processor, model)([step])
        assert ("actions" in batch) == (head is not None)
        by_head[head] = model.eval(), processor(instruction="go", images=frames["noise"]), batch
    return by_head


HEADS = (None, "l1", "diffusion")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"draft": ZEROS}, "draft is for a model that predicts token by token; leave it out"),
        ({"eos_token_id": 2}, "in one pass, without eos_token_id"),
        ({"do_sample": True}, "in one pass, without do_sample"),
        ({"no": 1}, "in one pass, without no"),
    ],
)
def test_unused_arguments_of_parallel_prediction(head, kwargs, message, parallel):
    model, inputs, _ = parallel[head]
    with pytest.raises(ValueError, match=message):
        model.predict_action(**inputs, **kwargs)


@pytest.mark.parametrize("head", ["l1", "diffusion"])
def test_constrain_actions_is_refused_with_a_continuous_head(head, parallel):
    model, inputs, _ = parallel[head]
    with pytest.raises(ValueError, match="constrain_actions is for models that predict tokens, not for action_head"):
        model.predict_action(**inputs, constrain_actions=True)


def test_generator_is_refused_with_given_noise(parallel):
    model, inputs, batch = parallel["diffusion"]
    with pytest.raises(ValueError, match="noise is given, so nothing is drawn from the generator"):
        model.predict_action(**inputs, noise=torch.zeros(2, 7), generator=torch.Generator())
    drawn = {"noise": torch.zeros(1, 2, 7), "timesteps": torch.zeros(1, dtype=torch.long)}
    with pytest.raises(ValueError, match="so nothing is drawn from the generator; leave it out"):
        model(**batch, **drawn, generator=torch.Generator())
    assert model(**batch, noise=drawn["noise"], generator=torch.Generator()).loss.isfinite()


FLAGS = ("use_cache", "output_attentions", "output_hidden_states", "output_projector_features")


@pytest.mark.parametrize("head", HEADS)
def test_unused_arguments_of_parallel_forward(head, parallel):
    model, _, batch = parallel[head]
    refused = {name: True for name in FLAGS} | {"logits_at_labels": False, "position_ids": torch.zeros(1, 1)}
    refused |= {name: torch.zeros(1) for name in ("inputs_embeds", "past_key_values", "cache")}
    for name, value in refused.items():
        with pytest.raises(ValueError, match=f"forward takes no {name}.*; leave it out"):
            model(**batch, **{name: value})
    unused = {"actions": torch.zeros(1, 2, 7)} if head is None else {}
    if head != "diffusion":
        unused |= {"noise": torch.zeros(1, 2, 7), "timesteps": torch.zeros(1), "generator": torch.Generator()}
    for name, value in unused.items():
        with pytest.raises(ValueError, match=f"{name}: not used by a model whose action_head is {head!r}"):
            model(**{**batch, name: value})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        output = model(**batch, **dict.fromkeys(FLAGS, False), logits_at_labels=True, return_dict=True)
        torch.manual_seed(0)
        as_tuple = model(**batch, **dict.fromkeys(FLAGS), return_dict=False)
    assert isinstance(as_tuple, tuple)
    for actual, expected in zip(as_tuple, output.to_tuple(), strict=True):
        assert torch.equal(actual, expected)


def test_unused_arguments_of_token_by_token_forward(tiny):
    ids = torch.tensor([[1, 5, 6]])
    for name in ("actions", "proprio", "noise", "timesteps", "generator"):
        value = torch.Generator() if name == "generator" else torch.zeros(1)
        with pytest.raises(ValueError, match=f"predicts one action in tokens and takes no {name}; leave it out"):
            tiny.model(ids, **{name: value})
    for name in FLAGS[:3]:
        with pytest.raises(ValueError, match=f"logits_at_labels gives loss and logits alone; .*{name}"):
            tiny.model(ids, labels=ids, logits_at_labels=True, **{name: True})
    output = tiny.model(ids, labels=ids, logits_at_labels=True)
    loss, logits = tiny.model(ids, labels=ids, logits_at_labels=True, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)


@pytest.mark.parametrize("training", [True, False])
def test_use_cache_returns_a_cache(training, inputs):
    from openvla.compatibility_openvla import cache_of, cached_length

    model, _ = build_tiny()
    output = model.train(training)(**inputs, use_cache=True)
    assert cached_length(cache_of(output)) == output.logits.shape[1]
    assert cache_of(model(**inputs, use_cache=False)) is None


def test_generate_refuses_two_lengths(tiny, inputs):
    with pytest.raises(ValueError, match="max_length and max_new_tokens say the same; give one of them"):
        tiny.model.generate(**inputs, max_length=400, max_new_tokens=3)


def test_enable_parallel_decoding_refuses_false():
    model, _ = build_tiny()
    with pytest.raises(ValueError, match="leave parallel_decoding out"):
        model.enable_parallel_decoding(action_dim=7, parallel_decoding=False)
    assert not model.config.parallel_decoding


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"instruction": "go", "truncation": True}, "an instruction is never cut; leave truncation out"),
        ({"instruction": "go", "padding": "max_length"}, "padding='max_length' needs max_length"),
        ({"text": "In: go", "images": None, "device": "cpu"}, "there are no images; leave it out"),
        (
            {"instruction": "go", "device": "cpu", "return_tensors": "np"},
            "device gives torch tensors, not return_tensors",
        ),
    ],
)
def test_unused_arguments_of_the_processor(kwargs, message, tiny, frames):
    with pytest.raises(ValueError, match=message):
        tiny.processor(**{"images": frames["noise"], **kwargs})


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"organization": "lab"},
            TypeError,
            r"takes no organization. Give an organization in repo_id \('organization/",
        ),
        ({"use_auth_token": "hf_"}, TypeError, "takes no use_auth_token. .* a token as token"),
        ({"use_temp_dir": False}, ValueError, "use_temp_dir=False would leave a folder here"),
        ({"safe_serialization": False}, ValueError, "would upload a pickle"),
    ],
)
@pytest.mark.parametrize("part", ["model", "processor"])
def test_unused_arguments_of_push_to_hub(part, kwargs, error, message, tiny):
    with pytest.raises(error, match=message):
        getattr(tiny, part).push_to_hub("me/robot", **kwargs)


def test_unused_arguments_of_saving_an_adapter(tmp_path):
    pytest.importorskip("peft")
    model, _ = build_tiny()
    model.enable_lora(r=2)
    refused = {"push_to_hub": True, "safe_serialization": False, "variant": "fp16", "save_peft_format": False}
    for name, value in refused.items():
        with pytest.raises(
            ValueError, match=f"{name}={value!r} has no effect on a model with an adapter; leave it out"
        ):
            model.save_pretrained(tmp_path, **{name: value})
    with pytest.raises(TypeError, match="save_pretrained takes no no; allowed"):
        model.save_pretrained(tmp_path, no=1)
    assert not list(tmp_path.iterdir())
    allowed = {"safe_serialization": True, "push_to_hub": False, "max_shard_size": "5GB", "save_function": torch.save}
    assert set(allowed) < set(SAVE_KEYWORDS)  # what transformers' trainer and accelerate pass
    model.save_pretrained(tmp_path, state_dict=model.state_dict(), **allowed)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_load_policy_refuses_constrain_actions_with_a_continuous_head(folder, tmp_path):
    model, processor = build_tiny(action_dim=7, chunk_length=2, parallel_decoding=True, action_head="l1")
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="constrain_actions is for models that predict tokens, not for action_head 'l1'"
    ):
        load_policy(tmp_path, device="cpu", constrain_actions=True)
    assert load_policy(folder, device="cpu", constrain_actions=True).constrain_actions
