"""Which layers and scales an MSDNet has, and what each reads: plain arithmetic, no arrays.

A node is (layer, scale): scale 1 is the finest, layer 0 makes every scale from the image, and layers are counted from 1
after it. The features of a node are all of its scale so far, those of the layers before it included.
"""

import dataclasses
import itertools

Node = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Geometry:
  """The graph of an MSDNet (Huang et al. 2018, sections 4 and 5).

  Attributes:
    image_side: S, pixels.
    num_scales: each of half the side of the one before.
    block_layers: layers of each block; an exit follows each block.

  Raises:
    ValueError: the shapes do not fit, in one line.
  """

  image_side: int
  num_scales: int
  block_layers: tuple[int, ...]

  def __post_init__(self):
    if not self.block_layers or min(self.block_layers) < 1:
      raise ValueError(f'an MSDNet needs 1 or more blocks of 1 or more layers, found blocks of {self.block_layers}')
    halvings = self.num_scales - 1
    if self.image_side < 2**halvings or self.image_side % 2**halvings:
      raise ValueError(
        f'image_side {self.image_side} cannot be halved {halvings} times, as {self.num_scales} scales need'
      )

  @property
  def exit_layers(self) -> tuple[int, ...]:
    """The layer that each exit follows."""
    return tuple(itertools.accumulate(self.block_layers))

  def finest(self, layer: int) -> int:
    """The finest scale that a layer still has: one fewer after each S-th of the layers (network reduction)."""
    layers_per_scale = -(-sum(self.block_layers) // self.num_scales)
    return 1 + max(layer - 1, 0) // layers_per_scale

  def drops(self, layer: int) -> bool:
    """Whether a layer is the first without the finest scale of the layer before; a transition follows it."""
    return self.finest(layer) > self.finest(layer - 1)

  def reads(self, node: Node) -> tuple[Node, ...]:
    """The nodes that a node reads: its own scale's first, if any, then the finer one's, if there is one."""
    layer, scale = node
    if layer == 0:
      return ((0, scale - 1),) if scale > 1 else ()
    finer = ((layer - 1, scale - 1),) if scale > self.finest(layer - 1) else ()
    return ((layer - 1, scale), *finer)

  def exit_node(self, number: int) -> Node:
    """The node that exit `number` (1-based) reads: the coarsest scale after its block."""
    return (self.exit_layers[number - 1], self.num_scales)


def block_layers(num_blocks: int, step_mode: str, step: int, base: int) -> tuple[int, ...]:
  """Layers of each block: `base`, then `step` ('even'), or `step` i + 1 in block i + 1 ('lin_grow').

  Raises:
    ValueError: another `step_mode`.
  """
  if step_mode not in ('even', 'lin_grow'):
    raise ValueError(f"step_mode {step_mode!r} must be 'even' or 'lin_grow'")
  later = [step if step_mode == 'even' else step * i + 1 for i in range(1, num_blocks)]
  return (base, *later)[:num_blocks]
