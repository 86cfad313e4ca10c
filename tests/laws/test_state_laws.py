"""A model with adapters is copied, moved, saved and resized like any other."""

import copy
import io
import pickle

import pytest
import torch
from tiny_models import CONFIGS, DECODERS, GENERATORS, METHODS, adapted, disturb, inputs, output, plain, rows_of, run

import adapters
from adapters import AdapterConfig, Average, BatchSplit, Fuse, Stack

USED = ("lora", "double_seq_bn", "adapter_plus", "prefix_tuning", "unipelt")
CHILDREN = (Stack("double_seq_bn", "unipelt"), Average("lora", "prefix_tuning"), "adapter_plus")
SETUP = BatchSplit(*CHILDREN, batch_sizes=[1, 2, 1])
each_model = pytest.mark.parametrize("name", CONFIGS)


def working(name: str, head: bool = False):
    """A model with adapters of several methods, all of them active."""
    model = adapted(name, *USED, head=head)
    model.set_active_adapters(SETUP)
    return model


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each_model
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_is_a_model_of_its_own(name: str, copied) -> None:
    model, batch = working(name), inputs(name)
    before = output(model, batch)
    other = copied(model)
    assert type(other) is type(model)
    assert list(other.state_dict()) == list(model.state_dict())
    assert torch.equal(output(other, batch), before)
    disturb(other, "lora")
    assert not torch.equal(output(other, batch), before)
    other.set_active_adapters(None)
    for adapter in USED:
        other.delete_adapter(adapter)
    assert torch.equal(output(other, batch), output(plain(name), batch))
    assert set(model.adapters_config) == set(USED)
    assert torch.equal(output(model, batch), before)


@each_model
def test_a_state_dict_carries_the_adapters(name: str) -> None:
    model, batch = working(name), inputs(name)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = adapted(name)
    for adapter in USED:
        other.add_adapter(adapter, METHODS[adapter])
    other.set_active_adapters(SETUP)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(output(other, batch), output(model, batch))


@each_model
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_adapters_move_with_the_model(name: str, dtype: torch.dtype) -> None:
    model, batch = working(name), inputs(name)
    single = output(model, batch)
    model.to(dtype)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    moved = output(model, batch)
    assert moved.dtype == dtype
    tolerance = {"rtol": 1e-4, "atol": 2e-5} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.25}
    torch.testing.assert_close(moved.float(), single, **tolerance)
    model.add_adapter("late", "lora")
    assert all(parameter.dtype == dtype for module in model._modules_of("late") for parameter in module.parameters())


@each_model
@pytest.mark.parametrize("method", METHODS)
def test_autocast(name: str, method: str) -> None:
    model, batch = adapted(name, method), inputs(name)
    model.set_active_adapters(method)
    full = output(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = output(model, batch)
        model(**batch)[0].float().sum().backward()
    torch.testing.assert_close(mixed.float(), full, rtol=0.1, atol=0.25)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(parameter.grad is not None for module in model._modules_of(method) for parameter in module.parameters())


@each_model
def test_save_pretrained_and_back(name: str, tmp_path) -> None:
    model, batch = working(name), inputs(name)
    for adapter in ("a", "b"):
        model.add_adapter(adapter, METHODS["seq_bn"])
    model.add_adapter_fusion(["a", "b"])
    model.save_pretrained(tmp_path)
    assert "adapters" not in model.config.to_dict()
    other = adapters.load_model(tmp_path, type(plain(name)))
    assert type(other) is type(model)
    assert set(other.adapters_config) == set(model.adapters_config)
    assert other.active_adapters is None
    saved = model.state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in other.state_dict().items())
    for setup in (None, SETUP, Fuse("a", "b")):
        torch.testing.assert_close(run(other, batch, setup), run(model, batch, setup))
    other.add_adapter("late", METHODS["prefix_tuning"], set_active=True)
    other.delete_adapter("unipelt")
    assert torch.isfinite(output(other, batch)).all()


@each_model
def test_the_base_of_a_saved_model_is_the_base(name: str, tmp_path) -> None:
    """Without the adapters' class the same folder gives the plain model."""
    working(name).save_pretrained(tmp_path)
    kind = type(plain(name))
    loaded, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(output(loaded.eval(), inputs(name)), output(plain(name), inputs(name)))


@pytest.mark.parametrize("name", GENERATORS)
def test_embeddings_are_resized_and_stay_tied(name: str) -> None:
    model, batch = working(name, head=True), inputs(name)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    before = output(model, batch)
    model.resize_token_embeddings(CONFIGS[name].vocab_size + 5, mean_resizing=False)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    after = output(model, batch)
    assert after.shape[-1] == before.shape[-1] + 5
    torch.testing.assert_close(after[..., : before.shape[-1]], before)
    copied = copy.deepcopy(model)
    assert (copied.get_input_embeddings().weight is copied.get_output_embeddings().weight) == tied


@each_model
def test_captured_hidden_states_are_those_after_the_adapters(name: str) -> None:
    """Also where the model has captured some before it got adapters."""
    model, batch = plain(name), inputs(name)
    with torch.no_grad():
        base = model(**batch, output_hidden_states=True)
        adapters.init(model)
        model.add_adapter("a", METHODS["double_seq_bn"], set_active=True)
        disturb(model, "a")
        found = model(**batch, output_hidden_states=True)
        again = model(**batch, output_hidden_states=True, output_attentions=False)
    key = "decoder_hidden_states" if name in ("t5", "bart") else "hidden_states"
    assert len(found[key]) == len(base[key]) > 1
    last = found[key][-1]
    if name not in ("vit", "t5"):
        torch.testing.assert_close(last, found[0])
    for layer in range(1, len(base[key])):
        assert (found[key][layer] - base[key][layer]).abs().max() > 1e-4, layer
    assert all(torch.equal(one, other) for one, other in zip(found[key], again[key], strict=True))


@pytest.mark.parametrize("name", ("bert", "gpt2", "t5"))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [True, False])
def test_new_modules_are_like_their_hosts(name: str, method: str, training: bool) -> None:
    model = adapted(name).to(torch.bfloat16).train(training)
    model.add_adapter("a", METHODS[method])
    modules = list(model._modules_of("a"))
    assert all(part.training == training for module in modules for part in module.modules())
    assert {parameter.dtype for module in modules for parameter in module.parameters()} == {torch.bfloat16}
    assert all(module.training == training for module in model.modules())


def test_new_modules_are_made_on_the_device_of_their_hosts() -> None:
    model = adapted("bert").to("meta")
    for method, config in METHODS.items():
        if method in ("lora", "ia3", "prefix_tuning"):  # reading sub-layers needs no weights either
            model.add_adapter(method, config)
    model.add_adapter("bottleneck", METHODS["double_seq_bn"])
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_dtype_of_the_configuration_stays() -> None:
    model, batch = adapted("llama"), inputs("llama")
    model.add_adapter("a", AdapterConfig.load("lora", dtype="bfloat16"), set_active=True)
    assert {p.dtype for module in model._modules_of("a") for p in module.parameters()} == {torch.bfloat16}
    assert output(model, batch).dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_makes_the_same_weights(method: str) -> None:
    config = METHODS[method]
    parts = config.configs if isinstance(config, adapters.ConfigUnion) else [config]
    seeded = [part.replace(init_weights_seed=7) for part in parts]
    config = adapters.ConfigUnion(*seeded) if len(seeded) > 1 else seeded[0]
    model = adapted("bert")
    states = []
    for name in ("a", "b"):
        torch.manual_seed(len(states))
        drawn = torch.rand(1)
        torch.manual_seed(len(states))
        model.add_adapter(name, config)
        assert torch.equal(torch.rand(1), drawn)
        states.append([value for module in model._modules_of(name) for value in module.state_dict().values()])
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


@pytest.mark.parametrize("name", DECODERS)
def test_rows_do_not_depend_on_the_batch(name: str) -> None:
    model, batch = adapted(name, *USED), inputs(name)
    whole = run(model, batch, "unipelt")
    torch.testing.assert_close(run(model, rows_of(batch, [2]), "unipelt"), whole[2:3], rtol=1e-4, atol=2e-5)
    assert torch.equal(run(model, batch, "unipelt"), whole)


@each_model
def test_reading_a_model_never_runs_its_weights(name: str) -> None:
    """Sub-layers are found on a model without data, whatever its padding token."""
    model = plain(name).to("meta")
    adapters.init(model)
    model.add_adapter("a", METHODS["double_seq_bn"])
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
