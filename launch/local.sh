#!/usr/bin/env bash
# Trains in several processes on this machine, each with its own CPU devices, to try out what a cluster does.
# The GPUs or the TPU of one machine need no launcher: one process uses all devices.
#
#   PROCESSES=2 DEVICES=1 launch/local.sh [--dry-run] ARGUMENTS
#
# Runs `python -m paranet_jax.main ARGUMENTS` in each. --dry-run prints the commands instead. Process 0 prints the
# progress, and all of them their errors. A signal goes to all processes, which save and stop; a second one kills them.
# If one process fails, all end, with its exit code.
#
# Variables:
#   PROCESSES  default: 2
#   DEVICES    CPU devices per process; default: 1
#   PORT       where the processes find each other; default: from 20000 to 39999, derived from this shell's pid
#   PYTHON     default: .venv/bin/python
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/common.sh

PROCESSES="${PROCESSES:-2}" DEVICES="${DEVICES:-1}" PORT="${PORT:-$((20000 + $$ % 20000))}"
PYTHON="${PYTHON:-.venv/bin/python}"

dry_run=''
if [[ "${1:-}" = --dry-run ]]; then
  dry_run=1
  shift
fi
for name in PROCESSES DEVICES PORT; do
  [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || fail "$name must be an integer of 1 or more, found '${!name}'"
done
command -v "$PYTHON" >/dev/null || [[ -n "$dry_run" ]] || fail "expected $PYTHON, found none; launch/quickstart.sh creates .venv"

# Sets `command` to the command of process $1; the other arguments go to the run.
command_of() {
  command=(env JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$DEVICES" "$PYTHON" -m paranet_jax.main "${@:2}")
  command+=(--coordinator="localhost:$PORT" --num_processes="$PROCESSES" --process_id="$1")
}

pids=()
signal=TERM
# shellcheck disable=SC2329 # Called by the trap.
pass_on() {
  kill -s "$signal" "${pids[@]}" 2>/dev/null || true
  signal=KILL
}
trap pass_on INT TERM

for ((index = 0; index < PROCESSES; index++)); do
  command_of "$index" "$@"
  if [[ -n "$dry_run" ]]; then
    printf '%q' "${command[0]}" && printf ' %q' "${command[@]:1}" && echo ' &'
  else
    "${command[@]}" &
    pids+=("$!")
  fi
done

# Polls rather than waits: any process may be the first to end, and a signal must be passed on.
code=0 failed_at=''
while ((${#pids[@]})); do
  sleep 0.2
  running=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      running+=("$pid")
      continue
    fi
    own=0
    wait "$pid" || own=$?
    if ((own && !code)); then
      code="$own" failed_at="$SECONDS"
    fi
  done
  pids=("${running[@]+"${running[@]}"}")
  # The others end on their own and say why, except those still waiting for a process that never joined.
  if [[ -n "$failed_at" ]] && ((${#pids[@]} && SECONDS - failed_at >= 5)); then
    kill -s KILL "${pids[@]}" 2>/dev/null || true
  fi
done
exit "$code"
