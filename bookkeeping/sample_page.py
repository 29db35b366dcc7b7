"""Draws a run's samples as a page: samples.jsonl -> samples.html, one file that needs no network and no script.

python -m bookkeeping.sample_page outputs/<run>

A prompt shows the roles of its messages if there are several. The completions of a group stand side by side, with
reward, advantage, length, and whether they ended. The colour of a token shows how far the step's updates have moved its
log-prob.
"""

import argparse
import json
import mmap
import os
from itertools import groupby
from pathlib import Path

from jinja2 import Environment

from configs import InputError, one_line_errors

MOST_TOKENS = 100_000  # on a page; the latest steps that fit are shown

TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}: samples</title>
<style>
  :root { color-scheme: light; font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fafafa; }
  body { max-width: 1600px; margin: 0 auto; padding: 1rem 1.5rem; }
  h1 { font-size: 1.3rem; }
  .note, dl { color: #555; }
  summary { cursor: pointer; font-weight: 600; padding: .4rem 0; }
  .prompt { white-space: pre-wrap; background: #eee; border-radius: 6px; padding: .5rem .7rem; margin: .6rem 0; }
  .turn { display: flex; } .turn b { flex: 0 0 6rem; }
  .turn b, small, .end { color: #666; }
  .group { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: .6rem; }
  .group { margin-bottom: 1.2rem; }
  .card { background: #fff; border: 1px solid #ddd; border-radius: 6px; padding: .5rem .7rem; min-width: 0; }
  .card.up { border-top: 4px solid #0072B2; } .card.down { border-top: 4px solid #D55E00; }
  .card.even { border-top: 4px solid #bbb; }
  .numbers { font-size: .85rem; color: #555; font-variant-numeric: tabular-nums; }
  .text { font: .85rem ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin-top: .4rem; }
  .text span { border-radius: 2px; }
</style>
</head>
<body>
<h1>{{ name }}: samples</h1>
<p class="note">Steps {{ steps[-1].step }} to {{ steps[0].step }}, the latest first
{%- if left_out %}; earlier ones are in samples.jsonl{% endif %}.
Colour: what the step's updates did to a token's log-prob,
<span style="background: {{ colour(-1) }}">less likely</span> or
<span style="background: {{ colour(1) }}">more likely</span>, in full from ±{{ full }} nats.
Hold the pointer over a token for the number. ↵ is a newline.</p>
{% for step in steps %}
<details{% if loop.first %} open{% endif %}>
<summary>Step {{ step.step }}</summary>
{% for group in step.groups %}
<div class="prompt">{% for turn in group[0].turns %}<div class="turn">\
{% if loop.length > 1 %}<b>{{ turn.role }}</b>{% endif %}<span>{{ turn.content }}</span></div>{% endfor %}\
<small>answer: {{ group[0].answer }}</small></div>
<div class="group">
{% for c in group %}
<div class="card {{ 'up' if c.advantage > 0 else 'down' if c.advantage < 0 else 'even' }}">
<div class="numbers">reward {{ '%.3g' % c.reward }} · advantage {{ '%+.2f' % c.advantage }} · {{ c.tokens }} tokens ·
{{ 'cut at the limit' if c.truncated else 'ended' }}</div>
<div class="text">{% for token, change in c.pairs %}<span style="background: {{ colour(change / full) }}" \
title="{{ '%+.3f' % change }}"\
{% if loop.last and not c.truncated %} class="end"{% endif %}>{{ token }}</span>{% endfor %}</div>
</div>
{% endfor %}
</div>
{% endfor %}
</details>
{% endfor %}
</body>
</html>
"""
FULL_COLOUR = 0.5  # nats


def draw_samples(folder):
    """Writes a run's samples.html from the end of its samples.jsonl. Returns its path, or None if there are no samples.

    Everything is escaped. Time and memory do not grow with the length of the run.
    """
    folder, shown, tokens = Path(folder), [], 0
    path = folder / "samples.jsonl"
    if not path.is_file() or path.stat().st_size == 0:
        return None
    left_out = False
    for step, rows in groupby(_samples_from_the_end(path), lambda row: row["step"]):
        rows = list(rows)[::-1]
        tokens += sum(row["tokens"] for row in rows)
        if shown and tokens > MOST_TOKENS:
            left_out = True
            break
        groups = [list(group) for _, group in groupby(rows, lambda row: (row.get("group"), row["prompt"]))]
        shown.append({"step": step, "groups": groups})
    template = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE)
    html = template.render(name=folder.resolve().name, steps=shown, left_out=left_out, colour=_colour, full=FULL_COLOUR)
    beside = folder / "samples.part.html"
    beside.write_text(html, encoding="utf-8")
    os.replace(beside, folder / "samples.html")
    return folder / "samples.html"


def _samples_from_the_end(path):
    """Yields the rows of a samples.jsonl that is not empty, the last one first.

    It reads only as many rows as are asked for.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        end = len(text)
        while end > 0:
            start = text.rfind(b"\n", 0, end - 1) + 1
            try:
                row = json.loads(text[start:end])
                changes = [change or 0.0 for change in row["logp_change"]]  # None stands for NaN
                texts = [text.replace("\n", "↵\n") for text in row["token_texts"]]  # or its colour could not be seen
                row["pairs"] = list(zip(texts, changes, strict=True))
                messages = row.get("messages", [{"role": "user", "content": row["prompt"]}])  # older rows have none
                row["turns"] = [message for message in messages if message["content"].strip()]
                row["step"], row["tokens"], row["prompt"], float(row["reward"]), float(row["advantage"])
            except (KeyError, TypeError, ValueError, AttributeError):
                number = text[:start].count(b"\n") + 1
                raise InputError(f"{path}, line {number}: not a sample; remove the line and draw again") from None
            yield row
            end = start


def _colour(change):
    """Returns orange if a token became less likely, and blue if more. change: full colour is at -1 and 1."""
    red, green, blue = (213, 94, 0) if change < 0 else (0, 114, 178)
    return f"rgba({red}, {green}, {blue}, {min(abs(change), 1) * 0.6:.2f})"


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draws a run's samples as a page.")
    parser.add_argument("run", metavar="RUN", help="folder of a run, such as outputs/gspo-<time>")
    arguments = parser.parse_args(argv)
    with one_line_errors():
        if (path := draw_samples(arguments.run)) is None:
            raise InputError(f"{arguments.run}: no samples.jsonl there; give the folder of a run")
        print(path)


if __name__ == "__main__":
    main()
