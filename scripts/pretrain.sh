#!/usr/bin/env bash
# Train a config on this machine, or on this machine's part of several:
#
#   scripts/pretrain.sh examples/llama_182m/remoe.yaml [key=value ...] [--force]
#
# One machine uses all its GPUs. For several machines, run the same line on each of them with
#   NNODES         the number of machines
#   MASTER_ADDR    the name of one of them, where they meet; MASTER_PORT is 29500 if not set
#   GPUS_PER_NODE  the number of GPUs of each, by default all that nvidia-smi lists
# Layouts are overrides: tensor_model_parallel_size=2 expert_model_parallel_size=8.
# REMOE_PYTHON names the Python to use, by default python3.
#
# When this script receives SIGTERM or SIGUSR1, the run saves a checkpoint and ends with 0.
set -euo pipefail

if [[ $# -eq 0 || $1 == -* ]]; then
    echo "usage: scripts/pretrain.sh CONFIG [key=value ...]" >&2
    exit 2
fi
gpus=${GPUS_PER_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)}
if [[ $gpus -eq 0 ]]; then
    echo "error: nvidia-smi lists no GPU; set GPUS_PER_NODE (processes, on a CPU)" >&2
    exit 2
fi
exec "${REMOE_PYTHON:-python3}" -m megatron.remoe launch "$@" \
    --nodes "${NNODES:-${SLURM_JOB_NUM_NODES:-1}}" --gpus-per-node "$gpus"
