"""dataset.json: what prediction needs to know about the data set, so that it works without the images."""

import dataclasses
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paranet_jax.data.dataset import Dataset
from paranet_jax.data.load import unnamed
from paranet_jax.host.errors import UserError
from paranet_jax.host.files import read_object, write_json

DATASET = 'dataset.json'


@dataclasses.dataclass(frozen=True)
class DatasetFacts:
  """The name of a run's data set, its classes, and how its images are normalized.

  Attributes:
    class_names: one per class.
    mean, std: one per channel, for pixel values of 0..1.
    counts: images in 'train', 'held_out' and 'test'.
    fingerprints: of the same splits, by content and label, whatever the order; None: a run of version 0.1.0; empty:
      weights from elsewhere, whose images are not known here.
  """

  name: str
  version: str
  class_names: tuple[str, ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  counts: dict[str, int]
  fingerprints: dict[str, str] | None = None


def dataset_facts(dataset: Dataset) -> DatasetFacts:
  """Collects the facts of a data set."""
  splits = {'train': dataset.train, 'held_out': dataset.held_out, 'test': dataset.test}
  return DatasetFacts(
    name=dataset.name,
    version=dataset.version,
    class_names=tuple(dataset.class_names),
    mean=tuple(dataset.mean),
    std=tuple(dataset.std),
    counts={name: 0 if split is None else len(split) for name, split in splits.items()},
  )


def output_names(class_names: Sequence[str], num_outputs: int) -> tuple[str, ...]:
  """One name per output of a model, which may have more or fewer outputs than its data set has classes."""
  return (*class_names[:num_outputs], *map(unnamed, range(len(class_names), num_outputs)))


def save_weights_facts(
  workdir: Path, name: str, class_names: Sequence[str], mean: Sequence[float], std: Sequence[float]
) -> None:
  """Writes dataset.json for weights from elsewhere, before anything is trained on them.

  A run in this folder then keeps their classes and their normalization, whatever images its exits are trained on.

  Args:
    workdir: an existing folder.
    name: of the data that the weights were trained on.
    class_names: one per output.
    mean, std: one per channel, for pixel values of 0..1.
  """
  counts: dict[str, int] = dict.fromkeys(('train', 'held_out', 'test'), 0)
  facts = DatasetFacts(name, '', tuple(class_names), tuple(mean), tuple(std), counts, fingerprints={})
  write_json(workdir / DATASET, dataclasses.asdict(facts))


def save_dataset_facts(workdir: Path, dataset: Dataset, fingerprints: dict[str, str] | None = None) -> None:
  """Writes dataset.json, unless it is up to date."""
  saved = json.loads(json.dumps(dataclasses.asdict(dataset_facts(dataset)))) | {'fingerprints': fingerprints}
  if fingerprints is None:  # As version 0.1.0 wrote it.
    del saved['fingerprints']
  try:
    same = read_object(workdir / DATASET, '') == saved
  except UserError:
    same = False
  if not same:
    write_json(workdir / DATASET, saved)


def restore_dataset_facts(workdir: Path, channels: int) -> DatasetFacts:
  """Reads dataset.json.

  Args:
    workdir: of the run.
    channels: of its images.

  Raises:
    UserError: there is none, or it is damaged.
  """
  path = workdir / DATASET
  fix = f'python -m paranet_jax.calibrate --workdir={shlex.quote(str(workdir))} --threshold=0.9 writes it again'
  saved = read_object(path, fix)
  if saved is None:
    raise UserError(f'expected {path}, found none; {fix}')
  if not _fits(saved, channels):
    raise UserError(f'{path} must hold name, version, class_names, mean, std and counts, found {saved!r:.60}; {fix}')
  fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
  return DatasetFacts(**fields)


def _fits(saved: dict[str, Any], channels: int) -> bool:
  fields = {field.name for field in dataclasses.fields(DatasetFacts)}
  if saved.keys() | {'fingerprints'} != fields:
    return False
  names, mean, std, counts = (saved[name] for name in ('class_names', 'mean', 'std', 'counts'))
  return (
    all(isinstance(saved[name], str) for name in ('name', 'version'))
    and isinstance(counts, dict)
    and {'train', 'held_out', 'test'} <= counts.keys()
    and all(type(count) is int for count in counts.values())
    and isinstance(saved.get('fingerprints'), dict | None)
    and isinstance(names, list)
    and all(isinstance(name, str) for name in names)
    and all(isinstance(values, list) and len(values) == channels for values in (mean, std))
    and all(isinstance(value, int | float) and math.isfinite(value) for value in mean + std)
    and min(std) > 0
  )
