"""Every shipped configuration is counted, which takes seconds of tracing for the large ones."""

import pytest
from reference import SHIPPED

from paranet_jax.command_line import load_config
from paranet_jax.config import build_model
from paranet_jax.costs import exit_costs
from paranet_jax.data.known import known_dataset


@pytest.mark.parametrize('config', SHIPPED)
def test_counts(config):
  found = load_config(f'paranet_jax:{config}')
  model = build_model(found, known_dataset(found.data.name).num_classes)
  costs = exit_costs(model, (model.image_side, model.image_side, 3))
  assert [(cost['params'], cost['macs']) for cost in costs] == SHIPPED[config][1]
