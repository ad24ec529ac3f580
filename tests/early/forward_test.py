"""The compiled forward pass against the model's own."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from paranet_jax.early.forward import compile_forward


@pytest.mark.parametrize('exits', [None, (1,), (3, 1)])
def test_equals_apply(exits):
  model = tiny.network(3)
  variables = tiny.variables(model)
  images = np.random.default_rng(0).normal(size=(4, tiny.SIDE, tiny.SIDE, 3)).astype(np.float32)
  found = compile_forward(model, variables, exits)(images)
  wanted = model.apply(variables, jnp.asarray(images), exits=exits)
  assert [logits is None for logits in found] == [logits is None for logits in wanted]
  chex.assert_trees_all_close(jax.device_get(found), jax.device_get(wanted), atol=1e-5)


def test_a_batch_size_is_compiled_once():
  model = tiny.network(2)
  forward = compile_forward(model, tiny.variables(model))
  for size in (2, 2, 3, 2):
    forward(np.zeros((size, tiny.SIDE, tiny.SIDE, 3), np.float32))
  assert forward._cache_size() == 2
