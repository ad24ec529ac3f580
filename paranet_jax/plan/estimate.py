"""From what a step needs and what a chip has: its time, and the largest batch that fits."""

from typing import NamedTuple

from paranet_jax.plan.chips import Chip
from paranet_jax.plan.step import StepFacts


class Estimate(NamedTuple):
  """Seconds of a step: a roofline's bound, what it is made of, and what the compiler's cycles say (None: nothing)."""

  arithmetic: float
  memory: float
  collectives: float
  compiler: float | None

  @property
  def step(self) -> float:
    """At best: arithmetic and main memory at the same time, each at its peak, and the collectives by themselves."""
    return max(self.arithmetic, self.memory) + self.collectives


def estimate(facts: StepFacts, chip: Chip, count: int) -> Estimate:
  """The time of a step on `count` chips.

  An all-reduce in a ring sends 2 (n - 1) / n of its bytes from each chip.
  """
  sent = 2 * (count - 1) / count * facts.collectives.size
  return Estimate(
    arithmetic=facts.flops / chip.flops,
    memory=facts.traffic / chip.bandwidth,
    collectives=sent / chip.links if chip.links else 0.0,
    compiler=facts.cycles / chip.clock if facts.cycles and chip.clock else None,
  )


def second_batch(first: StepFacts, chip: Chip, count: int, most: int) -> int:
  """The batch to compile besides the first one: half of what would fit if all its temporary memory were the images'.

  Args:
    count: devices, which share a batch evenly.
    most: images there are.
  """
  free = chip.memory - first.arguments - first.code
  guess = free / max(first.temporary, 1) * first.batch_size / 2
  batch = int(min(guess, most)) // count * count
  if batch > first.batch_size:
    return batch
  smaller = first.batch_size // 2 // count * count
  return smaller or 2 * first.batch_size


def largest_batch(one: StepFacts, other: StepFacts, chip: Chip, count: int, most: int) -> int:
  """The largest batch that `count` devices share and that fits, if memory grows linearly in it as between these two.

  At most `most` images, at least 0.
  """
  if one.batch_size == other.batch_size:  # No larger one was found to fit.
    return one.batch_size
  slope = (other.memory - one.memory) / (other.batch_size - one.batch_size)
  if slope <= 0:
    return most // count * count
  batch = one.batch_size + (chip.memory - one.memory) / slope
  return max(int(min(batch, most)) // count * count, 0)
