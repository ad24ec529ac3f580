"""The picture of confusion matrices: what it shows, and that its size depends on no number of classes."""

import numpy as np
import pytest
from matplotlib.image import imread

from paranet_jax.display.confusion import confusion_figure, draw_confusion


def panels(figure):
  return [axes for axes in figure.axes if axes.get_title()]


def test_shares_of_each_class(tmp_path):
  matrices = {2: np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), 3: np.eye(3, dtype=int)}
  names = ['$a_b$', 'tab\there', 'a name of more than sixteen letters']
  figure = confusion_figure(matrices, names, 'PN3-x3d on digits')
  first, second = panels(figure)
  assert [axes.get_title() for axes in (first, second)] == ['exit 2', 'exit 3']
  # A class without images has no shares.
  np.testing.assert_array_equal(first.images[0].get_array(), [[75, 25, 0], [0, 100, 0], [0, 0, 0]])
  shown = ['$a_b$', 'tab\\there', 'a name of more …']
  assert [text.get_text() for text in first.get_yticklabels()] == shown
  assert not any(text.get_parse_math() for text in first.get_yticklabels())
  assert 'PN3-x3d on digits' in figure.get_suptitle()
  path = draw_confusion(tmp_path, matrices, names, 'PN3-x3d', 'digits')
  assert path == tmp_path / 'confusion.png' and [entry.name for entry in tmp_path.iterdir()] == ['confusion.png']
  assert imread(path).shape[2] == 4


@pytest.mark.parametrize(
  ('exits', 'drawn'), [(1, [1]), (5, [1, 2, 3, 4, 5]), (14, [1, 2, 3, 5, 6, 7, 8, 9, 10, 12, 13, 14])]
)
def test_the_size_does_not_follow_the_classes(exits, drawn):
  figure = confusion_figure({number: np.eye(1000, dtype=int) for number in range(1, exits + 1)}, ['class'] * 1000, '')
  assert [axes.get_title() for axes in panels(figure)] == [f'exit {number}' for number in drawn]
  used = [axes for axes in figure.axes if axes.axison]
  assert len(used) == len(drawn) + 1  # And the scale; what is left of the last row stays empty.
  assert max(figure.get_size_inches() * figure.dpi) < 1600
  assert not any(text.get_text() == 'class' for axes in panels(figure) for text in axes.get_yticklabels())
