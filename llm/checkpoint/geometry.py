"""Where a piece of a parameter lies in the whole: flat ranges of tensor-parallel parts as boxes of lines and columns. Pure arithmetic.

A parameter that tensor ranks split along dimension d is seen as `lines` x `columns`: a line for each index of the dimensions before d, and
all of d and the dimensions after it in the columns. A part then is a band of columns in every line, whatever d is, and a flat range of a
part is at most three boxes: the rest of its first line, whole lines, the beginning of its last. Boxes of two layouts intersect in boxes.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple


class Box(NamedTuple):
    """Lines [line, end_line) x columns [column, end_column) of the whole parameter."""

    line: int
    end_line: int
    column: int
    end_column: int


class Band(NamedTuple):
    """A part: columns [column, column + width) of every line. A flat index i of it is line i // width, column `column` + i % width."""

    column: int
    width: int

    def flat(self, line: int, column: int) -> int:
        return line * self.width + column - self.column

    def boxes(self, start: int, end: int) -> Iterator[Box]:
        """Elements [start, end) of the flattened part."""
        if start >= end:
            return
        first, skipped = divmod(start, self.width)
        last, rest = divmod(end, self.width)
        if first == last:
            yield Box(first, first + 1, self.column + skipped, self.column + rest)
            return
        if skipped:
            yield Box(first, first + 1, self.column + skipped, self.column + self.width)
            first += 1
        if first < last:
            yield Box(first, last, self.column, self.column + self.width)
        if rest:
            yield Box(last, last + 1, self.column, self.column + rest)


def lines_and_columns(shape: tuple[int, ...], split_dim: int | None) -> tuple[int, int, int]:
    """(lines, the split dimension's size, columns of one index of it). A parameter that is not split is one line, of one part of size 1."""
    if split_dim is None:
        return 1, 1, prod(shape)
    return prod(shape[:split_dim]), shape[split_dim], prod(shape[split_dim + 1 :])


def band(shape: tuple[int, ...], split_dim: int | None, part_offset: int, part_size: int) -> Band:
    """The part [part_offset, part_offset + part_size) of dimension `split_dim`."""
    _, _, columns = lines_and_columns(shape, split_dim)
    return Band(part_offset * columns, part_size * columns)


def intersections(first: Iterator[Box] | list[Box], second: list[Box]) -> Iterator[Box]:
    for a in first:
        for b in second:
            line, end_line = max(a.line, b.line), min(a.end_line, b.end_line)
            column, end_column = max(a.column, b.column), min(a.end_column, b.end_column)
            if line < end_line and column < end_column:
                yield Box(line, end_line, column, end_column)
