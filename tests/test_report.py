"""benchmark/report.py and its parts: the paper's numbers, hand-computed tables, and what must not be mixed."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import findings
import numpy as np
import pytest
import report
import stats
from comparisons import pairs
from conftest import ROOT, SCRIPTS
from language import JUDGE, language_cells, language_table, language_text
from matplotlib.figure import Figure
from PIL import Image
from runs import FAMILY, PARTS, UNNORMALIZED, Found, bin_means, describe, parse, read_paper, series
from scipy import stats as scipy_stats
from sweeps import SWEEPS, Script
from sweeps import cells as sweep_cells
from tables import copies_text, read_public

PENDULUM, CHEETAH, LANDER = "InvertedDoublePendulum-v4", "HalfCheetah-v4", "LunarLanderContinuous-v3"
ALIEN = "AlienNoFrameskip-v4"
PPO_SCRIPT = "sppo_continuous_discretized"
DPPO, DSPPO = {"alpha": 1.0, "beta": 0.0, "Z": -1.0}, {"alpha": 0.5, "beta": 20.0, "Z": -1.0}
PAPER = read_paper()
PRINTED = PAPER.set_index(["table", "environment", "algorithm", "noise", "metric"]).printed


def printed(table, environment, algorithm, noise="none"):
    return PRINTED[table, environment, algorithm, noise, "score"]


def write_run(folder, scores, env_id=PENDULUM, script=PPO_SCRIPT, steps=1_001_472, first_seed=1, curves=None, **args):
    """A finished run in folder/seed<k> for each of the scores; curves: {tag: value}, of which the return rises."""
    for seed, score in enumerate(scores, first_seed):
        run_dir = folder / f"seed{seed}"
        run_dir.mkdir(parents=True)
        result = {"script": script, "env_id": env_id, "seed": seed, "args": args, "total_timesteps": steps}
        result |= {
            "eval_returns": [score] * 10,
            "eval_mean": score,
            "commit": "c" * 40,
            "versions": {"torch": "2.13.0"},
        }
        (run_dir / "result.json").write_text(json.dumps(result))
        if curves is not None:
            tags = {"losses/sign_flips": 0.1} | curves
            lines = [f"global_step,charts/episodic_return,{','.join(tags)}"]
            values = ",".join(map(str, tags.values()))
            lines += [f"{i * steps // 50},{score * i / 50},{values}" for i in range(1, 51)]
            (run_dir / "curves.csv").write_text("\n".join([*lines, f"{steps},,", "99999"]))


def write_language_run(folder, scores, script="sppo_rlhf_imdb", updates=None, curves=False, judge=None, **args):
    """A finished language run in folder/seed<k> for each of the scores, the paper's PPO unless args say otherwise."""
    updates = updates or {"sppo_rlhf_imdb": 60, "sppo_rlhf_tldr": 100}[script]
    args = Script(script, ROOT).defaults | {"alpha": 1.0, "beta": 0.0, "target_coef": 0.1} | args
    for seed, score in enumerate(scores, 1):
        run_dir = folder / f"seed{seed}"
        run_dir.mkdir(parents=True)
        metrics = {"score": score, "perplexity": 37.0 + 2 * seed, "score_reference": 0.6, "score_empty": 0.5}
        metrics |= {"score_truncated": score / 2, "empty_wins": 0.25, "truncated_wins": 0.125}
        if script == "sppo_rlhf_tldr":
            metrics |= {"rouge1": 0.3 + 0.1 * seed, "rouge2": 0.1, "rougeL": 0.2}
        before = metrics | {"score": 0.5, "perplexity": 33.0, "rouge1": 0.3, "score_truncated": 0.2}
        result = {"script": script, "policy": args["policy"], "dataset": args["dataset"], "seed": seed}
        result |= {"args": args, "num_updates": updates, "eval_scores": [score] * 3}
        result |= {f"eval_{name}": value for name, value in metrics.items()}
        result |= {"before": {f"eval_{name}": value for name, value in before.items()}, "commit": "c" * 40}
        (run_dir / "result.json").write_text(json.dumps(result))
        if curves:
            lines = ["update,objective/scores,objective/kl,eval/score,eval/perplexity", "0,,,0.5,33.0"]
            done = range(1, updates + 1)
            lines += [f"{i},{score * i / updates},{i * seed},{f'{seed},30' if i == 10 else ','}" for i in done]
            (run_dir / "curves.csv").write_text("\n".join([*lines, f"{updates},,,{score},0\n"]))
        if judge:
            verdict = {"win_rate": judge[seed - 1], "judge_model": JUDGE[0], "samples": 100, "against": "reference"}
            (run_dir / "judge.json").write_text(json.dumps(verdict))


def make_report(folder, *options):
    out = folder.parent / "report"
    assert report.main([str(folder), "--out", str(out), *map(str, options)]) == 0
    return (out / "report.md").read_text(encoding="utf-8")


@pytest.fixture
def drawing():
    """For a test that looks at figures."""


@pytest.fixture(autouse=True)
def no_drawing(request, monkeypatch):
    """Figures take most of a report's time: where a test does not look at them they have one pixel."""
    if "drawing" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: Image.new("RGB", (1, 1)).save(file, "png"))


def section(text, title):
    """Text of the section whose title starts so."""
    return next(part for part in text.split("\n## ") if part.startswith(title))


def rows(text):
    """Cells of the tables in a section, header and rule left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = {i for i, row in enumerate(cells) if set(row[0]) <= set(":-")}
    return [row for i, row in enumerate(cells) if i not in rules and i + 1 not in rules]


def tables(text):
    """The rows of each table in a section."""
    return [rows(block) for block in text.split("\n\n") if block.startswith("|")]


def test_paper_numbers_have_every_cell():
    with (ROOT / "benchmark/paper/paper_numbers.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    expected = {1: 32, 2: 24, 3: 15, 4: 10, 8: 88, 9: 27, 10: 27, 11: 88, 12: 27, 13: 27, 14: 4}
    assert Counter(int(cell["table"]) for cell in cells) == expected
    names = ("environment", "algorithm", "noise", "metric", "mean", "standard_error")
    by_table = {n: {tuple(cell[k] for k in names) for cell in cells if int(cell["table"]) == n} for n in expected}
    assert {n: len({row[:4] for row in some}) for n, some in by_table.items()} == expected  # no cell twice
    assert all(by_table[part] <= by_table[whole] for part, whole in PARTS.items())
    assert all((cell["standard_error"] == "") == (cell["table"] == "4") for cell in cells)
    assert PAPER.paper.notna().all() and len(PAPER) == sum(expected.values()) - expected[1] - expected[2]


def test_sweeps_run_every_cell_of_the_paper():
    for sweep, numbers in SWEEPS.items():
        if sweep in FAMILY.values():
            lines = [parse(line) for line in sweep_cells(sweep)]
            found = [(x["environment"], x["algorithm"], x["noise"]) for x in lines if x["algorithm"] != UNNORMALIZED]
            wanted = PAPER[PAPER.table.isin(numbers)]
            assert sorted(found) == sorted(zip(wanted.environment, wanted.algorithm, wanted.noise))
            assert {x["seeds"] for x in lines} == {5 if "atari" in sweep else 30}


def test_welch_of_means_is_welch_of_scores():
    first, second = np.array([3.0, 5.0, 4.0, 9.0]), np.array([1.0, 2.0, 4.0])
    expected = scipy_stats.ttest_ind(first, second, equal_var=False)
    t, p, z = stats.welch_of(first, second)
    assert (t, p) == pytest.approx((expected.statistic, expected.pvalue))
    assert 2 * scipy_stats.norm.sf(z) == pytest.approx(p)
    assert stats.welch_of(second, first)[2] == pytest.approx(-z)
    assert all(map(math.isnan, stats.welch_of(first, second[:1])))
    assert stats.welch(100, 3, 9, 110, 4, 9)[0] == pytest.approx(-10 / 5)
    assert stats.difference_interval(first, second) == pytest.approx(tuple(expected.confidence_interval()))
    # a difference compared with 0, which has no error, is the test of the difference itself
    again = stats.welch(*stats.difference(*stats.summary(first), *stats.summary(second)), 0.0, 0.0, 1e9)
    assert (float(again[0]), float(again[1])) == pytest.approx((t, p))


def test_without_any_difference_all_cells_together_err_in_five_percent():
    """14 cells of 5 and 10 seeds beside 30, 1,500 times; 1 / sqrt(cells) errs in more than 7."""
    rng, repetitions, n = np.random.default_rng(0), 1500, np.array([5] * 6 + [10] * 8)

    def drawn(seeds):
        x = rng.standard_normal((repetitions, seeds))
        return x.mean(1), x.std(1, ddof=1) / seeds**0.5, seeds

    t, _, z = (np.array(some) for some in zip(*(stats.welch(*drawn(k), *drawn(30)) for k in n)))
    stouffer = np.mean([stats.stouffer(cells)[1] < 0.05 for cells in z.T])
    misses = np.mean([low > 0 or high < 0 for _, low, high in map(stats.mean_interval, z.T)])
    assert 0.035 < stouffer < 0.065 and 0.035 < misses < 0.065
    assert np.mean(np.abs(t.mean(0)) > 1.96 / len(n) ** 0.5) > 0.07
    beyond = stats.beyond_by_chance(np.ones(14) / n**0.5, n, np.ones(14) / 30**0.5, np.full(14, 30))
    assert beyond == pytest.approx(np.mean(np.sum(np.abs(t) > 2, axis=0)), rel=0.1)


def test_hand_computed_statistics():
    assert stats.summary([90.0, 100.0, 110.0]) == pytest.approx((100, 10 / math.sqrt(3), 3))  # variance 100
    assert math.isnan(stats.summary([1.0])[1])
    # 4 x 0.01; 3 x 0.02; 2 x 0.04 and then no smaller; what has no p does not count
    holm = stats.holm([0.04, 0.01, math.nan, 0.02, 0.05])
    assert holm == pytest.approx([0.08, 0.04, math.nan, 0.06, 0.08], nan_ok=True)
    baseline, symmetric = [100.0, 200.0, -4.0, 10.0, 1.0, 0.0], [150.0, 100.0, 2.0, 10.0, 21.0, 5.0]
    assert stats.improvements(baseline, symmetric) == pytest.approx([50, -50, 150, 0, 2000])
    # 50, -50, 150, 0: 37.5 +- 3.182 x 42.7; all five: 430 +- 2.776 x 393.9
    text = "+430.0 % [-663.6, +1523.6] (+37.5 % [-98.4, +173.4] without the 1 above 1000 %)"
    assert stats.improvement_text(baseline, symmetric) == text
    assert stats.percent_text([10.0, 20.0]) == "+15.0 %"  # two cells: no interval
    assert stats.stouffer([1.0, 2.0, 1.0, 0.0]) == pytest.approx((2.0, 2 * scipy_stats.norm.sf(2)))


def test_probability_of_improvement_and_its_interval():
    first, second = np.array([1.0, 2.0, 3.0]), np.array([2.0, 0.0])
    # 1 > 0; 2 = 2 and 2 > 0; 3 > 2 and 3 > 0: 4.5 of 6; in a second environment never: the mean of both
    assert stats.probability_of_improvement(first, second) == pytest.approx(0.75)
    assert stats.probability_of_improvement(first, -first, second, first) == pytest.approx(0.375)
    low, high = stats.bootstrap_interval([first, second], stats.probability_of_improvement)
    assert 0 <= low < 0.75 < high <= 1
    # resampling within each environment: all eight together would spread
    means = lambda x, y, axis: np.mean([x.mean(axis), y.mean(axis)], axis=0)  # noqa: E731
    assert stats.bootstrap_interval([np.zeros(4), np.ones(4)], means) == (0.5, 0.5)
    assert stats.bootstrap_interval([np.zeros(4), np.ones(1)], means) is None


def test_the_papers_own_cells_are_tested_like_ours(tmp_path):
    write_run(tmp_path, [9000.0], **DSPPO)
    cells = Found([tmp_path]).cells
    for two, wins in (("SPPO", "PPO"), (16, 19)), (("SA2C", "A2C"), (13, 15)):
        both = pairs(cells, *two)
        assert tuple((both.paper_difference > 0).groupby(both.noise).sum()[["none", "BSC(0.1)"]]) == wins
    both = pairs(cells, "DSPPO", "DPPO")
    row = both[(both.environment == PENDULUM) & (both.noise == "none")].iloc[0]
    assert row.paper_t == pytest.approx((9015 - 8928) / math.hypot(101, 136))
    assert (row.paper_gain, len(both), both.difference.notna().sum()) == ("+87.0 ± 169.4", 18, 0)


def test_a_table_beside_the_papers(tmp_path):
    write_run(tmp_path / "dsppo" / "seeds1-2", [9000.0, 9200.0], **DSPPO)
    write_run(tmp_path / "dsppo" / "seeds3-4", [9100.0, 9300.0], first_seed=3, **DSPPO)
    write_run(tmp_path / "dppo", [8700.0, 8900.0], **DPPO)
    write_run(tmp_path / "lander-dsppo", [200.0, 300.0], LANDER, steps=2_000_896, **DSPPO)
    write_run(tmp_path / "lander-dppo", [300.0, 300.0], LANDER, steps=2_000_896, **DPPO)
    assert report.main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "openai/baselines" not in text and "RL Zoo" not in text  # no Atari run is there
    table = section(text, "Table 12")
    # SE of DSPPO: sqrt(50,000 / 3 / 4) = 64.5; (9150 - 9015) / sqrt(64.5^2 + 101^2) = 1.13. DPPO: -128 / 169.1.
    cells, comparison = tables(table)
    assert cells == [
        [LANDER, "DPPO", "none", "300.0 ± 0.0", "2", "2,000,000", "241 ± 7.7", "+7.66, exceeds"],
        [LANDER, "DSPPO", "none", "250.0 ± 50.0", "2", "2,000,000", "250 ± 6.9", "+0.00, within"],
        [PENDULUM, "DPPO", "none", "8800 ± 100", "2", "1,000,000", "8928 ± 136", "-0.76, within"],
        [PENDULUM, "DSPPO", "none", "9150 ± 65", "4", "1,000,000", "9015 ± 101", "+1.13, exceeds"],
    ]
    # DSPPO minus DPPO: -50 ± sqrt(50^2 + 0); 350 ± sqrt(64.5^2 + 100^2). The paper: 250 - 241 ± sqrt(6.9^2 + 7.7^2);
    # 9015 - 8928 ± sqrt(101^2 + 136^2). Pairs: 2 ties of 4, 8 of 8, whose certainty no resampling can tell.
    # Welch: t = -1 with 1 degree of freedom: 0.5; t = 2.94 with 1.90: 0.105.
    assert comparison == [
        [LANDER, "none", "2, 2", "-50.0 ± 50.0", "+9.0 ± 10.3", "0.25 [0.00, 0.50]", "0.50", "0.50"],
        [PENDULUM, "none", "4, 2", "+350.0 ± 119.0", "+87.0 ± 169.4", "1.00 (no interval)", "0.11", "0.21"],
        ["all 2", "none", "", "", "", "0.62 [0.50, 0.75]", "", ""],
    ]
    # 100 (9150 / 8800 - 1) = 3.98 and 100 (250 / 300 - 1) = -16.67
    wins = "DSPPO over DPPO, noise none: higher mean in 1 of 2 environments (the paper's cells: 2 of these, 8 of all 9)"
    assert f"- {wins}; average improvement -6.3 % (the paper's cells: +2.4 % in these environments, +5.4 % [" in table
    together = {row[0]: row[1:] for row in rows(section(text, "All cells together"))}
    # two cells: no interval; t = 1.13 and 0.00; 135 / 9015 = 1.5 % and 0
    assert together["DSPPO"][:3] == ["2", "2 to 4", "+0.56"] and together["DSPPO"][-1] == "+0.7 %"
    coverage = {tuple(row[:3]): row[3:] for row in rows(section(text, "Cells that were run"))}
    assert coverage["12", "PPO, DPPO, DSPPO", "none"] == ["4 of 27", "2"]
    assert coverage["11", "PPO, SPPO", "BSC(0.1)"] == ["0 of 44", "0"]
    assert coverage["4", "SPPO over PPO for five betas", "both"] == ["0 of 10", "0"]


def test_a_control_that_is_the_same_algorithm_is_pooled_and_has_a_row_of_its_own(tmp_path):
    write_run(tmp_path / "runs" / "dsppo", [9000.0, 9200.0], **DSPPO)
    write_run(tmp_path / "runs" / "control", [9000.0, 9100.0], alpha=20.5, beta=0.0)
    write_run(tmp_path / "runs" / "dppo", [8800.0, 8900.0], **DPPO)
    swimmer = {"env_id": "Swimmer-v4", "steps": 2_000_896}
    write_run(tmp_path / "runs" / "swimmer-dppo", [44.0, 45.5, 130.0], **swimmer, **DPPO)
    write_run(tmp_path / "runs" / "swimmer-dsppo", [61.0, 131.0], **swimmer, **DSPPO)
    a2c = {"script": "sa2c_continuous_discretized", "steps": 2_000_000, "env_id": LANDER}
    for name, args in (("da2c", DPPO), ("dsa2c", {"alpha": 0.5, "beta": 5.0}), ("half", {"alpha": 0.5, "beta": 0.0})):
        write_run(tmp_path / "runs" / name, [100.0, 120.0], **a2c, **args)
    document = tmp_path / "pairs.md"
    document.write_text("<!-- pairs: begin -->\n<!-- pairs: end -->\n")
    text = make_report(tmp_path / "runs", "--document", document)
    cells, pooled, beside, weight, modes = tables(section(text, "Table 12"))
    assert [(row[1], *row[3:5]) for row in cells if row[0] == PENDULUM] == [
        ("DPPO", "8850 ± 50", "2"),
        ("DSPPO", "9100 ± 100", "2"),
        ("DPPO control", "9050 ± 50", "2"),
    ]
    assert pooled[1][:4] == [PENDULUM, "none", "2, 2", "+225.0 ± 90.1"]  # 9000 and 9150 by seed, beside 8850 ± 50
    assert beside[0][:5] == [PENDULUM, "none", "2, 2", "+50.0 ± 111.8", "0.62 [0.00, 1.00]"]
    assert weight[0][:4] == [PENDULUM, "none", "2, 2", "+200.0 ± 70.7"]
    assert [row[0][2] for row in tables(section(text, "Table 9"))[1:4]] == ["2, 2"] * 3  # SA2C's control is another one
    assert modes == [
        ["Swimmer-v4", "DPPO", "none", "3", "60", "2", "1", "44.0, 45.5; 130.0"],
        ["Swimmer-v4", "DSPPO", "none", "2", "60", "0", "2", "61.0, 131.0"],
    ]
    found = {row[0]: row[1:] for row in rows(document.read_text())}
    # t = 2.50 with 1.74 degrees of freedom: 0.15; Swimmer's t is below 1
    clearest = ["InvertedDoublePendulum, +225.0 ± 90.1 (2, 2 seeds)", "0.15", "0.30 (of 2)"]
    assert found["DSPPO over DPPO"][:3] == ["none", "2 of 2", "2 to 3"] and found["DSPPO over DPPO"][-3:] == clearest
    assert found["DPPO control over DPPO"][:3] == ["both", "1 of 1", "2"]


def test_documents_are_filled_in(tmp_path, capsys):
    """DSPPO is better in one environment, worse in the next and alike in the last."""
    runs, document = tmp_path / "runs", tmp_path / "README.md"
    for env_id, steps, pair in (
        (PENDULUM, 1_001_472, ([9100.0, 9200.0], [8900.0, 9000.0, 9050.0])),
        (LANDER, 2_000_896, ([240.0, 250.0], [260.0, 270.0])),
        (CHEETAH, 2_000_896, ([0.0, 0.0], [0.0, 0.0])),
    ):
        for name, args, values in zip(("dsppo", "dppo"), (DSPPO, DPPO), pair):
            write_run(runs / f"{name}-{env_id}", values, env_id, steps=steps, **args)
    command = [str(runs), "--out", str(tmp_path / "report"), "--document", str(document)]
    for text, error in (
        ("# A\n", "no line <!-- NAME: begin -->"),
        ("<!-- scores: begin -->\n", "no lines <!-- scores: b"),
    ):
        document.write_text(text)
        assert report.main(command) == 2 and error in capsys.readouterr().err and not (tmp_path / "report").exists()
    markers = [f"<!-- {name}: begin -->\nold\n<!-- {name}: end -->\n" for name in ("verdict", "scores")]
    document.write_text("# A\n" + "".join(markers) + "z\n")
    assert report.main(command) == 0
    text = document.read_text()
    assert text.startswith("# A\n") and text.endswith("z\n") and "old" not in text
    assert "6 of the paper's 108 continuous-control cells were run (2 to 3 seeds each). 3 are within two joint" in text
    # HalfCheetah has no spread, so that the unit is the paper's: 3478 / 279; LunarLander's DPPO: 24 / sqrt(5^2 + 7.7^2)
    below, above = "DPPO on HalfCheetah, DSPPO on HalfCheetah", "DPPO on LunarLander"
    assert f"chance alone would leave 6. Below the paper: {below}. Above the paper: {above}." in text
    assert "Significant by Holm's method: 2 (smallest p < 0.001)." in text
    assert rows(text) == [
        ["HalfCheetah", "2", "0.000 ± 0.000 (3478)", "0.000 ± 0.000 (4104)", "", ""],
        ["LunarLander", "2", "265.0 ± 5.0 (241)", "245.0 ± 5.0 (250)", "", ""],
        ["InvertedDoublePendulum", "2 to 3", "8983 ± 44 (8928)", "9150 ± 50 (9015)", "", ""],
    ]


@pytest.mark.usefixtures("drawing")
def test_figures_are_written_and_small(tmp_path):
    runs = tmp_path / "runs"
    write_run(runs / "dsppo", [9000.0, 9200.0], curves={}, **DSPPO)
    write_run(runs / "dppo", [9000.0], curves={}, **DPPO)
    write_run(runs / "short", [9000.0, 9200.0], steps=20_480, curves={}, **DSPPO)
    write_run(runs / "sb3", [9000.0], script="sb3_baseline", algo="ppo")
    for game in PAPER.environment[PAPER.table == 11].unique()[:10]:
        args = {"alpha": 0.5, "beta": 10.0, "reward_flip_prob": 0.1}
        write_run(runs / game, [1.0], game, "sppo_atari", 5_000_192, curves={}, **args)
    text = make_report(runs)
    figures = {path.name: path.stat().st_size for path in (tmp_path / "report").glob("*.png")}
    names = ("continuous_ppo", "continuous_ppo_shorter", "atari_ppo")
    assert figures.keys() == {f"{what}_{name}.png" for what in ("curves", "sign_flips") for name in names}
    assert all(1_000 < size < 300_000 for size in figures.values())
    assert all(f"({name})" in text for name in figures)
    assert f"Without curves.csv, in no figure: {runs / 'sb3/seed1'}." in text


def test_curves_are_read_past_gaps_and_a_cut_line(tmp_path):
    write_run(tmp_path, [100.0], steps=5000, curves={}, **DSPPO)
    values = series(str(tmp_path / "seed1"), "charts/episodic_return")
    assert (len(values), values.index[0], values.index[-1], *values.iloc[[0, -1]]) == (50, 100, 5000, 2, 100)
    means = bin_means(values, np.array([120, 130, 5000]))
    assert means == pytest.approx([2.5, 51.3])  # of the line 0.02 x, at edges between its points
    assert not len(series(str(tmp_path / "seed1"), "no/such_tag")) and not len(series(str(tmp_path / "seed2"), "x"))


def test_short_runs_and_other_settings_are_never_mixed_in(tmp_path):
    runs = tmp_path / "runs"
    write_run(runs / "full", [9000.0, 9100.0], **DSPPO)
    write_run(runs / "short", [10.0, 20.0], first_seed=3, steps=51_200, **DSPPO)
    write_run(runs / "shorter", [30.0], CHEETAH, steps=51_200, **DSPPO)
    write_run(runs / "long", [1.0], first_seed=5, steps=2_000_000, **DSPPO)
    write_run(runs / "bins", [2.0], first_seed=6, curves={"losses/entropy": 0.5}, num_bins=7, **DSPPO)
    write_run(runs / "weight", [3.0], first_seed=7, alpha=3.0, beta=0.0)
    write_run(runs / "noise", [4.0], first_seed=8, reward_noise_std=0.1, **DSPPO)
    write_run(runs / "beta", [5.0], first_seed=9, reward_noise_std=0.05, **DSPPO)
    write_run(runs / "gamma", [6.0], "Swimmer-v4", "sa2c_continuous_discretized", 2_000_000, alpha=0.5, beta=0.2)
    text = make_report(runs)
    assert "2 at the paper's settings and length, 3 shorter, 1 longer, 5 at other settings" in text
    assert [row[:5] for row in rows(section(text, "Table 12"))] == [[PENDULUM, "DSPPO", "none", "9050 ± 50", "2"]]
    pendulum = [row[1:] for row in rows(section(text, "Shorter, longer, other")) if row[0] == PENDULUM]
    assert [[*row[:6], row[6]] for row in pendulum] == [
        ["DSPPO", "none", "", "2", "51,200 of 1,000,000", "15.0 ± 5.0", "9015 ± 101"],
        ["DSPPO", "none", "num_bins 7", "1", "1,000,000", "2.00", "-"],
        ["DSPPO", "none", "", "1", "2,000,000 of 1,000,000", "1.00", "9015 ± 101"],
        ["DPPO control", "none", "alpha 3", "1", "1,000,000", "3.00", "-"],
        ["DSPPO", "N(0, 0.05^2)", "beta 20", "1", "1,000,000", "5.00", "-"],
        ["DSPPO", "N(0, 0.1^2)", "not in the paper, beta 20", "1", "1,001,472", "4.00", "-"],
    ]
    assert pendulum[1][-3:] == ["1.90", "0.500", ""]  # the curve is a line to the score: its last tenth is 95 % of it
    others = [row[:7] for row in rows(section(text, "Shorter, longer, other")) if row[0] != PENDULUM]
    assert others == [
        [CHEETAH, "DSPPO", "none", "", "1", "51,200 of 2,000,000", "30.0"],
        ["Swimmer-v4", "DSA2C", "none", "gamma 0.99", "1", "2,000,000", "6.00"],  # the sweep has the authors' 0.9999
    ]
    assert "## Table 13" not in text and "## Table 9" not in text


def test_arms_of_one_setting_each_stand_beside_each_other(tmp_path):
    """The settings of PPO divided by 10.5 one by one, as the identity has them, with whatever seeds are there."""
    game = {"env_id": "CrazyClimberNoFrameskip-v4", "script": "sppo_atari", "steps": 500_736, "reward_flip_prob": 0.1}
    for name, scores, args in (
        ("ppo", [12.0, 20.0], DPPO),
        ("sppo", [40.0, 60.0], {"alpha": 0.5, "beta": 10.0}),
        ("entropy", [30.0, 40.0, 50.0], DPPO | {"ent_coef": 0.01 / 10.5}),
    ):
        write_run(tmp_path / name, scores, curves={"losses/value_loss": 0.5}, **game, **args)
    write_run(tmp_path / "alone", [1.0], **game | {"reward_flip_prob": 0.0}, **DPPO)  # without noise, so no arm
    arms = [(*row[3:5], *row[6:9], row[10]) for row in rows(findings.arms_text(Found([tmp_path])))]
    ppo, sppo = (printed(11, game["env_id"], name, "BSC(0.1)") for name in ("PPO", "SPPO"))
    assert arms == [
        ("", "2", "16.0 ± 4.0", ppo, "15.2 ± 3.8", "0.500 ± 0.000"),
        ("ent_coef 0.000952381", "3", "40.0 ± 5.8", "-", "38.0 ± 5.5", "0.500 ± 0.000"),
        ("", "2", "50.0 ± 10.0", sppo, "47.5 ± 9.5", "0.500 ± 0.000"),
    ]


def test_findings_of_hand_made_runs(tmp_path):
    training = {"losses/approx_kl": 0.02, "losses/clipfrac": 0.2, "losses/entropy": 1.0, "losses/value_loss": 1.0}
    for noise, flips in (({}, 0.2), ({"reward_noise_std": 0.05}, 0.1)):
        for name, args, norm in (("dppo", DPPO, 1.0), ("dsppo", DSPPO | {"beta": 25.0 if noise else 20.0}, 20.0)):
            curves = training | {"losses/grad_norm": norm, "losses/sign_flips": flips}
            write_run(tmp_path / f"{name}{flips}", [9000.0, 9100.0], curves=curves, **args, **noise)
    a2c = {"script": "sa2c_continuous_discretized", "steps": 2_000_000, "env_id": LANDER}
    for name, args in (("dsa2c", {"alpha": 0.5, "beta": 5.0, "Z": -1.0}), ("control", {"alpha": 0.5, "beta": 0.0})):
        write_run(tmp_path / name, [100.0, 120.0], curves={"losses/entropy": math.log(10)}, **a2c, **args)
    for path in (tmp_path / "dsppo0.2/seed2").glob("curves.csv"):  # a KL of 0.03 beside 0.02: 1.25 +- 0.25
        path.write_text(path.read_text().replace(",0.02,", ",0.03,"))
    found = Found([tmp_path])
    weight, noisy = rows(findings.weight_text(found))
    same = ["1.00 ± 0.00"] * 3 + ["20.00 ± 0.00", "1.00 ± 0.00"]
    assert weight == ["InvertedDoublePendulum", "none", "2, 2", "1.25 ± 0.25", *same] and noisy[3:] == [
        "1.00 ± 0.00",
        *same,
    ]
    p = scipy_stats.ttest_ind([0.02, 0.03], [0.02, 0.02], equal_var=False).pvalue  # of the KL; nothing else differs
    assert rows(findings.weight_tests_text(found))[0] == [
        "KL",
        f"{1.25**0.5:.2f}",
        f"{2 * scipy_stats.norm.sf(scipy_stats.norm.isf(p / 2) / 2**0.5):.2f}",
        "InvertedDoublePendulum, without noise, 1.25",
        f"{p:.2f}",
        "0 of 2",
    ]
    text = findings.flips_text(found)
    assert "sign flips in 1 of 1 environments; in 1 of them every seed with" in text
    flips = ["20.0 ± 0.0", "10.0 ± 0.0"] * 2
    assert rows(text)[0][:6] == ["InvertedDoublePendulum", "2", *flips]
    sample = findings.sample_weights(found).iloc[0]
    assert (sample.pi_first, sample.pi_last) == pytest.approx((0.1, 0.1))
    assert sample.factor_last == pytest.approx(1 + 5 * 0.1 / 0.5) and sample.difference == 0
    claims = findings.claims(found).set_index(["claim", "whose"])
    row, both = claims.loc["DSPPO minus DPPO", "the paper's"], pairs(found.cells, "DSPPO", "DPPO")
    assert list(row.z) == list(both.paper_z) and len(row.p) == 18
    ours = claims.loc["DSPPO minus DPPO", "ours minus the paper's"]  # 0 beside +87 and +184
    se = math.hypot(50, 50)
    t = [-87 / math.hypot(se, 101, 136), -184 / math.hypot(se, 61, 100)]
    assert list(ours.z) == pytest.approx(t, abs=0.05)  # almost normal numbers
    assert list(claims.loc["DSPPO minus DPPO", "ours, with noise minus without"].z) == [0]
    listed = {tuple(row[:2]): row[2:] for row in rows(findings.claims_text(found))}
    z = both.paper_z.sum() / 18**0.5
    assert listed["DSPPO minus DPPO", "the paper's"][:3:2] == ["18", f"{z:+.1f}"]
    table = {row[0]: row[1:] for row in rows(findings.algorithms_text(found))}
    gain = 100 * np.mean([87 / 8928, 184 / 8963])
    assert table["DSPPO"][0] == "2 of 18" and table["DSPPO"][2:4] == ["+0.0 %", f"{gain:+.1f} %"]


@pytest.fixture(scope="module")
def atari(tmp_path_factory):
    """Report of Atari runs of each kind: at the paper's length, longer, with noise, without normalization, Table 4."""
    runs = tmp_path_factory.mktemp("atari") / "runs"
    a2c = {"env_id": "BeamRiderNoFrameskip-v4", "script": "sa2c_atari", "alpha": 1.0, "beta": 0.0}
    write_run(runs / "5e6", [1100.0], steps=5_000_000, **a2c)
    write_run(runs / "1e7", [2900.0], steps=10_000_000, **a2c)
    write_run(runs / "noise", [2000.0], steps=5_000_000, reward_flip_prob=0.1, **a2c)
    for name, args, score in (("ppo", DPPO, 100.0), ("1", {"beta": 1.0}, 110.0), ("5", {"beta": 5.0}, 1300.0)):
        write_run(runs / name, [score], ALIEN, "sppo_atari", 5_000_192, **{"alpha": 0.5} | args)
    write_run(runs / "8e6", [1000.0], ALIEN, "sppo_atari", 8_000_000, **DPPO)
    for game, factor, seeds in ((ALIEN, 1.1, 2), ("QbertNoFrameskip-v4", 1.5, 1)):
        scores = [float(printed(11, game, "SPPO").split()[0]) / factor] * seeds
        write_run(runs / game, scores, game, "sppo_atari", 5_000_192, norm_adv=False, **DPPO)
    return make_report(runs)


def test_public_scores_stand_beside_atari_runs_without_noise(atari):
    a2c = "4139 (SLM Lab, 10,000,000 steps, n 4); 2890 (RL Zoo, 10,000,000 steps, n 1)"
    ppo = "1755 (CleanRL, 10,000,000 steps, n 3); 1706 (openai/baselines, steps not stated, n 3); "
    ppo += "1413 (SLM Lab, 10,000,000 steps, n 4)"
    cells = [(row[2], row[3], row[-1]) for row in rows(section(atari, "Table 8"))]
    assert cells == [("none", "1100", a2c), ("BSC(0.1)", "2000", "-")]
    longer = [(row[0], row[5], row[7], row[-1]) for row in rows(section(atari, "Shorter, longer")) if row[3] == ""]
    assert longer == [
        ("Alien", "8,000,000 of 5,000,000", printed(11, ALIEN, "PPO"), ppo),
        ("BeamRider", "10,000,000 of 5,000,000", printed(8, "BeamRiderNoFrameskip-v4", "A2C"), a2c),
    ]
    public, games = read_public(), set(PAPER.environment[PAPER.table == 11])
    assert public.groupby(["source", "algorithm"]).ngroups == 6
    for (source, _), some in public.groupby(["source", "algorithm"]):
        own = set(some.environment)
        assert own == games if source != "RL Zoo" else len(some) == 4 and own < games
        assert some.url.str.startswith("https://github.com/").all() and some.seeds.min() >= 1 and some.score.min() > 0


def test_gain_of_the_paper_over_each_baseline(atari):
    gains = {tuple(row[:2]): row[2:] for row in rows(section(atari, "The paper's gain"))}
    papers = gains["SPPO over PPO", "the paper's cells"]
    assert papers == ["5,000,000", "5", "16 of 22", "+13.4 % [+0.9, +26.0]", "+9.6 %"]
    ours = gains["SPPO over PPO", f"ours, {UNNORMALIZED}"]
    assert ours == ["5,000,000", "1 to 2", "2 of 2", "+30.0 %", "+30.0 %"]
    assert gains["SPPO over PPO", "openai/baselines"][:3] == ["not stated", "3", "1 of 22"]
    assert gains["SA2C over A2C", "RL Zoo"][:3] == ["10,000,000", "1", "0 of 4"]
    # PPO without normalization stands beside PPO's cell too
    cell, table = printed(11, ALIEN, "PPO"), tables(section(atari, "Table 11"))[0]
    first = [(*row[:2], row[6]) for row in table[:3]]
    assert first == [
        ("Alien", "PPO", cell),
        ("Alien", "SPPO", printed(11, ALIEN, "SPPO")),
        ("Alien", UNNORMALIZED, cell),
    ]


def test_table_4_and_its_rule(atari):
    table = section(atari, "Table 4")
    assert rows(table)[:3] == [
        ["0.5", "none", "not run", "0 of 22", "7.83 %"],
        ["1", "none", "+10.0 %", "1 of 22", "10.15 %"],
        ["5", "none", "+1200.0 % (nothing left without the 1 above 1000 %)", "1 of 22", "24.98 %"],
    ]
    assert "+13.4 % [+0.9, +26.0] for beta 1 (noise: none) where Table 4 prints 10.15 %" in table
    assert "] without the 2 above 1000 %) for beta 10 (noise: BSC(0.1))" in table


def test_what_cannot_be_counted_is_listed(tmp_path):
    runs = tmp_path / "runs"
    write_run(runs / "a", [9000.0, 9100.0], **DSPPO)
    write_run(runs / "copy", [9000.0], **DSPPO)
    write_run(runs / "nan", [math.nan], **DSPPO)
    write_language_run(runs / "language", [math.nan])
    for name, content in (("cut", '{"script": "sp'), ("list", "[]"), ("empty", "{}")):
        (runs / name).mkdir()
        (runs / name / "result.json").write_text(content)
    for seed in (1, 2):
        (runs / f"unfinished/seed{seed}").mkdir(parents=True)
        (runs / f"unfinished/seed{seed}/args.json").write_text("{}")
        (runs / f"unfinished/seed{seed}/curves.csv").write_text("global_step,charts/episodic_return\n2048,5\n4096,\n")
    (runs / "several/seed5").mkdir(parents=True)  # seed 4 finished, 5 did not; args.json is that of both
    (runs / "several/seed5/curves.csv").write_text("global_step,charts/episodic_return\n2048,5\n")
    write_run(runs / "several", [9200.0], first_seed=4, **DSPPO)
    for name in ("several", "updates", "begun"):
        (runs / name).mkdir(exist_ok=True)
        (runs / name / "args.json").write_text("{}")
    (runs / "updates/curves.csv").write_text("update,objective/kl\n7,0.5\n")
    text = make_report(runs)
    assert "3 runs in" in text and "11 left out" in text
    left_out = section(text, "Left out")
    for line in (
        f"- `{runs}/several`, seed5: not finished, 2,048 steps so far",
        f"- `{runs}`, begun: not finished, 0 steps so far",
        f"- `{runs}/unfinished`, seed1, seed2: not finished, 4,096 steps so far",
        f"- `{runs}/copy`, seed1: seed 1 again, as in {runs / 'a/seed1'}",
        "nan`, seed1: result.json: eval_mean is nan",
        "language`, seed1: result.json: eval_score is nan",
        "empty: result.json: lacks 'script'",
        "updates: not finished, 7 updates so far",
    ):
        assert line in left_out
    assert rows(section(text, "Table 12"))[0][3:5] == ["9100 ± 58", "3"]


@pytest.mark.parametrize(
    ("script", "env_id", "args", "algorithm", "other"),
    [
        ("sppo_atari", ALIEN, {"alpha": 0.5, "beta": 10.0, "reward_flip_prob": 0.1}, "SPPO", ""),
        ("sppo_atari", ALIEN, {"alpha": 1.0, "beta": 0.0, "Z": -7.0}, "PPO", ""),
        ("sa2c_atari", ALIEN, {"alpha": 0.5, "beta": 1.0, "reward_flip_prob": 0.1}, "SA2C", ""),
        ("sa2c_atari", "KrullNoFrameskip-v4", {"alpha": 0.5, "beta": 5.0, "reward_flip_prob": 0.1}, "SA2C", ""),
        ("sa2c_continuous_discretized", "Ant-v4", {"alpha": 0.5, "beta": 0.2, "reward_noise_std": 0.05}, "DSA2C", ""),
        ("sa2c_continuous_discretized", LANDER, {"alpha": 0.5, "beta": 5.0}, "DSA2C", ""),
        (PPO_SCRIPT, "Swimmer-v4", {"alpha": 0.5, "beta": 50.0, "reward_noise_std": 0.05}, "DSPPO", ""),
        ("sb3_baseline", "Walker2d-v4", {"algo": "ppo", "reward_noise_std": 0.05}, "PPO", ""),
        ("sb3_baseline", "Swimmer-v4", {"algo": "a2c", "gamma": 0.9999}, "A2C", ""),
        ("sb3_baseline", "Walker2d-v4", {"algo": "a2c", "num_bins": None}, "A2C", ""),
        ("sb3_baseline", LANDER, {"algo": "ppo", "num_bins": 11, "policy_coef": 1.0}, "PPO", "num_bins 11"),
        ("sb3_baseline", LANDER, {"algo": "a2c", "num_bins": 11}, "A2C", "num_bins 11"),
    ],
)
def test_runs_find_their_cell(script, env_id, args, algorithm, other):
    result = {"script": script, "env_id": env_id, "args": args, "total_timesteps": 10**6}
    row = describe(result | {"total_timesteps": describe(result)["paper_steps"]})
    assert (row["algorithm"], row["kind"], row["other_settings"]) == (algorithm, "other" if other else "paper", other)


@pytest.mark.parametrize("script", SCRIPTS)
def test_default_arguments_are_the_papers(script):
    language = "rlhf" in script
    args = Script(script, ROOT).defaults | ({"target_coef": 0.1} if language else {})
    env_id = "AlienNoFrameskip-v4" if script.endswith("atari") else LANDER
    result = {"script": script, "env_id": env_id, "args": args} | dict.fromkeys(("total_timesteps", "num_updates"), 9)
    full = describe(result)["paper_steps"]
    result |= dict.fromkeys(("total_timesteps", "num_updates"), full)
    assert describe(result)["kind"] == "paper"
    changes = {"gamma 0.9": {"gamma": 0.9}, "Z -2": {"Z": -2.0}}
    if language:
        changes |= {"kl_coef 0": {"kl_coef": 0.0}, "target_coef 0": {"target_coef": 0.0}}
        changes |= {"norm_adv False": {"norm_adv": False}}
    for text, change in changes.items():
        row = describe(result | {"args": args | change})
        assert (row["kind"], row["other_settings"]) == ("other", text)
    for steps, kind in ((full // 2, "shorter"), (2 * full, "longer")):
        assert describe(result | dict.fromkeys(("total_timesteps", "num_updates"), steps))["kind"] == kind


def flags_of(script):
    """A script's arguments, all at their defaults, but for the environment."""
    return {name: x for name, x in Script(script, ROOT).defaults.items() if name != "env_id"}


def test_a_changed_copy_stands_beside_the_original_under_its_own_name(tmp_path):
    runs, defaults = tmp_path / "runs", flags_of(PPO_SCRIPT)
    write_run(runs / "dppo", [8700.0, 8900.0], **defaults | DPPO)
    write_run(runs / "dsppo", [9000.0, 9200.0], **defaults | DSPPO)
    for name, own in (("default", {}), ("beta", {"beta": 5.0}), ("flag", {"tau": 0.1})):
        write_run(runs / name, [9300.0, 9500.0], script="my_loss", **defaults | own)
    write_run(runs / "bins", [9600.0], script="my_loss", **defaults | {"num_bins": 7})
    write_run(runs / "short", [10.0], script="my_loss", steps=51_200, **defaults)
    write_run(runs / "a2c", [200.0], LANDER, "my_a2c", 2_000_000, **flags_of("sa2c_continuous_discretized"))
    text = make_report(runs)
    assert text.partition("\n## ")[2].startswith("Changed copies beside their originals\n")
    copies = section(text, "Changed copies")
    compared = {tuple(row[3:5]): row[5:] for row in rows(copies)}
    # DSPPO: 9400 - 9100 ± sqrt(100^2 + 100^2), t with 2 degrees of freedom: 4.303 x 141.4
    expected = ["9400 ± 100", "9100 ± 100", "2, 2", "+300.0 ± 141.4 [-308, 908]", "1.00 (no interval)", "0.17"]
    assert compared["my_loss", "DSPPO"] == compared["my_loss, tau 0.1", "DSPPO"] == expected
    assert compared["my_loss", "DPPO"][3].startswith("+600.0 ± 141.4")
    assert Counter(original for _, original in compared) == {"DPPO": 3, "DSPPO": 3}  # three copies beside both weights
    alone = f"- my_loss, {PENDULUM}, noise none, 51,200 steps: no run of {PPO_SCRIPT} there to compare it with."
    assert alone in copies and "- my_a2c, LunarLanderContinuous-v3, noise none, 2,000,000 steps: no run of" in copies
    mine = ["none", "9400 ± 100", "2", "1,000,000", "-", "-"]
    assert [row[1:] for row in tables(section(text, "Table 12"))[0][2:]] == [
        [name, *mine] for name in ("my_loss", "my_loss, beta 5", "my_loss, tau 0.1")
    ]
    assert [row[1:4] for row in rows(section(text, "Table 9"))] == [["my_a2c", "none", "200.0"]]
    others = [row[1:6] for row in rows(section(text, "Shorter, longer"))]
    short, bins = (
        ["my_loss", "none", "", "1", "51,200 of 1,000,000"],
        ["my_loss", "none", "num_bins 7", "1", "1,000,000"],
    )
    assert others == [short, bins]


def test_a_changed_copy_of_a_language_script(tmp_path):
    write_language_run(tmp_path / "ppo", [0.88, 0.90])
    write_language_run(tmp_path / "mine", [0.91, 0.93], alpha=0.5, beta=0.4)
    for path in (tmp_path / "mine").rglob("result.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"script": "my_rlhf"}))
    runs = Found([tmp_path]).runs
    assert [row[:5] for row in rows(copies_text(runs))] == [["IMDB", "none", "60", "my_rlhf", "PPO"]]
    table = rows(language_table(language_cells(runs), 3))
    assert ["IMDB", "my_rlhf", "score", "0.920 ± 0.010", "2", "-", "-"] in table
    assert [row[0] for row in rows(language_text(runs))[:2]] == ["PPO", "my_rlhf"]


def test_runs_behind_symbolic_links_are_found_once(tmp_path):
    write_run(tmp_path / "elsewhere" / "dppo", [8900.0, 9100.0], **DPPO)
    (tmp_path / "elsewhere" / "begun").mkdir()
    (tmp_path / "elsewhere" / "begun" / "args.json").write_text("{}")
    runs = tmp_path / "runs"
    runs.mkdir()
    for name, target in (("dppo", "dppo"), ("again", "dppo"), ("begun", "begun"), ("round", "../runs")):
        (runs / name).symlink_to(tmp_path / "elsewhere" / target)  # a link in a circle ends
    found = Found([runs])
    assert list(found.runs.score) == [8900, 9100] and [folder.name for folder, _ in found.left_out] == ["begun"]


def test_missing_cells_have_hours_and_lines_that_run_them(tmp_path, capsys):
    runs, document = tmp_path / "runs", tmp_path / "missing.md"
    write_run(runs / "dsppo", [9000.0, 9200.0], **DSPPO)
    for i, path in enumerate(runs.rglob("result.json")):  # two seeds side by side: 200 steps per second
        timing = {"sps": 100.0, "wall_seconds": 9000.0 + i / 1000}
        path.write_text(json.dumps(json.loads(path.read_text()) | timing))
    document.write_text("<!-- missing cells: begin -->\n<!-- missing cells: end -->\n")
    make_report(runs, "--document", document)
    assert "509 of the 510 cells" in document.read_text()
    listed = {tuple(row[:3]): row[3:] for row in rows(document.read_text())}
    # 30 seeds of the 8 other environments, 20 million steps, at 200 per second; no run tells how fast PPO is
    lines = [parse(line) for line in sweep_cells("continuous_ppo")]
    steps = sum(line["steps"] for line in lines if (line["algorithm"], line["noise"]) == ("DSPPO", "none"))
    eight = f"{30 * (steps - 1_000_000) / 200 / 3600:,.0f}"
    where = listed["12, 13", "DSPPO", "none"]
    assert (where[0], where[-1]) == ("8 of 9", eight) and PENDULUM not in where[1]
    assert listed["12, 13", "PPO", "none"] == ["9 of 9", "all 9", "30", "-"]
    assert listed["4", "SPPO beta 25", "BSC(0.1)"][:3] == ["22 of 22", "all 22", "5"]
    capsys.readouterr()
    assert report.main([str(runs), "--missing"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 509
    planned = {line for sweep in SWEEPS for line in map(" ".join, map(str.split, sweep_cells(sweep)))}
    (run,) = (line for line in planned - set(lines) if PENDULUM in line)
    assert set(lines) < planned and parse(run)["algorithm"] == "DSPPO" and parse(run)["noise"] == "none"


def test_a_missing_package_is_named_with_its_requirements_file(tmp_path):
    (tmp_path / "tabulate.py").write_text("raise ModuleNotFoundError(name='tabulate')")
    command = [sys.executable, str(ROOT / "benchmark/report.py"), str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    error = "error: there is no tabulate: pip install -r requirements-benchmark.txt\n"
    assert (done.returncode, done.stderr) == (2, error)


def test_tables_of_the_language_tasks(tmp_path):
    runs = tmp_path / "runs"
    write_language_run(runs / "imdb-ppo", [0.88, 0.90], curves=True)
    write_language_run(runs / "imdb-unnormalized", [0.7, 0.8], norm_adv=False)
    write_language_run(runs / "imdb-sppo", [0.92, 0.94], alpha=0.5, beta=0.4)
    tldr = {"script": "sppo_rlhf_tldr", "curves": True}
    write_language_run(runs / "tldr-ppo", [5.9, 6.0], **tldr)
    write_language_run(runs / "tldr-sppo", [6.1, 6.2], alpha=0.5, beta=0.2, judge=[0.5, 0.54], **tldr)
    text = make_report(runs)
    assert "10 runs in" in text and "10 at the paper's settings and length, 0 shorter, 0 longer, 0 at other" in text
    # 0.89 and 0.93, SE 0.01; PPO of TL;DR after 10 updates: 1 and 2; the initial policies: 0.5 and 33.
    assert rows(section(text, "Table 3")) == [
        ["IMDB", "initial policy", "score", "0.500 ± 0.000", "2", "0.54 ± 0.00", "-"],
        ["IMDB", "initial policy", "perplexity", "33.0 ± 0.0", "2", "33.02 ± 0.09", "-0.22, within"],
        ["IMDB", "PPO", "score", "0.890 ± 0.010", "2", "0.89 ± 0.02", "+0.00, within"],
        ["IMDB", "PPO", "perplexity", "40.0 ± 1.0", "2", "41.09 ± 0.43", "-1.00, exceeds"],
        ["IMDB", "SPPO", "score", "0.930 ± 0.010", "2", "0.92 ± 0.01", "+0.71, within"],
        ["IMDB", "SPPO", "perplexity", "40.0 ± 1.0", "2", "40.60 ± 0.44", "-0.55, within"],
        ["TL;DR", "initial policy", "score", "0.500 ± 0.000", "2", "-", "-"],
        ["TL;DR", "initial policy", "perplexity", "33.0 ± 0.0", "2", "-", "-"],
        ["TL;DR", "PPO after 10 updates", "score", "1.50 ± 0.50", "2", "5.83 ± 0.02", "-8.65, exceeds"],
        ["TL;DR", "PPO after 10 updates", "perplexity", "30.0 ± 0.0", "2", "18.35 ± 0.02", "+582.50, exceeds"],
        ["TL;DR", "PPO", "score", "5.95 ± 0.05", "2", "5.94 ± 0.08", "+0.11, within"],
        ["TL;DR", "PPO", "perplexity", "40.0 ± 1.0", "2", "19.08 ± 0.17", "+20.62, exceeds"],
        ["TL;DR", "SPPO", "score", "6.15 ± 0.05", "2", "6.13 ± 0.02", "+0.37, within"],
        ["TL;DR", "SPPO", "perplexity", "40.0 ± 1.0", "2", "19.27 ± 0.21", "+20.29, exceeds"],
        ["TL;DR", "SPPO", "win rate (%)", "52.0 ± 2.0", "2", "52.50 ± 2.40", "-0.16, within"],
    ]
    assert rows(section(text, "Table 14")) == [
        ["IMDB", "PPO (without A normalization)", "score", "0.750 ± 0.050", "2", "0.77 ± 0.01", "-0.39, within"],
        ["IMDB", "PPO (with A normalization)", "score", "0.890 ± 0.010", "2", "0.89 ± 0.02", "+0.00, within"],
        ["TL;DR", "PPO (with A normalization)", "score", "5.95 ± 0.05", "2", "5.94 ± 0.08", "+0.11, within"],
    ]
    coverage = {row[0]: row[3:] for row in rows(section(text, "Cells that were run"))}
    assert (coverage["3"], coverage["14"]) == (["13 of 15", "5"], ["3 of 4", "0"])
    imdb, tldr, _ = section(text, "Language runs").split("\n### ")[1:]
    assert imdb.startswith("IMDB: policy `rajkumarrrk/gpt2-fine-tuned-on-imdb-positive-reviews`, data set `stanford")
    # KL of update i: i times the seed; of the last tenth, 57.5 and 115 of 60 updates, 95.5 and 191 of 100.
    assert rows(imdb)[1][4:] == ["0.500 ± 0.000 → 0.890 ± 0.010", "33.0 ± 0.0 → 40.0 ± 1.0", "86.2 ± 28.8"]
    assert rows(imdb)[2][-1] == "-" and rows(tldr)[0][6] == "143.2 ± 47.8"
    assert rows(tldr)[0][7:] == ["30.0 ± 0.0 → 45.0 ± 5.0", "10.0 ± 0.0 → 10.0 ± 0.0", "20.0 ± 0.0 → 20.0 ± 0.0"]
    # without normalization: 0.75 beside 0.89, 0.89, 0.93, 0.93
    row = rows(section(text, "Finding: normalization"))[0]
    assert row[:4] == ["IMDB", "60", "score", "2, 4"] and row[4].startswith("-0.160 ± 0.052 [")
    figures = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert figures == {"curves_rlhf_imdb.png", "curves_rlhf_tldr.png"}


def test_local_models_and_other_judges_are_never_beside_the_papers(tmp_path):
    runs = tmp_path / "runs"
    local = {"policy": "assets/gpt2-reviews", "dataset": "assets/reviews", "reward_model": "assets/sentiment"}
    write_language_run(runs / "ppo", [0.6, 0.8], curves=True, **local)
    write_language_run(runs / "sppo", [0.7, 0.9], updates=20, alpha=0.5, beta=0.4, curves=True, **local)
    write_language_run(runs / "text", [0.5], target_coef=0.0, eval_samples=20)  # the paper's text, not its numbers
    write_language_run(runs / "short", [0.6], updates=3)
    write_language_run(runs / "micro", [0.6], norm_adv=False, micro_batch_size=2, rollout_batch_size=3)
    write_language_run(runs / "judged", [0.9], alpha=0.5, beta=0.4, judge=[0.6])
    for name, against in (("judge.json", "reference"), ("judge-ppo-seed1.json", str(runs / "ppo" / "seed1"))):
        verdict = {"win_rate": 0.55, "judge_model": "another", "samples": 10, "against": against}
        (runs / "judged" / "seed1" / name).write_text(json.dumps(verdict))
    text = make_report(runs)
    assert "8 runs in" in text and "2 at the paper's settings and length, 1 shorter, 0 longer, 5 at other" in text
    assert {tuple(row[:3]) for row in rows(section(text, "Table 3"))} == {
        ("IMDB", algorithm, metric) for algorithm in ("initial policy", "SPPO") for metric in ("score", "perplexity")
    }
    assert [row[1] for row in rows(section(text, "Table 14"))] == ["PPO (without A normalization)"]
    reviews, paper, won = section(text, "Language runs").split("\n### ")[1:]
    assert reviews.startswith("IMDB: policy `assets/gpt2-reviews`, data set `assets/reviews`, reward model `assets/s")
    assert rows(reviews)[:2] == [
        ["PPO", "", "60", "2", "0.500 ± 0.000 → 0.700 ± 0.100", "33.0 ± 0.0 → 40.0 ± 1.0", "86.2 ± 28.8"],
        ["SPPO", "", "20 of 60", "2", "0.500 ± 0.000 → 0.800 ± 0.100", "33.0 ± 0.0 → 40.0 ± 1.0", "29.2 ± 9.7"],
    ]
    others = ["0.600 ± 0.000", "0.500 ± 0.000", "0.200 ± 0.000 → 0.350 ± 0.050", "25.0 ± 0.0 → 25.0 ± 0.0"]
    assert rows(reviews)[-2] == ["PPO", "", "60", "2", *others, "12.5 ± 0.0 → 12.5 ± 0.0"]
    assert ["PPO", "target_coef 0, eval_samples 20", "60", "1"] in [row[:4] for row in rows(paper)]
    judged = [row[2:] for row in rows(won)]
    assert judged == [["SPPO", "", "60", against, "another", "10", "55.0", "1"] for against in ("ppo", "reference")]
    assert {path.name for path in (tmp_path / "report").glob("*.png")} == {"curves_rlhf_imdb_other.png"}


def test_the_kept_report_is_what_the_kept_results_make_and_is_quoted_right(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    documents = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("findings", "results", "missing"))]
    copies = [str(shutil.copy(document, tmp_path)) for document in documents]
    assert report.main(["benchmark/results", "--out", str(tmp_path), "--document", *copies]) == 0
    kept = ROOT / "benchmark" / "results"
    assert (tmp_path / "report.md").read_text("utf-8") == (kept / "report.md").read_text("utf-8")
    assert {path.name for path in tmp_path.glob("*.png")} == {path.name for path in kept.glob("*.png")}
    assert [Path(copy).read_text() for copy in copies] == [document.read_text() for document in documents]


def test_folders_without_results_and_out_that_names_a_file(tmp_path, capsys):
    for name, content in (("run/args.json", "{}"), ("bad/result.json", "{")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
    write_run(tmp_path / "runs", [9000.0], **DSPPO)
    (tmp_path / "file").write_text("mine")
    for folder, out, message in (
        ("run", "report", "no result.json, 1 unfinished runs"),
        ("nowhere", "report", "no result.json, no such folder"),
        ("bad", "report", "no usable result.json among 1"),
        ("runs", "file", f"error: --out {tmp_path}/file is no folder"),
        ("runs", "file/below", f"error: --out {tmp_path}/file/below is no folder"),
    ):
        assert report.main([str(tmp_path / folder), "--out", str(tmp_path / out)]) == 2
        output, error = capsys.readouterr()
        assert not output and message in error and error.count("\n") == 1
    assert not (tmp_path / "report").exists() and (tmp_path / "file").read_text() == "mine"


@pytest.mark.usefixtures("drawing")
def test_our_runs_beside_those_of_stable_baselines3(tmp_path):
    """The curves rise on a line to the score: the mean of their last tenth is 95 % of it."""
    theirs = {"script": "sb3_baseline", "steps": 200_704, "num_bins": 11, "curves": {}}
    write_run(tmp_path / "ppo", [1000.0, 1100.0, 1200.0], algo="ppo", **theirs)
    write_run(tmp_path / "a2c", [500.0], LANDER, algo="a2c", **theirs)  # ours has not ended
    write_run(tmp_path / "gaussian", [9000.0], script="sb3_baseline", steps=200_704, curves={}, algo="ppo")
    assert "Beside Stable-Baselines3" not in make_report(tmp_path)
    write_run(tmp_path / "dppo", [1200.0, 1300.0, 1400.0], steps=200_704, curves={}, **DPPO)
    write_run(tmp_path / "dsppo", [9000.0], steps=200_704, curves={}, **DSPPO)
    write_run(tmp_path / "noise", [9000.0], steps=200_704, curves={}, reward_noise_std=0.05, **DPPO)
    text = section(make_report(tmp_path), "Beside Stable-Baselines3")
    # SE of both: 0.95 * 100 / sqrt(3) = 54.8; 190 / sqrt(2) / 54.8 = 2.45, with 4 degrees of freedom
    assert rows(text) == [[PENDULUM, "PPO", "none", "200,704", "1045 ± 55", "1235 ± 55", "3, 3", "+2.45", "0.070"]]


@pytest.mark.usefixtures("drawing")
def test_the_report_has_stable_baselines3_beside_ours_at_the_same_step(tmp_path):
    """DSPPO is Stable-Baselines3's PPO with its policy loss times 20.5; both curves rise at the same speed."""
    theirs = {"script": "sb3_baseline", "num_bins": 11, "algo": "ppo", "curves": {}}
    write_run(tmp_path / "runs" / "sb3", [498.0, 520.0], steps=500_736, policy_coef=20.5, **theirs)
    write_run(tmp_path / "runs" / "other", [900.0, 920.0], steps=500_736, policy_coef=3.0, **theirs)
    write_run(tmp_path / "runs" / "dsppo", [1000.0, 1080.0], curves={}, **DSPPO)
    text = section(make_report(tmp_path / "runs"), "Beside Stable-Baselines3")
    expected = ["500,736", "483.6 ± 10.5", "494.0 ± 19.0", "2, 2", "+0.48", "0.69"]
    assert rows(text) == [[PENDULUM, "PPO, policy loss times 20.5", "none", *expected]]
    assert (tmp_path / "report" / "beside_sb3.png").stat().st_size > 1_000
