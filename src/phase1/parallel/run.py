"""A run of several processes: how they find each other, each its GPU, and how all end when one does."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import psutil
import torch
import torch.distributed as dist

from phase1 import world
from phase1.errors import Elsewhere, Gone, error_line
from phase1.parallel.group import PATIENCE, Lost, gate
from phase1.signals import handlers

GRACE_SECONDS: Final = 15.0  # from the signal that ends a rank to its end, where it waits for a GPU that waits for another
LOOK_SECONDS: Final = 3.0  # for the rank that is gone, or says why it goes


RUN: Final = "run"  # the group of the ranks themselves


@contextmanager
def processes(command: str, name: str = RUN) -> Iterator[None]:
    """Within the block the ranks that torchrun started compute together; nothing changes where there is one.

    However one of them ends, all do, and one line says which it was.

    Args:
        command: whose line it is.
        name: of this group; processes that the ranks start for a measurement make a group of their own.
    Raises:
        Elsewhere: another rank has said why the run ends.
    """
    if world.size() == 1:
        yield
        return
    store = dist.PrefixStore(f"phase1/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{name}", _store(name == RUN))
    with Guard(store, command) as guard:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=world.rank(), world_size=world.size(), timeout=PATIENCE)
        try:
            yield
            gate()  # a rank that has ended could be taken for one that was ended
        except (Exception, KeyboardInterrupt) as error:
            for number in handlers():  # torchrun's, which it sends when another rank ends: this one knows, and looks for it
                signal.signal(number, signal.SIG_IGN)
            raise guard.verdict(error) from error
        dist.destroy_process_group()


def _store(hosts: bool) -> Any:
    """Where ranks leave word for each other: with torchrun, or with rank 0 where it leaves that to the ranks."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_host = hosts and world.rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    return dist.TCPStore(address, port, is_master=is_host, timeout=PATIENCE, wait_for_workers=False)


def see_one_gpu() -> None:
    """Leave this rank the GPU of its place on the machine: "cuda" is that one everywhere, as in a run of one process.

    Call it before CUDA is asked for anything else than how many GPUs there are: then it is too late.
    Raises ValueError where there are fewer GPUs than ranks of this machine.
    """
    gpus = visible_gpus()
    if world.size() == 1 or not gpus:
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world.size()))
    if ranks > len(gpus):
        raise ValueError(f"--nproc-per-node must be at most the {len(gpus)} GPUs of this machine; got {ranks}; lower it")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[world.local_rank()]
    if torch.cuda.device_count() > 1:  # too late: asking had to start CUDA, since there is no library of the driver
        torch.cuda.set_device(world.local_rank())


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in given.split(",") if name.strip()]
    return names[: torch.cuda.device_count()] or [str(i) for i in range(torch.cuda.device_count())]


class Guard:
    """Sees to it that a run ends with any of its ranks.

    torchrun sends a signal to all when one ends, and ends itself by a signal. Python acts on signals between its own
    instructions only, so a rank that waits in a library, for a GPU which waits for a rank that is gone, would never: a thread
    ends it after GRACE_SECONDS, and at once where torchrun is gone.
    """

    def __init__(self, store: Any, command: str) -> None:
        self.store, self.command, self.rank, self.size = store, command, world.rank(), world.size()
        self._parent = os.getppid()
        self._done = False

    def __enter__(self) -> "Guard":
        self.store.set(f"process {self.rank}", f"{socket.gethostname()} {os.getpid()}")
        self._reader, self._writer = socket.socketpair()
        self._reader.settimeout(1.0)
        self._writer.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done = True
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)

    def _watch(self) -> None:
        deadline = None
        while not self._done:
            with suppress(OSError):  # a second without a signal
                if self._reader.recv(64):
                    deadline = deadline or time.monotonic() + GRACE_SECONDS
            if os.getppid() != self._parent:
                os._exit(1)
            if deadline is not None and time.monotonic() > deadline and (end := self._end_elsewhere()) and not self._done:
                if isinstance(end, Gone):
                    os.write(2, f"{error_line(self.command, end)}\n".encode("ascii", "replace"))
                os._exit(3)

    def verdict(self, error: BaseException) -> BaseException:
        """What this rank has to say: `error`, that another one is gone, or nothing (Elsewhere), since one line is enough."""
        if not isinstance(error, Lost | KeyboardInterrupt):
            if self.rank > 0:
                time.sleep(0.5)  # where all fail alike rank 0 speaks
            return error if self._speaks() else Elsewhere("another rank failed")
        interrupted = isinstance(error, KeyboardInterrupt)
        for _ in range(1 if interrupted else int(LOOK_SECONDS / 0.1)):
            if end := self._end_elsewhere():
                return end
            if interrupted and self._said("interrupted"):
                return error
            time.sleep(0.1)
        if interrupted:
            with suppress(RuntimeError):
                self.store.set("interrupted", "")
        return error if interrupted or self._speaks() else Elsewhere("another rank failed")

    def _end_elsewhere(self) -> Gone | Elsewhere | None:
        """What ends this rank though it is well: another one has failed, or is gone."""
        if self._said("failed"):
            return Elsewhere("another rank failed")
        if gone := self._gone():
            text = f"rank {gone[0]} of {self.size} was ended, by a signal or for want of memory; the same command goes on"
            return Gone(text) if self._speaks() else Elsewhere("another rank failed")
        return None

    def _said(self, what: str) -> bool:
        with suppress(RuntimeError):  # torchrun, which keeps the store, is gone
            return bool(self.store.check([what]))
        return False

    def _speaks(self) -> bool:
        """Whether this is the first rank that asks; it may print then."""
        with suppress(RuntimeError):  # torchrun, which keeps the store, is gone
            if self.store.compare_set("failed", "", str(self.rank)) == str(self.rank).encode():
                world.speak()
                return True
        return False

    def _gone(self) -> list[int]:
        """Ranks of this machine that have ended without a word."""
        gone = []
        with suppress(RuntimeError):
            for rank in range(self.size):
                host, pid = self.store.get(f"process {rank}").decode().split()
                if host == socket.gethostname() and not _lives(int(pid)):
                    gone.append(rank)
        return gone


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
