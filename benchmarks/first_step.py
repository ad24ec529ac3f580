"""Seconds from the command line to the first training step of the quickstart, in processes of their own.

`python -m paranet_jax.main --config=configs/quickstart.py` is started in an empty folder, and the clock stops at its
line on the first step, which is logged at once here. Cold: there is neither a decoded data set nor a compiled program
nor a checked number, as after an installation; the files of the libraries are in memory. Warm: the same again.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cli
from paranet_jax.host.arguments import positive
from paranet_jax.host.errors import UserError
from paranet_jax.host.huge_pages import VARIABLE

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ('-m', 'paranet_jax.main', '--config=configs/quickstart.py', '--config.log.every_steps=1')
SETTINGS = (VARIABLE, 'JAX_COMPILATION_CACHE_DIR', 'XLA_FLAGS')
"""What this process has set, or its user, and a fresh one has not."""


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  parser = cli.Parser(__doc__)
  parser.add_rounds(1)
  parser.add_argument('--warm', type=positive, default=3, help='warm starts in each round (default: 3)')
  return cli.run(parser, measure, argv)


def measure(options: argparse.Namespace) -> dict[str, Any]:
  """`cold_first_step_s` and `warm_first_step_s`, medians, and `rows`, one for each start."""
  rows = []
  for number in range(1, options.rounds + 1):
    with tempfile.TemporaryDirectory() as folder:
      for warm in range(options.warm + 1):
        what = 'warm' if warm else 'cold'
        cli.progress(f'round {number}, {what} ...')
        rows.append({'what': what, 'round': number, 'first_step_s': started(Path(folder))})
  medians = {
    f'{what}_first_step_s': statistics.median(row['first_step_s'] for row in rows if row['what'] == what)
    for what in ('cold', 'warm')
  }
  return medians | {'rows': rows}


def started(cache: Path, root: Path = ROOT, settings: Mapping[str, str] | None = None) -> float:
  """Seconds until a fresh process has done its first step; then it is asked to stop, and waited for.

  Args:
    cache: PARANET_CACHE_DIR.
    root: of the repository.
    settings: more environment variables.

  Raises:
    UserError: it ended before.
  """
  environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
  environment |= {'PARANET_CACHE_DIR': str(cache)} | dict(settings or {})
  with tempfile.TemporaryDirectory() as folder:
    start = time.perf_counter()
    command = [sys.executable, *COMMAND, f'--workdir={folder}/run']
    process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None  # It is a pipe.
    seconds = next((time.perf_counter() - start for line in process.stdout if '  step 1/' in line), None)
    process.send_signal(signal.SIGTERM)
    process.communicate()
  if seconds is None:
    raise UserError(f'expected {" ".join(COMMAND)} to train, found exit code {process.returncode}; see its message')
  return seconds


if __name__ == '__main__':
  sys.exit(main())
