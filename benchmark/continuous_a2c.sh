#!/usr/bin/env bash
# Tables 9 and 10: Gaussian A2C, DA2C and DSA2C on MuJoCo and Box2D, without and with Gaussian noise, 30 seeds.
# Settings of Table 6; Swimmer's gamma is that of the authors' files, the paper names none.
# CONTROL=1 adds DSA2C without its reverse loss, DA2C's policy loss times alpha.
# SEEDS, ENVS, STEPS and WORKERS narrow the sweep, TABLE=9 or TABLE=10 is one of the two; runner.py --help has the flags.
cd "$(dirname "$0")/.." || exit
case $TABLE in
    "" | 9 | 10) ;;
    *)
        echo "error: TABLE is 9 (without noise) or 10 (with noise), not $TABLE" >&2
        exit 2
        ;;
esac

while read -r env beta noisy_beta; do
    cell="--seeds 30 --env-id $env --total-timesteps 2000000"
    [ "$env" != Swimmer-v4 ] || cell="$cell --gamma 0.9999"
    [ "$TABLE" = 10 ] || {
        echo "sb3_baseline $cell --algo a2c"
        echo "sa2c_continuous_discretized $cell --alpha 1 --beta 0"
        echo "sa2c_continuous_discretized $cell --alpha 0.5 --beta $beta"
        [ "$CONTROL" != 1 ] || echo "sa2c_continuous_discretized $cell --alpha 0.5 --beta 0"
    }
    [ "$TABLE" = 9 ] || {
        echo "sb3_baseline $cell --algo a2c --reward-noise-std 0.05"
        echo "sa2c_continuous_discretized $cell --alpha 1 --beta 0 --reward-noise-std 0.05"
        echo "sa2c_continuous_discretized $cell --alpha 0.5 --beta $noisy_beta --reward-noise-std 0.05"
        [ "$CONTROL" != 1 ] || echo "sa2c_continuous_discretized $cell --alpha 0.5 --beta 0 --reward-noise-std 0.05"
    }
done <<'TABLE' | benchmark/run_cells.sh "$@"
Ant-v4                     0.2   0.2
BipedalWalker-v3           0.5  10
HalfCheetah-v4             5    10
Hopper-v4                  0.2  10
HumanoidStandup-v4         0.5  10
InvertedDoublePendulum-v4  5    10
LunarLanderContinuous-v3   5     5
Swimmer-v4                 0.2  10
Walker2d-v4                0.2  10
TABLE
