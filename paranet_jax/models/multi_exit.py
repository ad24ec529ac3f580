"""The interface of every multi-exit model, and two base classes that implement it.

A model has `num_exits` and two ways to run, which give the same logits:
`model.apply(variables, images, exits=...)`: logits of the requested exits, computing only what they need;
`model.apply(variables, images, carry, number, method='stage')`: logits of exit `number` and the features that later
exits need, so that stopping early skips the rest.
A model that draws random numbers in training lists the keys it needs as `rng_names`; they are the same on every device.

Every network that a configuration can name has these attributes:
  num_classes: width of every exit.
  image_side: S, in pixels.
  channels: channels of the images.
  dtype: dtype of the computation; parameters, statistics and logits are float32.
  axis_name: device axis over which batch statistics are shared in training.

A network is a `Chain` if its exits lie along one chain of layers, and a `Graph` if they share features in another way.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

Images = Float[Array, 'B H W C']
Logits = Float[Array, 'B classes']
Carry = dict[Any, Any]
"""Features that later exits need, by position in the network; {} before the first exit and after the last."""


class MultiExit(nn.Module):
  """Base of all models. A subclass defines `num_exits`, `_evaluate` and, to carry fewer features, `_carried`."""

  exits_apart = False
  """Whether it is a `Chain` whose exits, also in training, read what the backbone computes in inference: then they can
  learn on a frozen backbone."""

  @property
  def num_exits(self) -> int:
    """Number of exits."""
    raise NotImplementedError

  def __call__(self, images: Images, train: bool = False, exits: Iterable[int] | None = None) -> list[Logits | None]:
    """Logits of the requested exits.

    Args:
      images: normalized images.
      train: whether to use batch statistics and update the running ones.
      exits: 1-based; None: all.

    Returns:
      One float32 array per exit; None for exits not requested.
    """
    numbers = range(1, self.num_exits + 1)
    logits, _ = self._evaluate(images, {}, numbers if exits is None else tuple(exits), train)
    return [logits.get(number) for number in numbers]

  def stage(self, images: Images, carry: Carry, number: int, train: bool = False) -> tuple[Logits, Carry]:
    """Computes what exit `number` still needs.

    Args:
      images: normalized images, the same at every stage.
      carry: {} at first, then what the previous stage returned. Stages may be skipped but not repeated, except that a
        `Chain` computes exit n, and nothing else, from the carry {n: features}.
      number: 1-based exit.
      train: as in `__call__`.

    Returns:
      float32 logits, and the features that later exits need; {} after the last exit.
    """
    logits, features = self._evaluate(images, carry, (number,), train)
    return logits[number], self._carried(features, number) if number < self.num_exits else {}

  @nn.nowrap
  def handed_on(self, x: Any) -> Any:
    """What later layers read of the features that an exit reads (see `own_channels.py`)."""
    return x

  def _evaluate(
    self, images: Images, carry: Carry, exits: Iterable[int], train: bool
  ) -> tuple[Mapping[int, Logits], Carry]:
    """Logits of these exits by number, and all features known by then, including those in `carry`."""
    raise NotImplementedError

  def _carried(self, features: Carry, number: int) -> Carry:
    """The subset of the features known after exit `number` that later exits need."""
    return features


class Chain(MultiExit):
  """Base of a network that is one chain of layers with exits along it. It carries the features of the last exit run."""

  dtype = jnp.float32  # A field in subclasses.

  @property
  def exit_positions(self) -> tuple[int, ...]:
    """Position in the chain, from 1, of the layer that each exit follows; the last exit is at the end."""
    raise NotImplementedError

  def segment(self, x: Any, start: int, end: int, train: bool) -> Any:
    """Features after position `end` from those after position `start`; position 0 is the images in `dtype`."""
    raise NotImplementedError

  def exit_logits(self, x: Any, number: int, train: bool) -> Logits:
    """Float32 logits of exit `number` from the features at its position, or from `exit_features` of them."""
    raise NotImplementedError

  @nn.nowrap
  def exit_features(self, x: Any, number: int) -> Any:
    """What the parameters of exit `number` read of the features at its position: less, if it pools them first."""
    return x

  @property
  def num_exits(self) -> int:
    """Exits along the chain, including the one at its end."""
    return len(self.exit_positions)

  @nn.compact
  def _evaluate(self, images, carry, exits, train):
    exits = tuple(exits)
    positions = (0, *self.exit_positions)
    done, x = next(iter(carry.items()), (0, images.astype(self.dtype)))
    logits = {}
    for number in range(max(done, 1), max(exits, default=0) + 1):
      if number > done:
        x = self.segment(x, positions[number - 1], positions[number], train)
      if number in exits:
        logits[number] = self.exit_logits(x, number, train)
        x = self.handed_on(x)
    return logits, {max(exits, default=done): x}


Node = tuple[int, int]
"""A feature map in a graph. Nodes sort after the nodes that they read."""


class Geometry(Protocol):
  """The edges of a graph: plain arithmetic, no arrays."""

  def reads(self, node: Node) -> Iterable[Node]:
    """The nodes that a node reads."""
    ...

  def exit_node(self, number: int) -> Node:
    """The node that exit `number` (1-based) reads."""
    ...


class Graph(MultiExit):
  """Base of a network whose features form a graph.

  An exit computes only the nodes that it needs, and a stage carries the nodes that later exits still read.
  """

  @property
  def geometry(self) -> Geometry:
    """The graph."""
    raise NotImplementedError

  def node_features(self, node: Node, images: Images, features: Carry, train: bool) -> Any:
    """Features of a node, from the nodes that it reads or from the images."""
    raise NotImplementedError

  def exit_logits(self, x: Any, number: int, train: bool) -> Logits:
    """Float32 logits of exit `number` from the features of its node."""
    raise NotImplementedError

  @nn.compact
  def _evaluate(self, images, carry, exits, train):
    geometry, features = self.geometry, dict(carry)
    read, at_exits = dict(carry), set(map(geometry.exit_node, exits))
    for node in needed(at_exits, geometry.reads, features):
      features[node] = self.node_features(node, images, read, train)
      read[node] = self.handed_on(features[node]) if node in at_exits else features[node]
    return {n: self.exit_logits(features[geometry.exit_node(n)], n, train) for n in exits}, features

  def _carried(self, features, number):
    geometry = self.geometry
    later = [geometry.exit_node(other) for other in range(number + 1, self.num_exits + 1)]
    return {node: features[node] for node in kept(later, geometry.reads, features)}


def named_after(derived: type[MultiExit], base: type[MultiExit]) -> type[MultiExit]:
  """A class that is derived within a function, with the name of the class it is derived from behind its own."""
  derived.__name__ = derived.__qualname__ = f'{derived.__name__}{base.__name__}'
  return derived


def field_values(model: MultiExit) -> dict[str, Any]:
  """The values of a model's own fields, by name, to make a model of a derived class from."""
  own = (field.name for field in dataclasses.fields(model) if field.init)
  return {name: getattr(model, name) for name in own if name not in ('parent', 'name')}


def needed(
  targets: Iterable[Node], reads: Callable[[Node], Iterable[Node]], known: Collection[Node] = ()
) -> list[Node]:
  """The nodes still to compute for these targets, each after the nodes that it reads."""
  missing, pending = set(), list(targets)
  while pending:
    node = pending.pop()
    if node not in missing and node not in known:
      missing.add(node)
      pending.extend(reads(node))
  return sorted(missing)


def kept(targets: Collection[Node], reads: Callable[[Node], Iterable[Node]], known: Collection[Node]) -> list[Node]:
  """The known nodes that are targets or that nodes still to compute for the targets read."""
  read = {source for node in needed(targets, reads, known) for source in reads(node)}
  return sorted(read.union(targets).intersection(known))


def check_halvings(image_side: int, times: int) -> None:
  """Raises ValueError unless `image_side` can be halved this many times."""
  if image_side < 1 or image_side % 2**times:
    raise ValueError(f'image_side must be a multiple of {2**times}, to be halved {times} times, found {image_side}')


def parse_exits(text: str) -> str | tuple[int, ...]:
  """The numbers in '6,12'; other text, such as 'last', unchanged."""
  return tuple(map(int, text.split(','))) if re.fullmatch(r'\d+(,\d+)*', text) else text


def exit_positions(exits: str | tuple[int, ...], each: str, groups: int, size: int) -> tuple[int, ...]:
  """Positions of the exits in a chain of equal groups.

  Args:
    exits: 'last': one exit at the end; the word `each`: one after each group; or ascending positions, from 1, that an
      exit follows in every group, in addition to the exit at the end.
    each: the word that means one exit after each group, such as 'blocks'.
    groups: number of groups.
    size: length of a group.

  Raises:
    ValueError: `exits` is none of these; the message is one line.
  """
  named: dict[Any, tuple[int, ...]] = {'last': (), each: (size,)}
  inner = named.get(exits, exits)
  if isinstance(inner, str) or list(inner) != sorted(set(inner) & set(range(1, size + 1))):
    raise ValueError(f"exits must be 'last', '{each}' or ascending numbers from 1 to {size}, found {exits!r}")
  positions = {group * size + place for group in range(groups) for place in inner}
  return tuple(sorted(positions | {groups * size}))
