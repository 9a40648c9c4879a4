"""What is shown while a model trains."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def training(console: Console, steps: int, every: int, first: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A bar from step `first` to `steps` while the block runs, or lines where the console is no terminal.

    Yields `told(step, line)`, to be called after each step with how many were made; of every so many, the first and the last
    the line is printed.
    """
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("training", total=steps, completed=first)

        def told(step: int, line: str) -> None:
            progress.update(bar, completed=step, description=line)
            if not console.is_terminal and (step % every == 0 or step in (first + 1, steps)):
                console.print(f"step {step}/{steps}  {line}")

        yield told
