"""What reading a run's data is like: the records skipped, by reason and by shard, and what limits its speed."""

import logging
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from clip_jax.data.workers import Batch, Skips
from clip_jax.errors import TrainingError

FEWEST_DRAWN = 1000  # records, before a share of them says anything
WAITED_TOO_LONG = 0.05  # of the time
WORST = 5  # shards that are named


@dataclass(frozen=True)
class Reading:
    """Of one step, or of several, in this process."""

    drawn: int
    skips: Skips
    busy: float  # seconds of a core
    taken: float  # seconds of a thread

    @classmethod
    def of(cls, parts: Iterable[Batch]) -> "Reading":
        parts = list(parts)
        return cls(
            drawn=sum(len(next(iter(part.arrays.values()))) for part in parts),
            skips=sum((part.skips for part in parts), start=Counter()),
            busy=sum(part.busy for part in parts),
            taken=sum(part.taken for part in parts),
        )


class ReadingSoFar:
    """Since this start of a run.

    Args:
      limit: the share of records skipped above which `add` stops the run.
    """

    def __init__(self, limit: float, threads: int, workers: int):
        self._limit, self._threads, self._workers = limit, threads, workers
        self.drawn = 0
        self.skips: Skips = Counter()
        self._drawn, self._busy, self._taken = 0, 0.0, 0.0  # since the last warning, or time for one

    def add(self, reading: Reading) -> None:
        """Raises TrainingError, with the worst shards, where too large a share of the records was skipped."""
        self.drawn += reading.drawn
        self.skips.update(reading.skips)
        self._drawn, self._busy = self._drawn + reading.drawn, self._busy + reading.busy
        self._taken += reading.taken
        rejected = self.skips.total()
        if self.drawn >= FEWEST_DRAWN and rejected > self._limit * self.drawn:
            raise TrainingError(
                f"{rejected} of {self.drawn} records drawn were bad, more than data.max_rejected_share "
                f"{self._limit:g} ({self._by_reason()}){self._worst()}; the warnings above name them"
            )

    def counts(self) -> dict[str, float]:
        """For the metrics: all skipped so far, and by reason."""
        by_reason = {f"rejected/{reason}": float(count) for reason, count in sorted(self._reasons().items())}
        return {"rejected_records": float(self.skips.total())} | by_reason

    def report(self) -> None:
        """Says at the end what was skipped, if anything was."""
        if self.skips:
            logging.warning("%d of %d records drawn were bad and replaced (%s)%s",
                            self.skips.total(), self.drawn, self._by_reason(), self._worst())  # fmt: skip

    def warn(self, waited: float) -> None:
        """Says in one line what limits the reading where a step waited for it, as a share of the time."""
        if waited > WAITED_TOO_LONG and self._taken:
            logging.warning("%.0f%% of the time was spent waiting for data: %s", 100 * waited, self._limiting())
        self._drawn, self._busy, self._taken = 0, 0.0, 0.0

    def _limiting(self) -> str:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        each = f"{1e3 * self._busy / self._drawn:.1f} ms of a core and {1e3 * self._taken / self._drawn:.1f} ms in all"
        readers = max(self._workers, 1) * self._threads
        said = f"an example takes {each}, by {readers} threads"
        if self._workers:
            said += f" of {self._workers} processes"
        if self._busy < 0.5 * self._taken and readers <= cores:
            return f"{said}, which wait for the source most of it: more data.threads may help"
        if (self._workers or 1) < cores:
            return f"{said}; data.workers may be up to this machine's {cores} cores"
        return f"{said}; this machine's {cores} cores are the limit"

    def _reasons(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for (reason, _), count in self.skips.items():
            found[reason] += count
        return found

    def _by_reason(self) -> str:
        return ", ".join(f"{reason} {count}" for reason, count in self._reasons().most_common())

    def _worst(self) -> str:
        shards: Counter[str] = Counter()
        for (_, shard), count in self.skips.items():
            shards[shard] += count
        named = [f"{shard} {count}" for shard, count in shards.most_common(WORST + 1) if shard][:WORST]
        return f"; the worst shards: {', '.join(named)}" if named else ""
