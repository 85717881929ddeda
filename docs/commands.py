"""A hook of mkdocs: puts the help of every command into docs/cli.md, so that none is missing."""

from fewstep.cli import parser, stages

PLACE = "<!-- commands -->"


def on_page_markdown(markdown: str, **given: object) -> str:
    """The page, with a section for each command where it has the place for it."""
    return markdown.replace(PLACE, sections()) if PLACE in markdown else markdown


def sections() -> str:
    parts = []
    for stage in stages():
        commands = next(a.choices for a in parser(stage)._actions if a.dest == "stage")
        assert commands is not None
        parts.append(f"## {stage}\n\n```text\n{commands[stage].format_help()}```\n")  # pyright: ignore
    return "\n".join(parts)
