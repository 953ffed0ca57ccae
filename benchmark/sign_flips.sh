#!/usr/bin/env bash
# Figure 2: how often PPO's advantages change sign in the normalization (losses/sign_flips in curves.csv).
# These are runs of atari_ppo.sh (5 seeds) and continuous_ppo.sh (30 seeds) too; whichever sweep comes first does them.
# SEEDS, ENVS, STEPS and WORKERS narrow the sweep; runner.py --help has the flags.
cd "$(dirname "$0")/.." || exit

{
    ENVS= benchmark/atari_ppo.sh --cells | grep -E -- "--env-id (CrazyClimber|WizardOfWor)"
    ENVS= TABLE= benchmark/continuous_ppo.sh --cells | grep -E -- "--env-id (Ant|Walker2d)"
} | grep -E -- "--alpha 1 --beta 0$" | benchmark/run_cells.sh "$@"
