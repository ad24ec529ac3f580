"""`python -m paranet_jax.experiments results`: docs/results.md, all that has been measured, from every results.json."""

import re
from collections.abc import Sequence
from pathlib import Path

from paranet_jax.experiments.markdown import table_markdown
from paranet_jax.experiments.published import TABLES
from paranet_jax.experiments.queue.results import RESULTS, markdown
from paranet_jax.host.arguments import Parser, absolute, from_here
from paranet_jax.host.errors import UserError, report_no_room, say
from paranet_jax.host.files import read_file, read_object, write_text

_FOLDER, _PAGE = 'results', 'docs/results.md'
_HEAD = '# Results\n\nWhat has been measured of the paper and around it'
"""What a page begins with; no other file is replaced by one."""
_BEGINNING = f"""{_HEAD}, made from `results/**/results.json` by
`python -m paranet_jax.experiments results`; nothing is typed by hand. [The paper](paper.md#results) explains what it
means.

Every row has its seeds, deviation, epochs and costs, and lists the fields that differ from the paper's training. Each
section ends with its runs: date, hardware, time and command."""


def run(argv: Sequence[str]) -> int:
  """Runs the command with the arguments after `results`; returns its exit code."""
  parser = Parser(
    prog='python -m paranet_jax.experiments results',
    description=f'Writes one page of all results that the tables and queues below a folder have in their {RESULTS}.',
  )
  parser.add_argument('--folder', default=_FOLDER, help=f'Where the results are (default: {_FOLDER}).')
  parser.add_argument('--out', default=_PAGE, help=f'The page (default: {_PAGE}).')
  arguments = parser.parse_args(argv)
  folder, out = absolute(arguments.folder), absolute(arguments.out)
  earlier = read_file(out, 'set --out to another file')
  if earlier and not earlier.startswith(_HEAD.encode()):
    raise UserError(f'expected an earlier page of results or nothing at {out}, found another file; set --out')
  text = results_page(folder)
  if not out.parent.is_dir():
    raise UserError(f'expected the folder {out.parent}, found none; set --out')
  with report_no_room(out.parent):
    write_text(out, text)
  say(f'written: {out}')
  return 0


def results_page(folder: Path) -> str:
  """The page in Markdown.

  Args:
    folder: absolute; results.json of tables and of queues lie anywhere below it.

  Raises:
    UserError: there is none, or one is damaged or of another command.
  """
  files = sorted(folder.rglob(RESULTS))
  if not files:
    raise UserError(f'expected {RESULTS} of tables or queues below {folder}, found none; set --folder')
  parts = [part for file in files if (part := _part(file, _named(file.parent, folder)))]
  return '\n\n'.join([_BEGINNING, *filter(None, [_contents(parts)]), *parts]) + '\n'


def _contents(parts: Sequence[str]) -> str:
  """A list of the sections, each with its folder, as a page's tables are long."""
  found = re.findall(r'^## (.+)\n\nIn `(.+)`\.$', '\n\n'.join(parts), flags=re.MULTILINE)
  return '\n'.join(f'- [{title}](#{_anchor(title)}), in `{place}`' for title, place in found)


def _anchor(title: str) -> str:
  """The anchor that GitHub and MkDocs give a heading."""
  return re.sub(r'\s+', '-', re.sub(r'[^\w\s-]', '', title).strip().lower())


def _named(place: Path, folder: Path) -> Path:
  """A folder without what lies above: pages name no machine's folders."""
  shown = from_here(place)
  return place.relative_to(folder.parent) if shown.is_absolute() else shown


def _part(file: Path, place: Path) -> str:
  fix = 'write it again, or set --folder'
  found = read_object(file, fix) or {}
  try:
    if 'queue' in found:
      texts = [markdown(found)]
    else:
      sections = found['experiments']
      texts = [table_markdown(sections[name], found['protocol']) for name in TABLES if name in sections]
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise UserError(f'{file} is not of `experiments` ({error!r:.60}); {fix}') from error
  # Titles of files become sections of the page.
  sections = [re.sub('^#', '##', text.strip(), flags=re.MULTILINE) for text in texts]
  return '\n\n'.join(text.replace('\n', f'\n\nIn `{place.as_posix()}`.\n', 1) for text in sections)
