"""Curves over steps or updates, a panel for each environment."""

import io
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from .cells import BASELINES, UNNORMALIZED, Group, short_name
from .runs import Results, Runs, read_curve
from .tables import sort_key

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAPER_COLORS = {("Gaussian", "none"): "black", ("Gaussian", "noise"): "tab:purple"}  # the other four are Figure 3's
PAPER_COLORS |= {("baseline", "none"): "tab:blue", ("symmetric", "none"): "tab:orange"}
PAPER_COLORS |= {("baseline", "noise"): "tab:green", ("symmetric", "noise"): "tab:red"}
PAPER_COLORS |= {(UNNORMALIZED, "none"): "tab:gray"}
OTHER_COLORS = ("tab:brown", "tab:pink", "tab:olive", "tab:cyan", "goldenrod", "navy", "darkgreen", "salmon")


def line_style(group: Group, common: set[tuple[str, object]]) -> tuple[str, str | None]:
    """Label and color of a group's line; the color is None where only the cycle can keep lines apart.

    The label leaves out settings that all lines of the panel have in common.
    """
    label = group.algorithm + (f", {group.noise}" if group.noise != "none" else "")
    if group.timesteps != group.paper_timesteps and (group.kind != "other" or group.unit == "updates"):
        label += f", {group.timesteps:,} {group.unit}"
    if group.kind == "other":
        own = replace(group, differences=tuple(d for d in group.differences if d not in common))
        return ", ".join(filter(None, [label, own.difference_text()])), None
    gaussian = group.family.startswith("continuous") and group.algorithm in ("PPO", "A2C")
    role = "symmetric" if group.algorithm in BASELINES else "Gaussian" if gaussian else group.algorithm
    role = "baseline" if not gaussian and group.algorithm in BASELINES.values() else role
    return label, PAPER_COLORS.get((role, "none" if group.noise == "none" else "noise"))


def bin_means(steps: np.ndarray, values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Means of a piecewise linear curve between neighbouring edges, (len(edges) - 1,)."""
    grid = np.union1d(steps, edges)
    values = np.interp(grid, steps, values)
    areas = np.append(0, np.cumsum(np.diff(grid) * (values[1:] + values[:-1]) / 2))
    return np.diff(areas[np.searchsorted(grid, edges)]) / np.diff(edges)


def plot(groups: dict[Group, Runs], tag: str, ylabel: str, scale: float, path: Path, style=line_style) -> bool:
    """Mean and standard error over seeds of one tag, a panel for each environment; False if nobody logged it."""
    lines = defaultdict(list)  # environment: [(group, steps, values of shape (seeds, 100))]
    for group in sorted(groups, key=sort_key):
        curves = [read_curve(folder, tag) for folder in groups[group].folders.values()]
        curves = [(steps, values) for steps, values in curves if len(steps) > 1]
        first, last = max((s[0] for s, _ in curves), default=0), min((s[-1] for s, _ in curves), default=0)
        if first < last:
            edges = np.linspace(first, last, 101)
            values = scale * np.array([bin_means(*curve, edges) for curve in curves])
            lines[group.environment].append((group, (edges[1:] + edges[:-1]) / 2, values))
    if not lines:
        return False
    columns = min(len(lines), 5 if len(lines) > 9 else 3)
    rows = math.ceil(len(lines) / columns)
    width, height = (2.6, 2.1) if columns == 5 else (3.6, 2.8) if columns > 1 else (6, 4)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    handles, cycle = {}, {}
    unit = lines[next(iter(lines))][0][0].unit
    size = 1e6 if unit == "steps" else 1
    for ax, (environment, panel) in zip(axes.flat, lines.items()):
        common = set.intersection(*(set(group.differences) for group, _, _ in panel))
        for group, steps, values in panel:
            label, color = style(group, common)
            color = color or cycle.setdefault(label, OTHER_COLORS[len(cycle) % len(OTHER_COLORS)])
            mean = values.mean(0)
            (handle,) = ax.plot(steps / size, mean, color=color, linewidth=1.2)
            handles.setdefault(label, (sort_key(group)[1:], handle))
            if len(values) > 1:
                se = values.std(0, ddof=1) / math.sqrt(len(values))
                ax.fill_between(steps / size, mean - se, mean + se, color=color, alpha=0.25, linewidth=0)
        ax.set_title(short_name(environment), fontsize=9)
        ax.tick_params(labelsize=7)
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(lines) :]:
        ax.axis("off")
    for ax in [axes.flat[i] for i in range(max(0, len(lines) - columns), len(lines))]:
        ax.set_xlabel("million steps" if unit == "steps" else unit, fontsize=8)
    for ax in axes[:, 0]:
        ax.set_ylabel(ylabel, fontsize=8)
    labels = sorted(handles, key=lambda label: handles[label][0])
    ncols = max(1, int(width * columns * 12 / (max(map(len, labels)) + 8)))  # some 12 characters an inch
    figure.set_figheight(figure.get_figheight() + 0.2 * max(0, math.ceil(len(labels) / ncols) - 2))
    figure.set_layout_engine("constrained")
    figure.legend([handles[label][1] for label in labels], labels, loc="outside lower center", ncols=ncols, fontsize=8)
    save(figure, path, dpi=90)
    return True


def picture(results: Results, path: Path) -> bool:
    """The one for README.md: DPPO and DSPPO where most was run, in six panels; dashed with noise, the control thin."""
    styles = {"DPPO": ("tab:blue", 1.6), "DSPPO": ("tab:orange", 1.6), "DPPO control": ("black", 0.7)}
    path.unlink(missing_ok=True)
    panels = defaultdict(list)  # environment: [(algorithm, with noise, steps, values of shape (seeds, 50))]
    for group, runs in sorted(results.of_kind("paper").items(), key=lambda item: sort_key(item[0])):
        curves = [read_curve(folder, "charts/episodic_return") for folder in runs.folders.values()]
        curves = [curve for curve in curves if len(curve[0]) > 1]
        if group.family == "continuous_ppo" and group.algorithm in styles and curves:
            edges = np.linspace(max(s[0] for s, _ in curves), min(s[-1] for s, _ in curves), 51)
            values = np.array([bin_means(*curve, edges) for curve in curves])
            panels[group.environment].append((group.algorithm, group.noise != "none", edges, values))
    shown = sorted(panels, key=lambda e: (-len(panels[e]), -sum(len(line[-1]) for line in panels[e]), e))[:6]
    if not shown:
        return False
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.4 * rows + 0.4), squeeze=False)
    for ax, environment in zip(axes.flat, shown):
        for algorithm, noisy, edges, values in panels[environment]:
            color, width = styles[algorithm]
            middle, mean = (edges[1:] + edges[:-1]) / 2e6, values.mean(0)
            ax.plot(middle, mean, "--" if noisy else "-", color=color, linewidth=width)
            if len(values) > 1 and algorithm in ("DPPO", "DSPPO"):
                se = values.std(0, ddof=1) / math.sqrt(len(values))
                ax.fill_between(middle, mean - se, mean + se, color=color, alpha=0.15, linewidth=0)
        ax.set_title(environment.partition("-")[0].removesuffix("Continuous"), fontsize=11)
        ax.tick_params(labelsize=9)
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(shown) :]:
        ax.axis("off")
    for ax in axes[-1]:
        ax.set_xlabel("million steps", fontsize=10)
    for ax in axes[:, 0]:
        ax.set_ylabel("training return", fontsize=10)
    names = {"DPPO": "DPPO", "DSPPO": "DSPPO", "DPPO control": "DPPO with DSPPO's weight (control)"}
    handles = [plt.Line2D([], [], color=styles[a][0], linewidth=styles[a][1], label=name) for a, name in names.items()]
    handles.append(plt.Line2D([], [], color="gray", linestyle="--", label="with reward noise"))
    figure.set_layout_engine("constrained")
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=10)
    save(figure, path, dpi=100)
    return True


def save(figure, path: Path, dpi: int) -> None:
    """As a PNG with a small palette."""
    with io.BytesIO() as file:
        figure.savefig(file, dpi=dpi)
        Image.open(file).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
    plt.close(figure)


def figures_section(results: Results, out: Path) -> str:
    titles = {"paper": "paper's settings and length", "shorter": "shorter than the paper"}
    titles |= {"longer": "longer than the paper", "other": "other settings"}
    domains = {"atari_ppo": "Atari, PPO", "atari_a2c": "Atari, A2C", "continuous_ppo": "MuJoCo and Box2D, PPO"}
    domains |= {"continuous_a2c": "MuJoCo and Box2D, A2C"}
    language = {"rlhf_imdb": "IMDB", "rlhf_tldr": "TL;DR"}
    figures = (
        ("curves", "charts/episodic_return", "training return", 1, "Learning curves", domains),
        ("curves", "objective/scores", "score of the rollouts", 1, "Learning curves", language),
        (
            "sign_flips",
            "losses/sign_flips",
            "advantage sign flips (%)",
            100,
            "Advantage sign flips (Figure 2)",
            domains,
        ),
    )
    all_groups = results.groups | results.language
    text = [
        "## Figures",
        "",
        "Mean over seeds, averaged over each hundredth of the run; the band is the standard error. Where settings are "
        "not the paper's, the legend names those in which the lines of a panel differ.",
        "",
    ]
    if picture(results, out / "picture.png"):
        text += ["DPPO and DSPPO in up to six environments: dashed with noise, the control thin.", ""]
        text += ["![DPPO and DSPPO](picture.png)", ""]
    for name, tag, ylabel, scale, caption, families in figures:
        for kind, title in titles.items():
            for family, domain in families.items():
                groups = {g: runs for g, runs in all_groups.items() if (g.kind, g.family) == (kind, family)}
                path = out / f"{name}_{family}{'' if kind == 'paper' else f'_{kind}'}.png"
                path.unlink(missing_ok=True)
                if groups and plot(groups, tag, ylabel, scale, path):
                    text += [f"{caption}: {domain}, {title}.", "", f"![{caption}]({path.name})", ""]
    without = [f for runs in all_groups.values() for f in runs.folders.values() if not (f / "curves.csv").exists()]
    if without:
        text += [f"Without curves.csv, in no figure: {', '.join(map(str, sorted(without)))}.", ""]
    return "\n".join(text)
