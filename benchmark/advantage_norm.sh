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
    case $task in
        imdb) data=stanfordnlp/imdb more="--num-updates 60" ;;
        tldr)
            data=CarperAI/openai_summarize_tldr
            more="--base-precision ${BASE_PRECISION:-4bit} --num-updates 100 --eval-every 10"
            ;;
    esac
    cell="sppo_rlhf_$task --seeds 4 --dataset '${DATASET:-$data}' ${POLICY:+--policy '$POLICY'}"
    cell="$cell ${REWARD_MODEL:+--reward-model '$REWARD_MODEL'} $more"
    echo "$cell --target-coef 0.1 --alpha 1 --beta 0 $FLAGS"
    echo "$cell --target-coef 0.1 --alpha 1 --beta 0 --no-norm-adv $FLAGS"
done | "${PYTHON:-.venv/bin/python}" benchmark/runner.py "$@"
