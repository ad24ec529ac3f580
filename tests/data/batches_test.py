import jax
import numpy as np
import pytest

from paranet_jax.data.batches import epoch_order, eval_batches, jitted_order, steps_per_epoch
from paranet_jax.host.errors import UserError


@pytest.mark.parametrize('num_examples, batch_size, steps', [(50_000, 64, 781), (8, 4, 2), (7, 4, 1), (4, 4, 1)])
def test_steps_per_epoch(num_examples, batch_size, steps):
  assert steps_per_epoch(num_examples, batch_size) == steps


def test_refuses_a_batch_larger_than_the_training_set():
  with pytest.raises(UserError, match='at most 3 images per batch .*, found 4: lower --config.train.batch_size'):
    steps_per_epoch(3, 4)


def test_epoch_order_visits_each_image_at_most_once():
  order = epoch_order(0, 0, num_examples=11, batch_size=4)
  assert order.shape == (2, 4) and order.dtype == np.int32
  assert len(np.unique(order)) == 8 and 0 <= order.min() and order.max() < 11


def test_epoch_order_is_a_function_of_seed_and_epoch():
  jitted = jitted_order(100, 10)
  orders = {part: np.asarray(jitted(*part)).tobytes() for part in [(0, 0), (0, 1), (1, 0), (1, 1)]}
  assert len(set(orders.values())) == 4
  for part, order in orders.items():
    assert np.asarray(epoch_order(*part, 100, 10)).tobytes() == order


def test_resumed_runs_keep_the_order_of_their_images():
  stream = jax.random.fold_in(jax.random.key(3), 0)
  expected = jax.random.permutation(jax.random.fold_in(stream, 2), 7)[:6]
  np.testing.assert_array_equal(epoch_order(3, 2, 7, 3), expected.reshape(2, 3))


def test_the_dropped_images_differ_between_epochs():
  dropped = [set(range(11)) - set(np.asarray(epoch_order(0, epoch, 11, 4)).ravel().tolist()) for epoch in range(4)]
  assert len({frozenset(images) for images in dropped}) > 1


EVAL_BATCHES = [
  (3, 2, [[0, 1], [2, 0]], [[1, 1], [1, 0]]),
  (4, 2, [[0, 1], [2, 3]], [[1, 1], [1, 1]]),
  (1, 3, [[0, 0, 0]], [[1, 0, 0]]),
]


@pytest.mark.parametrize('num_examples, batch_size, indices, mask', EVAL_BATCHES)
def test_eval_batches_pad_the_last_one(num_examples, batch_size, indices, mask):
  found = eval_batches(num_examples, batch_size)
  np.testing.assert_array_equal(found[0], np.array(indices))
  np.testing.assert_array_equal(found[1], np.array(mask))
  assert found[0].dtype == np.int32 and found[1].dtype == np.float32
