"""Result files into Markdown and figures: our scores beside the paper's cells.

    python benchmark/report.py runs/                             # writes runs/report.md and PNGs beside it
    python benchmark/report.py runs/ more-runs/ --out report/
    python benchmark/report.py benchmark/results --document README.md docs/findings.md docs/results.md docs/missing.md
    python benchmark/report.py benchmark/results --missing | grep Hopper | benchmark/run_cells.sh --compile

Reads every result.json below the folders and the curves.csv beside it, nothing else. A run is compared with a cell of
the paper only if its settings, its models and its length are those of the sweep that runs the cell; all others have
tables of their own. A changed copy of a script is compared with the original first. Win rates are those of judge.py.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

try:
    import tyro
    from beside_sb3 import NOTE, beside, both_sides
    from comparisons import together_text
    from documents import filled, plan
    from figures import figures_text
    from findings import FINDINGS, arms
    from language import language_cells, language_table, language_text
    from runs import FAMILY, PARTS, TASKS, Found, unfinished
    from stats import markdown
    from sweeps import find
    from tables import copies_text, coverage_table, gains_text, other_text, table_4_text, table_text
except ModuleNotFoundError as error:
    print(f"error: there is no {error.name}: pip install -r requirements-benchmark.txt", file=sys.stderr)
    sys.exit(2)

COUNTED = {"paper": "at the paper's settings and length", "shorter": "shorter", "longer": "longer"}
COUNTED |= {"other": "at other settings"}
INTRO = """\
Ours: mean ± standard error (SE) over n seeds (the paper: 5 on Atari, 4 on the language tasks, 30 elsewhere). The score
of a seed is the mean of its 10 evaluation episodes, or of its evaluation samples.

- Difference: ours minus the paper's, in units of the joint SE, √(SE_ours² + SE_paper²), and whether it exceeds one. By
  chance alone a third of the cells would.
- Welch's p: of a difference of two means as large, either way; by Holm: in view of all comparisons of the same two
  algorithms in both tables of a family. In "symmetric minus baseline" runs of DSPPO's (SPPO's) control count as
  DSPPO's (SPPO's), which they are by the identity; two runs of one seed begin alike and count as one, their mean.
- z: the normal number with the p of Welch's t, so that few seeds do not count too much. Its mean is over cells, with
  the interval of a t test over cells; p of all cells is Stouffer's.
- Improvements in per cent are means over environments; their 95 % interval is that of a t test over environments.
- Probability of improvement: that a run of the first algorithm scores above one of the second, averaged over
  environments, with its 95 % stratified-bootstrap interval. It has none where all runs of one are above all of the
  other, since no resampling can change that.
- Controls: DPPO and PPO with their policy loss times alpha - beta Z, by the identity DSPPO and SPPO, so that the
  difference is chance; DA2C and A2C with theirs times alpha, which are DSA2C and SA2C without their reverse loss.
- PPO (without A normalization): the Atari baseline as the authors released it; PPO is that of the paper's text.
- Where scores have two modes: Swimmer's agents below the bar stayed on a plateau, HalfCheetah's ran on their backs,
  wherever that was looked at."""

GAINS = "The paper's SPPO and SA2C cells without noise; docs/results.md says where the scores of others come from."


def left_out_text(left_out: list[tuple[Path, str]]) -> str:
    alike = defaultdict(list)  # seeds side by side usually share their reason
    for path, reason in left_out:
        alike[path.parent, reason].append(path.name)
    lines = [f"- `{parent}`, {', '.join(names)}: {reason}" for (parent, reason), names in alike.items()]
    return "## Left out\n\n" + "\n".join(lines) + "\n" if lines else ""


def report_text(found: Found, out: Path) -> str:
    """The whole report; figures go to out."""
    runs, kinds, language = found.runs, found.runs.kind.value_counts(), language_cells(found.runs)
    counts = ", ".join(f"{kinds.get(kind, 0)} {text}" for kind, text in COUNTED.items())
    where = ", ".join(f"`{folder}`" for folder in found.folders)
    first = f"{len(runs)} runs in {where}: {counts}, {len(found.left_out)} left out."
    note = "; ".join(f"Table {part} is a part of Table {whole}" for part, whole in PARTS.items()) + "."
    parts = [
        f"# Our results beside the paper's\n\n{first}\n\n{INTRO}\n",
        copies_text(runs),
        f"## Cells that were run\n\n{coverage_table(found, language)}\n\n{note}\n",
        f"## All cells together\n\n{together_text(found.cells)}",
        *(table_text(found, table) for table in FAMILY),
    ]
    sections = {name: make(found) for name, make in FINDINGS.items() if name != "arms"}
    parts += [f"## Finding: {name}\n\n{section}" for name, section in sections.items() if section]
    if len(rows := beside(both_sides(runs), out / "beside_sb3.png")):
        title = "## Beside Stable-Baselines3 with bins, at the same step"
        parts.append(f"{title}\n\n{NOTE}\n\n{markdown(rows)}\n\n![Training returns of both sides](beside_sb3.png)\n")
    parts.append(table_4_text(runs, found.cells))
    if runs.family.str.startswith("atari").any():
        parts.append(f"## The paper's gain over each baseline\n\n{GAINS}\n\n{gains_text(found.cells)}")
    parts += [*(language_table(language, table) for table in (3, 14)), other_text(runs)]
    if runs.family.isin(TASKS).any():
        parts.append(language_text(runs))
    parts += [left_out_text(found.left_out), figures_text(out, runs, arms(runs))]
    made_by = (runs["commit"] + "; " + runs.versions).value_counts()
    parts.append("## Made by\n\n" + "".join(f"- {n} runs: commit {text}\n" for text, n in made_by.items()))
    return "\n".join(filter(None, parts))


@dataclass
class Args:
    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)
    """folders with runs, searched with all their subfolders"""
    out: Path | None = None  # where report.md and the figures go; without, into the first of the folders
    document: tuple[Path, ...] = ()
    """Markdown files in which to renew what stands between marker lines: verdict, scores, missing cells, ..."""
    missing: bool = False  # print a line for each cell of the sweeps without a run, for run_cells.sh, and write nothing


def fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    args = tyro.cli(Args, args=argv, description=__doc__)
    for folder in args.folders:
        if not find([folder], "result.json"):
            begun = len(unfinished([folder]))
            hint = f", {begun} unfinished runs" if begun else "" if folder.is_dir() else ", no such folder"
            return fail(f"{folder}: no result.json{hint}")
    found = Found(list(args.folders))
    if found.runs.empty:
        path, reason = found.left_out[0]
        return fail(f"no usable result.json among {len(found.left_out)}; the first, {path}: {reason}")
    if args.missing:
        cells = plan(found.runs)
        print(*cells.line[cells.missing], sep="\n")
        return 0
    documents = {}
    for path in args.document:
        try:
            documents[path] = filled(path, found)
        except (OSError, ValueError) as error:
            return fail(f"error: --document {path}: {error}")
    out = args.out or args.folders[0]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        return fail(f"error: --out {out} is no folder")
    (out / "report.md").write_text(report_text(found, out), encoding="utf-8")
    for path, text in documents.items():
        path.write_text(text, "utf-8")
    print(f"{len(found.runs)} runs, {len(found.left_out)} left out: {out / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
