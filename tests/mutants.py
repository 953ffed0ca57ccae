"""Bugs that the tests must notice: each is put into a copy of the repository, where its tests have to fail.

They have to pass without it first. Tests that cannot be collected, or do not end in time, have not noticed anything.

python tests/mutants.py                     # all of them; exit code 1 unless each is caught
python tests/mutants.py --only bootstrap    # those with a word in their name, script or test file
python tests/mutants.py --list
"""

import argparse
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
LIBRARIES = "torch.utils.tensorboard safetensors.torch tyro mujoco ale_py stable_baselines3 hypothesis".split()
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "runs", "wandb", "results", "report", "assets")
TIMEOUT = 600  # seconds for the tests of one mutant

# What breaks | script | test file, perhaps with pytest's -k. The lines after - have exactly one place in the script,
# and those after + replace them.
MUTANTS = r"""
# The loss
loss: sign | sppo_continuous_discretized | loss
- L_ppo = -torch.min(
+ L_ppo = torch.min(

loss: sign of the reverse loss | sppo_continuous_discretized | loss
- Z * unclipped
+ -Z * unclipped

loss: sign | sa2c_continuous_discretized | loss
- L_a2c = -advantages
+ L_a2c = advantages

loss: sign of the reverse loss | sa2c_continuous_discretized | loss
- advantages * Z * torch
+ -advantages * Z * torch

loss: Z ignored | sa2c_continuous_discretized | loss
- advantages * Z * torch
+ -advantages * torch

loss: nothing is clipped | sppo_continuous_discretized | loss
- -torch.min(unclipped, clipped)
+ -unclipped

clip mask: every sample active | sppo_continuous_discretized | loss
- unclipped <= clipped
+ unclipped == unclipped

clip mask: the clipped ones active | sppo_continuous_discretized | loss
- unclipped <= clipped
+ unclipped >= clipped

clip mask: in one script alone | sppo_atari | siblings
- unclipped <= clipped
+ unclipped < clipped

loss: sign in one script alone | sa2c_atari | siblings
- advantages * Z * torch
+ -advantages * Z * torch

clip mask: every sample active | sppo_rlhf_imdb | loss
- unclipped <= clipped
+ unclipped == unclipped

alpha and beta swapped | sppo_continuous_discretized | loss
- (alpha * L_ppo + beta * L_rppo)
+ (beta * L_ppo + alpha * L_rppo)

alpha and beta swapped | sa2c_continuous_discretized | loss
- alpha * L_a2c + beta * L_ra2c)
+ beta * L_a2c + alpha * L_ra2c)

# The update
gradient clip: off | sa2c_continuous_discretized | references
- scale = (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)
+ scale = torch.ones_like(grad_norm)

gradient clip: small gradients scaled up | sppo_continuous_discretized | references
- scale = (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)
+ scale = (args.max_grad_norm / (grad_norm + 1e-6))

gradient clip: small gradients scaled up | sppo_atari | references_atari
- scale = (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)
+ scale = (args.max_grad_norm / (grad_norm + 1e-6))

gradient clip: by the value | sa2c_atari | references_atari
- p.grad = g * scale
+ p.grad = g.clamp(-0.5, 0.5)

gradient clip: one norm of all agents | sppo_continuous_discretized | references
- for g in grads]).norm(dim=0)
+ for g in grads]).norm(dim=0).norm().expand(len(loss))

entropy: sign | sa2c_continuous_discretized | references
- loss - args.ent_coef * entropy
+ loss + args.ent_coef * entropy

entropy: sign | sppo_atari | references_atari
- loss - args.ent_coef * entropy
+ loss + args.ent_coef * entropy

value loss: halved | sa2c_atari | references_atari
- (values - returns).square().mean(-1)
+ (values - returns).square().mean(-1) / 2

advantages: one mean of all agents | sppo_continuous_discretized | references
- (advantages - advantages.mean(-1, keepdim=True))
+ (advantages - advantages.mean())

advantages: biased deviation | sppo_atari | references_atari
- advantages.std(-1, keepdim=True)
+ advantages.std(-1, keepdim=True, correction=0)

optimizer: eps | sppo_continuous_discretized | references
- args.learning_rate, eps=1e-5
+ args.learning_rate, eps=1e-8

optimizer: eps | sa2c_continuous_discretized | references
- alpha=0.99, eps=1e-5
+ alpha=0.99, eps=1e-8

optimizer: eps | sppo_atari | references_atari
- args.learning_rate, eps=1e-5
+ args.learning_rate, eps=1e-8

optimizer: square average starts at zero | sa2c_atari | references_atari
- torch.ones_like(p)
+ torch.zeros_like(p)

optimizer: eps outside the root | sa2c_atari | references_atari
- (state["square_avg"] + group["eps"]).sqrt()
+ state["square_avg"].sqrt() + group["eps"]

schedule: one rollout late | sppo_continuous_discretized | references
- 1 - global_step / args.total
+ 1 - (global_step - T * E) / args.total

schedule: never ends | sa2c_atari | atari -k schedules
- 1 - global_step / args.total
+ 1 - 0.9 * global_step / args.total

schedule: clip range | sppo_atari | atari -k schedules
- clip_coef.fill_(args.clip_coef * remaining)
+ clip_coef.fill_(args.clip_coef)

minibatches: drawn with replacement | sppo_atari | atari -k epoch
- torch.randperm(T * E, generator=generator)
+ torch.randint(T * E, (T * E,), generator=generator)

minibatches: one order for all agents | sppo_continuous_discretized | seeds
- torch.randperm(T * E, generator=g) for g in generators
+ torch.randperm(T * E, generator=generators[0]) for _ in generators

# The rollout
bootstrap: dropped at a time limit | sppo_continuous_discretized | references
- bootstrap[:, t][time_limit] = args
+ bootstrap[:, t][time_limit] = 0 * args

bootstrap: of terminated episodes too | sa2c_continuous_discretized | references
- time_limit = truncated & ~terminated
+ time_limit = truncated | terminated

bootstrap: of episodes that end both ways | sppo_continuous_discretized | references
- time_limit = truncated & ~terminated
+ time_limit = truncated

bootstrap: dropped at the frame limit | sppo_atari | atari -k frame_limit
- reward_buf[t] += args
+ reward_buf[t] += 0 * args

bootstrap: not discounted | sa2c_atari | atari -k frame_limit
- reward_buf[t] += args.gamma * final_value
+ reward_buf[t] += final_value

bootstrap: of the observation after the reset | sa2c_continuous_discretized | references
- agent.value(tensor(normalizer.obs(final_obs)))
+ agent.value(tensor(normalizer.obs(raw_obs)))

bootstrap: final observations overwritten | sppo_continuous_discretized | references
- final_obs = np.array(final_obs)
+ final_obs = np.asarray(final_obs)

GAE: lambda missing | sppo_continuous_discretized | references
- decay = gamma * gae_lambda * ~dones
+ decay = gamma * ~dones

GAE: runs over the end of an episode | sppo_continuous_discretized | references
- decay = gamma * gae_lambda * ~dones
+ decay = gamma * gae_lambda

GAE: lambda and gamma swapped | sppo_atari | atari -k epoch
- gae(reward_buf, values, done_buf, last_value, args.gamma, args.gae_lambda)
+ gae(reward_buf, values, done_buf, last_value, args.gae_lambda, args.gamma)

GAE: lambda of no effect | sa2c_continuous_discretized | references
- gae(rewards, values, done_buf, last_value, args.gamma, args.gae_lambda)
+ gae(rewards, values, done_buf, last_value, args.gamma, 1.0)

observations: counted in after their normalization | sppo_continuous_discretized | references
-             normalizer.count(raw_obs)
-             obs = normalizer.obs(raw_obs)
+             obs = normalizer.obs(raw_obs)
+             normalizer.count(raw_obs)

observations: eps | sppo_continuous_discretized | references
- np.sqrt(self.statistics["obs_var"] + 1e-8)
+ np.sqrt(self.statistics["obs_var"] + 1e-4)

observations: not clipped | sppo_continuous_discretized | references
- ((obs - mean) / std).clip(-10, 10)
+ ((obs - mean) / std)

rewards: their mean subtracted | sppo_continuous_discretized | references
- return (rewards / np.sqrt
+ return ((rewards - self.statistics["return_mean"]) / np.sqrt

rewards: returns run over the end of an episode | sppo_continuous_discretized | references
- self.returns[dones[:, t]] = 0
+ pass

rewards: not clipped | sppo_continuous_discretized | references
- np.sqrt(new_var + 1e-8)).clip(-10, 10)
+ np.sqrt(new_var + 1e-8))

reward noise: before normalization | sa2c_continuous_discretized | references
- (normalizer.rewards(reward_buf, done_buf) + reward_noise)
+ normalizer.rewards(reward_buf + reward_noise, done_buf)

reward noise: in the logged returns | sppo_continuous_discretized | references
- episode_return += reward_buf[:, t]
+ episode_return += reward_buf[:, t] + reward_noise[:, t]

reward noise: in the evaluation | sppo_continuous_discretized | references
- returns += reward * running
+ returns += (reward + args.reward_noise_std * np.random.randn(*reward.shape)) * running

bins: one off | sppo_continuous_discretized | references
- space.high.flatten(), num_bins, dtype=space.dtype)
+ space.high.flatten(), num_bins + 1, dtype=space.dtype)[:-1]

sampling: exponential noise | sppo_continuous_discretized | references
- exponential_(generator=g) for g in generators]).log()
+ exponential_(generator=g) for g in generators])

sampling: none | sa2c_continuous_discretized | references
- (agent.logits(tensor(obs)).cpu().numpy() + gumbel[:, t]).argmax(-1)
+ agent.logits(tensor(obs)).cpu().numpy().argmax(-1)

sampling: exponential noise | sa2c_atari | atari -k frequencies
- T, E, envs.num_actions).exponential_(generator=generator).log()
+ T, E, envs.num_actions).exponential_(generator=generator)

sampling: none in the evaluation | sppo_atari | atari -k first_game_alone
- (logits + gumbel.to(args.device))
+ (logits)

# Devices
devices: clip range on the CPU | sppo_atari | devices -k sppo_atari
- torch.tensor(args.clip_coef, device=args.device)
+ torch.tensor(args.clip_coef)

devices: rollout on the CPU | sppo_continuous_discretized | devices -k sppo_continuous
- tensor = partial(torch.as_tensor, device=args.device)
+ tensor = torch.as_tensor

devices: logits left where they are | sa2c_continuous_discretized | devices -k sa2c_continuous
- agent.logits(tensor(obs)).cpu().numpy()
+ agent.logits(tensor(obs)).numpy()

devices: networks on the CPU | sppo_atari | devices -k sppo_atari
- agent = Agent(envs.num_actions, generator).to(args.device)
+ agent = Agent(envs.num_actions, generator)

devices: what was chosen on the CPU | sa2c_atari | devices -k sa2c_atari
- chosen_buf = torch.ones((T, E), device=args.device)
+ chosen_buf = torch.ones((T, E))

devices: a sum on the CPU | sppo_rlhf_imdb | devices -k sentiment
- x.float().to(device) for x
+ x.float() for x

devices: mask on the CPU | sppo_rlhf_tldr | devices -k adapter
- args.response_length, dtype=torch.bool, device=device)
+ args.response_length, dtype=torch.bool)

# The evaluation, and what a run leaves
evaluation: statistics go on | sppo_continuous_discretized | cli -k saved_model
-             obs = torch.from_numpy(normalizer.obs(raw_obs))
+             normalizer.count(raw_obs)
+             obs = torch.from_numpy(normalizer.obs(raw_obs))

evaluation: in the environments of the training | sppo_continuous_discretized | seeds
- TRAINING, EVALUATION = 0, 1
+ TRAINING, EVALUATION = 0, 0

evaluation: counts later games | sppo_atari | atari -k first_game_alone
- returns += reward * running
+ returns += reward

resume: random numbers start anew | sppo_continuous_discretized | cli -k round_trip
- generator.set_state(state)
+ pass

resume: random numbers start anew | sa2c_atari | atari -k resumed
- generator.set_state(progress["generator"])
+ pass

resume: statistics lost | sppo_continuous_discretized | cli -k round_trip
- "optimizer": optimizer, "normalizer": normalizer}
+ "optimizer": optimizer}

resume: optimizer lost | sppo_atari | atari -k resumed
- parts = {"agent": agent, "optimizer": optimizer}
+ parts = {"agent": agent}

resume: curves begin anew | sppo_continuous_discretized | cli -k resumed
- if self.path.exists():
+ if False:

resume: TensorBoard not cut | sppo_continuous_discretized | cli -k resumed
- , purge_step=global_step + 1)
+ )

resume: the first environment seeds again | sppo_continuous_discretized | seeds
- envs.reset(args.seeds, TRAINING, global_step)
+ envs.reset(args.seeds, TRAINING, 0)

resume: the first game seeds again | sa2c_atari | atari -k resumed
- env_seeds(args.seed, E, TRAINING, global_step)
+ env_seeds(args.seed, E, TRAINING, 0)

resume: counters lost | sa2c_continuous_discretized | seeds
-     return state["progress"]
+     return {}

# Atari
Atari: rewards not clipped | sppo_atari | atari -k clipped
- flip_rewards(np.sign(raw_reward)
+ flip_rewards(raw_reward

Atari: flips to -r | sppo_atari | references_atari
- 1 - rewards, rewards
+ -rewards, rewards

Atari: flips with the opposite probability | sppo_atari | references_atari
- np.where(uniform < flip_prob
+ np.where(uniform > flip_prob

Atari: no flips | sa2c_atari | atari -k clipped
- uniform[t], args.reward_flip_prob)
+ uniform[t], 0.0)

Atari: a lost life ends nothing | sppo_atari | atari -k lost_life
- done_buf[t] = terminated | truncated
+ done_buf[t] = game_over

Atari: scores of single lives | sa2c_atari | atari -k scores
- in np.flatnonzero(game_over):
+ in np.flatnonzero(terminated):

Atari: scores of clipped rewards | sppo_atari | atari -k scores
- episode_return += raw_reward
+ episode_return += np.sign(raw_reward)

Atari: no fire after a lost life | sa2c_atari | atari -k lost_life
-             if envs.must_fire.any():
-                 action_buf[t]
+             if envs.must_fire.all():
+                 action_buf[t]

Atari: no fire in the evaluation | sppo_atari | atari -k first_game_alone
-             if envs.must_fire.any():
-                 actions[envs.must_fire]
+             if envs.must_fire.all():
+                 actions[envs.must_fire]

# Language models
rewards: cut at the wrong place | sppo_rlhf_tldr | rlhf -k adapter_reward
- [[*begin, *text, end][-room:]
+ [[*begin, *text, end][:room]

rewards: prompt left out | sppo_rlhf_imdb | rlhf -k probability
- [prompt + response for prompt, response in zip(prompts, responses)]
+ [response for prompt, response in zip(prompts, responses)]

4 bit: quantized layers in eval mode | sppo_rlhf_tldr | rlhf_cli -k 4_bits
- layer.training = hasattr(layer, "quant_state")
+ layer.training = False

prompts: an instruction with the mark in it | sppo_rlhf_tldr | rlhf -k prompt_of_tldr
- rsplit(PROMPT_END, 1)
+ split(PROMPT_END, 1)

models: drawn where weights are missing | sppo_rlhf_imdb | rlhf_cli -k refused
- sorted(info["missing_keys"])
+ sorted(info["unexpected_keys"])

--revision: not of the default tokenizer | sppo_rlhf_imdb | rlhf_cli -k commits
- tokenizer = args.tokenizer or TOKENIZERS.get(args.policy)
+ tokenizer = args.tokenizer

responses: the first end token alone ends them | sppo_rlhf_imdb | rlhf_models -k end_token
- if token in ends), len(response))
+ if token == ends[0]), len(response))

resume: the last row once more | sppo_rlhf_tldr | rlhf_cli -k awkward
- min(update, args.num_updates - 1) if update else -1
+ update or -1

policy: saved after the final evaluation | sppo_rlhf_imdb | rlhf_cli -k final_evaluation
-         save_policy(learner, args)
-         say("trained and saved; evaluating")
-     metrics, samples = evaluate(learner, args)
+         say("trained and saved; evaluating")
+     metrics, samples = evaluate(learner, args)
+     save_policy(learner, args)

# Environments and models
observations: a vector of switches is not flattened | sppo_continuous_discretized | cli -k flattened
- isinstance(space, gym.spaces.Box) and len(space.shape) == 1
+ len(space.shape or ()) == 1

models: of another script | sppo_continuous_discretized | copies -k another_copy
- if script != SCRIPT:
+ if script is None:

# What strangers bring
regular numbers: as they come | sppo_continuous_discretized | strangers -k any_form
- (np.asarray(x).item() for x in (reward, terminated, truncated))
+ (reward, terminated, truncated)

regular numbers: not copied | sa2c_continuous_discretized | strangers -k any_form
- final_obs = np.array(final_obs)
+ 

lost model: saved after the final evaluation | sppo_continuous_discretized | strangers -k survives
-         if finished:  # before the evaluation, where an environment may fail
-             save_models(args, agent, normalizer)
-         if evaluate_now:
-             progress["eval_returns"] = evaluate(args, agent, normalizer, None if finished else global_step).tolist()
+         if evaluate_now:
+             progress["eval_returns"] = evaluate(args, agent, normalizer, None if finished else global_step).tolist()
+         if finished:
+             save_models(args, agent, normalizer)

lost model: saved after the final evaluation | sa2c_atari | strangers -k survives
-         if finished:  # before the evaluation, where a game may fail
-             save_model(args, agent)
-         if evaluate_now:
-             progress["eval_returns"] = evaluate(args, agent, None if finished else global_step).tolist()
+         if evaluate_now:
+             progress["eval_returns"] = evaluate(args, agent, None if finished else global_step).tolist()
+         if finished:
+             save_model(args, agent)

lost model: of the seeds after one that failed | sppo_continuous_discretized | strangers -k beside
-             failed.append(own_args.seed)
-             continue
+             fail(f"no result of seed {own_args.seed}", code=1)

one writer: no lock | sppo_atari | strangers -k writer
- fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
+ pass

default name: of a second | sa2c_continuous_discretized | strangers -k same_second
- %Y%m%d-%H%M%S-%f}
+ %Y%m%d-%H%M%S}

closed: not after a failure | sppo_continuous_discretized | strangers -k closed
- with closing(Envs(args, args.num_envs)) as envs:
+ if envs := Envs(args, args.num_envs):

closed: not after a failure | sppo_atari | strangers -k closed
- with closing(Envs(args, args.num_envs)) as envs:
+ if envs := Envs(args, args.num_envs):

closed: not where it is refused | sa2c_continuous_discretized | strangers -k closed
-         with closing(env):
-             fail(f"--env-id {env_id}: observations
+         if True:
+             fail(f"--env-id {env_id}: observations

ids: a missing package | sppo_continuous_discretized | strangers -k ids
- except (gym.error.Error, ImportError) as error:
+ except gym.error.Error as error:

ids: an empty module | sa2c_continuous_discretized | strangers -k ids
- if colon and not all(
+ if module and not all(

ids: a game without an emulator | sppo_atari | strangers -k ids
- ale_py.ALEInterface.isSupportedROM(ale_py.roms.get_rom_path(rom))
+ True

ids: sticky actions forgotten | sa2c_atari | strangers -k ids
- if match[2] in ("NoFrameskip-v0", "-v5")
+ if match[2] in ("-v5",)

ids: rendered unseen | sppo_continuous_discretized | strangers -k rendered
- if not isinstance(frames, np.ndarray):
+ if frames is None:

bounds: bins that are no numbers | sppo_continuous_discretized | strangers -k boxes
- if bins.size and np.isfinite(bins).all():
+ if bins.size:

bounds: whole numbers rounded | sa2c_continuous_discretized | strangers -k boxes
- isinstance(space, gym.spaces.Box) and np.issubdtype(space.dtype, np.floating)
+ isinstance(space, gym.spaces.Box)

output: a reader that has gone | sa2c_continuous_discretized | strangers -k head
- except OSError:
+ except FileNotFoundError:

output: the number of standard error goes to a file | sppo_continuous_discretized | strangers -k no_error
- (file or open(os.devnull, "w") for file in std)
+ std

packages: an empty folder | sppo_atari | strangers -k empty_folder
- not any(metadata.distributions(name=package))
+ not import_module("importlib.util").find_spec(package)

hints: not quoted | sppo_continuous_discretized | strangers -k pasted
- {shlex.join(resume)}
+ {' '.join(resume)}

hints: not quoted where a directory is in use | sa2c_atari | strangers -k pasted
- {shlex.quote(str(run_dir))}
+ {run_dir}

videos: of every environment | sa2c_continuous_discretized | strangers -k recorded
- None if i else video_dir
+ video_dir

resume: of a folder that a kill left | sa2c_atari | strangers -k kill_or
- or "{}")
+ )
"""


class Mutant(NamedTuple):
    name: str
    script: str
    tests: str
    old: str
    new: str


def parse(text: str) -> list[Mutant]:
    mutants = []
    for block in text.strip().split("\n\n"):
        header, *lines = [line for line in block.splitlines() if not line.startswith("#")]
        old, new = ("\n".join(line[2:] for line in lines if line[0] == sign) for sign in "-+")
        name, script, tests = header.split(" | ")
        mutants.append(Mutant(name, f"{script}.py", tests, old, new))
    return mutants


def mutated(mutant: Mutant) -> str:
    """The script's text with the bug. Exits unless the old text has exactly one place."""
    text = (ROOT / mutant.script).read_text()
    if (places := text.count(mutant.old)) != 1:
        raise SystemExit(f"{mutant.name}: {places} places in {mutant.script} of\n{mutant.old}")
    return text.replace(mutant.old, mutant.new)


class FirstFailure:
    """A plugin of pytest that remembers which test failed."""

    name = ""

    def pytest_runtest_logreport(self, report):
        self.name = self.name or (report.nodeid if report.failed else "")

    pytest_collectreport = pytest_runtest_logreport


def run_tests(mutant: Mutant) -> tuple[str, str, float]:
    """What came of the tests on the mutant, the first that failed and the seconds until then; in a process of its own.

    That process is a fork of one that has imported the libraries, which takes longer than most tests.
    """
    start, failure = time.monotonic(), FirstFailure()
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(ROOT, Path(folder, "copy"), ignore=IGNORED))
        (copy / mutant.script).write_text(mutated(mutant))
        os.chdir(copy)
        sys.path[0] = str(copy)  # was this file's folder
        file, *options = mutant.tests.split()
        signal.signal(signal.SIGALRM, signal.default_int_handler)  # as Ctrl-C, after which pytest cleans up
        signal.alarm(TIMEOUT)
        code = pytest.main(["-x", "-p", "no:cacheprovider", f"tests/test_{file}.py", *options], [failure])
        signal.alarm(0)
        os.chdir(ROOT)
    seconds = time.monotonic() - start
    outcome = {0: "passed", 1: "failed"}.get(int(code), f"pytest {code:d}")  # 2 to 5: nothing was tested
    return "timeout" if seconds > TIMEOUT else outcome, failure.name, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word in the name, script or test file")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once")
    parser.add_argument("--list", action="store_true", help="print them and run nothing")
    args = parser.parse_args()
    chosen = [m for m in parse(MUTANTS) if args.only.lower() in f"{m.name} {m.script} {m.tests}".lower()]
    lines = {m: f"{m.script.removesuffix('.py'):28} {m.name:52}" for m in chosen if mutated(m)}
    if args.list:
        print(*lines.values(), sep="\n")
        return 0
    for library in LIBRARIES:
        importlib.import_module(library)
    caught = 0
    with multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=1) as pool:
        unchanged = {m.tests: m._replace(new=m.old) for m in chosen}
        for tests, (outcome, test, seconds) in zip(unchanged, pool.imap(run_tests, unchanged.values())):
            print(f"{outcome:8} without a bug: {tests:66} {seconds:4.0f} s  {test[:120]}", flush=True)
            if outcome != "passed":  # its mutants are not caught by them
                lines = {m: line for m, line in lines.items() if m.tests != tests}
        for line, (outcome, test, seconds) in zip(lines.values(), pool.imap(run_tests, lines)):
            verdict = {"failed": "caught", "passed": "SURVIVED"}.get(outcome, outcome)
            caught += verdict == "caught"
            print(f"{verdict:8} {line} {seconds:4.0f} s  {test[:120]}", flush=True)
    print(f"{caught} of {len(chosen)} caught")
    return 0 if 0 < caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
