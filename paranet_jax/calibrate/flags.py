"""The flags of `python -m paranet_jax.calibrate`. Whatever is mistyped is a `UserError`."""

import argparse
import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from paranet_jax.early.policies import Flag, Policy, default_policy, find_policy, policies
from paranet_jax.early.scores import SCORES
from paranet_jax.host.arguments import Parser, absolute
from paranet_jax.host.errors import UserError

_MOST = 10**9  # Of what is counted.
_TARGETS = '--budget=30M (multiply-adds), --budget=2.5ms, --risk=0.02 or --threshold=0.9'
_BUDGET = re.compile(r'(\d+\.?\d*|\.\d+)(?:e([+-]?\d{1,4}))?\s*(k|m|g|ms)?', re.IGNORECASE)
_POWERS = {'': 0, 'ms': 0, 'k': 3, 'm': 6, 'g': 9}


class Budget(NamedTuple):
  """A mean cost an image: `unit` is 'macs' or 'ms'."""

  value: float
  unit: str


@dataclasses.dataclass(frozen=True)
class Request:
  """What is asked for: exactly one of `budget`, `risk` and `threshold`.

  Attributes:
    workdir: of the run, absolute.
    step: of the checkpoint; None: the latest.
    batch_size: to measure milliseconds at; None: nothing is measured.
    policy: that chooses the thresholds.
    options: what the policy's own flags say, by their key in the target.
    curves: draw the figures.
    compilation_cache: folder, 'off', or None for the default.
  """

  workdir: Path
  step: int | None
  budget: Budget | None
  batch_size: int | None
  risk: float | None
  threshold: float | None
  score: str
  policy: Policy
  options: dict[str, Any]
  curves: bool
  compilation_cache: str | None

  @property
  def target(self) -> dict[str, Any]:
    """The target as exits.json keeps it and the policy reads it."""
    if self.budget:
      at = {'batch_size': self.batch_size} if self.budget.unit == 'ms' else {}
      return {'budget': self.budget.value, 'unit': self.budget.unit, **at, **self.options}
    if self.risk is not None:
      return {'risk': self.risk, 'guarantee': self.policy.name, **self.options}
    return {'threshold': self.threshold, **self.options}


def parse(argv: Sequence[str] | None) -> Request:
  """Reads the flags.

  Args:
    argv: the arguments; None: those of the process.

  Raises:
    UserError: a flag is unknown, misses its value, or does not go with the others.
    SystemExit: `--help` has been answered.
  """
  _register(argv)
  given = _parser().parse_args(argv)
  target = _one_target(given)
  score = _one_of('score', given.score or 'max_prob', SCORES)
  policy = _policy(given, target, score)
  budget = None if given.budget is None else parse_budget(given.budget)
  batch_size = None if given.batch_size is None else _whole('batch-size', given.batch_size, 1)
  if budget and budget.unit == 'ms' and batch_size is None:
    batch_size = 1
  return Request(
    workdir=absolute(given.workdir),
    step=None if given.step is None else _whole('step', given.step, 0),
    budget=budget,
    batch_size=batch_size,
    risk=None if given.risk is None else _fraction('risk', given.risk),
    threshold=None if given.threshold is None else _threshold(given.threshold, score),
    score=score,
    policy=policy,
    options=_options(given, policy),
    curves=given.curves,
    compilation_cache=given.compilation_cache,
  )


def _register(argv: Sequence[str] | None) -> None:
  """Looks the policy up, as one that is found among the entry points may bring flags of its own."""
  parser = Parser(add_help=False)
  parser.add_argument('--policy', nargs='?')
  name = parser.parse_known_args(argv)[0].policy
  if name:
    find_policy(name)


def parse_budget(text: str) -> Budget:
  """Reads `30M`, `30e6`, `0.5G` (multiply-adds an image) or `2.5ms` (milliseconds an image), in either case.

  Raises:
    UserError: it is something else, or not above 0.
  """
  match = _BUDGET.fullmatch(text.strip())
  suffix = (match[3] or '').lower() if match else ''
  # Not 32.631277 times 10^6, which is less than the 32,631,277 that are shown as 32.631277M.
  value = float(f'{match[1]}e{int(match[2] or 0) + _POWERS[suffix]}') if match else 0.0
  if not 0 < value < math.inf:
    raise UserError(f"budget must be multiply-adds such as 30M or a time such as 2.5ms, found '{text}'; set --budget")
  return Budget(value, 'ms' if suffix == 'ms' else 'macs')


def _parser() -> argparse.ArgumentParser:
  parser = Parser(
    prog='python -m paranet_jax.calibrate',
    description='Chooses when a trained run may stop early, on its held-out images, and writes exits.json beside it.',
    epilog=f'One target is needed: {_TARGETS}.',
  )
  for name, text in (
    ('workdir', 'folder of the run'),
    ('step', 'checkpoint (default: the latest)'),
    ('budget', 'mean cost an image: multiply-adds (30M, 30e6, 0.5G) or measured milliseconds (2.5ms)'),
    ('batch-size', 'measure milliseconds at this batch size (default with --budget=..ms: 1)'),
    ('risk', 'share of images that may be lost against the full network, such as 0.02'),
    ('threshold', 'one threshold for all exits, on the scale of the score, such as 0.9'),
    ('score', 'max_prob (default), entropy, margin or patience: what says that an exit is sure'),
    ('policy', f'how thresholds are chosen: {_names()}, or a registered one; each target has a default'),
    ('guarantee', 'the --policy of --risk: ltt (default): it holds with probability 1 - delta; crc: on average'),
    *((flag.name, flag.help) for flag in _policy_flags()),
    ('compilation_cache', 'folder of compiled programs (default: compiled/ in PARANET_CACHE_DIR); off: none'),
  ):
    parser.add_argument(f'--{name}', help=text, metavar=name.upper(), required=name == 'workdir')
  parser.add_argument('--curves', action='store_true', help='draw the figures, into exits/ of the run')
  return parser


def _one_target(given: argparse.Namespace) -> str:
  found = [name for name in ('budget', 'risk', 'threshold') if getattr(given, name) is not None]
  if not found:
    raise UserError(f'expected one target, found none; set {_TARGETS}')
  if len(found) > 1:
    flags = ' and '.join(f'--{name}' for name in found)
    raise UserError(f'expected one target, found {flags}; leave out all but one')
  return found[0]


def _policy(given: argparse.Namespace, target: str, score: str) -> Policy:
  flag, name = ('policy', given.policy) if given.guarantee is None else ('guarantee', given.guarantee)
  if None not in (given.policy, given.guarantee):
    raise UserError('--guarantee is the --policy of --risk, found both; leave one of the two out')
  if flag == 'guarantee' and target != 'risk':
    raise UserError('--guarantee belongs to risk control; set --risk, or leave it out')
  policy = find_policy(name) if name else default_policy(target, score)
  if not policy and name:
    raise UserError(f"unknown {flag} '{name}', expected one of {_names(target)}; set --{flag}")
  if not policy:
    raise UserError(f'--{target} needs a score that ranks the images, found --score={score}; leave one of the two out')
  if target not in policy.scores:
    wanted = ' or '.join(f'--{each}' for each in policy.scores)
    raise UserError(f'--{flag}={name} belongs to {wanted}, found --{target}; leave one of the two out')
  if score not in policy.scores[target]:
    wanted = ' or '.join(policy.scores[target])
    raise UserError(f'--{flag}={name} with --{target} needs a score of {wanted}, found {score}; set --score')
  return policy


def _names(target: str | None = None) -> str:
  return ', '.join(policy.name for policy in policies() if target is None or target in policy.scores)


def _policy_flags() -> list[Flag]:
  return list({flag.name: flag for policy in policies() for flag in policy.flags}.values())


def _options(given: argparse.Namespace, policy: Policy) -> dict[str, Any]:
  """The values of the policy's own flags, by key; a flag of another policy is refused."""
  for flag in _policy_flags():
    if flag not in policy.flags and getattr(given, flag.name.replace('-', '_')) is not None:
      names = ' or '.join(other.name for other in policies() if flag in other.flags)
      raise UserError(f'--{flag.name} belongs to --policy={names}, found {policy.name}; leave out --{flag.name}')
  options = {}
  for flag in policy.flags:
    text = getattr(given, flag.name.replace('-', '_'))
    try:
      options[flag.key] = flag.default if text is None else flag.parse(text)
    except ValueError as error:
      raise UserError(f'{flag.name} {error}, found {text}; set --{flag.name}') from error
  return options


def _one_of(flag: str, value: str, choices: tuple[str, ...]) -> str:
  if value not in choices:
    raise UserError(f"unknown {flag} '{value}', expected one of {', '.join(choices)}; set --{flag}")
  return value


def _number(text: str) -> float:
  try:
    return float(text)
  except ValueError:
    return math.nan


def _fraction(flag: str, text: str) -> float:
  value = _number(text)
  if not 0 < value < 1:
    raise UserError(f'{flag} must be between 0 and 1, found {text}; set --{flag}')
  return value


def _whole(flag: str, text: str, low: int) -> int:
  value = _number(text) if text.isdecimal() else -1
  if not low <= value <= _MOST:
    raise UserError(f'{flag} must be a whole number from {low} to {_MOST:,}, found {text:.20}; set --{flag}')
  return int(value)


def _threshold(text: str, score: str) -> float:
  if score == 'patience':
    return float(_whole('threshold', text, 1))
  value = _number(text)
  if not 0 <= value <= 1:
    raise UserError(f'threshold must be from 0 to 1, found {text}; set --threshold')
  return value
