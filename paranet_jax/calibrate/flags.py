"""The flags of `python -m paranet_jax.calibrate`. Whatever is mistyped is a `UserError`."""

import argparse
import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from paranet_jax.early.scores import SCORES
from paranet_jax.host.arguments import Parser, absolute
from paranet_jax.host.errors import UserError

POLICIES = ('quota', 'optimal')
GUARANTEES = ('ltt', 'crc')
RISK_LOSSES = ('gap', 'disagreement')

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
    delta, guarantee, risk_loss: of risk control.
    policy: of a budget.
    curves: draw the figures.
    compilation_cache: folder, 'off', or None for the default.
  """

  workdir: Path
  step: int | None
  budget: Budget | None
  batch_size: int | None
  risk: float | None
  delta: float
  guarantee: str
  risk_loss: str
  threshold: float | None
  score: str
  policy: str
  curves: bool
  compilation_cache: str | None


def parse(argv: Sequence[str] | None) -> Request:
  """Reads the flags.

  Args:
    argv: the arguments; None: those of the process.

  Raises:
    UserError: a flag is unknown, misses its value, or does not go with the others.
    SystemExit: `--help` has been answered.
  """
  given = _parser().parse_args(argv)
  _check_one_target(given)
  score = _one_of('score', given.score or 'max_prob', SCORES)
  _check_used(given, score)
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
    delta=_fraction('delta', given.delta or '0.1'),
    guarantee=_one_of('guarantee', given.guarantee or 'ltt', GUARANTEES),
    risk_loss=_one_of('risk-loss', given.risk_loss or 'gap', RISK_LOSSES),
    threshold=None if given.threshold is None else _threshold(given.threshold, score),
    score=score,
    policy=_one_of('policy', given.policy or 'optimal', POLICIES),
    curves=given.curves,
    compilation_cache=given.compilation_cache,
  )


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
    ('delta', 'of --guarantee=ltt: how often the risk may be missed (default: 0.1)'),
    ('guarantee', 'ltt (default): the risk holds with probability 1 - delta; crc: it holds on average'),
    ('risk-loss', 'gap (default): wrong where the full network is right; disagreement: another answer than its'),
    ('threshold', 'one threshold for all exits, on the scale of the score, such as 0.9'),
    ('score', 'max_prob (default), entropy, margin or patience: what says that an exit is sure'),
    ('policy', 'of --budget: optimal (default) or quota'),
    ('compilation_cache', 'folder of compiled programs (default: compiled/ in PARANET_CACHE_DIR); off: none'),
  ):
    parser.add_argument(f'--{name}', help=text, metavar=name.upper(), required=name == 'workdir')
  parser.add_argument('--curves', action='store_true', help='draw the figures, into exits/ of the run')
  return parser


def _check_one_target(given: argparse.Namespace) -> None:
  found = [f'--{name}' for name in ('budget', 'risk', 'threshold') if getattr(given, name) is not None]
  if not found:
    raise UserError(f'expected one target, found none; set {_TARGETS}')
  if len(found) > 1:
    raise UserError(f'expected one target, found {" and ".join(found)}; leave out all but one')


def _check_used(given: argparse.Namespace, score: str) -> None:
  """Refuses a flag that nothing would read."""
  for name in ('delta', 'guarantee', 'risk_loss'):
    if getattr(given, name) is not None and given.risk is None:
      raise UserError(f'--{name.replace("_", "-")} belongs to risk control; set --risk, or leave it out')
  if given.delta is not None and given.guarantee == 'crc':
    raise UserError('--delta belongs to --guarantee=ltt, and crc holds on average; leave out --delta')
  if given.policy is not None and given.budget is None:
    raise UserError('--policy chooses the thresholds for a budget; set --budget, or leave it out')
  if score == 'patience' and (given.risk is not None or given.policy is not None):
    flag = '--policy' if given.risk is None else '--risk'
    raise UserError(f'{flag} needs a score that ranks the images, found --score=patience; leave one of the two out')


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
