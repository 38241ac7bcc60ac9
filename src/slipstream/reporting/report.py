"""The HTML report of a run: one file that opens anywhere, reads without a network, and can be sent to a colleague."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from .completions import CompletionRow
from .figures import Figure, figures
from .history import is_number, series
from .samples import samples
from .text import duration, number

_HERE = Path(__file__).parent
_SECRET = re.compile(r"(api_key|secret|password|credentials?)$|(hub|auth|access|server|bearer|hf)_token$|^token$", re.I)


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    history: Sequence[Mapping[str, Any]],
    completions: Sequence[CompletionRow],
    config: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report of a run as one HTML file.

    Curves of reward, held-out accuracy, length, KL, ratios, loss, entropy and time per phase, each left out where its
    metrics were not logged; and a browser of completions by step. plotly.js is inside the file (about 5 MB), and a
    content security policy in it forbids every request. Completions are model output: they are data to the page, never
    markup. The file is replaced in one move, so a running training can rewrite it.

    Args:
        path: The file to write; its folder is made.
        title: Heading of the page.
        history: `trainer.state.log_history`.
        completions: Rows to browse, in any order. A report carries a limited number and says what it leaves out.
        config: Settings to list. Values of keys that name a secret (`hub_token`, `api_key`, …) are masked.
        summary: Key numbers for the top, in order. `accuracy_before` with `accuracy_after` (shares of one), `duration`
            (seconds), `steps` and `tokens` are known; any other key is shown as it is called. None: what the history
            tells.

    Returns:
        The path written.
    """
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    path = Path(path)
    drawn = figures(
        history, {name for row in completions for name in row.rewards if row.rewards[name] not in (0, 1, None)}
    )
    browser = samples(completions)
    scripts = [get_plotlyjs().replace("\r\n", "\n"), (_HERE / "report.js").read_text(encoding="utf-8")]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.jinja").render(
        title=title,
        written=datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        tiles=_tiles(summary if summary is not None else _summary(history)),
        sections=_sections(drawn),
        thinned=max((figure.thinned for figure in drawn), default=1),
        browser=browser,
        config=[(name, _setting(name, value)) for name, value in (config or {}).items()],
        data=Markup(_json_for_html({"figures": [_plain(figure) for figure in drawn], "browser": browser})),
        css=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        # Only these two scripts run, by their hash: markup that slipped in through any field could not.
        policy="; ".join(
            [
                "default-src 'none'",
                "script-src " + " ".join(_hash(script) for script in scripts),
                "style-src 'unsafe-inline'",
                "img-src data: blob:",
                "base-uri 'none'",
                "form-action 'none'",
            ]
        ),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    scratch.write_bytes(page.encode(errors="backslashreplace"))
    os.replace(scratch, path)
    return path


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _json_for_html(data: Any) -> str:
    """JSON that an HTML parser reads as text only: no `</script>`, no comment, nothing but ASCII."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(figure: Figure) -> dict[str, Any]:
    """A figure as JSON data, its numbers cut to what a screen can show."""
    plain = asdict(figure)
    for curve in plain["curves"]:
        for values in ("y", "low", "high"):
            if curve[values]:
                curve[values] = [None if value is None else float(f"{value:.6g}") for value in curve[values]]
    return plain


def _sections(drawn: Sequence[Figure]) -> list[dict[str, Any]]:
    """Figures by section, each with its index in the page's data."""
    found: dict[str, list[tuple[int, Figure]]] = {}
    for i, figure in enumerate(drawn):
        found.setdefault(figure.section, []).append((i, figure))
    return [{"name": name, "figures": members} for name, members in found.items()]


def _summary(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Key numbers out of the history, for a caller who gave none."""
    found: dict[str, Any] = {}
    for metric, name in (("eval_reward", "held-out reward"), ("reward", "reward")):
        values = [value for value in series(history, metric).values() if value is not None]
        if values:
            found[name] = f"{number(values[0])} → {number(values[-1])}" if len(values) > 1 else values[0]
            break
    runtimes = [entry["train_runtime"] for entry in history if is_number(entry.get("train_runtime"))]
    if runtimes:
        found["duration"] = runtimes[-1]
    steps = [entry["step"] for entry in history if isinstance(entry.get("step"), int)]
    if steps:
        found["steps"] = max(steps)
    tokens = [value for value in series(history, "num_tokens").values() if value is not None]
    if tokens:
        found["tokens"] = tokens[-1]
    return found


def _tiles(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Label and value of each key number; the two accuracies make one tile."""
    tiles = []
    before, after = summary.get("accuracy_before"), summary.get("accuracy_after")
    for name, value in summary.items():
        label = name.replace("_", " ")
        label = label[:1].upper() + label[1:]
        if name == "accuracy_before" and is_number(before) and is_number(after):
            continue
        if name == "accuracy_after" and is_number(before) and is_number(after):
            tiles.append({"label": "Held-out accuracy", "value": f"{100 * after:.3g}%", "was": f"{100 * before:.3g}%"})
        elif name in ("accuracy_before", "accuracy_after") and is_number(value):
            tiles.append({"label": f"Held-out {label.lower()}", "value": f"{100 * value:.3g}%"})
        elif name == "duration" and is_number(value):
            tiles.append({"label": label, "value": duration(value)})
        elif value is None or isinstance(value, float) or is_number(value):
            tiles.append({"label": label, "value": number(value)})
        else:
            tiles.append({"label": label, "value": str(value)})
    return tiles


def _setting(name: str, value: Any) -> str:
    """A setting's value as text, with secrets masked at any depth."""
    if _SECRET.search(name) and value:
        return "(hidden)"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_setting(str(key), inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_setting("", inner) for inner in value) + "]"
    return str(value)
