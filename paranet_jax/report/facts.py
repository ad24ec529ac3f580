"""What a report shows, read from the folder of a run or a bundle and, where there is one, from its data set."""

import base64
import dataclasses
import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from paranet_jax.calibrate.figures.figure_data import FigureData, figure_data
from paranet_jax.data.dataset import Dataset, Images, Split, StoredImages
from paranet_jax.early.bundle_folder import is_bundle
from paranet_jax.early.exit_plan import ExitPlan
from paranet_jax.early.loaded_run import LoadedRun, load
from paranet_jax.early.logits import Outputs, split_logits
from paranet_jax.early.path_costs import mac_costs
from paranet_jax.early.scores import confidences, to_score
from paranet_jax.early.thresholds import exits_taken
from paranet_jax.host.errors import UserError, say, without_config_flags
from paranet_jax.host.files import read_file
from paranet_jax.steps import Preprocessing

HEAD = b'<!doctype html>'
"""What a report begins with; no other file is replaced by one."""
EACH = 6
"""Most images of an exit, of each kind."""
_MOST_IMAGES = 240
_THUMBNAIL = 96  # Pixels of its longer side, at most.


class Shown(NamedTuple):
  """A test image.

  Attributes:
    source: a data URI.
    label, prediction: class names.
    probability: of the prediction, calibrated.
  """

  source: str
  label: str
  prediction: str
  probability: float


class ExitImages(NamedTuple):
  """Of the test images that exit at an exit, those that it is surest of, and the surest of those that it gets wrong."""

  number: int
  surest: list[Shown]
  wrong: list[Shown]


@dataclasses.dataclass(frozen=True)
class Facts:
  """What is known.

  Attributes:
    folder: of the run or the bundle.
    data: measured on the data set; None: it could not be read.
    images: of each exit that an image takes.
    lacking: why `data` is None; ''.
  """

  folder: Path
  bundle: bool
  run: LoadedRun
  plan: ExitPlan
  data: FigureData | None
  images: tuple[ExitImages, ...]
  lacking: str


def read_facts(folder: Path, bundle: bool, data_dir: Path | None, accept_data_changes: bool, out: Path) -> Facts:
  """Reads a run or a bundle, and measures it on its data set if that can be read.

  Args:
    folder: absolute.
    bundle: whether it is meant to be a bundle.
    data_dir: of the data set; None: as the run says.
    accept_data_changes: the data may have other classes or labels than the run learned.
    out: the file that will be written.

  Raises:
    UserError: there is no such run or bundle, or `out` cannot be written.
  """
  if bundle and not is_bundle(folder):
    raise UserError(f'expected a bundle with a bundle.json in {folder}, found none; set --bundle')
  writable = os.path.isdir(out.parent) and os.access(out.parent, os.W_OK | os.X_OK) and not out.is_dir()
  if os.path.isdir(folder) and not writable:  # Without a run, that is what is wrong, and `load` says so.
    raise UserError(f'expected a file in a writable folder as the report, found {out}; set --out')
  earlier = read_file(out, 'set --out to another file')
  if earlier and not earlier.startswith(HEAD):
    raise UserError(f'expected an earlier report or nothing at {out}, found another file; set --out')
  run = load(folder)
  if bundle and data_dir is None:  # It may be on a device, which should not download a data set.
    return Facts(folder, bundle, run, run.plan, None, (), 'a bundle does not say where it is; set --data_dir')
  try:
    dataset = _dataset(run, data_dir, accept_data_changes)
  except UserError as error:
    return Facts(folder, bundle, run, run.plan, None, (), without_config_flags(str(error)))
  assert dataset.held_out is not None  # See `_dataset`.
  say(f'reading {len(dataset.held_out):,} held-out and {len(dataset.test):,} test images')
  held_out, test = (_outputs(run, dataset, split) for split in (dataset.held_out, dataset.test))
  plan, names = run.plan, run.dataset.class_names
  latency = plan.latency['batch_sizes'][0]['ms_alone'] if plan.latency else None
  data = figure_data(
    dataclasses.replace(plan, target={}),  # So that all costs are multiply-adds.
    *(held_out, test, mac_costs(run.model, run.image_shape, plan.exits), dataset.test.images, names),
    ms=None if latency is None else np.array(latency, np.float64),
    labeled=dataset.labeled,
  )
  return Facts(folder, bundle, run, plan, data, exit_images(plan, test, dataset.test.images, names), '')


def _dataset(run: LoadedRun, data_dir: Path | None, accept_data_changes: bool) -> Dataset:
  """The data set of a run.

  Raises:
    UserError: it cannot be read, or no images are held out or to test on.
  """
  dataset = run.load_dataset(data_dir, accept_data_changes)
  if not dataset.held_out or not len(dataset.held_out) or not len(dataset.test):
    raise UserError('expected held-out and test images, found none of one kind; train with --config.data.held_out')
  return dataset


def _outputs(run: LoadedRun, dataset: Dataset, split: Split) -> Outputs:
  preprocessing = Preprocessing(run.dataset.mean, run.dataset.std, crop_padding=0, flip=False)
  batch_size = run.config.eval.batch_size
  logits = split_logits(run.model, run.variables, run.plan.exits, preprocessing, split, batch_size)
  return Outputs.of(logits, split.labels if dataset.labeled else None)


def exit_images(
  plan: ExitPlan, test: Outputs, images: Images | StoredImages, class_names: tuple[str, ...]
) -> tuple[ExitImages, ...]:
  """The images to show of each exit that a test image takes, at most `EACH` of a kind, surest first."""
  taken = exits_taken(confidences(test.logits, plan.score, plan.temperatures), plan.confidence_floors)
  each = max(min(EACH, _MOST_IMAGES // (2 * len(plan.exits))), 1)
  found = []
  for k, number in enumerate(plan.exits):
    there = np.flatnonzero(taken == k)
    if not len(there):
      continue
    sure = confidences(test.logits[k : k + 1, there], 'max_prob', plan.temperatures[k : k + 1])[0]
    ranking = there[np.argsort(-sure, kind='stable')]
    probabilities = dict(zip(there.tolist(), to_score(sure, 'max_prob').tolist(), strict=True))
    predictions = test.logits[k].argmax(-1)
    wrong = ranking[predictions[ranking] != test.labels[ranking]]

    def shown(
      chosen: Int[np.ndarray, ' n'],
      predictions: Int[np.ndarray, ' N'] = predictions,
      probabilities: dict[int, float] = probabilities,
    ) -> list[Shown]:
      return [
        Shown(
          data_uri(image), class_names[test.labels[place]], class_names[predictions[place]], probabilities[int(place)]
        )
        for place, image in zip(chosen, np.asarray(images[chosen]) if len(chosen) else (), strict=True)
      ]

    found.append(ExitImages(number, shown(ranking[:each]), shown(wrong[:each])))
  return tuple(found)


def data_uri(image: UInt8[np.ndarray, 'H W C']) -> str:
  """A thumbnail: PNG if it is small, otherwise JPEG."""
  picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
  small = max(picture.size) <= _THUMBNAIL
  if not small:
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
  encoded = io.BytesIO()
  picture.save(encoded, 'PNG' if small else 'JPEG', quality=85)
  return f'data:image/{"png" if small else "jpeg"};base64,{base64.b64encode(encoded.getvalue()).decode()}'
