"""Clients in other processes: of this machine, or of all that torchrun started.

    python fedgs.py --workers 2                       # two processes of this machine
    torchrun --nproc-per-node=5 fedgs.py              # several GPUs, or several machines

Process 0 is the server: it holds the round loop, the terminal and the run's folder, and has clients
of its own. Every other process serves: it waits for a request, answers it, and waits again. What
crosses is what would leave a hospital: the server's state, updates, numbers of steps and images,
sums; and at the end of a run the scores of the test images, for its tables.

Workers of this machine talk through a pipe that only parent and child can reach. Those of torchrun
talk through gloo, by way of the CPU.
"""

import contextlib
import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from support import hardware
from support.errors import UserError, for_people

GO_ON = "the same command with --resume goes on from the last whole round"
PATIENCE = timedelta(days=7)  # how long one may wait for another; one that died is noticed at once
END = "end"
CPU = torch.device("cpu")  # from where tensors can be sent


# ---------------------------------------------------------------------------------------- channels


class Channel:
    """Messages between the server and one process that serves.

    due: how many answers have not come yet. Raises UserError where the other end is gone.
    """

    def __init__(self, other: str):
        self.other = other
        self.due = 0

    def request(self, *message: object, answers: int = 1) -> None:
        """Ask for something that takes this many messages to answer."""
        self.send(message)
        self.due += answers

    def answer(self) -> Any:
        """The next message. Raises UserError with the message of an error at the other end."""
        problem, content = self.receive()
        if problem:
            self.due = 0  # nothing more will come of this request
            raise UserError(problem)
        self.due -= 1
        return content

    def send(self, message: object) -> None:
        with self.talking():
            self.send_bytes(pickle.dumps(message))

    def receive(self) -> Any:
        with self.talking():
            return pickle.loads(self.receive_bytes())

    @contextlib.contextmanager
    def talking(self) -> Iterator[None]:
        """A connection that broke is an error for people."""
        try:
            yield
        except (EOFError, OSError, RuntimeError) as error:
            raise UserError(f"{self.other} is gone; {GO_ON}") from error

    def send_bytes(self, content: bytes) -> None:
        raise NotImplementedError

    def receive_bytes(self) -> bytes:
        raise NotImplementedError

    def close(self) -> None:
        """Let the other process end, unless it is at work and does not listen, or gone."""
        if self.due == 0:
            with contextlib.suppress(UserError):
                self.send(END)


class PipeChannel(Channel):
    """A pipe between this process and one that it started, or was started by."""

    def __init__(self, connection: Any, other: str, process: Any = None):
        super().__init__(other)
        self.connection = connection
        self.process = process

    def send_bytes(self, content: bytes) -> None:
        self.connection.send_bytes(content)

    def receive_bytes(self) -> bytes:
        return self.connection.recv_bytes()

    def close(self) -> None:
        """A worker keeps nothing that would be lost: it can be stopped at any moment."""
        self.process.terminate()
        self.process.join()


class GlooChannel(Channel):
    """Messages through torch.distributed, to or from the process of this rank."""

    def __init__(self, rank: int):
        super().__init__(f"process {rank} of {dist.get_world_size()}")
        self.rank = rank

    def send_bytes(self, content: bytes) -> None:
        message = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        dist.send(torch.tensor([len(message)]), self.rank)
        dist.send(message, self.rank)

    def receive_bytes(self) -> bytes:
        length = torch.zeros(1, dtype=torch.int64)
        dist.recv(length, self.rank)
        message = torch.empty(int(length), dtype=torch.uint8)
        dist.recv(message, self.rank)
        return message.numpy().tobytes()


# --------------------------------------------------------------------------------- the other side


def serve(channel: Channel, open_local: Callable[..., Any]) -> None:
    """Answer the server's requests until it has no more.

    open_local(config, centres) loads these centres, and returns what trains, evaluates and tests
    them. An error for people is an answer, too.
    """
    clients = None
    while (request := channel.receive()) != END:
        verb, *arguments = request
        try:
            if verb == "open":
                config, centres, threads = arguments
                torch.set_num_threads(threads)
                clients = open_local(config, centres)
                answer(channel, clients.federation.facts)
            elif verb == "train":
                # All clients first: the server does not listen while it trains its own, and a
                # client that is done must not keep the next one waiting.
                state, round_ = arguments
                updates = list(clients.train(state_on(clients.device, state), round_))
                for update in updates:
                    answer(channel, update_on(CPU, update))
            elif verb == "evaluate":
                answer(channel, clients.evaluate(state_on(clients.device, arguments[0])))
            elif verb == "test":
                tests = clients.test(state_on(clients.device, arguments[0]))
                answer(channel, [without_images(test) for test in tests])
        except Exception as error:
            if not for_people(error):
                raise
            channel.send((for_people(error), None))


def answer(channel: Channel, content: object) -> None:
    channel.send((None, content))


def state_on(device: torch.device, state: Any) -> Any:
    """The server's state on a device."""
    *tensors, own = state
    return type(state)(*(x.to(device) for x in tensors), all_on(device, own))


def update_on(device: torch.device, update: Any) -> Any:
    """A client's update on a device."""
    return replace(
        update,
        vector=update.vector.to(device),
        buffers=update.buffers.to(device),
        counters=update.counters.to(device),
        own=all_on(device, update.own),
    )


def all_on(device: torch.device, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by name, on a device."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def without_images(test: Any) -> Any:
    """A centre's test as the tables need it: its images stay in their own process."""
    return replace(test, images=None, evaluation=None)


def work(connection: Any, open_local: Callable[..., Any]) -> None:
    """The life of a worker of this machine."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    quiet_bars()
    with contextlib.suppress(UserError):  # the server is gone: nobody is left to tell
        serve(PipeChannel(connection, "the server"), open_local)


def end_with_parent() -> None:
    """A server that is killed cannot stop its workers: they watch it."""
    multiprocessing.parent_process().join()
    os._exit(1)


class NoTerminal(io.TextIOWrapper):
    """Keeps progress bars away, and lets errors through."""

    def isatty(self) -> bool:
        return False


def quiet_bars() -> None:
    """One bar at a time: the server's."""
    # The lock of bars is a semaphore of the system by default, which a worker that is stopped
    # would leave behind.
    tqdm.set_lock(threading.RLock())
    sys.stderr = NoTerminal(sys.stderr.buffer, errors="backslashreplace", line_buffering=True)


# ------------------------------------------------------------------------------- the server's side


class SpreadClients:
    """Clients in several processes, this one among them, as if they were all here.

    local: the clients of this process; channels: {rank: Channel} to the others; owners: {client:
    rank}, in client order. Each process trains one client after another, all processes at once.
    """

    def __init__(self, local: Any, channels: Mapping[int, Channel], owners: Mapping[str, int]):
        self.local = local
        self.channels = channels
        self.owners = owners
        self.flat = local.flat
        self.kernels = local.kernels
        self.federation = local.federation
        self.here = local.here
        self.on_step = None

    @property
    def placement(self) -> str:
        """Which client is where, for the header."""
        places = []
        for rank in range(1 + len(self.channels)):
            own = clients_at(rank, self.owners)
            places.append(f"process {rank}: {', '.join(own)}")
        return f" each of {len(places)} processes ({'; '.join(places)})"

    def train(self, state: Any, round_: int) -> Iterator[Any]:
        """Every client's update, in client order."""
        owners = list(self.owners.values())
        sent = state_on(CPU, state)
        for rank, channel in self.channels.items():
            channel.request("train", sent, round_, answers=owners.count(rank))

        # While the others train theirs.
        self.local.on_step = self.on_step
        mine = list(self.local.train(state, round_))

        for rank in owners:
            if rank == 0:
                yield mine.pop(0)
            else:
                yield update_on(state.parameters.device, self.channels[rank].answer())

    def evaluate(self, state: Any) -> dict[str, Any]:
        """{client: sums and counts over its validation images}, in client order."""
        sent = state_on(CPU, state)
        for channel in self.channels.values():
            channel.request("evaluate", sent)

        tallies = dict(self.local.evaluate(state))
        for channel in self.channels.values():
            tallies.update(channel.answer())
        return {client: tallies[client] for client in self.owners}

    def test(self, state: Any) -> list[Any]:
        """Every centre's test, in the order of the clients, then that of a held-out centre."""
        sent = state_on(CPU, state)
        for channel in self.channels.values():
            channel.request("test", sent)

        tests = list(self.local.test(state))
        for channel in self.channels.values():
            tests.extend(channel.answer())

        # In the order of the centres, those of each in the order that its process tested them.
        order = [*self.owners, self.federation.out_centre]
        return sorted(tests, key=lambda test: order.index(test.centre))


def choose_workers(wanted: str, clients: int, device: torch.device) -> int:
    """How many processes share the clients: torchrun's number, else that of --workers.

    Raises UserError for more processes than clients.
    """
    few = f"there are {clients} clients, so take at most as many processes"
    if under_torchrun():
        count = int(os.environ["WORLD_SIZE"])
        if count > clients:
            raise UserError(f"--nproc-per-node {count}: {few}")
        return count
    if wanted == "auto":
        return min(clients, hardware.available_cores()) if device.type == "cpu" else 1
    if int(wanted) > clients:
        raise UserError(f"--workers {wanted}: {few}")
    return int(wanted)


@contextlib.contextmanager
def spread(
    open_local: Callable[..., Any], config: Any, work_of: Mapping[str, int], count: int
) -> Iterator[SpreadClients]:
    """Share the clients, {client: its amount of work}, out to `count` processes.

    open_local: see `serve`. This process has the held-out centre beside its clients. Its threads
    are its share of the cores while it has company.
    """
    owners = share_out(work_of, count)
    threads_before = torch.get_num_threads()
    channels = {}
    try:
        channels.update(meet() if under_torchrun() else start_workers(count, open_local))

        threads = threads_of_each(count)
        for rank, channel in channels.items():
            channel.request("open", config, clients_at(rank, owners), threads)
        torch.set_num_threads(threads)
        local = open_local(config, [*clients_at(0, owners), config.out_centre])

        # Of the others' data this process learns the facts alone.
        facts = dict(local.federation.facts)
        for channel in channels.values():
            facts.update(channel.answer())
        local.federation.facts = {centre: facts[centre] for centre in config.centres}
        yield SpreadClients(local, channels, owners)
    finally:
        for channel in channels.values():
            channel.close()
        if under_torchrun():
            dist.destroy_process_group()
        torch.set_num_threads(threads_before)


def share_out(work_of: Mapping[str, int], count: int) -> dict[str, int]:
    """{client: rank}: the largest client goes to the process that has least to do."""
    load = [0] * count
    owners = {}
    for client in sorted(work_of, key=work_of.get, reverse=True):
        rank = load.index(min(load))
        owners[client] = rank
        load[rank] += work_of[client]
    return {client: owners[client] for client in work_of}


def clients_at(rank: int, owners: Mapping[str, int]) -> list[str]:
    """The clients of one process."""
    return [client for client, owner in owners.items() if owner == rank]


def threads_of_each(count: int) -> int:
    """Threads of each process, where a machine's cores are shared by those that run on it."""
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if under_torchrun() else count
    return max(1, hardware.available_cores() // here)


def start_workers(count: int, open_local: Callable[..., Any]) -> dict[int, Channel]:
    """Start count - 1 workers on this machine. -> {rank: Channel}"""
    # A forked copy of a process with OpenMP threads can hang: workers start afresh.
    context = multiprocessing.get_context("spawn")
    channels = {}

    # Workers inherit this: while they import, they could not yet ask for it themselves.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for rank in range(1, count):
            mine, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, open_local), daemon=True)
            process.start()
            theirs.close()  # so that the pipe ends when the worker does
            channels[rank] = PipeChannel(mine, f"worker {rank} of {count}", process)
    finally:
        signal.signal(signal.SIGINT, handler)
    return channels


# --------------------------------------------------------------------------------------- torchrun


def under_torchrun() -> bool:
    """Whether torchrun started this process, and others."""
    return dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def serves() -> bool:
    """Whether torchrun started this process to serve another one."""
    return under_torchrun() and int(os.environ["RANK"]) > 0


def join(open_local: Callable[..., Any]) -> None:
    """The life of a process that serves under torchrun."""
    # Process 0 only shows the help, and ends without having met the others.
    if not {"-h", "--help"}.isdisjoint(sys.argv):
        return

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is process 0's affair
    quiet_bars()
    start_group()
    try:
        serve(GlooChannel(0), open_local)
    except UserError:  # process 0 is gone, and has said why
        raise SystemExit(1) from None
    dist.destroy_process_group()


def meet() -> dict[int, Channel]:
    """Process 0 meets the others that torchrun started. -> {rank: Channel}"""
    start_group()
    return {rank: GlooChannel(rank) for rank in range(1, dist.get_world_size())}


def start_group() -> None:
    """Every process of torchrun has to call this. Each takes one of its machine's GPUs."""
    if torch.cuda.is_available():
        local_rank = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    dist.init_process_group("gloo", timeout=PATIENCE)
