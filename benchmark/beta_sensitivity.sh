#!/usr/bin/env bash
# Table 4: SPPO's improvement over PPO on 22 Atari games for five values of beta, without and with noise, 5 seeds.
# PPO, beta 1 without noise and beta 10 with noise are runs of atari_ppo.sh too; whichever sweep comes first does them.
# SEEDS, ENVS, STEPS and WORKERS narrow the sweep; runner.py --help has the flags.
cd "$(dirname "$0")/.." || exit

games="Alien Assault Asterix BeamRider Centipede CrazyClimber DemonAttack Frostbite Gopher Gravitar Krull MsPacman
    NameThisGame Qbert Riverraid RoadRunner Seaquest StarGunner TimePilot UpNDown VideoPinball WizardOfWor"

for game in $games; do
    for noise in "" "--reward-flip-prob 0.1"; do
        cell="sppo_atari --seeds 5 --env-id ${game}NoFrameskip-v4 --total-timesteps 10000000"
        echo "$cell --alpha 1 --beta 0 $noise"
        for beta in 0.5 1 5 10 25; do
            echo "$cell --alpha 0.5 --beta $beta $noise"
        done
    done
done | "${PYTHON:-.venv/bin/python}" benchmark/runner.py "$@"
