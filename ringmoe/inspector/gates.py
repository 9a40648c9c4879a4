"""Limits that a report must keep: what makes `ringmoe inspect` a check in CI."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from ringmoe.inspector import words
from ringmoe.inspector.report import OverlapReport

_SAME = 1 + 1e-9  # the same program's figures may differ in the last bits


@dataclasses.dataclass(frozen=True)
class Limits:
    """The most that a report may have; None is no limit.

    Attributes:
      exposed: part of the wire time that is exposed. waiting: part of a run that waits for the wire.
      us: time of a run.
      memory: device memory -> bytes that a program may take of it.
      baseline: reports of before, one of each target.
      tolerance: part by which time and memory may grow beyond the baseline, and part of its run by which waiting may.
    """

    exposed: float | None = None
    waiting: float | None = None
    us: float | None = None
    memory: Callable[[int], float] | None = None
    baseline: Sequence[OverlapReport] | None = None
    tolerance: float = 0.03

    def failures(self, report: OverlapReport) -> list[str]:
        """One line for each limit that the report breaks.

        Raises:
          ValueError: a limit cannot be checked: the memory is not known, the baseline has no report of the target.
        """
        return [f"{report.target}: {line}" for line in (*self._own(report), *self._against_baseline(report))]

    def _own(self, report: OverlapReport) -> Iterator[str]:
        if self.exposed is not None and report.exposed_fraction > self.exposed * _SAME:
            yield f"{report.exposed_fraction:.1%} of the wire time is exposed, more than {self.exposed:.1%}"
        if self.waiting is not None and report.exposed_share > self.waiting * _SAME:
            yield f"{report.exposed_share:.1%} of a step is spent waiting for the wire, more than {self.waiting:.1%}"
        if self.us is not None and report.us > self.us * _SAME:
            yield f"a step takes {words.time(report.us)}, more than {words.time(self.us)}"
        if self.memory is not None:
            limit = self.memory(report.hbm_bytes)
            if report.peak_bytes is None:
                raise ValueError(
                    f"{report.target}: the memory is not known from text, so --max-memory cannot be checked: "
                    "pass MODULE:FUNCTION, which is compiled"
                )
            if report.peak_bytes > limit:
                yield f"a device needs {words.size(report.peak_bytes)} of memory, more than {words.size(limit)}"

    def _against_baseline(self, report: OverlapReport) -> Iterator[str]:
        if self.baseline is None:
            return
        before = next((one for one in self.baseline if one.target == report.target), None)
        if before is None:
            targets = ", ".join(words.plain(one.target) for one in self.baseline)
            raise ValueError(
                f"the baseline has no report for {report.target}, expected one; it has {targets or 'none'}"
            )
        allowed = f"+ {self.tolerance:.1%}"
        if report.us > before.us * (1 + self.tolerance) * _SAME:
            yield f"a step takes {words.time(report.us)}, more than the baseline's {words.time(before.us)} {allowed}"
        if report.exposed_us > (before.exposed_us + self.tolerance * before.us) * _SAME:
            then = f"{words.time(before.exposed_us)} {allowed} of its step"
            yield f"a step waits {words.time(report.exposed_us)} for the wire, more than the baseline's {then}"
        if (report.peak_bytes is None) != (before.peak_bytes is None):
            raise ValueError(
                f"{report.target}: the memory of the report or of its baseline is not known from text, so they cannot be "
                "compared: make both of MODULE:FUNCTION or both of text"
            )
        if report.peak_bytes and before.peak_bytes and report.peak_bytes > before.peak_bytes * (1 + self.tolerance):
            size = f"{words.size(before.peak_bytes)} {allowed}"
            yield f"a device needs {words.size(report.peak_bytes)} of memory, more than the baseline's {size}"
