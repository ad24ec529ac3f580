"""Keeps what exporting packages print, log and warn of off the terminal."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """jax2onnx warns of plugins of no use here and prints for itself, ONNX Runtime of a preparation that is done."""
  level = logging.root.manager.disable
  logging.disable(logging.ERROR)
  try:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
      warnings.simplefilter('ignore')
      yield
  finally:
    logging.disable(level)
