"""Prompt tuning, P-tuning, CPT, multitask prompt tuning: formulas, PEFT's outputs, padding, heads, generation."""

import copy
import functools

import pytest
import torch
from peft import CPTConfig as PeftCPT
from peft import MultitaskPromptTuningConfig as PeftMultitask
from peft import PromptEncoderConfig, get_peft_model
from peft import PromptTuningConfig as PeftPromptTuning
from tiny_models import BOS, CONFIGS, DECODERS, PAD, VOCABULARY, adapted, config, disturb, inputs, plain
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

import adapters
from adapters import AdapterError, AdapterSetup, Average, BatchSplit, CompositionError, Parallel, Split, Stack
from adapters.methods.cpt import context_loss

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # in PEFT
START_OF_TOKENS = adapters.PromptTuningConfig(
    prompt_length=3, prompt_init="from_string", prompt_init_text=[7, 8, 9], placement="tokens"
)
CONTEXT, KINDS = [5, 6, 7, 8], [1, 2, 3, 4]
PROMPTS = {
    "prompt": adapters.PromptTuningConfig(prompt_length=3),
    "long": adapters.PromptTuningConfig(prompt_length=5),
    "after": adapters.PromptTuningConfig(prompt_length=2, combine="prefix_after_bos"),
    "tokens": adapters.PromptTuningConfig(prompt_length=3, placement="tokens"),
    "mlp": adapters.PTuningConfig(prompt_length=3, encoder_hidden_size=6),
    "lstm": adapters.PTuningConfig(prompt_length=2, encoder_reparameterization_type="LSTM", encoder_hidden_size=6),
    "tasks": adapters.MultitaskPromptTuningConfig(prompt_length=3, num_tasks=2, num_ranks=2),
    "cpt": adapters.CPTConfig(cpt_token_ids=CONTEXT, cpt_tokens_type_mask=KINDS),
}
TEXTS = tuple(name for name in CONFIGS if name != "vit")
GENERATORS = ("gpt2", "llama", "mistral", "t5", "bart")


@functools.cache
def model_with(name: str, head: bool = False):
    """A model with every prompt that it takes. Not to be changed."""
    model = adapted(name, head=head)
    for prompt, configuration in PROMPTS.items():
        if name != "vit" or configuration["placement"] == "auto":
            model.add_adapter(prompt, configuration)
            disturb(model, prompt, 0.5)
    return model


def unpadded(name: str, rows: int = 2) -> dict[str, torch.Tensor]:
    batch = {key: value[:rows] for key, value in inputs(name).items() if "mask" not in key}
    if "input_ids" in batch:
        batch["input_ids"] = batch["input_ids"].clamp(min=3)
    return batch


@torch.no_grad()
def run(model, batch, setup, **kwargs) -> torch.Tensor:
    """The whole first output, under `setup`."""
    with AdapterSetup(setup):
        return model(**batch, **kwargs)[0]


def vectors(model, name: str) -> torch.Tensor:
    return model.get_adapter(name)[-1]["prompt"].prompt_embedding.weight


def close(found, wanted, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def of_tokens(states: torch.Tensor, batch) -> torch.Tensor:
    return states[:, -batch.get("decoder_input_ids", batch.get("input_ids")).shape[1] :]


# --- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_tokens_in_front_are_tokens_in_front(name):
    """A prompt made of the embeddings of tokens is these tokens; masks, positions and types follow."""
    model = adapted(name)
    model.add_adapter("p", START_OF_TOKENS)
    for side in ("right", "left"):
        batch = inputs(name, side=side) if (side == "right" or name not in ("bart", "roberta", *DECODERS)) else None
        if batch is None:
            continue
        rows = len(batch["input_ids"])
        start = batch["attention_mask"].argmax(1) if side == "left" else torch.zeros(rows, dtype=torch.long)
        longer = dict(batch)
        for key, front in (("input_ids", torch.tensor([7, 8, 9])), ("attention_mask", torch.ones(3, dtype=torch.long))):
            longer[key] = torch.stack(
                [torch.cat([row[:at], front, row[at:]]) for row, at in zip(batch[key], start, strict=True)]
            )
        wanted, found = plain(name)(**longer)[0], run(model, batch, "p")
        mask = longer["attention_mask"].bool() if wanted.shape[1] == longer["input_ids"].shape[1] else ...
        close(found[mask], wanted[mask])


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "albert"])
def test_behind_the_embeddings_a_prompt_has_no_position(name):
    model, batch = model_with(name), inputs(name)
    bare = plain(name)
    embedded = bare.embeddings(batch["input_ids"])
    prompt = vectors(model, "prompt").expand(len(embedded), -1, -1)
    bare.embeddings.forward = lambda *args, **kwargs: torch.cat([prompt, embedded], 1)
    mask = torch.cat([torch.ones(len(embedded), 3, dtype=torch.long), batch["attention_mask"]], 1)
    with torch.no_grad():
        wanted = bare(batch["input_ids"], attention_mask=mask)[0]
    close(run(model, batch, "prompt")[mask.bool()], wanted[mask.bool()])


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_after_the_first_token(name):
    model, batch = model_with(name), unpadded(name)
    before = run(model, batch, "after")
    assert before.shape[1] == plain(name)(**batch)[0].shape[1] + 2
    if name in DECODERS:  # the first token sees nothing but itself
        close(before[:, 0], plain(name)(**batch)[0][:, 0])


@pytest.mark.parametrize("name", ["bert", "distilbert", "albert", "llama", "t5"])
@pytest.mark.parametrize("prompt", ["prompt", "after"])
def test_d13_d14_what_is_padded_has_no_effect(name, prompt):
    """D13, D14: on either side, with either attention."""
    for side in ("left", "right"):
        batch = inputs(name, side=side)
        other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 9, batch["input_ids"])}
        model = model_with(name)
        found, same = (of_tokens(run(model, one, prompt), one) for one in (batch, other))
        real = batch.get("decoder_attention_mask", batch["attention_mask"]).bool()
        if prompt == "after" and name != "t5":
            real = real & (real.cumsum(1) > 1)
        close(found[real], same[real])


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama", "t5"])
@pytest.mark.parametrize("prompt", ["prompt", "after"])
def test_d15_attention_implementations_agree(name, prompt):
    batch, model = inputs(name, side="left"), copy.deepcopy(model_with(name))
    sdpa = of_tokens(run(model, batch, prompt), batch)
    model.set_attn_implementation("eager")
    real = batch.get("decoder_attention_mask", batch["attention_mask"]).bool()
    close(of_tokens(run(model, batch, prompt), batch)[real], sdpa[real])


@pytest.mark.parametrize("name", ["llama", "mistral", "t5", "gpt2"])
@pytest.mark.parametrize("prompt", ["prompt", "after", "mlp"])
def test_a_row_does_not_depend_on_its_padding(name, prompt):
    model, batch = model_with(name), inputs(name, side="left")
    if name == "gpt2":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    together = run(model, batch, prompt)
    for row, mask in enumerate(batch["attention_mask"].bool()):
        alone = {"input_ids": batch["input_ids"][row : row + 1, mask]}
        alone |= {key: value[row : row + 1] for key, value in batch.items() if key.startswith("decoder")}
        found = run(model, alone, prompt)
        length = alone["input_ids"].shape[1] - (2 if prompt == "after" else 0)
        close(
            together[row, -length:] if name != "t5" else together[row], found[0, -length:] if name != "t5" else found[0]
        )


# --- PEFT -------------------------------------------------------------------------------------------------------------


def peft_pair(name: str, configuration, ours, tensors: dict[str, str], seed: int = 3):
    """PEFT's model with random weights, and ours with the same ones."""
    torch.manual_seed(seed)
    theirs = get_peft_model(plain(name, head=True), configuration).eval()
    encoder = theirs.prompt_encoder["default"]
    with torch.no_grad():
        for key, parameter in encoder.named_parameters():
            if key != "embedding.weight" or not isinstance(configuration, PeftCPT):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model = adapted(name, head=True)
    model.add_adapter("p", PROMPTS[ours] if isinstance(ours, str) else ours)
    own, given = model.get_adapter("p")[-1]["prompt"], encoder.state_dict()
    own.load_state_dict({tensors.get(key, key): value for key, value in given.items()})
    model.set_active_adapters("p")
    return theirs, model


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_prompt_tuning_is_pefts(name):
    task = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    extra = {"num_transformer_submodules": 1} if name == "t5" else {}
    theirs, model = peft_pair(
        name,
        PeftPromptTuning(task_type=task, num_virtual_tokens=3, **extra),
        "tokens",
        {"embedding.weight": "prompt_embedding.weight"},
    )
    batch = inputs(name)
    batch.pop("decoder_attention_mask", None)
    with torch.no_grad():
        close(model(**batch).logits, of_tokens(theirs(**batch).logits, batch))


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_p_tuning_is_pefts(kind):
    settings = {"encoder_reparameterization_type": kind.upper(), "encoder_hidden_size": 6}
    peft_config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPTS[kind].prompt_length, **settings)
    theirs, model = peft_pair("llama", peft_config, kind, {})
    batch = inputs("llama")
    with torch.no_grad():
        close(model(**batch).logits, of_tokens(theirs(**batch).logits, batch))


def test_multitask_prompt_tuning_is_pefts():
    peft_config = PeftMultitask(task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2, num_ranks=2)
    theirs, model = peft_pair("gpt2", peft_config, "tasks", {})
    batch, tasks = inputs("gpt2"), torch.tensor([1, 0, 0, 1])
    with torch.no_grad():
        wanted = theirs(**batch, task_ids=tasks).logits
        close(model(**batch, task_ids=tasks).logits, of_tokens(wanted, batch))


def test_cpt_is_pefts():
    peft_config = PeftCPT(task_type="CAUSAL_LM", cpt_token_ids=CONTEXT, cpt_tokens_type_mask=KINDS)
    names = {"embedding.weight": "embedding"}
    theirs, model = peft_pair("llama", peft_config, "cpt", names)
    batch = inputs("llama")
    own = model.get_adapter("p")[-1]["prompt"]
    assert (own.delta_embedding.weight.norm(dim=1) > 0.1).all()  # so that the projection has something to do
    with torch.no_grad():
        close(model(**batch).logits, of_tokens(theirs(**batch, labels=None).logits, batch))
    model.train_adapter("p")
    model(**batch).logits.sum().backward()
    gradient = own.delta_embedding.weight.grad
    assert gradient[:3].any(1).all()
    assert not gradient[3].any()
    close(own.delta_embedding.weight.norm(dim=1), torch.tensor([1.0, 1.0, 1.0, 0.0]) * 0.1 * (16 / 2048) ** 0.5)


@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_the_loss_on_the_context_is_pefts(decay):
    context, kinds = [5, 6, 7, 8, 9, 10, 11, 12], [1, 2, 3, 4, 4, 6, 7, 8]
    settings = {"cpt_token_ids": context, "cpt_tokens_type_mask": kinds}
    weighted = {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": decay}
    peft_config = PeftCPT(task_type="CAUSAL_LM", **settings, **weighted)
    theirs, model = peft_pair("llama", peft_config, adapters.CPTConfig(**settings), {"embedding.weight": "embedding"})
    batch = inputs("llama")
    labels = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (torch.arange(6) < 2), -100)
    model.train_adapter("p")
    loss = context_loss(model, "p", **batch, labels=labels, decay=decay)
    wanted = theirs(**batch, labels=labels, input_type_mask=(labels != -100).long() * 4).loss
    close(loss, wanted)
    loss.backward()
    assert model.get_adapter("p")[-1]["prompt"].delta_embedding.weight.grad[:3].any(1).all()
    left = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"].flip(1)}
    with pytest.raises(AdapterError, match="a row is padded on the left"):
        context_loss(model, "p", **left, labels=labels)
    with pytest.raises(AdapterError, match="no CPT adapter of that name"):
        context_loss(model, "zz", **batch, labels=labels)


def test_the_loss_on_the_context_leaves_other_adapters_in_force():
    model = copy.deepcopy(model_with("gpt2", head=True))
    model.add_adapter("lora", "lora[r=2]")
    disturb(model, "lora")
    batch = inputs("gpt2")
    with torch.no_grad():
        losses = {}
        for setup in ("cpt", Stack("lora", "cpt"), None):
            model.set_active_adapters(setup)
            losses[str(setup)] = context_loss(model, "cpt", **batch, labels=batch["input_ids"])
            assert model.active_adapters == (Stack(setup) if setup == "cpt" else setup)
    assert losses["cpt"] == losses["None"] != losses["Stack[lora, cpt]"]


# --- composition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_with_prompts_of_different_lengths(name, side):
    """Each row is what it is alone, also with a prompt of another length, or none, beside it."""
    if name == "vit":
        model, batch, length = model_with(name), inputs(name), 5
    else:
        model, batch, length = model_with(name), inputs(name, side=side), None
    parts = ["prompt", None, "long", Stack("long", "prompt")]
    real = batch.get("decoder_attention_mask", batch.get("attention_mask", torch.ones(4, 5))).bool()
    length = real.shape[1]
    alone = torch.stack([run(model, batch, part)[row, -length:] for row, part in enumerate(parts)])
    found = run(model, batch, BatchSplit(*parts, batch_sizes=1))
    close(found[:, -length:][real], alone[real])
    close(
        run(model, batch, None, adapter_names=["prompt", None, "long", None])[:3, -length:][real[:3]],
        alone[:3][real[:3]],
    )
    parallel = run(model, batch, Parallel("prompt", None))[:, -length:]
    apart = torch.cat([run(model, batch, part)[:, -length:] for part in ("prompt", None)])
    close(parallel[real.repeat(2, 1)], apart[real.repeat(2, 1)])


SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 48}
OTHERS = {
    "deberta-v2": {**SIZE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},  # its embeddings read the mask
    "electra": {**SIZE, "embedding_size": 8},
    "opt": {**SIZE, "ffn_dim": 24, "word_embed_proj_dim": 16, "pad_token_id": PAD},  # positions from the mask
    "gemma2": {**SIZE, "num_key_value_heads": 2, "head_dim": 4},
    "bloom": {"hidden_size": 16, "n_layer": 1, "n_head": 4, "vocab_size": 48, "pad_token_id": PAD},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures(kind):
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **OTHERS[kind])).eval()
    adapters.init(model)
    for prompt in ("prompt", "long", "after"):
        model.add_adapter(prompt, PROMPTS[prompt])
    batch = {key: value[:4] for key, value in inputs("bert", side="left").items()}
    real, parts = batch["attention_mask"].bool(), ["prompt", "long", None, "after"]
    alone = [run(model, batch, part)[row, -6:] for row, part in enumerate(parts)]
    found = run(model, batch, BatchSplit(*parts, batch_sizes=1))
    for row in (0, 1, 2):
        close(found[row, -6:][real[row]], alone[row][real[row]])
    assert run(model, {"input_ids": batch["input_ids"]}, "long").shape[1] == 11


@pytest.mark.parametrize("name", ["bert", "gpt2", "bart"])
def test_places_mix_in_a_batch(name):
    model, batch = model_with(name), inputs(name)
    setup = BatchSplit("after", "tokens", Stack("after", "tokens"), None, batch_sizes=1)
    with torch.no_grad(), AdapterSetup(setup):
        model(**batch)
    head = plain_classifier(name, model) if name == "bert" else None
    if head is not None:
        wanted = [run(head, batch, part)[row] for row, part in enumerate(setup.children)]
        close(run(head, batch, setup), torch.stack(wanted))


def plain_classifier(name, source):
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_config(config(name)).eval()
    adapters.init(model)
    for prompt in ("prompt", "after", "tokens"):
        model.add_adapter(prompt, PROMPTS[prompt])
        disturb(model, prompt, 0.5)
    return model


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_stack_and_average(name):
    model, batch = model_with(name), inputs(name)
    stacked = run(model, batch, Stack("prompt", "long"))
    assert stacked.shape[1] == run(model, batch, "prompt").shape[1] + (0 if name == "t5" else 5)
    close(run(model, batch, Average("prompt", "prompt", weights=[0.3, 0.7])), run(model, batch, "prompt"))
    with torch.no_grad():
        mean = Average("prompt", "prompt")
        close(run(model, batch, mean), run(model, batch, "prompt"))


def test_what_has_no_meaning_is_refused():
    model, batch = model_with("bert"), inputs("bert")
    with pytest.raises(CompositionError, match=r"prompts of different lengths, here \[3, 5\], have no mean"):
        run(model, batch, Average("prompt", "long"))
    with pytest.raises(CompositionError, match="a prompt stands before the whole input"):
        run(model, batch, Split("prompt", "long", splits=[2, 4]))
    with pytest.raises(AdapterError, match=r"attention_mask is no tensor \(b, s\)"):
        run(model, {**batch, "attention_mask": torch.ones(4, 1, 6, 6)}, "prompt")
    with pytest.raises(AdapterError, match=r"task_ids=None for 4 rows; pass task_ids=, one number from 0 to 1"):
        run(model, batch, "tasks")
    with pytest.raises(AdapterError, match=r"task_ids=\[0, 1, 2, 0\]"):
        run(model, batch, "tasks", task_ids=torch.tensor([0, 1, 2, 0]))


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_with_a_cache_is_that_without(name, beams):
    model, batch = model_with(name, head=True), inputs(name, rows=3, side="left")
    batch = {key: value for key, value in batch.items() if not key.startswith("decoder")}
    fixed = {"num_beams": beams, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    for setup in ("prompt", "after", BatchSplit("long", None, "prompt", batch_sizes=1)):
        with torch.no_grad(), AdapterSetup(setup):
            found = [
                model.generate(**batch, **fixed, use_cache=cache, return_dict_in_generate=True, output_scores=True)
                for cache in (True, False)
            ]
        assert torch.equal(found[0].sequences, found[1].sequences)
        for one, other in zip(found[0].scores, found[1].scores, strict=True):
            close(one.nan_to_num(neginf=-1e9), other.nan_to_num(neginf=-1e9), 1e-3)


@pytest.mark.parametrize("name", GENERATORS)
def test_each_row_generates_what_it_does_alone(name):
    model, batch = model_with(name, head=True), inputs(name, rows=3, side="left")
    batch = {key: value for key, value in batch.items() if not key.startswith("decoder")}
    fixed = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    parts = ["long", None, "prompt"]
    with AdapterSetup(BatchSplit(*parts, batch_sizes=1)):
        together = model.generate(**batch, **fixed)
    for row, part in enumerate(parts):
        mask = batch["attention_mask"][row].bool()
        with AdapterSetup(part):
            alone = model.generate(batch["input_ids"][row : row + 1, mask], **fixed)
        assert torch.equal(together[row, -4:], alone[0, -4:])


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "roberta", "albert", "gpt2", "llama"])
@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_d16_static_heads_read_the_tokens(name, auto):
    """Logits are those of the head on the tokens' states, as long as the labels; D16: the first token is one."""
    torch.manual_seed(0)
    model = auto.from_config(config(name)).eval()
    adapters.init(model)
    model.add_adapter("p", PROMPTS["prompt"], set_active=True)
    batch = inputs(name)
    labels = torch.zeros(batch["input_ids"].shape if auto is AutoModelForTokenClassification else 4, dtype=torch.long)
    with torch.no_grad():
        output, states = model(**batch, labels=labels), model.base_model(**batch)
    assert output.loss.isfinite()
    assert output.logits.shape == (*labels.shape, 2)
    tokens = of_tokens(states[0], batch)
    if auto is AutoModelForTokenClassification and name != "roberta":
        head = model.score if name == "llama" else model.classifier
        close(head(tokens), output.logits)
    if name == "bert":
        close(states.pooler_output, model.base_model.pooler(tokens)) if model.base_model.pooler else None
    if name == "albert" and model.base_model.pooler is not None:
        close(states.pooler_output, torch.tanh(model.base_model.pooler(tokens[:, 0])))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "bart"])
def test_language_models_have_a_loss(name):
    model, batch = model_with(name, head=True), inputs(name)
    labels = batch.get("decoder_input_ids", batch["input_ids"])
    with torch.no_grad(), AdapterSetup("prompt"):
        output = model(**batch, labels=labels)
    assert output.logits.shape[:2] == labels.shape
    shift = 0 if name in ("t5", "bart") else 1
    logits, labels = output.logits[:, : labels.shape[1] - shift], labels[:, shift:]
    close(output.loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def test_flexible_heads_read_the_tokens():
    model = adapters.BertAdapterModel(config("bert")).eval()
    model.add_adapter("p", PROMPTS["prompt"])
    batch = inputs("bert")
    labels = torch.zeros_like(batch["input_ids"])
    model.add_tagging_head("tags", num_labels=3)
    model.add_qa_head("span")
    model.add_classification_head("class")
    model.set_active_adapters("p")
    with torch.no_grad():
        tokens = of_tokens(model.base_model(**batch)[0], batch)
        tags = model(**batch, head="tags", labels=labels)
        assert tags.logits.shape == (4, 6, 3)
        assert tags.loss.isfinite()
        span = model(**batch, head="span", start_positions=torch.tensor([1] * 4), end_positions=torch.tensor([2] * 4))
        close(span.start_logits, model.heads["span"].run(tokens)[..., 0])
        close(model(**batch, head="class").logits, model.heads["class"].run(tokens[:, 0]))


# --- the start --------------------------------------------------------------------------------------------------------


def test_d12_from_string(tmp_path):
    """D12: the tokenizer is the model's, or any that is named."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 3, "good": 10, "film": 11}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    model = adapted("bert")
    settings = {"prompt_length": 5, "prompt_init": "from_string"}
    named = adapters.PromptTuningConfig(prompt_init_text="good film", tokenizer_name_or_path=str(tmp_path), **settings)
    model.add_adapter("named", named)
    words = model.embeddings.word_embeddings.weight
    assert torch.equal(vectors(model, "named"), words[[10, 11, 10, 11, 10]])
    model.config.name_or_path = str(tmp_path)
    model.add_adapter("own", named.replace(tokenizer_name_or_path=None))
    assert torch.equal(vectors(model, "own"), vectors(model, "named"))
    model.add_adapter("ids", named.replace(prompt_init_text=[10, 11]))
    assert torch.equal(vectors(model, "ids"), vectors(model, "named"))
    model.save_adapter(tmp_path / "saved", "named")
    other = adapted("bert")  # without the tokenizer
    (tmp_path / "tokenizer.json").unlink()
    other.load_adapter(str(tmp_path / "saved"), load_as="again")
    assert torch.equal(vectors(other, "again"), vectors(model, "named"))


def test_a_start_that_cannot_be_made_is_refused():
    model = adapted("bert")
    settings = {"prompt_init": "from_string", "prompt_init_text": "good"}
    model.config.name_or_path = ""
    with pytest.raises(AdapterError, match="the model has no name to load a tokenizer by; set tokenizer_name_or_path"):
        model.add_adapter("p", adapters.PromptTuningConfig(**settings))
    with pytest.raises(AdapterError, match="'/nowhere' cannot be loaded"):
        model.add_adapter("p", adapters.PromptTuningConfig(**settings, tokenizer_name_or_path="/nowhere"))
    with pytest.raises(AdapterError, match=f"token id {VOCABULARY} is outside"):
        model.add_adapter("p", adapters.CPTConfig(cpt_token_ids=[VOCABULARY]))
    with pytest.raises(AdapterError, match="reads no tokens"):
        adapted("vit").add_adapter("p", adapters.PromptTuningConfig(**{**settings, "prompt_init_text": [BOS]}))
    with pytest.raises(AdapterError, match=r"LlamaModel has only the placement 'tokens'"):
        adapted("llama").add_adapter("p", adapters.PromptTuningConfig(placement="embeddings"))
    assert not model.has_adapters()


def test_d11_a_seed_and_the_scale():
    model = adapted("gpt2")
    for name, scale in (("a", 0.5), ("b", 0.5), ("c", 0.01)):
        model.add_adapter(name, adapters.PromptTuningConfig(random_uniform_scale=scale, init_weights_seed=7))
    assert torch.equal(vectors(model, "a"), vectors(model, "b"))
    assert vectors(model, "a").abs().max() > 0.4
    assert vectors(model, "c").abs().max() <= 0.01
    assert model.adapter_summary(as_dict=True)[0]["#param"] == 160
    own = [key for key in model.state_dict() if "prompt_tuning" in key]
    assert own == [f"prompt_tuning.prompt_tunings.{name}.prompt_embedding.weight" for name in "abc"]
    assert model.adapters_config.get("c").to_dict()["random_uniform_scale"] == 0.01
