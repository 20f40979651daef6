"""Find misuse of Celery, in this project or any other: ``python3 celery_rules.py [FILE OR FOLDER ...]``.

Guards against: settings, tasks, images and units that undo Celery's security, about which bandit and Ruff are silent.
Rests on: what is written as a literal where it is used. A value that is computed elsewhere is not seen, so the
effective settings need a check of their own. It needs nothing but Python 3.11: copy this one file. Tests are passed
over, for they do what must be refused; a line is let off for a reason: ``# allow plain-url: loopback only``.
Controls: SUP-3, VAL-2.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

RULES = {
    "serializer": "pickle and YAML run code when they are read: use json",
    "accept-content": "name the one format that is accepted, and none that runs code when it is read",
    "no-verification": "this end of TLS verifies nothing: require a certificate and check the name in it",
    "ssl-true": "a TLS setting without cert_reqs verifies no name, or is plain text with Redis: write the whole dict",
    "plain-url": "messages and password cross the network in the clear: use amqps:// or rediss://",
    "ssl-in-url": "ssl_ parameters of a URL override the TLS settings: write them into the settings",
    "root": "a worker that runs as root gives root to whoever reaches it: use an account of its own",
    "open-flower": "Flower shows and controls every task: require a login, and keep its API closed",
    "secret-in-argv": "every user of the machine can read this: put it into a file",
    "annotations": "annotate every argument of a task, so that what does not fit can be refused",
    "limits": "give the task a time_limit, or all tasks a task_time_limit, and a bound to its retries",
    "input": "what a message says must not become code, a command, a task's name or a queue: choose from a table",
    "result-extended": "it stores the arguments of every task beside its result: leave it off",
    "eager": "eager tasks skip serializer, signature and permissions: use them in tests only",
    "signal": "an exception in a signal's receiver stops no message: sign and verify where messages are made and read",
    "unreadable": "it cannot be parsed, so nothing in it was looked at",
}
UNSAFE = {"pickle", "yaml", "application/x-python-serialize", "application/x-yaml", "application/yaml", "text/yaml"}
MIME = {"application/json": "json", "application/data": "auth"}
SIGNALS = {"before_task_publish", "after_task_publish", "task_received", "task_prerun"}
CRYPTOGRAPHY = {"sign", "signed", "verify", "hmac", "jwt", "jws", "authorize", "authorise", "authenticate"}
PROCESSES = r"(subprocess|asyncio\.create_subprocess_\w+|os\.(system|popen|exec\w+|spawn\w+|posix_spawn\w*)|pty\.spawn)"
CODE = r"(builtins\.)?(eval|exec|compile|__import__)|importlib\.import_module|runpy\.run_\w+"
LOADERS = r"(pickle|cPickle|dill|cloudpickle|marshal)\.loads?|yaml\.(unsafe_|full_)?load(_all)?|shelve\.open"
SINKS = re.compile(rf"({CODE}|{LOADERS}|{PROCESSES}(\.\w+)?)$")
TASK_NAMES = re.compile(r"(^|\.)(send_task|signature|subtask)$")
#: What comes out of these is no text that somebody chose.
CLEAN = {"int", "float", "bool", "len", "uuid.UUID", "decimal.Decimal"}

YES = r"""["']?\s*(?:[=:,]|\n\s*value:)\s*["']?(?:true|1|yes|on)\b"""
IS = r"""["']?\s*(?:[=:,]|\n\s*value:)\s*[\["']*"""
PLAIN = r"(?:py)?amqp|redis|sentinel"
# In what an operator writes: images, units, manifests, scripts, environment files.
TEXT = {
    "serializer": rf"SERIALIZER{IS}(?:pickle|yaml)\b",
    "accept-content": rf"ACCEPT_CONTENT{IS}[^\n]*(?:pickle|yaml|\*|,)",
    "no-verification": rf"CERT_NONE|cert_reqs{IS}(?:none|0)\b|check_hostname{IS}(?:false|0)\b",
    "ssl-true": rf"_USE_SSL{YES}",
    "plain-url": rf"(?<![\w+])(?:{PLAIN})://[\w\[{{$%:@]",
    "ssl-in-url": r"\b(?:amqps?|rediss?|sentinel)://\S*[?&]ssl_\w+=",
    "root": r"\bC_FORCE_ROOT\b|\bcelery\b[^\n]*--uid[= ](?:0|root)\b",
    "open-flower": rf"FLOWER_UNAUTHENTICATED_API{YES}",
    "secret-in-argv": r"--(?:basic[-_]auth|oauth2[-_]secret|cookie[-_]secret)\b",
    "result-extended": rf"RESULT_EXTENDED{YES}",
    "eager": rf"ALWAYS_EAGER{YES}",
}
TEXT_RULES = {rule: re.compile(pattern, re.IGNORECASE | re.MULTILINE) for rule, pattern in TEXT.items()}
FLOWER = re.compile(r"\bcelery\b(?:[^\n]|\n\s*-\s){0,200}?\bflower\b(?!\.)|\bmher/flower\b")
FLOWER_LOGIN = re.compile(r"FLOWER_(BASIC_AUTH|AUTH|OAUTH2)|--(basic[-_]auth|auth|conf)\b", re.IGNORECASE)
TEXT_FILES = re.compile(
    r"(Dockerfile|Containerfile|Makefile|Procfile|.*\.(ya?ml|env|cfg|ini|toml|conf|sh|service|json|properties))$|\.env"
    r"|Dockerfile\.|Containerfile\."
)
ALLOWED = re.compile(r"\ballow ([a-z-]+): \S")


class Finding(NamedTuple):
    """One line that breaks one rule."""

    path: Path
    line: int
    rule: str
    detail: str = ""

    def __str__(self) -> str:
        """Say where, what, and what to do instead."""
        return f"{self.path}:{self.line}: {self.rule}: {self.detail}{RULES[self.rule]}"


Found = Iterator[tuple[ast.AST, str, str]]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def text_of(node: ast.AST | None) -> str:
    """Return a string, with something in place of what an f-string puts in; nothing for any other node."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "x" for part in node.values)
    return ""


def last_name(node: ast.AST | None) -> str:
    """Return a name, or the last one of several with dots in between."""
    return str(getattr(node, "attr", getattr(node, "id", "")))


def dotted(node: ast.AST, imported: dict[str, str]) -> str:
    """Return the name of a function as it is known outside of this module."""
    if isinstance(node, ast.Name):
        return imported.get(node.id, node.id)
    return f"{dotted(node.value, imported)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def imports(tree: ast.Module) -> dict[str, str]:
    """Return what the names that a module imports stand for."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def settings(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Yield each name that is given a value: assigned, as an argument, in a dict, or as an item of something."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                key = target.slice if isinstance(target, ast.Subscript) else None
                name = text_of(key) or last_name(target)
                yield name.lower(), node.value
        elif isinstance(node, ast.Call):
            yield from ((keyword.arg.lower(), keyword.value) for keyword in node.keywords if keyword.arg)
            if last_name(node.func) in ("setdefault", "putenv", "setenv", "setattr"):
                yield from ((text_of(key).lower(), node.args[-1]) for key in node.args[:-1] if text_of(key))
        elif isinstance(node, ast.Dict):
            yield from ((text_of(key).lower(), value) for key, value in zip(node.keys, node.values, strict=True))


def literal(node: ast.expr) -> Any:
    """Return a literal's value, the last name of anything else that has one, or an object like nothing else."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return last_name(node) or object()


def wide(node: ast.expr) -> bool:
    """Whether a list of formats holds more than one, one that runs code, or is none: then any is accepted."""
    if not isinstance(node, ast.List | ast.Tuple | ast.Set):
        return isinstance(node, ast.Constant) and node.value is None
    formats = {MIME.get(text_of(item), text_of(item)) or ast.unparse(item) for item in node.elts}
    return len(formats) != 1 or bool(formats & (UNSAFE | {"*"}))


def without_requirement(node: ast.expr) -> bool:
    """Whether a TLS setting is ``True``, or a dict in which no certificate is required."""
    if isinstance(node, ast.Dict) and None not in node.keys:
        return bool(node.keys) and not any(text_of(key).endswith("cert_reqs") for key in node.keys)
    return literal(node) is True


def lower(node: ast.expr) -> Any:
    """Return a literal's value, text in lower case."""
    value = literal(node)
    return value.lower() if isinstance(value, str) else value


# How a setting's name ends, so that old names, Django's prefixes and arguments of tasks are the same rule.
SETTINGS: tuple[tuple[str, str, Callable[[ast.expr], bool]], ...] = (
    ("serializer", "serializer", lambda value: lower(value) in UNSAFE),
    ("accept_content", "accept-content", wide),
    ("cert_reqs", "no-verification", lambda value: lower(value) in (None, 0, "none", "cert_none", "optional")),
    ("verify_mode", "no-verification", lambda value: lower(value) == "cert_none"),
    ("check_hostname", "no-verification", lambda value: literal(value) is False),
    ("use_ssl", "ssl-true", without_requirement),
    ("c_force_root", "root", lambda value: literal(value) not in (None, False, "")),
    ("flower_unauthenticated_api", "open-flower", lambda value: lower(value) in (True, "true", "1", "yes", "on")),
    ("result_extended", "result-extended", lambda value: literal(value) is True),
    ("always_eager", "eager", lambda value: literal(value) is True),
    ("^max_retries", "limits", lambda value: isinstance(value, ast.Constant) and value.value is None),
)


def wrong_settings(tree: ast.Module) -> Found:
    """Find what Celery, kombu and their clients are told to do."""
    for name, value in settings(tree):
        for end, rule, wrong in SETTINGS:
            if re.search(f"{end}$", name) and wrong(value):
                yield value, rule, f"{name}: "
    for node in ast.walk(tree):
        called = last_name(node.func) if isinstance(node, ast.Call) else ""
        if called in ("register_pickle", "register_yaml", "enable_insecure_serializers"):
            yield node, "serializer", f"{called}(): "


def wrong_text(tree: ast.Module) -> Found:
    """Find it in strings that are used, and in lists of them that make a command."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    prose |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        text = "" if id(node) in prose else text_of(node)
        if re.search(rf"(^|;)({PLAIN})://[^\s]", text, re.IGNORECASE):
            yield node, "plain-url", ""
        for rule in ("ssl-in-url", "secret-in-argv"):
            if TEXT_RULES[rule].search(text):
                yield node, rule, ""
        if isinstance(node, ast.List | ast.Tuple):
            text = " ".join(text_of(item) for item in node.elts)
        if FLOWER.search(text) and not FLOWER_LOGIN.search(text):
            yield node, "open-flower", ""


def task_options(function: Function, imported: dict[str, str]) -> dict[str | None, ast.expr] | None:
    """Return the options of a task's decorator, or None for a function that is no task."""
    for decorator in function.decorator_list:
        call = decorator if isinstance(decorator, ast.Call) else None
        name = dotted(call.func if call else decorator, imported)
        if re.search(r"(^|\.)shared_task$|(app|celery)\.(\w+\.)?task$", name, re.IGNORECASE):
            return {keyword.arg: keyword.value for keyword in call.keywords} if call else {}
    return None


def wrong_tasks(tree: ast.Module, limited: bool) -> Found:
    """Find tasks without types or limits, and what a task, or a view, does with what it was given."""
    imported = imports(tree)
    for function in ast.walk(tree):
        if not isinstance(function, Function):
            continue
        options = task_options(function, imported)
        given = {"request"}
        if options is not None:
            spec = function.args
            bound = "bind" in options and literal(options["bind"]) is True
            arguments = [*spec.posonlyargs, *spec.args][1 if bound else 0 :]
            arguments += [argument for argument in (*spec.kwonlyargs, spec.vararg, spec.kwarg) if argument]
            given = {argument.arg for argument in arguments}
            if missing := [argument.arg for argument in arguments if argument.annotation is None]:
                yield function, "annotations", f"{function.name}({', '.join(missing)}): "
            none = ast.Constant(None)
            if not limited and None not in options and literal(options.get("time_limit", none)) is None:
                yield function, "limits", f"{function.name}: "
        yield from Flow(function, given, imported).sinks()


class Flow:
    """What a function makes of its input: names that hold some of it, and calls that it must not reach."""

    def __init__(self, function: Function, given: set[str], imported: dict[str, str]) -> None:
        """Follow it through assignments and loops, until there are no more names."""
        self.function, self.imported, self.names = function, imported, set(given)
        before = -1
        while before != len(self.names):
            before = len(self.names)
            for node in ast.walk(function):
                value = getattr(node, "iter", getattr(node, "context_expr", getattr(node, "value", None)))
                targets = getattr(node, "targets", [getattr(node, "target", getattr(node, "optional_vars", None))])
                if isinstance(value, ast.expr) and self.holds(value):
                    found = (name for target in targets if isinstance(target, ast.AST) for name in ast.walk(target))
                    self.names |= {name.id for name in found if isinstance(name, ast.Name)}

    def holds(self, node: ast.AST) -> bool:
        """Whether an expression holds input: not what was looked up by it in a table, and no number."""
        if isinstance(node, ast.Name):
            return node.id in self.names
        if isinstance(node, ast.Subscript):
            return self.holds(node.value)
        if isinstance(node, ast.Call):
            if dotted(node.func, self.imported) in CLEAN:
                return False
            if isinstance(node.func, ast.Attribute) and node.func.attr == "get":
                return self.holds(node.func.value)
        return any(self.holds(child) for child in ast.iter_child_nodes(node))

    def sinks(self) -> Found:
        """Find the calls that it reaches."""
        for node in ast.walk(self.function):
            if isinstance(node, ast.Subscript) and last_name(node.value) == "tasks" and self.holds(node.slice):
                yield node, "input", "tasks[...]: "
            if not isinstance(node, ast.Call):
                continue
            name = dotted(node.func, self.imported)
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            arguments = [*node.args, *keywords.values()]
            watched = arguments if SINKS.match(name) else arguments[:1] if TASK_NAMES.search(name) else []
            if any(self.holds(argument) for argument in watched):
                yield node, "input", f"{name}(): "
            for option in {"queue", "routing_key", "exchange"} & keywords.keys():
                if self.holds(keywords[option]):
                    yield node, "input", f"{option}=: "


def wrong_signals(tree: ast.Module) -> Found:
    """Find receivers of signals that sign or verify."""
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, Function)}
    receivers: list[ast.AST | None] = []
    for node in ast.walk(tree):
        for connect in [*getattr(node, "decorator_list", []), node]:
            function = connect.func if isinstance(connect, ast.Call) else connect
            signal = function.value if isinstance(function, ast.Attribute) and function.attr == "connect" else None
            if last_name(signal) in SIGNALS:
                arguments = connect.args if isinstance(connect, ast.Call) else []
                receivers += [node] if connect is not node else [functions.get(getattr(a, "id", "")) for a in arguments]
    for receiver in filter(None, receivers):
        for node in ast.walk(receiver):
            if isinstance(node, ast.Call):
                words = re.findall(r"[a-z]+", re.sub(r"([A-Z])", r" \1", dotted(node.func, {})).lower())
                if CRYPTOGRAPHY & {*words}:
                    yield node, "signal", f"{dotted(node.func, {})}(): "


def looks_like_a_test(path: Path) -> bool:
    """Whether a file is part of a test suite, by its name or its folder's."""
    return bool({"tests", "test"} & {*path.parts}) or bool(re.search(r"^test_|_test\.py$|^conftest\.py$", path.name))


def findings(paths: list[Path]) -> list[Finding]:
    """Look at all files at once: a limit for all tasks may be in another file than they are."""
    texts = {path: path.read_text(encoding="utf-8", errors="replace") for path in paths}
    found, trees = [], {}
    for path, text in texts.items():
        if path.suffix == ".py":
            try:
                trees[path] = ast.parse(text)
            except (SyntaxError, ValueError) as error:
                found.append(Finding(path, getattr(error, "lineno", None) or 1, "unreadable"))
            continue
        for rule, pattern in TEXT_RULES.items():
            found += [Finding(path, line_of(text, match.start()), rule) for match in pattern.finditer(text)]
        if not FLOWER_LOGIN.search(text):
            found += [Finding(path, line_of(text, match.start()), "open-flower") for match in FLOWER.finditer(text)]
    limited = any(
        name.endswith("task_time_limit") and literal(value) is not None
        for tree in trees.values()
        for name, value in settings(tree)
    )
    for path, tree in trees.items():
        for check in (wrong_settings(tree), wrong_text(tree), wrong_tasks(tree, limited), wrong_signals(tree)):
            found += [Finding(path, getattr(node, "lineno", 1), rule, detail) for node, rule, detail in check]
    return sorted({finding for finding in found if not let_off(finding, texts[finding.path])})


def line_of(text: str, position: int) -> int:
    """Return the number of the line that holds a position."""
    return text.count("\n", 0, position) + 1


def let_off(finding: Finding, text: str) -> bool:
    """Whether it is in a comment, or is allowed with a reason on its line."""
    line = text.splitlines()[finding.line - 1] if text else ""
    comment = finding.path.suffix != ".py" and line.lstrip().startswith(("#", ";", "//"))
    allowed = ALLOWED.search(line)
    return comment or bool(allowed and allowed[1] == finding.rule)


def files(arguments: list[str]) -> list[Path]:
    """Return the files that were named, and those of folders; no tests, nothing hidden, no environments."""
    chosen = []
    for root in map(Path, arguments or ["."]):
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            inner = path.relative_to(root) if root.is_dir() else Path(path.name) if path.is_absolute() else path
            hidden = root.is_dir() and any(part.startswith(".") for part in inner.parts[:-1])
            skipped = hidden or looks_like_a_test(inner) or {"node_modules", "site-packages"} & {*inner.parts}
            if path.is_file() and not skipped and (path.suffix == ".py" or TEXT_FILES.match(path.name)):
                chosen.append(path)
    return chosen


def main() -> int:
    """Return 0 if no rule is broken, 1 after a line for each finding."""
    found = findings(files(sys.argv[1:]))
    for finding in found:
        print(finding)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
