"""Parses the command line into flags and a configuration. Mistakes raise `UserError`."""

import difflib
import re
import runpy
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from paranet_jax.base_config import RENAMED, field_names
from paranet_jax.host.arguments import absolute
from paranet_jax.host.errors import UserError, say
from paranet_jax.host.watch import Place

MODES = ('train', 'eval', 'describe')
CONFIGS = Path(__file__).with_name('configs')
"""The repository's `configs/`, which is part of the package in a wheel."""

_OVERRIDE = re.compile(r'^(--?(?:no)?config\.)([^=]*)')
_PARANET_FILE = re.compile(r'pn([1-9])(cut)?_([1-9dx]+)\.py')


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, ConfigDict]:
  """Parses the flags and the configuration, including the fields that flags override.

  Args:
    argv: the program's name, then its arguments.

  Returns:
    The flags, and the configuration from `--config`, or the one saved in `--workdir` if `--config` is not set.

  Raises:
    UserError: a flag, a field or a file is wrong.
    SystemExit: after `--help`.
  """
  values = _define_flags()
  rest = _renamed(_consume(values, argv, known_only=True))
  if values.help:
    say(f'usage: python -m paranet_jax.main --config=FILE [--config.section.field=value ...]{values.get_help()}')
    raise SystemExit
  _consume(values, [argv[0], *(a for a in rest if a.startswith('--') and not _OVERRIDE.match(a))])
  if values.mode not in MODES:
    raise UserError(f"unknown mode '{values.mode}', expected one of {', '.join(MODES)}; set --mode")
  if values.step is not None and values.mode != 'eval':
    raise UserError(f'--step chooses the checkpoint to evaluate, found --mode={values.mode}; set --mode=eval')
  if values.json and values.mode == 'train':
    raise UserError('--json prints the result of describe or eval, found --mode=train; set --mode')
  _check_place(values)
  config = _load_config(values)
  _check_overrides(config, rest)
  # From here on, `--config` is the configuration itself, with a flag for each overridden field.
  del values.config
  _define_fields(values, config, rest)
  unexpected = _consume(values, rest)[1:]
  if unexpected:
    raise UserError(f"unexpected argument '{unexpected[0]}'; flags are written --name=value")
  return values, config


def override(config: ConfigDict, arguments: Sequence[str]) -> None:
  """Changes fields in place, as the command line does.

  Args:
    arguments: each `--config.section.field=value`.

  Raises:
    UserError: a field is unknown, or its value has another type.
  """
  arguments = _renamed(arguments)
  _check_overrides(config, arguments)
  values = flags.FlagValues()
  _define_fields(values, config, arguments)
  _consume(values, ['', *arguments])


def _define_fields(values: flags.FlagValues, config: ConfigDict, argv: Sequence[str]) -> None:
  """Defines a flag for each field that the arguments override; of one that is given twice, the last value counts."""
  config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=argv)
  for name in values:
    if isinstance(values[name], flags.MultiFlag):  # A tuple.
      _take_last(values[name])


def _take_last(flag: Any) -> None:
  parse = flag.parse

  def parse_anew(argument: str) -> None:
    flag.present = 0  # Otherwise the values are added to those before.
    parse(argument)

  flag.parse = parse_anew


def _define_flags() -> flags.FlagValues:
  values = flags.FlagValues()
  values.set_gnu_getopt()
  for kind, name, default, text in (
    ('bool', 'help', False, 'Show this help.'),
    ('string', 'config', None, 'Configuration file, or paranet_jax:NAME; fields: paranet_jax/base_config.py.'),
    ('string', 'workdir', None, 'Folder of the run (default: runs/<name>-<dataset>-s<seed>).'),
    ('string', 'mode', 'train', f'One of {", ".join(MODES)}.'),
    ('integer', 'step', None, 'Checkpoint for --mode=eval (default: the latest).'),
    ('string', 'compilation_cache', None, 'Folder of compiled programs (default: in PARANET_CACHE_DIR); off: none.'),
    ('string', 'coordinator', None, 'HOST:PORT of process 0 (default: from TPU pods, SLURM or Open MPI).'),
    ('integer', 'num_processes', None, 'Number of processes; 1: this one trains alone.'),
    ('integer', 'process_id', None, 'Index of this process, from 0.'),
    ('integer', 'heartbeat_timeout', 100, 'Seconds without a heartbeat until a process counts as dead.'),
    ('bool', 'accept_wrong_numbers', False, 'Compute on although this jaxlib computes wrong numbers.'),
    ('bool', 'json', False, 'Print one JSON object (--mode=describe and eval).'),
    ('bool', 'accept_config_changes', False, 'Continue a run whose saved configuration differs.'),
    ('string', 'data_dir', None, 'Folder of the data set, if it is not where the configuration of the run says.'),
    (
      'bool',
      'accept_data_changes',
      False,
      'Go on although classes, labels or all images changed; the run keeps its own classes.',
    ),
  ):
    getattr(flags, f'DEFINE_{kind}')(name, default, text, flag_values=values)
  for name in ('data_dir', 'accept_data_changes', 'accept_wrong_numbers'):  # As in other commands.
    flags.DEFINE_alias(name.replace('_', '-'), name, flag_values=values)
  return values


def place(values: flags.FlagValues) -> Place:
  """This process's place in a multi-process run, from the flags."""
  return Place(values.coordinator, values.num_processes, values.process_id)


def _check_place(values: flags.FlagValues) -> None:
  coordinator, number, index = place(values)
  if values.heartbeat_timeout < 5:
    raise UserError(f'--heartbeat_timeout must be 5 seconds or more, found {values.heartbeat_timeout}')
  if values.heartbeat_timeout > 10**6 or (number or 0) > 10**6:
    raise UserError('--heartbeat_timeout and --num_processes must be at most 1,000,000, found more')
  if (coordinator, index) == (None, None) and number in (None, 1):
    return
  if coordinator is None or number is None or index is None:
    raise UserError(
      f'--coordinator, --num_processes and --process_id go together, found {coordinator}, {number} and {index}; '
      'set all of them, or none where the cluster provides them'
    )
  if not re.fullmatch(r'.+:\d+', coordinator):
    raise UserError(f'--coordinator must be HOST:PORT, found {coordinator}')
  if not 0 <= index < number:
    raise UserError(f'--process_id must be from 0 to --num_processes - 1, found {index} of {number}')
  if values.mode == 'describe':
    raise UserError('--mode=describe runs in one process; remove --coordinator, --num_processes and --process_id')


def _consume(values: flags.FlagValues, argv: Sequence[str], known_only: bool = False) -> list[str]:
  try:
    return values(argv, known_only)
  except (flags.Error, ValueError) as error:
    reason = _one_line(error)
    raise UserError(f'{reason}; see --help for the flags, paranet_jax/base_config.py for the fields') from error


def _load_config(values: flags.FlagValues) -> ConfigDict:
  if values.config is not None:
    return load_config(values.config)
  if values.workdir is None:
    raise UserError('expected a configuration, found none; set --config=configs/quickstart.py or another, or --workdir')
  # Importing jax takes a second, and a mistyped flag should fail at once.
  from paranet_jax.runs.workdir import restore_config

  return restore_config(absolute(values.workdir))


def load_config(flag: str) -> ConfigDict:
  """The configuration that `get_config` of a Python file returns.

  Args:
    flag: value of `--config`: FILE or FILE:ARGUMENT of `get_config`, where FILE is a path or, for a file in `configs/`
      that an installed package has too, `paranet_jax:NAME`.

  Raises:
    UserError: the file does not exist, it fails, or it returns another type.
  """
  path, argument = _split(flag)
  _check_exists(Path(path))
  try:
    config = runpy.run_path(path).get('get_config', lambda *_: None)(*argument)
  except UserError:
    raise
  except (Exception, SystemExit) as error:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    place = f'line {lines[-1]} of {path}' if lines else path
    raise UserError(f'{place} raises {type(error).__name__}: {_one_line(error)}; fix it or set --config') from error
  if not isinstance(config, ConfigDict):
    raise UserError(f'{path} must have a function get_config that returns a ConfigDict; see configs/quickstart.py')
  return config


def _split(flag: str) -> tuple[str, list[str]]:
  """File and arguments in the value of `--config`."""
  path, *argument = flag.split(':', 1)
  if path == 'paranet_jax' and argument:
    name, *argument = argument[0].split(':', 1)
    path = str(CONFIGS / f'{name}.py')
  old = _PARANET_FILE.fullmatch(Path(path).name)
  if old and not Path(path).exists():  # 0.1.0 had a file for each name, such as configs/pn3_x3d.py.
    pipelines, cut, suffix = old.groups(default='')
    return str(Path(path).with_name('paranet.py')), [f'PN{pipelines}{cut}-{suffix}']
  return path, argument


def _check_exists(path: Path) -> None:
  if not path.is_file():
    files = [file.name for file in path.parent.glob('*.py') if file.is_file()]
    near = difflib.get_close_matches(path.name, files, 1)
    hint = f'did you mean {path.parent / near[0]}?' if near else 'set --config, such as configs/quickstart.py'
    found = 'a link to a file that does not exist' if path.is_symlink() else 'none'
    raise UserError(f'expected a configuration file at {path}, found {found}; {hint}')


def _check_overrides(config: ConfigDict, argv: Sequence[str]) -> None:
  known = field_names(config)
  for field in (match[2] for match in map(_OVERRIDE.match, argv) if match):
    if field not in known:
      near = difflib.get_close_matches(field, known, 1)
      hint = f'did you mean {near[0]}? All are' if near else 'all are'
      raise UserError(f'unknown configuration field {field}; {hint} in paranet_jax/base_config.py')


def _renamed(argv: Sequence[str]) -> list[str]:
  """The same arguments with the current names of fields."""
  return [_OVERRIDE.sub(lambda match: match[1] + RENAMED.get(match[2], match[2]), argument, 1) for argument in argv]


def _one_line(error: BaseException) -> str:
  # ml_collections lists every field next to the misspelled one.
  return ' '.join(re.sub(r'Other fields present: .*\}"\\n', '', str(error)).split())
