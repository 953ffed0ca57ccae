"""The language scripts as whole runs on tiny models: output, survival, bad input, two processes, learning."""

import contextlib
import csv
import errno
import importlib
import io
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import datasets
import huggingface_hub
import numpy as np
import pytest
import tiny
import torch
import two_processes
from conftest import ROOT, import_scripts, largest_file, read_checkpoint, wait_for_the_next_second
from pausing import interrupt
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

SCRIPTS = import_scripts("sppo_rlhf_*.py")
IMDB, TLDR = (param.values[0] for param in SCRIPTS)
RESULT_KEYS = {
    "script",
    "policy",
    "dataset",
    "reward_model",
    "seed",
    "args",
    "num_updates",
    "eval_scores",
    "eval_score",
    "eval_score_reference",
    "eval_score_empty",
    "eval_score_truncated",
    "eval_empty_wins",
    "eval_truncated_wins",
    "eval_perplexity",
    "before",
    "rollout_tokens_per_second",
    "update_tokens_per_second",
    "generation_time_share",
    "peak_memory_gib",
    "num_processes",
    "num_processes_from",
    "device",
    "wall_seconds",
    "versions",
    "commit",
    "hub_commits",
}
ROUGE = {"eval_rouge1", "eval_rouge2", "eval_rougeL"}
TAGS = {
    "objective/scores",
    "objective/kl",
    "objective/entropy",
    "objective/non_score_reward",
    "objective/rlhf_reward",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "loss/policy_avg",
    "loss/value_avg",
    "loss/target_avg",
    "val/clipfrac_avg",
    "val/ratio",
    "val/response_length",
    "val/eos_rate",
    "losses/sign_flips",
    "losses/grad_norm",
    "losses/explained_variance",
    "perf/rollout_seconds",
    "perf/update_seconds",
    "perf/rollout_tokens_per_second",
    "perf/update_tokens_per_second",
    "perf/generation_seconds",
    "eval/score",
    "eval/score_reference",
    "eval/score_empty",
    "eval/score_truncated",
    "eval/empty_wins",
    "eval/truncated_wins",
    "eval/perplexity",
}
ROUGE_TAGS = {"eval/rouge1", "eval/rouge2", "eval/rougeL"}
FILES = {"args.json", "curves.csv", "result.json", "eval_samples.jsonl", "policy"}
LOCK = """
import fcntl, sys
file = open(sys.argv[1], "r+")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("locked", flush=True)
sys.stdin.read()
"""
RUN = {"num_updates": 3, "checkpoint_every": 1, "seed": 3, "run_dir": "run"}


@pytest.fixture(scope="session", params=SCRIPTS)
def script(request):
    return request.param


# For what is the same text in both (test_siblings.py).
either = pytest.mark.parametrize("script", SCRIPTS[:1], indirect=True)
of_tldr = pytest.mark.parametrize("script", SCRIPTS[1:], indirect=True)


def call(script, cwd, flags):
    """main() in this process with cwd as working directory: (exit code, stdout, stderr)."""
    flags = tiny.command_line(flags) if isinstance(flags, dict) else list(map(str, flags))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        patch.object(sys, "argv", [script.__file__, *flags]),
    ):
        try:
            assert script.main() is None
        except SystemExit as end:
            code = end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return code, out.getvalue(), err.getvalue()


def read_result(run_dir):
    return json.loads((run_dir / "result.json").read_text())


def read_curves(run_dir):
    with (run_dir / "curves.csv").open() as file:
        return list(csv.DictReader(file))


def without_speed(run_dir):
    return [{tag: value for tag, value in row.items() if not tag.startswith("perf/")} for row in read_curves(run_dir)]


def weights(run_dir):
    (path,) = (run_dir / "policy").glob("*.safetensors")
    return load_file(path)


def updates_in_checkpoint(run_dir):
    rows, *_ = read_checkpoint(run_dir)["progress"]
    return len(rows) - 1


def without(folder, name):
    """Take the weights of that name out of a saved model."""
    path = Path(folder) / "model.safetensors"
    save_file({other: x for other, x in load_file(path).items() if other != name}, path, {"format": "pt"})


def events(run_dir):
    return EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def snapshot(directory):
    """{path: (content, modification time)} of everything below directory"""
    return {p: (p.read_bytes() if p.is_file() else None, p.stat().st_mtime_ns) for p in directory.rglob("*")}


def assert_refused(code, err, *words):
    assert code == 2, err
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err


def sequence_logprobs(model):
    tokens = torch.tensor([[5, 9, 17, 40, 3, 8, 120]])
    with torch.no_grad():
        return model(tokens).logits.log_softmax(-1)


@pytest.fixture(scope="session")
def finished(script, assets, tmp_path_factory):
    """A run that has ended, in "run" of its working directory, with what it printed and its policy at the end.

    What another process got that tried to lock it meanwhile is there too.
    """
    cwd, logprobs, locked = tmp_path_factory.mktemp("finished"), [], []
    save_policy = script.Run.save_policy

    def spy(run):
        logprobs.append(sequence_logprobs(run.learner.actor_critic.policy))
        locked.append(subprocess.run([sys.executable, "-c", LOCK, "run/args.json"], capture_output=True, text=True))
        save_policy(run)

    with patch.object(script.Run, "save_policy", spy):
        code, out, err = call(script, cwd, tiny.flags(script.SCRIPT, assets) | RUN | {"eval_every": 2})
    assert (code, err) == (0, "")
    return SimpleNamespace(cwd=cwd, run_dir=cwd / "run", out=out, logprobs=logprobs[0], locked=locked[0])


def assert_same_run(run_dir, finished, periodic_evaluations=True):
    """Parameters, curves, scores and samples are exactly those of the finished run."""
    expected, actual = weights(finished.run_dir), weights(run_dir)
    assert expected.keys() == actual.keys() and all(torch.equal(expected[name], actual[name]) for name in expected)
    curves = [without_speed(finished.run_dir), without_speed(run_dir)]
    if not periodic_evaluations:
        curves = [[{k: v for k, v in r.items() if k[:5] != "eval/"} for r in rows] for rows in curves]
    assert curves[0] == curves[1]
    results = [
        {k: v for k, v in read_result(d).items() if k[:4] in ("eval", "befo")} for d in (finished.run_dir, run_dir)
    ]
    assert results[0] == results[1]
    samples = [(d / "eval_samples.jsonl").read_text() for d in (finished.run_dir, run_dir)]
    assert samples[0] == samples[1]


# Output


def test_finished_run_leaves_the_agreed_files_and_nothing_else(finished):
    assert [p.name for p in finished.cwd.iterdir()] == ["run"]
    names = {p.name for p in finished.run_dir.iterdir()}
    event_files = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(event_files) == 1 and names - event_files == FILES
    policy = {p.name for p in (finished.run_dir / "policy").iterdir()}
    assert {"tokenizer.json"} < policy and not any(name.endswith((".bin", ".pt", ".tmp")) for name in policy)


def test_result_has_the_agreed_keys(script, finished, assets):
    result = read_result(finished.run_dir)
    assert set(result) == RESULT_KEYS | (ROUGE if script is TLDR else set())
    flags = tiny.flags(script.SCRIPT, assets)
    assert (result["script"], result["seed"], result["num_updates"]) == (script.SCRIPT, 3, 3)
    assert all(result[name] == flags[name] for name in ("policy", "dataset", "reward_model"))
    assert result["args"] == json.loads((finished.run_dir / "args.json").read_text())["args"]
    assert result["args"]["num_updates"] == 3 and result["args"]["eval_every"] == 2
    assert set(result["before"]) == {key for key in result if key.startswith("eval_")} - {"eval_scores"}
    assert len(result["eval_scores"]) == 8 and len(set(result["eval_scores"])) > 1
    assert result["eval_score"] == pytest.approx(np.mean(result["eval_scores"]), abs=1e-6)
    assert result["before"]["eval_score_reference"] == pytest.approx(result["eval_score_reference"], rel=1e-5)
    assert result["before"]["eval_perplexity"] != result["eval_perplexity"]
    assert all(math.isfinite(result[key]) for key in result if key.startswith("eval_") and key != "eval_scores")
    assert result["rollout_tokens_per_second"] > 1 and result["update_tokens_per_second"] > 1
    assert 0 < result["generation_time_share"] < 1
    assert result["hub_commits"] == {}  # all folders
    assert result["num_processes_from"] == {"0": 1}
    assert result["num_processes"] == 1 and result["device"] == "cpu" and 0.1 < result["peak_memory_gib"] < 100
    versions = {name: sys.modules[name].__version__ for name in script.PACKAGES}
    assert result["versions"] == versions | {"python": sys.version.split()[0]}


def test_output_says_how_to_go_on_how_it_went_and_where_everything_is(script, finished):
    result = read_result(finished.run_dir)
    before, first, *updates, saved, last, where = finished.out.splitlines()
    updates = [line for line in updates if line.startswith("update ")]  # and an evaluation on the way
    command = f"{sys.executable} {script.__file__} --resume {finished.run_dir}"
    assert first == f"run directory {finished.run_dir}; if it stops, continue with: {command}"
    assert before.startswith(f"evaluation: score {result['before']['eval_score']:.4f}")
    assert saved == "trained and saved; evaluating"
    assert last.startswith(f"evaluation: score {result['eval_score']:.4f}")
    assert f"{result['eval_perplexity']:.2f}" in last
    assert ("ROUGE" in last) == (script is TLDR)
    assert where == f"everything is in {finished.run_dir}"
    scores = [float(row["objective/scores"]) for row in read_curves(finished.run_dir) if row["objective/scores"]]
    lines = [line.split("  ") for line in updates]
    assert [(line[0], line[1]) for line in lines] == [
        (f"update {i} of 3", f"score {score:.4f}") for i, score in enumerate(scores, 1)
    ]
    assert lines[-1][-1] == "0:00:00 left" and len(scores) == 3


def tags(run_dir):
    return [tag for tag in read_curves(run_dir)[0] if tag != "update"]


def test_curves_hold_every_metric_and_the_same_values_as_tensorboard(script, finished):
    rows = read_curves(finished.run_dir)
    assert [int(row["update"]) for row in rows] == [0, 1, 2, 3]  # the last step once
    points = {tag: [(int(r["update"]), float(r[tag])) for r in rows if r[tag]] for tag in tags(finished.run_dir)}
    assert TAGS | (ROUGE_TAGS if script is TLDR else set()) == set(points)
    scalars = events(finished.run_dir)
    assert set(scalars.Tags()["scalars"]) == set(points)
    for tag, expected in points.items():
        actual = [(e.step, e.value) for e in scalars.Scalars(tag)]
        assert (
            [step for step, _ in actual]
            == [step for step, _ in expected]
            == ([0, 2, 3] if tag.startswith("eval/") else [1, 2, 3])
        )
        np.testing.assert_allclose([v for _, v in actual], [v for _, v in expected], rtol=1e-5, err_msg=tag)
    assert scalars.Tags()["tensors"] == ["samples/text_summary"]
    assert len(scalars.Tensors("samples/text_summary")) == 3
    assert points["eval/score"][-1][1] == pytest.approx(read_result(finished.run_dir)["eval_score"], rel=1e-5)
    for row in rows[1:4]:
        assert float(row["losses/grad_norm"]) > 0 and 0.5 < float(row["val/ratio"]) < 2
        assert 0 <= float(row["val/eos_rate"]) <= 1 and 1 <= float(row["val/response_length"]) <= 6


def test_saved_policy_loads_and_has_the_log_probabilities_of_the_run(script, finished, assets):
    folder = finished.run_dir / "policy"
    if script is IMDB:
        model = AutoModelForCausalLM.from_pretrained(folder)
    else:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(assets / "llama"), folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(assets / "llama")
        assert set(weights(finished.run_dir)) == set(map(str, load_file(folder / "adapter_model.safetensors")))
        assert not any("value" in name or "reward" in name for name in weights(finished.run_dir))
    torch.testing.assert_close(sequence_logprobs(model.eval()), finished.logprobs, rtol=0, atol=1e-6)
    start = AutoModelForCausalLM.from_pretrained(tiny.flags(script.SCRIPT, assets)["policy"]).eval()
    assert (sequence_logprobs(start) - finished.logprobs).abs().max() > 1e-3
    text = "the movie was fine"
    assert AutoTokenizer.from_pretrained(folder)(text) == AutoTokenizer.from_pretrained(assets / "gpt2")(text)


def test_eval_samples_are_what_the_scores_are_of(script, finished):
    samples = [json.loads(line) for line in (finished.run_dir / "eval_samples.jsonl").open()]
    result = read_result(finished.run_dir)
    assert [sample["index"] for sample in samples] == list(range(8))
    assert [sample["score"] for sample in samples] == pytest.approx(result["eval_scores"], abs=1e-6)
    columns = {"score", "score_reference", "score_empty", "score_truncated"}
    columns |= {"rouge1", "rouge2", "rougeL"} if script is TLDR else set()
    assert set(samples[0]) == {"index", "prompt", "response", "reference"} | columns
    for column in columns:
        assert result[f"eval_{column}"] == pytest.approx(np.mean([sample[column] for sample in samples]))
    assert result["eval_empty_wins"] == np.mean([s["score_empty"] > s["score"] for s in samples])
    assert result["eval_truncated_wins"] == np.mean([s["score_truncated"] > s["score"] for s in samples])


def test_evaluate_prints_the_numbers_of_the_final_evaluation_and_changes_nothing(script, finished):
    before, result = snapshot(finished.cwd), read_result(finished.run_dir)
    code, out, err = call(script, finished.cwd, ["--evaluate", "run"])
    assert (code, err) == (0, "")
    rouge = " / ".join(f"{100 * result.get(f'eval_{name}', 0):.1f}" for name in ("rouge1", "rouge2", "rougeL"))
    rouge = f", ROUGE {rouge}" if script is TLDR else ""
    scores = f"score {result['eval_score']:.4f}, perplexity {result['eval_perplexity']:.2f}"
    assert out == f"evaluation: {scores}{rouge}\n"
    assert result["eval_score"] != result["before"]["eval_score"]
    assert snapshot(finished.cwd) == before


def test_resume_of_a_finished_run_says_so_and_changes_nothing(script, finished):
    before = snapshot(finished.cwd)
    code, out, err = call(script, finished.cwd, ["--resume", "run"])
    assert (code, err) == (0, "")
    assert out == f"{finished.run_dir} has finished; --evaluate evaluates its policy again\n"
    assert snapshot(finished.cwd) == before


@either
def test_output_without_a_character_or_a_reader_stops_nothing(script, monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    script.say("run directory wüste")
    assert ascii_only.buffer.getvalue() == b"run directory w\\xfcste\n"
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        script.say("update 1", file)
        with pytest.raises(SystemExit) as end:
            script.require(False, "stopped", code=130)
    assert end.value.code == 130


@either
def test_other_processes_print_no_result(script, finished, monkeypatch):
    monkeypatch.setattr(script, "RANK", 1)
    assert call(script, finished.cwd, ["--resume", "run"]) == (0, "", "")


@either
def test_same_seed_gives_the_same_run_whatever_is_evaluated_and_checkpointed(script, finished, assets, tmp_path):
    flags = tiny.flags(script.SCRIPT, assets) | RUN | {"checkpoint_every": 3, "rollout_batch_size": 3}
    assert call(script, tmp_path, flags)[0] == 0
    assert_same_run(tmp_path / "run", finished, periodic_evaluations=False)


WANDB = """
import json
from pathlib import Path

def init(**settings):
    assert not list(Path(settings["dir"]).rglob("events*"))  # TensorBoard is listened to from its beginning
    with Path("tracked").open("a") as file:
        file.write(json.dumps(settings))
"""


def test_track_is_refused_where_wandb_is_not_installed(script, assets, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "wandb").mkdir()  # as runs without the package leave it: no package
    flags = tiny.flags(script.SCRIPT, assets) | {"track": True}
    assert_refused(*call(script, tmp_path, flags)[::2], "--track needs wandb: pip install wandb")


@either
def test_another_seed_gives_another_run_in_a_directory_of_its_own_which_wandb_tracks(
    script, finished, assets, tmp_path, monkeypatch
):
    flags = tiny.flags(script.SCRIPT, assets) | {"seed": 4, "num_updates": 1, "track": True}
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (tmp_path / "wandb.py").write_text(WANDB)
    (tmp_path / "wandb-1.0.dist-info").mkdir()
    (tmp_path / "wandb-1.0.dist-info/METADATA").write_text("Name: wandb")
    importlib.invalidate_caches()
    assert call(script, tmp_path, flags)[0] == 0
    monkeypatch.delitem(sys.modules, "wandb")
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith(f"{Path(flags['dataset']).name}__{script.SCRIPT}__4__2")
    args = json.loads((run_dir / "args.json").read_text())["args"]
    assert args["run_dir"] == str(run_dir)
    expected = {"dir": str(run_dir), "config": args, "sync_tensorboard": True, "resume": "auto"}
    assert json.loads((tmp_path / "tracked").read_text()) == expected
    rows = [without_speed(d)[1] for d in (run_dir, finished.run_dir)]
    for tag in ("objective/scores", "objective/entropy", "loss/policy_avg", "loss/value_avg", "losses/grad_norm"):
        assert rows[0][tag] != rows[1][tag]


@either
def test_target_term_and_raw_advantages_change_the_run_and_are_logged(script, finished, assets, tmp_path):
    for i, changes in enumerate(({"target_coef": 0.1}, {"norm_adv": False})):
        flags = tiny.flags(script.SCRIPT, assets) | RUN | {"num_updates": 1, "run_dir": f"run{i}"} | changes
        assert call(script, tmp_path, flags)[0] == 0
    target, raw, usual = (without_speed(d)[1] for d in (tmp_path / "run0", tmp_path / "run1", finished.run_dir))
    assert float(target["loss/target_avg"]) > 1 and float(usual["loss/target_avg"]) == 0
    assert float(raw["losses/sign_flips"]) == 0 < float(usual["losses/sign_flips"])
    assert target["objective/scores"] == raw["objective/scores"] == usual["objective/scores"]
    assert len({row["losses/grad_norm"] for row in (target, raw, usual)}) == 3


@pytest.fixture
def hub(assets, script):
    """The tiny models and data as the cache has them after a download: {hub id: commit of its revision v1}."""
    cache, flags, commits = Path(huggingface_hub.constants.HF_HUB_CACHE), tiny.flags(script.SCRIPT, assets), {}
    for number, flag in enumerate(("policy", "reward_model")):
        repository = cache / f"models--owner--{script.SCRIPT}-{flag}"
        commits[f"owner/{script.SCRIPT}-{flag}"] = commit = f"{number + 1:040x}"
        shutil.copytree(flags[flag], repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "v1").write_text(commit)
    commits[f"owner/{script.SCRIPT}"] = commit = f"{9:040x}"
    cached = Path(datasets.load_dataset(flags["dataset"])["train"].cache_files[0]["filename"]).parent
    folder = Path(datasets.config.HF_DATASETS_CACHE) / f"owner___{script.SCRIPT}" / "default" / "0.0.0" / commit
    shutil.copytree(cached, folder)
    for path in folder.glob("*.arrow"):
        path.rename(folder / path.name.replace(Path(flags["dataset"]).name, script.SCRIPT))
    yield commits
    for path in (*cache.glob("models--owner--*"), folder):
        shutil.rmtree(path)


def test_result_names_the_commits_of_what_came_from_a_hub_at_the_revisions_that_were_asked_for(
    script, assets, tmp_path, hub
):
    policy, reward_model, dataset = hub
    changes = {"num_updates": 1, "policy": policy, "reward_model": reward_model, "dataset": dataset}
    changes["revision"] = (policy, "v1", reward_model, "v1")
    code, _, err = call(script, tmp_path, tiny.flags(script.SCRIPT, assets) | RUN | changes)
    assert (code, err) == (0, "")
    assert read_result(tmp_path / "run")["hub_commits"] == hub
    if script is TLDR:  # peft loads the base of an adapter at this revision
        assert PeftConfig.from_pretrained(tmp_path / "run" / "policy").revision == "v1"
    changes |= {"run_dir": "other", "revision": (policy, "v1")}
    code, _, err = call(script, tmp_path, tiny.flags(script.SCRIPT, assets) | RUN | changes)
    assert_refused(code, err, f"--reward-model {reward_model}")  # there is nothing but v1
    changes["revision"] = (str(assets / "gpt2"), "v1")
    code, _, err = call(script, tmp_path, tiny.flags(script.SCRIPT, assets) | RUN | changes)
    assert_refused(code, err, "--revision", "no hub id")
    (tokenizer,) = script.TOKENIZERS.values()  # of the default policy
    script.parse_args(
        script.Args(revision={tokenizer: "v1"}, **{"base_precision": "float32"} if script is TLDR else {})
    )


# Survival


@pytest.fixture(scope="session")
def killed(script, assets, tmp_path_factory):
    """A run that was killed after a checkpoint, IMDB's in a process of its own: (working directory, stderr)."""
    cwd, err = tmp_path_factory.mktemp("killed"), ""
    flags = tiny.command_line(tiny.flags(script.SCRIPT, assets) | RUN | {"eval_every": 2})
    if script is IMDB:
        code, err = interrupt(script, cwd, flags, "rollout", 2, signal.SIGKILL)
        assert code == -signal.SIGKILL
    else:
        killed_in(script, cwd, flags, "rollout", 2)
    assert not (cwd / "run" / "result.json").exists()
    return cwd, err


def test_killed_run_resumes_to_exactly_the_run_that_was_never_killed(script, killed, unfinished, finished):
    assert killed[1] == ""
    assert updates_in_checkpoint(unfinished) == 1
    wait_for_the_next_second()
    code, out, err = call(script, unfinished.parent, ["--resume", "run"])
    assert (code, err) == (0, "")
    assert out.count("evaluation: ") == 2  # of update 2 and the last one
    assert_same_run(unfinished, finished)
    assert {p.name for p in unfinished.iterdir() if "tfevents" not in p.name} == FILES
    scalars = events(unfinished)
    for tag in tags(unfinished):
        assert [e.step for e in scalars.Scalars(tag)] == ([0, 2, 3] if tag.startswith("eval/") else [1, 2, 3])


@pytest.fixture
def unfinished(killed, tmp_path):
    """A copy of the killed run."""
    return Path(shutil.copytree(killed[0] / "run", tmp_path / "run"))


class Killed(BaseException):
    """Stands for kill -9: nothing in the scripts may catch it."""


def killed_in(script, cwd, flags, function, call_number=1):
    """Run until a function of the script, or a method, is called for the given time, then end as if by kill -9."""
    *owner, function = function.split(".")
    script_or_class = getattr(script, owner[0]) if owner else script
    original, calls = getattr(script_or_class, function), []

    def die(*args, **kwargs):
        calls.append(None)
        if len(calls) == call_number:
            raise Killed
        return original(*args, **kwargs)

    with patch.object(script_or_class, function, die), pytest.raises(Killed):
        call(script, cwd, flags)


MOMENTS = {
    "before the first checkpoint": ("backward", 5),
    "before the policy is saved": ("Run.save_policy", 1),
    "before the result": ("Run.finish", 1),
}


@pytest.mark.parametrize(
    "script, moment", [*((IMDB, moment) for moment in MOMENTS), (TLDR, "before the result")], indirect=["script"]
)
def test_run_killed_at_an_awkward_moment_resumes_to_the_same_run(script, finished, assets, tmp_path, moment):
    function, call_number = MOMENTS[moment]
    flags = tiny.flags(script.SCRIPT, assets) | RUN | {"checkpoint_every": 3, "eval_every": 2}
    killed_in(script, tmp_path, flags, function, call_number)
    assert not (tmp_path / "run" / "result.json").exists()
    code, _, err = call(script, tmp_path, ["--resume", "run"])
    assert (code, err) == (0, "")
    assert_same_run(tmp_path / "run", finished)
    assert {p.name for p in (tmp_path / "run").iterdir() if "tfevents" not in p.name} == FILES


def test_run_on_a_base_in_4_bits_resumes_and_is_evaluated(assets, tmp_path):
    """For real, on the CPU, where bitsandbytes is installed."""
    Linear4bit = pytest.importorskip("bitsandbytes").nn.Linear4bit
    flags = tiny.flags(TLDR.SCRIPT, assets) | RUN | tiny.family("gptj", assets) | {"base_precision": "4bit"}
    killed_in(TLDR, tmp_path, flags, "rollout", 2)
    assert call(TLDR, tmp_path, ["--resume", "run"])[0] == 0
    rows = read_curves(tmp_path / "run")[1:4]
    assert all(float(row["losses/grad_norm"]) > 0 and 0.5 < float(row["val/ratio"]) < 2 for row in rows)
    assert any(float(row["objective/kl"]) for row in rows[1:])
    code, out, _ = call(TLDR, tmp_path, ["--evaluate", "run"])
    assert code == 0 and out.startswith(f"evaluation: score {read_result(tmp_path / 'run')['eval_score']:.4f}")
    adapter = load_file(tmp_path / "run/policy/adapter_model.safetensors")
    assert all(x.any() for name, x in adapter.items() if "lora_B" in name)  # gradients reached every layer
    learner = TLDR.Learner(TLDR.Args(**flags))
    modules = list(learner.actor_critic.modules())
    assert {id(m) for m in modules if m.training} == {id(m) for m in modules if isinstance(m, Linear4bit)} != set()
    exact = sequence_logprobs(AutoModelForCausalLM.from_pretrained(assets / "gptj").eval())
    error = (sequence_logprobs(learner.actor_critic.switch_to("policy_adapter")).float() - exact).abs().mean()
    assert any(p.dtype == torch.uint8 for p in learner.actor_critic.lm.parameters()) and 0 < error < 1


def test_run_of_another_family_resumes_and_leaves_an_adapter_that_peft_loads_whole(assets, tmp_path):
    flags = tiny.flags(TLDR.SCRIPT, assets) | RUN | tiny.family("gptj", assets) | {"num_updates": 2}
    killed_in(TLDR, tmp_path, flags, "rollout", 2)
    assert call(TLDR, tmp_path, ["--resume", "run"])[0] == 0
    base = AutoModelForCausalLM.from_pretrained(assets / "gptj").eval()
    start = sequence_logprobs(base)
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "policy").eval()
    assert (sequence_logprobs(model) - start).abs().max() > 1e-3
    loaded = model.load_adapter(tmp_path / "run" / "policy", "again")
    assert not loaded.unexpected_keys and not any("lora_" in key for key in loaded.missing_keys)
    assert len(weights(tmp_path / "run")) == 4 * len(flags["lora_targets"])  # A and B in two layers
    assert call(TLDR, tmp_path, ["--evaluate", "run"])[0] == 0


WAIT = "stopping when this update has ended and is saved; once more stops at once\n"


@either
def test_signal_stops_after_the_running_update_with_a_checkpoint_and_says_so_at_once(
    script, finished, assets, tmp_path
):
    """SIGTERM; the runs of two processes are stopped by SIGINT."""
    rollout, updates = script.rollout, []

    def signal_in_the_second_update(*args):
        updates.append(None)
        if len(updates) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            assert sys.stderr.getvalue() == WAIT
        return rollout(*args)

    flags = tiny.flags(script.SCRIPT, assets) | RUN | {"checkpoint_every": 100, "eval_every": 2}
    with patch.object(script, "rollout", signal_in_the_second_update):
        code, _, err = call(script, tmp_path, flags)
    assert code == 130 and len(updates) == 2
    assert err == f"{WAIT}error: stopped\n"
    assert updates_in_checkpoint(tmp_path / "run") == 2
    assert not (tmp_path / "run" / "result.json").exists()
    assert call(script, tmp_path, ["--resume", "run"])[0] == 0
    assert_same_run(tmp_path / "run", finished)


@either
@pytest.mark.parametrize("call_number, code", [(1, 130), (2, 130)], ids=["before training", "after it"])
def test_a_stop_where_nothing_is_lost_ends_at_once(script, finished, assets, tmp_path, call_number, code):
    evaluate, calls = script.evaluate, []

    def interrupted(*args):
        calls.append(None)
        if len(calls) == call_number:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*args)

    with patch.object(script, "evaluate", interrupted):
        actual, _, err = call(script, tmp_path, tiny.flags(script.SCRIPT, assets) | RUN)
    assert (actual, err, len(calls)) == (code, "error: stopped\n", call_number)
    if call_number == 1:
        assert list(tmp_path.iterdir()) == []
    else:
        assert call(script, tmp_path, ["--resume", "run"])[0] == 0
        assert_same_run(tmp_path / "run", finished, periodic_evaluations=False)


def test_checkpoint_holds_what_is_trained_and_not_what_is_frozen(unfinished):
    names = set(torch.load(unfinished / "checkpoint.pt", weights_only=True)["model"])
    assert "value_head.weight" in names
    assert any("policy" in name for name in names) and any("value" in name for name in names)
    assert not any("reward" in name or "reference" in name or "base_layer" in name for name in names)


@either
def test_nan_loss_stops_the_run_with_seed_update_and_advice(script, finished, assets, tmp_path):
    loss, calls = script.symmetric_ppo_loss, []

    def sometimes_nan(*args):
        calls.append(None)
        return loss(*args) * (torch.nan if len(calls) >= 13 else 1.0)  # in the second update

    flags = tiny.flags(script.SCRIPT, assets) | RUN | {"eval_every": 2}
    with patch.object(script, "symmetric_ppo_loss", sometimes_nan):
        code, _, err = call(script, tmp_path, flags)
    failed = f"seed 3 of {assets / 'reviews'} failed in update 2"
    hint = "the loss is not finite. Try a lower --learning-rate or a lower --beta"
    assert (code, err) == (1, f"error: {failed}: {hint}\n")
    assert not (tmp_path / "run" / "result.json").exists() and not (tmp_path / "run" / "policy").exists()
    assert call(script, tmp_path, ["--resume", "run"])[0] == 0  # from the checkpoint before the failure
    assert_same_run(tmp_path / "run", finished)


@either
@pytest.mark.parametrize("minibatch_size", [4, 8], ids=["within an update", "between two updates"])
def test_huge_learning_rate_stops_the_run_without_a_traceback(script, assets, tmp_path, minibatch_size):
    changes = {"learning_rate": 1e30, "minibatch_size": minibatch_size, "update_epochs": 8 // minibatch_size - 1 or 1}
    flags = tiny.flags(script.SCRIPT, assets) | RUN | changes
    code, _, err = call(script, tmp_path, flags)
    assert code == 1 and err.startswith("error: seed 3 of ") and err.count("\n") == 1 and "--learning-rate" in err
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize(
    "script, where",
    [(IMDB, "load_network"), (IMDB, "backward"), (TLDR, "load_network")],
    indirect=["script"],
)
def test_running_out_of_gpu_memory_says_what_to_lower(script, assets, tmp_path, where):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with patch.object(script, where, out_of_memory):
        code, _, err = call(script, tmp_path, tiny.flags(script.SCRIPT, assets) | RUN)
    assert (code, err) == (1, f"error: the GPU is out of memory: {script.OOM_HINT}\n")
    assert ("--base-precision" in err) == (script is TLDR)
    assert (tmp_path / "run").exists() == (where != "load_network")


@either
@pytest.mark.parametrize(
    "error, code, err",
    [
        (OSError(errno.ENOSPC, "no space"), 1, "error: process 1: {run}: [Errno 28] no space\n"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "error: process 1: the GPU is out of memory: "),
        (2, 2, "error: process 1: wrong\n"),
        (1, 1, "error: process 1: wrong\n"),
        (KeyboardInterrupt(), 130, "error: process 1: stopped\n"),
    ],
)
def test_another_process_says_what_may_have_happened_to_it_alone(
    script, assets, tmp_path, monkeypatch, error, code, err
):
    def fail(*_):
        if isinstance(error, int):
            script.require(False, "wrong", error)
        raise error

    monkeypatch.setattr(script, "RANK", 1)
    monkeypatch.setattr(script, "Learner", fail)
    actual = call(script, tmp_path, tiny.flags(script.SCRIPT, assets) | RUN)
    assert actual[:2] == (code, "")
    assert actual[2].startswith(err.format(run=tmp_path / "run")) and actual[2].count("\n") == 1


@either
@pytest.mark.parametrize("num_bytes", [4_500, 20_000])  # torch.save raises an error of its own, or the system's
def test_full_disk_stops_the_run_in_one_line(script, finished, assets, tmp_path, num_bytes):
    with largest_file(num_bytes):
        code, _, err = call(script, tmp_path, tiny.flags(script.SCRIPT, assets) | RUN | {"eval_every": 2})
    assert (code, err) == (1, f"error: {tmp_path / 'run'}: [Errno 27] File too large\n")
    assert not (tmp_path / "run/checkpoint.pt").exists()
    assert call(script, tmp_path, ["--resume", "run"])[0] == 0
    assert_same_run(tmp_path / "run", finished)
    assert not list(tmp_path.rglob("*.tmp"))


def test_full_disk_for_the_policy_loses_nothing(script, finished, assets, tmp_path):
    save_policy = script.Run.save_policy

    def save_on_a_full_disk(run):
        with largest_file(5_000):
            save_policy(run)

    with patch.object(script.Run, "save_policy", save_on_a_full_disk):
        code, _, err = call(script, tmp_path, tiny.flags(script.SCRIPT, assets) | RUN | {"eval_every": 2})
    assert code == 1 and err.count("\n") == 1
    said = "Error while serializing: I/O error: File too large"  # safetensors'; the adapter is small
    assert err.startswith(f"error: {tmp_path / 'run'}: {said if script is IMDB else '[Errno 27] File too large'}")
    code, _, err = call(script, tmp_path, ["--evaluate", "run"])  # of what there is of it
    assert_refused(code, err, "policy")
    assert call(script, tmp_path, ["--resume", "run"])[0] == 0
    assert_same_run(tmp_path / "run", finished)


@either
def test_full_disk_for_the_tokenizer_loses_nothing(script, finished, assets, tmp_path):
    save_pretrained = PreTrainedTokenizerFast.save_pretrained

    def save_on_a_full_disk(tokenizer, folder):
        with largest_file(5_000):
            save_pretrained(tokenizer, folder)

    with patch.object(PreTrainedTokenizerFast, "save_pretrained", save_on_a_full_disk):
        code, _, err = call(script, tmp_path, tiny.flags(script.SCRIPT, assets) | RUN | {"eval_every": 2})
    assert (code, err) == (1, f"error: {tmp_path / 'run'}: File too large (os error 27)\n")
    assert call(script, tmp_path, ["--resume", "run"])[0] == 0
    assert_same_run(tmp_path / "run", finished)


@either
def test_full_disk_at_the_start_is_no_wrong_argument_and_names_the_place(script, assets, tmp_path):
    with largest_file(0):
        code, _, err = call(script, tmp_path, tiny.flags(script.SCRIPT, assets) | RUN)
    assert (code, err) == (1, f"error: {tmp_path / 'run'}: [Errno 27] File too large\n")


@either
def test_resume_takes_smaller_batches_and_another_number_of_processes_and_ignores_arguments_that_are_no_more(
    script, unfinished
):
    """A size that is the default counts as given, too."""
    change_checkpoint(unfinished, lambda c: c["progress"][1].update({"0": 4}))
    saved = json.loads((unfinished / "args.json").read_text())
    saved["args"] |= {"micro_batch_size": 1000, "colour": 1}
    (unfinished / "args.json").write_text(json.dumps(saved))
    default = script.Args.micro_batch_size
    flags = ["--resume", "run", f"--micro_batch_size={default}", "--rollout-batch-size", 2]
    code, _, err = call(script, unfinished.parent, flags)
    assert (code, err) == (0, "")
    result = read_result(unfinished)
    assert result["num_processes"] == 1 and result["num_processes_from"] == {"0": 4, "1": 1}
    args = result["args"]
    assert (args["micro_batch_size"], args["rollout_batch_size"]) == (default, 2) and "colour" not in args


@either
def test_a_run_is_trained_by_one_process(script, finished, unfinished):
    assert finished.locked.returncode == 1 and "BlockingIOError" in finished.locked.stderr
    command, pipe = [sys.executable, "-c", LOCK, unfinished / "args.json"], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        code, out, err = call(script, unfinished.parent, ["--resume", "run"])
        other.stdin.close()
    assert_refused(code, err, "run is being trained by another process")
    assert out == ""


def test_the_sweep_on_pythia_trains_resumes_and_evaluates_on_tiny_models_of_its_classes(assets, tmp_path):
    """Every step of benchmark/rlhf_pythia.sh: its cells with local names and smaller numbers."""
    names = {"POLICY": "neox", "REWARD_MODEL": "neox-reward", "DATASET": "posts"}
    small = tiny.flags(TLDR.SCRIPT, assets) | {"num_updates": 2, "checkpoint_every": 1, "run_dir": "run"}
    small = {key: value for key, value in small.items() if key not in ("policy", "reward_model", "dataset")}
    environment = os.environ | {key: str(assets / name) for key, name in names.items()}
    environment |= {"FLAGS": " ".join(tiny.command_line(small)), "CONTROL": "1"}
    command = [ROOT / "benchmark" / "rlhf_pythia.sh", "--cells"]
    cells = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    weights_of = [
        (words[words.index("--alpha") + 1], words[words.index("--beta") + 1]) for words in map(str.split, cells)
    ]
    assert weights_of == [("1", "0"), ("0.5", "0.2"), ("0.7", "0")]
    script, _, seeds, *flags = shlex.split(cells[1])
    assert (script, seeds) == (TLDR.SCRIPT, "4")
    killed_in(TLDR, tmp_path, flags, "rollout", 2)
    assert call(TLDR, tmp_path, ["--resume", "run"])[0] == 0
    result = read_result(tmp_path / "run")
    assert result["args"]["lora_targets"] == ["query_key_value"] and result["args"]["reward_end"] == tiny.END
    code, out, _ = call(TLDR, tmp_path, ["--evaluate", "run"])
    assert code == 0 and out.startswith(f"evaluation: score {result['eval_score']:.4f}")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(assets / "neox"), tmp_path / "run" / "policy"
    )
    assert model.active_adapter == "default"


# Bad input


BAD_FLAGS = [  # each names what is loaded, which every script does in its own place
    ({"prompt_length": 200}, "--prompt-length", "--response-length", "positions"),
    ({"policy": "missing"}, "--policy missing", "local folder"),
    ({"reward_model": "missing"}, "--reward-model missing", "local folder"),
    ({"dataset": "missing"}, "--dataset missing", "local folder"),
    ({"dataset": "words.jsonl"}, "--dataset words.jsonl", "is no text; its columns are words"),
    ({"tokenizer": "missing"}, "--tokenizer missing", "local folder"),
]
BAD_IMDB_FLAGS = [  # the first ones are found by what is the same text in both scripts
    ({"policy": "owner/unknown"}, "--policy owner/unknown", "local folder"),
    ({"policy": "empty"}, "--policy empty", "local folder"),
    ({"reward_model": "owner/unknown"}, "--reward-model owner/unknown", "local folder"),
    ({"dataset": "owner/unknown"}, "--dataset owner/unknown", "local folder"),
    ({"dataset": "empty.jsonl"}, "--dataset empty.jsonl"),
    ({"policy": "other_tokens"}, "--policy other_tokens", "tokens", "different models"),
    ({"policy": "no_end"}, "--policy no_end", "no end-of-text token"),
    ({"policy": "adapter"}, "--policy adapter", "is an adapter", "merged"),
    ({"policy": "no_norm"}, "--policy no_norm", "for transformer.h.1.ln_1.bias of GPT2LMHeadModel"),
    ({"reward_model": "gpt2"}, "--reward-model gpt2", "for score.weight"),
    ({"dataset": "short.jsonl"}, "--dataset short.jsonl", "two words"),
    ({"reward_model": "scalar"}, "--reward-model scalar", "no label positive", "reward"),
    ({"reward_model": "other_sentiment"}, "--reward-model other_sentiment", "different models"),
]
BAD_TLDR_FLAGS = [
    ({"reward_model": "sentiment"}, "--reward-model sentiment", "several labels"),
    ({"reward_model": "bad_adapter"}, "--reward-model bad_adapter"),
    ({"lora_targets": "c_attn"}, "--lora-targets c_attn"),
    ({"dataset": "no_references"}, "--dataset no_references", "references are empty"),
]


@pytest.fixture(scope="session")
def bad_assets(assets, tmp_path_factory):
    """The tiny models and broken ones, to be used as working directory."""
    folder = Path(shutil.copytree(assets, tmp_path_factory.mktemp("bad") / "assets"))
    (folder / "empty").mkdir()
    tiny.write_jsonl(folder / "words.jsonl", [{"words": "a b c"}] * 3)
    tiny.write_jsonl(folder / "empty.jsonl", [])
    tiny.write_jsonl(folder / "short.jsonl", [{"text": "short"}] * 9)
    for split in ("train", "validation"):
        tiny.write_jsonl(folder / "no_references" / f"{split}.jsonl", [{"prompt": "a post", "label": " "}] * 9)
    tokenizer = AutoTokenizer.from_pretrained(assets / "gpt2")
    small = len(tokenizer) - 5
    tiny.gpt2(small).save_pretrained(folder / "other_tokens")
    tiny.classifier(small, ["NEGATIVE", "POSITIVE"]).save_pretrained(folder / "other_sentiment")
    for name in ("other_tokens", "other_sentiment"):
        tokenizer.save_pretrained(folder / name)
    without(shutil.copytree(assets / "gpt2", folder / "no_norm"), "transformer.h.1.ln_1.bias")
    shutil.copytree(assets / "llama", folder / "no_end")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder / "no_end")
    tiny.reward_adapter(tiny.llama_config(len(tokenizer), hidden_size=24), folder / "bad_adapter")
    return folder


def assert_refused_before_anything_is_written(script, assets, changes, words):
    before = set(assets.rglob("*"))
    flags = tiny.flags(script.SCRIPT, assets) | {"run_dir": "run"} | changes
    code, out, err = call(script, assets, flags)
    assert_refused(code, err, *words)
    assert out == ""
    assert set(assets.rglob("*")) == before


@pytest.mark.parametrize("changes, words", [(changes, words) for changes, *words in BAD_FLAGS])
def test_bad_input_is_refused_in_one_line_before_anything_is_written(script, bad_assets, changes, words):
    assert_refused_before_anything_is_written(script, bad_assets, changes, words)


@pytest.mark.parametrize("changes, words", [(changes, words) for changes, *words in BAD_IMDB_FLAGS])
def test_bad_input_of_imdb_is_refused_in_one_line_before_anything_is_written(bad_assets, changes, words):
    assert_refused_before_anything_is_written(IMDB, bad_assets, changes, words)


@pytest.mark.parametrize("changes, words", [(changes, words) for changes, *words in BAD_TLDR_FLAGS])
def test_bad_input_of_tldr_is_refused_in_one_line_before_anything_is_written(bad_assets, changes, words):
    assert_refused_before_anything_is_written(TLDR, bad_assets, changes, words)


BROKEN_RULES = {
    "--num-updates >= 1": ("--num-updates 0", "0 >= 1"),
    "--prompt-length >= 1": ("--prompt-length 0", "0 >= 1"),
    "--response-length >= 1": ("--response-length 0", "0 >= 1"),
    "--num-trajectories >= 1": ("--num-trajectories 0", "0 >= 1"),
    "--update-epochs >= 1": ("--update-epochs 0", "0 >= 1"),
    "--minibatch-size >= 1": ("--minibatch-size 0", "0 >= 1"),
    "--micro-batch-size >= 1": ("--micro-batch-size 0", "0 >= 1"),
    "--rollout-batch-size >= 1": ("--rollout-batch-size 0", "0 >= 1"),
    "--checkpoint-every >= 1": ("--checkpoint-every 0", "0 >= 1"),
    "--lora-rank >= 1": ("--lora-rank 0", "0 >= 1"),
    "--lora-alpha >= 1": ("--lora-alpha 0", "0 >= 1"),
    "--top-k >= 0": ("--top-k -1", "-1 >= 0"),
    "--eval-every >= 0": ("--eval-every -1", "-1 >= 0"),
    "--eval-samples >= 0": ("--eval-samples -1", "-1 >= 0"),
    "--num-threads >= 0": ("--num-threads -1", "-1 >= 0"),
    "0 <= --seed < 2**63": (f"--seed {2**63}", f"0 <= {2**63} < 2**63"),
    "0 < --alpha < inf": ("--alpha 0", "0 < 0.0 < inf"),
    "0 <= --beta < inf": ("--beta nan", "0 <= nan < inf"),
    "-inf < --Z < 0": ("--Z 0", "-inf < 0.0 < 0"),
    "0 <= --kl-coef < inf": ("--kl-coef -0.1", "0 <= -0.1 < inf"),
    "0 <= --target-coef < inf": ("--target-coef inf", "0 <= inf < inf"),
    "0 < --clip-coef < inf": ("--clip-coef 0", "0 < 0.0 < inf"),
    "0 < --clip-coef-value < inf": ("--clip-coef-value 0", "0 < 0.0 < inf"),
    "0 <= --vf-coef < inf": ("--vf-coef -1", "0 <= -1.0 < inf"),
    "0 < --max-grad-norm < inf": ("--max-grad-norm 0", "0 < 0.0 < inf"),
    "0 < --learning-rate < inf": ("--learning-rate 0", "0 < 0.0 < inf"),
    "0 <= --weight-decay < inf": ("--weight-decay -1", "0 <= -1.0 < inf"),
    "0 <= --gamma <= 1": ("--gamma 1.1", "0 <= 1.1 <= 1"),
    "0 <= --gae-lambda <= 1": ("--gae-lambda -0.1", "0 <= -0.1 <= 1"),
    "0 <= --min-response-length <= --response-length": (
        "--response-length 6 --min-response-length 7",
        "0 <= 7 <= 6",
    ),
    "--num-trajectories % --minibatch-size == 0": ("--num-trajectories 10 --minibatch-size 4", "10 % 4 == 0"),
}
BROKEN_RULES_OF_3_PROCESSES = {
    "--minibatch-size % WORLD_SIZE == 0": ("--num-trajectories 8 --minibatch-size 4", "4 % 3 processes == 0"),
    "--eval-samples == 0 or --eval-samples >= WORLD_SIZE": (
        "--num-trajectories 6 --minibatch-size 3 --eval-samples 2",
        "2 == 0 or 2 >= 3 processes",
    ),
}


def test_an_argument_that_breaks_a_rule_is_refused_in_one_line_before_anything_is_written(
    script, tmp_path, monkeypatch, capsys
):
    rules = script.RULES.strip().replace("\n", ", ").split(", ")
    broken = BROKEN_RULES | BROKEN_RULES_OF_3_PROCESSES
    assert set(broken) - set(rules) == (set() if script is TLDR else {"--lora-rank >= 1", "--lora-alpha >= 1"})
    for rule in rules:
        flags, values = broken[rule]
        monkeypatch.setattr(script, "WORLD_SIZE", 3 if rule in BROKEN_RULES_OF_3_PROCESSES else 1)
        said = f"error: {rule.replace('WORLD_SIZE', '3 processes')} must hold, and {values} does not\n"
        words = [word.removeprefix("--").replace("-", "_") if word[:2] == "--" else word for word in flags.split()]
        changes = {name: type(getattr(script.Args, name))(x) for name, x in zip(words[::2], words[1::2])}
        with pytest.raises(SystemExit) as end:
            script.parse_args(script.Args(**changes))
        assert (end.value.code, capsys.readouterr().err) == (2, said)
    assert call(script, tmp_path, flags.split()) == (2, "", said)  # the last one by the command line
    assert list(tmp_path.iterdir()) == []


@either
def test_processes_that_accelerate_does_not_see_are_refused(script, assets, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "WORLD_SIZE", 2)
    code, _, err = call(script, tmp_path, tiny.flags(script.SCRIPT, assets))
    assert_refused(code, err, "sees 1 processes, not the 2", "torchrun")
    assert list(tmp_path.iterdir()) == []


def test_the_package_for_4_bits_is_named_where_it_is_missing(assets, tmp_path, monkeypatch):
    monkeypatch.setattr(TLDR.metadata, "distributions", lambda name: [])
    code, _, err = call(TLDR, tmp_path, tiny.flags(TLDR.SCRIPT, assets) | {"base_precision": "4bit"})
    assert_refused(code, err, "--base-precision 4bit needs bitsandbytes: pip install bitsandbytes")


FLAGS = [
    ("--resume run --seed 5", "run keeps its arguments: drop --seed"),
    ("--resume run --policy x --beta=5 --no_norm_adv", "drop --beta, --norm-adv, --policy"),
    ("--resume run --run-dir new", "drop --run-dir"),
    ("--resume missing", "missing: there is no run, no args.json"),
    ("--resume=", "an empty name: there is no run, no args.json"),
    ("--evaluate run --seed 5", "run keeps its arguments: drop --seed"),
    ("--evaluate run --resume run", "give --resume or --evaluate, not both"),
    ("--evaluate run", "run holds no policy: it is written at the end of training"),
    ("--evaluate missing", "missing: there is no run, no args.json"),
    ("--evaluate=", "an empty name: there is no run, no args.json"),
    ("--run-dir run", "/run is in use: name another, or try --resume /"),
    ("--run-dir run/args.json", "/run/args.json is in use"),
]


@either
@pytest.mark.parametrize("flags, words", FLAGS)
def test_resume_run_dir_and_evaluate_refuse_what_they_cannot_honour(script, unfinished, flags, words):
    before = snapshot(unfinished.parent)
    code, out, err = call(script, unfinished.parent, flags.split())
    assert_refused(code, err, words)
    assert out == "" and snapshot(unfinished.parent) == before


def test_run_directory_whose_name_is_no_text_is_refused(script, assets, tmp_path):
    flags = tiny.flags(script.SCRIPT, assets) | {"run_dir": os.fsdecode(b"w\xff")}
    code, _, err = call(script, tmp_path, flags)
    assert_refused(code, err, f"--run-dir {tmp_path}/w\udcff is not in UTF-8")
    assert list(tmp_path.iterdir()) == []


@either
def test_run_directory_that_cannot_be_made_is_refused(script, assets, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = call(script, tmp_path, tiny.flags(script.SCRIPT, assets) | {"run_dir": "file/run"})
    assert_refused(code, err, f"--run-dir {tmp_path}/file/run cannot be made: Not a directory")


def change_checkpoint(run_dir, change):
    content = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    change(content)
    torch.save(content, run_dir / "checkpoint.pt")


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


FOREIGN = {
    "args of another script": (
        lambda d: (d / "args.json").write_text('{"script": "sppo_atari", "args": {}}'),
        "run is of sppo_atari, not of",
    ),
    "args of no script": (
        lambda d: (d / "args.json").write_text('{"script": null, "args": {}}'),
        "run is of None, not of",
    ),
    "no args": (lambda d: (d / "args.json").unlink(), "run: there is no run, no args.json"),
    "version 1": (
        lambda d: change_checkpoint(d, lambda c: c.pop("version")),
        "run/checkpoint.pt is of version 1",
    ),
    "version 3": (lambda d: change_checkpoint(d, lambda c: c.update(version=3)), "is of version 3"),
}


@either
@pytest.mark.parametrize("kind", FOREIGN)
def test_resume_refuses_what_is_no_run_of_this_script(script, unfinished, kind):
    damage, words = FOREIGN[kind]
    damage(unfinished)
    before = snapshot(unfinished.parent)
    code, _, err = call(script, unfinished.parent, ["--resume", "run"])
    assert_refused(code, err, words)
    assert snapshot(unfinished.parent) == before


DAMAGE = {
    "args": (lambda d: truncate(d / "args.json"), json.JSONDecodeError, "delimiter|Unterminated|Expecting"),
    "checkpoint": (lambda d: truncate(d / "checkpoint.pt"), RuntimeError, "zip archive"),
    "network": (
        lambda d: change_checkpoint(d, lambda c: c["model"].update({"value_head.weight": torch.zeros(3, 7)})),
        RuntimeError,
        "size mismatch for value_head.weight",
    ),
    "network that broadcasts": (
        lambda d: change_checkpoint(d, lambda c: c["model"].update({"value_head.weight": torch.zeros(1, 1)})),
        RuntimeError,
        "size mismatch for value_head.weight",
    ),
    "no value head": (
        lambda d: change_checkpoint(d, lambda c: c["model"].pop("value_head.weight")),
        KeyError,
        "value_head.weight",
    ),
}


@either
@pytest.mark.parametrize("kind", DAMAGE)
def test_resume_of_a_damaged_run_raises_what_the_library_says_and_changes_nothing(script, unfinished, kind):
    damage, error, words = DAMAGE[kind]
    damage(unfinished)
    before = snapshot(unfinished.parent)
    with pytest.raises(error, match=words):
        call(script, unfinished.parent, ["--resume", "run"])
    assert snapshot(unfinished.parent) == before


def test_evaluate_refuses_a_damaged_policy(script, finished, tmp_path):
    run_dir = Path(shutil.copytree(finished.run_dir, tmp_path / "run"))
    (path,) = (run_dir / "policy").glob("*.safetensors")
    truncate(path)
    code, out, err = call(script, tmp_path, ["--evaluate", "run"])
    assert_refused(code, err, "run/policy")
    path.unlink()
    code, _, err = call(script, tmp_path, ["--evaluate", "run"])
    assert_refused(code, err, "run", "policy")
    assert out == ""


@either
def test_evaluate_refuses_a_policy_with_weights_missing(script, finished, tmp_path):
    shutil.copytree(finished.run_dir, tmp_path / "run")
    without(tmp_path / "run" / "policy", "transformer.h.0.attn.c_attn.bias")
    code, out, err = call(script, tmp_path, ["--evaluate", "run"])
    assert_refused(code, err, "run/policy", "for transformer.h.0.attn.c_attn.bias")
    assert out == ""


@of_tldr
def test_evaluate_refuses_an_adapter_with_a_part_missing(script, finished, tmp_path):
    shutil.copytree(finished.run_dir, tmp_path / "run")
    parameters = weights(tmp_path / "run")
    for name in (min(parameters), max(parameters)):
        rest = {other: x for other, x in parameters.items() if other != name}
        save_file(rest, tmp_path / "run" / "policy" / "adapter_model.safetensors")
        code, out, err = call(script, tmp_path, ["--evaluate", "run"])
        assert_refused(code, err, "run/policy does not fit")
        assert out == ""


# Bugs


@either
def test_bug_in_a_reward_during_the_final_evaluation_costs_neither_the_policy_nor_the_run(
    script, finished, assets, tmp_path
):
    score = script.Classifier.__call__

    def broken(self, *inputs):
        if (tmp_path / "run/policy").exists():  # saved before the final evaluation
            raise ZeroDivisionError("a bug in the reward")
        return score(self, *inputs)

    error = pytest.raises(ZeroDivisionError, match="a bug in the reward")
    with patch.object(script.Classifier, "__call__", broken), error:
        call(script, tmp_path, tiny.flags(script.SCRIPT, assets) | RUN)
    saved, expected = weights(tmp_path / "run"), weights(finished.run_dir)
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    code, out, _ = call(script, tmp_path, ["--evaluate", "run"])
    assert code == 0 and out.startswith(f"evaluation: score {read_result(finished.run_dir)['eval_score']:.4f}")
    assert call(script, tmp_path, ["--resume", "run"])[0] == 0
    assert_same_run(tmp_path / "run", finished, periodic_evaluations=False)


@either
@pytest.mark.parametrize(
    "function, error",
    [
        ("check_policy", TypeError("bug")),
        ("make_examples", KeyError("bug")),
        ("generation_config", RuntimeError("bug")),
        ("generation_config", AssertionError()),
    ],
)
def test_bug_while_models_are_loaded_keeps_its_traceback_and_leaves_no_run(script, assets, tmp_path, function, error):
    def broken(*args, **kwargs):
        raise error

    with patch.object(script, function, broken), pytest.raises(type(error)):
        call(script, tmp_path, tiny.flags(script.SCRIPT, assets) | RUN)
    assert list(tmp_path.iterdir()) == []


@either
def test_changed_loss_that_is_wrong_ends_in_its_own_traceback(script, assets, tmp_path):
    def changed(*args):
        return args[0].sum() + torch.zeros(3)

    with patch.object(script, "symmetric_ppo_loss", changed), pytest.raises(RuntimeError, match="scalar"):
        call(script, tmp_path, tiny.flags(script.SCRIPT, assets) | RUN)


# A Python function as reward


REWARDS = """
import os
import sys

import numpy as np
import torch

CALLS = []

def length(prompts, responses, rows):
    CALLS.append((prompts, responses, rows))
    return np.array([len(response) / 10 for response in responses])

def by_label(prompts, responses, rows):
    return [int(row["label"]) for row in rows]

def buggy(prompts, responses, rows):
    raise ZeroDivisionError("a bug of mine")

def changes_its_inputs(prompts, responses, rows):
    scores = length(prompts, responses, rows).tolist()
    prompts.reverse()
    responses[:] = [""] * len(responses)
    for row in rows:
        row.update(dict.fromkeys(row, "spoiled"))
    return scores

def draws(prompts, responses, rows):
    torch.manual_seed(7)
    torch.rand(100)
    return length(prompts, responses, rows)

def exits(prompts, responses, rows):
    sys.exit(0)

def sets_dtype(prompts, responses, rows):
    torch.set_default_dtype(torch.float64)
    return [1.0] * len(rows)

def sets_grad_mode(prompts, responses, rows):
    torch.set_grad_enabled(not torch.is_grad_enabled())
    return [1.0] * len(rows)

def goes_elsewhere(prompts, responses, rows):
    os.chdir("/")
    return [1.0] * len(rows)

short = lambda prompts, responses, rows: [1.0]
nothing = lambda prompts, responses, rows: None
words = lambda prompts, responses, rows: ["good"] * len(rows)
by_row = lambda prompts, responses, rows: {i: 0.5 for i in range(len(rows))}
one_number = lambda prompts, responses, rows: torch.tensor(0.5)
too_large = lambda prompts, responses, rows: [1e39] * len(rows)
larger = lambda prompts, responses, rows: [10**60] * len(rows)
generator = lambda prompts, responses, rows: (1.0 for _ in rows)
unordered = lambda prompts, responses, rows: set(range(len(rows)))
text = lambda prompts, responses, rows: "1" * len(rows)
tensor = lambda prompts, responses, rows: torch.tensor([len(response) / 10 for response in responses])
infinite = lambda prompts, responses, rows: [float("nan")] * len(rows)
number = 3
"""


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    """A module in the working directory, which is a new one for every test."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "broken_rewards.py").write_text("import broken\n")  # whose name begins the module's
    (tmp_path / "exiting_rewards.py").write_text("import sys\n\nsys.exit(0)\n")
    (tmp_path / "typed_rewards.py").write_text("import torch\n\ntorch.set_default_dtype(torch.float64)\nf = print\n")
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    sys.modules.pop("typed_rewards", None)
    sys.modules.pop("my_rewards", None)


def with_function(script, assets, name):
    flags = tiny.flags(script.SCRIPT, assets) | RUN | {"num_updates": 1, "reward_function": name}
    return flags | {"reward_model": "missing"}  # which is not even looked for


def test_function_is_called_with_prompts_responses_and_rows_and_gives_the_reward(script, assets, tmp_path, rewards):
    code, _, err = call(script, tmp_path, with_function(script, assets, "my_rewards:length"))
    assert (code, err) == (0, "")
    calls = sys.modules["my_rewards"].CALLS
    assert [len(rows) for *_, rows in calls] == [8] * 9  # an update, and 4 kinds of responses before and after it
    columns = {"text", "label"} if script is IMDB else {"prompt", "label"}
    for prompts, responses, rows in calls:
        assert len(prompts) == len(responses) == len(rows) and all(set(row) == columns for row in rows)
        assert all(isinstance(text, str) for text in prompts + responses)
        if script is TLDR:
            assert all(prompt.endswith("\nTL;DR:") for prompt in prompts)
    result = read_result(tmp_path / "run")
    assert result["reward_model"] == "my_rewards:length"
    samples = [json.loads(line) for line in (tmp_path / "run" / "eval_samples.jsonl").open()]
    _, responses, rows = calls[-4]
    assert [sample["score"] for sample in samples] == [len(response) / 10 for response in responses]
    assert [sample["score_empty"] for sample in samples] == [0.0] * 8
    if script is IMDB:
        assert all(row["text"].endswith(sample["reference"]) for row, sample in zip(rows, samples))
    scores = [float(row["objective/scores"]) for row in read_curves(tmp_path / "run") if row["objective/scores"]]
    assert scores == pytest.approx([np.mean([len(response) / 10 for response in calls[4][1]])], rel=1e-5)
    code, out, _ = call(script, tmp_path, ["--evaluate", "run"])
    assert code == 0 and out.startswith(f"evaluation: score {result['eval_score']:.4f}")


def test_function_sees_columns_that_no_script_asks_for(assets, tmp_path, rewards):
    code, _, err = call(IMDB, tmp_path, with_function(IMDB, assets, "my_rewards:by_label"))
    assert (code, err) == (0, "") and read_result(tmp_path / "run")["eval_score"] == 1


@either
def test_function_that_changes_its_inputs_or_draws_random_numbers_changes_nothing_else(
    script, assets, tmp_path, rewards
):
    for name in ("length", "changes_its_inputs", "draws"):
        flags = with_function(script, assets, f"my_rewards:{name}") | {"run_dir": name}
        code, _, err = call(script, tmp_path, flags)
        assert (code, err) == (0, "")
    expected, curves = weights(tmp_path / "length"), without_speed(tmp_path / "length")
    for name in ("changes_its_inputs", "draws"):
        actual = weights(tmp_path / name)
        assert all(torch.equal(actual[key], expected[key]) for key in expected), name
        assert without_speed(tmp_path / name) == curves


@either
@pytest.mark.parametrize(
    "name, words",
    [
        ("my_rewards:exits", "the reward my_rewards:exits called sys.exit(0)"),
        ("exiting_rewards:f", "--reward-function exiting_rewards:f called sys.exit(0)"),
        ("my_rewards:sets_dtype", "the reward my_rewards:sets_dtype changed torch's default dtype"),
        ("typed_rewards:f", "--reward-function typed_rewards:f changed torch's default dtype"),
        ("my_rewards:sets_grad_mode", "the reward my_rewards:sets_grad_mode changed torch's grad mode"),
        ("my_rewards:goes_elsewhere", "the reward my_rewards:goes_elsewhere changed the working directory"),
    ],
)
def test_function_that_changes_the_program_is_named_and_leaves_no_run(script, assets, tmp_path, rewards, name, words):
    code, _, err = call(script, tmp_path, with_function(script, assets, name))
    assert (code, err) == (1, f"error: {words}\n")
    assert not (tmp_path / "run").exists()


@either
@pytest.mark.parametrize(
    "name, words",
    [
        ("my_rewards", "module:name"),
        ("my_rewards.py:length", "there is no module my_rewards.py, without .py, in the working directory"),
        (":length", "module:name"),
        ("no_such_module:length", "no module no_such_module"),
        ("my_rewards:no_such_function", "my_rewards has no function no_such_function"),
        ("my_rewards:number", "my_rewards has no function number"),
    ],
)
def test_reward_function_that_is_not_there_is_refused_in_one_line(script, assets, tmp_path, rewards, name, words):
    code, _, err = call(script, tmp_path, with_function(script, assets, name))
    assert_refused(code, err, f"--reward-function {name}", words)


NO_REWARDS = {
    "short": "[1.0], which is no list of 8 numbers",
    "nothing": "None, which is no list",
    "words": "'good' for ",
    "infinite": "nan for ",
    "by_row": "{0: 0.5, 1: 0.5, ",
    "one_number": "0.5, which is no list",
    "too_large": "1e+39 for ",
    "larger": "00000 for ",
    "generator": "<generator object ",
    "unordered": "{0, 1, 2, 3, 4, 5, 6, 7}, which is no list",
    "text": "'11111111', which is no list",
}


@either
def test_rewards_are_a_list_of_finite_numbers_or_end_the_run_in_one_line(script, assets, tmp_path, rewards, capsys):
    code, _, err = call(script, tmp_path, with_function(script, assets, "my_rewards:short"))
    assert code == 1 and err == f"error: the reward my_rewards:short returned {NO_REWARDS['short']}\n"
    module = sys.modules["my_rewards"]
    learner = SimpleNamespace(reward_name="my_rewards:f")
    texts = ["ab"] * 8, ["c" * i for i in range(8)], [{}] * 8
    for name, words in NO_REWARDS.items():
        learner.reward = getattr(module, name)
        with pytest.raises(SystemExit) as end:
            script.Learner.score(learner, *texts)
        err = capsys.readouterr().err
        assert end.value.code == 1 and err.count("\n") == 1, name
        assert err.startswith("error: the reward my_rewards:f returned ") and words in err, name
        assert ("no finite number of 32 bits" in err) == words.endswith(" for ") != ("no list of 8 numbers" in err)
    for name in ("length", "tensor"):
        learner.reward = getattr(module, name)
        assert script.Learner.score(learner, *texts) == pytest.approx([i / 10 for i in range(8)])


@either
def test_bug_in_a_reward_function_or_its_module_keeps_its_traceback(script, assets, tmp_path, rewards):
    with pytest.raises(ZeroDivisionError, match="a bug of mine") as caught:
        call(script, tmp_path, with_function(script, assets, "my_rewards:buggy"))
    assert caught.traceback[-1].name == "buggy"
    with pytest.raises(ModuleNotFoundError, match="No module named 'broken'"):
        call(script, tmp_path, with_function(script, assets, "broken_rewards:length") | {"run_dir": "other"})


# Two processes


@pytest.fixture(scope="session")
def two(assets, tmp_path_factory):
    """What two processes under torchrun left: gradients per process, and a run of each script."""
    out = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--local-addr", "127.0.0.1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [*command, two_processes.__file__, assets, out], env=environment, capture_output=True, text=True, timeout=900
    )
    assert process.returncode == 0, process.stderr
    return SimpleNamespace(
        out=out,
        ranks=[torch.load(out / f"rank{rank}.pt") for rank in (0, 1)],
        stdout=process.stdout,
        stderr=process.stderr,
    )


@pytest.mark.parametrize("change", range(len(two_processes.CHANGES)))
def test_two_processes_have_the_gradients_and_losses_of_one(script, assets, two, change):
    key, changes = (script.SCRIPT, change), two_processes.CHANGES[change]
    expected = two_processes.gradients(script, assets, changes)
    for (losses, grads, num_tokens), *ranks in zip(expected, *(rank[key] for rank in two.ranks)):
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        assert sum(rank[2] for rank in ranks) == num_tokens and ranks[0][2] != ranks[1][2]
        for rank_losses, rank_grads, _ in ranks:
            assert rank_losses == pytest.approx(losses, rel=1e-4, abs=1e-6)
            for name, g in grads.items():
                assert (rank_grads[name] - g).norm() <= 1e-4 * g.norm() + 1e-6 * norm, name
            assert all(torch.equal(rank_grads[name], ranks[0][1][name]) for name in grads)


def test_two_processes_share_the_prompts_of_an_update_and_draw_differently(script, assets, two):
    ranks = [torch.load(two.out / f"{script.SCRIPT}-rank{rank}.pt") for rank in (0, 1)]
    args = script.Args(**tiny.flags(script.SCRIPT, assets))
    rows = script.Learner(args).rows
    seeds = set()
    for update in (0, 1):
        indices = script.prompt_indices(len(rows), update, 8, args.seed)
        for rank in (0, 1):
            shard, seed, responses = ranks[rank][update]
            assert shard == [rows[i] for i in indices[rank::2]] and len(responses) == 4
            seeds.add(seed)
    assert len(seeds) == 4


def test_run_of_two_processes_leaves_one_result_over_all_samples(script, assets, two):
    run_dir, flags = two.out / script.SCRIPT, tiny.flags(script.SCRIPT, assets)
    result = read_result(run_dir)
    assert result["num_processes"] == 2 and result["num_updates"] == 2
    assert {p.name for p in run_dir.iterdir() if "tfevents" not in p.name} == FILES
    samples = [json.loads(line) for line in (run_dir / "eval_samples.jsonl").open()]
    assert [sample["index"] for sample in samples] == list(range(8)) and len(result["eval_scores"]) == 8
    assert [int(row["update"]) for row in read_curves(run_dir)] == [0, 1, 2]
    assert two.stdout.count("evaluation: ") == 4  # per script one before and one at the end
    assert two.stdout.count("run directory ") == 4  # and once when resumed
    assert two.stderr.count("error: stopped\n") == 2
    learner = script.Learner(script.Args(**flags))
    alone, _ = script.evaluate(learner, script.Args(**flags))
    same = ["perplexity", "score_reference", "score_empty"]  # IMDB's responses are sampled per process
    same += ["score", "score_truncated", "rouge1", "empty_wins"] if script is TLDR else []
    for name in same:
        assert result["before"][f"eval_{name}"] == pytest.approx(alone[f"eval/{name}"], rel=1e-4), name


# Learning


@pytest.fixture(scope="session")
def bandit(tmp_path_factory):
    return tiny.bandit(tmp_path_factory.mktemp("bandit"))


BANDIT = {"num_updates": 20, "top_k": 0, "response_length": 4, "num_trajectories": 32, "minibatch_size": 16}
BANDIT |= {"micro_batch_size": 16, "rollout_batch_size": 32, "eval_samples": 0, "run_dir": "run"}


def test_policy_learns_the_word_that_is_rewarded(script, bandit, tmp_path):
    flags = tiny.flags(script.SCRIPT, bandit) | BANDIT | {"alpha": 0.5, "beta": 20.0}
    if script is IMDB:
        flags |= {"learning_rate": 3e-3}
        chance, goal = 0.1, 0.75  # probabilities: nothing but "good" has 0.92
    else:
        flags |= {"learning_rate": 1e-2, "reward_model": str(bandit / "scalar")}
        chance, goal = -2.5, -0.7  # logits: nothing but "good" has 0.18
    code, _, err = call(script, tmp_path, flags)
    assert (code, err) == (0, "")
    result = read_result(tmp_path / "run")
    assert result["before"]["eval_score"] < chance
    assert result["eval_score"] > goal
    scores = [float(row["objective/scores"]) for row in read_curves(tmp_path / "run") if row["objective/scores"]]
    assert np.mean(scores[:2]) < chance + 0.1 and np.mean(scores[-4:]) > goal
