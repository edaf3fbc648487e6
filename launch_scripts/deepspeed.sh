#!/usr/bin/env bash
# Starts a training command on every machine of a hostfile, one process per GPU, with the deepspeed launcher.
#
#   launch_scripts/deepspeed.sh HOSTFILE pretrain configs/runs/llama2-0.5b-20x.yaml optimizer.weight_decay=1.0
#
# HOSTFILE has lines such as "node1 slots=8". Every machine needs passwordless ssh, this repository at the same path with its
# environment, and a shared folder for runs/ and data/. Of the environment the launcher forwards only variables whose names begin
# with MLFLOW, PYTHON, NCCL, MV2 or UCX, and those in the file that DS_ENV_FILE names, all of them on command lines that everybody
# can see: with passwords use `megatron-plasticity launch`, which also checks the machines first.
set -euo pipefail

if [ "$#" -lt 3 ]; then
    sed -n '2,/^set/p' "$0" | sed -nE 's/^# ?//p' >&2
    exit 2
fi
hostfile=$1
shift
if [ ! -f "$hostfile" ]; then
    echo "error: $hostfile: no such hostfile; it lists one machine per line, such as: node1 slots=8" >&2
    exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH="$here/.venv/bin:$PATH"
# Without --force_multi a hostfile of one machine would start the ranks here, whichever machine that is.
exec deepspeed --hostfile "$hostfile" --force_multi --module megatron_plasticity "$@"
