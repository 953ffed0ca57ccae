"""The trained agents kept in benchmark/results/ score what is written beside them."""

import importlib
import json
import sys

import pytest
from conftest import ROOT

MODELS = sorted((ROOT / "benchmark/results").rglob("model.safetensors"))


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.parent.parent.name)
def test_kept_agent_plays_to_its_kept_score(path, monkeypatch):
    result, seen = json.loads((path.parent / "result.json").read_text()), []
    script = importlib.import_module(result["script"])
    evaluate = script.evaluate
    monkeypatch.setattr(script, "evaluate", lambda *inputs: seen.append(evaluate(*inputs)))
    monkeypatch.setattr(sys, "argv", [script.__file__, "--evaluate", str(path)])
    script.main()
    # Another processor rounds differently, which a long episode magnifies; here the returns are equal.
    assert seen[0].mean() == pytest.approx(result["eval_mean"], rel=0.05)
    assert path.stat().st_size < 150_000
