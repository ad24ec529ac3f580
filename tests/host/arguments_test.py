"""Paths that users name: URLs and unknown home folders are refused before anything is done."""

import importlib
from pathlib import Path

import pytest

from paranet_jax import config as config_lib
from paranet_jax.base_config import base_config
from paranet_jax.host import arguments
from paranet_jax.host.errors import UserError
from paranet_jax.host.machine import use_compilation_cache
from tests.helpers.running import run_command, run_main

URL = 'expected a local path, found the URL {}; copy or mount it, and name the local folder'
HOME = 'expected a path, found {}, whose home folder is unknown; write it in full, or set HOME'


@pytest.mark.parametrize('path', ['gs://bucket/run', 's3://b', 'file:///x', Path('gs://bucket/run')], ids=str)
def test_a_url_is_refused(path):
  with pytest.raises(UserError) as error:
    arguments.absolute(path)
  assert str(error.value) == URL.format(path)


def test_a_colon_elsewhere_is_a_path(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert arguments.absolute('a:b/c') == tmp_path / 'a:b/c' and arguments.absolute('./gs:/x') == tmp_path / 'gs:/x'


@pytest.mark.parametrize(
  'flag', ['workdir', 'data_dir', 'compilation_cache', 'config.init_from', 'config.data.data_dir']
)
@pytest.mark.parametrize(('path', 'message'), [('gs://bucket/x', URL), ('~nobody_here/x', HOME)])
def test_main_refuses_at_the_start(path, message, flag, tmp_path, monkeypatch):
  config = Path('configs/quickstart.py').absolute()
  monkeypatch.chdir(tmp_path)
  result = run_main(f'--config={config}', '--mode=describe', f'--{flag}={path}')
  assert (result.code, result.err) == (2, f'error: {message.format(path)}\n')
  assert not list(tmp_path.iterdir())


COMMANDS = (
  *('calibrate --workdir={} --threshold=0.9', 'calibrate --workdir=w --data_dir={} --threshold=0.9'),
  *('predict --workdir={} a.png', 'predict --workdir=w --output={} a.png', 'pack --workdir={} --out=o'),
  *('pack --workdir=w --out={}', 'export --workdir={} --out=o', 'export --workdir=w --out={}'),
  *('export --workdir=w --out=o --data_dir={}', 'ensemble {} w', 'ensemble w w --data_dir={}'),
  *('experiments table1 --workdir={}', 'experiments table1 --data_dir={}', 'plan --config={config} --data_dir={}'),
  'adopt --arch=cifar_resnet20 --weights={} --images=i --workdir=w',
  *(f'adopt --arch=cifar_resnet20 --weights=w.pt --{flag}={{}} --workdir=w' for flag in ('images', 'data')),
  'adopt --arch=cifar_resnet20 --weights=w.pt --images=i --workdir={}',
)


@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize(('path', 'message'), [('gs://bucket/x', URL), ('~nobody_here/x', HOME)])
def test_every_command_refuses_them(path, message, command, tmp_path, monkeypatch):
  config = Path('configs/quickstart.py').absolute()
  monkeypatch.chdir(tmp_path)
  name, *flags = command.format(path, config=config).split()
  module = importlib.import_module('paranet_jax.pack' if name == 'pack' else f'paranet_jax.{name}.__main__')
  result = run_command(module.main, *flags)
  assert (result.code, result.err) == (2, f'error: {message.format(path)}\n')
  assert not list(tmp_path.iterdir())


def test_without_a_home_folder(monkeypatch):
  monkeypatch.setattr(arguments.os.path, 'expanduser', lambda path: path)
  monkeypatch.delenv('PARANET_CACHE_DIR', raising=False)
  assert use_compilation_cache() is None
  config_lib.absolute_paths(base_config())
  with pytest.raises(UserError, match='found none for this user; set PARANET_CACHE_DIR or HOME'):
    arguments.cache_folder()
