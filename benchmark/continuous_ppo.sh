#!/usr/bin/env bash
# Tables 2, 12 and 13: Gaussian PPO, DPPO and DSPPO on MuJoCo and Box2D, without and with Gaussian noise, 30 seeds.
# Settings of Table 6; docs/paper-notes.md has its gaps (LunarLander's and Walker2d's timesteps).
# SEEDS, ENVS, STEPS and WORKERS narrow the sweep, TABLE=12 or TABLE=13 is one of the two; runner.py --help has the flags.
# CONTROL=1 adds the control of the identity in docs/findings.md: DPPO's policy loss times alpha - beta Z.
cd "$(dirname "$0")/.." || exit
case $TABLE in
    "" | 12 | 13) ;;
    *)
        echo "error: TABLE is 12 (without noise) or 13 (with noise), not $TABLE" >&2
        exit 2
        ;;
esac

while read -r env steps beta noisy_beta; do
    cell="--seeds 30 --env-id $env --total-timesteps $steps"
    [ "$TABLE" = 13 ] || {
        echo "sb3_baseline $cell --algo ppo"
        echo "sppo_continuous_discretized $cell --alpha 1 --beta 0"
        echo "sppo_continuous_discretized $cell --alpha 0.5 --beta $beta"
        [ "$CONTROL" != 1 ] || echo "sppo_continuous_discretized $cell --alpha $beta.5 --beta 0"
    }
    [ "$TABLE" = 12 ] || {
        echo "sb3_baseline $cell --algo ppo --reward-noise-std 0.05"
        echo "sppo_continuous_discretized $cell --alpha 1 --beta 0 --reward-noise-std 0.05"
        echo "sppo_continuous_discretized $cell --alpha 0.5 --beta $noisy_beta --reward-noise-std 0.05"
        [ "$CONTROL" != 1 ] || echo "sppo_continuous_discretized $cell --alpha $noisy_beta.5 --beta 0 --reward-noise-std 0.05"
    }
done <<'TABLE' | benchmark/run_cells.sh "$@"
Ant-v4                     2000000  20  20
BipedalWalker-v3           1000000  20  25
HalfCheetah-v4             2000000  20  25
Hopper-v4                  2000000  20  50
HumanoidStandup-v4        10000000  20  25
InvertedDoublePendulum-v4  1000000  20  25
LunarLanderContinuous-v3   2000000  20  20
Swimmer-v4                 2000000  20  50
Walker2d-v4                5000000  20  25
TABLE
