#!/usr/bin/env bash
# Table 8: A2C and SA2C on 22 Atari games, without and with BSC(0.1) reward noise, 5 seeds.
# 5e6 steps are the authors' files', the paper names none; alpha and beta are those of Table 5.
# CONTROL=1 adds SA2C without its reverse loss, A2C's policy loss times alpha.
# SEEDS, ENVS, STEPS and WORKERS narrow the sweep; runner.py --help has the flags.
cd "$(dirname "$0")/.." || exit

sweep() { # beta with noise, games
    for game in $2; do
        cell="sa2c_atari --seeds 5 --env-id ${game}NoFrameskip-v4 --total-timesteps 5000000"
        echo "$cell --alpha 1 --beta 0"
        echo "$cell --alpha 0.5 --beta 5"
        [ "$CONTROL" != 1 ] || echo "$cell --alpha 0.5 --beta 0"
        echo "$cell --alpha 1 --beta 0 --reward-flip-prob 0.1"
        echo "$cell --alpha 0.5 --beta $1 --reward-flip-prob 0.1"
        [ "$CONTROL" != 1 ] || echo "$cell --alpha 0.5 --beta 0 --reward-flip-prob 0.1"
    done
}

{
    sweep 1 "Alien Assault Gravitar MsPacman Qbert StarGunner TimePilot UpNDown VideoPinball"
    sweep 5 "Asterix BeamRider Centipede CrazyClimber DemonAttack Frostbite Gopher Krull NameThisGame Riverraid
        RoadRunner Seaquest WizardOfWor"
} | benchmark/run_cells.sh "$@"
