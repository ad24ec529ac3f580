"""A bundle on this machine, by ONNX Runtime and OpenVINO, beside our JAX runtime, PyTorch and earlyon, same weights.

Each runs in a process of its own, with its defaults, and in turn. `openvino_auto` is OpenVINO at its own precision,
`openvino_streams` the same with its throughput hint: as many batches at a time as it asks for. What is not installed
(PyTorch, OpenVINO, earlyon) is left out, with a line. PyTorch and earlyon are also left out for networks that are no
full ParaNet.

Timed are every exit (with those before it, and no image leaving), then early exit at three budgets: mean multiply-adds
as a share of the last exit's. With `--workdir`, a run with held-out images, thresholds are chosen on these, and its
test images are timed. Without, weights are random and images are noise.

`one_image_ms` is the mean over images answered one by one, and `speedup` is that of the same runtime's last exit
divided by it. `one_image_joules` is what the machine uses for one image, where it says so (`energy` says how, or why
not). `images_per_s` is in batches of 64; a batch leaves earlyon as a whole, where its least confident image may.

`--points` measures a part, for machines that are idle for minutes only; `--folder` keeps the exported bundle from one
part to the next.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cli, deploy_runtimes, early_exit, network
from benchmarks.deploy_runtimes import BATCH, BUNDLE, SUBJECT, Network, Point
from benchmarks.own_process import RemoteFunction, own_process, with_huge_pages
from benchmarks.timing import in_turn
from paranet_jax.base_config import base_config
from paranet_jax.early.exit_plan import with_thresholds
from paranet_jax.early.loaded_run import LoadedRun, load
from paranet_jax.export.bundle import Request, held_out_images, write_bundle
from paranet_jax.host.energy import Energy, find_energy
from paranet_jax.host.errors import UserError
from paranet_jax.models.paranet import ParaNet
from paranet_jax.runs.dataset_facts import DatasetFacts

START, KEPT = 'start', 'benchmark.pickle'
BUDGETS = ('budget 25%', 'budget 50%', 'budget 75%')
ALL = (START, 'exit 1', 'exit 2', 'exit 3', *BUDGETS)
"""What can be measured; start: also the size and memory of each."""
NEEDS = {
  'onnxruntime': 'onnxruntime',
  'openvino': 'openvino',
  'openvino_auto': 'openvino',
  'openvino_streams': 'openvino',
  'ours': 'jax',
  'eager': 'torch',
  'earlyon': 'earlyon',
}
HUGE_PAGES = ('ours',)
"""What asks for huge pages, as the package does; no user of the others has them."""
ONE_BY_ONE = 16
"""Images that are answered one by one in a call."""
IN_BATCHES = 128
"""Images that are answered in batches in a call: two batches, or the slowest runtimes take minutes each."""


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  parser = cli.Parser(__doc__)
  parser.add_rounds(2)
  parser.add_seconds(0.2)
  parser.add_argument('--workdir', type=Path, help='a trained run with held-out images (default: random weights)')
  names = ', '.join(ALL).replace('%', '%%')  # argparse formats the help.
  parser.add_argument('--points', type=_points, default=ALL, help=f'some of {names} (default: all)')
  parser.add_argument('--folder', type=Path, help='of the bundle: written if it does not exist, and kept')
  parser.add_argument('--dtype', choices=('float32', 'float16', 'int8'), default='float32', help='of the bundle')
  return cli.run(parser, measure, argv)


def _points(text: str) -> tuple[str, ...]:
  names = tuple(text.split(','))
  if unknown := [name for name in names if name not in ALL]:
    raise argparse.ArgumentTypeError(f'expected some of {", ".join(ALL)}, found {unknown[0]!r}')
  return names


def measure(options: argparse.Namespace) -> dict[str, Any]:
  """`rows`, one for each point and runtime; `runtimes`: size, start and memory of each; `agreement` of the bundle.

  `energy`: what measured the joules, or why there are none.
  """
  energy = find_energy(gpu=False)  # The runtimes compute on the processor.
  if isinstance(energy, str):
    cli.progress(f'no joules are measured: {energy}')
  told = energy if isinstance(energy, str) else ', '.join(energy.sources)
  with tempfile.TemporaryDirectory() as name:
    folder = options.folder or Path(name)
    folder.mkdir(parents=True, exist_ok=True)
    subject, agreement = prepared(folder, options)
    kinds = [kind for kind in deploy_runtimes.RUNTIMES if is_there(kind, subject)]
    facts = {kind: started(kind, folder, subject) for kind in kinds} if START in options.points else {}
    chosen = {name: point for name, point in points(subject).items() if name in options.points}
    if not chosen:
      return {'rows': [], 'runtimes': facts, 'agreement': agreement, 'energy': told}
    with contextlib.ExitStack() as processes:
      answers = {
        kind: processes.enter_context(
          own_process(kind, deploy_runtimes.make, kind, str(folder), huge_pages=kind in HUGE_PAGES)
        )
        for kind in kinds
      }
      rows = [row for point in chosen.items() for row in compare(*point, answers, subject, options, energy)]
  return {'rows': with_speedups(rows, subject), 'runtimes': facts, 'agreement': agreement, 'energy': told}


def prepared(folder: Path, options: argparse.Namespace) -> tuple[early_exit.Subject, dict[str, Any]]:
  """What is measured, and how far the bundle in the folder agrees with it.

  Both are written if they are not there, and with the first part again, since the code may have changed.

  Raises:
    UserError: the folder was written with other flags.
  """
  flags = {name: getattr(options, name) for name in ('workdir', 'dtype', 'size')}
  kept = folder / KEPT
  if kept.exists() and START not in options.points:
    found, subject, agreement = pickle.loads(kept.read_bytes())
    if found != flags:
      raise UserError(f'expected a folder of {flags}, {folder} is of {found}; set another --folder')
    return subject, agreement
  subject = early_exit.trained(options.workdir) if options.workdir else early_exit.untrained(options.size, IN_BATCHES)
  shutil.rmtree(folder / BUNDLE, ignore_errors=True)
  agreement = write(folder, subject, options)
  # The thresholds of its points are chosen; costs are functions, which cannot be pickled.
  subject = dataclasses.replace(subject, variables=jax.device_get(subject.variables), macs=None)
  kept.write_bytes(pickle.dumps((flags, subject, agreement)))
  return subject, agreement


def points(subject: early_exit.Subject) -> dict[str, Point]:
  """Every exit, then the budgets."""
  exits = subject.plan.exits
  found = {f'exit {number}': Point((None,) * len(exits), k) for k, number in enumerate(exits)}
  for name in BUDGETS:
    thresholds = np.maximum(subject.points[name].thresholds, 0)
    found[name] = Point(tuple(float(at) if np.isfinite(at) else None for at in thresholds), len(exits) - 1)
  return found


def compare(
  name: str,
  point: Point,
  answers: dict[str, RemoteFunction],
  subject: early_exit.Subject,
  options: argparse.Namespace,
  energy: Energy | str,
) -> list[dict[str, Any]]:
  """A row for each runtime at one point."""
  cli.progress(f'{name} ...')
  few, many = subject.images[:ONE_BY_ONE], subject.images[:IN_BATCHES]
  one = in_turn(answers, options.rounds, options.seconds, (point, few, 1))
  batches = in_turn(answers, options.rounds, options.seconds, (point, many, BATCH))
  return [
    {
      'what': name,
      'peer': kind,
      'accuracy': None if subject.labels is None else subject.accuracy(answer(point, subject.images, BATCH)),
      'one_image_ms': 1e3 * one[kind] / len(few),
      'one_image_joules': None
      if isinstance(energy, str)
      else energy.a_call(partial(answer, point, few, 1), options.seconds) / len(few),
      'images_per_s': len(many) / batches[kind],
    }
    for kind, answer in answers.items()
  ]


def with_speedups(rows: list[dict[str, Any]], subject: early_exit.Subject) -> list[dict[str, Any]]:
  """The rows with `speedup`: of one image, against the last exit of the same runtime; None: it is in another part."""
  last = {row['peer']: row['one_image_ms'] for row in rows if row['what'] == f'exit {subject.plan.exits[-1]}'}
  return [row | {'speedup': last[row['peer']] / row['one_image_ms'] if last else None} for row in rows]


def is_there(kind: str, subject: early_exit.Subject) -> bool:
  """Whether a runtime can be measured; if not, says why."""
  if importlib.util.find_spec(NEEDS[kind]) is None:
    cli.progress(f'{kind} is left out: found no {NEEDS[kind]}; pip install -r benchmarks/requirements.txt')
    return False
  if kind in ('eager', 'earlyon') and not is_full_paranet(subject.model):
    cli.progress(f'{kind} is left out: the PyTorch peer is a full ParaNet, and this network is none')
    return False
  return True


def is_full_paranet(model: Any) -> bool:
  """Whether the PyTorch peer computes it."""
  fields = ('num_pipelines', 'num_classes', 'layers_per_block', 'growth_rate', 'image_side', 'scan_layers')
  return isinstance(model, ParaNet) and model == ParaNet(**{name: getattr(model, name) for name in fields})


def write(folder: Path, subject: early_exit.Subject, options: argparse.Namespace) -> dict[str, Any]:
  """Writes the bundle and the `Network` into a folder; returns how far the bundle agrees with JAX."""
  cli.progress('export ...')
  plan = with_thresholds(subject.plan, subject.points[BUDGETS[1]].thresholds, subject.macs)
  run = load(options.workdir) if options.workdir else _random_run(subject)
  images = held_out_images(run) if options.workdir else subject.images
  bundle = write_bundle(Request(folder, folder / BUNDLE, ('onnx',), options.dtype), run, plan, images)
  subject_file = Network(
    model=pickle.dumps(subject.model),
    plan=pickle.dumps(plan),
    variables=jax.device_get(subject.variables),
    plan_fields=json.loads((folder / BUNDLE / 'exits.json').read_text()),
    all_macs=tuple(bundle['all_macs']),
    image_shape=subject.image_shape,
    mean=tuple(run.dataset.mean),
    std=tuple(run.dataset.std),
    num_classes=bundle['num_classes'],
  )
  (folder / SUBJECT).write_bytes(pickle.dumps(subject_file))
  return bundle['agreement']


def _random_run(subject: early_exit.Subject) -> LoadedRun:
  names = tuple(str(label) for label in range(network.NUM_CLASSES))
  normalization = tuple(subject.preprocessing.mean) * 3, tuple(subject.preprocessing.std) * 3
  facts = DatasetFacts('noise', '', names, *normalization, {'train': 0, 'held_out': 0, 'test': len(subject.images)})
  return LoadedRun(subject.model, subject.variables, _config(subject), 0, facts)


def _config(subject: early_exit.Subject) -> Any:
  config = base_config(network.NAME)
  config.model.image_side = subject.image_shape[0]
  return config


def started(kind: str, folder: Path, subject: early_exit.Subject) -> dict[str, float]:
  """`size_mb` of what is read, and what a fresh process takes to start: `start_s` and `peak_mb`.

  The second process is measured, as starts are from then on: JAX keeps programs, and files are in memory.
  """
  exits = len(subject.plan.exits)
  for _ in range(2):
    cli.progress(f'a fresh process: {kind} ...')
    command = [sys.executable, deploy_runtimes.__file__, kind, str(folder), str(time.time()), str(exits)]
    with with_huge_pages(kind in HUGE_PAGES):
      found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
  return {'size_mb': _size(kind, folder, subject) / 1e6} | found


def _size(kind: str, folder: Path, subject: early_exit.Subject) -> int:
  if kind == 'onnxruntime' or kind.startswith('openvino'):
    return sum(path.stat().st_size for path in (folder / BUNDLE).glob('*.onnx'))
  return sum(leaf.nbytes for leaf in jax.tree.leaves(subject.variables))


if __name__ == '__main__':
  sys.exit(main())
