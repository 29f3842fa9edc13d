"""The doctor's findings on a terminal: one table, red ones first; plain lines where stdout is no terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.checks_judge import Finding

COLUMNS = ("", "node", "what", "seen", "rule", "fix")


def show(findings: Sequence[Finding], notes: Sequence[str], console: Console | None = None) -> None:
    """Prints them, green ones of several nodes as one line, then the notes and how many there are of each severity."""
    console = console or Console(highlight=False)
    lines = folded(findings)
    if console.is_terminal and not console.is_dumb_terminal:
        table = Table(*COLUMNS)
        for each in lines:
            table.add_row(Text(each.severity.upper(), style=f"bold {each.severity}"), *map(Text, _fields(each)))
        console.print(table)
    else:
        for each in lines:
            fix = f"; fix: {each.fix}" if each.fix else ""
            print(f"{each.severity.upper():6} {each.node}: {each.what}: {each.seen}; rule: {each.rule}{fix}")
    for note in notes:
        print(note)
    counts = {severity: sum(f.severity == severity for f in findings) for severity in ("red", "yellow", "green")}
    print(", ".join(f"{count} {severity}" for severity, count in counts.items()))


def folded(findings: Sequence[Finding]) -> list[Finding]:
    """The findings in order, but green ones about the same thing as one, at the place of the first."""
    found: list[Finding] = []
    greens: dict[str, list[Finding]] = {}
    for each in findings:
        if each.severity != "green":
            found.append(each)
        else:
            greens.setdefault(each.what, []).append(each)
    for same in greens.values():
        seen = same[0].seen if len({each.seen for each in same}) == 1 else f"{same[0].seen}, ..."
        node = same[0].node if len(same) == 1 else f"{len(same)} nodes"
        found.append(Finding("green", node, same[0].what, seen, same[0].rule))
    return found


def _fields(finding: Finding) -> tuple[str, ...]:
    return finding.node, finding.what, finding.seen, finding.rule, finding.fix
