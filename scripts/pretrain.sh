#!/usr/bin/env bash
# Train a config on this machine, or on this machine's part of several:
#
#   scripts/pretrain.sh examples/llama_182m/remoe.yaml [key=value ...] [--force]
#
# One machine uses all its GPUs. For several, run the same line on each of them with
#   NNODES         how many machines
#   MASTER_ADDR    name of one of them, where they meet; MASTER_PORT, 29500 if not set
#   GPUS_PER_NODE  GPUs of each, all that nvidia-smi lists if not set
# Layouts are overrides: tensor_model_parallel_size=2 expert_model_parallel_size=8.
#
# SIGTERM or SIGUSR1 to this script: the run saves a checkpoint and ends with 0.
set -euo pipefail

if [[ $# -eq 0 || $1 == -* ]]; then
    echo "usage: scripts/pretrain.sh CONFIG [key=value ...]" >&2
    exit 2
fi
nodes=${NNODES:-${SLURM_JOB_NUM_NODES:-1}}
if [[ -z ${GPUS_PER_NODE:-} ]]; then
    GPUS_PER_NODE=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || true
    if [[ $GPUS_PER_NODE -eq 0 ]]; then
        echo "error: nvidia-smi lists no GPU; set GPUS_PER_NODE (processes, on a CPU)" >&2
        exit 2
    fi
fi
export MASTER_PORT=${MASTER_PORT:-29500}

# Only Megatron's workers, which install a handler for it, shall see SIGUSR1: what is ignored here
# stays ignored in what this starts, torchrun's agent included.
(
    trap '' USR1
    exec remoe launch "$@" --nodes "$nodes" --gpus-per-node "$GPUS_PER_NODE"
) &
torchrun=$! # `remoe launch` becomes torchrun, whose children are the workers
if [[ -n ${SLURM_JOB_ID:-} ]]; then # where pretrain.sbatch finds this process on every machine
    echo $$ >"${TMPDIR:-/tmp}/remoe-$SLURM_JOB_ID.pid"
fi

# True once every worker has its handler: before, SIGUSR1 would be lost. It is sent once, because
# Python gives signals up as it ends, and a second one would kill a worker that has saved.
workers_listen() {
    local worker caught listening=false
    for worker in $(pgrep -P "$torchrun"); do
        caught=$(awk '/^SigCgt/ { print $2 }' "/proc/$worker/status") || return 1
        (((0x$caught >> 9) & 1)) || return 1 # bit 9 is signal 10, SIGUSR1
        listening=true
    done
    $listening
}

stopping=false
trap 'stopping=true' TERM USR1
while true; do
    wait "$torchrun" || true
    kill -0 "$torchrun" 2>/dev/null || break
    while $stopping && kill -0 "$torchrun" 2>/dev/null; do
        if workers_listen; then
            pkill -USR1 -P "$torchrun" || true
            stopping=false
        else
            sleep 1
        fi
    done
done
status=0
wait "$torchrun" || status=$?
exit "$status"
