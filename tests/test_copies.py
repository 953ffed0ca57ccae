"""A copy of a script with changes of each kind, as in docs/changing-a-script.md, trains, resumes and is evaluated."""

import csv
import importlib.util
import json
import re
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import CONTINUOUS, CONTROL, ROOT, read_checkpoint
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

LOSS = {
    "sppo": (
        "    L_rppo = torch.where(active, Z * unclipped, 0.0)  # Eq. 8\n",
        "    L_rppo = torch.where(active, Z * ratio * advantages.sign(), 0.0)\n",
    ),
    "sa2c": ("    L_a2c = -advantages * logprob  # Eq. 16\n", "    L_a2c = -advantages.sign() * logprob\n"),
}
TAG = ('        "losses/entropy": ', '        "losses/advantage_std": advantages.std(-1),\n        "losses/entropy": ')
METRICS = {
    "continuous_discretized": (
        '            metrics |= {"charts/learning_rate": optimizer.param_groups[0]["lr"], "charts/SPS": sps}\n',
        '            metrics |= {"charts/learning_rate": optimizer.param_groups[0]["lr"], "charts/SPS": sps}\n'
        '            metrics["charts/reward_std"] = reward_buf[i].std()\n',
    ),
    "atari": (
        '        metrics["losses/explained_variance"] =',
        '        metrics["charts/reward_std"] = reward_buf.std()\n        metrics["losses/explained_variance"] =',
    ),
}
FLAG = ("    gamma: float = 0.99", "    value_scale: float = 1.0  # of the value loss\n    gamma: float = 0.99")
USE = ("args.vf_coef * value_loss", "args.vf_coef * args.value_scale * value_loss")
NETWORK = {
    "continuous_discretized": [
        (
            "        self.critic = mlp(1, 1.0)\n",
            "        self.critic = mlp(1, 1.0)\n"
            "        self.log_temperature = nn.Parameter(torch.zeros(len(generators), 1, 1, 1))\n",
        ),
        (
            "self.actor(obs).unflatten(-1, self.action_shape)",
            "self.actor(obs).unflatten(-1, self.action_shape) / self.log_temperature.exp()",
        ),
    ],
    "atari": [
        (
            "            init(nn.Linear(64 * 7 * 7, 512), 2**0.5),\n",
            "            init(nn.Linear(64 * 7 * 7, 512), 2**0.5),\n            nn.LayerNorm(512),\n",
        )
    ],
}
LAYER_NORM = ("nn.Tanh(), second, nn.Tanh()", "nn.Tanh(), second, nn.LayerNorm(64), nn.Tanh()")
TARGET_KL = [
    (
        "    gamma: float = 0.99",
        "    target_kl: float = 0.02  # of an agent, above which its epochs end\n    gamma: float = 0.99",
    ),
    (
        "        for _ in range(args.update_epochs):\n",
        "        stopped = torch.zeros(N, dtype=torch.bool, device=args.device)\n"
        "        for _ in range(args.update_epochs):\n",
    ),
    (
        "                optimizer.step()\n",
        """\
                stopped |= stats[-1]["losses/approx_kl"] > args.target_kl
                own = [x for p in agent.parameters() for x in (p, *optimizer.state[p].values()) if x.ndim]
                kept = [x[stopped] for x in own]
                optimizer.step()
                for x, old in zip(own, kept):
                    x[stopped] = old
""",
    ),
]
NOW = "        now = replace(args, beta=torch.tensor(args.beta * global_step / total_timesteps, device=args.device))\n"
SCHEDULE = {
    "sppo": [
        (
            "        for _ in range(args.update_epochs):\n",
            NOW + "        for _ in range(args.update_epochs):\n",
        ),
        ("compiled_backward(agent, minibatch, args)", "compiled_backward(agent, minibatch, now)"),
    ],
    "sa2c": [
        (
            "        stats.append(compiled_backward(agent, batch, args))\n",
            NOW + "        stats.append(compiled_backward(agent, batch, now))\n",
        )
    ],
}
GAUSSIAN = [
    (
        "        self.actor = mlp(action_dim * num_bins, 0.01)\n",
        "        self.actor = mlp(action_dim, 0.01)\n"
        "        self.log_std = nn.Parameter(torch.zeros(len(generators), 1, action_dim))\n",
    ),
    (
        "        return self.actor(obs).unflatten(-1, self.action_shape)\n",
        "        mean = self.actor(obs)\n        return torch.stack([mean, self.log_std.expand_as(mean)], -1)\n",
    ),
    (
        """\
    logp = logits.log_softmax(-1)
    logprob = logp.gather(-1, actions.unsqueeze(-1)).squeeze(-1).sum(-1)
    return logprob, -(logp.exp() * logp).sum((-2, -1))
""",
        """\
    normal = torch.distributions.Normal(logits[..., 0], logits[..., 1].exp(), validate_args=False)
    return normal.log_prob(actions).sum(-1), normal.entropy().sum(-1)
""",
    ),
    (
        "        values = self.bins[actions, np.arange(self.action_dim)].reshape(-1, *self.action_space.shape)\n",
        "        values = actions.reshape(-1, *self.action_space.shape)"
        ".clip(self.action_space.low, self.action_space.high)\n",
    ),
    ("envs.action_dim), np.int64)", "envs.action_dim), np.float32)"),
    ("        shape = (T, E, envs.action_dim, args.num_bins)\n", "        shape = (T, E, envs.action_dim)\n"),
    (
        "        gumbel = -torch.stack([torch.empty(shape).exponential_(generator=g) for g in generators])"
        ".log().numpy()\n",
        "        noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).numpy()\n",
    ),
    (
        "            actions = (agent.logits(tensor(obs)).cpu().numpy() + gumbel[:, t]).argmax(-1)\n",
        "            mean, log_std = np.moveaxis(agent.logits(tensor(obs)).cpu().numpy(), -1, 0)\n"
        "            actions = mean + np.exp(log_std) * noise[:, t]\n",
    ),
    ("actions = agent.logits(obs).argmax(-1).cpu().numpy()", "actions = agent.logits(obs)[..., 0].cpu().numpy()"),
]
STACKED = (
    "    space = env.observation_space\n",
    "    env = gym.wrappers.FrameStackObservation(env, 8)\n    space = env.observation_space\n",
)
RECURRENT = [
    STACKED,
    (
        "        self.actor = mlp(action_dim * num_bins, 0.01)\n",
        "        self.gru = nn.GRU(obs_dim // 8, 64, batch_first=True)\n"
        "        self.actor = mlp(action_dim * num_bins, 0.01)\n",
    ),
    ("sizes = (obs_dim, 64, 2**0.5)", "sizes = (64, 64, 2**0.5)"),
    ("return self.actor(obs)", "return self.actor(self.summary(obs))"),
    ("return self.critic(obs)", "return self.critic(self.summary(obs))"),
    (
        "    def logits(self, obs: Tensor) -> Tensor:\n",
        """\
    def summary(self, obs: Tensor) -> Tensor:
        sequences = obs.flatten(0, 1).unflatten(-1, (8, -1))
        return self.gru(sequences)[0][:, -1].unflatten(0, obs.shape[:2])

    def logits(self, obs: Tensor) -> Tensor:
""",
    ),
]
DROPOUT = ("nn.Tanh(), second, nn.Tanh()", "nn.Tanh(), nn.Dropout(0.5), second, nn.Tanh()")
DISCRETE = (
    "    if isinstance(space, gym.spaces.Box) and np.issubdtype",
    "    if isinstance(space, gym.spaces.Discrete) and space.n == num_bins:\n"
    "        return np.arange(space.start, space.start + space.n)[:, None]\n"
    "    if isinstance(space, gym.spaces.Box) and np.issubdtype",
)
AVERAGE = [
    ("    parts = {", "    average = torch.optim.swa_utils.AveragedModel(agent)\n    parts = {"),
    ('"optimizer": optimizer', '"optimizer": optimizer, "average": average'),
    ('    progress = {"global_step": 0', '    progress = {"updates": 0, "global_step": 0'),
    ("        episodes, stats =", '        progress["updates"] += len(stats)\n        episodes, stats ='),
]
UPDATE = {
    algorithm: (f"{indent}optimizer.step()\n", f"{indent}optimizer.step()\n{indent}average.update_parameters(agent)\n")
    for algorithm, indent in (("sppo", " " * 16), ("sa2c", " " * 8))
}


def edited(original, edits) -> str:
    """The script's text with (old, new) replacements, each of which has one place."""
    source = (ROOT / f"{original}.py").read_text()
    for old, new in edits:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def page() -> list[str]:
    """The lines of Python in docs/changing-a-script.md, without the comments that say where they go."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/changing-a-script.md").read_text(), re.DOTALL)
    return [re.sub(r"  # (in|before|after) .*", "", line) for block in blocks for line in block.splitlines() if line]


def copy(original, folder, name, *edits):
    """The script with these edits, imported from folder/name.py."""
    (folder / f"{name}.py").write_text(edited(original, edits))
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def edits_of(original):
    algorithm, domain = original.split("_", 1)
    return LOSS[algorithm], TAG, METRICS[domain], FLAG, USE, *NETWORK[domain]


def call(module, *flags):
    with patch.object(sys, "argv", [module.__file__, *map(str, flags)]):
        module.main()


def train(module, original, run_dir, *flags) -> dict:
    """Two rollouts with one update of one minibatch each; the model."""
    env = "Breakout" if "atari" in original else "InvertedPendulum-v4"
    small = ["--env-id", env, "--num-envs", 2, "--num-steps", 8, "--total-timesteps", 32, "--num-threads", 1]
    small += ["--eval-episodes", 1]
    small += ["--num-minibatches", 1, "--update-epochs", 1] if original.startswith("sppo") else []
    call(module, *small, "--run-dir", run_dir, *flags)
    return load_file(run_dir / "model.safetensors") if (run_dir / "model.safetensors").exists() else {}


def result_of(run_dir) -> dict:
    return json.loads((run_dir / "result.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of a copy with all four changes, made when a script's first test asks for it."""
    made = {}

    def run(original):
        if original not in made:
            folder = tmp_path_factory.mktemp(original)
            module = copy(original, folder, "my_copy", *edits_of(original))
            model = train(module, original, folder / "run", "--value-scale", 0.5)
            made[original] = SimpleNamespace(module=module, run_dir=folder / "run", model=model)
        return made[original]

    return run


# A script of each domain and of each algorithm; what changes an update is tested with all that have one of their own.
two = pytest.mark.parametrize("original", ["sppo_continuous_discretized", "sa2c_atari"])
continuous = pytest.mark.parametrize("original", CONTINUOUS)
one = pytest.mark.parametrize("original", ["sppo_continuous_discretized"])


@two
def test_a_copy_with_all_four_changes_trains_logs_and_is_evaluated(original, runs, tmp_path, capsys):
    run = runs(original)
    result = result_of(run.run_dir)
    assert result["script"] == "my_copy" and result["args"]["value_scale"] == 0.5
    row, *_ = csv.DictReader((run.run_dir / "curves.csv").open())
    assert float(row["losses/advantage_std"]) > 0 and float(row["charts/reward_std"]) >= 0
    plain = copy(original, tmp_path, "my_plain_copy", *edits_of(original)[1:])
    unchanged = train(plain, original, tmp_path / "plain", "--value-scale", 0.5)
    bias = "actor.bias" if "atari" in original else "actor.4.bias"
    assert run.model.keys() == unchanged.keys() and not torch.equal(run.model[bias], unchanged[bias])
    capsys.readouterr()
    call(run.module, "--evaluate", run.run_dir)
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"seed 1: {result['eval_mean']:.1f} (")


@two
def test_a_run_goes_on_where_a_flag_was_added_or_taken_away(original, runs, tmp_path, capsys):
    run_dir = tmp_path / "run"
    before = copy(original, tmp_path, "my_copy", *edits_of(original)[:3])
    train(before, original, run_dir)
    (run_dir / "result.json").unlink()
    after = copy(original, tmp_path, "my_copy", *edits_of(original)[:5])
    call(after, "--resume", run_dir)
    assert result_of(run_dir)["args"]["value_scale"] == 1.0  # the default
    call(after, "--evaluate", run_dir)
    (run_dir / "result.json").unlink()
    call(before, "--resume", run_dir)
    assert "value_scale" not in result_of(run_dir)["args"]
    run = runs(original)
    without = copy(original, tmp_path, "my_copy", *edits_of(original)[:3], *edits_of(original)[5:])
    capsys.readouterr()
    call(without, "--evaluate", run.run_dir)
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"seed 1: {result_of(run.run_dir)['eval_mean']:.1f} (")


@two
def test_a_run_of_another_copy_is_refused_in_one_line(original, runs, tmp_path, capsys):
    other = copy(original, tmp_path, "your_copy", *edits_of(original))
    for flag in ("--evaluate", "--resume"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            call(other, flag, runs(original).run_dir)
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
        assert "is of my_copy, not of your_copy" in err


@two
def test_a_run_of_another_network_or_other_parts_keeps_its_traceback(original, runs, tmp_path):
    run_dir = runs(original).run_dir
    other = copy(original, tmp_path, "my_copy", *edits_of(original)[:5])
    with pytest.raises(RuntimeError, match="in loading state_dict for Agent"):
        call(other, "--evaluate", run_dir)
    result = (run_dir / "result.json").rename(tmp_path / "result.json")
    with pytest.raises(RuntimeError, match="in loading state_dict for Agent"):
        call(other, "--resume", run_dir)
    averaging = copy(original, tmp_path, "my_copy", *edits_of(original), *AVERAGE)
    with pytest.raises(KeyError, match="average"):
        call(averaging, "--resume", run_dir)
    result.rename(run_dir / "result.json")


@two
def test_a_bug_in_a_changed_loss_keeps_its_traceback(original, tmp_path):
    old, new = LOSS[original.split("_", 1)[0]]
    broken = copy(original, tmp_path, "my_copy", (old, new.replace("advantages", "no_such_name")))
    with pytest.raises(NameError, match="no_such_name") as error:
        train(broken, original, tmp_path / "run")
    assert error.traceback[-1].name in ("symmetric_ppo_loss", "symmetric_a2c_loss")


@continuous
def test_a_parameter_per_agent_goes_with_a_batch_of_seeds(original, runs, tmp_path):
    module = runs(original).module
    train(module, original, tmp_path / "batch", "--num-seeds", 2)
    single = train(module, original, tmp_path / "single", "--seed", 2)
    batch = load_file(tmp_path / "batch/seed2/model.safetensors")
    assert single["log_temperature"].item() != 0
    for name in single:
        torch.testing.assert_close(batch[name], single[name], rtol=1e-4, atol=1e-6, msg=name)


@one
def test_one_agent_may_have_any_layer_and_several_agents_are_told_what_is_wrong_with_it(original, tmp_path):
    changed = copy(original, tmp_path, "my_copy", LAYER_NORM)
    assert train(changed, original, tmp_path / "run")["actor.3.weight"].shape == (64,)
    call(changed, "--evaluate", tmp_path / "run")
    with pytest.raises(AssertionError, match="the first dimension of parameters is the agent's"):
        train(changed, original, tmp_path / "batch", "--num-seeds", 2)


def test_an_agent_stopped_by_its_kl_stays_as_it_is_while_another_goes_on(tmp_path):
    changed = copy("sppo_continuous_discretized", tmp_path, "my_copy", *TARGET_KL)
    metrics, states, backward = [], [], changed.backward

    def spy(*inputs):
        metrics.append(backward(*inputs))
        return metrics[-1]

    def state(optimizer, *_):
        tensors = [x for p in optimizer.param_groups[0]["params"] for x in (p, *optimizer.state[p].values()) if x.ndim]
        states.append([torch.cat([x[i].flatten() for x in tensors]) for i in range(2)])  # of each agent

    changed.backward = spy
    hook = register_optimizer_step_pre_hook(state)
    flags = "--env-id InvertedPendulum-v4 --num-seeds 2 --num-steps 64 --total-timesteps 128 --num-minibatches 4"
    flags += " --eval-episodes 1"
    call(changed, *flags.split(), "--target-kl", 0.01, "--learning-rate", 0.003, "--run-dir", tmp_path / "run")
    hook.remove()
    assert len(states) == 2 * 40  # two rollouts of 10 epochs of 4 minibatches
    kl = torch.stack([m["losses/approx_kl"] for m in metrics]).view(2, 40, 2)
    stopped = (kl > 0.01).cumsum(1) > 0
    counts = {(r, i): stopped[r, :, i].sum().item() for r in range(2) for i in range(2)}
    assert all(0 < count < 40 for count in counts.values()) and len(set(counts.values())) > 1, counts
    for k in range(1, 79):
        for i in range(2):
            was, now = states[k][i], states[k + 1][i]
            assert torch.equal(was, now) == bool(stopped.view(80, 2)[k, i]), (k, i)


def test_a_discrete_action_space_is_learned(tmp_path):
    """CartPole-v1 by DPPO; a policy that draws its actions evenly stands for 22 steps."""
    changed = copy("sppo_continuous_discretized", tmp_path, "my_copy", DISCRETE)
    flags = "--env-id CartPole-v1 --num-bins 2 --num-seeds 2 --num-steps 512 --total-timesteps 4096 --num-minibatches 8"
    call(changed, *flags.split(), "--run-dir", tmp_path / "run")
    assert min(result_of(tmp_path / f"run/seed{i}")["eval_mean"] for i in (1, 2)) > 60
    call(changed, "--evaluate", tmp_path / "run/seed2")


@two
def test_what_is_put_into_parts_and_progress_survives_a_resume(original, tmp_path):
    changed, seen = copy(original, tmp_path, "my_copy", *AVERAGE, UPDATE[original.split("_")[0]]), []
    changed.LOG_EVERY, changed.SAVE_EVERY = 1, 0
    hook = register_optimizer_step_post_hook(
        lambda optimizer, *_: seen.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])
    )
    with patch.object(changed, "gae", stop_at_call(changed.gae, 2)), pytest.raises(SystemExit):
        train(changed, original, tmp_path / "run")
    assert read_checkpoint(tmp_path / "run")["progress"]["updates"] == len(seen) == 1
    call(changed, "--resume", tmp_path / "run")
    hook.remove()
    checkpoint = read_checkpoint(tmp_path / "run")
    assert checkpoint["progress"]["updates"] == checkpoint["average"]["n_averaged"] == len(seen) == 2
    average = [x for name, x in checkpoint["average"].items() if name != "n_averaged"]
    for x, first, second in zip(average, *seen, strict=True):
        torch.testing.assert_close(x, (first + second) / 2)


def stop_at_call(function, n):
    """Ctrl-C at that call."""
    calls = []

    def stopping(*inputs):
        calls.append(inputs)
        if len(calls) == n:
            raise KeyboardInterrupt
        return function(*inputs)

    return stopping


@pytest.mark.parametrize("original", CONTROL)
def test_a_scheduled_coefficient_reaches_the_loss_and_not_the_result(original, tmp_path):
    edits = SCHEDULE[original.split("_")[0]]
    if original == "sppo_atari":
        edits = [edits[0], ("clip_coef, args))", "clip_coef, now))")]
    changed, betas = copy(original, tmp_path, "my_copy", *edits), []
    name = f"symmetric_{'ppo' if original.startswith('sppo') else 'a2c'}_loss"
    loss = getattr(changed, name)
    setattr(changed, name, lambda *inputs: betas.append(inputs[-2].item()) or loss(*inputs))
    train(changed, original, tmp_path / "run", "--beta", 3)
    assert betas == [1.5, 3.0] and result_of(tmp_path / "run")["args"]["beta"] == 3


@continuous
def test_a_gaussian_policy_learns(original, tmp_path):
    changed = copy(original, tmp_path, "my_copy", *GAUSSIAN)
    assert train(changed, original, tmp_path / "run", "--alpha", 1, "--beta", 0)["log_std"].item() != 0
    call(changed, "--evaluate", tmp_path / "run")
    learn = (
        "--num-steps 512 --num-minibatches 8" if original.startswith("sppo") else "--num-envs 4 --learning-rate 2e-3"
    )
    flags = "--env-id InvertedPendulum-v4 --total-timesteps 12288 --alpha 1 --beta 0 --num-seeds 2"
    call(changed, *flags.split(), *learn.split(), "--run-dir", tmp_path / "two")
    assert max(result_of(tmp_path / f"two/seed{i}")["eval_mean"] for i in (1, 2)) > 60  # untrained: at most 31


@one
def test_stacked_observations_and_a_recurrent_policy_of_one_agent(original, tmp_path):
    stacked = copy(original, tmp_path, "my_stack", STACKED)
    assert train(stacked, original, tmp_path / "stacked", "--num-seeds", 2) == {}  # in seed<k>
    assert load_file(tmp_path / "stacked/seed2/model.safetensors")["obs_mean"].shape == (32,)
    recurrent = copy(original, tmp_path, "my_gru", *RECURRENT)
    model = train(recurrent, original, tmp_path / "run")
    assert model["gru.weight_ih_l0"].shape == (192, 4)
    call(recurrent, "--evaluate", tmp_path / "run")
    again = train(recurrent, original, tmp_path / "again")
    assert all(torch.equal(x, again[name]) for name, x in model.items())  # the seed is that of any layer
    with pytest.raises(AssertionError, match="the first dimension of parameters is the agent's"):
        train(recurrent, original, tmp_path / "batch", "--num-seeds", 2)


@one
def test_a_layer_that_draws_goes_on_after_a_stop_as_if_there_had_been_none(original, tmp_path):
    class Stateless:
        """Environments without a state, whose only observation is one."""

        def reset(self, seeds, *stream):
            return torch.ones(*self.shape, self.obs_dim).numpy()

        def step(self, actions, running=None):
            end = torch.ones(self.shape, dtype=torch.bool).numpy()
            return self.reset(None), actions.mean(-1), end, end, self.reset(None)

    changed = copy(original, tmp_path, "my_copy", DROPOUT)
    changed.Envs, changed.LOG_EVERY = type("Envs", (Stateless, changed.Envs), {}), 1
    changed.Normalizer.count = lambda *_: None  # which counts the observations of a reset
    whole = train(changed, original, tmp_path / "whole")
    with patch.object(changed, "gae", stop_at_call(changed.gae, 2)), pytest.raises(SystemExit):
        train(changed, original, tmp_path / "run", "--eval-every", 16)
    call(changed, "--resume", tmp_path / "run")
    resumed = load_file(tmp_path / "run/model.safetensors")
    assert all(torch.equal(x, resumed[name]) for name, x in whole.items())


def test_the_lines_of_python_on_the_page_run_one_after_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmark").symlink_to(ROOT / "benchmark")  # one block plays a kept agent
    text = (ROOT / "docs/changing-a-script.md").read_text()
    names = {}
    *blocks, in_numpy = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    for block in blocks:
        exec(block, names)
    exec(in_numpy, {})
    assert names["returns"].shape == (1, 10) and names["logits"].shape == (1, 1, 1, 11)
    assert (tmp_path / "curve.png").stat().st_size > 5000


@pytest.mark.parametrize("line", page(), ids=str.strip)
def test_every_line_of_code_on_the_page_is_in_a_copy_that_is_trained_here(line):
    copies = [edits_of("sppo_continuous_discretized"), TARGET_KL, [DISCRETE], [*AVERAGE, UPDATE["sppo"]]]
    copies += [SCHEDULE["sppo"], GAUSSIAN, [STACKED], RECURRENT]
    assert any(line in edited("sppo_continuous_discretized", edits).splitlines() for edits in copies)
