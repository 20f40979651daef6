"""Refuse bad answers where Cookiecutter did not ask for them: those of a replay file.

Rendering the last line applies the rules of ``secure_celery_answers.py``; Cookiecutter removes its folder.
Other answers were checked before that folder was made, which is why the rules are not in this file.
Controls: TPL-2.
"""

CHECKED = "{{ cookiecutter | checked }}"
