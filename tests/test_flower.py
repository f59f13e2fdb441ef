"""Clients in hospitals: one process's bits, who is refused and why, and what crosses."""

import copy
import json
import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_weights, rows, without_time

pytest.importorskip("flwr", reason="flwr is not installed, or this Python is older than 3.11")

from flwr.app import Array, ConfigRecord, Context, Error, Message, RecordDict
from flwr.supercore.inflatable import inflatable_object, inflatable_utils
from flwr.supercore.task_identity import TaskIdentity

import data
import fedgs
import metrics
from support import flower
from support.errors import UserError
from tools import flower_apps

CENTRES = ("C4", "C5", "C6")
PATIENT = flower.Policy(pause=0.0)
HASTY = flower.Policy(pause=0.0, patience=0.05)


ANSWERS = {}  # what an honest hospital answers, so that it has to compute only once


class Grid:
    """Flower without its network: hospitals in this process, one node each, and what may go wrong.

    meddle(centre, request, reply) -> the reply that arrives, or None for none. Replies come in any
    order. `crossed` keeps every byte, in either direction.
    """

    def __init__(self, nodes, meddle=None):
        self.nodes = dict(enumerate(nodes, start=1))  # number of a node -> its configuration
        self.names = {number: node["centre"] for number, node in self.nodes.items()}
        self.meddle = meddle
        self.replies = []
        self.requests = []
        self.crossed = b""
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1

    def get_nodes(self):
        return [SimpleNamespace(node_id=n, name=name) for n, name in self.names.items()]

    def push_messages(self, messages):
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message {len(self.requests)}"
            self.requests.append(message)
            number = message.metadata.dst_node_id
            request = Message(self.carry(message.content), metadata=message.metadata)
            reply = self.answer(number, request)
            if self.meddle is not None:
                reply = self.meddle(self.names[number], request, reply)
            if reply is not None:
                self.replies.append(reply)
            ids.append(message.metadata.message_id)
        return ids

    def answer(self, number, request):
        """What the hospital says, at once."""
        context = Context(1, number, self.nodes[number], RecordDict(), {})
        return self.carried(flower_apps.client(request, context))

    def carried(self, reply):
        return Message(self.carry(reply.content), metadata=reply.metadata)

    def pull_messages(self, ids):
        found = [reply for reply in self.replies if reply.metadata.reply_to_message_id in ids]
        self.replies = [reply for reply in self.replies if reply not in found]
        random.Random(len(self.requests)).shuffle(found)
        return found

    def carry(self, content):
        """To bytes and back, as Flower does it."""
        objects = inflatable_object.get_all_nested_objects(content)
        contents = {name: part.deflate() for name, part in objects.items()}
        self.crossed += b"".join(contents.values())
        return inflatable_utils.inflate_object_from_contents(content.object_id, contents)

    def asked(self, centre):
        """What a hospital was asked for, in order."""
        return [
            request.metadata.message_type
            for request in self.requests
            if self.names[request.metadata.dst_node_id] == centre
        ]


class Recorded(Grid):
    """The same, but that hospitals repeat what they answered to the same request before."""

    def answer(self, number, request):
        key = self.names[number], request.metadata.message_type, request.content.object_id
        if key not in ANSWERS:
            ANSWERS[key] = super().answer(number, request).content
        return self.carried(Message(copy.deepcopy(ANSWERS[key]), reply_to=request))


@pytest.fixture(scope="module")
def config(square_root):
    return fedgs.Config(
        data_root=str(square_root),
        image_size=32,
        width=2,
        batch_size=4,
        local_epochs=1,
        lr=1e-3,
        tau=10.0,
        rounds=2,
        centres=CENTRES,
        precision="fp32",
        workers="1",
    )


@pytest.fixture
def nodes(square_root, tmp_path):
    """What the nodes of the hospitals were started with."""
    return [
        {"centre": centre, "data-root": str(square_root), "out": str(tmp_path / centre)}
        for centre in CENTRES
    ]


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The folder of the same run in one process. Not to be changed."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    fedgs.run(replace(config, out=str(folder)))
    return folder


def run(grid, config, policy=PATIENT):
    return fedgs.run(config, "a test", flower.hospitals(grid, policy, fedgs))


def assert_equal_runs(one, other):
    """Weights, rounds and results; times, and what names places of the machine, apart."""
    for name in ("last", "best", "best_small"):
        assert_same_weights(one / f"{name}.pt", other / f"{name}.pt")
    assert without_time(one / "rounds.csv") == without_time(other / "rounds.csv")
    assert results_of(one) == results_of(other)


def results_of(folder):
    results = json.loads((folder / "results.json").read_text())
    for name in ("seconds", "checksum", "checksums"):
        del results[name]
    for name in ("out", "data_root", "workers", "device", "cache", "preset", "label", "resume"):
        del results["config"][name]
    return results


def kept_at(centre, folder):
    """Where a hospital has kept its own results of the first test, run by run."""
    return sorted((folder / centre).glob("*/test-1"))


def state_of(config):
    return fedgs.FlatNetwork(fedgs.build_network(config)).state()


def meet(grid, config, policy=PATIENT):
    """The hospitals, before the first round."""
    return enter(flower.hospitals(grid, policy, fedgs)(config))


def enter(context):
    return context.__enter__()


# ---------------------------------------------------------------------------------- equal results


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"model": "sd-utnet", "method": "fedavg", "rounds": 1, "server_momentum": 0.5}],
    ids=["utnet", "sd-utnet"],
)
def test_hospitals_are_one_process(config, nodes, options, tmp_path):
    """Their answers cross as bytes, and come in any order."""
    config = replace(config, **options)
    fedgs.run(replace(config, out=str(tmp_path / "alone")))
    run(Grid(nodes), replace(config, out=str(tmp_path / "run")))
    assert_equal_runs(tmp_path / "alone", tmp_path / "run")

    # Scores, names and pictures of test images are at the hospitals alone.
    assert (tmp_path / "run" / "scores.csv").read_text().strip() == ""
    assert not (tmp_path / "run" / "predictions.png").exists()
    own = []
    for centre in CENTRES:
        own += rows(kept_at(centre, tmp_path)[0] / "scores.csv")
    of_one = [row for row in rows(tmp_path / "alone" / "scores.csv") if row["checkpoint"] == "best"]
    assert own == [{**row, "checkpoint": "tested"} for row in of_one]
    own = kept_at("C4", tmp_path)[0]
    assert (own / "predictions.png").exists()
    assert_same_weights(own / "tested.pt", tmp_path / "run" / "best.pt")


@pytest.fixture
def quick(config, nodes, plain_pictures, tmp_path):
    """quick(meddle, option=…, …): two rounds in hospitals, without pictures. -> grid, folder"""

    def run_quickly(meddle=None, policy=PATIENT, **changes):
        grid = Recorded(nodes, meddle)
        folder = tmp_path / "run"
        run(grid, replace(config, out=str(folder), **changes), policy)
        return grid, folder

    return run_quickly


def test_a_round_is_one_message_a_hospital(quick, alone):
    """Validation of a state travels with the request to train from it."""
    grid, folder = quick()
    assert grid.asked("C4") == ["query", "train", "train.on", "evaluate", "evaluate.test"]
    assert grid.asked("C6") == ["query", "evaluate.test"]  # the held-out centre
    assert {request.metadata.ttl for request in grid.requests} == {PATIENT.patience}
    assert_equal_runs(alone, folder)


@pytest.mark.slow
def test_a_centres_own_statistics_are_measured_there_and_stay_there(
    quick, config, alone, monkeypatch, tmp_path
):
    """Validation with them is one process's; what is trained does not know of them."""
    drawn = []
    draw = fedgs.draw_tests

    def watch(clients, tests, heading):
        drawn.extend(test.batch_norm for test in tests)
        return draw(clients, tests, heading)

    monkeypatch.setattr(fedgs, "draw_tests", watch)
    local = replace(config, batch_norm="local", out=str(tmp_path / "one"))
    fedgs.run(local)
    _, folder = quick(batch_norm="local")
    assert_equal_runs(tmp_path / "one", folder)
    assert_same_weights(folder / "last.pt", alone / "last.pt")
    assert rows(folder / "rounds.csv")[0]["dice"] != rows(alone / "rounds.csv")[0]["dice"]

    # The hospital's own pictures are of these statistics; the network is everybody's.
    assert set(drawn) == {"local"}
    [own] = kept_at("C6", tmp_path)
    assert {row["batch_norm"] for row in rows(own / "scores.csv")} == {"averaged", "local"}
    assert_same_weights(own / "tested.pt", folder / "best.pt")


def test_without_a_held_out_centre_all_hospitals_train(quick, config, tmp_path):
    changes = {"out_centre": "", "rounds": 1}
    fedgs.run(replace(config, out=str(tmp_path / "one"), **changes))
    grid, folder = quick(**changes)
    assert grid.asked("C6") == ["query", "train", "evaluate", "evaluate.test"]
    assert_equal_runs(tmp_path / "one", folder)
    assert results_of(folder)["checkpoints"]["best"]["averaged"]["out_test"]["dice"]["n"] == 0


def test_two_runs_of_one_name_have_folders_of_their_own_at_a_hospital(config, nodes, tmp_path):
    """As one that goes on has not."""
    for changes in ({}, {"lr": 0.5}, {"rounds": 3}):
        clients = meet(Grid(nodes), replace(config, **changes))
        clients.test(state_of(config))
    assert len(kept_at("C4", tmp_path)) == 2


def test_a_hospital_that_failed_is_asked_again_and_the_bits_stay(quick, alone):
    """An error of C4's in round 1; silence of C5's in round 2."""
    failed = set()

    def meddle(centre, request, reply):
        what = centre, request.metadata.message_type
        if what in failed or what not in {("C4", "train"), ("C5", "train.on")}:
            return reply
        failed.add(what)
        return None if centre == "C5" else Message(Error(7), reply_to=request)

    grid, folder = quick(meddle, replace(PATIENT, patience=2.0))
    assert grid.asked("C4").count("train") == 2
    assert grid.asked("C5").count("train.on") == 2
    assert_equal_runs(alone, folder)


@pytest.mark.parametrize("when", ["train", "train.on", "evaluate", "evaluate.test"])
def test_a_superlink_that_is_gone_and_a_resumed_run(quick, alone, when):
    """The connection breaks in a round, or after it. The same command with --resume goes on."""

    def broken(centre, request, reply):
        if (centre, request.metadata.message_type) == ("C5", when):
            raise ConnectionError
        return reply

    with pytest.raises(ConnectionError):
        quick(broken)
    _, folder = quick(resume=True)
    assert_equal_runs(alone, folder)


# ------------------------------------------------------------------------------- what is refused


def with_array(part, name, change):
    """A fault: one array of an answer is another."""

    def meddle(content):
        array = change(content[part][name].numpy())
        content[part][name] = array if isinstance(array, Array) else Array(array)

    return meddle


def with_number(part, name, value):
    """A fault: one number of an answer is another."""

    def meddle(content):
        content[part][name] = value

    return meddle


def without(part):
    def meddle(content):
        del content[part]

    return meddle


def spoilt(value):
    """One of a thousand numbers is no number."""

    def change(array):
        array = array.copy()
        array[len(array) // 2] = value
        return array

    return change


def shorter(array):
    return array[:-1].copy()


def as_double(array):
    return array.astype("float64")


def no_array(array):
    return Array("float32", (3,), "numpy.ndarray", b"no array")


def more_images(array):
    array = array.copy()
    array[3, 1] += 1  # the row of "dice"
    return array


FAULTS = {
    "nan": (with_array("update", "vector", spoilt(float("nan"))), "update that is not finite"),
    "inf": (with_array("update", "vector", spoilt(float("-inf"))), "update that is not finite"),
    "nan buffers": (with_array("update", "buffers", spoilt(float("nan"))), "buffers that are not"),
    "nan loss": (with_number("log", "loss", float("nan")), "loss or update that is not finite"),
    "shape": (with_array("update", "vector", shorter), "vector is float32 [73537], not float32"),
    "counters": (with_array("update", "counters", shorter), "wrong shape: counters"),
    "type": (with_array("update", "buffers", as_double), "wrong shape: buffers is float64"),
    "bytes": (with_array("update", "vector", no_array), "its update cannot be read (vector)"),
    "parts": (with_array("update", "more", shorter), "other parts than vector, buffers, counters"),
    "images": (with_number("log", "images", 7), "trained on other than the 8 images, 2 steps"),
    "steps": (with_number("log", "steps", 3), "trained on other than the 8 images, 2 steps"),
    "numbers": (with_number("log", "favourite", 3), "lacks something"),
    "no update": (without("update"), "lacks something"),
    "no log": (without("log"), "lacks something"),
    "no about": (without("about"), "another centre"),
    "centre": (with_number("about", "centre", "C4"), "answered for another centre"),
    "version": (with_number("about", "version", "0.1"), "has changed since the run began: version"),
    "data": (with_number("about", "fingerprint", "00"), "has changed since the run began"),
    "no tally": (without("tally"), "lacks something"),
    "nan tally": (with_array("tally", "tally", spoilt(float("nan"))), "tally that is not finite"),
    "short tally": (with_array("tally", "tally", shorter), "its tally has the wrong shape"),
    "counts": (with_array("tally", "tally", more_images), "other images than the 1 that it"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_answer_that_cannot_be_used_is_refused_by_name(config, nodes, fault):
    """Twice, since a hospital is asked again; then the round ends, and says how to go on."""
    spoil, words = FAULTS[fault]
    if fault == "parts":
        spoil = add_a_part

    def meddle(centre, request, reply):
        if centre == "C5" and request.metadata.message_type == "train.on":
            spoil(reply.content)
        return reply

    grid = Recorded(nodes, meddle)
    clients = meet(grid, config)
    clients.round = 1
    with pytest.raises(UserError) as error:
        clients.evaluate(state_of(config))
    assert str(error.value).startswith("round 2: hospital C5 ")
    assert words in str(error.value)
    assert "--resume" in str(error.value)
    assert grid.asked("C5").count("train.on") == 2
    assert grid.asked("C4").count("train.on") == 1


def add_a_part(content):
    content["update"]["more"] = content["update"]["vector"]


def test_both_tallies_of_a_test_have_to_count_its_images(config, nodes):
    """That of the centre's own statistics, too."""

    def meddle(centre, request, reply):
        if (centre, request.metadata.message_type) == ("C6", "evaluate.test"):
            with_array("tally", "local", more_images)(reply.content)
        return reply

    clients = meet(Recorded(nodes, meddle), config)
    with pytest.raises(UserError, match="hospital C6 counted other images than the 10 that it"):
        clients.test(state_of(config))


def silence(request, reply):
    return None


def flowers_error(request, reply):
    return Message(Error(2, "cannot read /data/C5/Smith.jpg"), reply_to=request)


def of_another_node(request, reply):
    reply.metadata.__dict__["_src_node_id"] = 1
    return reply


def a_problem(request, reply):
    content = RecordDict({"problem": ConfigRecord({"sentence": "had \n no electricity"})})
    return Message(content, reply_to=request)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (silence, "did not answer in 0.05 s"),
        (flowers_error, "failed (Flower's error 2); "),
        (of_another_node, "was answered for by another node"),
        (a_problem, "had no electricity"),
    ],
)
def test_a_hospital_that_fails_is_named(config, nodes, fault, words):
    def meddle(centre, request, reply):
        return (
            reply
            if (centre, request.metadata.message_type) != ("C5", "train")
            else fault(request, reply)
        )

    clients = meet(Recorded(nodes, meddle), config, HASTY if fault is silence else PATIENT)
    with pytest.raises(UserError) as error:
        list(clients.train(state_of(config), 1))
    assert f"round 1: hospital C5 {words}" in str(error.value)
    assert "Smith" not in str(error.value)


def test_an_answer_that_comes_late_is_dropped(config, nodes):
    """And so is one that comes twice."""
    late = []

    def meddle(centre, request, reply):
        if centre == "C5" and request.metadata.message_type == "train" and not late:
            late.append(reply)
            return None
        return reply

    grid = Recorded(nodes, meddle)
    pull = grid.pull_messages

    def pull_late(ids):
        found = pull(ids)
        return [*(late if len(grid.asked("C5")) == 3 else []), *found, *found]

    grid.pull_messages = pull_late
    clients = meet(grid, config, replace(PATIENT, patience=0.5))
    late[:] = []
    updates = list(clients.train(state_of(config), 1))
    assert [update.client for update in updates] == ["C4", "C5"]
    assert grid.asked("C5").count("train") == 2


# ------------------------------------------------------------------------------ who they are


def saying(name, value):
    """Meddles with what C5 says of itself."""

    def meddle(centre, request, reply):
        if centre == "C5":
            reply.content["about"][name] = value
        return reply

    return meddle


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", "0.1.0"),
        ("torch", "1.0"),
        ("kernels", "torch"),
        ("precision", "bf16"),
        ("network", "0123"),
        ("source", "PolypGen stand-in"),
    ],
)
def test_hospitals_that_compute_otherwise_are_refused(config, nodes, name, value):
    with pytest.raises(UserError, match=f"hospital C5 has {name} {value}, not .*compute alike"):
        meet(Recorded(nodes, saying(name, value)), replace(config, kernels="cpp"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train", -1),
        ("validation", 1.0),
        ("fingerprint", 5),
        ("filled", 1),
        ("masks", "x" * 501),
        ("source", "PolypGen\n\x1b[2J"),
    ],
)
def test_a_hospital_that_says_of_itself_what_cannot_be_is_refused(config, nodes, name, value):
    with pytest.raises(UserError, match=f"hospital C5 announced {name} that cannot be"):
        meet(Recorded(nodes, saying(name, value)), config)


def test_a_hospital_that_leaves_out_something_of_itself_is_refused(config, nodes):
    def meddle(centre, request, reply):
        if centre == "C5":
            del reply.content["about"]["torch"]
        return reply

    with pytest.raises(UserError, match="hospital C5 sent an answer that lacks something"):
        meet(Recorded(nodes, meddle), config)


def test_a_hospital_says_truly_with_what_it_computes(config, nodes):
    clients = meet(Recorded(nodes), replace(config, kernels="torch", width=3))
    said = clients.about["C5"]
    assert said["version"] == fedgs.__version__
    assert said["torch"] == torch.__version__.partition("+")[0]
    assert said["kernels"] == "torch"
    assert said["precision"] == "fp32"
    assert said["threads"] == torch.get_num_threads()
    network = fedgs.build_network(replace(config, width=2))
    assert said["network"] != flower.layout(network)


def test_a_node_is_whom_its_key_says(config, nodes):
    """Its own configuration names another centre: a swapped key, or a mistaken one."""
    grid = Grid(nodes)
    grid.names = {1: "C5", 2: "C4", 3: "C6"}
    with pytest.raises(UserError, match="hospital C4 holds another centre than the one"):
        meet(grid, config)


def test_two_nodes_under_one_name_are_refused(config, nodes):
    grid = Recorded([*nodes, dict(nodes[1])])
    with pytest.raises(UserError, match="two nodes are registered as C5"):
        meet(grid, config)


def test_a_node_that_nobody_registered_is_not_asked(config, nodes):
    grid = Recorded([nodes[0], nodes[2], {**nodes[1], "centre": ""}])
    with pytest.raises(UserError, match="hospital C5 is not connected; all are needed"):
        meet(grid, config, HASTY)
    assert grid.asked("") == []


def test_a_hospital_that_connects_late_is_waited_for(config, nodes):
    grid = Recorded(nodes)
    everyone = grid.get_nodes()
    looks = []

    def some():
        looks.append(len(looks))
        return everyone[:2] if len(looks) < 4 else everyone

    grid.get_nodes = some
    assert list(meet(grid, config).about) == list(CENTRES)
    assert len(grid.requests) == 3


# ------------------------------------------------------------------------------- without somebody


def absent(centre, *of):
    """A fault: a hospital's node answers nothing to these requests."""

    def meddle(who, request, reply):
        gone = who == centre and request.metadata.message_type in of
        return Message(Error(5), reply_to=request) if gone else reply

    return meddle


def test_a_round_goes_on_without_a_hospital_where_that_is_allowed(quick, config, nodes, capsys):
    """Its weight is shared by the others, rounds.csv says so, and best stays where it was."""
    allowed = replace(PATIENT, allow_missing=True, quorum=1)
    _, folder = quick(absent("C5", "train.on"), allowed)
    first, second = rows(folder / "rounds.csv")
    assert "round 2 goes on without C5" in capsys.readouterr().out

    # C5 neither validated round 1 nor trained in round 2.
    assert (first["missing"], first["validated"]) == ("", "1 of 2")
    assert (second["missing"], second["validated"]) == ("C5", "")
    assert second["loss_C5"] == "nan"
    assert first["loss_C5"] != "nan"
    saved = torch.load(folder / "best.pt", weights_only=True)._metadata["fedgs"]
    assert saved["round"] == 2

    # Round 2 is C4's alone: the state moves by its whole update. FedAvg, since that weighs them by
    # images, of which they have different numbers.
    config = replace(config, method="fedavg")
    clients = meet(Recorded(nodes, absent("C5", "train")), config, allowed)
    state = state_of(config)
    [update] = clients.train(state, 1)
    weights = fedgs.client_weights(config, clients.federation.facts)
    server = fedgs.Server(state, weights, config)
    server.apply([update])
    assert torch.equal(server.state.parameters, state.parameters - update.vector)
    assert torch.equal(server.state.buffers, update.buffers)


def test_where_all_report_the_weights_stay_as_they_are(config, nodes):
    updates = list(meet(Recorded(nodes), config).train(state_of(config), 1))
    assert [update.share for update in updates] == [1.0, 1.0]


def test_best_does_not_move_in_a_round_that_not_all_validated(quick):
    """The second round is only validated by C4."""
    allowed = replace(PATIENT, allow_missing=True, quorum=1)
    _, folder = quick(absent("C5", "evaluate"), allowed)
    assert rows(folder / "rounds.csv")[1]["validated"] == "1 of 2"
    saved = torch.load(folder / "best.pt", weights_only=True)._metadata["fedgs"]
    assert saved["round"] == 1


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({}, "or with --allow-missing"),
        ({"allow_missing": True}, "1 reported, and --quorum is 2"),  # more than half of two
        ({"allow_missing": True, "quorum": 2}, "1 reported, and --quorum is 2"),
    ],
)
def test_a_run_stops_below_its_quorum_and_can_go_on(quick, alone, policy, words):
    with pytest.raises(UserError, match=words):
        quick(absent("C5", "train.on"), replace(PATIENT, **policy))
    _, folder = quick(resume=True)
    assert_equal_runs(alone, folder)


def test_more_than_half_of_those_who_train_are_a_quorum(config, nodes):
    """Two of three: the held-out centre does not count."""
    nodes = [{**nodes[0], "centre": "C1"}, *nodes]
    config = replace(config, centres=("C1", *CENTRES))
    grid = Recorded(nodes, absent("C5", "train"))
    clients = meet(grid, config, replace(PATIENT, allow_missing=True))
    updates = clients.train(state_of(config), 1)
    assert [update.client for update in updates] == ["C1", "C4"]


def test_the_final_test_needs_everybody(quick):
    with pytest.raises(UserError, match=r"hospital C6 failed .*all are needed"):
        quick(absent("C6", "evaluate.test"), replace(PATIENT, allow_missing=True, quorum=1))


# -------------------------------------------------------------------------- what stays at home


def test_an_answer_holds_sums_and_updates_and_nothing_else(quick, config):
    """Every part by name, every array by its shape: none has a place for an image's number."""
    parts = {}

    def look(centre, request, reply):
        found = parts.setdefault(request.metadata.message_type, {})
        for name, record in reply.content.items():
            found[name] = {key: getattr(value, "shape", None) for key, value in record.items()}
        return reply

    quick(look)
    about = dict.fromkeys(flower.IDENTITY)
    state = state_of(config)
    update = {
        "vector": tuple(state.parameters.shape),
        "buffers": tuple(state.buffers.shape),
        "counters": tuple(state.counters.shape),
    }
    log = dict.fromkeys(("images", "steps", "loss", "eta", "scaled"))
    sums = (len(metrics.MEASURES), 2)
    tests = {"averaged": sums, "local": sums}
    assert parts["query"] == {"about": about}
    assert parts["train"] == {"about": about, "update": update, "log": log}
    assert parts["train.on"] == {**parts["train"], "tally": {"tally": sums}}
    assert parts["evaluate"] == {"about": about, "tally": {"tally": sums}}
    assert parts["evaluate.test"] == {"about": about, "tally": tests}


def test_nothing_of_an_image_crosses(quick, square_root):
    grid, _ = quick()
    assert len(grid.crossed) > 1e6
    for secret in (str(square_root), square_root.name, "00.jpg", "_mask", "images_C4"):
        assert secret.encode() not in grid.crossed


def test_a_hospital_loads_its_own_centre_from_its_own_folder(config, nodes, monkeypatch):
    """Whatever the coordinator says of folders, devices or files stays at the coordinator."""
    opened = []
    open_local = fedgs.open_local_clients

    def watch(config, centres):
        opened.append((config, centres))
        return open_local(config, centres)

    monkeypatch.setattr(fedgs, "open_local_clients", watch)
    theirs = {"data_root": "/server", "cache": "/server", "out": "/server", "label": "../x"}
    grid = Grid([{**node, "device": "cpu"} for node in nodes])
    enter(flower.hospitals(grid, PATIENT, fedgs)(replace(config, **theirs, device="auto")))
    assert [centres for _, centres in opened] == [["C4"], ["C5"], ["C6"]]
    for own, _ in opened:
        assert (own.data_root, own.cache, own.out) == (nodes[0]["data-root"], "", "")
        assert (own.device, own.label, own.workers) == ("cpu", "", "1")
    assert b"/server" not in grid.crossed


def test_a_hospital_takes_as_many_threads_as_all_others(config, nodes, monkeypatch):
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    meet(Grid(nodes), config, replace(PATIENT, threads=3))
    assert taken == [3, 3, 3]
    meet(Grid(nodes), config)
    assert taken == [3, 3, 3]  # each its own


@pytest.mark.parametrize(
    "setting",
    [{"data_root": "/etc"}, {"out": "/etc"}, {"device": "cpu"}, {"method": "mine"}, {"extra": 1}],
)
def test_a_hospital_takes_no_setting_that_is_not_the_coordinators(config, nodes, setting):
    text = json.dumps({**json.loads(flower.settings(config)), **setting})
    with pytest.raises(flower.Refusal, match="does not take one of the server's settings"):
        flower.own_config(text, nodes[0], fedgs)


def test_a_damaged_file_is_told_of_at_the_hospital_alone(config, nodes, square_root, tmp_path):
    """No path, file name or reason leaves it; its own log has them."""
    root = tmp_path / "frames"
    shutil.copytree(square_root / "data_C5", root / "data_C5")
    damaged = root / "data_C5" / "images_C5" / "03.jpg"
    damaged.write_bytes(damaged.read_bytes()[:200])
    nodes[1]["data-root"] = str(root)

    grid = Grid(nodes)
    with pytest.raises(UserError) as error:
        meet(grid, config)
    assert f"hospital C5 {flower.NEUTRAL}" in str(error.value)
    for secret in ("03.jpg", str(tmp_path), "frames", "images_C5", "runcated", "Error"):
        assert secret not in str(error.value)
        assert secret.encode() not in grid.crossed
    assert f"cannot read {damaged}" in (tmp_path / "C5" / "hospital.log").read_text()


def test_a_state_of_another_network_is_refused_by_the_hospital(config, nodes):
    grid = Grid(nodes)
    clients = meet(grid, config)
    other = state_of(replace(config, width=3))
    with pytest.raises(UserError, match="hospital C4 the server's state has the wrong shape"):
        list(clients.train(other, 1))


# ------------------------------------------------------------------------------------ the options


def test_options_of_a_run_between_hospitals():
    text = "--rounds 7 --method fedavg --allow-missing --patience 60 --label 'two words'"
    config, policy = flower_apps.configure(text)
    assert (config.rounds, config.method, config.label) == (7, "fedavg", "two words")
    assert (config.image_size, config.width) == (512, 32)  # the paper's, where nothing is said
    assert policy == flower.Policy(allow_missing=True, patience=60.0)


OWN = "--dataset cohort --centres Oslo Berlin --images slices --preset quick"


def test_options_of_a_run_on_the_hospitals_own_images():
    """No manifest is here: what one would tell is said."""
    config, _ = flower_apps.configure(OWN)
    assert (config.dataset, config.data_root) == ("cohort", "")
    assert (config.clients, config.out_centre) == (["Oslo", "Berlin"], "")
    assert (config.images, config.tau, config.log_base) == ("slices", 1000.0, 1000.0)
    assert config.width == fedgs.PRESETS["quick"]["width"]
    fedgs.settle(config, elsewhere=True)

    for missing in ("--centres Oslo Berlin", "--images slices"):
        with pytest.raises(UserError, match="name the centres with --centres, and say with --im"):
            flower_apps.configure(OWN.replace(missing, ""))


def test_a_manifest_has_the_name_that_everybody_agreed_on(square_root, tmp_path):
    """Otherwise the name of a hospital's folder would cross."""
    image = square_root / "data_C4" / "images_C4" / "00.jpg"
    mask = square_root / "data_C4" / "masks_C4" / "00_mask.jpg"
    for name in ("cohort", "Smith"):
        (tmp_path / f"{name}.csv").write_text(f"centre,image,mask\nOslo,{image},{mask}\n")
    config, _ = flower_apps.configure(OWN)
    settings = flower.settings(config)
    own = flower.own_config(settings, {"data-root": str(tmp_path / "cohort.csv")}, fedgs)
    assert own.dataset == "cohort"
    with pytest.raises(flower.Refusal, match="has a manifest of another name") as error:
        flower.own_config(settings, {"data-root": str(tmp_path / "Smith.csv")}, fedgs)
    assert "Smith" not in str(error.value)


def test_a_method_whose_clients_keep_something_is_refused(config, nodes):
    grid = Grid(nodes)
    with pytest.raises(UserError, match="--method fedbn: what its clients keep"):
        meet(grid, replace(config, method="fedbn"))
    assert grid.requests == []


@pytest.mark.parametrize(
    "text", ["--patience 0", "--attempts 0", "--quorum -1", "--patience inf", "--threads -2"]
)
def test_a_policy_that_makes_no_sense_is_refused(text):
    with pytest.raises(UserError, match=text.split()[0]):
        flower_apps.configure(text)


def test_what_is_said_of_single_files_stays_in_the_hospital():
    facts = data.Facts(4, 1, 1, 0, 0, "ab", remarks="1 images are turned, as patient-7.jpg")
    clients = SimpleNamespace(
        federation=SimpleNamespace(source="here", rule="", flags="", facts={"C4": facts}),
        kernels=SimpleNamespace(name="torch"),
        flat=SimpleNamespace(network=torch.nn.Linear(1, 1)),
    )
    about = flower.describe(clients, fedgs.Config(), "C4", "1")
    flower.check_about(about)
    assert "patient" not in str(about)
