#!/usr/bin/env bash
# Runs the tests in two processes; arguments go to pytest (-n0: in one). The tests of real CIFAR-100 run where
# PARANET_DATA_DIR holds it.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/venv.sh

prepare_venv requirements.txt requirements-test.txt
exec .venv/bin/python -m pytest -q --durations=10 --numprocesses=2 --dist=loadfile "$@"
