"""`python -m paranet_jax.adopt`: exits for a network that PyTorch has trained, learned from images without labels."""

import argparse
import sys
from collections.abc import Sequence

from paranet_jax.command_line import override
from paranet_jax.host.arguments import Parser, absolute, add_data_flags, add_jax_flags
from paranet_jax.host.errors import UserError, exit_code, say
from paranet_jax.host.fields import numbers
from paranet_jax.host.starting import begin
from paranet_jax.models.registry import ADOPTED_HEADS
from paranet_jax.targets import EXIT_TARGETS


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command with these arguments (default: sys.argv); returns the exit code."""
  return exit_code(lambda: _run(*_parse(argv)))


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
  parser = Parser(
    prog='python -m paranet_jax.adopt',
    description='Gives a network that PyTorch has trained early exits, which learn to match its last one.',
    epilog='--config.section.field=value overrides a field, as in paranet_jax.main.',
  )
  add = parser.add_argument
  add('what', nargs='?', choices=('describe',), help='Only list the places of exits, with their costs.')
  add('--arch', required=True, help="Architecture, by torchvision's or timm's name.")
  add('--weights', help='State dict: .safetensors, .pth, .pt or .th; or hf:OWNER/NAME[@REVISION][:FILE].')
  add('--exits', help='Places of the exits before the last one, such as layer1,layer2.1 (default: as describe says).')
  add('--head', choices=ADOPTED_HEADS, help='Kind of their heads (default: by the architecture).')
  images = parser.add_mutually_exclusive_group()
  images.add_argument('--images', type=absolute, metavar='FOLDER', help='Images without labels, in any folders below.')
  images.add_argument('--data', type=absolute, metavar='FOLDER', help='Images in a folder for each class.')
  add('--targets', choices=EXIT_TARGETS, help='What the exits learn from (default: last, which needs no labels).')
  add('--classes', action='store_true', help='The classes of --data are not those of the weights: a new last exit.')
  add('--mean', type=_mean, help='Mean of red, green and blue, from 0 to 1, such as 0.5,0.5,0.5 (default: as --arch).')
  add('--deviation', type=_deviation, help='Their standard deviation, such as 0.5,0.5,0.5 (default: as --arch).')
  add('--workdir', type=absolute, help='Folder of the new run.')
  add('--accept_config_changes', action='store_true', help='Continue a run whose saved configuration differs.')
  add_data_flags(parser)
  add_jax_flags(parser)
  given, rest = parser.parse_with_overrides(argv)
  if given.what:
    others = [name for name, value in vars(given).items() if value != parser.get_default(name)]
    found = [f'--{name}' for name in others if name not in ('what', 'arch', 'head')] + rest
    if found:
      raise UserError(f'describe takes --arch and --head alone, found {found[0]}; leave it out')
  else:
    for flag in ('weights', 'workdir'):
      if getattr(given, flag) is None:
        parser.error(f'the following arguments are required: --{flag}')
    if given.images is None and given.data is None and not any(a.startswith('--config.data.name=') for a in rest):
      raise UserError(
        'expected images for the exits to learn from, found none; set --images (without labels), --data (in a folder '
        'for each class) or --config.data.name'
      )
    if given.images and (given.targets not in (None, 'last') or given.classes):
      found = '--classes' if given.classes else f'--targets={given.targets}'
      raise UserError(f'{found} needs labels, found --images; set --data to a folder of images for each class')
  return given, rest


def _mean(text: str) -> tuple[float, ...]:
  values = numbers(text)
  if len(values) != 3 or not all(0 <= value <= 1 for value in values):
    raise argparse.ArgumentTypeError(f'expected three numbers from 0 to 1, found {text:.40}')
  return values


def _deviation(text: str) -> tuple[float, ...]:
  values = _mean(text)
  if not all(values):
    raise argparse.ArgumentTypeError(f'expected three numbers of more than 0, found {text:.40}')
  return values


def _run(given: argparse.Namespace, overrides: Sequence[str]) -> None:
  # jax takes a second to import; flags are checked first.
  from paranet_jax.host.machine import start_jax
  from paranet_jax.host.processes import refuse_several
  from paranet_jax.models.adopted.registry import find_architecture

  architecture = find_architecture(given.arch)
  refuse_several('adopt')
  if given.what:
    from paranet_jax.adopt.places import describe

    say(describe(architecture, given.head))
    return
  start_jax(given)
  from paranet_jax.adopt.run import adopt

  adopt(given, architecture, lambda config: override(config, overrides))


if __name__ == '__main__':
  begin()
  sys.exit(main())
