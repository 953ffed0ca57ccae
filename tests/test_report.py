"""benchmark/report.py and its parts: the paper's numbers, hand-computed figures, and what must not be mixed."""

import csv
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import report
from conftest import ROOT, import_scripts
from peers import same_as_sb3
from sweeps import SWEEPS
from sweeps import cells as sweep_cells
from tables_and_plots import scores
from tables_and_plots.cells import (
    PAPER_NUMBERS,
    PARTS,
    TABLES,
    UNNORMALIZED,
    Cell,
    identify,
    parse,
    read_paper,
    read_public,
)
from tables_and_plots.figures import bin_means
from tables_and_plots.runs import JUDGE, read_curve

PENDULUM, CHEETAH, LANDER = "InvertedDoublePendulum-v4", "HalfCheetah-v4", "LunarLanderContinuous-v3"
PPO_SCRIPT = "sppo_continuous_discretized"
DPPO, DSPPO = {"alpha": 1.0, "beta": 0.0}, {"alpha": 0.5, "beta": 20.0}
PAPER = read_paper()


def write_run(folder, scores, env_id=PENDULUM, script=PPO_SCRIPT, steps=1_001_472, first_seed=1, curves=False, **args):
    """A finished run in folder/seed<k> for each of the scores."""
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
        if curves:
            lines = ["global_step,charts/episodic_return,losses/sign_flips", f"{steps},{score},0.2", "99999"]
            lines[1:1] = [f"{i * steps // 50},{score * i / 50},0.1" for i in range(1, 50)] + [f"{steps},,"]
            (run_dir / "curves.csv").write_text("\n".join(lines))


def write_language_run(folder, scores, script="sppo_rlhf_imdb", updates=None, curves=False, judge=None, **args):
    """A finished language run in folder/seed<k> for each of the scores, the paper's PPO unless args say otherwise."""
    updates = updates or {"sppo_rlhf_imdb": 60, "sppo_rlhf_tldr": 100}[script]
    args = asdict(importlib.import_module(script).Args()) | {"alpha": 1.0, "beta": 0.0, "target_coef": 0.1} | args
    for seed, score in enumerate(scores, 1):
        run_dir = folder / f"seed{seed}"
        run_dir.mkdir(parents=True)
        perplexity = 37.0 + 2 * seed
        metrics = {"score": score, "perplexity": perplexity, "score_reference": 0.6, "score_empty": 0.5}
        metrics |= {"score_truncated": score / 2, "empty_wins": 0.25, "truncated_wins": 0.125}
        if script == "sppo_rlhf_tldr":
            metrics |= {"rouge1": 0.3 + 0.1 * seed, "rouge2": 0.1, "rougeL": 0.2}
        before = metrics | {"score": 0.5, "perplexity": 33.0, "rouge1": 0.3, "score_truncated": 0.2}
        result = {"script": script, "policy": args["policy"], "dataset": args["dataset"], "seed": seed}
        result |= {"args": json.loads(json.dumps(args)), "num_updates": updates, "eval_scores": [score] * 3}
        result |= {f"eval_{name}": value for name, value in metrics.items()}
        result |= {"before": {f"eval_{name}": value for name, value in before.items()}}
        result |= {"commit": "c" * 40, "versions": {"torch": "2.13.0"}}
        (run_dir / "result.json").write_text(json.dumps(result))
        if curves:
            lines = ["update,objective/scores,objective/kl,eval/score,eval/perplexity", "0,,,0.5,33.0"]
            updates_done = range(1, updates + 1)
            lines += [f"{i},{score * i / updates},{i * seed},{f'{seed},30' if i == 10 else ','}" for i in updates_done]
            (run_dir / "curves.csv").write_text("\n".join([*lines, f"{updates},,,{score},{perplexity}\n"]))
        if judge:
            verdict = {"win_rate": judge[seed - 1], "win_rate_se": 0.05, "judge_model": JUDGE[0], "samples": 100}
            (run_dir / "judge.json").write_text(json.dumps(verdict | {"against": "reference", "unparsed": 0}))


def make_report(folder):
    out = folder.parent / "report"
    assert report.main([str(folder), "--out", str(out)]) == 0
    return (out / "report.md").read_text(encoding="utf-8")


def section(text, title):
    """Text of the section whose title starts so."""
    return next(part for part in text.split("\n## ") if part.startswith(title))


def rows(text):
    """Cells of the tables in a section, header and rule left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def tables(text):
    """The rows of each table in a section."""
    return [rows(block) for block in text.split("\n\n") if block.startswith("|")]


def test_paper_numbers_have_every_cell():
    with PAPER_NUMBERS.open(newline="") as file:
        cells = list(csv.DictReader(file))
    expected = {1: 32, 2: 24, 3: 15, 4: 10, 8: 88, 9: 27, 10: 27, 11: 88, 12: 27, 13: 27, 14: 4}
    assert Counter(int(cell["table"]) for cell in cells) == expected
    keys = [tuple(cell[k] for k in ("table", "environment", "algorithm", "noise", "metric")) for cell in cells]
    assert len(set(keys)) == len(keys)
    for cell in cells:
        float(cell["mean"])
        assert (cell["standard_error"] == "") == (cell["table"] == "4")
    for part, whole in PARTS.items():
        assert PAPER[part].items() <= PAPER[whole].items()


@pytest.mark.parametrize(
    ("table", "noise", "wins"), [(11, "none", 16), (11, "BSC(0.1)", 19), (8, "none", 13), (8, "BSC(0.1)", 15)]
)
def test_wins_of_the_paper_recomputed_from_its_cells(table, noise, wins):
    games = {game for game, *_ in PAPER[table]}
    baseline, symmetric = ("PPO", "SPPO") if table == 11 else ("A2C", "SA2C")
    pairs = [(PAPER[table][game, baseline, noise].mean, PAPER[table][game, symmetric, noise].mean) for game in games]
    assert (scores.count_wins(pairs), len(pairs)) == (wins, 22)


def test_hand_computed_statistics():
    values = np.array([90.0, 100.0, 110.0])  # variance 100
    assert scores.standard_error(values) == pytest.approx(10 / math.sqrt(3))
    assert math.isnan(scores.standard_error(values[:1]))
    assert scores.joint_difference(100, 3, Cell("110", "4")) == pytest.approx(-10 / 5)
    assert math.isnan(scores.joint_difference(100, math.nan, Cell("110", "4")))
    assert scores.format_difference(-2.0) == "-2.00, exceeds"
    assert scores.format_difference(1.0) == "+1.00, within"

    pairs = [(100.0, 150.0), (200.0, 100.0), (-4.0, 2.0), (10.0, 10.0), (1.0, 21.0)]
    assert scores.count_wins(pairs) == 3  # a tie is no win
    assert scores.improvements(pairs) == pytest.approx([50, -50, 150, 0, 2000])
    assert scores.format_improvement(pairs) == "+430.0 % (+37.5 % without the 1 above 1000 %)"

    first, second = np.array([0.0, 1.0, 2.0, 100.0]), np.array([3.0, 4.0, 5.0, -50.0])
    assert scores.interquartile_mean(first, second) == 2.5  # of 1, 2, 3, 4


def test_bootstrap_resamples_within_each_environment():
    low, high = scores.bootstrap_interval([np.zeros(4), np.ones(4)])
    assert low == high == 0.5  # resampling all eight together would spread
    assert scores.bootstrap_interval([np.zeros(4), np.ones(1)]) is None
    samples = [np.arange(10.0), np.arange(5.0)]
    low, high = scores.bootstrap_interval(samples)
    assert low < scores.interquartile_mean(*samples) < high
    assert (low, high) == scores.bootstrap_interval(samples)


def test_probability_of_improvement():
    first, second = np.array([1.0, 2.0, 3.0]), np.array([2.0, 0.0])
    # 1 > 0; 2 = 2 and 2 > 0; 3 > 2 and 3 > 0: 4.5 of 6
    assert scores.probability_of_improvement(first, second) == pytest.approx(0.75)
    # and in a second environment never: the mean of both
    assert scores.probability_of_improvement(first, -first, second, first) == pytest.approx(0.375)
    low, high = scores.bootstrap_interval([first, second], scores.probability_of_improvement)
    assert 0 <= low < 0.75 < high <= 1


def test_a_pair_is_compared_where_both_were_run(tmp_path):
    write_run(tmp_path / "runs" / "a", [9000.0, 9200.0], **DSPPO)
    write_run(tmp_path / "runs" / "b", [8700.0, 8900.0], **DPPO)
    write_run(tmp_path / "runs" / "c", [200.0, 300.0], LANDER, steps=2_000_896, **DSPPO)
    write_run(tmp_path / "runs" / "d", [300.0, 310.0], LANDER, steps=2_000_896, **DPPO)
    before = section(make_report(tmp_path / "runs"), "Table 12")
    write_run(tmp_path / "runs" / "gaussian", [8000.0, 8100.0], script="sb3_baseline", algo="ppo")
    table = section(make_report(tmp_path / "runs"), "Table 12")
    pairs = [line for line in table.splitlines() if "probability of improvement" in line]
    assert [line.partition(":")[0] for line in pairs] == [
        "- DSPPO and PPO, 1 environment",
        "- DSPPO and DPPO, 2 environments",
    ]
    assert pairs[1] in before


def test_a_table_beside_the_papers(tmp_path):
    runs = tmp_path / "runs"
    write_run(runs / "dsppo" / "seeds1-2", [9000.0, 9200.0], **DSPPO)
    write_run(runs / "dsppo" / "seeds3-4", [9100.0, 9300.0], first_seed=3, **DSPPO)
    write_run(runs / "dppo", [8700.0, 8900.0], **DPPO)
    write_run(runs / "lander-dsppo", [200.0, 300.0], LANDER, steps=2_000_896, **DSPPO)
    write_run(runs / "lander-dppo", [300.0, 300.0], LANDER, steps=2_000_896, **DPPO)
    text = make_report(runs)
    table = section(text, "Table 12")
    # SE of DSPPO: sqrt(50,000 / 3 / 4) = 64.5; (9150 - 9015) / sqrt(64.5^2 + 101^2) = 1.13. DPPO: -128 / 169.1.
    cells, comparison = tables(table)
    assert cells == [
        [LANDER, "DPPO", "300.0 ± 0.0", "2", "2,000,000", "241 ± 7.7", "+7.66, exceeds"],
        [LANDER, "DSPPO", "250.0 ± 50.0", "2", "2,000,000", "250 ± 6.9", "+0.00, within"],
        [PENDULUM, "DPPO", "8800 ± 100", "2", "1,000,000", "8928 ± 136", "-0.76, within"],
        [PENDULUM, "DSPPO", "9150 ± 65", "4", "1,000,000", "9015 ± 101", "+1.13, exceeds"],
    ]
    # DSPPO minus DPPO: -50 ± sqrt(50^2 + 0); 350 ± sqrt(64.5^2 + 100^2). The paper: 250 - 241 ± sqrt(6.9^2 + 7.7^2);
    # 9015 - 8928 ± sqrt(101^2 + 136^2). Pairs: 2 ties of 4, 8 of 8.
    # Splits: all of 200, 300, 300, 300 differ as much; of 15 that of 8700 and 8900 from the rest, twice for both sides.
    # No resampling of runs that are all above the others says how sure that is.
    assert comparison == [
        [LANDER, "2, 2", "-50.0 ± 50.0", "+9.0 ± 10.3", "0.25 [0.00, 0.50]", "1.00", "1.00"],
        [PENDULUM, "4, 2", "+350.0 ± 119.0", "+87.0 ± 169.4", "1.00 (no interval)", "0.13", "0.27"],
        ["all 2", "", "", "", "0.62 [0.50, 0.75]", "", ""],
    ]
    assert "by Holm: in view of all comparisons of DSPPO with DPPO in Tables 12 and 13, 2 so far." in table
    # DSPPO: (1.13 + 0.00) / 2 ± 1 / sqrt(2); 135 / 9015 = 1.5 % and 0
    together = rows(section(text, "All cells together"))
    assert ["DSPPO", "2", "2 to 4", "+0.56 ± 0.71", "+0.7 %"] in together
    sentence = section(text, "DSPPO, in sentences")
    assert "- Without noise DSPPO has the higher mean than DPPO in 1 of 2 environments (2 to 4 seeds);" in sentence
    assert (
        f"on {PENDULUM}, +350.0 ± 119.0 (4, 2 seeds; permutation test 0.13, by Holm over 2 comparisons 0.27)"
        in sentence
    )
    assert "higher mean than DPPO in 1 of 2 environments; in the paper's cells in 2 of these and in 8 of all 9" in table
    # 100 (9150 / 8800 - 1) = 3.98 and 100 (250 / 300 - 1) = -16.67
    assert "DSPPO over DPPO: -6.3 %; the paper's cells: +2.4 % in these environments, +5.4 % in all 9" in table
    # DPPO: of 0.9745, 0.9969 and 1.2448 twice the middle two; DSPPO: of 0.8299, 1.0081, 1.0193, 1.0305, 1.0417, 1.2448
    # the middle four, since a quarter of six is rounded down. DSPPO: 8 of 8 pairs, and 1 of 4: two ties.
    pair = section(table, "Table 12").partition("- DSPPO and DPPO, 2 environments: ")[2].partition("\n")[0]
    assert "DPPO cell 1.02 [" in pair and "] and 1.12 [" in pair and "probability of improvement 0.62 [" in pair
    assert "- Not run: PPO: everywhere." in table
    assert "- Not run: DSPPO: Ant-v4, BipedalWalker-v3, HalfCheetah-v4" in table
    overview = {tuple(row[:3]): row[3:] for row in rows(section(text, "Cells that were run"))}
    assert overview["12", "PPO, DPPO, DSPPO", "none"] == ["4 of 27", "0", "2"]
    assert overview["11", "PPO, SPPO", "BSC(0.1)"] == ["0 of 44", "0", "0"]


def test_what_the_readme_quotes_is_filled_in(tmp_path):
    """DSPPO is better in one environment, worse in the next and alike in the last: 0.5, without the worse 0.75."""
    runs, document = tmp_path / "runs", tmp_path / "README.md"
    both = ("dsppo", DSPPO), ("dppo", DPPO)
    for env_id, steps, pair in (
        (PENDULUM, 1_001_472, ([9100.0, 9200.0], [8900.0, 9000.0, 9050.0])),
        (LANDER, 2_000_896, ([240.0, 250.0], [260.0, 270.0])),
        (CHEETAH, 2_000_896, ([0.0, 0.0], [0.0, 0.0])),
    ):
        for (name, args), values in zip(both, pair):
            write_run(runs / f"{name}-{env_id}", values, env_id, steps=steps, **args)
    markers = ("verdict", "scores")
    document.write_text("".join(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in markers))
    assert report.main([str(runs), "--out", str(tmp_path / "report"), "--document", str(document)]) == 0
    text = document.read_text()
    words = " ".join(text.split())
    assert "6 of the paper's 108 continuous-control cells were run (2 to 3 seeds each). 3 of them are within" in words
    # HalfCheetah has no spread, so that the unit is the paper's: 3478 / 279; LunarLander's DPPO: 24 / sqrt(5^2 + 7.7^2)
    assert "; further are DPPO on HalfCheetah, DSPPO on HalfCheetah, DPPO on LunarLander. - DSPPO beside" in words
    assert "- DSPPO beside DPPO: the clearest difference is InvertedDoublePendulum-v4, +166.7 ± 66.7 (2, 3" in words
    assert "(2, 3 seeds; permutation test 0.20, by Holm over 3 comparisons 0.60)." in words
    chance = (
        "above one of DPPO with probability 0.50 (no interval) without noise (3 environments; leaving out LunarLander"
    )
    assert f"{chance}, which moves it most, 0.75 (no interval))." in words and "with noise" not in words
    assert rows(text) == [
        ["HalfCheetah", "2", "0.000 ± 0.000 (3478)", "0.000 ± 0.000 (4104)", "", ""],
        ["LunarLander", "2", "265.0 ± 5.0 (241)", "245.0 ± 5.0 (250)", "", ""],
        ["InvertedDoublePendulum", "2 to 3", "8983 ± 44 (8928)", "9150 ± 50 (9015)", "", ""],
    ]


def test_coverage_counts_the_papers_cells_ataris_none_included(tmp_path):
    runs, document = tmp_path / "runs", tmp_path / "README.md"
    write_run(runs / "dsppo", [9100.0, 9200.0], **DSPPO)
    game = {"script": "sppo_atari", "steps": 5_000_192, "alpha": 0.5}
    write_run(runs / "beta1", [100.0], "AlienNoFrameskip-v4", beta=1.0, **game)  # one of the 22 games of Table 4's cell
    document.write_text("<!-- coverage: begin -->\n<!-- coverage: end -->\n")
    assert report.main([str(runs), "--document", str(document)]) == 0
    counts = {row[0]: row[2] for row in rows(document.read_text())}
    assert counts["2, 12, 13"] == "1 of 54" and counts["1, 11"] == "1 of 88" and counts["8"] == "0 of 88"
    assert counts["4"] == "0 of 10" and counts["3"] == "0 of 15" and counts["14"] == "0 of 4"


def test_share_of_the_agents_that_left_the_plateau_stands_beside_the_mean(tmp_path):
    runs = tmp_path
    write_run(runs / "dppo", [44.0, 45.5, 130.0], "Swimmer-v4", steps=2_000_896, **DPPO)
    write_run(runs / "dsppo", [61.0, 131.0], "Swimmer-v4", steps=2_000_896, **DSPPO)
    modes = tables(section(make_report(runs), "Table 12"))[-1]
    assert modes == [
        ["Swimmer-v4", "DPPO", "3", "60", "2", "1", "44.0, 45.5; 130.0"],
        ["Swimmer-v4", "DSPPO", "2", "60", "0", "2", "61.0, 131.0"],
    ]


def test_figures_are_written_and_small(tmp_path):
    write_run(tmp_path / "runs" / "dsppo", [9000.0, 9200.0], curves=True, **DSPPO)
    write_run(tmp_path / "runs" / "short", [9000.0, 9200.0], steps=20_480, curves=True, **DSPPO)
    write_run(tmp_path / "runs" / "sb3", [9000.0], script="sb3_baseline", algo="ppo")
    for noise in ({}, {"reward_flip_prob": 0.1}):
        for game in sorted({game for game, *_ in PAPER[11]}):
            args = {"alpha": 0.5, "beta": 10.0 if noise else 1.0} | noise
            write_run(
                tmp_path / "runs" / f"{game}{noise}", [1.0, 2.0], game, "sppo_atari", 5_000_192, curves=True, **args
            )
    text = make_report(tmp_path / "runs")
    figures = {path.name: path.stat().st_size for path in (tmp_path / "report").glob("*.png")}
    names = ("continuous_ppo", "continuous_ppo_shorter", "atari_ppo")
    expected = {f"{what}_{name}.png" for what in ("curves", "sign_flips") for name in names}
    assert figures.keys() == expected | {"picture.png"}
    assert all(1_000 < size < 300_000 for size in figures.values())
    assert all(f"({name})" in text for name in figures)
    assert f"Without curves.csv, in no figure: {tmp_path / 'runs/sb3/seed1'}." in text


def test_curves_are_read_past_gaps_and_a_cut_line(tmp_path):
    write_run(tmp_path, [100.0], steps=5000, curves=True, **DSPPO)
    steps, values = read_curve(tmp_path / "seed1", "charts/episodic_return")
    assert (len(steps), steps[0], steps[-1], values[0], values[-1]) == (50, 100, 5000, 2, 100)
    means = bin_means(steps, values, np.array([120, 130, 5000]))
    assert means == pytest.approx([2.5, 51.3])  # of the line 0.02 x, at edges between its points
    assert len(read_curve(tmp_path / "seed1", "no/such_tag")[0]) == 0
    assert len(read_curve(tmp_path / "seed2", "global_step")[0]) == 0


def test_short_runs_and_other_settings_are_never_mixed_in(tmp_path):
    runs = tmp_path / "runs"
    write_run(runs / "full", [9000.0, 9100.0], **DSPPO)
    write_run(runs / "short", [10.0, 20.0], first_seed=3, steps=51_200, **DSPPO)
    write_run(runs / "shorter", [30.0], CHEETAH, steps=51_200, **DSPPO)
    write_run(runs / "long", [1.0], first_seed=5, steps=2_000_000, **DSPPO)
    write_run(runs / "bins", [2.0], first_seed=6, num_bins=7, **DSPPO)
    write_run(runs / "weight", [3.0], first_seed=7, alpha=3.0, beta=0.0)
    write_run(runs / "noise", [4.0], first_seed=8, reward_noise_std=0.1, **DSPPO)
    write_run(runs / "beta", [5.0], first_seed=9, reward_noise_std=0.05, **DSPPO)
    text = make_report(runs)
    table = section(text, "Table 12")
    assert [row[:4] for row in rows(table)] == [[PENDULUM, "DSPPO", "9050 ± 50", "2"]]
    assert f"- Shorter runs only: DSPPO: {CHEETAH}." in table
    assert rows(section(text, "Shorter than the paper")) == [
        [CHEETAH, "DSPPO", "none", "51,200 of 2,000,000", "30.0", "1", "4104 ± 258"],
        [PENDULUM, "DSPPO", "none", "51,200 of 1,000,000", "15.0 ± 5.0", "2", "9015 ± 101"],
    ]
    assert rows(section(text, "Longer than the paper")) == [
        [PENDULUM, "DSPPO", "none", "2,000,000 of 1,000,000", "1.00", "1", "9015 ± 101"]
    ]
    assert [row[1:] for row in rows(section(text, "Other settings"))] == [
        ["DSPPO", "none", "num_bins 7", "1,000,000", "2.00", "1"],
        ["DPPO control", "none", "alpha 3", "1,000,000", "3.00", "1"],
        ["DSPPO", "N(0, 0.05^2)", "beta 20", "1,000,000", "5.00", "1"],
        ["DSPPO", "N(0, 0.1^2)", "not in the paper, beta 20", "1,001,472", "4.00", "1"],
    ]
    assert "## Table 13" not in text


def test_the_control_of_the_identity_has_a_row_of_its_own(tmp_path):
    write_run(tmp_path / "runs" / "dsppo", [9000.0, 9200.0], **DSPPO)
    write_run(tmp_path / "runs" / "control", [9000.0, 9100.0], alpha=20.5, beta=0.0)
    text = make_report(tmp_path / "runs")
    table = section(text, "Table 12")
    cells, beside = tables(table)
    assert beside == [[PENDULUM, "2, 2", "+50.0 ± 111.8", "0.62 [0.00, 1.00]", "1.00 (1.00)", "", "", "", ""]]
    assert "- Beside the control, DPPO with its policy loss times alpha - beta Z" in section(
        text, "DSPPO, in sentences"
    )
    assert [row[1:] for row in cells] == [
        ["DSPPO", "9100 ± 100", "2", "1,000,000", "9015 ± 101", "+0.60, within"],
        ["DPPO control", "9050 ± 50", "2", "1,000,000", "-", "-"],
    ]
    assert "- DSPPO and DPPO control, 1 environment: interquartile mean" in table
    assert "- DPPO control: the symmetric algorithm without its reverse loss, its policy loss times" in table


def test_public_scores_stand_beside_atari_runs_without_noise(tmp_path):
    beam, alien = "BeamRiderNoFrameskip-v4", "AlienNoFrameskip-v4"
    args = {"script": "sa2c_atari", "alpha": 1.0, "beta": 0.0}
    write_run(tmp_path / "runs" / "5e6", [1100.0], beam, steps=5_000_000, **args)
    write_run(tmp_path / "runs" / "1e7", [2900.0], beam, steps=10_000_000, **args)
    write_run(tmp_path / "runs" / "noise", [2000.0], beam, steps=5_000_000, reward_flip_prob=0.1, **args)
    write_run(tmp_path / "runs" / "8e6", [1000.0], alien, "sppo_atari", 8_000_000, alpha=1.0, beta=0.0)
    text = make_report(tmp_path / "runs")
    a2c = "4139 (SLM Lab, 10,000,000 steps, n 4); 2890 (RL Zoo, 10,000,000 steps, n 1)"
    ppo = "1755 (CleanRL, 10,000,000 steps, n 3); 1706 (openai/baselines, steps not stated, n 3); "
    ppo += "1413 (SLM Lab, 10,000,000 steps, n 4)"
    assert [(row[2], row[3], row[-1]) for row in rows(section(text, "Table 8"))] == [
        ("none", "1100", a2c),
        ("BSC(0.1)", "2000", "-"),
    ]
    cells = [str(PAPER[table][key]) for table, key in ((11, (alien, "PPO", "none")), (8, (beam, "A2C", "none")))]
    assert [(row[0], row[3], *row[6:]) for row in rows(section(text, "Longer than the paper"))] == [
        ("Alien", "8,000,000 of 5,000,000", cells[0], ppo),
        ("BeamRider", "10,000,000 of 5,000,000", cells[1], a2c),
    ]


def test_public_scores_have_a_source_for_every_game():
    games = {game for game, *_ in PAPER[11]}
    public = {(p.source, p.algorithm): p for p in read_public()}
    assert len(public) == 6
    for (source, _), p in public.items():
        assert p.means.keys() == games if source != "RL Zoo" else len(p.means) == 4 and p.means.keys() < games
        assert p.url.startswith("https://github.com/") and p.seeds >= 1 and min(p.means.values()) > 0


def test_gain_of_the_paper_over_each_baseline(tmp_path):
    sppo = {game: PAPER[11][f"{game}NoFrameskip-v4", "SPPO", "none"].mean for game in ("Alien", "Qbert")}
    games = {"Alien": sppo["Alien"] / 1.1, "Qbert": sppo["Qbert"] / 1.5}
    for game, score in games.items():
        for seeds in (1, 2)[: 2 if game == "Alien" else 1]:
            args = {"alpha": 1.0, "beta": 0.0, "norm_adv": False, "first_seed": seeds}
            write_run(
                tmp_path / "runs" / f"{game}{seeds}", [score], f"{game}NoFrameskip-v4", "sppo_atari", 5_000_192, **args
            )
    gains = {tuple(row[:2]): row[2:] for row in rows(section(make_report(tmp_path / "runs"), "The paper's gain"))}
    assert gains["SPPO over PPO", "the paper's cells"] == ["5,000,000", "5", "16 of 22", "+13.4 %", "+9.6 %"]
    ours = gains["SPPO over PPO", f"ours, {UNNORMALIZED}"]
    assert ours == ["5,000,000", "1 to 2", "2 of 2", "+30.0 %", "+30.0 %"]
    assert gains["SPPO over PPO", "ours, PPO"] == ["5,000,000", "", "", "", ""]
    assert gains["SPPO over PPO", "openai/baselines"][:3] == ["not stated", "3", "1 of 22"]
    assert gains["SA2C over A2C", "RL Zoo"][:3] == ["10,000,000", "1", "0 of 4"]


def test_ppo_on_atari_with_and_without_normalization(tmp_path):
    for name, score, norm_adv in (("with", 1200.0, True), ("without", 1000.0, False)):
        args = {"alpha": 1.0, "beta": 0.0, "norm_adv": norm_adv}
        write_run(tmp_path / "runs" / name, [score], "AlienNoFrameskip-v4", "sppo_atari", 5_000_192, **args)
    table = section(make_report(tmp_path / "runs"), "Table 11")
    cell = str(PAPER[11]["AlienNoFrameskip-v4", "PPO", "none"])
    assert [(*row[1:4], row[6]) for row in rows(table)] == [
        ("PPO", "none", "1200", cell),
        (UNNORMALIZED, "none", "1000", cell),
    ]
    assert f"- {UNNORMALIZED} is the baseline as the authors released it" in table


def test_swimmer_has_two_gammas_and_one_stands_beside_the_cell(tmp_path):
    script, weights = "sa2c_continuous_discretized", {"alpha": 0.5, "beta": 0.2}
    write_run(tmp_path / "runs" / "theirs", [100.0], "Swimmer-v4", script, 2_000_000, gamma=0.9999, **weights)
    write_run(tmp_path / "runs" / "default", [50.0], "Swimmer-v4", script, 2_000_000, gamma=0.99, **weights)
    gaussian = {"script": "sb3_baseline", "steps": 2_000_000, "algo": "a2c"}
    write_run(tmp_path / "runs" / "a2c", [90.0], "Swimmer-v4", gamma=0.9999, **gaussian)
    write_run(tmp_path / "runs" / "older", [40.0], "Swimmer-v4", **gaussian)  # than the flag: gamma was 0.99
    write_run(tmp_path / "runs" / "hopper", [300.0], "Hopper-v4", script, 2_000_000, gamma=0.9999, **weights)
    text = make_report(tmp_path / "runs")
    table = section(text, "Table 9")
    swimmer = {algorithm: str(PAPER[9]["Swimmer-v4", algorithm, "none"]) for algorithm in ("A2C", "DSA2C")}
    assert [(row[1], row[2], row[5]) for row in tables(table)[0]] == [
        ("A2C", "90.0", swimmer["A2C"]),
        ("DSA2C", "100.0", swimmer["DSA2C"]),
        ("A2C, gamma 0.99", "40.0", "-"),
        ("DSA2C, gamma 0.99", "50.0", "-"),
    ]
    assert "- Swimmer-v4: the rows beside the paper's cells have gamma 0.9999" in table
    assert [row[:4] for row in rows(section(text, "Other settings"))] == [
        ["Hopper-v4", "DSA2C", "none", "gamma 0.9999"]
    ]


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
    parent = {"script": PPO_SCRIPT, "args": {"seed": 4, "num_seeds": 3}}  # seed 4 finished, 5 and 6 did not
    (runs / "several").mkdir()
    (runs / "several/args.json").write_text(json.dumps(parent))
    write_run(runs / "several", [9200.0], first_seed=4, **DSPPO)
    (runs / "updates").mkdir()
    (runs / "updates/args.json").write_text("{}")
    (runs / "updates/curves.csv").write_text("update,objective/kl\n7,0.5\n")
    text = make_report(runs)
    assert "3 runs in" in text and "11 left out" in text
    left_out = section(text, "Left out")
    assert f"- `{runs}/several`, seed5, seed6: not finished, 0 steps so far" in left_out
    assert f"- `{runs}/unfinished`, seed1, seed2: not finished, 4,096 steps so far" in left_out
    assert f"- `{runs}/copy`, seed1: seed 1 again, as in {runs / 'a/seed1'}" in left_out
    for line in (
        "nan`, seed1: result.json: eval_mean is nan",
        "language`, seed1: result.json: eval_score is nan",
        "empty: result.json: lacks 'script'",
        "updates: not finished, 7 updates so far",
    ):
        assert line in left_out
    assert rows(section(text, "Table 12"))[0][2:4] == ["9100 ± 58", "3"]


def test_table_4_and_its_rule(tmp_path):
    for name, args, score in (("ppo", DPPO, 100.0), ("1", {"beta": 1.0}, 110.0), ("5", {"beta": 5.0}, 1300.0)):
        args = {"alpha": 0.5} | args
        write_run(tmp_path / "runs" / name, [score], "AlienNoFrameskip-v4", "sppo_atari", 5_000_192, **args)
    text = make_report(tmp_path / "runs")
    table = section(text, "Table 4")
    assert rows(table)[:3] == [
        ["0.5", "none", "not run", "0 of 22", "7.83 %"],
        ["1", "none", "+10.0 %", "1 of 22", "10.15 %"],
        ["5", "none", "+1200.0 % (nothing left without the 1 above 1000 %)", "1 of 22", "24.98 %"],
    ]
    assert "+13.4 % for beta 1 (noise: none) where Table 4 prints 10.15 %" in table
    assert "+216.7 % (+90.4 % without the 2 above 1000 %) for beta 10 (noise: BSC(0.1))" in table
    assert [row[:2] for row in tables(section(text, "Table 11"))[0]] == [["Alien", "PPO"], ["Alien", "SPPO"]]


@pytest.mark.parametrize(
    ("script", "env_id", "args", "algorithm"),
    [
        ("sppo_atari", "AlienNoFrameskip-v4", {"alpha": 0.5, "beta": 10.0, "reward_flip_prob": 0.1}, "SPPO"),
        ("sppo_atari", "AlienNoFrameskip-v4", {"alpha": 1.0, "beta": 0.0, "Z": -7.0}, "PPO"),
        ("sa2c_atari", "AlienNoFrameskip-v4", {"alpha": 0.5, "beta": 1.0, "reward_flip_prob": 0.1}, "SA2C"),
        ("sa2c_atari", "KrullNoFrameskip-v4", {"alpha": 0.5, "beta": 5.0, "reward_flip_prob": 0.1}, "SA2C"),
        ("sa2c_continuous_discretized", "Ant-v4", {"alpha": 0.5, "beta": 0.2, "reward_noise_std": 0.05}, "DSA2C"),
        ("sa2c_continuous_discretized", LANDER, {"alpha": 0.5, "beta": 5.0}, "DSA2C"),
        ("sppo_continuous_discretized", "Swimmer-v4", {"alpha": 0.5, "beta": 50.0, "reward_noise_std": 0.05}, "DSPPO"),
        ("sb3_baseline", "Walker2d-v4", {"algo": "ppo", "reward_noise_std": 0.05}, "PPO"),
        ("sb3_baseline", "Walker2d-v4", {"algo": "a2c"}, "A2C"),
    ],
)
def test_runs_find_their_cell(script, env_id, args, algorithm):
    result = {"script": script, "env_id": env_id, "args": args, "total_timesteps": 10**6}
    steps = identify(result).paper_timesteps
    group = identify(result | {"total_timesteps": steps})
    assert (group.algorithm, group.kind, group.differences) == (algorithm, "paper", ())


def test_discretized_runs_of_stable_baselines3_are_beside_no_cell():
    result = {"script": "sb3_baseline", "env_id": LANDER, "total_timesteps": 2_000_000}
    for change in ({}, {"policy_coef": 20.5}):
        args = {"algo": "ppo", "num_bins": 11, "policy_coef": 1.0} | change
        group = identify(result | {"args": args})
        assert (group.algorithm, group.kind) == ("PPO", "other")
        assert group.differences == (("num_bins", 11), *change.items())
    assert identify(result | {"args": {"algo": "ppo", "num_bins": None}}).kind == "paper"


@pytest.mark.parametrize("script", import_scripts("s*_[ac]*.py"))
def test_default_arguments_are_the_papers(script):
    args = asdict(script.Args())
    env_id = "AlienNoFrameskip-v4" if script.SCRIPT.endswith("atari") else LANDER
    result = {"script": script.SCRIPT, "env_id": env_id, "args": args, "total_timesteps": 2_000_000}
    result["total_timesteps"] = identify(result).paper_timesteps
    assert identify(result).kind == "paper"
    for change in ({"gamma": 0.9}, {"num_envs": 3}, {"Z": -2.0}, {"anneal_lr": not args["anneal_lr"]}):
        group = identify(result | {"args": args | change})
        assert (group.kind, group.differences) == ("other", tuple(change.items()))


def flags_of(script):
    """A script's arguments, all at their defaults, but for the environment."""
    return {name: x for name, x in asdict(importlib.import_module(script).Args()).items() if name != "env_id"}


def test_a_changed_copy_stands_beside_the_original_under_its_own_name(tmp_path):
    runs, defaults = tmp_path / "runs", flags_of(PPO_SCRIPT)
    write_run(runs / "dppo", [8700.0, 8900.0], curves=True, **defaults | DPPO)
    write_run(runs / "dsppo", [9000.0, 9200.0], curves=True, **defaults | DSPPO)
    for name, own in (("default", {}), ("beta", {"beta": 5.0}), ("flag", {"tau": 0.1})):
        write_run(runs / name, [9300.0, 9500.0], script="my_loss", curves=True, **defaults | own)
    write_run(runs / "bins", [9600.0], script="my_loss", **defaults | {"num_bins": 7})
    write_run(runs / "noise", [9100.0], script="my_loss", **defaults | {"reward_noise_std": 0.05})
    write_run(runs / "short", [10.0], script="my_loss", steps=51_200, **defaults)
    write_run(runs / "a2c", [200.0], LANDER, "my_a2c", 2_000_000, **flags_of("sa2c_continuous_discretized"))
    text = make_report(runs)
    assert text.partition("\n## ")[2].startswith("Changed copies beside their originals\n")
    copies = section(text, "Changed copies")
    compared = {tuple(row[3:5]): row[5:] for row in rows(copies)}
    # DSPPO: 9400 - 9100 ± sqrt(100^2 + 100^2), t with 2 degrees of freedom: 4.303 x 141.4
    expected = ["9400 ± 100", "9100 ± 100", "2, 2", "+300.0 ± 141.4 [-308, 908]", "1.00 (no interval)", "0.33"]
    assert compared["my_loss", "DSPPO"] == compared["my_loss, tau 0.1", "DSPPO"] == expected
    assert compared["my_loss", "DPPO"][3].startswith("+600.0 ± 141.4")
    names = [name for copy, name in compared if copy.startswith("my_loss")]
    assert Counter(names) == {"DPPO": 3, "DSPPO": 3}  # three copies beside both weights
    assert (
        f"- my_loss, {PENDULUM}, noise none, 51,200 steps: no run of {PPO_SCRIPT} there to compare it with." in copies
    )
    assert "- my_a2c, LunarLanderContinuous-v3, noise none, 2,000,000 steps: no run of sa2c" in copies
    table = section(text, "Table 12")
    mine = ["9400 ± 100", "2", "1,000,000", "-", "-"]
    assert [row[1] for row in rows(table)[:2]] == ["DPPO", "DSPPO"]
    assert [row[1:] for row in tables(table)[0][2:]] == [["my_loss", *mine]] + [
        [f"my_loss, {own}", *mine] for own in ("beta 5", "tau 0.1")
    ]
    assert "- DSPPO and my_loss, 1 environment: interquartile mean" in table
    assert [row[1:3] for row in rows(section(text, "Table 13"))] == [["my_loss", "9100"]]
    assert [row[1:3] for row in rows(section(text, "Table 9"))] == [["my_a2c", "200.0"]]
    assert [row[1:4] for row in rows(section(text, "Other settings"))] == [["my_loss", "none", "num_bins 7"]]
    assert rows(section(text, "Shorter"))[0][1:4] == ["my_loss", "none", "51,200 of 1,000,000"]
    assert (tmp_path / "report" / "curves_continuous_ppo.png").exists()


def test_a_changed_copy_of_a_language_script(tmp_path):
    write_language_run(tmp_path / "runs" / "ppo", [0.88, 0.90])
    write_language_run(tmp_path / "runs" / "control", [0.89, 0.91], alpha=0.9)
    write_language_run(tmp_path / "runs" / "mine", [0.91, 0.93], alpha=0.5, beta=0.4)
    for path in (tmp_path / "runs" / "mine").rglob("result.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"script": "my_rlhf"}))
    text = make_report(tmp_path / "runs")
    copies = [row[:5] for row in rows(section(text, "Changed copies"))]
    assert copies == [["IMDB", "none", "60", "my_rlhf", name] for name in ("PPO", "PPO control")]
    table = rows(section(text, "Table 3"))
    assert ["IMDB", "my_rlhf", "score", "0.920 ± 0.010", "2", "-", "-"] in table
    assert ["IMDB", "PPO control", "score", "0.900 ± 0.010", "2", "-", "-"] in table
    assert [row[0] for row in rows(section(text, "Language runs"))[:3]] == ["PPO", "PPO control", "my_rlhf"]


def test_runs_behind_symbolic_links_are_found_once(tmp_path):
    write_run(tmp_path / "elsewhere" / "dppo", [8900.0, 9100.0], **DPPO)
    (tmp_path / "elsewhere" / "begun").mkdir()
    (tmp_path / "elsewhere" / "begun" / "args.json").write_text("{}")
    runs = tmp_path / "runs"
    runs.mkdir()
    for name in ("dppo", "again"):
        (runs / name).symlink_to(tmp_path / "elsewhere" / "dppo")
    (runs / "begun").symlink_to(tmp_path / "elsewhere" / "begun")
    (runs / "round").symlink_to(runs)  # a link in a circle ends
    text = make_report(runs)
    assert rows(section(text, "Table 12"))[0][:4] == [PENDULUM, "DPPO", "9000 ± 100", "2"]
    assert "1 left out" in text and "begun: not finished" in text


def test_missing_cells_are_written_between_the_marker_lines(tmp_path, capsys):
    runs, document = tmp_path / "runs", tmp_path / "results.md"
    timing = {"sps": 100.0, "wall_seconds": 9000.0}
    write_run(runs / "dsppo", [9000.0, 9200.0], **DSPPO)
    for i, path in enumerate(runs.rglob("result.json")):  # two seeds side by side: 200 steps per second
        timing["wall_seconds"] += i / 1000
        path.write_text(json.dumps(json.loads(path.read_text()) | timing))
    command = [str(runs), "--out", str(tmp_path / "report"), "--document", str(document)]
    document.write_text("# Results\n")
    assert report.main(command) == 2 and "it has no line <!-- NAME: begin -->" in capsys.readouterr().err
    document.write_text("# Results\n<!-- missing cells: begin -->\n")
    assert report.main(command) == 2 and "it has no lines <!-- missing cells: begin -->" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
    document.write_text("# Results\n<!-- missing cells: begin -->\nold\n<!-- missing cells: end -->\nMore.\n")
    for _ in range(2):
        assert report.main(command) == 0
        text = document.read_text()
        assert text.startswith("# Results\n<!-- missing cells: begin -->\n") and "\nold\n" not in text
        assert text.endswith("\n<!-- missing cells: end -->\nMore.\n") and text.count("| Table") == 1
    listed = rows(text)
    # 30 seeds of 1e6 steps at 200 steps per second; no run tells how fast Stable-Baselines3 is
    dppo = "sppo_continuous_discretized --seeds 30 --env-id InvertedDoublePendulum-v4 --total-timesteps 1000000"
    dppo = f'`benchmark/run_cells.sh <<< "{dppo} --alpha 1 --beta 0"`'
    assert ["12, 13", PENDULUM, "DPPO", "30", dppo, "42"] in listed
    assert next(row[2:] for row in listed if row[:2] == ["12, 13", PENDULUM])[::3] == ["PPO", "-"]
    assert ["3", "IMDB", "PPO, SPPO", "4", "`benchmark/rlhf_imdb.sh`", "-"] in listed
    names = "SPPO beta 0.5, SPPO beta 5, SPPO beta 10, SPPO beta 25"
    assert [row[2] for row in listed if row[:2] == ["4", "all 22"]] == [
        f"{names}; with noise: SPPO beta 0.5, SPPO beta 1, SPPO beta 5, SPPO beta 25"
    ]
    assert not any(row[:3] == ["12, 13", PENDULUM, "DSPPO"] for row in listed)


@pytest.mark.parametrize("module", ["matplotlib", "scipy"])
def test_a_missing_package_is_named_with_its_requirements_file(tmp_path, module):
    (tmp_path / f"{module}.py").write_text(f"raise ModuleNotFoundError(name={module!r})")
    command = [sys.executable, str(ROOT / "benchmark/report.py"), str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: there is no {module}: pip install -r requirements-benchmark.txt\n",
    )


def test_sweeps_run_every_cell_of_the_paper():
    for sweep, tables in SWEEPS.items():
        if sweep not in TABLES.values():
            continue
        plans = [parse(line) for line in sweep_cells(sweep)]
        found = [(p.environment, p.algorithm, p.noise) for p in plans if p.algorithm != UNNORMALIZED]
        assert sorted(found) == sorted(cell for table in tables for cell in PAPER[table])
        assert {plan.seeds for plan in plans} == {5 if "atari" in sweep else 30}


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
    assert "- Not run: TL;DR, PPO: win rate (%).\n- Not run: TL;DR, PPO after 10 updates: win rate (%).\n" in text
    assert rows(section(text, "Table 14")) == [
        ["IMDB", "PPO (without A normalization)", "score", "0.750 ± 0.050", "2", "0.77 ± 0.01", "-0.39, within"],
        ["IMDB", "PPO (with A normalization)", "score", "0.890 ± 0.010", "2", "0.89 ± 0.02", "+0.00, within"],
        ["TL;DR", "PPO (with A normalization)", "score", "5.95 ± 0.05", "2", "5.94 ± 0.08", "+0.11, within"],
    ]
    overview = {row[0]: row[3:] for row in rows(section(text, "Cells that were run"))}
    assert (overview["3"], overview["14"]) == (["13 of 15", "0", "5"], ["3 of 4", "0", "0"])
    imdb, tldr = section(text, "Language runs").split("\n### ")[1:]
    assert imdb.startswith("IMDB: policy `rajkumarrrk/gpt2-fine-tuned-on-imdb-positive-reviews`, data set `stanford")
    # KL of update i: i times the seed; of the last tenth, 57.5 and 115 of 60 updates, 95.5 and 191 of 100.
    assert rows(imdb)[1][4:] == ["0.500 ± 0.000 → 0.890 ± 0.010", "33.0 ± 0.0 → 40.0 ± 1.0", "86.2 ± 28.8"]
    assert rows(imdb)[2][-1] == "-"
    assert rows(tldr)[1][6] == "143.2 ± 47.8"
    assert rows(tldr)[1][7:] == ["30.0 ± 0.0 → 45.0 ± 5.0", "10.0 ± 0.0 → 10.0 ± 0.0", "20.0 ± 0.0 → 20.0 ± 0.0"]
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
    assert (
        "8 runs in" in text and "2 at the paper's settings and length, 1 shorter, 0 longer, 5 at other settings" in text
    )
    table = section(text, "Table 3")
    assert {tuple(row[:3]) for row in rows(table)} == {
        ("IMDB", algorithm, metric) for algorithm in ("initial policy", "SPPO") for metric in ("score", "perplexity")
    }
    assert [row[1] for row in rows(section(text, "Table 14"))] == ["PPO (without A normalization)"]
    paper, reviews = sorted(section(text, "Language runs").split("\n### ")[1:], key=lambda part: "reviews`" in part)
    assert reviews.startswith("IMDB: policy `assets/gpt2-reviews`, data set `assets/reviews`, reward model `assets/s")
    assert rows(reviews)[:2] == [
        ["PPO", "", "60", "2", "0.500 ± 0.000 → 0.700 ± 0.100", "33.0 ± 0.0 → 40.0 ± 1.0", "86.2 ± 28.8"],
        ["SPPO", "", "20 of 60", "2", "0.500 ± 0.000 → 0.800 ± 0.100", "33.0 ± 0.0 → 40.0 ± 1.0", "29.2 ± 9.7"],
    ]
    errors = ["0.600 ± 0.000", "0.500 ± 0.000", "0.200 ± 0.000 → 0.350 ± 0.050", "25.0 ± 0.0 → 25.0 ± 0.0"]
    assert rows(reviews)[-2] == ["PPO", "", "60", "2", *errors, "12.5 ± 0.0 → 12.5 ± 0.0"]
    assert ["PPO", "target_coef 0, eval_samples 20", "60", "1"] in [row[:4] for row in rows(paper)]
    assert "- Win rate of SPPO, 60 updates, against ppo: 55.0 % (n 1), 10 samples judged by another." in paper
    assert "- Win rate of SPPO, 60 updates, against the references: 55.0 % (n 1), 10 samples judged by an" in paper
    assert {path.name for path in (tmp_path / "report").glob("*.png")} == {"curves_rlhf_imdb_other.png"}


@pytest.mark.parametrize("script", import_scripts("sppo_rlhf*.py"))
def test_default_arguments_of_a_language_script_are_the_papers(script):
    args = json.loads(json.dumps(asdict(script.Args())))
    result = {"script": script.SCRIPT, "args": args | {"target_coef": 0.1}, "num_updates": args["num_updates"]}
    assert identify(result).kind == "paper"
    for change in ({"gamma": 0.9}, {"Z": -2.0}, {"kl_coef": 0.0}, {"target_coef": 0.0}, {"norm_adv": False}):
        group = identify(result | {"args": result["args"] | change})
        assert (group.kind, group.differences) == ("other", tuple(change.items()))
    for updates, kind in ((args["num_updates"] - 1, "shorter"), (args["num_updates"] + 1, "longer")):
        assert identify(result | {"num_updates": updates}).kind == kind


def test_the_kept_report_is_what_the_kept_results_make_and_is_quoted_right(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    documents = [ROOT / "README.md", ROOT / "docs/results.md", ROOT / "docs/missing.md"]
    copies = [str(shutil.copy(document, tmp_path)) for document in documents]
    assert report.main(["benchmark/results", "--out", str(tmp_path), "--document", *copies]) == 0
    made = (tmp_path / "report.md").read_text(encoding="utf-8")
    kept = ROOT / "benchmark" / "results"
    assert made == (kept / "report.md").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.glob("*.png")} == {path.name for path in kept.glob("*.png")}
    assert [Path(copy).read_text() for copy in copies] == [document.read_text() for document in documents]
    gains = rows(section(made, "The paper's gain"))
    assert gains and all(row in rows(documents[1].read_text()) for row in gains if row[-1])


def test_folders_without_results(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/args.json").write_text("{}")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/result.json").write_text("{")
    for folder, message in (
        ("run", "no result.json, 1 unfinished runs"),
        ("nowhere", "no result.json, no such folder"),
        ("bad", "no usable result.json among 1"),
    ):
        assert report.main([str(tmp_path / folder), "--out", str(tmp_path / "report")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_out_that_names_a_file_is_refused(tmp_path, capsys, out):
    write_run(tmp_path / "runs", [9000.0], **DSPPO)
    (tmp_path / "file").write_text("mine")
    assert report.main([str(tmp_path / "runs"), "--out", str(tmp_path / out)]) == 2
    assert capsys.readouterr() == ("", f"error: --out {tmp_path / out} is no folder\n")
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_our_runs_beside_those_of_stable_baselines3(tmp_path, capsys):
    """The curves rise on a line to the score: the mean of their last tenth is 95 % of it."""
    cells = tmp_path / "runs"
    theirs = {"script": "sb3_baseline", "steps": 200_704, "num_bins": 11, "curves": True}
    write_run(cells / "ppo", [1000.0, 1100.0, 1200.0], algo="ppo", **theirs)
    write_run(cells / "a2c", [500.0], LANDER, algo="a2c", **theirs)  # ours has not ended
    write_run(cells / "gaussian", [9000.0], script="sb3_baseline", steps=200_704, curves=True, algo="ppo")
    document = tmp_path / "results.md"
    document.write_text(f"a\n<!-- {same_as_sb3.MARKER}: begin -->\nold\n<!-- {same_as_sb3.MARKER}: end -->\nz\n")
    command = [str(cells), "--out", str(tmp_path / "figures"), "--document", str(document)]
    assert same_as_sb3.main(command) == 2 and capsys.readouterr().err.startswith("error: no finished runs of both")
    write_run(cells / "dppo", [1200.0, 1300.0, 1400.0], steps=200_704, curves=True, **DPPO)
    write_run(cells / "dsppo", [9000.0], steps=200_704, curves=True, **DSPPO)
    write_run(cells / "noise", [9000.0], steps=200_704, curves=True, reward_noise_std=0.05, **DPPO)
    assert same_as_sb3.main(command) == 0
    text = document.read_text()
    assert text.startswith("a\n") and text.endswith("z\n") and "old" not in text
    # SE of both: 0.95 * 100 / sqrt(3) = 54.8; 190 / sqrt(2) / 54.8 = 2.45
    row = [PENDULUM, "PPO", "200,704", "1045 ± 55", "1235 ± 55", "3, 3", "+2.45", "0.20"]
    assert rows(text) == [row]
    assert re.findall(r"!\[.*?\]\((.*?)\)", text) == ["figures/same_as_sb3_ppo.png"]
    assert all(1_000 < path.stat().st_size < 300_000 for path in (tmp_path / "figures").iterdir())


def test_the_report_has_stable_baselines3_beside_ours_at_the_same_step(tmp_path):
    """DSPPO is Stable-Baselines3's PPO with its policy loss times 20.5; both curves rise at the same speed."""
    theirs = {"script": "sb3_baseline", "num_bins": 11, "algo": "ppo", "curves": True}
    write_run(tmp_path / "runs" / "sb3", [498.0, 520.0], steps=500_736, policy_coef=20.5, **theirs)
    write_run(tmp_path / "runs" / "other", [900.0, 920.0], steps=500_736, policy_coef=3.0, **theirs)
    write_run(tmp_path / "runs" / "dsppo", [1000.0, 1080.0], curves=True, **DSPPO)
    text = section(make_report(tmp_path / "runs"), "Beside Stable-Baselines3")
    expected = ["500,736", "483.6 ± 10.5", "494.0 ± 19.0", "2, 2", "+0.48", "0.67"]
    assert rows(text) == [[PENDULUM, "PPO, policy loss times 20.5", "none", *expected]]
    assert (tmp_path / "report" / "beside_sb3.png").stat().st_size > 1_000


def test_the_report_goes_where_the_runs_are_and_names_atari_only_beside_atari_runs(tmp_path):
    write_run(tmp_path / "dsppo", [9000.0, 9200.0], **DSPPO)
    assert report.main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "openai/baselines" not in text and "RL Zoo" not in text
    write_run(tmp_path / "atari", [1100.0], "BeamRiderNoFrameskip-v4", "sa2c_atari", 5_000_000, alpha=1.0, beta=0.0)
    assert report.main([str(tmp_path)]) == 0
    assert "openai/baselines" in section((tmp_path / "report.md").read_text(encoding="utf-8"), "The paper's gain")


def test_permutation_test_and_holm():
    first, second = np.array([3.0, 4.0, 5.0, 6.0, 7.0]), np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    assert scores.permutation_test(first, second) == pytest.approx(2 / math.comb(10, 5))
    assert math.isnan(scores.permutation_test(first[:1], second))
    # 4 x 0.01; 3 x 0.02; 2 x 0.04 and then no smaller; one seed does not count
    assert scores.holm([0.04, 0.01, math.nan, 0.02, 0.05])[:4] == pytest.approx(
        [0.08, 0.04, math.nan, 0.06], nan_ok=True
    )
    assert scores.holm([0.04, 0.01, 0.02, 0.05])[3] == pytest.approx(0.08)


def test_kept_runs_have_result_thinned_curves_and_every_evaluation(tmp_path):
    run_dir = tmp_path / "runs" / "cell" / "seed1"
    run_dir.mkdir(parents=True)
    (run_dir / "result.json").write_text("{}")
    (run_dir / "model.safetensors").write_text("large")
    rows = [f"{step},{step / 10},{step if step % 333 == 0 else ''}\n" for step in range(1, 1001)]
    (run_dir / "curves.csv").write_text("global_step,charts/SPS,eval/episodic_return\n" + "".join(rows))
    script = str(ROOT / "benchmark" / "thin_results.py")
    thin = [sys.executable, script, str(tmp_path / "runs"), "--out", str(tmp_path / "kept")]
    assert subprocess.run(thin, capture_output=True).returncode == 0
    kept = tmp_path / "kept" / "cell" / "seed1"
    assert sorted(path.name for path in kept.iterdir()) == ["curves.csv", "result.json"]
    lines = (kept / "curves.csv").read_text().splitlines()[1:]
    assert len(lines) == 100 + 3 and set(lines) <= {row.strip() for row in rows}
    assert [line for line in lines if not line.endswith(",")] == [f"{s},{s / 10},{s}" for s in (333, 666, 999)]
    assert subprocess.run([*thin[:2], str(tmp_path / "kept" / "nothing")], capture_output=True).returncode == 2


def test_kept_language_runs_have_the_judges_verdict_and_no_samples(tmp_path):
    write_language_run(tmp_path / "runs" / "cell", [0.9], updates=150, curves=True, judge=[0.5])
    run_dir = tmp_path / "runs" / "cell" / "seed1"
    for name in ("eval_samples.jsonl", "judgments-judge-reference.jsonl", "policy"):
        (run_dir / name).write_text("large")
    script = str(ROOT / "benchmark" / "thin_results.py")
    thin = [sys.executable, script, str(tmp_path / "runs"), "--out", str(tmp_path / "kept")]
    assert subprocess.run(thin, capture_output=True).returncode == 0
    kept = tmp_path / "kept" / "cell" / "seed1"
    assert sorted(path.name for path in kept.iterdir()) == ["curves.csv", "judge.json", "result.json"]
    lines, all_lines = ((folder / "curves.csv").read_text().splitlines() for folder in (kept, run_dir))
    assert len(lines) < len(all_lines) and [line for line in all_lines if ",30" in line or ",39.0" in line] == [
        line for line in lines if ",30" in line or ",39.0" in line
    ]
    assert report.main([str(tmp_path / "kept"), "--out", str(tmp_path / "report")]) == 0
