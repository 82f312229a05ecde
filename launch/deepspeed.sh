#!/usr/bin/env bash
# Starts a run with the DeepSpeed launcher, which only starts the processes: the training is the same as everywhere.
#
#   launch/deepspeed.sh CONFIG [key=value ...]
#   NPROC=2 launch/deepspeed.sh configs/demo.yaml training.steps=20
#
# Several nodes: either HOSTFILE=path, and the launcher reaches the others by ssh; or, without ssh, on every node with its own
# NODE_RANK:
#
#   HOSTFILE=hosts NODE_RANK=0 MASTER_ADDR=node0 launch/deepspeed.sh configs/llama_1b_128k.yaml data.paths=DATA
#
# RESTARTS=N restarts the run from its newest checkpoint after up to N failures in a row without a new checkpoint. Set it on
# every node where this script runs.
#
# Environment: NPROC (processes on this node; all GPUs), RESTARTS (0), RESTART_PAUSE (10 s), HOSTFILE, NODE_RANK, MASTER_ADDR,
# MASTER_PORT (29500), OMP_NUM_THREADS (cores / NPROC), DS_ACCELERATOR (cpu where there is no GPU).
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
nproc_per_node=${NPROC:-$((gpus > 0 ? gpus : 1))}
[[ $gpus -gt 0 ]] || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc_per_node ? cores / nproc_per_node : 1))}

where=(--master_port "${MASTER_PORT:-29500}")
if [[ -n ${HOSTFILE:-} ]]; then
    where+=(--hostfile "$HOSTFILE")
    if [[ -n ${NODE_RANK:-} ]]; then
        where+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "${MASTER_ADDR:?set it to the address of node 0}")
    fi
else
    where+=(--num_accelerators "$nproc_per_node")
fi

# The rank comes from the environment, as under torchrun, so the script's own --local_rank argument is left out.
launcher=(deepspeed "${where[@]}" --no_local_rank --module dash_dist.cli train)
exec python -m dash_dist.cluster.local_supervisor "${launcher[@]}" -- "$@"
