"""Draws PN3: its three pipelines, the cascade between them and their exits. `python docs/drawings/cascade.py`."""

from svg import Canvas, Palette, write

# Multiply-adds of an image that stops at each exit, in millions: `--config=configs/pn3_ddd.py --mode=describe`.
COSTS = ('3.4 M', '23.5 M', '125.9 M')
SIDES = (16, 8, 4)  # Pixels, by column.
COLUMNS = (250, 425, 600)
ROWS = (62, 162, 262)
WIDTH, HEIGHT = 112, 52


def draw(palette: Palette) -> str:
  """The drawing in this palette."""
  canvas = Canvas(960, 350, 'ParaNet with three pipelines: later pipelines reuse the features of earlier ones', palette)
  for x, side in zip(COLUMNS, SIDES, strict=True):
    canvas.text(x + WIDTH / 2, 28, f'{side} x {side}', soft=True, size=13)
  _image(canvas)
  for row, y in enumerate(ROWS):
    _pipeline(canvas, row, y)
    if row:
      _cascade(canvas, row, y)
  _legend(canvas)
  return canvas.svg()


def _image(canvas: Canvas) -> None:
  x, y, side = 20, ROWS[1] - 8, 68
  canvas.box(x, y, side, side, 3)
  canvas.text(x + side / 2, y + 32, 'image')
  canvas.text(x + side / 2, y + 50, '32 x 32', soft=True, size=12)


def _pipeline(canvas: Canvas, row: int, y: float) -> None:
  middle, first = y + HEIGHT / 2, 2 - row
  color = canvas.palette.strokes[row]
  start = {0: 'M60 154 V{} H', 1: 'M88 {} H', 2: 'M60 222 V{} H'}[row].format(middle)
  canvas.arrow(f'{start}{COLUMNS[first] - 2}', color)
  canvas.text(106, middle - 8, f'stem, {3 - row} x pool', anchor='start', soft=True, size=12)
  for column in range(first, 3):
    x = COLUMNS[column]
    canvas.box(x, y, WIDTH, HEIGHT, row)
    canvas.text(x + WIDTH / 2, middle + 5, 'dense block')
    if column < 2:
      canvas.arrow(f'M{x + WIDTH} {middle} H{COLUMNS[column + 1] - 2}', color)
  end = COLUMNS[2] + WIDTH
  canvas.arrow(f'M{end} {middle} H{end + 30}', color)
  canvas.box(end + 32, y + 8, 72, HEIGHT - 16, row, radius=18)
  canvas.text(end + 68, middle + 5, f'exit {row + 1}', bold=True)
  canvas.text(end + 116, middle - 2, COSTS[row], anchor='start', bold=True)
  canvas.text(end + 116, middle + 15, 'multiply-adds', anchor='start', soft=True, size=12)
  if row < 2:
    x = end + 68
    canvas.arrow(f'M{x} {y + HEIGHT - 8} V{y + 106}', dashed=True)
    canvas.text(x + 10, y + 80, 'not confident: continue', anchor='start', soft=True, size=12)


def _cascade(canvas: Canvas, row: int, y: float) -> None:
  """The features of the pipeline above, which this one's blocks but the first also read."""
  for column in range(3 - row, 3):
    x = COLUMNS[column] + WIDTH / 2
    canvas.arrow(f'M{x} {y - 100 + HEIGHT} V{y - 2}', canvas.palette.strokes[row - 1], width=2.5)


def _legend(canvas: Canvas) -> None:
  y = 338
  canvas.arrow(f'M250 {y - 5} H284', canvas.palette.strokes[0], width=2.5)
  canvas.text(294, y, 'cascade: features that a later pipeline reuses', anchor='start', soft=True, size=13)


if __name__ == '__main__':
  write('cascade', draw)
