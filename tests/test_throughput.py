"""benchmark/peers/throughput.py: what is measured, in which order, how it is summed up; not how fast anything is."""

import os

import pytest
from peers import throughput
from peers.throughput import Speed, in_turn, iterations, processor, table

CONTROL, ENV, ATARI = "sa2c_continuous_discretized", "InvertedDoublePendulum-v4", "sa2c_atari"


def test_rounds_go_back_and_forth_and_the_first_is_dropped(capsys):
    calls = []

    def measure(name):
        def run():
            calls.append(name)
            return Speed(len(calls), 1.0)

        return run

    found = in_turn(3, {"a": measure("a"), "b": measure("b")}, "label")
    assert "".join(calls) == "abbaabba"
    assert {name: [one.wall for one in speeds] for name, speeds in found.items()} == {"a": [4, 5, 8], "b": [3, 6, 7]}
    line = capsys.readouterr().out
    assert line.startswith(f"label, 3 rounds; {processor()}, ") and processor() and ", load " in line


def test_ratios_are_of_one_round_and_their_median_has_an_interval():
    """Both slow down tenfold in one round: the ratios do not."""
    peer = [Speed(x, 2.0, 1.0) for x in (100.0, 10.0, 100.0, 100.0, 100.0)]
    mine = [Speed(x, 5.0, 0.5) for x in (200.0, 20.0, 300.0, 200.0, 150.0)]
    found = table({"SB3": peer, "ours": mine}, ["SB3"]).set_index("")
    assert found.loc["ours"].tolist() == ["2.00 [1.50, 3.00]", "2.50 [2.50, 2.50]", "200", "5", "0.50"]
    assert found.loc["SB3"].tolist() == ["1.00 [1.00, 1.00]", "1.00 [1.00, 1.00]", "100", "2", "1.00"]
    assert table({"SB3": peer[:1], "ours": mine[:1]}, ["SB3"])["times SB3"].tolist() == ["1.00", "2.00"]


def test_an_iteration_that_compiles_is_left_out():
    marks = [(1.0, 10.0), (2.0, 11.0), (5.0, 12.0), (6.0, 14.0)]
    assert iterations(marks).tolist() == [[1.0, 1.0], [1.0, 2.0]]
    assert iterations([(0.0, 0.0), *marks]).tolist() == iterations(marks).tolist()


def measure_all() -> list[Speed]:
    return [
        throughput.ours(CONTROL, ENV, 128, 1, 2, False),
        throughput.ours(ATARI, "PongNoFrameskip-v4", 160, 1, 1, False),
        throughput.stable_baselines3(CONTROL, ENV, 64, 1),
        throughput.environments_alone(CONTROL, ENV, 32, 1),
        throughput.control_arithmetic(CONTROL, ENV, 32, 1),
    ]


def test_every_side_is_measured_by_the_clock_and_in_cpu_seconds():
    """Other iterations than those behind the script's own steps per second would raise an error."""
    speeds = throughput.in_fresh_process(measure_all)
    assert all(0 < speed.wall < 1.1 * speed.cpu for speed in speeds)  # one thread: CPU seconds are no more than seconds
    assert all(0.1 < speed.memory < 4 for speed in speeds)
    assert speeds[-1].cpu > speeds[0].cpu  # arithmetic is a limit


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scaling", "1", "0"], "--rounds, --num-seeds, --threads, --steps and --scaling must be at least 1"),
        (["--rounds", "0"], "--rounds, --num-seeds, --threads, --steps and --scaling must be at least 1"),
        (["--scripts", "sppo_rlhf_tldr"], "--scripts sppo_rlhf_tldr: known are sppo_continuous_discretized, "),
    ],
)
def test_what_it_cannot_measure_is_refused(capsys, flags, message):
    assert throughput.main(flags) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith(f"error: {message}") and error.count("\n") == 1


def test_the_sides_of_each_script(monkeypatch, capsys):
    """With other processes than the real ones, which say what they would do."""
    seen, plain = [], os.environ.get("MALLOC_MMAP_MAX_")

    def in_this_process(function, *inputs):
        kept = os.environ.get("MALLOC_MMAP_MAX_") == "0"
        if function is throughput.language_models:
            return {}
        if function is throughput.language:
            seen.append((inputs[0], kept, inputs[2]))
            return Speed({"TRL": 10.0, "ours": 20.0, "arithmetic": 50.0}[inputs[0]] * (2 if kept else 1), 1.0)
        seen.append((function.__name__, *inputs))
        return Speed(1.0, 1.0)

    monkeypatch.setattr(throughput, "in_fresh_process", in_this_process)
    assert throughput.main(["--rounds", "1", "--steps", "4", "--scripts", "sppo_rlhf_imdb"]) == 0
    one_round = [("TRL", False, 4), ("ours", False, 4), ("TRL", True, 4), ("ours", True, 4), ("arithmetic", False, 0)]
    assert seen == one_round + one_round[::-1] and os.environ.get("MALLOC_MMAP_MAX_") == plain
    rows = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines() if "|" in line]
    columns = [rows[0].index(f"times {base}") for base in ("TRL", "TRL, memory kept", "ours", "arithmetic")]
    kept = next(row for row in rows if row[1] == "ours, memory kept")
    assert [kept[column] for column in columns] == ["4.00", "2.00", "2.00", "0.80"]

    seen.clear()
    throughput.main(["--rounds", "1", "--scripts", CONTROL, ATARI, "--num-seeds", "3", "--variants", "compile"])
    assert seen[:3] == [
        ("stable_baselines3", CONTROL, "HalfCheetah-v4", 20_480, 1),
        ("ours", CONTROL, "HalfCheetah-v4", 20_480, 1, 3, True),
        ("environments_alone", CONTROL, "HalfCheetah-v4", 3000, 3),
    ]
    assert seen[7:9] == [
        ("ours", ATARI, "BreakoutNoFrameskip-v4", 4096, 2, 1, True),
        ("control_arithmetic", ATARI, "BreakoutNoFrameskip-v4", 2048, 2),
    ]
    seen.clear()
    throughput.main(["--rounds", "1", "--scripts", CONTROL, "--scaling", "1", "5"])
    assert seen[:2] == [("ours", CONTROL, "HalfCheetah-v4", 20_480, 1, agents, True) for agents in (1, 5)]
