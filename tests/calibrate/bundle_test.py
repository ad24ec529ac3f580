"""`calibrate --bundle --images`: a bundle made by hand, calibrated on new images without JAX and without the run."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_bundle
from PIL import Image
from running import run_command

from paranet_jax.calibrate import bundle as bundle_lib
from paranet_jax.calibrate.__main__ import main
from paranet_jax.early.exit_plan import ExitPlan, read_plan, save_plan
from paranet_jax.portable import run

COUNT = 80
IMAGES = np.random.default_rng(4).integers(0, 256, (COUNT, 8, 8, 3), np.uint8)
MACS = (10_000_000, 20_000_000, 30_000_000)
PLAN = ExitPlan(
  name='tiny',
  dataset='photos',
  step=7,
  fingerprint='0123456789abcdef',
  score='max_prob',
  policy='shared',
  target={'threshold': 0.6},
  exits=(1, 2, 3),
  temperatures=(1.0, 0.9, 0.8),
  thresholds=(0.6, 0.6, 0.0),
  confidence_thresholds=(float(run.to_confidence(0.6, 'max_prob')),) * 2 + (0.0,),
  visited=(1, 2, 3),
  macs=MACS,
  ms=None,
  macs_alone=MACS,
)


def write(folder, plan=PLAN):
  """A bundle with a complete exits.json."""
  tiny_bundle.write(folder)
  save_plan(folder, plan)
  known = json.loads((folder / 'bundle.json').read_text())
  known['checksums']['exits.json'] = hashlib.sha256((folder / 'exits.json').read_bytes()).hexdigest()
  known['all_macs'] = list(MACS)
  (folder / 'bundle.json').write_text(json.dumps(known))
  (folder / 'README.md').write_text('# tiny\n')
  return folder


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A bundle; and its images, in folders of classes and without. Nine of ten have the last exit's answer as label."""
  folder = tmp_path_factory.mktemp('again')
  bundle = run.load(write(folder / 'tiny'))
  labels = bundle.safe().predict(IMAGES).labels
  labels[::10] = (labels[::10] + 1) % tiny_bundle.CLASSES
  for place, image in enumerate(IMAGES):
    for path in (folder / f'labeled/class {labels[place]}', folder / 'plain'):
      path.mkdir(parents=True, exist_ok=True)
      Image.fromarray(image).save(path / f'{place}.png')
  return folder


@pytest.fixture
def folder(whole, tmp_path):
  """The bundle in a folder of its own."""
  shutil.copytree(whole / 'tiny', tmp_path / 'tiny')
  return tmp_path


def calibrate(folder, images, *flags):
  code, out, err = run_command(main, f'--bundle={folder / "tiny"}', f'--images={images}', *flags)
  assert (code, err) == (0, ''), (code, err)
  return out


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_new_version_beside_the_old(whole, folder):
  before = contents(folder / 'tiny')
  out = calibrate(folder, whole / 'labeled', '--budget=15M')
  assert contents(folder / 'tiny') == before
  plan, bundle = read_plan(folder / 'tiny-2'), run.load(folder / 'tiny-2')
  assert (plan.target, plan.policy) == ({'budget': 15e6, 'unit': 'macs'}, 'optimal')
  assert plan.splits == {'temperature': 40, 'thresholds': 40, 'test': 40} and plan.seen['images'] == 40
  assert plan.expected['cost_macs'] <= 15e6 and (plan.visited, plan.macs) == ((1, 2, 3), MACS)
  assert plan.checkpoint == PLAN.checkpoint and plan.provenance['recalibrated']['images'] == COUNT
  # The new bundle exits by the new thresholds, and its answers are as measured.
  found = bundle.predict(IMAGES)
  assert found.macs.mean() < 30e6 and plan.temperatures != PLAN.temperatures
  lines = out.splitlines()
  assert lines[0] == f'read 80 images in folders of their classes of {whole / "labeled"}'
  assert lines[1] == 'what changes on 40 images that chose nothing'
  assert lines[3].split()[:4] == ['1', '1.000', '->', f'{plan.temperatures[0]:.3f}']
  assert f'-> {100 * plan.test["accuracy"]:.2f} %' in out and lines[-1] == f'bundle: {folder / "tiny-2"}'
  card = (folder / 'tiny-2/README.md').read_text()
  assert card.startswith('# tiny\n\n## Calibrated again\n\nOn ')
  assert '- Thresholds were chosen so that' in card and '- `run.py --watch=STATE.json` tests whether' in card
  assert {path.name for path in folder.iterdir()} == {'tiny', 'tiny-2'}
  calibrate(folder, whole / 'labeled', '--budget=15M')  # The same again.
  assert read_plan(folder / 'tiny-3').thresholds == plan.thresholds


def test_by_the_target_of_the_bundle_and_without_labels(whole, folder):
  out = calibrate(folder, whole / 'plain', f'--out={folder / "other"}')
  plan = read_plan(folder / 'other')
  assert (plan.target, plan.policy) == ({'threshold': 0.6}, 'shared') and plan.thresholds == pytest.approx(
    [0.6, 0.6, 0]
  )
  assert 'same answer as exit 3: ' in out and 'accuracy' not in out
  assert plan.test['agreement'] is not None and plan.seen['wrong'] is None
  assert plan.temperatures[2] == 1.0  # It always agrees with itself.


def test_a_limit_of_the_bundle_still_holds(whole, tmp_path):
  write(tmp_path / 'tiny', ExitPlan(**vars(PLAN) | {'target': {'threshold': 0.6, 'max_macs': 2e7}}))
  calibrate(tmp_path, whole / 'labeled')
  plan = read_plan(tmp_path / 'tiny-2')
  assert plan.target == {'threshold': 0.6, 'max_macs': 2e7} and plan.thresholds[1] == 0
  assert run.load(tmp_path / 'tiny-2').predict(IMAGES).macs.max() == 20e6


@pytest.mark.parametrize(
  ('limit', 'flags', 'kept', 'said'),
  [
    ({'max_macs': 2e7}, ['--budget=15M'], True, 'at most 20M multiply-adds for any image, as before'),
    ({'max_macs': 2e7}, ['--budget=25M'], True, 'at most 20M multiply-adds for any image, as before'),
    ({'max_macs': 2e7}, ['--threshold=0.7'], True, 'at most 20M multiply-adds for any image, as before'),
    (
      {'max_macs': 2e7},
      ['--risk=0.9', '--delta=0.5'],
      False,
      'no longer promised: at most 20M multiply-adds for any image (set --budget or --threshold, which keep it)',
    ),
    (
      {'max_macs': 5e6},
      ['--threshold=0.7'],
      False,
      'no longer promised: at most 5M multiply-adds for any image (set --max-macs with --workdir)',
    ),
    (
      {'max_ms': 2.5},
      ['--threshold=0.7'],
      False,
      'no longer promised: at most 2.5 ms for any image (set --max-ms=2.5 with --workdir)',
    ),
  ],
)
def test_a_limit_of_the_bundle_and_a_new_target(whole, tmp_path, limit, flags, kept, said):
  write(tmp_path / 'tiny', ExitPlan(**vars(PLAN) | {'target': {'threshold': 0.6, **limit}}))
  assert calibrate(tmp_path, whole / 'labeled', *flags).splitlines()[-3] == said
  plan = read_plan(tmp_path / 'tiny-2')
  assert plan.target.get('max_macs') == (2e7 if kept else None) and 'max_ms' not in plan.target
  assert (run.load(tmp_path / 'tiny-2').predict(IMAGES).macs.max() <= 20e6) or not kept


@pytest.mark.parametrize(
  ('images', 'flags', 'said'),
  [
    (
      'labeled',
      [],
      'an error of at most 0.5 among the answers (set --reject=0.5 --delta=0.2), '
      'a coverage of 0.8 (set --coverage=0.8)',
    ),
    (
      'plain',
      ['--threshold=0.9'],
      'an error of at most 0.5 among the answers (set --reject=0.5 --delta=0.2 and --images to folders named after '
      'classes), a coverage of 0.8 (set --coverage=0.8 and --images to folders named after classes)',
    ),
    ('labeled', ['--coverage=0.7'], 'an error of at most 0.5 among the answers (set --reject=0.5 --delta=0.2)'),
    ('labeled', ['--reject=0.6'], 'a coverage of 0.8 (set --coverage=0.8)'),
    ('labeled', ['--reject=0.6', '--coverage=0.7'], None),
  ],
)
def test_promises_that_the_new_version_does_not_make(whole, folder, images, flags, said):
  calibrate(folder, whole / 'labeled', '--threshold=0.99', '--reject=0.5', '--delta=0.2', '--coverage=0.8')
  code, out, _ = run_command(main, f'--bundle={folder / "tiny-2"}', f'--images={whole / images}', *flags)
  found = [line for line in out.splitlines() if line.startswith('no longer promised: ')]
  assert (code, found) == (0, [] if said is None else [f'no longer promised: {said}'])


def test_no_temperatures_leave_no_images_for_them(whole, folder):
  calibrate(folder, whole / 'labeled', '--temperature=none')
  assert read_plan(folder / 'tiny-2').splits == {'temperature': 0, 'thresholds': 40, 'test': 40}


def test_promises_of_a_bundle(whole, folder):
  out = calibrate(folder, whole / 'labeled', '--threshold=0.99', '--reject=0.5', '--coverage=0.8')
  plan, bundle = read_plan(folder / 'tiny-2'), run.load(folder / 'tiny-2')
  assert plan.target == {'threshold': 0.99} and plan.reject['risk'] == 0.5
  assert bundle.rejects and bundle.coverage == 0.8 and plan.splits['promises'] == 20
  assert bundle.sets(bundle.predict(IMAGES)).any(-1).all()
  answered, error, covered = (f'{100 * plan.test[name]:.2f} %' for name in ('answered', 'answered_error', 'covered'))
  assert f'answered, the others are unknown: {answered}; wrong among them: {error}\n' in out
  assert f'sets that hold the right class: {covered}, with {plan.test["set_size"]:.2f} classes on average\n' in out


@pytest.mark.parametrize(('flag', 'measured'), [('--reject=0.5', 'answered'), ('--coverage=0.8', 'covered')])
def test_one_promise_alone(whole, folder, flag, measured):
  out = calibrate(folder, whole / 'labeled', '--threshold=0.99', flag)
  plan = read_plan(folder / 'tiny-2')
  assert (plan.reject is None, plan.sets is None) == (measured != 'answered', measured != 'covered')
  assert measured in plan.test and not {'answered', 'covered'} - {measured} & plan.test.keys()
  assert ('wrong among them' in out) == (measured == 'answered') and ('sets that hold' in out) == (
    measured != 'answered'
  )


def test_answers_that_are_wrong_however_sure(whole, folder):
  for number in range(tiny_bundle.CLASSES):  # Each class has the images of the one before.
    before = whole / f'labeled/class {(number - 1) % tiny_bundle.CLASSES}'
    for copy in 'ab':  # A quarter of them makes promises.
      shutil.copytree(before, folder / f'images/class {number}/{copy}')
  flags = f'--bundle={folder / "tiny"}', f'--images={folder / "images"}', '--threshold=1', '--reject=0.1'
  found, _ = refusal(folder, *flags)
  assert found == (
    'an error of 0.1 among the answers cannot be promised from 40 held-out images: the surest answers are wrong too '
    'often; no bundle was written; raise --reject, let fewer images leave early, or set --images to more of them'
  )


def test_an_older_run_file_is_replaced_and_a_card_that_was_removed_is_not(whole, folder):
  (folder / 'tiny/README.md').unlink()
  (folder / 'tiny/run.py').write_text('# Knows no promises.\n')
  calibrate(folder, whole / 'plain')
  assert (folder / 'tiny-2/run.py').read_bytes() == Path(run.__file__).read_bytes()
  assert not (folder / 'tiny-2/README.md').exists()


def test_only_what_was_exported_is_copied_and_can_be_written(whole, folder):
  bundle = folder / 'tiny'
  (bundle / 'onnxruntime-web').mkdir()
  (bundle / 'onnxruntime-web/ort.mjs').write_text('// a page of --web')
  known = json.loads((bundle / 'bundle.json').read_text())
  named = 'onnxruntime-web/ort.mjs', 'gone.safetensors', f'../../{folder.name}/outside'
  known['checksums'] |= dict.fromkeys(named, '0' * 64)
  (bundle / 'bundle.json').write_text(json.dumps(known))
  exported = {path.relative_to(bundle) for path in bundle.rglob('*')}
  for name in ('outside', 'tiny/report.html', 'tiny/state.json', 'tiny/onnxruntime-web/mine.txt'):
    (folder / name).write_text('')
  for path in (*bundle.rglob('*'), bundle):
    path.chmod(0o555 if path.is_dir() else 0o444)
  try:
    calibrate(folder, whole / 'plain')
  finally:
    for path in (bundle, bundle / 'onnxruntime-web'):
      path.chmod(0o755)
  new = folder / 'tiny-2'
  assert {path.relative_to(new) for path in new.rglob('*')} == exported
  assert all(path.stat().st_mode & 0o200 for path in (new, *new.rglob('*')))
  assert {path.name for path in folder.iterdir()} == {'tiny', 'tiny-2', 'outside'}


@pytest.mark.parametrize('flags', [[], ['--risk-loss=disagreement']])
def test_a_risk_without_labels(whole, folder, flags):
  # Of a network of random weights, whose exits seldom agree.
  calibrate(folder, whole / 'plain', '--risk=0.99', '--risk-of=selective', '--delta=0.5', *flags)
  assert read_plan(folder / 'tiny-2').target['loss'] == 'disagreement'


def test_the_risk_of_each_class(whole, folder):
  images = shutil.copytree(whole / 'labeled', folder / 'images')
  rare = max(images.iterdir(), key=lambda path: len(list(path.iterdir())))
  for path in sorted(rare.iterdir())[1:]:
    path.unlink()
  out = calibrate(folder, images, '--risk=0.9', '--risk-of=class', '--delta=0.5')
  label = int(rare.name.removeprefix('class '))
  assert label in (few := read_plan(folder / 'tiny-2').target['too_few'])
  named = ', '.join(f'class {each}' for each in few)
  assert (
    f'no risk of their own is promised for {len(few)} of 5 classes, which have fewer than 1 held-out images to test '
    f'it: {named}; they count in the overall risk\n'
  ) in out


def refusal(folder, *flags):
  before = {path.name for path in folder.iterdir()}
  code, out, err = run_command(main, *flags)
  assert code == 2 and err.startswith('error: ') and err.count('\n') == 1
  assert {path.name for path in folder.iterdir()} == before
  return err[len('error: ') : -1].replace(str(folder), 'HERE'), out


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], '--bundle needs images to calibrate on, found none; set --images to a folder'),
    (['--images=a', '--workdir=b'], '--workdir belongs to --workdir, found --bundle; leave one of them out'),
    (['--images=a', '--curves'], '--curves belongs to --workdir, found --bundle; leave one of them out'),
    (['--images=a', '--batch-size=3'], '--batch-size belongs to --workdir, found --bundle; leave one of them out'),
    (
      ['--images=a', '--budget=2ms'],
      '--budget in milliseconds needs the run, found --bundle; set multiply-adds, or --workdir',
    ),
    (
      ['--images=a', '--budget=0.5J'],
      '--budget in joules needs the run, found --bundle; set multiply-adds, or --workdir',
    ),
    (['--images=a', '--audit'], '--audit belongs to --workdir, found --bundle; leave one of them out'),
    (
      ['--images=a', '--accept_wrong_numbers'],
      '--accept_wrong_numbers belongs to --workdir, found --bundle; leave one of them out',
    ),
    *(
      (
        ['--images=a', *flags],
        '--score belongs to --workdir: a bundle keeps the score it was calibrated with; leave it out',
      )
      for flags in (['--score=max_prob'], ['--score=entropy', '--budget=15M'])
    ),
    *(
      (
        ['--images=a', f'--{name}={value}'],
        f'--{name} needs a target with --bundle; set --budget, --risk or --threshold, or leave out --{name}',
      )
      for name, value in (('risk-loss', 'gap'), ('risk-of', 'class'), ('delta', '0.2'))
    ),
    (
      ['--images=a', '--coverage=0.9', '--delta=0.2'],
      '--delta needs a target with --bundle; set --budget, --risk or --threshold, or leave out --delta',
    ),
    (
      ['--images=a', '--policy=quota'],
      '--policy and --guarantee need a target; set --budget, --risk or --threshold, or leave them out',
    ),
    (
      ['--images=LABELED', '--bundle=LABELED'],
      'expected a bundle with a bundle.json in LABELED, found none; set --bundle',
    ),
    (
      ['--images=LABELED', '--threshold=0.5', '--out=HERE/none/new'],
      'HERE/none/new cannot be written: No such file or directory; set --out to another folder',
    ),
    (['--images=none'], 'expected a folder of images in {cwd}/none, found none; set --images'),
    (['--images=HERE/tiny'], 'expected images ('),
    (
      ['--images=LABELED', '--out=HERE/tiny/new'],
      'expected a folder outside of HERE/tiny, found HERE/tiny/new; set --out',
    ),
    (['--images=LABELED', '--out=HERE/tiny'], 'expected no HERE/tiny, found something there; set --out to another'),
    (
      ['--images=LABELED', '--budget=9M'],
      'budget must be from 10M (the first exit) to 30M (all exits in turn), found 9M; set --budget',
    ),
    (
      ['--images=LABELED', '--risk=0.01'],
      'risk 0.01 cannot be promised from 20 held-out images: it would need 230; no bundle was written; '
      'raise --risk, or set --images to more of them',
    ),
    (
      ['--images=PLAIN', '--risk=0.5', '--risk-loss=gap'],
      '--risk-loss=gap needs labels, and the images in PLAIN have none; set --risk-loss=disagreement',
    ),
    (['--images=PLAIN', '--reject=0.1'], '--reject needs labels, and the images in PLAIN have none; leave it out'),
    (
      ['--images=LABELED', '--threshold=0', '--reject=0.02'],
      'an error of 0.02 among the answers cannot be promised from 20 held-out images: it would need 114 of its own, '
      'a quarter of all; no bundle was written; raise --reject, let fewer images leave early, or set --images to more '
      'of them',
    ),
    (
      ['--images=LABELED', '--threshold=0', '--coverage=0.99'],
      'a coverage of 0.99 needs 99 held-out images of its own, a quarter of all, found 20; no bundle was written; '
      'lower --coverage, or set --images to more of them',
    ),
    (['--images=PLAIN', '--coverage=0.9'], '--coverage needs labels, and the images in PLAIN have none; leave it out'),
    (['--images=LABELED/class 0'], 'expected 20 images or more to calibrate on, found '),
  ],
)
def test_what_is_refused(whole, folder, flags, message):
  places = {'HERE': folder, 'LABELED': whole / 'labeled', 'PLAIN': whole / 'plain'}
  for name, path in places.items():
    flags = [flag.replace(name, str(path)) for flag in flags]
  found, _ = refusal(folder, f'--bundle={folder / "tiny"}', *flags)
  for name in ('LABELED', 'PLAIN'):
    found = found.replace(str(places[name]), name)
  assert found.startswith(message.format(cwd=Path.cwd()))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'policy': 'half'}, 'expected a bundle with a policy to choose thresholds by again, found half; set --budget, '),
    (
      {'policy': 'optimal', 'target': {'budget': 2.0, 'unit': 'ms'}},
      'expected a target that can be met without the run, found a budget in milliseconds; set --budget to ',
    ),
    (
      {'policy': 'optimal', 'target': {'budget': 0.5, 'unit': 'joules'}},
      'expected a target that can be met without the run, found a budget in joules; set --budget to ',
    ),
    (
      {'target': {'threshold': 0.6, 'max_ms': 2.0}},
      'expected a target that can be met without the run, found a limit in milliseconds; set --budget to ',
    ),
    (
      {'target': {'threshold': 0.6, 'max_macs': 5e6}},
      'expected a limit of at least 10M, the first exit in the bundle, found 5M in exits.json; set --budget, ',
    ),
  ],
)
def test_bundles_whose_target_cannot_be_met_again(whole, tmp_path, change, message):
  write(tmp_path / 'tiny', ExitPlan(**vars(PLAN) | change))
  found, _ = refusal(tmp_path, f'--bundle={tmp_path / "tiny"}', f'--images={whole / "labeled"}')
  assert found.startswith(message)


def test_a_policy_that_does_not_suit_the_score(whole, tmp_path):
  patient = {'score': 'patience', 'thresholds': (2.0, 2.0, 0.0), 'confidence_thresholds': (2.0, 2.0, 0.0)}
  write(tmp_path / 'tiny', ExitPlan(**vars(PLAN) | patient))
  flags = f'--bundle={tmp_path / "tiny"}', f'--images={whole / "labeled"}'
  found, _ = refusal(tmp_path, *flags, '--budget=15M', '--policy=optimal')
  assert found == (
    '--policy=optimal with --budget needs a score of max_prob or entropy or margin, found patience; '
    'set another --policy'
  )
  found, _ = refusal(tmp_path, *flags, '--threshold=0.9')
  assert (
    found
    == 'expected 1 or more equal predictions in a row for a bundle that exits by patience, found 0.9; set --threshold'
  )
  found, _ = refusal(tmp_path, *flags, '--risk=0.1')
  assert found == (
    '--risk needs a score that ranks images, found a bundle that exits by patience; set --budget or --threshold'
  )
  for target in ('--budget=15M', '--threshold=2'):
    assert main([*flags, target, f'--out={tmp_path / target}']) == 0
    assert read_plan(tmp_path / target).policy == 'shared'
  found, _ = refusal(tmp_path, f'--bundle={tmp_path / "tiny"}', f'--images={whole / "labeled"}', '--reject=0.1')
  assert found == '--reject needs a score that ranks images, found a bundle that exits by patience; leave it out'


def test_images_of_no_class_and_unreadable_ones(whole, folder):
  images = shutil.copytree(whole / 'labeled', folder / 'images')
  (images / 'class 1/broken.png').write_text('no image')
  flags = f'--bundle={folder / "tiny"}', f'--images={images}', '--threshold=0.5', f'--out={folder / "new"}'
  code, out, _ = run_command(main, *flags)
  assert code == 0 and out.startswith(
    f'left out 1 images that cannot be read: {images}/class 1/broken.png (not an image'
  )
  shutil.rmtree(folder / 'new')
  (images / 'odd').mkdir()
  Image.fromarray(IMAGES[0]).save(images / 'odd/a.png')
  found, _ = refusal(folder, *flags)
  assert found == (
    'expected all images in folders named after classes, or none, found HERE/images/odd/a.png; move it, or set --images'
  )


def test_images_without_a_finite_answer_are_left_out(whole, folder, monkeypatch):
  computed = bundle_lib.bundle_logits

  def overflowing(bundle, images):
    logits = computed(bundle, images)
    logits[1, 0] = np.nan
    return logits

  monkeypatch.setattr(bundle_lib, 'bundle_logits', overflowing)
  flags = f'--bundle={folder / "tiny"}', f'--images={whole / "labeled"}', '--threshold=0.5', f'--out={folder / "new"}'
  code, out, _ = run_command(main, *flags)
  left_out = -(-COUNT // run.WAVE)
  assert code == 0 and out.startswith(f'left out {left_out} images that cannot be read: {whole}/labeled/')
  assert "(the network's answer is not finite)" in out and f'read {COUNT - left_out:,} images' in out


def test_no_image_can_be_read(folder):
  (folder / 'images').mkdir()
  (folder / 'images/a.png').write_text('no image')
  found, out = refusal(folder, f'--bundle={folder / "tiny"}', f'--images={folder / "images"}')
  assert found == 'expected images in HERE/images, found none that can be read; set --images'
  assert out.startswith(f'left out 1 images that cannot be read: {folder}/images/a.png (not an image')


def test_another_version_that_appears_meanwhile_is_not_replaced(whole, folder, monkeypatch):
  load, new = run.load, folder / 'new'

  def slowly(path):
    if path != folder / 'tiny':  # The new version, before it gets its name.
      new.mkdir()
      (new / 'mine').write_text('')
    return load(path)

  monkeypatch.setattr(run, 'load', slowly)
  code, _, err = run_command(main, f'--bundle={folder / "tiny"}', f'--images={whole / "plain"}', f'--out={new}')
  assert (code, err) == (2, f'error: expected no {new}, found something there; set --out to another folder\n')
  assert list(contents(new)) == ['mine'] and {path.name for path in folder.iterdir()} == {'tiny', 'new'}


@pytest.mark.parametrize(('flag', 'value'), [('images', 'a'), ('out', 'b')])
def test_flags_of_bundles_with_a_run(flag, value):
  found = run_command(main, '--workdir=/none', '--threshold=0.9', f'--{flag}={value}')
  assert found == (2, '', f'error: --{flag} belongs to --bundle; set --bundle, or leave out --{flag}\n')


def test_no_jax(whole, folder):
  blocked = folder / 'blocked'
  blocked.mkdir()
  for name in ('jax', 'flax', 'optax', 'orbax', 'ml_collections', 'tensorflow_datasets'):
    (blocked / f'{name}.py').write_text('raise ImportError("not needed")\n')
  command = [sys.executable, '-m', 'paranet_jax.calibrate', f'--bundle={folder / "tiny"}', '--budget=15M']
  environment = os.environ | {'PYTHONPATH': f'{blocked}:{Path(__file__).resolve().parents[2]}'}
  found = subprocess.run(
    [*command, f'--images={whole / "labeled"}'], env=environment, capture_output=True, text=True, cwd=folder
  )
  assert (found.returncode, found.stderr) == (0, '') and found.stdout.endswith(f'bundle: {folder / "tiny-2"}\n')
