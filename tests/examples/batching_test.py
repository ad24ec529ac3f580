"""Tests of the scheduler: which stage runs next on which images, and when they are answered, by a clock of the test."""

import math
import threading
import types

import numpy as np
import pytest
from batching import Full, Pace, Scheduler, Timings, measure

from paranet_jax.portable import run

BATCH = 4
ONE, FULL = {1: 1.0, 2: 2.0, 3: 4.0}, {1: 2.5, 2: 5.0, 3: 10.0}
PATIENCE = 2 * (2.5 + 5 + 10) * 2  # Twice what the eight images of a full queue take, in batches of four.
CLASSES = 256


class Bundle:
  """Images are (label, exit); a stage advances the clock by the time it should take."""

  visited, image_shape = (1, 2, 3), (1, 1, 2)

  def __init__(self):
    self.now, self.log, self.broken = 0.0, [], None

  def clock(self):
    return self.now

  def begin(self, images):
    return {'images': images}

  def stage(self, number):
    def stage(carried):
      labels = carried['images'][:, 0, 0, 0]
      self.log.append((number, labels.tolist()))
      self.now += ONE[number] + (len(labels) - 1) * (FULL[number] - ONE[number]) / (BATCH - 1)
      if number == self.broken:
        raise ArithmeticError('broken')
      return carried, np.eye(CLASSES, dtype=np.float32)[labels] * 10

    return stage

  def leaves(self, number, logits, carried):
    return carried['images'][:, 0, 0, 1] <= number

  def answers(self, number, logits):
    ones = np.ones(len(logits), int)
    return run.Predictions(logits.argmax(-1), run.softmax(logits, 1), ones * number, ones)


class Queue:
  """A scheduler that the test steps."""

  def __init__(self):
    self.bundle = Bundle()
    self.scheduler = Scheduler(run, self.bundle, Timings(ONE, FULL, BATCH), 2 * BATCH, BATCH, self.bundle.clock)

  def send(self, label, sure=3, last=3, deadline=math.inf, place=None):
    return self.scheduler.submit(np.array([[[label, sure]]], np.uint8), self.bundle.now, last, deadline, place)

  def finish(self):
    while self.scheduler.step():
      pass
    return self.bundle.log


@pytest.fixture
def queue():
  return Queue()


def test_images_at_the_same_stage_are_batched(queue):
  answers = [queue.send(label, sure=3 if label % 2 else 1) for label in range(8)]
  queue.scheduler.step()
  assert [answer.done() for answer in answers] == [True, False] * 2 + [False] * 4
  assert queue.finish() == [(1, [0, 1, 2, 3]), (1, [4, 5, 6, 7]), (2, [1, 3, 5, 7]), (3, [1, 3, 5, 7])]
  assert [answer.result(0)[:3:2] for answer in answers] == [(label, 3 if label % 2 else 1) for label in range(8)]
  assert answers[0].result(0).seconds == 2.5 and answers[7].result(0).seconds == 2.5 + 2.5 + 5 + 10
  assert answers[0].result(0).probability == pytest.approx(math.exp(10) / (math.exp(10) + CLASSES - 1))
  assert queue.scheduler.exits == {1: 4, 2: 0, 3: 4}
  assert queue.scheduler.seconds == 2 * 2.5 + 2 * 5 + 4 * 20
  counts = {number: (runs.count, runs.images) for number, runs in queue.scheduler.runs.items()}
  assert counts == {1: (2, 8), 2: (1, 4), 3: (1, 4)}


def test_the_deepest_full_batch_goes_first(queue):
  for label in range(8):
    queue.send(label)
  assert [number for number, _ in queue.finish()] == [1, 2, 3, 1, 2, 3]


def test_without_a_full_batch_the_oldest_goes_first(queue):
  queue.send(0)
  queue.scheduler.step()
  queue.send(1)
  assert queue.finish() == [(1, [0]), (2, [0]), (3, [0]), (1, [1]), (2, [1]), (3, [1])]


@pytest.mark.parametrize(('late_by', 'chosen'), [(-0.1, (1, [1, 2, 3, 4])), (0.1, (2, [0]))])
def test_an_image_that_waited_long_goes_before_a_full_batch(queue, late_by, chosen):
  queue.send(0)
  queue.scheduler.step()
  queue.bundle.now = PATIENCE - FULL[3] - ONE[2] + late_by
  for label in range(1, 5):
    queue.send(label)
  queue.scheduler.step()
  assert queue.bundle.log[-1] == chosen


@pytest.mark.parametrize(
  ('deadline', 'exit', 'seconds'),
  [(0.5, 1, 1), (1, 1, 1), (2.9, 1, 1), (3, 2, 3), (6.9, 2, 3), (7, 3, 7), (99, 3, 7)],
)
def test_a_stage_that_would_be_late_does_not_start(queue, deadline, exit, seconds):
  answer = queue.send(9, deadline=deadline)
  assert queue.finish() == [(number, [9]) for number in range(1, exit + 1)]
  assert (answer.result(0).exit, answer.result(0).seconds) == (exit, seconds)


def test_a_confident_image_exits_before_its_deadline(queue):
  answer = queue.send(9, sure=2, deadline=99)
  queue.finish()
  assert answer.result(0).exit == 2


def test_a_batch_is_small_enough_for_the_first_deadline_in_it(queue):
  for label in range(3):
    queue.send(label)
  queue.send(3, deadline=2.0)
  queue.scheduler.step()
  assert queue.bundle.log == [(1, [3, 0, 1])]


def test_an_image_that_is_late_anyway_shrinks_no_batch(queue):
  for label in range(3):
    queue.send(label)
  late = queue.send(3, deadline=0.1)
  queue.scheduler.step()
  assert queue.bundle.log == [(1, [0, 1, 2, 3])]
  assert late.result(0).exit == 1


def test_an_image_that_the_next_stage_would_make_late_is_answered_first(queue):
  first = queue.send(0, deadline=3.9)
  queue.scheduler.step()
  queue.send(1, deadline=3.5)
  queue.scheduler.step()
  assert queue.bundle.log == [(1, [0]), (1, [1])]
  assert (first.result(0).exit, first.result(0).seconds) == (1, 1)


@pytest.mark.parametrize('last', [1, 2, 3])
def test_no_image_passes_its_last_exit(queue, last):
  answer = queue.send(5, last=last)
  queue.finish()
  assert answer.result(0).exit == last


def test_a_failing_stage_fails_its_images_only(queue):
  queue.bundle.broken = 2
  answers = [queue.send(label, sure=3 if label else 1) for label in range(5)]
  queue.finish()
  assert answers[0].result(0).exit == 1
  for answer in answers[1:]:
    with pytest.raises(ArithmeticError, match='broken'):
      answer.result(0)
  queue.bundle.broken = None
  after = queue.send(7)
  queue.finish()
  assert after.result(0).label == 7
  assert queue.scheduler.exits == {1: 1, 2: 0, 3: 1}


def test_features_that_do_not_fit_in_memory_fail_their_batch_only(queue, monkeypatch):
  def select(carried, rows):
    raise MemoryError('no room')

  with monkeypatch.context() as short:
    short.setattr(run, 'select', select)
    answers = [queue.send(label, sure=3) for label in range(2)]
    queue.finish()
  for answer in answers:
    with pytest.raises(MemoryError, match='no room'):
      answer.result(0)
  after = queue.send(7)
  queue.finish()
  assert after.result(0).label == 7


def test_room(queue):
  queue.scheduler.admit(5)
  with pytest.raises(Full):
    queue.scheduler.admit(4)
  queue.scheduler.admit(3)
  queue.scheduler.release()
  queue.scheduler.admit(1)
  assert queue.scheduler.inside == 8


def test_the_thread_answers_every_image_before_it_closes(queue):
  answers = {}

  def send(offset):
    for label in range(offset, CLASSES, 8):
      answers[label] = queue.send(label, sure=1 + label % 3)

  threads = [threading.Thread(target=send, args=(offset,)) for offset in range(8)]
  assert not queue.scheduler.alive()
  queue.scheduler.start()
  assert queue.scheduler.alive()
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  queue.scheduler.close()
  assert not queue.scheduler.alive()
  assert {label: answer.result(0)[:3:2] for label, answer in answers.items()} == {
    label: (label, 1 + label % 3) for label in range(CLASSES)
  }
  with pytest.raises(Full):
    queue.send(0)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_a_thread_that_ended_fails_what_waits(queue):
  answer = queue.send(0)
  del queue.bundle.now
  queue.scheduler.start()
  with pytest.raises(RuntimeError, match='the thread of the stages has ended'):
    answer.result(60)
  queue.bundle.now = 0
  with pytest.raises(Full):
    queue.send(0)
  queue.scheduler.close()
  assert not queue.scheduler.alive()


def test_the_wait_is_what_stages_should_take_until_answers_say_otherwise():
  pace = Pace(Timings(ONE, FULL, BATCH), BATCH)
  assert [pace.wait(ahead) for ahead in (0, 1, 4, 9)] == [0, 7, 17.5, 2 * 17.5 + 7]
  for _ in range(500):
    pace.learn(4, 8.75)  # Half, since images exit early.
  assert pace.wait(8) == pytest.approx(17.5)
  pace.learn(0, 1e6)  # It waited for none.
  assert pace.wait(8) == pytest.approx(17.5)
  pace.learn(4, 1e6)
  assert pace.wait(8) < 50


def test_the_scheduler_learns_how_long_images_wait(queue):
  assert queue.scheduler.wait() == 0
  for label in range(8):
    queue.scheduler.admit(1)
    queue.send(label, sure=1)
  assert queue.scheduler.wait() == 35
  queue.finish()  # Takes 5.
  for _ in range(8):
    queue.scheduler.release()
  assert queue.scheduler.wait() == 0
  queue.scheduler.admit(8)
  assert 5 < queue.scheduler.wait() < 30


def test_timings():
  timings = Timings(ONE, FULL, BATCH)
  assert [timings.seconds(2, count) for count in (1, 2, 4)] == [2, 3, 5]
  assert timings.alone() == {1: 1, 2: 3, 3: 7}
  assert timings.all_stages(4) == 17.5
  assert Timings(ONE, {1: 0.9} | FULL, 1).seconds(3) == 4


def test_stages_are_measured_in_turn_at_both_sizes():
  bundle = Bundle()
  timings = measure(bundle, BATCH)
  assert timings.visited == (1, 2, 3)
  assert bundle.log == [(number, [0] * size) for size in (1, BATCH) for _ in range(6) for number in (1, 2, 3)]
  assert all(timings.seconds(number) > 0 for number in timings.visited)


class Promising(Bundle):
  """Images of odd labels are unknown; the set is the label, or all classes where a deadline or a budget stopped it."""

  coverage = 0.9

  def answers(self, number, logits):
    found = super().answers(number, logits)
    return found._replace(labels=np.where(found.labels % 2, CLASSES, found.labels))

  def sets(self, answers, any_exit):
    return np.full(answers.probabilities.shape, True) if any_exit else answers.probabilities > 0.01


class Watching:
  """A watch that alarms at the fourth answer."""

  BLOCK = 2

  def __init__(self):
    self.seen, self.alarm, self.flushed = [], None, False

  def add(self, answers):
    self.seen += answers
    self.alarm = 'now' if len(self.seen) >= 4 else None

  def flush(self):
    self.flushed = True

  def line(self):
    return 'drift'


def test_a_watch_sees_what_nothing_forced(queue, capsys):
  queue.scheduler.watch = watch = Watching()
  for label, how in ((1, {}), (2, {'sure': 1}), (3, {'last': 2}), (4, {'deadline': 1e9})):
    queue.send(label, **how)
  queue.finish()
  assert [(exit, label) for exit, _, label in watch.seen] == [(3, 1), (1, 2)]
  assert watch.seen[0][1] == pytest.approx(math.exp(10) / (math.exp(10) + CLASSES - 1))
  assert capsys.readouterr().err == ''
  queue.scheduler._safe = True
  queue.bundle.safe = lambda: 'safe'
  queue.send(5), queue.send(6)
  queue.scheduler.step(), queue.scheduler.step(), queue.scheduler.step()
  assert queue.scheduler._bundle == 'safe' and capsys.readouterr().err == 'drift\n'


class Listing(Watching):
  """A watch that lists the labels that it was shown, each at once, and never alarms."""

  BLOCK = 1

  def add(self, answers):
    self.seen += [label for _, _, label in answers]


@pytest.mark.parametrize(
  ('how', 'broken', 'at_first', 'in_the_end'),
  [
    ({}, None, [], [0, 1, 2, 3]),
    ({}, 2, [], [1, 2, 3]),
    ({'deadline': 1e9}, None, [1, 2, 3], [1, 2, 3]),
    ({'deadline': 4.0}, None, [1, 2, 3], [1, 2, 3]),
    ({'last': 2}, None, [1, 2, 3], [1, 2, 3]),
  ],
  ids=['counts', 'fails', 'deadline', 'late', 'budget'],
)
def test_answers_wait_for_an_earlier_one_if_it_counts(queue, how, broken, at_first, in_the_end):
  queue.scheduler.watch, queue.bundle.broken = watch, _ = Listing(), broken
  deep = queue.send(0, **how)
  for label in (1, 2, 3):
    queue.send(label, sure=1)
  queue.scheduler.step()
  assert watch.seen == at_first and not deep.done()
  queue.finish()
  assert watch.seen == in_the_end and deep.done() and not queue.scheduler._places


def test_images_are_in_the_order_of_their_requests_whichever_is_submitted_first(queue):
  queue.scheduler.watch = watch = Listing()
  with queue.scheduler.arrive(3) as first, queue.scheduler.arrive(2) as second:
    for label, place in ((4, second[1]), (1, first[1]), (3, second[0])):
      queue.send(label, sure=1, place=place)
    queue.send(5, sure=1)
    queue.finish()
    assert watch.seen == []  # One is being decoded.
    queue.send(0, place=first[0])
    queue.finish()
    assert watch.seen == [0, 1]
  queue.send(6, sure=1)
  queue.finish()
  assert watch.seen == [0, 1, 3, 4, 5, 6]  # The third image of the first request was refused.


def test_a_request_that_is_cancelled_loses_only_places_of_images_not_submitted(queue):
  queue.scheduler.watch = watch = Listing()
  with pytest.raises(ArithmeticError), queue.scheduler.arrive(2) as places:
    queue.send(0, place=places[0])
    raise ArithmeticError
  queue.send(1, sure=1)
  queue.scheduler.step()
  assert watch.seen == []
  queue.finish()
  assert watch.seen == [0, 1]


def test_a_close_shows_what_is_known_and_tests_it_last(queue):
  queue.scheduler.watch = watch = Listing()
  flushed, add = [], watch.add
  watch.add = lambda answers: (flushed.append(watch.flushed), add(answers))
  queue.send(0, sure=1), queue.send(1)
  with queue.scheduler.arrive(1):
    queue.send(2)
    queue.scheduler.close()  # The thread finds it closed when it starts.
    queue.scheduler.start()
    queue.scheduler.close()
    assert watch.seen == [0, 1, 2] and watch.flushed
  assert flushed == [False] * 3 and not queue.scheduler._places


def test_the_order_of_arrival_with_many_threads(queue):
  queue.scheduler.watch = watch = Listing()

  def send(offset):
    for label in range(offset, CLASSES, 16):
      with queue.scheduler.arrive(2) as places:
        queue.send(label + 8, sure=1 + label % 3, place=places[1])
        queue.send(label, sure=1 + label % 2, place=places[0])

  threads = [threading.Thread(target=send, args=(offset,)) for offset in range(8)]
  queue.scheduler.start()
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  queue.scheduler.close()
  assert sorted(watch.seen) == list(range(CLASSES))
  for offset in range(8):
    assert [label for label in watch.seen if label % 8 == offset] == list(range(offset, CLASSES, 8))


@pytest.mark.parametrize('shares', [(0.9, 0.08, 0.02), (0.8, 0.15, 0.05)])
@pytest.mark.parametrize('seed', [0, 1])
def test_a_full_queue_looks_like_no_change(shares, seed):
  """While the first stage always has a full batch, images that go deeper wait, and others are answered meanwhile."""
  rng, bundle, (capacity, batch, count) = np.random.default_rng(seed), Bundle(), (256, 64, 64 * run.Watch.BLOCK)

  def draw(images):
    return np.stack([rng.integers(0, CLASSES, images), 1 + rng.choice(3, images, p=shares)], 1).astype(np.uint8)

  labels, exits = draw(2000).T
  calibrated = [[int(found)] for found in np.bincount(exits, minlength=4)[1:]]
  classes = np.bincount(labels, minlength=CLASSES).tolist()
  seen = {'images': 2000, 'edges': [[], [], []], 'counts': calibrated, 'classes': classes, 'wrong': None}
  plan = types.SimpleNamespace(_seen=seen, exits=(1, 2, 3), macs={1: 1, 2: 2, 3: 3}, _identity='', rejects=False)
  watch, by_completion, shown, answered = run.Watch(plan), run.Watch(plan), [], []
  add = watch.add
  watch.add = lambda answers: (shown.extend(answers), add(answers))
  scheduler = Scheduler(run, bundle, Timings(ONE, FULL, BATCH), capacity, batch, bundle.clock, watch)
  images, sent, held = draw(count), 0, 0
  while len(answered) < count:
    for image in images[sent : len(answered) + capacity]:
      scheduler.submit(image[None, None], bundle.now, 3).add_done_callback(lambda done: answered.append(done.result()))
    sent = min(len(answered) + capacity, count)
    scheduler.step()
    held = max(held, len(scheduler._places))
  scheduler._watched()
  assert [[label, exit] for exit, _, label in shown] == images.tolist()
  assert (watch.alarm, watch.images) == (None, count)
  # An image waits for at most three full queues of four batches, in which all stages take as long as seven first ones.
  assert capacity < held <= 3 * 4 * (1 + 2 + 4) * batch
  by_completion.add((answer.exit, answer.probability, answer.label) for answer in answered)
  assert by_completion.alarm  # The order is what matters.


def test_labels_go_to_the_watch_in_its_thread(queue):
  assert not queue.scheduler.takes_labels()
  watch, recorded = Watching(), []
  watch.takes_labels, watch.record = True, lambda right, answer: recorded.append((right, answer.label, answer.unknown))
  queue.scheduler.watch, queue.bundle.class_names = watch, 'abcdefgh'
  queue.scheduler.start()
  queue.scheduler.record([(1, 1), (2, 7)])
  assert queue.scheduler.takes_labels()
  queue.scheduler.close()
  assert recorded == [(1, 1, False), (2, 7, False)] and watch.flushed


def test_a_watch_that_fails_is_given_up(queue, capsys):
  queue.scheduler.watch = Watching()
  queue.scheduler.watch.add = lambda answers: (_ for _ in ()).throw(OSError('no space'))
  answers = [queue.send(label) for label in range(4)]
  queue.finish()
  assert all(answer.result(0).label == label for label, answer in enumerate(answers))
  assert queue.scheduler.watch is None and capsys.readouterr().err == 'the watch ends: no space\n'


def test_an_alarm_that_cannot_be_saved_is_one(queue, capsys):
  queue.scheduler.watch, queue.scheduler._safe = (watch := Watching()), True
  made_safe = object()
  queue.bundle.safe = lambda: made_safe

  def add(answers):
    watch.alarm = 'now'
    raise OSError('no space')

  watch.add = add
  queue.send(1), queue.send(2)
  queue.finish()
  assert queue.scheduler.watch is watch and queue.scheduler._bundle is made_safe
  assert capsys.readouterr().err == 'the watch ends: no space\ndrift\n'


def test_unknown_images_and_sets(queue):
  queue.scheduler._bundle = queue.bundle = Promising()
  queue.scheduler._clock = queue.bundle.clock
  free, capped, late = (queue.send(4, **how) for how in ({}, {'last': 2}, {'deadline': 9.0}))
  unknown, hurried = queue.send(5), queue.send(6, deadline=0.5)
  queue.finish()
  assert [answer.result(0).label for answer in (free, capped, late, unknown, hurried)] == [4, 4, 4, None, 6]
  assert (free.result(0).held, unknown.result(0).held) == ([4], [5])
  assert unknown.result(0).probability == pytest.approx(math.exp(10) / (math.exp(10) + CLASSES - 1))
  assert [len(answer.result(0).held) for answer in (capped, late, hurried)] == [CLASSES] * 3
