#!/usr/bin/env bash
# Trains on a Google Cloud TPU VM, or on a pod slice, whose workers train one model together. Needs gcloud, logged in.
#
#   ZONE=us-west4-a launch/tpu_vm.sh [--dry-run] ACTION [ARGUMENTS]
#
#   create   creates the VM (or slice), or uses the existing one
#   setup    copies this folder to all workers and installs it there
#   run      starts `python -m paranet_jax.main ARGUMENTS` on all workers unless it is running; streams worker 0's log
#   train    all three; after each preemption, recreates the VM and resumes from the last checkpoint
#   logs     streams the log of a run that was started before
#   delete   deletes the VM and its disk
#
# --dry-run prints the commands, one per line, for the case that no VM exists yet, and runs nothing.
#
# Variables:
#   ZONE      such as us-west4-a (no default)
#   PROJECT   default: gcloud's own
#   NAME      name of the VM; default: paranet
#   TYPE      accelerator type; default: v5litepod-4, which is v5e:2x2; v5litepod-16 is v5e:4x4
#   RUNTIME   software version of the VM; default: depends on TYPE
#   TIER      standard (default), spot or preemptible
#   QUEUED    1: wait in a queue for capacity; default: fail if there is none now
#   RUNS      NFS export (Filestore) that all workers mount as runs/, such as 10.0.0.2:/share; required for preemptible
#             VMs, which lose their disks; default: runs/ is on the disk of each worker
#   POLL      seconds between status checks; default: 60
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/common.sh

NAME="${NAME:-paranet}" TYPE="${TYPE:-v5litepod-4}" TIER="${TIER:-standard}" QUEUED="${QUEUED:-}" RUNS="${RUNS:-}"
POLL="${POLL:-60}" dry_run=''
WORKER=paranet_jax/launch/tpu_worker.sh
STOPPED=75 # Exit code of tpu_worker.sh if the run was stopped before its end.

# Runs a command, or prints it quoted for a shell.
run_or_print() {
  if [[ -n "$dry_run" ]]; then
    printf '%q' "$1" && printf ' %q' "${@:2}" && echo
  else
    "$@"
  fi
}

tpus() {
  run_or_print gcloud compute tpus "$@" "${where[@]}"
}

# Runs a command on worker $1, or on all.
on_worker() {
  local command
  command="$(printf '%q ' "${@:2}")"
  tpus tpu-vm ssh "$NAME" --worker="$1" --command="${command% }"
}

# Prints the state of the VM (READY, PREEMPTED, ...) or of the queued request (ACTIVE, SUSPENDED, ...), if one exists.
state() {
  [[ -z "$dry_run" ]] || return 0
  if [[ -n "$QUEUED" ]]; then
    tpus queued-resources describe "$NAME" --format='value(state.state)' 2>/dev/null || true
  else
    tpus tpu-vm describe "$NAME" --format='value(state)' 2>/dev/null || true
  fi
}

is_ready() {
  [[ "$(state)" =~ ^(READY|ACTIVE)$ ]]
}

create() {
  local found
  found="$(state)"
  if [[ "$found" =~ ^(PREEMPTED|TERMINATED|STOPPED|FAILED|SUSPENDING|SUSPENDED)$ ]]; then
    delete
    found=''
  fi
  if [[ -z "$found" && -n "$QUEUED" ]]; then
    tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" \
      "${tier[@]}"
  elif [[ -z "$found" ]]; then
    tpus tpu-vm create "$NAME" --accelerator-type="$TYPE" --version="$RUNTIME" "${tier[@]}"
  fi
  while [[ -z "$dry_run" ]] && ! is_ready; do
    found="$(state)"
    echo "waiting for $NAME: $found" >&2
    [[ "$found" != FAILED ]] || fail "the request for $TYPE failed; set another ZONE or TYPE"
    sleep "$POLL"
  done
}

setup() {
  archive=/tmp/paranet_jax.tar.gz
  # Also if a command below fails: preemptions would fill the disk.
  [[ -n "$dry_run" ]] || { archive="$(mktemp --suffix=.tar.gz)" && trap 'rm -f -- "$archive"' EXIT; }
  run_or_print tar --create --gzip --file="$archive" --exclude-vcs --exclude=./.venv --exclude=./.venv-newest \
    --exclude=./build --exclude=./runs --exclude=./.pytest_cache .
  tpus tpu-vm scp "$archive" "$NAME:paranet_jax.tar.gz" --worker=all
  run_or_print rm "$archive"
  on_worker all mkdir -p paranet_jax
  on_worker all tar --extract --gzip --file=paranet_jax.tar.gz --directory=paranet_jax
  on_worker all bash "$WORKER" install ${RUNS:+"$RUNS"}
}

# Streams the log until the run ends. Reconnects after a lost connection; the action train also recreates a lost VM.
# After a failure it waits before it checks the VM, because the workers of a preempted slice do not end at once.
run() {
  local code
  on_worker all bash "$WORKER" start "$@"
  while ! logs; do
    code="$(on_worker 0 bash "$WORKER" code 2>/dev/null || true)"
    [[ -z "$code" || "$action" = train ]] || return "$code"
    sleep "$POLL"
    if ! is_ready; then
      [[ "$action" = train ]] || fail "$NAME is gone; the action train recreates it and resumes"
      echo "$NAME is gone; recreating it" >&2
      create
      setup
    elif [[ -n "$code" && "$code" != "$STOPPED" ]]; then
      return "$code"
    fi
    on_worker all bash "$WORKER" start "$@" || true # Does nothing if the run is alive.
  done
}

train() {
  create
  setup
  run "$@"
}

logs() {
  on_worker 0 bash "$WORKER" follow
}

delete() {
  if [[ -n "$QUEUED" ]]; then
    tpus queued-resources delete "$NAME" --force --quiet
  else
    tpus tpu-vm delete "$NAME" --quiet
  fi
}

if [[ "${1:-}" = --dry-run ]]; then
  dry_run=1
  shift
fi
action="${1:-}"
[[ "$action" =~ ^(create|setup|run|train|logs|delete)$ ]] ||
  fail "expected create, setup, run, train, logs or delete, found '$action'; see the top of launch/tpu_vm.sh"
[[ -n "${ZONE:-}" ]] || fail "ZONE must be set, such as ZONE=us-west4-a"
where=(--zone="$ZONE" ${PROJECT:+"--project=$PROJECT"})
case "$TYPE" in
  v6e*) default=v2-alpha-tpuv6e ;;
  v5p*) default=v2-alpha-tpuv5 ;;
  v5litepod*) default=v2-alpha-tpuv5-lite ;;
  *) default=tpu-ubuntu2204-base ;;
esac
RUNTIME="${RUNTIME:-$default}"
case "$TIER" in
  standard) tier=() ;;
  spot | preemptible) tier=("--$TIER") ;;
  *) fail "TIER must be standard, spot or preemptible, found '$TIER'" ;;
esac
[[ "$TIER" != preemptible || -z "$QUEUED" ]] || fail "a queued VM can be spot but not preemptible; set TIER=spot"
[[ "$TIER" = standard || "$action" != train || -n "$RUNS" ]] ||
  fail "a preempted VM loses its disk and the checkpoints on it; set RUNS to an NFS export"
[[ -n "$dry_run" ]] || command -v gcloud >/dev/null || fail "gcloud is needed; see https://cloud.google.com/sdk/docs/install"
"$action" "${@:2}"
