"""Batches stages across requests: images that wait for the same stage go through it together.

One thread runs one stage at a time. An image that exits after it is answered at once; the others wait for the next
stage. The next stage to run is, in this order: one with an image that would be late otherwise; the deepest with a full
batch waiting; the one with the image that is due first. An image is due at its deadline, or after twice the time that a
full queue should take.

Deep images are therefore answered after others that came later. The watch sees answers in the order of arrival all the
same: in the order in which images are answered, early exits would come first, and look like images that change.
"""

import contextlib
import dataclasses
import math
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

_RUNS = 5
_NOTICEABLE = 0.02  # Seconds of waiting from which its length says how fast the service is.


class Full(Exception):
  """There is no room for that many images."""


class Answer(NamedTuple):
  """label: int; None: the image is unknown. probability: of that label, or the most probable one, calibrated. exit:
  1-based. seconds: from the request's arrival. held: the classes of its set, most probable first; None: without sets.
  free: neither a deadline nor a budget may have stopped it.
  """

  label: int | None
  probability: float
  exit: int
  seconds: float
  held: list[int] | None = None
  free: bool = True


class Timings:
  """Seconds that each visited stage should take, interpolated between two measured batch sizes.

  Attributes:
    visited: exit numbers, 1-based, increasing.
  """

  def __init__(self, one: Mapping[int, float], full: Mapping[int, float], batch: int):
    """one, full: seconds by exit number for one image and for a batch of them."""
    self.visited, self._one, self._full, self._batch = tuple(one), one, full, batch
    self._all_one, self._all_more = sum(one.values()), sum(max(full[number] - one[number], 0.0) for number in one)

  def seconds(self, number: int, count: int = 1) -> float:
    """The stage of exit `number` on `count` images."""
    share = (count - 1) / max(self._batch - 1, 1)
    return self._one[number] + share * max(self._full[number] - self._one[number], 0.0)

  def alone(self) -> dict[int, float]:
    """Seconds until a single image has passed each exit, by its number."""
    return dict(zip(self.visited, np.cumsum([self._one[number] for number in self.visited]).tolist(), strict=True))

  def all_stages(self, count: int) -> float:
    """All stages on `count` images."""
    return self._all_one + (count - 1) / max(self._batch - 1, 1) * self._all_more


def measure(bundle: Any, batch: int) -> Timings:
  """Times the visited stages of a bundle on this machine: medians of a few runs after a warm-up."""
  one, full = (_time_stages(bundle, size) for size in (1, batch))
  return Timings(one, full, batch)


def _time_stages(bundle: Any, size: int) -> dict[int, float]:
  seconds = {number: [] for number in bundle.visited}
  for _ in range(_RUNS + 1):
    carried = bundle.begin(np.zeros((size, *bundle.image_shape), np.uint8))
    for number in bundle.visited:
      started = time.perf_counter()
      carried, _ = bundle.stage(number)(carried)
      seconds[number].append(time.perf_counter() - started)
  return {number: statistics.median(runs[1:]) for number, runs in seconds.items()}


@dataclasses.dataclass(eq=False, slots=True)
class Place:
  """Of an image in the order of arrival. submitted: it has been. decided: what the watch sees of it is known: answer,
  as `Watch.add` takes it; None: nothing, since it failed, was not submitted, or may have been stopped."""

  submitted: bool = False
  decided: bool = False
  answer: tuple[int, float, int] | None = None


@dataclasses.dataclass(eq=False, slots=True)
class Waiting:
  """An image in the service. number: the exit that it waits for; last: the last one that it may reach; ahead: images
  admitted before it and not answered when it was submitted; free: its request has neither a deadline nor a budget."""

  image: np.ndarray
  arrived: float
  last: int
  deadline: float
  due: float
  number: int
  carried: dict[str, np.ndarray] | None = None
  reached: tuple[int | None, float, int, list[int] | None] | None = None
  ahead: int = 0
  free: bool = True
  place: Place | None = None
  answer: Future = dataclasses.field(default_factory=Future)


@dataclasses.dataclass(slots=True)
class Runs:
  """Totals of one stage: runs, images, seconds."""

  count: int = 0
  images: int = 0
  seconds: float = 0.0


class Pace:
  """How long images wait: what their stages should take by `Timings`, times a factor learned from answers.

  The factor covers early exits, which make it small, and decoding, HTTP and other programs, which make it large.
  """

  def __init__(self, timings: Timings, batch: int):
    self._timings, self._batch, self.factor = timings, batch, 1.0

  def wait(self, ahead: int) -> float:
    """Seconds until an image is answered that arrives after `ahead` others."""
    return self.factor * self._expected(ahead)

  def learn(self, ahead: int, seconds: float) -> None:
    """An image that arrived after `ahead` others took so long."""
    expected = self._expected(ahead)
    if expected >= _NOTICEABLE:
      self.factor += 0.05 * (min(max(seconds / expected, 1 / 16), 16.0) - self.factor)

  def _expected(self, count: int) -> float:
    full, rest = divmod(count, self._batch)
    return full * self._timings.all_stages(self._batch) + (self._timings.all_stages(rest) if rest else 0.0)


class Scheduler:
  """Answers images, at most `capacity` at a time. Every method but `step` is thread-safe.

  Attributes:
    runs: by exit number.
    exits: images answered, by exit number.
    seconds: from arrival to answer, summed over images.
    inside: images admitted and not released.
  """

  def __init__(
    self,
    runtime: ModuleType,
    bundle: Any,
    timings: Timings,
    capacity: int,
    batch: int,
    clock: Callable[[], float] = time.perf_counter,
    watch: Any = None,
    safe: bool = False,
  ):
    """
    Args:
      runtime: the bundle's run.py.
      bundle: what it loaded.
      batch: most images per run of a stage.
      clock: for arrivals and deadlines, in seconds.
      watch: the runtime's `Watch`, which sees all answers but those that a deadline or a budget may have changed, in
        the order of arrival. An answer is held until those to images that came before are known. No image waits for
        longer than three full queues should take, so those held are at most what the first stage answers in that time.
      safe: after an alarm of the watch, no image exits early.
    """
    self.watch, self._safe = watch, safe
    self._runtime, self._bundle, self._timings = runtime, bundle, timings
    self._capacity, self._batch, self._clock = capacity, batch, clock
    self._patience = 2 * timings.all_stages(batch) * math.ceil(capacity / batch)
    self._longest = max(timings.seconds(number, batch) for number in timings.visited)
    self._pools: dict[int, list[Waiting]] = {number: [] for number in timings.visited}
    self._next = dict(zip(timings.visited, timings.visited[1:], strict=False))
    self._arriving: list[Waiting] = []
    self._pace = Pace(timings, batch)
    self._places: deque[Place] = deque()  # From the first one that is not decided.
    self._seen: list[tuple[int, float, int]] = []
    self._labels: list[tuple[int, int]] = []
    self._changed, self._closing = threading.Condition(), False
    self._thread = threading.Thread(target=self._work, name='stages', daemon=True)
    self.runs = {number: Runs() for number in timings.visited}
    self.exits, self.seconds, self.inside = dict.fromkeys(timings.visited, 0), 0.0, 0

  def start(self) -> None:
    """Starts the thread."""
    self._thread.start()

  def alive(self) -> bool:
    """Whether submitted images will be answered."""
    return self._thread.is_alive()

  def close(self) -> None:
    """Ends the thread once every submitted image is answered."""
    with self._changed:
      self._closing = True
      self._changed.notify()
    if self._thread.is_alive():
      self._thread.join()

  def admit(self, count: int) -> None:
    """Reserves room for images; `release` frees it one at a time.

    Raises:
      Full: there is not enough.
    """
    with self._changed:
      if self.inside + count > self._capacity:
        raise Full
      self.inside += count

  def wait(self) -> float:
    """Seconds until an image that arrives now should be answered."""
    return self._pace.wait(self.inside)

  def release(self) -> None:
    """Frees the room of one image."""
    with self._changed:
      self.inside -= 1

  @contextlib.contextmanager
  def arrive(self, count: int) -> Iterator[list[Place]]:
    """Places for images that have arrived now, in their order, for `submit`.

    Decoding takes longer for some images than for others, so the order in which they are submitted depends on them.
    When the context ends, images that were not submitted have lost their places: no answer waits for them any more.
    """
    with self._changed:
      places = self._new_places(count)
    try:
      yield places
    finally:
      for place in places:
        if not place.submitted:
          place.decided = True

  def submit(
    self, image: np.ndarray, arrived: float, last: int, deadline: float = math.inf, place: Place | None = None
  ) -> 'Future[Answer]':
    """Queues an image.

    Args:
      image: uint8 [H, W, C].
      arrived: when its request arrived, by the clock.
      last: number of the last exit that it may reach, one of those visited.
      deadline: by the clock. A stage starts only if it should finish by then, except the first.
      place: one of those of `arrive`; None: it has arrived now.

    Returns:
      Its future answer, or the exception of the stage that failed.

    Raises:
      Full: `close` was called, or the thread has ended.
    """
    sample = Waiting(image, arrived, last, deadline, min(deadline, arrived + self._patience), self._timings.visited[0])
    sample.answer.set_running_or_notify_cancel()
    sample.ahead, sample.free = max(self.inside - 1, 0), last == self._timings.visited[-1] and deadline == math.inf
    with self._changed:
      if self._closing:
        raise Full
      sample.place = place or self._new_places(1)[0]
      sample.place.submitted = True
      if not sample.free:
        sample.place.decided = True
      self._arriving.append(sample)
      self._changed.notify()
    return sample.answer

  def _new_places(self, count: int) -> list[Place]:
    places = [Place() for _ in range(count)]
    if self.watch:
      self._places += places
    return places

  def takes_labels(self) -> bool:
    """Whether the watch tests errors, too."""
    return getattr(self.watch, 'takes_labels', False)

  def record(self, labels: Sequence[tuple[int, int]]) -> None:
    """Shows the watch the right class of images, each with the one that was answered."""
    with self._changed:
      self._labels += labels
      self._changed.notify()

  def step(self) -> bool:
    """Runs one stage for some waiting images; False if none waits. Only the thread calls it."""
    with self._changed:
      arriving, self._arriving = self._arriving, []
    self._pools[self._timings.visited[0]] += arriving
    now = self._clock()
    for sample in self._waiting():
      self._drop_if_late(sample, now)
    if not any(self._pools.values()):
      return False
    number = self._choose(now)
    chosen = self._take(number, now)
    then = now + self._timings.seconds(number, len(chosen))
    for sample in self._waiting():
      if sample.reached:
        self._drop_if_late(sample, then)
    self._run(number, chosen)
    self._advance()
    if self.watch and len(self._seen) >= self.watch.BLOCK:
      self._watched()
    return True

  def _work(self) -> None:
    try:
      self._work_until_closed()
    finally:  # If that ever fails, no request waits forever.
      with self._changed:
        self._closing = True
      for sample in [*self._waiting(), *self._arriving]:
        sample.answer.set_exception(RuntimeError('the thread of the stages has ended'))

  def _work_until_closed(self) -> None:
    while True:
      with self._changed:
        self._changed.wait_for(lambda: self._arriving or self._labels or self._closing)
        closing = self._closing
      while self.step():
        pass
      if closing or self._labels:
        self._watched(closing)
      if closing:
        return

  def _waiting(self) -> list[Waiting]:
    return [sample for pool in self._pools.values() for sample in pool]

  def _drop_if_late(self, sample: Waiting, now: float) -> None:
    """Answers an image that has no time for another stage; one that has passed none goes through the first only."""
    if now + self._timings.seconds(sample.number) <= sample.deadline:
      return
    if sample.reached:
      self._pools[sample.number].remove(sample)
      self._answer(sample)
    else:
      sample.last, sample.deadline, sample.due = sample.number, math.inf, sample.arrived + self._patience

  def _choose(self, now: float) -> int:
    first = min(self._waiting(), key=lambda sample: sample.due)
    if now + self._longest + self._timings.seconds(first.number) > first.due:
      return first.number
    full = [number for number, pool in self._pools.items() if len(pool) >= self._batch]
    return full[-1] if full else first.number

  def _take(self, number: int, now: float) -> list[Waiting]:
    """The images due first, as many as a batch can finish before the earliest of their deadlines."""
    pool = sorted(self._pools[number], key=lambda sample: sample.due)
    count = min(len(pool), self._batch)
    while count > 1 and now + self._timings.seconds(number, count) > min(sample.deadline for sample in pool[:count]):
      count -= 1
    self._pools[number] = pool[count:]
    return pool[:count]

  def _run(self, number: int, chosen: Sequence[Waiting]) -> None:
    started, no = time.perf_counter(), [False] * len(chosen)
    try:
      carried, logits = self._bundle.stage(number)(self._carried(chosen))
      leave = self._bundle.leaves(number, logits, carried)
      found = self._bundle.answers(number, logits)
      unknown, held = getattr(found, 'unknown', no), self._sets(found, chosen)  # Older bundles have neither.
      seconds = time.perf_counter() - started
      exits = [bool(leave[row]) or number == sample.last for row, sample in enumerate(chosen)]
      # A list of rows copies them; a view would keep the whole batch in memory, of which little may be left.
      rests = [None if exit else self._runtime.select(carried, [row]) for row, exit in enumerate(exits)]
    except Exception as error:  # It fails these images only.
      for sample in chosen:
        sample.place.decided = True
        sample.answer.set_exception(error)
      return
    runs = self.runs[number]
    runs.count, runs.images = runs.count + 1, runs.images + len(chosen)
    runs.seconds += seconds
    labels, most = np.asarray(found.labels).tolist(), found.probabilities.max(-1).tolist()
    for row, sample in enumerate(chosen):
      sample.reached = None if unknown[row] else labels[row], most[row], number, held[row]
      if exits[row]:
        if self.watch and sample.free:
          sample.place.answer = number, most[row], int(found.probabilities[row].argmax())
          sample.place.decided = True
        self._answer(sample)
      else:
        sample.carried, sample.number = rests[row], self._next[number]
        self._pools[sample.number].append(sample)

  def _advance(self, closing: bool = False) -> None:
    """Takes the places before the first one that is not decided, all when closing: no other image is answered then."""
    with self._changed:  # Requests add places.
      while self._places and (closing or self._places[0].decided):
        if answer := self._places.popleft().answer:
          self._seen.append(answer)

  def _watched(self, closing: bool = False) -> None:
    """Shows the watch what was answered. A watch that fails is given up, unless it alarms; images are answered."""
    self._advance(closing)
    seen, self._seen = self._seen, []
    with self._changed:
      labels, self._labels = self._labels, []
    if not self.watch:
      return
    before, failed = self.watch.alarm, False
    try:
      self.watch.add(seen)
      nothing = np.zeros(len(self._bundle.class_names)) if labels else None
      for right, answered in labels:
        self.watch.record(right, self._runtime.Prediction(answered, nothing, 0, 0))
      if closing:  # Not before all is answered: which answers are in a block must not depend on them.
        self.watch.flush()
    except Exception as error:  # The state cannot be written.
      print(f'the watch ends: {error}', file=sys.stderr, flush=True)
      failed = True
    if self.watch.alarm and not before:
      self.on_alarm()
    if failed and not self.watch.alarm:
      self.watch = None

  def on_alarm(self) -> None:
    """Says that the watch has alarmed, and lets no image exit early if that was asked for."""
    print(self.watch.line(), file=sys.stderr, flush=True)
    if self._safe:
      self._bundle = self._bundle.safe()

  def _sets(self, found: Any, chosen: Sequence[Waiting]) -> list[list[int] | None]:
    """The set of each answer, as is valid under the deadline or budget of its request."""
    if getattr(self._bundle, 'coverage', None) is None:
      return [None] * len(chosen)
    calibrated, capped = (self._bundle.sets(found, any_exit) for any_exit in (False, True))
    return [
      self._runtime.ranked_classes((calibrated if sample.free else capped)[row], found.probabilities[row])
      for row, sample in enumerate(chosen)
    ]

  def _carried(self, chosen: Sequence[Waiting]) -> dict[str, np.ndarray]:
    if chosen[0].carried is None:
      return self._bundle.begin(np.stack([sample.image for sample in chosen]))
    return self._runtime.join([sample.carried for sample in chosen])

  def _answer(self, sample: Waiting) -> None:
    seconds = self._clock() - sample.arrived
    self.exits[sample.reached[2]] += 1
    self.seconds += seconds
    self._pace.learn(sample.ahead, seconds)
    *answer, held = sample.reached
    sample.answer.set_result(Answer(*answer, seconds, held, sample.free))
