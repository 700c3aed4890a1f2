"""Tables in plain text and in Markdown, and numbers for people."""

from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """
    A table in plain text, the first column aligned to the left and the others to the right.

    Args:
        header (`Sequence[str]`):
            Titles of the columns.
        rows (`Sequence[Sequence[str]]`):
            Cells, as many in each row as there are titles.

    Returns:
        `str`: The lines of the table.
    """
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def format_facts(facts: Sequence[tuple[str, str]]) -> str:
    """
    Facts in plain text, a line each.

    Args:
        facts (`Sequence[tuple[str, str]]`):
            What it is, and how it is.

    Returns:
        `str`: The lines, aligned.
    """
    width = max(len(name) for name, _ in facts)
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in facts)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """
    A table in Markdown.

    Args:
        header (`Sequence[str]`):
            Titles of the columns.
        rows (`Sequence[Sequence[str]]`):
            Cells, as many in each row as there are titles.

    Returns:
        `str`: The lines of the table.
    """
    lines = [header, ["---"] * len(header), *rows]
    # A bar would end the cell, and a line break the table.
    cells = ([" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def size_text(size: int) -> str:
    """`"41.9 MB"`, in units of 1000."""
    value, units = float(size), iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while value >= 999.95 and unit != "GB":
        value, unit = value / 1000, next(units)
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def number_text(value: float) -> str:
    """A metric with four digits behind the point, a whole number as it is."""
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def shortened(text: str, width: int) -> str:
    """A text of at most that many characters. What is cut is its beginning: the end of a name tells more."""
    return text if len(text) <= width else f"...{text[len(text) - width + 3 :]}"
