"""Reads the text of a compiled program: its computations, their instructions, and how often each one runs."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_SHAPE = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.-]+) = ')
_NAME = re.compile(r'%([\w.-]+)')
_TILE = re.compile(r'T\(([\d,]+)\)')
_BITS = re.compile(r'\d+')


class Array(NamedTuple):
  """An array of a program.

  Attributes:
    size: bytes of its elements.
    stored: bytes that it takes in memory, where a TPU pads it to whole tiles.
    on_chip: it lies in memory of the core itself, not in the device's main memory.
  """

  size: int
  stored: int
  on_chip: bool


class Instruction(NamedTuple):
  """One instruction: what it gives (the leaves of a tuple), what it takes, by name, and the text of its attributes."""

  name: str
  opcode: str
  results: tuple[Array, ...]
  operands: tuple[str, ...]
  attributes: str
  literal: str
  is_root: bool

  def called(self, attribute: str) -> str:
    """The name of the computation that an attribute such as `calls` or `body` names."""
    return re.search(rf'\b{attribute}=%?([\w.-]+)', self.attributes)[1]


class Program(NamedTuple):
  """Computations by name, each a dict of instructions by name, and the name of the one that runs."""

  computations: dict[str, dict[str, Instruction]]
  entry: str

  def executed(self, name: str | None = None, times: int = 1) -> Iterator[tuple[dict, Instruction, int]]:
    """Every instruction that runs by itself, in which computation, and how often: loops are followed into."""
    computation = self.computations[name or self.entry]
    for instruction in computation.values():
      if instruction.opcode == 'while':
        yield from self.executed(instruction.called('body'), times * self._trips(instruction))
      elif instruction.opcode == 'call':
        yield from self.executed(instruction.called('to_apply'), times)
      elif instruction.opcode == 'conditional':
        for branch in re.findall(
          r'%([\w.-]+)', instruction.attributes.partition('computations={')[2].partition('}')[0]
        ):
          yield from self.executed(branch, times)
      else:
        yield computation, instruction, times

  def _trips(self, loop: Instruction) -> int:
    """How often a loop runs: as the compiler says, or as its condition compares a counter from 0 with a constant."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
      return int(known[1])
    bounds = [i.literal for i in self.computations[loop.called('condition')].values() if i.opcode == 'constant']
    return int(bounds[0]) if len(bounds) == 1 and bounds[0].isdecimal() else 1


def parse(text: str) -> Program:
  """Reads what `compiled.as_text()` gives."""
  computations, entry, current = {}, '', {}
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      current = computations[header[2]] = {}
      entry = header[2] if header[1] else entry
      continue
    found = _INSTRUCTION.match(line)
    if found:
      instruction = _instruction(found[2], bool(found[1]), line[found.end() :])
      current[instruction.name] = instruction
  return Program(computations, entry)


def _instruction(name: str, is_root: bool, text: str) -> Instruction:
  end = _closing(text, 0) + 1 if text.startswith('(') else text.index(' ')
  shape, rest = text[:end], text[end:].lstrip()
  opening = rest.index('(')
  closing = _closing(rest, opening)
  inner = rest[opening + 1 : closing]
  return Instruction(
    name=name,
    opcode=rest[:opening],
    results=tuple(map(_array, _SHAPE.finditer(shape))),
    operands=tuple(_NAME.findall(inner)),
    attributes=rest[closing + 1 :],
    literal=inner,
    is_root=is_root,
  )


def _closing(text: str, opening: int) -> int:
  """The place of the parenthesis that closes the one at `opening`."""
  depth = 0
  for match in re.compile(r'[()]').finditer(text, opening):
    depth += 1 if match[0] == '(' else -1
    if depth == 0:
      return match.start()
  raise ValueError(f'no closing parenthesis in {text[opening : opening + 60]!r}')


def _array(match: re.Match) -> Array:
  dtype, dims, layout = match[1], [int(n) for n in match[2].split(',') if n], match[3] or ''
  item = _item_bytes(dtype)
  order, _, tiling = layout.partition(':')
  tile = _TILE.search(tiling)
  # Major to minor, as the array lies in memory; a tile covers its last dimensions.
  physical = [dims[int(n)] for n in reversed(order.split(','))] if order and dims else list(dims)
  for place, unit in enumerate(reversed(tile[1].split(',') if tile else ()), start=1):
    if place <= len(physical):
      physical[-place] = -(-physical[-place] // int(unit)) * int(unit)
  return Array(int(item * math.prod(dims)), int(item * math.prod(physical)), 'S(' in tiling and 'S(5)' not in tiling)


def _item_bytes(dtype: str) -> float:
  """Bytes of an element: a bool takes one; tokens and the like none."""
  bits = _BITS.search(dtype)
  return 1 if dtype == 'pred' else int(bits[0]) / 8 if bits else 0
