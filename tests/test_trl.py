"""TRL's PPO beside sppo_rlhf_imdb.py: rewards, values and log-probabilities of both, and what their runs leave."""

import json
import os

import pytest
import tiny
import torch

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
from peers import trl_baseline
from peers.throughput import language
from trl.experimental.ppo.ppo_trainer import forward, get_reward

SMALL = "num_trajectories minibatch_size rollout_batch_size prompt_length response_length update_epochs num_updates"


def small(assets) -> dict:
    flags = tiny.flags("sppo_rlhf_imdb", assets)
    names = f"{SMALL} learning_rate num_threads policy reward_model dataset".split()
    return {name: flags[name] for name in names} | {"rollout_batch_size": 4}


@pytest.fixture(scope="module")
def trainer(assets, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("trl")
    args = trl_baseline.Args(str(run_dir), **small(assets))
    script = trl_baseline.script
    learner = script.Learner(trl_baseline.settings(args))
    run = script.Run(trl_baseline.settings(args), learner)
    run.log(0, {})
    log = trl_baseline.Log(run, args.num_updates)
    return trl_baseline.make_trainer(args, run_dir, learner, log), learner, args


def test_trl_sees_our_rewards_values_and_log_probabilities(trainer):
    """Left padding, responses that have ended and one that has not: as TRL computes them and as our script does."""
    trainer, learner, args = trainer
    script, pad, end = trl_baseline.script, learner.tokenizer.pad_token_id, learner.tokenizer.eos_token_id
    assert pad != end
    prompts = script.make_examples(learner.tokenizer, learner.rows[:4], trl_baseline.settings(args)).prompts
    responses = [[5, 6, end], [7, 8, 9, 10, 11, 12], [end], [13, 14, 15, 16, end]]
    tokens, mask, response_mask = script.pad(prompts, responses, learner.device)
    theirs, context = torch.where(mask.bool(), tokens, pad), tokens.shape[1] - 6
    texts = [learner.tokenizer.decode(p + r, skip_special_tokens=True) for p, r in zip(prompts, responses)]
    with torch.no_grad():
        _, scores, _ = get_reward(trainer.reward_model, theirs, pad, context)
        values = get_reward(trainer.value_model, theirs, pad, context)[0][:, context - 1 : -1].squeeze(-1)
        logits = forward(trainer.ref_model, theirs, pad).logits[:, context - 1 : -1]
        logprob, own_values = learner.actor_critic(tokens, mask, 6)
    assert scores.tolist() == pytest.approx(learner.reward([""] * 4, texts, [{}] * 4))
    assert len(set(scores.tolist())) == 4
    torch.testing.assert_close(values[response_mask], own_values[response_mask])
    theirs = logits.log_softmax(-1).gather(-1, tokens[:, -6:].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(theirs[response_mask], logprob[response_mask])


def test_trl_makes_an_optimizer_step_per_minibatch_and_samples_until_the_end_token(trainer, monkeypatch):
    trainer, learner, args = trainer
    steps, first = [], [p.clone() for p in learner.actor_critic.parameters()]
    step = trainer.optimizer.step
    monkeypatch.setattr(trainer.optimizer, "step", lambda *inputs: (steps.append(1), step(*inputs)))
    trainer.train()
    assert len(steps) == args.num_updates * args.update_epochs * args.num_trajectories // args.minibatch_size
    assert sum(int(not torch.equal(a, b)) for a, b in zip(first, learner.actor_critic.parameters())) > 20
    sampling = trainer.policy_model.generation_config
    assert (sampling.eos_token_id, sampling.pad_token_id) == (
        learner.tokenizer.eos_token_id,
        trainer.processing_class.pad_token_id,
    )
    rows = trainer.callback_handler.callbacks[-1].run.rows
    assert [row["update"] for row in rows] == [0, 1, 2, 3]
    assert abs(rows[1]["objective/kl"]) < 1e-4 < abs(rows[3]["objective/kl"])


@pytest.fixture
def train(call, tmp_path):
    """Runs a script's main in this process; exit code and standard error."""

    def train(script, flags: dict, run_dir: str = "run") -> tuple[int, str]:
        code, _, error = call(script, *tiny.command_line(flags), "--run-dir", str(tmp_path / run_dir))
        return code, error

    return train


def test_a_run_of_trl_has_the_results_of_ours(assets, train, tmp_path):
    """Trained here, 2 updates each; the score before training is of the same policy and prompts."""
    flags, results = small(assets) | {"num_updates": 2}, []
    same = {"alpha": 1, "beta": 0, "min_response_length": 0, "top_k": 0}
    for script, more in ((trl_baseline, {}), (trl_baseline.script, same)):
        assert train(script, flags | more, script.__name__)[0] == 0
        results.append(json.loads((tmp_path / script.__name__ / "result.json").read_text()))
    theirs, ours = results
    assert {"eval_score", "eval_perplexity", "before"} <= theirs.keys() < ours.keys()
    assert theirs["before"] == ours["before"]
    assert [result["script"] for result in results] == ["trl_baseline", "sppo_rlhf_imdb"]
    assert theirs["eval_score"] != ours["eval_score"]


@pytest.mark.parametrize(
    "flags, message",
    [({"num_updates": 0}, "--num-updates >= 1 must hold"), ({"policy": "nothing"}, "--policy nothing")],
)
def test_wrong_arguments_end_in_one_line(assets, train, tmp_path, flags, message):
    code, error = train(trl_baseline, small(assets) | flags)
    assert code == 2 and error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_both_sides_are_timed_from_the_end_of_the_first_update(assets, monkeypatch):
    script = trl_baseline.script
    monkeypatch.setattr(script, "evaluate", script.evaluate)  # language() replaces it and these, and they come back
    for name in ("log", "save", "save_policy", "finish"):
        monkeypatch.setattr(script.Run, name, getattr(script.Run, name))
    paths = {name: small(assets)[name] for name in ("policy", "reward_model", "dataset")}
    for side in ("TRL", "ours", "arithmetic"):
        speed = language(side, paths, 1, 1, {"prompt_length": 12, "response_length": 6})
        assert 0 < speed.wall < 1.1 * speed.cpu and 0.1 < speed.memory < 8
