"""data_identity.npz: the images that a run learned from, by content, to be compared when they are read again."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from paranet_jax.data.cache import read_arrays, write_arrays
from paranet_jax.data.dataset import Dataset
from paranet_jax.data.identity import Identities, Known, Learned, Limits, fingerprint_of, known_of
from paranet_jax.host.errors import UserError
from paranet_jax.host.files import read_object
from paranet_jax.runs.checkpoints import CHECKSUMS, has_checkpoint
from paranet_jax.runs.dataset_facts import DATASET, DatasetFacts, restore_dataset_facts, save_dataset_facts

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
    trained = known['train'].ids
    known = {
      name: _union(before.splits[name], now, trained if name != 'train' else trained[:0]) for name, now in known.items()
    }
  record: dict[str, Any] = {'class_names': np.array(dataset.class_names), 'mean': dataset.mean, 'std': dataset.std}
  for prefix, values in (*known.items(), *dataset.limits.items()):
    record |= {f'{prefix}.{name}': value for name, value in values._asdict().items()}
  prints = {name: fingerprint_of(*images) for name, images in known.items()}
  if before and before.splits and prints != {name: fingerprint_of(*old) for name, old in before.splits.items()}:
    # A process killed between the two writes leaves none of the older facts, which would contradict the record.
    (workdir / DATASET).unlink(missing_ok=True)
  write_arrays(workdir / IDENTITY, record)
  save_dataset_facts(workdir, dataset, prints)


def repair_dataset_facts(workdir: Path, dataset: Dataset) -> None:
  """Writes dataset.json if it is missing or damaged; else the run's own names, mean and std stay."""
  try:
    restore_dataset_facts(workdir, channels=len(dataset.mean))
  except UserError:
    learned = restore_learned(workdir, len(dataset.mean), accept_changes=True)
    splits = learned.splits if learned else {}
    save_dataset_facts(workdir, dataset, {name: fingerprint_of(*known) for name, known in splits.items()} or None)


def _union(before: Known, now: Known, trained: Identities) -> Known:
  """Both, without those images of before that are now trained on: they would count as copies."""
  gone = ~np.isin(before.ids, now.ids) & ~np.isin(before.ids, trained)
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
    facts = restore_dataset_facts(workdir, channels)
  except UserError:
    facts = None
  trained = has_checkpoint(workdir)
  try:
    if os.path.isfile(path):  # Unlike Path.is_file, also False where the name is too long.
      return dataclasses.replace(_learned(read_arrays(path), workdir, channels, facts), accept_changes=accept_changes)
    # Version 0.1.0 wrote dataset.json alone, and what came before it neither that nor checksums of checkpoints; another
    # trained run without either has lost its record.
    lost = facts is None and has_checkpoint(workdir, CHECKSUMS)
    expected = bool(facts.fingerprints) if facts else _expects_record(workdir)
    missing = os.path.lexists(path) or expected or lost
    problem = 'is missing' if missing else None
  except Exception as error:  # A damaged archive makes zipfile and NumPy raise nearly anything.
    problem = f'is damaged ({error})'
  if problem and not accept_changes:
    raise UserError(
      f'{path}, by which images that the run was trained on are recognized, {problem}: restore it, or set '
      '--accept_data_changes to draw the splits again'
    )
  if facts is None and not trained:
    return None
  brought = facts is not None and facts.fingerprints == {}  # With weights from elsewhere: no image was read yet.
  learned = Learned(
    workdir,
    by_position=not problem and not brought,
    brought=brought and not trained,
    accept_changes=accept_changes,
  )
  if facts is None:
    return learned
  count = None if brought else sum(facts.counts.values())
  return dataclasses.replace(learned, class_names=facts.class_names, mean=facts.mean, std=facts.std, count=count)


def _learned(record: dict[str, Any], workdir: Path, channels: int, facts: DatasetFacts | None) -> Learned:
  """What the record says; raises ValueError if it cannot have been written by a run, or not by the one of `facts`."""
  names = record['class_names']
  _check(names.dtype.kind == 'U' and names.ndim == 1 and len(np.unique(names)) == len(names), 'class_names')
  for name in ('mean', 'std'):
    values = record[name]
    _check(values.dtype.kind == 'f' and values.shape == (channels,) and bool(np.isfinite(values).all()), name)
  _check(bool((record['std'] > 0).all()), 'std')
  splits, limits = {}, {}
  for name in SPLITS:
    ids, labels = record[f'{name}.ids'], record[f'{name}.labels']
    _check(ids.dtype == np.uint64 and ids.ndim == 1, f'{name}.ids')
    within = (
      labels.dtype.kind == 'i' and labels.shape == ids.shape and bool(((labels >= 0) & (labels < len(names))).all())
    )
    _check(within, f'{name}.labels')
    splits[name] = Known(ids, labels)
    if f'{name}.bound' in record:
      bound, copies, asked = (record[f'{name}.{field}'] for field in Limits._fields)
      _check(bound.dtype == np.uint64 and bound.ndim == 1, f'{name}.bound')
      _check(copies.dtype.kind == 'i' and copies.shape == bound.shape, f'{name}.copies')
      _check(asked.dtype.kind in 'if' and asked.ndim == 0 and bool(np.isfinite(asked)), f'{name}.asked')
      limits[name] = Limits(bound, copies, float(asked))
  mean, std = (tuple(record[name].tolist()) for name in ('mean', 'std'))
  learned = Learned(workdir, tuple(names.tolist()), mean, std, splits=splits, limits=limits)
  if facts:
    for name in ('class_names', 'mean', 'std'):
      _check(getattr(learned, name) == getattr(facts, name), name, f'other values than {DATASET}')
    prints = {name: fingerprint_of(*known) for name, known in splits.items()}
    _check(facts.fingerprints in (None, prints), 'images', f'other ones than {DATASET}')
  return learned


def _check(right: bool, name: str, found: str = 'impossible values') -> None:
  if not right:
    raise ValueError(f'{name}: {found}')


def _expects_record(workdir: Path) -> bool:
  """Whether a dataset.json that is otherwise damaged has fingerprints."""
  try:
    return bool((read_object(workdir / DATASET, '') or {}).get('fingerprints'))
  except UserError:
    return False
