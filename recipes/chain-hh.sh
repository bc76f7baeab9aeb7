#!/bin/sh
# sh recipes/chain-hh.sh
#
# Helpful, then harmless on HH-RLHF, stage by stage, and what became of each dimension. MODEL, DATA and RUNS may be
# set before it; arguments go to both stages: sh recipes/chain-hh.sh training.num_train_epochs=2
#
# `prefopt chain recipes/chain-hh.yaml` does the same from one file, and skips what is finished already.
set -eu
recipes=$(dirname "$0")
MODEL=${MODEL:-Qwen/Qwen2.5-0.5B}
DATA=${DATA:-data/hh_helpful_harmless.jsonl.gz}
RUNS=${RUNS:-runs/chain-hh}

# Rows of the file are sorted: helpful ones first, then harmless ones.
rows() { printf '{source: "%s", where: {dimension: %s}, split: "train[%s]"}' "$DATA" "$1" "$2"; }
held_out="dataset.eval={helpful: $(rows helpful 45%:50%), harmless: $(rows harmless 95%:)}"

prefopt train "$recipes/gpo-hh.yaml" \
    "model.name_or_path=$MODEL" "dataset.train=$(rows helpful :45%)" dataset.holdout=null "$held_out" \
    "output_dir=$RUNS/helpful" "$@"

prefopt train "$recipes/sequential-hh.yaml" \
    "model.name_or_path=$RUNS/helpful" "method.previous=[$RUNS/helpful]" \
    "dataset.train=$(rows harmless 50%:95%)" "$held_out" \
    "output_dir=$RUNS/harmless" "$@"

prefopt retention "$RUNS/harmless"
