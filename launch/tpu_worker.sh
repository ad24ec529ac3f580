#!/usr/bin/env bash
# The commands that launch/tpu_vm.sh runs on each worker:
#
#   install [EXPORT]   installs this folder; EXPORT is an NFS share to mount as runs/
#   start ARGUMENTS    starts paranet_jax.main in the background, unless it is running; it outlives the connection
#   follow             streams the log until the run ends, and exits with its code; 75: the run was stopped and saved
#                      before its end, for example by a preemption notice
#   code               prints that code, or nothing while the run continues
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/common.sh

packages() {
  sudo apt-get -qq update && sudo apt-get -qq install -y "$@" >/dev/null
}

install_here() {
  # Ubuntu 22.04, which the VMs have, comes with Python 3.10.
  command -v python3.13 python3.12 python3.11 >/dev/null || packages python3.11-venv
  if [[ -n "${1:-}" ]] && ! mountpoint -q runs; then
    packages nfs-common
    mkdir -p runs
    sudo mount -t nfs "$1" runs
  fi
  source launch/venv.sh
  prepare_venv requirements.txt requirements-tpu.txt
}

# The run inherits the lock. Its exit code is written next to its log.
start() {
  exec 9>run.lock
  if ! flock --nonblock 9; then
    echo "already running on $(hostname)"
    return
  fi
  rm -f run.code run.log
  # shellcheck disable=SC2016 # The new shell expands it.
  setsid bash -c '"$@" >run.log 2>&1; code=$?
    if [[ "$(tail -n 1 run.log)" = "stopped by "* ]]; then code=75; fi; echo $code >run.code' - \
    .venv/bin/python -m paranet_jax.main "$@" </dev/null >/dev/null 2>&1 &
}

follow() {
  until [[ -e run.log ]]; do sleep 1; done
  tail -n +1 -F run.log &
  until [[ -s run.code ]]; do sleep 1; done
  sleep 1
  kill $!
  exit "$(<run.code)"
}

case "${1:-}" in
  install) install_here "${2:-}" ;;
  start) start "${@:2}" ;;
  follow) follow ;;
  code) if [[ -e run.code ]]; then cat run.code; fi ;;
  *) fail "expected install, start, follow or code, found '${1:-}'" ;;
esac
