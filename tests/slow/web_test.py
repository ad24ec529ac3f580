"""The page of a bundle in a headless Chromium: it answers as run.py does, and says what is wrong."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import browser
import numpy as np
import onnx
import pytest
import tiny_bundle
from onnx import helper, numpy_helper
from PIL import Image

from paranet_jax.export import __main__ as export
from paranet_jax.export.web import page_library, write_page
from paranet_jax.host.errors import UserError
from paranet_jax.portable import run

PRETRAINED = Path(__file__).resolve().parents[2] / 'pretrained'
COUNT = 50
READY = 'document.getElementById("state").textContent === "Ready."'
ANSWERED = 'document.querySelectorAll(".card .answer").length + document.querySelectorAll(".card .wrong").length'

pytestmark = pytest.mark.skipif(not browser.CHROMIUM, reason=browser.MISSING)


@pytest.fixture(scope='module')
def library():
  try:
    return page_library()
  except UserError as error:
    pytest.skip(str(error))


@pytest.fixture(scope='module')
def tiny(library, tmp_path_factory):
  folder = tiny_bundle.write(tmp_path_factory.mktemp('tiny') / 'bundle', probability=0.45)
  write_page(folder, library)
  return folder


@pytest.fixture(scope='module')
def chromium():
  with browser.opened() as page:
    yield page


@pytest.fixture
def page(chromium):
  """The tab, without what happened before."""
  chromium.errors.clear()
  chromium.requests.clear()
  chromium.resize(1280)
  return chromium


def changed(bundle, folder, file, **fields):
  """A copy of a bundle with other fields in a file."""
  shutil.copytree(bundle, folder)
  values = json.loads((folder / file).read_text()) | fields
  (folder / file).write_text(json.dumps(values))
  facts = json.loads((folder / run.BUNDLE).read_text())
  facts['checksums'][file] = hashlib.sha256((folder / file).read_bytes()).hexdigest()
  (folder / run.BUNDLE).write_text(json.dumps(facts))
  return folder


def pictures(folder):
  """Image files of many sizes and modes whose pixels every decoder agrees on."""
  rng, files = np.random.default_rng(7), []
  shapes = [(8, 8), (32, 32), (33, 32), (31, 64), (5, 90), (300, 7), (120, 161), (1, 40), (480, 640), (1200, 900)]
  for place in range(COUNT):
    height, width = shapes[place % len(shapes)]
    coarse = rng.integers(0, 256, (max(height // 9, 1), max(width // 9, 1), 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    image = image if place % 3 else Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    kind = ('RGB.png', 'L.png', 'P.png', 'RGB.bmp', 'RGB.gif')[place // len(shapes)]
    mode, suffix = kind.split('.')
    path = folder / f'{place:02}.{suffix}'
    image.convert(mode if suffix != 'gif' else 'P').save(path)
    files.append(path)
  return files


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  return pictures(tmp_path_factory.mktemp('images'))


def pixels(page, files):
  """The input of the network, in 0..255, as the page makes it of each chosen file."""
  page.value('globalThis.chosen = [], document.getElementById("files").onchange = event => {'
             'chosen = [...event.target.files]; }, 0')  # fmt: skip
  page.choose('#files', files)
  page.wait(f'chosen.length === {len(files)}')
  return page.value('(async () => { const found = []; for (const file of chosen) found.push([...await early.pixels('
                    'file)]); return found; })()')  # fmt: skip


def answers(page):
  """What early.predict says of the files that `pixels` chose."""
  return page.value('(async () => { const found = []; for (const file of chosen) found.push(await early.predict('
                    'file)); return found; })()')  # fmt: skip


def opened(page, address):
  page.open(f'{address}/')
  page.wait(READY)


def read(bundle, files):
  side, _, channels = bundle.image_shape
  return np.stack([run.read_image(str(file), side, channels, scaling=bundle.scaling) for file in files])


def assert_same(page, bundle, images):
  expected, found = bundle.predict(images), answers(page)
  assert [bundle.class_names[label] for label in expected.labels] == [
    bundle.class_names[answer['label']] for answer in found
  ]
  assert [answer['exit'] for answer in found] == expected.exits.tolist()
  assert [answer['macs'] for answer in found] == expected.macs.tolist()
  np.testing.assert_allclose([answer['probabilities'] for answer in found], expected.probabilities, atol=1e-4)
  return expected


def test_a_trained_network_answers_as_run_does(page, library, files, tmp_path):
  archive, folder = tmp_path / 'library.tgz', tmp_path / 'bundle'
  archive.write_bytes(library)
  assert export.main([f'--workdir={PRETRAINED}', f'--out={folder}', '--web', f'--web-runtime={archive}']) == 0
  bundle = run.load(folder)
  with browser.served(folder) as address:
    opened(page, address)
    np.testing.assert_array_equal(np.reshape(pixels(page, files), (COUNT, 32, 32, 3)), images := read(bundle, files))
    exits = set()
    for setting, same in (
      ('', bundle),
      ('$("threshold").value = 0.3; $("threshold").oninput();', bundle.with_threshold(0.3)),
      ('$("budget").value = 2; $("budget").oninput();', bundle.with_threshold(0.3).with_budget(12e6)),
    ):
      page.value(f'{{ const $ = id => document.getElementById(id); {setting} }}')
      exits |= set(assert_same(page, same, images).exits)
    assert exits == {1, 2, 3}
  assert page.errors == [] and all(url.startswith((address, 'data:', 'blob:')) for url in page.requests)


def test_threads(page, tiny, files):
  headers = {'Cross_Origin_Opener_Policy': 'same-origin', 'Cross_Origin_Embedder_Policy': 'require-corp'}
  bundle = run.load(tiny)
  with browser.served(tiny, **headers) as address:
    opened(page, address)
    pixels(page, files)
    assert_same(page, bundle, read(bundle, files))
    assert re.search(r'Runs on the processor, \d+ threads\.', page.text())
  assert page.errors == []


def test_webgpu(tiny, files):
  """With a graphics processor that Chromium imitates."""
  bundle = run.load(tiny)
  flags = '--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader', '--enable-features=Vulkan'
  with browser.served(tiny) as address, browser.opened(*flags) as page:
    opened(page, address)
    if 'Runs on WebGPU' not in page.text():
      pytest.skip('this Chromium has no WebGPU without a graphics processor')
    pixels(page, files)
    assert_same(page, bundle, read(bundle, files))
    assert page.errors == []
    page.open(f'{address}/?device=cpu')
    page.wait(READY)
    assert 'Runs on the processor, one thread.' in page.text()


@pytest.mark.parametrize(
  'fields',
  [
    {'interpolation': 'bicubic'},
    {'side': 24, 'short_side': 29},
    {'side': 24, 'short_side': 28, 'interpolation': 'bicubic'},
    {'channels': 1, 'mean': [0.4], 'std': [0.2]},
  ],
)
def test_images_are_scaled_as_pillow_does(page, tiny, files, tmp_path, fields):
  folder = changed(tiny, tmp_path / 'bundle', run.PREPROCESSING, **fields)
  given = json.loads((folder / run.PREPROCESSING).read_text())
  scaling = run.Scaling(given.get('short_side'), given.get('interpolation', 'bilinear'))
  with browser.served(folder) as address:
    opened(page, address)
    for file, found in zip(files, pixels(page, files), strict=True):
      expected = run.read_image(str(file), given['side'], given['channels'], scaling=scaling)
      np.testing.assert_array_equal(np.reshape(found, expected.shape), expected, err_msg=file.name)


def test_transparency_and_orientation(page, tiny, tmp_path):
  """Decoders may differ by a little; a turned image or another background would differ by much."""
  rng = np.random.default_rng(1)
  image = Image.fromarray(rng.integers(0, 256, (2, 3, 4), np.uint8)).resize((60, 40), Image.Resampling.NEAREST)
  files = [tmp_path / 'clear.png', *(tmp_path / f'{turn}.jpg' for turn in range(1, 9))]
  image.save(files[0])
  for turn, file in enumerate(files[1:], 1):
    exif = Image.Exif()
    exif[0x0112] = turn
    image.convert('RGB').save(file, exif=exif, quality=95, subsampling=0)
  with browser.served(tiny) as address:
    opened(page, address)
    found = np.reshape(pixels(page, files), (len(files), 8, 8, 3))
  expected = np.stack([run.read_image(str(file), 8, 3) for file in files])
  np.testing.assert_allclose(found.astype(int), expected.astype(int), atol=3)


@pytest.mark.parametrize(
  'fields',
  [
    {'score': 'entropy', 'confidence_thresholds': [0.15, 0.1, 0]},
    {'score': 'margin', 'confidence_thresholds': [0.2, 0.1, 0]},
    {'score': 'patience', 'confidence_thresholds': [2, 2, 0]},
    {'confidence_thresholds': [None, 0.6, 0]},
  ],
)
def test_scores(page, tiny, files, tmp_path, fields):
  folder = changed(tiny, tmp_path / 'bundle', run.EXITS, **fields)
  bundle = run.load(folder)
  with browser.served(folder) as address:
    opened(page, address)
    pixels(page, files)
    assert len(set(assert_same(page, bundle, read(bundle, files)).exits)) > 1


def test_unknown_images_and_sets(page, tiny, files, tmp_path):
  limits = {'coverage': 0.9, 'penalty': 0.125, 'free': 2, 'limits': [0.3, 0.5, 0.7], 'anytime': 0.8}
  reject = {'risk': 0.1, 'delta': 0.1, 'confidence_threshold': 0.6}
  folder = changed(tiny, tmp_path / 'bundle', run.EXITS, reject=reject, sets=limits)
  calibrated = run.load(folder)
  with browser.served(folder) as address:
    opened(page, address)
    pixels(page, files)
    for steps, bundle in ((3, calibrated), (2, calibrated.with_budget(20))):
      page.value(f'document.getElementById("budget").value = {steps}; document.getElementById("budget").oninput(); 0')
      expected, found = bundle.predict(read(bundle, files)), answers(page)
      assert [answer['label'] for answer in found] == expected.labels.tolist()
      assert 0 < expected.unknown.sum() < COUNT
      sets = [np.flatnonzero(row).tolist() for row in bundle.sets(expected)]
      assert [sorted(answer['set']) for answer in found] == sets and len(set(map(len, sets))) > 1


def overflowing(bundle, folder):
  """A copy of a bundle whose first exit gives white images logits of NaN."""
  shutil.copytree(bundle, folder)
  model = onnx.load(folder / 'stage_1.onnx')
  next(node for node in model.graph.node if node.output[0] == 'logits').output[0] = 'plain'
  for name, value in (('grey', 1.9), ('large', 1e38)):
    model.graph.initializer.append(numpy_helper.from_array(np.array([value], np.float32), name))
  model.graph.node.extend(
    [
      helper.make_node('ReduceMin', ['flat'], ['darkest'], axes=[1], keepdims=1),
      helper.make_node('Sub', ['darkest', 'grey'], ['above']),
      helper.make_node('Relu', ['above'], ['white']),
      helper.make_node('Mul', ['white', 'large'], ['huge']),
      helper.make_node('Mul', ['huge', 'huge'], ['infinite']),
      helper.make_node('Sub', ['infinite', 'infinite'], ['nan']),  # 0 for other images.
      helper.make_node('Add', ['plain', 'nan'], ['logits']),
    ]
  )
  onnx.save(model, folder / 'stage_1.onnx')
  facts = json.loads((folder / run.BUNDLE).read_text())
  facts['checksums']['stage_1.onnx'] = hashlib.sha256((folder / 'stage_1.onnx').read_bytes()).hexdigest()
  (folder / run.BUNDLE).write_text(json.dumps(facts))
  return folder


def test_an_image_whose_answer_is_not_finite_has_none(page, tiny, files, tmp_path):
  """Later exits may answer it; at the first one, others have their answers."""
  Image.new('RGB', (8, 8), 'white').save(tmp_path / 'white.png')
  chosen = [*files[:3], tmp_path / 'white.png']
  folder = overflowing(tiny, tmp_path / 'bundle')
  bundle = run.load(folder)
  images, shown = read(bundle, chosen), '[...document.querySelectorAll(".card")].map(card => card.dataset.exit)'
  with browser.served(folder) as address:
    opened(page, address)
    page.choose('#files', chosen)
    page.wait(f'{ANSWERED} === 4 && !document.body.innerText.includes("so far")')
    expected = bundle.predict(images)
    assert expected.finite.all() and expected.exits[3] > 1
    assert page.value(shown)[::-1] == [str(number) for number in expected.exits]
    assert 'Exit 1: not finite' in page.text()
    page.value('document.getElementById("budget").value = 1; document.getElementById("budget").oninput(); 0')
    assert bundle.with_budget(10).predict(images).finite.tolist() == [True, True, True, False]
    assert page.value(shown)[::-1] == ['1', '1', '1', '']
    assert "white.png\n\nNo answer: the network's numbers for this image are not finite." in page.text()
    assert '3 (100.0 %)' in page.text() and 'NaN' not in page.text()
    page.choose('#files', chosen[3:])
    page.wait(f'{ANSWERED} === 5 && document.getElementById("state").className === "wrong"')
    said = "white.png: No answer: the network's numbers for this image are not finite."
    assert page.value('document.getElementById("state").textContent') == said
  assert page.errors == []


def test_use(page, tiny, files, tmp_path):
  """Cards and the histogram follow the images and the settings; a broken and a missing file get a sentence."""
  (tmp_path / 'broken.png').write_bytes(files[0].read_bytes()[:60])
  shutil.copy(files[0], tmp_path / 'gone.png')
  bundle = run.load(tiny)
  expected = bundle.predict(read(bundle, files[:12]))
  shown = [f'{number} ({100 * number / 12:.1f} %)' for number in np.bincount(expected.exits, minlength=4)[1:]]
  cards = (
    '[...document.querySelectorAll(".card")].map(card => [card.dataset.name, card.dataset.label, +card.dataset.exit])'
  )
  histogram = '[...document.querySelectorAll("#histogram .row span:last-child")].map(each => each.textContent)'
  with browser.served(tiny) as address:
    opened(page, address)
    page.choose('#files', files[:12])
    page.wait(f'{ANSWERED} === 12 && !document.body.innerText.includes("so far")')
    names = [bundle.class_names[label] for label in expected.labels]
    assert page.value(cards)[::-1] == [
      list(row) for row in zip([file.name for file in files], names, expected.exits.tolist(), strict=False)
    ]
    assert page.value(histogram) == shown and len(set(expected.exits)) == 3
    saved = f'Multiply-adds saved: {100 * (1 - expected.macs.mean() / 30):.1f} %'
    assert page.value('document.getElementById("saved").textContent').startswith(saved)
    page.value('document.getElementById("budget").value = 1; document.getElementById("budget").oninput(); 0')
    assert page.value(histogram) == ['12 (100.0 %)', '0 (0.0 %)', '0 (0.0 %)']
    assert page.value('document.getElementById("command").textContent') == 'python run.py --budget=10 IMAGES'
    # Removed after it was chosen, before it is read.
    page.value('Blob.prototype.arrayBuffer = (read => async function () { if (this.name === "gone.png")'
               ' throw new DOMException("gone", "NotFoundError"); return read.call(this); })'
               '(Blob.prototype.arrayBuffer); 0')  # fmt: skip
    page.choose('#files', [tmp_path / 'broken.png', tmp_path / 'gone.png'])
    page.wait(f'{ANSWERED} === 14')
    text = page.text()
    assert 'broken.png\n\nThis browser cannot read it as an image.' in text
    assert 'gone.png\n\nThis file can no longer be read. Choose it again.' in text
    page.value('document.getElementById("clear").click(); 0')
    assert page.value(ANSWERED) == 0 and 'No images yet.' in page.text()
  assert page.errors == []


def test_keyboard_width_and_colors(page, tiny):
  with browser.served(tiny) as address:
    page.resize(360, 740)
    opened(page, address)
    assert page.value('document.scrollingElement.scrollWidth') <= 360
    light = page.value('getComputedStyle(document.body).backgroundColor')
    page.resize(360, 740, dark=True)
    assert light == 'rgb(255, 255, 255)' != page.value('getComputedStyle(document.body).backgroundColor')
    reached = []
    for _ in range(6):
      page.press('Tab', 9)
      reached.append(page.value('document.activeElement.id'))
    assert reached == ['files', 'open', 'clear', 'calibrated', 'threshold', 'budget']
    page.press('ArrowLeft', 37)
    assert page.value('document.getElementById("budget-value").textContent') == 'at most: 20 multiply-adds'
    named = 'each.labels?.length || each.ariaLabel || each.textContent.trim()'
    unnamed = f'[...document.querySelectorAll("input, button, video")].filter(each => !({named})).map(each => each.id)'
    assert page.value(unnamed) == []


def test_files_are_dropped(page, tiny, files):
  with browser.served(tiny) as address:
    opened(page, address)
    x, y = page.value('(({x, y}) => [x + 20, y + 20])(document.getElementById("drop").getBoundingClientRect())')
    data = {'items': [], 'files': [str(file) for file in files[:2]], 'dragOperationsMask': 1}
    for kind in ('dragEnter', 'dragOver', 'drop'):
      page.call('Input.dispatchDragEvent', type=kind, x=x, y=y, data=data)
    page.wait(f'{ANSWERED} === 2')
    text = {'items': [{'mimeType': 'text/plain', 'data': 'no file'}], 'dragOperationsMask': 1}
    for kind in ('dragEnter', 'dragOver', 'drop'):
      page.call('Input.dispatchDragEvent', type=kind, x=x, y=y, data=text)
    page.wait('document.getElementById("state").textContent.startsWith("Expected image files, found something else")')
  assert page.errors == []


def test_the_camera(page, tiny):
  with browser.served(tiny) as address:
    page.open(f'{address.replace("127.0.0.1", "localhost")}/')
    page.wait(READY)
    page.value('document.getElementById("open").click(); 0')
    page.wait('!document.getElementById("camera").hidden')
    page.value('document.getElementById("take").click(); 0')
    page.wait(f'{ANSWERED} === 1')
    assert 'photo 1' in page.text()
    page.value('document.getElementById("close").click(); 0')
    assert page.value('document.getElementById("video").srcObject') is None
  assert page.errors == []


@pytest.mark.parametrize(
  'file, content, message',
  [
    ('bundle.json', None, 'Expected bundle.json beside this page, found none (404); copy or export the bundle again.'),
    ('exits.json', b'{}', 'exits.json is not what was exported; copy or export the bundle again.'),
    ('bundle.json', b'{', 'bundle.json is not JSON; copy or export the bundle again.'),
    (
      'bundle.json',
      b'{"schema_version": 2}',
      'Expected bundle.json of schema_version 1, found 2; use the page of that bundle.',
    ),
    (
      'stage_2.onnx',
      None,
      'Expected stage_2.onnx beside this page, found none (404); copy or export the bundle again.',
    ),
    (
      'onnxruntime-web/ort.wasm.bundle.min.mjs',
      None,
      'Expected onnxruntime-web/ort.wasm.bundle.min.mjs beside this page, found none; copy or export the bundle again.',
    ),
  ],
)
def test_a_damaged_bundle(page, tiny, tmp_path, file, content, message):
  folder = shutil.copytree(tiny, tmp_path / 'bundle')
  (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
  with browser.served(folder) as address:
    page.open(f'{address}/')
    page.wait('document.getElementById("state").className === "wrong"')
    assert page.value('document.getElementById("state").textContent') == message


def test_opened_as_a_file(page, tiny):
  page.open(f'file://{tiny}/index.html')
  page.wait('document.getElementById("state").className === "wrong"')
  assert 'Run python -m http.server in this folder' in page.value('document.getElementById("state").textContent')
