"""Labels that clients send later, for images that were answered: `POST /labels`, see service.py."""

import json
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from uploads import Refused

MOST = 100_000
"""Answers that are remembered for their labels; older ones are forgotten."""
MAX_BYTES = 2**20
"""Of a request with labels."""


class Remembered:
  """The latest answers by id, until their labels come."""

  def __init__(self, class_names: Sequence[str], most: int = MOST):
    self._places, self._classes = {name: label for label, name in enumerate(class_names)}, len(class_names)
    self._answers: OrderedDict[str, int | None] = OrderedDict()
    self._prefix, self._count, self._most = secrets.token_hex(4), 0, most  # No id of another start is one of these.

  def add(self, label: int | None) -> str:
    """Remembers an answer, None if the image was unknown; returns its id."""
    self._count += 1
    name = f'{self._prefix}-{self._count}'
    self._answers[name] = label
    if len(self._answers) > self._most:
      self._answers.popitem(last=False)
    return name

  def take(self, entries: Any) -> list[tuple[int, int]]:
    """Forgets the answers that these entries label.

    Args:
      entries: parsed JSON: {"id": ..., "label": ...}, or a list of them.

    Returns:
      The right class and the one that was answered, of those that were not unknown.

    Raises:
      Refused: 400 or 404; an entry is not understood, and none is taken.
    """
    entries = entries if isinstance(entries, list) else [entries]
    found: dict[str, int] = {}
    for entry in entries:
      if not isinstance(entry, dict) or set(entry) != {'id', 'label'} or not isinstance(entry['id'], str):
        raise Refused(400, f'expected {{"id": "...", "label": ...}}, or a list of them, found {_shown(entry)}')
      if entry['id'] not in self._answers:
        raise Refused(
          404,
          f'expected the id of an answer that has no label yet, one of the latest {self._most:,}, found '
          f'{_shown(entry["id"])}; leave it out',
        )
      if entry['id'] in found:
        raise Refused(400, f'expected one label for {_shown(entry["id"])}, found several; leave out all but one')
      found[entry['id']] = self._label(entry['label'])
    pairs = [(right, self._answers.pop(name)) for name, right in found.items()]
    return [(right, answered) for right, answered in pairs if answered is not None]

  def _label(self, value: Any) -> int:
    label = self._places.get(value) if isinstance(value, str) else value
    if type(label) is not int or not 0 <= label < self._classes:
      expected = f'expected a label from 0 to {self._classes - 1}, or the name of a class'
      raise Refused(400, f'{expected}, found {_shown(value)}')
    return label


def parse_entries(body: bytes) -> Any:
  """The JSON of a request.

  Raises:
    Refused: 400; it is none.
  """
  try:
    return json.loads(body)
  except (ValueError, RecursionError) as error:
    raise Refused(400, f'expected JSON, found something else ({error})') from error


def _shown(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 60 else f'{text[:57]}...'
