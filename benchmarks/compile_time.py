"""Seconds from a standing start, each measured in a fresh process.

First step: initialise, compile and run, until the first training step is finished; the time to import is a row of its
own. Cold is without a compilation cache, warm with the one that an earlier process left. Evaluation: the functions of
all exits compiled. Where libtpu is installed the step of four times the batch is compiled ahead of time for v5e:2x2.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cli, peers, report
from benchmarks.fresh_process import in_fresh_process
from benchmarks.network import Size
from paranet_jax.plan.target import has_libtpu

TPU_CHIPS = 4


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  parser = cli.Parser(__doc__)
  parser.add_peers()
  parser.add_rounds(1)
  return cli.run(parser, measure, argv)


def measure(options: argparse.Namespace) -> dict[str, Any]:
  """The five times and sizes by name, and `rows` of what the first step of ours and of each peer is made of."""
  size = options.size
  peers.require_torch()
  others = {peers.EAGER: 'eager'} | ({peers.COMPILED: 'compile'} if options.peer == 'compile' else {})
  others |= {peers.LINEN: 'linen'} if options.linen else {}
  with tempfile.TemporaryDirectory() as folder:
    cache = Path(folder)
    started(size, 'ours', cache)
    runs = {'cold': partial(started, size, 'ours'), 'warm': partial(started, size, 'ours', cache)}
    runs |= {name: partial(started, size, task) for name, task in others.items()}
    found = medians(runs, options.rounds)
  cold, warm = found['cold'], found['warm']
  rows = [row for name in others for row in compare('cold start', name, cold, found[name], size)]
  rows += compare('warm start', 'cold', warm, cold, size)
  return {
    'cold_first_step_s': cold['first_step'],
    'warm_first_step_s': warm['first_step'],
    'eval_s': started(size, 'evaluation')['compile'],
    **tpu(size),
    'rows': rows,
  }


def tpu(size: Size) -> dict[str, float | None]:
  """`tpu_compile_s` and `tpu_code_mb` of the step for v5e:2x2, None without libtpu."""
  if not has_libtpu():
    return {'tpu_compile_s': None, 'tpu_code_mb': None}
  found = started(dataclasses.replace(size, batch=TPU_CHIPS * size.batch), 'tpu')
  return {'tpu_compile_s': found['compile'], 'tpu_code_mb': found['code_mb']}


def started(size: Size, task: str, cache: Path | None = None) -> dict[str, float]:
  """What a fresh process measures, announced."""
  cli.progress(f'a fresh process: {task}{", with a compilation cache" if cache else ""} ...')
  return in_fresh_process(task, size, cache=cache)


def medians(runs: Mapping[str, Callable[[], dict[str, float]]], rounds: int) -> dict[str, dict[str, float]]:
  """Runs all in turn, `rounds` times; gives the median of each of their values."""
  found = {name: [] for name in runs}
  for _ in range(rounds):
    for name, run in runs.items():
      found[name].append(run())
  return {
    name: {key: statistics.median(values[key] for values in turns) for key in turns[0]} for name, turns in found.items()
  }


def compare(what: str, peer: str, ours: dict[str, float], theirs: dict[str, float], size: Size) -> list[dict[str, Any]]:
  """A row for each part of the first step."""
  return [
    report.row(f'{what}: {part.replace("_", " ")}', peer, ours[part], theirs[part], 's', size.batch) for part in ours
  ]


if __name__ == '__main__':
  sys.exit(main())
