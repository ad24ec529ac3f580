"""Configuration fields: default values and rules for valid values."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


class Rule(NamedTuple):
  """A condition on a value, and the text that follows 'must be' in an error message."""

  holds: Callable[[Any], bool]
  expected: str


class Field(NamedTuple):
  """Default and rule of one field.

  Attributes:
    default: None for a value derived from other fields unless the user sets it.
    rule: condition on a value other than None.
    kind: type of a field whose default is None.
  """

  default: Any
  rule: Rule | None = None
  kind: type | None = None


Fields = dict[str, Field]
"""Fields by name; a field of a section is named `section.field`."""


def derived(kind: type, rule: Rule | None = None) -> Field:
  """A field derived from other fields unless the user sets it."""
  return Field(None, rule, kind)


def new_config(fields: Fields) -> ConfigDict:
  """A configuration with the defaults of these fields, not locked."""
  config = ConfigDict()
  for path, field in fields.items():
    section, _, name = path.rpartition('.')
    if section and section not in config:
      config[section] = ConfigDict()
    # A placeholder belongs to one configuration, so each gets its own.
    (config[section] if section else config)[name] = field.default if field.kind is None else placeholder(field.kind)
  return config


def one_of(*choices: Any) -> Rule:
  """One of these values."""
  return Rule(lambda value: value in choices, 'one of ' + ', '.join(map(str, choices)))


def at_least(low: float, high: float = 10**9) -> Rule:
  """A number from `low` to `high`, beyond which nothing could be computed."""
  return Rule(lambda value: low <= value <= high, f'from {low} to {high:,}')


def tuple_of(kind: type | tuple[type, ...], low: float, high: float = 10**6) -> Rule:
  """At most 1,000 numbers of a type, each from `low` to `high`."""

  def holds(values):
    numbers = all(isinstance(v, kind) and not isinstance(v, bool) and low <= v <= high for v in values)
    return numbers and len(values) <= 1000

  return Rule(holds, f'at most 1,000 numbers from {low} to {high:,}, such as "(1,2,3)"')


def numbers(text: str) -> tuple[float, ...]:
  """Numbers separated by commas, as in `1,2.5` or `(1,2.5)`; () if the text is something else."""
  try:
    return tuple(map(float, text.strip().removeprefix('(').removesuffix(')').rstrip(',').split(',')))
  except ValueError:
    return ()


POSITIVE = Rule(lambda value: 0 < value <= 10**6, 'more than 0 and at most 1,000,000')
FRACTION = Rule(lambda value: 0 < value <= 1, 'more than 0 and at most 1')
SHARE = Rule(lambda value: 0 <= value <= 1, 'from 0 to 1')
RATE = Rule(lambda value: 0 <= value < 1, 'from 0 to less than 1')
