"""A written bundle in use, without JAX: it runs on image files, and damage is reported."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import decoding
import numpy as np
import odd_images
import pytest
import tiny
from exportable import IMAGES, SIDE, early_exit, made, of_family, paranet, write_paranet
from PIL import Image
from safetensors.numpy import load_file
from unwritable import run_with_closed_pipe, run_with_full_disk

from paranet_jax.data.sources.image_files import ImageFiles
from paranet_jax.export.bundle import Request, write_bundle
from paranet_jax.portable import run as runtime
from paranet_jax.predict.image_files import read_batches

BLOCKED = """
import importlib.abc, runpy, sys

class Blocked(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path, target=None):
    if name.partition('.')[0] in ('jax', 'jaxlib', 'flax', 'paranet_jax', 'onnx', 'scipy', 'ml_dtypes'):
      raise AssertionError(f'{name} is imported')

sys.meta_path.insert(0, Blocked())
sys.argv = ['run.py', *sys.argv[1:]]
try:
  runpy.run_path(sys.argv.pop(1), run_name='__main__')
except SystemExit as ended:
  code = ended.code
installed = {name.partition('.')[0] for name, module in sys.modules.items() if 'site-packages' in str(module)}
print(*sorted(installed - {'_distutils_hack'}))
sys.exit(code)
"""


@pytest.fixture(scope='module')
def small():
  """A small network and its plan."""
  return paranet()[:2]


@pytest.fixture(scope='module')
def out(tmp_path_factory, small):
  """The bundle of a small network, whose images exit at every exit."""
  out = tmp_path_factory.mktemp('written') / 'out'
  write_paranet(out, small[1])
  return out


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  """The images as files, and one file that is not an image."""
  folder = tmp_path_factory.mktemp('photos')
  for place, image in enumerate(IMAGES):
    Image.fromarray(image).save(folder / f'{place:02}.png')
  (folder / 'broken.jpg').write_text('x')
  return folder


def rows(bundle, files):
  """The lines that are printed for these images."""
  width = max(map(len, ('file', *files)))
  found = bundle.predict(IMAGES)
  lines = [f'{"file":{width}}  label  probability  exit']
  for file, label, probabilities, exit in zip(files, found.labels, found.probabilities, found.exits, strict=False):
    lines.append(f'{file:{width}}  {"abcde"[label]:5}  {probabilities[label]:11.3f}  {exit:4}')
  return lines


def test_run_without_jax(out, photos):
  command = [sys.executable, '-c', BLOCKED, str(out / 'run.py'), str(photos)]
  result = subprocess.run(command, capture_output=True, text=True, cwd=photos)
  assert result.returncode == 1, result.stderr
  *lines, modules = result.stdout.splitlines()
  files = [str(photos / f'{place:02}.png') for place in range(len(IMAGES))]
  bundle = runtime.load(out)
  assert [line.split() for line in lines] == [line.split() for line in rows(bundle, files)]
  assert modules == 'PIL numpy onnxruntime'
  exits = bundle.predict(IMAGES).exits
  shares = '; '.join(f'exit {number}: {100 * np.mean(exits == number):.1f} %' for number in (1, 2, 3))
  assert result.stderr.splitlines() == [
    f'error: {photos}/broken.jpg: not an image in a known format (PNG, JPEG, GIF, BMP, PPM, WEBP, TIFF)',
    f'12 images, 1 unreadable; {shares}',
  ]


@pytest.fixture
def command(out, photos, monkeypatch, capsys):
  def run(*arguments):
    monkeypatch.chdir(photos)
    code = runtime.main([f'--bundle={out}', *arguments])
    return code, *capsys.readouterr()

  return run


def test_one_line_an_image(command, out):
  files = [f'{place:02}.png' for place in range(12)]
  code, printed, err = command(*files)
  assert (code, printed.splitlines()) == (0, rows(runtime.load(out), files))
  assert err.startswith('12 images; exit 1: ')


def test_a_file_named_twice_is_answered_twice(command):
  code, printed, _ = command('01.png', '00.png', '01.png')
  assert [line.split()[0] for line in printed.splitlines()] == ['file', '01.png', '00.png', '01.png']
  assert printed.splitlines()[1] == printed.splitlines()[3]


@pytest.mark.parametrize(
  'arguments, policy',
  [
    (['--threshold=0.4'], lambda bundle: bundle.with_threshold(0.4)),
    (['--threshold=0', '--threads=1'], lambda bundle: bundle.with_threshold(0)),
    (['--budget=8K'], lambda bundle: bundle.with_budget(8000)),
  ],
)
def test_policies(command, out, arguments, policy):
  files = [f'{place:02}.png' for place in range(12)]
  code, printed, _ = command(*arguments, *files)
  assert (code, printed.splitlines()) == (0, rows(policy(runtime.load(out)), files))


def test_with_a_deadline_the_last_exit_is_reached_if_there_is_time(command):
  code, printed, err = command('--deadline-ms=1e6', '00.png', '01.png')
  assert code == 0 and err == '2 images; exit 1: 0.0 %; exit 2: 0.0 %; exit 3: 100.0 %\n'


@pytest.mark.parametrize(
  'arguments, message',
  [
    ([], 'expected image files or folders of images, found none; name them after the flags'),
    (['--bundle=nowhere', '00.png'], 'expected a bundle with a bundle.json in nowhere, found none; set --bundle'),
    (['--provider=tpu', '00.png'], "unknown provider 'tpu', expected one of cpu, openvino; set --provider"),
    (['--precision=half', '00.png'], "unknown precision 'half', expected one of float32, auto; set --precision"),
    (['--threads=-1', '00.png'], 'expected 0 threads or more, found -1; set --threads'),
    (['--threads=5', '00.png'], 'expected 4 threads at most, one per core, found 5; set --threads'),
    (['--threshold=2', '00.png'], 'expected a threshold from 0 to 1, as max_prob is, found 2.0; set --threshold'),
    (['--budget=1', '00.png'], 'expected a budget of 7,030 multiply-adds or more, found 1; set --budget=7030'),
    (['--budget=x', '00.png'], 'argument --budget: expected a number such as 5M, found x; see --help'),
    (['--deadline-ms=0', '00.png'], 'argument --deadline-ms: expected more than 0 ms, found 0; see --help'),
    (
      ['--deadline-ms=5', '--budget=5M', '00.png'],
      '--deadline-ms ignores thresholds and budgets; leave out --threshold and --budget, or it',
    ),
    (['--labels', '00.png'], 'unrecognized arguments: --labels; see --help'),
  ],
)
def test_refused_arguments(command, monkeypatch, arguments, message):
  monkeypatch.setattr(runtime.os, 'cpu_count', lambda: 4)
  assert command(*arguments) == (2, '', f'error: {message}\n')


@pytest.mark.filterwarnings('ignore')  # Pillow's, about damaged metadata.
def test_odd_images_are_answered_alike_by_predict_and_decoded_alike_in_training(command, out, small, tmp_path):
  files = odd_images.all_files()
  for name, content in files.items():
    (tmp_path / f'{name}.png'.replace('/', '-')).write_bytes(content)
  paths, left_out = runtime.list_images([str(tmp_path)])
  assert len(paths) == len(files) and not left_out
  (batch,) = read_batches(paths, SIDE, 3, len(paths))
  trained, _ = ImageFiles(paths, np.zeros(len(paths), np.int32), SIDE, 3, False).read(range(len(paths)))
  np.testing.assert_array_equal(batch.images, trained)
  uploaded = [decoding.decode(runtime, Path(path).read_bytes(), (SIDE, SIDE, 3), 10**6) for path in paths]
  np.testing.assert_array_equal(batch.images, uploaded)
  code, printed, _ = command(str(tmp_path))
  rows = [re.split(r'  +', line) for line in printed.splitlines()[1:]]
  found = early_exit(*small).predict(batch.images)
  assert code == 0 and [row[0] for row in rows] == batch.files == paths
  assert [row[1] for row in rows] == ['abcde'[label] for label in found.labels]
  assert [int(row[3]) for row in rows] == found.exits.tolist()
  np.testing.assert_allclose([float(row[2]) for row in rows], found.probabilities.max(-1), atol=6e-4)


@pytest.mark.parametrize(
  'module, arguments, message',
  [
    ('onnxruntime', [], 'expected onnxruntime for --provider=cpu, found none; pip install onnxruntime'),
    (
      'openvino',
      ['--provider=openvino'],
      'expected openvino for --provider=openvino, found none; pip install openvino',
    ),
    ('PIL', [], 'expected Pillow to read image files, found none; pip install pillow'),
  ],
)
def test_what_is_not_installed(command, monkeypatch, module, arguments, message):
  monkeypatch.setitem(sys.modules, module, None)
  assert command(*arguments, '00.png') == (2, '', f'error: {message}\n')


def test_standard_output_that_cannot_be_written(out, photos):
  command = [sys.executable, out / 'run.py', photos / '00.png']
  assert run_with_closed_pipe(command) == (141, '')
  assert run_with_full_disk(command) == (
    2,
    'error: standard output cannot be written (No space left on device); make room, or send it elsewhere\n',
  )


def test_the_card_may_be_edited(out, tmp_path):
  folder = shutil.copytree(out, tmp_path / 'bundle')
  (folder / 'README.md').write_text('mine')
  np.testing.assert_array_equal(runtime.load(folder).predict(IMAGES).exits, runtime.load(out).predict(IMAGES).exits)


def test_a_stage_that_openvino_cannot_load(out, tmp_path, monkeypatch):
  def compile_model(*_):
    raise RuntimeError('Exception from src/core:\nno such operation')

  core = types.SimpleNamespace(compile_model=compile_model)
  monkeypatch.setitem(sys.modules, 'openvino', types.SimpleNamespace(Core=lambda: core))
  with pytest.raises(runtime.BundleError) as error:
    runtime.load(out, 'openvino')
  assert str(error.value) == (
    f'openvino cannot load {out}/stage_1.onnx (Exception from src/core: no such operation); '
    'export the run again, or pip install -U openvino'
  )


@pytest.mark.filterwarnings('ignore:os.fork')  # Importing OpenVINO starts a process.
def test_openvino(out):
  pytest.importorskip('openvino', reason='needs openvino: pip install -r benchmarks/requirements.txt')
  ours, theirs = runtime.load(out).predict(IMAGES), runtime.load(out, 'openvino').predict(IMAGES)
  np.testing.assert_array_equal(theirs.exits, ours.exits)
  np.testing.assert_allclose(theirs.probabilities, ours.probabilities, atol=1e-4)


def test_a_run_that_is_not_calibrated(tmp_path):
  """Its last exit answers, and nothing is said to have been measured."""
  run, _, logits = made(tiny.dense(2))  # What is converted fastest.
  run = dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, class_names=tuple('abc')))
  run.config.name = 'PN2-dd'
  write_bundle(Request(tmp_path, tmp_path / 'out', ('onnx',), 'float32'), run, run.plan, IMAGES)
  bundle = runtime.load(tmp_path / 'out')
  found = bundle.predict(IMAGES)
  assert found.exits.tolist() == [2] * len(IMAGES)
  np.testing.assert_array_equal(found.labels, logits[-1].argmax(-1))
  assert set(bundle.with_threshold(0.0).predict(IMAGES).exits) == {1}
  exits = json.loads((tmp_path / 'out/exits.json').read_text())
  assert (exits['policy'], exits['target'], exits['expected'], exits['test']) == ('full', {}, None, None)
  card = (tmp_path / 'out/README.md').read_text()
  assert 'Not calibrated: every image goes to exit 2, and nothing was measured.' in card
  assert 'metrics:' not in card and 'paranet_jax.calibrate' not in card


def test_a_bundle_with_the_names_of_pytorch(tmp_path):
  """The state dict is among the files, and it is what `hf:OWNER/NAME` finds."""
  model = of_family('resnet', shortcut_padding='both_sides', exits='stages')
  run, plan, _ = made(model)
  run = dataclasses.replace(run, config=tiny.small('resnet', shortcut_padding='both_sides', exits='stages'))
  write_bundle(Request(tmp_path, tmp_path / 'out', ('stablehlo',), 'float32'), run, plan, IMAGES)
  tensors = load_file(tmp_path / 'out/model.safetensors')
  np.testing.assert_array_equal(tensors['linear.weight'].T, run.variables['params']['exit_3']['classifier']['kernel'])
  assert tensors['conv1.weight'].shape == (16, 3, 3, 3) and not any('exit' in name for name in tensors)
  assert '`model.safetensors`: the network without its added exits' in (tmp_path / 'out/README.md').read_text()
  assert 'model.safetensors' in json.loads((tmp_path / 'out/bundle.json').read_text())['checksums']
