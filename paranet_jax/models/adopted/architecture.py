"""What the toolkit needs to know about an architecture (see the package's docstring for how to add one)."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Mode(NamedTuple):
  """How modules run.

  Attributes:
    train: whether to normalize by the batch's statistics and update the running ones.
    axis_name: device axis over which batch statistics are shared in training.
  """

  train: bool = False
  axis_name: str | None = None


Stage = Callable[[Any, Mode], Any]
"""Maps features [B, H, W, C], or tokens [B, N, C], to the next ones; it creates its modules inside the network."""


class Parts(NamedTuple):
  """A network in pieces.

  Attributes:
    stages: the place after each, and what computes it, in order; the first reads the images.
    classifier: maps the last stage's features to logits: all that is left, such as a last norm, pooling and `fc`.
  """

  stages: tuple[tuple[str, Stage], ...]
  classifier: Stage


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """How the images of the trained weights were prepared.

  Attributes:
    side: of the network's input, in pixels.
    resize: the short side to which images are scaled before the center crop of `side`, in pixels; None: `side`.
    interpolation: 'bilinear' or 'bicubic', with antialiasing.
    mean: one per channel, for pixel values in 0..1.
    deviation: the standard deviations.
  """

  side: int = 224
  resize: int | None = 256
  interpolation: str = 'bilinear'
  mean: tuple[float, ...] = IMAGENET_MEAN
  deviation: tuple[float, ...] = IMAGENET_DEVIATION


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A network that PyTorch users have trained.

  Attributes:
    name: torchvision's or timm's.
    build: function from the number of classes to the network's parts.
    preprocessing: of its usual trained weights.
    num_classes: of its usual trained weights.
    class_names: whose classes these are: 'imagenet', 'cifar10', or None.
    head: the kind of head that its exits have by default (see `heads.py`).
    adopt_head: the kind that the command `adopt` gives them by default; None: `head`.
    adopt_copies: blocks of each shape that a head 'blocks' then has; None: as few as possible.
    patch: pixels of which the side of images is a multiple.
    least_side: of images, in pixels; smaller ones would leave no pixel at the end.
    renames: regular expressions and replacements, each applied to the names of a file's tensors, in order.
  """

  name: str
  build: Callable[[int], Parts]
  preprocessing: Preprocessing = Preprocessing()
  num_classes: int = 1000
  class_names: str | None = 'imagenet'
  head: str = 'conv'
  adopt_head: str | None = None
  adopt_copies: int | None = None
  patch: int = 1
  least_side: int = 1
  renames: tuple[tuple[str, str], ...] = ()

  @property
  def places(self) -> tuple[str, ...]:
    """Every place that an exit may have before the network's own classifier, in order."""
    return tuple(place for place, _ in self.build(self.num_classes).stages)

  def position(self, place: str) -> int:
    """The number, from 1, of the stage that a place follows: its own, or the last within it.

    Raises:
      ValueError: there is none; the message is one line and lists those that there are.
    """
    places = self.places
    found = [number for number, own in enumerate(places, 1) if f'{own}.'.startswith(f'{place}.')]
    if not found:
      raise ValueError(f'expected a place of {self.name} ({shown(places)}), found {place!r}')
    return found[-1]


def shown(places: tuple[str, ...]) -> str:
  """A list of places, in short."""
  return ', '.join(places if len(places) <= 12 else (*places[:6], '...', *places[-5:]))
