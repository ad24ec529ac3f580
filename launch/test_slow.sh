#!/usr/bin/env bash
# Runs the slow tests: deaths of real processes, all families, the tools of the benchmarks; then a soak that kills training
# at random. Arguments go to pytest.
#
# Variables:
#   MINUTES  of the soak, at least; default: 1
#   KILLS    of the soak, at least; default: 10
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/venv.sh

prepare_venv requirements.txt requirements-test.txt
.venv/bin/python -m pytest -q --durations=10 tests/slow "$@"
exec .venv/bin/python tests/slow/soak.py --minutes="${MINUTES:-1}" --kills="${KILLS:-10}"
