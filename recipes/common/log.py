"""What a run tells: DIR/log.jsonl, an object a line, and a progress bar."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .ranks import Ranks

Advance = Callable[[int, str], None]  # steps done, a word beside the bar


class Log:
    """Written by the first rank alone."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.path, self.ranks = folder / "log.jsonl", ranks
        if ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
            self.path.touch()

    def write(self, event: str, **values: Any) -> None:
        if self.ranks.first:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"event": event, **values}, allow_nan=False) + "\n")

    def size(self) -> int:
        """Bytes so far."""
        return self.path.stat().st_size if self.ranks.first else 0

    def cut(self, size: int) -> None:
        """Back to that size: what was logged after a checkpoint is logged again."""
        if self.ranks.first and self.path.stat().st_size > size:
            with self.path.open("r+b") as file:
                file.truncate(size)

    @contextlib.contextmanager
    def progress(self, title: str, total: int, done: int = 0) -> Iterator[Advance]:
        """A bar of rich where it is installed."""
        try:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
        except ImportError:
            yield lambda steps, word: None
            return
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(),
                   TimeRemainingColumn(), "{task.fields[word]}")  # fmt: skip
        with Progress(*columns, disable=not self.ranks.first) as bar:
            task = bar.add_task(title, total=total, completed=done, word="")
            yield lambda steps, word: bar.update(task, advance=steps, word=word)
