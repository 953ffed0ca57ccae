"""Tables of the report: the paper's as far as they were run, Table 4, published scores, other settings, copies."""

import numpy as np
import pandas as pd
import stats
from comparisons import comparison, drop_noise, modes_table, short, symmetric_of
from runs import FAMILY, GROUP, PAPER, RETURN, TASKS, UNNORMALIZED, WEIGHTS, by_group, last_tenths, read_paper

LAST_TENTH = {"Training return": RETURN, "Entropy": "losses/entropy", "Value loss": "losses/value_loss"}
KEY = ["environment", "algorithm", "noise"]
PUBLIC = """\
The paper's SPPO and SA2C cells of Tables 11 and 8 without noise (5 seeds, taken to be 5e6 steps) over baselines of
different origin. The paper's PPO cells are taken to be those of the baseline as released, which does not normalize
advantages; SPPO, CleanRL and openai/baselines do. Runs of 10,000,000 steps say nothing about SPPO at equal length.
Public scores are those of the last 100 episodes of training (openai/baselines; CleanRL, by its script's default steps:
the latest returns of its 8 games), of 100 checkpoints (SLM Lab; its A2C has n-step returns) or of the episodes of one
agent (RL Zoo). Sources, of the first two collected by openrlbenchmark: """
NOTES = {
    UNNORMALIZED: "the baseline as the authors released it; PPO is that of the paper's text",
    "DPPO control": "DPPO with its policy loss times alpha - beta Z, by the identity DSPPO: the difference is chance",
    "PPO control": "PPO with its policy loss times alpha - beta Z, by the identity SPPO: the difference is chance",
    "DA2C control": "DA2C with its policy loss times DSA2C's alpha: DSA2C without its reverse loss",
    "A2C control": "A2C with its policy loss times SA2C's alpha: SA2C without its reverse loss",
}


def title(cells: pd.DataFrame, table: int) -> str:
    printed = cells[(cells.table == table) & cells.in_paper]
    noises = list(printed.noise.unique())
    noise = "" if len(noises) > 1 else ", without noise" if noises == ["none"] else f", with noise {noises[0]}"
    domain = "Atari" if FAMILY[table].startswith("atari") else "MuJoCo and Box2D"
    return f"Table {table}: {', '.join(printed.algorithm.unique())}, {domain}{noise}"


def beside(differences: pd.Series) -> list[str]:
    """Differences in joint standard errors, and whether they exceed one."""
    return [f"{t:+.2f}, {'exceeds' if abs(t) > 1 else 'within'}" if t == t else "-" for t in differences]


def names(rows: pd.DataFrame) -> dict:
    """The first columns of a table."""
    return {"Environment": rows.environment.map(short), "Algorithm": rows.algorithm, "Noise": rows.noise}


def read_public() -> pd.DataFrame:
    """Published Atari scores of PPO and A2C, all without noise."""
    public = pd.read_csv(PAPER / "public_scores.csv").rename(columns={"mean": "score"})
    return public.assign(length=public.steps.map("{:,.0f}".format, na_action="ignore").fillna("not stated"))


def public_texts(rows: pd.DataFrame) -> list[str]:
    """What others have published for a cell."""
    texts = {}
    for x in read_public().itertuples():
        length = "steps not stated" if x.length == "not stated" else f"{x.length} steps"
        text = f"{stats.number(x.score)} ({x.source}, {length}, n {x.seeds})"
        texts.setdefault((x.environment, x.algorithm, "none"), []).append(text)
    return ["; ".join(texts.get(key, ["-"])) for key in zip(rows.environment, rows.algorithm, rows.noise)]


def coverage_table(cells: pd.DataFrame, language: pd.DataFrame, runs: pd.DataFrame) -> str:
    """Per table and noise: cells of the paper that were run, only shorter, and beyond one joint standard error."""
    shorter = runs[(runs.kind == "shorter") & ~runs.family.isin(TASKS)].drop_duplicates(KEY)[KEY]
    rows = cells[cells.in_paper].merge(shorter.assign(only_short=True), "left", KEY)
    rows = pd.concat([rows, language[language.in_paper].assign(noise="none")])
    rows["run"], rows["far"], rows["only_short"] = (
        rows.n > 0,
        rows.t.abs() > 1,
        rows.only_short.eq(True) & (rows.n == 0),
    )
    found = []
    for (table, noise), some in rows.groupby(["table", "noise"], sort=False):
        counts = [f"{some.run.sum()} of {len(some)}", some.only_short.sum(), some.far.sum()]
        found.append([table, ", ".join(some.algorithm.unique()), noise, *counts])
    betas = table_4(runs)
    found.append([4, "SPPO over PPO for five betas", "both", f"{(betas.games == 22).sum()} of {len(betas)}", 0, ""])
    header = ["Table", "Algorithms", "Noise", "Cells run", "Shorter only", "Beyond the joint SE"]
    return stats.markdown(pd.DataFrame(found, columns=header))


def cells_table(cells: pd.DataFrame, table: int) -> str:
    """One table of the paper as far as it was run, ours beside the paper's."""
    rows = cells[(cells.table == table) & (cells.n > 0)]
    frame = names(rows) | {"Ours": map(stats.mean_se, rows.ours, rows.se), "n": rows.n}
    frame |= {"Timesteps": rows.steps.map("{:,.0f}".format), "Paper": rows.printed.fillna("-")}
    frame |= {"Difference / joint SE": beside(rows.t)}
    frame |= {"Public": public_texts(rows)} if FAMILY[table].startswith("atari") else {}
    return stats.markdown(drop_noise(pd.DataFrame(frame), cells, table))


def table_text(cells: pd.DataFrame, pooled: pd.DataFrame, table: int, shorter: pd.DataFrame) -> str | None:
    """One table of the paper as far as it was run, and what follows from it; shorter: runs that are that only."""
    some = cells[cells.table == table]
    run = list(some[some.n > 0].sort_values("order").algorithm.unique())
    if not run:
        return None
    symmetric, baseline, control = symmetric_of(FAMILY[table])
    parts = [f"## {title(cells, table)}", cells_table(cells, table), comparison(pooled, table, symmetric, baseline)]
    others = [name for name in run if name not in (symmetric, baseline, control)]
    parts += [comparison(cells, table, *two) for two in ((symmetric, control), (control, baseline))]
    parts += [comparison(pooled, table, symmetric, name) for name in others]
    lines = [f"- {name}: {NOTES[name]}." for name in run if name in NOTES]
    missing = some[some.in_paper & (some.n == 0)].merge(
        shorter.drop_duplicates(KEY)[KEY], "left", KEY, indicator="only"
    )
    missing["what"] = np.where(missing.only == "both", "Shorter runs only", "Not run")
    for (what, algorithm, noise), left in missing.groupby(["what", "algorithm", "noise"]).environment:
        where = "everywhere" if len(left) == some.environment.nunique() else ", ".join(sorted(left.map(short)))
        lines.append(
            f"- {what}: {algorithm}{', noise ' + noise if FAMILY[table].startswith('atari') else ''}: {where}."
        )
    return "\n\n".join(filter(None, [*parts, modes_table(cells, table), "\n".join(lines)])) + "\n"


def table_4(runs: pd.DataFrame) -> pd.DataFrame:
    """The numbers of Table 4 by beta and noise, with our means of PPO and SPPO in the games where both were run."""
    atari = runs[(runs.family == "atari_ppo") & (runs.steps == runs.paper_steps)]
    atari = atari[atari.other_settings.str.fullmatch(r"(beta \S+)?") & atari.algorithm.isin(["PPO", "SPPO"])]
    means = atari.groupby(["algorithm", "noise", "beta", "environment"]).score.mean()
    rows, none = read_paper().query("table == 4"), pd.Series(dtype=float)
    beta = rows.algorithm.str.extract(r"beta ([\d.]+)", expand=False).astype(float)
    both = [
        pd.concat([means.get(("PPO", noise, 0.0), none), means.get(("SPPO", noise, b), none)], axis=1, join="inner")
        for noise, b in zip(rows.noise, beta)
    ]
    return rows.assign(beta=beta, both=both, games=list(map(len, both)))


def table_4_text(runs: pd.DataFrame, cells: pd.DataFrame) -> str | None:
    """Improvement of SPPO over PPO for each beta, and what Table 11's cells say about the paper's rule."""
    rows = table_4(runs)
    if not rows.games.any():
        return None
    ours = [stats.improvement_text(x.iloc[:, 0], x.iloc[:, 1]) if len(x) else "not run" for x in rows.both]
    frame = {"beta": rows.beta.map("{:g}".format), "Noise": rows.noise, "Ours": ours}
    frame |= {"Games": [f"{n} of 22" for n in rows.games], "Paper": rows.printed + " %"}
    rule = []
    for noise, beta in (("none", 1.0), ("BSC(0.1)", 10.0)):
        both = cells[(cells.table == 11) & cells.in_paper & (cells.noise == noise)]
        both = both.pivot(index="environment", columns="algorithm", values="paper")
        printed, text = rows[(rows.noise == noise) & (rows.beta == beta)], stats.improvement_text(both.PPO, both.SPPO)
        rule.append(f"{text} for beta {beta:g} (noise: {noise}) where Table 4 prints {printed.printed.iloc[0]} %")
    return (
        f"## Table 4: improvement of SPPO over PPO, alpha 0.5\n\n{stats.markdown(pd.DataFrame(frame))}\n\n- Table 4's "
        "own rule (very large improvements left out of the average) does not reproduce from Table 11's cells. They "
        f"give {'; '.join(rule)}.\n"
    )


def gains_text(cells: pd.DataFrame) -> str:
    """How far the paper's symmetric cells without noise are above each baseline that there is."""
    atari = cells[cells.family.str.startswith("atari") & (cells.noise == "none")].set_index("environment")
    public, rows = read_public(), []
    for symmetric, baseline in (("SPPO", "PPO"), ("SA2C", "A2C")):
        compared = [("the paper's cells", "5,000,000", "5", atari[atari.algorithm == baseline].paper)]
        for name in (UNNORMALIZED, "PPO") if baseline == "PPO" else ("A2C",):
            some = atari[(atari.algorithm == name) & (atari.n > 0)]
            compared.append((f"ours, {name}", "5,000,000", stats.span(some.n) if len(some) else "", some.ours))
        for (source, length), some in public[public.algorithm == baseline].groupby(["source", "length"], sort=False):
            compared.append((source, length, some.seeds.iloc[0], some.set_index("environment").score))
        for name, length, n, base in compared:
            both = pd.concat([atari[atari.algorithm == symmetric].paper, base], axis=1, keys=["s", "b"], join="inner")
            texts = ["", "", ""]
            if len(both):
                texts = [f"{(both.s > both.b).sum()} of {len(both)}", stats.improvement_text(both.b, both.s)]
                texts.append(f"{np.median(stats.improvements(both.b, both.s)):+.1f} %")
            rows.append([f"{symmetric} over {baseline}", name, length, n, *texts])
    header = ["The paper's", "Baseline", "Steps", "n", "Higher in", "Average gain", "Median gain"]
    links = ", ".join(f"[{x.source}]({x.url})" for x in public.drop_duplicates("source").itertuples())
    return f"{PUBLIC}{links}.\n\n{stats.markdown(pd.DataFrame(rows, columns=header))}\n"


def groups_text(runs: pd.DataFrame, cells: pd.DataFrame, kind: str) -> str | None:
    """Control runs that are shorter, longer, or at other settings: no comparison with the paper."""
    runs = runs[(runs.kind == kind) & ~runs.family.isin(TASKS)]
    if runs.empty:
        return None
    order = ["environment", "noise", "rank", "algorithm", "steps", "other_settings"]
    rows = by_group(runs, GROUP).sort_values(order, key=lambda x: x != "none" if x.name == "noise" else x)
    of = [
        f" of {full:,.0f}" if done < full or kind == "longer" else ""
        for done, full in zip(rows.steps, rows.paper_steps)
    ]
    ours = {
        "Timesteps": rows.steps.map("{:,}".format) + of,
        "Ours": map(stats.mean_se, rows.ours, rows.se),
        "n": rows.n,
    }
    if kind == "other":
        plan = np.where(rows.paper_steps.isna(), "not in the paper", "")
        settings = [", ".join(filter(None, texts)) for texts in zip(plan, rows.other_settings)]
        frame = names(rows) | {"Not the paper's": settings} | ours | last_texts(rows)
        note = (
            "## Other settings\n\nNot the paper's for these cells. Training return, entropy and value loss: last tenth."
        )
    else:
        printed = cells[cells.printed.notna()].set_index(KEY).printed
        keys = zip(rows.environment, rows.algorithm, rows.noise)
        frame = names(rows) | ours | {"Paper, full length": [printed.get(key, "-") for key in keys]}
        frame |= (
            {"Public": public_texts(rows)} if kind == "longer" and rows.family.str.startswith("atari").any() else {}
        )
        note = f"## {kind.capitalize()} than the paper\n\nThe paper's settings, but not its length: no comparison."
    return f"{note}\n\n{stats.markdown(pd.DataFrame(frame))}\n"


def last_texts(groups: pd.DataFrame) -> dict:
    """Training return, entropy and value loss of the last tenth; empty where runs did not log them."""
    return {
        name: [stats.mean_text(last_tenths(folders, tag)) for folders in groups.folders]
        for name, tag in LAST_TENTH.items()
    }


def copies_text(runs: pd.DataFrame) -> str | None:
    """Runs of changed copies beside those of the original of the same settings but for the weights."""
    groups = by_group(runs, GROUP).sort_values(["environment", "noise", "algorithm"], ignore_index=True)
    weights = rf"(^|, )({'|'.join(WEIGHTS)}) [^,]+"
    groups["alike"] = groups.other_settings.str.replace(weights, "", regex=True).str.lstrip(", ")
    changed = groups.script != groups.origin
    if not changed.any():
        return None
    key = ["origin", "family", "environment", "noise", "steps", "alike", "policy", "dataset", "reward_model"]
    rows, lines = [], []
    for x in groups[changed].merge(groups[~changed], "left", key, suffixes=("_a", "_b")).itertuples():
        length = f"{x.steps:,} {'updates' if x.family in TASKS else 'steps'}"
        if x.algorithm_b != x.algorithm_b:
            where = f"{short(x.environment)}, noise {x.noise}, {length}"
            lines.append(f"- {x.algorithm_a}, {where}: no run of {x.origin} there to compare it with.")
            continue
        both, (low, high) = (x.scores_a, x.scores_b), stats.difference_interval(x.scores_a, x.scores_b)
        gain = stats.gain(x.ours_a - x.ours_b, np.hypot(x.se_a, x.se_b))
        gain += f" {stats.bounds_text(low, high, x.ours_a)}"
        texts = [*map(stats.mean_text, both), f"{len(both[0])}, {len(both[1])}", gain.strip()]
        texts.append(stats.interval_text(both, stats.probability_of_improvement))
        name = ", ".join(filter(None, [x.algorithm_b, x.other_settings_b]))
        where = [short(x.environment), x.noise, f"{x.steps:,}", x.algorithm_a, name]
        rows.append([*where, *texts, stats.p_text(stats.welch_of(*both)[1])])
    header = ["Environment", "Noise", "Length", "Copy", "Original", "Copy's score", "Original's", "n", "Difference"]
    table = stats.markdown(pd.DataFrame(rows, columns=[*header, "Probability of improvement", "Welch's p"]))
    note = (
        "## Changed copies beside their originals\n\nThe same environment, noise and length. Difference: copy minus "
        "original ± SE, with the 95 % interval of Welch's t; p is not corrected for the number of rows."
    )
    return "\n\n".join(filter(None, [note, table, "\n".join(lines)])) + "\n"
