"""The report as one self-contained page: `page.html` with the report's data put in."""

import importlib.resources
import json
from typing import Any

from ringmoe.inspector.timeline import Timeline

_TIMELINES, _SPANS = 12, 1500  # what a page holds; the longest are kept


def page(record: dict[str, Any], timelines: tuple[Timeline, ...]) -> str:
    """HTML of a report.

    Args:
      record: `OverlapReport.to_dict()`.
      timelines: its timelines; those that take longest over the run are drawn.
    """
    chosen = sorted((t for t in timelines if t.spans), key=lambda t: -t.trip_count * t.us * t.counted)[:_TIMELINES]
    # The loop that waits longest is what one opens the page for; if none, that with most wire.
    chosen.sort(
        key=lambda t: [
            -t.counted * t.trip_count * sum(us(c) for c in t.collectives)
            for us in (lambda c: c.exposed_us, lambda c: c.wire_us)
        ]
    )
    record = record | {"timelines": [_drawn(timeline) for timeline in chosen]}
    template = importlib.resources.files("ringmoe.inspector").joinpath("page.html").read_text()
    # "<" cannot then close the script element, whatever the program's names hold.
    return template.replace("/*DATA*/null", json.dumps(record).replace("<", "\\u003c"))


def _drawn(timeline: Timeline) -> dict[str, Any]:
    spans = sorted(timeline.spans, key=lambda span: span.start - span.end)[:_SPANS]
    return {
        "name": timeline.computation,
        "us": timeline.us,
        "trip_count": timeline.trip_count,
        "spans": [[span.lane, span.name, span.start, span.end] for span in sorted(spans, key=lambda span: span.start)],
    }
