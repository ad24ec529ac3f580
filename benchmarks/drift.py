"""How soon the watch finds images that changed, on a trained run, and how much it costs; writes a table.

    python benchmarks/drift.py --workdir=RUN --data-dir=DATA   # measures, for benchmarks/results/drift.json
    python benchmarks/drift.py --table                         # the table of docs/guarantees.md from that file

Half of the test images are what calibration saw. The other half are the stream: 1,000 of them as they are, and then
images that changed, in 20 random orders.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import tables
from paranet_jax.data.corruptions import blur, brightness, noise
from paranet_jax.experiments import markdown
from paranet_jax.host.errors import exit_code

REPO = Path(__file__).resolve().parents[1]
RESULTS, PAGE = REPO / 'benchmarks/results/drift.json', REPO / 'docs/guarantees.md'
BEFORE, AFTER = '<!-- made by benchmarks/drift.py --table -->', '<!-- end of drift -->'
CLEAN, ORDERS, ALPHA = 1000, 20, 0.01

Images = np.ndarray
"""uint8 [N, H, W, C]."""


def digits(images: Images) -> Images:
  """As many handwritten digits, scaled to the side."""
  from sklearn.datasets import load_digits

  drawn = load_digits().images * (255 / 16)
  factor = -(-images.shape[1] // drawn.shape[1])
  large = drawn.repeat(factor, 1).repeat(factor, 2)[:, : images.shape[1], : images.shape[2]]
  pixels = np.resize(large, (len(images), *large.shape[1:]))[..., None].repeat(images.shape[-1], -1)
  return np.rint(pixels).astype(np.uint8)


CHANGES: dict[str, Callable[[Images, np.random.Generator], Images]] = {
  'none': lambda images, rng: images,
  'brightness, 0.9 times': brightness(0.9),
  'brightness, 0.6 times': brightness(0.6),
  'noise, deviation 8 of 255': noise(8),
  'noise, deviation 20 of 255': noise(20),
  'blur, 3 x 3 pixels': blur(3),
  'another data set (digits)': lambda images, rng: digits(images),
}
PRIOR = 'class prior: half of the classes four times as often as the others'


def measure(workdir: Path, data_dir: Path | None) -> dict[str, Any]:
  """`rows`: for each change the share of orders with an alarm, and the median delay in images."""
  from paranet_jax.calibrate.promises import _answers, what_was_seen
  from paranet_jax.config import with_data_dir
  from paranet_jax.data.dataset import Split
  from paranet_jax.early.loaded_run import load
  from paranet_jax.early.logits import Outputs, split_logits
  from paranet_jax.early.runtime import EarlyExit
  from paranet_jax.host.machine import cpu_name
  from paranet_jax.portable.run import Watch
  from paranet_jax.task import build_task

  run = load(workdir)
  task = build_task(with_data_dir(run.config, data_dir))
  plan, test = run.plan, task.dataset.test
  thresholds = plan.confidence_floors

  def outputs(images: Images, labels: np.ndarray) -> Outputs:
    split = Split(images, labels)
    found = split_logits(run.model, run.variables, plan.exits, task.preprocessing, split, 500)
    return Outputs(found, labels)

  half = len(test) // 2
  images, labels = np.asarray(test.images[:]), np.asarray(test.labels)
  assert task.dataset.held_out is not None
  held_out = task.dataset.held_out
  binned = outputs(np.asarray(held_out.images[:]), np.asarray(held_out.labels))
  seen = what_was_seen(plan, binned, outputs(images[:half], labels[:half]), thresholds, labeled=True)
  plan = dataclasses.replace(plan, seen=seen)
  runtime = EarlyExit(run.model, run.variables, plan, run.image_shape, run.dataset.mean, run.dataset.std)

  def rows(found: Outputs) -> list[tuple[int, float, int]]:
    taken, tops, classes = _answers(plan, found, thresholds)
    return list(zip((np.array(plan.exits)[taken]).tolist(), tops.tolist(), classes.tolist(), strict=True))

  stream = images[half:]
  plain = rows(outputs(stream, labels[half:]))
  weights = np.where(labels[half:] % 2, 1.0, 4.0)
  changed = {}
  for name, change in CHANGES.items():
    changed[name] = rows(outputs(change(stream, np.random.default_rng(0)), labels[half:]))
  found_rows = []
  for name in (*CHANGES, PRIOR):
    delays, seconds, count = [], 0.0, 0
    for seed in range(ORDERS):
      rng = np.random.default_rng(seed)
      order, watch = rng.permutation(half), Watch(runtime, alpha=ALPHA)
      watch.add([plain[row] for row in order[:CLEAN]])
      assert not watch.alarm
      rest = rng.choice(half, half, p=weights / weights.sum()) if name == PRIOR else order[CLEAN:]
      given = plain if name == PRIOR else changed[name]
      started = time.perf_counter()
      watch.add([given[row] for row in rest])
      seconds, count = seconds + time.perf_counter() - started, count + watch.images - CLEAN
      if watch.alarm:
        delays.append(watch.alarm.images - CLEAN)
    found_rows.append(
      {
        'change': name,
        'found': len(delays) / ORDERS,
        'delay': float(np.median(delays)) if delays else None,
        'microseconds': 1e6 * seconds / count,
      }
    )
    print(found_rows[-1], file=sys.stderr)
  return {'alpha': ALPHA, 'orders': ORDERS, 'cpu': cpu_name(), 'rows': found_rows}


def table(found: dict[str, Any]) -> str:
  """A row for each change, and columns for each run."""
  runs = list(found.values())
  columns = 'found in', 'images until the alarm (median)'
  header = ['change', *(f'`{name}`: {what}' for name in found for what in columns)]
  lines = []
  for rows in zip(*(run['rows'] for run in runs), strict=True):
    line = [rows[0]['change']]
    for run, row in zip(runs, rows, strict=True):
      delay = '' if row['delay'] is None else f'{row["delay"]:,.0f}'
      line += [f'{100 * row["found"]:.0f} % of {run["orders"]} orders', delay]
    lines.append(line)
  # Where nothing changes: after an alarm, a watch has few images.
  times = ' or '.join(f'{run["rows"][0]["microseconds"]:.0f} ({run["cpu"]})' for run in runs)
  watch = f'Without a change, the watch itself takes {times} microseconds an image, with other programs running.'
  return f'{markdown.table(header, lines)}\n\n{watch}'


def with_table(page: str, found: dict[str, Any]) -> str:
  """The page with the table in place of the one that it has."""
  return tables.put(page, BEFORE, table(found), AFTER, f'the table in {PAGE}')


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', type=Path, default=REPO / 'pretrained')
  parser.add_argument('--data-dir', type=Path)
  parser.add_argument('--table', action='store_true', help='only write the table')
  given = parser.parse_args(argv)
  return exit_code(lambda: _run(given))


def _run(given: argparse.Namespace) -> None:
  if not given.table:
    measured = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    workdir = given.workdir.absolute()
    measured[workdir.name] = measure(workdir, given.data_dir)
    RESULTS.write_text(json.dumps(measured, indent=1) + '\n')
  found = json.loads(RESULTS.read_text())
  PAGE.write_text(with_table(PAGE.read_text(), found))
  print(table(found))


if __name__ == '__main__':
  sys.exit(main())
