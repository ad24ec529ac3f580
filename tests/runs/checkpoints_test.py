"""Tests of saving and restoring. How a run uses them is tested in train_test.py and resume_test.py."""

import asyncio
import errno
import gc
import resource
import shutil
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging

from paranet_jax.host.errors import UserError
from paranet_jax.runs import checkpoints as checkpoints_lib
from paranet_jax.runs.checkpoints import Checkpoints, has_checkpoint, step_folders


def tree(scale: float = 1.0):
  """A state of several types, a scalar among them."""
  return {
    'params': {
      'kernel': jnp.arange(6, dtype=jnp.float32).reshape(2, 3) * scale,
      'bias': jnp.float32([np.pi, -0.0, 1e-40]),
    },
    'half': jnp.bfloat16([0.1, 3]),
    'step': jnp.int32(7),
    'opt_state': (jnp.zeros(()), {'trace': jnp.ones(4)}),
  }


def save(workdir, *steps, keep=9, value=tree):
  with Checkpoints(workdir, keep) as checkpoints:
    for step in steps:
      checkpoints.save(step, value(step), {'seed': step})


def test_what_is_saved_is_restored(tmp_path):
  save(tmp_path, 3, 12)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == 12
    assert checkpoints.choose() == 12 and checkpoints.choose(3) == 3
    for step in (3, 12):
      state, meta = checkpoints.restore(step, jax.tree.map(jnp.zeros_like, tree()))
      chex.assert_trees_all_equal(state, tree(step), strict=True)
      assert meta == {'seed': step}


def test_each_array_goes_where_the_one_it_is_like_lies(tmp_path):
  save(tmp_path, 1)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), 'x')
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), tree())
  with Checkpoints(tmp_path) as checkpoints:
    state, _ = checkpoints.restore(1, like)
  assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(state))
  chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(tree(1)))


def test_the_state_may_be_given_away_at_once(tmp_path):
  replace = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 - 1, state), donate_argnums=0)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    state = {'x': jnp.arange(100_000, dtype=jnp.float32)}
    checkpoints.save(1, state, {})
    jax.block_until_ready(replace(state))
    assert state['x'].is_deleted()
  with Checkpoints(tmp_path) as checkpoints:
    restored, _ = checkpoints.restore(1, {'x': jnp.zeros(100_000)})
  np.testing.assert_array_equal(restored['x'], np.arange(100_000, dtype=np.float32))


@pytest.mark.parametrize(('keep', 'kept'), [(1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_latest_are_kept(tmp_path, keep, kept):
  save(tmp_path, 1, 2, 3, 4, 5, keep=keep)
  assert sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir()) == kept


def test_others_are_kept_in_addition(tmp_path):
  with Checkpoints(tmp_path, 1) as checkpoints:
    checkpoints.also_keep = lambda steps: {step for step in steps if step in (1, 3)}
    for step in (1, 2, 3, 4, 5):
      checkpoints.save(step, tree(), {})
    assert checkpoints.steps() == [1, 3, 5]
  assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['1', '3', '5']


def test_what_a_kill_left_half_written_or_half_deleted_is_not_a_checkpoint(tmp_path):
  save(tmp_path, 4)
  folder = tmp_path / 'checkpoints'
  for name in ('8.orbax-checkpoint-tmp', '12.orbax-checkpoint-tmp-0', 'deleted/3'):
    (folder / name / 'state').mkdir(parents=True)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.choose() == 4
  assert len(list(folder.iterdir())) == 4
  with Checkpoints(tmp_path, 2):
    assert [path.name for path in folder.iterdir()] == ['4']
  save(tmp_path, 8)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.choose() == 8


def test_an_unfinished_first_checkpoint_is_none(tmp_path):
  folder = tmp_path / 'checkpoints'
  (folder / '100.orbax-checkpoint-tmp-0').mkdir(parents=True)
  (folder / '100.orbax-checkpoint-tmp-0' / 'checksums.json').touch()
  assert not has_checkpoint(tmp_path) and not has_checkpoint(tmp_path, 'checksums.json')
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [] and not checkpoints._is_open  # Without importing orbax.
  save(tmp_path, 4, 100)
  assert sorted(step_folders(tmp_path)) == [4, 100] and has_checkpoint(tmp_path, 'checksums.json')
  for step in (4, 100):
    (folder / str(step) / 'checksums.json').unlink()
  assert has_checkpoint(tmp_path) and not has_checkpoint(tmp_path, 'checksums.json')


@pytest.fixture
def held(monkeypatch):
  """Lets a save begin and not end before the event is set."""
  write, event = Checkpoints._write, threading.Event()
  monkeypatch.setattr(Checkpoints, '_write', lambda *arguments: event.wait(60) and write(*arguments))
  yield event
  event.set()


def test_it_is_saved_in_the_background(tmp_path, held):
  with Checkpoints(tmp_path, 2) as checkpoints:
    checkpoints.save(4, tree(), {})
    checkpoints.check()
    assert not list((tmp_path / 'checkpoints').iterdir())
    held.set()
    assert checkpoints.latest_step() == 4
    checkpoints.save(8, tree(), {})
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [4, 8]


UNFIT = tree() | {'half': jnp.float32([1, np.nan])}


@pytest.mark.parametrize('reported', ['check', 'wait', 'steps', 'save', 'end'])
def test_what_is_not_finite_is_not_saved(tmp_path, reported):
  save(tmp_path, 4)
  with pytest.raises(UserError) as error, Checkpoints(tmp_path, 2) as checkpoints:
    checkpoints.save(8, UNFIT, {})
    if reported == 'check':
      while not checkpoints._saving.done():
        pass
    if reported != 'end':
      getattr(checkpoints, reported)(*((12, tree(), {}) if reported == 'save' else ()))
      raise AssertionError('nothing was reported')
  assert str(error.value).startswith('the state is no longer finite at step 8, and the last checkpoint is of step 4; ')
  assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['4']


def test_an_earlier_error_is_the_one_to_tell(tmp_path):
  with pytest.raises(RuntimeError, match='earlier'), Checkpoints(tmp_path, 2) as checkpoints:
    checkpoints.save(8, UNFIT, {})
    raise RuntimeError('earlier')


def test_reading_makes_nothing(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() is None
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('empty', [False, True])
def test_there_is_none(tmp_path, empty):
  if empty:
    (tmp_path / 'checkpoints').mkdir()
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError) as error:
    checkpoints.choose()
  assert str(error.value) == (
    f'expected a checkpoint in {tmp_path}/checkpoints, found none; train first, or set --workdir'
  )


def test_there_is_none_of_this_step(tmp_path):
  save(tmp_path, 3, 12)
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError) as error:
    checkpoints.choose(4)
  assert str(error.value) == f'no checkpoint of step 4 in {tmp_path}/checkpoints, found [3, 12]; set --step'


def half(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  """One bit, of an array's values: orbax does not see it."""
  data = path.read_bytes()
  place = data.index(VALUES) + 40
  path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


# Not compressible, so that they are in the file as they are.
NOISE = np.random.default_rng(0).integers(0, 2**32, 500, np.uint32) & 0xBFFFFFFF
VALUES = NOISE.tobytes()[400:500]


def noise(step):
  return {'params': {'kernel': jnp.asarray(NOISE.view(np.float32))}, 'batch_stats': {}, 'step': jnp.int32(step)}


def largest(folder):
  """The file with the values of the arrays."""
  return max((path for path in (folder / 'state').rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGES = {
  'a file of values is cut off': lambda folder: half(largest(folder)),
  'a file of values is empty': lambda folder: largest(folder).write_bytes(b''),
  'a file of values is gone': lambda folder: largest(folder).unlink(),
  'a bit of a value is another': lambda folder: flip(largest(folder)),
  'the manifest is cut off': lambda folder: half(folder / 'state' / 'manifest.ocdbt'),
  'the tree is cut off': lambda folder: half(folder / 'state' / '_METADATA'),
  'the meta is cut off': lambda folder: half(folder / 'meta' / 'metadata'),
  'the meta is gone': lambda folder: shutil.rmtree(folder / 'meta'),
  'the state is gone': lambda folder: shutil.rmtree(folder / 'state'),
  'the checksums are cut off': lambda folder: half(folder / 'checksums.json'),
  'the meta is of something else': lambda folder: (
    (folder / 'meta' / 'metadata').write_text('{"seed": 1}') and (folder / 'checksums.json').unlink()
  ),
  'it had no checksums': lambda folder: half(folder / 'meta' / 'metadata') or (folder / 'checksums.json').unlink(),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, capsys, damage):
  save(tmp_path, 4, 8, value=noise)
  folder, other = tmp_path / 'checkpoints', tmp_path / 'damaged_checkpoints'
  for number in (0, 1):
    DAMAGES[damage](folder / '8')
    named = f'checkpoint {folder}/8 is damaged ('
    with Checkpoints(tmp_path) as checkpoints:
      for restore in (lambda: checkpoints.restore(8, noise(0)), lambda: checkpoints.read_variables(8)):
        with pytest.raises(UserError) as error:
          restore()
        assert str(error.value).startswith(named)
        assert str(error.value).endswith('); move that folder away to continue without it')
    with Checkpoints(tmp_path, 9) as checkpoints:
      step, state, _ = checkpoints.restore_latest(noise(0))
      assert (step, state['step']) == (4, 4)
      np.testing.assert_array_equal(state['params']['kernel'].view(np.uint32), NOISE)
      out = capsys.readouterr().out
      assert out.startswith(named) and out.endswith(f'); moved to {other}/8{".1" if number else ""}\n')
      assert checkpoints.steps() == [4]
      checkpoints.save(8, noise(8), {})
  assert sorted(path.name for path in other.iterdir()) == ['8', '8.1']
  shutil.rmtree(other / '8')  # A user has looked at the first one only.
  DAMAGES[damage](folder / '8')
  with Checkpoints(tmp_path, 9) as checkpoints:
    assert checkpoints.restore_latest(noise(0))[0] == 4
  assert sorted(path.name for path in other.iterdir()) == ['8', '8.1']


def test_a_checkpoint_that_training_deletes_meanwhile_is_not_damaged(tmp_path):
  save(tmp_path, 4, 8, value=noise)

  def read(step):
    if step == 8:  # As a training elsewhere does, between the choice and the reading.
      (tmp_path / 'checkpoints/8').rename(tmp_path / 'gone')
      shutil.copytree(tmp_path / 'checkpoints/4', tmp_path / 'checkpoints/12')
    return checkpoints.read_variables(step)

  with Checkpoints(tmp_path) as checkpoints:
    step, variables = checkpoints.read_chosen(Checkpoints.choose, read)
    assert step == 12
    np.testing.assert_array_equal(variables['params']['kernel'].view(np.uint32), NOISE)
    with pytest.raises(UserError, match=r'no checkpoint of step 8 in .*, found \[4, 12\]; set --step'):
      checkpoints.read_chosen(lambda found: found.choose(8), read)
    shutil.rmtree(tmp_path / 'checkpoints/12/state')
    with pytest.raises(UserError, match='checkpoints/12 is damaged'):
      checkpoints.read_chosen(Checkpoints.choose, read)


def test_the_only_checkpoint_is_not_moved_away(tmp_path, capsys):
  save(tmp_path, 4, 8, value=noise)
  for step in (4, 8):
    shutil.rmtree(tmp_path / 'checkpoints' / str(step) / 'state')
  with (
    pytest.raises(UserError, match='/4 is damaged .*; move that folder away'),
    Checkpoints(tmp_path, 9) as checkpoints,
  ):
    checkpoints.restore_latest(noise(0))
  assert 'checkpoints/8 is damaged' in capsys.readouterr().out
  assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['4']


def many(step):
  """Arrays of several sizes that do not compress, each of which has a writer and a reader of its own."""
  rng = np.random.default_rng(step)
  arrays = {f'layer_{i}': rng.standard_normal(80 << (i % 4), np.float32) for i in range(16)}
  return jax.tree.map(jnp.asarray, {'params': arrays, 'step': np.int32(step)})


def test_a_disk_that_is_full_at_any_write_leaves_nothing_behind(tmp_path, capfd, caplog):
  folder, free = tmp_path / 'checkpoints', resource.getrlimit(resource.RLIMIT_FSIZE)
  save(tmp_path, 4, value=many)
  for room in (0, 100, 150, 300, 500, 800, 1200, 2000, 4000, 8000):  # Of a file: the largest has 26,000 bytes.
    with pytest.raises(UserError) as error, Checkpoints(tmp_path, 1) as checkpoints:
      resource.setrlimit(resource.RLIMIT_FSIZE, (room, free[1]))
      try:
        checkpoints.save(8, many(8), {'seed': 8})
        checkpoints.wait()
      finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
    assert str(error.value) == (
      f'the checkpoint of step 8 cannot be written to {folder} (File too large), and the one of step 4 is intact; '
      'fix that or make room, and the same command resumes'
    )
    assert [path.name for path in folder.iterdir()] == ['4']
  gc.collect()
  assert capfd.readouterr() == ('', '') and caplog.messages == []


def test_a_thread_that_is_about_to_start_is_waited_for(monkeypatch):
  ended, calls = [], []
  kind = type('Late', (threading.Thread,), {'__module__': 'orbax.late'})
  late, alive = kind(target=lambda: ended.append(True)), threading.enumerate

  def enumerate_threads():  # As in the middle of `start`, twice.
    calls.append(True)
    if len(calls) == 3:
      late.start()
    return [late] if len(calls) <= 3 else alive()

  monkeypatch.setattr(threading, 'enumerate', enumerate_threads)
  with checkpoints_lib._raised_not_logged():
    pass
  assert ended and not late.is_alive()


def test_of_several_threads_none_leaves_the_logs_silent(caplog):
  source = 'from absl import logging\nlogging.error(text)'

  def log(text, file='/packages/orbax/checkpoint/a.py'):
    exec(compile(source, file, 'exec'), {'text': text})

  before, first_left = absl_logging.get_verbosity(), threading.Event()
  second_came, done = threading.Event(), threading.Event()

  def second():
    with checkpoints_lib._raised_not_logged():
      second_came.set()
      assert first_left.wait(60)
      log('of the second')
      log('meanwhile', '/packages/other/a.py')
    done.set()

  thread = threading.Thread(target=second)
  with checkpoints_lib._raised_not_logged():
    thread.start()
    assert second_came.wait(60)
    log('of the first')
  first_left.set()
  thread.join()
  log('afterwards')
  assert done.is_set() and caplog.messages == ['meanwhile', 'afterwards']
  assert absl_logging.get_verbosity() == before


def test_no_room_for_checksums(tmp_path, monkeypatch):
  def fail(*unused):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(checkpoints_lib, 'write_json', fail)
  with pytest.raises(UserError) as error:
    save(tmp_path, 4)
  assert str(error.value).startswith('the checksums of the checkpoint of step 4 cannot be written to ')
  assert ' (No space left on device), and the one of step 4 is intact; ' in str(error.value)
  with Checkpoints(tmp_path) as checkpoints:
    chex.assert_trees_all_equal(checkpoints.restore(4, tree())[0], tree(4), strict=True)


def test_orbax_waits_for_all_writers_when_one_fails():
  checkpoints_lib.orbax()
  from orbax.checkpoint._src import asyncio_utils

  written = []

  async def write():
    await asyncio.sleep(0.01)
    written.append('second')

  async def save():
    asyncio.get_running_loop().create_task(write())
    raise OSError('first')

  with pytest.raises(OSError, match='first'):
    asyncio_utils.run_sync(save())
  assert written == ['second']


def test_no_memory_is_not_damage(tmp_path, monkeypatch):
  save(tmp_path, 4, 8)

  def fail(*unused, **unused_too):
    raise MemoryError

  with pytest.raises(MemoryError), Checkpoints(tmp_path, 9) as checkpoints:
    monkeypatch.setattr(checkpoints._manager, 'restore', fail)
    checkpoints.restore_latest(tree())
  assert len(list((tmp_path / 'checkpoints').iterdir())) == 2


def raised(error, cause=None, context=None):
  """A function that raises an error, because of another one, or while another one is handled."""

  def fail(*unused, **unused_too):
    try:
      if context:
        raise context
    finally:
      raise error from cause

  return fail


@pytest.mark.parametrize(
  ('fail', 'reason'),
  [
    (raised(OSError(errno.EMFILE, 'of the file')), 'Too many open files'),
    (raised(PermissionError(errno.EACCES, 'of the file')), 'Permission denied'),
    (raised(ValueError("Error opening /a/b: [os_error_code='5'] [spec]")), 'Input/output error'),
    (raised(KeyError('a'), cause=OSError(errno.ENFILE, 'of the file')), 'Too many open files in system'),
    (raised(ValueError('a'), context=OSError(errno.ENOMEM, 'of the file')), 'Cannot allocate memory'),
    (raised(FileNotFoundError(errno.ENOENT, 'none'), context=OSError(errno.EIO, 'of the file')), 'Input/output error'),
    (raised(FileNotFoundError(errno.ENOENT, 'none')), None),
    (raised(NotADirectoryError(errno.ENOTDIR, 'none'), context=IsADirectoryError(errno.EISDIR, 'a folder')), None),
    (raised(OSError('not as orbax writes it')), None),
    (raised(ValueError("Error opening /a/b: [os_error_code='2']")), None),
    (raised(ValueError('not as orbax writes it'), cause=KeyError('a')), None),
  ],
)
def test_what_the_system_does_not_let_be_read_is_not_damage(tmp_path, monkeypatch, capsys, fail, reason):
  save(tmp_path, 4, 8)
  folder = tmp_path / 'checkpoints'
  with Checkpoints(tmp_path, 9) as checkpoints:
    restore = checkpoints._manager.restore
    monkeypatch.setattr(
      checkpoints._manager, 'restore', lambda step, args: (fail if step == 8 else restore)(step, args=args)
    )
    if reason is None:
      assert checkpoints.restore_latest(tree())[0] == 4
      assert capsys.readouterr().out.startswith(f'checkpoint {folder}/8 is damaged (')
      return
    with pytest.raises(UserError) as error:
      checkpoints.restore_latest(tree())
  assert str(error.value) == (
    f'checkpoint {folder}/8 may be intact, and cannot be read ({reason}); fix that, or move that folder away to '
    'continue without it'
  )
  assert sorted(path.name for path in folder.iterdir()) == ['4', '8'] and len(list(tmp_path.iterdir())) == 1


def test_a_later_format_is_refused(tmp_path):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoints_lib, 'FORMAT', 2)
    save(tmp_path, 4)
  with pytest.raises(UserError) as error, Checkpoints(tmp_path, 9) as checkpoints:
    checkpoints.restore_latest(tree())
  assert str(error.value) == (
    f'checkpoint {tmp_path}/checkpoints/4 has format 2, and this version reads up to 1; '
    'update paranet_jax, or set --workdir'
  )


def without(state, key):
  return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
  ('like', 'difference'),
  [
    (tree() | {'half': jnp.zeros(3)}, 'half is [2] there and [3] in this configuration'),
    (without(tree(), 'half'), 'half is [2] there and absent in this configuration'),
    (tree() | {'more': jnp.zeros(3)}, 'more is absent there and [3] in this configuration'),
    (tree() | {'step': jnp.zeros(1)}, 'step is [] there and [1] in this configuration'),
    (tree() | {'opt_state': (jnp.zeros(()), {})}, 'opt_state/1/trace is [4] there and absent in this configuration'),
  ],
)
def test_another_architecture_is_refused(tmp_path, like, difference):
  save(tmp_path, 12)
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError) as error:
    checkpoints.restore(12, like)
  assert str(error.value) == (
    f'checkpoint {tmp_path}/checkpoints/12 has a different architecture or optimizer: {difference}; '
    'set --config to the one it was trained with, or --workdir'
  )


@pytest.mark.parametrize(
  ('error', 'reason'),
  [
    (OSError(28, 'No space left on device'), 'No space left on device'),
    (
      ValueError("UNKNOWN: Writing /a/b: No space left on device [os_error_code='28']"),
      'No space left on device',
    ),
    (ValueError("Error: File too large [os_error_code='28'] [spec='{true}']"), 'No space left on device'),
    (ValueError('two\n  lines'), 'two lines'),
  ],
)
def test_reason_of_a_failed_save_is_short(error, reason):
  assert checkpoints_lib._reason(error) == reason
