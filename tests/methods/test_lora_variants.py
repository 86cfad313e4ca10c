"""LoRA's options, its starts, the vocabulary, trainable tokens, AdaLoRA and LoRA+."""

import copy

import peft
import pytest
import torch
from tiny_models import adapted, disturb, generator, inputs, output, plain, run
from torch import nn
from transformers import TrainingArguments

import adapters
from adapters import AdaLoRAConfig, AdapterConfig, AdapterError, ConfigError, LoRAConfig, TrainableTokensConfig
from adapters.composition import BatchSplit, MultiTask, Parallel, Stack
from adapters.methods.adalora import budget, orthogonality_loss, update_and_allocate
from adapters.trainer import AdapterTrainer
from adapters.training import AdapterTrainingArguments, loraplus_groups

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # PEFT asks for it
    "ignore:`lora_bias=True` was passed",  # PEFT too cannot merge it into a map without bias
)

LABELLED = {**inputs("llama"), "labels": inputs("llama")["input_ids"]}
TARGETS = ["q_proj", "v_proj"]


def with_lora(config, name="llama", head=True):
    model = adapted(name, head=head)
    model.add_adapter("a", config, set_active=True)
    return model


def modules(model, adapter="a"):
    return model.adapter_sites.holding(adapter)


@torch.no_grad()
def from_peft(config, parameters: dict[str, str], source=None):
    """PEFT's output on the tiny Llama, and ours with its tensors: parameters of ours by the name in PEFT's keys."""
    theirs = peft.get_peft_model(source or plain("llama", head=True), config).eval()
    values = {key: value for key, value in theirs.named_parameters() if ".default" in key}
    for key, value in values.items():
        if source is None:
            value.add_(torch.randn(value.shape, generator=generator(key)) * 0.1)
    return output(theirs, inputs("llama")), {key.replace(".default", ""): value for key, value in values.items()}


@torch.no_grad()
def fill(model, values):
    for site, module in modules(model):
        for name, parameter in module.named_parameters():
            key = f"base_model.model.model.{site.path}.{NAMES[name]}"
            parameter.copy_(values[key].view(parameter.shape))


NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "bias": "lora_B.bias"}


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"use_rslora": True}, {"use_rslora": True}),
        ({"lora_bias": True}, {"lora_bias": True}),
        (
            {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
            {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        ),
    ],
)
def test_options_are_those_of_peft(options, theirs):
    wanted, values = from_peft(peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **theirs), NAMES)
    model = with_lora(LoRAConfig(r=4, alpha=6, **options))
    fill(model, values)
    torch.testing.assert_close(output(model, inputs("llama")), wanted, atol=1e-5, rtol=1e-5)


def test_which_key_wins():
    pattern = {"selfattn_lora": 1, 1: 2, "q": 3, r"layers\.1\.self_attn\.v_proj": 5, r"v_pro.": 4}
    model = with_lora(LoRAConfig(attn_matrices=["q", "k", "v"], rank_pattern=pattern))
    ranks = {(site.layer, site.role): module.rank for site, module in modules(model)}
    assert ranks == {(0, "q"): 3, (0, "k"): 1, (0, "v"): 4, (1, "q"): 3, (1, "k"): 2, (1, "v"): 5}
    model.add_adapter("none", LoRAConfig(rank_pattern={"q": 0}))
    assert {site.role for site, _ in modules(model, "none")} == {"v"}


@pytest.mark.parametrize("scheme", ["pissa", "pissa_niter_16", "olora"])
def test_starts_are_those_of_peft_and_change_nothing(scheme):
    model = plain("llama", head=True)
    bare = output(model, inputs("llama"))
    theirs = peft.get_peft_model(
        plain("llama", head=True),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=scheme),
    )
    ours = with_lora(LoRAConfig(r=4, alpha=8, init_weights=scheme))
    assert torch.equal(output(ours, inputs("llama")), bare)
    for site, module in modules(ours):
        other = theirs.get_submodule(f"base_model.model.model.{site.path}")
        product = other.lora_B["default"].weight @ other.lora_A["default"].weight
        close = 2e-2 if "niter" in scheme else 1e-4  # it draws random directions
        torch.testing.assert_close(module.lora_B @ module.lora_A, product, atol=close, rtol=close)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("scheme", ["pissa", "olora", "eva", "lora_ga"])
def test_starts_merge_and_are_saved(name, scheme, tmp_path):
    batch = {**inputs(name), "labels": inputs(name)["input_ids"]}
    bare = output(plain(name, head=True), inputs(name))
    model = with_lora(LoRAConfig(r=4, init_weights=scheme, intermediate_lora=True), name)
    if scheme in ("eva", "lora_ga"):
        model.initialize_lora("a", [batch, batch])
    assert torch.equal(output(model, inputs(name)), bare)
    disturb(model, "a")
    changed = output(model, inputs(name))
    model.merge_adapter("a")
    torch.testing.assert_close(output(model, inputs(name)), changed, atol=1e-5, rtol=1e-5)
    model.reset_adapter()
    model.save_adapter(tmp_path, "a")
    again = adapted(name, head=True)
    again.load_adapter(tmp_path, set_active=True)
    torch.testing.assert_close(output(again, inputs(name)), changed, atol=0, rtol=0)


def test_eva_finds_the_principal_components():
    model = with_lora(LoRAConfig(r=4, init_weights="eva", attn_matrices=["q"]))
    (site, module), *_ = modules(model)
    seen = []
    handle = site.host.register_forward_hook(lambda host, args, result: seen.append(args[0].flatten(0, -2)))
    output(model, inputs("llama"))
    handle.remove()
    model.initialize_lora("a", [LABELLED])
    _, _, directions = torch.linalg.svd(seen[0] - seen[0].mean(0), full_matrices=False)
    torch.testing.assert_close((directions[:4] @ module.lora_A.T).abs(), torch.eye(4), atol=1e-4, rtol=1e-4)


def test_lora_ga_reads_the_gradient_and_leaves_none():
    model = with_lora(LoRAConfig(r=4, init_weights="lora_ga", attn_matrices=["q"]))
    (site, module), *_ = modules(model)
    model.initialize_lora("a", [LABELLED])
    assert all(parameter.grad is None for parameter in model.parameters())
    weight = site.host.weight.requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(**LABELLED).loss, weight)
    left, _, right = torch.linalg.svd(gradient)
    scale = 16**0.25 / 4
    torch.testing.assert_close((right[:4] @ module.lora_A.T).abs() / scale, torch.eye(4), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close((left[:, 4:8].T @ module.lora_B).abs() / scale, torch.eye(4), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(r=4, embedding_lora=True),
        LoRAConfig(r=4, selfattn_lora=False, lm_head_lora=True, lora_bias=True),
        TrainableTokensConfig(token_indices=[3, 9, 20]),
    ],
    ids=["embedding", "lm_head", "tokens"],
)
def test_vocabulary(name, config, tmp_path):
    bare = output(plain(name, head=True), inputs(name))
    model = with_lora(config, name)
    assert torch.equal(output(model, inputs(name)), bare)
    disturb(model, "a")
    changed = output(model, inputs(name))
    assert not torch.allclose(changed, bare)
    model.save_adapter(tmp_path, "a")
    again = adapted(name, head=True)
    again.load_adapter(tmp_path, set_active=True)
    assert torch.equal(output(again, inputs(name)), changed)
    model.set_active_adapters(None)
    assert torch.equal(output(model, inputs(name)), bare)


def test_embeddings_and_head_merge_where_they_are_not_tied():
    for config in (LoRAConfig(embedding_lora=True), LoRAConfig(lm_head_lora=True)):
        model = with_lora(config)
        disturb(model, "a")
        changed = output(model, inputs("llama"))
        model.merge_adapter("a")
        torch.testing.assert_close(output(model, inputs("llama")), changed, atol=1e-5, rtol=1e-5)
    with pytest.raises(AdapterError, match="one weight"):
        with_lora(config, "gpt2").merge_adapter("a")


def test_tied_words_follow_trained_tokens_merged_or_not():
    model = with_lora(TrainableTokensConfig(token_indices=[3, 9]), "gpt2")
    disturb(model, "a")
    changed = output(model, inputs("gpt2"))
    model.merge_adapter("a")
    assert model.lm_head.weight is model.transformer.wte.weight
    torch.testing.assert_close(output(model, inputs("gpt2")), changed, atol=1e-5, rtol=1e-5)
    with pytest.raises(AdapterError, match="resize"):
        model.resize_token_embeddings(60)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_trained_tokens_are_those_of_peft(name):
    target = "wte" if name == "gpt2" else "embed_tokens"
    theirs = peft.get_peft_model(
        plain(name, head=True), peft.TrainableTokensConfig(token_indices=[3, 9], target_modules=[target])
    ).eval()
    ours = with_lora(TrainableTokensConfig(token_indices=[3, 9]), name)
    change = torch.randn(2, 16, generator=generator(name))
    for key, parameter in theirs.named_parameters():
        if "trainable_tokens_delta" in key:
            parameter.add_(change)
    next(iter(ours.adapter_sites.shared("a").values())).delta.copy_(change)
    torch.testing.assert_close(output(ours, inputs(name)), output(theirs, inputs(name)), atol=1e-5, rtol=1e-5)


ADALORA = AdaLoRAConfig(init_r=4, target_r=2, tinit=1, tfinal=2, total_step=8, alpha=6)


def test_adalora_allocates_as_peft_does():
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=2, total_step=8, lora_alpha=6, target_modules=TARGETS
    )
    theirs = peft.get_peft_model(plain("llama", head=True), config).train()
    ours = with_lora(ADALORA)
    ours.train_adapter("a")
    with torch.no_grad():
        for site, module in modules(ours):
            other = theirs.get_submodule(f"base_model.model.model.{site.path}")
            for name, parameter in module.named_parameters():
                value = torch.randn(parameter.shape, generator=generator(site.path + name)) * 0.3
                parameter.copy_(value)
                other.get_parameter(f"{name}.default").copy_(value)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (ours, theirs)]
    for step in range(1, 9):
        their_loss = theirs.base_model(**LABELLED).loss
        own_loss = ours(**LABELLED).loss + orthogonality_loss(ours)
        torch.testing.assert_close(own_loss, their_loss, atol=1e-5, rtol=1e-4)
        for loss, optimizer in zip((own_loss, their_loss), optimizers, strict=True):
            loss.backward()
            optimizer.step()
        update_and_allocate(ours, step)
        theirs.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for site, module in modules(ours):
            other = theirs.get_submodule(f"base_model.model.model.{site.path}").lora_E["default"]
            torch.testing.assert_close(module.lora_E, other, atol=1e-5, rtol=1e-4)
    assert sum(int((module.lora_E != 0).sum()) for _, module in modules(ours)) == 2 * len(modules(ours))


def test_budget_shrinks_as_a_cubic():
    assert [budget(ADALORA, step, 8, 10)[0] for step in range(1, 9)] == [40, 30, 24, 21, 20, 20, 20, 20]


def trained(model, tmp_path, **options):
    kind = AdapterTrainingArguments if "loraplus_lr_ratio" in options else TrainingArguments
    arguments = kind(str(tmp_path), max_steps=8, per_device_train_batch_size=2, report_to=[], use_cpu=True, **options)
    rows = [{key: value[row] for key, value in LABELLED.items()} for row in range(4)]
    trainer = AdapterTrainer(model, arguments, train_dataset=rows)
    trainer.train()
    return trainer


def test_trainer_allocates(tmp_path):
    model = with_lora(ADALORA.replace(total_step=None))
    model.train_adapter("a")
    trained(model, tmp_path)
    assert sum(int((module.lora_E != 0).sum()) for _, module in modules(model)) == 2 * len(modules(model))


def test_loraplus(tmp_path):
    model = with_lora(LoRAConfig(r=4))
    model.train_adapter("a")
    groups = loraplus_groups(model, lr=0.1, ratio=16)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for _, module in modules(model):
        assert (rates[id(module.lora_A)], rates[id(module.lora_B)]) == (0.1, 1.6)
    trainer = trained(model, tmp_path, loraplus_lr_ratio=16, learning_rate=0.01, lr_scheduler_type="constant")
    assert sorted({round(group["lr"], 6) for group in trainer.optimizer.param_groups}) == [0.01, 0.16]
    with pytest.raises(AdapterError, match="no matrix B"):
        loraplus_groups(nn.Linear(2, 2), 0.1, 16)


def test_new_fields_are_saved_only_where_they_are_set():
    new = {"use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "embedding_lora", "lm_head_lora"}
    assert not new & set(LoRAConfig().to_dict())
    config = LoRAConfig(use_rslora=True, rank_pattern={1: 4})
    assert new & set(config.to_dict()) == {"use_rslora", "rank_pattern"}
    assert AdapterConfig.load(config.to_dict()) == config != LoRAConfig()
    assert LoRAConfig().replace(lora_bias=True).lora_bias


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank_pattern": {"(": 4}}, "no pattern"),
        ({"rank_pattern": {"q": -1}}, "integers >= 0"),
        ({"alpha_pattern": ["q"]}, "no pattern"),
        ({"use_dora": True, "lora_bias": True}, "not possible with dora"),
        ({"embedding_lora": True, "dropout": 0.1}, "embedding_lora"),
        ({"init_weights": "pissa", "alpha": 0}, "must be > 0"),
        ({"init_weights": "pisa"}, "must be one of"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        LoRAConfig(**fields)


def test_bad_calls():
    model = with_lora(LoRAConfig())
    with pytest.raises(AdapterError, match="lora_ga"):
        model.initialize_lora("a", [LABELLED], method="lora_ga")
    with pytest.raises(AdapterError, match="no LoRA"):
        model.initialize_lora("b", [LABELLED])
    with pytest.raises(AdapterError, match="one batch"):
        model.initialize_lora("a", [], method="eva")
    with pytest.raises(AdapterError, match="r must be <= 16"):
        model.add_adapter("c", LoRAConfig(r=20, init_weights="pissa"))
    with pytest.raises(AdapterError, match="tokens 0 to 47"):
        model.add_adapter("c", TrainableTokensConfig(token_indices=[48]))
    with pytest.raises(AdapterError, match="'q_porj' fits no place"):
        model.add_adapter("c", LoRAConfig(rank_pattern={"q_porj": 2}))
    bare = adapted("llama")
    with pytest.raises(AdapterError, match="lm_head_lora"):
        bare.add_adapter("a", LoRAConfig(lm_head_lora=True))
    assert "c" not in model.adapters_config
    assert "a" not in bare.adapters_config
    assert adapters.ADAPTER_CONFIG_MAP["adalora"] == AdaLoRAConfig()


VOCABULARY = {
    "embedding": LoRAConfig(r=4, embedding_lora=True, lm_head_lora=True),
    "tokens": TrainableTokensConfig(token_indices=list(range(3, 20))),
}


@pytest.mark.parametrize("kind", list(VOCABULARY))
@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_vocabulary_in_compositions(name, kind):
    model = adapted(name, head=True)
    for adapter in ("a", "b"):
        model.add_adapter(adapter, VOCABULARY[kind])
        disturb(model, adapter)
    batch = inputs(name)
    alone = {adapter: run(model, batch, adapter) for adapter in ("a", "b", None)}
    both = run(model, batch, Parallel("a", "b"))
    torch.testing.assert_close(both, torch.cat([alone["a"], alone["b"]]), atol=1e-5, rtol=1e-5)
    split = run(model, batch, BatchSplit("a", "b", batch_sizes=[1, 3]))
    torch.testing.assert_close(split, torch.cat([alone["a"][:1], alone["b"][1:]]), atol=1e-5, rtol=1e-5)
    mixed = run(model, batch, MultiTask("a", "b"), task_ids=torch.tensor([1, 0, 0, 1]))
    rows = [alone["ba"[bit]][row] for row, bit in enumerate([0, 1, 1, 0])]
    torch.testing.assert_close(mixed, torch.stack(rows), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run(copy.deepcopy(model), batch, "a"), alone["a"], atol=0, rtol=0)
    model.train_adapter(Stack("a", "b"))
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for _, module in modules(model, "b"):
        assert all(parameter.grad is not None for parameter in module.parameters())
    trained = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert all(".a." in key or ".b." in key for key in trained)
    for adapter in ("a", "b"):
        model.delete_adapter(adapter)
    torch.testing.assert_close(run(model.eval(), batch, None), alone[None], atol=0, rtol=0)
    assert set(model.state_dict()) == set(plain(name, head=True).state_dict())
