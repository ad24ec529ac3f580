"""`python -m paranet_jax.export`: the files it writes, the requests it rejects, and no partial output."""

import copy
import dataclasses
import hashlib
import json
import shlex
import shutil
import types
from pathlib import Path

import hub_server
import jax
import numpy as np
import onnx
import pytest
import yaml
from jax import export as jax_export
from PIL import Image
from running import contents
from safetensors.numpy import load_file

import paranet_jax
from paranet_jax.calibrate import __main__ as calibrate
from paranet_jax.calibrate.flags import _parser
from paranet_jax.costs import exit_costs
from paranet_jax.data.augment import normalize
from paranet_jax.data.dataset import Split, StoredImages
from paranet_jax.early.exit_plan import without_local_paths
from paranet_jax.export import __main__ as export
from paranet_jax.export import bundle as bundle_lib
from paranet_jax.export import compare as compare_lib
from paranet_jax.export import contents as contents_lib
from paranet_jax.export import stablehlo
from paranet_jax.export.card import model_card
from paranet_jax.host.arguments import absolute, without_paths
from paranet_jax.host.errors import UserError
from paranet_jax.portable import run as runtime
from paranet_jax.runs import trained

PRETRAINED = Path(__file__).resolve().parents[2] / 'pretrained'
FINGERPRINT = json.loads((PRETRAINED / 'exits.json').read_text())['fingerprint']
NOISE = np.random.default_rng(1).integers(0, 256, (24, 32, 32, 3), np.uint8)


@pytest.fixture(scope='module', autouse=True)
def converted():
  """Loads the run, cuts and converts its stages only once; each test writes its own files."""

  def once(function, key):
    kept = {}

    def cached(*arguments):
      name = key(*arguments)
      kept[name] = kept.get(name) or function(*arguments)
      return copy.deepcopy(kept[name]) if isinstance(kept[name], onnx.ModelProto) else kept[name]

    return cached

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(bundle_lib, 'cut', once(bundle_lib.cut, lambda *arguments: arguments[2:]))
    patch.setattr(bundle_lib, 'load', once(bundle_lib.load, str))
    patch.setattr(bundle_lib, 'exit_costs', once(bundle_lib.exit_costs, lambda *_: 'costs'))
    patch.setattr(contents_lib, 'mac_costs', once(contents_lib.mac_costs, lambda *arguments: arguments[2:]))
    for module, name in ((bundle_lib, 'onnx_stage'), (stablehlo, 'stablehlo_stage')):
      patch.setattr(module, name, once(getattr(module, name), lambda spec: spec.name))
    yield


@pytest.fixture(scope='module')
def run():
  return paranet_jax.load(PRETRAINED)


@pytest.fixture(scope='module')
def costs(run):
  return exit_costs(run.model, run.image_shape)


@pytest.fixture(scope='module')
def logits(run):
  """Logits of every exit on the noise, float32 [3, 24, 100]."""
  images = normalize(NOISE, run.dataset.mean, run.dataset.std)
  return np.stack(jax.jit(run.model.apply)(run.variables, images))


@pytest.fixture(scope='module')
def out(tmp_path_factory):
  """A bundle in both formats, as the command writes it."""
  folder = tmp_path_factory.mktemp('exported') / 'bundle'
  assert export.main([f'--workdir={PRETRAINED}', f'--out={folder}', '--format=both']) == 0
  return folder


@pytest.fixture
def held_out(logits, monkeypatch):
  """Replaces the run's held-out images with noise, and their logits in JAX with those computed above.

  Returns:
    The numbers of the images that are compared, once they are.
  """
  numbers, compared = {image.tobytes(): number for number, image in enumerate(NOISE)}, []

  def computed_above(*given):
    compared[:] = [numbers[image.tobytes()] for image in given[4].images]
    return logits[:, compared]

  split = Split(NOISE, np.zeros(len(NOISE), np.int32))
  monkeypatch.setattr(trained, 'load_dataset', lambda *_, **__: type('Dataset', (), {'held_out': split}))
  monkeypatch.setattr(compare_lib, 'split_logits', computed_above)
  return compared


def test_files(out):
  stages = [f'stage_{number}.{kind}' for number in (1, 2, 3) for kind in ('onnx', 'stablehlo')]
  facts = ['bundle.json', 'classes.json', 'config.json', 'exits.json', 'preprocessing.json']
  assert sorted(path.name for path in out.iterdir()) == sorted(
    [*stages, *facts, 'README.md', 'run.py', 'weights.safetensors']
  )
  assert list(out.parent.iterdir()) == [out]
  # No path of the machine that wrote it.
  assert not [
    path.name for path in out.iterdir() if str(Path(stablehlo.__file__).parents[1]).encode() in path.read_bytes()
  ]
  assert (out / 'run.py').read_bytes() == Path(runtime.__file__).read_bytes()
  exits = json.loads((PRETRAINED / 'exits.json').read_text())
  exits['provenance']['command'] = 'python -m paranet_jax.calibrate --workdir=FOLDER --budget=11M --audit'
  assert json.loads((out / 'exits.json').read_text()) == exits
  dataset = json.loads((PRETRAINED / 'dataset.json').read_text())
  assert json.loads((out / 'classes.json').read_text()) == dataset['class_names']
  preprocessing = json.loads((out / 'preprocessing.json').read_text())
  assert preprocessing == {
    'side': 32,
    'channels': 3,
    'mean': dataset['mean'],
    'std': dataset['std'],
    'resize': 'shorter side to `side` (bilinear, antialiased), center crop',
    'short_side': None,
    'interpolation': 'bilinear',
    'normalize': '(pixel / 255 - mean) / std, a channel',
  }


def test_checksums(out):
  checksums = json.loads((out / 'bundle.json').read_text())['checksums']
  assert {*checksums, 'README.md', 'bundle.json'} == {path.name for path in out.iterdir()}
  for name, digest in checksums.items():
    assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest


def test_stage_descriptions(out):
  bundle = json.loads((out / 'bundle.json').read_text())
  assert (bundle['visited_stages'], bundle['all_stages']) == (['stage_1', 'stage_2', 'stage_3'],) * 2
  assert bundle['all_macs'] == json.loads((PRETRAINED / 'exits.json').read_text())['macs']
  carried = {'images': ['batch', 32, 32, 3]}
  for name in bundle['all_stages']:
    spec, model = bundle['stages'][name], onnx.load(out / bundle['stages'][name]['file'])
    given = [('logits', ['batch', 100]), *((tensor['name'], tensor['shape']) for tensor in spec['gives'])]
    assert {tensor['name']: tensor['shape'] for tensor in spec['takes']}.items() <= carried.items()
    assert _shapes(model.graph.input) == [(tensor['name'], tensor['shape']) for tensor in spec['takes']]
    assert _shapes(model.graph.output) == given
    # Stage i + 1 takes exactly what stage i passes on.
    carried = {key: shape for key, shape in carried.items() if key in spec['keeps']} | dict(given[1:])
  assert carried == {}


def _shapes(values):
  return [(v.name, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]) for v in values]


def test_graph_is_clean(out):
  """Only images and pooled features are transposed, and each norm is folded or a single operation."""
  pools = {'AveragePool', 'GlobalAveragePool', 'MaxPool'}
  known = pools | {'BatchNormalization', 'Concat', 'Conv', 'Gemm', 'Relu', 'Squeeze', 'Transpose'}
  for number in (1, 2, 3):
    model = onnx.load(out / f'stage_{number}.onnx')
    found = [node.op_type for node in model.graph.node]
    assert set(found) <= known
    transposed = [node.input[0] for node in model.graph.node if node.op_type == 'Transpose']
    pooled = [node.output[0] for node in model.graph.node if node.op_type == 'GlobalAveragePool']
    assert transposed == ['images', *pooled]
    # The second norm of a dense layer is part of the convolution before it.
    layers = 3 * number
    assert (found.count('Conv'), found.count('BatchNormalization')) == (2 * layers + number, layers + number)
    assert [entry.domain for entry in model.opset_import] == ['']


def test_logits(out, logits):
  bundle = runtime.load(out)
  carried = bundle.begin(NOISE)
  for expected, number in zip(logits, bundle.visited, strict=True):
    carried, found = bundle.stage(number)(carried)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-4)


def test_stablehlo(out, run, logits):
  bundle = json.loads((out / 'bundle.json').read_text())
  assert bundle['formats'] == ['onnx', 'stablehlo']
  for count, names in ((24, bundle['all_stages']), (3, ['stage_1'])):
    carried = {'images': normalize(NOISE[:count], run.dataset.mean, run.dataset.std)}
    for expected, name in zip(logits, names, strict=False):
      entry, spec = bundle['stablehlo'][name], bundle['stages'][name]
      stage = jax_export.deserialize((out / entry['file']).read_bytes())
      assert list(entry['inputs']) == [tensor['name'] for tensor in spec['takes']]
      assert entry['platforms'] == ['cpu', 'cuda', 'tpu']
      found, *given = stage.call(*(carried[tensor['name']] for tensor in spec['takes']))
      np.testing.assert_allclose(found, expected[:count], rtol=1e-6, atol=1e-4)
      carried |= dict(zip(list(entry['outputs'])[1:], given, strict=True))
  assert bundle['stablehlo']['stage_2']['inputs'] == {
    'images': 'float32[batch,32,32,3]',
    'features_1_1': 'float32[batch,4,4,160]',
  }


def test_weights(out, run):
  found = load_file(out / 'weights.safetensors')
  leaves = jax.tree_util.tree_leaves_with_path(run.variables)
  assert len(found) == len(leaves)
  for path, leaf in leaves:
    np.testing.assert_array_equal(found['/'.join(key.key for key in path)], leaf)


def test_model_card(out, run):
  early = run.exits.test
  shares = early['accuracy'], early['exit_accuracy'][0], early['shares'][0]
  accuracy, first, leaving = (f'{100 * share:.2f}' for share in shares)
  _, header, text = (out / 'README.md').read_text().split('---\n', 2)
  metadata = yaml.safe_load(header)
  assert metadata['pipeline_tag'] == 'image-classification' and metadata['datasets'] == ['cifar100']
  (model,) = metadata['model-index']
  assert model['results'][0]['metrics'] == [{'type': 'accuracy', 'value': early['accuracy']}]
  for line in (
    f'| 1 | {first} | {leaving} | 4.14 M | 166.9 k |',
    f'| as calibrated | {accuracy} | | {early["cost_macs"] / 1e6:.2f} M | |',
    '| stage_1.onnx | images [batch, 32, 32, 3] | logits, features_1_1 [batch, 160, 4, 4] |',
    'python -m paranet_jax.main --workdir=FOLDER',
  ):
    assert line in text.splitlines()
  assert 'without a stated license' in text and 'jax2onnx' in text and 'Python 3.10 or newer' in text
  assert (metadata['license'], metadata['license_name']) == ('other', 'that-of-the-data')
  found = json.loads((out / 'bundle.json').read_text())['agreement']['logits']
  noise = f'on 16 noise images: logits differ by at most {found:.1e}, relative to the largest.'
  assert noise in text and 'the same exits' not in text


def test_model_card_with_agreement_on_held_out_images(out, run, costs):
  agreement = {'images': 1000, 'of': 'held-out', 'labels': 0.999, 'exits': 0.9874, 'logits': 0.01}
  bundle = json.loads((out / 'bundle.json').read_text()) | {'agreement': agreement}
  card = model_card(run, run.exits, costs, bundle)
  assert 'on 1,000 held-out images: 99.90 % the same labels, 98.74 % the same exits.\n' in card


@pytest.mark.parametrize(
  'formats, library, tags',
  [
    (['onnx'], 'onnxruntime', ['onnx']),
    (['stablehlo'], 'jax', ['stablehlo']),
    (['onnx', 'stablehlo'], 'onnxruntime', ['onnx', 'stablehlo']),
  ],
)
def test_model_card_follows_the_formats(out, run, costs, formats, library, tags):
  bundle = json.loads((out / 'bundle.json').read_text()) | {'formats': formats}
  _, header, text = model_card(run, run.exits, costs, bundle).split('---\n', 2)
  metadata = yaml.safe_load(header)
  assert metadata['library_name'] == library
  assert metadata['tags'] == [*tags, 'early-exit', 'image-classification']
  assert ('python run.py' in text) == ('onnx' in formats)
  assert 'shows it in a browser' not in text
  assert 'shows it in a browser' in model_card(run, run.exits, costs, bundle | {'web': ['index.html']})
  assert ("export.deserialize(Path('stage_1.stablehlo').read_bytes())" in text) == ('onnx' not in formats)


def test_model_card_names_the_promises(out, run, costs):
  bundle = json.loads((out / 'bundle.json').read_text())
  promised = 'Thresholds were chosen so that the 5,000 held-out images cost a mean of 11.00 M multiply-adds at most.'
  assert f'\n\n## What is promised\n\n- {promised}' in model_card(run, run.exits, costs, bundle)
  made = {'reject': {'risk': 0.02, 'delta': 0.1}, 'sets': {'coverage': 0.9}, 'seen': {'images': 9}}
  card = model_card(run, dataclasses.replace(run.exits, **made), costs, bundle)
  for words in ('at most 2 % of the answers', 'a probability of at least 90 %', '- `run.py --watch=STATE.json` tests'):
    assert words in card
  assert 'What is promised' not in model_card(run, dataclasses.replace(run.exits, policy='full'), costs, bundle)


def test_model_card_without_labels(out, run, costs):
  bundle = json.loads((out / 'bundle.json').read_text())
  test = run.exits.test | {
    'accuracy': None,
    'exit_accuracy': None,
    'agreement': 0.75,
    'exit_agreement': [0.5, 0.75, 1.0],
    'shares': [0.3614, 0.4364, 0.2022],
  }
  card = model_card(run, dataclasses.replace(run.exits, test=test), costs, bundle)
  assert '| exit | same answer as exit 3 on test images (%) | share' in card
  assert '| 1 | 50.00 | 36.14 |' in card and '| as calibrated | 75.00 | |' in card
  assert 'accura' not in card.lower() and 'agreements were' in card


def test_model_card_of_weights_from_elsewhere(out, run, costs):
  bundle = json.loads((out / 'bundle.json').read_text())
  facts = dataclasses.replace(run.dataset, name='photos', counts=dict.fromkeys(run.dataset.counts, 0))
  card = model_card(dataclasses.replace(run, dataset=facts), run.exits, costs, bundle)
  assert 'The weights were trained elsewhere, on photos; ask their provider for the terms.' in card
  assert 'Data:' not in card and 'paranet_jax.main' not in card


def test_local_paths_are_removed(tmp_path):
  config = (PRETRAINED / 'config.json').read_text()
  copy = shutil.copytree(PRETRAINED, tmp_path / 'mine' / 'run')
  fields = json.loads(config)
  fields['data']['data_dir'] = fields['init_from'] = f'{tmp_path}/mine/other'
  fields['loss'] |= {'distill': 'all', 'teacher': 'run', 'teacher_run': f'{tmp_path}/mine/teacher'}
  (copy / 'config.json').write_text(json.dumps(fields))
  exits = json.loads((copy / 'exits.json').read_text())
  # The run was calibrated in another folder and moved.
  places = f'--workdir={tmp_path}/elsewhere/run --compilation_cache {tmp_path}/cache --data-dir={tmp_path}/mine'
  exits['provenance']['command'] = f'python -m paranet_jax.calibrate {places} --budget=8M'
  (copy / 'exits.json').write_text(json.dumps(exits))
  assert export.main([f'--workdir={copy}', f'--out={tmp_path}/out', '--format=both']) == 0
  images = tmp_path / 'mine' / 'images'
  images.mkdir()
  for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (20, 16, 16), np.uint8)):
    Image.fromarray(pixels).save(images / f'{number}.png')
  places = f'--bundle={tmp_path}/out', f'--images={images}', '--out', f'{tmp_path}/again'
  assert calibrate.main([*places, '--threshold=0.5']) == 0
  for path in (*(tmp_path / 'out').iterdir(), *(tmp_path / 'again').iterdir()):
    assert str(tmp_path).encode() not in path.read_bytes(), path
  config = json.loads((tmp_path / 'again/config.json').read_text())
  assert (config['init_from'], config['loss']['teacher_run']) == ('other', 'teacher')
  provenance = json.loads((tmp_path / 'again/exits.json').read_text())['provenance']
  assert provenance['recalibrated']['command'] == (
    'python -m paranet_jax.calibrate --bundle=FOLDER --images=FOLDER --out FOLDER --threshold=0.5'
  )
  command = 'python -m paranet_jax.calibrate --workdir=FOLDER --compilation_cache FOLDER --data-dir=FOLDER --budget=8M'
  assert command in (tmp_path / 'out/README.md').read_text().splitlines()
  assert json.loads((tmp_path / 'out/exits.json').read_text())['provenance']['command'] == command


@pytest.mark.parametrize(
  'flags, written',
  [
    ('--workdir=/home/me/run --budget=8M', '--workdir=FOLDER --budget=8M'),
    ('--budget=8M --workdir run', '--budget=8M --workdir FOLDER'),
    ("'--workdir=/home/it'\"'\"'s me/run' --risk=0.1", '--workdir=FOLDER --risk=0.1'),
    ("--workdir '/home/it'\"'\"'s me/run' --risk=0.1", '--workdir FOLDER --risk=0.1'),
    ("--workdir='/home/me", '--workdir=FOLDER'),
    ('--bundle mine/bundle --images=mine --out=../other', '--bundle FOLDER --images=FOLDER --out=FOLDER'),
    ('--own-table=/home/me/table --other ~/mine --budget=2.5ms', '--own-table=FOLDER --other FOLDER --budget=2.5ms'),
  ],
)
def test_paths_in_a_command(run, flags, written):
  plan = dataclasses.replace(run.exits, provenance={'command': f'python -m paranet_jax.calibrate {flags}'})
  assert without_local_paths(plan).provenance == {'command': f'python -m paranet_jax.calibrate {written}'}


def test_every_flag_of_calibrate_with_a_path_is_known():
  actions = [
    action
    for action in _parser()._actions
    if action.metavar in ('RUN', 'DIR', 'FOLDER') or action.type is absolute or 'folder' in (action.help or '')
  ]
  assert {action.dest for action in actions} == {'workdir', 'bundle', 'images', 'out', 'compilation_cache', 'data_dir'}
  for flag in (flag for action in actions for flag in action.option_strings):
    assert without_paths(f'calibrate {flag}=mine {flag} mine') == f'calibrate {flag}=FOLDER {flag} FOLDER'


@pytest.mark.parametrize('dtype, weights', [('float16', {'FLOAT16'}), ('int8', {'FLOAT', 'INT32', 'INT8', 'UINT8'})])
def test_reduced_precision(dtype, weights, tmp_path, held_out, logits, capsys):
  assert export.main([f'--workdir={PRETRAINED}', f'--out={tmp_path}/out', f'--dtype={dtype}']) == 0
  bundle = json.loads((tmp_path / 'out/bundle.json').read_text())
  found, count = bundle['agreement'], {'float16': 24, 'int8': 12}[dtype]  # Half of them calibrate int8.
  assert (found['images'], found['of']) == (count, 'held-out')
  assert 0 < found['logits'] < {'float16': 0.01, 'int8': 0.5}[dtype]
  assert found['labels'] >= {'float16': 0.9, 'int8': 0.5}[dtype]
  assert len(set(held_out)) == count
  images, theirs = NOISE[held_out], logits[:, held_out]
  plan = json.loads((PRETRAINED / 'exits.json').read_text())
  sure = [runtime.confidence(z, 'max_prob', t) for z, t in zip(theirs, plan['temperatures'], strict=True)]
  taken = [next(k for k in range(3) if sure[k][i] >= plan['confidence_thresholds'][k]) for i in range(count)]
  ours = runtime.load(tmp_path / 'out').predict(images)
  assert found['exits'] == np.mean(ours.exits == np.array(taken) + 1)
  assert found['labels'] == np.mean(ours.labels == theirs[taken, np.arange(count)].argmax(-1))
  out, err = capsys.readouterr()
  percent = [f'{100 * found[key]:.2f} % the same {key}' for key in ('labels', 'exits')]
  assert f'on {count} held-out images: {percent[0]}, {percent[1]}' in out and not err
  # Another network than the one that was calibrated.
  assert f'\ncalibrated in float32: nothing is promised in {dtype} before it is calibrated on images: ' in out
  card = (tmp_path / 'out/README.md').read_text()
  assert '## What was promised\n' in card and '## What is promised' not in card and '--watch' not in card
  assert 'model-index' not in card and json.loads((tmp_path / 'out/exits.json').read_text()).get('seen') is None
  model = onnx.load(tmp_path / 'out/stage_2.onnx')
  assert {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer} - {'INT64'} == weights
  size = (tmp_path / 'out/stage_3.onnx').stat().st_size
  assert size < {'float16': 1_200_000, 'int8': 800_000}[dtype]  # 1.9 MB in float32.


@pytest.fixture
def refused(tmp_path, capsys):
  """Exports with some flags; returns the error, and checks that nothing was written."""

  def run(*flags):
    assert export.main([f'--workdir={PRETRAINED}', f'--out={tmp_path}/out', *flags]) == 2
    assert not list(tmp_path.iterdir())
    return capsys.readouterr().err.removeprefix('error: ').removesuffix('\n')

  return run


def test_float32_bundle_that_differs_from_jax_is_rejected(refused, monkeypatch):
  monkeypatch.setattr(bundle_lib, 'compare', lambda *_: {'logits': 2e-4})
  assert refused() == (
    'expected exported logits within 1e-04 of those in JAX, found 2.0e-04; '
    'install the versions in constraints.txt, or set --format=stablehlo'
  )


def test_interruption_leaves_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(bundle_lib, 'model_card', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
  assert export.main([f'--workdir={PRETRAINED}', f'--out={tmp_path}/out', '--format=stablehlo']) == 130
  assert not list(tmp_path.iterdir())


def test_folder_created_meanwhile_is_kept(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(bundle_lib, 'model_card', lambda *_: (tmp_path / 'out').mkdir() or '')
  assert export.main([f'--workdir={PRETRAINED}', f'--out={tmp_path}/out', '--format=stablehlo']) == 2
  expected = f'error: expected no {tmp_path}/out, found something there; set --out to another folder\n'
  assert capsys.readouterr().err == expected
  assert contents(tmp_path) == {'out': None}


def test_a_run_that_is_not_calibrated_says_so(tmp_path, monkeypatch, capsys):
  shutil.copytree(PRETRAINED, tmp_path / 'bare', ignore=shutil.ignore_patterns('exits.json'))
  written = []

  def write(request, run, plan, images):
    request.out.mkdir()
    written.append(plan)
    return {'step': run.step}

  monkeypatch.setattr(bundle_lib, 'write_bundle', write)
  assert export.main([f'--workdir={tmp_path}/bare', f'--out={tmp_path}/out']) == 0
  assert written[0].policy == 'full' and written[0].visited == (3,)
  line = f'not calibrated: all images go to exit 3; {CALIBRATE}bare --threshold=0.9 lets them exit earlier'
  assert capsys.readouterr().out.splitlines()[0] == line.format(here=tmp_path)


def test_the_commands_it_names_run_in_any_folder(tmp_path, monkeypatch, capsys):
  agreement = {'images': 16, 'of': 'noise', 'labels': 1.0, 'exits': 1.0, 'logits': 1e-6}

  def write(request, run, plan, images):
    request.out.mkdir()
    return {'step': run.step, 'agreement': agreement}

  monkeypatch.setattr(bundle_lib, 'write_bundle', write)
  assert export.main([f'--workdir={PRETRAINED}', f'--out={tmp_path}/my bundle', '--web']) == 0
  *_, try_it, see_it = capsys.readouterr().out.splitlines()
  assert shlex.split(try_it) == ['try', 'it:', 'python', f'{tmp_path}/my bundle/run.py', 'IMAGE...']
  assert f'{tmp_path}/my bundle' in shlex.split(see_it.partition(', then')[0])


@pytest.mark.filterwarnings('ignore:Use .content=:DeprecationWarning')  # Between huggingface_hub and its HTTP client.
def test_a_bundle_is_pushed(tmp_path, monkeypatch, capsys):
  def write(request, run, plan, images):
    request.out.mkdir()
    (request.out / 'bundle.json').write_text('{}')
    (request.out / 'weights.safetensors').write_bytes(b'weights')
    return {'step': run.step}

  monkeypatch.setattr(bundle_lib, 'write_bundle', write)
  flags = [f'--workdir={PRETRAINED}', f'--out={tmp_path}/out', '--push-to=hf:me/net']
  with hub_server.used(tmp_path, monkeypatch) as hub:
    assert export.main(flags) == 2 and not (tmp_path / 'out').exists()  # Before anything is written.
    line = 'error: hf:me/net is written with a token of the hub, found none; run hf auth login, or set HF_TOKEN\n'
    assert capsys.readouterr().err == line
    monkeypatch.setenv('HF_TOKEN', hub_server.TOKEN)
    assert export.main(flags) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f'pushed: {hub.endpoint}/me/net/commit/')
    assert hub.repos['me/net']['main'] == {'bundle.json': b'{}', 'weights.safetensors': b'weights'}
  assert export.main([*flags[:2], '--push-to=me/net']) == 2
  assert capsys.readouterr().err == (
    "error: expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION, found 'me/net'; set --push-to\n"
  )


@pytest.fixture
def place(tmp_path):
  """Runs that cannot be exported, and paths that exist."""
  (tmp_path / 'file').write_text('mine')
  (tmp_path / 'folder').mkdir()
  (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
  for name in ('other', 'damaged'):
    shutil.copytree(PRETRAINED, tmp_path / name)
  text = (tmp_path / 'other/exits.json').read_text()
  (tmp_path / 'other/exits.json').write_text(text.replace(FINGERPRINT, '0123456789abcdef'))
  (tmp_path / 'damaged/exits.json').write_text('{')
  return tmp_path


LONG = 300 * 'a'
NEW = '--workdir={run} --out={here}/new'
CALIBRATE = 'python -m paranet_jax.calibrate --workdir={here}/'


@pytest.mark.parametrize(
  'arguments, message',
  [
    ('--out={here}/new', 'the following arguments are required: --workdir; see --help'),
    ('--workdir={run}', 'the following arguments are required: --out; see --help'),
    (f'{NEW} x', 'unrecognized arguments: x; see --help'),
    (f'{NEW} --format=tflite', "argument --format: invalid choice: 'tflite' (choose from "),
    (f'{NEW} --dtype=int4', "argument --dtype: invalid choice: 'int4' (choose from "),
    (
      f'{NEW} --dtype=int8 --format=both',
      'StableHLO stages are float32 only, found --dtype=int8; set --format=onnx or --dtype=float32',
    ),
    (
      f'{NEW} --web --format=stablehlo',
      '--web runs ONNX stages, found --format=stablehlo; set --format=onnx or --format=both',
    ),
    (
      f'{NEW} --web-runtime={{here}}/file',
      '--web-runtime is what the page of --web runs on; set --web, or leave it out',
    ),
    (f'{NEW} --web --web-runtime={{here}}/file', 'expected onnxruntime-web 1.30.0 of sha256 d2228df7e461, found '),
    *(
      (
        f'--workdir={{run}} --out={{here}}/{name}',
        f'expected no {{here}}/{name}, found something there; set --out to another folder',
      )
      for name in ('folder', 'file', 'link')
    ),
    *(
      (
        f'--workdir={{run}} --out={{here}}/{name}/new',
        f'expected a folder {{here}}/{name} to write in, found none; create it, or set --out',
      )
      for name in ('no', LONG)
    ),
    (
      f'--workdir={{run}} --out={{here}}/{LONG}',
      f'{{here}}/{LONG} cannot be written: File name too long; set --out to another folder',
    ),
    (
      '--workdir={here}/folder --out={here}/new',
      'expected a run with a config.json in {here}/folder, found none; set --workdir',
    ),
    (
      '--workdir={here}/other --out={here}/new',
      '{here}/other/exits.json belongs to another checkpoint: variables 0123456789abcdef there, '
      f'{FINGERPRINT} here; {CALIBRATE}other --threshold=0.9 writes it again',
    ),
    ('--workdir={here}/damaged --out={here}/new', '{here}/damaged/exits.json is not a JSON object ('),
  ],
)
def test_rejected_requests(place, arguments, message, capsys):
  before, places = contents(place), {'run': PRETRAINED, 'here': place}
  assert export.main(arguments.format(**places).split()) == 2
  out, err = capsys.readouterr()
  assert not out and err.startswith(f'error: {message.format(**places)}') and err.count('\n') == 1
  assert contents(place) == before


def test_folder_that_is_not_writable(tmp_path, refused, monkeypatch):
  monkeypatch.setattr(bundle_lib.os, 'access', lambda path, mode: path != tmp_path)  # Root may write anywhere.
  assert refused() == f'expected a writable folder, found {tmp_path}, which is not; set --out'


@pytest.mark.parametrize('package', ['jax2onnx', 'onnx', 'onnxruntime', 'safetensors', 'flatbuffers'])
def test_missing_package(package, refused, monkeypatch):
  find_spec = bundle_lib.importlib.util.find_spec
  monkeypatch.setattr(bundle_lib.importlib.util, 'find_spec', lambda name: None if name == package else find_spec(name))
  expected = f'exporting needs {package}, found none; pip install -r requirements-export.txt'
  assert refused('--format=both') == expected


def test_missing_data_set(refused, monkeypatch):
  def missing(*_, **__):
    raise UserError('expected cifar100, found none; set --config.data.data_dir')

  monkeypatch.setattr(trained, 'load_dataset', missing)
  assert refused('--dtype=int8') == 'expected cifar100, found none; set --data_dir'


@pytest.mark.parametrize(
  'dtype, needed, count, split',
  [
    ('float16', '1 held-out image', 0, None),
    ('float16', '1 held-out image', 0, Split(NOISE[:0], np.zeros(0, np.int32))),
    ('int8', '2 held-out images', 1, Split(NOISE[:1], np.zeros(1, np.int32))),
  ],
)
def test_too_few_held_out_images(dtype, needed, count, split, refused, monkeypatch):
  monkeypatch.setattr(trained, 'load_dataset', lambda *_, **__: type('Dataset', (), {'held_out': split}))
  assert refused(f'--dtype={dtype}') == (
    f'--dtype={dtype} needs at least {needed}, found {count}; '
    'set --dtype=float32, or train with a larger --config.data.held_out'
  )


@pytest.mark.parametrize('stored', [False, True])
def test_ranges_and_agreement_come_from_all_classes(stored, run, monkeypatch):
  labels = np.repeat(np.arange(100), 30)  # As a folder lists its files.

  def read(numbers):
    return [np.full((2, 2, 3), labels[number], np.uint8) for number in numbers], None

  if stored:
    images = StoredImages(types.SimpleNamespace(read=read), np.arange(len(labels)), (2, 2, 3))
  else:
    images = np.stack(read(range(len(labels)))[0])
  split = Split(images, labels)
  monkeypatch.setattr(trained, 'load_dataset', lambda *_, **__: type('Dataset', (), {'held_out': split}))
  found = bundle_lib.held_out_images(run)
  count = bundle_lib.calibration_count(found)
  assert (len(found), count) == (1512, 512)
  for part in (found[:count], found[count:]):
    assert np.unique(part).tolist() == list(range(100))
  np.testing.assert_array_equal(found, bundle_lib.held_out_images(run))


def test_full_disk(tmp_path, refused, monkeypatch):
  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(contents_lib, 'save_weights', full)
  expected = f'{tmp_path}/out cannot be written: No space left on device; set --out to another folder'
  assert refused('--format=stablehlo') == expected
