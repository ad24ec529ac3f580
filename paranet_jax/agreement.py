"""Whether the processes of a run train the same: each builds its task by itself, from its own flags and files."""

import hashlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from paranet_jax.base_config import field_names
from paranet_jax.host import processes
from paranet_jax.host.errors import UserError
from paranet_jax.task import Task

_OF_THE_MACHINE = ('data.data_dir', 'data.workers', 'init_from')
"""Where the data lies and how many read it may differ; what a run starts from, the first process alone reads."""


def check_agreement(task: Task) -> None:
  """Compares what determines the training with the first process's; every process calls it.

  Raises:
    UserError: in all of them, of the first field that differs anywhere.
  """
  if processes.count() == 1:
    return
  facts = _facts(task.config) | _data_facts(task)
  own = {name: hashlib.sha256(fact.encode()).hexdigest()[:8] for name, fact in facts.items()}
  told = processes.from_first(own)
  places = np.zeros(processes.count())
  places[processes.index()] = next((place for place, name in enumerate(told, 1) if own.get(name) != told[name]), 0)
  places = processes.summed(places)
  if places.any():
    other = int(np.flatnonzero(places)[0])
    name = list(told)[int(places[other]) - 1]
    raise UserError(
      f'all processes must train the same, found in process {other} another {name} than in process 0 '
      f'(here {facts.get(name, "none")[:80]}); start all of them with the same flags and data'
    )


def _facts(config: ConfigDict) -> dict[str, str]:
  facts = {}
  for name in field_names(config):
    if name not in _OF_THE_MACHINE:
      value: Any = config
      for part in name.split('.'):
        value = value[part]
      facts[name] = repr(value)
  return facts


def _data_facts(task: Task) -> dict[str, str]:
  data = task.dataset
  facts = {'version of the data': data.version, 'class names': ', '.join(data.class_names)}
  for name, split in (('training', data.train), ('held-out', data.held_out), ('test', data.test)):
    if split is not None:
      facts[f'number of {name} images'] = str(len(split))
      facts[f'{name} labels'] = hashlib.sha256(np.asarray(split.labels, np.int32).tobytes()).hexdigest()
  # Rounded, as machines may add up in another order.
  for name in ('mean', 'std'):
    facts[f'{name} of the images'] = ', '.join(f'{value:.5f}' for value in getattr(data, name))
  return facts
