"""Tests of `python -m paranet_jax.plan` on CPU devices and, where libtpu is installed, for TPUs."""

import dataclasses
import importlib.util
import json
import math
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from running import QUICKSTART, Result, run_command

from paranet_jax import config as config_lib
from paranet_jax.base_config import base_config
from paranet_jax.costs import abstract_variables, exit_costs
from paranet_jax.data.load import load_dataset
from paranet_jax.host.errors import UserError
from paranet_jax.plan import __main__ as plan
from paranet_jax.plan import plan as build_lib
from paranet_jax.plan import target as target_lib
from paranet_jax.plan.data_size import dataset_like
from paranet_jax.plan.hlo import Collectives
from paranet_jax.plan.plan import Estimate, estimate, largest_batch, second_batch
from paranet_jax.plan.plan_text import as_text
from paranet_jax.plan.step import StepFacts
from paranet_jax.plan.target import (
  CHIPS,
  Chip,
  Target,
  choose_target,
  measured_chip,
  split_topology,
  topology_devices,
)

# 1,137 training images are 71 steps of 16.
TINY = (
  QUICKSTART,
  '--config.name=PN1-d',
  '--config.model.layers_per_block=1',
  '--config.model.growth_rate=2',
  '--config.model.image_side=8',
  '--config.train.batch_size=16',
  '--config.train.epochs=1',
)
CHIP = Chip(memory=8e6, flops=2e9, bandwidth=1e9, links=5e8, source='a page', clock=1e9)
FACTS = StepFacts(
  batch_size=16,
  arguments=1_000_000,
  temporary=2_000_000,
  code=500_000,
  flops=10_000_000,
  traffic=3_000_000,
  collectives=Collectives(7, 400_000),
  cycles=20_000_000,
  compile_seconds=12.4,
)


def run_plan(*arguments) -> Result:
  return run_command(plan.main, *arguments)


def refusal(*arguments) -> str:
  code, out, err = run_plan(*arguments)
  assert (code, out) == (2, '') and err.startswith('error: ') and err.count('\n') == 1, (code, out, err)
  return err[len('error: ') : -1]


@pytest.fixture(scope='module', autouse=True)
def devices():
  """Creates the devices of the tests before a plan can create its own number."""
  jax.devices()


@pytest.fixture
def any_chip(monkeypatch):
  """Replaces the measured peaks."""
  monkeypatch.setattr(target_lib, 'measured_chip', lambda device, count: CHIP)


def planned(*flags):
  code, out, err = run_plan(*TINY, '--json', *flags)
  assert code == 0, err
  assert out.count('\n') == 1
  return json.loads(out)


def network():
  config = base_config('PN1-d')
  config.model.update(layers_per_block=1, growth_rate=2, image_side=8)
  return config_lib.build_model(config, 10)


def forward_macs():
  """Multiply-adds of the forward pass of an image."""
  (costs,) = exit_costs(network(), (8, 8, 3))
  return costs['macs']


def state_bytes():
  """Bytes of the parameters and of the batch_stats, in float32."""
  shapes = abstract_variables(network(), (8, 8, 3))
  params, statistics = (sum(leaf.size for leaf in jax.tree.leaves(shapes[key])) for key in ('params', 'batch_stats'))
  return 4 * params, 4 * statistics


@pytest.fixture(scope='module')
def plans():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(target_lib, 'measured_chip', lambda device, count: CHIP)
    one = planned('--devices=1')
    patch.setattr(build_lib, 'second_batch', lambda *_: 10_000)  # More than the data set holds, so it is not compiled.
    return {1: one, 2: planned('--devices=2')}


def test_memory_per_device(plans):
  params, statistics = state_bytes()
  data_set = (1137 + 300 + 360) * (8 * 8 * 3 + 4)  # What is held out and tested on lies there too.
  for count, found in plans.items():
    order = 71 * 16 * 4 // count
    totals = 4 * 4  # The total loss, and the loss, cross-entropy and accuracy of the exit.
    expected = 2 * params + statistics + data_set + order + totals
    # In addition: step, seed and the addresses of the results.
    assert expected < found['memory']['arguments'] < expected + 1000
    parts = ('arguments', 'temporary', 'code')
    assert found['memory']['needed'] == sum(found['memory'][part] for part in parts)
    assert found['memory']['temporary'] > 0


def test_streamed_data_set_stays_on_the_host(any_chip, monkeypatch):
  monkeypatch.setattr(build_lib, 'second_batch', lambda *_: 10_000)
  found = planned('--config.data.streaming=True', '--devices=2')
  params, statistics = state_bytes()
  batches = 3 * 16 // 2 * (8 * 8 * 3 + 4)  # Two are read ahead.
  expected = 2 * params + statistics + batches + 71 * 16 * 4 // 2 + 4 * 4
  assert expected < found['memory']['arguments'] < expected + 1000
  assert (found['total_steps'], found['batch_size']) == (71, 16) and found['measured_step_s'] > 0


@pytest.mark.parametrize(
  ('name', 'side', 'asked', 'streamed'),
  [
    ('digits', 8, None, False),
    ('digits', 8, True, True),
    ('imagenet2012', 224, None, True),
    ('imagenet2012', 224, False, False),
  ],
)
def test_which_data_sets_are_streamed(name, side, asked, streamed):
  config = base_config()
  config.data.update(name=name, streaming=asked)
  config.model.image_side = side
  found = dataset_like(config)
  assert found.train.streamed == found.test.streamed == streamed
  number = {'digits': 1437, 'imagenet2012': 1_281_167}[name]
  assert found.train.images.shape == (number, side, side, 3) and len(found.train) == number
  assert found.train.images[np.array([0, 5])].shape == (2, side, side, 3)
  assert not streamed or len(found.train.images.records) == number


def test_two_devices_share_the_work(plans):
  one, two = plans[1], plans[2]
  assert one['flops'] == 2 * two['flops']
  # The backward pass costs twice the forward pass, except for the first convolution: images need no gradient.
  assert 2 * 2 * forward_macs() * 16 < one['flops'] <= 2 * 3 * forward_macs() * 16
  assert two['memory_traffic_bytes'] < one['memory_traffic_bytes']
  assert one['collectives'] == {'count': 0, 'size': 0}
  params, statistics = state_bytes()
  assert params < two['collectives']['size'] < params + 2 * statistics + 100


def test_time_and_run(plans):
  found = plans[1]
  assert (found['total_steps'], found['batch_size'], found['fits']) == (71, 16, True)
  assert found['estimate_s']['arithmetic'] == found['flops'] / CHIP.flops
  assert found['estimate_s']['run'] == 71 * found['estimate_s']['step']
  assert found['measured_step_s'] > 0
  assert found['largest_batch'] >= 16 and len(found['largest_batch_from']) == 2


@pytest.mark.parametrize(
  ('flags', 'count'),
  [
    (['--config.train.devices=2'], 2),
    (['--config.train.devices=2', '--devices=1'], 1),
    ([], len(jax.local_devices())),
  ],
)
def test_a_run_has_the_devices_that_its_configuration_says(flags, count, small_devices):
  small_devices(100)
  assert planned('--config.train.batch_size=24', *flags)['devices']['count'] == count


@pytest.mark.parametrize(
  'flags, message',
  [
    ([], 'the following arguments are required: --config; see --help'),
    ([*TINY, '--topolgy=v5e:2x2'], 'unrecognized arguments: --topolgy=v5e:2x2; see --help'),
    ([*TINY, 'v5e:2x2'], 'unrecognized arguments: v5e:2x2; see --help'),
    ([*TINY, '--devices=none'], 'argument --devices: expected an integer of 1 or more, found none; see --help'),
    (
      [*TINY, '--devices=999999'],
      'argument --devices: expected an integer from 1 to 100,000, found 999999; see --help',
    ),
    (
      [*TINY, '--devices=99999'],
      'expected at most 512 devices of this machine, found 99999; set --devices or --config.train.devices',
    ),
    ([*TINY, '--devices=0'], 'argument --devices: expected an integer of 1 or more, found 0; see --help'),
    (
      [*TINY, '--config.train.batchsize=3'],
      'unknown configuration field train.batchsize; did you mean train.batch_size? All are in '
      'paranet_jax/base_config.py',
    ),
    ([*TINY, '--config.seeds=2'], 'a plan covers one run, found 2 seeds; leave out --config.seeds'),
    (
      [*TINY, '--devices=3'],
      '3 devices cannot share train.batch_size 16 evenly; set --config.train.batch_size or --devices',
    ),
    (
      [*TINY, '--topology=v5e'],
      'expected a topology of a chip and a slice shape, such as v4:2x2x1, v5e:2x2, v5p:2x2x1, v6e:2x2, '
      "found 'v5e'; set --topology",
    ),
  ],
)
def test_rejected_flags(flags, message):
  assert refusal(*flags) == message


def test_too_many_devices():
  count = len(jax.local_devices())
  assert refusal(*TINY, f'--devices={count + 1}') == (
    f'expected at most {count} devices, the number in this machine, found {count + 1}; set --devices or '
    '--config.train.devices'
  )


def test_without_libtpu(monkeypatch):
  monkeypatch.setattr(target_lib, 'has_libtpu', lambda: False)
  assert refusal(*TINY, '--topology=v5e:2x2') == (
    'compiling for v5e:2x2 needs libtpu, found none; pip install -r requirements-tpu.txt'
  )


@pytest.fixture
def libtpu(monkeypatch):
  """Pretends that libtpu is installed, and restores the environment."""
  for name in target_lib._WITHOUT_TPU:
    monkeypatch.setenv(name, os.environ.get(name, ''))
  monkeypatch.setattr(target_lib, 'has_libtpu', lambda: True)
  return monkeypatch


def test_topology_unknown_to_libtpu(libtpu):
  from jax.experimental import topologies

  def refuse(**_):
    raise RuntimeError('INVALID_ARGUMENT: Topology layout "v5e:3x3"\nis not divisible')

  libtpu.setattr(topologies, 'get_topology_desc', refuse)
  assert refusal(*TINY, '--topology=v5e:3x3') == (
    'libtpu does not know topology \'v5e:3x3\' (INVALID_ARGUMENT: Topology layout "v5e:3x3" is not divisible); '
    'set --topology, such as v5e:2x2'
  )


@pytest.mark.parametrize(
  'name, options',
  [
    ('v5e:2x2', {}),
    ('v5e:1x1', {'chips_per_host_bounds': (1, 1, 1)}),
    ('v4:2x2x2', {'chip_config_name': 'megacore'}),  # Without it, each chip would be two devices.
  ],
)
def test_options_for_libtpu(libtpu, name, options):
  from jax.experimental import topologies

  asked = {}

  def answer(**arguments):
    asked.update(arguments)
    return SimpleNamespace(devices=['a', 'b'])

  libtpu.setattr(topologies, 'get_topology_desc', answer)
  assert topology_devices(name) == ['a', 'b']
  assert asked == {'platform': 'tpu', 'topology_name': name} | options


@pytest.mark.parametrize('name, chip, count', [('v5e:4x4', 'v5e', 16), ('v4:2x2x2', 'v4', 8), ('v6e:1x1', 'v6e', 1)])
def test_topologies(name, chip, count):
  assert split_topology(name) == (CHIPS[chip], count)


@pytest.mark.parametrize('name', ['v5e:2x2x1', 'v4:2x2', 'v9:2x2', 'v5e:0x2', 'v5e:x', '', 'v5e:2x2 '])
def test_invalid_topologies(name):
  with pytest.raises(UserError, match=f"found '{name}'; set --topology$"):
    split_topology(name)


def test_estimate():
  """10 MFLOP at 2 GFLOP/s, 3 MB at 1 GB/s, and 3/2 of 0.4 MB sent by each of 4 chips at 0.5 GB/s."""
  found = estimate(FACTS, CHIP, count=4)
  assert found == pytest.approx((0.005, 0.003, 0.0012, 0.02))
  assert found.step == pytest.approx(0.0062)
  here = estimate(FACTS, CHIP._replace(links=None, clock=None), count=4)
  assert here == Estimate(0.005, 0.003, 0.0, None)
  assert estimate(FACTS, CHIP._replace(bandwidth=3e8), count=1).step == pytest.approx(0.01)


@pytest.mark.parametrize(
  'memory, batch_size, count, most, expected',
  [
    (8e6, 16, 4, 1000, 24),  # 6.5 MB free hold 52 images of 0.125 MB: half of them, rounded down to a multiple of 4.
    (8e6, 16, 4, 20, 20),  # Capped by the data set.
    (4e6, 16, 4, 1000, 8),  # 2.5 MB hold 20 images, half of which is below the first batch: half of that.
    (4e6, 4, 4, 1000, 8),
  ],
)
def test_second_batch(memory, batch_size, count, most, expected):
  facts = dataclasses.replace(FACTS, batch_size=batch_size, temporary=125_000 * batch_size)
  assert second_batch(facts, CHIP._replace(memory=memory), count, most) == expected


@pytest.mark.parametrize(
  'temporary, count, most, expected',
  [
    (3_600_000, 1, 1000, 61),  # 3.5 MB at 16 images, 5.1 MB at 32: 0.1 MB an image, 8 MB at 61.
    (3_600_000, 4, 1000, 60),
    (3_600_000, 4, 50, 48),
    (2_000_000, 4, 50, 48),  # Memory does not grow.
    (20_000_000, 1, 1000, 20),  # 1.125 MB an image.
  ],
)
def test_largest_batch(temporary, count, most, expected):
  other = dataclasses.replace(FACTS, batch_size=32, temporary=temporary)
  assert largest_batch(FACTS, other, CHIP, count, most) == expected
  assert largest_batch(other, FACTS, CHIP, count, most) == expected


def test_largest_batch_from_one_step():
  assert largest_batch(FACTS, FACTS, CHIP, 1, 1000) == 16


@pytest.fixture
def small_devices(monkeypatch, any_chip):
  """Replaces the compiler by one that rejects batches above a limit; returns the batches that it compiled."""
  asked = []

  def limit(most, reason='RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm'):
    def compile_step(task, devices):
      batch_size = task.config.train.batch_size
      asked.append(batch_size)
      if batch_size > most:
        raise jax.errors.JaxRuntimeError(reason)
      return None, dataclasses.replace(FACTS, batch_size=batch_size, temporary=125_000 * batch_size)

    monkeypatch.setattr(build_lib, 'compile_step', compile_step)
    monkeypatch.setattr(build_lib, 'time_steps', lambda *_: (1.0, 0.5, None))
    return asked

  return limit


def test_batch_that_does_not_fit(small_devices):
  asked = small_devices(50)
  found = planned('--config.train.batch_size=200', '--devices=2')
  assert asked == [200, 100, 50, 24]  # The last one shows how memory grows.
  assert (found['batch_size'], found['fits'], found['largest_batch']) == (50, False, 52)
  code, out, err = run_plan(*TINY, '--config.train.batch_size=200', '--devices=2')
  assert code == 0
  assert out.startswith('a step of 200 images does not fit; the batch was halved until it did\n')
  assert '200 images do not fit\n' in err


@pytest.mark.parametrize(('batch_size', 'measured'), [(32, 0.5), (64, None)])
def test_a_step_that_does_not_fit_a_cpu_is_not_run(small_devices, batch_size, measured):
  small_devices(64)  # A CPU's compiler rejects none. 1.5 MB and 0.125 MB an image are 5.5 of 8 MB, or 9.5.
  found = planned(f'--config.train.batch_size={batch_size}', '--devices=1')
  assert (found['measured_step_s'], found['fits'], found['largest_batch']) == (measured, measured is not None, 52)


def test_devices_whose_memory_is_not_known(small_devices, monkeypatch):
  asked = small_devices(50)
  monkeypatch.setattr(target_lib, 'measured_chip', lambda device, count: CHIP._replace(memory=math.inf))
  found = planned('--devices=2')
  assert asked == [16]  # No second batch: there is no limit to look for.
  assert (found['memory']['available'], found['largest_batch'], found['fits']) == (None, None, True)
  memory = run_plan(*TINY, '--devices=2').out.split('\n\n')[1].splitlines()
  assert memory[-1] == 'available                  unknown'


def test_smallest_batch_that_does_not_fit(small_devices):
  small_devices(1)
  code, out, err = run_plan(*TINY, '--devices=2')
  assert (code, out) == (2, '')
  assert err.splitlines()[-1].startswith('error: a step of 2 images does not fit 2 x cpu')
  assert err.endswith('set --topology to a chip with more memory, or --config.model fields to a smaller network\n')


def test_other_compiler_errors_pass_through(small_devices):
  small_devices(1, 'INTERNAL: a bug')
  with pytest.raises(jax.errors.JaxRuntimeError, match='a bug'):
    run_plan(*TINY, '--devices=2')


REPORT = """\
PN1-d on digits: a training step of 16 images on 4 x TPU v5 lite (v5e:2x2), 4 per device
compiled in 12 s with jax 1.2

memory per device
state, data set and order    1 MB
temporary                    2 MB
code                       500 kB
total                      3.5 MB
available                    8 MB
43.8 % used
largest batch that fits: 60 images (extrapolated from steps compiled for 16 and 32 images)

step, per device
floating-point operations       0.01 G
main memory traffic               3 MB
collectives                400 kB in 7

time                        ms  images/s  71 steps
arithmetic at peak           5
main memory at peak          3
collectives                1.2
step, roofline bound       6.2     2,581       0 s
step, compiler's estimate   20       800       1 s
step, measured              31       516       2 s
measured / bound: 5.00

assumptions:
- a device does 0.002 TFLOP/s and moves 1 GB/s, 0.5 GB/s sent to other chips (a page)
"""


def test_report():
  config = base_config('PN1-d')
  config.data.name = 'digits'
  config.data.held_out = 300
  config.model.update(layers_per_block=1, growth_rate=2, image_side=8)
  config.train.update(batch_size=16, epochs=1.0)
  task = build_lib.build_task(config, dataset_like(config))
  found = build_lib.Plan(
    asked=16,
    target=Target('4 x TPU v5 lite (v5e:2x2)', [None] * 4, 'v5e:2x2'),
    chip=CHIP,
    task=task,
    facts=FACTS,
    estimate=estimate(FACTS, CHIP, 4),
    other=dataclasses.replace(FACTS, batch_size=32, temporary=3_600_000),
    largest=60,
    measured=0.031,
    versions={'jax': '1.2'},
  )
  text = as_text(found)
  assert text.splitlines()[: len(REPORT.splitlines())] == REPORT.splitlines()
  assert "- the compiler's estimate counts the cycles of a 1.00 GHz core, without waiting for others" in text
  everything = as_text(found._replace(largest=1136, other=None))
  assert 'largest batch that fits: 1,136 images, the whole data set\n' in everything
  # Devices of this machine, of which no clock is known, or of another one, on which nothing is measured.
  facts, chip = dataclasses.replace(FACTS, collectives=Collectives(1, 999)), CHIP._replace(links=None, clock=None)
  plain = as_text(found._replace(facts=facts, chip=chip, estimate=estimate(facts, chip, 4), measured=None))
  assert 'collectives                999 bytes in 1\n' in plain
  assert '- devices of one machine: collectives take no time\n' in plain
  assert 'measured' not in plain and "compiler's estimate" not in plain
  # 16 images in 40 s.
  assert 'step, measured' + 13 * ' ' + '40,000       0.4' in as_text(found._replace(measured=40.0))


def test_a_plan_for_chips_elsewhere(small_devices, monkeypatch):
  small_devices(100)
  chips = [SimpleNamespace(device_kind='TPU v5 lite', platform='tpu')] * 4
  monkeypatch.setattr(target_lib, 'topology_devices', lambda name: chips)
  monkeypatch.setattr(build_lib.importlib.metadata, 'version', lambda name: {'jax': '1', 'libtpu': '2'}[name])
  found = planned('--topology=v5e:2x2')
  assert found['devices'] == {'count': 4, 'kind': 'TPU v5 lite'} and found['topology'] == 'v5e:2x2'
  assert found['memory']['available'] == CHIPS['v5e'].memory and found['peaks']['links'] == CHIPS['v5e'].links
  assert found['versions'] == {'jax': '1', 'libtpu': '2'}
  assert found['estimate_s']['compiler'] == pytest.approx(20_000_000 / CHIPS['v5e'].clock)
  assert found['measured_step_s'] is None  # Only a machine that has them can run a step.


def test_a_plan_of_several_phases():
  config = base_config('PN3-ddd')
  config.data.name = 'digits'
  config.model.update(layers_per_block=1, growth_rate=2, image_side=8)
  config.train.update(batch_size=16, epochs=4.0, regime='disjoint')
  task = build_lib.build_task(config, dataset_like(config))
  found = build_lib.Plan(
    16, Target('4 x cpu', [None] * 4, None), CHIP, task, FACTS, estimate(FACTS, CHIP, 4), None, 9, 1.0, {}
  )
  assert len(task.phases) == 2
  assert as_text(found).endswith('\n- every step costs as much as in the last phase of train.regime=disjoint')


@pytest.mark.parametrize('spec', [None, 'found'])
def test_libtpu_is_found_without_importing_it(monkeypatch, spec):
  monkeypatch.setattr(target_lib.importlib.util, 'find_spec', lambda name: spec if name == 'libtpu' else 'another')
  assert target_lib.has_libtpu() == (spec is not None)


@pytest.mark.parametrize('held_out, padding, flip', [(0, None, None), (300, 2, True)])
def test_stand_in_matches_the_real_data_set(held_out, padding, flip):
  config = base_config()
  config.data.update(name='digits', held_out=held_out, crop_padding=padding, flip=flip)
  config.model.image_side = 8
  ours, real = dataset_like(config), load_dataset(config.data, image_side=8, channels=3)
  for split in ('train', 'test'):
    assert getattr(ours, split).images.shape == getattr(real, split).images.shape
    assert getattr(ours, split).images.dtype == getattr(real, split).images.dtype
  assert (ours.crop_padding, ours.flip) == (real.crop_padding, real.flip)
  assert len(ours.class_names) == len(real.class_names)


def test_unknown_data_set_is_read(tmp_path):
  config = base_config()
  config.data.update(name='folder', data_dir=str(tmp_path / 'none'))
  with pytest.raises(UserError, match='none'):
    dataset_like(config)


def test_the_place_of_the_data():
  code, _, err = run_command(plan.main, QUICKSTART, '--config.data.name=folder', '--data-dir=/nowhere')
  assert code == 2 and err.startswith('error: expected a folder of images, found no folder /nowhere: ')


def test_measured_chip(monkeypatch):
  """A product of 2 * 2,048^3 FLOP in 0.5 s; memory read and written in 0.25 s; four devices share them."""
  assert 4 * target_lib._SIZE == 2**28  # As its source says; here it would only take memory.
  monkeypatch.setattr(target_lib, '_SIZE', 2**10)
  seconds = iter([0.5, 0.25] * 2)
  monkeypatch.setattr(target_lib, '_seconds', lambda *_: next(seconds))
  one, shared = (measured_chip(jax.devices()[0], count) for count in (1, 4))
  assert (one.flops, one.bandwidth) == (4 * 2048**3, 2 * 2**12 / 0.25)
  assert (one.memory, one.flops, one.bandwidth) == (4 * shared.memory, 4 * shared.flops, 4 * shared.bandwidth)
  assert one.memory > 2**28


def test_seconds_of_the_fastest_call(monkeypatch):
  clock = iter([0, 9, 10, 13, 20, 22, 30, 34])
  monkeypatch.setattr(target_lib.time, 'perf_counter', lambda: next(clock))
  assert target_lib._seconds(lambda x: x, 1) == 2


def test_devices_of_this_machine():
  target = choose_target(None, 1)
  assert target.here and target.devices == jax.local_devices()[:1] and target.name.startswith('1 x cpu (')


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs libtpu: requirements-tpu.txt')
@pytest.mark.parametrize('topology, count', [('v5e:2x2', 4), ('v4:2x2x1', 4), ('v5e:1x1', 1)])
def test_tpu(libtpu, topology, count):
  found = planned(f'--topology={topology}')
  assert found['devices']['count'] == count
  assert found['memory']['code'] > 0 and found['measured_step_s'] is None
  params, statistics = state_bytes()
  if count == 1:
    assert found['collectives']['size'] == 0
  else:
    assert params < found['collectives']['size'] < params + 2 * statistics + 100
  assert found['estimate_s']['compiler'] > found['estimate_s']['step'] > 0
  assert found['largest_batch'] % count == 0
