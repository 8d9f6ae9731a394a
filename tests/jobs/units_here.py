"""Units without Ray, one after the other in this process, for tests of what workers do."""

import json
from collections.abc import Sequence

from rayembed.jobs.units import Unit, UnitActor, Work


def actor_for(work: Work, *, copies: Sequence[Sequence[str]] = ()) -> UnitActor:
    """The actor, with arguments that came as text, as from another machine.

    Args:
        work: what it does.
        copies: of run folders on object stores that the other machine has.
    """
    return UnitActor(
        worker=work.worker,
        arguments=json.loads(json.dumps(work.arguments)),
        folder=str(work.folder),
        threads=1,
        use_gpu=False,
        max_retries=0,
        num_workers=1,
        copies=copies,
    )


def done_by(actor: UnitActor, unit: Unit, work: Work) -> dict[str, str]:
    """Does one unit; the row that Ray Data would give."""
    mark = str((unit.folder or work.folder) / "done" / f"{unit.name}.json")
    return {"mark": mark, "error": actor({"mark": [mark], "spec": [json.dumps(unit.spec)]})["error"][0]}


class UnitsHere:
    """In place of `rayembed.jobs.units._stream`: the last unit first, as no order is promised; notes what it did."""

    def __init__(self) -> None:
        self.done: list[str] = []
        """FOLDER/UNIT of each."""

        self.workers: set[str] = set()
        self.stop_at: str | None = None
        """Unit before which the driver is killed."""

    def stream(self, pending: Sequence[Unit], work: Work, *_: object) -> list[dict[str, str]]:
        """Does the units by a worker that got its arguments as text, as from another machine."""
        actor = actor_for(work)
        self.workers.add(work.worker.rpartition(":")[2])
        rows = []
        for unit in reversed(pending):
            if unit.name == self.stop_at:
                raise KeyboardInterrupt
            self.done.append(f"{(unit.folder or work.folder).name}/{unit.name}")
            rows.append(done_by(actor, unit, work))
        return rows
