"""`python -m paranet_jax.main`: trains, evaluates or describes one run."""

import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from paranet_jax.command_line import parse, place
from paranet_jax.host.arguments import absolute
from paranet_jax.host.errors import UserError, exit_code, say
from paranet_jax.host.files import json_line
from paranet_jax.host.starting import begin


def main() -> int:
  """Runs the command in sys.argv; returns the exit code."""
  return exit_code(lambda: _run(*parse(sys.argv)))


def _run(values: flags.FlagValues, config: ConfigDict) -> None:
  # jax takes a second to import, which a mistyped flag should not wait for.
  from paranet_jax import config as config_lib
  from paranet_jax.costs import describe
  from paranet_jax.display.tables import describe_table
  from paranet_jax.host.machine import start_jax
  from paranet_jax.host.processes import joined

  config_lib.validate(config)
  if values.data_dir:
    config.data.data_dir = values.data_dir
  config_lib.absolute_paths(config)
  workdir = absolute(values.workdir or config_lib.default_workdir(config))
  start_jax(values)
  if values.mode == 'describe':
    _print(values, description := describe(config), describe_table(description))
    return
  with joined(place(values), values.heartbeat_timeout):
    (_train if values.mode == 'train' else _evaluate)(values, config, workdir)


def _train(values: flags.FlagValues, config: ConfigDict, workdir: Path) -> None:
  from paranet_jax.runs.workdir import Accepted
  from paranet_jax.seeds import train_seeds
  from paranet_jax.train import train_and_evaluate

  train = train_seeds if config.seeds > 1 else train_and_evaluate
  train(config, workdir, Accepted(values.accept_config_changes, values.accept_data_changes, bool(values.data_dir)))


def _evaluate(values: flags.FlagValues, config: ConfigDict, workdir: Path) -> None:
  from paranet_jax.display.tables import class_table, evaluation_table
  from paranet_jax.evaluation import as_json
  from paranet_jax.train import evaluate_checkpoint

  if config.seeds > 1:
    raise UserError(
      f'--mode=eval evaluates one run, found {config.seeds} seeds; set --workdir={workdir}/seed_{config.seed}'
    )
  result = evaluate_checkpoint(config, workdir, values.step, values.accept_data_changes)
  splits = result['splits']
  tables = evaluation_table(splits)
  if not any('agreement' in row for row in splits['test']):  # Without labels there are no accuracies by class.
    tables += f'\n\n{class_table(splits["test"], result["class_names"])}'
  _print(values, result | {'splits': as_json(splits)}, f'{result["name"]} after step {result["step"]}:\n{tables}')


def _print(values: flags.FlagValues, result: dict, text: str) -> None:
  say(json_line(result) if values.json else text)


if __name__ == '__main__':
  begin()
  sys.exit(main())
