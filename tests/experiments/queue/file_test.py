"""Tests of queue files: what they mean, and what is refused."""

from pathlib import Path

import pytest
from running import CONFIGS

from paranet_jax.experiments.queue.file import Comparison, read_queue
from paranet_jax.host.errors import UserError

RUN = "[[runs]]\nconfig = 'paranet_jax:paranet:PN3-xdx'\n"


def read(tmp_path, text, workdir=None):
  path = tmp_path / 'queue.toml'
  path.write_text(text)
  return read_queue(path, workdir)


def test_a_queue_file(tmp_path):
  queue = read(
    tmp_path,
    f"""
    workdir = 'here'
    [set]
    'eval.every_epochs' = 5
    {RUN}
    protocol = 'quarter'
    seeds = [1, 0]
    [[runs]]
    name = 'own'
    config = 'paranet_jax:paranet:PN3-xdx'
    priority = -1
    paper = 'PN3-ddd'
    set = {{ 'eval.every_epochs' = 2, loss.exit_weights = [1, 2.5, 0], train.drop_epochs = [], train.nesterov = false }}
    [[comparisons]]
    question = 'why?'
    control = 'PN3-xdx'
    treated = 'own'
    exit = 2
    """,
  )
  assert queue.workdir == 'here'
  assert [(run.name, run.row, run.paper, run.config.train.epochs) for run in queue.runs] == [
    ('own-s0', 'own', 'PN3-ddd', 130),
    ('PN3-xdx-s1', 'PN3-xdx', 'PN3-xdx', 32.5),
    ('PN3-xdx-s0', 'PN3-xdx', 'PN3-xdx', 32.5),
  ]
  own, first, _ = (run.config for run in queue.runs)
  assert (own.loss.exit_weights, own.train.drop_epochs) == ((1, 2.5, 0), ()) and not own.train.nesterov
  assert (own.eval.every_epochs, first.eval.every_epochs, first.seed) == (2, 5, 1)
  assert queue.runs[1].arguments[1:] == (
    '--config.eval.every_epochs=5',
    '--config.train.epochs=32.5',
    '--config.seed=1',
  )
  assert queue.comparisons == (Comparison('why?', 'PN3-xdx', ('own',), 2),)


@pytest.mark.parametrize(
  ('first', 'given', 'folder'),
  [
    ("workdir = 'here'\n", None, 'here'),
    ('', None, 'results/queue'),
    ("workdir = 'here'\n", '{}/there', '{}/there'),
    ("workdir = 'here'\n", 'there', '{}/there'),
    # The same folder by another path: runs that have begun keep their arguments.
    ("workdir = 'here'\n", '{}/here', 'here'),
    ("workdir = 'here'\n", 'else/../here', 'here'),
    ("workdir = 'here'\n", 'link', 'here'),
    ('', 'results/queue/', 'results/queue'),
  ],
)
def test_values_name_the_folder_of_the_queue(tmp_path, monkeypatch, first, given, folder):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'else').mkdir()
  (tmp_path / 'link').symlink_to('here')
  text = f"{first}{RUN}set.loss = {{ teacher = 'run', teacher_run = '{{workdir}}/runs/teacher-s0' }}"
  text = text.replace('PN3-xdx', 'PN3-x3d')
  queue, folder = read(tmp_path, text, given and given.format(tmp_path)), folder.format(tmp_path)
  assert queue.workdir == folder
  assert f'--config.loss.teacher_run={folder}/runs/teacher-s0' in queue.runs[0].arguments
  assert queue.runs[0].config.loss.teacher_run == str(tmp_path / folder / 'runs/teacher-s0')


@pytest.mark.parametrize('shared', ['body', 'backbone'])
@pytest.mark.parametrize('own', ['body', 'backbone'])
def test_a_field_is_one_by_its_old_name_too(tmp_path, shared, own):
  text = f'set = {{ train.{shared}_epochs = 1 }}\n{RUN}set = {{ train.{own}_epochs = 2 }}'
  assert read(tmp_path, text).runs[0].config.train.backbone_epochs == 2


def test_a_table_of_first_seeds_comes_before_any_second_seed(tmp_path):
  first, second = (f"{RUN}\nname = '{name}'" for name in ('first', 'second'))
  queue = read(tmp_path, f'{first}\nseeds = [0, 1, 2]\n{second}\nseeds = [2]\n{RUN}\npriority = 1\nseeds = [5, 4]')
  assert [run.name for run in queue.runs] == [
    *('PN3-xdx-s5', 'PN3-xdx-s4'),
    *('first-s0', 'second-s2', 'first-s1', 'first-s2'),
  ]


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('runs = 3 3', 'is not TOML (Expected newline'),
    ('', ': expected at least one [[runs]], found none'),
    ('runs = 3', ': expected tables [[runs]], found 3'),
    ("workdir = 3\n" + RUN, ': workdir must be a string in quotes, found 3'),
    ('prioritiy = 1\n' + RUN, ": the file has an unknown key 'prioritiy'; known are workdir, set, runs, comparisons"),
    (
      RUN + 'prioritiy = 1',
      ": [[runs]] paranet_jax:paranet:PN3-xdx has an unknown key 'prioritiy' (did you mean priority?); known are name, "
      'config, protocol, seeds, priority, paper, set',
    ),
    (RUN + "priority = 'high'", ": priority must be an integer, found 'high'"),
    ('[[runs]]\nname = "a"', ': [[runs]] a needs a config, such as config = "paranet_jax:paranet:PN3-xdx"'),
    (RUN + "protocol = 'half'", ': [[runs]] paranet_jax:paranet:PN3-xdx: protocol must be one of paper, quarter, '),
    (RUN + 'seeds = []', ': [[runs]] paranet_jax:paranet:PN3-xdx: seeds must be a list of integers of 32 bits'),
    (RUN + 'seeds = [true]', ': [[runs]] paranet_jax:paranet:PN3-xdx: seeds must be a list of integers of 32 bits'),
    (RUN + 'seeds = [1, 1]', ': two runs are named PN3-xdx-s1; give one of them another name'),
    (RUN + RUN, ': two runs are named PN3-xdx-s0; give one of them another name'),
    (
      RUN + RUN + "seeds = [1]\nset = { train.epochs = 1 }",
      ': runs named PN3-xdx differ in more than their seeds; give one of them another name',
    ),
    (RUN + "name = 'a/b'", ": [[runs]] a/b: a name has letters, digits and ._+-, found 'a/b'"),
    (RUN + "set = { seed = 1 }", ': [[runs]] paranet_jax:paranet:PN3-xdx: seed differs between the runs; set name, '),
    (RUN + "set = 'train.epochs=1'", ': [[runs]] paranet_jax:paranet:PN3-xdx: set must be a table of fields and val'),
    (
      RUN + 'set = { train.epoch = 1 }',
      ': [[runs]] paranet_jax:paranet:PN3-xdx: unknown configuration field train.epoch; did you mean train.epochs?',
    ),
    (
      RUN + 'set = { train.epochs = 0 }',
      ': [[runs]] paranet_jax:paranet:PN3-xdx: train.epochs must be more than 0 and at most 1,000,000, found 0.0; '
      'set train.epochs',
    ),
    ("[[runs]]\nconfig = 'paranet_jax:none'", ': [[runs]] paranet_jax:none: expected a configuration file at '),
    (RUN + "[[comparisons]]\ncontrol = 'PN3-xdx'", ': [[comparisons]] needs control, treated (a list of names) '),
    (
      RUN + "[[comparisons]]\ncontrol = 'PN3-xd'\ntreated = 'PN3-xdx'\nexit = 2",
      ": [[comparisons]]: expected names of [[runs]], found 'PN3-xd' (did you mean PN3-xdx?)",
    ),
    (
      RUN + "[[comparisons]]\ncontrol = 'PN3-xdx'\ntreated = 'PN3-xdx'\nexit = 4",
      ': [[comparisons]]: expected an exit from 1 to 3, the last one of PN3-xdx, found 4; set exit',
    ),
  ],
)  # fmt: skip
def test_refused(tmp_path, text, message):
  with pytest.raises(UserError) as error:
    read(tmp_path, text)
  assert str(error.value).startswith(f'{tmp_path / "queue.toml"}{"" if message.startswith(":") else " "}{message}')
  assert '\n' not in str(error.value)


def test_seeds_of_a_configuration_file(tmp_path):
  own = tmp_path / 'own.py'
  own.write_text(
    'from paranet_jax.base_config import base_config\n'
    'def get_config():\n'
    "  config = base_config('PN1-d')\n"
    '  config.seeds = 2\n'
    '  return config\n'
  )
  with pytest.raises(UserError) as error:
    read(tmp_path, f"[[runs]]\nconfig = '{own}'")
  assert str(error.value) == (
    f'{tmp_path}/queue.toml: [[runs]] {own}: its configuration has 2 seeds; list them in seeds'
  )


def test_no_file(tmp_path):
  with pytest.raises(UserError, match='expected a queue file at .*, found none; name one, such as configs/queues/'):
    read_queue(tmp_path / 'none.toml')


@pytest.mark.parametrize('path', sorted((CONFIGS / 'queues').glob('*.toml')), ids=lambda path: path.stem)
def test_committed_files_are_valid(path: Path):
  assert read_queue(path).runs


def test_the_papers_queue():
  runs = read_queue(CONFIGS / 'queues' / 'paper.toml').runs
  first = ['PN3cut-dxx-s0', 'PN3cut-xdx-s0', 'PN3-xdx-s0', 'quarter-PN3-xdx-s0']
  assert [run.name for run in runs[:4]] == first and len(runs) == 13
  assert {run.config.train.epochs for run in runs} == {130, 32.5}
  assert all(run.config.model.layers_per_block == 16 for run in runs)
