"""Tables of text: CSV with a header, in and out.

Pure: text -> table, rows -> text. Every cell is text, as it was written, and
every row knows where it stood, so that errors can name it.
"""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence

from flexjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows that share their columns.

  Attributes:
    name: what errors call it, such as the file's path.
    columns: names of the columns, all different, none empty.
    rows: per row a cell for every column.
    places: per row where it stands, such as 'cities.csv:7'.
  """

  name: str
  columns: tuple[str, ...]
  rows: list[dict[str, str]]
  places: list[str]


def parse(text: str, name: str) -> Table:
  """Reads CSV: commas, double quotes, a header; a row of blank cells is none.

  A mark of the byte order at the beginning is left out, and so are spaces
  around the names of columns.

  Raises:
    InputError: it is no CSV, has no header or no rows, a column has no name
      or another one's, or a row has more or fewer cells than the header.
  """
  reader = csv.reader(
    io.StringIO(text.removeprefix('\ufeff'), newline=''), strict=True
  )
  records: list[tuple[int, list[str]]] = []
  line = 1
  try:
    for cells in reader:
      if any(map(str.strip, cells)):
        records.append((line, cells))
      line = reader.line_num + 1
  except csv.Error as e:
    raise InputError(f'{name}:{line}: not CSV: {e}') from None
  if not records:
    raise InputError(f"'{name}' is empty: expected CSV with a header")
  columns = [name.strip() for name in records[0][1]]
  for n, column in enumerate(columns):
    if not column:
      raise InputError(f"'{name}': column {n + 1} of the header has no name")
    if column in columns[:n]:
      raise InputError(f"'{name}' has two columns '{column}'")
  if len(records) == 1:
    raise InputError(f"'{name}' has a header but no rows")
  for line, cells in records[1:]:
    if len(cells) != len(columns):
      raise InputError(
        f'{name}:{line}: expected {len(columns)} cells, as in the header, got '
        f'{len(cells)}'
      )
  return Table(
    name,
    tuple(columns),
    [dict(zip(columns, cells, strict=True)) for _, cells in records[1:]],
    [f'{name}:{line}' for line, _ in records[1:]],
  )


def to_csv(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
  """Returns CSV with a header, a line per row that ends in a newline."""
  cells = [columns, *([row[column] for column in columns] for row in rows)]
  return ''.join(map(_line, cells))


def serialise(fields: Mapping[str, str]) -> str:
  """Returns 'name: value. name: value.' on one line, blank values left out."""
  named = {name: one_line(value) for name, value in fields.items()}
  parts = [
    f'{one_line(name)}: {value}' for name, value in named.items() if value
  ]
  return ' '.join(p if p.endswith('.') else f'{p}.' for p in parts)


def one_line(text: str) -> str:
  """Returns a text with a single space wherever it had any."""
  return ' '.join(text.split())


def _line(cells: Sequence[str]) -> str:
  out = io.StringIO(newline='')
  # With '\n' for its end the module would leave a '\r' in a cell unquoted,
  # where readers see another line.
  csv.writer(out, lineterminator='\r\n').writerow(cells)
  return out.getvalue().removesuffix('\r\n') + '\n'
