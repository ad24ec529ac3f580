# shellcheck shell=bash
# Sourced by the other scripts in this folder.

# Prints one line and exits with 2, the code of a user error.
fail() {
  echo "error: $*" >&2
  exit 2
}
