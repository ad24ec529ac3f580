#!/usr/bin/env bash
# Trains the quickstart configuration on the digits that come with scikit-learn. Needs only Python and a network.
# Arguments go to paranet_jax.main. ACCELERATOR=cuda or ACCELERATOR=tpu also installs JAX for that accelerator.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/venv.sh

prepare_venv requirements.txt ${ACCELERATOR:+"requirements-$ACCELERATOR.txt"}
exec .venv/bin/python -m paranet_jax.main --config=configs/quickstart.py "$@"
