"""The report as one self-contained page: `page.html` with the report's data put in."""

import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

from ringmoe.inspector import words
from ringmoe.inspector.timeline import Timeline

_TIMELINES, _SPANS = 24, 1500  # what a page holds; the longest are kept


def page(record: dict[str, Any], timelines: tuple[Timeline, ...]) -> str:
    """HTML of a report.

    Args:
      record: `OverlapReport.to_dict()`.
      timelines: its timelines, the entry last; those that take longest over the run are drawn.
    """
    loops = [t for t in timelines[:-1] if t.spans]
    chosen = sorted(loops, key=lambda t: -t.trip_count * t.us * t.counted)[: _TIMELINES - 1]
    chosen += [t for t in timelines[-1:] if t.spans]
    # In the order in which one would look: what waits longest; if nothing does, what has most wire.
    chosen.sort(
        key=lambda t: [
            -t.counted * t.trip_count * sum(us(c) for c in t.collectives)
            for us in (lambda c: c.exposed_us, lambda c: c.wire_us)
        ]
    )
    named = {timeline.computation: timeline for timeline in timelines}
    places = {timeline.computation: index for index, timeline in enumerate(chosen)}
    record = record | {
        "timelines": [_drawn(timeline, named, places) for timeline in chosen],
        "entry": next((index for index, t in enumerate(chosen) if t is timelines[-1]), 0),
    }
    for entry in (*record["collectives"], *record["operations"]):
        entry["label"] = words.label(entry["op_name"], entry["name"])
    for entry in record["collectives"]:
        hidden_by = zip(entry["hidden_by_ops"], entry["hidden_by"])
        entry["behind"] = list(dict.fromkeys(words.label(op_name, name) for op_name, name in hidden_by))
    template = importlib.resources.files("ringmoe.inspector").joinpath("page.html").read_text()
    # "<" cannot then close the script element, whatever the program's names hold.
    return template.replace("/*DATA*/null", json.dumps(record).replace("<", "\\u003c"))


def _drawn(timeline: Timeline, named: Mapping[str, Timeline], places: Mapping[str, int]) -> dict[str, Any]:
    """One timeline. A span is [lane, name, start, end, place of the timeline inside it or -1, times it runs, time waited
    inside it]."""
    spans = sorted(timeline.spans, key=lambda span: span.start - span.end)[:_SPANS]
    drawn = []
    for span in sorted(spans, key=lambda span: span.start):
        inside = max(span.inside, key=lambda name: named[name].us, default="")
        waited = span.times * sum(named[name].us - named[name].compute_us for name in span.inside)
        drawn.append([span.lane, span.name, span.start, span.end, places.get(inside, -1), span.times, waited])
    return {
        "name": timeline.computation,
        "us": timeline.us,
        "trip_count": timeline.trip_count,
        "spans": drawn,
    }
