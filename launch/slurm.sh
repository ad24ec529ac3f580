#!/usr/bin/env bash
# Trains on a SLURM cluster: submits a job that runs `python -m paranet_jax.main ARGUMENTS` in all its tasks.
#
#   launch/slurm.sh [--dry-run] ARGUMENTS
#
# --dry-run prints the job instead of submitting it. All tasks on all nodes train one model together: see
# docs/scaling.md. Two minutes before the time limit, or when the job is preempted, they save and stop, and the job
# requeues itself until they are finished; after an error it does not. .venv must exist: launch/quickstart.sh or
# launch/test.sh creates it.
#
# Variables:
#   NODES      default: 1
#   TASKS      processes per node; default: GPUS, or 1 without GPUs
#   GPUS       GPUs per node, one process each; default: none, CPUs are used
#   CPUS       cores per process; default: 8
#   HOURS      time limit, after which the job requeues itself; default: 24
#   PARTITION  default: the cluster's own
#   ACCOUNT    default: the cluster's own
#   WORKDIR    of the run, on a file system that all nodes share; default: runs/slurm
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/common.sh

# The job looks for summary.json in WORKDIR to see whether the run is finished.
for argument in "$@"; do
  [[ ! "$argument" =~ ^--?(workdir|mode|help|helpfull|helpshort|helpxml)(=|$) ]] ||
    fail "the job trains in WORKDIR until it is finished, found $argument; set WORKDIR, and leave the flag out"
done
dry_run=''
if [[ "${1:-}" = --dry-run ]]; then
  dry_run=1
  shift
fi
[[ -x .venv/bin/python || -n "$dry_run" ]] ||
  fail "expected .venv/bin/python, found none; launch/quickstart.sh creates it"
[[ -n "$dry_run" ]] || command -v sbatch >/dev/null ||
  fail "sbatch is needed, found none; run this on a login node of a SLURM cluster, or use --dry-run"
GPUS="${GPUS:-}" CPUS="${CPUS:-8}" WORKDIR="${WORKDIR:-runs/slurm}"
options=(
  --job-name=paranet
  --nodes="${NODES:-1}"
  --ntasks-per-node="${TASKS:-${GPUS:-1}}"
  --cpus-per-task="$CPUS"
  --time="${HOURS:-24}:00:00"
  --signal=TERM@120
  --requeue
  --open-mode=append
  --output="$WORKDIR/slurm-%j.log"
  ${GPUS:+"--gpus-per-node=$GPUS"}
  ${PARTITION:+"--partition=$PARTITION"}
  ${ACCOUNT:+"--account=$ACCOUNT"}
)
# Since Slurm 22.05, srun no longer inherits --cpus-per-task from the job.
job="$(printf ' %q' srun --cpus-per-task="$CPUS" .venv/bin/python -m paranet_jax.main --workdir="$WORKDIR" "$@")"
job="#!/usr/bin/env bash
set -euo pipefail
${job# }
log=$(printf '%q' "$WORKDIR")/slurm-\$SLURM_JOB_ID.log
# A run that was resumed with more epochs has the summary of the fewer.
if [[ ! -e $(printf '%q' "$WORKDIR/summary.json") || \"\$(tail -n 1 \"\$log\")\" = 'stopped by '* ]]; then
  scontrol requeue \"\$SLURM_JOB_ID\"
fi"

if [[ -n "$dry_run" ]]; then
  printf 'mkdir -p %q\n' "$WORKDIR"
  printf 'sbatch' && printf ' %q' "${options[@]}" && printf ' <<%s\n%s\nJOB\n' "'JOB'" "$job"
else
  mkdir -p "$WORKDIR"
  sbatch "${options[@]}" <<<"$job"
fi
