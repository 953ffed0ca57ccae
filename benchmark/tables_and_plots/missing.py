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


def env_name(plan: Planned) -> str:
    """As ENVS takes it."""
    return short_name(plan.settings.get("env_id") or Path(plan.settings["dataset"]).name)


def missing_section(folders: list[Path], run: set[Group]) -> str:
    """A row for the environments of a sweep of which nothing was run, and one for each cell that others lack."""
    speed, rows, seen, total, unknown = speeds(folders), [], set(), 0.0, 0
    for sweep, tables in SWEEPS.items():
        environments = defaultdict(dict)  # environment: {group: (line, plan)}, without what an earlier sweep has
        for line in cells(sweep):
            plan = parse(line)
            if (group := group_of(plan)) not in seen:
                environments[plan.environment][group] = line, plan
                seen.add(group)
        whole, parts = defaultdict(list), []  # whole: {names of the cells: environments of which nothing was run}
        for environment, found in environments.items():
            missing = {group: cell for group, cell in found.items() if group not in run}
            if len(missing) == len(found):
                whole[cell_names(list(found))].append(environment)
            else:
                parts += [(cell_names([g]), [line], [plan]) for g, (line, plan) in missing.items()]
        for names, some in whole.items():
            parts.append((names, [], [plan for e in some for _, plan in environments[e].values()]))
        for names, lines, plans in parts:
            time, known, compiled = hours(plans, speed)
            flag = " --compile" * compiled
            if lines:
                command = f'benchmark/run_cells.sh{flag} <<< "{" ".join(lines[0].split())}"'
            else:
                narrow = dict.fromkeys(env_name(plan) for plan in plans)
                command = f'ENVS="{" ".join(narrow)}" ' * (len(narrow) < len(environments))
                command = command.replace('"', "") if len(narrow) == 1 else command
                command += f"benchmark/{sweep}.sh{flag}"
            total, unknown = total + time, unknown + (not known)
            estimate = f"{time:,.{0 if time >= 10 else 1}f}{'' if known else '+'}" if time else "-"
            where = list(dict.fromkeys(short_name(plan.environment) for plan in plans))
            where = f"all {len(where)}" if 2 < len(where) == len(environments) else ", ".join(where)
            place = [", ".join(map(str, tables)), where, names]
            rows.append([*place, str(plans[0].seeds), f"`{command}`", estimate])
    header = ["Table", "Environment", "Cells", "Seeds", "Command", "Hours"]
    names = ", ".join(f"`{folder}`" for folder in folders)
    return (
        f"{len(seen - run)} of the {len(seen)} cells of the sweeps have no run at the paper's settings and length. "
        f"Hours are those of one process after the other, at the speeds of the runs in {names}: {total:,.0f} in all, "
        f"without what no run has told the speed of ({unknown} rows, - or +). `benchmark/judge.py` finds the win rates "
        f"of Table 3 when the runs are there.\n\n{markdown_table(header, rows, right='Seeds|Hours', padded=False)}\n"
    )
