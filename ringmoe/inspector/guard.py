"""Runs a command in a process of its own: a compiler that aborts, hangs or wants too much memory ends that one."""

import resource
import signal
import subprocess
import sys
from collections.abc import Sequence


def run(words: Sequence[str], *, timeout: float | None = None, memory: float | None = None) -> int:
    """The exit status of the command, or 2, with a line on standard error, when it did not end by itself.

    Args:
      words: the command, which inherits this process's streams and folder.
      timeout: seconds it may take.
      memory: GiB of data it may hold (Linux: its RLIMIT_DATA, which counts neither files nor addresses merely reserved).
    """
    with subprocess.Popen(words) as child:
        if memory is not None:
            size = int(memory * 2**30)
            resource.prlimit(child.pid, resource.RLIMIT_DATA, (size, size))
        try:
            status = child.wait(timeout)
        except subprocess.TimeoutExpired:
            child.kill()
            return _told(f"stopped after --timeout {timeout:g} seconds")
        except KeyboardInterrupt:  # the child got it too
            child.wait()
            return _told("interrupted")
    if status >= 0:
        return status
    limit = f"; it had --memory {memory:g} GiB" if memory is not None else ""
    return _told(f"the compiler died of {signal.Signals(-status).name}{limit}: what it wrote last, above, says why")


def _told(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 2
