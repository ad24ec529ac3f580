#!/usr/bin/env bash
# Runs the tests in two processes; arguments go to pytest (-n0: one process). The tests on real CIFAR-100 run if
# PARANET_DATA_DIR holds it. launch/test_slow.sh runs the slow tests.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/venv.sh

prepare_venv requirements.txt requirements-test.txt
unset PYTHONDONTWRITEBYTECODE  # Or each of the many processes that tests start would compile the package again.
exec .venv/bin/python -m pytest -q --durations=10 --numprocesses=2 --dist=loadfile "$@"
