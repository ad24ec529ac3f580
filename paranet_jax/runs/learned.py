"""data_identity.npz: the images that a run learned from, by content, to be compared when they are read again."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from paranet_jax.data.cache import read_arrays, write_arrays
from paranet_jax.data.dataset import Dataset
from paranet_jax.data.identity import Known, Learned, Limits, fingerprint_of, known_of
from paranet_jax.host.errors import UserError
from paranet_jax.host.files import read_object
from paranet_jax.runs.dataset_facts import DATASET, restore_dataset_facts, save_dataset_facts

IDENTITY = 'data_identity.npz'
SPLITS = ('train', 'held_out', 'test')


def save_learned(workdir: Path, dataset: Dataset) -> None:
  """Records the data set in data_identity.npz and dataset.json: what a run is about to learn from.

  Images that were recorded before stay recorded. A run of version 0.1.0, which has no record, gets none.
  """
  before = restore_learned(workdir, channels=len(dataset.mean), accept_changes=True)
  if dataset.train.identities is None or (before and before.by_position):
    save_dataset_facts(workdir, dataset)
    return
  known = {name: known_of(getattr(dataset, name)) for name in SPLITS}
  if before and before.splits:
    known = {name: _union(before.splits[name], now) for name, now in known.items()}
  record: dict[str, Any] = {'class_names': np.array(dataset.class_names), 'mean': dataset.mean, 'std': dataset.std}
  for prefix, values in (*known.items(), *dataset.limits.items()):
    record |= {f'{prefix}.{name}': value for name, value in values._asdict().items()}
  write_arrays(workdir / IDENTITY, record)
  save_dataset_facts(workdir, dataset, {name: fingerprint_of(*images) for name, images in known.items()})


def repair_dataset_facts(workdir: Path, dataset: Dataset) -> None:
  """Writes dataset.json if it is missing or damaged; else the run's own names, mean and std stay."""
  try:
    restore_dataset_facts(workdir, channels=len(dataset.mean))
  except UserError:
    learned = restore_learned(workdir, len(dataset.mean), accept_changes=True)
    splits = learned.splits if learned else {}
    save_dataset_facts(workdir, dataset, {name: fingerprint_of(*known) for name, known in splits.items()} or None)


def _union(before: Known, now: Known) -> Known:
  gone = ~np.isin(before.ids, now.ids)
  return Known(np.concatenate([now.ids, before.ids[gone]]), np.concatenate([now.labels, before.labels[gone]]))


def restore_learned(workdir: Path, channels: int, accept_changes: bool = False) -> Learned | None:
  """Reads what a run recorded of its data; None: there is no run.

  Args:
    channels: of its images.
    accept_changes: classes, labels and images may have changed, or the record may be damaged.

  Raises:
    UserError: the record is damaged or missing.
  """
  path = workdir / IDENTITY
  try:
    if os.path.isfile(path):  # Unlike Path.is_file, also False where the name is too long.
      return dataclasses.replace(_learned(read_arrays(path), workdir), accept_changes=accept_changes)
    problem = 'is missing' if os.path.lexists(path) or _expects_record(workdir) else None
  except Exception as error:  # A damaged archive makes zipfile and NumPy raise nearly anything.
    problem = f'is damaged ({error})'
  if problem and not accept_changes:
    raise UserError(
      f'{path}, by which images that the run was trained on are recognized, {problem}: restore it, or set '
      '--accept_data_changes to draw the splits again'
    )
  try:
    facts = restore_dataset_facts(workdir, channels)
  except UserError:
    facts = None
  checkpoints = workdir / 'checkpoints'
  if facts is None and not (os.path.isdir(checkpoints) and any(checkpoints.glob('[0-9]*'))):
    return None
  learned = Learned(workdir, by_position=not problem, accept_changes=accept_changes)
  if facts is None:
    return learned
  count = sum(facts.counts.values())
  return dataclasses.replace(learned, class_names=facts.class_names, mean=facts.mean, std=facts.std, count=count)


def _learned(record: dict[str, Any], workdir: Path) -> Learned:
  splits = {name: Known(record[f'{name}.ids'], record[f'{name}.labels']) for name in SPLITS}
  limits = {
    name: Limits(record[f'{name}.bound'], record[f'{name}.copies'], float(record[f'{name}.asked']))
    for name in SPLITS
    if f'{name}.bound' in record
  }
  mean, std = (tuple(record[name].tolist()) for name in ('mean', 'std'))
  return Learned(workdir, tuple(record['class_names'].tolist()), mean, std, splits=splits, limits=limits)


def _expects_record(workdir: Path) -> bool:
  try:
    return bool((read_object(workdir / DATASET, '') or {}).get('fingerprints'))
  except UserError:
    return False
