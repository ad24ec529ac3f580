"""The table of audits in docs/guarantees.md, from what `calibrate --audit` wrote.

python -m paranet_jax.calibrate --workdir=RUN --budget=8M --audit
python benchmarks/audit.py --workdir=RUN    # keeps it in benchmarks/results/audit.json, by the name of the folder
python benchmarks/audit.py                  # the table from that file
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import tables
from paranet_jax.display.tables import human_count
from paranet_jax.early.exit_plan import read_plan
from paranet_jax.experiments import markdown
from paranet_jax.host.errors import UserError, exit_code

REPO = Path(__file__).resolve().parents[1]
RESULTS, PAGE = REPO / 'benchmarks/results/audit.json', REPO / 'docs/guarantees.md'
BEGIN, END = '<!-- made by benchmarks/audit.py -->', '<!-- end of audit -->'


def of_run(workdir: Path) -> dict[str, Any]:
  """What the table needs of a calibrated run.

  Raises:
    UserError: its exits.json has no audit.
  """
  plan = read_plan(workdir)
  if plan.audit is None or plan.expected is None:
    raise UserError(f'expected an audit in {workdir}/exits.json, found none; run calibrate with --audit')
  return {
    'command': (plan.provenance or {}).get('command'),
    'alone': plan.macs_alone[-1],
    'promised': plan.macs_alone[-1] / plan.expected['cost_macs'],
    'audit': plan.audit,
  }


def table(found: dict[str, Any]) -> str:
  """A row for each kind of images, and columns for each run."""
  runs = list(found.values())
  header = ['images', *(f'`{name}`: {what}' for name in found for what in ('factor', 'speed-up', 'accuracy'))]
  rows = [['as they are', *(_cells(run, run['audit']['clean']) for run in runs)]]
  for place, corruption in enumerate(runs[0]['audit']['corruptions']):
    rows.append([corruption['name'], *(_cells(run, run['audit']['corruptions'][place]) for run in runs)])
  rows.append(['slowdown attack', *(_cells(run, run['audit']['attack']) for run in runs)])
  most = [_cells(run, {'cost_macs': run['audit']['most_macs']}) for run in runs]
  rows.append(['all at the most expensive exit', *most])
  lines = [[name, *(cell for part in cells for cell in part)] for name, *cells in rows]
  promised = '; '.join(
    f'`{name}`: {run["promised"]:.2f}, from {human_count(run["alone"])} multiply-adds to '
    f'{human_count(round(run["alone"] / run["promised"]))}'
    for name, run in found.items()
  )
  return f'{markdown.table(header, lines)}\n\nThe speed-up that calibration promised: {promised}.'


def _cells(run: dict[str, Any], row: dict[str, Any]) -> list[str]:
  cost, accuracy = row['cost_macs'], row.get('accuracy')
  factor, speed_up = cost / run['audit']['clean']['cost_macs'], run['alone'] / cost
  return [f'{factor:.2f}', f'{speed_up:.2f}', '' if accuracy is None else f'{100 * accuracy:.1f} %']


def with_table(page: str, found: dict[str, Any]) -> str:
  """The page with the table in place of the one that it has."""
  return tables.put(page, BEGIN, table(found), END, f'the table of audits in {PAGE}')


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', type=Path, help='a run that was audited')
  return exit_code(lambda: _run(parser.parse_args(argv).workdir))


def _run(workdir: Path | None) -> None:
  found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  if workdir:
    found[workdir.absolute().name] = of_run(workdir)
    RESULTS.write_text(json.dumps(found, indent=1) + '\n')
  PAGE.write_text(with_table(PAGE.read_text(), found))
  print(table(found))


if __name__ == '__main__':
  sys.exit(main())
