"""Models with active adapters go through ``torch.export`` and ``torch.onnx.export``, with equal outputs."""

import pytest
import torch
from tiny_models import METHODS, MORE_METHODS, disturb, inputs, output, plain

import adapters
from adapters import Average, BatchSplit, Parallel, Split, Stack

pytestmark = [
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning"),
]
ALONE = ("lora", "ia3", "seq_bn", "prefix_tuning", "prompt", "loreft", "seq_bn_inv", "gated_lora", "ln_tuning")
SETUPS = {
    **{name: name for name in ALONE},
    "stack": Stack("lora", "seq_bn"),
    "parallel": Parallel("lora", "seq_bn"),
    "average": Average("lora", "ia3", weights=[0.7, 0.3]),
    "batch split": BatchSplit("lora", "seq_bn", batch_sizes=[1, 3]),
    "split": Split("seq_bn", "lora", splits=[2, 4]),
}
CASES = [("bert", name) for name in SETUPS]
CASES += [(model, name) for model in ("gpt2", "llama") for name in ("lora", "prefix_tuning")]


def active(name: str, setup):
    model = plain(name)
    adapters.init(model)
    for method in dict.fromkeys([setup] if isinstance(setup, str) else setup.leaves()):
        model.add_adapter(method, (METHODS | MORE_METHODS)[method])
        disturb(model, method)
    model.config.use_cache = False
    model.set_active_adapters(setup)
    return model


@pytest.mark.parametrize(("name", "setup"), CASES)
def test_an_exported_program_gives_what_the_model_gives(name: str, setup: str) -> None:
    model, batch = active(name, SETUPS[setup]), inputs(name)
    with torch.no_grad():
        program = torch.export.export(model, (), dict(batch), strict=False)
        found = program.module()(**batch)[0]
        wanted = model(**batch)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_onnxruntime_gives_what_the_model_gives(tmp_path) -> None:
    """Batches of any size and length; one setup, as it takes long."""
    runtime = pytest.importorskip("onnxruntime")
    model = active("bert", SETUPS["stack"])
    free = torch.export.Dim.DYNAMIC
    batch = inputs("bert")
    program = torch.onnx.export(
        model,
        (),
        kwargs=batch,
        dynamo=True,
        optimize=False,
        verbose=False,
        dynamic_shapes={key: {0: free, 1: free} for key in batch},
    )
    program.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for part in (batch, {key: value[:2, :4] for key, value in batch.items()}):
        found = session.run(None, {key: value.numpy() for key, value in part.items()})[0]
        torch.testing.assert_close(torch.tensor(found), output(model, part), rtol=1e-4, atol=1e-5)
