"""Where a process is among several that train together."""

from typing import NamedTuple


class Place(NamedTuple):
  """What the flags say; all None where the cluster's environment says it, or where the process is alone."""

  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
