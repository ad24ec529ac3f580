"""Where a network can have exits: every place with its shape and cost, and a suggestion of three."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from paranet_jax.costs import abstract_variables, exit_costs
from paranet_jax.display.tables import align, human_count
from paranet_jax.models.adopted.architecture import Architecture
from paranet_jax.models.adopted.network import AdoptedNetwork

SHARES = (0.25, 0.45, 0.7)
"""Shares of the multiply-adds near which exits are suggested."""


class Place(NamedTuple):
  """A place of an exit.

  Attributes:
    shape: of the features there, (H, W, C) or (tokens, C).
    macs: multiply-adds up to it, with the architecture's own kind of head.
    share: of those of the whole network.
  """

  name: str
  shape: tuple[int, ...]
  macs: int
  share: float


def find_places(architecture: Architecture, num_classes: int) -> list[Place]:
  """Every place of an exit before the last one, in order."""
  names, side = architecture.places[:-1], architecture.preprocessing.side
  model = AdoptedNetwork(num_classes, side, arch=architecture.name, exits=names)

  def features(variables, image):
    carry: Any = {}
    found = []
    for number in range(1, model.num_exits):
      _, carry = model.apply(variables, image, carry, number, method='stage')
      found.append(carry[number])
    return found

  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  shapes = jax.eval_shape(features, abstract_variables(model, (side, side, 3)), image)
  costs = exit_costs(model, (side, side, 3))
  whole = costs[-1]['macs_alone']
  return [
    Place(name, leaf.shape[1:], cost['macs_alone'], cost['macs_alone'] / whole)
    for name, leaf, cost in zip(names, shapes, costs, strict=False)
  ]


def suggested(places: Sequence[Place]) -> tuple[str, ...]:
  """The places nearest to SHARES, in order."""
  nearest = {min(places, key=lambda place: abs(place.share - share)).name for share in SHARES}
  return tuple(place.name for place in places if place.name in nearest)


def places_text(architecture: Architecture, places: Sequence[Place]) -> str:
  """The table that `describe` prints."""
  chosen = suggested(places)
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
      f'--exits={",".join(chosen)}',
    ]
  )


def _listed(values: Sequence[float]) -> str:
  return ' '.join(f'{value:g}' for value in values)
