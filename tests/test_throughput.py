"""benchmark/peers/throughput.py: what is measured, in which order, how it is summed up; not how fast anything is."""

import os

import pytest
from peers import throughput
from peers.throughput import Speed, in_fresh_process, in_turn, iterations, ours, processor, ratio, stable_baselines3


def test_rounds_go_back_and_forth_and_the_first_is_dropped(capsys):
    calls = []

    def measure(name):
        def run():
            calls.append(name)
            return Speed(len(calls), 1.0)

        return run

    found = in_turn(3, {"a": measure("a"), "b": measure("b")}, "label")
    assert "".join(calls) == "abbaabba"
    assert {name: [speed.wall for speed in speeds] for name, speeds in found.items()} == {
        "a": [4, 5, 8],
        "b": [3, 6, 7],
    }
    line = capsys.readouterr().out
    assert line.startswith(f"label, 3 rounds; {processor()}, ") and processor() and ", load " in line


def test_ratios_are_of_one_round_and_their_median_has_an_interval():
    """Both slow down tenfold in one round: the ratios do not."""
    peer = [Speed(x, 2.0) for x in (100.0, 10.0, 100.0, 100.0, 100.0)]
    mine = [Speed(x, y) for x, y in ((200.0, 5.0), (20.0, 5.0), (300.0, 5.0), (200.0, 5.0), (150.0, 5.0))]
    assert ratio(mine, peer) == "2.00 [1.50, 3.00] (per CPU second 2.50 [2.50, 2.50])"
    assert ratio(mine[:1], peer[:1]) == "2.00 (per CPU second 2.50)"


def test_an_iteration_that_compiles_is_left_out():
    marks = [(1.0, 10.0), (2.0, 11.0), (5.0, 12.0), (6.0, 14.0)]
    assert iterations(marks).tolist() == [[1.0, 1.0], [1.0, 2.0]]
    assert iterations([(0.0, 0.0), *marks]).tolist() == iterations(marks).tolist()


def test_a_script_is_measured_by_the_clock_and_in_cpu_seconds():
    """Other iterations than those behind the script's own steps per second would raise an error."""
    speed = in_fresh_process(ours, "sa2c_continuous_discretized", "InvertedDoublePendulum-v4", 1024, 1, 2, False)
    assert 0 < speed.wall < 1.1 * speed.cpu  # one thread: CPU seconds are no more than seconds
    assert sum(speed.shares.values()) == pytest.approx(1) and min(speed.shares.values()) > 0
    assert 0.1 < speed.memory < 4
    atari = in_fresh_process(ours, "sa2c_atari", "PongNoFrameskip-v4", 160, 1, 1, False)
    assert sum(atari.shares.values()) == pytest.approx(1) and min(atari.shares.values()) > 0
    assert list(atari.shares) == ["policy", "environment", "update and the rest"]
    peer = in_fresh_process(stable_baselines3, "sa2c_continuous_discretized", "InvertedDoublePendulum-v4", 64, 1)
    assert 0 < peer.wall < 1.1 * peer.cpu


@pytest.mark.parametrize("flags", [("--scaling", "0"), ("--scaling", "1", "0"), ("--rounds", "0"), ("--steps", "0")])
def test_numbers_below_one_are_refused(capsys, flags):
    message = "error: --rounds, --num-seeds, --threads, --steps and --scaling must be at least 1\n"
    assert throughput.main(list(flags)) == 2 and capsys.readouterr() == ("", message)


def test_beside_trl_every_side_has_its_environment_and_the_kept_ones_their_ratios(monkeypatch, capsys):
    seen, plain = [], os.environ.get("MALLOC_MMAP_MAX_")

    def in_this_process(function, *inputs):
        if function is throughput.language_models:
            return {}
        side, _, updates, *_ = inputs
        kept = os.environ.get("MALLOC_MMAP_MAX_") == "0"
        seen.append((side, kept, updates))
        speed = {"TRL": 10.0, "ours": 20.0, "arithmetic": 50.0}[side] * (2 if kept else 1)
        return Speed(speed, speed, memory=1.0)

    monkeypatch.setattr(throughput, "in_fresh_process", in_this_process)
    throughput.compare_with_trl(throughput.Args(rounds=1, steps=4))
    one_round = [("TRL", False, 4), ("ours", False, 4), ("TRL", True, 4), ("ours", True, 4), ("arithmetic", False, 0)]
    assert seen == one_round + one_round[::-1] and os.environ.get("MALLOC_MMAP_MAX_") == plain
    out = capsys.readouterr().out
    assert "  ours, memory kept: 2.00 (per CPU second 2.00) times ours\n" in out
    assert "  ours, memory kept: 2.00 (per CPU second 2.00) times TRL, memory kept\n" in out
    assert "  ours: 2.00 (per CPU second 2.00) times TRL, 0.40 (per CPU second 0.40) of our arithmetic alone\n" in out
    assert "  ours, memory kept: 4.00 (per CPU second 4.00) times TRL, 0.80 " in out
