"""`python -m paranet_jax.calibrate`: chooses when a trained run may exit early, and writes exits.json."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paranet_jax.calibrate.flags import BundleRequest, Request, parse
from paranet_jax.host.errors import UserError, exit_code, say
from paranet_jax.host.starting import begin


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command with these arguments (None: those of the process) and returns the exit code."""
  argv = sys.argv[1:] if argv is None else argv
  command = shlex.join(['python', '-m', 'paranet_jax.calibrate', *argv])
  return exit_code(lambda: _run(parse(argv), command), has_config=False)


def _run(request: Request | BundleRequest, command: str) -> None:
  if isinstance(request, BundleRequest):
    _run_bundle(request, command)
    return
  # jax takes a second to import; a wrong flag is reported before.
  from paranet_jax.calibrate.calibration import calibrate
  from paranet_jax.calibrate.summary_text import summary_text
  from paranet_jax.display.pictures import drawn
  from paranet_jax.early.exit_plan import EXITS
  from paranet_jax.host.machine import start_jax
  from paranet_jax.host.processes import refuse_several

  refuse_several('calibrate')
  start_jax(request)
  path = request.workdir / EXITS
  replaced = ', replacing an earlier one' if path.exists() else ''
  result = calibrate(request, command)
  if result.problem:
    raise UserError(result.problem)
  say(summary_text(result.plan))
  say(f'\nexits: {path}{replaced}')
  if request.curves:
    found = drawn(lambda: _draw(request.workdir, result))
    say('\n'.join(f'figure: {line}' for line in ([found] if isinstance(found, str) else found)))


def _run_bundle(request: BundleRequest, command: str) -> None:
  from paranet_jax.calibrate.bundle import changes_text, recalibrate

  found = recalibrate(request, command)
  if found.problem:
    problem = found.problem.replace('exits.json keeps the full network', 'no bundle was written')
    raise UserError(problem.replace('hold out more images in a new run', 'set --images to more of them'))
  say(changes_text(found))
  say(f'\nbundle: {found.folder}')


def _draw(workdir: Path, result: Any) -> list[Path]:
  from paranet_jax.calibrate.figures import draw

  return [path for path in draw(workdir, result) if path.suffix == '.png']


if __name__ == '__main__':
  begin()
  sys.exit(main())
