"""What users see when a checkpoint cannot be loaded or saved; the model and the files are then as they were."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BertConfig,
    BertForNextSentencePrediction,
    BertForSequenceClassification,
    GPT2Config,
    RobertaConfig,
)

import adapters
from adapters import AutoAdapterModel, BertAdapterModel, Fuse, Stack
from adapters.checkpoints import WeightsLoader, files
from adapters.errors import AdapterError, CheckpointError, ConfigError, UnknownAdapterError

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
BERT = BertConfig(vocab_size=20, **SIZE)
WIDE = BertConfig(vocab_size=20, **(SIZE | {"hidden_size": 24}))
GPT2 = GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2)
ROBERTA = RobertaConfig(vocab_size=20, **SIZE)
FUSION = Fuse("a", "b", name="f")


def new_model(config=BERT):
    """Has adapters of the names in the checkpoint, with the same and with another configuration, and one active."""
    model = AutoAdapterModel.from_config(copy.deepcopy(config)).eval()
    model.add_adapter("a", config="seq_bn[reduction_factor=4]")
    model.add_adapter("b", config="seq_bn[reduction_factor=4]")
    model.add_adapter_fusion(FUSION)
    model.add_adapter("same", config="lora[r=2]")
    model.add_adapter("other", config="lora[r=4]")
    model.add_classification_head("same", num_labels=2, id2label={0: "no", 1: "yes"})
    model.add_classification_head("other", num_labels=3)
    model.active_head = "same"
    model.set_active_adapters(Stack("a", "other"), skip_layers=[1])
    return model


@pytest.fixture
def model():
    return new_model()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Folders of an adapter with a head, an ordinary head, a fusion and a setup."""
    folder = tmp_path_factory.mktemp("checkpoints")
    saved = AutoAdapterModel.from_config(copy.deepcopy(BERT))
    for name in ("a", "b"):
        saved.add_adapter(name, config="seq_bn[reduction_factor=4]")
    saved.add_adapter_fusion(FUSION)
    for name in ("new", "same", "other"):
        saved.add_adapter(name, config="lora[r=2]")
        saved.add_classification_head(name, num_labels=2)
        saved.save_adapter(folder / name, name)
        saved.save_adapter(folder / f"{name}.bin", name, use_safetensors=False)
    saved.save_adapter_fusion(folder / "f", "f")
    saved.save_adapter_setup(folder / "setup", Stack("new", FUSION), head_setup="new")
    return folder


@pytest.fixture
def saved(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "saved"))


def state(model):
    heads = {name: (id(head), head.config.copy()) for name, head in model.heads.items()}
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    config, hooks = model.adapters_config, sum(len(module._forward_hooks) for module in model.modules())
    records = [config.to_dict(), config.skip_layers, model.active_adapters, model.active_head, model.config.label2id]
    return [*records, model.config.id2label, heads, hooks, [p.requires_grad for p in model.parameters()]], tensors


def as_it_was(model, before):
    records, tensors = before
    now, found = state(model)
    assert now == records
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], value) for key, value in tensors.items())


def edit(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


def edit_config(file, **changes):
    edit(file, config={**json.loads(file.read_text())["config"], **changes})


def edit_weights(file, change):
    weights = dict(change(key, value) for key, value in load_file(file).items())
    save_file(weights, file)


def truncate(file, share=0.6):
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


BREAK = {
    "no config": (
        lambda f: (f / "adapter_config.json").unlink(),
        "adapter_config.json': No such file .* holds 'adapter.saf",
    ),
    "no weights": (
        lambda f: (f / "adapter.safetensors").unlink(),
        "neither 'adapter.safetensors' nor 'pytorch_adapter.bin'",
    ),
    "config truncated": (
        lambda f: truncate(f / "adapter_config.json"),
        "adapter_config.json': the file is broken, not JSON",
    ),
    "config empty": (lambda f: (f / "adapter_config.json").write_text(""), "the file is broken, not JSON"),
    "config is binary": (
        lambda f: (f / "adapter_config.json").write_bytes(b"\xff\xfe\x00"),
        "the file is broken, not JSON",
    ),
    "config nested without end": (lambda f: (f / "adapter_config.json").write_text("[" * 10**5), "the file is broken"),
    "config is a list": (
        lambda f: (f / "adapter_config.json").write_text("[1]"),
        "holds a JSON list; it must be an object",
    ),
    "config without settings": (
        lambda f: edit(f / "adapter_config.json", config=None),
        "'config' is None; it must hold",
    ),
    "config without name": (lambda f: edit(f / "adapter_config.json", name=None), "'name' is None; .* Pass load_as"),
    "unknown method": (
        lambda f: edit_config(f / "adapter_config.json", architecture="lorax"),
        "'config' cannot be used: adapter config: unknown architecture 'lorax'; did you mean 'lora'",
    ),
    "members of a union that are none": (
        lambda f: edit(f / "adapter_config.json", config={"architecture": "union", "configs": "x"}),
        "'config' cannot be used",
    ),
    "impossible value": (
        lambda f: edit_config(f / "adapter_config.json", r="two"),
        "'config' cannot be used: LoRAConfig",
    ),
    "odd version": (lambda f: edit(f / "adapter_config.json", version="adapters.x"), "'version' is 'adapters.x'"),
    "weights truncated": (lambda f: truncate(f / "adapter.safetensors"), "adapter.safetensors': truncated, broken"),
    "weights cut in the header": (
        lambda f: truncate(f / "adapter.safetensors", 0.05),
        "adapter.safetensors': truncated",
    ),
    "weights empty": (
        lambda f: (f / "adapter.safetensors").write_bytes(b""),
        "adapter.safetensors': truncated, broken",
    ),
    "weights without tensors": (
        lambda f: save_file({}, f / "adapter.safetensors"),
        "none of the 0 tensors in the file",
    ),
    "a tensor of another shape": (
        lambda f: edit_weights(f / "adapter.safetensors", lambda key, value: (key, value[:1])),
        r"has shape \(1, 16\) in the file and \(2, 16\) in this model",
    ),
    "keys of another adapter": (
        lambda f: edit_weights(
            f / "adapter.safetensors", lambda key, value: (key.replace(".loras.", ".loras.x"), value)
        ),
        "none of the 12 tensors|none of the 8 tensors",
    ),
    "head config truncated": (
        lambda f: truncate(f / "head_config.json"),
        "head_config.json': the file is broken, not JSON",
    ),
    "head without weights": (lambda f: (f / "model_head.safetensors").unlink(), "neither 'model_head.safetensors' nor"),
    "head truncated": (lambda f: truncate(f / "model_head.safetensors"), "model_head.safetensors': truncated, broken"),
    "head of another shape": (
        lambda f: edit_weights(f / "model_head.safetensors", lambda key, value: (key, value[:1])),
        r"'heads\.\w+\.1\.weight' has shape \(1, 16\) in the file and \(16, 16\)|'heads\.\w+\.1\.bias' has shape",
    ),
    "labels without numbers": (
        lambda f: edit_config(f / "head_config.json", label2id=["x", "y"]),
        r"'label2id' is \['x', 'y'\]; it must map each label to its number",
    ),
    "head with an impossible value": (
        lambda f: edit_config(f / "head_config.json", dropout_prob="x"),
        "its saved config cannot be used",
    ),
    "head of an unknown type": (
        lambda f: edit_config(f / "head_config.json", head_type="x"),
        "head type 'x' is not known",
    ),
    "head with an unknown setting": (
        lambda f: edit_config(f / "head_config.json", x=1),
        "unexpected keyword argument 'x'",
    ),
}


@pytest.mark.parametrize("name", ["new", "same", "other"])
@pytest.mark.parametrize("case", BREAK)
def test_a_broken_folder_leaves_the_model_as_it_was(case, name, model, saved):
    damage, message = BREAK[case]
    damage(saved / name)
    before = state(model)
    load_as = None if case == "config without name" else name
    with pytest.raises(AdapterError, match=message):
        model.load_adapter(saved / name, load_as=load_as, set_active=True)
    as_it_was(model, before)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: {"a": object}, "objects other than tensors, which are refused"),
        (lambda: {"a": torch.ones(1), "b": [1]}, "it must hold tensors by name"),
        (lambda: [torch.ones(1)], "it must hold tensors by name"),
        (lambda: {1: torch.ones(1)}, "it must hold tensors by name"),
    ],
)
def test_torch_files_hold_tensors_only(content, message, model, saved):
    torch.save(content(), saved / "new.bin" / "pytorch_adapter.bin")
    before = state(model)
    with pytest.raises(CheckpointError, match=message):
        model.load_adapter(saved / "new.bin")
    as_it_was(model, before)


def test_nothing_in_a_torch_file_is_executed(model, saved):
    class Trap:
        def __reduce__(self):
            return Path.touch, (saved / "executed",)

    torch.save({"a": Trap()}, saved / "new.bin" / "pytorch_adapter.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_adapter\.bin'"):
        model.load_adapter(saved / "new.bin")
    assert not (saved / "executed").exists()


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_truncated_torch_files(share, model, saved):
    truncate(saved / "new.bin" / "pytorch_adapter.bin", share)
    with pytest.raises(CheckpointError, match=r"pytorch_adapter\.bin': truncated, broken"):
        model.load_adapter(saved / "new.bin")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            GPT2,
            r"none of the 8 .* a BertAdapterModel \(model_type 'bert', hidden_size 16\), this model is a GPT2A",
        ),
        (WIDE, r"has shape \(2, 16\) in the file and \(2, 24\) in this model.* hidden_size 16\), .* hidden_size 24\)"),
        (ROBERTA, r"none of the 8 tensors .*\(model_type 'bert', hidden_size 16\), .*\(model_type 'roberta'"),
    ],
)
@pytest.mark.parametrize("name", ["new", "same", "other"])
def test_a_checkpoint_for_another_architecture(name, config, message, saved):
    model = new_model(config)
    before = state(model)
    with pytest.raises(CheckpointError, match=message):
        model.load_adapter(saved / name)
    as_it_was(model, before)


def test_an_adapter_of_a_bare_model_of_another_architecture(tmp_path):
    """Its keys have no prefix, so they fit; that does not make it the right one."""
    saved = AutoModel.from_config(BERT)
    adapters.init(saved)
    saved.add_adapter("a")
    saved.save_adapter(tmp_path, "a")
    model = AutoAdapterModel.from_config(copy.deepcopy(ROBERTA))
    with pytest.raises(CheckpointError, match=r"this model is a RobertaAdapterModel .* Load it into a 'bert' model"):
        model.load_adapter(tmp_path)
    assert "a" not in model.adapters_config


CALLS = [
    (lambda m, f: m.load_adapter("nowhere"), CheckpointError, "there is no directory 'nowhere' here"),
    (lambda m, f: m.load_adapter("no where"), CheckpointError, "it cannot be the name of a Hub repository"),
    (
        lambda m, f: m.load_adapter("https://x.org/a.zip", cache_dir=f / "none", local_files_only=True),
        CheckpointError,
        "it is not in .*none', and downloads are off",
    ),
    (
        lambda m, f: m.load_adapter(f / "new" / "adapter_config.json"),
        CheckpointError,
        "is neither a zip nor a tar file; pass one, or the directory",
    ),
    (lambda m, f: m.load_adapter(f), CheckpointError, "No such file or directory; the directory holds 'f', 'new'"),
    (
        lambda m, f: m.load_adapter(f / "new", cache_dri="x"),
        ConfigError,
        "unknown argument 'cache_dri'; did you mean 'cache_d",
    ),
    (lambda m, f: m.load_adapter(f / "new", load_as="a.b"), AdapterError, r"'a\.b'"),
    (lambda m, f: m.load_adapter(f / "new", num_labels=5), AdapterError, "id2label has 5 labels"),
    (lambda m, f: m.load_head(f / "nowhere"), CheckpointError, "this directory does not exist"),
    (lambda m, f: m.load_head(f / "f"), CheckpointError, r"head_config\.json': No such file"),
    (lambda m, f: m.load_head(f / "new", id2label={0: "x"}), AdapterError, "id2label has 1 labels"),
    (lambda m, f: m.load_adapter_fusion(f / "new"), CheckpointError, r"adapter_fusion_config\.json': No such file"),
    (lambda m, f: m.load_adapter_setup(f / "new"), CheckpointError, r"adapter_setup\.json': No such file"),
    (
        lambda m, f: m.save_adapter(f / "x", "nobody"),
        UnknownAdapterError,
        "No adapter of this type with the given name",
    ),
    (lambda m, f: m.save_head(f / "x", "nobody"), AdapterError, "Unknown head_name 'nobody'"),
    (
        lambda m, f: m.save_adapter_fusion(f / "x", "a,c"),
        UnknownAdapterError,
        "Unknown AdapterFusion 'a,c'; known are 'f'",
    ),
    (lambda m, f: m.save_adapter_fusion(f / "x", "f", with_head=True), AdapterError, "No head with name 'f' found"),
    (lambda m, f: m.save_adapter_setup(f / "x", Stack("a", "c")), UnknownAdapterError, "has no adapter named 'c'"),
    (
        lambda m, f: m.save_adapter_setup(f / "x", Fuse("a", "b")),
        UnknownAdapterError,
        "has no AdapterFusion named 'a,b'",
    ),
    (lambda m, f: m.save_adapter_setup(f / "x", "a", head_setup="c"), UnknownAdapterError, "has no head named 'c'"),
    (lambda m, f: m.save_adapter_setup(f / "x", None), AdapterError, "there is nothing to save"),
    (lambda m, f: m.save_adapter(f / "x", "a", meta_dict={"m": object()}), CheckpointError, "a value cannot be JSON"),
]


@pytest.mark.parametrize(("call", "kind", "message"), CALLS)
def test_calls(call, kind, message, model, saved, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = state(model)
    with pytest.raises(kind, match=message):
        call(model, saved)
    as_it_was(model, before)
    assert not (saved / "x").exists()


def test_former_arguments_are_named(model, saved):
    with pytest.warns(FutureWarning, match="config and model_name have no effect"):
        model.load_adapter(saved / "new", config="seq_bn")
    with pytest.warns(FutureWarning, match="'source' has no effect any more"):
        model.load_adapter(saved / "new", source="hf")


# --- heads, fusions, setups, loaders ---------------------------------------------------------------------------------


def test_heads_for_another_class(model, saved):
    static = BertForSequenceClassification(BERT)
    adapters.init(static)
    before = static.classifier.weight.clone()
    with pytest.raises(CheckpointError, match="Model class 'BertAdapterModel' of found prediction head does not match"):
        static.load_head(saved / "new")
    assert torch.equal(static.classifier.weight, before)
    other = BertForNextSentencePrediction(BERT)
    adapters.init(other)
    other.save_head(saved / "static")
    records = state(model)
    with pytest.raises(
        CheckpointError, match="Cannot automatically convert prediction head of model class BertForNext"
    ):
        model.load_head(saved / "static", load_as="h")
    as_it_was(model, records)


FUSION_FILES = ("adapter_fusion_config.json", "model_adapter_fusion.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: truncate(f / FUSION_FILES[0]), "the file is broken, not JSON"),
        (lambda f: truncate(f / FUSION_FILES[1]), "truncated, broken"),
        (lambda f: edit(f / FUSION_FILES[0], config=None), "is not that of an AdapterFusion"),
        (lambda f: edit(f / FUSION_FILES[0], adapter_names=[{}]), "is not that of an AdapterFusion"),
        (lambda f: edit_config(f / FUSION_FILES[0], key="x"), "'config' cannot be used"),
        (
            lambda f: edit(f / FUSION_FILES[0], adapter_names=["a", "z"]),
            "No adapter with name 'z' found; it fuses 'a' and",
        ),
        (lambda f: edit_weights(f / FUSION_FILES[1], lambda key, value: (key, value[:2])), "in the file and"),
    ],
)
@pytest.mark.parametrize("load_as", [None, "new"])
@pytest.mark.parametrize("changed", [{}, {"temperature": True}])
def test_fusions(damage, message, load_as, changed, model, saved):
    edit_config(saved / "f" / FUSION_FILES[0], **changed)
    damage(saved / "f")
    before = state(model)
    with pytest.raises(AdapterError, match=message):
        model.load_adapter_fusion(saved / "f", load_as=load_as, set_active=True)
    as_it_was(model, before)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: truncate(f / "adapter_setup.json"), "the file is broken, not JSON"),
        (
            lambda f: edit(f / "adapter_setup.json", adapter_setup={"type": "Pile", "children": []}),
            "holds no composition",
        ),
        (
            lambda f: edit(f / "adapter_setup.json", adapter_setup={"type": "Stack", "children": []}),
            "an empty composition",
        ),
        (lambda f: edit(f / "adapter_setup.json", adapter_setup=None), "holds no composition"),
        (lambda f: edit(f / "adapter_setup.json", head_setup=[1]), "holds no composition"),
        (
            lambda f: edit(f / "adapter_setup.json", adapter_setup={"type": "single", "children": ["../x"]}),
            "cannot name",
        ),
        (lambda f: truncate(f / "b" / "adapter.safetensors"), "truncated, broken"),
        (lambda f: truncate(f / "f" / FUSION_FILES[1]), "truncated, broken"),
        (lambda f: truncate(f / "new" / "model_head.safetensors"), "truncated, broken"),
        (lambda f: shutil.rmtree(f / "f"), r"adapter_fusion_config\.json': No such file"),
    ],
)
def test_setups(damage, message, model, saved):
    damage(saved / "setup")
    before = state(model)
    with pytest.raises(AdapterError, match=message):
        model.load_adapter_setup(saved / "setup", set_active=True)
    as_it_was(model, before)


class Refusing(WeightsLoader):
    def __init__(self, model):
        super().__init__(model, "x.bin", "x.json")

    def filter_func(self, adapter_name):
        return lambda key: "pooler" in key

    def rename_func(self, old_name, new_name):
        return lambda key: key


@pytest.mark.parametrize("name", ["new", "same", "other"])
def test_a_failing_loader_takes_everything_back(name, model, saved):
    before = state(model)
    with pytest.raises(CheckpointError, match=r"x\.json': No such file"):
        model.load_adapter(saved / name, set_active=True, custom_weights_loaders=[Refusing(model)])
    as_it_was(model, before)


def test_a_warning_that_is_an_error_takes_everything_back(model, saved):
    edit_weights(saved / "same" / "adapter.safetensors", lambda key, value: (key.replace("layer.1", "layer.9"), value))
    before = state(model)
    with pytest.raises(UserWarning, match="4 tensors are not in the file"):
        model.load_adapter(saved / "same", set_active=True)
    as_it_was(model, before)


# --- saving ----------------------------------------------------------------------------------------------------------


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_target_that_is_no_directory(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="saving to"):
            model.save_adapter(target, "a")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failed_save_leaves_the_old_files(model, saved, monkeypatch):
    before = contents(saved / "same")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("adapters.checkpoints.files.save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        model.save_adapter(saved / "same", "same")
    assert contents(saved / "same") == before
    (saved / "new" / "model_head.safetensors").unlink()
    (saved / "new" / "model_head.safetensors").mkdir()
    monkeypatch.undo()
    before = (saved / "new" / "adapter.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"'model_head\.safetensors' is a directory there"):
        model.save_adapter(saved / "new", "same")
    assert (saved / "new" / "adapter.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["", ".", "..", "up/../../x", "back\\slash"])
def test_names_do_not_lead_out_of_the_folder(name, tmp_path):
    with pytest.raises(CheckpointError, match="cannot name a folder"):
        files.subfolder(tmp_path, name)


WRONG_TYPES = {
    "load_adapter": lambda model, folder, wrong: model.load_adapter(wrong),
    "load_as": lambda model, folder, wrong: model.load_adapter(folder / "new", load_as=wrong),
    "id2label": lambda model, folder, wrong: model.load_adapter(folder / "new", id2label=wrong),
    "num_labels": lambda model, folder, wrong: model.load_adapter(folder / "new", num_labels=wrong),
    "load_head": lambda model, folder, wrong: model.load_head(wrong),
    "load_adapter_fusion": lambda model, folder, wrong: model.load_adapter_fusion(wrong),
    "load_adapter_setup": lambda model, folder, wrong: model.load_adapter_setup(wrong),
    "load_embeddings": lambda model, folder, wrong: model.load_embeddings(wrong, "e"),
    "save_adapter to": lambda model, folder, wrong: model.save_adapter(wrong, "same"),
    "save_adapter": lambda model, folder, wrong: model.save_adapter(folder / "x", wrong),
    "save_adapter_fusion": lambda model, folder, wrong: model.save_adapter_fusion(folder / "x", wrong),
    "save_pretrained": lambda model, folder, wrong: model.save_pretrained(wrong),
    "add_embeddings": lambda model, folder, wrong: model.add_embeddings("e", wrong, "default", wrong),
    "embeddings": lambda model, folder, wrong: model.set_active_embeddings(wrong),
    "average_adapter": lambda model, folder, wrong: model.average_adapter("mean", wrong),
    "average_head": lambda model, folder, wrong: model.average_head("mean", wrong),
    "weights": lambda model, folder, wrong: model.average_adapter("mean", ["same"], weights=wrong),
    "merge_adapter": lambda model, folder, wrong: model.merge_adapter(wrong),
    "active_adapters": lambda model, folder, wrong: model.set_active_adapters(wrong),
    "active_head": lambda model, folder, wrong: setattr(model, "active_head", wrong),
    "add_prediction_head": lambda model, folder, wrong: model.add_prediction_head(wrong),
    "a head's config": lambda model, folder, wrong: model.add_prediction_head_from_config("h", wrong),
    "a head's labels": lambda model, folder, wrong: model.add_tagging_head("h", id2label=wrong),
    "a head's activation": lambda model, folder, wrong: model.add_tagging_head(
        "h", layers=2, activation_function=wrong
    ),
    "load_model": lambda model, folder, wrong: adapters.load_model(wrong, BertAdapterModel),
    "load_model with": lambda model, folder, wrong: adapters.load_model(folder, wrong),
}


@pytest.mark.parametrize("wrong", [2.5, object()], ids=["a number", "an object"])
@pytest.mark.parametrize("case", WRONG_TYPES)
def test_wrong_types(case, wrong, model, saved):
    before = state(model)
    with pytest.raises(AdapterError, match=re.escape(repr(wrong))):
        WRONG_TYPES[case](model, saved, wrong)
    as_it_was(model, before)
