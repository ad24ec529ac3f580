"""Keeps what exporting packages log and warn of off the terminal."""

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """jax2onnx warns of plugins for packages that are of no use here, ONNX Runtime of a preparation already done."""
  level = logging.root.manager.disable
  logging.disable(logging.ERROR)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      yield
  finally:
    logging.disable(level)
