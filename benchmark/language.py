"""Tables 3 and 14, and all language runs before and after training."""

import pandas as pd
import stats
from runs import GROUP, MODELS, PAPER_SEEDS, TASKS, by_group, read_judgments, read_paper, series
from tables import beside

KEY = ["environment", "algorithm", "metric"]
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


def measured(runs: pd.DataFrame) -> pd.DataFrame:
    """Scores over seeds of every (environment, algorithm, metric) at full length, and of the initial policies."""
    runs = runs[runs.family.isin(TASKS) & (runs.kind != "other")].sort_values("seed", kind="stable")
    some = runs[runs.kind == "paper"]
    judged = read_judgments(some.folder)
    judged = judged[(judged.against == "reference") & (judged.judge == JUDGE[0]) & (judged.samples == JUDGE[1])]
    ppo, first = some[some.algorithm == "PPO"], runs.drop_duplicates(["environment", "seed"], keep="last")
    tldr = ppo[ppo.environment == "TL;DR"]
    initial = first.environment.map({"IMDB": "SFT"}).fillna("initial policy")  # all algorithms begin alike
    parts = [(some, some.algorithm, "win_rate", some.folder.map(judged.set_index("folder").percent))]
    parts.append((ppo, "PPO (with A normalization)", "rm_score", ppo.score))
    for metric, name in (("rm_score", "score"), ("perplexity", "perplexity")):
        parts.append((some, some.algorithm, metric, some.get(name)))
        parts.append((first, initial, metric, first.get(f"before_{name}")))
        sft = [series(folder, f"eval/{name}").get(SFT_UPDATES) for folder in tldr.folder]
        parts.append((tldr, "SFT", metric, sft))
    header = [*KEY, "value"]
    frames = [pd.DataFrame(dict(zip(header, (rows.environment, *rest)))).dropna() for rows, *rest in parts]
    found = pd.concat(frames).groupby(KEY, sort=False).value.agg(list).rename("scores").reset_index()
    found[["ours", "se", "n"]] = pd.DataFrame(map(stats.summary, found.scores), found.index, [0, 1, 2], dtype=float)
    return found


def language_cells(runs: pd.DataFrame) -> pd.DataFrame:
    """Rows of Tables 3 and 14 beside the paper's; what the paper has not comes first in its task, in Table 3."""
    paper = read_paper().query("table in [3, 14]").drop(columns="noise").assign(in_paper=True)
    ours = measured(runs)
    extra = ours[~ours.algorithm.isin(paper.algorithm)][KEY].assign(table=3, in_paper=False)
    cells = pd.concat([extra, paper]).merge(ours, "left", KEY)
    cells["n"] = cells.n.fillna(0).astype(int)
    cells["t"] = stats.welch(cells.ours, cells.se, cells.n, cells.paper, cells.paper_se, PAPER_SEEDS["rlhf"])[0]
    return cells.sort_values(["table", "environment"], kind="stable", ignore_index=True)


def language_table(cells: pd.DataFrame, table: int) -> str | None:
    """Table 3 or 14 as far as it was run; None where none of it was."""
    rows = cells[(cells.table == table) & (cells.n > 0)]
    if not rows.in_paper.any():
        return None
    labels = [LABELS.get(key, key[1]) for key in zip(rows.environment, rows.algorithm)]
    frame = {"Task": rows.environment, "Algorithm": labels, "Metric": rows.metric.map(METRICS)}
    frame |= {"Ours": map(stats.mean_se, rows.ours, rows.se), "n": rows.n, "Paper": rows.printed.fillna("-")}
    frame |= {"Difference / joint SE": beside(rows.t)}
    note = f"\n{NOTE}\n" if table == 3 else ""
    return f"## Table {table}: {TITLES[table]}\n\n{stats.markdown(pd.DataFrame(frame))}\n{note}"


def change(some: pd.DataFrame, name: str) -> str:
    """A metric before and after training; shares in percent."""
    factor = 100 if name.endswith("wins") or name.startswith("rouge") else 1
    names = [name] if name in FIXED else [f"before_{name}", name]
    values = [factor * some[column].dropna() for column in names if column in some]
    return " → ".join(stats.mean_text(x) for x in values if len(x)) or "-"


def language_text(runs: pd.DataFrame) -> str:
    """All language runs, the paper's settings or not, with what the reward model gives to other texts."""
    runs = runs[runs.family.isin(TASKS)].sort_values("seed", kind="stable")
    order, text = ["rank", "algorithm", "steps", "other_settings"], [BEFORE_AFTER]
    for (task, *models), some in runs.groupby(["environment", *MODELS]):
        groups = by_group(some, GROUP).sort_values(order, ignore_index=True)
        full = (" of " + groups.paper_steps.map("{:.0f}".format)).where(groups.steps < groups.paper_steps, "")
        names = {"Algorithm": groups.algorithm, "Not the paper's": groups.other_settings}
        names |= {"Updates": groups.steps.astype(str) + full, "n": groups.n}
        alike = [some[some.folder.isin(folders)] for folders in groups.folders]
        text.append("### {}: policy `{}`, data set `{}`, reward model `{}`\n".format(task, *models))
        for columns in (RESULT, OTHERS):
            texts = {label: [change(rows, name) for rows in alike] for label, name in columns.items()}
            texts = {label: column for label, column in texts.items() if task == "TL;DR" or "ROUGE" not in label}
            text.append(stats.markdown(pd.DataFrame(names | texts)) + "\n")
    judged, rows = runs.merge(read_judgments(runs.folder), on="folder"), []
    key = ["environment", "policy", "algorithm", "other_settings", "steps", "against", "judge", "samples"]
    for group, some in judged.groupby(key):
        rows.append([*group, stats.mean_text(some.percent), len(some)])
    header = ["Task", "Policy", "Algorithm", "Not the paper's", "Updates", "Against", "Judge", "Samples"]
    frame = pd.DataFrame(rows, columns=[*header, "Win rate (%)", "n"])
    return "\n".join(text) + (f"\n### Win rates\n\n{stats.markdown(frame)}\n" if rows else "")
