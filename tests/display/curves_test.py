"""Tests of the picture of a run."""

import json

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

from paranet_jax.display.curves import curves_figure, draw_curves
from paranet_jax.host.errors import UserError

BLUE, VERMILLION, GREEN = '#0072b2', '#d55e00', '#009e73'


def write_metrics(workdir, records):
  (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))


def record(step, split, **values):
  return {'step': step, 'epoch': step / 10, 'split': split} | {
    key.replace('exit', 'exit_').replace('__', '/'): value for key, value in values.items()
  }


def curves(axes) -> list[tuple]:
  return [(to_hex(line.get_color()), line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines]


def legend(figure) -> list[str]:
  return [text.get_text() for entry in figure.legends for text in entry.get_texts()]


def test_each_exit_and_split_has_its_curve(tmp_path):
  write_metrics(
    tmp_path,
    [
      record(5, 'train', exit1__nll=4.0, exit3__nll=3.0, exit1__accuracy=0.25, exit3__accuracy=0.5, learning_rate=0.1),
      record(20, 'test', exit1__nll=2.0, exit1__accuracy=0.75),
      record(10, 'test', exit1__nll=3.0, exit1__accuracy=0.5),
      record(10, 'held_out', exit3__nll=1.0, exit3__accuracy=1.0),
    ],
  )
  figure = curves_figure(tmp_path)
  loss, accuracy = figure.axes
  # Training below, test on top; a test of an earlier checkpoint is put in its place.
  assert curves(loss) == [
    (BLUE, [0.5], [4.0]),
    (GREEN, [0.5], [3.0]),
    (GREEN, [1.0], [1.0]),
    (BLUE, [1.0, 2.0], [3.0, 2.0]),
  ]
  assert curves(accuracy) == [
    (BLUE, [0.5], [25.0]),
    (GREEN, [0.5], [50.0]),
    (GREEN, [1.0], [100.0]),
    (BLUE, [1.0, 2.0], [50.0, 75.0]),
  ]
  assert [axes.get_xlabel() for axes in figure.axes] == ['epoch', 'epoch']
  assert [axes.get_ylabel() for axes in figure.axes] == ['cross-entropy (nats)', 'accuracy (%)']
  assert legend(figure) == ['exit 1', 'exit 3', 'train', 'held out', 'test']


def test_loss_takes_the_place_of_absent_nll_and_the_axis_says_so(tmp_path):
  write_metrics(tmp_path, [record(5, 'train', exit1__loss=9.0), record(10, 'test', exit1__loss=8.0, exit1__nll=2.0)])
  axes = curves_figure(tmp_path).axes[0]
  assert curves(axes) == [(BLUE, [0.5], [9.0]), (BLUE, [1.0], [2.0])]
  assert axes.get_ylabel() == 'loss'


def test_without_labels_the_agreement_is_drawn(tmp_path):
  write_metrics(tmp_path, [record(5, 'train', exit1__loss=9.0), record(10, 'test', exit1__agreement=0.5)])
  loss, agreement = curves_figure(tmp_path).axes
  assert curves(loss) == [(BLUE, [0.5], [9.0])]
  assert curves(agreement) == [(BLUE, [1.0], [50.0])]
  assert agreement.get_ylabel() == 'same answer as the last exit (%)'


def test_a_null_is_a_gap_and_an_exit_of_nulls_is_left_out(tmp_path):
  values = ((10, 1.0, None), (20, None, None), (30, 2.0, None))
  write_metrics(tmp_path, [record(step, 'test', exit1__nll=first, exit2__nll=second) for step, first, second in values])
  figure = curves_figure(tmp_path)
  (line,) = figure.axes[0].lines
  np.testing.assert_array_equal(line.get_ydata(), [1.0, np.nan, 2.0])
  assert legend(figure) == ['exit 1', 'test']


@pytest.mark.parametrize(('split', 'points'), [('train', 300), ('test', 600)])
def test_only_long_training_curves_are_averaged(tmp_path, split, points):
  # Two neighbors 2i and 2i + 1 average to 2i + 0.5.
  write_metrics(tmp_path, [record(10 * step, split, exit1__nll=step) for step in range(600)])
  ((_, x, y),) = curves(curves_figure(tmp_path).axes[0])
  assert x == y == ([2 * i + 0.5 for i in range(300)] if split == 'train' else list(range(600)))
  assert len(x) == points


@pytest.mark.parametrize(('count', 'marker'), [(1, 'o'), (40, 'o'), (41, 'None')])
def test_few_evaluations_are_marked(tmp_path, count, marker):
  write_metrics(tmp_path, [record(step, 'test', exit1__nll=1.0) for step in range(count)])
  assert curves_figure(tmp_path).axes[0].lines[0].get_marker() == marker


@pytest.mark.parametrize(('last', 'scale'), [(0.5, 'linear'), (0.3, 'log'), (0.0, 'linear')])
def test_losses_over_a_factor_of_ten_are_drawn_logarithmically(tmp_path, last, scale):
  write_metrics(tmp_path, [record(1, 'test', exit1__nll=4.6), record(2, 'test', exit1__nll=last)])
  assert curves_figure(tmp_path).axes[0].get_yscale() == scale


@pytest.mark.parametrize(
  ('config', 'title'),
  [
    ({'name': 'PN3-x3d', 'data': {'name': 'cifar100'}}, 'PN3-x3d on cifar100'),
    ({'name': 'PN3-x3d'}, 'PN3-x3d'),
    ({}, 'my-run'),
    (None, 'my-run'),
  ],
)
def test_the_title_names_the_run(tmp_path, config, title):
  workdir = tmp_path / 'my-run'
  workdir.mkdir()
  if config is not None:
    (workdir / 'config.json').write_text(json.dumps(config))
  assert curves_figure(workdir).get_suptitle() == title


def test_panels_without_measurements_say_so(tmp_path):
  write_metrics(tmp_path, [record(1, 'test', exit1__accuracy=0.5)])
  loss, accuracy = curves_figure(tmp_path).axes
  assert [text.get_text() for text in loss.texts] == ['nothing measured']
  assert not accuracy.texts


def test_the_picture_is_written_and_replaced_as_a_whole(tmp_path, monkeypatch):
  write_metrics(tmp_path, [record(step, 'test', exit2__nll=step, exit2__accuracy=step / 100) for step in (1, 9)])
  path = draw_curves(tmp_path)
  assert path == tmp_path / 'curves.png'
  pixels = np.rint(imread(path)[..., :3] * 255)
  assert pixels.shape == (720, 1500, 3)
  # Vermillion, the color of exit 2, and not the blue of exit 1.
  assert (pixels == (0xD5, 0x5E, 0x00)).all(-1).sum() > 1000
  assert not (pixels == (0x00, 0x72, 0xB2)).all(-1).any()
  assert sorted(entry.name for entry in tmp_path.iterdir()) == ['curves.png', 'metrics.jsonl']

  def fail_half_way(self, temporary, **kwargs):
    temporary.write(b'half')
    raise OSError('disk full')

  before = path.read_bytes()
  monkeypatch.setattr(Figure, 'savefig', fail_half_way)
  with pytest.raises(OSError, match='disk full'):
    draw_curves(tmp_path)
  assert path.read_bytes() == before


def test_unreadable_measurements_are_refused(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('nonsense\n')
  with pytest.raises(UserError, match="found 'nonsense' on line 1"):
    draw_curves(tmp_path)


def test_a_users_style_does_not_reach_the_picture(tmp_path):
  write_metrics(tmp_path, [record(10, 'test', exit1__loss=1.0, exit1__accuracy=0.5)])
  plain = draw_curves(tmp_path).read_bytes()
  with matplotlib.rc_context({'text.usetex': True, 'axes.facecolor': 'red', 'savefig.facecolor': 'red'}):
    assert draw_curves(tmp_path).read_bytes() == plain
    assert matplotlib.rcParams['text.usetex']
