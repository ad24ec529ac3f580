#!/usr/bin/env bash
# Trains on a SLURM cluster: submits a job that runs `python -m paranet_jax.main ARGUMENTS` in all its tasks.
#
#   launch/slurm.sh [--dry-run] ARGUMENTS
#
# --dry-run prints what would be submitted. All tasks train one model together, on all nodes: see docs/scaling.md. Two
# minutes before the time is up, or when the job is preempted, they save and stop, and the job queues itself again until
# summary.json is there; what fails stays stopped. .venv must be there: launch/test.sh or launch/quickstart.sh makes it.
#
# Variables:
#   NODES      default: 1
#   TASKS      processes a node; default: GPUS, or 1 without them
#   GPUS       GPUs a node, a process each; default: none, CPUs
#   CPUS       cores a process; default: 8
#   HOURS      of the job, then it queues itself again; default: 24
#   PARTITION  default: the cluster's own
#   ACCOUNT    default: the cluster's own
#   WORKDIR    of the run, on a file system that all nodes see; default: runs/slurm
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# Who looks whether the run is at its end looks in WORKDIR for its summary.
for argument in "$@"; do
  [[ ! "$argument" =~ ^--?(workdir|mode)(=|$) ]] ||
    { echo "error: the job trains in WORKDIR until it is at its end, found $argument; set WORKDIR, and leave it out" >&2 && exit 2; }
done
dry_run=''
if [[ "${1:-}" = --dry-run ]]; then
  dry_run=1
  shift
fi
[[ -x .venv/bin/python || -n "$dry_run" ]] ||
  { echo 'error: expected .venv/bin/python, found none; launch/quickstart.sh makes it' >&2 && exit 2; }
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
# srun is told again: since Slurm 22.05 it does not take the job's.
job="$(printf ' %q' srun --cpus-per-task="$CPUS" .venv/bin/python -m paranet_jax.main --workdir="$WORKDIR" "$@")"
job="#!/usr/bin/env bash
set -euo pipefail
${job# }
test -e $(printf '%q' "$WORKDIR/summary.json") || scontrol requeue \"\$SLURM_JOB_ID\""

if [[ -n "$dry_run" ]]; then
  printf 'mkdir -p %q\n' "$WORKDIR"
  printf 'sbatch' && printf ' %q' "${options[@]}" && printf ' <<%s\n%s\nJOB\n' "'JOB'" "$job"
else
  mkdir -p "$WORKDIR"
  sbatch "${options[@]}" <<<"$job"
fi
