"""Whether a chat template can be read at all: what is cut, empty or no template fails only when somebody chats.

It is parsed with jinja2, as transformers does, and nothing of it is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen2tool.errors import UserError

REMEDY = "Copy the chat template again from where the checkpoint came from"


def check_templates(file: Path, stored: Any) -> bool:
    """Whether `file` holds a chat template: the text of one, or a list of several with their names.

    Raises:
        UserError: it holds something else under that name.
    """
    if not stored:
        return False
    if not isinstance(stored, list):
        return check_template(file, stored)
    for entry in stored:
        if not isinstance(entry, dict) or not {"name", "template"} <= entry.keys():
            raise UserError(f"{file}: chat_template is a list of other things than named templates", REMEDY)
        check_template(file, entry["template"])
    return True


def check_template(file: Path, template: Any) -> bool:
    """True for the text of a template.

    Raises:
        UserError: it is no text, empty, or no template.
    """
    from jinja2 import Environment, TemplateSyntaxError
    from jinja2.ext import Extension
    from jinja2.nodes import Node
    from jinja2.parser import Parser

    class Generation(Extension):
        """The block around an assistant's turn, which transformers adds to the language."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it of an instance)

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    if not isinstance(template, str):
        raise UserError(f"{file}: the chat template is no text but {ascii(template)[:40]}", REMEDY)
    if not template.strip():
        raise UserError(f"{file}: the chat template is empty", REMEDY)
    try:
        Environment(extensions=["jinja2.ext.loopcontrols", Generation]).parse(template)
    except TemplateSyntaxError as error:
        raise _invalid(file, f"line {error.lineno}: {str(error.message).partition('. ')[0]}") from None
    except (ValueError, RecursionError) as error:  # a number of five thousand digits, brackets in brackets
        raise _invalid(file, str(error)) from None
    return True


def _invalid(file: Path, why: str) -> UserError:
    return UserError(f"{file}: the chat template is no valid one ({ascii(why)[1:-1][:80]})", REMEDY)
