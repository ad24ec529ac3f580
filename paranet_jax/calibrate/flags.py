"""The flags of `python -m paranet_jax.calibrate`. Wrong flags are a `UserError`."""

import argparse
import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paranet_jax.early.exit_plan import DTYPES, EXITS
from paranet_jax.early.policies import Flag, Policy, default_policy, find_policy, policies
from paranet_jax.early.scores import SCORES
from paranet_jax.early.units import MEASURED
from paranet_jax.host.arguments import Parser, absolute, add_data_flags, add_jax_flags, fraction, positive
from paranet_jax.host.errors import UserError
from paranet_jax.host.files import read_object

TEMPERATURES = ('nll', 'ece', 'none')
"""What each exit's temperature minimizes on the held-out images; 'none': every temperature is 1."""

_BUDGET = re.compile(r'(\d+\.?\d*|\.\d+)(?:e([+-]?\d{1,4}))?\s*(k|m|g|ms|mj|j)?', re.IGNORECASE)
_POWERS = {'': 0, 'ms': 0, 'k': 3, 'm': 6, 'g': 9, 'mj': -3, 'j': 0}
_UNITS = {'ms': 'ms', 'mj': 'joules', 'j': 'joules'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Request:
  """What the flags ask for with and without `--bundle`.

  Attributes:
    temperature: one of TEMPERATURES.
    reject: the most errors among answered images, as a share; None: every image is answered.
    delta: how often that may be missed.
    coverage: of sets of classes; None: there are none.
  """

  temperature: str
  reject: float | None
  delta: float
  coverage: float | None

  @property
  def promises(self) -> bool:
    """Whether answers or sets are calibrated, which needs images of its own."""
    return (self.reject, self.coverage) != (None, None)


@dataclasses.dataclass(frozen=True)
class Request(_Request):
  """What the flags ask for without `--bundle`.

  Attributes:
    workdir: absolute.
    step: of the checkpoint; None: the latest.
    target: the target as exits.json keeps it and the policy reads it, see `Policy`.
    batch_size: at which milliseconds are measured; None: nothing is measured.
    curves: draw the figures.
    audit: measure how far harder images and an adversary raise the mean cost.
    compilation_cache, accept_wrong_numbers: as the flags (see `machine.start_jax`).
    data_dir: folder of the data set; None: as the run says.
    accept_data_changes: the data may have other classes or labels than the run learned.
    explicit: keys of the target that flags of the policy gave, and not their defaults.
    most: what each image may cost, and its unit, 'macs' or 'ms'; None: as much as the last exit.
    dtype: in which the network computes from now on, one of DTYPES; None: that of its run.
  """

  workdir: Path
  step: int | None
  target: dict[str, Any]
  batch_size: int | None
  score: str
  policy: Policy
  curves: bool
  audit: bool
  compilation_cache: str | None
  data_dir: Path | None = None
  accept_data_changes: bool = False
  accept_wrong_numbers: bool = False
  explicit: frozenset[str] = frozenset()
  most: tuple[float, str] | None = None
  dtype: str | None = None

  @property
  def measured_unit(self) -> str | None:
    """'ms' or 'joules', if the target is a budget of them."""
    unit = self.target.get('unit')
    return unit if unit in MEASURED else None


@dataclasses.dataclass(frozen=True)
class BundleRequest(_Request):
  """What the flags ask for with `--bundle`.

  Attributes:
    bundle, images: absolute.
    out: folder to write; None: beside the bundle.
    target, policy: as of `Request`; None: those that the bundle was calibrated with.
    explicit: as of `Request`.
  """

  bundle: Path
  images: Path
  out: Path | None
  target: dict[str, Any] | None
  policy: Policy | None
  explicit: frozenset[str] = frozenset()


def parse(argv: Sequence[str] | None) -> Request | BundleRequest:
  """Reads the flags.

  Args:
    argv: the arguments; None: those of the process.

  Raises:
    UserError: a flag is unknown, has no value or a wrong one, or conflicts with another.
    SystemExit: after `--help`.
  """
  _find_plugin(argv)
  given = _parser().parse_args(argv)
  if given.bundle is not None and given.score is not None:
    raise UserError('--score belongs to --workdir: a bundle keeps the score it was calibrated with; leave it out')
  if given.bundle is not None:
    given.score = _score_of(absolute(given.bundle))
    return _of_bundle(given)
  given.score = given.score or 'max_prob'
  kind = _check_run(given)
  (policy, target), batch_size = _aim(given, kind), given.batch_size
  if given.reject is not None and given.score == 'patience':
    raise UserError('--reject needs a score that ranks images, found --score=patience; leave one of them out')
  most = _most(given, kind)
  if most:
    target[f'max_{most[1]}'] = most[0]
  measured = target.get('unit') in MEASURED
  if measured or (most and most[1] == 'ms'):
    batch_size = batch_size or 1
  if measured:
    target['batch_size'] = batch_size
  return Request(
    workdir=absolute(given.workdir),
    step=given.step,
    target=target | _options(given, policy),
    batch_size=batch_size,
    score=given.score,
    policy=policy,
    curves=given.curves,
    audit=given.audit,
    compilation_cache=given.compilation_cache,
    data_dir=given.data_dir,
    accept_data_changes=given.accept_data_changes,
    accept_wrong_numbers=given.accept_wrong_numbers,
    explicit=_explicit(given),
    most=most,
    dtype=given.dtype,
    **_promised(given),
  )


def _score_of(bundle: Path) -> str:
  """The score of a bundle; the usual one where it cannot be read, which `recalibrate` reports."""
  with contextlib.suppress(UserError):
    score = (read_object(bundle / EXITS, '') or {}).get('score')
    return score if score in SCORES else 'max_prob'
  return 'max_prob'


def _kind(given: argparse.Namespace) -> str | None:
  """The target that is given, of which there is at most one."""
  return next((name for name in ('budget', 'risk', 'threshold') if getattr(given, name) is not None), None)


def _aim(given: argparse.Namespace, kind: str) -> tuple[Policy, dict[str, Any]]:
  """The policy and the target, without the values of the policy's own flags."""
  if given.threshold is not None:
    _check_threshold(given.threshold, given.score, _shown_score(given))
  policy = _policy(given, kind)
  target = given.budget or {kind: getattr(given, kind)}
  return policy, target | ({'guarantee': policy.name} if kind == 'risk' else {})


def _promised(given: argparse.Namespace) -> dict[str, Any]:
  """The attributes of `_Request`."""
  delta = 0.1 if given.delta is None else given.delta
  return {'temperature': given.temperature, 'reject': given.reject, 'delta': delta, 'coverage': given.coverage}


def _most(given: argparse.Namespace, kind: str) -> tuple[float, str] | None:
  """The limit on each image, and its unit."""
  for unit in ('macs', 'ms'):
    value = getattr(given, f'max_{unit}')
    if value is not None and kind == 'risk':
      raise UserError(
        f'--max-{unit} belongs to --budget or --threshold, found --risk, which compares with the last exit; '
        'leave one of them out'
      )
    if value is not None:
      return value, unit
  return None


def _parse_macs(text: str) -> float:
  """Multiply-adds, such as 10M."""
  target = parse_budget(text)
  if target['unit'] != 'macs':
    raise argparse.ArgumentTypeError(f"expected multiply-adds such as 30M, found '{text}'")
  return target['budget']


def _parse_ms(text: str) -> float:
  """Milliseconds, such as 2.5 or 2.5ms."""
  return parse_budget(text if text.lower().endswith('ms') else f'{text}ms')['budget']


def _check_run(given: argparse.Namespace) -> str:
  """Rejects what belongs to `--bundle`, and what it lacks; returns the `_kind`."""
  for name in ('images', 'out'):
    if getattr(given, name) is not None:
      raise UserError(f'--{name} belongs to --bundle; set --bundle, or leave out --{name}')
  if given.workdir is None:
    raise UserError('the following arguments are required: --workdir; see --help')
  kind = _kind(given)
  if kind is None:
    raise UserError('one of the arguments --budget --risk --threshold is required; see --help')
  return kind


_OF_RUNS = (
  'workdir',
  'step',
  'batch_size',
  'max_macs',
  'max_ms',
  'curves',
  'audit',
  'dtype',
  'compilation_cache',
  'data_dir',
  'accept_data_changes',
  'accept_wrong_numbers',
)


def _of_bundle(given: argparse.Namespace) -> BundleRequest:
  for name in _OF_RUNS:
    if getattr(given, name) not in (None, False):
      flag = name if name == 'compilation_cache' or name.startswith('accept_') else name.replace('_', '-')
      raise UserError(f'--{flag} belongs to --workdir, found --bundle; leave one of them out')
  if given.images is None:
    raise UserError('--bundle needs images to calibrate on, found none; set --images to a folder')
  target = policy = None
  if kind := _kind(given):
    policy, target = _aim(given, kind)
    if words := MEASURED.get(target.get('unit', 'macs')):
      raise UserError(f'--budget in {words} needs the run, found --bundle; set multiply-adds, or --workdir')
    target = target | _options(given, policy)
  elif (given.policy, given.guarantee) != (None, None):
    raise UserError('--policy and --guarantee need a target; set --budget, --risk or --threshold, or leave them out')
  else:
    _check_no_options(given)
  return BundleRequest(
    bundle=absolute(given.bundle),
    images=absolute(given.images),
    out=given.out and absolute(given.out),
    target=target,
    policy=policy,
    explicit=_explicit(given),
    **_promised(given),
  )


def _check_no_options(given: argparse.Namespace) -> None:
  """Rejects flags of a policy where the target, and so its options, are those of the bundle."""
  for flag in _policy_flags():
    if _value(given, flag) is not None and not (flag.key == 'delta' and given.reject is not None):
      raise UserError(
        f'--{flag.name} needs a target with --bundle; set --budget, --risk or --threshold, or leave out --{flag.name}'
      )


def _value(given: argparse.Namespace, flag: Flag) -> Any:
  return getattr(given, flag.name.replace('-', '_'))


def parse_budget(text: str) -> dict[str, Any]:
  """Parses multiply-adds (`30M`, `30e6`, `0.5G`), milliseconds (`2.5ms`) or joules (`0.5J`, `20mJ`) per image.

  Case does not matter.

  Returns:
    The target {'budget': value, 'unit': 'macs', 'ms' or 'joules'}.
  """
  match = _BUDGET.fullmatch(text.strip())
  suffix = (match[3] or '').lower() if match else ''
  # Not 32.631277 * 10^6, which is less than the 32,631,277 that is shown as 32.631277M.
  value = float(f'{match[1]}e{int(match[2] or 0) + _POWERS[suffix]}') if match else 0.0
  if not 0 < value < math.inf:
    raise argparse.ArgumentTypeError(
      f"expected multiply-adds such as 30M, a time such as 2.5ms or an energy such as 0.5J, found '{text}'"
    )
  return {'budget': value, 'unit': _UNITS.get(suffix, 'macs')}


def _find_plugin(argv: Sequence[str] | None) -> None:
  """Registers a policy from another package before the flags are read: it may add its own."""
  parser = Parser(add_help=False)
  parser.add_argument('--policy', nargs='?')
  name = parser.parse_known_args(argv)[0].policy
  if name:
    find_policy(name)


def _parser() -> argparse.ArgumentParser:
  parser = Parser(
    prog='python -m paranet_jax.calibrate',
    description='Chooses when a trained run may stop early, on its held-out images, and writes exits.json beside it.',
  )
  add = parser.add_argument
  add('--workdir', metavar='RUN', help='folder of the run')
  add(
    '--bundle', metavar='DIR', help='instead: an exported bundle, which is calibrated without JAX and without the run'
  )
  add('--images', metavar='FOLDER', help='of --bundle: new images, in folders named after classes, or without labels')
  add('--out', metavar='DIR', help='of --bundle: folder to write (default: beside the bundle, with the next number)')
  add('--step', type=int, help='checkpoint (default: the latest)')
  target = parser.add_mutually_exclusive_group()
  target.add_argument(
    '--budget',
    type=parse_budget,
    help='mean cost per image: multiply-adds (30M, 30e6), or measured milliseconds (2.5ms) or joules (0.5J)',
  )
  target.add_argument(
    '--risk', type=fraction, help='share of images that the full network gets right and an early exit may not (0.02)'
  )
  target.add_argument('--threshold', type=float, help='one threshold for all exits, on the scale of the score (0.9)')
  limit = parser.add_mutually_exclusive_group()
  limit.add_argument(
    '--max-macs', type=_parse_macs, help='most multiply-adds of any image (10M), beside a budget or a threshold'
  )
  limit.add_argument(
    '--max-ms', type=_parse_ms, help='most milliseconds of any image (2.5), beside a budget or a threshold'
  )
  add(
    '--batch-size',
    type=functools.partial(positive, most=65_536),
    help='measure milliseconds and joules at this batch size (default for a budget of them: 1)',
  )
  add('--score', choices=SCORES, help='how confidence is measured (default: max_prob)')
  add(
    '--temperature',
    choices=TEMPERATURES,
    default='nll',
    help='what the temperature of each exit minimizes: nll (default), which can raise ECE, or ece; none: all are 1',
  )
  add('--policy', help=f'how thresholds are chosen: {_names()}, or a registered one; each target has a default')
  add('--guarantee', help='the --policy for --risk: ltt (default), with probability 1 - delta, or crc, on average')
  for flag in _policy_flags():
    add(f'--{flag.name}', type=_type(flag.parse), help=flag.help)
  add(
    '--reject',
    type=fraction,
    help='answer "unknown" where the last exit is too unsure: with probability 1 - delta, at most this share of the '
    'answers is wrong (0.02)',
  )
  add('--coverage', type=fraction, help='sets of classes that hold the right one with this probability (0.9)')
  add('--curves', action='store_true', help="draw the figures into the run's exits/")
  add(
    '--audit',
    action='store_true',
    help='measure how far corrupted images and an adversary raise the mean cost, on 1,000 test images',
  )
  add(
    '--dtype',
    choices=DTYPES,
    help='in which the network predicts from now on, with the same parameters (default: as it was trained)',
  )
  add_jax_flags(parser)
  add_data_flags(parser)
  return parser


def _type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
  def convert(text: str) -> Any:
    try:
      return parse(text)
    except ValueError as error:
      raise argparse.ArgumentTypeError(f'{error}, found {text}') from error

  return convert


def _shown_score(given: argparse.Namespace) -> str:
  return f'--score={given.score}' if given.bundle is None else f'a bundle that exits by {given.score}'


def _check_threshold(threshold: float, score: str, shown: str) -> None:
  if score == 'patience' and not (threshold >= 1 and threshold.is_integer()):
    raise UserError(f'expected 1 or more equal predictions in a row for {shown}, found {threshold:g}; set --threshold')
  if score != 'patience' and not 0 <= threshold <= 1:
    raise UserError(f'expected a threshold from 0 to 1 for {shown}, found {threshold:g}; set --threshold')


def _policy(given: argparse.Namespace, target: str) -> Policy:
  flag, name = ('policy', given.policy) if given.guarantee is None else ('guarantee', given.guarantee)
  if None not in (given.policy, given.guarantee):
    raise UserError('--guarantee is the --policy for --risk, found both; leave one of them out')
  if flag == 'guarantee' and target != 'risk':
    raise UserError('--guarantee belongs to risk control; set --risk, or leave it out')
  policy = find_policy(name) if name else default_policy(target, given.score)
  if not policy and name:
    raise UserError(f"unknown {flag} '{name}', expected one of {_names(target)}; set --{flag}")
  if not policy:
    fix = 'leave one of them out' if given.bundle is None else 'set --budget or --threshold'
    raise UserError(f'--{target} needs a score that ranks images, found {_shown_score(given)}; {fix}')
  if target not in policy.scores:
    expected = ' or '.join(f'--{each}' for each in policy.scores)
    raise UserError(f'--{flag}={name} belongs to {expected}, found --{target}; leave one of them out')
  if given.score not in policy.scores[target]:
    expected = ' or '.join(policy.scores[target])
    fix = 'set --score' if given.bundle is None else f'set another --{flag}'
    raise UserError(f'--{flag}={name} with --{target} needs a score of {expected}, found {given.score}; {fix}')
  return policy


def _names(target: str | None = None) -> str:
  return ', '.join(policy.name for policy in policies() if target is None or target in policy.scores)


def _policy_flags() -> list[Flag]:
  return list({flag.name: flag for policy in policies() for flag in policy.flags}.values())


def _explicit(given: argparse.Namespace) -> frozenset[str]:
  return frozenset(flag.key for flag in _policy_flags() if _value(given, flag) is not None)


def _options(given: argparse.Namespace, policy: Policy) -> dict[str, Any]:
  """The values of the policy's own flags, by key; rejects another policy's flag."""
  options = {}
  for flag in _policy_flags():
    value = _value(given, flag)
    if flag in policy.flags:
      value = flag.default if value is None else value
      options |= {} if value is None else {flag.key: value}
    elif value is not None and not (flag.key == 'delta' and given.reject is not None):
      names = ' or '.join(other.name for other in policies() if flag in other.flags)
      names += ' or to --reject' if flag.key == 'delta' else ''
      raise UserError(f'--{flag.name} belongs to --policy={names}, found {policy.name}; leave out --{flag.name}')
  return options
