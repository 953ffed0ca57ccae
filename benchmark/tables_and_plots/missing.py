"""What of the paper was not run: every such cell, the command that runs it, and how long that takes."""

from collections import defaultdict
from pathlib import Path

from sweeps import SWEEPS, cells, seconds, speeds

from .cells import Group, Planned, identify, parse, short_name
from .scores import markdown_table


def group_of(plan: Planned) -> Group:
    """The group of the runs that a line of a sweep makes."""
    lengths = {"total_timesteps": plan.timesteps, "num_updates": plan.timesteps}
    return identify({"script": plan.script, "env_id": plan.environment, "args": plan.settings} | lengths)


def cell_names(groups: list[Group]) -> str:
    """PPO, SPPO; with noise: SPPO."""
    names = defaultdict(list)
    for group in groups:
        names["with noise: " * (group.noise != "none")].append(f"{group.algorithm} {group.difference_text()}".strip())
    return "; ".join(prefix + ", ".join(algorithms) for prefix, algorithms in names.items())


def hours(plans: list[Planned], speed: dict) -> tuple[float, bool, bool]:
    """Of one process after the other, as far as runs have told; whether all have, and whether with --compile."""
    can = ["compile" in plan.settings for plan in plans]
    found = [
        seconds(speed, p.script, p.settings | ({"compile": True} if c else {}), p.seeds * p.timesteps)
        for p, c in zip(plans, can)
    ]
    compiled = any(can) and all(time and alike for (time, alike), c in zip(found, can) if c)
    return sum(time or 0 for time, _ in found) / 3600, all(time for time, _ in found), compiled


def missing_section(folders: list[Path], run: set[Group]) -> str:
    """A row for each environment of a sweep of which nothing was run, and for each cell that others lack."""
    speed, rows, seen, total, unknown = speeds(folders), [], set(), 0.0, 0
    for sweep, tables in SWEEPS.items():
        environments = defaultdict(dict)  # environment: {group: (line, plan)}, without what an earlier sweep has
        for line in cells(sweep):
            plan = parse(line)
            if (group := group_of(plan)) not in seen:
                environments[plan.environment][group] = line, plan
                seen.add(group)
        for found in environments.values():
            missing = {group: cell for group, cell in found.items() if group not in run}
            if len(missing) == len(found):
                (_, plan), *_ = found.values()
                name = short_name(plan.settings.get("env_id") or Path(plan.settings["dataset"]).name)
                parts = [(list(missing), f"ENVS={name} benchmark/{sweep}.sh")]
            else:
                parts = [
                    ([g], f'benchmark/run_cells.sh <<< "{" ".join(line.split())}"') for g, (line, _) in missing.items()
                ]
            for groups, command in parts:
                plans = [missing[group][1] for group in groups]
                time, known, compiled = hours(plans, speed)
                command = command.replace(".sh", ".sh --compile") if compiled else command
                total, unknown = total + time, unknown + (not known)
                estimate = f"{time:,.{0 if time >= 10 else 1}f}{'' if known else '+'}" if time else "-"
                place = [", ".join(map(str, tables)), short_name(plans[0].environment), cell_names(groups)]
                rows.append([*place, str(plans[0].seeds), f"`{command}`", estimate])
    header = ["Table", "Environment", "Cells", "Seeds", "Command", "Hours"]
    names = ", ".join(f"`{folder}`" for folder in folders)
    return (
        f"{len(seen - run)} of the {len(seen)} cells of the sweeps have no run at the paper's settings and length. "
        f"Hours are those of one process after the other, at the speeds of the runs in {names}: {total:,.0f} in all, "
        f"without what no run has told the speed of ({unknown} rows, - or +). `benchmark/judge.py` finds the win rates "
        f"of Table 3 when the runs are there.\n\n{markdown_table(header, rows, right='Seeds|Hours')}\n"
    )
