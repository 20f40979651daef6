"""Refuse bad answers where Cookiecutter did not ask for them: those of a replay file.

Rendering the last line applies the rules, which are in ``secure_celery_answers.py``; Cookiecutter then removes the
folder. Everywhere else they were applied before that folder was made, which is why they are not in this file.
Controls: TPL-2.
"""

CHECKED = "{{ cookiecutter | checked }}"
