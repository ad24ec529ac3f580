"""The registry of policies: each is found by name, and another package's policy reaches the command line."""

import json
import shutil

import numpy as np
import plugin
import pytest
from PIL import Image
from running import run_command

import paranet_jax
from paranet_jax.calibrate import calibration
from paranet_jax.calibrate.__main__ import main as calibrate
from paranet_jax.calibrate.flags import parse
from paranet_jax.early.policies import POLICIES, Policy, default_policy, find_policy, policies, register_policy
from paranet_jax.export import bundle
from paranet_jax.export.__main__ import main as export
from paranet_jax.host.errors import UserError
from paranet_jax.portable import run
from paranet_jax.portable.run import SCORES
from paranet_jax.predict.__main__ import main as predict

PLUGIN = """
from paranet_jax.early.policies import Choice, Flag, Policy
from paranet_jax.early.policies.shared import shared_thresholds

def level(text):
  if not text.isdecimal():
    raise ValueError('must be a whole number')
  return int(text)

def choose(samples, target):
  return Choice(shared_thresholds(target['level'], samples.costs.num_exits))

LEVEL = Flag('level', 'level', level, 7, 'how confident a sample must be')
POLICY = Policy('plugin', 'one level', {'budget': ('max_prob',)}, choose, (LEVEL,))
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
  """A package that provides a policy."""
  plugin.install(tmp_path, monkeypatch, POLICIES, 'a_plugin', ['plugin = a_plugin:POLICY'], PLUGIN)


def test_every_built_in_policy():
  assert [policy.name for policy in policies()] == ['optimal', 'quota', 'shared', 'ltt', 'crc']
  assert all(find_policy(policy.name) is policy for policy in policies())
  defaults = {
    (target, score): default_policy(target, score) for target in ('budget', 'risk', 'threshold') for score in SCORES
  }
  names = {place: policy and policy.name for place, policy in defaults.items()}
  ranking = {'budget': 'optimal', 'risk': 'ltt', 'threshold': 'shared'}
  patience = {'budget': 'shared', 'risk': None, 'threshold': 'shared'}
  assert names == {(t, s): (patience if s == 'patience' else ranking)[t] for t, s in defaults}


def test_a_name_is_registered_once(monkeypatch):
  monkeypatch.setattr(POLICIES, 'known', dict(POLICIES.known))
  mine = Policy('mine', 'mine', {}, lambda samples, target: None)
  register_policy(mine)
  register_policy(mine)
  assert find_policy('mine') is mine
  with pytest.raises(ValueError, match="there is already a policy 'mine'"):
    register_policy(Policy('mine', 'another', {}, lambda samples, target: None))


def test_a_policy_from_an_entry_point_and_its_flag(installed):
  request = parse(['--workdir=a', '--budget=3M', '--policy=plugin'])
  assert request.policy.name == 'plugin' and request.target == {'budget': 3e6, 'unit': 'macs', 'level': 7}
  assert parse(['--workdir=a', '--budget=3M', '--policy=plugin', '--level=2']).target['level'] == 2
  for flags, message in (
    (['--policy=plugin', '--level=x'], 'argument --level: must be a whole number, found x; see --help'),
    (['--level=2'], '--level belongs to --policy=plugin, found optimal; leave out --level'),
    (['--policy=other'], "unknown policy 'other', expected one of optimal, quota, shared, plugin; set --policy"),
  ):
    with pytest.raises(UserError) as error:
      parse(['--workdir=a', '--budget=3M', *flags])
    assert str(error.value) == message


def test_without_the_plugin_there_is_no_such_policy():
  assert find_policy('plugin') is None


def test_a_policy_from_outside_serves_every_command(finished_run, installed, tmp_path, monkeypatch):
  def logits(model, variables, exits, preprocessing, split, batch_size):
    return np.random.default_rng(0).normal(size=(len(exits), len(split), 10)).astype(np.float32)

  monkeypatch.setattr(calibration, 'split_logits', logits)
  same = {'images': 1, 'labels': 1.0, 'exits': 1.0, 'exit_labels': [1.0, 1.0], 'logits': 0.0}
  workdir = shutil.copytree(finished_run, tmp_path / 'run')
  alone = [cost['macs_alone'] for cost in json.loads((workdir / 'summary.json').read_text())['exits']]
  flags = f'--budget={alone[2]}', '--policy=plugin', '--level=0'
  result = run_command(calibrate, f'--workdir={workdir}', *flags)
  assert (result.code, result.err) == (0, '') and ': one level, for a mean of ' in result.out
  monkeypatch.undo()  # The package is not installed where the run is used.
  loaded = paranet_jax.load(workdir)
  assert (loaded.exits.policy, loaded.exits.target['level'], loaded.exits.thresholds) == ('plugin', 0, (0.0, 0.0))
  image = np.zeros((16, 16, 3), np.uint8)
  Image.fromarray(image).save(tmp_path / 'a.png')
  result = run_command(predict, f'--workdir={workdir}', tmp_path / 'a.png')
  assert (result.code, result.out.splitlines()[1].split()[0]) == (0, str(tmp_path / 'a.png'))
  monkeypatch.setattr(bundle, 'compare', lambda *_: same)
  assert run_command(export, f'--workdir={workdir}', f'--out={tmp_path / "bundle"}').code == 0
  assert run.load(tmp_path / 'bundle').predict_one(image).exit == 2
  assert 'plugin' in (tmp_path / 'bundle' / 'README.md').read_text()
