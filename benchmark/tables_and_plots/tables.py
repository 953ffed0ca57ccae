"""The tables of the report."""

import math
from collections import defaultdict

import numpy as np

from .cells import (
    BASELINES,
    LANGUAGE_TABLES,
    PARTS,
    TABLES,
    UNNORMALIZED,
    Cell,
    Group,
    LanguageGroup,
    planned,
    read_public,
    short_name,
)
from .comparisons import comparison_table, control_table, modes_table
from .runs import JUDGE, SFT_UPDATES, Results, Runs, language_cells, read_curve
from .scores import (
    count_wins,
    format_difference,
    format_improvement,
    format_interval,
    format_mean,
    format_number,
    improvements,
    interquartile_mean,
    joint_difference,
    markdown_table,
    probability_of_improvement,
    standard_error,
)

PRINTED_WINS = {(8, "none"): 12, (8, "BSC(0.1)"): 15, (11, "none"): 16, (11, "BSC(0.1)"): 19}
ATARI = {11: ("PPO", "SPPO"), 8: ("A2C", "SA2C")}
METRICS = {"rm_score": "score", "perplexity": "perplexity", "win_rate": "win rate (%)"}


def sort_key(group: Group) -> tuple:
    order = (UNNORMALIZED, "PPO", "A2C", "DPPO", "DA2C", "SPPO", "SA2C", "DSPPO", "DSA2C")
    rank = order.index(group.algorithm) if group.algorithm in order else len(order)
    return group.environment, group.noise != "none", rank, group.algorithm, group.timesteps, str(group)


def table_title(table: int, cells: dict) -> str:
    algorithms = list(dict.fromkeys(algorithm for _, algorithm, _ in cells))
    noises = list(dict.fromkeys(noise for *_, noise in cells))
    noise = "without noise" if noises == ["none"] else f"with noise {noises[0]}" if len(noises) == 1 else ""
    domain = "Atari" if table in (8, 11) else "MuJoCo and Box2D"
    return ", ".join(filter(None, [f"Table {table}: {', '.join(algorithms)}", domain, noise]))


def overview_section(paper: dict, results: Results, shorter: set, table_4_run: bool) -> str:
    ours = results.paper_cells()
    rows = []
    for table in TABLES:
        for noise in dict.fromkeys(noise for *_, noise in paper[table]):
            cells = {key: cell for key, cell in paper[table].items() if key[2] == noise}
            values = [(ours[key][1].values, cell) for key, cell in cells.items() if key in ours]
            differences = [joint_difference(v.mean(), standard_error(v), cell) for v, cell in values]
            algorithms = ", ".join(dict.fromkeys(algorithm for _, algorithm, _ in cells))
            counts = [f"{len(values)} of {len(cells)}", str(len(shorter & cells.keys() - ours.keys()))]
            rows.append([str(table), algorithms, noise, *counts, str(sum(abs(d) > 1 for d in differences))])
    full, short = (language_cells(results, kind) for kind in ("paper", "shorter"))
    for table in LANGUAGE_TABLES:
        cells = paper[table]
        values = [(full[key], cell) for key, cell in cells.items() if key in full]
        differences = [joint_difference(v.mean(), standard_error(v), cell) for v, cell in values]
        counts = [f"{len(values)} of {len(cells)}", str(len(short.keys() & cells.keys() - full.keys()))]
        algorithms = ", ".join(dict.fromkeys(algorithm for _, algorithm, _ in cells))
        rows.append([str(table), algorithms, "none", *counts, str(sum(abs(d) > 1 for d in differences))])
    header = ["Table", "Algorithms", "Noise", "Cells run", "Shorter only", "Beyond the joint SE"]
    table = markdown_table(header, rows, right="Table|Cells run|Shorter only|Beyond the joint SE")
    parts = "; ".join(f"Table {part} is a part of Table {whole}" for part, whole in PARTS.items())
    table_4 = "" if table_4_run else " No cell of Table 4 was run."
    return f"## Cells that were run\n\n{table}\n\n{parts}.{table_4}\n"


def paper_cell(cells: dict, key: tuple[str, str, str]) -> Cell | None:
    """The cell beside which a row stands; that of PPO has two rows, with and without advantage normalization."""
    environment, algorithm, noise = key
    return cells.get((environment, "PPO" if algorithm == UNNORMALIZED else algorithm, noise))


def row_keys(table: int, cells: dict, ours: dict) -> list[tuple[str, str, str]]:
    """What was run of a table: its cells, and after those of each environment and noise what the paper has not."""
    keys = []
    for environment, noise in dict.fromkeys((environment, noise) for environment, _, noise in cells):
        keys += [key for key in cells if key[0::2] == (environment, noise) and key in ours]
        others = [group for key, (group, _) in ours.items() if key[0::2] == (environment, noise) and key not in cells]
        keys += [group.cell for group in sorted(others, key=sort_key) if group.family == TABLES[table]]
    return keys


def cells_table(table: int, cells: dict, ours: dict) -> str:
    """One table of the paper as far as it was run, ours beside the paper's."""
    names = 2 if len({noise for *_, noise in cells}) == 1 else 3  # the title has the noise
    rows = []
    for key in row_keys(table, cells, ours):
        group, runs = ours[key]
        cell = paper_cell(cells, key)
        mean, se = runs.values.mean(), standard_error(runs.values)
        difference = format_difference(joint_difference(mean, se, cell) if cell else math.nan)
        texts = [format_mean(runs.values), str(len(runs.values)), f"{group.timesteps:,}", str(cell or "-"), difference]
        rows.append([*group.columns[:names], *texts] + [public_text(*key)] * (table in ATARI))
    header = ["Environment", "Algorithm", "Noise"][:names]
    header += ["Ours", "n", "Timesteps", "Paper", "Difference / joint SE"] + ["Public"] * (table in ATARI)
    return markdown_table(header, rows, right="Ours|n|Timesteps|Paper")


def table_section(table: int, paper: dict, ours: dict, shorter: set) -> str:
    """One table of the paper as far as it was run, and what follows from its cells."""
    cells = paper[table]
    names = 2 if len({noise for *_, noise in cells}) == 1 else 3
    keys = row_keys(table, cells, ours)
    text = [f"## {table_title(table, cells)}", "", cells_table(table, cells, ours), ""]
    for made in (comparison_table, control_table, modes_table):
        if more := made(table, paper, ours):
            text += [more, ""]
    for noise in dict.fromkeys(noise for *_, noise in cells):
        text += noise_summary(table, cells, ours, noise)
    text += explanations(table, keys)

    missing = defaultdict(list)
    for environment, algorithm, noise in cells.keys() - ours.keys():
        what = "Shorter runs only" if (environment, algorithm, noise) in shorter else "Not run"
        missing[what, algorithm if names == 2 else f"{algorithm}, noise {noise}"].append(short_name(environment))
    per_column = len(cells) // len({key[1:] for key in cells})
    for (what, column), environments in sorted(missing.items()):
        where = "everywhere" if len(environments) == per_column else ", ".join(sorted(environments))
        text.append(f"- {what}: {column}: {where}.")
    return "\n".join(text) + "\n"


def public_text(environment: str, algorithm: str, noise: str) -> str:
    """What others have published for a cell; all of it is without noise, and PPO with advantage normalization."""
    same = [p for p in read_public() if noise == "none" and p.algorithm == algorithm and environment in p.means]
    texts = [f"{format_number(p.means[environment])} ({p.source}, {p.steps_text}, n {p.seeds})" for p in same]
    return "; ".join(texts) or "-"


def gains_text(paper: dict, ours: dict) -> str:
    """How far the paper's symmetric cells without noise are above each baseline that there is."""
    rows = []
    for table, (baseline, symmetric) in ATARI.items():
        cells = {e: cell for (e, a, noise), cell in paper[table].items() if (a, noise) == (symmetric, "none")}
        compared = [("the paper's cells", "5,000,000", "5", {e: paper[table][e, baseline, "none"].mean for e in cells})]
        for name in (UNNORMALIZED, "PPO") if baseline == "PPO" else ("A2C",):
            runs = {e: ours[e, name, "none"][1].values for e in cells if (e, name, "none") in ours}
            seeds = sorted({len(values) for values in runs.values()})
            means = {e: values.mean() for e, values in runs.items()}
            compared.append((f"ours, {name}", "5,000,000", " to ".join(map(str, seeds[:1] + seeds[1:][-1:])), means))
        compared += [
            (p.source, f"{p.steps:,}" if p.steps else "not stated", str(p.seeds), p.means)
            for p in read_public()
            if p.algorithm == baseline
        ]
        for name, steps, seeds, means in compared:
            pairs = [(means[e], cell.mean) for e, cell in cells.items() if e in means]
            texts = ["", "", ""]
            if pairs:
                median = f"{np.median(improvements(pairs)):+.1f} %"
                texts = [f"{count_wins(pairs)} of {len(pairs)}", format_improvement(pairs), median]
            rows.append([f"{symmetric} over {baseline}", name, steps, seeds, *texts])
    header = ["The paper's", "Baseline", "Steps", "n", "Higher in", "Average gain", "Median gain"]
    links = ", ".join(f"[{source}]({url})" for source, url in {p.source: p.url for p in read_public()}.items())
    return f"""\
The paper's SPPO and SA2C cells of Tables 11 and 8 without noise (5 seeds, taken to be 5e6 steps) over baselines of
different origin. The paper's PPO cells are taken to be those of the baseline as released, which does not normalize
advantages; SPPO, CleanRL and openai/baselines do. Runs of 10,000,000 steps say nothing about SPPO at equal length.
Public scores are those of the last 100 episodes of training (openai/baselines; CleanRL, by its script's default steps:
the latest returns of its 8 games), of 100 checkpoints (SLM Lab; its A2C has n-step returns) or of the episodes of one
agent (RL Zoo). Sources, of the first two collected by openrlbenchmark: {links}.

{markdown_table(header, rows, right="|".join(header[2:]))}
"""


def explanations(table: int, keys: list[tuple[str, str, str]]) -> list[str]:
    """Of rows that need it, as bullets."""
    text, algorithms = [], dict.fromkeys(algorithm for _, algorithm, _ in keys)
    gammas = {p.environment: p.settings["gamma"] for key, p in planned().items() if key[0] == TABLES[table]}
    for environment in dict.fromkeys(environment for environment, *_ in keys):
        if gammas[environment] != 0.99:
            text.append(
                f"- {environment}: the rows beside the paper's cells have gamma {gammas[environment]}, which the "
                "authors' files have and the paper does not name; those with gamma 0.99 say so."
            )
    if UNNORMALIZED in algorithms:
        text.append(f"- {UNNORMALIZED} is the baseline as the authors released it, PPO is that of the paper's text.")
    for control in (algorithm for algorithm in algorithms if algorithm.endswith(" control")):
        factor = "alpha" if "A2C" in control else "alpha - beta Z"
        text.append(
            f"- {control}: the symmetric algorithm without its reverse loss, its policy loss times the {factor} of the "
            "symmetric row (--beta 0; docs/paper-notes.md says why)."
        )
    return text


def noise_summary(table: int, cells: dict, ours: dict, noise: str) -> list[str]:
    """Wins, improvement and pairs of algorithms of one table and noise, ours beside the paper's, as bullets."""
    algorithms = list(dict.fromkeys(algorithm for _, algorithm, _ in cells))
    symmetric = algorithms[-1]
    baseline = BASELINES[symmetric]
    environments = [e for e in dict.fromkeys(e for e, *_ in cells) if (e, symmetric, noise) in cells]
    paper_pairs = {e: (cells[e, baseline, noise].mean, cells[e, symmetric, noise].mean) for e in environments}
    both = [e for e in environments if (e, baseline, noise) in ours and (e, symmetric, noise) in ours]
    prefix = "" if noise == "none" or table not in (8, 11) else f"Noise {noise}: "
    text = []
    if both:
        our_pairs = [tuple(ours[e, a, noise][1].values.mean() for a in (baseline, symmetric)) for e in both]
        same_pairs = [paper_pairs[e] for e in both]
        all_pairs = list(paper_pairs.values())
        recomputed, printed = count_wins(all_pairs), PRINTED_WINS.get((table, noise))
        misprint = f" (the paper prints {printed})" if printed not in (None, recomputed) else ""
        wins, improvement = count_wins(same_pairs), format_improvement(same_pairs)
        these, everywhere = f" in {wins} of these", f" {improvement} in these environments"
        if len(both) < len(environments):
            these, everywhere = f"{these} and in", f"{everywhere},"
        else:
            these, everywhere = " in", ""
        text += [
            f"- {prefix}{symmetric} has the higher mean than {baseline} in {count_wins(our_pairs)} of {len(both)} "
            f"environments; in the paper's cells{these} {recomputed} of all {len(all_pairs)}{misprint}.",
            f"- {prefix}Average improvement of {symmetric} over {baseline}: {format_improvement(our_pairs)}; "
            f"the paper's cells:{everywhere} {format_improvement(all_pairs)} in all {len(all_pairs)}.",
        ]
    others = [algorithm for _, algorithm, n in row_keys(table, cells, ours) if n == noise]
    for other in dict.fromkeys([*algorithms[:-1], *others]):
        common = [e for e in environments if (e, other, noise) in ours and (e, symmetric, noise) in ours]
        if other == symmetric or not common:
            continue
        samples = [[ours[e, a, noise][1].values for e in common] for a in (symmetric, other)]
        unit = [cells[e, baseline, noise].mean for e in common]
        means = [format_interval([s / u for s, u in zip(own, unit)], interquartile_mean) for own in samples]
        text.append(
            f"- {prefix}{symmetric} and {other}, {len(common)} environment{'s' * (len(common) > 1)}: interquartile "
            f"mean of score / the paper's {baseline} cell {means[0]} and {means[1]}; probability of improvement "
            f"{format_interval(samples[0] + samples[1], probability_of_improvement)}."
        )
    return text


def table_4_means(results: Results) -> dict[tuple[float | None, str], dict[str, float]]:
    """{(beta or None for PPO, noise): {environment: mean}} of our runs."""
    ours = defaultdict(dict)
    for group, runs in results.groups.items():
        differences = dict(group.differences)
        if group.family != "atari_ppo" or group.timesteps != group.paper_timesteps:
            continue
        if group.algorithm == "PPO" and not differences:
            ours[None, group.noise][group.environment] = runs.values.mean()
        elif group.algorithm == "SPPO" and differences.keys() <= {"beta"}:
            plan = planned()["atari_ppo", group.environment, "SPPO", group.noise]
            beta = differences.get("beta", plan.settings["beta"])
            ours[beta, group.noise][group.environment] = runs.values.mean()
    return ours


def table_4_section(paper: dict, results: Results) -> str | None:
    """Improvement of SPPO over PPO for each beta, and what Table 11's cells say about the paper's rule."""
    ours = table_4_means(results)
    rows = []
    for (_, algorithm, noise), cell in paper[4].items():
        beta = float(algorithm.removeprefix("SPPO (beta ").removesuffix(")"))
        both = sorted(ours[None, noise].keys() & ours[beta, noise].keys())
        pairs = [(ours[None, noise][e], ours[beta, noise][e]) for e in both]
        text = format_improvement(pairs) if pairs else "not run"
        rows.append([f"{beta:g}", noise, text, f"{len(both)} of 22", f"{cell} %"])
    if not any(ours.values()):
        return None
    rule = []
    for noise, beta in (("none", 1.0), ("BSC(0.1)", 10.0)):
        environments = [e for e, a, n in paper[11] if (a, n) == ("PPO", noise)]
        pairs = [(paper[11][e, "PPO", noise].mean, paper[11][e, "SPPO", noise].mean) for e in environments]
        printed = paper[4]["22 Atari games", f"SPPO (beta {beta})", noise]
        rule.append(f"{format_improvement(pairs)} for beta {beta:g} (noise: {noise}) where Table 4 prints {printed} %")
    header = ["beta", "Noise", "Ours", "Games", "Paper"]
    return "\n".join(
        [
            "## Table 4: improvement of SPPO over PPO, alpha 0.5",
            "",
            markdown_table(header, rows, right="beta|Games|Paper"),
            "",
            "- Table 4's own rule (very large improvements left out of the average) does not reproduce from Table 11's "
            f"cells. They give {'; '.join(rule)}.",
            "",
        ]
    )


def length_section(kind: str, paper: dict, groups: dict[Group, Runs]) -> str:
    """Shorter or longer runs at the paper's settings."""
    cells = {key: cell for table in TABLES for key, cell in paper[table].items()}
    atari = any("atari" in group.family for group in groups)
    rows = []
    for group in sorted(groups, key=sort_key):
        values, cell = groups[group].values, paper_cell(cells, group.cell)
        steps = f"{group.timesteps:,} of {group.paper_timesteps:,}"
        rows.append([*group.columns, steps, format_mean(values), str(len(values)), str(cell or "-")])
        if atari and kind == "longer":
            rows[-1].append(public_text(*group.cell))
    header = ["Environment", "Algorithm", "Noise", "Timesteps", f"Ours, {kind}", "n", "Paper, full length"]
    text = [
        f"## {kind.capitalize()} than the paper",
        "",
        "The paper's settings, but not its length: no comparison.",
        "",
    ]
    if atari and kind == "longer":
        header.append("Public")
    return "\n".join([*text, markdown_table(header, rows, right="|".join(header[3:7])), ""])


def other_section(groups: dict[Group, Runs]) -> str:
    rows = []
    for group in sorted(groups, key=sort_key):
        values = groups[group].values
        steps = f"{group.timesteps:,}"
        if group.paper_timesteps and group.timesteps < group.paper_timesteps:
            steps += f" of {group.paper_timesteps:,}"
        rows.append([*group.columns, group.difference_text(), steps, format_mean(values), str(len(values))])
    header = ["Environment", "Algorithm", "Noise", "Not the paper's", "Timesteps", "Ours", "n"]
    table = markdown_table(header, rows, right="Timesteps|Ours|n")
    return f"## Other settings\n\nNot the paper's for these cells, so they are in no table above.\n\n{table}\n"


def language_table_section(table: int, paper: dict, ours: dict) -> str:
    """Table 3 or 14 as far as it was run."""
    cells = paper[table]
    title = {3: "language models", 14: "PPO without and with advantage normalization, language models"}[table]
    labels = {("IMDB", "SFT"): "initial policy", ("TL;DR", "SFT"): f"PPO after {SFT_UPDATES} updates"}
    known = {algorithm for other in LANGUAGE_TABLES for _, algorithm, _ in paper[other]}
    keys = [key for key in ours if key[1] not in known] if table == 3 else []  # initial policies, controls, copies
    tasks = list(dict.fromkeys(task for task, _, _ in cells))
    rows = []
    for task, algorithm, metric in sorted([*keys, *cells], key=lambda key: tasks.index(key[0])):
        key = task, algorithm, metric
        if key not in ours:
            continue
        values, cell = ours[key], cells.get(key)
        difference = joint_difference(values.mean(), standard_error(values), cell) if cell else math.nan
        texts = [format_mean(values), str(len(values)), str(cell or "-"), format_difference(difference)]
        rows.append([task, labels.get((task, algorithm), algorithm), METRICS[metric], *texts])
    header = ["Task", "Algorithm", "Metric", "Ours", "n", "Paper", "Difference / joint SE"]
    text = [f"## Table {table}: {title}", "", markdown_table(header, rows, right="Ours|n|Paper"), ""]
    if table == 3:
        text += [
            f"- Beside the paper's SFT: of IMDB the initial policy; of TL;DR the policy after {SFT_UPDATES} updates "
            "(Section 5.3), which does not say whether of PPO or SPPO: here of PPO.",
            f"- Win rates stand here if {JUDGE[0]} judged {JUDGE[1]} samples against the references.",
        ]
    missing = defaultdict(list)
    for task, algorithm, metric in cells.keys() - ours.keys():
        missing[task, labels.get((task, algorithm), algorithm)].append(METRICS[metric])
    for (task, algorithm), metrics in sorted(missing.items()):
        text.append(f"- Not run: {task}, {algorithm}: {', '.join(sorted(metrics))}.")
    return "\n".join(text) + "\n"


def format_change(runs: Runs, name: str, factor: float = 1) -> str:
    """A metric before and after training."""
    both = [factor * runs.metric(prefix + name) for prefix in ("before_", "")]
    return " → ".join(format_mean(values) for values in both if len(values)) or "-"


def format_kl(runs: Runs) -> str:
    """The KL estimate of a run's last tenth: nats per response, of the policy before an update to the reference."""
    curves = [read_curve(runs.folders[seed], "objective/kl")[1] for seed in sorted(runs.folders)]
    values = np.array([kl[-math.ceil(len(kl) / 10) :].mean() for kl in curves if len(kl)])
    return format_mean(values) if len(values) else "-"


def language_section(groups: dict[LanguageGroup, Runs]) -> str:
    """All language runs, the paper's settings or not, with what the reward model gives to other texts."""
    text = [
        "## Language runs",
        "",
        "Before → after training; KL is `objective/kl` of the last tenth. Below each table, what the reward model "
        "gives to texts other than the policy's: the references, nothing at all (IMDB: the prompt alone), and the "
        "policy's response cut in half; \"wins\" is how often such a text scores above the policy's whole response "
        "(compare Figure 1 and Table 15).",
        "",
    ]
    combinations = dict.fromkeys((group.task, group.models) for group in sorted(groups, key=sort_key))
    for task, models in sorted(combinations, key=lambda combination: combination[0]):
        policy, data, reward = models
        text += [f"### {task}: policy `{policy}`, data set `{data}`, reward model `{reward}`", ""]
        rouge = ("rouge1", "rouge2", "rougeL") if task == "TL;DR" else ()
        rows, errors, judged = [], [], []
        for group in sorted(groups, key=sort_key):
            if (group.task, group.models) != (task, models):
                continue
            runs, updates = groups[group], f"{group.timesteps} of {group.paper_timesteps}"
            if group.timesteps >= group.paper_timesteps:
                updates = str(group.timesteps)
            names = [group.algorithm, group.difference_text(), updates, str(len(runs.scores))]
            changes = [format_change(runs, name) for name in ("score", "perplexity")]
            rows.append([*names, *changes, format_kl(runs), *(format_change(runs, name, 100) for name in rouge)])
            fixed = [runs.metric(f"score_{name}") for name in ("reference", "empty")]  # the same after as before
            errors.append([*names, *(format_mean(values) if len(values) else "-" for values in fixed)])
            errors[-1].append(format_change(runs, "score_truncated"))
            errors[-1] += [format_change(runs, f"{name}_wins", 100) for name in ("empty", "truncated")]
            for (against, judge, samples), by_seed in sorted(runs.judged.items()):
                against = "the references" if against == "reference" else against
                values = np.array([by_seed[seed] for seed in sorted(by_seed)])
                judged.append(
                    f"- Win rate of {', '.join(filter(None, names[:2]))}, {updates} updates, against {against}: "
                    f"{format_mean(values)} % (n {len(values)}), {samples} samples judged by {judge}."
                )
        header = ["Algorithm", "Not the paper's", "Updates", "n"]
        scores = ["Score", "Perplexity", "KL", *(f"ROUGE-{name[5:]}" for name in rouge)]
        others = ["References", "Empty", "Cut in half", "Empty wins (%)", "Cut in half wins (%)"]
        for names, table in ((scores, rows), (others, errors)):
            text += [markdown_table([*header, *names], table, right="|".join(["Updates", "n", *names])), ""]
        text += [*judged, ""] if judged else []
    return "\n".join(text)
