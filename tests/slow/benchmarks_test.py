"""Every benchmark on a tiny network: the networks that it compares agree, and it prints what it measured."""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import (
  compile_time,
  first_step,
  fresh_process,
  inference,
  loader,
  memory,
  network,
  peers,
  report,
  saving,
  train_step,
)
from benchmarks.network import Size
from benchmarks.own_process import own_process
from paranet_jax.data.dataset import Split, StoredImages
from paranet_jax.host.errors import UserError
from paranet_jax.host.huge_pages import VARIABLE
from paranet_jax.losses import exit_losses, total_loss
from paranet_jax.targets import parse_name

TINY = Size(layers=2, growth_rate=2, side=8, batch=4)
SMALLEST = Size(layers=1, growth_rate=2, side=8, batch=4)
FLAGS = [f'--{field}={value}' for field, value in vars(SMALLEST).items()]
SURROUNDINGS = {'machine', 'versions', 'date'}
RANDOM_VARIABLES = network.random_variables
ROW = {'what', 'peer', 'batch', 'exit', 'ours', 'theirs', 'ratio', 'unit'}


def test_own_process(capfd):
  numbers = [1, 2, 3, 4, 5]
  with own_process('eager', getattr, numbers, 'pop') as pop:
    assert len(multiprocessing.active_children()) == 1
    assert pop(0) == 1
    assert pop.seconds(2) > 0
    assert (pop(), numbers) == (3, [1, 2, 3, 4, 5])
    with pytest.raises(UserError, match='^expected eager to run in its own process, found TypeError: .* [(]traceback'):
      pop('none')
    with pytest.raises(UserError, match='^expected eager to run in its own process, found it ended with code 0$'):
      pop()
  assert not multiprocessing.active_children()
  out, err = capfd.readouterr()
  assert out == '' and err.startswith('Traceback')


@pytest.mark.parametrize('write, arguments', [(print, ('a notice',)), (os.write, (1, b'a notice\n'))])
def test_own_process_writes_to_standard_error(write, arguments, monkeypatch, capfd):
  monkeypatch.delenv('PYTHONUNBUFFERED', raising=False)
  with own_process('eager', partial, write) as remote_write:
    remote_write(*arguments)
  assert capfd.readouterr() == ('', 'a notice\n')


def test_own_process_ignores_control_c(capfd):
  with own_process('eager', partial, signal.raise_signal) as interrupt_itself:
    interrupt_itself(signal.SIGINT)
  with pytest.raises(KeyboardInterrupt), own_process('eager', partial, os.kill) as interrupt_ours:
    interrupt_ours(os.getpid(), signal.SIGINT)
  assert not multiprocessing.active_children()
  assert capfd.readouterr() == ('', '')


def test_own_process_that_cannot_make_its_function():
  with pytest.raises(UserError) as here:
    parse_name('PN')
  with pytest.raises(UserError) as there, own_process('eager', parse_name, 'PN'):
    pass
  assert str(there.value) == str(here.value)
  with pytest.raises(UserError, match='^expected eager to run in its own process, found it ended with code 3$'):
    with own_process('eager', os._exit, 3):
      pass
  assert not multiprocessing.active_children()


@pytest.mark.parametrize('main', [train_step.main, inference.main, compile_time.main])
def test_without_pytorch(main, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(UserError):
    peers.require_torch()
  monkeypatch.setattr(network, 'random_variables', None)  # Nothing slow has begun.
  assert main([*FLAGS, '--json']) == 2
  out, err = capsys.readouterr()
  assert out == ''
  assert err.splitlines()[-1] == 'error: expected PyTorch, found none; pip install -r benchmarks/requirements.txt'


class FakeTorch:
  """Replaces `torch_paranet`: takes no time, and prints to standard output, which is reserved for the result."""

  @staticmethod
  def torch_network(variables, *, pool_first):
    print('a notice')
    return variables

  @staticmethod
  def training_step(theirs, images, labels, optimizer, **options):
    return lambda: None

  @staticmethod
  def forward(theirs, exits, **options):
    return lambda images: [np.zeros((len(images), 100))] * len(exits)


@pytest.fixture
def fake_torch(monkeypatch):
  """Installs the fake in this process."""

  def stand_in(name, make, *arguments, huge_pages=True):
    if name == train_step.TWO_DEVICES:
      return own_process(name, make, *arguments)
    return contextlib.nullcontext(make(*arguments))

  monkeypatch.setattr(peers, 'require_torch', lambda: None)
  monkeypatch.setattr(peers, 'torch_paranet', FakeTorch)
  monkeypatch.setattr(inference, 'own_process', stand_in)
  monkeypatch.setattr(train_step, 'own_process', stand_in)


@pytest.mark.parametrize('huge_pages', [True, False])
def test_own_process_asks_for_huge_pages_if_ours_does(huge_pages, monkeypatch):
  monkeypatch.setenv(VARIABLE, 'glibc.malloc.hugetlb=1')
  with own_process('eager', partial, os.getenv, VARIABLE, huge_pages=huge_pages) as variable:
    assert variable() == ('glibc.malloc.hugetlb=1' if huge_pages else None)
  assert os.environ[VARIABLE] == 'glibc.malloc.hugetlb=1'


EAGER_PEERS = tuple(peers.torch_peers('eager'))


@pytest.mark.parametrize('name', peers.TORCH_PEERS)
def test_what_a_peer_is(name, monkeypatch):
  made = []

  class Recorded:
    torch_network = staticmethod(lambda variables, *, pool_first: made.append(('pool_first', pool_first)))
    forward = staticmethod(lambda theirs, exits, **options: made.append(options))
    training_step = staticmethod(lambda theirs, *batch, **options: made.append(options))

  monkeypatch.setattr(peers, 'torch_paranet', lambda: Recorded)
  everything = 'everything' in name
  modes = {'compile': 'default', 'compile_everything': 'max-autotune-no-cudagraphs'}
  options = {'compiled': modes.get(name, ''), 'bfloat16': everything or name == 'eager_bfloat16'}
  expected = [('pool_first', everything or name == 'eager_pool_first'), options]
  assert peers.TORCH_PEERS[name].huge_pages == (everything or name == 'eager_huge_pages')
  peers.torch_forward(peers.TORCH_PEERS[name], {}, (1,))
  peers.torch_step(peers.TORCH_PEERS[name], {}, None, None, {})
  assert made == expected * 2


def run(main, flags, capsys):
  """What a benchmark prints with --json: one line, and nothing else."""
  assert main([*flags, '--json']) == 0
  out = capsys.readouterr().out
  assert out.count('\n') == 1 and out.endswith('\n')
  result = json.loads(out)
  assert set(result) >= SURROUNDINGS | {'rows'}
  assert all(set(row) == ROW for row in result['rows'])
  return result


def named(result):
  return [(row['what'], row['peer'], row['batch'], row['exit'], row['unit']) for row in result['rows']]


def test_train_step(fake_torch, monkeypatch, capsys):
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')  # Of the process with two devices.
  result = run(train_step.main, [*FLAGS, '--rounds=1', '--seconds=0', '--no-linen'], capsys)
  assert set(result) == SURROUNDINGS | {'ours', 'theirs', 'ratio', 'rows'}
  assert named(result) == [
    *(('training step', peer, 4, None, 'images/s') for peer in EAGER_PEERS),
    ('training step, two CPU devices', 'eager', 4, None, 'images/s'),
  ]
  assert [result[name] for name in ('ours', 'theirs', 'ratio')] == list(result['rows'][0].values())[4:7]
  assert result['ratio'] == pytest.approx(result['ours'] / result['theirs'], rel=1e-3)
  assert 0 < result['rows'][len(EAGER_PEERS)]['ours'] < result['theirs']


def test_train_step_scaling(fake_torch, monkeypatch, capsys):
  # The fake time of a step: layers times growth rate times pixels times batch.
  def step_time(size):
    return size.layers * size.growth_rate * size.side**2 * size.batch

  monkeypatch.setattr(train_step, 'our_step', lambda size, *_: step_time(size))
  monkeypatch.setattr(train_step, 'torch_step', lambda size, name: contextlib.nullcontext(2 * step_time(size)))
  monkeypatch.setattr(train_step, 'own_process', lambda name, make, size: contextlib.nullcontext(step_time(size) / 4))
  monkeypatch.setattr(train_step, 'timed', lambda what, steps, options: steps)
  result = run(train_step.main, ['--layers=16', '--scaling', '--peer=compile'], capsys)
  step = 16 * 12 * 32**2 * 64
  first = len(peers.TORCH_PEERS) + 2
  assert [row['peer'] for row in result['rows'][:first]] == [*peers.TORCH_PEERS, 'linen', 'eager']
  assert result['ratio'] == 2.0 and result['rows'][first - 1]['ratio'] == 8.0
  assert [(row['what'], row['batch'], row['ours'] / (1000 * step), row['ratio']) for row in result['rows'][first:]] == [
    ('time of a step', 64, pytest.approx(1, rel=1e-3), 0.5),
    ('time of a step, layers 8', 64, pytest.approx(1 / 2, rel=1e-3), 0.5),
    ('time of a step, layers 32', 64, pytest.approx(2, rel=1e-3), 0.5),
    ('time of a step, growth_rate 6', 64, pytest.approx(1 / 2, rel=1e-3), 0.5),
    ('time of a step, growth_rate 24', 64, pytest.approx(2, rel=1e-3), 0.5),
    ('time of a step, side 16', 64, pytest.approx(1 / 4, rel=1e-3), 0.5),
    ('time of a step, side 64', 64, pytest.approx(4, rel=1e-3), 0.5),
    ('time of a step, batch 16', 16, pytest.approx(1 / 4, rel=1e-3), 0.5),
    ('time of a step, batch 256', 256, pytest.approx(4, rel=1e-3), 0.5),
  ]


def test_inference(fake_torch, monkeypatch, capsys):
  # Our logits are then the peer's: all zero.
  monkeypatch.setattr(network, 'random_variables', lambda size: jax.tree.map(np.zeros_like, RANDOM_VARIABLES(size)))
  result = run(inference.main, [*FLAGS, '--rounds=1', '--seconds=0', '--no-linen'], capsys)
  assert set(result) == SURROUNDINGS | {'ours', 'theirs', 'ratio', 'rows', 'logit_difference'}
  assert result['logit_difference'] == 0
  assert named(result) == [
    row
    for exit in (None, 1, 2, 3)
    for row in (
      *(('forward pass', peer, 4, exit, 'images/s') for peer in (peers.OURS_BFLOAT16, *EAGER_PEERS)),
      *(('one image', peer, 1, exit, 'ms') for peer in (peers.OURS_BFLOAT16, *EAGER_PEERS)),
    )
  ]


@pytest.mark.parametrize('theirs', [0.5002, np.nan])
def test_other_logits_are_refused(theirs):
  forwards = {'ours': lambda _: [np.full((2, 3), 0.5)], 'eager': lambda _: [np.full((2, 3), theirs)]}
  with pytest.raises(RuntimeError, match='the logits of eager differ by (2.0e-04|nan), and by 1e-04 at most'):
    inference.check_logits(forwards, None)


def test_compile_time(fake_torch, monkeypatch, capsys):
  asked = []
  values = {
    'ours': iter([99.0, 30.0, 6.0, 40.0, 4.0, 35.0, 5.0]),  # Fills the cache; then cold and warm in turn.
    'eager': iter([1.0, 3.0, 2.0]),
    'linen': iter([100.0, 100.0, 100.0]),
  }

  def fake(task, size, *, cache):
    asked.append((task, cache is not None, size.batch))
    if task == 'evaluation':
      return {'imports': 1.0, 'compile': 8.0}
    if task == 'tpu':
      return {'imports': 1.0, 'compile': 80.0, 'code_mb': 30.0}
    return {'imports': 1.0, 'first_step': next(values[task])}

  monkeypatch.setattr(compile_time, 'in_fresh_process', fake)
  monkeypatch.setattr(compile_time, 'has_libtpu', lambda: True)
  result = run(compile_time.main, ['--rounds=3'], capsys)
  turn = [
    ('ours', False, 64),
    ('ours', True, 64),
    ('eager', False, 64),
    ('linen', False, 64),
  ]
  last = [('evaluation', False, 64), ('tpu', False, 256)]
  assert asked == [('ours', True, 64), *turn * 3, *last]
  assert {name: value for name, value in result.items() if name not in SURROUNDINGS | {'rows'}} == {
    'cold_first_step_s': 35.0,
    'warm_first_step_s': 5.0,
    'eval_s': 8.0,
    'tpu_compile_s': 80.0,
    'tpu_code_mb': 30.0,
  }
  assert [(row['what'], row['peer'], row['ours'], row['theirs']) for row in result['rows']] == [
    ('cold start: imports', 'eager', 1.0, 1.0),
    ('cold start: first step', 'eager', 35.0, 2.0),
    ('cold start: imports', 'linen', 1.0, 1.0),
    ('cold start: first step', 'linen', 35.0, 100.0),
    ('warm start: imports', 'cold', 1.0, 1.0),
    ('warm start: first step', 'cold', 5.0, 35.0),
  ]


def test_first_step(monkeypatch, capsys):
  folders, seconds = [], iter([12.0, 3.0, 2.0, 14.0, 1.0, 4.0])
  monkeypatch.setattr(first_step, 'started', lambda cache: folders.append(cache) or next(seconds))
  assert first_step.main(['--rounds=2', '--warm=2', '--json']) == 0
  result = json.loads(capsys.readouterr().out)
  assert (result['cold_first_step_s'], result['warm_first_step_s']) == (13.0, 2.5)
  assert [(row['what'], row['round'], row['first_step_s']) for row in result['rows']] == [
    *(('cold', 1, 12.0), ('warm', 1, 3.0), ('warm', 1, 2.0)),
    *(('cold', 2, 14.0), ('warm', 2, 1.0), ('warm', 2, 4.0)),
  ]
  # A round's starts share what they keep, and the next round has none of it.
  assert [folder == folders[0] for folder in folders] == [True] * 3 + [False] * 3
  assert not any(folder.exists() for folder in folders)


RUNS = """
import os, sys, time
with open(os.environ['PARANET_CACHE_DIR'], 'w') as file:
  print('XLA_FLAGS' in os.environ, os.environ['MORE'], sys.argv[1].partition('=')[0], file=file)
print('  step 1/9', flush=True)
time.sleep(600)
"""


def test_time_until_the_first_step(tmp_path, monkeypatch):
  """The clock stops at the line on the step, and the process, which would go on, is asked to stop."""
  monkeypatch.setenv('XLA_FLAGS', '--of_this_process')
  monkeypatch.setattr(first_step, 'COMMAND', ('-c', RUNS))
  began = time.perf_counter()
  found = first_step.started(tmp_path / 'seen', tmp_path, {'MORE': 'set'})
  assert 0 < found <= time.perf_counter() - began < 300
  assert (tmp_path / 'seen').read_text() == 'False set --workdir\n'


def test_first_step_that_never_comes(tmp_path, monkeypatch):
  monkeypatch.setattr(first_step, 'COMMAND', ('-c', 'raise SystemExit(3)'))
  with pytest.raises(UserError, match='^expected .* to train, found exit code 3; see its message$'):
    first_step.started(tmp_path, tmp_path)


def test_tpu_is_null_without_libtpu(monkeypatch):
  monkeypatch.setattr(compile_time, 'has_libtpu', lambda: False)
  assert compile_time.tpu(TINY) == {'tpu_compile_s': None, 'tpu_code_mb': None}


def test_fresh_process_and_its_compilation_cache(monkeypatch, tmp_path):
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
  cache = tmp_path / 'cache'
  found = fresh_process.in_fresh_process('evaluation', SMALLEST, cache=cache)
  assert set(found) == {'imports', 'compile'} and min(found.values()) > 0
  assert len(list((cache / 'compiled').iterdir())) == 1


def test_saving(monkeypatch, capsys):
  steps = {'steps_ms': 3.0, 'bare_steps_ms': 2.0}
  monkeypatch.setattr(saving, '_step_times', lambda *unused: steps)
  result = run(saving.main, [*FLAGS, '--rounds=2'], capsys)
  assert result.keys() == SURROUNDINGS | {'save_ms', 'copy_ms', 'ratio', 'whole_save_ms', 'megabytes', 'rows', *steps}
  assert result['ratio'] == pytest.approx(result['save_ms'] / result['copy_ms'], rel=1e-3)
  assert 0 < result['save_ms'] < result['whole_save_ms'] and result['steps_ms'] == 3.0
  assert [row['peer'] for row in result['rows']] == ['copy', 'orbax async']


def test_time_of_training_steps_with_a_save(tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(network, 'our_training_step', lambda *unused: lambda: calls.append('step'))
  monkeypatch.setattr(saving.Checkpoints, 'save', lambda *unused: calls.append('save'))
  found = saving._step_times(SMALLEST, {}, tmp_path, rounds=1)
  assert calls == ['step', 'save', *['step'] * 2 * saving.STEPS] and found.keys() == {'steps_ms', 'bare_steps_ms'}


def test_memory(monkeypatch, capsys):
  ours = memory.temp_bytes_per_image(SMALLEST, network.our_network)
  # At the very least the bottleneck outputs of the six layers are kept: 4 k channels of 4 bytes at a pixel or more.
  assert ours > 6 * 4 * SMALLEST.growth_rate * 4
  monkeypatch.setattr(memory, 'temp_bytes_per_image', lambda size, make: 3e6 if make is network.our_network else 12e6)
  result = run(memory.main, [], capsys)
  assert {name: value for name, value in result.items() if name not in SURROUNDINGS} == {
    'temp_bytes_per_image': 3e6,
    'linen_temp_bytes_per_image': 12e6,
    'ratio': 0.25,
    'rows': [report.row('temporary memory of the training step', 'linen', 3e6, 12e6, 'bytes an image', 64)],
  }


def test_loader(monkeypatch, capsys):
  used, read = [], []
  monkeypatch.setattr(loader, 'rate', lambda split, batch, options, use: used.append((len(split), use(None))) or 300.0)
  monkeypatch.setattr(loader, 'decoding_rate', lambda split, options: read.append(split.images[:2].shape) or 50.0)
  monkeypatch.setattr(loader, 'in_turn', lambda functions, rounds, seconds: {'ours': 0.04})
  monkeypatch.setattr(loader, 'streamed_step', lambda size, device: lambda batch: 'trained')
  monkeypatch.setattr(network, 'our_training_step', lambda *_: None)
  result = run(loader.main, [*FLAGS, '--workers=2', '--data_dir='], capsys)
  assert [(row['what'], row['peer'], row['ours'], row['theirs'], row['ratio']) for row in result['rows']] == [
    ('loader', 'training step', 300, 100, 3),
    ('training, streamed', 'in memory', 300, 100, 3),
    ('loader, 224 pixels', 'one thread', 300, 50, 6),
  ]
  assert (result['ratio'], result['workers'], result['images']) == (3, 2, 'generated')
  assert used == [(128, None), (128, None), (128, 'trained')]
  assert read == [(2, 224, 224, 3)]


def test_rate_of_a_loader(monkeypatch):
  """Batches of four, of which the warm-up takes four and each round two, a second apart."""
  clock = iter(range(100))
  monkeypatch.setattr(loader.time, 'perf_counter', lambda: next(clock))
  images = StoredImages(
    SimpleNamespace(read=lambda numbers: ([np.zeros((8, 8, 3), np.uint8)] * len(numbers), None)),
    np.arange(3),
    (8, 8, 3),
  )
  taken = []
  options = SimpleNamespace(workers=0, rounds=3, seconds=2)
  rate = loader.rate(
    Split(images, np.zeros(3, np.int32)), 4, options, lambda batch: taken.append(batch['images'].shape)
  )
  assert taken == [(4, 8, 8, 3)] * (4 + 3 * 2)
  # Looked at before, once after each batch but the first, and at the end: 3 s for two batches.
  assert rate == 4 / 1.5


def test_linen_baseline_is_the_same_function(standard_promotion):
  ours, linen = network.our_network(TINY), network.linen_network(TINY)
  variables = network.random_variables(TINY)
  # Enough that the statistics of the smallest features do not magnify rounding.
  images = network.random_images(TINY, 32)

  def outputs(model):
    def function(variables, images):
      trained = model.apply(variables, images, train=True, mutable=['batch_stats'])
      return model.apply(variables, images), trained

    return jax.jit(function)(variables, images)

  shapes = jax.eval_shape(lambda: linen.init(jax.random.key(0), images))
  chex.assert_trees_all_equal_shapes_and_dtypes(variables, shapes)
  chex.assert_trees_all_close(outputs(ours), outputs(linen), rtol=1e-4, atol=1e-4)


@pytest.fixture
def torch_paranet():
  pytest.importorskip('torch', reason='PyTorch is not installed: pip install -r benchmarks/requirements.txt')
  return peers.torch_paranet()


@pytest.mark.parametrize('pool_first', [False, True])
@pytest.mark.parametrize('exits', [(1, 2, 3), (2,), (3, 1)])
def test_torch_logits(torch_paranet, pool_first, exits):
  variables, images = network.random_variables(TINY), network.random_images(TINY, 4)
  theirs = torch_paranet.forward(torch_paranet.torch_network(variables, pool_first=pool_first), exits)(images)
  expected = jax.jit(network.our_network(TINY).apply)(variables, images)
  chex.assert_trees_all_close(theirs, [np.asarray(expected[number - 1]) for number in exits], rtol=0, atol=1e-4)


def test_torch_training_steps(torch_paranet):
  variables, images = network.random_variables(SMALLEST), network.random_images(SMALLEST, 4)
  labels = network.random_labels(4)
  theirs = torch_paranet.torch_network(variables)
  step = torch_paranet.training_step(theirs, images, labels, network.TORCH_SGD)
  params = expected_training(variables, images, labels, steps=2)
  step()
  step()
  moved = torch_paranet.torch_weights({'params': jax.tree.map(jnp.subtract, params, variables['params'])})
  before = torch_paranet.torch_weights({'params': variables['params']})
  after = dict(theirs.named_parameters())
  assert set(after) == set(moved)
  for name, change in moved.items():
    found = (after[name].detach() - before[name]).numpy()
    np.testing.assert_allclose(found, change.numpy(), rtol=1e-2, atol=1e-4, err_msg=name)
    assert np.abs(change.numpy()).max() > 1e-3


def expected_training(variables, images, labels, steps):
  """Our parameters after some steps on one batch that is not augmented."""
  model, optimizer = network.our_network(SMALLEST), network.optimizer()

  @jax.jit
  def step(params, opt_state):
    def loss(params):
      variables_in = variables | {'params': params}
      logits, _ = model.apply(variables_in, images, train=True, mutable=['batch_stats'])
      return total_loss(exit_losses(logits, labels, network.TARGETS), (1.0, 1.0, 1.0))

    updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  params, opt_state = variables['params'], optimizer.init(variables['params'])
  for _ in range(steps):
    params, opt_state = step(params, opt_state)
  return params
