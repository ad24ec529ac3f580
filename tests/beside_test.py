"""Tests of what a state holds beside its optimizer's: averages of the weights, and a network that teaches."""

import contextlib
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import tiny
from running import TINY, before_each_step, refusal, run_main, saved_state, send

import paranet_jax
from paranet_jax import losses, steps, train
from paranet_jax import task as task_lib
from paranet_jax.base_config import base_config
from paranet_jax.display.metrics import read_metrics
from paranet_jax.host.errors import UserError
from paranet_jax.losses import squared_error
from paranet_jax.models import linked
from paranet_jax.optim import make_optimizer
from paranet_jax.runs import teacher as teacher_lib
from paranet_jax.runs.checkpoints import Checkpoints
from paranet_jax.runs.packed import pack
from paranet_jax.runs.teacher import check_normalization, check_teacher
from paranet_jax.runs.workdir import restore_config, save_config
from paranet_jax.steps import Beside, averaged, computed_exits, make_train_step, teaching_exits, zero_totals
from paranet_jax.targets import parse_name
from paranet_jax.task import build_task

pytestmark = pytest.mark.usefixtures('programs')


def test_averages():
  """Decays 1/10 after no step, 2/11 after one, and at most 0.9."""
  old, new = {'w': jnp.array([1.0])}, {'w': jnp.array([2.0])}
  for step, expected in ((0, 1.9), (1, 20 / 11), (1000, 1.1)):
    np.testing.assert_allclose(averaged(old, new, 0.9, jnp.int32(step))['w'], [expected], rtol=1e-6)


def test_exits_that_teach():
  matching = tiny.objective('PN3-x3d')
  assert (teaching_exits(matching), computed_exits(matching)) == ((3,), (2, 3))
  other = tiny.objective('PN3-dxx', teacher='average', teachers={1: (3,)})
  assert (teaching_exits(other), computed_exits(other)) == ((3,), (1,))


@pytest.mark.parametrize('teacher', ['average', 'teacher'])
def test_a_step_with_another_teacher(teacher):
  """Exit 1 matches exit 2 of the other network in inference; the averages follow."""
  name, model, optimizer = 'PN2-2d', tiny.named('PN2-2d'), optax.sgd(0.1)
  images, labels = tiny.images(4, model), tiny.labels(4)
  state = tiny.state(model, optimizer)
  other = jax.tree.map(jnp.asarray, tiny.variables(model, seed=1))
  own = {'params': state.params, 'batch_stats': state.batch_stats}
  beside = Beside(state.opt_state, own, {})._replace(**{teacher: other})
  objective = tiny.objective(name, teacher=teacher)
  step = jax.jit(make_train_step(model, optimizer, objective, tiny.PLAIN, average=0.5))
  order = np.arange(4, dtype=np.int32)[None]
  arguments = zero_totals(parse_name(name).targets), images, labels, order
  after, metrics = step(state.replace(opt_state=beside, step=jnp.int32(100)), *arguments)

  pixels = (images / 255 - np.array(tiny.PLAIN.mean)) / np.array(tiny.PLAIN.std)
  geometry = {'blocks': (1, 2), 'halvings': (2, 1), 'cascade': ((2, 2),)}
  (student, _), _ = reference.paranet(own, pixels, train=True, **geometry)
  (_, taught), _ = reference.paranet(other, pixels, train=False, **geometry)
  np.testing.assert_allclose(metrics['exit_1/loss'], np.mean((student - taught) ** 2), rtol=1e-3)
  new = {'params': after.params, 'batch_stats': after.batch_stats}
  expected = jax.tree.map(lambda old, new: 0.5 * old + 0.5 * new, beside.average, new)
  chex.assert_trees_all_close(after.opt_state.average, expected, rtol=1e-6)
  chex.assert_trees_all_equal(after.opt_state.teacher, beside.teacher)


def traced(function, *arguments):
  return str(jax.make_jaxpr(function)(*arguments))


def test_off_is_the_program_without_any_of_it(monkeypatch):
  """With the defaults, a step traces none of the new parts, and the optimizer and the loss are what they were."""

  def never(*_, **__):
    raise AssertionError

  parts = {
    steps: ('auto_augment', 'alternately_mirrored', 'cutmix', 'averaged', 'conflict_averse'),
    task_lib: ('with_own_channels',),
    losses: ('leaving_weights',),
    linked: ('boosted', 'with_transfer'),
  }
  for module, names in parts.items():
    for name in names:
      monkeypatch.setattr(module, name, never)
  config = base_config('PN2-2d')
  config.update_from_flattened_dict({'model.layers_per_block': 1, 'model.image_side': 8, 'data.name': 'digits'})
  task = build_task(config)
  state = jax.eval_shape(task.init_state)
  assert not isinstance(state.opt_state, Beside)
  images, labels = task.dataset.train.images, task.dataset.train.labels
  jax.eval_shape(task.train_step(), state, zero_totals(task.targets), images, labels, np.zeros((1, 64), np.int32))

  params, rate = {'kernel': jnp.ones((2, 3))}, optax.constant_schedule(0.1)
  ours = make_optimizer('sgd', rate)
  plain = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(rate, 0.9, True))
  assert traced(ours.update, params, ours.init(params), params) == traced(
    plain.update, params, plain.init(params), params
  )

  def mean_square(student, teacher):
    difference = student.astype(jnp.float32) - jax.lax.stop_gradient(teacher.astype(jnp.float32))
    return jnp.mean(jnp.square(difference), axis=-1)

  logits = jnp.ones((2, 3))
  assert traced(squared_error, logits, logits) == traced(mean_square, logits, logits)


RUN = (*TINY, '--config.name=PN2-2d', '--config.model.halvings=(2,2)', '--config.model.blocks=(1,1)')
AVERAGE = (*RUN, '--config.train.average=0.9', '--config.loss.teacher=average')


@pytest.fixture(scope='module')
def whole(programs, tmp_path_factory):
  """A run with averages that nothing happened to."""
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  result = run_main(*AVERAGE, f'--workdir={workdir}')
  assert (result.code, result.err) == (0, '') and f'averaged weights: {workdir}/average\n' in result.out
  return workdir


def test_averages_are_evaluated_and_saved_beside(whole):
  lines = [line for line in read_metrics(whole) if line['split'].startswith('test')]
  assert [(line['step'], line['split']) for line in lines] == [
    (step, split) for step in (5, 10) for split in ('test', 'test_average')
  ]
  summary = json.loads((whole / 'summary.json').read_text())
  for row in summary['average']['test']:
    key = f'exit_{row["exit"]}/nll'
    assert row['nll'] == lines[-1].get(key) and row['nll'] != lines[-2].get(key) or not row['trained']
  # Other commands read the averages as a run.
  found = run_main(f'--workdir={whole}/average', '--mode=eval', '--json')
  assert (found.code, found.err) == (0, '')
  assert [row['nll'] for row in json.loads(found.out)['splits']['test']] == pytest.approx(
    [row['nll'] for row in summary['average']['test']]
  )
  saved = json.loads((whole / 'average' / 'summary.json').read_text())
  for measure in ('nll', 'confusion'):
    assert [row[measure] for row in saved['exits']] == [row[measure] for row in summary['average']['test']]
  for row in saved['exits']:  # Row by row the images of a class.
    counts = np.array(row['confusion'])
    assert counts.trace() / counts.sum() == pytest.approx(row['accuracy'])
  state = saved_state(whole)
  pairs = zip(*map(jax.tree.leaves, (state.opt_state.average['params'], state.params)), strict=True)
  assert any(not np.array_equal(*pair) for pair in pairs)


def test_averages_are_packed(whole, tmp_path):
  assert pack(whole / 'average', tmp_path / 'packed') == 10
  kept = jax.tree.map(lambda leaf: leaf.astype(np.float16).astype(np.float32), averages(whole)['params'])
  chex.assert_trees_all_equal(paranet_jax.load(tmp_path / 'packed').variables['params'], kept)


def averages(workdir):
  with Checkpoints(workdir / 'average') as checkpoints:
    return checkpoints.read_variables(10)


def averages_of_state(workdir):
  average = saved_state(workdir).opt_state.average
  return jax.device_get({name: average[name] for name in ('params', 'batch_stats')})


def test_a_finished_run_keeps_its_averages_until_it_is_trained_again(whole, tmp_path):
  workdir = shutil.copytree(whole, tmp_path / 'run')
  (workdir / 'average' / 'exits.json').write_text('{}')  # Calibrated meanwhile.
  files = {path: path.read_bytes() for path in (workdir / 'average' / 'checkpoints').rglob('*') if path.is_file()}
  assert run_main(*AVERAGE, f'--workdir={workdir}').code == 0
  assert all(path.read_bytes() == content for path, content in files.items())
  chex.assert_trees_all_equal(averages(workdir), averages_of_state(workdir))
  # Damaged ones are written again.
  (workdir / 'average' / 'checkpoints' / '10' / 'checksums.json').write_text('{"state/manifest.ocdbt": 1}')
  assert run_main(*AVERAGE, f'--workdir={workdir}').code == 0
  chex.assert_trees_all_equal(averages(workdir), averages_of_state(workdir))
  # Other weights of the same step take their place.
  shutil.rmtree(workdir / 'checkpoints')
  (workdir / 'summary.json').unlink()
  other = (*AVERAGE, '--config.train.learning_rate=0.01', '--accept_config_changes', f'--workdir={workdir}')
  assert run_main(*other).code == 0
  chex.assert_trees_all_equal(averages(workdir), averages_of_state(workdir))
  assert any(
    not np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, map(averages, (whole, workdir))), strict=True)
  )
  saved = json.loads((workdir / 'average' / 'summary.json').read_text())
  summary = json.loads((workdir / 'summary.json').read_text())
  assert [row['nll'] for row in saved['exits']] == [row['nll'] for row in summary['average']['test']]


def test_a_run_is_finished_after_its_averages(whole, tmp_path, monkeypatch):
  workdir = shutil.copytree(whole, tmp_path / 'run')
  for name in ('average', 'summary.json'):
    shutil.rmtree(workdir / name) if name == 'average' else (workdir / name).unlink()

  def killed(*_):
    raise SystemExit(9)

  monkeypatch.setattr('paranet_jax.train.save_average', killed)
  with pytest.raises(SystemExit):
    run_main(*AVERAGE, f'--workdir={workdir}')
  assert not (workdir / 'summary.json').exists()


def test_a_resumed_run_has_the_same_averages(whole, tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    before_each_step(patch, send(15, at_step=7))
    assert 'stopped by SIGTERM after step 7' in run_main(*AVERAGE, f'--workdir={tmp_path}').out
  assert run_main(*AVERAGE, f'--workdir={tmp_path}').code == 0
  chex.assert_trees_all_equal(saved_state(tmp_path), saved_state(whole), strict=True)


def test_a_finished_run_teaches(whole, tmp_path):
  flags = *RUN, '--config.loss.teacher=run', f'--config.loss.teacher_run={whole}', '--config.train.max_steps=2'
  result = run_main(*flags, f'--workdir={tmp_path}/run')
  assert (result.code, result.err) == (0, '')
  assert 'was trained on' not in result.out
  teacher = saved_state(tmp_path / 'run').opt_state.teacher
  state = saved_state(whole)
  chex.assert_trees_all_equal(teacher, {'params': state.params, 'batch_stats': state.batch_stats})


def test_images_that_the_teacher_was_trained_on_are_counted(whole, tmp_path, monkeypatch):
  # A run without steps: stopped before the first.
  monkeypatch.setattr(train, 'train_loop', lambda records, state, *unused: (state, None))
  held_out = json.loads((whole / 'dataset.json').read_text())['counts']['held_out']
  flags = *RUN, '--config.loss.teacher=run', f'--config.loss.teacher_run={whole}'
  result = run_main(*flags, f'--config.data.held_out={held_out + 100}', f'--workdir={tmp_path}/run')
  # Larger splits hold the smaller ones.
  assert result.code == 0 and f'held_out has 100 images that {whole} was trained on, so ' in result.out
  assert 'test has ' not in result.out


def test_a_run_of_other_classes_cannot_teach(whole, tmp_path):
  run = shutil.copytree(whole, tmp_path / 'teacher')
  facts = json.loads((run / 'dataset.json').read_text())
  facts['class_names'][:2] = '1', '0'
  (run / 'dataset.json').write_text(json.dumps(facts))
  flags = (*RUN, '--config.loss.teacher=run', f'--config.loss.teacher_run={run}')
  assert refusal(*flags, f'--workdir={tmp_path}/run', started=True) == (
    f"loss.teacher_run {run} learned '1' as class 1, found '0'; name a run that learned the same classes by "
    '--config.loss.teacher_run, or set --config.data.data_dir'
  )


@pytest.mark.parametrize(
  ('there', 'here', 'other', 'message'),
  [
    ((2, 1), None, {}, None),
    (None, (2, 1), {}, None),
    ((2, 2), None, {}, 'model.halvings is (2, 2) there and None in this configuration'),
    (None, (2, 2), {}, 'model.halvings is None there and (2, 2) in this configuration'),
    ((2, 1), None, {'entry_order': 'pool_first'}, 'model.entry_order is stem_first there and pool_first in this'),
  ],
)
def test_a_teacher_may_spell_out_what_the_new_run_derives(whole, tmp_path, there, here, other, message):
  """Two pipelines are halved twice and once at their entry, unless `model.halvings` says otherwise."""
  run = shutil.copytree(whole, tmp_path / 'teacher')
  saved = json.loads((run / 'config.json').read_text())
  saved['model']['halvings'] = there
  (run / 'config.json').write_text(json.dumps(saved))
  config = restore_config(whole)
  config.model.update({'halvings': here, **other})
  config.loss.update(teacher='run', teacher_run=str(run))
  with pytest.raises(UserError) if message else contextlib.nullcontext() as error:
    check_teacher(config, tmp_path / 'new')
  assert message is None or str(error.value).startswith(f'loss.teacher_run {run} is another network: {message}')


@pytest.mark.parametrize(
  ('there', 'here', 'distill', 'missing'),
  [
    ('PN3-dxx', 'PN3-33d', 'none', 3),
    ('PN3-xxd', 'PN3-33d', 'none', None),
    ('PN3-dxd', 'PN3-ddd', 'last', None),
    ('PN3-dxd', 'PN3-ddd', 'next', 2),
    ('PN3-ddx', 'PN3-ddd', 'later', 3),
    ('PN3-ddx', 'PN3-ddx', 'all', None),
  ],
)
def test_what_exits_learn_from_has_learned(tmp_path, monkeypatch, there, here, distill, missing):
  """An exit without a loss has parameters, too: those that the seed drew."""
  run = tmp_path / 'teacher'
  (run / 'checkpoints').mkdir(parents=True)
  (run / 'summary.json').write_text('{}')
  save_config(run, base_config(there))
  monkeypatch.setattr(teacher_lib, 'backbone_difference', lambda config, run: None)
  config = base_config(here)
  config.loss.update(teacher='run', teacher_run=str(run), distill=distill)
  with pytest.raises(UserError) if missing else contextlib.nullcontext() as error:
    check_teacher(config, tmp_path / 'new')
  assert missing is None or str(error.value) == (
    f'loss.teacher_run {run} must have trained exit {missing}, from which {here} learns, found {there}, which did not; '
    'set --config.loss.teacher_run'
  )


def test_a_teacher_reads_images_as_it_learned_to(whole, tmp_path):
  """The mean may be off by 5 % of the deviation, as those of other splits of a data set are."""
  run = shutil.copytree(whole, tmp_path / 'teacher')
  facts = json.loads((run / 'dataset.json').read_text())
  dataset = build_task(restore_config(whole)).dataset
  for share, fits in ((0.04, True), (0.06, False)):
    mean = [value + share * deviation for value, deviation in zip(facts['mean'], facts['std'], strict=True)]
    (run / 'dataset.json').write_text(json.dumps(facts | {'mean': mean}))
    with contextlib.nullcontext() if fits else pytest.raises(UserError, match='learned from images of mean and dev'):
      check_normalization(run, dataset)
  (run / 'dataset.json').write_text(json.dumps(facts | {'mean': [0.5] * len(facts['mean'])}))
  flags = (*RUN, '--config.loss.teacher=run', f'--config.loss.teacher_run={run}')
  message = refusal(*flags, f'--workdir={tmp_path}/run', started=True)
  assert message.startswith(f'loss.teacher_run {run} learned from images of mean and deviation 0.500')


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ((), 'loss.teacher_run must be the folder of a finished run, and {run} has no summary.json; set --config.loss.tea'),
    (('--config.data.name=cifar10',), 'loss.teacher_run {run} learned from data.name digits, found cifar10; set --con'),
    (('--config.model.growth_rate=3',), 'loss.teacher_run {run} is another network: '),
    # The shapes are the same.
    (('--config.model.entry_pool=avg',), 'loss.teacher_run {run} is another network: model.entry_pool is max there'),
    (
      ('--config.model.image_side=16',),
      'loss.teacher_run {run} is another network: model.image_side is 8 there and 16',
    ),
    (
      (
        *('--config.name=PN2-dd', '--config.loss.distill=all', '--config.loss.hard_label_weight=0.5'),
        '--config.model.boost=0.5',
      ),
      'loss.teacher_run {run} is another network: model.boost is 0.0 there and 0.5 in this configuration; set --config',
    ),
  ],
)
def test_a_run_that_cannot_teach(whole, tmp_path, fields, message):
  run = shutil.copytree(whole, tmp_path / 'teacher')
  if not fields:
    (run / 'summary.json').unlink()
  flags = (*RUN, '--config.loss.teacher=run', f'--config.loss.teacher_run={run}', *fields)
  assert refusal(*flags, f'--workdir={tmp_path}/run').startswith(message.format(run=run))
  assert not (tmp_path / 'run').exists()
