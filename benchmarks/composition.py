"""``python -m benchmarks.composition``: what it costs to use many adapters at once.

Prints the table and writes it to ``docs/benchmarks-composition.md``.
"""

import argparse
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median

import peft
import torch
import transformers
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import adapters
from adapters import Fuse, Parallel, SeqBnConfig

from .by_hand import PREFIX, generating_by_hand, prefix_cache
from .models import sharing
from .timing import interleaved

ADAPTERS, FUSED = 64, (2, 4, 8)
Row = tuple[str, str, str, str]


def encoder(hidden: int, layers: int) -> nn.Module:
    """BERT of that width, with heads of 64 units at most."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 4 * hidden}
    return BertModel(BertConfig(num_attention_heads=max(2, hidden // 64), vocab_size=1000, **sizes)).eval()


def tokens(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens without padding."""
    ids = torch.randint(5, 1000, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def call(model: nn.Module, batch: dict[str, torch.Tensor], **kwargs: object) -> None:
    """A forward pass without gradients."""
    model(**batch, **kwargs)


def mixed_batch(rounds: int) -> list[Row]:
    """Rows of one batch with an adapter each, as a ratio to one adapter for all."""
    base, batch = encoder(64, 4), tokens(ADAPTERS, 32)
    names = [f"a{number}" for number in range(ADAPTERS)]
    rows = []
    for method in ("lora", "seq_bn"):
        model = sharing(base)
        adapters.init(model)
        for name in names:
            model.add_adapter(name, config=method)
        model.eval()
        few = [names[row % 8] for row in range(ADAPTERS)]
        calls = {"one": partial(call, model, batch, adapter_names="a0")}
        calls |= {
            "64": partial(call, model, batch, adapter_names=names),
            "8": partial(call, model, batch, adapter_names=few),
        }
        seconds = interleaved(calls, rounds)
        for count in ("8", "64"):
            label = f"mixed batch of 64 rows, {count} {method}: time / one adapter's"
            target = "1.5" if (count, method) == ("64", "lora") else ""
            rows.append((label, f"{seconds[count] / seconds['one']:.2f}", target, ""))
    other = peft.get_peft_model(sharing(base), peft.LoraConfig(r=8, target_modules=["query", "value"]), "a0")
    for name in names[1:]:
        other.add_adapter(name, peft.LoraConfig(r=8, target_modules=["query", "value"]))
    other.eval()
    calls = {"one": partial(call, other, batch), "64": partial(call, other, batch, adapter_names=names)}
    seconds = interleaved(calls, rounds)
    label, target, measured = rows[1][0], rows[1][2], rows[1][1]
    rows[1] = (label, measured, target, f"{seconds['64'] / seconds['one']:.2f}")
    return rows


def parallel(rounds: int) -> list[Row]:
    """Eight tasks on one input, as a ratio to one."""
    model, batch = encoder(768, 12), tokens(1, 128)
    adapters.init(model)
    names = [f"a{number}" for number in range(8)]
    for name in names:
        model.add_adapter(name, config="seq_bn")
        model.add_adapter(f"upper_{name}", config=SeqBnConfig(leave_out=list(range(6))))
    model.eval()
    setups = {"one": "a0", "all": Parallel(*names), "upper": Parallel(*(f"upper_{name}" for name in names))}
    seconds = interleaved(
        {key: partial(call, model, batch, adapter_names=setup) for key, setup in setups.items()}, rounds
    )
    return [
        (
            "BERT-base shape, Parallel, 8 bottlenecks in all layers: time / one's",
            f"{seconds['all'] / seconds['one']:.2f}",
            "6.5",
            "",
        ),
        (
            "BERT-base shape, Parallel, 8 bottlenecks in the upper half",
            f"{seconds['upper'] / seconds['one']:.2f}",
            "4.2",
            "",
        ),
    ]


def fusion(rounds: int) -> list[Row]:
    """AdapterFusion, as a ratio to the bare model."""
    bare, batch = encoder(384, 6), tokens(8, 128)
    model = sharing(bare)
    adapters.init(model)
    names = [f"a{number}" for number in range(max(FUSED))]
    for name in names:
        model.add_adapter(name, config="seq_bn")
    for count in FUSED:
        model.add_adapter_fusion(names[:count])
    model.eval()
    setups = {count: Fuse(*names[:count]) for count in FUSED}
    calls: dict[str, Callable[[], object]] = {"bare": partial(call, bare, batch)}
    calls |= {str(count): partial(call, model, batch, adapter_names=setup) for count, setup in setups.items()}
    seconds = interleaved(calls, rounds)
    rows = [
        (f"Fusion of {count}, forward: time / bare model", f"{seconds[str(count)] / seconds['bare']:.2f}", target, "")
        for count, target in zip(FUSED, ("", "", "1.35"), strict=True)
    ]
    trained = encoder(384, 6).train()
    model.train_adapter_fusion(setups[8])

    def step(network: nn.Module) -> None:
        network(**batch)[0].square().mean().backward()
        network.zero_grad()

    seconds = interleaved({"bare": partial(step, trained), "8": partial(step, model)}, rounds)
    rows.append(("Fusion of 8, training: time / full fine-tuning", f"{seconds['8'] / seconds['bare']:.2f}", "1.5", ""))
    return rows


def switching() -> Row:
    """Another active adapter, with 100 in the model."""
    model = encoder(768, 12)
    adapters.init(model)
    for number in range(100):
        model.add_adapter(f"a{number}", config="lora")
    times = []
    for number in range(200):
        start = time.perf_counter()
        model.set_active_adapters(f"a{number % 100}")
        times.append(time.perf_counter() - start)
    first, again = median(times[:100]), median(times[100:])
    return (
        "switching the active adapter, 100 present",
        f"{again * 1e3:.3f} ms ({first * 1e3:.2f} ms at first)",
        "0.05 ms",
        "",
    )


def generation(rounds: int) -> list[Row]:
    """Greedy generation with a cache, as a ratio to the bare model; and of the same formulas in its own classes."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    bare = GPT2LMHeadModel(GPT2Config(n_embd=384, n_layer=6, n_head=6, vocab_size=5000, **ends)).eval()
    batch, longer = tokens(8, 64), tokens(8, 64 + PREFIX)

    def generate(model: nn.Module) -> None:
        model.generate(**batch, max_new_tokens=32, min_new_tokens=32, do_sample=False)

    def generate_behind_prefix(model: nn.Module) -> None:
        cache = prefix_cache(model, 8, PREFIX)
        model.generate(**longer, past_key_values=cache, max_new_tokens=32, min_new_tokens=32, do_sample=False)

    calls: dict[str, Callable[[], object]] = {"bare": partial(generate, bare)}
    methods = {"lora": generate, "seq_bn": generate, "prefix_tuning": generate_behind_prefix}
    for method, by_hand in methods.items():
        model = sharing(bare)
        adapters.init(model)
        model.add_adapter("a", config=method, set_active=True)
        calls[method] = partial(generate, model.eval())
        calls[f"{method}, by hand"] = partial(by_hand, generating_by_hand(bare, method))
    seconds = interleaved(calls, rounds)
    return [
        (f"generate, GPT-2 with {name}: time / bare", f"{seconds[name] / seconds['bare']:.2f}", target, "")
        for name, target in ((name, "1.03" if name in methods else "") for name in calls)
        if name != "bare"
    ]


def main() -> None:
    """Measure everything, report it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.composition", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="how often all is timed")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks-composition.md"), help="the report")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows: list[Row] = [("", "here", "target", "PEFT"), ("---",) * 4]
    for part in (mixed_batch, parallel, fusion, generation):
        rows += part(arguments.rounds)
    rows.append(switching())
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    command = f"python -m benchmarks.composition --rounds {arguments.rounds}"
    text = (
        f"# Benchmarks: composition\n\nWritten by `{command}` on {date.today()}: one thread, CPU time, interleaved.\n"
    )
    arguments.output.write_text(f"{text}\n{table}\n", "utf-8")
    print(table)


if __name__ == "__main__":
    main()
