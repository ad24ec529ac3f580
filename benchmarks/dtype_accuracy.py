"""The accuracy of a run in float32 and in bfloat16, over several seeds each: by default the quickstart's.

`difference` is bfloat16's mean less float32's, in points; `deviations` is that by the standard deviation of float32's
seeds. Nothing here is timed, so the machine may be busy. `--workdir` keeps the runs; those that are finished are read.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cli
from paranet_jax.host.arguments import positive
from paranet_jax.host.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {'float32': 'float32', 'bfloat16': 'bfloat16!'}
"""Their names, and the values of `model.dtype`, which insist."""


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  parser = cli.Parser(__doc__)
  parser.add_argument('--config', default='configs/quickstart.py', help='of the runs (default: the quickstart)')
  parser.add_argument(
    '--set', action='append', default=[], metavar='FIELD=VALUE', help='another value of a field of --config'
  )
  parser.add_argument('--seeds', type=positive, default=3, help='of each dtype (default: 3)')
  parser.add_argument('--workdir', type=Path, help='folder of the runs (default: a temporary one)')
  return cli.run(parser, measure, argv)


def measure(options: argparse.Namespace) -> dict[str, Any]:
  """`rows`, one for each exit."""
  with tempfile.TemporaryDirectory() as temporary:
    folder = options.workdir or Path(temporary)
    accuracies = {
      name: [trained(options.config, options.set, folder, name, seed) for seed in range(options.seeds)]
      for name in DTYPES
    }
  return {'rows': rows(accuracies)}


def trained(config: str, changes: Sequence[str], folder: Path, dtype: str, seed: int) -> list[float]:
  """The test accuracy in percent of each exit of a run, which is trained unless it is finished.

  Args:
    changes: `FIELD=VALUE` of the configuration.
  """
  workdir = folder.resolve() / f'{dtype}-{seed}'
  flags = [
    f'--config={config}',
    *(f'--config.{change}' for change in changes),
    f'--config.seed={seed}',
    f'--config.model.dtype={DTYPES[dtype]}',
    f'--workdir={workdir}',
  ]
  cli.progress(f'{dtype}, seed {seed} ...')
  # If it is finished too: one of another configuration is refused.
  process = subprocess.run([sys.executable, '-m', 'paranet_jax.main', *flags], cwd=ROOT, stdout=subprocess.DEVNULL)
  if process.returncode:
    raise UserError(f'expected a run in {workdir}, found exit code {process.returncode}; see its message above')
  return [100 * row['accuracy'] for row in json.loads((workdir / 'summary.json').read_text())['exits']]


def rows(accuracies: Mapping[str, Sequence[Sequence[float]]]) -> list[dict[str, Any]]:
  """A row for each exit.

  Args:
    accuracies: by dtype, of each seed and each exit.
  """
  found = []
  by_exit = (zip(*accuracies[name], strict=True) for name in DTYPES)
  for number, (single, half) in enumerate(zip(*by_exit, strict=True), 1):
    difference = statistics.mean(half) - statistics.mean(single)
    deviation = statistics.stdev(single) if len(single) > 1 else 0.0
    found.append(
      {
        'exit': number,
        'float32': list(single),
        'bfloat16': list(half),
        'difference': difference,
        'deviations': difference / deviation if deviation else None,
      }
    )
  return found


if __name__ == '__main__':
  sys.exit(main())
