"""A CIFAR ResNet-56 that others trained gets exits from images without labels, as docs/adopt.md says."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import resnet_weights

from paranet_jax.early.loaded_run import load
from paranet_jax.models.adopted.tensors import to_state_dict
from paranet_jax.weights.pytorch_file import read_tensors
from paranet_jax.weights.state_dict import without_prefix

REPO = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get('PARANET_DATA_DIR', '')).parent
IMAGES, WEIGHTS = DATA / 'cifar10_jpeg.tar.gz', DATA / 'cifar_resnets' / 'resnet56.th'
FIXTURES = REPO / 'tests' / 'fixtures' / 'pytorch'
SECONDS = 900
"""For 2 shared cores. With both cores of an Intel Xeon with AMX it takes 4 min 16 s."""


def command(name, *arguments):
  """What a command prints in a process of its own, as users run it: XLA compiles slow programs in this one."""
  environment = {key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'}
  line = [sys.executable, '-m', f'paranet_jax.{name}', *map(str, arguments)]
  done = subprocess.run(line, cwd=REPO, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout


def predicted(run, folder):
  """The number of images, the share that get the class that their folder is named after, and mean multiply-adds."""
  answers = json.loads(command('predict', f'--workdir={run}', '--format=json', folder))
  names = json.loads((run / 'dataset.json').read_text())['class_names']
  classes = sorted(path.name for path in folder.iterdir())
  right = [names.index(row['label']) == classes.index(Path(row['file']).parent.name) for row in answers]
  return len(right), np.mean(right), np.mean([row['macs'] for row in answers])


@pytest.mark.skipif(
  not (IMAGES.is_file() and WEIGHTS.is_file()),
  reason='needs cifar10_jpeg.tar.gz and cifar_resnets/ beside the folder of PARANET_DATA_DIR',
)
def test_exits_are_learned_without_labels(tmp_path):
  with tarfile.open(IMAGES) as archive:
    archive.extractall(tmp_path, filter='data')
  (root,) = (folder.parent for folder in tmp_path.rglob('test') if folder.is_dir())
  started = time.monotonic()
  run = tmp_path / 'run'
  command('adopt', '--arch=cifar_resnet56', f'--weights={WEIGHTS}', f'--images={root / "train"}', f'--workdir={run}')
  assert time.monotonic() - started < SECONDS

  # The backbone is what it was, bit for bit, and so are its logits.
  loaded = load(run)
  found, given = to_state_dict(jax.device_get(loaded.variables)), without_prefix(read_tensors(WEIGHTS))
  assert found.keys() == given.keys()
  for name, tensor in given.items():
    np.testing.assert_array_equal(found[name], tensor, err_msg=name)
  logits = jax.jit(loaded.model.apply)(loaded.variables, resnet_weights.images())
  np.testing.assert_allclose(logits[-1], np.load(FIXTURES / 'logits_of_trained_56.npy'), rtol=0, atol=1e-4)

  whole = json.loads((run / 'summary.json').read_text())['exits'][-1]['macs_alone']
  count, of_last, _ = predicted(run, root / 'test')
  assert count == 10_000 and of_last == pytest.approx(0.8320, abs=5e-4)
  measured = {}
  for share in (0.5, 0.7):
    command('calibrate', f'--workdir={run}', f'--budget={round(whole * share)}')
    _, right, macs = predicted(run, root / 'test')
    measured[share] = right, macs / whole
  # Measured: 82.97 % at 52.1 % and 83.64 % at 71.0 %, of 83.20 %.
  assert measured[0.5][0] >= of_last - 0.01 and measured[0.5][1] < 0.54, measured
  assert measured[0.7][0] >= of_last - 0.005 and measured[0.7][1] < 0.73, measured
