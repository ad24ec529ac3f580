"""Reads the text of a compiled program: its instructions, how often each one runs, and the bytes that they move."""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_SHAPE = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.-]+) = ')
_NAME = re.compile(r'%([\w.-]+)')
_TILE = re.compile(r'T\(([\d,]+)\)')
_BITS = re.compile(r'\d+')
_COLLECTIVES = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  'collective-broadcast',
)
_NO_WORK = ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id', 'replica-id')
_PARTIAL_READS = ('dynamic-slice', 'slice', 'gather')


class Array(NamedTuple):
  """An array of a program.

  Attributes:
    size: bytes of its elements.
    stored: bytes that it occupies in memory; a TPU pads it to whole tiles.
    on_chip: whether it lies in the core's own memory rather than in the device's main memory.
  """

  size: int
  stored: int
  on_chip: bool


class Instruction(NamedTuple):
  """One instruction: its results (the leaves of a tuple), the names of its operands, and the text of its attributes."""

  name: str
  opcode: str
  results: tuple[Array, ...]
  operands: tuple[str, ...]
  attributes: str
  literal: str
  is_root: bool

  def called(self, attribute: str) -> str:
    """The computation that an attribute such as `calls` or `body` names."""
    return re.findall(rf'\b{attribute}=%?([\w.-]+)', self.attributes)[0]


class Program(NamedTuple):
  """Computations by name, each a dict of instructions by name, and the name of the entry computation."""

  computations: dict[str, dict[str, Instruction]]
  entry: str

  def executed(self, name: str | None = None, times: int = 1) -> Iterator[tuple[dict, Instruction, int]]:
    """Yields each instruction outside fusions with its computation and how often it runs, loops unrolled."""
    computation = self.computations[name or self.entry]
    for instruction in computation.values():
      if instruction.opcode == 'while':
        yield from self.executed(instruction.called('body'), times * self._trips(instruction))
      elif instruction.opcode == 'call':
        yield from self.executed(instruction.called('to_apply'), times)
      elif instruction.opcode == 'conditional':
        # They are named as branch_computations, or as true_computation and false_computation.
        for branch in filter(self.computations.__contains__, _NAME.findall(instruction.attributes)):
          yield from self.executed(branch, times)
      else:
        yield computation, instruction, times

  def _trips(self, loop: Instruction) -> int:
    """The trip count of a loop: the compiler's, or the one constant to which its condition compares a counter."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
      return int(known[1])
    bounds = [i.literal for i in self.computations[loop.called('condition')].values() if i.opcode == 'constant']
    return int(bounds[0]) if len(bounds) == 1 and bounds[0].isdecimal() else 1


def parse(text: str) -> Program:
  """Parses the text that `compiled.as_text()` returns."""
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
  """The index of the parenthesis that closes the one at `opening`."""
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
  # Major to minor, the order in memory; a tile covers the last dimensions.
  physical = [dims[int(n)] for n in reversed(order.split(','))] if order and dims else list(dims)
  for place, unit in enumerate(reversed(tile[1].split(',') if tile else ()), start=1):
    if place <= len(physical):
      physical[-place] = -(-physical[-place] // int(unit)) * int(unit)
  return Array(int(item * math.prod(dims)), int(item * math.prod(physical)), 'S(' in tiling and 'S(5)' not in tiling)


def _item_bytes(dtype: str) -> float:
  """Bytes of an element: 1 for a bool, 0 for tokens and the like."""
  bits = _BITS.search(dtype)
  return 1 if dtype == 'pred' else int(bits[0]) / 8 if bits else 0


class Collectives(NamedTuple):
  """How many collectives a run executes, and the bytes that they return on each device."""

  count: int  # pyright: ignore[reportIncompatibleMethodOverride]  # A JSON field; tuple.count is unused.
  size: int


def collectives(program: Program) -> Collectives:
  """The collectives that one run of the program executes, loops unrolled."""
  count = size = 0
  for _, instruction, times in program.executed():
    if instruction.opcode.removesuffix('-start') in _COLLECTIVES:
      count += times
      size += times * sum(array.size for array in instruction.results)
  return Collectives(count, size)


def memory_traffic(program: Program) -> int:
  """Bytes that one run reads from and writes to main memory.

  Each instruction reads its operands and writes its results; a fusion counts as one instruction. Slicing an array
  reads only the slice, and updating it in place writes only the update. Arrays on the chip are free. The caches of a
  CPU are ignored.
  """
  return sum(times * _moved(program, computation, one) for computation, one, times in program.executed())


def _moved(program: Program, computation: dict[str, Instruction], instruction: Instruction) -> int:
  opcode = instruction.opcode
  if opcode in _NO_WORK or opcode.endswith('-done') or 'custom_call_target="AllocateBuffer"' in instruction.attributes:
    return 0
  operands = [computation[name].results for name in instruction.operands if name in computation]
  if opcode.endswith('-start'):
    return _copied(opcode, instruction.results, operands)
  if opcode in _PARTIAL_READS:
    return 2 * _stored(instruction.results)
  if opcode == 'dynamic-update-slice':
    return 2 * _stored(operands[1])
  if opcode == 'fusion':
    return _fusion(program.computations[instruction.called('calls')], instruction.results, operands)
  return _stored(instruction.results) + sum(map(_stored, operands))


def _copied(opcode: str, results: tuple[Array, ...], operands: list[tuple[Array, ...]]) -> int:
  """An asynchronous copy, which returns (target, source, state), or another move: (source, target, ...)."""
  sources = [array for arrays in operands for array in arrays]
  target = results[0 if opcode == 'copy-start' else min(len(sources), len(results) - 1)]
  return target.stored * (any(not array.on_chip for array in sources) + (not target.on_chip))


def _fusion(body: dict[str, Instruction], results: tuple[Array, ...], operands: list[tuple[Array, ...]]) -> int:
  users = {}
  for instruction in body.values():
    for name in instruction.operands:
      users.setdefault(name, []).append(instruction)
  parameters = {int(one.literal): one for one in body.values() if one.opcode == 'parameter'}
  read = sum(_read(users, parameters[number], arrays) for number, arrays in enumerate(operands))
  (root,) = (one for one in body.values() if one.is_root)
  return read + _written(body, root, results)


def _read(users: dict, parameter: Instruction, arrays: tuple[Array, ...]) -> int:
  if all(array.on_chip for array in arrays):
    return 0
  taken, waiting = 0, [parameter]
  while waiting:
    value = waiting.pop()
    for user in users.get(value.name, ()):
      if user.opcode == 'bitcast':
        waiting.append(user)
      elif user.opcode in _PARTIAL_READS:
        taken += sum(array.stored for array in user.results)
      elif not (user.opcode == 'dynamic-update-slice' and user.operands[0] == value.name):
        return _stored(arrays)
  return min(taken, _stored(arrays))


def _written(body: dict, root: Instruction, results: tuple[Array, ...]) -> int:
  parts = [body[name] for name in root.operands] if root.opcode == 'tuple' else [root]
  if len(parts) != len(results):
    return _stored(results)
  written = 0
  for part, array in zip(parts, results, strict=True):
    while part.opcode == 'bitcast':
      part = body[part.operands[0]]
    update = part.opcode == 'dynamic-update-slice'
    size = sum(leaf.stored for leaf in body[part.operands[1]].results) if update else array.stored
    written += 0 if array.on_chip else size
  return written


def _stored(arrays: Iterable[Array]) -> int:
  return sum(array.stored for array in arrays if not array.on_chip)
