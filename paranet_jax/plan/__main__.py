"""`python -m paranet_jax.plan`: the memory, work and time of a run, for devices that this machine may lack."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from paranet_jax.command_line import load_config, override
from paranet_jax.host.arguments import Parser, add_data_flags, positive
from paranet_jax.host.errors import UserError, exit_code, say
from paranet_jax.host.files import json_line
from paranet_jax.host.starting import begin


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command with these arguments (default: sys.argv); returns the exit code."""
  return exit_code(lambda: _run(*_parse(argv)))


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
  parser = Parser(
    prog='python -m paranet_jax.plan',
    description='Compiles the training step of a run for some devices, and reports its needs and its time.',
    epilog='--config.section.field=value overrides a field, as in paranet_jax.main.',
  )
  add = parser.add_argument
  add('--config', required=True, help='Configuration file.')
  add('--topology', help='TPU slice to compile for, such as v5e:2x2 (default: the devices of this machine).')
  add(
    '--devices',
    type=partial(positive, most=100_000),
    help='Number of devices; a CPU is divided into that many (default: train.devices, where 0 is all).',
  )
  add('--json', action='store_true', help='Print one JSON object.')
  add_data_flags(parser, accept=False)
  return parser.parse_with_overrides(argv)


def _run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
  # jax takes a second to import; flags are checked first.
  from paranet_jax.config import validate, with_data_dir
  from paranet_jax.host.processes import refuse_several
  from paranet_jax.plan.plan import build_plan
  from paranet_jax.plan.plan_text import as_json, as_text
  from paranet_jax.plan.target import choose_target
  from paranet_jax.runs.dtype import with_dtype

  refuse_several('plan')
  config = load_config(arguments.config)
  override(config, overrides)
  config = with_data_dir(config, arguments.data_dir)
  validate(config)
  if config.seeds > 1:
    raise UserError(f'a plan covers one run, found {config.seeds} seeds; leave out --config.seeds')
  progress = partial(say, to_stderr=True)
  target = choose_target(arguments.topology, arguments.devices or config.train.devices or None)
  if target.here:
    config = with_dtype(config, target.devices, report=progress)
  plan = build_plan(config, target, progress)
  say(json_line(as_json(plan)) if arguments.json else as_text(plan))


if __name__ == '__main__':
  begin()
  sys.exit(main())
