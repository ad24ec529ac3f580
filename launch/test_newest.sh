#!/usr/bin/env bash
# Runs the tests of what jax computes on Python 3.13 with the newest jax (constraints-newest.txt), in .venv-newest;
# arguments go to pytest. Without a Python 3.13 it says so and runs nothing. PYTHON names one.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

source launch/venv.sh

VENV=.venv-newest CONSTRAINTS="$PWD/.venv-newest/constraints.txt"

TESTS=(
  tests/models/numerics_test.py tests/models/layers tests/models/paranet_test.py tests/steps_test.py
  tests/losses_test.py tests/optim_test.py tests/dtype_timing_test.py tests/main_test.py tests/export/export_test.py
)

find_python_313() {
  local candidate candidates=(python3.13)
  if [[ -n "${PYTHON:-}" ]]; then
    candidates=("$PYTHON")
  elif command -v pyenv >/dev/null; then  # Its python3.13 runs only if it is switched on.
    for candidate in $(pyenv versions --bare); do
      [[ "$candidate" != 3.13.* ]] || candidates+=("$(pyenv prefix "$candidate")/bin/python")
    done
  fi
  for candidate in "${candidates[@]}"; do
    [[ "$(python_version "$candidate")" != 3.13 ]] || { echo "$candidate" && return; }
  done
  return 1
}

# constraints.txt, with the versions of constraints-newest.txt where it has them.
merged_constraints() {
  local line newest
  newest=$'\n'"$(cat constraints-newest.txt)"
  while read -r line; do
    [[ "$newest" == *$'\n'"${line%%==*}=="* ]] || echo "$line"
  done <constraints.txt
  echo "$newest"
}

if ! PYTHON="$(find_python_313)"; then
  echo 'Not tested with the newest jax: found no Python 3.13; name one: PYTHON=/path/to/python3.13' >&2
  exit 0
fi
mkdir -p "$VENV"
merged_constraints >"$CONSTRAINTS"
prepare_venv requirements.txt requirements-test.txt
unset PYTHONDONTWRITEBYTECODE  # As in launch/test.sh.
(($#)) || set -- "${TESTS[@]}"
exec "$VENV/bin/python" -m pytest -q --durations=5 --numprocesses=2 --dist=loadfile "$@"
