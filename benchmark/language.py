"""Tables 3 and 14, and all language runs before and after training."""

import pandas as pd
import stats
from runs import GROUP, MODELS, PAPER_SEEDS, TASKS, by_group, read_judgments, read_paper, series
from tables import beside

SFT_UPDATES = 10  # the SFT row of TL;DR is the policy after these (Section 5.3)
JUDGE = ("gpt-4-turbo-2024-04-09", 100)  # the paper's, and the samples that it is taken to have judged
METRICS = {"rm_score": "score", "perplexity": "perplexity", "win_rate": "win rate (%)"}
LABELS = {("IMDB", "SFT"): "initial policy", ("TL;DR", "SFT"): f"PPO after {SFT_UPDATES} updates"}
TITLES = {3: "language models", 14: "PPO without and with advantage normalization, language models"}
RESULT = {"Score": "score", "Perplexity": "perplexity", "KL": "kl", **{f"ROUGE-{x}": f"rouge{x}" for x in "12L"}}
OTHERS = {"References": "score_reference", "Empty": "score_empty", "Cut in half": "score_truncated"}
OTHERS |= {"Empty wins (%)": "empty_wins", "Cut in half wins (%)": "truncated_wins"}
FIXED = ("kl", "score_reference", "score_empty")  # the same before and after
NOTE = f"""\
- Beside the paper's SFT: of IMDB the initial policy; of TL;DR the policy after {SFT_UPDATES} updates (Section 5.3),
  which does not say whether of PPO or SPPO: here of PPO.
- Win rates stand here if {JUDGE[0]} judged {JUDGE[1]} samples against the references."""
BEFORE_AFTER = """\
## Language runs

Before → after training; KL is `objective/kl` of the last tenth. Below each table, what the reward model gives to texts
other than the policy's: the references, nothing at all (IMDB: the prompt alone), and the policy's response cut in half;
"wins" is how often such a text scores above the policy's whole response (compare Figure 1 and Table 15).
"""


def measured(runs: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Scores over seeds of every (environment, algorithm, metric) of a kind of runs, and of the initial policies."""
    runs = runs[runs.family.isin(TASKS) & (runs.kind != "other")].sort_values("seed", kind="stable")
    some = runs[runs.kind == kind]
    judged = read_judgments(some.folder)
    judged = judged[(judged.against == "reference") & (judged.judge == JUDGE[0]) & (judged.samples == JUDGE[1])]
    ppo, first = some[some.algorithm == "PPO"], runs.drop_duplicates(["environment", "seed"], keep="last")
    tldr = ppo[ppo.environment == "TL;DR"]
    parts = [(some, some.algorithm, "win_rate", some.folder.map(judged.set_index("folder").percent))]
    parts.append((ppo, "PPO (with A normalization)", "rm_score", ppo.score))
    for metric, name in (("rm_score", "score"), ("perplexity", "perplexity")):
        parts.append((some, some.algorithm, metric, some.get(name)))
        initial = first.environment.map({"IMDB": "SFT"}).fillna("initial policy")  # all algorithms begin alike
        parts.append((first, initial, metric, first.get(f"before_{name}")))
        sft = [series(folder, f"eval/{name}").get(SFT_UPDATES) for folder in tldr.folder]
        parts.append((tldr, "SFT", metric, sft))
    header = ["environment", "algorithm", "metric", "value"]
    frames = [pd.DataFrame(dict(zip(header, (rows.environment, *rest)))).dropna() for rows, *rest in parts]
    found = pd.concat(frames).groupby(header[:3], sort=False).value.agg(list).rename("scores").reset_index()
    found[["ours", "se", "n"]] = pd.DataFrame(map(stats.summary, found.scores), found.index, [0, 1, 2], dtype=float)
    return found


def language_cells(runs: pd.DataFrame) -> pd.DataFrame:
    """Rows of Tables 3 and 14 beside the paper's; what the paper has not comes first in its task, in Table 3."""
    paper = read_paper().query("table in [3, 14]").drop(columns="noise").assign(in_paper=True)
    key = ["environment", "algorithm", "metric"]
    ours, shorter = (measured(runs, kind) for kind in ("paper", "shorter"))
    extra = ours[~ours.algorithm.isin(paper.algorithm)][key].assign(table=3, in_paper=False)
    cells = pd.concat([extra, paper]).merge(ours, "left", key)
    cells = cells.merge(shorter[key].assign(only_short=True), "left", key)
    cells["n"] = cells.n.fillna(0).astype(int)
    cells["t"] = stats.welch(cells.ours, cells.se, cells.n, cells.paper, cells.paper_se, PAPER_SEEDS["rlhf"])[0]
    return cells.sort_values(["table", "environment"], kind="stable", ignore_index=True)


def language_table(cells: pd.DataFrame, table: int) -> str | None:
    """Table 3 or 14 as far as it was run; None where none of it was."""
    cells = cells[cells.table == table].copy()
    cells["label"] = [LABELS.get((x.environment, x.algorithm), x.algorithm) for x in cells.itertuples()]
    rows, missing = cells[cells.n > 0], cells[cells.n == 0]
    if not rows.in_paper.any():
        return None
    frame = {
        "Task": rows.environment,
        "Algorithm": rows.label,
        "Metric": rows.metric.map(METRICS),
        "Ours": map(stats.mean_se, rows.ours, rows.se),
    }
    frame |= {"n": rows.n, "Paper": rows.printed.fillna("-"), "Difference / joint SE": beside(rows.t)}
    lines = [f"- Not run: {task}, {label}: {', '.join(sorted(some.map(METRICS)))}."
             for (task, label), some in missing.groupby(["environment", "label"]).metric]  # fmt: skip
    lines = [NOTE, *lines] if table == 3 else lines
    text = [f"## Table {table}: {TITLES[table]}", stats.markdown(pd.DataFrame(frame)), "\n".join(lines)]
    return "\n\n".join(text) + "\n"


def change(some: pd.DataFrame, name: str) -> str:
    """A metric before and after training; shares in percent."""
    factor = 100 if name.endswith("wins") or name.startswith("rouge") else 1
    names = [name] if name in FIXED else [f"before_{name}", name]
    values = [factor * some[column].dropna() for column in names if column in some]
    return " → ".join(stats.mean_text(x) for x in values if len(x)) or "-"


def language_text(runs: pd.DataFrame) -> str:
    """All language runs, the paper's settings or not, with what the reward model gives to other texts."""
    rows = runs[runs.family.isin(TASKS)].sort_values("seed", kind="stable")
    text = [BEFORE_AFTER]
    for (task, *models), some in rows.groupby(["environment", *MODELS]):
        title = "policy `{}`, data set `{}`, reward model `{}`".format(*models)
        groups = by_group(some, GROUP).sort_values(["rank", "algorithm", "steps", "other_settings"], ignore_index=True)
        updates = groups.steps.astype(str) + " of " + groups.paper_steps.astype(int).astype(str)
        updates = updates.where(groups.steps < groups.paper_steps, groups.steps.astype(str))
        names = {
            "Algorithm": groups.algorithm,
            "Not the paper's": groups.other_settings,
            "Updates": updates,
            "n": groups.n,
        }
        alike = [some[some.folder.isin(folders)] for folders in groups.folders]
        text.append(f"### {task}: {title}\n")
        for columns in (RESULT, OTHERS):
            texts = {label: [change(rows, name) for rows in alike] for label, name in columns.items()}
            if task != "TL;DR":
                texts = {label: column for label, column in texts.items() if not label.startswith("ROUGE")}
            text.append(stats.markdown(pd.DataFrame(names | texts)) + "\n")
        for group, number in zip(groups.itertuples(), updates):
            name = ", ".join(filter(None, [group.algorithm, group.other_settings]))
            for (against, judge, samples), judged in read_judgments(group.folders).groupby(
                ["against", "judge", "samples"]
            ):
                against = "the references" if against == "reference" else against
                text.append(
                    f"- Win rate of {name}, {number} updates, against {against}: {stats.mean_text(judged.percent)} % "
                    f"(n {len(judged)}), {samples} samples judged by {judge}."
                )
    return "\n".join(text) + "\n"
