"""Names of the classes that published weights know."""

import functools
from pathlib import Path

CIFAR10 = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')


@functools.cache
def class_names(whose: str | None, count: int) -> tuple[str, ...]:
  """One name per class.

  Args:
    whose: `Architecture.class_names`.
    count: of the classes; names are known only if they are as many.
  """
  names: tuple[str, ...] = ()
  if whose == 'cifar10':
    names = CIFAR10
  elif whose == 'imagenet':
    text = Path(__file__).with_name('imagenet_classes.txt').read_text('utf-8')
    names = tuple(line for line in text.splitlines() if not line.startswith('#'))
  return names if len(names) == count else tuple(f'class {number}' for number in range(count))
