"""Lazy evaluation: of the nodes of a network's graph, which an exit still needs, and which are worth keeping.

A node is a tuple of numbers that sorts after every node it reads.
"""

from collections.abc import Callable, Collection, Iterable

Node = tuple[int, ...]
Reads = Callable[[Node], Iterable[Node]]


def needed(targets: Iterable[Node], reads: Reads, given: Collection[Node] = ()) -> list[Node]:
  """The nodes still to compute for these targets, each after what it reads.

  Args:
    targets: nodes.
    reads: from a node to those it reads.
    given: nodes that are there already.
  """
  missing, pending = set(), list(targets)
  while pending:
    node = pending.pop()
    if node not in missing and node not in given:
      missing.add(node)
      pending.extend(reads(node))
  return sorted(missing)


def kept(targets: Collection[Node], reads: Reads, given: Collection[Node]) -> list[Node]:
  """Of the given nodes, those that are targets or that a node still needed for the targets reads."""
  read = {source for node in needed(targets, reads, given) for source in reads(node)}
  return sorted(read.union(targets).intersection(given))
