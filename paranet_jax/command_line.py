"""From the command line to flags and a configuration. Whatever is mistyped is a `UserError`."""

import difflib
import re
import runpy
import traceback
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from paranet_jax.base_config import field_names
from paranet_jax.host.errors import UserError
from paranet_jax.host.watch import Place

MODES = ('train', 'eval', 'describe')

_OVERRIDE = re.compile(r'--?(?:no)?config\.([^=]*)')


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, ConfigDict]:
  """Reads the flags, and the configuration with what they override in it.

  Args:
    argv: the program's name, then its arguments.

  Returns:
    The flags, and the configuration of `--config`, or the one saved in `--workdir` where there is no `--config`.

  Raises:
    UserError: a flag, a field or a file is not what it must be.
    SystemExit: `--help` has been answered.
  """
  values = _define_flags()
  rest = _consume(values, argv, known_only=True)
  if values.help:
    print(f'usage: python -m paranet_jax.main --config=FILE [--config.section.field=value ...]{values.get_help()}')
    raise SystemExit
  _consume(values, [argv[0], *(a for a in rest if a.startswith('--') and not _OVERRIDE.match(a))])
  if values.mode not in MODES:
    raise UserError(f"unknown mode '{values.mode}', expected one of {', '.join(MODES)}; set --mode")
  if values.step is not None and values.mode != 'eval':
    raise UserError(f'--step chooses the checkpoint to evaluate, found --mode={values.mode}; set --mode=eval')
  if values.json and values.mode == 'train':
    raise UserError('--json prints what describe or eval finds, found --mode=train; set --mode')
  _check_place(values)
  config = _load_config(values)
  _check_overrides(config, rest)
  # From here on `config` is the configuration itself, with a flag for each field that is overridden.
  del values.config
  config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=rest)
  unexpected = _consume(values, rest)[1:]
  if unexpected:
    raise UserError(f"unexpected argument '{unexpected[0]}'; flags are written --name=value")
  return values, config


def override(config: ConfigDict, arguments: Sequence[str]) -> None:
  """Changes fields as the command line does.

  Args:
    config: changed in place.
    arguments: each `--config.section.field=value`.

  Raises:
    UserError: a field is unknown, or its value is of another type.
  """
  _check_overrides(config, arguments)
  values = flags.FlagValues()
  config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=arguments)
  _consume(values, ['', *arguments])


def _define_flags() -> flags.FlagValues:
  values = flags.FlagValues()
  values.set_gnu_getopt()
  for define, name, default, text in (
    (flags.DEFINE_bool, 'help', False, 'Show this help.'),
    (flags.DEFINE_string, 'config', None, 'Configuration file; fields: paranet_jax/base_config.py.'),
    (flags.DEFINE_string, 'workdir', None, 'Folder of the run (default: runs/<name>-<dataset>-s<seed>).'),
    (flags.DEFINE_string, 'mode', 'train', f'One of {", ".join(MODES)}.'),
    (flags.DEFINE_integer, 'step', None, 'Checkpoint for --mode=eval (default: the latest).'),
    (
      flags.DEFINE_string,
      'compilation_cache',
      None,
      'Folder of compiled programs (default: compiled/ in PARANET_CACHE_DIR); off: none.',
    ),
    (
      flags.DEFINE_string,
      'coordinator',
      None,
      'HOST:PORT at which the others reach process 0, of several that train together (default: as TPU pods, SLURM and '
      'Open MPI say).',
    ),
    (flags.DEFINE_integer, 'num_processes', None, 'How many there are; 1: this one trains alone.'),
    (flags.DEFINE_integer, 'process_id', None, 'Which of them this one is, from 0.'),
    (flags.DEFINE_integer, 'heartbeat_timeout', 100, 'Seconds without a sign of life, then a process counts as dead.'),
    (flags.DEFINE_bool, 'json', False, 'Print one JSON object (--mode=describe and eval).'),
    (flags.DEFINE_bool, 'accept_config_changes', False, 'Go on with a run although its saved configuration differs.'),
  ):
    define(name, default, text, flag_values=values)
  return values


def place(values: flags.FlagValues) -> Place:
  """Where the flags put this process among several."""
  return Place(values.coordinator, values.num_processes, values.process_id)


def _check_place(values: flags.FlagValues) -> None:
  coordinator, number, index = place(values)
  if values.heartbeat_timeout < 5:
    raise UserError(f'--heartbeat_timeout must be 5 seconds or more, found {values.heartbeat_timeout}')
  if (coordinator, index) == (None, None) and number in (None, 1):
    return
  if None in (coordinator, number, index):
    raise UserError(
      f'--coordinator, --num_processes and --process_id go together, found {coordinator}, {number} and {index}; '
      'set all of them, or none where the cluster says it'
    )
  if not re.fullmatch(r'.+:\d+', coordinator):
    raise UserError(f'--coordinator must be HOST:PORT, found {coordinator}')
  if not 0 <= index < number:
    raise UserError(f'--process_id must be from 0 to --num_processes - 1, found {index} of {number}')
  if values.mode == 'describe':
    raise UserError('--mode=describe is of one process; leave --coordinator, --num_processes and --process_id out')


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
  # jax takes a second to import, and a mistyped flag should not wait for it.
  from paranet_jax.runs.workdir import restore_config

  return restore_config(Path(values.workdir).expanduser().absolute())


def load_config(flag: str) -> ConfigDict:
  """The configuration that `get_config` of a Python file returns, given what follows `:` in the flag.

  Raises:
    UserError: there is no such file, it fails, or it returns something else.
  """
  path, *argument = flag.split(':', 1)
  _check_exists(Path(path))
  try:
    config = runpy.run_path(path).get('get_config', lambda *_: None)(*argument)
  except UserError:
    raise
  except (Exception, SystemExit) as error:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    place = f'line {lines[-1]} of {path}' if lines else path
    raise UserError(f'{place} raises {type(error).__name__}: {_one_line(error)}; mend it or set --config') from error
  if not isinstance(config, ConfigDict):
    raise UserError(f'{path} must have a function get_config that returns a ConfigDict; see configs/quickstart.py')
  return config


def _check_exists(path: Path) -> None:
  if not path.is_file():
    near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob('*.py')], 1)
    hint = f'did you mean {path.parent / near[0]}?' if near else 'set --config, such as configs/quickstart.py'
    raise UserError(f'expected a configuration file at {path}, found none; {hint}')


def _check_overrides(config: ConfigDict, argv: Sequence[str]) -> None:
  known = field_names(config)
  for field in (match[1] for match in map(_OVERRIDE.match, argv) if match):
    if field not in known:
      near = difflib.get_close_matches(field, known, 1)
      hint = f'did you mean {near[0]}? All are' if near else 'all are'
      raise UserError(f'unknown configuration field {field}; {hint} in paranet_jax/base_config.py')


def _one_line(error: Exception) -> str:
  # ml_collections lists every field beside the misspelt one.
  return ' '.join(re.sub(r'Other fields present: .*\}"\\n', '', str(error)).split())
