"""The command line that the benchmarks share."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import report
from benchmarks.network import Size
from paranet_jax.host.arguments import positive
from paranet_jax.host.errors import UserError
from paranet_jax.host.huge_pages import use_huge_pages


class Parser(argparse.ArgumentParser):
  """Flags of a benchmark: `json`, and the `size` of what is measured.

  Raises:
    UserError: a flag is not what it must be.
  """

  def __init__(self, description: str, sharers: int = 1):
    """`sharers`: devices that must be able to share a batch."""
    super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    self.sharers = sharers
    self.add_argument('--json', action='store_true', help='one line of JSON on stdout and nothing else')
    for field, default in vars(Size()).items():
      self.add_argument(f'--{field}', type=positive, default=default, help=f'{Size.HELP[field]} (default: {default})')

  def add_rounds(self, default: int) -> None:
    """Adds the flag of how often each is measured."""
    self.add_argument('--rounds', type=positive, default=default, help=f'turns of each; medians (default: {default})')

  def add_seconds(self, default: float = 1.0) -> None:
    """Adds the flag of how long a turn is."""
    self.add_argument('--seconds', type=float, default=default, help=f'length of a turn (default: {default:g})')

  def add_peers(self) -> None:
    """Adds the flags of whom ours is compared with."""
    self.add_argument(
      '--peer',
      choices=('eager', 'compile'),
      default='eager',
      help='compile: torch.compile too (minutes to compile); each PyTorch peer runs in its own process',
    )
    self.add_argument(
      '--linen',
      action=argparse.BooleanOptionalAction,
      default=True,
      help='the linen baseline too (a minute to compile)',
    )

  def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
    options = super().parse_args(args, namespace)
    if options.side % 8:
      raise UserError(
        f'expected a side that can be halved three times, found {options.side}; set --side to a multiple of 8'
      )
    if options.batch % self.sharers:
      raise UserError(
        f'expected a batch that {self.sharers} devices can share, found {options.batch}; set --batch to a multiple'
      )
    options.size = Size(*(getattr(options, field) for field in vars(Size())))
    return options

  def error(self, message: str) -> None:
    raise UserError(f'{message}; see --help')


def run(parser: Parser, measure: Callable[[argparse.Namespace], dict[str, Any]], argv: Sequence[str] | None) -> int:
  """Measures what the flags say and prints it; returns the exit code."""
  if argv is None:
    use_huge_pages()  # As paranet_jax.main does. PyTorch is in processes of its own, which do not ask for them.
  try:
    options = parser.parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):
      surroundings = report.surroundings()  # First: the load of others, not of this.
      warn_if_busy(**surroundings['machine'])
      result = report.rounded(measure(options) | surroundings)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  print(json.dumps(result) if options.json else report.text(result))
  return 0


def warn_if_busy(load_average: float, cores: int, **_: Any) -> None:
  """Says that ratios will not hold: PyTorch's threads wait for each other, and lose more by a busy core than XLA's."""
  if load_average > cores / 2:
    progress(
      f'warning: load average {load_average} on {cores} cores slows PyTorch most; wait until the machine is idle'
    )


def progress(message: str) -> None:
  """Says what is being done, on stderr."""
  print(message, file=sys.stderr, flush=True)
