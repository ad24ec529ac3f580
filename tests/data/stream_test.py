"""Tests of images that stay in their files and of the batches that are read from them."""

import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import textwrap
import threading
import types
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from forking import forked_workers

from paranet_jax import devices as devices_lib
from paranet_jax.data import stream as stream_lib
from paranet_jax.data.batches import epoch_order
from paranet_jax.data.dataset import Split, StoredImages
from paranet_jax.data.stream import EvalBatches, Stream, TrainBatches, num_workers
from paranet_jax.host.errors import LostWorkersError, UserError

SHAPE = (2, 2, 1)


@dataclass(frozen=True)
class Counting:
  """Record i is filled with i; some are corrupt, and one is refused."""

  count: int
  corrupt: tuple[int, ...] = ()
  refused: int | None = None

  def __len__(self):
    return self.count

  def read(self, numbers):
    if self.refused in numbers:
      raise UserError(f'expected a whole record, found {self.refused}: fix it')
    images = [None if number in self.corrupt else np.full(SHAPE, number, np.uint8) for number in numbers]
    return images, np.array(numbers, np.int32) % 7


def split(count=40, **options) -> Split:
  """The even records, so that an image's number is half of what fills it."""
  numbers = np.arange(0, 2 * count, 2)
  return Split(StoredImages(Counting(2 * count, **options), numbers, SHAPE), (numbers % 7).astype(np.int32))


def filled(images) -> list[int]:
  return np.asarray(images)[..., 0, 0, 0].tolist()


@pytest.mark.parametrize(
  'index, expected',
  [(3, 6), (-1, 78), (slice(2, 5), [4, 6, 8]), (np.array([5, 0, 5]), [10, 0, 10]), (slice(0, 0), [])],
)
def test_stored_images_are_indexed_like_an_array(index, expected):
  images = split().images
  assert (len(images), images.shape) == (40, (40, 2, 2, 1))
  found = images[index]
  assert filled(found) == expected
  assert found.dtype == np.uint8 and found.shape[-3:] == SHAPE


def test_a_part_of_a_split_is_not_read():
  part = split(refused=4).take(np.array([7, 2, 30]))
  assert part.streamed and part.labels.tolist() == [0, 4, 4]
  assert filled(part.images[np.array([2, 0])]) == [60, 14]
  with pytest.raises(UserError, match='expected a whole record, found 4: fix it'):
    part.images[1]
  in_memory = Split(np.arange(5), np.arange(5)).take(np.array([3, 1]))
  assert not in_memory.streamed and in_memory.images.tolist() == in_memory.labels.tolist() == [3, 1]


def test_an_image_that_became_corrupt():
  message = 'expected images that could be read when the run started, found 2 of 3 corrupt since then: start again'
  with pytest.raises(UserError, match=message):
    split(corrupt=(4, 8)).images.read(np.array([2, 4, 5]))


def train_batches(first_step=0, total_steps=12, **share) -> TrainBatches:
  return TrainBatches(split(), seed=3, batch_size=8, total_steps=total_steps, first_step=first_step, **share)


def order(epoch):
  return np.asarray(epoch_order(3, epoch, 40, 8))


def test_batches_are_those_of_training_in_memory():
  batches = train_batches()
  assert len(batches) == 12
  for step in range(12):
    epoch, row = divmod(step, 5)
    batch = batches[step]
    assert filled(batch['images']) == (2 * order(epoch)[row]).tolist()
    np.testing.assert_array_equal(batch['labels'], 2 * order(epoch)[row] % 7)
    assert (batch['images'].dtype, batch['labels'].dtype) == (np.uint8, np.int32)


@pytest.mark.parametrize('processes, devices', [(1, 2), (2, None), (2, 1), (2, 2), (4, 2), (8, None)])
def test_processes_and_devices_share_every_batch_in_order(processes, devices):
  shares = [
    train_batches(num_devices=devices, process_index=index, process_count=processes)[7] for index in range(processes)
  ]
  for share in shares:
    axes = () if devices is None else (devices,)
    assert share['images'].shape == (*axes, 8 // processes // (devices or 1), *SHAPE)
    assert share['labels'].shape == share['images'].shape[:-3]
  together = np.concatenate([share['images'].reshape(-1, *SHAPE) for share in shares])
  assert filled(together) == (2 * order(1)[2]).tolist()


@pytest.mark.parametrize('first_step', [1, 5, 7, 12, 13])
def test_a_later_stream_continues_where_another_stopped(first_step):
  whole, later = train_batches(), train_batches(first_step)
  assert len(later) == max(12 - first_step, 0)
  with Stream(whole, 0) as everything, Stream(later, 0) as rest:
    expected = [filled(batch['images']) for batch in everything]
    assert [filled(batch['images']) for batch in rest] == expected[first_step:]


def test_evaluation_sees_every_image_once():
  batches = EvalBatches(split(5), 2)
  with Stream(batches, 0) as items:
    found = [(filled(item['images']), item['labels'].tolist(), item['mask'].tolist()) for item in items]
  assert found == [([0, 2], [0, 2], [1, 1]), ([4, 6], [4, 6], [1, 1]), ([8, 0], [1, 0], [1, 0])]


def test_processes_share_an_evaluation():
  shares = [EvalBatches(split(5), 2, index, 2) for index in range(2)]
  assert [[filled(share[number]['images']) for number in range(len(share))] for share in shares] == [
    [[0, 2], [8, 0]],
    [[4, 6]],
  ]
  with Stream(EvalBatches(split(2), 2, 1, 2), 2) as nothing:
    assert list(nothing) == []


@pytest.fixture
def _quick_workers():
  with forked_workers():
    yield


@pytest.mark.usefixtures('_quick_workers')
def test_worker_processes_give_the_same_batches_and_one_that_is_killed_is_named():
  batches, device = train_batches(total_steps=40), jax.devices()[1]
  with Stream(batches, 2, jax.sharding.SingleDeviceSharding(device)) as placed:
    found = [next(placed) for _ in range(4)]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:  # As a signal to the whole group does: only the run ends them.
      worker.terminate()
    found += [next(placed) for _ in range(3)]
    for worker in workers:
      worker.join(0.2)
      assert worker.is_alive()
    victim, other = sorted(workers, key=lambda worker: worker.pid)
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(LostWorkersError) as error:
      list(placed)
  assert str(error.value) == (
    f'worker {victim.pid} of 2 that read the images was killed by SIGKILL, probably because memory ran out: '
    'free memory, or set --config.data.workers=1'
  )
  assert multiprocessing.active_children() == [] and other.exitcode == -signal.SIGKILL
  for step, batch in enumerate(found):
    assert batch['images'].devices() == {device}
    jax.tree.map(np.testing.assert_array_equal, batch, batches[step])


@pytest.mark.usefixtures('_quick_workers')
def test_after_a_signal_a_stalled_worker_is_waited_for_shortly(monkeypatch):
  monkeypatch.setattr(stream_lib, 'seconds_since_request', lambda: 5.1)
  with Stream(train_batches(), 1) as items:
    next(items)  # Longer than these 5.1 s, which never pass, is waited for a worker that has not begun.
    workers = multiprocessing.active_children()
    os.kill(workers[0].pid, signal.SIGSTOP)
    with pytest.raises(LostWorkersError) as error:
      list(items)
  assert str(error.value) == (
    f'a signal to stop came, and the workers that read the images (pid {workers[0].pid}) had no batch ready within '
    '5 s: look whether the disk or network that holds the images still answers'
  )
  assert multiprocessing.active_children() == []


def test_after_a_signal_a_stalled_thread_is_waited_for_shortly(monkeypatch):
  answers = threading.Event()
  monkeypatch.setattr(stream_lib, 'seconds_since_request', lambda: 5.1)
  monkeypatch.setattr(TrainBatches, '__getitem__', lambda *unused: answers.wait())
  with (
    pytest.raises(LostWorkersError, match='the threads that read the images had no batch'),
    Stream(train_batches(), 0) as items,
  ):
    next(items)
  answers.set()


def test_after_a_signal_workers_that_start_are_waited_for(monkeypatch):
  """As in an evaluation that a signal finds: it goes on with the next split, whose workers start long after it."""
  monkeypatch.setattr(stream_lib, '_POLL', 0.05)
  monkeypatch.setattr(stream_lib, '_STARTING', 100.0, raising=False)
  monkeypatch.setattr(stream_lib, 'seconds_since_request', lambda: 60.0)
  with Stream(train_batches(), 1) as items:
    next(items)


@pytest.mark.usefixtures('_quick_workers')
@pytest.mark.parametrize('workers', [0, 1])
def test_what_a_worker_raises_is_raised(workers):
  batches = EvalBatches(split(5, refused=4), 2)
  with Stream(batches, workers) as items:
    assert filled(next(items)['images']) == [0, 2]
    with pytest.raises(UserError, match='^expected a whole record, found 4: fix it$'):
      next(items)
  assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
  ('code', 'how'),
  [
    (-signal.SIGKILL, 'was killed by SIGKILL, probably because memory ran out'),
    (-signal.SIGSEGV, 'was killed by SIGSEGV'),
    (3, 'ended with exit code 3'),
  ],
)
def test_a_worker_that_ends_without_a_word_is_named(monkeypatch, code, how):
  """Also if grain goes on waiting for it."""
  dead, other = mock.Mock(pid=7, exitcode=code), mock.Mock(pid=8, exitcode=None)
  monkeypatch.setattr(stream_lib, '_POLL', 0.001)
  with Stream(train_batches(), 0) as items:
    items._workers, items._count, items._found = {dead, other}, 4, queue.SimpleQueue()
    with pytest.raises(LostWorkersError) as error:
      next(items)
    items._workers = set()
  assert str(error.value) == (f'worker 7 of 4 that read the images {how}: free memory, or set --config.data.workers=2')
  assert dead.kill.called and other.kill.called


def test_arrays_are_split_over_the_devices_ahead():
  devices = jax.devices()[:2]
  with Stream(train_batches(num_devices=2), 0, devices_lib.shared(devices)) as placed:
    batch = next(placed)
  assert [shard.data.shape for shard in batch['images'].addressable_shards] == [(1, 4, *SHAPE)] * 2


def test_number_of_workers(monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(3), raising=False)
  assert [num_workers(asked) for asked in (None, 0, 40)] == [3, 0, 40]
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(100))
  assert num_workers(None) == 16


def test_workers_end_with_a_killed_parent(tmp_path):
  program = """
    import time
    import numpy as np
    from paranet_jax.data.stream import Stream

    class Batches:
      def __len__(self):
        return 10**6
      def __getitem__(self, number):
        return np.full(3, number)

    if __name__ == '__main__':
      with Stream(Batches(), 1) as items:
        next(items)
        print('reading', flush=True)
        time.sleep(600)
  """
  (tmp_path / 'reader.py').write_text(textwrap.dedent(program))
  environment = os.environ | {'PYTHONPATH': str(Path(stream_lib.__file__).parents[2])}
  with subprocess.Popen(
    [sys.executable, tmp_path / 'reader.py'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
  ) as reader:
    assert reader.stdout.readline() == b'reading\n'
    os.kill(reader.pid, signal.SIGKILL)
    reader.communicate(timeout=20)  # Until the worker, too, has let go of the pipe.


SCRIPT = """
from paranet_jax.data import stream

def main():
  stream._check_main_guard()

"""
GUARDED = (
  "if __name__ == '__main__':\n  main()",
  "try:\n  if __name__ == '__main__':\n    main()\nfinally:\n  pass",
  "if not main:\n  pass\nelif '__main__' == __name__:\n  main()",
  "__name__ == '__main__' and main()",
  "main() if __name__ == '__main__' else None",
  "match __name__:\n  case '__main__':\n    main()",
)
UNGUARDED = 'main()', 'if True:\n  main()', 'for _ in range(1):\n  main()', 'main() or __name__'


def run_script(path, monkeypatch, content, module_name=None):
  """Runs it as Python does, and as the main module; module_name: as `python -m` does."""
  path.write_text(SCRIPT + content)
  module = types.ModuleType('__main__')
  module.__file__ = str(path)
  module.__spec__ = module_name and types.SimpleNamespace(name=module_name)
  monkeypatch.setitem(sys.modules, '__main__', module)
  exec(compile(path.read_text(), path, 'exec'), vars(module))


@pytest.mark.parametrize('module_name', [None, 'package.script'])
@pytest.mark.parametrize('content', UNGUARDED)
def test_a_script_without_a_main_guard_is_refused_before_its_workers_import_it(
  tmp_path, monkeypatch, content, module_name
):
  path = tmp_path / 'script.py'
  with pytest.raises(UserError) as error:
    run_script(path, monkeypatch, content, module_name)
  assert str(error.value) == (
    f"expected `if __name__ == '__main__':` around line {7 + content.count(chr(10))} of {path}, because the worker "
    'processes that read the images import it again; or set --config.data.workers=0'
  )


def test_streams_of_worker_processes_need_a_main_guard(monkeypatch):
  def refuse():
    raise UserError('no guard')

  monkeypatch.setattr(stream_lib, '_check_main_guard', refuse)
  with pytest.raises(UserError, match='no guard'):
    Stream(train_batches(), 1)
  assert multiprocessing.active_children() == []
  with Stream(train_batches(), 0) as items:
    next(items)


@pytest.mark.parametrize('content', GUARDED)
def test_a_script_with_a_main_guard(tmp_path, monkeypatch, content):
  run_script(tmp_path / 'script.py', monkeypatch, content)


def test_what_workers_do_not_import_needs_no_guard(tmp_path, monkeypatch):
  run_script(tmp_path / '__main__.py', monkeypatch, 'main()', 'package.__main__')
  namespace = vars(sys.modules['__main__'])
  namespace['__spec__'] = None
  exec(compile('main()', '<stdin>', 'exec'), namespace)  # After `python -i script.py`.


def test_a_script_that_cannot_be_read_again_is_not_refused(tmp_path, monkeypatch):
  """It was replaced while it ran: what its workers import is not known."""
  path = tmp_path / 'script.py'
  for then in ('write_text("if:")', 'write_bytes(b"\\0")'):
    run_script(path, monkeypatch, f'import pathlib\npathlib.Path(__file__).{then}\nmain()')
