"""exits.json: what `calibrate` chose for one checkpoint and what prediction reads."""

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from paranet_jax.early.path_costs import PathCosts
from paranet_jax.early.scores import SCORES, to_score
from paranet_jax.early.thresholds import visited
from paranet_jax.host.arguments import without_paths
from paranet_jax.host.errors import UserError
from paranet_jax.host.files import read_object, write_json
from paranet_jax.portable.run import PROMISES

EXITS = 'exits.json'
SCHEMA_VERSION = 1
FULL = 'full'
"""The policy of a plan that nothing was calibrated for."""

DTYPES = ('float32', 'bfloat16')
"""In which `calibrate --dtype` lets a network predict."""

PerExit = tuple[float | None, ...]


class CheckpointId(NamedTuple):
  """What distinguishes checkpoints: the network's name, the data set as configured, the step, and `fingerprint`."""

  name: str
  dataset: str
  step: int
  fingerprint: str


def fingerprint(variables: Any) -> str:
  """A hash over the paths, types, shapes and bytes of `params` and `batch_stats`: 16 hexadecimal digits."""
  import jax  # Here: a bundle is calibrated without it.

  digest = hashlib.sha256()
  kept = {'params': variables['params'], 'batch_stats': variables['batch_stats']}
  for path, leaf in jax.tree_util.tree_leaves_with_path(kept):
    values = np.ascontiguousarray(leaf)
    digest.update(f'{jax.tree_util.keystr(path)} {values.dtype} {values.shape}'.encode())
    digest.update(values.data)
  return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class ExitPlan:
  """Which exits are run, when a sample exits, and what that costs. K usable exits: those that were trained.

  Attributes:
    name: of the network; it, dataset, step and fingerprint tell the checkpoint, see `CheckpointId`.
    score: what samples are ranked by.
    policy: how the thresholds were chosen; 'full': no sample exits early.
    target: the target of calibration, such as {'budget': 3e7, 'unit': 'macs'}; {} for 'full'.
    exits: numbers of the usable exits, 1-based, increasing.
    temperatures: [K].
    thresholds: [K], on the score's scale; None: no sample exits there; the last is 0.0.
    confidence_thresholds: [K], the same on the scale of `scores.confidence`, which prediction compares with.
    visited: numbers of the exits that are run, the last one included.
    macs: [K], multiply-adds to each exit along the visited path; None where not visited.
    ms: [K], the same in milliseconds per image; None: not measured.
    joules: [K], the same in joules.
    macs_alone: [K], multiply-adds of each exit alone.
    expected: {cost_macs, cost_ms, accuracy, shares, ...} on the held-out split, and cost_joules if they were measured.
    test: the same on the test split.
    splits: the number of images that temperatures, thresholds and test results come from.
    latency: the measurements and their device; None: nothing was measured.
    provenance: command line, versions, device, date.
    reject: which images are unknown at the last exit: `risk` and `delta` that are promised, `confidence_threshold`, and
      `threshold`, the same on the score's scale (None: all of them); None: every image is answered.
    sets: limits of sets of classes, see `promises.choose_sets`; None: there are none.
    seen: what the answers to the test images look like, for `run.Watch`; None: not known. `images`; `edges` [K], of
      bins of the largest probability at each exit; `counts` [K] of the images that leave there in each bin; `classes`,
      how many got each class; `wrong`, how many got a wrong one, None without labels. With `reject` also
      `answered`, how many are not unknown: `wrong` counts among these.
    audit: what hard images and an adversary do to the mean cost, see `calibrate.audit`; None: not measured.
    dtype: 'float32' or 'bfloat16', in which the network was calibrated and predicts; None: that of its run.
  """

  name: str
  dataset: str
  step: int
  fingerprint: str
  score: str
  policy: str
  target: dict[str, Any]
  exits: tuple[int, ...]
  temperatures: tuple[float, ...]
  thresholds: PerExit
  confidence_thresholds: PerExit
  visited: tuple[int, ...]
  macs: PerExit
  ms: PerExit | None
  macs_alone: tuple[int, ...]
  expected: dict[str, Any] | None = None
  test: dict[str, Any] | None = None
  splits: dict[str, int] | None = None
  latency: dict[str, Any] | None = None
  provenance: dict[str, Any] | None = None
  reject: dict[str, Any] | None = None
  sets: dict[str, Any] | None = None
  seen: dict[str, Any] | None = None
  joules: PerExit | None = None
  audit: dict[str, Any] | None = None
  dtype: str | None = None

  @property
  def checkpoint(self) -> CheckpointId:
    """The checkpoint that this was chosen for."""
    return CheckpointId(self.name, self.dataset, self.step, self.fingerprint)

  @property
  def confidence_floors(self) -> Float[np.ndarray, ' K']:
    """The least confidence with which an image leaves at each exit; inf: none leaves there; -inf at the last."""
    early = [np.inf if at is None else at for at in self.confidence_thresholds[:-1]]
    return np.array([*early, -np.inf])

  @property
  def most_macs(self) -> float:
    """The most multiply-adds of any image: none goes past an exit with a threshold of 0."""
    steps = zip(self.confidence_thresholds, self.macs, strict=True)
    return next(float(cost) for at, cost in steps if at == 0 and cost is not None)


def full_network_plan(checkpoint: CheckpointId, exits: Sequence[int], macs_alone: Sequence[int]) -> ExitPlan:
  """The plan that runs only the last usable exit."""
  early = len(exits) - 1
  return ExitPlan(
    *checkpoint,
    score='max_prob',
    policy=FULL,
    target={},
    exits=tuple(exits),
    temperatures=(1.0,) * len(exits),
    thresholds=(None,) * early + (0.0,),
    confidence_thresholds=(None,) * early + (0.0,),
    visited=(exits[-1],),
    macs=(None,) * early + (macs_alone[-1],),
    ms=None,
    macs_alone=tuple(macs_alone),
  )


def with_thresholds(plan: ExitPlan, thresholds: Float[np.ndarray, ' K'], macs: PathCosts) -> ExitPlan:
  """The plan with these thresholds on the confidence scale.

  Args:
    macs: multiply-adds of the K exits.
  """
  path = visited(thresholds)
  confidences = np.maximum(thresholds, 0)  # -inf is 0 in the file: every confidence reaches both.
  exits = np.isfinite(confidences)
  return dataclasses.replace(
    plan,
    thresholds=_nullable(to_score(confidences, plan.score), exits),
    confidence_thresholds=_nullable(confidences, exits),
    visited=tuple(plan.exits[index] for index in path),
    macs=tuple(None if cost is None else int(cost) for cost in along(macs, path)),
  )


def along(costs: PathCosts, path: tuple[int, ...]) -> PerExit:
  """The cost of exiting at each exit along a path: [K], None off the path."""
  found = dict(zip(path, costs.cumulative(path).tolist(), strict=True))
  return tuple(found.get(index) for index in range(costs.num_exits))


def _nullable(values: np.ndarray, known: np.ndarray) -> PerExit:
  return tuple(float(value) if is_known else None for value, is_known in zip(values, known, strict=True))


def save_plan(workdir: Path, plan: ExitPlan) -> None:
  """Writes exits.json atomically. Promises that the plan does not make, and what was not measured, are left out."""
  saved = dataclasses.asdict(plan)
  made = {field: value for field, value in saved.items() if field not in (*PROMISES, *_LATER) or value is not None}
  write_json(workdir / EXITS, {'schema_version': SCHEMA_VERSION, **made})


def without_local_paths(plan: ExitPlan) -> ExitPlan:
  """The plan as it may be shared: without the paths in its command lines, from whichever machine calibrated it."""
  return dataclasses.replace(plan, provenance=_cleaned(plan.provenance))


def _cleaned(provenance: Any) -> Any:
  if not isinstance(provenance, dict):
    return provenance
  cleaned = {name: _cleaned(value) for name, value in provenance.items()}  # `recalibrated` has a command too.
  if 'command' in cleaned:
    # Someone may have edited it so that where a path ends is unknown.
    cleaned['command'] = without_paths(str(cleaned['command'])) or 'python -m paranet_jax.calibrate --workdir=FOLDER'
  return cleaned


def calibrate_command(workdir: Path) -> str:
  """A command that writes exits.json."""
  return f'python -m paranet_jax.calibrate --workdir={shlex.quote(str(workdir))} --threshold=0.9'


def uncalibrated_line(plan: ExitPlan, workdir: Path) -> str:
  """Says where the images of a run go that is not calibrated."""
  last = plan.exits[-1]
  earlier = f'; {calibrate_command(workdir)} lets them exit earlier' if plan.exits[0] < last else ''
  return f'not calibrated: all images go to exit {last}{earlier}'


def load_plan(workdir: Path, checkpoint: CheckpointId, exits: tuple[int, ...]) -> ExitPlan:
  """Reads exits.json.

  Args:
    workdir: of the run.
    checkpoint: the one that predicts.
    exits: numbers of its usable exits.

  Raises:
    UserError: exits.json is missing or damaged, has a different version, belongs to another checkpoint, or has other
      exits.
  """
  plan = read_plan(workdir)
  for field, found, expected in zip(CheckpointId._fields, plan.checkpoint, checkpoint, strict=True):
    if found != expected:
      what = 'variables' if field == 'fingerprint' else field
      alternative = f', or set --step={found}' if field == 'step' else ''
      raise UserError(
        f'{workdir / EXITS} belongs to another checkpoint: {what} {found} there, {expected} here; '
        f'{_rewrites(workdir)}{alternative}'
      )
  if plan.exits != exits:
    raise _wrong(workdir, 'exits', f'the exits that were trained, {list(exits)}', plan.exits)
  return plan


def read_plan(workdir: Path) -> ExitPlan:
  """Reads exits.json, whichever checkpoint it belongs to.

  Raises:
    UserError: it is missing or damaged, or has a different version.
  """
  path = workdir / EXITS
  saved = read_object(path, _rewrites(workdir))
  if saved is None:
    raise UserError(f'expected {path}, found none; {calibrate_command(workdir)} writes it')
  version = saved.get('schema_version')
  if version != SCHEMA_VERSION:
    raise UserError(f'{path} must have schema_version {SCHEMA_VERSION}, found {version}; {_rewrites(workdir)}')
  fields = {}
  for field in _RULES:
    if field not in saved:
      raise UserError(f'{path} lacks the field {field}; {_rewrites(workdir)}')
    fields[field] = _tuple_of(saved[field])
  fields |= {field: saved.get(field) for field in PROMISES} | {field: _tuple_of(saved.get(field)) for field in _LATER}
  plan = ExitPlan(**fields)
  _check(plan, workdir)
  return plan


def _tuple_of(value: Any) -> Any:
  return tuple(value) if isinstance(value, list) else value


def _number(value: Any) -> bool:
  return type(value) in (int, float) and abs(value) < 2**63  # NumPy's integers.


def _cost(value: Any) -> bool:
  return value is None or _number(value) and value >= 0


def _increasing(values: Any) -> bool:
  numbers = isinstance(values, tuple) and values and all(type(value) is int and value >= 1 for value in values)
  return bool(numbers) and list(values) == sorted(set(values))


def _measured(value: Any, k: int) -> bool:
  """Whether these are test results that can be shown."""
  if not isinstance(value, dict):
    return False
  kind = 'agreement' if 'agreement' in value else 'accuracy'  # Of images without labels, or with.
  lists = [value[name] for name in (f'exit_{kind}', 'shares') if value.get(name) is not None]
  return not value or (
    all(_number(value.get(name)) for name in (kind, 'cost_macs'))
    and all(isinstance(each, list) and len(each) == k and all(map(_cost, each)) for each in lists)
  )


def _audited(value: Any, k: int) -> bool:
  """Whether this can be shown."""
  if not isinstance(value, dict) or not all(_number(value.get(name)) for name in ('images', 'within', 'most_macs')):
    return False
  rows = [row for name in ('clean', 'hardest', 'attack') if isinstance(row := value.get(name), dict)]
  if len(rows) < 3:
    return False
  named = isinstance(value.get('corruptions'), list) and isinstance(rows[1].get('name'), str)
  return named and all(_number(row.get('cost_macs')) and row['cost_macs'] > 0 for row in rows)


Rule = tuple[Callable[[Any, int], bool], str]
"""Whether a value is valid, given the number of exits, and what it must be."""


def _each(holds: Callable[[Any], bool], words: str) -> Rule:
  return lambda values, k: isinstance(values, tuple) and len(values) == k and all(map(holds, values)), words


def _optional(rule: Rule) -> Rule:
  return lambda value, k: value is None or rule[0](value, k), f'{rule[1]} or null'


_TEXT: Rule = (lambda value, k: isinstance(value, str), 'text')
_OBJECT: Rule = (lambda value, k: isinstance(value, dict), 'an object')
_NUMBERS: Rule = (lambda value, k: _increasing(value), 'increasing exit numbers')
_COSTS = _each(_cost, 'a number of 0 or more, or null, for each exit')
_THRESHOLDS: Rule = (lambda values, k: _COSTS[0](values, k) and values[-1] == 0, f'{_COSTS[1]}, the last 0')

_RULES: dict[str, Rule] = {
  'name': _TEXT,
  'dataset': _TEXT,
  'step': (lambda value, k: type(value) is int, 'an integer'),
  'fingerprint': _TEXT,
  'score': (lambda value, k: value in SCORES, f'one of {", ".join(SCORES)}'),
  'policy': _TEXT,  # Any: a plan also predicts where the package that registers its policy is not installed.
  'target': _OBJECT,
  'exits': _NUMBERS,
  'temperatures': _each(lambda value: _number(value) and value > 0, 'a number above 0 for each exit'),
  'thresholds': _THRESHOLDS,
  'confidence_thresholds': _THRESHOLDS,
  'visited': _NUMBERS,
  'macs': _COSTS,
  'ms': _optional(_COSTS),
  'macs_alone': _each(lambda value: type(value) is int and value > 0, 'an integer above 0 for each exit'),
  'test': _optional((_measured, 'an object with accuracy (or agreement) and cost_macs, and numbers for each exit')),
  **dict.fromkeys(('expected', 'splits', 'latency', 'provenance'), _optional(_OBJECT)),
}

_LATER: dict[str, Rule] = {
  'joules': _optional(_COSTS),
  'audit': _optional((_audited, 'an object with images, within and most_macs, and costs of clean, hardest and attack')),
  'dtype': (lambda value, k: value in (None, *DTYPES), f'one of {", ".join(DTYPES)}'),
}
"""Fields that plans lack where they were not measured or chosen."""


def _check(plan: ExitPlan, workdir: Path) -> None:
  k = len(plan.exits) if isinstance(plan.exits, tuple) else 0
  for field, (holds, expected) in (_RULES | _LATER).items():
    value = getattr(plan, field)
    if not holds(value, k):
      raise _wrong(workdir, field, expected, value)
  for field, (promised, expected) in PROMISES.items():
    if not promised(getattr(plan, field), {'exits': plan.exits, 'score': plan.score}):
      raise _wrong(workdir, field, expected, getattr(plan, field))
  for threshold, confidence in zip(plan.thresholds, plan.confidence_thresholds, strict=True):
    if not _agree(threshold, confidence, plan.score):
      raise _wrong(workdir, 'thresholds', 'confidence_thresholds on the scale of the score', plan.thresholds)
  exits = {number for number, at in zip(plan.exits, plan.confidence_thresholds, strict=True) if at is not None}
  runs = {number for number, cost in zip(plan.exits, plan.macs, strict=True) if cost is not None}
  if not exits <= set(plan.visited) or runs != set(plan.visited):
    raise _wrong(workdir, 'visited', 'the exits that have macs, those with a threshold among them', plan.visited)


def _agree(threshold: float | None, confidence: float | None, score: str) -> bool:
  if threshold is None or confidence is None:
    return threshold is confidence
  return abs(float(to_score(confidence, score)) - threshold) < 1e-9


def _wrong(workdir: Path, field: str, expected: str, found: Any) -> UserError:
  shown = json.dumps(found)
  shown = shown if len(shown) <= 60 else shown[:57] + '...'
  return UserError(f'{workdir / EXITS}: {field} must be {expected}, found {shown}; {_rewrites(workdir)}')


def _rewrites(workdir: Path) -> str:
  return f'{calibrate_command(workdir)} writes it again'
