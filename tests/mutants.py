"""Bugs in the mathematics that the tests must notice: each is put into a copy of the repository, where its tests fail.

python tests/mutants.py                # all of them (make mutants); exit code 1 unless each is caught
python tests/mutants.py --random 5     # some, as continuous integration does after make test
python tests/mutants.py --only gae     # those with a word in their line
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "runs", "results", "assets")
TIMEOUT = 900  # seconds for the tests of one mutant
SPPO, SA2C = "sppo_continuous_discretized", "sa2c_continuous_discretized"

# script | test file, perhaps with pytest's -k | text that has one place in the script => what takes its place
MUTANTS = f"""
# The loss
{SPPO} | loss | L_ppo = -torch.min( => L_ppo = torch.min(
{SPPO} | loss | Z * unclipped => -Z * unclipped
{SPPO} | loss | unclipped <= clipped => unclipped == unclipped
{SPPO} | loss | (alpha * L_ppo + beta * L_rppo) => (beta * L_ppo + alpha * L_rppo)
{SA2C} | loss | L_a2c = -advantages => L_a2c = advantages
{SA2C} | loss | advantages * Z * torch => advantages * torch
sppo_atari | siblings | unclipped <= clipped => unclipped < clipped
sppo_rlhf_imdb | loss | unclipped <= clipped => unclipped == unclipped
# The update
{SPPO} | references | (advantages - advantages.mean(-1, keepdim=True)) => (advantages - advantages.mean())
{SPPO} | references | args.learning_rate, eps=1e-5 => args.learning_rate, eps=1e-8
{SPPO} | references | 1 - global_step / args.total => 1 - (global_step - T * E) / args.total
{SPPO} | seeds | torch.randperm(T * E, generator=g) for g in generators => torch.randperm(T * E) for _ in generators
{SA2C} | references | loss - args.ent_coef * entropy => loss + args.ent_coef * entropy
{SA2C} | references | alpha=0.99, eps=1e-5 => alpha=0.99, eps=1e-8
sppo_atari | references_atari | advantages.std(-1, keepdim=True) => advantages.std(-1, keepdim=True, correction=0)
sppo_atari | atari -k schedules | clip_coef.fill_(args.clip_coef * remaining) => clip_coef.fill_(args.clip_coef)
sa2c_atari | references_atari | torch.ones_like(p) => torch.zeros_like(p)
sa2c_atari | references_atari | (values - returns).square().mean(-1) => (values - returns).square().mean(-1) / 2
# The rollout
{SPPO} | references | bootstrap[:, t][time_limit] = args => bootstrap[:, t][time_limit] = 0 * args
{SPPO} | references | decay = gamma * gae_lambda * ~dones => decay = gamma * gae_lambda
{SPPO} | references | self.returns[dones[:, t]] = 0 => pass
{SPPO} | references | ((obs - mean) / std).clip(-10, 10) => ((obs - mean) / std)
{SPPO} | references | episode_return += reward_buf[:, t] => episode_return += reward_buf[:, t] + reward_noise[:, t]
{SPPO} | references | for g in generators]).log() => for g in generators])
{SA2C} | references | time_limit = truncated & ~terminated => time_limit = truncated | terminated
{SA2C} | references | agent.value(tensor(normalizer.obs(final_obs))) => agent.value(tensor(normalizer.obs(raw_obs)))
sa2c_atari | atari -k frame_limit | reward_buf[t] += args => reward_buf[t] += 0 * args
sppo_atari | references_atari | 1 - rewards, rewards => -rewards, rewards
sa2c_atari | atari -k clipped | flip_rewards(np.sign(raw_reward) => flip_rewards(raw_reward
sa2c_atari | atari -k scores | in np.flatnonzero(game_over): => in np.flatnonzero(terminated):
# Evaluation and resume
{SPPO} | seeds | TRAINING, EVALUATION = 0, 1 => TRAINING, EVALUATION = 0, 0
{SPPO} | cli -k round_trip | generator.set_state(state) => pass
sa2c_atari | atari -k first_game_alone | returns += reward * running => returns += reward
# Language models
sppo_rlhf_imdb | rlhf -k probability | [prompt + response for prompt, response in => [response for prompt, response in
sppo_rlhf_tldr | rlhf -k adapter_reward | [[*begin, *text, end][-room:] => [[*begin, *text, end][:room]
sppo_rlhf_imdb | rlhf_models -k end_token | if token in ends), len(response)) => if token == ends[0]), len(response))
"""


class Mutant(NamedTuple):
    script: str
    tests: str
    old: str
    new: str


def mutants() -> list[Mutant]:
    lines = [line for line in MUTANTS.splitlines() if line and not line.startswith("#")]
    fields = [line.split(" | ", 2) for line in lines]
    return [Mutant(f"{script}.py", tests, *change.split(" => ")) for script, tests, change in fields]


def mutated(mutant: Mutant) -> str:
    """The script's text with the bug. Raises ValueError unless the old text has exactly one place."""
    text = (ROOT / mutant.script).read_text()
    if (places := text.count(mutant.old)) != 1:
        raise ValueError(f"{places} places in {mutant.script} of {mutant.old}")
    return text.replace(mutant.old, mutant.new)


def outcome(mutant: Mutant) -> str:
    """caught where a test fails; tests that cannot be collected, or do not end in time, have noticed nothing."""
    file, *options = mutant.tests.split()
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(ROOT, Path(folder, "copy"), ignore=IGNORED)
        (copy / mutant.script).write_text(mutated(mutant))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/test_{file}.py"]
        try:
            done = subprocess.run([*command, *options], cwd=copy, capture_output=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return "timeout"
    return {0: "SURVIVED", 1: "caught"}.get(done.returncode, f"pytest {done.returncode}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word in the line of a mutant")
    parser.add_argument("--random", type=int, help="this many, drawn anew each time")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once")
    args = parser.parse_args()
    chosen = [mutant for mutant in mutants() if args.only.lower() in " ".join(mutant).lower()]
    if args.random:
        chosen = random.sample(chosen, min(args.random, len(chosen)))
    caught = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, verdict in zip(chosen, pool.map(outcome, chosen)):
            caught += verdict == "caught"
            print(f"{verdict:8} {mutant.script:32} {mutant.tests:24} {mutant.old} => {mutant.new}", flush=True)
    print(f"{caught} of {len(chosen)} caught")
    return 0 if 0 < caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
