"""Laws of adapters on quantised bases: bitsandbytes' 4 bits (nf4, double quantisation) and 8 bits, on a CPU."""

import pytest
import torch
from tiny_models import disturb, generator, plain
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BitsAndBytesConfig,
    LlamaConfig,
    Trainer,
    TrainingArguments,
)

import adapters
from adapters import AdapterConfig, AdapterError, AdapterTrainer, Fuse, Stack
from adapters.quantised import dequantised, is_quantised

pytest.importorskip("bitsandbytes")
SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 48}
BASES = {
    "llama": (AutoModelForCausalLM, LlamaConfig(**SIZE, num_key_value_heads=2, pad_token_id=0)),
    "bert": (
        AutoModelForSequenceClassification,
        BertConfig(**SIZE, num_labels=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    ),
}
BITS = {
    4: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    8: BitsAndBytesConfig(load_in_8bit=True),
}
CASES = [(name, bits) for name in BASES for bits in BITS]
FAMILIES = {
    "lora": "lora[r=4]",
    "ia3": "ia3",
    "dora": "dora[r=4]",
    "vera": "vera[r=8]",
    "oft": "oft[block_size=8]",
    "loha": "loha[r=2]",
    "hra": "hra[r=4]",
    "ln_tuning": "ln_tuning",
    "seq_bn": "seq_bn[reduction_factor=8]",
    "par_bn": "par_bn[reduction_factor=8]",
    "compacter": "compacter[reduction_factor=4,phm_dim=2]",
    "seq_bn_inv": "seq_bn_inv[reduction_factor=8]",
    "prefix_tuning": "prefix_tuning[prefix_length=3,bottleneck_size=8]",
    "prompt": "prompt_tuning[prompt_length=3]",
    "loreft": "loreft[r=2]",
    "mam": "mam",
}
EXACT = ("lora", "ia3", "loha", "ln_tuning", "vera", "par_bn")
"""The identity at the start, bit for bit: methods that add a zero to what the quantised map gives."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each base, saved in floating numbers."""
    found = {}
    for name, (auto, config) in BASES.items():
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp(name)
        auto.from_config(config).save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def load(folders):
    """Load a base, quantised or not."""

    def loaded(name: str, bits: int | None, **options):
        config = {} if bits is None else {"quantization_config": BITS[bits], "device_map": "cpu"}
        model = BASES[name][0].from_pretrained(folders[name], **config, **options)
        for parameter in model.parameters():
            parameter.requires_grad = False  # heads are not trained here
        return model

    return loaded


def batch(name: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 48, (4, 6), generator=generator(name))
    return {"input_ids": ids, "labels": ids if name == "llama" else torch.tensor([0, 1, 2, 3])}


def logits(model, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch(name)["input_ids"]).logits


def trained(model, name: str, steps: int = 6, rate: float = 0.02) -> list[float]:
    """The losses of some steps, in all of which there are gradients, finite ones."""
    torch.manual_seed(0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, rate), []
    model.train()
    for _ in range(steps):
        loss = model(**batch(name)).loss
        loss.backward()
        gradients = [each.grad for each in parameters if each.grad is not None]
        assert gradients
        assert all(each.isfinite().all() for each in gradients)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_every_family_trains_and_is_nothing_when_it_is_off(name: str, bits: int, load) -> None:
    model = adapters.prepare_quantized_training(load(name, bits), gradient_checkpointing=False)
    base = logits(model, name)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    for method, text in FAMILIES.items():
        model.add_adapter(method, AdapterConfig.load(text))
        model.train_adapter(method)
        if method in EXACT:
            assert torch.equal(logits(model, name), base), method
        losses = trained(model, name)
        assert losses[-1] < losses[0], (method, losses)
        own = {parameter.dtype for module in model._modules_of(method) for parameter in module.parameters()}
        assert own == {torch.float32}, method
        assert not torch.equal(logits(model, name), base)
        model.set_active_adapters(None)
        assert torch.equal(logits(model, name), base), method
        model.delete_adapter(method)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("bits", BITS)
def test_a_fusion_trains(bits: int, load) -> None:
    model = adapters.prepare_quantized_training(load("llama", bits), gradient_checkpointing=False)
    for name in ("a", "b"):
        model.add_adapter(name, "seq_bn[reduction_factor=8]")
        disturb(model, name)
    base = logits(model, "llama")
    model.add_adapter_fusion(["a", "b"])
    model.train_adapter_fusion(Fuse("a", "b"))
    losses = trained(model, "llama")
    assert losses[-1] < losses[0]
    model.set_active_adapters(None)
    assert torch.equal(logits(model, "llama"), base)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_half_precision_is_had_where_it_is_asked_for(bits: int, single: bool, load) -> None:
    model = load("llama", bits, dtype=torch.bfloat16)
    adapters.prepare_quantized_training(model, single_precision=single)
    assert model.base_model.norm.weight.dtype == (torch.float32 if single else torch.bfloat16)
    assert model.base_model.layers[0].gradient_checkpointing
    for name, dtype in {"wide": "float32", "narrow": "bfloat16"}.items():
        model.add_adapter(name, f"lora[r=4,dtype='{dtype}']")
        model.train_adapter(name)
        losses = trained(model, "llama")
        assert losses[-1] < losses[0]
        own = {parameter.dtype for module in model._modules_of(name) for parameter in module.parameters()}
        assert own == {getattr(torch, dtype)}


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_the_loss_falls_as_on_the_base_in_floating_numbers(name: str, bits: int, load) -> None:
    """Within a tenth of what the unquantised run gains."""
    losses = {}
    for each in (None, bits):
        model = load(name, each)
        if each is None:
            adapters.init(model)
        else:
            adapters.prepare_quantized_training(model)
        torch.manual_seed(1)
        model.add_adapter("a", "lora[r=4]")
        model.train_adapter("a")
        losses[each] = trained(model, name, steps=10, rate=0.01)
    gains = {each: found[0] - found[-1] for each, found in losses.items()}
    assert gains[None] > 0
    assert abs(gains[bits] - gains[None]) < 0.1 * gains[None]


@pytest.mark.parametrize("bits", BITS)
def test_gradients_after_an_evaluation(bits: int, load) -> None:
    """bitsandbytes orders 4-bit weights anew in the first evaluation on a CPU; through these no gradient passes."""
    model = load("llama", bits)
    model.eval()(**batch("llama"))
    with torch.no_grad():
        model(**batch("llama"))
    adapters.init(model)
    model.add_adapter("a", "lora[r=4]")
    model.train_adapter("a")
    losses = trained(model, "llama")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("setup", ["lora", "oft", "ia3", Stack("lora", "ia3")], ids=str)
@pytest.mark.parametrize(("name", "bits"), CASES)
def test_merging_is_exact_to_the_format(name: str, bits: int, setup, load) -> None:
    """The merged weight is the quantised form of W + ΔW; reset puts back the very same bits."""
    model = adapters.prepare_quantized_training(load(name, bits), gradient_checkpointing=False)
    for adapter in setup.leaves() if isinstance(setup, Stack) else [setup]:
        model.add_adapter(adapter, FAMILIES[adapter])
        disturb(model, adapter, 0.05)
    base = logits(model, name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sites = [site for site in model.adapter_sites.sites if site.adapters]
    wide = {site.path: site.weight.float() for site in sites}
    for site in sites:
        for adapter in ("lora", "oft", "ia3"):
            if adapter in site.adapters:
                wide[site.path] = site.adapters[adapter].merged_weight(wide[site.path])
    model.merge_adapter(setup)
    for site in sites:
        assert is_quantised(site.host)
        kept = site.host.weight
        fields = vars(kept) | {"bnb_quantized": False, "quant_state": None, "CB": None, "SCB": None}
        own = {} if bits == 4 else {"has_fp16_weights": False}
        twin = type(site.host)(site.inputs, site.outputs, bias=False, **own)
        values = wide[site.path].detach().clone()
        twin.weight = type(kept)(values, **(fields | {"requires_grad": False})).to("cpu")
        assert torch.equal(twin.weight.data, kept.data)
        assert torch.equal(dequantised(twin), dequantised(site.host))
    merged = logits(model, name)
    assert not torch.equal(merged, base)
    model.reset_adapter()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model, name), base)


@pytest.mark.parametrize("bits", BITS)
def test_files_hold_no_base_weights(bits: int, load, tmp_path) -> None:
    model = adapters.prepare_quantized_training(load("llama", bits), gradient_checkpointing=False)
    model.add_adapter("a", "lora[r=4]", set_active=True)
    disturb(model, "a")
    model.save_adapter(tmp_path / "a", "a", with_head=False)
    size = sum(4 * each.numel() for module in model._modules_of("a") for each in module.parameters())
    assert sum(file.stat().st_size for file in (tmp_path / "a").iterdir()) < size + 8000
    other = adapters.prepare_quantized_training(load("llama", bits), gradient_checkpointing=False)
    other.load_adapter(tmp_path / "a", set_active=True)
    assert torch.equal(logits(other, "llama"), logits(model, "llama"))


def test_a_merged_model_is_saved_in_its_format(load, tmp_path) -> None:
    model = adapters.prepare_quantized_training(load("llama", 4), gradient_checkpointing=False)
    model.add_adapter("a", "lora[r=4]")
    disturb(model, "a", 0.05)
    model.merge_adapter("a")
    wanted = logits(model, "llama")
    model.save_merged(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert not isinstance(other, adapters.ModelAdaptersMixin)
    adapters.prepare_quantized_training(other, gradient_checkpointing=False)  # the same kernels
    assert torch.equal(logits(other, "llama"), wanted)


@pytest.mark.parametrize("trainer", [Trainer, AdapterTrainer])
@pytest.mark.parametrize("bits", BITS)
def test_trainers_take_a_prepared_model(bits: int, trainer, load, tmp_path) -> None:
    model = adapters.prepare_quantized_training(load("llama", bits))
    model.add_adapter("a", "lora[r=4]")
    model.train_adapter("a")
    rows = [{key: value[row] for key, value in batch("llama").items()} for row in range(4)]
    arguments = TrainingArguments(tmp_path, max_steps=2, report_to="none", use_cpu=True, save_strategy="no")
    before = {key: value.clone() for key, value in model.state_dict().items() if ".loras." not in key}
    start = [each.detach().clone() for module in model._modules_of("a") for each in module.parameters()]
    trainer(model, arguments, train_dataset=rows).train()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    now = [each for module in model._modules_of("a") for each in module.parameters()]
    assert any(not torch.equal(one, two) for one, two in zip(start, now, strict=True))


def test_what_is_not_quantised_needs_no_preparation() -> None:
    with pytest.raises(AdapterError, match=r"prepare_quantized_training\(BertModel\): it is no quantised model"):
        adapters.prepare_quantized_training(plain("bert"))
