"""What is compared with what, how surely they differ, and what all cells say together."""

import math

import numpy as np

from .cells import BASELINES, TABLES, Group, short_name
from .runs import Results, Runs
from .scores import (
    difference_interval,
    format_gain,
    format_interval,
    format_mean,
    format_number,
    format_p,
    holm,
    joint_difference,
    markdown_table,
    permutation_test,
    probability_of_improvement,
    standard_error,
)

MODES = {("continuous_ppo", "Swimmer-v4"): 60.0, ("continuous_ppo", "HalfCheetah-v4"): 2000.0}  # scores in between
TWO_MODES = ("Swimmer-v4", "HalfCheetah-v4")


def pairs(
    family: str, paper: dict, ours: dict, first: str, second: str
) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """{(environment, noise): scores of both algorithms} in the order of the paper's tables, where both were run."""
    found = {}
    for table in (table for table, name in TABLES.items() if name == family):
        for environment, noise in dict.fromkeys((e, noise) for e, _, noise in paper[table]):
            keys = [(environment, algorithm, noise) for algorithm in (first, second)]
            if all(key in ours for key in keys):
                found[environment, noise] = tuple(ours[key][1].values for key in keys)
    return found


def tested(compared: dict) -> dict[tuple[str, str], tuple[float, float]]:
    """{(environment, noise): p of the permutation test, by itself and by Holm over all of them}."""
    single = [permutation_test(*both) for both in compared.values()]
    return dict(zip(compared, zip(single, holm(single))))


def algorithms_of(table: int, paper: dict) -> tuple[str, str, str]:
    """Symmetric algorithm, baseline and control."""
    symmetric = next(algorithm for _, algorithm, _ in reversed(paper[table]))
    return symmetric, BASELINES[symmetric], f"{BASELINES[symmetric]} control"


def noises_of(table: int, paper: dict) -> list[str]:
    return list(dict.fromkeys(noise for *_, noise in paper[table]))


def tables_of(family: str) -> str:
    """Tables 12 and 13."""
    numbers = [str(table) for table, name in sorted(TABLES.items()) if name == family]
    return f"Table{'s' * (len(numbers) > 1)} {' and '.join(numbers)}"


def gain(first: np.ndarray, second: np.ndarray) -> str:
    errors = math.hypot(standard_error(first), standard_error(second))
    return format_gain(first.mean() - second.mean(), errors)


def probability(samples: dict) -> str:
    """Probability of improvement over some environments, with its interval."""
    first, second = zip(*samples.values())
    return format_interval([*first, *second], probability_of_improvement)


def leave_one_out(samples: dict) -> tuple[str, str]:
    """The environment that changes the probability of improvement most, and the probability without it."""
    single = {key: probability_of_improvement(*pair) for key, pair in samples.items()}
    mean = np.mean(list(single.values()))
    left_out = max(single, key=lambda key: abs(single[key] - mean))
    return left_out[0], probability({key: pair for key, pair in samples.items() if key != left_out})


def comparison_table(table: int, paper: dict, ours: dict) -> str | None:
    """The symmetric algorithm beside its baseline, environment by environment; None where no pair was run."""
    symmetric, baseline, _ = algorithms_of(table, paper)
    compared = pairs(TABLES[table], paper, ours, symmetric, baseline)
    p, noises, rows = tested(compared), noises_of(table, paper), []
    for noise in noises:
        samples = {key: both for key, both in compared.items() if key[1] == noise}
        for (e, _), both in samples.items():
            cell, base = (paper[table][e, algorithm, noise] for algorithm in (symmetric, baseline))
            gains = [gain(*both), format_gain(cell.mean - base.mean, math.hypot(cell.se, base.se))]
            seeds = ", ".join(str(len(values)) for values in both)
            texts = [*gains, probability({e: both}), *map(format_p, p[e, noise])]
            rows.append([short_name(e), noise, seeds, *texts])
        if len(samples) > 1:
            rows.append([f"all {len(samples)}", noise, "", "", "", probability(samples), "", ""])
        if len(samples) > 2:
            left_out, rest = leave_one_out(samples)
            rows.append([f"all but {short_name(left_out)}", noise, "", "", "", rest, "", ""])
    title = f"{symmetric} minus {baseline}"
    header = ["Environment", "Noise", "n", f"{title}, ours", f"{title}, the paper's"]
    header += ["Probability of improvement, ours", "Permutation test", "by Holm"]
    if len(noises) == 1:  # the title has the noise
        header, rows = header[:1] + header[2:], [row[:1] + row[2:] for row in rows]
    if not rows:
        return None
    note = (
        f"n: seeds of {symmetric} and of {baseline}. Permutation test: p of a difference of the means as large, either "
        f"way; by Holm: in view of all comparisons of {symmetric} with {baseline} in {tables_of(TABLES[table])}, "
        f"{len(compared)} so far."
    )
    return f"{markdown_table(header, rows, right='|'.join(header[-6:]))}\n\n{note}"


def control_table(table: int, paper: dict, ours: dict) -> str | None:
    """The symmetric algorithm beside its control, and that beside the baseline; None where no control was run."""
    symmetric, baseline, control = algorithms_of(table, paper)
    compared = [pairs(TABLES[table], paper, ours, *two) for two in ((symmetric, control), (control, baseline))]
    ps = [tested(some) for some in compared]
    noises, rows = noises_of(table, paper), []
    for key in dict.fromkeys([*compared[0], *compared[1]]):
        if key[1] not in noises:
            continue
        row = [short_name(key[0]), key[1]]
        for some, p in zip(compared, ps):
            if both := some.get(key):
                seeds = ", ".join(str(len(values)) for values in both)
                row += [seeds, gain(*both), probability({key: both}), f"{format_p(p[key][0])} ({format_p(p[key][1])})"]
            else:
                row += ["", "", "", ""]
        rows.append(row)
    header = ["Environment", "Noise"]
    for two in ((symmetric, "control"), ("control", baseline)):
        header += ["n", " minus ".join(two), "Probability of improvement", "Permutation test (by Holm)"]
    if len(noises) == 1:
        header, rows = header[:1] + header[2:], [row[:1] + row[2:] for row in rows]
    weight = "alpha" if "A2C" in baseline else "alpha - beta Z"
    note = (
        f"The control is {baseline} with its policy loss times {weight}, so that {symmetric} minus control is "
        f"{'the reverse loss' if weight == 'alpha' else 'chance, by the identity'}, and control minus {baseline} the "
        "weight. By Holm: in view of all such differences in both tables."
    )
    return f"{markdown_table(header, rows, right='|'.join(header[1:]))}\n\n{note}" if rows else None


def modes_table(table: int, paper: dict, ours: dict) -> str | None:
    """Scores of all seeds where they have two modes; None where nothing was run there."""
    rows, noises = [], noises_of(table, paper)
    for environment in TWO_MODES:
        bar = MODES.get((TABLES[table], environment))
        for (e, algorithm, noise), (group, runs) in sorted(ours.items(), key=lambda item: item[0][1]):
            if (e, group.family) != (environment, TABLES[table]) or noise not in noises:
                continue
            values = np.sort(runs.values)
            parts = (values, values[:0]) if bar is None else (values[values <= bar], values[values > bar])
            texts = [[format_number(value) for value in part] for part in parts]
            counts = [str(len(some)) for some in texts] if bar else ["", ""]
            scores = "; ".join(filter(None, (", ".join(some) for some in texts)))
            rows.append([short_name(e), algorithm, noise, str(len(values)), f"{bar:g}" if bar else "", *counts, scores])
    header = ["Environment", "Algorithm", "Noise", "n", "Bar", "Below", "Above", "Scores of the seeds, sorted"]
    note = (
        "Scores of all seeds where they have two modes. Bar: Swimmer's agents that stay on a plateau score less; "
        "HalfCheetah's that scored less ran on their backs, wherever that was looked at."
    )
    if not any(row[4] for row in rows):
        note = "Scores of all seeds, in environments where they have shown two modes."
        header, rows = header[:4] + header[-1:], [row[:4] + row[-1:] for row in rows]
    if len(noises) == 1:
        header, rows = header[:2] + header[3:], [row[:2] + row[3:] for row in rows]
    return f"{markdown_table(header, rows, right='n|Bar|Below|Above')}\n\n{note}" if rows else None


def together_table(paper: dict, ours: dict) -> str | None:
    """By algorithm: how far all cells lie from the paper's, in joint standard errors and in per cent."""
    rows = []
    for name, (differences, percent, seeds) in together(paper, ours).items():
        mean = f"{np.mean(differences):+.2f} ± {len(differences) ** -0.5:.2f}"
        rows.append([name, str(len(differences)), seeds, mean, f"{np.mean(percent):+.1f} %"])
    header = ["Algorithm", "Cells", "Seeds of a cell", "Mean difference / joint SE", "In per cent of the paper's means"]
    return markdown_table(header, rows, right="|".join(header[1:])) if rows else None


def together(paper: dict, ours: dict) -> dict[str, tuple[list[float], list[float], str]]:
    """{algorithm: differences from the paper's cells in joint standard errors and in per cent, numbers of seeds}."""
    found = {}
    for table in TABLES:
        for key, cell in paper[table].items():
            values = ours[key][1].values if key in ours else np.array([])
            difference = joint_difference(values.mean(), standard_error(values), cell) if len(values) else math.nan
            if math.isfinite(difference) and cell.mean:
                differences, percent, seeds = found.setdefault(key[1], ([], [], []))
                differences.append(difference)
                percent.append(100 * (values.mean() - cell.mean) / abs(cell.mean))
                seeds.append(len(values))
    return {name: (d, p, str(n[0]) if len({*n}) == 1 else f"{min(n)} to {max(n)}") for name, (d, p, n) in found.items()}


def clearest(compared: dict) -> tuple[str, str]:
    """The comparison with the smallest p, and among equals that with the largest difference in standard errors."""
    p = tested(compared)

    def size(key) -> tuple[float, float]:
        first, second = compared[key]
        joint = math.hypot(standard_error(first), standard_error(second))
        return math.inf if math.isnan(p[key][0]) else p[key][0], -abs(
            first.mean() - second.mean()
        ) / joint if joint > 0 else 0.0

    return min(compared, key=size)


def seeds_text(compared: dict) -> str:
    numbers = sorted({len(values) for both in compared.values() for values in both})
    return f"{numbers[0]} seeds" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]} seeds"


def clearest_text(compared: dict, among: dict) -> str:
    """HalfCheetah-v4 with noise, +1673 ± 299 (5, 5 seeds; permutation test 0.008, by Holm over 14 comparisons 0.11)."""
    key = clearest(compared)
    environment, noise = key
    p, adjusted = tested(among)[key]
    seeds = ", ".join(str(len(values)) for values in compared[key])
    holm_text = f", by Holm over {len(among)} comparisons {format_p(adjusted)}" * (len(among) > 1)
    tests = f"permutation test {format_p(p)}{holm_text}"
    where = f"{environment}{'' if noise == 'none' else ' with noise'}"
    return f"{where}, {gain(*compared[key])} ({seeds} seeds; {tests})"


def in_sentences(table: int, paper: dict, ours: dict) -> list[str]:
    """On a family of the paper's tables: without noise, with noise, and what the control says."""
    symmetric, baseline, control = algorithms_of(table, paper)
    family, texts = TABLES[table], []

    def say(first: str, second: str, compared: dict, among: dict, where: str) -> None:
        if not compared:
            return
        higher = sum(a.mean() > b.mean() for a, b in compared.values())
        where_higher = f"{higher} of {len(compared)} {'environment' if 'noise' in where else 'cell'}"
        where_higher += "s" * (len(compared) > 1)
        texts.append(
            f"{where}{first} has the higher mean than {second} in {where_higher} ({seeds_text(compared)}); the "
            f"probability that a run of the one scores above one of the other is {probability(compared)}; the clearest "
            f"difference is on {clearest_text(compared, among)}."
        )

    compared = pairs(family, paper, ours, symmetric, baseline)
    for where, wanted in (("Without noise ", True), ("With noise ", False)):
        some = {key: both for key, both in compared.items() if (key[1] == "none") == wanted}
        say(symmetric, baseline, some, compared, where)
    factor = "alpha" if family.endswith("a2c") else "alpha - beta Z, by the identity the same algorithm"
    beside = f"Beside the control, {baseline} with its policy loss times {factor}: "
    for first, second, where in (
        (symmetric, "the control", beside),
        ("the control", baseline, "By the weight alone: "),
    ):
        some = pairs(family, paper, ours, *(control if name == "the control" else name for name in (first, second)))
        say(first, second, some, some, where)
    return texts


def copies_section(results: Results) -> str | None:
    """Runs of changed copies beside those of the original, on the same environment and of the same length."""
    groups: dict[Group, Runs] = results.groups | results.language
    rows, alone = [], []
    for group in sorted((g for g in groups if g.changed), key=lambda g: (g.environment, g.noise, g.algorithm)):
        originals = [other for other in groups if is_original(other, group)]
        for other in sorted(originals, key=lambda other: (other.algorithm, str(other.differences))):
            copied, original = groups[group].values, groups[other].values
            interval = difference_interval(copied, original)
            bounds = f" [{', '.join(format_number(x, copied.mean()) for x in interval)}]" if interval else ""
            name = ", ".join(filter(None, [other.algorithm, other.difference_text()]))
            names = [short_name(group.environment), group.noise, f"{group.timesteps:,}", group.algorithm, name]
            texts = [format_mean(copied), format_mean(original), f"{len(copied)}, {len(original)}"]
            chance = [probability({"": (copied, original)}), format_p(permutation_test(copied, original))]
            rows.append([*names, *texts, gain(copied, original) + bounds, *chance])
        if not originals:
            where = f"{short_name(group.environment)}, noise {group.noise}, {group.timesteps:,} {group.unit}"
            alone.append(f"- {group.algorithm}, {where}: no run of {group.origin} there to compare it with.")
    if not (rows or alone):
        return None
    header = ["Environment", "Noise", "Length", "Copy", "Original", "Copy's score", "Original's", "n"]
    header += ["Difference", "Probability of improvement", "Permutation test"]
    text = [
        "## Changed copies beside their originals",
        "",
        "The same environment, noise and length. Difference: copy minus original ± SE, with the 95 % interval of "
        "Welch's t; permutation test: p of a difference of the means as large, either way, not corrected for the "
        "number of rows.",
        "",
    ]
    if rows:
        text += [markdown_table(header, rows, right="|".join(["Length", *header[5:]])), ""]
    return "\n".join([*text, *alone, *[""] * bool(alone)])


def is_original(other: Group, copy: Group) -> bool:
    """Whether other is of the script of which copy is one, and alike in all but the weights."""
    weights = ("alpha", "beta", "Z")
    settings = [[d for d in group.differences if d[0] not in weights] for group in (other, copy)]
    same = all(getattr(other, name) == getattr(copy, name) for name in ("family", "environment", "noise", "timesteps"))
    return not other.changed and other.origin == copy.origin and same and settings[0] == settings[1]
