"""Processes meet at one address, and stay in touch until the end.

Process 0 listens there; each of the others keeps one connection to it and says a line of JSON every
second. A process that dies takes its connection along, so the others know at once, on any host;
one that is stopped or stuck falls silent. `watch.judge` says who is lost; then every process says
so in one line and ends with `EXIT`.

JAX's own runtime must not learn of a death first: it would end the process from C++ under a page
of text that names nobody. So its connections to process 0 go through here as well, and stay open
on this side when the other is gone.

JAX has its key-value store for such news, but no public way to it; it meets by ending the process
where somebody does not come, and it dies with process 0.
"""

import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import asdict, replace
from typing import Any

from sharding.errors import ShardingError
from sharding.processes import watch
from sharding.processes.watch import COMPILING, FAILED, RUNNING, Member, Verdict

EXIT = 70
"""The exit status of a process that ends because another is lost; EX_SOFTWARE of sysexits.h."""

LOOPBACK = "127.0.0.1"
LINE = 1 << 16  # bytes in a line of JSON, at most
GRACE = 0.2  # seconds


class Meeting:
    """The meeting as one process sees it: a thread with an event loop, and what it knows.

    Attributes:
        me: what the main thread has to say; it sets the fields, the thread sends them.
        members: what is known of each; of all in process 0, of itself and process 0 in the others.
        runtime: the port on this host's loopback where JAX finds its coordination service.
        outcome: after a failure here, once it is known whose fault it is: None if all failed alike.
    """

    def __init__(
        self, address: str, processes: int, rank: int, *,
        timeout: float, stall: float, interval: float, within: float,
    ):  # fmt: skip
        """Sets up; `join` begins. Times are in seconds, as for `cluster.start`."""
        host, _, port = address.rpartition(":")
        self.address, self.host, self.port = address, host.strip("[]"), int(port)
        self.processes, self.rank = processes, rank
        self.timeout, self.stall, self.interval, self.within = timeout, stall, interval, within
        self.me = Member(rank, socket.gethostname(), os.getpid())
        self.members = {rank: replace(self.me)}
        self.runtime = 0
        self.outcome: Future[Verdict | None] = Future()
        self._main = threading.main_thread().ident or 0
        self._loop: asyncio.AbstractEventLoop
        self._writers: list[asyncio.StreamWriter] = []
        self._servers: list[asyncio.Server] = []
        self._kept: list[Any] = []  # what would end if it were collected
        self._met: Future[None] = Future()
        self._settled = False
        self._judged = time.monotonic()

    def join(self) -> None:
        """Waits until all have come.

        Raises:
            ShardingError: they have not within the time; the address is wrong or taken.
        """
        threading.Thread(target=asyncio.run, args=(self._attend(),), daemon=True).start()
        self._met.result()

    def tell(self) -> None:
        """Says at once where this process is; returns when it is said."""
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._beat(), self._loop).result(1)

    # --- in the thread ----------------------------------------------------------------------------

    async def _attend(self) -> None:
        """Meets, and stays for as long as the process lives."""
        self._loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.within):
                await (self._host() if self.rank == 0 else self._visit())
        except Exception as error:  # raised where the user waits for it
            late = ShardingError(self._nobody()) if isinstance(error, TimeoutError) else error
            for thing in (*self._writers, *self._servers):
                thing.close()
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(1):  # until it is closed rank 0 refuses a second try
                    await asyncio.gather(*(writer.wait_closed() for writer in self._writers))
            self._met.set_exception(late)
            return
        self._judged = time.monotonic()
        self._met.set_result(None)
        try:
            while True:
                await self._beat()
                await asyncio.sleep(self.interval)
        except Exception as error:  # nobody would be watched
            self._broke(error)

    async def _host(self) -> None:
        """Process 0: until all are here."""
        self._all = asyncio.Event()
        self.runtime = _free_port()
        local = self.host in ("localhost", LOOPBACK, "::1")
        try:
            self._servers.append(
                await asyncio.start_server(self._arrive, self.host if local else None, self.port)
            )
        except OSError as error:
            raise ShardingError(
                f"rank 0 cannot listen at port {self.port} of {self.me.host}: "
                f"{error.strerror or error}; give another address than {self.address}"
            ) from error
        await self._all.wait()
        self._send({"all": "here"})

    async def _arrive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Process 0: somebody connects; a stranger, such as a health check, is sent away."""
        try:
            hello = await asyncio.wait_for(_read(reader), self.timeout)
            if hello.get("runtime") == self.processes:
                await self._relay(reader, writer, LOOPBACK, self.runtime)
                return
            processes = hello["processes"]
            member = Member(int(hello["rank"]), str(hello["host"]), int(hello["pid"]))
        except (OSError, TimeoutError, ValueError, KeyError, TypeError, AttributeError, EOFError):
            writer.close()
            return
        if member.rank in self.members:  # one that gave up and tries again may overtake its own end
            await asyncio.sleep(GRACE)
        if wrong := self._refusal(member, processes):
            writer.write(_encode({"refused": wrong}))
            writer.close()
            return
        member.heard = member.moved = time.monotonic()
        self.members[member.rank] = member
        self._writers.append(writer)
        if len(self.members) == self.processes:
            self._all.set()
        try:
            while True:
                member.hear(await _read(reader), time.monotonic())
                self._judge()
        except (OSError, ValueError, KeyError, EOFError):
            if not self._all.is_set():  # it may come again
                del self.members[member.rank]
                self._writers.remove(writer)
            writer.close()
            member.gone = True
            self._judge()

    def _refusal(self, member: Member, processes: int) -> str:
        if processes != self.processes:
            return f"rank {member.rank} counts {processes} processes, rank 0 {self.processes}"
        if member.rank in self.members:
            other = self.members[member.rank]
            return f"rank {member.rank} is there already, as pid {other.pid} on {other.host}"
        return ""

    async def _visit(self) -> None:
        """Every other process: until all are there."""
        reader, writer = await _connect(self.host, self.port)
        self._writers.append(writer)
        hello = {"rank": self.rank, "processes": self.processes}
        self._send({**hello, "host": self.me.host, "pid": self.me.pid})
        try:
            answer = await _read(reader)
        except (OSError, ValueError, EOFError) as error:
            raise ShardingError(
                f"rank {self.rank}: {self.address} closed the connection: rank 0 has ended, or "
                "another program listens there"
            ) from error
        if "refused" in answer:
            raise ShardingError(f"{self.address} refuses rank {self.rank}: {answer['refused']}")

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._relay(reader, writer, self.host, self.port, {"runtime": self.processes})

        server = await asyncio.start_server(relay, LOOPBACK, 0)
        self._servers.append(server)
        self.runtime = server.sockets[0].getsockname()[1]
        self.members[0] = Member(0, self.host, 0, heard=time.monotonic())
        self._go(self._follow(reader, self.members[0]))

    async def _follow(self, reader: asyncio.StreamReader, zero: Member) -> None:
        """Every other process: what process 0 says, until it says no more."""
        try:
            while True:
                said = await _read(reader)
                if "zero" in said:
                    zero.host, zero.pid = said["host"], said["pid"]
                    zero.hear(said["zero"], time.monotonic())
                elif "lost" in said:
                    lost = Member(**said["lost"])
                    self._settle(Verdict(lost.rank, said["how"]), lost)
                elif "alike" in said:
                    zero.note = said["alike"]
                    self._settle(None, zero)
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            zero.gone = True
            self._judge()

    async def _relay(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
        host: str, port: int, hello: dict | None = None,
    ) -> None:  # fmt: skip
        """Passes JAX's bytes on, both ways; the side towards JAX stays open when the other ends."""
        self._kept.append(writer)
        there, back = await _connect(host, port)
        self._kept.append(back)
        if hello is not None:
            back.write(_encode(hello))
        self._go(_pump(there, writer))
        await _pump(reader, back)
        back.close()

    async def _beat(self) -> None:
        where = watch.place(self._main)
        said = {**self.me.say(), "at": where["at"], "waits": where["waits"]}
        if where["compiles"] and said["state"] == RUNNING:
            said["state"] = COMPILING
        me = self.members[self.rank]
        me.hear(said, time.monotonic())
        about = {"zero": said, "host": me.host, "pid": me.pid} if self.rank == 0 else said
        self._send(about)
        self._judge()

    def _judge(self) -> None:
        now = time.monotonic()
        away, self._judged = now - self._judged, now
        if away > self.interval + self.timeout / 3:  # it was this process that was stopped or stuck
            for member in self.members.values():
                member.heard += away
                member.moved += away
        if self.rank == 0 and len(self.members) == self.processes:
            found = watch.judge(self.members.values(), now, timeout=self.timeout, stall=self.stall)
            if found is not None:
                self._settle(found, self.members[found.rank])
            elif all(m.state == FAILED for m in self.members.values()):
                self._settle(None, self.me)
        elif self.rank != 0 and 0 in self.members:
            # Process 0 judges in time if it can; of itself it cannot tell.
            zero = self.members[0]
            found = watch.judge([zero], now, timeout=self.timeout + self.interval, stall=self.stall)
            if found is None and zero.gone and zero.state == FAILED:
                found = Verdict(0, f"failed: {zero.note}")
            if found is not None:
                self._settle(found, zero)

    def _settle(self, found: Verdict | None, lost: Member) -> None:
        """Once: all know who is lost, and end; but one whose own failure it is reports that."""
        if self._settled:
            return
        self._settled = True
        if self.rank == 0:
            said = {"alike": lost.note} if found is None else {"lost": asdict(lost)}
            self._send(said if found is None else {**said, "how": found.how})
        if found is None or (found.rank == self.rank and self.me.state == FAILED):
            self.outcome.set_result(found)
        else:
            say(watch.line(found, lost, self.me))  # at once: a launcher may end this process, too
            self._loop.call_later(0.2, end, "")  # when what was said is on its way

    def _send(self, said: dict) -> None:
        for writer in self._writers:
            if not writer.is_closing():
                writer.write(_encode(said))

    def _go(self, work: Coroutine) -> None:
        task = self._loop.create_task(work)
        self._kept.append(task)

        def check(task: asyncio.Task) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._broke(error)

        task.add_done_callback(check)

    def _broke(self, error: BaseException) -> None:
        end(f"sharding: rank {self.rank}: the watch itself broke: {watch.describe(error)}")

    def _nobody(self) -> str:
        if self.rank == 0:
            absent = [str(r) for r in range(self.processes) if r not in self.members]
            return (
                f"rank {', '.join(absent)} of {self.processes} did not come to {self.address} "
                f"within {self.within:g} s: start them all, with an address by which they reach "
                f"this host, {self.me.host}"
            )
        return (
            f"rank {self.rank}: {self.address} did not answer within {self.within:g} s: is rank 0 "
            f"running there, and are all the others? Does {self.me.host} reach it?"
        )


def say(text: str) -> None:
    """A line on stderr, past whoever holds its locks."""
    fresh = "\n" if sys.stderr is not None and sys.stderr.isatty() else ""  # off a progress line
    os.write(2, f"{fresh}{text}\n".encode("utf-8", "backslashreplace"))


def end(text: str, status: int = EXIT) -> None:
    """Ends the process now, with a line on stderr; a handler at exit might wait for a peer."""
    flusher = threading.Thread(target=_flush, daemon=True)  # the main thread may hold the locks
    flusher.start()
    flusher.join(1)
    if text:
        say(text)
    os._exit(status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


async def _connect(host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Tries until somebody listens; the caller limits the time."""
    while True:
        try:
            return await asyncio.open_connection(host, port, limit=LINE)
        except OSError:  # an unknown host too: its name may come with it
            await asyncio.sleep(0.2)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(LINE):
            writer.write(data)
            await writer.drain()


async def _read(reader: asyncio.StreamReader) -> Any:
    text = await reader.readline()
    if not text.endswith(b"\n"):
        raise EOFError
    return json.loads(text)


def _encode(said: dict) -> bytes:
    return json.dumps(said).encode() + b"\n"


def _free_port() -> int:
    with socket.socket() as server:
        server.bind((LOOPBACK, 0))
        return server.getsockname()[1]
