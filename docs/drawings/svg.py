"""The few SVG shapes that the drawings need, in a palette for light and for dark pages."""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import NamedTuple

FONT = "-apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', Helvetica, Arial, sans-serif"


class Palette(NamedTuple):
  """Colors of one background. `fills` are for boxes, in the order of Okabe and Ito's colors."""

  ink: str
  soft: str
  line: str
  paper: str
  fills: tuple[str, ...]
  strokes: tuple[str, ...]


PALETTES = {
  'light': Palette(
    '#1f2328', '#59636e', '#8c959f', '#ffffff',
    ('#dcecf7', '#fbe6d6', '#d8f0e7', '#f1f3f5'), ('#0072b2', '#d55e00', '#009e73', '#8c959f'),
  ),
  'dark': Palette(
    '#e6edf3', '#9da7b3', '#6e7681', '#0d1117',
    ('#12324a', '#4a2a12', '#0f3d31', '#21262d'), ('#56b4e9', '#f0883e', '#2fc79a', '#6e7681'),
  ),
}  # fmt: skip


class Canvas:
  """An SVG under construction; coordinates are pixels from the top left corner."""

  def __init__(self, width: int, height: int, title: str, palette: Palette):
    self.palette = palette
    self._parts = [
      f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
      f'font-family="{FONT}" font-size="14" role="img">',
      f'<title>{escape(title)}</title>',
      '<defs>',
      *(_tip(color) for color in (palette.line, *palette.strokes[:3])),
      '</defs>',
    ]

  def box(self, x: float, y: float, width: float, height: float, color: int, radius: float = 6) -> None:
    """A rounded rectangle in one of the palette's colors."""
    self._parts.append(
      f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" '
      f'fill="{self.palette.fills[color]}" stroke="{self.palette.strokes[color]}" stroke-width="1.5"/>'
    )

  def text(
    self,
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = 'middle',
    size: int = 14,
    bold: bool = False,
    soft: bool = False,
  ) -> None:
    """A line of text with its baseline at y."""
    weight = ' font-weight="600"' if bold else ''
    self._parts.append(
      f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}"{weight} '
      f'fill="{self.palette.soft if soft else self.palette.ink}">{escape(text)}</text>'
    )

  def arrow(self, path: str, color: str | None = None, dashed: bool = False, width: float = 1.5) -> None:
    """An arrow along an SVG path."""
    dash = ' stroke-dasharray="5 4"' if dashed else ''
    color = color or self.palette.line
    self._parts.append(
      f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{width:g}"{dash} '
      f'marker-end="url(#tip{color[1:]})"/>'
    )

  def svg(self) -> str:
    """The document."""
    return '\n'.join([*self._parts, '</svg>', ''])


def _tip(color: str) -> str:
  """The head of arrows in this color; `fill="context-stroke"` would do for all, but older browsers ignore it."""
  return (
    f'<marker id="tip{color[1:]}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
    f'<path d="M0 0 10 5 0 10z" fill="{color}"/></marker>'
  )


def write(name: str, draw: Callable[[Palette], str]) -> None:
  """Writes NAME-light.svg and NAME-dark.svg beside this file."""
  for background, palette in PALETTES.items():
    path = Path(__file__).parent / f'{name}-{background}.svg'
    path.write_text(draw(palette))
    print(path)
