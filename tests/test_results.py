"""benchmark/results/: the kept agents score what is written beside them, and scores.csv is what the folders say."""

import csv
import importlib
import json
import re
import sys
from dataclasses import replace

import keep
import pandas as pd
import pytest
from conftest import ROOT

RESULTS = ROOT / "benchmark/results"
MODELS = sorted(RESULTS.rglob("model.safetensors"))


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.parent.parent.name)
def test_kept_agent_plays_to_its_kept_returns(path):
    """The first two of its ten episodes; each has an environment and a start of its own."""
    result = json.loads((path.parent / "result.json").read_text())
    script = importlib.import_module(result["script"])
    args, agent, normalizer = script.load_model(str(path))
    (returns,) = script.evaluate(replace(args, eval_episodes=2), agent, normalizer)
    # Another processor rounds differently, which a long episode magnifies; here the returns are equal.
    assert returns == pytest.approx(result["eval_returns"][:2], rel=0.05)
    assert path.stat().st_size < 150_000


def test_scores_csv_is_what_the_folders_say():
    """The command writes it anew, byte for byte; and by the result files alone its rows are right."""
    kept = (RESULTS / "scores.csv").read_text()
    assert keep.scores(RESULTS) == kept, "run benchmark/keep.py"
    rows = {row["folder"]: row for row in csv.DictReader(kept.splitlines())}
    paths = sorted(RESULTS.rglob("result.json"))
    assert len(rows) == len(paths) == len(kept.splitlines()) - 1
    for path in paths:
        result, row = json.loads(path.read_text()), rows[path.parent.relative_to(RESULTS).as_posix()]
        assert float(row["score"]) == result[row["score_is"]] and int(row["seed"]) == result["seed"]
        assert (row["script"], row["commit"]) == (result["script"], result["commit"][:10])
        assert float(row["wall_seconds"]) == result["wall_seconds"] and result["versions"]["torch"] in row["versions"]
        assert row["environment"] == result.get("env_id", "TL;DR" if "tldr" in result["script"] else "IMDB")
        for name in ("alpha", "beta", "Z"):
            assert row[name] == ("" if name not in result["args"] else str(float(result["args"][name])))
        lines = list(csv.DictReader((path.parent / "curves.csv").read_text().splitlines()))
        tag = "charts/episodic_return" if "env_id" in result else "objective/scores"
        steps = [(float(next(iter(line.values()))), float(line[tag])) for line in lines if line[tag]]
        last = [value for step, value in steps if step >= 0.8 * steps[-1][0]]  # and what lies before the tenth
        assert min(last) <= float(row["train_return"]) <= max(last)


def snippets(page):
    """Python blocks of a page that read scores.csv."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return [block for block in blocks if "scores.csv" in block]


def test_the_pages_snippets_read_scores_csv(monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = snippets("docs/results.md")
    names = {}
    exec(code, names)
    runs = names["runs"].query("kind == 'paper' and environment == 'Hopper-v4' and noise == 'none'")
    dppo, dsppo = (runs[runs.algorithm == name].score for name in ("DPPO", "DSPPO"))
    assert names["table"].loc[("Hopper-v4", "DSPPO", "none"), "mean"] == pytest.approx(dsppo.mean())
    assert names["chance"] == pytest.approx(sum(x > y for x in dsppo for y in dppo) / len(dppo) / len(dsppo))
    assert 0 <= names["interval"].low < names["chance"] < names["interval"].high <= 1
    assert f"# {names['chance']:.2f} [{names['interval'].low:.2f}, {names['interval'].high:.2f}]" in code


def test_the_readmes_snippet_prints_a_table(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = snippets("README.md")
    exec(code, {})
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("DSPPO"))
    assert line.split()[-1] == "5"


def write_curve(run_dir, tag, every):
    run_dir.mkdir(parents=True)
    lines = [f"{step},{step / 10},{step if step % every == 0 else ''}\n" for step in range(1, 1001)]
    (run_dir / "curves.csv").write_text(f"global_step,charts/SPS,{tag}\n" + "".join(lines))
    return [line.strip() for line in lines]


def kept(tmp_path, monkeypatch, *runs):
    monkeypatch.setattr(sys, "argv", ["keep.py", *map(str, runs), "--out", str(tmp_path / "kept")])
    return keep.main()


@pytest.mark.parametrize("tag", ["eval/episodic_return", "eval/score"])
def test_kept_runs_have_result_thinned_curves_and_every_evaluation(tmp_path, monkeypatch, capsys, tag):
    run_dir = tmp_path / "runs" / "cell" / "seed1"
    lines = write_curve(run_dir, tag, 333)
    path = next(RESULTS.glob("ant-dppo/seed1/result.json" if "return" in tag else "reviews-gpt2-ppo/seed1/result.json"))
    result = json.loads(path.read_text())
    result["args"]["run_dir"] = str(run_dir)
    (run_dir / "result.json").write_text(json.dumps(result))
    for name in ("model.safetensors", "eval_samples.jsonl", "judgments-judge-reference.jsonl"):
        (run_dir / name).write_text("large")
    judge = {"against": "reference", "judge_model": "a judge", "samples": 10, "win_rate": 0.55}
    (run_dir / "judge.json").write_text(json.dumps(judge))
    assert kept(tmp_path, monkeypatch, tmp_path / "runs") == 0
    assert "1 runs copied to" in capsys.readouterr().out
    folder = tmp_path / "kept/cell/seed1"
    assert sorted(path.name for path in folder.iterdir()) == ["curves.csv", "judge.json", "result.json"]
    thinned = (folder / "curves.csv").read_text().splitlines()[1:]
    assert len(thinned) == 100 + 3 and set(thinned) <= set(lines)
    assert [line for line in thinned if not line.endswith(",")] == [f"{s},{s / 10},{s}" for s in (333, 666, 999)]
    assert json.loads((folder / "result.json").read_text())["args"]["run_dir"] == "cell/seed1"
    scores = pd.read_csv(tmp_path / "kept/scores.csv")
    assert list(scores.folder) == ["cell/seed1"] and scores.win_rates[0] == "55.0 % against reference by a judge"


def test_scores_are_written_anew_and_what_cannot_be_read_is_named(tmp_path, monkeypatch, capsys):
    assert kept(tmp_path, monkeypatch) == 2
    assert capsys.readouterr().err == f"error: no result.json below {tmp_path / 'kept'}\n"
    assert kept(tmp_path, monkeypatch, tmp_path / "nowhere") == 2 and not (tmp_path / "kept").exists()
    for seed in (1, 2):
        folder = tmp_path / f"kept/cell/seed{seed}"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text((RESULTS / f"ant-dppo/seed{seed}/result.json").read_text())
    (folder / "result.json").write_text("{")
    assert kept(tmp_path, monkeypatch) == 0
    assert "left out: " + str(folder) in capsys.readouterr().err
    assert list(pd.read_csv(tmp_path / "kept/scores.csv").seed) == [1]
