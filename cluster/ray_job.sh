#!/usr/bin/env bash
# Submits a run to a Ray cluster as a job: launch/ray_train.py, with this repository as the job's working directory.
#
#   RAY_ADDRESS=http://head:8265 cluster/ray_job.sh CONFIG [key=value ...] [--num-workers N]
#   cluster/ray_job.sh --dry-run CONFIG ...        prints the command instead
#
# dash-dist must be installed on the cluster's nodes, and run.directory must lie on storage that all of them share: the job's
# own working directory is a copy that is thrown away.
#
# `dash-dist submit` does the same and more: it checks the configuration first and says how to stop, resume and watch the run.
# `ray job stop` lets the run save: it gets RAY_JOB_STOP_WAIT_TIME_S (600) seconds for that before it is killed.
#
# Authentication is by token, as Ray does it: RAY_AUTH_TOKEN, or a file at RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token
# (`ray get-auth-token --generate` makes one; the cluster's head must have been started with the same).
set -euo pipefail

dry_run=
if [[ ${1:-} == --dry-run ]]; then
    dry_run=yes
    shift
fi
if [[ $# -lt 1 || $1 == -* ]]; then
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi
if [[ -z ${RAY_ADDRESS:-} ]]; then
    echo "RAY_ADDRESS is not set: give the cluster's dashboard, such as RAY_ADDRESS=http://head:8265" >&2
    exit 2
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
# The working directory is uploaded: what is not needed to run stays here.
excludes='".git", ".venv", "runs", "build", "tests", "docs", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"'
variables="\"RAY_AUTH_MODE\": \"$RAY_AUTH_MODE\", \"RAY_JOB_STOP_WAIT_TIME_S\": \"${RAY_JOB_STOP_WAIT_TIME_S:-600}\""
# Below the job's copy of this repository: its kernels go before those that are installed, as its dash_dist does.
variables+=", \"PYTHONPATH\": \"kernels\""
command=(
    ray job submit --working-dir .
    --runtime-env-json "{\"excludes\": [$excludes], \"env_vars\": {$variables}}"
    -- python launch/ray_train.py "$@"
)
if [[ -n $dry_run ]]; then
    printf '%q ' "${command[@]}"
    echo
else
    exec "${command[@]}"
fi
