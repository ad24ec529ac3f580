"""Everything that a configuration and its data set determine: built once, then only read."""

import dataclasses
import functools
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from paranet_jax import config as config_lib
from paranet_jax.base_config import field_names
from paranet_jax.costs import abstract_variables, parameter_sizes, variable_paths
from paranet_jax.data.batches import steps_per_epoch
from paranet_jax.data.dataset import Dataset, Split
from paranet_jax.data.identity import Learned
from paranet_jax.data.load import load_dataset
from paranet_jax.frozen import (
  POOLED,
  Features,
  feature_shapes,
  keep_features,
  make_exits_step,
  on_disk,
  places_shifted,
)
from paranet_jax.host.errors import UserError, printable
from paranet_jax.host.kept_programs import Kept
from paranet_jax.host.machine import Device
from paranet_jax.host.processes import Coordinator
from paranet_jax.models.linked import trained_by_its_exits
from paranet_jax.models.own_channels import with_own_channels
from paranet_jax.optim import Schedule, decay_mask, make_optimizer, make_schedule
from paranet_jax.steps import Beside, Objective, Preprocessing, TrainState, init_state, make_train_step
from paranet_jax.targets import GIVEN, Phase, Targets, make_phases, matches_exits, trained_exits

_MACHINE_FIELDS = (*config_lib.PATHS, 'data.workers')
"""May differ between processes: where the data is, how many workers read it, and what process 0 alone reads."""
_TOGETHER = {'gradient_equilibrium': False, 'conflict_averse': 0, 'own_channels': 0}
"""The fields of the loss that change the gradients of parameters that exits share, and their values when off."""
_OF_LABELS = {'class_weights': 'none', 'label_smoothing': 0}
"""The fields of the loss that change nothing but losses with the true label, and their values when off."""


@dataclasses.dataclass(frozen=True)
class Task:
  """A model, its data, its objective and its optimizer.

  Attributes:
    steps_per_epoch: full batches per epoch.
    total_steps: length of the run.
    schedule: learning rate by optimizer update.
  """

  config: ConfigDict
  dataset: Dataset
  model: Any
  targets: Targets
  objective: Objective
  preprocessing: Preprocessing
  optimizer: optax.GradientTransformation
  schedule: Schedule
  steps_per_epoch: int
  total_steps: int

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C)."""
    return config_lib.image_shape(self.config)

  @property
  def class_weights(self) -> Sequence[float] | None:
    """The weight of every output in losses with the true label; None: all are the same."""
    return self.objective.class_weights

  @property
  def labeled(self) -> bool:
    """Whether the images have labels."""
    return self.dataset.labeled

  @property
  def phases(self) -> tuple[Phase, ...]:
    """Which exits train at which steps."""
    backbone_steps = config_lib.backbone_steps(self.config, self.steps_per_epoch)
    return make_phases(
      self.config.train.regime,
      self.targets,
      backbone_steps,
      self.total_steps,
      match_step=config_lib.match_step(self.config, self.steps_per_epoch),
      match_before=self.config.loss.match_before,
    )

  @property
  def evaluation_steps(self) -> int:
    """Steps between evaluations."""
    return max(round(self.config.eval.every_epochs * self.steps_per_epoch), 1)

  def learning_rate(self, step: int) -> float:
    """Learning rate of the update that step `step` (from 0) belongs to."""
    return float(self._schedule(np.int32(step // self.config.train.accumulate_steps)))

  @functools.cached_property
  def _schedule(self) -> Kept:  # One program: one by one, its operations would take a third of a second to compile.
    of = self.config.train.to_dict(), self.steps_per_epoch
    return Kept('learning_rate', lambda: jax.jit(self.schedule), lambda: of)

  def init_state(self) -> TrainState:
    """The state at step 0; what teaches from another run is not read yet, but has its shapes."""
    state = init_state(self.model, self.optimizer, self.config.seed, self.image_shape, self.frozen)
    if not config_lib.keeps_beside(self.config):
      return state

    def copy(wanted: bool) -> Any:  # A step is given the buffers of its state, and each once.
      variables = {'params': state.params, 'batch_stats': state.batch_stats}
      return jax.tree.map(jnp.copy, variables) if wanted else {}

    average, teacher = copy(bool(self.config.train.average)), copy(self.config.loss.teacher == 'run')
    return dataclasses.replace(state, opt_state=Beside(state.opt_state, average, teacher))

  @functools.cached_property  # It traces the network.
  def frozen(self) -> frozenset[tuple[str, ...]]:
    """Under the regime 'exits', paths of the backbone, and of the last exit if it is given; otherwise none."""
    if self.config.train.regime != 'exits':
      return frozenset()
    last = self.model.num_exits
    paths = variable_paths(self.model, self.image_shape, last)
    return frozenset(path for path in paths if self.targets[-1] == GIVEN or path[1] != f'exit_{last}')

  @property
  def keeps_features(self) -> bool:
    """Whether training reads kept features of a frozen backbone instead of images."""
    return bool(self.frozen) and not config_lib.varies_images(self.config, self.preprocessing.crop_padding)

  def feature_shapes(self, split: Split) -> Features:
    """Shapes of the features of a split; of the training images also mirrored, if they are."""
    variables = abstract_variables(self.model, self.image_shape)
    learning = trained_exits(self.phases[-1].targets)
    mirrored = self.preprocessing.flip and split is self.dataset.train
    dtype = self.config.train.features
    if self.config.loss.match_features and split is self.dataset.train:
      learning = (*learning, POOLED)
    return feature_shapes(self.model, variables, self.image_shape, learning, dtype, len(split), mirrored)

  @property
  def streams(self) -> bool:
    """Whether a training step gets its batch, and not the whole training set."""
    if self.keeps_features:
      return on_disk(self.feature_shapes(self.dataset.train))
    return self.dataset.train.streamed

  def keep_features(
    self, split: Split, variables: Any, name: str, check: Callable[[], None] = lambda: None
  ) -> Features:
    """Computes the features of a split (see `frozen.keep_features`)."""
    return keep_features(
      self.model,
      variables,
      self.preprocessing,
      split,
      self.feature_shapes(split),
      self.config.eval.batch_size,
      name,
      mirrored=self.preprocessing.flip and split is self.dataset.train,
      check=check,
    )

  def phase(self, step: int) -> Phase:
    """The phase that step `step` (from 0) belongs to; the last one at the end of the run."""
    return next((phase for phase in self.phases if step < phase.end), self.phases[-1])

  def train_step(self, axis_name: str | None = None, phase: Phase | None = None) -> Callable:
    """The body of a phase's training step, by default the last phase's (see `steps.make_train_step`)."""
    phase = phase or self.phases[-1]
    if self.frozen:
      return make_exits_step(
        self.model,
        self.optimizer,
        self.objective._replace(targets=phase.targets),
        self.preprocessing,
        axis_name,
        frozen=self.frozen,
        kept=self.keeps_features,
        labeled=self.labeled,
        shift=self.config.train.feature_shift,
        match_mirrored=self.config.loss.match_mirrored,
        match_features=self.config.loss.match_features,
      )
    whole, loss = phase.targets == self.targets, self.config.loss
    return make_train_step(
      with_own_channels(self.model, loss.own_channels) if loss.own_channels else self.model,
      # Both have the same state: they differ in which parameters decay.
      self.optimizer if whole else _optimizer(self.config, self.schedule, self.model, phase.targets),
      self.objective._replace(targets=phase.targets, teachers=self._teachers(phase)),
      self.preprocessing,
      axis_name,
      frozen=variable_paths(self.model, self.image_shape, phase.frozen) if phase.frozen else (),
      users=_users(self, phase) if loss.gradient_equilibrium or loss.conflict_averse else None,
      conflict=loss.conflict_averse,
      average=self.config.train.average,
    )

  def _teachers(self, phase: Phase) -> Mapping[int, Sequence[int]]:
    """The teachers of each exit in a phase, without those of the run that have not begun to learn."""
    teachers, phases = self.objective.teachers, self.phases
    if self.objective.teacher == 'teacher':
      return teachers
    begun = {number for own in phases[: phases.index(phase) + 1] for number in trained_exits(own.targets)}
    found = {number: tuple(other for other in own if other in begun) for number, own in teachers.items()}
    return {number: own for number, own in found.items() if own}

  def determines_step(self, phase: Phase) -> Any:
    """What tells a phase's training step from others, beside the shapes of its arguments."""
    of_config = {name: self.config[name].to_dict() for name in ('model', 'loss', 'train')}
    of_data = self.labeled, self.keeps_features, self.steps_per_epoch, self.total_steps
    return self.model, self.objective, self.preprocessing, phase, of_config, of_data

  def facts(self) -> dict[str, str]:
    """What determines the training, by name: every field of the configuration and a digest of the data."""
    facts = {}
    for name in field_names(self.config):
      if name not in _MACHINE_FIELDS:
        value: Any = self.config
        for part in name.split('.'):
          value = value[part]
        facts[name] = repr(value)
    data = self.dataset
    facts |= {'data set version': data.version, 'class names': ', '.join(data.class_names)}
    for name, split in (('training', data.train), ('held-out', data.held_out), ('test', data.test)):
      if split is not None:
        facts[f'number of {name} images'] = str(len(split))
        facts[f'{name} labels'] = hashlib.sha256(np.asarray(split.labels, np.int32).tobytes()).hexdigest()
    # Rounded, as machines may add in a different order.
    for name in ('mean', 'std'):
      facts[f'{name} of the images'] = ', '.join(f'{value:.5f}' for value in getattr(data, name))
    return facts

  def facts_line(self, devices: list[Device], processes: int) -> str:
    """One line on the size of the run and what it runs on."""
    data = self.dataset
    held_out = f' {len(data.held_out):,} held out,' if data.held_out is not None else ''
    skipped = f' ({data.skipped:,} corrupt files skipped)' if data.skipped else ''
    where = f'{len(devices)} x {devices[0].device_kind}' + (f' in {processes} processes' if processes > 1 else '')
    return (
      f'images: {len(data.train):,} train,{held_out} {len(data.test):,} test{skipped}; '
      f'{self.total_steps:,} steps of {self.config.train.batch_size} on {where}{self._weights_line()}'
    )

  def _weights_line(self) -> str:
    if not self.class_weights:
      return ''
    weights = self.class_weights[: len(self.dataset.class_names)]
    named = list(zip(weights, map(printable, self.dataset.class_names), strict=True))
    low, high = (f'{weight:g} ({name})' for weight, name in (min(named), max(named)))
    return f'\nclass weights: from {low} to {high}'


def agreed_task(config: ConfigDict, processes: Coordinator, learned: Learned | None = None) -> Task:
  """Builds the task in every process, process 0 first, and checks that all built the same one.

  Args:
    learned: what the run has recorded of its data; process 0's is used.

  Raises:
    UserError: as `build_task`, or the tasks differ, or a new run is too short.
  """
  learned = processes.object_from_first(learned)
  if learned and not processes.is_first:
    learned = dataclasses.replace(learned, silent=True)
  task = processes.first_then_others(lambda: build_task(config, learned=learned))
  if processes.count > 1:
    processes.check_same(task.facts())
  if _is_new(learned):  # A run that has begun may be read where there are fewer images.
    _check_lengths(task)
  return task


def build_task(config: ConfigDict, dataset: Dataset | None = None, learned: Learned | None = None) -> Task:
  """Reads the data set and builds everything that training and evaluation need.

  Args:
    dataset: replaces the one that the configuration names.
    learned: what the run has recorded of its data; None: a new run.

  Raises:
    UserError: the configuration or the data does not fit.
  """
  config_lib.validate(config)
  dataset = dataset or load_dataset(
    config.data,
    image_side=config.model.image_side,
    channels=config.model.channels,
    num_classes=config.model.num_classes,
    learned=learned,
  )
  model = config_lib.build_model(config, len(dataset.class_names))
  targets = config_lib.targets(config)
  steps = steps_per_epoch(len(dataset.train), config.train.batch_size)
  schedule = _schedule(config, steps)
  task = Task(
    config=config,
    dataset=dataset,
    model=model,
    targets=targets,
    objective=Objective(
      targets,
      config_lib.exit_weights(config),
      matching=config.loss.matching,
      temperature=config.loss.temperature,
      hard_label_weight=config_lib.hard_label_weight(config),
      label_smoothing=config.loss.label_smoothing,
      teachers=config_lib.teachers(config),
      class_weights=config_lib.class_weights(
        config, dataset.class_names, dataset.train.labels, config.model.num_classes or len(dataset.class_names)
      ),
      match_scale=config.loss.match_scale,
      match_centered=config.loss.match_centered,
      teacher='teacher' if config.loss.teacher == 'run' else config.loss.teacher,
      sample_weight=config.loss.sample_weight,
      leaving=config.loss.leaving,
    ),
    preprocessing=Preprocessing(
      dataset.mean,
      dataset.std,
      dataset.crop_padding,
      dataset.flip,
      config.train.cutout,
      config.train.mixup,
      config.train.cutmix,
      config.train.alternate_flip and dataset.flip,
      config.train.auto_augment,
      config.train.rand_augment_operations,
      config.train.rand_augment_magnitude,
    ),
    optimizer=_optimizer(config, schedule, model, targets),
    schedule=schedule,
    steps_per_epoch=steps,
    total_steps=config_lib.total_steps(config, steps),
  )
  new_last = ", model.last 'new'" if config.model.get('last') == 'new' else ''
  if config.loss.match_mirrored and not (task.frozen and targets[-1] == GIVEN and dataset.flip):
    raise UserError(
      f"loss.match_mirrored needs train.regime 'exits', a last exit that came trained and mirrored images, found "
      f'{config.train.regime!r}{new_last} and data.flip {dataset.flip}; set --config.loss.match_mirrored=False, or '
      '--config.data.flip=True'
    )
  if config.loss.match_features and not (task.frozen and targets[-1] == GIVEN and config.model.get('head') == 'blocks'):
    raise UserError(
      "loss.match_features needs train.regime 'exits', a last exit that came trained and exits of copied blocks, found "
      f'{config.train.regime!r}{new_last} and model.head {config.model.get("head")!r}; set '
      '--config.loss.match_features=0'
    )
  if _is_new(learned):  # A run that has begun ignores them, as before.
    _check_shift(task)
    _check_labels_beside(task)
    _check_losses_with_labels(task)
    _check_mirrored(task)
    _check_together(task)
  if task.preprocessing.alternate_flip and dataset.train.streamed:
    raise UserError(
      'train.alternate_flip needs training images in memory, found streamed ones; set --config.data.streaming=False, '
      'or --config.train.alternate_flip=False'
    )
  if config.train.alternate_flip and not dataset.flip and _is_new(learned):
    raise UserError(
      'train.alternate_flip needs mirrored images, found data.flip False; set --config.data.flip=True, or '
      '--config.train.alternate_flip=False'
    )
  for phase in task.phases:
    _check_phase(task, phase)
  return task


_same_schedule = functools.lru_cache(maxsize=32)(make_schedule)
"""`make_schedule`, which compiles the learning rate of a log line once for runs that have the same."""


def _schedule(config: ConfigDict, steps: int) -> Schedule:
  train = config.train
  return _same_schedule(
    train.schedule,
    train.learning_rate,
    epochs=train.epochs,
    updates_per_epoch=steps / train.accumulate_steps,
    drop_epochs=tuple(config_lib.drop_epochs(config)),
    drop_factor=train.drop_factor,
    warmup_epochs=train.warmup_epochs,
  )


def _optimizer(config: ConfigDict, schedule: Schedule, model: Any, targets: Targets) -> optax.GradientTransformation:
  train = config.train
  reached = set(parameter_sizes(model, config_lib.image_shape(config), *trained_exits(targets)))
  return make_optimizer(
    train.optimizer,
    schedule,
    momentum=train.momentum,
    nesterov=train.nesterov,
    weight_decay=train.weight_decay,
    decay_mask=lambda params: decay_mask(params, reached, train.decay),
    decoupled_decay=train.decoupled_decay,
    norm_bias_factor=train.norm_bias_factor,
    clip_norm=train.clip_norm,
    accumulate_steps=train.accumulate_steps,
  )


def _is_new(learned: Learned | None) -> bool:
  return learned is None or learned.brought


def _check_lengths(task: Task) -> None:
  """Raises UserError if a run would end before its first update or its second phase."""
  train, steps = task.config.train, config_lib.all_steps(task.config, task.steps_per_epoch)
  if train.accumulate_steps > steps:
    raise UserError(
      f'train.accumulate_steps must be at most the {steps} steps of the run, found {train.accumulate_steps}, so that '
      'no weight would change; set --config.train.accumulate_steps or --config.train.epochs'
    )
  if len(task.phases) > 1 and task.phases[0].end >= steps:
    joint = train.regime == 'joint'
    name = 'loss.match_from_epoch' if joint else 'train.backbone_epochs'
    epochs = task.config.loss.match_from_epoch if joint else config_lib.backbone_epochs(task.config)
    raise UserError(
      f'{name} {epochs:g} leaves none of the {steps} steps of the run to what begins then; set --config.{name} or '
      '--config.train.epochs'
    )


def _check_shift(task: Task) -> None:
  """Raises UserError if `train.feature_shift` would move nothing."""
  shift, regime = task.config.train.feature_shift, task.config.train.regime
  if not shift:
    return
  found = f'train.regime {regime!r}' if not task.frozen else 'images that are cropped, covered, blended or distorted'
  if task.keeps_features:
    sides = sides_of(task.model, task.config)
    if any(places_shifted(shift, side) for side in sides):
      return
    found = f'{max(sides)}' if sides else 'tokens'
  raise UserError(
    f"train.feature_shift {shift:g} needs train.regime 'exits', images that are at most mirrored, and features of "
    f'{math.ceil(1 / shift)} places or more along a side, found {found}; set --config.train.feature_shift=0'
  )


def _check_labels_beside(task: Task) -> None:
  """Raises UserError if `loss.hard_label_weight` would weigh nothing, as no exit learns from exits by distillation."""
  loss, matches = task.config.loss, matches_exits(task.targets)
  if not loss.hard_label_weight or task.objective.teachers or (matches and loss.matching == 'kl'):
    return
  if matches:
    raise UserError(
      f'loss.hard_label_weight {loss.hard_label_weight:g} is the share of labels beside distillation, and '
      f"{task.config.name} matches logits with loss.matching 'squared_error'; set --config.loss.matching=kl, or "
      '--config.loss.hard_label_weight=0'
    )
  raise UserError(
    f'loss.hard_label_weight {loss.hard_label_weight:g} is the share of labels beside distillation, and no exit of '
    f'{task.config.name} learns from exits; set --config.loss.distill, or --config.loss.hard_label_weight=0'
  )


def _check_losses_with_labels(task: Task) -> None:
  """Raises UserError if what changes losses with labels would change nothing, as no exit learns from labels."""
  config = task.config
  on = [name for name, off in _OF_LABELS.items() if config.loss[name] != off]
  beside = matches_exits(task.targets) and config_lib.hard_label_weight(config, target=1)
  if on and not beside and not config_lib.learning_from_labels(config):
    raise UserError(
      f'loss.{on[0]} is about losses with labels, and no exit of {config.name} learns from labels; set '
      f'--config.loss.{on[0]}={_OF_LABELS[on[0]]}, or --config.'
      + ('train.exit_targets' if task.frozen else 'loss.hard_label_weight')
    )


def _check_mirrored(task: Task) -> None:
  """Raises UserError if `loss.match_mirrored` would change nothing, as exits match neither logits nor features."""
  loss, matches = task.config.loss, matches_exits(task.targets)
  if loss.match_mirrored and not (matches or task.objective.teachers or loss.match_features):
    raise UserError(
      'loss.match_mirrored is about exits that match the last one, and those of '
      f'{task.config.name} learn from labels alone; set --config.loss.match_mirrored=False, or '
      '--config.train.exit_targets'
    )


def _check_together(task: Task) -> None:
  """Raises UserError if what balances the exits' gradients would change nothing: no two train a parameter at once."""
  on = [name for name in _TOGETHER if task.config.loss[name]]
  if not on:
    return
  for phase in () if task.frozen else task.phases:
    frozen = variable_paths(task.model, task.image_shape, phase.frozen) if phase.frozen else ()
    users: Any = flatten_dict(_users(task, phase))
    if any(number > 1 for path, number in users.items() if ('params', *path) not in frozen):
      return
  raise UserError(
    f'loss.{on[0]} is about parameters that exits train together, and {task.config.name} has none with '
    f'train.regime {task.config.train.regime!r}; set --config.loss.{on[0]}={_TOGETHER[on[0]]}'
  )


def sides_of(model: Any, config: ConfigDict) -> list[int]:
  """Places along the side of each feature map that exits on a frozen backbone read; tokens have none."""
  shape = config_lib.image_shape(config)
  learning = [number for number, target in enumerate(config_lib.targets(config), 1) if target not in (None, GIVEN)]
  features = feature_shapes(model, abstract_variables(model, shape), shape, learning, config.train.features, 1)
  return [leaf.shape[1] for leaf in jax.tree.leaves(features) if leaf.ndim == 4]


def _check_phase(task: Task, phase: Phase) -> None:
  if phase.frozen is None:
    return
  frozen = variable_paths(task.model, task.image_shape, phase.frozen)
  for number in trained_exits(phase.targets):
    if variable_paths(task.model, task.image_shape, number) <= frozen:
      raise UserError(
        f'train.regime {task.config.train.regime!r} would train nothing of exit {number} of {task.config.name}: '
        f'exit {phase.frozen} uses the same parameters; set --config.train.regime'
      )


def _users(task: Task, phase: Phase) -> Any:
  """How many of the phase's exits train each parameter, as a tree."""
  model = trained_by_its_exits(task.model)
  used = Counter(
    path for number in trained_exits(phase.targets) for path in parameter_sizes(model, task.image_shape, number)
  )
  params = abstract_variables(task.model, task.image_shape)['params']
  return jax.tree_util.tree_map_with_path(lambda path, _: used[tuple(key.key for key in path)], params)
