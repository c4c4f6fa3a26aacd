"""Help texts in groups: options and commands under the headings of their `rich_help_panel`.

Typer draws such groups as boxes, which do not suit a pipe, and squeeze the text on 80 columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from typer.core import TyperCommand, TyperGroup

NAME_WIDTH: Final = 28  # columns: the text of a longer name begins on the next line


class GroupedOptions(TyperCommand):
    """A command whose help lists its options in groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        rows, defaults = [], self.default_texts()
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                name, text = record
                heading = getattr(parameter, "rich_help_panel", None) or "Options"
                if parameter.name in defaults:
                    text += f"  [{defaults[parameter.name]}]"
                rows.append((heading, name, text))
        _write_groups(formatter, rows)

    def default_texts(self) -> Mapping[str, str]:
        """The defaults that are known only at run time, by the names of the options."""
        return {}


class GroupedCommands(TyperGroup):
    """A group of commands whose help lists them in groups."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        rows = []
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                heading = getattr(command, "rich_help_panel", None) or "Commands"
                rows.append((heading, name, command.get_short_help_str(limit=200)))
        _write_groups(formatter, rows)


def _write_groups(formatter: Any, rows: Iterable[tuple[str, str, str]]) -> None:
    """Writes (heading, name, text) rows, one list for each heading, all texts in one column."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for heading, name, text in rows:
        groups.setdefault(heading, []).append((name, text))
    lengths = [len(name) for group in groups.values() for name, _ in group]
    width = max((length for length in lengths if length <= NAME_WIDTH), default=0)
    for heading, group in groups.items():
        with formatter.section(heading):
            formatter.write_dl([(name.ljust(width), text) for name, text in group], width)
