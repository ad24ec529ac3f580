"""A bundle is read as a run, from a folder or from a hub."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import hub_server
import jax
import numpy as np
import pytest
from safetensors.numpy import load, save

import paranet_jax
from paranet_jax.early.bundle_folder import FILES
from paranet_jax.host.errors import UserError

FIXTURES = Path(__file__).resolve().parents[1] / 'fixtures/v0_1_0'
BUNDLE = FIXTURES / 'bundle'
AGAIN = 'copy or export the bundle again'


def test_a_bundle_is_the_run_that_it_was_exported_from():
  run, bundle = paranet_jax.load(FIXTURES / 'run'), paranet_jax.load(BUNDLE)
  assert bundle.step == run.step and bundle.model == run.model and bundle.plan == bundle.exits
  assert bundle.exits.fingerprint == run.exits.fingerprint
  for name in ('class_names', 'mean', 'std'):
    assert getattr(bundle.dataset, name) == getattr(run.dataset, name)
  jax.tree.map(np.testing.assert_array_equal, bundle.variables, run.variables)


def test_predictions():
  expected = json.loads((FIXTURES / 'expected.json').read_text())['bundle']
  found = paranet_jax.EarlyExit.load(BUNDLE).predict(np.load(FIXTURES / 'images.npy'))
  assert (found.labels.tolist(), found.exits.tolist()) == (expected['labels'], expected['exits'])


@pytest.mark.parametrize(
  ('dtypes', 'told'),
  [
    ({'dtype': 'int8', 'calibrated_dtype': 'int8'}, True),
    ({'dtype': 'int8', 'calibrated_dtype': 'float32'}, False),
    ({'dtype': 'float32', 'calibrated_dtype': 'float32'}, False),
  ],
)
def test_a_bundle_that_was_calibrated_in_another_dtype(tmp_path, capsys, dtypes, told):
  folder = shutil.copytree(BUNDLE, tmp_path / 'bundle')
  edit('bundle.json', **dtypes)(folder)
  paranet_jax.load(folder)
  line = f'{folder} was calibrated in int8 and is read in float32: nothing is promised of it here\n'
  assert capsys.readouterr().err == (line if told else '')


def files_of(folder):
  return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_from_a_hub(tmp_path, monkeypatch):
  with hub_server.used(tmp_path, monkeypatch) as hub:
    hub.add('me/bundle', files_of(BUNDLE), 'v1')
    hub.add('me/run', files_of(FIXTURES / 'packed'))
    hub.add('me/other', {'model.safetensors': b''})
    bundle, run = paranet_jax.load('hf:me/bundle@v1'), paranet_jax.load('hf:me/run')
    assert bundle.exits == paranet_jax.load(BUNDLE).exits
    assert run.exits == paranet_jax.load(FIXTURES / 'packed').exits
    assert {path.name for path in bundle.workdir.iterdir()} == set(FILES)  # And no model files.
    with pytest.raises(UserError, match=r'expected bundle.json, config.json, .* in hf:me/other, found none of these'):
      paranet_jax.load('hf:me/other')
    with pytest.raises(UserError, match='expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION, found'):
      paranet_jax.load('hf:me/run:config.json')


def edit(name, **changes):
  def act(folder):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

  return act


def sealed(name, change):
  """Changes the content of a file, and its checksum with it."""

  def act(folder):
    content = change((folder / name).read_bytes())
    (folder / name).write_bytes(content)
    known = json.loads((folder / 'bundle.json').read_text())['checksums']
    edit('bundle.json', checksums=known | {name: hashlib.sha256(content).hexdigest()})(folder)

  return act


def of_another_network(content):
  arrays = load(content)
  name = next(name for name in arrays if name.startswith('params/exit_1/') and name.endswith('/kernel'))
  return save(arrays | {name: arrays[name][:-1]})


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (
      sealed('classes.json', lambda _: b'['),
      f'{{0}} does not have the contents of a bundle (Expecting value: line 1 column 2 (char 1)); {AGAIN}',
    ),
    (
      sealed('preprocessing.json', lambda _: b'{"mean": [0.5]}'),
      f"{{0}} does not have the contents of a bundle ('std'); {AGAIN}",
    ),
    (
      sealed('weights.safetensors', lambda content: content[:-1]),
      '{0} does not have the contents of a bundle (Error while deserializing',
    ),
    (
      sealed('weights.safetensors', of_another_network),
      '{0}/weights.safetensors does not fit {0}/config.json: ',
    ),
    (edit('exits.json', score='margin'), '{0}/exits.json is not what was exported: expected sha256 '),
    (
      lambda folder: (folder / 'weights.safetensors').unlink(),
      f'expected {{0}}/weights.safetensors, found none; {AGAIN}',
    ),
    (edit('bundle.json', checksums=None), f'{{0}}/bundle.json lacks the checksums or the step of a bundle; {AGAIN}'),
    (lambda folder: (folder / 'bundle.json').write_text('{'), '{0}/bundle.json is not a JSON object ('),
  ],
)
def test_a_damaged_bundle(tmp_path, damage, message):
  folder = shutil.copytree(BUNDLE, tmp_path / 'bundle')
  damage(folder)
  with pytest.raises(UserError) as error:
    paranet_jax.load(folder)
  assert str(error.value).startswith(message.format(folder))


def test_without_safetensors(monkeypatch):
  monkeypatch.setitem(sys.modules, 'safetensors', None)
  with pytest.raises(UserError, match='^a bundle is read with safetensors, found none; pip install safetensors$'):
    paranet_jax.load(BUNDLE)


def test_another_step():
  with pytest.raises(UserError, match=f'expected step 3 in {BUNDLE}, found a bundle of step 140; leave out the step'):
    paranet_jax.load(BUNDLE, step=3)
