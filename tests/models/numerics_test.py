"""The checks of this machine's numbers: right ones pass, wrong ones are caught, and results are remembered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from killing import run
from running import TINY

from paranet_jax.config import build_model
from paranet_jax.configs import quickstart
from paranet_jax.host.errors import UserError
from paranet_jax.host.known_faults import ACCEPT, jaxlib_version
from paranet_jax.host.native import missing
from paranet_jax.models import numerics
from paranet_jax.models.layers import native_dense

KNOWN_WRONG = '--xla_cpu_experimental_ynn_fusion_type=reduce'
SHAPE = (8, 8, 1)
check_once = numerics.check_once  # The suite's fixture replaces it.


@pytest.fixture
def model():
  config = quickstart.get_config()
  config.model.update({'layers_per_block': 2, 'growth_rate': 2, 'image_side': 8, 'channels': 1})
  return build_model(config, 10)


@pytest.fixture
def cache(monkeypatch, tmp_path):
  monkeypatch.setenv('PARANET_CACHE_DIR', str(tmp_path))
  return tmp_path / 'numerics'


@pytest.mark.parametrize('batch_size', [1, 2])
def test_batches_of_one_and_two_pixels_pass(model, batch_size):
  tiny = model.clone(num_pipelines=1, image_side=2)
  findings = [numerics.measure(program) for program in numerics.programs(tiny, (2, 2, 1), batch_size, True)]
  assert findings[-1].program.name == '2 dense layers on [16, 1, 1, 4] with their gradients'
  assert all(finding.error < numerics.EXACT / 10 for finding in findings)


@pytest.mark.parametrize('train', [True, False])
def test_right_programs_are_far_below_the_tolerance(model, train):
  findings = [numerics.measure(program) for program in numerics.programs(model, SHAPE, 6, train)]
  names = ['the sums of 32,769 vmapped', 'a 3x3 convolution of [6, 8, 8, 1]', '2 dense layers on [6, 4, 4, 4]']
  names += [] if train else ['a stem of [6, 8, 8, 1]']
  assert [
    name for name, finding in zip(names, findings, strict=True) if not finding.program.name.startswith(name)
  ] == []
  assert all(0 < finding.error < numerics.EXACT / 5 and finding.right for finding in findings), findings


def test_bfloat16_is_compared_by_its_norm():
  program = numerics.dense_layers((6, 4, 4, 4), 2, 2, 4, True, jnp.bfloat16)
  finding = numerics.measure(program)
  assert not program.exact and finding.right and finding.error > numerics.EXACT


def test_kernels_of_a_stem_are_checked():
  program = numerics.pooled_layer((16, 32, 32, 3))
  assert program.native == ('kernels in C++' in program.name) == (not missing(native_dense.FEATURES))
  finding = numerics.measure(program)
  assert finding.right and finding.error < numerics.EXACT / 10
  wrong = program._replace(compute=lambda: [jnp.roll(output, 1, -1) for output in program.compute()])
  assert not numerics.measure(wrong).right


@pytest.mark.parametrize('fault', ['a row', 'a gradient', 'not finite'])
def test_a_wrong_number_anywhere_is_found(fault):
  right = numerics.dense_layers((6, 4, 4, 4), 1, 2, 4, True)

  def compute():
    outputs = [jnp.asarray(output) for output in right.compute()]
    values, gradient = outputs[0], outputs[-1]
    if fault == 'a row':
      outputs[0] = values.at[5, 3, 3, 1].multiply(0.99)
    elif fault == 'a gradient':
      outputs[-1] = gradient.at[2, 2, 0, 1].add(0.001 * jnp.abs(gradient).max())
    else:
      outputs[0] = values.at[0, 0, 0, 0].set(jnp.nan)
    return outputs

  assert numerics.measure(right).right
  assert not numerics.measure(right._replace(compute=compute)).right


def test_checked_once_and_remembered_by_shapes_and_flags(monkeypatch, cache, model):
  ran = []

  def few(*arguments):
    ran.append(arguments[1:])
    return [numerics.summed_products(10)]

  monkeypatch.setattr(numerics, 'programs', few)
  for _ in range(2):
    check_once(model, SHAPE, 6, True)
  check_once(model, SHAPE, 7, True)
  monkeypatch.setenv('XLA_FLAGS', '--xla_cpu_parallel_codegen_split_count=1')
  check_once(model, SHAPE, 7, True)
  assert ran == [(SHAPE, 6, True), (SHAPE, 7, True), (SHAPE, 7, True)]
  assert len(list(cache.glob('*.json'))) == 3


def test_wrong_numbers_stop_until_they_are_accepted(monkeypatch, capsys, cache, model):
  right = numerics.summed_products(10)
  wrong = right._replace(compute=lambda: [jnp.float32(2) * right.compute()[0]])
  monkeypatch.setattr(numerics, 'programs', lambda *_: [wrong])
  monkeypatch.setattr(numerics, 'jaxlib_version', lambda: (0, 10, 2))
  monkeypatch.delenv(ACCEPT, raising=False)
  for _ in range(2):  # What is wrong is not remembered.
    with pytest.raises(
      UserError, match='expected 81 in the sums of 10 vmapped matrix-vector products, found 162'
    ) as error:
      check_once(model, SHAPE, 6, True)
  message = str(error.value)
  assert "set XLA_FLAGS='--xla_cpu_experimental_ynn_fusion_type=-reduce' before jax starts (https://" in message
  assert message.endswith('--accept_wrong_numbers') and '\n' not in message
  monkeypatch.setenv(ACCEPT, '1')
  check_once(model, SHAPE, 6, True)
  assert capsys.readouterr().out == f'warning: {message}\n'
  assert not cache.exists()


@pytest.mark.parametrize(
  ('version', 'native', 'fix'),
  [
    ((0, 10, 2), True, 'set PARANET_NATIVE=off, which leaves the computation to XLA'),
    ((0, 13, 0), True, 'set PARANET_NATIVE=off, which leaves the computation to XLA'),
    ((0, 13, 0), False, 'install another jaxlib'),
  ],
)
def test_what_to_do_about_wrong_numbers(monkeypatch, version, native, fix):
  monkeypatch.setattr(numerics, 'jaxlib_version', lambda: version)
  found = numerics.Finding(numerics.summed_products(10)._replace(native=native), 1.0, 162.0, 81.0)
  assert str(found).startswith('expected 81 in the sums of 10 vmapped matrix-vector products, found 162: jaxlib ')
  assert str(found).endswith(f'; {fix}, or go on with --accept_wrong_numbers') and not found.right


@pytest.mark.skipif(jaxlib_version() != (0, 10, 2), reason='jaxlib 0.10.2 computes wrong numbers with this flag')
def test_a_fault_that_the_user_forces_stops_training(tmp_path):
  env = {'XLA_FLAGS': KNOWN_WRONG, 'PARANET_CACHE_DIR': str(tmp_path / 'cache')}
  code, _, err = run(*TINY, workdir=tmp_path / 'run', env=env)
  assert code == 2 and err.count('\n') == 1, err
  assert err.startswith('error: expected 1.07374182e+09 in the sums of 32,769 vmapped matrix-vector products,')
  assert not list(tmp_path.glob('run/checkpoints/*'))


def test_networks_without_dense_blocks_are_checked_too():
  names = [program.name for program in numerics.programs(OneLayer(), (4, 4, 3), 2, True)]
  assert names == [
    'the sums of 32,769 vmapped matrix-vector products',
    'a 3x3 convolution of [2, 4, 4, 3] with its loss and gradient',
  ]


class OneLayer:
  def init(self, key, images):
    return jax.tree.map(jnp.mean, images)


def test_no_relu_reads_a_value_that_rounding_could_flip():
  """Without it, two layers at the shape of the quickstart have a flip, which looks like wrong numbers."""
  x = np.random.default_rng(1).normal(size=(32, 16, 16, 24)).astype(np.float32)
  drawn = numerics.drawn_layers(np.random.default_rng(2), 24, layers=2, growth_rate=12, bn_size=4)
  nearest, values = [], x.astype(np.float64)
  cleared = numerics.clear_of_zero(x, drawn)
  for layer, before in zip(cleared, drawn, strict=True):
    read = values * layer.scale1 + layer.shift1
    product = np.maximum(read, 0) @ layer.kernel1
    z = (product - product.mean((0, 1, 2))) / np.sqrt(product.var((0, 1, 2)) + 1e-5) * layer.scale2 + layer.shift2
    nearest += [np.abs(read).min(), np.abs(z).min()]
    np.testing.assert_allclose(layer.shift1, before.shift1, atol=0.1)
    np.testing.assert_allclose(layer.shift2, before.shift2, atol=0.1)
    y = sum(
      np.pad(np.maximum(z, 0), ((0, 0), (1, 1), (1, 1), (0, 0)))[:, i : i + 16, j : j + 16] @ layer.kernel2[i, j]
      for i in range(3)
      for j in range(3)
    )
    y = (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5)
    values = np.concatenate([values, y], -1)
  assert min(nearest) > 5e-6  # Values are of order 1, and float32 has errors of about 1e-6 here.
