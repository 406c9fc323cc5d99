"""Who of several processes is lost, from what they last said: a pure function of what is known.

Each process says again and again where it is (`meet` carries that); process 0 calls `judge` on
all of it. The rule is that of a relay race: all make the same calls in the same order, so each
counts its beats, and whoever stands still while another is ahead and waits keeps all from going on.
Compiling, evaluating and saving are done by all alike and put nobody ahead.
"""

import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

RUNNING, PAUSED, COMPILING = "running", "paused", "compiling"
FAILED, DONE = "failed", "done"

SETTLE = 1.5
"""Seconds that a failure waits for the others': if all fail alike, nobody is to blame."""


@dataclass
class Member:
    """What is known of one process.

    Attributes:
        rank, host, pid: which.
        step: the last it told; None before the first.
        beats: how many it has made.
        state: running, paused, compiling, failed or done.
        note: the exception if it failed.
        own: whether that is its own fault, as far as one can see, and not a peer's.
        at: where its main thread is, as file:line.
        waits: whether that is inside JAX, so rather waiting for a peer than hanging.
        heard, moved: when it last said anything, and anything new; in seconds of the judge's clock.
        gone: whether its connection is closed.
    """

    rank: int
    host: str
    pid: int
    step: int | None = None
    beats: int = 0
    state: str = RUNNING
    note: str = ""
    own: bool = True
    at: str = ""
    waits: bool = False
    heard: float = 0.0
    moved: float = 0.0
    gone: bool = False

    def hear(self, said: dict, now: float) -> None:
        """Takes in what it says."""
        if any(getattr(self, name) != said[name] for name in ("beats", "state")):
            self.moved = now
        self.heard = now
        for name in SAID:
            setattr(self, name, said[name])

    def say(self) -> dict:
        """What `hear` takes in."""
        return {name: getattr(self, name) for name in SAID}


SAID = ("step", "beats", "state", "note", "own", "at", "waits")


@dataclass(frozen=True)
class Verdict:
    """Which process is lost, and how: "died", "failed: …"."""

    rank: int
    how: str


def judge(members: Iterable[Member], now: float, *, timeout: float, stall: float) -> Verdict | None:
    """Find the process that keeps the others from going on.

    Args:
        members: all of them.
        now: the time, on the clock of `Member.heard`.
        timeout: seconds of silence after which a process counts as lost.
        stall: seconds for which one may stand still while another waits further on.

    Returns:
        The first to blame; None if all is well, or all have failed and each knows why.

    >>> two = [Member(0, "a", 1, heard=9.0), Member(1, "b", 2, heard=5.0)]
    >>> judge(two, 9.0, timeout=3, stall=9)
    Verdict(rank=1, how='does not answer; it died, was stopped or is stuck')
    """
    members = sorted(members, key=lambda m: m.rank)
    living = [m for m in members if m.state not in (FAILED, DONE)]
    if dead := [m for m in living if m.gone]:
        return Verdict(min(dead, key=lambda m: m.heard).rank, "died")
    if silent := [m for m in members if not m.gone and now - m.heard > timeout]:
        first = min(silent, key=lambda m: m.heard)
        return Verdict(first.rank, "does not answer; it died, was stopped or is stuck")
    failed = [m for m in members if m.state == FAILED]
    own = [m for m in failed if m.own]
    if len(failed) < len(members) and failed:
        first = min(own or failed, key=lambda m: m.moved)
        # An error that a peer's loss may have caused waits until such a loss would be known.
        if now - first.moved > (min(SETTLE, timeout) if own else timeout):
            early = [m for m in members if m.state == DONE]
            if early and not own:
                return Verdict(early[0].rank, "ended before the others")
            return Verdict(first.rank, f"failed: {first.note}")
    fewest = min(m.beats for m in members)
    behind = [m for m in members if m.beats == fewest]
    ahead = [m for m in members if m.beats > fewest]
    busy = any(m.state in (PAUSED, COMPILING) or now - m.moved <= stall for m in behind)
    if not busy and any(now - m.moved > stall for m in ahead):
        last = min(behind, key=lambda m: (m.waits, m.rank))
        how = "ended before the others" if last.state == DONE else f"hangs in {last.at}"
        return Verdict(last.rank, how)
    return None


def line(verdict: Verdict, lost: Member, me: Member) -> str:
    """What a process says before it ends.

    >>> line(Verdict(2, "died"), Member(2, "b", 42, step=137), Member(0, "a", 7, step=138))
    'sharding: rank 2 on b (pid 42) died; its last known step was 137; this is rank 0 on a, at
    step 138; ending. Resume from the last checkpoint.'
    """
    last = "it told of no step" if lost.step is None else f"its last known step was {lost.step}"
    now = "" if me.step is None else f", at step {me.step}"
    return (
        f"sharding: rank {lost.rank} on {lost.host} (pid {lost.pid}) {verdict.how}; {last}; "
        f"this is rank {me.rank} on {me.host}{now}; ending. Resume from the last checkpoint."
    )


def describe(error: BaseException) -> str:
    """An exception in one line of bounded length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) < 300 else f"{text[:297]}..."


def is_own(error: BaseException) -> bool:
    """Whether an exception is surely this process's own and not the echo of a peer's loss.

    What the runtime raises, a broken collective among it, begins with a status in capitals.

    >>> is_own(KeyError("x")), is_own(ValueError("UNKNOWN: Gloo all-reduce failed: closed"))
    (True, False)
    """
    head, colon, _ = str(error).partition(":")
    return not (colon and head.isupper() and head.replace("_", "").isalpha())


def place(thread: int) -> dict:
    """Where a thread is, as far as `Member` wants to know.

    A program may be in one process's compilation cache and not in another's, so compiling is told
    apart from hanging. JAX has no public sign of it: its frame is looked for by name, and should
    that change, a hang is taken for what it looks like after `stall` seconds.

    >>> import threading
    >>> sorted(place(threading.main_thread().ident))
    ['at', 'compiles', 'waits']
    """
    frame = sys._current_frames().get(thread)
    if frame is None:
        return {"at": "", "waits": False, "compiles": False}
    inner, code = Path(frame.f_code.co_filename), frame.f_code
    files = [Path(f.f_code.co_filename).parts[-3:] for f, _ in traceback.walk_stack(frame)]
    return {
        "at": f"{inner.name}:{frame.f_lineno} ({code.co_name})",
        "waits": "jax" in inner.parts,
        "compiles": ("jax", "_src", "compiler.py") in files,
    }
