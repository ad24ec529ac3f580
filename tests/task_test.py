"""Tests of what a configuration and its data set determine, on the embedded digits."""

import jax
import numpy as np
import pytest
import tiny

from paranet_jax.base_config import base_config
from paranet_jax.steps import zero_totals
from paranet_jax.task import build_task


def config(name, **train):
  found = base_config(name)
  found.model.update(layers_per_block=1, growth_rate=2, bn_size=2, image_side=tiny.SIDE)
  found.data.update(name='digits', held_out=300)
  found.train.update(train)
  return found


def test_lengths_and_learning_rate():
  """1,137 images make 11 batches of 100; an update is two steps, so the rate drops after 10 and 20 of the 30 epochs."""
  task = build_task(config('PN2-2d', batch_size=100, epochs=30.0, accumulate_steps=2, drop_epochs=(10, 20)))
  assert (task.steps_per_epoch, task.total_steps) == (11, 330)
  assert task.image_shape == (tiny.SIDE, tiny.SIDE, 3)
  assert (task.model.num_exits, task.model.num_classes, task.targets) == (2, 10, (2, 0))
  rates = [task.learning_rate(step) for step in (0, 109, 110, 219, 220, 329)]
  np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-5)


def paths(tree):
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize(
  'name, optimizer, unreached',
  [
    ('PN3-xxd', 'sgd', ('exit_1', 'exit_2')),
    ('PN3-xdx', 'adamw', ('pipeline_3_', 'exit_1', 'exit_3')),
    ('PN3cut-xdx', 'sgd', ('pipeline_1_', 'pipeline_3_', 'exit_1', 'exit_3')),
  ],
)
def test_training_moves_what_a_loss_reaches_and_leaves_the_rest_bit_for_bit(
  name, optimizer, unreached, standard_promotion
):
  task = build_task(config(name, optimizer=optimizer, batch_size=8, weight_decay=0.1))
  order = np.arange(16, dtype=np.int32).reshape(2, 8)
  step = jax.jit(task.train_step())
  before = after = tiny.state(task.model, task.optimizer)
  for _ in range(3):
    train = task.dataset.train
    after, _ = step(after, zero_totals(task.targets), train.images, train.labels, order)
  for part in ('params', 'batch_stats'):
    old, new = paths(getattr(before, part)), paths(getattr(after, part))
    assert old.keys() == new.keys()
    changed = {path for path in old if not np.array_equal(old[path], new[path])}
    assert changed == {path for path in old if not path.startswith(tuple(f"['{prefix}" for prefix in unreached))}
