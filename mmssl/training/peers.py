"""The ranks of a job: which processes they are, how far each has come, which have gone, and what ended the job first.

They meet in `.ranks/` of the run folder, on whatever hosts they are: N.json says where rank N stands, cause.json what ended the
run. A rank whose process is gone is seen at once on its own host; on others it is one that makes no progress.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mmssl import stage
from mmssl.distributed import all_objects, barrier, rank
from mmssl.errors import MmsslError, RankError
from mmssl.redaction import redact
from mmssl.stage import Stage
from mmssl.training.run_folder import RunFolder, born, storing

GRACE = 15.0  # seconds in which the reason for a broken connection must show itself: a process takes a while to be gone


class Member(NamedTuple):
    """A process, named for good."""

    host: str
    pid: int
    born: int | None


class Cause(NamedTuple):
    """What ended a job."""

    rank: int  # that found it
    code: int  # exit status
    text: str

    def error(self) -> RankError:
        """As the other ranks report it."""
        told = RankError(self.text)
        told.code = self.code
        return told


class Peers:
    """All ranks, this one included. Making it is a collective."""

    def __init__(self) -> None:
        self.rank = rank()
        self.members = [Member(*member) for member in all_objects((socket.gethostname(), os.getpid(), born(os.getpid())))]
        self.near = [r for r in range(len(self.members)) if r != self.rank and self._lives(r)]  # those that can be watched
        self.folder: RunFolder | None = None  # set once the main process has opened it
        self.beats = 0

    @property
    def place(self) -> Path | None:
        """Where they meet, None for a single process or before there is a run folder."""
        return None if self.folder is None or len(self.members) == 1 else self.folder.path / ".ranks"

    def make_place(self, folder: RunFolder) -> RunFolder:
        """Make a place to meet in a run folder: for the main process, before the others set `folder`. Returns: the folder."""
        place = folder.path / ".ranks"
        shutil.rmtree(place, ignore_errors=True)
        if len(self.members) > 1:
            with storing(place):
                place.mkdir()
        self.folder = folder
        return folder

    def part(self) -> None:
        """The job is done: nobody leaves while another one still watches. A collective."""
        barrier()
        if self.rank == 0 and self.place is not None:
            shutil.rmtree(self.place, ignore_errors=True)

    def _lives(self, other: int) -> bool:
        host, pid, began = self.members[other]
        return host == self.members[self.rank].host and began is not None and born(pid) == began

    # Where each stands -------------------------------------------------------------------------------------------------

    def beat(self) -> None:
        """Let the others know where this rank stands."""
        self.beats += 1
        if self.place is not None:
            with suppress(OSError):  # a full disk is for the next save to report
                _write(self.place / f"{self.rank}.json", [self.beats, *stage.now()])

    def stages(self) -> dict[int, tuple[int, Stage]]:
        """Rank -> how often it has said where it stands, and where; without those that have not yet."""
        found = {}
        for other in range(len(self.members)) if self.place is not None else ():
            with suppress(OSError, ValueError, TypeError):
                beats, *where = json.loads((self.place / f"{other}.json").read_text())  # type: ignore[operator]
                found[other] = (int(beats), Stage(*where))
        return found | {self.rank: (self.beats, stage.now())}

    # Who has gone ------------------------------------------------------------------------------------------------------

    def gone(self) -> list[int]:
        """Ranks on this host whose process has ended."""
        return [other for other in self.near if not self._lives(other)]

    def farewell(self, lost: list[int]) -> RankError:
        """The sentence for ranks that have gone."""
        last = self.stages()
        where = [f", last seen at step {last[r][1].step} ({last[r][1].name})" if r in last else "" for r in lost]
        who = [f"process {self.members[r].pid} on {self.members[r].host}{seen}" for r, seen in zip(lost, where)]
        return RankError(
            f"{name(lost)} {'has' if len(lost) == 1 else 'have'} gone (killed or crashed; {'; '.join(who)}). "
            f"Without a message of its own, the system may have ended it for want of memory.{self._go_on()}"
        )

    def stand_still(self, behind: list[int], seconds: float, silent: list[int]) -> RankError:
        """The sentence for ranks that hang."""
        where = self.stages()[behind[0]][1]
        mute = f" and {'does' if len(silent) == 1 else 'do'} not answer" if silent else ""
        return RankError(
            f"{name(behind)} {'has' if len(behind) == 1 else 'have'} made no progress for {seconds:.0f} s "
            f"(train.hang_timeout) in {where.name} at step {where.step}{mute}; all ranks were ended. "
            f"What each of them did is in stacks-RANK.txt of the run folder.{self._go_on()}"
        )

    def _go_on(self) -> str:
        return "" if self.folder is None else f" Go on with: mmssl resume {self.folder.path}"

    def kill(self, other: int) -> None:
        """End a process on this host that does not answer, a stopped one for example."""
        if other in self.near and self._lives(other):
            with suppress(OSError):
                os.kill(self.members[other].pid, signal.SIGKILL)

    # What was first ----------------------------------------------------------------------------------------------------

    def cause(self) -> Cause | None:
        """What ended the job, if that is known."""
        if self.place is not None:
            with suppress(OSError, ValueError, TypeError):
                return Cause(*json.loads((self.place / "cause.json").read_text()))
        return None

    def claim(self, code: int, text: str) -> Cause:
        """Name what ended the job, unless another rank was faster. Returns: the first cause."""
        mine = Cause(self.rank, code, redact(text))
        if self.place is not None:
            draft = self.place / f".cause-{self.rank}-{secrets.token_hex(4)}"
            with suppress(OSError):
                draft.write_text(json.dumps(mine))
                with suppress(FileExistsError):
                    os.link(draft, self.place / "cause.json")  # at once, and only for the first
            draft.unlink(missing_ok=True)
        return self.cause() or mine

    def explain(self, error: BaseException) -> BaseException:
        """Why this rank really ends: an error of its own, or that of another one, or one that has gone.

        A connection breaks before it can be known why, so this may take `GRACE` seconds.
        """
        if len(self.members) == 1:
            return error
        if not isinstance(error, MmsslError) and isinstance(error, (RuntimeError, ConnectionError, TimeoutError)):
            deadline = time.monotonic() + GRACE
            while time.monotonic() < deadline:
                if found := self.found():
                    return found.error()
                time.sleep(0.1)
        self.claim(getattr(error, "code", 8), f"rank {self.rank} stopped: {type(error).__name__}: {error}")
        return error

    def found(self) -> Cause | None:
        """What ended the job, or ends it now that a rank has gone."""
        if (cause := self.cause()) is not None:
            return cause
        lost = self.gone()
        return self.claim(RankError.code, str(self.farewell(lost))) if lost else None


def name(ranks: list[int]) -> str:
    """`rank 1`, `ranks 1 and 2`."""
    *most, last = map(str, ranks)
    return f"ranks {', '.join(most)} and {last}" if most else f"rank {last}"


def _write(path: Path, value: object) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)
