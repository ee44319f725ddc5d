"""The page that `jaxaroo quickstart` writes: what each stage came to, in one HTML file that needs nothing else.

Every figure is read from what the commands of this run wrote or said; a stage that was not run has none. Pictures are
inside, text is escaped, there is no script and no address of another host.
"""

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .output import write_whole
from .stages import Ran, Stage, read_done

SOLUTIONS = 12  # in the map of step scores


class Section(NamedTuple):
    """What is shown of a stage."""

    text: str
    tables: list[dict[str, Any]]  # title, head, rows
    pictures: list[tuple[str, str]]  # what it shows, PNG in base64
    maps: list[dict[str, Any]]  # of step scores: a question and its steps


def write(out: Path, stages: Sequence[Stage]) -> Path:
    """Make the page of what has been run; returns where it is.

    Args:
      out: folder of the quick start.
      stages: all that there are.
    """
    import jinja2

    done = read_done(out)
    made: list[dict[str, Any]] = []
    for stage in stages:
        ran = [one for one in done if one.stage == stage.name]
        if len(ran) < len(stage.commands):
            continue
        section = SECTIONS[stage.name](out, ran)
        seconds = sum(one.seconds for one in ran)
        made.append({"stage": stage, "section": section, "ran": ran, "seconds": seconds})
    pages = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    total = sum(one.seconds for one in done)
    page = out / "report.html"
    write_whole(page, pages.from_string(PAGE).render(made=made, total=total, machine=_machine()))
    return page


# ------------------------------------------------------------------------------------------------------------ sections
def _policies(out: Path, ran: list[Ran]) -> Section:
    weak, strong = (_said(one) for one in ran[2:4])
    names = {"policy": "the policy", "strong": "a stronger model"}
    curves = {title: _metrics(out / name) for name, title in names.items()}
    rows = [
        [title, len(curves[title]), found["n"], _percent(found["accuracy"]), _interval(found["interval"])]
        for title, found in zip(curves, (weak, strong), strict=True)
    ]
    head = ["model", "updates", "unseen problems", "solved greedily", "95 %"]
    return Section(
        "Both begin with random numbers and learn from worked solutions of word problems. The policy is stopped early, "
        "so that it makes mistakes; the other one will judge it, and be served.",
        [{"title": "", "head": head, "rows": rows}],
        [("Loss of both, in nats a token, by updates", _losses(curves))],
        [],
    )


def _rewards(out: Path, ran: list[Ran]) -> Section:
    agreed, steps, chosen, guided = _said(ran[3]), _said(ran[6]), _said(ran[7]), _said(ran[10])
    best = chosen["best_of"]["min"]
    rows = [
        [k, *(_percent(values[i]) for values in (chosen["majority"], best, chosen["pass_at"]))]
        for i, k in enumerate(chosen["k"])
    ]
    scored = _rows(out / "scored-tests.jsonl")
    problems = len({row["prompt"] for row in _rows(out / "solutions.jsonl")})
    text = (
        f"The policy wrote {agreed['solutions']} solutions of {problems} problems. Each step was continued by "
        "both models: a step from which the right answer is reached is good. Of the solutions "
        f"{agreed['kept']} were kept, those whose first error both agree on (Athena's filter). An outcome model began "
        "the process reward model, a head on the stronger model's states. Of two steps of unseen solutions it scores "
        f"the good one higher in {_percent(steps['auroc'])} of cases (50 % is chance). A value model learned from the "
        "same solutions how they end, and weighs each token of the policy's as it decodes (IVO)."
    )
    head = ["answers", "majority", "by the worst step's score", "one that knows the truth"]
    ways = ("greedily, alone", "greedily, guided by the value model")
    steered = [
        [name, found["n"], _percent(found["accuracy"]), _interval(found["interval"])]
        for name, found in zip(ways, (_greedy(out), guided), strict=True)
    ]
    return Section(
        text,
        [
            {"title": "The policy's answers to unseen problems: right when chosen among k", "head": head, "rows": rows},
            {"title": "", "head": ["the policy decodes", "unseen problems", "solved", "95 %"], "rows": steered},
        ],
        [("Accuracy by how many answers there are to choose from", _best_of(chosen))],
        [
            {"prompt": row["prompt"].strip(), "steps": [*zip(row["steps"], row["labels"], row["scores"], strict=True)]}
            for row in scored[:SOLUTIONS]
        ],
    )


def _improve(out: Path, ran: list[Ran]) -> Section:
    before = _greedy(out)
    ranked, dpo = _said(ran[1]), _said(ran[5])
    names = ("before", "its own right answers learned (one round)", "and DPO on pairs that the reward model ranked")
    rows = [
        [name, found["n"], _percent(found["accuracy"]), _interval(found["interval"])]
        for name, found in zip(names, (before, ranked, dpo), strict=True)
    ]
    pairs = len(_rows(out / "pairs.jsonl"))
    return Section(
        "Without a new worked solution: first the policy learns those of its own answers to training problems that are "
        f"right, then from {pairs} pairs of its earlier solutions, of each problem the best beside the worst by the "
        "reward model's scores. Where intervals overlap, the difference may be luck.",
        [{"title": "", "head": ["policy", "unseen problems", "solved greedily", "95 %"], "rows": rows}],
        [],
        [],
    )


def _bits(out: Path, ran: list[Ran]) -> Section:
    measured = json.loads((out / "bits" / "bits.json").read_text(encoding="utf-8"))["measured"]
    rows = [
        [m["name"], f"{m['perplexity']:.4f}", _percent(m["accuracy"]), f"{m['total'] / 1000:.0f} kB"] for m in measured
    ]
    return Section(
        "The stronger model was trained on for a moment at four widths together. One file of 8-bit codes then serves "
        "all of them; a width is a shift of its integers.",
        [{"title": "", "head": ["width", "perplexity", "solved greedily", "weights"], "rows": rows}],
        [("Problems solved by what the weights take", _by_bytes(measured))],
        [],
    )


def _drafts(out: Path, ran: list[Ran]) -> Section:
    found = {p.name: json.loads((p / "report.json").read_text()) for p in sorted((out / "bench").iterdir())}
    rows = [
        [name, f"{r['tau']:.2f}", f"{r['speedup']:.2f}", "all" if r["identical"] == 1 else _percent(r["identical"])]
        for name, r in found.items()
    ]
    small = max(r["speedup"] for r in found.values()) <= 1
    why = (
        " A step of so small a model costs less than a draft, so none pays here; the engine sees that by itself and "
        "decodes plainly (speculate=auto). Tokens a step are what carries over to large models."
    )
    head = ["drafter", "tokens a step", "times as fast as plain decoding", "answers equal to plain decoding's"]
    return Section(
        "Jakiro and Kangaroo learned to draft for the stronger model; lookup copies what stood before. The model "
        "judges all drafts in one pass, and what comes out is what it would have written alone."
        + (why if small else ""),
        [{"title": "", "head": head, "rows": rows}],
        [],
        [],
    )


SECTIONS: dict[str, Callable[[Path, list[Ran]], Section]] = {
    "policies": _policies,
    "rewards": _rewards,
    "improve": _improve,
    "bits": _bits,
    "drafts": _drafts,
}


# ----------------------------------------------------------------------------------------------------------- private
def _said(ran: Ran) -> Any:
    return json.loads(ran.said)


def _greedy(out: Path) -> Any:
    """How the policy did before anything was done to it."""
    return next(_said(one) for one in read_done(out) if one.stage == "policies" and "policy/model" in one.command)


def _rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _metrics(run: Path) -> list[Any]:
    return _rows(run / "metrics.jsonl")


def _percent(value: float | None) -> str:
    return "not defined" if value is None else f"{100 * value:.1f} %"


def _interval(ends: Sequence[float]) -> str:
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f} %"


def _losses(curves: dict[str, list[Any]]) -> str:
    figure, axes = _figure("updates", "loss (nats a token)")
    for title, records in curves.items():
        axes.plot([r["step"] for r in records], [r["loss"] for r in records], label=title, linewidth=1)
    axes.legend()
    return _png(figure)


def _best_of(chosen: Any) -> str:
    figure, axes = _figure("answers to choose from", "right (%)")
    drawn = {"one that knows the truth": chosen["pass_at"], "reward model": chosen["best_of"]["min"]}
    for name, values in (drawn | {"majority": chosen["majority"]}).items():
        axes.plot(chosen["k"], [100 * v for v in values], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(chosen["k"], [str(k) for k in chosen["k"]])
    axes.legend()
    return _png(figure)


def _by_bytes(measured: list[Any]) -> str:
    figure, axes = _figure("weights (kB)", "solved greedily (%)")
    for m in measured:
        axes.plot([m["total"] / 1000], [100 * m["accuracy"]], marker="o", linestyle="", label=m["name"])
    axes.legend()
    return _png(figure)


def _figure(x: str, y: str) -> Any:
    from matplotlib.figure import Figure  # not pyplot: that keeps a global state, and wants a display

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _png(figure: Any) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return base64.b64encode(file.getvalue()).decode()


def _machine() -> str:
    import platform

    import jax

    device = jax.devices()[0]
    return f"{device.device_kind} ({platform.machine()}), Python {platform.python_version()}, jax {jax.__version__}"


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>jaxaroo quickstart</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 3rem; border-top: 1px solid #ddd; padding-top: 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #eee; vertical-align: top; }
td.step { padding: .15rem .6rem; font-family: ui-monospace, monospace; font-size: .85rem; border: 1px solid #fff; }
td.wrong { outline: 2px solid #b00; outline-offset: -2px; }
img { max-width: 100%; }
pre { background: #f6f6f6; padding: .6rem; overflow-x: auto; font-size: .8rem; }
details { margin: 1rem 0; }
.small { color: #666; font-size: .85rem; }
</style>
</head>
<body>
<h1>jaxaroo quickstart</h1>
<p class="small">{{ machine }}; {{ "%.0f" | format(total) }} s in all. Every figure comes from this run.</p>
{% for one in made %}
<h2>{{ one.stage.title }}</h2>
<p>{{ one.section.text }}</p>
{% for table in one.section.tables %}
<table>
{% if table.title %}<caption class="small">{{ table.title }}</caption>{% endif %}
<tr>{% for cell in table.head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endfor %}
{% for title, picture in one.section.pictures %}
<p><img alt="{{ title }}" src="data:image/png;base64,{{ picture }}"><br><span class="small">{{ title }}</span></p>
{% endfor %}
{% if one.section.maps %}
<p class="small">Step scores of unseen solutions, green for good and red for bad as the reward model sees it. A frame
marks the steps that are wrong: half of the solutions had an error put in, and what follows from it is wrong too.</p>
<table>
{% for solution in one.section.maps %}
<tr><td class="small">{{ solution.prompt }}</td><td><table><tr>
{% for step, label, score in solution.steps %}
<td class="step{{ " wrong" if label == 0 else "" }}" title="{{ "%.2f" | format(score) }}"
 style="background: hsl({{ "%.0f" | format(120 * score) }}, 70%, 85%)">{{ step }}<br>{{ "%.2f" | format(score) }}</td>
{% endfor %}
</tr></table></td></tr>
{% endfor %}
</table>
{% endif %}
<details><summary>{{ one.ran | length }} commands, {{ "%.0f" | format(one.seconds) }} s</summary>
<pre>{% for ran in one.ran %}
{{ "%6.1f s  " | format(ran.seconds) }}{{ ran.command }}
{% endfor %}</pre></details>
{% endfor %}
</body>
</html>
"""
