#!/usr/bin/env bash
# Tables 3 and 7, TL;DR: GPT-J with LoRA learns to summarize by PPO and by SPPO, 4 seeds. What Table 7 does not name is
# the script's default. --target-coef 0.1: a supervised term that the paper does not mention, its numbers had it.
# --eval-every 10: the paper's SFT row is the policy after 10 updates.
# BASE_PRECISION is the paper's 4bit (CUDA) unless set. Local models and data: BASE_PRECISION=float32
# DATASET=assets/docstrings POLICY=assets/smollm2-135m REWARD_MODEL=assets/docstring-reward.
# FLAGS="--learning-rate 1e-5" adds flags to every cell, or replaces them.
# CONTROL=1 adds the control of the identity in docs/findings.md: PPO's policy loss times alpha - beta Z.
# SEEDS, ENVS (data sets), STEPS (updates) and WORKERS (default 1: one GPU) narrow it; runner.py --help has the flags.
cd "$(dirname "$0")/.." || exit
export WORKERS="${WORKERS:-1}"

cell="sppo_rlhf_tldr --seeds 4 --dataset '${DATASET:-CarperAI/openai_summarize_tldr}' ${POLICY:+--policy '$POLICY'}"
cell="$cell ${REWARD_MODEL:+--reward-model '$REWARD_MODEL'} --base-precision ${BASE_PRECISION:-4bit}"
cell="$cell --num-updates 100 --eval-every 10 --target-coef 0.1"

{
    echo "$cell --alpha 1 --beta 0 $FLAGS"
    echo "$cell --alpha 0.5 --beta 0.2 $FLAGS"
    [ "$CONTROL" != 1 ] || echo "$cell --alpha 0.7 --beta 0 $FLAGS"
} | benchmark/run_cells.sh "$@"
