"""A run's processes: one, or as many as torchrun started, each with clients of its own.

    torchrun --nproc-per-node=5 fedgs.py --dataset polypgen --method fedgs

A client's images are loaded by its own process. What crosses is what would leave a hospital: updates, buffers, numbers of
steps and images, sums; and at the end of a run the scores of the test images, for its tables. Process 0 is the
server. On CPUs gloo carries it, between GPUs NCCL; processes that share a GPU talk by way of the CPU, since NCCL wants one each.
"""

import contextlib
import io
import os
import signal
import sys
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from runs import RunError

GO_ON = "the same command with --resume goes on from the last whole round"
PATIENCE = timedelta(days=7)  # how long one may wait for another; one that died is noticed at once


class OtherEnded(Exception):
    """Another process of the run is gone, and no process can go on. Not a RunError, which a grid of runs survives."""


class Processes:
    """The processes of a run: this one alone, until `join` has met those that torchrun started."""

    def __init__(self, readable=(RunError, OSError)):
        """readable: errors that are for people. Where one process meets one, all of them do."""
        self.readable = readable
        self.rank, self.count, self.owners = 0, 1, {}

    # -------------------------------------------------------------------------------------- beginning and end

    def join(self):
        """Meet the other processes, if torchrun started some. Cores and GPUs are shared out; process 0 has the terminal."""
        if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
            return
        self.rank, self.count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        torch.set_num_threads(max(1, available_cores() // here))
        if torch.cuda.is_available():
            torch.cuda.set_device(local % torch.cuda.device_count())
        signal.signal(signal.SIGTERM, self.stop)
        with self.talking():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
        if self.rank:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
            sys.stderr = NoTerminal(sys.stderr.buffer, errors="backslashreplace", line_buffering=True)

    def leave(self):
        """Part from the others, when all is done."""
        if self.count > 1:
            dist.destroy_process_group()

    def stop(self, *_):
        """SIGTERM: how torchrun ends the others when one has ended."""
        raise OtherEnded(f"process {self.rank} of {self.count} was stopped, as torchrun was or as another process ended (torchrun's "
                         f"report says which); {GO_ON}")

    @contextlib.contextmanager
    def talking(self):
        """What torch raises for a connection that broke is an error for people."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).partition("] ")[2].partition(". ")[0] or error  # gloo says: [its source] reason. Advice
            raise OtherEnded(f"process {self.rank} of {self.count} lost another one ({reason}; torchrun's report says more); "
                             f"{GO_ON}") from error

    # --------------------------------------------------------------------------------------------- agreement

    def agree(self, function):
        """function() on every process -> its result there. A readable error of one of them is raised by all."""
        if self.count == 1:
            return function()
        result = problem = None
        try:
            result = function()
        except self.readable as error:
            problem = str(error)
        with self.talking():
            dist.all_gather_object(problems := [None] * self.count, problem)
        if any(problem is not None for problem in problems):
            raise RunError("; ".join(dict.fromkeys(problem for problem in problems if problem is not None)))
        return result

    def from_first(self, function):
        """function() on process 0 only -> its result, on every process"""
        result = [self.agree(lambda: function() if self.rank == 0 else None)]
        if self.count > 1:
            with self.talking():
                dist.broadcast_object_list(result, 0)
        return result[0]

    def union(self, mine):
        """The entries of every process's dictionary, on every process."""
        parts = [mine]
        if self.count > 1:
            with self.talking():
                dist.all_gather_object(parts := [None] * self.count, mine)
        return {key: value for part in parts for key, value in part.items()}

    # ------------------------------------------------------------------------------------ clients and updates

    def spread(self, clients):
        """Share out {centre: work}: the largest client goes to the process that has least to do. -> this process's clients

        Raises RunError for more processes than clients.
        """
        if self.count > len(clients):
            raise RunError(f"--nproc-per-node {self.count}: there are {len(clients)} clients, so take at most as many processes")
        load, owners = [0] * self.count, {}
        for centre in sorted(clients, key=clients.get, reverse=True):
            owners[centre] = load.index(min(load))
            load[owners[centre]] += clients[centre]
        self.owners = {centre: owners[centre] for centre in clients}
        return [centre for centre, owner in self.owners.items() if owner == self.rank]

    def collect(self, updates, like):
        """The updates of all clients, in their order, on process 0; the other processes send theirs, and get none.

        updates: an iterator over those of this process, as fedgs.Update; like: tensors that theirs look like. One process
        alone takes them as they come, several train first and exchange then, so that none waits for another's client.
        """
        if self.count == 1:
            return updates
        mine = list(updates)
        if self.rank == 0:
            return (mine.pop(0) if owner == 0 else self.receive(owner, like) for owner in self.owners.values())
        with self.talking():
            for update in mine:
                dist.send_object_list([update.without_vectors()], 0)
                for vector in (update.delta, update.buffers, update.counters):
                    dist.send(self.carried(vector), 0)
        return ()

    def receive(self, rank, like):
        with self.talking():
            dist.recv_object_list(box := [None], rank)
            vectors = [torch.empty_like(self.carried(x)) for x in like]
            for vector in vectors:
                dist.recv(vector, rank)
        delta, buffers, counters = (vector.to(x.device) for vector, x in zip(vectors, like, strict=True))
        return replace(box[0], delta=delta, buffers=buffers, counters=counters)

    def share(self, tensors):
        """Overwrite tensors with those of process 0."""
        if self.count > 1:
            with self.talking():
                for x in tensors:
                    dist.broadcast(carried := self.carried(x), 0)
                    x.copy_(carried)

    def carried(self, x):
        """The tensor where it can be sent from."""
        return x if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]) else x.cpu()


class NoTerminal(io.TextIOWrapper):
    """Keeps progress bars away, and lets errors through."""

    def isatty(self):
        return False


def available_cores():
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
