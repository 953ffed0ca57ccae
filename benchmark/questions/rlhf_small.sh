#!/usr/bin/env bash
# Do the forms of Tables 3 and 14 differ where no hub is needed, and does the identity of docs/paper-notes.md show?
# No score differs by more than two joint standard errors, and SPPO is PPO with its weight until rounding parts them:
# docs/questions.md, the scores in docs/results.md. A small GPT-2 (benchmark/rlhf_assets.py makes it) continues reviews.
# PPO, SPPO, PPO with SPPO's weight alpha - beta Z, PPO without advantage normalization, PPO with its policy loss times
# 5; 5 seeds each, without the supervised term.
# SEEDS, STEPS (updates) and WORKERS narrow it; runner.py --help has the flags.
cd "$(dirname "$0")/../.." || exit

task="--policy assets/gpt2-reviews --reward-model assets/sentiment --dataset assets/reviews"
task="$task --num-trajectories 56 --response-length 24 --min-response-length 24 --learning-rate 1e-4"
cell="sppo_rlhf_imdb --seeds 5 --num-updates 40 $task --eval-samples 256"

{
    echo "$cell --alpha 1 --beta 0"
    echo "$cell --alpha 0.5 --beta 0.4"
    echo "$cell --alpha 0.9 --beta 0"
    echo "$cell --alpha 1 --beta 0 --no-norm-adv"
    echo "$cell --alpha 5 --beta 0"
} | benchmark/run_cells.sh "$@"
