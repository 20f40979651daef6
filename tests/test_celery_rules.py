"""``tools/celery_rules.py`` finds each misuse of Celery where it is planted, and none in what does it right (SUP-3)."""

from __future__ import annotations

import contextlib
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .baking import PROJECT

RULES = PROJECT / "tools" / "celery_rules.py"
HEAD = "import subprocess\nfrom uuid import UUID\nfrom celery import Celery, shared_task\napp = Celery()\n"
TASK = "@shared_task(time_limit=9)\ndef work(name: str, number: int) -> None:\n    "
SIGNAL = "from celery.signals import before_task_publish\n"

# rule, file, what is found in it, what is not.
PLANTED = [
    ("serializer", "conf.py", 'app.conf.task_serializer = "pickle"', 'app.conf.task_serializer = "json"'),
    ("serializer", "conf.py", 'CELERY_RESULT_SERIALIZER = "yaml"', 'CELERY_RESULT_SERIALIZER = "json"'),
    ("serializer", "conf.py", 'app.conf.update(event_serializer="PICKLE")', 'app.conf.update(event_serializer="auth")'),
    ("serializer", "conf.py", '@app.task(serializer="pickle", time_limit=9)\ndef f(): ...', 'open("pickle")'),
    ("serializer", "conf.py", "kombu.enable_insecure_serializers()", "kombu.disable_insecure_serializers()"),
    ("serializer", "deploy.yaml", "CELERY_TASK_SERIALIZER: pickle", "CELERY_TASK_SERIALIZER: json"),
    ("serializer", "pod.yaml", "- name: CELERY_TASK_SERIALIZER\n  value: pickle", "- name: PICKLES\n  value: many"),
    ("accept-content", "conf.py", 'accept_content = ["json", "pickle"]', 'accept_content = ["json"]'),
    ("accept-content", "conf.py", 'accept_content = ["auth", "json"]', 'accept_content = ["json", "application/json"]'),
    ("accept-content", "conf.py", "app.conf.accept_content = None", "app.conf.accept_content = [OURS]"),
    ("accept-content", "conf.py", 'conf = {"result_accept_content": []}', 'conf = {"accept_content": ("auth",)}'),
    ("accept-content", "a.env", "CELERY_ACCEPT_CONTENT=json,pickle", "CELERY_ACCEPT_CONTENT=json"),
    ("no-verification", "conf.py", 'tls = {"cert_reqs": ssl.CERT_NONE}', 'tls = {"cert_reqs": ssl.CERT_REQUIRED}'),
    ("no-verification", "conf.py", 'tls = {"ssl_cert_reqs": "none"}', 'tls = {"ssl_cert_reqs": "required"}'),
    ("no-verification", "conf.py", "context.verify_mode = ssl.CERT_NONE", "assert mode != ssl.CERT_NONE"),
    ("no-verification", "conf.py", "redis(ssl_check_hostname=False)", "redis(ssl_check_hostname=True)"),
    ("no-verification", "x.toml", 'ssl_cert_reqs = "CERT_NONE"', 'ssl_cert_reqs = "required"'),
    ("ssl-true", "conf.py", "broker_use_ssl = True", "broker_use_ssl = builder(settings)"),
    ("ssl-true", "conf.py", "CELERY_REDIS_BACKEND_USE_SSL = True", "use_ssl = {**tls}"),
    ("ssl-true", "conf.py", 'broker_use_ssl = {"ca_certs": CA}', 'broker_use_ssl = {"ca_certs": CA, "cert_reqs": 2}'),
    ("ssl-true", "a.env", "CELERY_BROKER_USE_SSL=true", "CELERY_BROKER_USE_SSL_CA=/ca.pem"),
    ("plain-url", "conf.py", 'app = Celery(broker="amqp://guest@broker//")', 'app = Celery(broker="amqps://broker//")'),
    ("plain-url", "conf.py", 'URL = f"redis://{HOST}/0"', 'URL = f"rediss://{HOST}/0"'),
    ("plain-url", "conf.py", 'URL = "amqps://a//;amqp://b//"', 'reason = "not amqp://b"'),
    ("plain-url", "conf.py", 'URL = "sentinel://a:26379"', 'assert url.startswith("redis://")'),
    ("plain-url", "compose.yaml", "environment: {BROKER: redis://redis:6379/0}", "environment: {BROKER: rediss://r/0}"),
    ("plain-url", "Dockerfile", "ENV BROKER=amqp://rabbit//", "# ENV BROKER=amqp://rabbit//"),
    ("plain-url", "run.sh", 'export BROKER="amqp://$HOST//"', 'export BROKER="amqps://$HOST//"'),
    ("ssl-in-url", "conf.py", 'URL = "rediss://r/0?ssl_cert_reqs=none"', 'URL = "rediss://r/0?db=1"'),
    ("ssl-in-url", "a.env", "BROKER=rediss://r/0?db=1&ssl_ca_certs=/ca.pem", "BROKER=rediss://r/0?timeout=1"),
    ("root", "conf.py", 'os.environ["C_FORCE_ROOT"] = "1"', 'os.environ["C_FORCE_ROOT"] = ""'),
    ("root", "conf.py", 'os.environ.setdefault("C_FORCE_ROOT", "1")', 'os.environ.pop("C_FORCE_ROOT")'),
    ("root", "Dockerfile", "ENV C_FORCE_ROOT=1", "USER 10001"),
    ("root", "w.service", "ExecStart=celery -A x worker --uid=0", "ExecStart=celery -A x worker --uid=10001"),
    ("open-flower", "a.env", "FLOWER_UNAUTHENTICATED_API=true", "FLOWER_UNAUTHENTICATED_API=false"),
    ("open-flower", "pod.yaml", "name: FLOWER_UNAUTHENTICATED_API\nvalue: 'true'", "name: FLOWER_PORT\nvalue: '1'"),
    ("open-flower", "conf.py", 'environ["FLOWER_UNAUTHENTICATED_API"] = "1"', 'environ["FLOWER_PORT"] = "1"'),
    ("open-flower", "compose.yaml", "command: celery -A x flower", "command: celery -A x flower --conf=/etc/flower.py"),
    ("open-flower", "pod.yaml", "args:\n  - celery\n  - -A\n  - x\n  - flower", "args:\n  - celery\n  - worker"),
    ("open-flower", "conf.py", 'run(["celery", "flower"])', 'run(["celery", "flower", "--conf=f.py"])'),
    ("secret-in-argv", "run.sh", "celery flower --basic_auth=a:b", "FLOWER_BASIC_AUTH=$(cat file) celery flower"),
    ("secret-in-argv", "conf.py", 'run(["celery", "flower", f"--basic-auth={x}"])', 'run(["celery", "worker"])'),
    ("secret-in-argv", "compose.yaml", "command: [flower, --cookie_secret=x]", "command: [flower, --conf=x]"),
    ("annotations", "t.py", "@app.task(time_limit=9)\ndef f(a, *rest): ...", "def f(a, *rest): ..."),
    ("annotations", "t.py", "@shared_task(time_limit=9)\nasync def f(*, a): ...", TASK + "pass"),
    (
        "annotations",
        "t.py",
        "@app.task(bind=True, time_limit=9)\ndef f(self, a): ...",
        "@app.task(bind=True, time_limit=9)\ndef f(self, a: int): ...",
    ),
    ("limits", "t.py", "@shared_task\ndef f(): ...", "@shared_task(time_limit=9)\ndef f(): ..."),
    ("limits", "t.py", "@app.task()\ndef f(): ...", "app.conf.task_time_limit = 9\n@app.task()\ndef f(): ..."),
    ("limits", "t.py", "@shared_task(time_limit=None)\ndef f(): ...", "@shared_task(**limits)\ndef f(): ..."),
    ("limits", "t.py", "@app.task(time_limit=9, max_retries=None)\ndef f(): ...", "connect(connect_max_retries=None)"),
    ("input", "t.py", TASK + "eval(name)", TASK + "eval('1')"),
    ("input", "t.py", TASK + "x = name.strip()\n    exec(f'{x}()')", TASK + "x = TABLE[name]\n    x()"),
    ("input", "t.py", TASK + "subprocess.run(['ls', name])", TASK + "subprocess.run(['ls', TABLE[name]])"),
    ("input", "t.py", "from subprocess import run as go\n" + TASK + "go(name)", TASK + "run(name)"),
    ("input", "t.py", TASK + "import os\n    os.system('ls ' + name)", TASK + "os.stat(name)"),
    ("input", "t.py", TASK + "for part in name.split():\n        eval(part)", TASK + "eval(str(UUID(name)))"),
    ("input", "t.py", TASK + "app.send_task(name)", TASK + "app.send_task('tasks.a', args=[name])"),
    ("input", "t.py", TASK + "app.tasks[name].delay()", TASK + "app.tasks['tasks.a'].delay(name)"),
    ("input", "t.py", TASK + "other.apply_async(queue=name)", TASK + "other.apply_async(queue=QUEUES.get(name))"),
    ("input", "t.py", TASK + "pickle.loads(name)", TASK + "json.loads(name)"),
    ("input", "t.py", "def view(request):\n    app.send_task(request.GET['t'])", "def view(request):\n    f(request)"),
    ("result-extended", "conf.py", "app.conf.result_extended = True", "app.conf.result_extended = False"),
    ("result-extended", "a.env", "CELERY_RESULT_EXTENDED=1", "CELERY_RESULT_EXTENDED=0"),
    ("eager", "conf.py", "CELERY_TASK_ALWAYS_EAGER = True", "CELERY_TASK_ALWAYS_EAGER = False"),
    ("eager", "a.env", "CELERY_TASK_ALWAYS_EAGER=true", "CELERY_TASK_ALWAYS_EAGER=false"),
    (
        "signal",
        "conf.py",
        SIGNAL + "@before_task_publish.connect\ndef f(headers, **_):\n    headers['mac'] = hmac.new(KEY)",
        SIGNAL + "@before_task_publish.connect\ndef f(headers, **_):\n    log(headers)",
    ),
    (
        "signal",
        "conf.py",
        "from celery import signals\ndef f(**_):\n    key.verify(_)\nsignals.task_prerun.connect(f)",
        "from celery import signals\ndef f(**_):\n    key.verify(_)\nsignals.worker_ready.connect(f)",
    ),
    ("unreadable", "conf.py", "def f(:", "def f(): ..."),
]


CHECKER = runpy.run_path(str(RULES))


def found(folder: Path, *names: str) -> list[str]:
    """Return the rule of each finding in a folder, or in some of its files."""
    with contextlib.chdir(folder):
        return [finding.rule for finding in CHECKER["findings"](CHECKER["files"](list(names)))]


@pytest.fixture
def service(tmp_path: Path) -> Path:
    """Give a folder for a service, in one of whose parents tests could be."""
    folder = tmp_path / "tests" / "service"
    folder.mkdir(parents=True)
    return folder


def write(folder: Path, name: str, text: str) -> None:
    """Write one file of a service; Python gets the imports it needs."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((HEAD if path.suffix == ".py" else "") + text + "\n", encoding="utf-8")


@pytest.mark.parametrize(("rule", "name", "bad", "good"), PLANTED)
def test_a_rule_finds_what_is_planted_and_not_what_is_right(
    rule: str, name: str, bad: str, good: str, service: Path
) -> None:
    write(service, name, bad)
    assert found(service) == [rule]
    write(service, name, good)
    assert found(service) == []


def test_every_rule_has_a_planted_example() -> None:
    assert CHECKER["RULES"].keys() == {rule for rule, *_ in PLANTED}


def test_the_one_file_alone_says_where_and_what_to_do(service: Path) -> None:
    """As somebody runs it who has copied it: no packages, nothing of an environment."""
    alone = shutil.copy(RULES, service.parent / "celery_rules.py")
    write(service, "a/conf.py", 'task_serializer = "pickle"')
    command = [sys.executable, "-I", "-S", alone, "."]
    done = subprocess.run(command, cwd=service, capture_output=True, text=True, check=False)
    line = HEAD.count("\n") + 1
    said = f"a/conf.py:{line}: serializer: task_serializer: pickle and YAML run code when they are read: use json\n"
    assert (done.returncode, done.stdout) == (1, said)
    write(service, "a/conf.py", 'task_serializer = "json"')
    done = subprocess.run(command, cwd=service, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("comment", "rules"),
    [
        ("# allow plain-url: loopback only", []),
        ("# allow plain-url", ["plain-url"]),
        ("# allow plain-url:", ["plain-url"]),
        ("# allow eager: another rule", ["plain-url"]),
    ],
)
@pytest.mark.parametrize(("name", "line"), [("conf.py", 'URL = "redis://here"'), ("a.yaml", "url: redis://here")])
def test_a_line_is_let_off_for_a_reason(comment: str, rules: list[str], name: str, line: str, service: Path) -> None:
    write(service, name, f"{line}  {comment}")
    assert found(service) == rules


def test_tests_may_do_what_must_be_refused(service: Path) -> None:
    for name in ("tests/unit/things.py", "test/things.py", "src/test_things.py", "src/things_test.py", "conftest.py"):
        write(service, name, 'task_always_eager = True\nURL = "amqp://here"\ntask_serializer = "pickle"')
    assert found(service) == []
    write(service, "src/contest.py", "task_always_eager = True")
    assert found(service) == found(service, str(service)) == found(service, str(service / "src")) == ["eager"]
    assert found(service, "src/contest.py") == found(service, str(service / "src/contest.py")) == ["eager"]
    assert found(service, "src/test_things.py") == found(service, "tests/unit/things.py") == []


def test_a_limit_in_another_file_is_a_limit_and_one_in_the_environment_is_hidden(service: Path) -> None:
    write(service, "tasks.py", "@shared_task\ndef f(): ...")
    write(service, "conf.py", "task_time_limit = 30")
    write(service, ".venv/lib/conf.py", 'task_serializer = "pickle"')
    assert found(service) == []
    assert found(service, "tasks.py") == ["limits"]


def test_documentation_is_no_misuse(service: Path) -> None:
    write(service, "conf.py", '"""Never write amqp://here."""\nclass A:\n    """redis://here?ssl_cert_reqs=none"""')
    write(service, "README.md", "C_FORCE_ROOT=1 celery -A x flower --basic_auth=a:b")
    write(service, "a.yaml", "# redis://here\n  # C_FORCE_ROOT=1")
    assert found(service) == []
