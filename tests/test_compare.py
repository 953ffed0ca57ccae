"""compare.py: the rule against scipy by hand, plans and refusals with a fake script, and one comparison for real."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import stats
from compare import Side, by_environment, fit, main, sentence
from compare_rule import decide, has_two_modes, holm, least_difference, welch_floored, words
from scipy.stats import combine_pvalues, norm, ttest_ind

ROOT = Path(__file__).resolve().parent.parent
PPO, A2C = ROOT / "sppo_continuous_discretized.py", ROOT / "sa2c_continuous_discretized.py"
ENVS = ("InvertedPendulum-v4", "InvertedDoublePendulum-v4")

FAKE = """
import argparse, json, random, sys
from pathlib import Path

class Args:
    env_id: str = "Toy-v0"
    total_timesteps: int = 1000
    seed: int = 1
    num_seeds: int = 1
    shift: float = 0.0  # better by so much
    fades: float = 1.0  # what is left of it at the end
    no_result_of: int = 0  # a seed
    clip_coef: float = 0.2
    run_dir: str = ""
    resume: str = ""

parser = argparse.ArgumentParser()
for name, kind in Args.__annotations__.items():
    parser.add_argument("--" + name.replace("_", "-"), default=getattr(Args, name), type=kind)
args = parser.parse_args()
if not args.env_id.startswith("Toy"):
    sys.exit(f"error: --env-id {args.env_id}: no such environment")
for seed in range(args.seed, args.seed + args.num_seeds):
    folder = Path(args.run_dir or args.resume) / (f"seed{seed}" if args.num_seeds > 1 else "")
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(f"{seed} {args.env_id}").gauss(0, 1)
    rows = [(i * args.total_timesteps // 10, draw + args.shift * (1 if i < 9 else args.fades)) for i in range(1, 11)]
    lines = ["global_step,charts/episodic_return", *(f"{step},{value}" for step, value in rows)]
    (folder / "curves.csv").write_text("\\n".join(lines))
    if seed != args.no_result_of:
        result = {"script": Path(__file__).stem, "env_id": args.env_id, "seed": seed, "args": vars(args), "sps": 1e6}
        (folder / "result.json").write_text(json.dumps(result | {"eval_mean": draw}))
    else:
        (Path(args.run_dir or args.resume) / "args.json").write_text(
            json.dumps({"script": Path(__file__).stem, "args": vars(args)})
        )
"""


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """compare.py in tmp_path, where fake.py finishes at once: exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake.py").write_text(FAKE)

    def run(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words)])
        capsys.readouterr()
        try:
            code = main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def refused(done: tuple[int, str, str], *texts: str) -> None:
    """It ended in one line that says so."""
    code, _, error = done
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert all(text in error for text in texts), error


# The rule


def samples(envs: int, n: int = 10, m: int = 10, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((envs, n)), rng.standard_normal((envs, m))


def test_the_rule_is_scipys_welch_and_stouffer_with_holm():
    x, y = samples(4)
    x[0] += 1.0
    p, z = welch_floored(x, y)
    tests = [ttest_ind(a, b, equal_var=False) for a, b in zip(x, y)]
    assert np.allclose(p, [test.pvalue for test in tests])
    assert (np.sign(z) == [np.sign(test.statistic) for test in tests]).all()
    one_sided = [ttest_ind(a, b, equal_var=False, alternative="greater").pvalue for a, b in zip(x, y)]
    above = combine_pvalues(one_sided, method="stouffer").pvalue
    verdict = decide(p, z)
    assert math.isclose(verdict.p, 2 * min(above, 1 - above))
    assert np.allclose(verdict.holm, stats.holm(p))
    many = np.random.default_rng(1).uniform(0, 0.2, (20, 4))
    assert np.allclose(holm(many), [stats.holm(p) for p in many])


def test_no_p_is_below_that_of_a_permutation_test():
    x, y = samples(1, 5, 5)
    p, _ = welch_floored(x + 1000, y)
    assert ttest_ind(x[0] + 1000, y[0], equal_var=False).pvalue < 1e-6 and p == 2 / math.comb(10, 5)
    constant = np.ones((2, 10))
    p, z = welch_floored(np.array([[2.0], [1.0]]) * constant, constant)  # neither side varies
    assert p.tolist() == [2 / math.comb(20, 10), 1.0] and z[0] > 4 and z[1] == 0


@pytest.mark.parametrize(
    ("p", "signs", "look", "word", "shown", "ways"),
    [
        ((0.02, 0.04, 0.04, 0.04), (1, 1, 1, 1), 1, "Better", True, (0, 0, 0, 0)),
        ((0.02, 0.04, 0.04, 0.04), (-1, -1, -1, -1), 1, "Worse", True, (0, 0, 0, 0)),
        ((0.001, 0.9, 0.9, 0.9), (1, 1, -1, -1), 1, "Better", False, (1, 0, 0, 0)),
        ((0.001, 0.9, 0.9, 0.9), (1, 1, -1, -1), 2, "Better", False, (1, 0, 0, 0)),  # 4 * 4 * 0.001 <= 0.025
        ((0.001, 0.9, 0.9, 0.9), (1, 1, -1, -1), 3, "Not shown", False, (0, 0, 0, 0)),
        ((0.01, 0.9, 0.9, 0.9), (1, 1, -1, -1), 1, "Not shown", False, (0, 0, 0, 0)),  # Holm 0.04, over all silent
        ((0.01, 0.1, 0.1, 0.1), (1, 1, 1, 1), 1, "Better", True, (1, 0, 0, 0)),  # Holm 0.04, over all has spoken
        ((0.001, 0.001, 0.9, 0.9), (1, -1, 1, -1), 1, "Mixed", False, (1, -1, 0, 0)),
        ((0.04,), (1,), 1, "Better", True, (1,)),
        ((0.04,), (1,), 2, "Not shown", False, (0,)),
        ((0.06,), (1,), 1, "Not shown", False, (0,)),
    ],
)
def test_what_the_rule_says(p, signs, look, word, shown, ways):
    p = np.array(p)
    verdict = decide(p, np.array(signs) * norm.isf(p / 2), look)
    assert (verdict.word, verdict.shown, tuple(verdict.ways)) == (word, shown, ways)


def test_the_rule_errs_as_announced_and_sees_what_it_announces():
    """Other random numbers than those with which least_difference finds its answer."""
    rng = np.random.default_rng(7)
    x, y = rng.standard_normal((2, 4000, 4, 10))
    assert 0.03 < (words(x, y) != "Not shown").mean() < 0.055
    in_all, alone = least_difference(10, 4), least_difference(10, 4, alone=True)
    assert abs(in_all - 0.7) < 0.03 and abs(alone - 1.75) < 0.1
    assert abs((words(x + in_all, y) == "Better").mean() - 0.8) < 0.03
    one = np.array([1, 0, 0, 0])[:, None]
    assert abs((words(x - alone * one, y) == "Worse").mean() - 0.8) < 0.03
    assert least_difference(5, 4, alone=True) == math.inf  # 4 * 2 / C(10, 5) > 0.025
    assert least_difference(4, 1) < math.inf == least_difference(3, 1)


def test_two_modes_are_seen_and_one_is_not():
    rng = np.random.default_rng(3)
    two = np.concatenate([rng.standard_normal(5), 12 + rng.standard_normal(5)])
    assert has_two_modes(two) and not has_two_modes(two[:7]) and not has_two_modes(np.ones(10))
    assert sum(has_two_modes(rng.standard_normal(10)) for _ in range(50)) <= 2


def say(*shifts: tuple[float, float]) -> str:
    """The sentence for ten seeds a side that differ by a shift over all steps and by another in the last tenth."""
    rng, rows = np.random.default_rng(0), []
    for i, (shift, end) in enumerate(shifts):
        for label, times in (("A", 1), ("B", 0)):
            rows += [(f"Env{i}", label, x + times * shift, x + times * end) for x in rng.standard_normal(10)]
    found = by_environment(pd.DataFrame(rows, columns=["environment", "side", "score", "last_tenth"]))
    return sentence(found, decide(found.p.to_numpy(), found.z.to_numpy()), "300,000 steps", "a difference of 0.7")


def test_the_sentence():
    assert say((2, 2), (2, 2), (2, 2)).startswith("Better: in the first 300,000 steps, over all 3 environments")
    assert say((-2, -2), (-2, -2)).startswith("Worse: ")
    mixed = say((3, 0.5), (-3, -0.5))
    assert mixed.startswith("Mixed: better on Env0 and worse on Env1; in the first 300,000 steps")
    assert "The lead is closing" in mixed and "The lead is not closing" in say((2, 2))
    alone = say((3, 3), (-0.3, 0), (-0.3, 0), (-0.5, 0))
    assert alone.startswith("Better on Env0, not shown over all: in the first 300,000 steps")
    nothing = say((0, 0), (0, 0))
    assert nothing.startswith("Not shown: in the first 300,000 steps") and "a difference of 0.7 would have" in nothing
    assert "lead" not in nothing


# One algorithm


@pytest.mark.parametrize(
    ("script", "first", "second", "same"),
    [
        (PPO, "", "", True),
        (PPO, "", "--alpha 20.5 --beta 0", True),
        (PPO, "--alpha 1 --beta 4.5", "--beta 2.5 --Z -2", True),  # alpha - beta Z 5.5
        (PPO, "", "--beta 10", False),
        (PPO, "", "--alpha 0.5 --beta 0.5 --vf-coef 0.1", False),
        (PPO, "--beta 9.5", "--alpha 1 --beta 0 --vf-coef 0.05 --max-grad-norm 0.05", True),  # all divided by 10
        (PPO, "--beta 9.5", "--alpha 1 --beta 0 --vf-coef 0.05", False),
        (PPO, "--beta 9.5 --gamma 0.9", "--alpha 1 --beta 0 --vf-coef 0.05 --max-grad-norm 0.05", False),
        (PPO, "", "--num-threads 2", True),
        (A2C, "--alpha 1 --beta 2", "--alpha 1 --beta 1 --Z -2", True),
        (A2C, "--alpha 1 --beta 2", "--alpha 2 --beta 1", False),  # its factor depends on the sample
        (A2C, "--alpha 1 --beta 2", "--alpha 2 --beta 4 --vf-coef 1 --max-grad-norm 1", True),
    ],
)
def test_both_sides_are_one_algorithm(tmp_path, script, first, second, same):
    a, b = (Side(label, f"{script} {flags}", [], tmp_path) for label, flags in (("A", first), ("B", second)))
    assert (a.algorithm() == b.algorithm()) is same


def test_comments_do_not_make_another_algorithm_and_a_changed_loss_has_no_identity(tmp_path):
    text = PPO.read_text()
    (tmp_path / "commented.py").write_text("# mine\n" + text)
    (tmp_path / "changed.py").write_text(text.replace("torch.min(", "torch.max(", 1))
    assert (tmp_path / "changed.py").read_text() != text

    def same(first: str, second: str) -> bool:
        scripts = tmp_path / f"scripts{len(list(tmp_path.iterdir()))}"
        sides = [Side(label, flags, [], scripts) for label, flags in (("A", first), ("B", second))]
        return sides[0].algorithm() == sides[1].algorithm()

    assert same(f"{tmp_path}/commented.py", f"{PPO}") and not same(f"{tmp_path}/changed.py", f"{PPO}")
    assert same(f"{tmp_path}/commented.py --alpha 20.5 --beta 0", f"{PPO}")
    assert not same(f"{tmp_path}/changed.py --alpha 20.5 --beta 0", f"{tmp_path}/changed.py")


# Plans, looks and refusals, with the fake script


def test_a_comparison_grows_counts_its_looks_and_keeps_its_scripts(compare, tmp_path):
    command = "fake.py --shift 2", "fake.py", "--envs", "Toy-v0 Toy/v1", "--out", "out"
    code, out, error = compare(*command, "--dry-run", "--", "--clip-coef=0.1")
    assert code == 0 and "Toy-v0, Toy/v1: 10 seeds a side, 300,000 steps, about 0 minutes" in out, error
    assert "a difference of 1.0 standard deviations in all environments or of 1.6 in one alone" in out
    assert not (tmp_path / "out").exists()

    before = signal.getsignal(signal.SIGINT)
    code, out, error = compare(*command)
    assert code == 0 and "Better: in the first 300,000 steps" in out, out + error
    assert signal.getsignal(signal.SIGINT) == before and "tables:" not in out
    scores = pd.read_csv(tmp_path / "out/scores.csv")
    assert len(scores) == 40 and set(scores.environment) == {"Toy-v0", "Toy/v1"}
    results = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("result.json")}

    with (tmp_path / "fake.py").open("a") as file:
        file.write("\nraise RuntimeError\n")
    code, out, _ = compare(*command)
    assert code == 0 and "fake.py has changed" in out and "look 2" not in out
    code, out, error = compare(*command, "--seeds", "12")
    assert code == 0 and "look 2 at the answer, so every p is multiplied by 4" in out, error
    assert len(pd.read_csv(tmp_path / "out/scores.csv")) == 48
    assert all(path.stat().st_mtime_ns == begun for path, begun in results.items())  # nothing ran again
    assert "look 2" in compare(*command)[1]  # the same answer is no new look
    refused(compare(*command, "--seeds", "10"), "seeds can only be added")
    refused(compare(*command, "--steps", "1000"), "steps 300000, not 1000", "choose another --out")
    refused(compare("fake.py --shift 3", *command[1:]), "choose another --out")
    assert (tmp_path / "out/curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "| over all" in (tmp_path / "out/answer.md").read_text()


def test_the_same_algorithm_gets_other_seeds(compare, tmp_path):
    code, out, error = compare("fake.py", "fake.py", "--envs", "Toy-v0", "--seeds", "4", "--out", "out")
    assert code == 0 and "Both sides are one algorithm" in out, out + error
    scores = pd.read_csv(tmp_path / "out/scores.csv")
    assert scores[scores.side == "B"].seed.tolist() == [1001, 1002, 1003, 1004]
    _, out, _ = compare("fake.py --shift 1", "fake.py", "--envs", "Toy-v0", "--seeds", "4")
    assert "one algorithm" not in out
    scores = pd.read_csv(tmp_path / "runs/compare/fake_shift_1__fake/scores.csv")
    assert scores[scores.side == "B"].seed.tolist() == [1, 2, 3, 4]


def test_failed_seeds_are_said_and_count_nowhere(compare, tmp_path):
    one = "--envs", "Toy-v0", "--seeds", "5", "--out", "out"
    code, out, error = compare("fake.py --no-result-of 2 --shift 9", "fake.py", *one)
    assert code == 1 and "1 of 5 seeds of A on Toy-v0 have no result" in out, error
    assert pd.read_csv(tmp_path / "out/answer.csv").seeds[0] == "4, 5"


def test_scores_of_a_language_script_are_its_rewards_by_update(compare, tmp_path):
    text = FAKE.replace("total_timesteps", "num_updates").replace("env_id", "dataset").replace("env-id", "dataset")
    text = text.replace("    num_seeds: int = 1\n", "").replace("args.num_seeds", "1")
    (tmp_path / "words.py").write_text(text.replace("charts/episodic_return", "objective/scores"))
    one = "words.py --shift 9", "words.py", "--envs", "Toy-reviews", "--steps", "60", "--seeds", "4"
    code, out, error = compare(*one, "--out", "out")
    assert code == 0 and "in the first 60 updates, on Toy-reviews" in out, out + error
    curve = pd.read_csv(tmp_path / "out/A/Toy-reviews/seed3/curves.csv", index_col=0)["objective/scores"]
    scores = pd.read_csv(tmp_path / "out/scores.csv").set_index(["side", "seed"]).score
    assert np.isclose(scores["A", 3], np.interp(np.linspace(6, 60, 200), curve.index, curve).mean())
    assert "4 seeds a side, 60 updates, about" in compare(*one, "--out", "more", "--dry-run")[1]


def test_hours_choose_the_largest_plan_that_fits(tmp_path):
    (tmp_path / "fake.py").write_text(FAKE)
    sides = [Side(label, f"{tmp_path}/fake.py", [], tmp_path / "scripts") for label in "AB"]
    trials = {f"{label} Toy-v0": {"seconds": 40, "speed": 10_000} for label in "AB"}
    plan = {"envs": ["Toy-v0"], "steps": 300_000, "agents": 10, "trials": trials}
    ten = (40 + 10 * 300_000 / 10_000) / 3600  # both sides at once
    chosen = fit(sides, plan | {"hours": 1.01 * ten}, 2, tmp_path)
    assert chosen == {"seeds": 10, "steps": 300_000}
    assert fit(sides, plan | {"hours": 0.99 * ten}, 2, tmp_path) == {"seeds": 10, "steps": 150_000}
    assert fit(sides, plan | {"hours": 2.01 * ten}, 2, tmp_path) == {"seeds": 20, "steps": 300_000}
    with pytest.raises(SystemExit):
        fit(sides, plan | {"hours": 0.001}, 2, tmp_path)


ONE = "--envs", "Toy-v0"


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (("fake.py", "nowhere.py"), ["side B: there is no script 'nowhere.py'"]),
        (("", "fake.py"), ["side A: there is no script ''"]),
        (("broken.py", "fake.py"), ["side A", "broken.py", "line 2"]),
        (("other.py", "fake.py"), ["side A", "other.py has no class Args"]),
        (("fake.py --betta 1", "fake.py"), ["side A", "fake.py has no flag --betta"]),
        (("fake.py", "fake.py --shift much"), ["side B", "'much'"]),
        (("fake.py --seed 3", "fake.py"), ["side A: --seed is set by"]),
        (("fake.py", "fake.py", *ONE, "--seeds", "3"), ["--seeds 3: fewer than 4 seeds"]),
        (("fake.py", "fake.py", *ONE, "--seeds", "-3"), ["must be above 0"]),
        (("fake.py", "fake.py", *ONE, "--hours", "1", "--steps", "10"), ["--hours chooses"]),
        (("fake.py", "updates.py", *ONE), ["one side counts updates"]),
        (("fake.py", "fake.py", *ONE, "--", "--gamma", "1"), ["side A", "no flag --gamma"]),
        (("fake.py", "fake.py", "--envs", "Toy-v0 Ant-v99"), ["side A cannot be trained on Ant-v99: --env-id Ant-v99"]),
        (("sppo_atari.py", "sppo_atari.py --beta 1"), ["--envs and --steps have defaults for the continuous scripts"]),
    ],
)
def test_bad_input_ends_in_one_line(compare, tmp_path, words, texts):
    (tmp_path / "broken.py").write_text("class Args:\n    x: int = (\n")
    (tmp_path / "other.py").write_text("print('no arguments')\n")
    (tmp_path / "updates.py").write_text(FAKE.replace("total_timesteps", "num_updates"))
    refused(compare(*words), *texts)
    assert not (tmp_path / "runs").exists()


def test_a_bug_in_a_copy_keeps_its_traceback(compare, tmp_path):
    (tmp_path / "mine.py").write_text(FAKE.replace("lines = [", "lines = nonsense + ["))
    code, _, error = compare("fake.py", "mine.py", *ONE)
    assert code == 2 and "Traceback" in error and not (tmp_path / "runs").exists()
    assert error.splitlines()[-1].startswith("error: side B cannot be trained on Toy-v0: NameError")


# For real


def test_a_real_script_refuses_what_it_cannot_train(compare, tmp_path):
    done = compare(PPO, f"{PPO} --beta 1", "--envs", "CartPole-v1", "--seeds", "4", "--out", tmp_path / "out")
    refused(done, "side A cannot be trained on CartPole-v1", "bins need a Box")


def score_by_hand(curve: Path, steps: int) -> float:
    """Mean of the piecewise linear curve over its steps."""
    returns = pd.read_csv(curve, index_col=0)["charts/episodic_return"].dropna()
    grid = np.linspace(returns.index[0], steps, 200)
    return float(np.mean(np.interp(grid, returns.index, returns)))


def test_a_comparison_for_real_is_killed_and_continues(tmp_path):
    out = tmp_path / "out"
    words = f"{PPO} --gamma 0.9", PPO, "--envs", " ".join(ENVS), "--seeds", "4", "--steps", "4096", "--out", out
    command = [sys.executable, str(ROOT / "benchmark/compare.py"), *map(str, words), "--workers", "2"]
    command += ["--", "--update-epochs", "1", "--num-minibatches", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    curve = out / "A" / ENVS[0] / "seeds1-4/seed1/curves.csv"
    end = time.monotonic() + 900
    while not curve.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    assert curve.exists() and not list(out.rglob("result.json"))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()

    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    gammas = [json.loads((out / label / ENVS[0] / "seeds1-4/args.json").read_text())["args"]["gamma"] for label in "AB"]
    assert gammas == [0.9, 0.99]
    table = pd.read_csv(out / "answer.csv", dtype=str, keep_default_na=False).set_index("Environment")
    greater, ps = [], []
    for env in ENVS:
        folders = {label: [out / label / env / "seeds1-4" / f"seed{seed}" for seed in (1, 2, 3, 4)] for label in "AB"}
        assert all((folder / "result.json").exists() for folder in folders["A"] + folders["B"])
        a, b = (np.array([score_by_hand(x / "curves.csv", 4096) for x in folders[label]]) for label in "AB")
        test = ttest_ind(a, b, equal_var=False)
        ps.append(max(test.pvalue, 2 / math.comb(8, 4)))
        greater.append(ps[-1] / 2 if test.statistic > 0 else 1 - ps[-1] / 2)
        row, low, high = table.loc[env], *test.confidence_interval()
        assert row["seeds"] == "4, 4" and row["A"] == stats.mean_text(a) and row["B"] == stats.mean_text(b)
        assert row["A - B"] == f"{stats.gain(a.mean() - b.mean())} [{stats.gain(low)}, {stats.gain(high)}]"
        assert row["p"] == stats.p_text(ps[-1])
    over_all = combine_pvalues(greater, method="stouffer").pvalue
    over_all = 2 * min(over_all, 1 - over_all)
    assert table.loc["over all", "p"] == stats.p_text(over_all)
    assert [table.loc[env, "Holm"] for env in ENVS] == [stats.p_text(p) for p in stats.holm(ps)]
    assert ("Not shown" in done.stdout) == (over_all > 0.025) and "in the first 4,096 steps" in done.stdout
    answer = (out / "answer.md").read_text()
    assert answer.splitlines()[0] in done.stdout and (out / "curves.png").exists()
    assert f"A: `{PPO.name} --gamma 0.9 --update-epochs 1" in answer
