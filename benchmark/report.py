"""Result files into Markdown and figures: our scores beside the paper's cells.

    python benchmark/report.py runs/                             # writes runs/report.md and PNGs beside it
    python benchmark/report.py runs/ more-runs/ --out report/
    python benchmark/report.py benchmark/results --document README.md docs/results.md docs/missing.md

Reads every result.json below the folders and the curves.csv beside it; models, environments and the machine that made
them are not needed. A score is the mean of the 10 evaluation episodes of one seed, of a language run the mean reward of
its evaluation samples; means and standard errors are over seeds. A run is compared with a cell of the paper only if its
settings, its models and its length are those of the paper (the defaults of the scripts with --target-coef 0.1, and
Tables 5 to 7), as the sweeps have them; all others have tables of their own. A changed copy of a script is compared
with the original first, and stands, under its own name, beside its runs. Win rates are those of benchmark/judge.py.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

try:
    import tyro
    from sweeps import find
    from tables_and_plots.beside_sb3 import beside_section
    from tables_and_plots.cells import LANGUAGE_TABLES, TABLES, read_paper
    from tables_and_plots.comparisons import copies_section, in_sentences, together_table
    from tables_and_plots.documents import filled
    from tables_and_plots.figures import figures_section
    from tables_and_plots.runs import Results, language_cells, load, unfinished
    from tables_and_plots.tables import (
        gains_text,
        language_section,
        language_table_section,
        length_section,
        other_section,
        overview_section,
        row_keys,
        table_4_section,
        table_section,
    )
except ModuleNotFoundError as error:
    print(f"error: there is no {error.name}: pip install -r requirements-benchmark.txt", file=sys.stderr)
    sys.exit(2)


def write_report(folders: list[Path], results: Results, paper: dict, out: Path) -> None:
    kinds = dict.fromkeys(("paper", "shorter", "longer", "other"), 0)
    for group, runs in (results.groups | results.language).items():
        kinds[group.kind] += len(runs.scores)
    ours = results.paper_cells()
    sections = [
        "# Our results beside the paper's\n\n"
        f"{sum(kinds.values())} runs in {', '.join(f'`{folder}`' for folder in folders)}: {kinds['paper']} at the "
        f"paper's settings and length, {kinds['shorter']} shorter, {kinds['longer']} longer, {kinds['other']} at "
        f"other settings, {len(results.left_out)} left out.\n\n"
        "Ours: mean ± standard error (SE) over n seeds (the paper: 5 on Atari, 4 on the language tasks, 30 elsewhere); "
        "the score of a seed is the mean of its 10 evaluation episodes, or of its evaluation samples. Difference: ours "
        "minus the paper's, in units of the joint SE, √(SE_ours² + SE_paper²), and whether it exceeds one. By chance "
        "alone a third of the cells would. Brackets: 95 % stratified-bootstrap intervals. Probability of improvement: "
        "that a run of the first algorithm scores above one of the second, averaged over environments; it has no "
        "interval where all runs of one are above all of the other, since no resampling can change that.\n"
    ]
    if copies := copies_section(results):
        sections.append(copies)
    shorter = {group.cell for group in results.of_kind("shorter")}
    table_4 = table_4_section(paper, results)
    sections.append(overview_section(paper, results, shorter, bool(table_4)))
    if table := together_table(paper, ours):
        sections.append(
            f"## All cells together\n\n{table}\n\nEvery cell counts once. ±: what chance alone allows, 1 / √cells, if "
            "each cell differs from the paper's by chance.\n"
        )
    for table in TABLES:
        if row_keys(table, paper[table], ours):
            sections.append(table_section(table, paper, ours, shorter))
    for algorithm, table in (("DSPPO", 12), ("DSA2C", 9)):
        if sentences := in_sentences(table, paper, ours):
            sections.append("\n".join([f"## {algorithm}, in sentences", "", *(f"- {text}" for text in sentences), ""]))
    if beside := beside_section(results, out):
        sections.append(beside)
    if table_4:
        sections.append(table_4)
    if any(group.family.startswith("atari") for group in results.groups):
        sections.append(f"## The paper's gain over each baseline\n\n{gains_text(paper, ours)}")
    language = language_cells(results, "paper")
    for table in LANGUAGE_TABLES:
        if language.keys() & paper[table].keys():
            sections.append(language_table_section(table, paper, language))
    for kind in ("shorter", "longer"):
        if groups := results.of_kind(kind):
            sections.append(length_section(kind, paper, groups))
    if other := results.of_kind("other"):
        sections.append(other_section(other))
    if results.language:
        sections.append(language_section(results.language))
    if results.left_out:
        alike = defaultdict(list)  # seeds side by side usually share their reason
        for path, reason in results.left_out:
            alike[path.parent, reason].append(path.name)
        lines = [f"- `{parent}`, {', '.join(names)}: {reason}" for (parent, reason), names in alike.items()]
        sections.append("\n".join(["## Left out", "", *lines, ""]))
    sections.append(figures_section(results, out))
    lines = [f"- {number} runs: commit {c}; {versions}" for (c, versions), number in results.made_by.most_common()]
    sections.append("\n".join(["## Made by", "", *lines, ""]))
    (out / "report.md").write_text("\n".join(sections), encoding="utf-8")


@dataclass
class Args:
    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)
    """folders with runs, searched with all their subfolders"""
    out: Path | None = None
    """where report.md and the figures go; without, into the first of the folders"""
    document: tuple[Path, ...] = ()
    """Markdown files in which to renew what stands between marker lines: verdict, scores, tables, missing cells"""


def main(argv: list[str] | None = None) -> int:
    args = tyro.cli(Args, args=argv, description=__doc__)
    paper = read_paper()
    for folder in args.folders:
        if not find([folder], "result.json"):
            begun = len(unfinished([folder]))
            hint = f", {begun} unfinished runs" if begun else "" if folder.is_dir() else ", no such folder"
            print(f"{folder}: no result.json{hint}", file=sys.stderr)
            return 2
    results = load(list(args.folders))
    if not (results.groups or results.language):
        path, reason = results.left_out[0]
        print(f"no usable result.json among {len(results.left_out)}; the first, {path}: {reason}", file=sys.stderr)
        return 2
    documents = {}
    for path in args.document:
        try:
            documents[path] = filled(path, list(args.folders), results, paper)
        except (OSError, ValueError) as error:
            print(f"error: --document {path}: {error}", file=sys.stderr)
            return 2
    out = args.out or args.folders[0]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        print(f"error: --out {out} is no folder", file=sys.stderr)
        return 2
    write_report(list(args.folders), results, paper, out)
    for path, text in documents.items():
        path.write_text(text, "utf-8")
    counted = sum(len(runs.scores) for runs in (results.groups | results.language).values())
    print(f"{counted} runs, {len(results.left_out)} left out: {out / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
