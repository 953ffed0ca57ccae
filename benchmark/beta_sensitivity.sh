#!/usr/bin/env bash
# Table 4: SPPO's improvement over PPO on 22 Atari games for five values of beta, without and with noise, 5 seeds.
# PPO, beta 1 without noise and beta 10 with noise are runs of atari_ppo.sh too; whichever sweep comes first does them.
# SEEDS, ENVS, STEPS and WORKERS narrow the sweep; runner.py --help has the flags.
cd "$(dirname "$0")/.." || exit

ENVS= benchmark/atari_ppo.sh --cells | grep -e "--alpha 1 --beta 0" | grep -v norm-adv | while read -r cell; do
    echo "$cell"
    for beta in 0.5 1 5 10 25; do
        echo "${cell/--alpha 1 --beta 0/--alpha 0.5 --beta $beta}"
    done
done | benchmark/run_cells.sh "$@"
