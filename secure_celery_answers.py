"""What must hold before Cookiecutter has created anything, and the two filters that write answers into files.

Guards against: an answer that is a template. Cookiecutter renders every value given with ``--no-input``, ``key=value``
or a user configuration, and ``cruft update`` renders the stored answers again, all with an unsandboxed Jinja: whoever
chooses such a value would run code before the first hook. And against a slug that is a path: Cookiecutter creates the
folder, parents included, before ``hooks/pre_gen_project.py`` can refuse.
Rests on: Jinja calling ``preprocess`` for every source before it is compiled, and on nothing but files having a name.
Controls: TPL-2.
"""

from __future__ import annotations

import json
import re

from cookiecutter.exceptions import FailedHookException
from jinja2 import Environment
from jinja2.ext import Extension

# All the template syntax that cookiecutter.json, file names and hooks of this template use outside of files.
EXPRESSION = re.compile(
    r"\{\{ ?cookiecutter(\.[a-z_]+)?( \| (slugify|jsonify|folder_name|replace\('-', '_'\)))* ?\}\}"
)
SYNTAX = re.compile(r"\{[%#{]")
FOLDER = re.compile(r"[a-z0-9-]{1,40}")


def folder_name(slug: str) -> str:
    """Return the slug if it is one short path part; every other rule for it is in the pre-generation hook."""
    if not FOLDER.fullmatch(slug):
        raise FailedHookException(
            "project_slug: it must be 1 to 40 characters out of a-z, 0-9 and '-'; "
            "choose another project_name or set project_slug."
        )
    return slug


def toml(text: str) -> str:
    """Quote as a TOML basic string. JSON's escapes are TOML's, except for surrogate pairs, hence no ASCII-only."""
    return json.dumps(text, ensure_ascii=False)


def markdown(text: str) -> str:
    """Write text into Markdown so that it neither opens a tag nor a code fence that swallows what follows."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("`", "&#96;")


class Answers(Extension):
    """The filters above, and the refusal of template syntax in answers."""

    def __init__(self, environment: Environment) -> None:
        """Register the filters."""
        super().__init__(environment)
        environment.filters.update(folder_name=folder_name, toml=toml, markdown=markdown)

    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
        """Refuse what is not a file and holds other expressions than this template's own."""
        if name is None and SYNTAX.search(EXPRESSION.sub("", source)):
            raise FailedHookException(
                "An answer holds template syntax ('{{', '{%' or '{#'), which would be executed; leave it out."
            )
        return source
