"""What a run of `adopt` keeps of its network's accuracy within budgets, on images that it has not seen.

    python benchmarks/adopted.py --workdir=RUN --images=FOLDER   # measures, and writes benchmarks/results/adopted.json
    python benchmarks/adopted.py --table                         # writes the table and the figure of docs/adopt.md

FOLDER has a folder of images for each class. Thresholds are chosen on the run's held-out images as `calibrate` chooses
them, and measured on FOLDER. `oracle` is the mean cost if each image left at the first exit that answers as the last
one does.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import report, tables
from paranet_jax.calibrate.calibration import calibrate
from paranet_jax.calibrate.flags import Request, parse
from paranet_jax.calibrate.measures import fit, rank
from paranet_jax.data.dataset import Split
from paranet_jax.display.plots import BLUE, VERMILLION, bare, save_figure
from paranet_jax.early.logits import Outputs, split_logits
from paranet_jax.early.thresholds import operating_point
from paranet_jax.experiments import markdown
from paranet_jax.host.arguments import absolute
from paranet_jax.host.errors import UserError, exit_code
from paranet_jax.portable.run import decode_image, find_images

REPO = Path(__file__).resolve().parents[1]
RESULTS, PAGE, FIGURE = REPO / 'benchmarks/results/adopted.json', REPO / 'docs/adopt.md', REPO / 'docs/adopt.png'
BEFORE, AFTER = '<!-- made by benchmarks/adopted.py --table -->', '<!-- end -->'
SHARES = tuple(number / 100 for number in range(20, 101, 5))
SHOWN = (0.4, 0.5, 0.6, 0.7, 0.8)


def measure(workdir: Path, folder: Path) -> dict[str, Any]:
  """Everything that the page says about the run.

  Raises:
    UserError: the run cannot be calibrated, or the folders are not named as its classes.
  """
  whole = json.loads((workdir / 'summary.json').read_text())['exits'][-1]['macs_alone']
  request = parse([f'--workdir={workdir}', f'--budget={whole}'])
  assert isinstance(request, Request)
  done = calibrate(request, '')
  subject = done.subject
  task, costs = subject.task, subject.macs
  images = read_folder(folder, task.dataset.class_names, task.config.model.image_side)
  arguments = task.model, subject.variables, subject.exits, task.preprocessing, images, task.config.eval.batch_size
  test = Outputs(split_logits(*arguments), np.asarray(images.labels))
  alone, answers = costs.alone(), test.logits.argmax(-1)
  same = answers == answers[-1]
  first = np.argmax(same, axis=0)
  in_turn = costs.cumulative(tuple(range(len(alone))))
  rows = []
  for share in SHARES:
    target = {'budget': share * whole, 'unit': 'macs'}
    if target['budget'] < alone[0]:
      continue
    temperatures, _, _, samples = fit(done.held_out, target, request.score, request.temperature, costs)
    thresholds = request.policy.choose(samples, target).thresholds
    ranked = rank(*test, request.score, temperatures, costs)
    found = operating_point(ranked, thresholds)
    agreement = operating_point(ranked._replace(correct=same), thresholds).accuracy
    rows.append(
      {
        'budget': share,
        'cost': found.cost / whole,
        'agreement': agreement,
        'accuracy': found.accuracy,
        'shares': found.shares.tolist(),
      }
    )
  return {
    'exits': [
      {'cost': cost / whole, 'accuracy': float(np.mean(own == test.labels)), 'agreement': float(np.mean(equal))}
      for cost, own, equal in zip(alone, answers, same, strict=True)
    ],
    'images': len(images),
    'step': subject.checkpoint.step,
    'oracle': float(in_turn[first].mean() / whole),
    'rows': rows,
    **report.surroundings(),
  }


def read_folder(folder: Path, class_names: Sequence[str], side: int) -> Split:
  """The images of class folders.

  Raises:
    UserError: a folder is not named as a class.
  """
  names, images, labels = sorted(each.name for each in folder.iterdir() if each.is_dir()), [], []
  if not names or not set(names) <= set(class_names):
    raise UserError(f'expected folders named as classes ({", ".join(class_names)}) in {folder}; set --images')
  for name in names:
    files = find_images(str(folder / name)).images
    images += [decode_image(Path(file).read_bytes(), side, 3) for file in files]
    labels += [class_names.index(name)] * len(files)
  return Split(np.stack(images), np.array(labels))


def table(found: dict[str, Any]) -> str:
  """The budgets as Markdown."""
  head = ('budget, share of the multiply-adds', 'mean cost on test images (%)', 'same answer as the last exit (%)')
  lines = [
    (
      f'{row["budget"]:.2f}',
      f'{100 * row["cost"]:.1f}',
      *(f'{100 * row[name]:.2f}' for name in ('agreement', 'accuracy')),
    )
    for row in found['rows']
    if row['budget'] in SHOWN
  ]
  return markdown.table((*head, 'test accuracy (%)'), lines)


def draw(found: dict[str, Any], path: Path) -> None:
  """Draws accuracy against cost, within budgets and of each exit alone."""
  figure = Figure(figsize=(6, 4), dpi=100, layout='constrained')
  axes = figure.subplots()
  bare(axes)
  for rows, style, label in ((found['rows'], 'o-', 'budgets'), (found['exits'], 's', 'an exit alone')):
    values = [[100 * row[name] for row in rows] for name in ('cost', 'accuracy')]
    axes.plot(*values, style, color=BLUE if style == 'o-' else VERMILLION, label=label)
  axes.set_xlabel('mean multiply-adds of an image (% of the network)')
  axes.set_ylabel('test accuracy (%)')
  axes.legend(loc='lower right')
  save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', type=absolute, help='run of adopt')
  parser.add_argument('--images', type=absolute, help='folder with a folder of images for each class')
  parser.add_argument('--table', action='store_true', help='only write the table and the figure')
  given = parser.parse_args(argv)
  return exit_code(lambda: _run(given))


def _run(given: argparse.Namespace) -> None:
  if not given.table:
    if given.workdir is None or given.images is None:
      raise UserError('expected a run and images, found neither or one; set --workdir and --images, or --table')
    RESULTS.write_text(json.dumps(measure(given.workdir, given.images), indent=1) + '\n')
  found = json.loads(RESULTS.read_text())
  draw(found, FIGURE)
  PAGE.write_text(tables.put(PAGE.read_text(), BEFORE, table(found), AFTER, f'the table in {PAGE}'))
  print(table(found))


if __name__ == '__main__':
  sys.exit(main())
