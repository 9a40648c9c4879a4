"""The timelines as Chrome trace events, the open JSON format that ui.perfetto.dev, Speedscope and chrome://tracing open.

The first process is the run: a loop is a block in it, its first and its last iteration lie inside the block. Then each
computation has a process of its own that shows one execution. Lanes are computing, waiting, and the wire, as many lanes as
transfers overlap.
"""

import collections
import heapq
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ringmoe.inspector.timeline import Span, Timeline

_SPANS, _EVENTS, _PROCESSES = 20_000, 100_000, 40  # of one execution, of the run, in all; the longest are kept
_COMPUTE, _WAIT, _WIRE = 1, 2, 3  # thread numbers; the wire's further lanes count on


class _Placed(NamedTuple):
    """A span at its time in a process, and what to tell about it."""

    lane: str
    name: str
    start: float
    end: float
    about: Mapping[str, Any]


def chrome(title: str, timelines: Sequence[Timeline]) -> str:
    """JSON text of the trace.

    Args:
      title: of the run.
      timelines: callees first, the entry last.

    Raises:
      ValueError: there are none.
    """
    if not timelines:
        raise ValueError(
            "the report has no timelines, expected one of `ringmoe.inspect`: JSON holds none, so inspect the program again"
        )
    named = {timeline.computation: timeline for timeline in timelines}
    others = [t for t in timelines[:-1] if t.us > 0 and t.trip_count]
    others = heapq.nlargest(_PROCESSES - 1, others, key=lambda t: (t.counted, t.us * t.trip_count))
    events = _process(1, title, _run(timelines[-1], named))
    for number, timeline in enumerate(others, 2):
        name = f"{timeline.computation}: one of {timeline.trip_count} executions"
        events += _process(number, name, list(_execution(timeline, 0.0)))
    return json.dumps({"displayTimeUnit": "ns", "traceEvents": events})


def _run(entry: Timeline, named: Mapping[str, Timeline]) -> list[_Placed]:
    """The entry with what runs inside its loops, branches and calls, outer ones first; inner ones as long as there is room."""
    found: list[_Placed] = []
    waiting = collections.deque([(entry, 0.0)])
    while waiting:
        timeline, at = waiting.popleft()
        if len(found) + min(len(timeline.spans), _SPANS) > _EVENTS:
            continue
        found += _execution(timeline, at)
        for span in _longest(timeline):
            for start in _shown_iterations(span, at, found):
                for name in span.inside:
                    waiting.append((named[name], start))
                    start += named[name].us
    return found


def _shown_iterations(span: Span, at: float, found: list[_Placed]) -> list[float]:
    """When the first and the last iteration of a loop start; what is between them goes to `found` as a block."""
    one, times = (span.end - span.start) / max(span.times, 1), span.times
    if not span.inside or not times:
        return []
    start = at + span.start
    if times > 2:
        found.append(_Placed("compute", f"{times - 2:.9g} more like these", start + one, start + one * (times - 1), {}))
    return [start, start + one * (times - 1)][: 2 if times > 1 else 1]


def _execution(timeline: Timeline, at: float) -> Iterator[_Placed]:
    """One execution of one computation, from the time `at` on."""
    about: dict[str, dict[str, Any]] = {
        o.name: {"bound by": o.bound, "FLOPs": o.flops, "op_name": o.op_name, "source": o.source}
        for o in timeline.operations
    }
    for c in timeline.collectives:
        words = {"over": "+".join(c.axes), "route": c.route, "op_name": c.op_name, "source": c.source}
        about[c.name] = {"bytes": c.wire_bytes, "exposed us": c.exposed_us} | words
    for span in _longest(timeline):
        loop = {"iterations": span.times, "of": ", ".join(span.inside)} if span.inside else {}
        start, end = max(0.0, span.start), min(max(0.0, span.end), timeline.us)
        yield _Placed(span.lane, span.name, at + start, at + end, about.get(span.name, {}) | loop)


def _longest(timeline: Timeline) -> list[Span]:
    return heapq.nlargest(_SPANS, timeline.spans, key=lambda span: span.end - span.start)


def _process(number: int, title: str, placed: list[_Placed]) -> list[dict[str, Any]]:
    """Events of one process, in order of time; blocks come before what lies inside them."""
    threads = {_COMPUTE: "compute", _WAIT: "waiting for the wire", _WIRE: "wire"}
    free: list[float] = []  # when each lane of the wire is
    events = []
    for span in sorted(placed, key=lambda span: (span.start, -span.end)):
        start, end = round(1e3 * span.start), round(1e3 * span.end)  # whole nanoseconds nest exactly
        if end <= start:
            continue
        thread = _COMPUTE if span.lane == "compute" else _WAIT
        if span.lane == "wire":
            lane = next((lane for lane, when in enumerate(free) if when <= start), len(free))
            free[lane : lane + 1] = [end]
            thread = _WIRE + lane
            threads.setdefault(thread, f"wire {lane + 1}")
        event = {"ph": "X", "pid": number, "tid": thread, "name": span.name, "cat": span.lane}
        events.append(event | {"ts": start / 1e3, "dur": (end - start) / 1e3, "args": dict(span.about)})
    names = [("process_name", 0, {"name": title}), ("process_sort_index", 0, {"sort_index": number})]
    names += [("thread_name", thread, {"name": name}) for thread, name in threads.items()]
    return [{"ph": "M", "pid": number, "tid": tid, "name": name, "args": args} for name, tid, args in names] + events
