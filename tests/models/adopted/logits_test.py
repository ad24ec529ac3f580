"""A small network of each file computes PyTorch's logits.

tests/slow/adopted_test.py compares those of the architectures themselves.
"""

import functools
from pathlib import Path

import drawn_weights
import jax
import numpy as np
import pytest
import small_architectures

from paranet_jax.costs import abstract_variables
from paranet_jax.models.adopted.network import AdoptedNetwork
from paranet_jax.models.adopted.tensors import tensor_table, to_state_dict
from paranet_jax.weights.state_dict import to_variables

LOGITS = np.load(Path(__file__).resolve().parents[2] / 'fixtures' / 'pytorch' / 'adopted_logits.npz')


@pytest.mark.parametrize('name', small_architectures.SMALL)
def test_logits_are_those_of_pytorch(monkeypatch, name):
  member, architecture = drawn_weights.SMALL[name], small_architectures.register(monkeypatch, name)
  model = AdoptedNetwork(10, member.side, arch=architecture.name)
  table = tensor_table(abstract_variables(model, (member.side, member.side, 3)))
  weights = drawn_weights.draw({entry.name: entry.shape for entry in table}, member)
  variables = to_variables(weights, table)
  back = to_state_dict(variables)  # What an export writes: the same, bit for bit.
  jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), back, dict(weights))
  (logits,) = jax.jit(model.apply)(variables, drawn_weights.images(member.side))
  np.testing.assert_allclose(logits, LOGITS[architecture.name], rtol=0, atol=1e-4)
