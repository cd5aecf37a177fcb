"""lm-evaluation-harness is handed the model and the tasks; a stand-in shows with what."""

import sys
import types

import pytest
from dijiang import evaluate
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def calls(monkeypatch):
    """A module in the place of lm_eval; the calls it gets."""
    seen = {}

    class HFLM:
        def __init__(self, pretrained, tokenizer, batch_size=64, max_length=None):
            seen["model"] = dict(
                pretrained=pretrained, tokenizer=tokenizer, batch_size=batch_size,
                max_length=max_length,
            )  # fmt: skip
            seen["wrapped"] = self

    def simple_evaluate(model, tasks, num_fewshot=None, limit=None):
        seen["call"] = dict(model=model, tasks=tasks, num_fewshot=num_fewshot, limit=limit)
        return {"results": {task: {"acc,none": 0.5} for task in tasks}}

    package = types.ModuleType("lm_eval")
    package.simple_evaluate = simple_evaluate
    package.models = types.ModuleType("lm_eval.models")
    package.models.huggingface = types.ModuleType("lm_eval.models.huggingface")
    package.models.huggingface.HFLM = HFLM
    for module in (package, package.models, package.models.huggingface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


def test_arguments(calls):
    model, tokenizer = tiny_model().train(), tiny_tokenizer()
    made = evaluate.lm_eval(
        model, tokenizer, ("arc_easy", "piqa"), batch_size=4, max_length=512, limit=10,
        num_fewshot=5,
    )  # fmt: skip
    assert made["results"]["piqa"] == {"acc,none": 0.5}
    assert calls["model"] == dict(
        pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=512
    )
    assert calls["call"] == dict(
        model=calls["wrapped"], tasks=["arc_easy", "piqa"], num_fewshot=5, limit=10
    )
    assert not model.training


def test_one_task_and_the_harness_own_defaults(calls):
    evaluate.lm_eval(tiny_model(), tiny_tokenizer(), "piqa")
    assert calls["call"]["tasks"] == ["piqa"] and calls["call"]["limit"] is None
    assert calls["model"]["batch_size"] == 1 and calls["model"]["max_length"] is None
    with pytest.raises(ValueError, match="tasks must name at least one"):
        evaluate.lm_eval(tiny_model(), tiny_tokenizer(), [])


def test_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match="pip install lm_eval"):
        evaluate.lm_eval(tiny_model(), tiny_tokenizer(), ["piqa"])
