"""The report of one exported network: ``report.json`` holds every figure, ``report.html`` is drawn from it alone.

Torch-free, so that the worker can add what reloading the files in a clean process measured, and draw it again.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from search.charts import bar, line, scatter

__all__ = ["add_reloaded", "render", "write"]

Facts = Mapping[str, Any]

STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#647084;--line:#dbe1ea;--paper:#fff;--mark:#2563c9;
--good:#1c7c4a;--bad:#b3341f}
@media(prefers-color-scheme:dark){:root{--ink:#e5e9f0;--soft:#97a3b6;--line:#303a49;--paper:#141a22;--mark:#6da3f5;
--good:#5cc28e;--bad:#ef8a75}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:60rem;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin-top:2.2rem}p.lead{color:var(--soft);margin-top:0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}.wide{overflow-x:auto}
th,td{text-align:right;padding:.3rem .6rem;border-bottom:1px solid var(--line)}th{color:var(--soft);font-weight:600}
th:first-child,td:first-child{text-align:left}code{font-size:.85em;overflow-wrap:anywhere}
.good{color:var(--good);font-weight:600}.bad{color:var(--bad);font-weight:600}
svg.chart{width:100%;height:auto}svg text{fill:var(--soft);font-size:11px}svg .grid{stroke:var(--line)}
svg .dot{fill:var(--mark);opacity:.75}svg .chosen{fill:none;stroke:var(--bad);stroke-width:2.5}
svg .path{fill:none;stroke:var(--mark);stroke-width:2}
svg.bar{width:8rem;height:.7rem}svg .rail{fill:var(--line)}svg .fill{fill:var(--mark)}
"""


def write(facts: Facts, out: Path) -> list[Path]:
    """Write ``report.json`` and ``report.html`` into ``out``."""
    pages = {"report.json": json.dumps(facts, indent=1, sort_keys=True) + "\n", "report.html": render(facts)}
    for name, text in pages.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in pages]


def add_reloaded(out: Path, reloaded: Mapping[str, Facts]) -> list[Path]:
    """Add to the report in ``out`` what ``search/reload.py`` printed for each file, ``{"model.pt2": {…}}``."""
    facts = json.loads((out / "report.json").read_text(encoding="utf-8"))
    facts["reloaded"] = {name: dict(found) for name, found in reloaded.items()}
    return write(facts, out)


def render(facts: Facts) -> str:
    """The whole page: no script, nothing fetched."""
    before, after = facts["before"], facts["after"]
    ratio = before["parameters"] / max(after["parameters"], 1)
    sections = [
        _verdict(facts),
        _comparison(facts),
        _storage(facts),
        _layers(facts["layers"]),
        _front(facts),
        _training(facts),
        _files(facts),
        _origin(facts),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Tenfold: {ratio:.2f}× smaller</title><style>{STYLE}</style></head><body>"
        f"<h1>{ratio:.2f}× fewer parameters</h1>{''.join(sections)}</body></html>\n"
    )


def _verdict(facts: Facts) -> str:
    budget = facts["budget"]
    drop = budget.get("verify_drop")
    if drop is None:
        return '<p class="lead">This point was not checked on the verify split.</p>'
    kept = budget.get("keeps_budget")
    word = '<span class="good">keeps</span>' if kept else '<span class="bad">does not keep</span>'
    interval = budget.get("verify_interval")
    between = f", 95 % paired interval {interval['low']:+.4f} to {interval['high']:+.4f}" if interval else ""
    return (
        f"<p>On the verify split, which nothing was chosen on, the {escape(budget['metric'])} drops by {drop:+.4f}"
        f"{between}. The budget allows {budget['max_drop']:.4f}: this network {word} it.</p>"
    )


def _comparison(facts: Facts) -> str:
    before, after, metric = facts["before"], facts["after"], escape(facts["budget"]["metric"])
    rows: list[tuple[str, ...]] = []
    for key, title in (("value", f"{metric}, select split"), ("verify_value", f"{metric}, verify split")):
        if before.get(key) is not None and after.get(key) is not None:
            rows.append((title, f"{before[key]:.4f}", f"{after[key]:.4f}", ""))
    for key, title, unit in (
        ("parameters", "parameters", ""),
        ("macs", "MACs of one sample", ""),
        ("bytes", "stored bytes", ""),
        ("latency_ms", f"latency, batch of {facts['latency_batch']}", " ms"),
    ):
        a, b = before.get(key), after.get(key)
        if a is not None and b is not None:
            shown = (f"{x:,.3f}{unit}" if unit else f"{x:,}" for x in (a, b))
            rows.append((title, *shown, f"÷ {a / b:.2f}" if b else ""))
    body = [[escape(cell) for cell in row] for row in rows]
    return "<h2>Before and after</h2>" + _table(("", "original", "compressed", "ratio"), body)


def _storage(facts: Facts) -> str:
    """The same network with its weights in fewer bits."""
    rows, metric = facts.get("storage"), facts["budget"]["metric"]
    if not rows:
        return ""
    sizes = {file["filename"]: file["bytes"] for file in facts.get("files", [])}
    kind = "onnx" if "model.onnx" in sizes else "pt2"
    body = []
    for found in rows:
        stem = "model" if found["weights"] == "float32" else f"model-{found['weights']}"
        value, drop = (found["verify_value"], found["verify_drop"])
        shown = ("not finite", "") if value is None else (f"{value:.4f}", f"{drop:+.4f}")
        size = sizes[f"{stem}.{kind}"]
        body.append([found["weights"], f"{size:,}", *shown, "yes" if found["keeps_budget"] else "no"])
    note = (
        "<p>Smaller to send and to keep, not faster: the weights are widened to float32 whenever they are used. The "
        "graph beside them, large in a .pt2, gets no smaller.</p>"
    )
    heads = ("weights stored as", f"bytes of the .{kind} file", f"{metric}, verify split", "drop", "keeps the budget")
    return "<h2>Fewer bits</h2>" + note + _table(heads, [[escape(cell) for cell in row] for row in body])


def _layers(layers: Sequence[Facts]) -> str:
    body = []
    for layer in layers:
        dense, now = layer["dense_parameters"], layer["parameters"]
        ranks = " × ".join(str(r) for r in layer["ranks"]) if layer["method"] else "unchanged"
        shared = f" with {layer['together'] - 1} others" if layer["together"] else ""
        body.append(
            [
                f"<code>{escape(layer['name'])}</code>",
                escape(layer["kind"]),
                escape((layer["method"] or "") + shared),
                ranks,
                f"{dense:,}",
                f"{now:,}",
                bar(now / dense if dense else 0.0),
            ]
        )
    heads = ("layer", "kind", "method", "ranks", "parameters", "now", "kept")
    return "<h2>Layers</h2>" + _table(heads, body)


def _front(facts: Facts) -> str:
    front = facts.get("front") or []
    if not front:
        return ""
    metric = facts["budget"]["metric"]
    points = [(p["parameters"], p["value"], f"trial {p['number']}: {p['value']:.4f}") for p in front]
    own = next((p for p in points if p[2].startswith(f"trial {facts['trial']['number']}:")), None)
    before = facts["before"]
    original = (before["parameters"], before["value"], f"original: {before['value']:.4f}")
    chart = scatter([*points, original], x_title="parameters", y_title=metric, chosen=own)
    body = [[str(p["number"]), p["rung"], f"{p['value']:.4f}", f"{p['parameters']:,}", f"{p['macs']:,}"] for p in front]
    return "<h2>Front</h2>" + chart + _table(("trial", "rung", metric, "parameters", "MACs"), body)


def _training(facts: Facts) -> str:
    curve = [r for r in facts.get("curve", []) if r["value"] is not None]
    if not curve:
        return ""
    points = [(r["epoch"], r["value"], f"epoch {r['epoch']:g}: {r['value']:.4f}") for r in curve]
    body = [[f"{r['epoch']:g}", f"{r['loss']:.4f}", f"{r['value']:.4f}", f"{r['learning_rate']:.2g}"] for r in curve]
    chart = line(points, x_title="epoch", y_title=facts["budget"]["metric"]) if len(points) > 1 else ""
    return "<h2>Fine-tuning</h2>" + chart + _table(("epoch", "loss", "select split", "learning rate"), body)


def _files(facts: Facts) -> str:
    reloaded = facts.get("reloaded", {})
    body = []
    for file in facts.get("files", []):
        found = reloaded.get(file["filename"], {})
        again = f"{found['value']:.4f}" if found.get("value") is not None else ""
        difference = f"{found['max_difference']:.1e}" if found.get("max_difference") is not None else ""
        name = f"<code>{escape(file['filename'])}</code>"
        body.append([name, f"{file['bytes']:,}", again, difference, f"<code>{escape(file['sha256'])}</code>"])
    note = "<p>Value and largest difference are from loading the file in a clean process without Tenfold.</p>"
    heads = ("file", "bytes", "value again", "difference", "SHA-256")
    return "<h2>Files</h2>" + (note if reloaded else "") + _table(heads, body)


def _origin(facts: Facts) -> str:
    rows = {f"input: {k}": v for k, v in facts.get("inputs", {}).items()}
    rows |= {f"seed: {k}": v for k, v in facts.get("seeds", {}).items()}
    rows |= {f"version: {k}": v for k, v in facts.get("versions", {}).items()}
    rows |= {f"note {i + 1}": note for i, note in enumerate(facts.get("notes", []))}
    body = [[escape(k), f"<code>{escape(str(v))}</code>"] for k, v in rows.items()]
    request = escape(json.dumps(facts.get("request", {}), indent=1))
    details = f"<details><summary>The request</summary><pre>{request}</pre></details>"
    return "<h2>Where it comes from</h2>" + _table(("", "value"), body) + details


def _table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
