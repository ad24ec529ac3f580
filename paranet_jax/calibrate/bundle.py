"""`--bundle=DIR --images=FOLDER`: calibrates an exported bundle on new images, without JAX and without the run.

Half of the images choose temperatures and thresholds, as of a run's held-out ones. The other half are measured, and are
what the watch compares with from then on; half of these make the promises of `--reject` and `--coverage` instead.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from paranet_jax.calibrate.flags import BundleRequest
from paranet_jax.calibrate.measures import fit, halves, measured, rank, without_labels
from paranet_jax.calibrate.promises import measured_promises, what_was_seen, with_promises
from paranet_jax.calibrate.summary_text import too_few_text
from paranet_jax.display.tables import align, human_count
from paranet_jax.early.exit_plan import EXITS, ExitPlan, read_plan, save_plan, with_thresholds, without_local_paths
from paranet_jax.early.logits import Outputs, bundle_logits
from paranet_jax.early.path_costs import PathCosts
from paranet_jax.early.policies import find_policy
from paranet_jax.early.policies.cap import choose_within
from paranet_jax.early.sentences import promises, shown_threshold, watch_sentence
from paranet_jax.early.units import MEASURED
from paranet_jax.host.errors import UserError, say
from paranet_jax.host.files import read_object, write_json
from paranet_jax.host.new_folder import check_absent, new_folder
from paranet_jax.portable import run as runtime

_CARD = """
## Calibrated again

On {date}, temperatures and thresholds were chosen again on {images:,} other images, without the run. What is said above
about thresholds, accuracy, cost and promises describes the version before; `exits.json` describes this one.

{promises}
"""
_LEAST = 20
"""Images below which thresholds are noise."""


class Recalibrated(NamedTuple):
  """What was done. before, after: exits.json of the two folders; problem: why the target cannot be met."""

  folder: Path
  before: ExitPlan
  after: ExitPlan
  moved: tuple[dict[str, Any], dict[str, Any]]
  problem: str | None


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
  """Turns what the bundle's runtime refuses into a `UserError`."""
  try:
    yield
  except runtime.BundleError as error:
    raise UserError(str(error)) from error


@_user_errors()
def recalibrate(request: BundleRequest, command: str) -> Recalibrated:
  """Writes a new version of a bundle beside it, with temperatures and thresholds for new images.

  Args:
    command: the command line, for the record.

  Raises:
    UserError: the bundle or the images cannot be read, do not fit each other or the target, or cannot be written.
  """
  bundle = runtime.load(request.bundle)
  before = read_plan(request.bundle)
  out = request.out or _next_version(request.bundle)
  check_absent(out)
  if out.resolve().is_relative_to(request.bundle.resolve()):
    raise UserError(f'expected a folder outside of {request.bundle}, found {out}; set --out to another folder')
  if request.reject is not None and before.score == 'patience':
    raise UserError('--reject needs a score that ranks images, found a bundle that exits by patience; leave it out')
  target, policy = _target(request, before)
  outputs, labeled = _read(bundle, request.images)
  if not labeled:
    target = _without_labels(request, target)
  count = len(outputs.labels)
  say(f'read {count:,} images {"in folders of their classes" if labeled else "without labels"} of {request.images}')
  if count < _LEAST:
    raise UserError(f'expected {_LEAST} images or more to calibrate on, found {count}; set --images to a larger folder')
  all_macs = [bundle._all_macs[number] for number in bundle.exits]
  if request.target is not None and 'risk' not in target and before.target.get('max_macs', 0) >= all_macs[0]:
    target['max_macs'] = before.target['max_macs']  # No flag could give it.
  # The bundle runs all its stages in turn, whatever it could skip.
  costs = PathCosts(len(all_macs), lambda path, k: all_macs[k] - (all_macs[path[-1]] if path else 0))
  _check_budget(target, all_macs)
  rest, kept = halves(outputs)
  promised, kept = halves(kept) if request.promises else (None, kept)
  temperatures, reference, chosen, samples = fit(rest, target, before.score, request.temperature, costs)
  samples = samples._replace(classes=np.unique(outputs.labels))
  if 'max_macs' in target:
    choice = choose_within(policy, samples, target, target['max_macs'], costs)
  else:
    choice = policy.choose(samples, target)
  if choice.facts.get('too_few'):
    say(too_few_text(choice.facts, bundle.class_names))
  plan = dataclasses.replace(
    before,
    policy=policy.name,
    target=target | dict(choice.facts),
    temperatures=tuple(temperatures.tolist()),
    ms=None,
    joules=None,
    latency=None,
    audit=None,
    reject=None,
    sets=None,
    provenance={
      **(before.provenance or {}),
      'recalibrated': {
        'command': command,
        'images': count,
        'labeled': labeled,
        'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      },
    },
  )
  plan = with_thresholds(plan, choice.thresholds, costs)
  # Every stage runs, so that its cost is in those of later exits.
  plan = dataclasses.replace(plan, visited=plan.exits, macs=tuple(all_macs))
  plan = plan if promised is None else with_promises(plan, request, rest, promised, choice.thresholds)
  expected = measured(plan, samples, chosen, choice.thresholds) | {'temperature': request.temperature}
  tested = measured(plan, rank(*kept, plan.score, temperatures, costs), kept, choice.thresholds)
  if request.promises:
    tested |= measured_promises(plan, kept, choice.thresholds)
  as_before = rank(*kept, before.score, np.array(before.temperatures), costs)
  old = measured(before, as_before, kept, before.confidence_floors)
  if not labeled:
    expected, tested, old = map(without_labels, (expected, tested, old))
  of_temperature = 0 if request.temperature == 'none' else len(reference.labels)
  splits = {'temperature': of_temperature, 'thresholds': len(chosen.labels), 'test': len(kept.labels)}
  splits |= {} if promised is None else {'promises': len(promised.labels)}
  seen = what_was_seen(plan, chosen, kept, choice.thresholds, labeled)
  plan = without_local_paths(dataclasses.replace(plan, expected=expected, test=tested, splits=splits, seen=seen))
  if not choice.problem:
    _write(request.bundle, out, plan)
  return Recalibrated(out, before, plan, (old, tested), choice.problem)


def changes_text(found: Recalibrated) -> str:
  """What changed, exit by exit and on the images that chose nothing."""
  before, after, (old, new) = found.before, found.after, found.moved
  header = ('exit', 'temperature', 'threshold', 'share (%)')
  rows = []
  for k, number in enumerate(after.exits):
    temperatures = f'{before.temperatures[k]:.3f} -> {after.temperatures[k]:.3f}'
    thresholds = ' -> '.join(shown_threshold(plan, k) for plan in (before, after)) if number != after.exits[-1] else ''
    rows.append(
      (str(number), temperatures, thresholds, f'{100 * old["shares"][k]:.1f} -> {100 * new["shares"][k]:.1f}')
    )
  kind = 'agreement' if 'agreement' in new else 'accuracy'
  name = 'accuracy' if kind == 'accuracy' else f'same answer as exit {after.exits[-1]}'
  lines = [
    f'what changes on {new["images"]:,} images that chose nothing',
    *align(header, rows, left=(1, 2)),
    f'{name}: {100 * old[kind]:.2f} -> {100 * new[kind]:.2f} %',
    f'mean multiply-adds: {human_count(round(old["cost_macs"]))} -> {human_count(round(new["cost_macs"]))}',
  ]
  if after.reject:
    wrong = 'none' if new['answered_error'] is None else f'{100 * new["answered_error"]:.2f} %'
    lines.append(f'answered, the others are unknown: {100 * new["answered"]:.2f} %; wrong among them: {wrong}')
  if after.sets:
    lines.append(
      f'sets that hold the right class: {100 * new["covered"]:.2f} %, with {new["set_size"]:.2f} classes on average'
    )
  if most := after.target.get('max_macs'):
    lines.append(f'at most {_millions(most)} multiply-adds for any image, as before')
  if lost := list(_no_longer_promised(before, after, labeled=kind == 'accuracy')):
    lines.append(f'no longer promised: {", ".join(lost)}')
  return '\n'.join(lines)


def _no_longer_promised(before: ExitPlan, after: ExitPlan, labeled: bool) -> Iterator[str]:
  """The promises that only the version before makes, each with the flags that make it again."""
  labels = '' if labeled else ' and --images to folders named after classes'
  if (reject := before.reject) and not after.reject:
    flags = f'--reject={reject["risk"]:g} --delta={reject["delta"]:g}'
    yield f'an error of at most {reject["risk"]:g} among the answers (set {flags}{labels})'
  if (sets := before.sets) and not after.sets:
    yield f'a coverage of {sets["coverage"]:g} (set --coverage={sets["coverage"]:g}{labels})'
  if (macs := before.target.get('max_macs')) and 'max_macs' not in after.target:
    fix = '--budget or --threshold, which keep it' if 'risk' in after.target else '--max-macs with --workdir'
    yield f'at most {_millions(macs)} multiply-adds for any image (set {fix})'
  if ms := before.target.get('max_ms'):
    yield f'at most {ms:g} ms for any image (set --max-ms={ms:g} with --workdir)'


def _millions(macs: float) -> str:
  """Multiply-adds as a flag takes them."""
  return f'{macs / 1e6:.10g}M'


def _target(request: BundleRequest, before: ExitPlan) -> tuple[dict[str, Any], Any]:
  """The target and the policy: those of the flags, or else those that the bundle was calibrated with."""
  if request.target is not None:
    return dict(request.target), request.policy
  policy = find_policy(before.policy)
  if policy is None:
    raise UserError(
      f'expected a bundle with a policy to choose thresholds by again, found {before.policy}; '
      'set --budget, --risk or --threshold'
    )
  target = {key: value for key, value in before.target.items() if key not in ('too_few', 'needed')}
  words = MEASURED.get(target.get('unit', 'macs'))
  if words or 'max_ms' in target:
    what = f'budget in {words}' if words else f'limit in {MEASURED["ms"]}'
    raise UserError(
      f'expected a target that can be met without the run, found a {what}; '
      'set --budget to multiply-adds, --risk or --threshold'
    )
  return target, policy


def _without_labels(request: BundleRequest, target: dict[str, Any]) -> dict[str, Any]:
  if request.promises:
    flag = 'coverage' if request.reject is None else 'reject'
    raise UserError(f'--{flag} needs labels, and the images in {request.images} have none; leave it out')
  if 'loss' in request.explicit and target['loss'] != 'disagreement':
    raise UserError(
      f'--risk-loss={target["loss"]} needs labels, and the images in {request.images} have none; '
      'set --risk-loss=disagreement'
    )
  return target | ({'loss': 'disagreement'} if 'risk' in target else {})


def _check_budget(target: dict[str, Any], all_macs: Sequence[int]) -> None:
  if target.get('max_macs', math.inf) < all_macs[0]:
    raise UserError(
      f'expected a limit of at least {_millions(all_macs[0])}, the first exit in the bundle, found '
      f'{_millions(target["max_macs"])} in exits.json; set --budget, --risk or --threshold'
    )
  if 'budget' in target and not all_macs[0] <= target['budget'] <= all_macs[-1]:
    low, high = _millions(all_macs[0]), _millions(all_macs[-1])
    raise UserError(
      f'budget must be from {low} (the first exit) to {high} (all exits in turn), found '
      f'{_millions(target["budget"])}; set --budget'
    )


def _read(bundle: runtime.Adaptive, folder: Path) -> tuple[Outputs, bool]:
  """The logits of all exits, with the classes that folders are named after, or the answers of the last exit."""
  if not folder.is_dir():
    raise UserError(f'expected a folder of images in {folder}, found none; set --images')
  files, _ = runtime.list_images([str(folder)])
  places = {name: label for label, name in enumerate(bundle.class_names)}
  names = [Path(file).relative_to(folder).parts[0] if Path(file).parent != folder else None for file in files]
  known = [name in places for name in names]
  if any(known) and not all(known):
    odd = files[known.index(False)]
    raise UserError(
      f'expected all images in folders named after classes, or none, found {odd}; move it, or set --images'
    )
  logits, labels, unreadable = [], [], []
  side, _, channels = bundle.image_shape
  for first in range(0, len(files), runtime.WAVE):
    images, here, read = [], [], []
    for file, name in zip(files[first : first + runtime.WAVE], names[first : first + runtime.WAVE], strict=True):
      image = runtime.read_image(file, side, channels, scaling=bundle.scaling)
      if isinstance(image, str):
        unreadable.append(f'{file} ({image})')
      else:
        images.append(image)
        here.append(-1 if name is None else places.get(name, -1))
        read.append(file)
    if images:
      found = bundle_logits(bundle, np.stack(images))
      finite = np.atleast_1d(np.isfinite(found).all(axis=(0, 2)))
      unreadable += [
        f'{file} ({runtime.DIVERGED})' for file, answered in zip(read, finite, strict=True) if not answered
      ]
      logits.append(found[:, finite])
      labels += np.array(here)[finite].tolist()
  if unreadable:
    say(
      f'left out {len(unreadable):,} images that cannot be read: {unreadable[0]}{" and others" * (len(unreadable) > 1)}'
    )
  if not logits:
    raise UserError(f'expected images in {folder}, found none that can be read; set --images')
  return Outputs.of(np.concatenate(logits, axis=1), labels if all(known) else None), all(known)


def _next_version(bundle: Path) -> Path:
  """The first free name beside a bundle: digits-2, then digits-3."""
  stem, _, number = bundle.name.rpartition('-')
  name, first = (stem, int(number) + 1) if stem and number.isdecimal() else (bundle.name, 2)
  return next(each for n in range(first, first + 10**6) if not os.path.lexists(each := bundle.with_name(f'{name}-{n}')))


def _write(bundle: Path, out: Path, plan: ExitPlan) -> None:
  """A copy of the bundle with another exits.json, which appears at once or not at all.

  Only what was exported is copied: a report or the state of a watch would be of the version before. Modes are not, as a
  bundle may be read-only.
  """
  with new_folder(out) as folder:
    known = read_object(bundle / runtime.BUNDLE, 'copy or export the bundle again') or {}
    for name in ('README.md', *known['checksums']):
      copy = folder / name
      if (bundle / name).is_file() and copy.resolve().is_relative_to(folder.resolve()):  # The file may say anything.
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle / name, copy)
    save_plan(folder, plan)
    shutil.copyfile(runtime.__file__, folder / 'run.py')  # An older one would not know what is promised.
    known['visited_stages'], known['calibrated_dtype'] = known['all_stages'], known.get('dtype')
    for name in (EXITS, 'run.py'):
      known['checksums'][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    known.pop('agreement', None)
    if (folder / 'README.md').is_file():  # The model card, which no checksum covers.
      with (folder / 'README.md').open('a', encoding='utf-8') as card:
        lines = [*promises(plan), *filter(None, [watch_sentence(plan)])]
        made = (plan.provenance or {})['recalibrated']
        card.write(_CARD.format_map(made | {'promises': '\n'.join(f'- {line}' for line in lines)}))
    write_json(folder / runtime.BUNDLE, known)
    runtime.load(folder)  # What is written can be read.
