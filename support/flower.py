"""Clients in real hospitals: the requests and answers of a run as messages of Flower.

    coordinator                                    hospital C3
    HospitalClients.ask  -- request, state -->     work: loads its own images, trains, validates
                         <-- update, tally --      and answers; its scores and log stay there

The round loop does not know that its clients are far away. Flower carries messages and knows who
sent them: a hospital is the name under which its node's key was registered. What the messages hold,
and what is refused of it, is written here; tools/flower_apps.py hands this to Flower.

A message is a process of its own at the hospital, so that a round is one message: the validation of
a state travels with the request to train from it. At the end of round 3 the hospitals are asked to
validate the new state and to train round 4 from it; their updates wait here until the loop asks for
round 4.

In order: the policy, what crosses, the coordinator's side (asking, then reading what was answered),
and the hospital's side.
"""

import contextlib
import hashlib
import json
import math
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

import data
import metrics
from support import checkpoints, hardware, manifest, options, processes, runs
from support.errors import UserError
from support.options import option

MESSAGES = {  # what Flower calls a request -> what a hospital then does, in this order
    "query": [],
    "train": ["train"],
    "train.on": ["validate", "train"],
    "evaluate": ["validate"],
    "evaluate.test": ["test"],
}
STATE = ("parameters", "buffers", "counters")  # what crosses of the server's state
NO_FACTS = data.Facts(0, 0, 0, 0, 0, "")  # of which types a centre's facts are
IDENTITY = {  # what every answer says of its sender, see `describe`
    *("centre", "version", "torch", "kernels", "precision", "network", "threads"),
    *("source", "rule", "flags", *data.Facts._fields),
}
LONGEST = 500  # characters of a text from a hospital, which may end up in tables here
NEUTRAL = "could not do its part: its own log says why"  # no path, no name, no number


class Refusal(UserError):
    """A sentence that may cross: nothing in it comes from a hospital's data or disk."""


# -------------------------------------------------------------------------------------- the policy


@dataclass(frozen=True)
class Policy:
    """How long the coordinator waits, for whom, and what it does without."""

    patience: float = option(3600.0, "seconds in which a hospital has to answer a request")
    attempts: int = option(2, "how often a hospital is asked, the first time included")
    allow_missing: bool = option(False, "go on with a round in which not all hospitals report")
    quorum: int = option(0, "how many have to report even then; default: more than half")
    threads: int = option(0, "threads of each hospital's process; default: its own choice")
    pause: float = 1.0  # seconds between looks for answers


def check_policy(policy: Policy) -> None:
    """Raise UserError, naming the option, for values that no run can use."""
    for name, least in {"patience": 0.001, "attempts": 1, "quorum": 0, "threads": 0}.items():
        value = getattr(policy, name)
        if not least <= value < math.inf:
            raise UserError(f"{options.spelling(name)} {value}: must be at least {least}")


# ------------------------------------------------------------------------------------ what crosses


def pack(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors, float32, float64 or int64, which arrive bit for bit."""
    arrays = {}
    for name, tensor in tensors.items():
        # Flower's arrays are NumPy's, which are on the CPU and have no bfloat16.
        arrays[name] = FlowerArray(tensor.cpu().numpy())
    return ArrayRecord(arrays)


def tensors_of(state: Any) -> dict[str, Tensor]:
    """{name: tensor} of a state, as far as it crosses."""
    return {name: getattr(state, name) for name in STATE}


def unpack(record: ArrayRecord, expected: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The tensors of a record, on the devices of those that are expected.

    Raises Refusal where one is missing or more than that, and for another type or shape.
    """
    if set(record) != set(expected):
        raise Refusal(f"{what} has other parts than {', '.join(expected)}")

    tensors = {}
    for name, like in expected.items():
        # Bytes that are no array can raise anything. They are never read as code: Flower has NumPy
        # read them without pickles.
        try:
            array = record[name].numpy()
        except Exception as error:
            raise Refusal(f"{what} cannot be read ({name})") from error

        # NumPy would stretch a shape, and convert a type, without a word.
        wanted = like.cpu().numpy()
        if array.shape != wanted.shape or array.dtype != wanted.dtype:
            has = f"{array.dtype} {list(array.shape)}"
            raise Refusal(
                f"{what} has the wrong shape: {name} is {has}, not "
                f"{wanted.dtype} {list(wanted.shape)}"
            )
        tensors[name] = torch.from_numpy(array).to(like.device)
    return tensors


def pack_log(log: Any) -> MetricRecord:
    """A client's round in numbers, as in fedgs.ClientLog."""
    numbers = {
        "images": log.images,
        "steps": log.steps,
        "loss": log.loss,
        "eta": log.eta,
        "scaled": log.scaled,
    }
    for name, value in log.terms.items():
        numbers[f"term {name}"] = value
    return MetricRecord(numbers)


def layout(network: torch.nn.Module) -> str:
    """A hash of a network's names and shapes: of what an update is an update of."""
    shapes = []
    for name, tensor in network.state_dict().items():
        shapes.append([name, list(tensor.shape)])
    return hashlib.blake2b(json.dumps(shapes).encode(), digest_size=8).hexdigest()


def decided(config: Any) -> set[str]:
    """Names of the options that the coordinator decides for everybody."""
    # What may change when a run goes on says where and how long it computes: that is each place's
    # own affair. Kernels are not, since they decide the last bits.
    of_each_place = options.flagged(config, "free") | options.flagged(config, "path")
    everything = {f.name for f in fields(config)}
    return everything - of_each_place | {"kernels"}


def settings(config: Any) -> str:
    """The coordinator's decisions as JSON: no path, and nothing of its machine."""
    values = {}
    for name in sorted(decided(config)):
        values[name] = getattr(config, name)
    return json.dumps(values)


def describe(clients: Any, config: Any, centre: str, version: str) -> dict[str, Any]:
    """Who answers: with which programs, and of which data. Every answer brings it."""
    federation = clients.federation
    return {
        "centre": centre,
        "version": version,
        "torch": release_of_torch(),
        "kernels": clients.kernels.name,
        "precision": config.precision,
        "network": layout(clients.flat.network),
        "threads": torch.get_num_threads(),
        "source": federation.source,
        "rule": federation.rule,
        "flags": federation.flags,
        # What is said of single files stays where they are.
        **federation.facts[centre]._replace(remarks="")._asdict(),
    }


def release_of_torch() -> str:
    """Torch's version, without the name of the build that follows a plus."""
    return torch.__version__.partition("+")[0]


# --------------------------------------------------------------------- the coordinator's side: asks


@dataclass
class Asked:
    """A hospital whose answer has not come yet."""

    left: int  # how often it may still be asked
    until: float  # when patience ends
    message: str = ""  # id of the message; empty while its node is not connected
    node: int = 0


class HospitalClients:
    """Clients in hospitals, as if they were all here.

    flat: a network in this process; about: {centre: what it said of itself}, for every centre of
    the configuration; method: the module fedgs.
    """

    def __init__(self, grid: Grid, config: Any, policy: Policy, flat: Any, method: Any):
        self.grid = grid
        self.config = config
        self.policy = policy
        self.flat = flat
        self.method = method
        self.kernels, _ = method.choose_kernels(config.kernels, flat.parameters.device)

        # No client computes in this process: there are no steps to show.
        self.here = []
        self.on_step = None

        self.about = {}
        self.round = 0  # that was asked for last
        self.ahead = None  # the state from which the next round was trained, its updates
        self.tests = 0
        self.federation = self._meet()

    @property
    def placement(self) -> str:
        """Which client is where, for the header."""
        return f" (coordinator; hospitals {', '.join(self.about)}, each in its own place)"

    def _meet(self) -> data.Federation:
        """Ask who the hospitals are. -> the federation with their facts

        Raises UserError naming those that differ from this process or from each other.
        """
        # The held-out centre, too: what it cannot do should not be found out at the end.
        config = self.config
        answers = self.ask("query", config.centres, None, 0, all_of_them=True)
        about = {centre: found["about"] for centre, found in answers.items()}
        self._refuse_different(about)
        self.about = about

        # What is said of the data beside the numbers was equal at all hospitals.
        first = next(iter(about.values()))
        federation = data.Federation(
            source=first["source"],
            place=f"in {len(about)} hospitals",
            rule=first["rule"],
            flags=first["flags"],
            size=config.image_size,
            out_centre=config.out_centre,
        )
        for centre, said in about.items():
            facts = {name: said[name] for name in data.Facts._fields}
            federation.facts[centre] = data.Facts(**facts)
        return federation

    def _refuse_different(self, about: Mapping[str, Mapping]) -> None:
        """Raise UserError naming the hospitals that compute otherwise, and in what."""
        # Kernels and data are compared with the first hospital's: the server may have no GPU, and
        # has no images.
        first = next(iter(about.values()))
        expected = {
            "version": self.method.__version__,
            "torch": release_of_torch(),
            "precision": self.config.precision,
            "network": layout(self.flat.network),
            "kernels": first["kernels"],
            "source": first["source"],
            "rule": first["rule"],
        }
        different = []
        for centre, said in about.items():
            for name, value in expected.items():
                if said[name] != value:
                    different.append(f"hospital {centre} has {name} {said[name]}, not {value}")
        if different:
            raise UserError(f"{'; '.join(different)}: all hospitals have to compute alike")

    # --------------------------------------------------------------------- what the loop asks for

    def train(self, state: Any, round_: int) -> Iterator[Any]:
        """Every client's update, in client order."""
        self.round = round_

        # Mostly they came with the validation of this state. A run's first round was not asked for.
        if self.ahead is None or self.ahead[0] is not state:
            answers = self.ask("train", self.config.clients, state, round_)
            self._keep_ahead(state, answers)
        _, updates = self.ahead
        self.ahead = None

        # The weights of those that report have to sum to 1, as those of all clients do. Where all
        # report this is 1, exactly.
        share = 1.0
        if len(updates) < len(self.config.clients):
            weights = self.method.client_weights(self.config, self.federation.facts)
            share = sum(weights[update.client] for update in updates)

        # One after another, so that the memory of those that were added up is free.
        while updates:
            yield replace(updates.pop(0), share=share)

    def evaluate(self, state: Any) -> dict[str, Tensor]:
        """{client: sums and counts over its validation images}, in client order."""
        # After the last round there is none to train ahead.
        if self.round == self.config.rounds:
            answers = self.ask("evaluate", self.config.clients, state, self.round)
        else:
            answers = self.ask("train.on", self.config.clients, state, self.round + 1)
            self._keep_ahead(state, answers)
        return {centre: found["validation"]["tally"] for centre, found in answers.items()}

    def _keep_ahead(self, state: Any, answers: Mapping[str, Mapping]) -> None:
        """Keep the updates of a round until the loop asks for it."""
        self.ahead = state, [found["update"] for found in answers.values()]

    def test(self, state: Any) -> list[Any]:
        """Every centre's tests, in the order of the clients, then the held-out centre's.

        Sums and counts alone: scores, names and pictures are at the hospitals.
        """
        # Each hospital has a folder for each test.
        self.tests += 1
        held_out = [centre for centre in self.config.centres if centre not in self.config.clients]
        centres = [*self.config.clients, *held_out]
        answers = self.ask("evaluate.test", centres, state, self.tests, all_of_them=True)

        tests = []
        for centre, found in answers.items():
            # With the statistics that the server has averaged, and with the centre's own.
            for batch_norm, tally in found["test"].items():
                test = self.method.CentreTest(
                    centre=centre,
                    split="out_test" if centre in held_out else "in_test",
                    batch_norm=batch_norm,
                    tally=tally,
                    scores=[],
                    images=None,
                    evaluation=None,
                )
                tests.append(test)
        return tests

    # ------------------------------------------------------------------------ asking, with policy

    def ask(
        self, what: str, centres: Sequence[str], state: Any, number: int, all_of_them: bool = False
    ) -> dict[str, dict]:
        """Ask these hospitals at once, and read what they answer. -> {centre: answer}, in order

        what: a key of MESSAGES; number: the round, or which test. A hospital that fails is asked
        again. Raises UserError, naming everyone that failed, where the policy does not go on.
        """
        # Packed once, however many hospitals there are. The first meeting has no state to send.
        record = None if state is None else pack(tensors_of(state))
        asked = {}
        for centre in centres:
            asked[centre] = Asked(self.policy.attempts, time.monotonic() + self.policy.patience)
        answers = {}
        problems = {}

        while asked:
            # Also to those that have only connected now, or are asked again.
            self._send(what, asked, record, number)
            for centre, reply in self._replies(asked):
                answer, problem = self._look_at(what, centre, asked[centre], reply)
                if problem:
                    self._failed(centre, problem, asked, problems)
                else:
                    answers[centre] = answer
                    del asked[centre]

            # A node that was killed, or whose machine is off, says nothing at all.
            for centre, turn in list(asked.items()):
                if time.monotonic() > turn.until:
                    missing = f"did not answer in {self.policy.patience:g} s"
                    if not turn.message:
                        missing = "is not connected"
                    self._failed(centre, missing, asked, problems)
            if asked:
                time.sleep(self.policy.pause)

        if problems:
            self._without(problems, answers, number, all_of_them)

        # Answers came in any order. What is added up has to be in the order of the clients.
        return {centre: answers[centre] for centre in centres if centre in answers}

    def _send(
        self, what: str, asked: Mapping[str, Asked], record: ArrayRecord | None, number: int
    ) -> None:
        """Send the request to those that have not got it, as far as they are connected."""
        waiting = [centre for centre, turn in asked.items() if not turn.message]
        if not waiting:
            return

        nodes = self._nodes(waiting)
        for centre in waiting:
            # It may still connect, as long as patience lasts.
            if centre not in nodes:
                continue

            request = {
                "centre": centre,
                "config": settings(self.config),
                "round": number,
                "threads": self.policy.threads,
            }
            content = RecordDict({"request": ConfigRecord(request)})
            if record is not None:
                content["state"] = record

            # Flower throws away what is older than its time to live, so that no hospital begins
            # with something for which nobody waits any more.
            message = Message(content, nodes[centre], what, ttl=self.policy.patience)
            # One that could not be handed over is sent again at the next look.
            [sent] = self.grid.push_messages([message]) or [None]
            asked[centre].message = sent or ""
            asked[centre].node = nodes[centre]

    def _nodes(self, centres: Sequence[str]) -> dict[str, int]:
        """{name: number} of the nodes that are connected. Raises UserError for two of one name."""
        # Who a node is says its key. What it says itself is only compared with that.
        nodes = {}
        for node in self.grid.get_nodes():
            if node.name in centres and node.name in nodes:
                raise UserError(f"two nodes are registered as {node.name}: unregister one of them")
            nodes[node.name] = node.node_id
        return nodes

    def _replies(self, asked: Mapping[str, Asked]) -> Iterator[tuple[str, Message]]:
        """What has come: one reply a hospital, whatever their order, and none that is not due."""
        # A reply says to which message it is one. To an earlier one it is too late.
        due = {}
        for centre, turn in asked.items():
            if turn.message:
                due[turn.message] = centre
        if not due:
            return

        for reply in self.grid.pull_messages(list(due)):
            # Taken away, so that a second reply to the same message finds nothing.
            centre = due.pop(reply.metadata.reply_to_message_id, None)
            if centre is not None:
                yield centre, reply

    def _failed(
        self, centre: str, problem: str, asked: dict[str, Asked], problems: dict[str, str]
    ) -> None:
        """Ask again, as long as the policy allows."""
        # What a client does depends on seed, round and client alone: a second answer has the same
        # bits.
        turn = asked[centre]
        turn.left -= 1
        turn.message = ""
        turn.until = time.monotonic() + self.policy.patience

        again = ", asking again" if turn.left else ""
        print(f"hospital {centre} {problem}{again}", flush=True)
        if not turn.left:
            problems[centre] = problem
            del asked[centre]

    def _without(
        self, problems: Mapping[str, str], answers: Mapping, number: int, all_of_them: bool
    ) -> None:
        """Whether it goes on without those that failed. Raises UserError where it does not."""
        told = "; ".join(f"hospital {centre} {problem}" for centre, problem in problems.items())

        # Without a hospital's numbers of images no weight is known, and a test without one of them
        # is another test.
        if all_of_them:
            raise UserError(f"{told}; all are needed here; {processes.GO_ON}")
        if not self.policy.allow_missing:
            raise UserError(f"round {number}: {told}; {processes.GO_ON}, or with --allow-missing")

        quorum = self.policy.quorum or len(self.config.clients) // 2 + 1
        if len(answers) < quorum:
            few = f"{len(answers)} reported, and --quorum is {quorum}"
            raise UserError(f"round {number}: {told}; {few}; {processes.GO_ON}")
        print(f"round {number} goes on without {', '.join(problems)}", flush=True)

    # ---------------------------------------------------------------------- reading, and refusing

    def _look_at(
        self, what: str, centre: str, turn: Asked, reply: Message
    ) -> tuple[dict[str, Any], str]:
        """-> what a reply says, and why it cannot be used; one of the two is empty."""
        try:
            return self._read(what, centre, turn, reply), ""
        except Refusal as error:
            return {}, str(error)

    def _read(self, what: str, centre: str, turn: Asked, reply: Message) -> dict[str, Any]:
        """A reply's content, checked. -> {"about", "validation", "test", "update"}, as was asked

        Raises Refusal for whatever cannot be used.
        """
        # Flower's text of an error is the exception's, with paths and names of files: it is not
        # repeated here.
        if reply.has_error():
            raise Refusal(f"failed (Flower's error {reply.error.code})")

        # Flower knows the sender by its key. What it says itself is looked at below.
        if reply.metadata.src_node_id != turn.node:
            raise Refusal("was answered for by another node")
        content = reply.content
        if "problem" in content:
            raise Refusal(read_problem(content["problem"]))

        found = {"about": self._read_about(centre, content)}
        tasks = MESSAGES[what]
        try:
            if "validate" in tasks:
                found["validation"] = self._read_tallies(centre, content, "validation", ["tally"])
            if "test" in tasks:
                statistics = self.method.STATISTICS
                found["test"] = self._read_tallies(centre, content, "test", statistics)
            if "train" in tasks:
                found["update"] = self._read_update(centre, content)
        except (KeyError, TypeError) as error:
            raise Refusal("sent an answer that lacks something") from error
        return found

    def _read_about(self, centre: str, content: RecordDict) -> dict[str, Any]:
        """Who answers. It has to be who answered first."""
        about = dict(content.get("about", {}))
        if about.get("centre") != centre:
            raise Refusal("answered for another centre")

        known = self.about.get(centre)
        if known is None:
            check_about(about)
            return about

        # Programs and data stay as they were: half of a run would be of something else.
        for name, value in known.items():
            if about.get(name) != value:
                raise Refusal(f"has changed since the run began: {name} was {value}")
        return about

    def _read_tallies(
        self, centre: str, content: RecordDict, part: str, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Sums and counts over a part of the images, as many as were announced. -> {name: tally}"""
        empty = torch.zeros(len(metrics.MEASURES), 2, dtype=torch.float64)
        tallies = unpack(content["tally"], dict.fromkeys(names, empty), "its tally")

        images = getattr(self.federation.facts[centre], part)
        for tally in tallies.values():
            if not tally.isfinite().all():
                raise Refusal("sent a tally that is not finite")

            # Every image has a Dice, so its count is that of the images.
            counted = tally[list(metrics.MEASURES).index("dice"), 1].item()
            if counted != images or (tally < 0).any():
                raise Refusal(f"counted other images than the {images} that it announced")
        return tallies

    def _read_update(self, centre: str, content: RecordDict) -> Any:
        """An update, finite, of the announced number of steps and images."""
        # The same network was built here: that tells what has to come.
        state = self.flat.state()
        expected = {
            "vector": state.parameters,
            "buffers": state.buffers,
            "counters": state.counters,
        }
        tensors = unpack(content["update"], expected, "its update")

        # Which terms a loss has is the network's affair. A number more than those is none of ours.
        numbers = dict(content["log"])
        terms = {}
        for name in list(numbers):
            if name.startswith("term "):
                terms[name.removeprefix("term ")] = numbers.pop(name)
        log = self.method.ClientLog(client=centre, terms=terms, **numbers)

        # The server would refuse the whole round for these. Here the hospital is asked again.
        measured = [*numbers.values(), *terms.values()]
        finite = all(math.isfinite(value) for value in measured)
        if not (finite and tensors["vector"].isfinite().all()):
            raise Refusal("sent a loss or update that is not finite")
        if not tensors["buffers"].isfinite().all():
            raise Refusal("sent buffers that are not finite")

        # The weights of the server's step were computed from these numbers.
        steps = self.method.client_steps(self.config, self.federation.facts)[centre]
        images = self.federation.facts[centre].train
        if (log.images, log.steps) != (images, steps):
            raise Refusal(f"trained on other than the {images} images, {steps} steps announced")
        return self.method.Update(client=centre, log=log, **tensors)


def check_about(about: Mapping[str, Any]) -> None:
    """Raise Refusal for what no hospital can say of itself."""
    if not set(about) >= IDENTITY:
        raise Refusal("sent an answer that lacks something")

    for name, like in NO_FACTS._asdict().items():
        value = about[name]
        if type(value) is not type(like) or (isinstance(value, int) and value < 0):
            raise Refusal(f"announced {name} that cannot be")

    # Texts end up in tables and on the terminal.
    for name, value in about.items():
        if isinstance(value, str) and (len(value) > LONGEST or not value.isprintable()):
            raise Refusal(f"announced {name} that cannot be")


def read_problem(record: Any) -> str:
    """What a hospital says that it could not do, in one line."""
    return " ".join(str(dict(record).get("sentence", NEUTRAL)).split())[:200]


def hospitals(
    grid: Grid, policy: Policy, method: Any
) -> Callable[[Any], contextlib.AbstractContextManager[HospitalClients]]:
    """What opens the clients of a run in hospitals, as fedgs.run wants it."""

    @contextlib.contextmanager
    def open_hospitals(config: Any) -> Iterator[HospitalClients]:
        # A request has no place for it, and nothing at a hospital outlives one.
        if config.method == "fedbn":
            raise UserError("--method fedbn: what its clients keep is not kept between hospitals")

        hardware.prepare_torch()
        device = hardware.choose_device(config.device)
        flat = method.FlatNetwork(method.build_network(config).to(device))
        yield HospitalClients(grid, config, policy, flat, method)

    return open_hospitals


# ------------------------------------------------------------------------------ the hospital's side


def work(message: Message, context: Context, method: Any) -> Message:
    """Answer one request, from the images of this hospital's own centre.

    method: the module fedgs. Whatever goes wrong is written here, to hospital.log in the node's
    folder, and leaves as a sentence that tells nothing of this hospital.
    """
    # What this node was started with. The coordinator has no say in it.
    here = context.node_config
    centre = str(here.get("centre", ""))
    folder = Path(str(here.get("out", f"runs/hospital-{centre}")))
    try:
        content = answer(message, here, centre, folder, method)
        note(folder, f"{message.metadata.message_type}: answered")
    except Exception as error:
        # Flower would send the exception's own text, which names files.
        note(folder, traceback.format_exc())
        told = str(error) if isinstance(error, Refusal) else NEUTRAL
        content = RecordDict({"problem": ConfigRecord({"sentence": told})})
    return Message(content, reply_to=message)


def answer(
    message: Message, here: Mapping[str, Any], centre: str, folder: Path, method: Any
) -> RecordDict:
    """What this hospital sends back. Raises Refusal, and whatever its data and machine raise."""
    # Keys that were registered under each other's names would mix up two hospitals.
    request = message.content["request"]
    if request["centre"] != centre:
        raise Refusal("holds another centre than the one it is registered as")

    # Sums over threads are in an order that depends on how many there are.
    if request["threads"]:
        torch.set_num_threads(request["threads"])

    # The coordinator decides what is computed. Where data lie and what is written stays ours.
    config = own_config(request["config"], here, method)
    clients = method.open_local_clients(config, [centre])
    about = describe(clients, config, centre, method.__version__)
    content = RecordDict({"about": ConfigRecord(about)})

    # The first meeting asks for no more than that.
    tasks = MESSAGES[message.metadata.message_type]
    if tasks:
        like = clients.flat.state()
        arrived = unpack(message.content["state"], tensors_of(like), "the server's state")
        state = like._replace(**arrived)

    if "validate" in tasks:
        tally = clients.evaluate(state)[centre]
        content["tally"] = pack({"tally": tally})
    if "train" in tasks:
        [update] = clients.train(state, request["round"])
        parts = {
            "vector": update.vector,
            "buffers": update.buffers,
            "counters": update.counters,
        }
        content["update"] = pack(parts)
        content["log"] = pack_log(update.log)
    if "test" in tasks:
        tests = list(clients.test(state))
        clients.flat.load(state)  # without this centre's own statistics
        keep_tests(clients, tests, config, folder / run_folder(config, request), method)
        content["tally"] = pack({test.batch_norm: test.tally for test in tests})
    return content


def own_config(text: str, here: Mapping[str, Any], method: Any) -> Any:
    """The coordinator's settings with this hospital's own places. Raises UserError."""
    known = {f.name: f for f in fields(method.Config)}
    theirs = decided(method.Config)
    values = json.loads(text)
    for name, value in values.items():
        # Nothing but what a coordinator decides: no folder, no file, no device.
        if name not in theirs or not options.plausible(known[name], value):
            raise Refusal("does not take one of the server's settings: another version?")

    config = method.Config(
        **options.with_tuples(method.Config, values),
        data_root=str(here.get("data-root", "")),
        cache=str(here.get("cache", "")),
        device=str(here.get("device", "auto")),
        workers="1",
    )

    # What one's own data are called crosses with every answer: it must not be a folder's name that
    # nobody has agreed on.
    if config.dataset not in data.CENTRES:
        path = data.find(config.dataset, config.data_root)
        if manifest.name_of(path) != config.dataset:
            raise Refusal("has a manifest of another name than the one in --dataset")
    return method.settle(config, elsewhere=True)


def run_folder(config: Any, request: Mapping[str, Any]) -> Path:
    """Where this hospital's own results of a test belong, below its node's folder."""
    # Runs of one name may differ in other settings. One that goes on has the same.
    number = zlib.crc32(request["config"].encode())
    return Path(f"{runs.run_name(config)}-{number:08x}") / f"test-{int(request['round'])}"


def keep_tests(clients: Any, tests: Sequence[Any], config: Any, folder: Path, method: Any) -> None:
    """This hospital's own tables, pictures and network, which nobody else gets."""
    federation = clients.federation
    about = runs.describe_weights(config, federation.source, None, method.__version__)
    weights = checkpoints.with_about(clients.flat.network, about)
    checkpoints.save(folder / "tested.pt", weights)

    # Tables as of `tools.evaluate`, so that `tools.compare` reads them.
    summary = runs.summarise_tests(tests, None)
    results = runs.describe_results(config, federation, {"tested": summary})
    scores = runs.score_table("tested", tests)

    # A centre may have no test images of its own.
    figures = {}
    if scores:
        heading = f"{runs.title(config, federation)}\n{tests[0].centre}, {tests[0].split}"
        chosen = [test for test in tests if test.batch_norm == config.batch_norm]
        figures = method.draw_tests(clients, chosen, heading)
    runs.save_results(folder, results, scores, figures)


def note(folder: Path, text: str) -> None:
    """A line in the hospital's own log, and on its terminal."""
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.rstrip()}"
    print(line, flush=True)

    # A full disk is one of the things that may have gone wrong: the answer leaves all the same.
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "hospital.log").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
