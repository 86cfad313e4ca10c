"""What the goldens cover, as data: groups of adapters that live in one model, and the setups to run on each group.

Read by ``make_goldens.py`` only (the tests read ``goldens/index.json``, which it writes). Configs are strings in the
grammar of ``AdapterConfig.load`` and setups are Python expressions over the composition blocks, so a line here is what
a user would type.
"""

from dataclasses import dataclass, field, replace

PADDED = ("right",)
PADDED_BOTH_WAYS = ("right", "left")
COMPOSED = ("composed",)
UNPADDED = ("plain",)


@dataclass(frozen=True)
class Group:
    """Adapters that are added to one model, saved once, and run in several setups.

    ``labels`` names the labels of a prediction head: of a flexible one when ``head_type`` is given, else of the static
    head of the class ``model``.
    """

    id: str
    adapters: dict[str, str]
    setups: dict[str, str] = field(default_factory=lambda: {"": "'a'"})
    fusions: dict[str, str] = field(default_factory=dict)
    inputs: tuple[str, ...] = PADDED
    architectures: tuple[str, ...] = ()
    not_on: tuple[str, ...] = ()
    gated_too: bool = False
    model: str = "AutoModel"
    labels: str = ""
    head_type: str = ""
    head_arguments: dict[str, object] = field(default_factory=dict)
    added_length: int = 0
    known_wrong: dict[str, str] = field(default_factory=dict)
    add_first: bool = False

    def concerns(self, architecture: str) -> bool:
        """Whether this group is run on that architecture; the variants of T5 get what T5 itself cannot show."""
        if architecture == "mt5":
            return self.gated_too
        if architecture == "t5_unbiased":
            return "t5" in self.known_wrong or self.id == "bare"
        return architecture in (self.architectures or ARCHITECTURES) and architecture not in self.not_on


ARCHITECTURES = (
    *("bert", "roberta", "distilbert", "albert", "gpt2", "llama", "mistral", "t5", "bart", "vit"),
    "mt5",  # gated feed-forwards
    "t5_unbiased",  # T5 whose position bias is zero, so that 1.x's shift of it under a prefix has no effect (D8)
)
ENCODER_DECODERS = ("t5", "bart", "t5_unbiased")
POST_NORM = ("bert", "roberta", "distilbert", "albert", "bart")
ONE_LAYER = ("albert",)
C1 = {"albert": "C1: 1.x hands ALBERT's attention adapter the layer input and the attention output in swapped roles"}
D8 = {"t5": "D8: 1.x shifts T5's position bias by the length of the prefix"}

# What 1.3.0 computes wrongly or not at all on every architecture, so that there is no golden (defects-1x.md).
LEFT_OUT = {
    "Average of anything": "A1: 1.x divides by the number of children twice",
    "Average of prefixes, Fuse or Split of LoRAs or prefixes": "A10: 1.x raises NotImplementedError",
    "Stack in Parallel, BatchSplit or Fuse": "A2: 1.x applies the block's norm and residual twice",
    "Stack of LoRAs": "A3: 1.x hands the first one's delta to the second",
    "Stack of a sequential or parallel and a parallel bottleneck": "A4: in 1.x only the last one acts",
    "Stack of a parallel and a sequential bottleneck": "A4: 1.x drops the output of the sub-layer itself",
    "children of different LoRA kinds or with modules at different places": "A7, A8: 1.x computes wrongly or raises",
    "Parallel of prefixes of different lengths": "A9: 1.x pads the shorter one with zeros that are attended to",
    "Parallel of a union": "1.x raises an error about sizes",
    "Fuse with temperature": "C15: in 1.x the output depends on the number of earlier calls",
    "gates on padded inputs": "C9: in 1.x gates average over padding",
    "prefixes with sdpa attention": "D1 to D4: 1.x is wrong with masks and causal models, so the goldens use eager",
    "generate with cache on llama and mistral": "D5: 1.x sees the last token only",
    "stochastic depth": "F13: 1.x needs torchvision, which does not import beside the CPU build of torch",
    "GLOW; mtl_lora with task_specific_matrix_type='linear'": "C12, B10: 1.x raises",
}


def one(id: str, config: str, **settings: object) -> Group:
    """One adapter ``a`` that is active alone."""
    return Group(id, {"a": config}, **settings)  # type: ignore[arg-type]


def bottlenecks() -> list[Group]:
    """Every field of ``BnConfig`` but those of PHM, invertible and stochastic depth."""
    seq, double, par = (f"{kind}[reduction_factor=8" for kind in ("seq_bn", "double_seq_bn", "par_bn"))
    plus = f"{seq},non_linearity='gelu'"
    fields = {
        "seq_bn": f"{seq}]",
        "scaled_par_bn": "scaled_par_bn[reduction_factor=8]",
        "par_bn": f"{par}]",
        "adapter_plus": f"{plus},original_ln_after=False,residual_before_ln=False,scaling='channel']",
        "norm_none": f"{seq},original_ln_before=False,original_ln_after=False]",
        "norm_after": f"{seq},original_ln_before=False]",
        "norm_before": f"{seq},original_ln_after=False]",
        "own_norm_before": f"{seq},ln_before=True]",
        "own_norm_after": f"{seq},ln_after=True]",
        "own_norm_both_residual_inside": f"{seq},ln_before=True,ln_after=True,adapter_residual_before_ln=True]",
        "residual_inside": f"{seq},adapter_residual_before_ln=True,ln_after=True,original_ln_before=False]",
        "residual_after_norm": f"{seq},residual_before_ln=False]",
        "scaling_learned": f"{seq},scaling='learned']",
        "scaling_channel": f"{seq},scaling='channel']",
        "scaling_number": f"{seq},scaling=0.5,dropout=0.3]",
        "reduction_per_layer": "seq_bn[reduction_factor={'default':16,'1':8},non_linearity='leakyrelu']",
        "wide": "seq_bn[reduction_factor=0.8,non_linearity='gelu_new']",
        "par_norm_before": f"{par},ln_before=True,ln_after=True]",
        "par_norm_none": f"{par},original_ln_after=False,scaling='channel']",
    }
    twice = {
        "double_seq_bn": f"{double}]",
        "double_norm_before": f"{double},original_ln_before=True,original_ln_after=False,residual_before_ln=False]",
        "double_norm_both": f"{double},original_ln_before=True]",
        "attention_only": f"{double},output_adapter=False]",
        "double_par_bn": f"{par},mh_adapter=True]",
        "union_seq_par": f"{double},output_adapter=False]|{par}]",
    }
    groups = [one(name, config) for name, config in fields.items()]
    groups += [one("residual_twice", f"{seq},residual_before_ln='post_add']", architectures=POST_NORM)]
    groups += [one(name, config, known_wrong=C1) for name, config in twice.items()]
    groups += [
        one("leave_out", f"{seq},leave_out=[0],non_linearity='tanh']", not_on=ONE_LAYER),
        one("gating", f"{seq},use_gating=True]", inputs=UNPADDED),
        one("par_gating", f"{par},use_gating=True,scaling='learned']", inputs=UNPADDED),
        one("cross", f"{double},cross_adapter=True]", architectures=ENCODER_DECODERS),
        one("cross_seq", f"{seq},cross_adapter=True]", architectures=ENCODER_DECODERS),
        one("cross_par", f"{par},cross_adapter=True]", architectures=ENCODER_DECODERS),
    ]
    return groups


def loras() -> list[Group]:
    """LoRA on every choice of projections, and the scaling kind that (IA)³ is a preset of."""
    everywhere = "intermediate_lora=True,output_lora=True"
    configs = {
        "lora": "lora[r=2]",
        "lora_default": "lora",
        "lora_everywhere": f"lora[r=2,alpha=3,{everywhere},attn_matrices=['q','k','v'],dropout=0.2]",
        "lora_query": "lora[r=2,alpha=4,attn_matrices=['q']]",
        "lora_key": "lora[r=2,alpha=4,attn_matrices=['k']]",
        "lora_value_query": "lora[r=2,alpha=4,attn_matrices=['v','q'],dtype='float32']",
        "lora_key_value": "lora[r=2,alpha=4,attn_matrices=['k','v'],leave_out=[1]]",
        "lora_intermediate": "lora[r=3,selfattn_lora=False,intermediate_lora=True]",
        "lora_output": "lora[r=3,selfattn_lora=False,output_lora=True]",
    }
    scale = "lora[r=1,alpha=2,composition_mode='scale',init_weights='ia3',output_lora=True]"
    unadapted = "1.x multiplies the projections of c_attn that have no adapter by alpha"
    gated = {
        "lora_gating": f"lora[r=2,alpha=2,use_gating=True,{everywhere},attn_matrices=['q','k','v']]",
        "lora_scale_gating": "lora[r=1,alpha=1,composition_mode='scale',init_weights='ia3',use_gating=True]",
    }
    return [
        *(one(name, config) for name, config in configs.items()),
        *(one(name, config, inputs=UNPADDED) for name, config in gated.items()),
        one("lora_scale", scale, known_wrong={"gpt2": unadapted}),
        # 1.x ignores alpha where a LoRA is gated (B9): these files are read with another alpha than they say.
        one("rescaled_lora", "lora[r=2,alpha=4,use_gating=True]", inputs=UNPADDED, architectures=("bert", "gpt2")),
        one("rescaled_lora_scale", gated["lora_scale_gating"].replace("alpha=1", "alpha=3"), inputs=UNPADDED,
            architectures=("bert",)),
    ]  # fmt: skip


def prefixes() -> list[Group]:
    """Prefix tuning and the unions that contain it."""
    small = "prefix_length=5,bottleneck_size=16"
    prefix = f"prefix_tuning[{small}"
    par, gated = "par_bn[reduction_factor=8]", "use_gating=True]"
    union = f"{prefix},{gated}|seq_bn[reduction_factor=8,{gated}|lora[r=2,alpha=2,{gated}"
    both: dict[str, object] = {"inputs": PADDED_BOTH_WAYS, "known_wrong": D8}
    return [
        one("prefix", f"{prefix},dropout=0.1]", **both),
        one("prefix_flat", "prefix_tuning_flat[prefix_length=5]", **both),
        one("prefix_relu_leave_out", f"{prefix},non_linearity='relu',leave_out=[0]]", not_on=ONE_LAYER, **both),
        one("prefix_gating", f"{prefix},{gated}", inputs=UNPADDED, known_wrong=D8),
        one("prefix_two_gates", f"{prefix},shared_gating=False,{gated}", inputs=UNPADDED, known_wrong=D8),
        one("prefix_not_in_encoder", f"{prefix},encoder_prefix=False]", architectures=ENCODER_DECODERS, **both),
        one("prefix_not_across", f"{prefix},cross_prefix=False]", architectures=ENCODER_DECODERS, **both),
        one("mam", f"{prefix}]|{par}", **both),
        one("unipelt", union, inputs=UNPADDED, known_wrong=D8),
        one("rescaled_unipelt", union.replace("r=2", "r=4"), inputs=UNPADDED, architectures=("bert",)),
    ]


def compositions() -> list[Group]:
    """Composition blocks; ``known_wrong`` and the laws of the generator say where 1.3.0 is right."""
    halves = {
        "batch_split": "BatchSplit('a', 'b', batch_sizes=[1, 2])",
        "parallel": "Parallel('a', 'b')",
    }
    blocks = halves | {
        "stack": "Stack('a', 'b')",
        "stack_of_three": "Stack('c', 'a', 'b')",
        "parallel_of_three": "Parallel('c', 'a', 'b')",
        "stack_parallel": "Stack('c', Parallel('a', 'b'))",
        "stack_batch_split": "Stack('c', BatchSplit('a', 'b', batch_sizes=[2, 1]))",
        "fuse_static": "Fuse('a', 'b')",
        "fuse_dynamic": "Fuse('b', 'c')",
        "stack_fuse": "Stack('c', Fuse('a', 'b'))",
    }
    bottlenecks = {"a": "seq_bn[reduction_factor=8]", "b": "seq_bn[reduction_factor=16,non_linearity='tanh']"}
    bottlenecks |= {"c": "seq_bn[reduction_factor=8,non_linearity='gelu']"}
    doubles = {"a": "double_seq_bn[reduction_factor=8]", "b": "double_seq_bn[reduction_factor=16]"}
    low_rank = {"a": "lora[r=2,attn_matrices=['q','k','v']]", "b": "lora[r=3,alpha=2,attn_matrices=['q','k','v']]"}
    feed_forward = "selfattn_lora=False,intermediate_lora=True,output_lora=True]"
    low_rank_outside = {"a": f"lora[r=2,{feed_forward}", "b": f"lora[r=1,{feed_forward}"}
    prefix = dict.fromkeys("ab", "prefix_tuning[prefix_length=5,bottleneck_size=16]")
    fusions = {"a,b": "static", "b,c": "dynamic"}
    splits = {"split": "Split('a', 'b', splits=[3, 4])", "stack_split": "Stack('c', Split('a', 'b', splits=[2, 5]))"}
    two = {"a": bottlenecks["a"], "b": bottlenecks["b"]}
    stack = {"stack": "Stack('a', 'b')"}
    more = halves | stack
    groups = [
        Group("composed_bottlenecks", bottlenecks, blocks, fusions, inputs=COMPOSED),
        Group("nested_bottlenecks", bottlenecks, {
            "parallel_batch_split": "Parallel(BatchSplit('a', 'b', batch_sizes=[1, 2]), 'c')",
            "batch_split_of_three": "BatchSplit('c', 'a', 'b', batch_sizes=[1, 1, 1])",
        }, {"a,b": "dynamic"}, inputs=COMPOSED, architectures=("bert", "gpt2", "t5")),
        Group("split_bottlenecks", bottlenecks, splits, inputs=UNPADDED, not_on=("vit",)),
        Group("composed_doubles", doubles, more | {"fuse": "Fuse('a', 'b')"}, {"a,b": "static"}, inputs=COMPOSED,
              known_wrong=C1),
        Group("composed_loras", low_rank, halves, inputs=COMPOSED),
        Group("composed_loras_feed_forward", low_rank_outside, halves, inputs=COMPOSED),
        Group("composed_prefixes", prefix, more, inputs=("composed", "left"), known_wrong=D8),
        Group("lora_and_bottleneck", {"a": "lora[r=2]", "b": bottlenecks["a"]}, stack, inputs=COMPOSED),
        Group("prefix_and_bottleneck", {"a": prefix["a"], "b": bottlenecks["a"]}, stack, inputs=COMPOSED,
              known_wrong=D8),
    ]  # fmt: skip
    variants = {
        "query_before_norm": {"query_before_ln": True},
        "residual_before": {"residual_before": True},
        "value_after_softmax": {"value_before_softmax": False},
        "no_key": {"key": False},
        "no_query": {"query": False},
    }
    for name, change in variants.items():
        groups.append(Group(f"fuse_{name}", two, {"": "Fuse('a', 'b')"}, {"a,b": repr(change)},
                            inputs=COMPOSED, architectures=("bert", "gpt2")))  # fmt: skip
    return groups


def heads() -> list[Group]:
    """Flexible heads saved with their adapter, static heads, and static ones that a flexible model converts."""
    kinds: dict[str, tuple[str, str, dict[str, object]]] = {
        "classification": ("class", "classification", {"num_labels": 3}),
        "classification_one_layer": ("class", "classification", {"num_labels": 3, "layers": 1}),
        "classification_pooler": ("class", "classification", {"num_labels": 3, "layers": 1, "use_pooler": True}),
        "regression": ("number", "classification", {"num_labels": 1, "activation_function": "gelu"}),
        "multilabel": ("many", "classification", {"num_labels": 4, "multilabel": True}),
        "tagging": ("tags", "tagging", {"num_labels": 5}),
        "tagging_two_layers": ("tags", "tagging", {"num_labels": 5, "layers": 2}),
        "masked_lm": ("tokens", "masked_lm", {}),
        "masked_lm_one_layer": ("tokens", "masked_lm", {"layers": 1}),
        "causal_lm": ("tokens", "causal_lm", {}),
        "causal_lm_one_layer": ("tokens", "causal_lm", {"layers": 1}),
        "image": ("class", "image_classification", {"num_labels": 3}),
    }
    config = "seq_bn[reduction_factor=8]"
    encoders = ("bert", "roberta", "distilbert", "albert")
    decoders = ("gpt2", "llama", "mistral")
    offered = dict.fromkeys(kinds, encoders + decoders) | {"classification_pooler": ("bert", "roberta", "albert")}
    offered |= {"masked_lm": encoders, "masked_lm_one_layer": encoders, "image": ("vit",)}
    offered |= dict.fromkeys(("causal_lm", "causal_lm_one_layer"), ("bert", "roberta", *decoders))
    offered |= {name: offered[name] + ("bart", "t5") for name in ("classification", "regression", "multilabel")}
    groups = [
        one(f"head_{name}", config, model="AutoAdapterModel", labels=labels, head_type=head_type,
            head_arguments=arguments, inputs=("classify",), architectures=offered[name])
        for name, (labels, head_type, arguments) in kinds.items()
    ]  # fmt: skip
    static = {
        "SequenceClassification": ("class", encoders + decoders + ("bart",)),
        "TokenClassification": ("tags", encoders + decoders),
        "MaskedLM": ("tokens", encoders),
        "CausalLM": ("tokens", decoders),
        "ImageClassification": ("class", ("vit",)),
    }
    for task, (labels, architectures) in static.items():
        groups.append(one(f"static_{task}", config, model=f"AutoModelFor{task}", labels=labels, inputs=("classify",),
                          architectures=architectures))  # fmt: skip
    return groups


def core() -> list[Group]:
    """The methods whose modules are part of the core."""
    bare = Group("bare", {}, {"": "None"}, inputs=("plain", "right", "left"))
    return [bare, *bottlenecks(), *loras(), *prefixes(), *compositions(), *heads()]


def others() -> list[Group]:
    """The methods built on the core: same format, in a sub-tree of their own.

    Those with shared parameters are saved from an ``AutoAdapterModel``: a bare base model of 1.x loses them (F4).
    """
    headed = {"model": "AutoAdapterModel"}
    b5 = "B5: 1.x shapes VeRA's shared matrices after the first projection"
    vera_wrong = dict.fromkeys(("llama", "mistral"), b5)
    configs: dict[str, tuple[str, dict[str, object]]] = {
        "compacter": ("compacter[reduction_factor=4,phm_dim=2]", {**headed, "known_wrong": C1}),
        "compacter_plus_plus": ("compacter++[reduction_factor=4]", headed),
        "compacter_own_rule": ("compacter++[reduction_factor=4,shared_phm_rule=False,factorized_phm_W=False]", headed),
        "compacter_factorized": ("compacter++[reduction_factor=4,factorized_phm_rule=True,phm_rank=2]", headed),
        "compacter_shared": ("compacter++[reduction_factor=4,shared_W_phm=True,phm_bias=False]", headed),
        "seq_bn_inv": ("seq_bn_inv[reduction_factor=8]", {"not_on": ("vit",)}),
        "double_seq_bn_inv": ("double_seq_bn_inv[reduction_factor=8]", {"not_on": ("vit",), "known_wrong": C1}),
        "ia3": ("ia3", {}),
        "ia3_gating": ("ia3[use_gating=True]", {"inputs": UNPADDED}),
        "vera": ("vera[r=3]", {**headed, "known_wrong": vera_wrong}),
        "dora": ("dora[r=2,alpha=2]", {}),
        "dora_scaled": ("dora[r=2,alpha=6,output_lora=True]", {}),
        "dvora": ("dvora[r=3,alpha=3]", {**headed, "known_wrong": vera_wrong}),
        "mtl_lora": ("mtl_lora[r=2,n_up_projection=3]", {}),
        "prompt_tuning": ("prompt_tuning[prompt_length=3]", {"added_length": 3, "inputs": PADDED_BOTH_WAYS}),
        "prompt_tuning_after_bos": (
            "prompt_tuning[prompt_length=3,combine='prefix_after_bos']", {"added_length": 3, "inputs": UNPADDED}),
        "noreft": ("noreft[r=2,non_linearity='tanh']", {"inputs": PADDED_BOTH_WAYS}),
        "noreft_tied": (
            "noreft[r=2,suffix_positions=2,tied_weights=True,layers=[1]]",
            {"inputs": PADDED_BOTH_WAYS, "not_on": ONE_LAYER}),
        "loreft": ("loreft[r=2,suffix_positions=1,prefix_positions=2]", {"inputs": PADDED_BOTH_WAYS}),
        "direft": ("direft[r=2]", {"add_first": True}),
    }  # fmt: skip
    groups = [one(name, config, **settings) for name, (config, settings) in configs.items()]
    tasks = {"a": "mtl_lora[r=2]", "b": "mtl_lora[r=3,n_up_projection=2]"}
    groups.append(Group("mtl_tasks", tasks, {"": "MultiTask('a', 'b')"}, inputs=("tasks",)))
    return [replace(group, id=f"other/{group.id}") for group in groups]


def all_groups() -> list[Group]:
    """Every group; a few are run on the gated architecture too."""
    gated = {"bare", "double_seq_bn", "lora_everywhere", "lora_intermediate", "other/ia3"}
    return [replace(group, gated_too=group.id in gated) for group in core() + others()]
