"""Our discretized runs beside those of Stable-Baselines3 with bins: training returns at the same step."""

import math
from pathlib import Path

import numpy as np

from .cells import Group, planned, short_name
from .figures import bin_means, plot
from .runs import Results, Runs, read_curve
from .scores import format_mean, format_p, markdown_table, permutation_test, standard_error
from .tables import sort_key

TAG = "charts/episodic_return"  # raw returns of the episodes that ended since the last row, on both sides
FAMILIES = {"continuous_ppo": ("PPO", "DPPO", "DSPPO"), "continuous_a2c": ("A2C", "DA2C", None)}  # theirs, ours
COLORS = {"Stable-Baselines3": "tab:blue", "ours": "tab:orange"}


def side(group: Group) -> tuple[str, float] | None:
    """Whose a group is, and the weight of its policy loss; None: neither side's."""
    theirs, baseline, symmetric = FAMILIES.get(group.family, ("", "", ""))
    settings = dict(group.differences)
    if group.origin == "sb3_baseline" and group.algorithm == theirs and settings.pop("num_bins", None) == 11:
        weight = settings.pop("policy_coef", 1.0)
        return None if settings else ("Stable-Baselines3", weight)
    if settings or group.changed or group.algorithm not in (baseline, symmetric):
        return None
    plan = planned().get((group.family, group.environment, group.algorithm, group.noise))
    alpha, beta, Z = (plan.settings[name] for name in ("alpha", "beta", "Z")) if plan else (1.0, 0.0, -1.0)
    return "ours", alpha - beta * Z


def both_sides(groups: dict[Group, Runs]) -> dict[tuple, dict[str, Group]]:
    """{what both sides share: {side: group}} where both were run; of several lengths the longest."""
    found = {}
    for group in sorted(groups, key=sort_key):
        if known := side(group):
            who, weight = known
            found.setdefault((group.family, group.environment, group.noise, weight), {})[who] = group
    return {key: two for key, two in found.items() if len(two) == 2}


def last_tenth(runs: Runs, steps: float) -> np.ndarray:
    """A mean return for each seed that has a curve, over the last tenth of so many steps."""
    curves = [read_curve(folder, TAG) for _, folder in sorted(runs.folders.items())]
    return np.array([bin_means(*curve, steps * np.array([0.9, 1]))[0] for curve in curves if len(curve[0]) > 1])


def common_steps(*sides: Runs) -> float:
    """Up to where all curves go."""
    curves = [read_curve(folder, TAG)[0] for runs in sides for folder in runs.folders.values()]
    return min((steps[-1] for steps in curves if len(steps) > 1), default=0.0)


def beside_rows(groups: dict[Group, Runs], two: dict[str, Group]) -> list[str] | None:
    """Scores of both sides, their seeds, the difference, and the permutation test; None where one has no curves."""
    theirs, ours = groups[two["Stable-Baselines3"]], groups[two["ours"]]
    steps = common_steps(theirs, ours)
    sb3, own = (last_tenth(runs, steps) for runs in (theirs, ours))
    if not (len(sb3) and len(own)):
        return None
    joint = math.hypot(standard_error(own), standard_error(sb3))
    difference = f"{(own.mean() - sb3.mean()) / joint:+.2f}" if joint > 0 else "-"
    seeds = f"{len(sb3)}, {len(own)}"
    return [
        f"{steps:,.0f}",
        format_mean(sb3),
        format_mean(own),
        seeds,
        difference,
        format_p(permutation_test(own, sb3)),
    ]


HEADER = ["Steps", "Stable-Baselines3", "Ours", "n", "Difference / joint SE", "Permutation test"]


def line_style(group: Group, _: set) -> tuple[str, str]:
    who, _ = side(group)
    return who, COLORS[who]


def beside_section(results: Results, out: Path) -> str | None:
    """The report's section and its figure; None where no cell has both sides."""
    rows, shown = [], {}
    for (family, environment, noise, weight), two in both_sides(results.groups).items():
        if more := beside_rows(results.groups, two):
            name = FAMILIES[family][0] + (f", policy loss times {weight:g}" if weight != 1 else "")
            rows.append([short_name(environment), name, noise, *more])
            shown |= {group: results.groups[group] for group in two.values()}
    path = out / "beside_sb3.png"
    path.unlink(missing_ok=True)
    if not rows:
        return None
    plot(shown, TAG, "training return", 1, path, line_style)
    header = ["Environment", "With bins", "Noise", *HEADER]
    text = [
        "## Beside Stable-Baselines3 with bins, at the same step",
        "",
        "Returns of training episodes, mean over the last tenth of the steps to which both sides go; errors are over "
        "seeds. Stable-Baselines3's PPO with its policy loss times alpha - beta Z is SPPO, by the identity.",
        "",
        markdown_table(header, rows, right="|".join(HEADER)),
        "",
        f"![Training returns of both sides]({path.name})",
        "",
    ]
    return "\n".join(text)
