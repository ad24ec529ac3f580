"""exits.json: what `calibrate` chose for one checkpoint and what prediction reads."""

import dataclasses
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paranet_jax.early.checkpoint_id import CheckpointId
from paranet_jax.early.scores import SCORES, to_score
from paranet_jax.early.thresholds import Costs, visited
from paranet_jax.host.errors import UserError
from paranet_jax.host.files import read_object, write_json

EXITS = 'exits.json'
SCHEMA_VERSION = 1

PerExit = tuple[float | None, ...]


@dataclasses.dataclass(frozen=True)
class ExitPlan:
  """Which exits are run, when a sample leaves, and what that costs. K usable exits: those that were trained.

  Attributes:
    name, dataset, step, fingerprint: of the checkpoint, see `CheckpointId`.
    score: what samples are ranked by.
    policy: how the thresholds were chosen; 'full': nobody leaves early.
    target: what was asked for, such as {'budget': 3e7, 'unit': 'macs'}; {} for 'full'.
    exits: numbers of the usable exits, 1-based, increasing.
    temperatures: [K].
    thresholds: [K], on the score's scale; None: nobody leaves there; the last 0.0.
    confidence_thresholds: [K], the same on the scale of `scores.confidence`, which prediction compares with.
    visited: numbers of the exits that are run, the last one included.
    macs: [K], multiply-adds of leaving at each exit along the visited path; None where not visited.
    ms: [K], the same in milliseconds an image; None: not measured.
    macs_alone: [K], multiply-adds of each exit by itself.
    expected, test: {cost_macs, cost_ms, accuracy, shares, ...} on the held-out and on the test split.
    splits: images that temperature, thresholds and test were fitted or measured on.
    latency: what was measured, and on which device; None: nothing.
    provenance: command line, versions, device, date.
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

  @property
  def checkpoint(self) -> CheckpointId:
    """The checkpoint this was chosen for."""
    return CheckpointId(self.name, self.dataset, self.step, self.fingerprint)


def full_network_plan(checkpoint: CheckpointId, exits: Sequence[int], macs_alone: Sequence[int]) -> ExitPlan:
  """The plan in which every sample leaves at the last usable exit and only that one is run."""
  early = len(exits) - 1
  return ExitPlan(
    *checkpoint,
    score='max_prob',
    policy='full',
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


def with_thresholds(plan: ExitPlan, thresholds: np.ndarray, macs: Costs) -> ExitPlan:
  """The plan by which samples leave at these thresholds [K] on the confidence scale.

  Args:
    macs: multiply-adds of the K exits.
  """
  path = visited(thresholds)
  confidences = np.maximum(thresholds, 0)  # What every confidence reaches is 0 in the file.
  leaves = np.isfinite(confidences)
  return dataclasses.replace(
    plan,
    thresholds=_nullable(to_score(confidences, plan.score), leaves),
    confidence_thresholds=_nullable(confidences, leaves),
    visited=tuple(plan.exits[index] for index in path),
    macs=tuple(None if cost is None else int(cost) for cost in along(macs, path)),
  )


def along(costs: Costs, path: tuple[int, ...]) -> PerExit:
  """The cost of leaving at each exit along a path: [K], None off the path."""
  found = dict(zip(path, costs.cumulative(path).tolist(), strict=True))
  return tuple(found.get(index) for index in range(costs.num_exits))


def _nullable(values: np.ndarray, there: np.ndarray) -> PerExit:
  return tuple(float(value) if known else None for value, known in zip(values, there, strict=True))


def save_plan(workdir: Path, plan: ExitPlan) -> None:
  """Writes exits.json in place of the one that may be there, whole or not at all."""
  write_json(workdir / EXITS, {'schema_version': SCHEMA_VERSION, **dataclasses.asdict(plan)})


def calibrate_command(workdir: Path) -> str:
  """A command that writes exits.json anew."""
  return f'python -m paranet_jax.calibrate --workdir={shlex.quote(str(workdir))} --threshold=0.9'


def load_plan(workdir: Path, checkpoint: CheckpointId, exits: tuple[int, ...]) -> ExitPlan:
  """Reads exits.json.

  Args:
    workdir: of the run.
    checkpoint: the one that predicts.
    exits: numbers of its usable exits.

  Raises:
    UserError: there is no exits.json, it is damaged, of another version, belongs to another checkpoint, or has other
      exits.
  """
  plan = read_plan(workdir)
  for field, found, expected in zip(CheckpointId._fields, plan.checkpoint, checkpoint, strict=True):
    if found != expected:
      what = 'variables' if field == 'fingerprint' else field
      mend = f', or set --step={found}' if field == 'step' else ''
      raise UserError(
        f'{workdir / EXITS} belongs to another checkpoint: {what} {found} there, {expected} here; '
        f'{calibrate_command(workdir)} writes it anew{mend}'
      )
  if plan.exits != exits:
    raise _wrong(workdir, 'exits', f'the exits that were trained, {list(exits)}', plan.exits)
  return plan


def read_plan(workdir: Path) -> ExitPlan:
  """Reads exits.json, whichever checkpoint it belongs to.

  Raises:
    UserError: there is none, it is damaged, or of another version.
  """
  path = workdir / EXITS
  saved = _read_object(workdir)
  version = saved.get('schema_version')
  if version != SCHEMA_VERSION:
    raise UserError(
      f'{path} must have schema_version {SCHEMA_VERSION}, found {version}; {calibrate_command(workdir)} writes it anew'
    )
  fields = {}
  for field in dataclasses.fields(ExitPlan):
    if field.name not in saved:
      raise UserError(f'{path} lacks the field {field.name}; {calibrate_command(workdir)} writes it anew')
    value = saved[field.name]
    fields[field.name] = tuple(value) if isinstance(value, list) else value
  plan = ExitPlan(**fields)
  _check(plan, workdir)
  return plan


def _read_object(workdir: Path) -> dict:
  path = workdir / EXITS
  try:
    return read_object(path)
  except FileNotFoundError as error:
    raise UserError(f'expected {path}, found none; {calibrate_command(workdir)} writes it') from error
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f'{path} is not a JSON object ({error}); {calibrate_command(workdir)} writes it anew') from error


Rule = tuple[Callable[[Any, int], bool], str]

_TOO_LARGE = 2**63  # for the integers of NumPy


def _number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _TOO_LARGE


def _integer(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _each(holds: Callable[[Any], bool], words: str) -> Rule:
  return lambda values, k: isinstance(values, tuple) and len(values) == k and all(map(holds, values)), words


def _is(kind: type, words: str) -> Rule:
  return lambda value, k: isinstance(value, kind) and not isinstance(value, bool), words


def _increasing(values: Any) -> bool:
  numbers = isinstance(values, tuple) and values and all(_integer(value) and value >= 1 for value in values)
  return bool(numbers) and list(values) == sorted(set(values))


def _thresholds(values: Any, k: int) -> bool:
  return isinstance(values, tuple) and len(values) == k and all(map(_cost, values)) and values[-1] == 0


def _cost(value: Any) -> bool:
  return value is None or _number(value) and value >= 0


def _optional(rule: Rule) -> Rule:
  return lambda value, k: value is None or rule[0](value, k), f'{rule[1]} or null'


_TEXT, _OBJECT = _is(str, 'text'), _is(dict, 'an object')
_COSTS = _each(_cost, 'a number of 0 or more, or null, for each exit')
_THRESHOLDS: Rule = (_thresholds, 'a number of 0 or more, or null, for each exit, the last 0')

_RULES: dict[str, Rule] = {
  'name': _TEXT,
  'dataset': _TEXT,
  'step': _is(int, 'an integer'),
  'fingerprint': _TEXT,
  'score': (lambda value, k: value in SCORES, f'one of {", ".join(SCORES)}'),
  'policy': _TEXT,  # Any: a plan predicts where the package that registers its policy is not installed.
  'target': _OBJECT,
  'exits': (lambda value, k: _increasing(value), 'increasing exit numbers'),
  'temperatures': _each(lambda value: _number(value) and value > 0, 'a number above 0 for each exit'),
  'thresholds': _THRESHOLDS,
  'confidence_thresholds': _THRESHOLDS,
  'visited': (lambda value, k: _increasing(value), 'increasing exit numbers'),
  'macs': _COSTS,
  'ms': _optional(_COSTS),
  'macs_alone': _each(lambda value: _integer(value) and value > 0, 'an integer above 0 for each exit'),
  'expected': _optional(_OBJECT),
  'test': _optional(_OBJECT),
  'splits': _optional(_OBJECT),
  'latency': _optional(_OBJECT),
  'provenance': _optional(_OBJECT),
}


def _check(plan: ExitPlan, workdir: Path) -> None:
  k = len(plan.exits) if isinstance(plan.exits, tuple) else 0
  for field, (holds, expected) in _RULES.items():
    value = getattr(plan, field)
    if not holds(value, k):
      raise _wrong(workdir, field, expected, value)
  pairs = zip(plan.thresholds, plan.confidence_thresholds, strict=True)
  if not all(_agree(*pair, plan.score) for pair in pairs):
    raise _wrong(workdir, 'thresholds', 'confidence_thresholds on the scale of the score', plan.thresholds)
  leaves = {number for number, at in zip(plan.exits, plan.confidence_thresholds, strict=True) if at is not None}
  runs = {number for number, cost in zip(plan.exits, plan.macs, strict=True) if cost is not None}
  if not leaves <= set(plan.visited) or runs != set(plan.visited):
    raise _wrong(workdir, 'visited', 'the exits that have macs, those with a threshold among them', plan.visited)


def _agree(threshold: float | None, confidence: float | None, score: str) -> bool:
  if threshold is None or confidence is None:
    return threshold is confidence
  return abs(to_score(confidence, score) - threshold) < 1e-9


def _wrong(workdir: Path, field: str, expected: str, found: Any) -> UserError:
  shown = json.dumps(found)
  shown = shown if len(shown) <= 60 else shown[:57] + '...'
  return UserError(
    f'{workdir / EXITS}: {field} must be {expected}, found {shown}; {calibrate_command(workdir)} writes it anew'
  )
