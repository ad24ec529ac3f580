"""What other packages can add to the toolkit: network families, data sets and exit policies."""

from collections.abc import Mapping
from typing import Generic, TypeVar

from paranet_jax.host.errors import UserError

T = TypeVar('T')


class Registry(Generic[T]):
  """Values by name: built in, registered in this process, or provided by an installed package as an entry point.

  Attributes:
    group: entry point group; an entry's name is the name of its value.
    what: kind of value, for messages, such as 'family'.
    known: values that are built in, registered, or loaded from an entry point.
  """

  def __init__(self, group: str, what: str, built_in: Mapping[str, T]):
    self.group, self.what, self.known = group, what, dict(built_in)

  def register(self, name: str, value: T) -> None:
    """Adds a value.

    Raises:
      ValueError: another value has this name.
    """
    if self.known.setdefault(name, value) != value:
      raise ValueError(f'there is already a {self.what} {name!r}')

  def find(self, name: str) -> T | None:
    """The value with this name, loaded from its entry point if necessary; None if there is none.

    Raises:
      UserError: the package that provides the value fails.
    """
    for entry in () if name in self.known else self._entry_points():
      if entry.name == name:
        try:
          self.register(name, entry.load())
        except Exception as error:
          raise UserError(
            f'{self.what} {name!r}: entry point {entry.value} fails: {error}; fix or uninstall its package'
          ) from error
    return self.known.get(name)

  def names(self) -> list[str]:
    """Every name, without loading entry points."""
    return list(dict.fromkeys((*self.known, *(entry.name for entry in self._entry_points()))))

  def _entry_points(self):
    from importlib.metadata import entry_points  # Reads the metadata of every installed package.

    return entry_points(group=self.group)
