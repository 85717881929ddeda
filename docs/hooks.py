"""Hooks of mkdocs: the help of every command, and no links to files that the site does not have."""

import re

from fewstep.cli import parser, stages

PLACE = "<!-- commands -->"
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")  # code and presets, seen from docs/


def on_page_markdown(markdown: str, **given: object) -> str:
    """The page as the site shows it."""
    if PLACE in markdown:
        markdown = markdown.replace(PLACE, sections())
    return OUTSIDE.sub(r"\1", markdown)


def sections() -> str:
    """A section with the help of each command, so that none is missing."""
    parts = []
    for stage in stages():
        commands = next(action for action in parser(stage)._actions if action.dest == "stage")
        text = commands.choices[stage].format_help()  # pyright: ignore
        parts.append(f"## {stage}\n\n```text\n{text}```\n")
    return "\n".join(parts)
