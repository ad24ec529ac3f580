"""What a checkpoint costs the training loop: ours beside the copy to host memory alone, and beside orbax's own.

`save` is how long the loop waits until saving returns. `copy` is the least that it can wait for: the state is copied
out of its buffers, which the next step reuses. The state is random, of the network's size, on the first device.
`whole_save_ms` is how long a save takes until it ends in the background. `steps_ms` is how long a few training steps
take that begin with a save, and `bare_steps_ms` the same steps without one.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
import orbax.checkpoint as ocp

from benchmarks import cli, network, report
from paranet_jax.runs.checkpoints import Checkpoints

STEPS = 8


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  parser = cli.Parser(__doc__)
  parser.add_rounds(5)
  return cli.run(parser, measure, argv)


def measure(options: argparse.Namespace) -> dict[str, Any]:
  """`save_ms`, `copy_ms`, their `ratio`, `whole_save_ms`, `steps_ms`, `bare_steps_ms`, `megabytes`, and `rows`."""
  size, rounds = options.size, options.rounds
  state = jax.block_until_ready(network.random_state(size))
  with tempfile.TemporaryDirectory() as folder:
    times = _times(state, Path(folder), rounds)
    steps = _step_times(size, state, Path(folder) / 'steps', rounds)
  rows = [
    report.row('save, until it returns', peer, times['save'], times[peer], 'ms') for peer in ('copy', 'orbax async')
  ]
  return {
    'save_ms': times['save'],
    'copy_ms': times['copy'],
    'ratio': times['save'] / times['copy'],
    'whole_save_ms': times['whole'],
    **steps,
    'megabytes': sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6,
    'rows': rows,
  }


def _times(state: Any, folder: Path, rounds: int) -> dict[str, float]:
  """Milliseconds, medians over the rounds, a first one left out."""
  found = {name: [] for name in ('copy', 'save', 'whole', 'orbax async')}
  options = ocp.CheckpointManagerOptions(max_to_keep=1)
  with Checkpoints(folder / 'ours', 1) as ours, ocp.CheckpointManager(folder / 'theirs', options=options) as theirs:
    for step in range(rounds + 1):
      cli.progress(f'saving, round {step} of {rounds} ...')
      # A state each, as after a step: an array keeps what was copied of it.
      one, two, three = (jax.block_until_ready(_again(state)) for _ in range(3))
      found['copy'].append(_milliseconds(partial(jax.tree.map, partial(np.array, copy=True), one)))
      returned = _milliseconds(partial(ours.save, step, two, {}))
      found['save'].append(returned)
      found['whole'].append(returned + _milliseconds(ours.wait))
      found['orbax async'].append(_milliseconds(partial(theirs.save, step, args=ocp.args.StandardSave(three))))
      theirs.wait_until_finished()
  return {name: statistics.median(values[1:]) for name, values in found.items()}


def _step_times(size: network.Size, state: Any, folder: Path, rounds: int) -> dict[str, float]:
  """Milliseconds of STEPS training steps with a save in them and without, in turn, medians."""
  run = network.our_training_step(network.our_network(size), size, jax.tree.map(np.array, state), jax.devices()[:1])
  cli.progress('compiling the training step ...')
  run()
  found = {'steps_ms': [], 'bare_steps_ms': []}
  with Checkpoints(folder, 1) as checkpoints:
    for step in range(rounds):
      cli.progress(f'training with and without a save, round {step + 1} of {rounds} ...')
      for name, save in (('steps_ms', lambda step=step: checkpoints.save(step, state, {})), ('bare_steps_ms', None)):
        found[name].append(_milliseconds(lambda save=save: _steps(run, save)))
        checkpoints.wait()
  return {name: statistics.median(values) for name, values in found.items()}


def _steps(run: Callable[[], None], save: Callable[[], None] | None) -> None:
  if save:
    save()
  for _ in range(STEPS):
    run()


@jax.jit
def _again(state: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf.copy(), state)


def _milliseconds(function: Callable[[], Any]) -> float:
  start = time.perf_counter()
  function()
  return 1000 * (time.perf_counter() - start)


if __name__ == '__main__':
  sys.exit(main())
