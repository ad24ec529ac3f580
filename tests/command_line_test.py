"""Tests of parsing a command line and of its errors."""

from pathlib import Path

import pytest
from running import CONFIGS, QUICKSTART, contents, refusal

from paranet_jax.base_config import base_config
from paranet_jax.command_line import load_config, override, parse
from paranet_jax.host.errors import UserError

FILES = {
  'good.py': 'from paranet_jax.base_config import base_config as get_config\n',
  'syntax.py': 'def get_config():\n  return (\n',
  'raises.py': 'def get_config():\n  config = {}\n  return config["model"]\n',
  'imports.py': 'import torch_for_paranet\n',
  'nothing.py': 'config = 1\n',
  'returns_none.py': 'def get_config():\n  pass\n',
  'returns_dict.py': 'def get_config():\n  return {"seed": 0}\n',
  'misspelt.py': (
    'from paranet_jax.base_config import base_config\n\n\n'
    'def get_config():\n  config = base_config()\n  config.train.epoch = 3\n  return config\n'
  ),
  'wrong_type.py': (
    'from paranet_jax.base_config import base_config\n\n\n'
    'def get_config():\n  config = base_config()\n  config.train.epochs = "three"\n  return config\n'
  ),
  'refuses.py': (
    'from paranet_jax.host.errors import UserError\n\n\ndef get_config():\n  raise UserError("one line of its own")\n'
  ),
}


@pytest.fixture(autouse=True)
def _files(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name, text in FILES.items():
    (tmp_path / name).write_text(text)


SEE = '; see --help for the flags, paranet_jax/base_config.py for the fields'
BASE = 'paranet_jax/base_config.py'
GOOD = '--config=good.py'
UNKNOWN = 'unknown configuration field'
FUNCTION = 'must have a function get_config that returns a ConfigDict; see configs/quickstart.py'


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((), 'expected a configuration, found none; set --config=configs/quickstart.py or another, or --workdir'),
    (
      ('--config=far/away.py',),
      'expected a configuration file at far/away.py, found none; set --config, such as configs/quickstart.py',
    ),
    (('--config=rases.py',), 'expected a configuration file at rases.py, found none; did you mean raises.py?'),
    (('--config', 'rases.py'), 'expected a configuration file at rases.py, found none; did you mean raises.py?'),
    (('--config=.',), 'expected a configuration file at ., found none; set --config, such as configs/quickstart.py'),
    (('--config=',), 'expected a configuration file at ., found none; set --config, such as configs/quickstart.py'),
    (('--config',), f'Missing value for flag --config{SEE}'),
    (('--config=raises.py',), "line 3 of raises.py raises KeyError: 'model'; fix it or set --config"),
    (
      ('--config=imports.py',),
      "line 1 of imports.py raises ModuleNotFoundError: No module named 'torch_for_paranet'; fix it or set --config",
    ),
    (('--config=nothing.py',), f'nothing.py {FUNCTION}'),
    (('--config=returns_none.py',), f'returns_none.py {FUNCTION}'),
    (('--config=returns_dict.py',), f'returns_dict.py {FUNCTION}'),
    (('--config=refuses.py',), 'one line of its own'),
    (
      ('--config=raises.py:PN3-ddd',),
      'raises.py raises TypeError: get_config() takes 0 positional arguments but 1 was given; fix it or set --config',
    ),
    ((GOOD, '--config.train.epoch=3'), f'{UNKNOWN} train.epoch; did you mean train.epochs? All are in {BASE}'),
    (('--config.modle.blocks=(1,)', GOOD), f'{UNKNOWN} modle.blocks; did you mean model.blocks? All are in {BASE}'),
    ((GOOD, '--noconfig.train.nestrov'), f'{UNKNOWN} train.nestrov; did you mean train.nesterov? All are in {BASE}'),
    ((GOOD, '--config.zzz=3'), f'{UNKNOWN} zzz; all are in {BASE}'),
    ((GOOD, '--config.=3'), f'{UNKNOWN} ; all are in {BASE}'),
    (
      (GOOD, '--config.train.epochs=abc'),
      f"flag --config.train.epochs=abc: could not convert string to float: 'abc'{SEE}",
    ),
    (
      (GOOD, '--config.train.batch_size=1.5'),
      f"flag --config.train.batch_size=1.5: invalid literal for int() with base 10: '1.5'{SEE}",
    ),
    (
      (GOOD, '--config.train.nesterov=maybe'),
      f"flag --config.train.nesterov=maybe: ('Non-boolean argument to boolean flag', 'maybe'){SEE}",
    ),
    ((GOOD, '--config.train.epochs'), f'Missing value for flag --config.train.epochs{SEE}'),
    ((GOOD, '--mode=tain'), "unknown mode 'tain', expected one of train, eval, describe; set --mode"),
    ((GOOD, '--step=3'), '--step chooses the checkpoint to evaluate, found --mode=train; set --mode=eval'),
    ((GOOD, '--mode=eval', '--step=x'), f"flag --step=x: invalid literal for int() with base 10: 'x'{SEE}"),
    (('--confg=good.py',), f"Unknown command line flag 'confg'. Did you mean: config ?{SEE}"),
    ((GOOD, '--nojson=3'), f'--nojson=3 does not take an argument{SEE}'),
    ((GOOD, 'describe'), "unexpected argument 'describe'; flags are written --name=value"),
    (('describe', GOOD), "unexpected argument 'describe'; flags are written --name=value"),
  ],
)
def test_refusals(tmp_path, arguments, message):
  before = contents(tmp_path)
  assert refusal(*arguments) == message
  assert contents(tmp_path) == before


@pytest.mark.parametrize(
  ('file', 'start', 'end'),
  [
    ('syntax.py', "syntax.py raises SyntaxError: '(' was never closed (syntax.py, line 2)", ''),
    ('misspelt.py', 'line 6 of misspelt.py raises AttributeError: ', 'Did you mean "epochs" instead of "epoch"?\''),
    ('wrong_type.py', 'line 6 of wrong_type.py raises TypeError: ', "cannot be casted to type <class 'float'>"),
  ],
)
def test_errors_in_a_configuration_file(file, start, end):
  message = refusal(f'--config={file}')
  assert message.startswith(start) and message.endswith(f'{end}; fix it or set --config')
  assert len(message) < 250


@pytest.mark.parametrize(
  ('typed', 'field', 'value'),
  [
    (('--config.model.blocks=(1,2,3)',), 'blocks', (1, 2, 3)),
    (('--config.model.blocks=[1,2,3]',), 'blocks', (1, 2, 3)),
    (('--config.model.blocks=1,2,3',), 'blocks', (1, 2, 3)),
    (('--config.model.blocks=(2,)',), 'blocks', (2,)),
    (('--config.model.blocks=2',), 'blocks', (2,)),
    (('--config.model.blocks', '(1,2,3)'), 'blocks', (1, 2, 3)),
    (('--config.model.cascade=2.2,3.3',), 'cascade', '2.2,3.3'),
    (('--config.model.cascade=',), 'cascade', ''),
    (('--config.model.num_classes=7',), 'num_classes', 7),
    (('--config.model.stem_norm',), 'stem_norm', True),
    (('--config.model.stem_norm=false',), 'stem_norm', False),
    (('--config.model.stem_norm', '--noconfig.model.stem_norm'), 'stem_norm', False),
    (('--config.model.image_side=16', '--config.model.image_side=64'), 'image_side', 64),
    (('--config.model.blocks=1,2', '--config.model.blocks=3'), 'blocks', (3,)),
    (('--config.model.blocks=1,2', '--config.model.blocks', '()'), 'blocks', ()),
  ],
)
def test_overrides(typed, field, value):
  for arguments in ((QUICKSTART, *typed), (*typed, QUICKSTART)):
    _, config = parse(['main', *arguments])
    assert config.model[field] == value and type(config.model[field]) is type(value)


def test_numbers_and_negative_numbers():
  _, config = parse(
    ['main', QUICKSTART, '--config.seed', '-3', '--config.train.epochs=2', '--config.loss.exit_weights=(1,.5)']
  )
  assert (config.seed, config.train.epochs, config.loss.exit_weights) == (-3, 2.0, (1, 0.5))
  assert isinstance(config.train.epochs, float)


def test_flags_and_the_argument_of_a_configuration():
  paranet = QUICKSTART.replace('quickstart', 'paranet') + ':PN4-444d'
  values, config = parse(['main', paranet, '--mode=eval', '--step=7', '--json', '--workdir=there'])
  assert (values.mode, values.step, values.json, values.workdir) == ('eval', 7, True, 'there')
  assert config.name == 'PN4-444d' and config.is_locked
  values, _ = parse(['main', paranet])
  assert (values.mode, values.step, values.json, values.workdir) == ('train', None, False, None)


def test_parsing_leaves_no_state():
  parse(['main', QUICKSTART, '--config.train.epochs=2', '--json', '--mode=describe'])
  values, config = parse(['main', GOOD])
  assert config.train.epochs == base_config().train.epochs and not values.json


def test_help(capsys):
  with pytest.raises(SystemExit) as end:
    parse(['main', '--help'])
  assert not end.value.code
  out = capsys.readouterr().out
  assert all(f'{flag}: ' in out for flag in ('--config', '--workdir', '--mode', '--step', '--[no]json', '--[no]help'))


def test_a_configuration_that_exits_is_named(tmp_path):
  path = tmp_path / 'exits.py'
  path.write_text('import sys\nsys.exit(3)\n')
  with pytest.raises(UserError, match=f'^line 2 of {path} raises SystemExit: 3; fix it or set --config$'):
    parse(['main', f'--config={path}'])


@pytest.mark.parametrize(
  ('flag', 'name'),
  [
    ('paranet_jax:quickstart', 'PN3-ddd'),
    ('paranet_jax:paranet:PN4-444d', 'PN4-444d'),
    ('paranet_jax:resnet_110', 'ResNet-110'),
    # Files of 0.1.0.
    (f'{CONFIGS}/pn3_x3d.py', 'PN3-x3d'),
    (f'{CONFIGS}/pn3cut_33d.py', 'PN3cut-33d'),
  ],
)
def test_names_of_shipped_configurations(flag, name):
  assert load_config(flag).name == name


@pytest.mark.parametrize('name', ['paranet_jax:quikstart', 'paranet_jax:'])
def test_a_shipped_configuration_that_does_not_exist(name):
  with pytest.raises(UserError, match=r'^expected a configuration file at .*configs/(quikstart)?\.py, found none; '):
    load_config(name)


def test_an_existing_file_is_not_taken_for_an_old_name():
  Path('pn2_dd.py').write_text(FILES['good.py'].replace('get_config', 'get_config, base_config as other'))
  assert load_config('pn2_dd.py').name == 'PN3-ddd'


def test_an_old_field_name_sets_the_new_one():
  for old in (('--config.train.body_epochs=3',), ('--config.train.body_epochs', '3')):
    _, config = parse(['main', QUICKSTART, *old])
    assert config.train.backbone_epochs == 3.0
  override(config, ['--config.train.body_epochs=4'])
  assert config.train.backbone_epochs == 4.0
