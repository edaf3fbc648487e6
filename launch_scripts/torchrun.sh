#!/usr/bin/env bash
# Starts a training command with torchrun, one process per GPU: run it on every machine, where ssh between them is not allowed.
#
#   launch_scripts/torchrun.sh NODES NODE_RANK FIRST_NODE GPUS pretrain configs/runs/llama2-0.5b-20x.yaml
#
# NODES is how many machines there are, NODE_RANK which one this is, from 0, FIRST_NODE the address of machine 0, GPUS the number of
# GPUs on each. Every machine needs this repository with its environment at the same path, and a shared folder for runs/ and data/.
# MASTER_PORT (default: 29500) is where the processes meet.
set -euo pipefail

if [ "$#" -lt 6 ]; then
    sed -n '2,/^set/p' "$0" | sed -nE 's/^# ?//p' >&2
    exit 2
fi
nodes=$1 rank=$2 first=$3 gpus=$4
shift 4
for number in "$nodes" "$rank" "$gpus"; do
    if ! [[ $number =~ ^[0-9]+$ ]]; then
        echo "error: $number: NODES, NODE_RANK and GPUS are whole numbers" >&2
        exit 2
    fi
done
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH="$here/.venv/bin:$PATH"
exec torchrun --nnodes "$nodes" --node-rank "$rank" --nproc-per-node "$gpus" \
    --master-addr "$first" --master-port "${MASTER_PORT:-29500}" --module megatron_plasticity "$@"
