"""The rules for answers, applied before anything is created, and the filters that write answers into files.

Guards against: an answer that is a template (Cookiecutter renders each value given with ``--no-input``,
``key=value`` or a user configuration, and ``cruft update`` renders the stored ones again, in an unsandboxed
Jinja: whoever chooses one would run code before the first hook); a slug that is a path (Cookiecutter creates
the folder, parents included, before the first hook); answers that break files, hide text or name something
that exists already.
Rests on: Jinja calling ``preprocess`` for every source before it is compiled, nothing but files having a name
there, and ``cookiecutter.json`` ending with a value that applies ``checked``.
Controls: TPL-1, TPL-2.
"""

from __future__ import annotations

import json
import keyword
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping

from cookiecutter.exceptions import FailedHookException
from jinja2 import Environment
from jinja2.ext import Extension

# All the template syntax that cookiecutter.json, the names of files and the hooks of this template hold.
OURS = re.compile(
    r"\{\{ cookiecutter\.project_name \| slugify \}\}"
    r"|\{\{ cookiecutter\.project_slug \| replace\('-', '_'\) \}\}"
    r"|\{\{ cookiecutter \| checked \}\}"
    r"|\{\{cookiecutter \| jsonify \| jsonify\}\}"
    r"|\{\{cookiecutter\.(project_slug|package_name)\}\}"
)
SYNTAX = re.compile(r"\{[%#{]")

LONGEST = {"project_name": 60, "description": 200, "author": 100}
SLUG = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
PACKAGE = re.compile(r"[a-z][a-z0-9_]*")

# Modules that the generated project has or installs: a package of that name would hide one or be hidden.
TAKEN = frozenset(
    """
    stack attacks tests test tools src hardening cookiecutter
    celery kombu amqp billiard vine redis cryptography cffi pydantic pydantic_core pydantic_settings dotenv
    click click_didyoumean click_plugins click_repl prompt_toolkit wcwidth dateutil six tzdata tzlocal
    async_timeout annotated_types typing_extensions typing_inspection packaging urllib3 pycparser
    py pytest pytest_timeout pluggy iniconfig pygments hypothesis sortedcontainers
    ruff mypy mypyc mypy_extensions pathspec librt uv tomlkit
    ast_serialize django asgiref sqlparse jwt joserfc pip setuptools wheel pkg_resources
    flower tornado humanize pytz prometheus_client
    """.split()
)


def refusals(answers: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for each answer that cannot be used, never with the answer's own text in it."""
    for name, longest in LONGEST.items():
        text = answers[name]
        if not text.strip():
            yield f"{name}: it is empty; write something."
        elif len(text) > longest:
            yield f"{name}: it has {len(text)} characters; {longest} is the limit."
        elif text != text.strip():
            yield f"{name}: it begins or ends with white space; remove that."
        elif any(unicodedata.category(c) in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp") for c in text):
            yield f"{name}: it holds a control or invisible character; write one line of plain text."
        elif SYNTAX.search(text):
            yield f"{name}: it holds template syntax, which 'cruft update' would execute; leave it out."
    slug, package = answers["project_slug"], answers["package_name"]
    if len(slug) > 40 or not SLUG.fullmatch(slug):
        yield (
            "project_slug: it must begin with a letter out of a-z and go on with a-z, 0-9 and single "
            "hyphens, at most 40 in all; choose another project_name or set project_slug."
        )
    elif len(package) > 40 or not PACKAGE.fullmatch(package):
        yield (
            "package_name: it must begin with a letter out of a-z and go on with a-z, 0-9 and '_', "
            "at most 40 in all; choose another."
        )
    elif keyword.iskeyword(package) or keyword.issoftkeyword(package):
        yield "package_name: it is a word of the Python language; choose another."
    elif package in sys.stdlib_module_names or package in TAKEN:
        yield "package_name: Python or a dependency has a module of that name; choose another."


def checked(answers: Mapping[str, str]) -> str:
    """Return "yes", or end the generation with one sentence for each answer that cannot be used."""
    if found := list(refusals(answers)):
        raise FailedHookException("\n".join(found))
    return "yes"


def toml(text: str) -> str:
    """Quote as a TOML basic string. JSON's escapes are TOML's but for surrogate pairs, hence not in ASCII."""
    return json.dumps(text, ensure_ascii=False)


def markdown(text: str) -> str:
    """Write text into Markdown so that it opens neither a tag nor a code span that swallows what follows."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("`", "&#96;")


class Answers(Extension):
    """The filters above, and the refusal of template syntax in answers that are about to be rendered."""

    def __init__(self, environment: Environment) -> None:
        """Register the filters."""
        super().__init__(environment)
        environment.filters.update(checked=checked, toml=toml, markdown=markdown)
        # `cruft update` generates the old and the new version in one process: the new one needs its own filters and
        # rules, and Jinja would find this module, already imported.
        sys.modules.pop(__name__, None)

    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
        """Refuse what is not a file and holds other expressions than this template's own."""
        # Ours become "{", so that one more brace in front of them is found too.
        if name is None and SYNTAX.search(OURS.sub("{", source)):
            raise FailedHookException(
                "An answer holds template syntax ('{{', '{%' or '{#'), which would be executed; leave it out."
            )
        return source
