"""Refuse bad answers with one sentence each, before a file is written.

Guards against: answers that break files, hide text or name something that exists already.
Rests on: answers arriving here as data only, as JSON inside a JSON string; Cookiecutter removing the folder it made
when this exits with an error. What must hold before that folder exists is in ``secure_celery_answers.py``.
Controls: TPL-1, TPL-2.
"""

import json
import keyword
import re
import sys
import unicodedata

ANSWERS = json.loads({{ cookiecutter | jsonify | jsonify }})

LONGEST = {"project_name": 60, "description": 200, "author": 100}
SLUG = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
PACKAGE = re.compile(r"[a-z][a-z0-9_]*")

# Top-level names that the generated project imports or provides: a package of that name would shadow or be shadowed.
TAKEN = frozenset(
    """
    stack attacks tests test tools src hardening cookiecutter
    celery kombu amqp billiard vine redis cryptography cffi pydantic pydantic_core pydantic_settings dotenv
    click click_didyoumean click_plugins click_repl prompt_toolkit wcwidth dateutil six tzdata tzlocal
    annotated_types typing_extensions typing_inspection packaging pycparser
    pytest pluggy iniconfig pygments hypothesis sortedcontainers ruff mypy mypyc mypy_extensions pathspec librt uv
    django asgiref sqlparse jwt joserfc pip setuptools wheel pkg_resources
    """.split()
)


def refusals(answers: dict[str, str]) -> list[str]:
    """Return a sentence for each answer that cannot be used; never with the answer's own text in it."""
    found = []
    for name, longest in LONGEST.items():
        text = answers[name]
        if not text.strip():
            found.append(f"{name}: it is empty; write something.")
        elif len(text) > longest:
            found.append(f"{name}: it has {len(text)} characters; {longest} is the limit.")
        elif text != text.strip():
            found.append(f"{name}: it begins or ends with white space; remove that.")
        elif any(unicodedata.category(c)[0] == "C" or unicodedata.category(c) in ("Zl", "Zp") for c in text):
            found.append(f"{name}: it holds a control, invisible or unassigned character; write one line of plain text.")
        elif re.search(r"\{[%#{]", text):
            found.append(f"{name}: it holds template syntax, which 'cruft update' would execute; leave it out.")
    slug, package = answers["project_slug"], answers["package_name"]
    if len(slug) > 40 or not SLUG.fullmatch(slug):
        found.append(
            "project_slug: it must be at most 40 characters, begin with a letter out of a-z and go on with "
            "a-z, 0-9 and single hyphens; choose another project_name or set project_slug."
        )
    if len(package) > 40 or not PACKAGE.fullmatch(package):
        found.append(
            "package_name: it must be at most 40 characters, begin with a letter out of a-z and go on with "
            "a-z, 0-9 and '_'; choose another."
        )
    elif keyword.iskeyword(package) or keyword.issoftkeyword(package):
        found.append("package_name: it is a word of the Python language; choose another, or set project_slug too.")
    elif package in sys.stdlib_module_names or package in TAKEN:
        found.append(
            "package_name: a module of that name exists already in Python or in a dependency; choose another."
        )
    return found


found = refusals(ANSWERS)
if found:
    sys.exit("\n".join(found))
