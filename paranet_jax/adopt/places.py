"""Where a network can have exits: every place with its shape and cost, and a suggestion of three."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from paranet_jax.costs import abstract_variables, exit_costs
from paranet_jax.display.tables import align, human_count
from paranet_jax.host.errors import UserError
from paranet_jax.models.adopted.architecture import Architecture
from paranet_jax.models.adopted.network import AdoptedNetwork

SHARES: dict[str, tuple[float, ...]] = {'blocks': (0.32, 0.62, 0.81)}
OTHER_SHARES = (0.25, 0.45, 0.7)
"""Shares of the multiply-adds near which exits are suggested, by kind of head and for the other kinds.

Copied blocks make good exits early, but a path to the last exit pays for all of them: the first exit should be one at
which most images can leave."""


class Place(NamedTuple):
  """A place of an exit.

  Attributes:
    shape: of the features there, (H, W, C) or (tokens, C).
    macs: multiply-adds of an exit there.
    share: of those of the whole network.
  """

  name: str
  shape: tuple[int, ...]
  macs: int
  share: float


def find_places(architecture: Architecture, num_classes: int, head: str) -> list[Place]:
  """Every place of an exit before the last one, in order.

  Args:
    head: kind of the exits' heads.

  Raises:
    UserError: this kind cannot read the features.
  """
  names, side = architecture.places[:-1], architecture.preprocessing.side
  model = AdoptedNetwork(
    num_classes, side, arch=architecture.name, exits=names, head=head, copies=architecture.adopt_copies
  )

  def features(variables, image):
    carry: Any = {}
    found = []
    for number in range(1, model.num_exits):
      _, carry = model.apply(variables, image, carry, number, method='stage')
      found.append(carry[number])
    return found

  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  try:
    shapes = jax.eval_shape(features, abstract_variables(model, (side, side, 3)), image)
  except UserError as error:  # This command has a flag of its own.
    raise UserError(str(error).replace('--config.model.head', '--head')) from error
  costs = exit_costs(model, (side, side, 3))
  whole = costs[-1]['macs_alone']
  return [
    Place(name, leaf.shape[1:], cost['macs_alone'], cost['macs_alone'] / whole)
    for name, leaf, cost in zip(names, shapes, costs, strict=False)
  ]


def suggested(places: Sequence[Place], head: str) -> tuple[str, ...]:
  """The places nearest to the shares of this kind of head, in order."""
  shares = SHARES.get(head, OTHER_SHARES)
  nearest = {min(places, key=lambda place: abs(place.share - share)).name for share in shares}
  return tuple(place.name for place in places if place.name in nearest)


def default_head(architecture: Architecture) -> str:
  """The kind of head that exits have unless the command says otherwise."""
  return architecture.adopt_head or architecture.head


def describe(architecture: Architecture, head: str | None) -> str:
  """What `adopt describe` prints.

  Args:
    head: kind of the exits' heads; None: the default.
  """
  head = head or default_head(architecture)
  return places_text(architecture, find_places(architecture, architecture.num_classes, head), head)


def places_text(architecture: Architecture, places: Sequence[Place], head: str) -> str:
  """The table that `describe` prints."""
  chosen = suggested(places, head)
  prepared = architecture.preprocessing
  rows = [
    (
      place.name,
      ' x '.join(map(str, place.shape)),
      human_count(place.macs),
      f'{100 * place.share:.1f}',
      'suggested' if place.name in chosen else '',
    )
    for place in places
  ]
  whole = round(places[-1].macs / places[-1].share)
  scaled = f'short side {prepared.resize}, center crop {prepared.side}' if prepared.resize else f'side {prepared.side}'
  return '\n'.join(
    [
      f'{architecture.name}: {human_count(whole)} multiply-adds an image of {prepared.side} pixels',
      *align(('place', 'features', 'multiply-adds', 'share (%)', ''), rows, left=(0, 1, 4)),
      f'images: {scaled}, {prepared.interpolation}; mean {_listed(prepared.mean)}, deviation '
      f'{_listed(prepared.deviation)}',
      f'--exits={",".join(chosen)} --head={head}',
    ]
  )


def _listed(values: Sequence[float]) -> str:
  return ' '.join(f'{value:g}' for value in values)
