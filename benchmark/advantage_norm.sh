#!/usr/bin/env bash
# Table 14: PPO on IMDB and TL;DR with and without advantage normalization, 4 seeds.
# PPO with it is a run of rlhf_imdb.sh and rlhf_tldr.sh too, whose comments apply; whichever sweep comes first does it.
# TASKS=imdb or TASKS=tldr is one of the two; DATASET, POLICY and REWARD_MODEL need it.
# SEEDS, ENVS (data sets), STEPS (updates) and WORKERS (default 1: one GPU) narrow it; runner.py --help has the flags.
cd "$(dirname "$0")/.." || exit
export WORKERS="${WORKERS:-1}"
if [ -z "$TASKS" ] && [ -n "$DATASET$POLICY$REWARD_MODEL" ]; then
    echo "error: DATASET, POLICY and REWARD_MODEL need TASKS=imdb or TASKS=tldr" >&2
    exit 2
fi

for task in ${TASKS:-imdb tldr}; do
    ENVS= "benchmark/rlhf_$task.sh" --cells | grep -e "--alpha 1 --beta 0" | while read -r cell; do
        echo "$cell"
        echo "$cell --no-norm-adv"
    done
done | benchmark/run_cells.sh "$@"
