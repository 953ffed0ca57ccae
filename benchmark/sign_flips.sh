#!/usr/bin/env bash
# Figure 2: how often PPO's advantages change sign in the normalization (losses/sign_flips in curves.csv).
# These are runs of atari_ppo.sh (5 seeds) and continuous_ppo.sh (30 seeds) too; whichever sweep comes first does them.
# SEEDS, ENVS, STEPS and WORKERS narrow the sweep; runner.py --help has the flags.
cd "$(dirname "$0")/.." || exit

"${PYTHON:-.venv/bin/python}" benchmark/runner.py "$@" <<'CELLS'
sppo_atari --seeds 5 --env-id CrazyClimberNoFrameskip-v4 --total-timesteps 10000000 --alpha 1 --beta 0
sppo_atari --seeds 5 --env-id WizardOfWorNoFrameskip-v4 --total-timesteps 10000000 --alpha 1 --beta 0
sppo_continuous_discretized --seeds 30 --env-id Ant-v4 --total-timesteps 2000000 --alpha 1 --beta 0
sppo_continuous_discretized --seeds 30 --env-id Walker2d-v4 --total-timesteps 5000000 --alpha 1 --beta 0
CELLS
