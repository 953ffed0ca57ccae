#!/usr/bin/env bash
# Does PPO of sppo_rlhf_imdb.py learn as TRL's does? It does: docs/language-models.md.
# Same policy, value model, reward and reviews, made by benchmark/rlhf_assets.py; 5 seeds each. What trl_baseline.py
# says of TRL is why ours has these flags.
# SEEDS, STEPS (updates) and WORKERS narrow it; runner.py --help has the flags.
cd "$(dirname "$0")/../.." || exit

task="--policy assets/gpt2-reviews --reward-model assets/sentiment --dataset assets/reviews"
task="--seeds 5 --num-updates 40 $task --num-trajectories 56 --response-length 24 --learning-rate 1e-4 --eval-samples 256"

{
    echo "trl_baseline $task"
    echo "sppo_rlhf_imdb $task --alpha 1 --beta 0 --top-k 0 --min-response-length 0 --max-grad-norm 1e9"
} | benchmark/run_cells.sh "$@"
