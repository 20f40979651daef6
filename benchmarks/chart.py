"""The report as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NAMES = {
    "json": "unsigned JSON",
    "auth": "Celery's own signing",
    "signed": "ours, without replay guard",
    "guarded": "ours",
}
_COLOURS = {"json": "#9aa5b1", "auth": "#d98c5f", "signed": "#6fa8c9", "guarded": "#1f6f9f"}
_PANELS = (("publish.cpu", "CPU for each message published"), ("consume.cpu", "CPU for each message consumed"))
_WIDTH, _BAR, _LABEL, _LONGEST = 680, 22, 200, 360


def markdown(
    medians: Mapping[str, Mapping[str, float]],
    goals: Sequence[Mapping[str, Any]],
    measures: Mapping[str, tuple[str, bool]],
    parts: Mapping[str, float],
) -> str:
    """Return medians, goals and what the layer's parts cost as tables; a ratio is above 1 where ours is better."""
    lines = [f"| | {' | '.join(NAMES.values())} |", "|---|" + "---:|" * len(NAMES)]
    for measure, (title, _) in measures.items():
        lines.append(f"| {title} | {' | '.join(f'{medians[profile][measure]:.4g}' for profile in NAMES)} |")
    lines += ["", "| goal | at least | reached | |", "|---|---:|---:|---|"]
    for goal in goals:
        title = f"{NAMES[goal['profile']]}, {measures[goal['measure']][0]}, against {NAMES[goal['against']]}"
        met = "met" if goal["reached"] >= goal["goal"] else "**missed**"
        lines.append(f"| {title} | {goal['goal']:.2f} | {goal['reached']:.2f} | {met} |")
    lines += ["", "| part of ours | CPU µs for each message |", "|---|---:|"]
    lines += [f"| {part} | {cost:.0f} |" for part, cost in parts.items()]
    consumed = [cost for part, cost in parts.items() if not part.startswith("publisher") and ": of " not in part]
    more = medians["guarded"]["consume.cpu"] - medians["json"]["consume.cpu"]
    lines += [
        f"| all parts of worker and pool child | {sum(consumed):.0f} |",
        f"| what ours takes more than unsigned JSON | {more:.0f} |",
    ]
    return "\n".join(lines)


def chart(medians: Mapping[str, Mapping[str, float]]) -> str:
    """Return bars of CPU time, relative to unsigned JSON; shorter is better."""
    rows: list[str] = []
    y = 8
    for measure, title in _PANELS:
        y += 20
        rows.append(f'<text x="8" y="{y}" font-weight="bold">{title}, unsigned JSON = 1</text>')
        y += 10
        longest = max(medians[profile][measure] for profile in NAMES)
        for profile, name in NAMES.items():
            value = medians[profile][measure]
            width = value / longest * _LONGEST
            place = f'x="{_LABEL}" y="{y}" width="{width:.1f}" height="{_BAR - 4}"'
            rows.append(f'<text x="8" y="{y + 15}">{name}</text>')
            rows.append(f'<rect {place} rx="2" fill="{_COLOURS[profile]}"/>')
            rows.append(
                f'<text x="{_LABEL + width + 8:.1f}" y="{y + 15}">{value / medians["json"][measure]:.2f}</text>'
            )
            y += _BAR
    style = 'font-family="system-ui, sans-serif" font-size="13" fill="#1f2933"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y + 12}" role="img" {style}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *rows, "</svg>"]) + "\n"
