"""What a policy is: a way to choose the thresholds of the exits on held-out images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from paranet_jax.early.thresholds import Samples
from paranet_jax.portable.run import SCORES

if TYPE_CHECKING:
  from jaxtyping import Float

RANKING = tuple(score for score in SCORES if score != 'patience')
"""The scores that rank images on a continuous scale."""


class Choice(NamedTuple):
  """What a policy chose.

  Attributes:
    thresholds: on the confidence scale; +inf: no sample exits there; the last is -inf.
    problem: why the target cannot be met, in which case no threshold lets a sample exit early.
    facts: what exits.json keeps besides in the target.
  """

  thresholds: Float[np.ndarray, ' K']
  problem: str | None = None
  facts: Mapping[str, Any] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Flag:
  """A flag of `python -m paranet_jax.calibrate` that only some policies read.

  Attributes:
    name: without the dashes.
    key: of its value in the target.
    parse: reads the text; raises a ValueError that says what the value must be.
    default: None: without the flag, the target lacks the key.
  """

  name: str
  key: str
  parse: Callable[[str], Any]
  default: Any
  help: str


@dataclasses.dataclass(frozen=True)
class Policy:
  """A way to choose thresholds.

  Attributes:
    name: as `--policy` and exits.json spell it.
    description: what it chooses, for the report: 'thresholds from quotas'.
    scores: the scores that it works with, for each kind of target that it accepts: 'budget', 'risk' or 'threshold'.
    choose: from the held-out images and the target to thresholds. The target is that of exits.json: one of
      {'budget': 3e7, 'unit': 'macs'}, {'risk': 0.02} and {'threshold': 0.9}, and the values of `flags` by key.
    flags: that it reads in addition to its target.
  """

  name: str
  description: str
  scores: Mapping[str, tuple[str, ...]]
  choose: Callable[[Samples, Mapping[str, Any]], Choice]
  flags: tuple[Flag, ...] = ()
