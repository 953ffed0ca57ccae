#!/usr/bin/env bash
# Tables 1 and 11, Figure 3: PPO and SPPO on 22 Atari games, without and with BSC(0.1) reward noise, 5 seeds.
# 5e6 steps are the authors' files', the paper names none; alpha and beta are those of Table 5.
# PPO with advantage normalization is the text's baseline, without it the one that the authors released.
# CONTROL=1 adds the control of the identity in docs/findings.md: PPO's policy loss times alpha - beta Z.
# SEEDS, ENVS, STEPS and WORKERS narrow the sweep; runner.py --help has the flags.
cd "$(dirname "$0")/.." || exit

games="Alien Assault Asterix BeamRider Centipede CrazyClimber DemonAttack Frostbite Gopher Gravitar Krull MsPacman
    NameThisGame Qbert Riverraid RoadRunner Seaquest StarGunner TimePilot UpNDown VideoPinball WizardOfWor"

for game in $games; do
    cell="sppo_atari --seeds 5 --env-id ${game}NoFrameskip-v4 --total-timesteps 5000000"
    echo "$cell --alpha 1 --beta 0"
    echo "$cell --alpha 1 --beta 0 --no-norm-adv"
    echo "$cell --alpha 0.5 --beta 1"
    [ "$CONTROL" != 1 ] || echo "$cell --alpha 1.5 --beta 0"
    echo "$cell --alpha 1 --beta 0 --reward-flip-prob 0.1"
    echo "$cell --alpha 1 --beta 0 --reward-flip-prob 0.1 --no-norm-adv"
    echo "$cell --alpha 0.5 --beta 10 --reward-flip-prob 0.1"
    [ "$CONTROL" != 1 ] || echo "$cell --alpha 10.5 --beta 0 --reward-flip-prob 0.1"
done | benchmark/run_cells.sh "$@"
