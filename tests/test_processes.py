"""Clients in other processes: the results of one, and a clear end when something goes wrong."""

import functools
import multiprocessing
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, assert_same_weights, exit_code, without_time

import data
import fedgs
from support import processes
from support.errors import UserError
from support.hardware import available_cores

OPTIONS = [
    *("--image-size", "32", "--width", "2", "--batch-size", "4", "--local-epochs", "1"),
    *("--lr", "1e-3", "--rounds", "2"),
]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


def start(*options, torchrun=0, **more):
    """Start a run, in processes of torchrun where a number of them is given. -> Popen"""
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"]
    command += ["fedgs.py", *OPTIONS, *map(str, options)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **more,
    )


@pytest.fixture(scope="module")
def alone(square_root, tmp_path_factory):
    """The folder of a run in one process, of as many threads as each of `count` gets."""
    folders = {}

    def run_alone(count, rounds=2):
        which = max(1, available_cores() // count), rounds
        if which not in folders:
            folder = tmp_path_factory.mktemp("alone") / "run"
            before = torch.get_num_threads()
            torch.set_num_threads(which[0])
            where = ["--data-root", square_root, "--out", folder]
            arguments = [*OPTIONS, *where, "--rounds", rounds, "--workers", 1]
            assert exit_code(fedgs.main, arguments) == 0
            torch.set_num_threads(before)
            folders[which] = folder
        return folders[which]

    return run_alone


def assert_equal_runs(one, other):
    """Weights of the last and the best round, and every table but for the time that it took."""
    for name in ("last", "best", "best_small"):
        assert_same_weights(one / f"{name}.pt", other / f"{name}.pt")
    for name in ("scores.csv", "rounds.csv"):
        table = without_time(one / name)
        assert table
        assert table == without_time(other / name)


def children(pid):
    """Processes that this one started."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            continue  # gone
        if parent == pid:
            found.append(int(entry))
    return found


def command_line(pid):
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()


def environment(pid):
    with open(f"/proc/{pid}/environ", "rb") as file:
        return b"\0" + file.read()


def workers_of(pid):
    """The processes that serve a run: multiprocessing starts a tracker beside them."""
    return [child for child in children(pid) if b"spawn_main" in command_line(child)]


def wait_for(condition, seconds=120):
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


class Script(processes.Channel):
    """A channel whose other end says what is written here. It keeps what it is told."""

    def __init__(self, *says):
        super().__init__("the other end")
        self.says = list(says)
        self.told = []

    def send(self, message):
        self.told.append(message)

    def receive(self):
        return self.says.pop(0)


# ---------------------------------------------------------------------------------- equal results


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 5])
def test_workers_are_one_process(square_root, alone, tmp_path, count):
    run = start("--data-root", square_root, "--out", tmp_path / "run", "--workers", count)
    out, error = run.communicate(timeout=300)
    assert run.returncode == 0, error
    assert error == ""  # no bars where there is no terminal
    assert out.count("round   2/2") == 1
    assert_equal_runs(alone(count), tmp_path / "run")


@pytest.mark.slow
def test_processes_of_torchrun_are_one(square_root, alone, tmp_path):
    run = start("--data-root", square_root, "--out", tmp_path / "run", torchrun=5)
    out, error = run.communicate(timeout=300)
    assert run.returncode == 0, error
    assert out.count("round   2/2") == 1
    assert "process 0: C3; process 1: C2; process 2: C1; process 3: C4; process 4: C5)" in out
    assert "fedgs.py" not in error
    assert "\r" not in error
    assert_equal_runs(alone(5), tmp_path / "run")


@pytest.mark.slow
def test_workers_share_a_disentangled_run_on_volumes(cache, tmp_path):
    """One channel, noise for codes, a stand-in that each process draws for itself."""
    options = ["--dataset", "lits", "--data-root", "stand-in", "--model", "sd-utnet"]
    options += ["--rounds", "1", "--cache", cache / "lits", "--batch-size", "8"]
    folders = []
    for count in (2, 1):
        folders.append(tmp_path / str(count))
        threads = max(1, available_cores() // 2) if count == 2 else 1
        run = start(*options, "--out", folders[-1], "--workers", count)
        _, error = run.communicate(timeout=300)
        assert run.returncode == 0, error
        if threads > 1:
            pytest.skip("this machine gives each of two processes several threads")
    assert_equal_runs(*folders)


# --------------------------------------------------------------------------------- ends and errors


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [0, 2])
def test_a_process_that_dies_ends_the_run_which_can_go_on(square_root, alone, tmp_path, torchrun):
    folder = tmp_path / "run"
    where = ["--data-root", square_root, "--out", folder]
    workers = [] if torchrun else ["--workers", 2]
    run = start(*where, *workers, "--rounds", 1000, torchrun=torchrun)
    wait_for((folder / "resume.pt").exists)
    if torchrun:
        [victim] = [pid for pid in children(run.pid) if b"\0RANK=1\0" in environment(pid)]
    else:
        [victim] = workers_of(run.pid)
    os.kill(victim, signal.SIGKILL)
    _, error = run.communicate(timeout=120)
    assert run.returncode != 0
    assert error.count("--resume goes on") == 1  # torchrun's own report is beside it

    done = torch.load(folder / "resume.pt", weights_only=True)["history"]
    assert 1 <= len(done) < 1000
    rounds = max(2, len(done) + 1)
    run = start(*where, *workers, "--rounds", rounds, "--resume", torchrun=torchrun)
    _, error = run.communicate(timeout=300)
    assert run.returncode == 0, error
    assert_equal_runs(alone(2, rounds), folder)


@on_linux
@pytest.mark.parametrize("how", ["SIGTERM", "SIGHUP", "SIGINT", "SIGKILL"])
@pytest.mark.slow
def test_no_worker_outlives_its_run(square_root, tmp_path, how):
    folder = tmp_path / "run"
    options = ["--data-root", square_root, "--out", folder, "--rounds", 1000, "--workers", 2]
    run = start(*options)
    wait_for((folder / "resume.pt").exists)
    [worker] = workers_of(run.pid)
    run.send_signal(signal.Signals[how])
    _, error = run.communicate(timeout=60)
    codes = {"SIGTERM": 143, "SIGHUP": 129, "SIGINT": 130, "SIGKILL": -signal.SIGKILL}
    assert run.returncode == codes[how]
    if how != "SIGKILL":
        assert error.startswith((f"fedgs.py: stopped by {how}", "fedgs.py: interrupted"))
        assert "--resume" in error
        assert error.count("\n") == 1
    wait_for(lambda: not os.path.exists(f"/proc/{worker}"), 20)


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [0, 2])
def test_an_error_of_one_process_is_everyones(square_root, tmp_path, torchrun):
    """A damaged image of a centre that process 1 holds: one message, before anything is written."""
    root = tmp_path / "frames"
    shutil.copytree(square_root, root)
    damaged = root / "data_C2" / "images_C2" / "03.jpg"
    damaged.write_bytes(damaged.read_bytes()[:200])
    workers = [] if torchrun else ["--workers", 2]
    run = start("--data-root", root, "--out", tmp_path / "run", *workers, torchrun=torchrun)
    _, error = run.communicate(timeout=120)
    assert run.returncode != 0
    assert error.count("fedgs.py: error: ") == 1
    assert f"cannot read {damaged}" in error
    assert not (tmp_path / "run").exists()


@on_linux
@pytest.mark.slow
def test_nothing_listens_where_other_users_could_connect(square_root, tmp_path):
    """Parent and worker share a pipe without a name, and no process waits for connections."""
    folder = tmp_path / "run"
    options = ["--data-root", square_root, "--out", folder, "--rounds", 1000, "--workers", 2]
    run = start(*options)
    try:
        wait_for((folder / "resume.pt").exists)
        for pid in (run.pid, *workers_of(run.pid)):
            assert not listening(pid)
    finally:
        run.kill()
        run.communicate()


def target(link):
    """What a link in /proc leads to; empty for one that is gone."""
    try:
        return os.readlink(link)
    except OSError:
        return ""


def listening(pid):
    """Sockets on which a process waits for connections: TCP ones, and Unix ones with a name."""
    held = {target(f"/proc/{pid}/fd/{descriptor}") for descriptor in os.listdir(f"/proc/{pid}/fd")}
    found = []
    for kind in ("tcp", "tcp6"):
        with open(f"/proc/{pid}/net/{kind}") as file:
            for line in file.readlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in held:
                    found.append(line)
    with open(f"/proc/{pid}/net/unix") as file:
        for line in file.readlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[6]}]" in held and len(fields) > 7:
                found.append(line)
    return found


def test_a_pipe_that_ends_is_an_error_for_people():
    """Whoever waits for an answer, or asks."""
    mine, theirs = multiprocessing.Pipe()
    channel = processes.PipeChannel(mine, "worker 1 of 2")
    theirs.close()
    for talk in (channel.answer, functools.partial(channel.request, "evaluate")):
        with pytest.raises(UserError, match=r"worker 1 of 2 is gone; .*--resume goes on"):
            talk()


def test_a_message_through_gloo_is_its_length_and_its_bytes(monkeypatch):
    sent = []

    def send(tensor, rank):
        sent.append((tensor, rank))

    def receive(tensor, rank):
        other, to = sent.pop(0)
        assert (other.shape, other.dtype, to) == (tensor.shape, tensor.dtype, rank)
        tensor.copy_(other)

    group = SimpleNamespace(send=send, recv=receive, get_world_size=lambda: 3)
    monkeypatch.setattr(processes, "dist", group)
    channel = processes.GlooChannel(2)
    assert channel.other == "process 2 of 3"
    channel.send(("train", [1, 2]))
    assert [len(tensor) for tensor, _ in sent] == [1, sent[0][0].item()]
    assert channel.receive() == ("train", [1, 2])
    assert not sent


def test_process_0_meets_all_others(monkeypatch):
    start = Mock()
    monkeypatch.setattr(processes, "start_group", start)
    monkeypatch.setattr(processes, "dist", SimpleNamespace(get_world_size=lambda: 3))
    channels = processes.meet()
    assert start.called
    assert {rank: channel.rank for rank, channel in channels.items()} == {1: 1, 2: 2}


def test_who_joins_serves_unless_help_is_all_that_is_wanted(monkeypatch):
    steps = Mock()
    for name in ("quiet_bars", "start_group", "GlooChannel", "serve", "dist"):
        monkeypatch.setattr(processes, name, getattr(steps, name))
    monkeypatch.setattr(signal, "signal", steps.signal)

    monkeypatch.setattr(sys, "argv", ["fedgs.py", "--help"])
    processes.join(None)
    assert not steps.method_calls

    monkeypatch.setattr(sys, "argv", ["fedgs.py"])
    processes.join("open")
    steps.signal.assert_called_once_with(signal.SIGINT, signal.SIG_IGN)
    steps.serve.assert_called_once_with(steps.GlooChannel(0), "open")
    names = [name for name, *_ in steps.method_calls]
    assert names.index("start_group") < names.index("serve")
    assert "dist.destroy_process_group" in names

    steps.serve.side_effect = UserError("process 0 is gone")
    with pytest.raises(SystemExit, match="1"):
        processes.join("open")


def test_a_worker_is_stopped_and_waited_for():
    worker = Mock()
    processes.PipeChannel(None, "worker 1 of 2", worker).close()
    assert [name for name, *_ in worker.method_calls] == ["terminate", "join"]


def test_nobody_ends_a_process_that_is_at_work():
    channel = Script()
    channel.request("train", answers=2)
    channel.close()
    assert processes.END not in channel.told  # it would not listen


def ignored(pid):
    """The signals that a process ignores."""
    with open(f"/proc/{pid}/status") as file:
        [mask] = [line.split()[1] for line in file if line.startswith("SigIgn:")]
    return {s for s in signal.valid_signals() if int(mask, 16) >> (s - 1) & 1}


@on_linux
@pytest.mark.slow
def test_ctrl_c_in_a_terminal_is_one_line(square_root, tmp_path):
    """It reaches every process. A worker leaves it to the server, from its first import on."""
    folder = tmp_path / "run"
    options = ["--data-root", square_root, "--out", folder, "--rounds", 1000, "--workers", 2]
    run = start(*options, start_new_session=True)
    wait_for(lambda: workers_of(run.pid))
    [worker] = workers_of(run.pid)
    early = ignored(worker)
    wait_for((folder / "resume.pt").exists)
    os.killpg(run.pid, signal.SIGINT)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 130
    assert error == f"fedgs.py: interrupted; {processes.GO_ON}\n"
    assert signal.SIGINT in early


def test_a_process_that_serves_does_nothing_else(monkeypatch):
    joined = []
    monkeypatch.setattr(processes, "serves", lambda: True)
    monkeypatch.setattr(processes, "join", joined.append)
    monkeypatch.setattr(fedgs, "run", None)
    fedgs.main(["--rounds", "1"])
    assert joined == [fedgs.open_local_clients]


@pytest.mark.slow
def test_help_ends_under_torchrun():
    run = start("--help", torchrun=2)
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 0
    assert out.count("usage: fedgs.py") == 1


AT_WORK = """
import sys, time
from pathlib import Path
from support import processes

def open_local(config, centres):
    Path(config).touch()
    time.sleep(600)

if __name__ == "__main__":
    [channel] = processes.start_workers(2, open_local).values()
    channel.request("open", sys.argv[1], [], 1)
    time.sleep(600)
"""


@on_linux
@pytest.mark.slow
def test_a_worker_at_work_ends_with_a_server_that_is_killed(tmp_path):
    """It does not look at its pipe before its client's round is over, which may take an hour."""
    (tmp_path / "program.py").write_text(AT_WORK)
    command = [sys.executable, tmp_path / "program.py", tmp_path / "begun"]
    server = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    wait_for((tmp_path / "begun").exists)
    [worker] = workers_of(server.pid)
    server.kill()
    server.wait()
    wait_for(lambda: not os.path.exists(f"/proc/{worker}"), 10)


# ----------------------------------------------------------------------------------- who does what


@pytest.mark.parametrize(
    ("clients", "count", "expected"),
    [
        # 546 and 610 images
        (
            {"C1": 204, "C2": 240, "C3": 365, "C4": 181, "C5": 166},
            2,
            {"C1": 1, "C2": 1, "C3": 0, "C4": 0, "C5": 1},
        ),
        ({"C1": 5, "C2": 5, "C3": 5}, 3, {"C1": 0, "C2": 1, "C3": 2}),
        ({"C1": 5, "C2": 9}, 1, {"C1": 0, "C2": 0}),
    ],
)
def test_clients_are_shared_out_by_size(clients, count, expected):
    owners = processes.share_out(clients, count)
    assert owners == expected
    assert list(owners) == list(clients)


def test_how_many_workers(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(processes.hardware, "available_cores", lambda: 4)
    assert processes.choose_workers("auto", 5, cpu) == 4
    assert processes.choose_workers("auto", 3, cpu) == 3
    assert processes.choose_workers("auto", 5, torch.device("cuda")) == 1
    assert processes.choose_workers("2", 5, torch.device("cuda")) == 2
    assert processes.threads_of_each(3) == 1
    assert processes.threads_of_each(2) == 2
    with pytest.raises(UserError, match="--workers 3: there are 2 clients"):
        processes.choose_workers("3", 2, cpu)


def test_torchruns_number_counts(monkeypatch):
    monkeypatch.setattr(processes, "under_torchrun", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert processes.choose_workers("auto", 5, torch.device("cpu")) == 3
    with pytest.raises(UserError, match="--nproc-per-node 3: there are 2 clients"):
        processes.choose_workers("auto", 2, torch.device("cpu"))


def test_which_processes_of_torchrun_serve(monkeypatch):
    monkeypatch.setattr(processes.dist, "is_torchelastic_launched", lambda: True)
    for count, company in (("1", False), ("2", True)):
        monkeypatch.setenv("WORLD_SIZE", count)
        assert processes.under_torchrun() == company

    for rank, serves in (("0", False), ("1", True)):
        monkeypatch.setenv("RANK", rank)
        assert processes.serves() == serves


def test_a_process_loads_its_own_centres_alone(square_root):
    """The parts' facts together are the whole's, their images are the whole's of these centres."""
    how = {"centres": ("C3", "C4", "C5"), "out_centre": "C5", "size": 32, "tau": 150}
    how["split"] = "fold"
    whole = data.load("polypgen", square_root, **how)
    first = data.load("polypgen", square_root, **how, only=["C3"])
    second = data.load("polypgen", square_root, **how, only=["C4", "C5"])
    assert list(first.train) == ["C3"]
    assert list(second.train) == ["C4"]
    assert first.out_test is None
    assert {**first.facts, **second.facts} == whole.facts
    assert list(whole.facts) == ["C3", "C4", "C5"]
    assert torch.equal(second.train["C4"].images, whole.train["C4"].images)
    assert torch.equal(second.out_test.images, whole.out_test.images)


@pytest.fixture
def tiny(square_root):
    return fedgs.Config(
        data_root=str(square_root),
        image_size=32,
        width=2,
        batch_size=4,
        centres=("C4", "C5", "C6"),
        precision="fp32",
    )


def test_what_a_process_does_and_says_when_it_serves(tiny, monkeypatch):
    """It loads its own centre, takes its share of threads; no image leaves it."""
    threads = []
    prepare = Mock()
    monkeypatch.setattr(fedgs.hardware, "prepare_torch", prepare)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    state = fedgs.open_local_clients(tiny, []).flat.state()
    requests = [("open", tiny, ["C5"], 3), ("test", state), processes.END]
    channel = Script(*requests)
    opened = []

    def open_local(config, centres):
        opened.append(centres)
        return fedgs.open_local_clients(config, centres)

    processes.serve(channel, open_local)
    assert opened == [["C5"]]
    assert threads == [3]
    assert prepare.called

    [(_, facts), (_, tests)] = channel.told
    assert list(facts) == ["C5"]
    assert [test.batch_norm for test in tests] == ["averaged", "local"]
    for test in tests:
        assert (test.centre, test.images, test.evaluation) == ("C5", None, None)
        assert test.scores


def test_the_server_with_its_company(tiny, monkeypatch):
    """Its own centres and the held-out one, its share of threads, facts in the centres' order."""
    threads = []
    whole = fedgs.load_data(tiny, tiny.centres)
    theirs = Script((None, {"C5": whole.facts["C5"]}))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(processes, "start_workers", lambda count, open_local: {1: theirs})
    monkeypatch.setattr(processes.hardware, "available_cores", lambda: 6)

    work_of = {"C4": 9, "C5": 8}
    with processes.spread(fedgs.open_local_clients, tiny, work_of, 2) as clients:
        assert clients.owners == {"C4": 0, "C5": 1}
        assert clients.placement == " each of 2 processes (process 0: C4; process 1: C5)"
        assert clients.kernels is clients.local.kernels
        assert list(clients.federation.facts.items()) == list(whole.facts.items())
        assert clients.federation.fingerprint == whole.fingerprint
        assert list(clients.federation.train) == ["C4"]
        assert threads == [3]
    assert theirs.told == [("open", tiny, ["C5"], 3), processes.END]
    assert threads == [3, 7]  # as before


class Line(processes.Channel):
    """A channel to another thread."""

    def __init__(self, outgoing, incoming):
        super().__init__("the other thread")
        self.outgoing = outgoing
        self.incoming = incoming

    def send_bytes(self, content):
        self.outgoing.put(content)

    def receive_bytes(self):
        return self.incoming.get(timeout=60)


@pytest.mark.parametrize("options", [{}, {"method": "fedbn", "batch_norm": "local"}])
def test_rounds_by_messages_are_those_of_one_process(tiny, monkeypatch, options):
    """Training, validation and tests of clients that another thread serves, bit for bit."""
    small = {"image_size": 16, "batch_size": 8, "local_epochs": 1, "lr": 0.03}
    config = replace(tiny, centres=("C3", "C4", "C5", "C6"), rounds=2, **small, **options)
    one_by_one = threading.Lock()  # initial weights are drawn from torch's global generator

    def open_local(config, centres):
        with one_by_one:
            return fedgs.open_local_clients(config, centres)

    def start_threads(count, open_local):
        there, back = queue.Queue(), queue.Queue()
        serving = (Line(back, there), open_local)
        threading.Thread(target=processes.serve, args=serving, daemon=True).start()
        return {1: Line(there, back)}

    def outcome(clients):
        weights = fedgs.client_weights(config, clients.federation.facts)
        server = fedgs.Server(clients.flat.state(), weights, config)
        rounds = []
        for _, logs, validation in fedgs.federate(server, clients, config):
            rounds.append((logs, str(validation)))
        tests = list(clients.test(server.state))
        tallies = [(test.centre, test.split, test.tally.tolist()) for test in tests]
        return server.state, rounds, [test.scores for test in tests], tallies

    threads = torch.get_num_threads()
    monkeypatch.setattr(processes, "threads_of_each", lambda count: threads)
    monkeypatch.setattr(processes, "start_workers", start_threads)
    with processes.spread(open_local, config, {"C3": 9, "C4": 4, "C5": 8}, 2) as clients:
        assert clients.owners == {"C3": 0, "C4": 1, "C5": 1}
        state, *others = outcome(clients)

    state_alone, *others_alone = outcome(open_local(config, config.centres))
    *vectors, own = state
    *vectors_alone, own_alone = state_alone
    assert all(torch.equal(a, b) for a, b in zip(vectors, vectors_alone, strict=True))
    assert list(own) == list(own_alone) == (["C3", "C4", "C5"] if options else [])
    assert all(torch.equal(own[client], own_alone[client]) for client in own)
    assert others == others_alone


def test_ctrl_c_is_ignored_by_workers_alone(monkeypatch):
    """They inherit it from the process that starts them, which goes on as before."""
    handlers = []
    pipes = SimpleNamespace(close=lambda: None)
    process = SimpleNamespace(start=lambda: handlers.append(signal.getsignal(signal.SIGINT)))
    context = SimpleNamespace(Pipe=lambda: (pipes, pipes), Process=lambda **how: process)
    monkeypatch.setattr(processes.multiprocessing, "get_context", lambda kind: context)

    # Programs in the background begin with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    assert list(processes.start_workers(3, fedgs.open_local_clients)) == [1, 2]
    assert handlers == [signal.SIG_IGN, signal.SIG_IGN]
    assert signal.signal(signal.SIGINT, before) == signal.default_int_handler


def test_all_that_crosses_comes_onto_the_device():
    device = torch.device("meta")
    own = {"C1": torch.ones(1)}
    state = fedgs.State(torch.ones(2), torch.ones(2), torch.ones(1), own)
    update = fedgs.Update("C1", torch.ones(2), torch.ones(2), torch.ones(1), None, own)
    *tensors, moved_own = processes.state_on(device, state)
    moved = processes.update_on(device, update)
    tensors += [moved.vector, moved.buffers, moved.counters, moved_own["C1"], moved.own["C1"]]
    assert len(tensors) == 8
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_an_error_for_people_is_an_answer():
    def damaged(config, centres):
        raise UserError("frame 7 is damaged")

    channel = Script(("open", None, ["C5"], torch.get_num_threads()), processes.END)
    processes.serve(channel, damaged)
    assert channel.told == [("frame 7 is damaged", None)]


def test_the_others_are_told_to_end_while_they_can_be_reached(monkeypatch):
    """And in every case: here the server's own images are damaged."""
    channel = Script()
    told = []

    def damaged(config, centres):
        channel.due = 0
        raise UserError("frame 7 is damaged")

    monkeypatch.setattr(processes, "under_torchrun", lambda: True)
    monkeypatch.setattr(processes, "meet", lambda: {1: channel})
    monkeypatch.setattr(processes, "threads_of_each", lambda count: torch.get_num_threads())
    monkeypatch.setattr(processes.dist, "destroy_process_group", lambda: told.extend(channel.told))
    config = fedgs.Config(centres=("C4", "C5", "C6"))
    with (
        pytest.raises(UserError, match="frame 7"),
        processes.spread(damaged, config, {"C4": 9, "C5": 8}, 2),
    ):
        pass
    assert told[-1] == processes.END


def test_answers_come_in_client_order():
    """Whoever they come from, and in whatever order a process tells of its clients."""
    x = torch.zeros(1)
    state = fedgs.State(x, x, x, {"C5": x})
    local = SimpleNamespace(
        flat=None,
        kernels=None,
        here=["C2"],
        federation=SimpleNamespace(out_centre="C6"),
        train=lambda state, round_: [fedgs.Update("C2", x, x, x, None)],
        evaluate=lambda state: {"C2": 2},
        test=lambda state: [SimpleNamespace(centre="C2"), SimpleNamespace(centre="C6")],
    )
    theirs = Script(
        (None, fedgs.Update("C1", x, x, x, None)),
        (None, fedgs.Update("C3", x, x, x, None)),
        (None, {"C3": 3, "C1": 1}),
        (None, [SimpleNamespace(centre="C3"), SimpleNamespace(centre="C1")]),
    )
    clients = processes.SpreadClients(local, {1: theirs}, {"C1": 1, "C2": 0, "C3": 1})
    clients.on_step = print
    assert [update.client for update in clients.train(state, 7)] == ["C1", "C2", "C3"]
    assert list(clients.evaluate(state).items()) == [("C1", 1), ("C2", 2), ("C3", 3)]
    assert [test.centre for test in clients.test(state)] == ["C1", "C2", "C3", "C6"]
    assert [told[0] for told in theirs.told] == ["train", "evaluate", "test"]
    assert theirs.told[0][2] == 7
    assert theirs.due == 0
    assert local.on_step is print


def test_threads_are_shared_by_the_processes_of_one_machine(monkeypatch):
    monkeypatch.setattr(processes, "under_torchrun", lambda: True)
    monkeypatch.setattr(processes.hardware, "available_cores", lambda: 8)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert processes.threads_of_each(4) == 4
