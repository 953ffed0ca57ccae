"""Tables of the report: the paper's as far as they were run, Table 4, published scores, other settings, copies."""

import numpy as np
import pandas as pd
import stats
from comparisons import (
    chance,
    chances,
    comparison_table,
    control_table,
    drop_noise,
    gains,
    modes_table,
    pairs,
    seeds,
    short,
    symmetric_of,
)
from runs import FAMILY, GROUP, PAPER, TASKS, UNNORMALIZED, WEIGHTS, by_group, last_tenths, read_paper

PRINTED_WINS = {(8, "none"): 12, (8, "BSC(0.1)"): 15, (11, "none"): 16, (11, "BSC(0.1)"): 19}
LAST_TENTH = {
    "Training return": "charts/episodic_return",
    "Entropy": "losses/entropy",
    "Value loss": "losses/value_loss",
}
TEXT = ("Algorithm", "Noise", "Difference / joint SE", "Public", "Not the paper's", "Algorithms", "Copy", "Original")
PUBLIC = """\
The paper's SPPO and SA2C cells of Tables 11 and 8 without noise (5 seeds, taken to be 5e6 steps) over baselines of
different origin. The paper's PPO cells are taken to be those of the baseline as released, which does not normalize
advantages; SPPO, CleanRL and openai/baselines do. Runs of 10,000,000 steps say nothing about SPPO at equal length.
Public scores are those of the last 100 episodes of training (openai/baselines; CleanRL, by its script's default steps:
the latest returns of its 8 games), of 100 checkpoints (SLM Lab; its A2C has n-step returns) or of the episodes of one
agent (RL Zoo). Sources, of the first two collected by openrlbenchmark: """

OTHER = """\
Not the paper's for these cells, so they are in no table above. Training return, entropy and value loss are means of the
last tenth of a run."""
COPIES = """\
## Changed copies beside their originals

The same environment, noise and length. Difference: copy minus original ± SE, with the 95 % interval of Welch's t, whose
p is not corrected for the number of rows."""


def title(cells: pd.DataFrame, table: int) -> str:
    printed = cells[(cells.table == table) & cells.in_paper]
    noises = list(printed.noise.unique())
    noise = "" if len(noises) > 1 else ", without noise" if noises == ["none"] else f", with noise {noises[0]}"
    domain = "Atari" if FAMILY[table].startswith("atari") else "MuJoCo and Box2D"
    return f"Table {table}: {', '.join(printed.algorithm.unique())}, {domain}{noise}"


def beside(differences: pd.Series) -> list[str]:
    """Differences in joint standard errors, and whether they exceed one."""
    return [f"{t:+.2f}, {'exceeds' if abs(t) > 1 else 'within'}" if t == t else "-" for t in differences]


def scores(rows: pd.DataFrame) -> list[str]:
    return [stats.mean_se(*x) for x in zip(rows.ours, rows.se)]


def thousands(numbers: pd.Series) -> pd.Series:
    return numbers.map("{:,.0f}".format, na_action="ignore")


def read_public() -> pd.DataFrame:
    """Published Atari scores of PPO and A2C, all without noise; steps are missing where they are not stated."""
    public = pd.read_csv(PAPER / "public_scores.csv")
    return public.assign(length=thousands(public.steps).fillna("not stated"), score=public["mean"])


def public_texts(rows: pd.DataFrame) -> list[str]:
    """What others have published for a cell."""
    public = read_public()
    length = public.length.where(public.steps.isna(), public.length + " steps").replace(
        "not stated", "steps not stated"
    )
    texts = (
        public.score.map(stats.number) + " (" + public.source + ", " + length + ", n " + public.seeds.astype(str) + ")"
    )
    texts = texts.groupby([public.environment, public.algorithm]).agg("; ".join)
    return [texts.get((x.environment, x.algorithm), "-") if x.noise == "none" else "-" for x in rows.itertuples()]


def overview_table(cells: pd.DataFrame, runs: pd.DataFrame, language: pd.DataFrame) -> str:
    """Per table and noise: cells of the paper that were run, only shorter, and beyond one joint standard error."""
    key = ["environment", "algorithm", "noise"]
    short_runs = runs[(runs.kind == "shorter") & ~runs.family.isin(TASKS)].drop_duplicates(key)[key]
    rows = cells[cells.in_paper].merge(short_runs.assign(only_short=True), "left", key)
    rows = pd.concat([rows, language[language.in_paper].assign(noise="none")])
    rows["run"], rows["far"], rows["only_short"] = (
        rows.n > 0,
        rows.t.abs() > 1,
        rows.only_short.eq(True) & (rows.n == 0),
    )
    found = rows.groupby(["table", "noise"], sort=False).agg(
        algorithms=("algorithm", lambda names: ", ".join(names.unique())), run=("run", "sum"), all=("run", "size"),
        short=("only_short", "sum"), far=("far", "sum"),
    ).reset_index()  # fmt: skip
    found["run"] = found.run.astype(str) + " of " + found.pop("all").astype(str)
    found.columns = ["Table", "Noise", "Algorithms", "Cells run", "Shorter only", "Beyond the joint SE"]
    return stats.markdown(found, TEXT)


def cells_table(cells: pd.DataFrame, table: int) -> str:
    """One table of the paper as far as it was run, ours beside the paper's."""
    rows = cells[(cells.table == table) & (cells.n > 0)]
    frame = {"Environment": rows.environment.map(short), "Algorithm": rows.algorithm, "Noise": rows.noise}
    frame |= {"Ours": scores(rows), "n": rows.n, "Timesteps": thousands(rows.steps), "Paper": rows.printed.fillna("-")}
    frame |= {"Difference / joint SE": beside(rows.t)}
    frame |= {"Public": public_texts(rows)} if FAMILY[table].startswith("atari") else {}
    return stats.markdown(drop_noise(pd.DataFrame(frame), cells, table), TEXT)


def summary_lines(cells: pd.DataFrame, pooled: pd.DataFrame, table: int, noise: str) -> list[str]:
    """Wins, improvement and interquartile means of one table and noise, ours beside the paper's, as bullets."""
    symmetric, baseline, control = symmetric_of(FAMILY[table])
    cells, pooled = (some[(some.table == table) & (some.noise == noise)] for some in (cells, pooled))
    printed = cells[cells.in_paper].pivot(index="environment", columns="algorithm", values="paper")
    base, wins = printed[baseline], (printed[symmetric] > printed[baseline])
    prefix, lines = "" if FAMILY[table].startswith("continuous") or noise == "none" else f"Noise {noise}: ", []
    both = pairs(pooled, symmetric, baseline)
    if len(both):
        same, whole = both.environment, len(both) == len(printed)
        claimed = PRINTED_WINS.get((table, noise), wins.sum())
        misprint = f" (the paper prints {claimed})" if claimed != wins.sum() else ""
        these = "" if whole else f" in {wins[same].sum()} of these and"
        here = stats.improvement_text(both.paper_b, both.paper_a)
        everywhere = stats.improvement_text(base, printed[symmetric])
        lines += [
            f"{symmetric} has the higher mean than {baseline} in {(both.ours_a > both.ours_b).sum()} of {len(both)} "
            f"environments; in the paper's cells{these} in {wins.sum()} of all {len(printed)}{misprint}.",
            f"Average improvement of {symmetric} over {baseline}: {stats.improvement_text(both.ours_b, both.ours_a)}; "
            f"the paper's cells:{'' if whole else f' {here} in these environments,'} {everywhere} in all {len(printed)}.",
        ]
    for other in dict.fromkeys(cells[cells.n > 0].sort_values("order", kind="stable").algorithm):
        both = pairs(cells if other == control else pooled, symmetric, other)
        if other != symmetric and len(both):
            unit = base[both.environment]
            means = [
                stats.interval_text([np.divide(x, u) for x, u in zip(values, unit)], stats.interquartile_mean)
                for values in (both.scores_a, both.scores_b)
            ]
            lines.append(
                f"{symmetric} and {other}, {len(both)} environment{'s' * (len(both) > 1)}: interquartile mean of score / "
                f"the paper's {baseline} cell {means[0]} and {means[1]}; probability of improvement {chance(both)}."
            )
    return [f"- {prefix}{line}" for line in lines]


def table_text(cells: pd.DataFrame, pooled: pd.DataFrame, table: int, shorter: pd.DataFrame) -> str:
    """One table of the paper as far as it was run, and what follows from its cells; shorter: runs that are that only."""
    made = [cells_table(cells, table), comparison_table(pooled, table), control_table(cells, table)]
    parts, some, lines = [*made, modes_table(cells, table)], cells[cells.table == table], []
    for noise in some[some.in_paper].noise.unique():
        lines += summary_lines(cells, pooled, table, noise)
    run = some[some.n > 0].algorithm.unique()
    if UNNORMALIZED in run:
        lines.append(f"- {UNNORMALIZED} is the baseline as the authors released it, PPO is that of the paper's text.")
    for control in (name for name in run if name.endswith(" control")):
        factor = "alpha" if "A2C" in control else "alpha - beta Z"
        lines.append(
            f"- {control}: the symmetric algorithm without its reverse loss, its policy loss times the {factor} of the "
            "symmetric row (--beta 0; docs/paper-notes.md says why)."
        )
    lines += ["- Swimmer-v4 has gamma 0.9999, which the authors' files have and the paper does not name."] * (
        FAMILY[table] == "continuous_a2c" and "Swimmer-v4" in set(some[some.n > 0].environment)
    )
    key = ["environment", "algorithm", "noise"]
    missing = some[some.in_paper & (some.n == 0)].merge(
        shorter.drop_duplicates(key)[key], "left", key, indicator="only"
    )
    missing["what"] = np.where(missing.only == "both", "Shorter runs only", "Not run")
    one = some[some.in_paper].noise.nunique() == 1
    missing["column"] = missing.algorithm if one else missing.algorithm + ", noise " + missing.noise
    for (what, column), names in missing.groupby(["what", "column"]).environment:
        everywhere = len(names) == some[some.in_paper].environment.nunique()
        lines.append(f"- {what}: {column}: {'everywhere' if everywhere else ', '.join(sorted(names.map(short)))}.")
    return "\n\n".join([f"## {title(cells, table)}", *filter(None, parts), "\n".join(lines)]) + "\n"


def table_4(runs: pd.DataFrame) -> pd.DataFrame:
    """Our improvement of SPPO over PPO by beta and noise: a row per number of Table 4, with the means of both."""
    atari = runs[(runs.family == "atari_ppo") & (runs.steps == runs.paper_steps)]
    means = atari[atari.other_settings.str.fullmatch(r"(beta \S+)?")].groupby(
        ["algorithm", "noise", "beta", "environment"]
    )
    means, rows = means.score.mean(), read_paper().query("table == 4").copy()
    rows["beta"] = rows.algorithm.str.extract(r"beta ([\d.]+)", expand=False).astype(float)
    empty = pd.Series(dtype=float)
    by = [
        (means.get(("PPO", x.noise, 0.0), empty), means.get(("SPPO", x.noise, x.beta), empty))
        for x in rows.itertuples()
    ]
    rows["both"] = [pd.concat(two, axis=1, keys=["ppo", "sppo"], join="inner") for two in by]
    return rows.assign(games=rows.both.map(len), any=[len(two[0]) + len(two[1]) > 0 for two in by])


def table_4_text(runs: pd.DataFrame, cells: pd.DataFrame) -> str | None:
    """Improvement of SPPO over PPO for each beta, and what Table 11's cells say about the paper's rule."""
    rows = table_4(runs)
    if not rows["any"].any():
        return None
    ours = [stats.improvement_text(x.ppo, x.sppo) if len(x) else "not run" for x in rows.both]
    frame = {"beta": rows.beta.map("{:g}".format), "Noise": rows.noise, "Ours": ours}
    frame = pd.DataFrame(frame | {"Games": [f"{n} of 22" for n in rows.games], "Paper": rows.printed + " %"})
    rule = []
    for noise, beta in (("none", 1.0), ("BSC(0.1)", 10.0)):
        both = cells[(cells.table == 11) & cells.in_paper & (cells.noise == noise)]
        both = both.pivot(index="environment", columns="algorithm", values="paper")
        printed = rows.printed[(rows.noise == noise) & (rows.beta == beta)].iloc[0]
        text = stats.improvement_text(both.PPO, both.SPPO)
        rule.append(f"{text} for beta {beta:g} (noise: {noise}) where Table 4 prints {printed} %")
    return (
        f"## Table 4: improvement of SPPO over PPO, alpha 0.5\n\n{stats.markdown(frame, TEXT)}\n\n- Table 4's own rule "
        "(very large improvements left out of the average) does not reproduce from Table 11's cells. They give "
        f"{'; '.join(rule)}.\n"
    )


def gains_text(cells: pd.DataFrame) -> str:
    """How far the paper's symmetric cells without noise are above each baseline that there is."""
    atari = cells[cells.family.str.startswith("atari") & (cells.noise == "none")]
    public = read_public()
    rows = []
    for symmetric, baseline in (("SPPO", "PPO"), ("SA2C", "A2C")):
        claimed = atari[atari.algorithm == symmetric].set_index("environment").paper
        own = atari[atari.algorithm == baseline].set_index("environment").paper
        compared = [("the paper's cells", "5,000,000", "5", own)]
        for name in (UNNORMALIZED, "PPO") if baseline == "PPO" else ("A2C",):
            some = atari[(atari.algorithm == name) & (atari.n > 0)].set_index("environment")
            compared.append((f"ours, {name}", "5,000,000", stats.span(some.n) if len(some) else "", some.ours))
        for (source, length), some in public[public.algorithm == baseline].groupby(["source", "length"], sort=False):
            compared.append((source, length, some.seeds.iloc[0], some.set_index("environment").score))
        for name, length, n, base in compared:
            theirs = claimed[claimed.index.isin(base.index)]
            base, texts = base.reindex(theirs.index), ["", "", ""]
            if len(theirs):
                median = f"{np.median(stats.improvements(base, theirs)):+.1f} %"
                texts = [f"{(theirs > base).sum()} of {len(theirs)}", stats.improvement_text(base, theirs), median]
            rows.append([f"{symmetric} over {baseline}", name, length, n, *texts])
    header = ["The paper's", "Baseline", "Steps", "n", "Higher in", "Average gain", "Median gain"]
    links = public.drop_duplicates("source")
    links = ", ".join("[" + links.source + "](" + links.url + ")")
    return f"{PUBLIC}{links}.\n\n{stats.markdown(pd.DataFrame(rows, columns=header), ('Baseline',))}\n"


def groups_text(runs: pd.DataFrame, cells: pd.DataFrame, kind: str) -> str | None:
    """Control runs that are shorter, longer, or at other settings: no comparison with the paper."""
    runs = runs[(runs.kind == kind) & ~runs.family.isin(TASKS)]
    if runs.empty:
        return None
    order = ["environment", "noise", "rank", "algorithm", "steps", "other_settings"]
    rows = by_group(runs, GROUP).sort_values(order, key=lambda x: x != "none" if x.name == "noise" else x)
    steps = [
        f"{x.steps:,}" + (f" of {x.paper_steps:,.0f}" if x.steps < x.paper_steps or kind == "longer" else "")
        for x in rows.itertuples()
    ]
    frame = {"Environment": rows.environment.map(short), "Algorithm": rows.algorithm, "Noise": rows.noise}
    if kind == "other":
        plan = np.where(rows.paper_steps.isna(), "not in the paper", "")
        frame |= {"Not the paper's": [", ".join(filter(None, texts)) for texts in zip(plan, rows.other_settings)]}
    frame |= {"Timesteps": steps, "Ours" if kind == "other" else f"Ours, {kind}": scores(rows), "n": rows.n}
    if kind == "other":
        frame |= {name: [last_text(folders, tag) for folders in rows.folders] for name, tag in LAST_TENTH.items()}
        return f"## Other settings\n\n{OTHER}\n\n{stats.markdown(pd.DataFrame(frame), TEXT)}\n"
    printed = cells[cells.printed.notna()].set_index(["environment", "algorithm", "noise"]).printed
    frame["Paper, full length"] = [printed.get(key, "-") for key in zip(rows.environment, rows.algorithm, rows.noise)]
    frame |= {"Public": public_texts(rows)} if kind == "longer" and rows.family.str.startswith("atari").any() else {}
    text = f"## {kind.capitalize()} than the paper\n\nThe paper's settings, but not its length: no comparison."
    return f"{text}\n\n{stats.markdown(pd.DataFrame(frame), TEXT)}\n"


def last_text(folders: list[str], tag: str) -> str:
    """Mean ± SE of a tag over the last tenth of runs; empty where they did not log it."""
    return stats.mean_text(last_tenths(folders, tag))


def copies_text(runs: pd.DataFrame) -> str | None:
    """Runs of changed copies beside those of the original of the same settings but for the weights."""
    groups = by_group(runs, GROUP).sort_values(["environment", "noise", "algorithm"], ignore_index=True)
    weights = "|".join(WEIGHTS)
    groups["alike"] = groups.other_settings.str.replace(rf"(^|, )({weights}) [^,]+", "", regex=True).str.lstrip(", ")
    changed = groups.script != groups.origin
    if not changed.any():
        return None
    key = ["origin", "family", "environment", "noise", "steps", "alike", "policy", "dataset", "reward_model"]
    both = groups[changed].merge(groups[~changed], "left", key, suffixes=("_a", "_b"))
    alone, both = both[both.n_b.isna()], both[both.n_b.notna()].copy()
    both["difference"], both["joint"] = both.ours_a - both.ours_b, np.hypot(both.se_a, both.se_b)
    intervals = [stats.difference_interval(x, y) for x, y in zip(both.scores_a, both.scores_b)]
    bounds = [
        f" [{', '.join(stats.number(x, mean) for x in i)}]" if i else "" for i, mean in zip(intervals, both.ours_a)
    ]
    name = both.algorithm_b + (", " + both.other_settings_b).where(both.other_settings_b != "", "")
    frame = {"Environment": both.environment.map(short), "Noise": both.noise, "Length": thousands(both.steps)}
    frame |= {"Copy": both.algorithm_a, "Original": name, "Copy's score": map(stats.mean_text, both.scores_a)}
    frame |= {"Original's": map(stats.mean_text, both.scores_b), "n": seeds(both.astype({"n_b": int}))}
    frame |= {"Difference": map("".join, zip(gains(both), bounds)), "Probability of improvement": chances(both)}
    frame |= {"Welch's p": [stats.p_text(stats.welch_of(*two)[1]) for two in zip(both.scores_a, both.scores_b)]}
    lines = [
        f"- {x.algorithm_a}, {short(x.environment)}, noise {x.noise}, {x.steps:,} "
        f"{'updates' if x.family in TASKS else 'steps'}: no run of {x.origin} there to compare it with."
        for x in alone.itertuples()
    ]
    parts = [stats.markdown(pd.DataFrame(frame), TEXT)] if len(both) else []
    return "\n\n".join([COPIES, *parts, *(["\n".join(lines)] if lines else [])]) + "\n"
