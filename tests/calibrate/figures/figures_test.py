"""The figures of a calibrated run: what they show, that they are legible, and how they are written."""

import csv
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from paranet_jax.calibrate import figures
from paranet_jax.calibrate.figures import write_figures
from paranet_jax.calibrate.figures.contact_sheet import contact_sheet
from paranet_jax.calibrate.figures.drawings import anytime, budgeted, cost_scale, histogram, reliability, risk
from paranet_jax.calibrate.figures.figure_data import (
  SPLITS,
  Bins,
  Curve,
  FigureData,
  Reliability,
  Risk,
  RiskCurve,
  Sheet,
)
from paranet_jax.display.tables import short_name

LONG = 'a long name of a run that contains all hyperparameters, in $dollars_ '


def bins(*counts: int) -> Bins:
  counts = np.array(counts + (0,) * (15 - len(counts)))
  return Bins(counts, np.linspace(0.01, 0.99, 15), np.linspace(0.05, 0.9, 15), 0.125)


def both(value) -> dict:
  return dict.fromkeys(SPLITS, value)


def made_up(k: int, **changes) -> FigureData:
  """K exits of 10, 20, 30, ... M multiply-adds; no image exits at the second."""
  macs = np.arange(1, k + 1) * 10e6
  accuracy = np.linspace(0.5, 0.75, k)
  shares = np.ones(k) / k
  there = np.linspace(0.9, 0.4, k)
  if k > 1:
    shares[[0, 1]], there[1] = (shares[0] + shares[1], 0), np.nan
  exits = np.repeat([index for index in range(k) if index != 1], 10)
  members = np.arange(len(exits))
  sheet = Sheet(
    exits=exits,
    hard=members % 10 >= 5,
    numbers=members + 100,
    labels=members % 2,
    predictions=np.zeros(len(exits), int),
    probabilities=np.full(len(exits), 0.999),
    images=np.full((len(exits), 8, 8, 3), 128, np.uint8),
  )
  curve = Curve(macs, accuracy + 0.01)
  data = FigureData(
    run='PN',
    dataset='cifar100',
    images={'held_out': 5000, 'test': 10000},
    exits=np.arange(k) + 1,
    class_names=('WWWWWWWWWWWWWWWWWWWWWWWWWWWWWW long', 'another long name'),
    unit='macs',
    macs=macs,
    ms=None,
    measured='',
    accuracy={'held_out': accuracy - 0.02, 'test': accuracy},
    alone=macs,
    families={family: both(curve) for family in ('quota', 'envelope', 'optimal', 'oracle')},
    chosen=both(Curve(np.array([15e6]), np.array([0.7]))),
    risk=Risk(
      loss='gap',
      thresholds=np.array([np.nan, 0.9, 0.5]),
      curves=both(RiskCurve(np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.01, 0.1]))),
      chosen={'held_out': RiskCurve(np.array([2.0]), np.array([0.01])), 'test': RiskCurve(np.ones(1), np.zeros(1))},
      epsilon=0.05,
    ),
    reliability=(Reliability(1.5, bins(9, 10, 20), bins(0, 30)),) * k,
    shares=both(shares),
    accuracy_there=both(there),
    sheet=sheet,
  )
  return replace(data, **changes)


def lines(axes) -> dict:
  return {line.get_label(): np.round([line.get_xdata(), line.get_ydata()], 9).tolist() for line in axes.lines}


def legend(figure) -> list[str]:
  return [text.get_text() for entry in figure.legends for text in entry.get_texts()]


def written(figure) -> list[tuple[str, Bbox]]:
  """Every visible text, and the pixels it covers."""
  figure.draw_without_rendering()
  texts = [*figure.texts, *(text for entry in figure.legends for text in entry.get_texts())]
  for axes in figure.axes:
    texts += [axes.title, *axes.texts, axes.xaxis.label, axes.yaxis.label]
    for axis in (axes.xaxis, axes.yaxis) if axes.axison else ():
      low, high = sorted(axis.get_view_interval())
      ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
      texts += [tick.label1 for tick in ticks if tick.label1.get_visible()]
  boxes = []
  for text in texts:
    box, clip = text.get_window_extent(), text.get_clip_box() if text.get_clip_on() else None
    boxes.append((text.get_text(), Bbox.intersection(box, clip) if clip else box))
  return [(text, box.padded(-1)) for text, box in boxes if text]


@pytest.mark.parametrize('draw', figures.FUNCTIONS, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize('k', [1, 7])  # 7 panels leave the last place of two rows empty.
def test_no_text_overlaps_or_crosses_the_border(draw, k):
  data = made_up(k, run=3 * LONG, ms=np.arange(k) + 1.0, measured=f'batch size 1, {LONG}')
  figure = draw(data).figure
  texts = written(figure)
  assert len(texts) > 3
  for text, box in texts:
    assert figure.bbox.contains(box.x0, box.y0) and figure.bbox.contains(box.x1, box.y1), text
  for (one, one_box), (other, other_box) in itertools.combinations(texts, 2):
    assert not one_box.overlaps(other_box), (one, other)


@pytest.mark.parametrize(
  ('unit', 'costs', 'expected'),
  [
    ('macs', [9e3, 99_999], (1e3, 'k multiply-adds per image')),
    ('macs', [9e3, 1e5], (1e6, 'M multiply-adds per image')),
    ('macs', [9.9e9], (1e6, 'M multiply-adds per image')),
    ('macs', [1e10], (1e9, 'G multiply-adds per image')),
    ('ms', [1e10], (1.0, 'ms per image')),
  ],
)
def test_costs_are_shown_in_readable_units(unit, costs, expected):
  assert cost_scale(unit, np.array(costs)) == expected


def test_anytime_shows_each_exit_in_order_of_cost():
  data = made_up(3, macs=np.array([20e6, 10e6, 30e6]))
  (axes,) = anytime(data).figure.axes
  assert lines(axes) == {
    'held out (5,000 images)': [[10, 20, 30], [60.5, 48, 73]],
    'test (10,000 images)': [[10, 20, 30], [62.5, 50, 75]],
  }
  assert [(text.get_text(), text.xy[0]) for text in axes.texts] == [('2', 10), ('1', 20), ('3', 30)]
  assert (axes.get_xlabel(), axes.get_ylabel()) == ('cost (M multiply-adds per image)', 'accuracy (%)')
  assert axes.get_xscale() == 'linear'


def test_anytime_has_a_second_panel_for_measured_times():
  drawing = anytime(made_up(2, ms=np.array([1.0, 4.0]), measured='batch size 1, some CPU'))
  _, axes = drawing.figure.axes
  assert axes.get_xlabel() == 'time (ms per image)\nbatch size 1, some CPU'
  assert lines(axes)['test (10,000 images)'] == [[1, 4], [50, 75]]
  assert [row['cost_ms'] for row in drawing.rows] == [1, 4]


def test_the_scales_of_the_axes():
  for last, scale in ((200e6, 'linear'), (201e6, 'log')):  # Costs that span a factor of 20, or more.
    assert anytime(made_up(2, macs=np.array([10e6, last]))).figure.axes[0].get_xscale() == scale
  accuracy = {'held_out': np.array([0.5]), 'test': np.array([0.504])}
  limits = anytime(made_up(1, accuracy=accuracy)).figure.axes[0].get_ylim()
  assert limits == pytest.approx((49.2, 51.2))  # Two percentage points at least.
  data = made_up(3)
  for fastest, scale in ((4.0, 'linear'), (4.1, 'log')):  # Speed-ups that span a factor of 4, or more.
    curve = RiskCurve(np.array([1.0, 2.0, fastest]), np.array([0.0, 0.0, 0.001]))
    axes = risk(replace(data, risk=replace(data.risk, curves=both(curve), epsilon=None))).figure.axes[0]
    assert axes.get_xscale() == scale and axes.get_ylim()[1] >= 1


def test_budgeted_shows_every_family_on_both_splits():
  chosen = {'held_out': Curve(np.array([15e6]), np.array([0.7])), 'test': Curve(np.array([16e6]), np.array([0.6]))}
  drawing = budgeted(made_up(2, chosen=chosen))
  family = [[10, 20], [51, 76]]
  expected = {
    'quota family': family,
    'envelope of the quota family': family,
    'optimal thresholds': family,
    'oracle bound': family,
    'one exit for all images': [[10, 20], [50, 75]],
    'chosen': [[16], [60]],
  }
  held_out, test = drawing.figure.axes
  assert lines(test) == expected
  assert lines(held_out) == expected | {'one exit for all images': [[10, 20], [48, 73]], 'chosen': [[15], [70]]}
  assert test.get_xlabel() == 'mean cost (M multiply-adds per image)'
  assert [axes.get_title() for axes in (held_out, test)] == ['held out (5,000 images)', 'test (10,000 images)']
  assert sorted(legend(drawing.figure)) == sorted(expected)
  assert {'split': 'test', 'family': 'chosen', 'mean_cost_macs': 16e6, 'accuracy_percent': 60} in drawing.rows
  assert {'split': 'held_out', 'family': 'exit 2', 'mean_cost_macs': 20e6, 'accuracy_percent': 73} in drawing.rows
  assert len(drawing.rows) == 4 * 2 * 2 + 2 + 2 * 2


@pytest.mark.parametrize('draw', [anytime, budgeted])
@pytest.mark.parametrize('better', SPLITS)
def test_all_points_are_within_the_axes(draw, better):
  accuracy = {split: np.array([0.6, 0.65]) + (0.2 if split == better else 0) for split in SPLITS}
  families = {'optimal': {split: Curve(np.array([10e6, 20e6]), accuracy[split]) for split in SPLITS}}
  for axes in draw(made_up(2, accuracy=accuracy, families=families)).figure.axes:
    low, high = axes.get_ylim()
    assert all(low < y < high for line in axes.lines for y in line.get_ydata())


def test_budgeted_is_in_the_unit_of_the_plan():
  drawing = budgeted(made_up(2, unit='ms'))
  assert drawing.figure.axes[0].get_xlabel() == 'mean cost (ms per image)'
  assert 'mean_cost_ms' in drawing.rows[0]


@pytest.mark.parametrize('epsilon', [0.05, None])
def test_risk_shows_the_target_if_any(epsilon):
  data = made_up(3)
  drawing = risk(replace(data, risk=replace(data.risk, epsilon=epsilon)))
  (axes,) = drawing.figure.axes
  curve = [[1, 2, 3], [0, 1, 10]]
  assert lines(axes) == {
    'held out (5,000 images)': curve,
    'test (10,000 images)': curve,
    'chosen, held out': [[2], [1]],
    'chosen, test': [[1], [0]],
  } | ({'target risk': [[0, 1], [5, 5]]} if epsilon else {})
  assert axes.get_xlabel() == 'speed-up over exit 3 alone (factor, in multiply-adds)'
  assert axes.get_ylabel() == 'risk (% of images):\nwrong where the last exit is right'
  assert drawing.facts == {'loss': 'gap', 'epsilon': epsilon}
  assert drawing.rows[4] == {
    'split': 'test', 'point': 'shared threshold', 'threshold': 0.9, 'speed_up': 2.0, 'risk_percent': 1.0
  }  # fmt: skip


def test_reliability_omits_bins_with_few_images_and_counts_them():
  drawing = reliability(made_up(2))
  upper, _, lower, _ = drawing.figure.axes
  confidence, accuracy = 100 * np.linspace(0.01, 0.99, 15), 100 * np.linspace(0.05, 0.9, 15)
  drawn = lines(upper)
  assert drawn['before temperature'] == np.round([confidence[1:3], accuracy[1:3]], 9).tolist()
  assert drawn['after temperature'] == np.round([confidence[1:2], accuracy[1:2]], 9).tolist()
  assert drawn['perfectly calibrated'] == [[0, 100], [0, 100]]
  assert upper.get_title() == 'exit 1, T = 1.5\nECE 12.5 % → 12.5 %'
  before, after = (patch.get_data().values for patch in lower.patches)
  np.testing.assert_allclose(before[:4], 100 * np.array([9, 10, 20, 0]) / 39)
  np.testing.assert_allclose(after[:3], [0, 100, 0])
  assert len(drawing.rows) == 2 * 2 * 15
  assert drawing.rows[0] | {'confidence_percent': 1, 'accuracy_percent': 5} == {
    'exit': 1, 'temperature': 1.0, 'state': 'before', 'bin': 1, 'images': 9,
    'confidence_percent': 1, 'accuracy_percent': 5, 'ece_percent': 12.5,
  }  # fmt: skip
  assert drawing.rows[15]['confidence_percent'] is None  # an empty bin


def test_reliability_of_few_images_keeps_its_panels():
  data = made_up(2)
  few = [exit_._replace(before=bins(9, 1), after=bins(1)) for exit_ in data.reliability]
  figure = reliability(replace(data, reliability=few)).figure
  figure.draw_without_rendering()
  assert min(axes.get_position().width for axes in figure.axes) > 0.3


def test_histogram_shows_shares_and_accuracies():
  shares = {'held_out': np.array([0.25, 0, 0.75]), 'test': np.array([0.5, 0, 0.5])}
  drawing = histogram(made_up(3, shares=shares))
  upper, lower = drawing.figure.axes
  assert [bar.get_height() for bar in upper.patches] == [25, 0, 75, 50, 0, 50]
  assert [bar.get_height() for bar in lower.patches] == [90, 0, 40, 90, 0, 40]
  assert [text.get_text() for text in lower.texts] == ['90.0', '', '40.0'] * 2
  assert [tick.get_text() for tick in lower.get_xticklabels()] == ['exit 1', 'exit 2', 'exit 3']
  assert [row['share_percent'] for row in drawing.rows] == [25, 0, 75, 50, 0, 50]


def test_contact_sheet_names_the_truth_of_wrong_answers():
  drawing = contact_sheet(made_up(2))
  texts = [text.get_text() for text in drawing.figure.axes[0].texts]
  assert texts.count('WWWWWWWWWWWWW…, 100 %') == 10
  assert [text for text in texts if text.startswith('true')] == ['true: another long …'] * 5
  assert 'no image\nexits here' in texts and '100.0 %\nexit here' in texts
  assert (short_name('maple', 5), short_name('maples', 5)) == ('maple', 'mapl…')
  images = drawing.figure.axes[0].images
  assert {image.get_interpolation() for image in images} == {'nearest'}
  lefts = [image.get_extent()[0] for image in images]
  assert lefts == sorted(lefts) and len(set(lefts)) == 10
  assert drawing.rows[7] == {
    'exit': 1, 'among': 'hardest', 'test_image': 107, 'label': 'another long name',
    'prediction': 'WWWWWWWWWWWWWWWWWWWWWWWWWWWWWW long', 'probability': 0.999,
  }  # fmt: skip


def test_contact_sheet_keeps_proportions():
  data = made_up(1)
  for shape, size in (((8, 8, 1), (1, 1)), ((16, 8, 3), (0.5, 1)), ((8, 32, 3), (1, 0.25))):
    sheet = replace(data.sheet, images=np.zeros((10, *shape), np.uint8))
    left, right, bottom, top = contact_sheet(replace(data, sheet=sheet)).figure.axes[0].images[0].get_extent()
    np.testing.assert_allclose((right - left, bottom - top), 0.95 * np.array(size))


def test_each_figure_is_a_picture_and_its_numbers(tmp_path):
  folder = tmp_path / 'exits'
  paths = write_figures(folder, made_up(2))
  names = [draw.__name__ for draw in figures.FUNCTIONS]
  assert [path.name for path in paths] == [f'{name}.{end}' for name in names for end in ('png', 'json', 'csv')]
  assert sorted(folder.iterdir()) == sorted(paths)
  for name in names:
    assert imread(folder / f'{name}.png').std() > 0.01
    saved = json.loads((folder / f'{name}.json').read_text(), parse_constant=pytest.fail)
    assert {key: saved[key] for key in ('figure', 'run', 'dataset', 'images')} == {
      'figure': name, 'run': 'PN', 'dataset': 'cifar100', 'images': {'held_out': 5000, 'test': 10000}
    }  # fmt: skip
    with (folder / f'{name}.csv').open(newline='') as file:
      table = list(csv.DictReader(file))
    expected = [{key: '' if value is None else str(value) for key, value in row.items()} for row in saved['rows']]
    assert table == expected
  rows = json.loads((folder / 'histogram.json').read_text())['rows']
  assert rows[1] == {'split': 'held_out', 'exit': 2, 'share_percent': 0.0, 'accuracy_percent': None}
  pixels = np.rint(imread(folder / 'histogram.png')[..., :3] * 255)
  assert (pixels == (0x00, 0x72, 0xB2)).all(-1).any()  # The bars keep their color.


def test_files_are_replaced_atomically(tmp_path, monkeypatch):
  monkeypatch.setattr(figures, 'FUNCTIONS', (anytime,))
  write_figures(tmp_path, made_up(1))

  def fail(*_, **__):
    raise OSError('disk full')

  for owner, method, kept in ((csv.DictWriter, 'writerows', 'csv'), (Figure, 'savefig', 'png')):
    before = (tmp_path / f'anytime.{kept}').read_bytes()
    monkeypatch.setattr(owner, method, fail)
    with pytest.raises(OSError, match='disk full'):
      write_figures(tmp_path, made_up(2))
    assert (tmp_path / f'anytime.{kept}').read_bytes() == before


def test_names_outside_the_font_raise_no_warning(tmp_path, monkeypatch):
  monkeypatch.setattr(figures, 'FUNCTIONS', (contact_sheet,))
  assert write_figures(tmp_path, made_up(1, run='試験', class_names=('猫', '犬')))


def test_names_that_cannot_be_printed(tmp_path, monkeypatch):
  monkeypatch.setattr(figures, 'FUNCTIONS', (contact_sheet,))
  data = made_up(1, run='a\x1b[31m', class_names=('\udcff', '\x1b[2J'))
  texts = [text.get_text() for text in contact_sheet(data).figure.axes[0].texts]
  assert '\\udcff, 100 %' in texts and 'true: \\x1b[2J' in texts
  write_figures(tmp_path, data)
  assert ',\\udcff,' in (tmp_path / 'contact_sheet.csv').read_text(encoding='utf-8')
  assert json.loads((tmp_path / 'contact_sheet.json').read_text())['rows'][0]['prediction'] == '\udcff'


def test_without_labels_nothing_is_called_an_accuracy():
  for function in figures.FUNCTIONS:
    figure, rows, facts = function(made_up(3, labeled=False))
    shown = [text.get_text() for text in figure.findobj(Text)]
    assert function is risk or any('same answer as exit 3' in text or 'exit 3: ' in text for text in shown)
    assert not any('accura' in text or 'true: ' in text or text == 'label' for text in (*shown, *rows[0], *facts))
