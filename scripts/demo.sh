#!/usr/bin/env bash
# The main job on the built-in model: capture, choose anchors, evaluate, generate. Minutes on two CPU cores.
set -euo pipefail
out=${1:-demo-out}
mkdir -p "$out"
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
# The model is so small that a second thread costs more than it brings.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

step() { printf '\n\033[1m$ kascade %s\033[0m\n' "$*"; kascade "$@"; }

step profile demo -o "$out/capture.h5" --num-prompts 8 --max-length 1k --overwrite
step select-anchors "$out/capture.h5" -o "$out/profile.yaml" --max-anchors 5 --verify-prompts 2 --min-keys 16 \
  --plots "$out" --overwrite
step evaluate demo --profile "$out/profile.yaml" --strategies dense,kascade,streaming-llm --ratio 0.1 \
  --max-length 1k --num-prompts 4 --questions 8 --plot "$out/evaluate.png" --overwrite
step generate demo --profile "$out/profile.yaml" --task two-hop --compare dense

printf '\nProfile and pictures are in %s:\n' "$out"
ls "$out"
