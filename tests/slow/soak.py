"""A soak: kills the real training process at random, again and again; the result must be as if it had not been killed.

`python tests/slow/soak.py --minutes=30 [--kills=50] [--seed=0]` trains small runs one after another, killing each with
SIGKILL at random times until it finishes, until both the minutes and the kills are reached. For each run it checks that
the final state equals the undisturbed run's bit for bit, that metrics.jsonl has every evaluation line once, that
summary.json is the same, and that no temporary file is left. It prints one JSON object.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1] / 'helpers')]

import jax  # noqa: E402
from killing import RUN, assert_ends_as, start  # noqa: E402

# 330 steps, with as many evaluations as the shorter run.
LONG = (
  *(*RUN, '--config.train.epochs=30', '--config.eval.every_epochs=5'),
  *('--config.checkpoint.every_steps=15', '--config.log.every_steps=10'),
)
LONGEST = 1.5
"""At most so many seconds from the first log line to the kill; a whole run takes a few."""


def killed(workdir: Path, chance: random.Random) -> bool:
  """Starts the run and kills it; returns False if it finished before."""
  with start(*LONG, workdir=workdir) as process:
    # Half of the kills hit the start (imports, restoring, compiling), half the training, saving and evaluating.
    training = chance.random() < 0.5
    if training:
      next((line for line in process.stdout if line.startswith('epoch')), None)
    try:
      process.wait(chance.uniform(0, LONGEST if training else 4 * LONGEST))
    except subprocess.TimeoutExpired:
      process.kill()
    _, err = process.communicate()
  assert process.returncode in (0, -9), err
  return process.returncode == -9


def finish(workdir: Path) -> None:
  """Lets the run finish."""
  with start(*LONG, workdir=workdir) as process:
    _, err = process.communicate()
  assert (process.returncode, err) == (0, ''), err


def main() -> None:
  """Runs the command."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--minutes', type=float, required=True, help='minimum duration')
  parser.add_argument('--kills', type=int, default=50, help='minimum number of kills (default: 50)')
  parser.add_argument('--seed', type=int, default=0, help='random seed for the kills (default: 0)')
  options = parser.parse_args()
  jax.config.update('jax_platforms', os.environ.setdefault('JAX_PLATFORMS', 'cpu'))
  jax.config.update('jax_disable_most_optimizations', True)
  chance, started, kills, runs = random.Random(options.seed), time.monotonic(), 0, 0
  with tempfile.TemporaryDirectory() as folder:
    os.environ['PARANET_CACHE_DIR'] = f'{folder}/cache'
    whole = Path(folder) / 'whole'
    finish(whole)
    while kills < options.kills or time.monotonic() - started < 60 * options.minutes:
      workdir, before = Path(folder) / f'run_{runs}', kills
      while killed(workdir, chance):
        kills += 1
        print(f'run {runs + 1}: {kills - before} kills, {kills} in total', file=sys.stderr, flush=True)
        if kills - before == options.kills:  # An unfinished run would not be checked.
          finish(workdir)
          break
      assert_ends_as(workdir, whole)
      runs += 1
  minutes = (time.monotonic() - started) / 60
  print(json.dumps({'runs': runs, 'kills': kills, 'minutes': round(minutes, 1), 'same': True}))


if __name__ == '__main__':
  main()
