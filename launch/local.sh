#!/usr/bin/env bash
# Trains in several processes on this machine, each with CPU devices of its own: what a cluster does, to try it.
# On GPUs or a TPU of one machine, one process takes all devices and needs no launcher.
#
#   PROCESSES=2 DEVICES=1 launch/local.sh [--dry-run] ARGUMENTS
#
# Runs `python -m paranet_jax.main ARGUMENTS` in all of them. --dry-run prints what would run. What the first one prints
# is seen, and the errors of all. A signal is passed on to all, which save and stop; a second one kills them. If one
# fails, all end, with its exit code.
#
# Variables:
#   PROCESSES  default: 2
#   DEVICES    CPU devices of each process; default: 1
#   PORT       at which the processes find each other; default: one from 20000 to 39999, of this shell's number
#   PYTHON     default: .venv/bin/python
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

PROCESSES="${PROCESSES:-2}" DEVICES="${DEVICES:-1}" PORT="${PORT:-$((20000 + $$ % 20000))}"
PYTHON="${PYTHON:-.venv/bin/python}"

fail() {
  echo "error: $*" >&2
  exit 2
}

dry_run=''
if [[ "${1:-}" = --dry-run ]]; then
  dry_run=1
  shift
fi
for name in PROCESSES DEVICES PORT; do
  [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || fail "$name must be a number of 1 or more, found '${!name}'"
done
[[ -x "$PYTHON" || -n "$dry_run" ]] || fail "expected $PYTHON, found none; launch/quickstart.sh makes .venv"

# The command of process $1, after what a run itself is told.
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

# Looked at in turn rather than waited for: any of them may be the first to end, and a signal must be passed on.
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
  # The others end by themselves, saying why, but for those that still wait for the one that never came.
  if [[ -n "$failed_at" ]] && ((${#pids[@]} && SECONDS - failed_at >= 5)); then
    kill -s KILL "${pids[@]}" 2>/dev/null || true
  fi
done
exit "$code"
