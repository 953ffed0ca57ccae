"""Curves over steps or updates: mean over seeds with its standard error, a panel for each environment or tag."""

import io
import math
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from comparisons import plain
from PIL import Image
from runs import BASELINES, GROUP, MODELS, RETURN, SCORES, TASKS, bin_means, by_group, series

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"PPO": "black", "A2C": "black", "DPPO": "tab:blue", "DA2C": "tab:blue", "DPPO control": "gray"}
COLORS |= {"DA2C control": "gray", "PPO control": "gray", "A2C control": "gray"} | dict.fromkeys(
    BASELINES, "tab:orange"
)
CYCLE = ("tab:brown", "tab:pink", "tab:olive", "tab:cyan", "goldenrod", "navy", "darkgreen", "salmon", "tab:purple")
KINDS = {"paper": "paper's settings and length", "shorter": "shorter than the paper"}
KINDS |= {"longer": "longer than the paper", "other": "other settings"}
DOMAINS = {"atari_ppo": "Atari, PPO", "atari_a2c": "Atari, A2C", "continuous_ppo": "MuJoCo and Box2D, PPO"}
DOMAINS |= {"continuous_a2c": "MuJoCo and Box2D, A2C"} | TASKS
TAGS = (  # name of the files, tag, y axis, scale, caption
    ("curves", RETURN, "training return", 1, "Learning curves"),
    ("curves", SCORES, "score of the rollouts", 1, "Learning curves"),
    ("sign_flips", "losses/sign_flips", "advantage sign flips (%)", 100, "Advantage sign flips (Figure 2)"),
)


def averaged(folders: list[str], tag: str, bins: int = 100) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps (bins,) and values (seeds, bins) of a tag where all curves go; None where nobody logged it."""
    curves = [curve for curve in (series(folder, tag) for folder in folders) if len(curve) > 1]
    first = max((curve.index[0] for curve in curves), default=0)
    last = min((curve.index[-1] for curve in curves), default=0)
    if first >= last:
        return None
    edges = np.linspace(first, last, bins + 1)
    return (edges[1:] + edges[:-1]) / 2, np.array([bin_means(curve, edges) for curve in curves])


def figure(path: Path, panels: list[tuple], unit: str = "million steps", columns: int = 3) -> bool:
    """Writes a PNG of panels (title, y label, tag, scale, [(label, style, folders)]); False where there is nothing."""
    path.unlink(missing_ok=True)
    size, drawn = 1e6 if unit == "million steps" else 1, []
    for title, y_label, tag, scale, lines in panels:
        found = [(label, style, averaged(folders, tag)) for label, style, folders in lines]
        if found := [(label, style, *both) for label, style, both in found if both]:
            drawn.append((title, y_label, scale, found))
    if not drawn:
        return False
    columns = min(len(drawn), columns)
    rows, width, handles = math.ceil(len(drawn) / columns), {1: 6, 2: 4, 3: 3.6}.get(columns, 2.6), {}
    picture, axes = plt.subplots(rows, columns, figsize=(width * columns, 0.75 * width * rows), squeeze=False)
    for ax, (title, _, scale, lines) in zip(axes.flat, drawn):
        for label, style, x, values in lines:
            mean = scale * values.mean(0)
            (handles[label],) = ax.plot(x / size, mean, **{"linewidth": 1.2} | style)
            if len(values) > 1:
                se = scale * values.std(0, ddof=1) / math.sqrt(len(values))
                ax.fill_between(x / size, mean - se, mean + se, color=style["color"], alpha=0.2, linewidth=0)
        ax.set_title(title, fontsize=10)
        ax.tick_params(labelsize=7)
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(drawn) :]:
        ax.axis("off")
    for ax in axes.flat[max(0, len(drawn) - columns) : len(drawn)]:
        ax.set_xlabel(unit, fontsize=8)
    for ax, (_, y_label, _, _) in zip(axes[:, 0], drawn):
        ax.set_ylabel(y_label, fontsize=8)
    names = list(handles)
    in_a_row = max(1, int(width * columns * 12 / (max(map(len, names)) + 8)))  # some 12 characters an inch
    picture.set_figheight(picture.get_figheight() + 0.2 * max(0, math.ceil(len(names) / in_a_row) - 2))
    picture.set_layout_engine("constrained")
    picture.legend(handles.values(), names, loc="outside lower center", ncols=in_a_row, fontsize=8)
    with io.BytesIO() as file:  # as a PNG with a small palette
        picture.savefig(file, dpi=90)
        Image.open(file).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
    plt.close(picture)
    return True


def lines(groups: pd.DataFrame, cycle: dict[str, str]) -> list[tuple[str, dict, list[str]]]:
    """A line (label, style, folders) for each group of a panel; the label leaves out settings that all have in common.

    Dashed with noise, in the algorithm's color or, at other settings, one of its own.
    """
    settings = [set(text.split(", ")) for text in groups.other_settings]
    common, found = set.intersection(*settings) if len(groups) > 1 else set(), []
    for row in groups.itertuples():
        unit = "updates" if row.family in TASKS else "steps"
        parts = [row.algorithm, "with noise" if row.noise != "none" else ""]
        parts += [f"{row.steps:,} {unit}" if row.steps != row.paper_steps else ""]
        parts += [text for text in row.other_settings.split(", ") if text not in common]
        label = ", ".join(filter(None, parts))
        color = None if row.other_settings else COLORS.get(row.algorithm)
        style = {"color": color or cycle.setdefault(label, CYCLE[len(cycle) % len(CYCLE)])}
        style["linestyle"] = "-" if row.noise == "none" else "--"
        style["linewidth"] = 0.7 if row.algorithm.endswith("control") and not row.other_settings else 1.2
        found.append((label, style, row.folders))
    return found


def curves(path: Path, runs: pd.DataFrame, tag: str, y_label: str, scale: float) -> bool:
    """A panel for each environment of runs of one family."""
    groups = by_group(runs, GROUP).sort_values(["environment", "noise", "rank", "steps"], ignore_index=True)
    panels, cycle = [], {}
    for (environment, *models), some in groups.groupby(["environment", *MODELS], dropna=False):
        names = [Path(model).name for model in models if isinstance(model, str)]
        title = ", ".join(names) if names and runs.kind.iloc[0] == "other" else plain(environment)
        panels.append((title, y_label, tag, scale, lines(some, cycle)))
    unit = "updates" if runs.family.isin(TASKS).all() else "million steps"
    return figure(path, panels, unit, 5 if len(panels) > 9 else 4 if len(panels) > 6 else 3)


def side_by_side(path: Path, groups: pd.DataFrame) -> bool:
    """Return, entropy and value loss of arms that differ in algorithm or settings alone."""
    arms = lines(groups.assign(paper_steps=groups.steps, noise="none"), {})
    tags = {RETURN: "training return", "losses/entropy": "entropy", "losses/value_loss": "value loss"}
    return figure(path, [(title, "", tag, 1, arms) for tag, title in tags.items()])


def figures_text(out: Path, runs: pd.DataFrame, arms: pd.DataFrame) -> str:
    """The report's section, and its figures into out."""
    text = [
        "## Figures\n\nMean over seeds, averaged over each hundredth of the run; the band is the standard error. Where "
        "settings are not the paper's, the legend names those in which the lines of a panel differ. Dashed: noise. "
        "Thin: controls.\n"
    ]
    for (environment, noise, steps), groups in arms.groupby(["environment", "noise", "steps"]):
        name = f"arms_{plain(environment).lower()}_{steps}{'' if noise == 'none' else '_noise'}.png"
        if side_by_side(out / name, groups):
            text.append(f"{plain(environment)}, {steps:,} steps, noise {noise}.\n\n![Arms]({name})\n")
    for file, tag, y_label, scale, caption in TAGS:
        for (kind, title), (family, domain) in product(KINDS.items(), DOMAINS.items()):
            some = runs[(runs.kind == kind) & (runs.family == family)]
            name = f"{file}_{family}{'' if kind == 'paper' else f'_{kind}'}.png"
            if (family in TASKS) == (tag == SCORES) and len(some) and curves(out / name, some, tag, y_label, scale):
                text.append(f"{caption}: {domain}, {title}.\n\n![{caption}]({name})\n")
    without = [folder for folder in runs.folder if not Path(folder, "curves.csv").exists()]
    if without:
        text.append(f"Without curves.csv, in no figure: {', '.join(sorted(without))}.\n")
    return "\n".join(text)
