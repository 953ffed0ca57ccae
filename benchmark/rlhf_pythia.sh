#!/usr/bin/env bash
# TL;DR with public models in full precision: a Pythia-1B that was fine-tuned on the summaries, and its reward model, with
# LoRA by PPO and by SPPO, 4 seeds. What stands here is not in the paper; the rest is the script's default.
# The reward model reads the end-of-text token after a summary, as when it was trained.
# DATASET, POLICY and REWARD_MODEL take others, such as local ones; FLAGS="--learning-rate 1e-5" adds flags or replaces them.
# CONTROL=1 adds the control of the identity in docs/findings.md: PPO's policy loss times alpha - beta Z.
# SEEDS, ENVS (data sets), STEPS (updates) and WORKERS (default 1: one GPU) narrow it; runner.py --help has the flags.
cd "$(dirname "$0")/.." || exit
export WORKERS="${WORKERS:-1}"

hub=cleanrl/EleutherAI_pythia-1b-deduped__
cell="sppo_rlhf_tldr --seeds 4 --dataset '${DATASET:-CarperAI/openai_summarize_tldr}' --policy '${POLICY:-${hub}sft__tldr}'"
cell="$cell --reward-model '${REWARD_MODEL:-${hub}reward__tldr}' --reward-end '<|endoftext|>' --base-precision float32"
cell="$cell --lora-targets query_key_value --response-length 53 --num-updates 100"

{
    echo "$cell --alpha 1 --beta 0 $FLAGS"
    echo "$cell --alpha 0.5 --beta 0.2 $FLAGS"
    [ "$CONTROL" != 1 ] || echo "$cell --alpha 0.7 --beta 0 $FLAGS"
} | benchmark/run_cells.sh "$@"
