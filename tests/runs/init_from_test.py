"""Tests of a run that starts from the backbone of another, or from PyTorch's weights."""

import contextlib
import json
import shutil

import chex
import jax
import numpy as np
import pytest
import resnet_weights
import tiny
from running import TINY, refusal, run_main
from tensor_files import safetensors_bytes

from paranet_jax import config as config_lib
from paranet_jax import train
from paranet_jax.base_config import base_config
from paranet_jax.costs import abstract_variables
from paranet_jax.data.dataset import Dataset, Split
from paranet_jax.host.errors import UserError
from paranet_jax.host.files import write_json
from paranet_jax.host.processes import Coordinator
from paranet_jax.models.adopted.cifar_resnet import architecture
from paranet_jax.models.adopted.registry import ARCHITECTURES
from paranet_jax.models.registry import family_names
from paranet_jax.runs.checkpoints import Checkpoints
from paranet_jax.runs.dataset_facts import save_weights_facts
from paranet_jax.runs.init_from import EXIT, check_backbone, check_classes, say_shared, take_backbone
from paranet_jax.runs.learned import save_learned
from paranet_jax.runs.record import open_record
from paranet_jax.runs.workdir import save_config
from paranet_jax.task import build_task


def config(**fields):
  found = base_config('PN2-2d')
  found.model.update(layers_per_block=1, growth_rate=2, bn_size=2, image_side=8)
  found.data.update(name='digits', held_out=300)
  found.train.batch_size = 100
  found.update_from_flattened_dict({name.replace('__', '.'): value for name, value in fields.items()})
  return found


def by_path(state):
  leaves = jax.tree_util.tree_leaves_with_path({'params': state.params, 'batch_stats': state.batch_stats})
  return {jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf) for path, leaf in leaves}


def save_run(folder, settings):
  """A finished run whose variables are none that a seed gives; returns its state."""
  task = build_task(settings)
  state = jax.tree.map(lambda leaf: leaf + 3, task.init_state())
  folder.mkdir()
  save_learned(folder, task.dataset)
  save_config(folder, settings)
  write_json(folder / 'summary.json', {})
  with Checkpoints(folder, 1) as checkpoints:
    checkpoints.save(5, state, {'seed': 0, 'wall_time_s': 0.0})
  return state


def restore(settings, workdir, save=False):
  """The state that a run starts or resumes from."""
  task = build_task(settings)
  workdir.mkdir(exist_ok=True)
  with open_record(task, workdir, Coordinator()) as record:
    state = record.restore(jax.devices()[:1])
    if save:
      record.save(0, state)
  return state


def test_averages_begin_with_the_backbone(tmp_path):
  """As they begin with what a seed draws: `loss.teacher=average` would else teach what a random network answers."""
  save_run(tmp_path / 'source', config())
  begun = restore(config(init_from=str(tmp_path / 'source'), train__average=0.9), tmp_path / 'new')
  own = {'params': begun.params, 'batch_stats': begun.batch_stats}
  chex.assert_trees_all_equal(begun.opt_state.average, own)
  for average, leaf in zip(*map(jax.tree.leaves, (begun.opt_state.average, own)), strict=True):
    # A step is given the buffers of its state, and each once.
    assert average.unsafe_buffer_pointer() != leaf.unsafe_buffer_pointer()


@pytest.mark.parametrize('fields', [{}, {'model__num_classes': 12, 'seed': 1, 'train__optimizer': 'adamw'}])
def test_the_backbone_is_taken_and_the_exits_are_new(tmp_path, fields, capsys, standard_promotion):
  source = by_path(save_run(tmp_path / 'source', config()))
  settings = config(**fields, init_from=str(tmp_path / 'source'))
  check_backbone(settings, tmp_path / 'new')
  begun, drawn = restore(settings, tmp_path / 'new', save=True), build_task(settings).init_state()
  assert f'backbone from {tmp_path}/source at step 5, new exits' in capsys.readouterr().out
  begun, drawn = by_path(begun), by_path(drawn)
  assert begun.keys() == drawn.keys()
  for path, value in begun.items():
    expected = drawn if path.split('/')[1] in ('exit_1', 'exit_2') else source
    np.testing.assert_array_equal(value, expected[path], err_msg=path, strict=True)
  # A resumed run does not read it again.
  shutil.rmtree(tmp_path / 'source')
  check_backbone(settings, tmp_path / 'new')
  for path, value in by_path(restore(settings, tmp_path / 'new')).items():
    np.testing.assert_array_equal(value, begun[path])


@pytest.mark.parametrize('family', family_names())
def test_what_depends_on_the_classes_is_named_exit(family):
  new = {'exits': 'layer1', 'last': 'new'} if family == 'adopted' else {}  # Its own head comes with its weights.
  settings = tiny.small(family, **new) if family in tiny.FAMILIES else config()
  # No other size of these networks is 97.
  variables = abstract_variables(config_lib.build_model(settings, 97), config_lib.image_shape(settings))
  leaves = jax.tree_util.tree_leaves_with_path(variables)
  assert {path[1].key[: len(EXIT)] for path, leaf in leaves if 97 in leaf.shape} == {EXIT}


def test_it_is_in_the_saved_configuration(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  save_run(tmp_path / 'source', config())
  fields = ('model.bn_size=2', 'model.growth_rate=2', 'model.image_side=8', 'name=PN2-2d', 'init_from=source')
  # A run without steps: stopped before the first.
  monkeypatch.setattr(train, 'train_loop', lambda records, state, *unused: (state, None))
  result = run_main(*TINY, '--workdir=new', *(f'--config.{field}' for field in fields))
  assert result.code == 0, result
  assert json.loads((tmp_path / 'new' / 'config.json').read_text())['init_from'] == f'{tmp_path}/source'


@pytest.mark.parametrize('missing', ['config.json', 'summary.json', 'checkpoints'])
def test_what_is_not_a_finished_run_is_refused(tmp_path, missing):
  source = tmp_path / 'source'
  for name in {'config.json', 'summary.json', 'checkpoints'} - {missing}:
    (source / name).mkdir(parents=True)
  for seeds in (1, 2):
    message = refusal(*TINY, f'--workdir={tmp_path}/new', f'--config.init_from={source}', f'--config.seeds={seeds}')
    assert message == (
      f'init_from must be the folder of a finished run, and {source} has no {missing}; set --config.init_from'
    )
  assert [path.name for path in tmp_path.iterdir()] == ['source']


@pytest.mark.parametrize(
  ('fields', 'what'),
  [
    (
      {'model__growth_rate': 4},
      'batch_stats/pipeline_1_block_1/layer_1/norm1/mean is [4] there and [8]',
    ),
    ({'model__stem_norm': True}, 'batch_stats/pipeline_1_stem_norm/mean is absent there and [4]'),
    ({'model__entry_pool': 'avg'}, 'model.entry_pool is max there and avg'),  # The shapes are the same.
    (
      {'name': 'PN1-d', 'model__halvings': (2,)},
      'params/pipeline_2_block_1/layer_1/conv1/kernel is [1, 1, 4, 4] there and absent',
    ),
  ],
)
def test_the_backbone_of_a_different_architecture_is_refused(tmp_path, fields, what):
  source = tmp_path / 'source'
  save_run(source, config())
  with pytest.raises(UserError) as error:
    check_backbone(config(**fields, init_from=str(source)), tmp_path / 'new')
  assert str(error.value) == (
    f'the backbone of init_from {source} does not fit: {what} in this configuration; '
    f'set --config to the network of {source}/config.json, or --config.init_from'
  )


def resnet(**fields):
  found = base_config('resnet', 'resnet')
  found.data.update(name='digits', held_out=300)
  found.train.batch_size = 100
  found.model.update(depth=8, image_side=8, shortcut_padding='both_sides')
  found.update_from_flattened_dict({name.replace('__', '.'): value for name, value in fields.items()})
  return found


def test_the_backbone_is_taken_from_pytorch_weights(tmp_path, capsys):
  drawn = resnet_weights.draw(8)
  (tmp_path / 'a.pth').write_bytes(safetensors_bytes(drawn))  # The content decides, not the suffix.
  settings = resnet(init_from=str(tmp_path / 'a.pth'), model__exits='stages')
  check_backbone(settings, tmp_path / 'new')
  begun, fresh = by_path(restore(settings, tmp_path / 'new')), by_path(build_task(settings).init_state())
  assert f'backbone from {tmp_path}/a.pth (PyTorch, CIFAR ResNet-8, zeros of shortcuts on both sides), new exits' in (
    capsys.readouterr().out
  )
  assert begun.keys() == fresh.keys()
  for path in begun:
    if '/exit_' in path:
      np.testing.assert_array_equal(begun[path], fresh[path], err_msg=path)
  np.testing.assert_array_equal(begun['params/stem/conv/kernel'], drawn['conv1.weight'].transpose(2, 3, 1, 0))
  np.testing.assert_array_equal(begun['batch_stats/stage_3_block_1/norm2/var'], drawn['layer3.0.bn2.running_var'])


def adopted(**fields):
  found = base_config('adopted', 'adopted')
  found.data.update(name='digits', held_out=300)
  found.train.batch_size = 100
  found.model.update(arch='cifar_resnet8', exits='layer1', image_side=8)
  found.update_from_flattened_dict({name.replace('__', '.'): value for name, value in fields.items()})
  return found


@pytest.fixture
def tiny_architecture(monkeypatch):
  monkeypatch.setattr(ARCHITECTURES, 'known', {'cifar_resnet8': architecture})


@pytest.mark.parametrize('last', ['own', 'new'])
def test_an_adopted_network_is_taken_with_its_classifier(tmp_path, tiny_architecture, last):
  drawn = resnet_weights.draw(8)
  (tmp_path / 'a').write_bytes(safetensors_bytes(drawn))
  settings = adopted(init_from=str(tmp_path / 'a'), model__last=last)
  check_backbone(settings, tmp_path / 'new')
  begun, fresh = by_path(restore(settings, tmp_path / 'new')), by_path(build_task(settings).init_state())
  assert begun.keys() == fresh.keys()
  new = {'own': ('/exit_1/',), 'new': ('/exit_1/', '/exit_2/')}[last]
  for path in begun:
    assert np.array_equal(begun[path], fresh[path]) == (path.split('/', 1)[1].startswith(tuple(n[1:] for n in new)))
  np.testing.assert_array_equal(
    begun['params/layer3.0/conv1/kernel'], drawn['layer3.0.conv1.weight'].transpose(2, 3, 1, 0)
  )
  if last == 'own':
    np.testing.assert_array_equal(begun['params/linear/kernel'], drawn['linear.weight'].T)


@pytest.mark.parametrize(('last', 'classes'), [('own', 10), ('new', 7)])
def test_copied_blocks_of_a_head_start_as_the_networks_own(tmp_path, tiny_architecture, last, classes):
  drawn = resnet_weights.draw(8, classes)
  (tmp_path / 'a').write_bytes(safetensors_bytes(drawn))
  settings = adopted(model__last=last, model__head='blocks')
  begun = by_path(take_backbone(build_task(settings).init_state(), tmp_path / 'a', settings))
  copies = {path: leaf for path, leaf in begun.items() if '/exit_1/blocks/' in path}
  assert {path.split('/')[3] for path in copies} == {'layer2.0', 'layer3.0', 'linear'}
  for path, leaf in copies.items():
    if classes == 10 or '/linear/' not in path:
      np.testing.assert_array_equal(leaf, begun[path.replace('exit_1/blocks/', '')], err_msg=path)
    else:  # Other classes have a new classifier.
      assert leaf.shape[-1] == 10


EXITS = {'train__regime': 'exits', 'model__exits': 'stages'}


def test_the_last_exit_stays_where_only_exits_learn(tmp_path):
  source = by_path(save_run(tmp_path / 'source', resnet()))
  (tmp_path / 'a').write_bytes(safetensors_bytes(resnet_weights.draw(8)))
  for number, (init_from, kernel) in enumerate(
    {'source': source['params/exit_1/classifier/kernel'], 'a': resnet_weights.draw(8)['linear.weight'].T}.items()
  ):
    settings = resnet(init_from=str(tmp_path / init_from), **EXITS)
    check_backbone(settings, tmp_path / 'new')
    begun = by_path(restore(settings, tmp_path / f'new{number}'))
    np.testing.assert_array_equal(begun['params/exit_3/classifier/kernel'], kernel)


def test_exits_that_learned_alone_are_taken_by_a_run_of_the_whole(tmp_path, capsys):
  source = by_path(save_run(tmp_path / 'source', resnet(**EXITS)))
  settings = resnet(init_from=str(tmp_path / 'source'), model__exits='stages')
  begun = by_path(take_backbone(build_task(settings).init_state(), tmp_path / 'source', settings))
  chex.assert_trees_all_equal(begun, source)
  assert capsys.readouterr().out.endswith('at step 5, its exits\n')


def test_other_exits_are_new(tmp_path, capsys):
  source = by_path(save_run(tmp_path / 'source', resnet(**EXITS)))
  settings = resnet(init_from=str(tmp_path / 'source'))
  begun = by_path(take_backbone(build_task(settings).init_state(), tmp_path / 'source', settings))
  assert not np.array_equal(begun['params/exit_1/classifier/kernel'], source['params/exit_3/classifier/kernel'])
  assert capsys.readouterr().out.endswith('at step 5, new exits\n')


WHOLE = {'model__exits': 'stages'}


@pytest.mark.parametrize(
  ('saved', 'fields', 'kept'),
  [({}, EXITS, True), (EXITS, WHOLE, True), ({}, WHOLE, False), (WHOLE, {}, False)],
  ids=['the last exit', 'all exits', 'new exits', 'fewer new exits'],
)
def test_exits_are_kept_for_the_same_classes_alone(tmp_path, saved, fields, kept):
  source = tmp_path / 'source'
  save_run(source, resnet(**saved))
  settings = resnet(init_from=str(source), **fields)
  restore(settings, tmp_path / 'same')
  facts = json.loads((source / 'dataset.json').read_text())
  facts['class_names'][4:6] = '5', '4'
  write_json(source / 'dataset.json', facts)
  if not kept:
    restore(settings, tmp_path / 'new')
    return
  with pytest.raises(UserError) as error:
    restore(settings, tmp_path / 'new')
  assert str(error.value) == (
    f"init_from {source} learned '5' as class 5, found '4'; name a run that learned the same classes by "
    '--config.init_from, or set --config.data.data_dir'
  )


@pytest.mark.parametrize(
  ('there', 'here', 'refused'),
  [
    ('ab', 'ab', False),
    ('ab', 'abc', False),  # A network may have outputs for classes to come.
    ('abc', 'ab', False),
    (('class 0', 'class 1'), 'ab', False),  # It learned without labels.
    ('ab', ('class 0', 'class 1'), False),
    ('ab', 'ba', True),
    ('ab', 'ac', True),
    (('class 1', 'b'), 'ab', True),  # A class of this name.
  ],
)
def test_classes_are_compared_by_their_place(tmp_path, there, here, refused):
  save_weights_facts(tmp_path, 'photos', tuple(there), (0.5,), (0.5,))
  image = Split(np.zeros((1, 4, 4, 1), np.uint8), np.zeros(1, np.int32), np.zeros(1, np.uint64))
  dataset = Dataset('own', '', image, None, image, tuple(here), (0.5,), (0.5,), 0, False)
  with pytest.raises(UserError, match=r'^loss.teacher_run .* learned ') if refused else contextlib.nullcontext():
    check_classes('loss.teacher_run', tmp_path, dataset)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (
      resnet(**EXITS),
      "train.regime 'exits' trains no backbone, and init_from is not set; set --config.init_from to the folder of a "
      'run or to a file of PyTorch weights',
    ),
    (
      resnet(init_from='a', **EXITS, model__depth=14),
      'a has depth 8, found 14; set --config.model.depth=8',
    ),
  ],
)
def test_exits_need_a_network(tmp_path, monkeypatch, settings, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'a').write_bytes(safetensors_bytes(resnet_weights.draw(8)))
  with pytest.raises(UserError) as error:
    check_backbone(settings, tmp_path / 'new')
  assert str(error.value) == message


def test_a_classifier_of_other_classes_is_refused(tmp_path):
  source = tmp_path / 'source'
  save_run(source, resnet(model__num_classes=12))
  with pytest.raises(UserError) as error:
    restore(resnet(init_from=str(source), **EXITS), tmp_path / 'new')
  assert str(error.value) == (
    f'{source} has params/exit_3/classifier/bias [12], expected [10] for the classes of the data; set '
    '--config.model.num_classes, or --config.init_from'
  )


def test_weights_that_read_other_images_are_refused(tmp_path, tiny_architecture):
  (tmp_path / 'a').write_bytes(safetensors_bytes(resnet_weights.draw(8)))
  with pytest.raises(UserError) as error:
    restore(adopted(init_from=str(tmp_path / 'a'), model__channels=1), tmp_path / 'new')
  assert str(error.value) == (
    f'{tmp_path}/a has params/conv1/kernel [3, 3, 3, 16], expected [3, 3, 1, 16] for the side and channels of the '
    'images; set --config.model.image_side and .channels, or --config.init_from'
  )


def test_weights_of_another_architecture_are_refused_by_the_field(tmp_path, tiny_architecture):
  (tmp_path / 'a').write_bytes(safetensors_bytes(resnet_weights.draw(8) | {'other': np.zeros(3, np.float32)}))
  with pytest.raises(UserError) as error:
    check_backbone(adopted(init_from=str(tmp_path / 'a')), tmp_path / 'new')
  assert str(error.value) == (
    f'{tmp_path}/a does not fit cifar_resnet8 of 10 classes: tensors 1 unknown (other); the nearest is cifar_resnet8: '
    'name its weights, or set --config.model.arch'
  )


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (
      config(init_from='/no/file'),
      'init_from must be the folder of a finished run or a file of PyTorch weights, and /no/file does not exist; '
      'set --config.init_from',
    ),
    (
      config(init_from=__file__),
      "PyTorch weights are read for model.family 'adopted' or 'resnet' (CIFAR ResNets), found 'paranet'; "
      'set --config, or --config.init_from to the folder of a run',
    ),
    (
      resnet(init_from=__file__, model__shortcut_padding='behind'),
      "PyTorch's CIFAR ResNets have model.shortcut_padding 'both_sides', found 'behind'; "
      'set --config.model.shortcut_padding=both_sides',
    ),
    (
      resnet(init_from=__file__, model__block='preactivation'),
      "PyTorch's CIFAR ResNets have model.block 'basic', found 'preactivation'; set --config.model.block=basic",
    ),
    (
      resnet(init_from=__file__),
      f'{__file__} cannot be read as PyTorch weights (expected a file that torch.save wrote, or safetensors); save the '
      'state dict alone, by torch.save(model.state_dict(), FILE) or as safetensors, and name that file',
    ),
  ],
)
def test_pytorch_weights_that_cannot_be_used_are_refused(tmp_path, settings, message):
  with pytest.raises(UserError) as error:
    check_backbone(settings, tmp_path / 'new')
  assert str(error.value) == message


def test_images_that_the_backbone_was_trained_on_are_counted(tmp_path, capsys):
  def split(*ids):
    return Split(np.zeros((len(ids), 4, 4, 1), np.uint8), np.zeros(len(ids), np.int32), np.array(ids, np.uint64))

  def dataset(train, held_out, test):
    return Dataset('own', '', train, held_out, test, ('a', 'b'), (0.5,), (0.5,), 0, False)

  source = tmp_path / 'source'
  source.mkdir()
  save_learned(source, dataset(split(1, 2, 3, 4), None, split(5, 6)))
  say_shared(source, dataset(split(1, 2, 3), None, split(5, 6)))
  say_shared(tmp_path / 'weights.pth', dataset(split(5), split(1), split(2)))
  assert capsys.readouterr().out == ''
  say_shared(source, dataset(split(1, 5), split(2, 3, 7), split(4, 6)))
  held_out, test = capsys.readouterr().out.splitlines()
  assert held_out.startswith(
    f'held_out has 2 images that {source} was trained on, so what is measured on them does not'
  )
  assert test.startswith('test has 1 images that ') and test.endswith('held_out (and data.test_fraction) as there')
