#!/usr/bin/env bash
# Starts a run with torchrun, one process per GPU, or NPROC processes on a machine without GPUs.
#
#   launch/torchrun.sh CONFIG [key=value ...]
#   NPROC=2 launch/torchrun.sh configs/demo.yaml training.steps=20
#
# Several nodes: run it on every node with the same NNODES and RENDEZVOUS (host:port of one of them).
#
#   NNODES=4 RENDEZVOUS=node0:29400 launch/torchrun.sh configs/llama_1b_128k.yaml data.paths=DATA
#
# RESTARTS=N restarts the run from its newest checkpoint after up to N failures in a row without a new checkpoint. Set it on
# every node. Each attempt gets a new torchrun: its own --max-restarts keeps the store of the attempt before, where ranks of
# the next one may read old entries.
#
# Environment: NPROC (processes on this node), NNODES (1), RENDEZVOUS (loopback), RESTARTS (0), RESTART_PAUSE (10 s),
# OMP_NUM_THREADS (cores / NPROC).
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi

nproc_per_node=${NPROC:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}
[[ $nproc_per_node -gt 0 ]] || nproc_per_node=1
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc_per_node ? cores / nproc_per_node : 1))}

if [[ -z ${RENDEZVOUS:-} && ${NNODES:-1} != 1 ]]; then
    echo "NNODES=$NNODES needs RENDEZVOUS=host:port, the same on every node" >&2
    exit 2
fi

launcher=(python "$(dirname "${BASH_SOURCE[0]}")/local_torchrun.py")
if [[ -n ${RENDEZVOUS:-} ]]; then
    launcher=(torchrun --nnodes "${NNODES:-1}" --rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS")
    launcher+=(--rdzv-id "dash-dist-{attempt}")
fi
launcher+=(--nproc-per-node "$nproc_per_node" -m dash_dist.cli train)
exec python -m dash_dist.cluster.local_supervisor "${launcher[@]}" -- "$@"
