"""Bytes that a compiled program moves: between devices, and to and from a device's main memory."""

from collections.abc import Iterable
from typing import NamedTuple

from paranet_jax.plan.hlo import Array, Instruction, Program

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


class Collectives(NamedTuple):
  """`count` of the collective operations of a run, and the `size` in bytes of what they give on each device."""

  count: int
  size: int


def collectives(program: Program) -> Collectives:
  """The collectives that one run of the program does, those in loops as often as they run."""
  count = size = 0
  for _, instruction, times in program.executed():
    if instruction.opcode.removesuffix('-start') in _COLLECTIVES:
      count += times
      size += times * sum(array.size for array in instruction.results)
  return Collectives(count, size)


def memory_traffic(program: Program) -> int:
  """Bytes that one run reads from and writes to main memory.

  Each instruction reads its operands and writes its results, a fusion being one; of an array that is only sliced, what
  the slice takes, and of one that is updated in place, the update. What lies on the chip costs nothing. Caches, which
  a CPU has, are not counted on.
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
  """An asynchronous copy, which gives (target, source, state), or another such move: (source, target, ...)."""
  sources = [array for arrays in operands for array in arrays]
  target = results[0 if opcode == 'copy-start' else min(len(sources), len(results) - 1)]
  return target.stored * (any(not array.on_chip for array in sources) + (not target.on_chip))


def _fusion(body: dict[str, Instruction], results: tuple[Array, ...], operands: list[tuple[Array, ...]]) -> int:
  users = {}
  for instruction in body.values():
    for name in instruction.operands:
      users.setdefault(name, []).append(instruction)
  parameters = {int(one.literal): one for one in body.values() if one.opcode == 'parameter'}
  read = sum(_read(body, users, parameters[number], arrays) for number, arrays in enumerate(operands))
  (root,) = (one for one in body.values() if one.is_root)
  return read + _written(body, root, results)


def _read(body: dict, users: dict, parameter: Instruction, arrays: tuple[Array, ...]) -> int:
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
