#!/usr/bin/env bash
# Do DPPO and DA2C learn as Stable-Baselines3's PPO and A2C do, with the same bins? Training curves, 3 seeds each.
# They do: docs/questions.md. benchmark/report.py makes figure and table.
# SEEDS, ENVS, STEPS and WORKERS narrow the sweep; runner.py --help has the flags.
cd "$(dirname "$0")/../.." || exit

while read -r env; do
    cell="--seeds 3 --env-id $env --total-timesteps 200000"
    echo "sb3_baseline $cell --algo ppo --num-bins 11"
    echo "sppo_continuous_discretized $cell --alpha 1 --beta 0"
    echo "sb3_baseline $cell --algo a2c --num-bins 11"
    echo "sa2c_continuous_discretized $cell --alpha 1 --beta 0"
done <<'TABLE' | benchmark/run_cells.sh "$@"
InvertedDoublePendulum-v4
HalfCheetah-v4
LunarLanderContinuous-v3
TABLE
