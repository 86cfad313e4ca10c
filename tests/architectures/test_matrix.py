"""A fair sample of the matrix, another one at each commit: a cell passes its checks or is refused with the reason.

The types are those of docs/architectures.md; the whole is run by ``make matrix``, which writes that page.
"""

import random
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
from cells import METHODS, run_type
from known import FAILURES

ROOT = Path(__file__).parents[2]
CHECKS, TYPES = 4, 10
pytestmark = pytest.mark.filterwarnings("ignore")


def types() -> list[str]:
    """Those of the page's table."""
    page = (ROOT / "docs/architectures.md").read_text("utf-8").partition("| type |")[2].partition("## Reasons")[0]
    return [line.split("|")[1].strip() for line in page.splitlines()[2:] if line]


def sample() -> list[str]:
    """Types drawn by the commit."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    return sorted(random.Random(commit).sample(types(), TYPES))


@pytest.mark.parametrize("model_type", sample())
def test_a_method_works_or_says_why_not(model_type: str) -> None:
    methods = tuple(method for method in METHODS if (model_type, method) not in FAILURES)
    found = run_type(model_type, methods, CHECKS)
    assert {method: why for method, (kind, why) in found.items() if kind == "fails"} == {}
    refusals = [why for kind, why in found.values() if kind == "refused"]
    assert [why for why in refusals if not why.startswith("add_adapter") or not why.endswith(".")] == []


def by_type() -> list[tuple[str, tuple[str, ...]]]:
    found = defaultdict(list)
    for model_type, method in FAILURES:
        found[model_type].append(method)
    return [(model_type, tuple(methods)) for model_type, methods in found.items()]


@pytest.mark.parametrize(("model_type", "methods"), by_type())
def test_what_is_known_to_fail_fails(model_type: str, methods: tuple[str, ...]) -> None:
    found = run_type(model_type, methods, CHECKS)
    assert {method: kind for method, (kind, _) in found.items()} == dict.fromkeys(methods, "fails"), found


WITHOUT_PROMPTS = ["deepseek_v4", "fsmt", "funnel", "gemma4", "lilt", "mra", "qwen2_vl_vision", "timesformer"]
WITHOUT_MEANING = [
    ("convnext", "prompt_tuning"),
    ("resnet", "double_seq_bn"),
    ("mobilenet_v1", "seq_bn"),
    ("mra", "lora"),
]


@pytest.mark.parametrize("model_type", WITHOUT_PROMPTS)
def test_prompts_without_a_place_are_refused_when_added(model_type: str) -> None:
    assert run_type(model_type, ("prompt_tuning",), CHECKS)["prompt_tuning"][0] == "refused"


@pytest.mark.parametrize(("model_type", "method"), WITHOUT_MEANING)
def test_what_has_no_meaning_says_what_the_model_lacks(model_type: str, method: str) -> None:
    assert run_type(model_type, (method,), CHECKS)[method][0] == "no meaning"


def test_the_page_has_types() -> None:
    assert {model_type for model_type, _ in FAILURES} <= set(types())
