"""Tables of the report: the paper's as far as they were run, Table 4, published scores, other settings, copies."""

import numpy as np
import pandas as pd
import stats
from comparisons import chances, compare, comparison_text, modes_text, pairs, short, symmetric_of
from runs import FAMILY, GROUP, PAPER, RETURN, TASKS, UNNORMALIZED, WEIGHTS, Found, by_group, last_tenths, read_paper

LAST_TENTH = {"Training return": RETURN, "Entropy": "losses/entropy", "Value loss": "losses/value_loss"}
KEY = ["environment", "algorithm", "noise"]
OTHERS = """\
## Shorter, longer, other settings

No comparison with the paper: the length, or what is named, is not the paper's for these cells. Training return, entropy
and value loss: last tenth."""
COPIES = """\
## Changed copies beside their originals

The same environment, noise and length. Difference: copy minus original ± SE, with the 95 % interval of Welch's t; p is
not corrected for the number of rows."""


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


def public_texts(rows: pd.DataFrame) -> dict:
    """A column of what others have published for Atari cells without noise; none where there is nothing."""
    public = read_public()
    length = (public.length + " steps").replace("not stated steps", "steps not stated")
    text = (
        public.score.map(stats.number) + " (" + public.source + ", " + length + ", n " + public.seeds.astype(str) + ")"
    )
    texts = text.groupby([public.environment, public.algorithm]).agg("; ".join)
    found = texts.reindex(pd.MultiIndex.from_frame(rows[["environment", "algorithm"]])).to_numpy()
    column = pd.Series(found, rows.index).where(rows.noise == "none")
    return {"Public": column.fillna("-")} if column.notna().any() else {}


def coverage_table(found: Found, language: pd.DataFrame) -> str:
    """Per table and noise: cells of the paper that were run, and those beyond one joint standard error."""
    betas = table_4(found.runs)
    betas = betas.assign(algorithm="SPPO over PPO for five betas", noise="both", n=betas.games == 22, t=np.nan)
    rows = pd.concat([found.cells[found.cells.in_paper], language[language.in_paper].assign(noise="none"), betas])
    groups = rows.groupby(["table", "noise"], sort=False)
    frame = {"Algorithms": groups.algorithm.agg(lambda names: ", ".join(names.unique()))}
    frame |= {"Cells run": groups.n.agg(lambda n: f"{(n > 0).sum()} of {len(n)}")}
    frame |= {"Beyond the joint SE": groups.t.agg(lambda t: (t.abs() > 1).sum())}
    frame = pd.DataFrame(frame).reset_index().rename(columns={"table": "Table", "noise": "Noise"})
    return stats.markdown(frame[["Table", "Algorithms", "Noise", "Cells run", "Beyond the joint SE"]])


def table_text(found: Found, table: int) -> str | None:
    """One table of the paper as far as it was run, and what follows from it; None where none of it was run."""
    cells = found.cells[found.cells.table == table]
    run = cells[cells.n > 0]
    if run.empty:
        return None
    frame = names(run) | {"Ours": map(stats.mean_se, run.ours, run.se), "n": run.n}
    frame |= {"Timesteps": run.steps.map("{:,.0f}".format), "Paper": run.printed.fillna("-")}
    frame |= {"Difference / joint SE": beside(run.t)} | public_texts(run)
    domain = "Atari" if FAMILY[table].startswith("atari") else "MuJoCo and Box2D"
    title = f"## Table {table}: {', '.join(cells.algorithm[cells.in_paper].unique())}, {domain}"
    parts = [title, stats.markdown(pd.DataFrame(frame))]

    symmetric, baseline, control = symmetric_of(FAMILY[table])
    others = [(symmetric, name) for name in run.sort_values("order").algorithm.unique()]
    others = [two for two in others if two[1] not in (symmetric, baseline, control)]
    for two in ((symmetric, baseline), (symmetric, control), (control, baseline), *others):
        both = pairs(found.cells if control in two else found.pooled, *two)
        parts.append(comparison_text(both[both.table == table], *two))
    return "\n\n".join(filter(None, [*parts, modes_text(run)])) + "\n"


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
    both, rule = pairs(cells, "SPPO", "PPO"), []
    for noise, beta in (("none", 1.0), ("BSC(0.1)", 10.0)):
        some = both[both.noise == noise]
        printed = rows.printed[(rows.noise == noise) & (rows.beta == beta)].iloc[0]
        text = stats.improvement_text(some.paper_b, some.paper_a)
        rule.append(f"{text} for beta {beta:g} (noise: {noise}) where Table 4 prints {printed} %")
    return (
        f"## Table 4: improvement of SPPO over PPO, alpha 0.5\n\n{stats.markdown(pd.DataFrame(frame))}\n\n- Table 4's "
        "own rule (very large improvements left out of the average) does not reproduce from Table 11's cells. They "
        f"give {'; '.join(rule)}.\n"
    )


def gains_text(cells: pd.DataFrame) -> str:
    """How far the paper's symmetric cells without noise are above each baseline that there is."""
    atari = cells[cells.family.str.startswith("atari") & (cells.noise == "none")].assign(length="5,000,000")
    own = atari[atari.in_paper].assign(score=atari.paper, source="the paper's cells", seeds=atari.paper_n)
    ours = atari[atari.algorithm.isin(["PPO", UNNORMALIZED, "A2C"])]
    ours = ours.assign(score=ours.ours, source="ours, " + ours.algorithm, seeds=ours.n)
    ours["algorithm"] = ours.algorithm.replace(UNNORMALIZED, "PPO")
    public, rows = read_public(), []
    bases = pd.concat([own, ours[ours.n > 0], public])
    for symmetric, baseline in (("SPPO", "PPO"), ("SA2C", "A2C")):
        theirs = own[own.algorithm == symmetric][["environment", "score"]]
        base = bases[bases.algorithm == baseline]
        for (source, length), some in base.groupby(["source", "length"], sort=False):
            both = theirs.merge(some, on="environment", suffixes=("", "_base"))
            texts = [f"{(both.score > both.score_base).sum()} of {len(both)}"]
            texts += [stats.improvement_text(both.score_base, both.score)]
            texts += [f"{np.median(stats.improvements(both.score_base, both.score)):+.1f} %"]
            rows.append([f"{symmetric} over {baseline}", source, length, stats.span(some.seeds.astype(int)), *texts])
    header = ["The paper's", "Baseline", "Steps", "n", "Higher in", "Average gain [95 %]", "Median gain"]
    return stats.markdown(pd.DataFrame(rows, columns=header)) + "\n"


def other_groups(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per group of control runs that are shorter, longer, or at other settings, with what the paper prints."""
    groups = by_group(runs[(runs.kind != "paper") & ~runs.family.isin(TASKS)], GROUP)
    printed = read_paper().query("table in @FAMILY")[[*KEY, "printed"]]
    groups = groups.merge(printed, "left", KEY, validate="m:1").assign(noisy=groups.noise != "none")
    groups["printed"] = groups.printed.where(groups.kind != "other")
    order = ["environment", "noisy", "noise", "rank", "algorithm", "steps", "other_settings"]
    return groups.sort_values(order, ignore_index=True)


def settings_table(groups: pd.DataFrame) -> str:
    """Groups of runs that stand beside no cell of the paper, with means of the last tenth; empty where not logged."""
    plan = np.where(groups.paper_steps.isna(), "not in the paper", "")
    settings = [", ".join(filter(None, texts)) for texts in zip(plan, groups.other_settings)]
    full = (" of " + groups.paper_steps.map("{:,.0f}".format)).where(groups.steps != groups.paper_steps, "")
    frame = names(groups) | {"Not the paper's": settings, "n": groups.n}
    frame |= {"Timesteps": groups.steps.map("{:,}".format) + full.where(groups.paper_steps.notna(), "")}
    frame |= {"Ours": map(stats.mean_se, groups.ours, groups.se), "Paper, full length": groups.printed.fillna("-")}
    for name, tag in LAST_TENTH.items():
        frame[name] = [stats.mean_text(last_tenths(folders, tag)) for folders in groups.folders]
    return stats.markdown(pd.DataFrame(frame | public_texts(groups)))


def other_text(runs: pd.DataFrame) -> str | None:
    groups = other_groups(runs)
    return f"{OTHERS}\n\n{settings_table(groups)}\n" if len(groups) else None


def copies_text(runs: pd.DataFrame) -> str | None:
    """Runs of changed copies beside those of the original of the same settings but for the weights."""
    groups = by_group(runs, GROUP).sort_values(["environment", "noise", "algorithm"], ignore_index=True)
    weights = rf"(^|, )({'|'.join(WEIGHTS)}) [^,]+"
    groups["alike"] = groups.other_settings.str.replace(weights, "", regex=True).str.lstrip(", ")
    changed = groups.script != groups.origin
    if not changed.any():
        return None
    key = ["origin", "family", "environment", "noise", "steps", "alike", "policy", "dataset", "reward_model"]
    both = groups[changed].merge(groups[~changed], "left", key, suffixes=("_a", "_b"))
    alone, both = both[both.algorithm_b.isna()], compare(both[both.algorithm_b.notna()])
    originals = both.algorithm_b + (", " + both.other_settings_b).where(both.other_settings_b != "", "")
    frame = {"Environment": both.environment.map(short), "Noise": both.noise, "Length": both.steps.map("{:,}".format)}
    frame |= {"Copy": both.algorithm_a, "Original": originals}
    frame |= {"Copy's score": map(stats.mean_se, both.ours_a, both.se_a)}
    frame |= {"Original's": map(stats.mean_se, both.ours_b, both.se_b)}
    frame |= {"n": [f"{len(a)}, {len(b)}" for a, b in zip(both.scores_a, both.scores_b)]}
    intervals = [stats.difference_interval(a, b) for a, b in zip(both.scores_a, both.scores_b)]
    texts = [f"{gain} {stats.bounds_text(*x, like)}" for gain, x, like in zip(both.gain, intervals, both.ours_a)]
    frame |= {"Difference": [text.strip() for text in texts], "Probability of improvement": chances(both)}
    frame |= {"Welch's p": both.p.map(stats.p_text)}
    lines = [
        f"- {x.algorithm_a}, {short(x.environment)}, noise {x.noise}, {x.steps:,} "
        f"{'updates' if x.family in TASKS else 'steps'}: no run of {x.origin} there to compare it with."
        for x in alone.itertuples()
    ]
    return "\n\n".join(filter(None, [COPIES, stats.markdown(pd.DataFrame(frame)), "\n".join(lines)])) + "\n"
