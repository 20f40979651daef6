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
            "compose.rabbitmq.yaml": "compose.yaml",
            "deploy/rabbitmq": "deploy/rabbitmq",
            "deploy/kubernetes/components/keda": "deploy/kubernetes/components/keda",
        },
        "redis": {
            "compose.redis.yaml": "compose.yaml",
            "deploy/redis/broker.acl": "deploy/redis/broker.acl",
            "deploy/redis/broker.conf": "deploy/redis/broker.conf",
            "deploy/redis/broker.md": "deploy/redis/broker.md",
        },
    },
    "kubernetes": {
        "yes": {
            "deploy/kubernetes": "deploy/kubernetes",
            "deploy/rabbitmq/kustomization.yaml": "deploy/rabbitmq/kustomization.yaml",
            "deploy/redis/kustomization.yaml": "deploy/redis/kustomization.yaml",
            "tools/kubernetes.py": "tools/kubernetes.py",
        },
        "no": {},
    },
    "ci": {
        "github": {".github": ".github"},
        "gitlab": {".gitlab": ".gitlab", ".gitlab-ci.yml": ".gitlab-ci.yml", "renovate.json": "renovate.json"},
    },
    "flower": {
        "basic": {
            "deploy/kubernetes/components/flower": "deploy/kubernetes/components/flower",
            "requirements/flower.in": "requirements/flower.in",
            "requirements/flower.txt": "requirements/flower.txt",
            "src/{{cookiecutter.package_name}}/flower.py": "src/{{cookiecutter.package_name}}/flower.py",
        },
        "oidc": {
            "deploy/kubernetes/components/flower": "deploy/kubernetes/components/flower",
            "deploy/kubernetes/components/flower/proxy.yaml": "deploy/kubernetes/components/flower/proxy.yaml",
            "deploy/kubernetes/components/flower/oauth2-proxy.yaml": "deploy/oauth2-proxy/kustomization.yaml",
            "deploy/oauth2-proxy": "deploy/oauth2-proxy",
            "requirements/flower.in": "requirements/flower.in",
            "requirements/flower.txt": "requirements/flower.txt",
            "src/{{cookiecutter.package_name}}/flower.py": "src/{{cookiecutter.package_name}}/flower.py",
        },
        "none": {},
    },
    "licence": {
        "MIT": {"LICENSE.mit": "LICENSE"},
        "Apache-2.0": {"LICENSE.apache": "LICENSE"},
        "BSD-3-Clause": {"LICENSE.bsd": "LICENSE"},
        "Proprietary": {"LICENSE.proprietary": "LICENSE"},
    },
}

for question, choices in PARTS.items():
    chosen = choices[ANSWERS[question]]
    for path in {Path(source) for paths in choices.values() for source in paths if source not in chosen}:
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():  # else another answer has dropped its folder
            path.unlink()
    for source, target in chosen.items():
        if Path(source).exists():
            Path(source).rename(target)
