"""Keep what was chosen and drop the rest, from one table.

Guards against: a project with parts nobody asked for, and hooks that grow a function per feature.
Rests on: every path of the table being in the template, which its tests check for every answer.
Controls: TPL-1.
"""

import json
import shutil
from pathlib import Path

ANSWERS = json.loads({{cookiecutter | jsonify | jsonify}})

# question -> answer -> {path in the template: path in the project}. Not chosen: dropped, file or folder.
PARTS = {
    "broker": {
        "rabbitmq": {
            "deploy/rabbitmq": "deploy/rabbitmq",
            "tests/live/test_attacks.py": "tests/live/test_attacks.py",
        },
        "redis": {
            "deploy/redis/broker.acl": "deploy/redis/broker.acl",
            "deploy/redis/broker.conf": "deploy/redis/broker.conf",
            "deploy/redis/broker.md": "deploy/redis/broker.md",
        },
    },
    "licence": {
        "MIT": {"LICENSE.mit": "LICENSE"},
        "Apache-2.0": {"LICENSE.apache": "LICENSE"},
        "BSD-3-Clause": {"LICENSE.bsd": "LICENSE"},
        "Proprietary": {"LICENSE.proprietary": "LICENSE"},
    },
}

for question, choices in PARTS.items():
    for answer, paths in choices.items():
        for source, target in paths.items():
            path = Path(source)
            if answer == ANSWERS[question]:
                path.rename(target)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
