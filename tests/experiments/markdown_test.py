"""Commands in Markdown."""

import shlex

import pytest

from paranet_jax.experiments.markdown import commands_block, table

LONGEST = 'python ' + 91 * 'a'


@pytest.mark.parametrize(
  ('command', 'lines'),
  [
    ('python run.py', ['python run.py']),
    (LONGEST, [LONGEST]),
    (f'{LONGEST}a', ['python \\', '  ' + 92 * 'a']),
    (f"python --set='{95 * 'b'} c' -d", ['python \\', f"  '--set={95 * 'b'} c' \\", '  -d']),
  ],
)
def test_a_command_fits_a_page(command, lines):
  text = commands_block([command, 'ls'])
  assert text.splitlines() == ['```bash', *lines, 'ls', '```']
  assert shlex.split(text.replace('\\\n', '').splitlines()[1]) == shlex.split(command)


def test_a_bar_does_not_end_a_cell():
  rows = [('a', 'data.data_dir: -> /of|mine'), ('b', '')]
  assert table(('run', 'fields'), rows).splitlines() == [
    '| run | fields |',
    '| --- | --- |',
    r'| a | data.data_dir: -> /of\|mine |',
    '| b |  |',
  ]
