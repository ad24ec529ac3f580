# shellcheck shell=bash
# Sourced from the repository root by launch/*.sh and .ci/run. `prepare_venv FILE...` creates .venv (what VENV names)
# and installs the requirement files into it, pinned by constraints.txt (CONSTRAINTS). A copy of the installed files
# stays in .venv, so a second run installs nothing and needs no network, and an interrupted run is completed. Nothing is
# ever deleted.

source launch/common.sh
# Not from the environment, where others use these names: what a script runs is in the folder that it prepared.
VENV=.venv CONSTRAINTS=constraints.txt

# Prints the version of the Python named by $1 (nothing if it does not run); false if it is too old.
python_version() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
  local candidate version found=''
  local candidates=(python3.13 python3.12 python3.11 python3)
  [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    # Runs it, because pyenv puts names on PATH that only print an error.
    version="$(python_version "$candidate")" && echo "$candidate" && return
    [[ -z "$version" ]] || found+=" $candidate ($version)"
  done
  fail "Python 3.11 or newer is needed; found:${found:- none that runs among ${candidates[*]}}." \
    "Install one, or name it: PYTHON=/path/to/python3.11 bash $0"
}

make_venv() {
  local python version
  if [[ ! -e "$VENV/bin/python" && ! -L "$VENV/bin/python" ]]; then
    python="$(find_python)"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
      fail "$python cannot create virtual environments: its venv module is missing" \
        "(Debian, Ubuntu: apt install python3-venv)."
    "$python" -m venv --without-pip "$VENV"
  fi
  version="$(python_version "$VENV/bin/python")" ||
    fail "Python 3.11 or newer is needed in $VENV; found: ${version:-one that no longer runs}." \
      "Move $VENV away and run this again."
  "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$VENV/bin/python" -m ensurepip --default-pip >/dev/null ||
    fail "pip is needed in $VENV; ensurepip could not install it (Debian, Ubuntu: apt install python3-venv)."
}

install() {
  local file="$1" stamp="$VENV/installed-$1"
  [[ -f "$file" ]] || fail "ACCELERATOR must be cuda or tpu; found no $file."
  [[ "$(cat "$file" "$CONSTRAINTS")" != "$(cat "$stamp" 2>/dev/null)" ]] || return 0
  echo "Installing $file into $VENV ..." >&2
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$file" -c "$CONSTRAINTS" ||
    fail "pip could not install $file (its reason is above; installing needs a network). Run this again to resume."
  cat "$file" "$CONSTRAINTS" >"$stamp"
}

prepare_venv() {
  local file
  make_venv
  for file in "$@"; do
    install "$file"
  done
}
