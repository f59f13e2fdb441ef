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
"""

import contextlib
import hashlib
import json
import math
import time
import traceback
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
from support import checkpoints, hardware, options, processes, runs
from support.errors import UserError
from support.options import option

MESSAGES = {  # what Flower calls a request -> what a hospital then does, in this order
    "query": [],
    "train": ["train"],
    "train.on": ["validate", "train"],
    "evaluate": ["validate"],
    "evaluate.test": ["test"],
}
IDENTITY = {  # what every answer says of its sender, see `describe`
    *("centre", "version", "torch", "kernels", "precision", "network", "threads"),
    *("source", "rule", "flags", *data.Facts._fields),
}
COUNTS = ("train", "validation", "test", "flagged", "lost")  # those facts that are numbers
NEUTRAL = "could not do its part: its own log says why"  # no path, no name, no number


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


class Refusal(UserError):
    """A sentence that may cross: nothing in it comes from a hospital's data or disk."""


# --------------------------------------------------------------------------------- what crosses


def pack(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors, float32, float64 or int64, which arrive bit for bit."""
    return ArrayRecord({name: FlowerArray(x.cpu().numpy()) for name, x in tensors.items()})


def unpack(record: ArrayRecord, expected: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The tensors of a record, on the devices of those that are expected.

    Raises Refusal where one is missing or more than that, and for another type or shape.
    """
    if set(record) != set(expected):
        raise Refusal(f"{what} has other parts than {', '.join(expected)}")

    tensors = {}
    for name, like in expected.items():
        # Bytes that are no array can raise anything.
        try:
            array = record[name].numpy()
        except Exception as error:
            raise Refusal(f"{what} cannot be read ({name})") from error

        wanted = like.cpu().numpy()
        if array.shape != wanted.shape or array.dtype != wanted.dtype:
            raise Refusal(
                f"{what} has the wrong shape: {name} is {array.dtype} {list(array.shape)}, not "
                f"{wanted.dtype} {list(wanted.shape)}"
            )
        tensors[name] = torch.from_numpy(array).to(like.device)
    return tensors


def pack_log(log: Any) -> MetricRecord:
    """A client's round in numbers, as in fedgs.ClientLog."""
    numbers = {"images": log.images, "steps": log.steps, "loss": log.loss}
    numbers.update(eta=log.eta, scaled=log.scaled)
    for name, value in log.terms.items():
        numbers[f"term {name}"] = value
    return MetricRecord(numbers)


def layout(network: torch.nn.Module) -> str:
    """A hash of a network's names and shapes: of what an update is an update of."""
    shapes = [[name, list(tensor.shape)] for name, tensor in network.state_dict().items()]
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
    return json.dumps({name: getattr(config, name) for name in sorted(decided(config))})


def describe(clients: Any, config: Any, centre: str, version: str) -> dict[str, Any]:
    """Who answers: with which programs, and of which data. Every answer brings it."""
    federation = clients.federation
    return {
        "centre": centre,
        "version": version,
        "torch": torch.__version__.partition("+")[0],
        "kernels": clients.kernels.name,
        "precision": config.precision,
        "network": layout(clients.flat.network),
        "threads": torch.get_num_threads(),
        "source": federation.source,
        "rule": federation.rule,
        "flags": federation.flags,
        **federation.facts[centre]._asdict(),
    }


# ------------------------------------------------------------------------------ the hospital's side


def work(message: Message, context: Context, method: Any) -> Message:
    """Answer one request, from the images of this hospital's own centre.

    method: the module fedgs. Whatever goes wrong is written here, to hospital.log in the node's
    folder, and leaves as a sentence that tells nothing of this hospital.
    """
    here = context.node_config
    centre = str(here.get("centre", ""))
    folder = Path(str(here.get("out", f"runs/hospital-{centre}")))
    try:
        content = answer(message, here, centre, folder, method)
        note(folder, f"{message.metadata.message_type}: answered")
    except Exception as error:
        note(folder, traceback.format_exc())
        told = str(error) if isinstance(error, Refusal) else NEUTRAL
        content = RecordDict({"problem": ConfigRecord({"sentence": told})})
    return Message(content, reply_to=message)


def answer(
    message: Message, here: Mapping[str, Any], centre: str, folder: Path, method: Any
) -> RecordDict:
    """What this hospital sends back. Raises Refusal, and whatever its data and machine raise."""
    request = message.content["request"]
    if request["centre"] != centre:
        raise Refusal("holds another centre than the one it is registered as")
    if request["threads"]:
        torch.set_num_threads(request["threads"])

    # The coordinator decides what is computed. Where data lie and what is written stays ours.
    config = own_config(request["config"], here, method)
    clients = method.open_local_clients(config, [centre])
    about = describe(clients, config, centre, method.__version__)
    content = RecordDict({"about": ConfigRecord(about)})

    tasks = MESSAGES[message.metadata.message_type]
    if tasks:
        like = clients.flat.state()
        arrived = unpack(message.content["state"], like._asdict(), "the server's state")
        state = like._replace(**arrived)

    if "validate" in tasks:
        tally = clients.evaluate(state)[centre]
        content["tally"] = pack({"tally": tally})
    if "train" in tasks:
        [update] = clients.train(state, request["round"])
        parts = {"vector": update.vector, "buffers": update.buffers, "counters": update.counters}
        content["update"] = pack(parts)
        content["log"] = pack_log(update.log)
    if "test" in tasks:
        tests = list(clients.test(state))
        clients.flat.load(state)  # without the statistics of this centre
        own = folder / runs.run_name(config) / f"test-{request['round']}"
        keep_test(clients, tests, config, own, method)
        content["tally"] = pack({test.batch_norm: test.tally for test in tests})
    return content


def own_config(text: str, here: Mapping[str, Any], method: Any) -> Any:
    """The coordinator's settings with this hospital's own places. Raises UserError."""
    known = {f.name: f for f in fields(method.Config)}
    theirs = decided(method.Config)
    values = {}
    for name, value in json.loads(text).items():
        if name not in theirs or not options.plausible(known[name], value):
            raise Refusal("does not take one of the server's settings: another version?")
        values[name] = tuple(value) if isinstance(value, list) else value

    config = method.Config(
        **values,
        data_root=str(here.get("data-root", "")),
        cache=str(here.get("cache", "")),
        device=str(here.get("device", "auto")),
        workers="1",
    )
    return method.settle(config)


def keep_test(clients: Any, tests: Sequence[Any], config: Any, folder: Path, method: Any) -> None:
    """This hospital's own tables, pictures and network, which nobody else gets."""
    federation = clients.federation
    network = clients.flat.network
    about = runs.describe_weights(config, federation.source, None, method.__version__)
    checkpoints.save(folder / "tested.pt", checkpoints.with_about(network, about))

    summary = runs.summarise_tests(tests, None)
    results = runs.describe_results(config, federation, {"tested": summary})
    heading = f"{runs.title(config, federation)}\n{tests[0].centre}, {tests[0].split}"
    chosen = [test for test in tests if test.batch_norm == config.batch_norm]
    figures = method.draw_tests(clients, chosen, heading) if tests[0].scores else {}
    runs.save_results(folder, results, runs.score_table("tested", tests), figures)


def note(folder: Path, text: str) -> None:
    """A line in the hospital's own log, and on its terminal."""
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.rstrip()}"
    print(line, flush=True)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "hospital.log").open("a", encoding="utf-8") as file:
            file.write(line + "\n")


# ------------------------------------------------------------------------------- the server's side


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
        self.here = []  # no client computes in this process
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

    # --------------------------------------------------------------------- what the loop asks for

    def train(self, state: Any, round_: int) -> Iterator[Any]:
        """Every client's update, in client order."""
        self.round = round_
        if self.ahead is None or self.ahead[0] is not state:
            answers = self.ask("train", self.config.clients, state, round_)
            self.ahead = state, [found["update"] for found in answers.values()]
        updates = self.ahead[1]
        self.ahead = None

        # Where all report this is 1, exactly.
        share = 1.0
        if len(updates) < len(self.config.clients):
            weights = self.method.client_weights(self.config, self.federation.facts)
            share = sum(weights[update.client] for update in updates)
        while updates:
            yield replace(updates.pop(0), share=share)

    def evaluate(self, state: Any) -> dict[str, Tensor]:
        """{client: sums and counts over its validation images}, in client order."""
        if self.round == self.config.rounds:
            answers = self.ask("evaluate", self.config.clients, state, self.round)
        else:
            answers = self.ask("train.on", self.config.clients, state, self.round + 1)
            self.ahead = state, [found["update"] for found in answers.values()]
        return {centre: found["tally"] for centre, found in answers.items()}

    def test(self, state: Any) -> list[Any]:
        """Every centre's test, in the order of the clients, then the held-out centre's.

        Sums and counts alone: scores, names and pictures are at the hospitals.
        """
        self.tests += 1
        held_out = [centre for centre in self.config.centres if centre not in self.config.clients]
        centres = [*self.config.clients, *held_out]
        answers = self.ask("evaluate.test", centres, state, self.tests, all_of_them=True)
        tests = []
        for centre, found in answers.items():
            split = "out_test" if centre in held_out else "in_test"
            for batch_norm, tally in found["tallies"].items():
                test = self.method.CentreTest(centre, split, batch_norm, tally, [], None, None)
                tests.append(test)
        return tests

    def _meet(self) -> Any:
        """Ask who the hospitals are. -> data.Federation with their facts

        Raises UserError naming those that differ from this process or from each other.
        """
        answers = self.ask("query", self.config.centres, None, 0, all_of_them=True)
        about = {centre: found["about"] for centre, found in answers.items()}

        # Kernels and data are compared with the first hospital's: the server may have no GPU.
        first = next(iter(about.values()))
        expected = {
            "version": self.method.__version__,
            "torch": torch.__version__.partition("+")[0],
            "precision": self.config.precision,
            "network": layout(self.flat.network),
            "kernels": first["kernels"],
            "source": first["source"],
        }
        different = []
        for centre, said in about.items():
            for name, value in expected.items():
                if said[name] != value:
                    different.append(f"hospital {centre} has {name} {said[name]}, not {value}")
        if different:
            raise UserError(f"{'; '.join(different)}: all hospitals have to compute alike")

        self.about = about
        config = self.config
        place = f"in {len(about)} hospitals"
        federation = data.Federation(
            source=first["source"],
            place=place,
            rule=first["rule"],
            flags=first["flags"],
            size=config.image_size,
            out_centre=config.out_centre,
        )
        for centre, said in about.items():
            federation.facts[centre] = data.Facts(*(said[name] for name in data.Facts._fields))
        return federation

    # -------------------------------------------------------------------------- asking, with policy

    def ask(
        self, what: str, centres: Sequence[str], state: Any, number: int, all_of_them: bool = False
    ) -> dict[str, dict]:
        """Ask these hospitals at once, and read what they answer. -> {centre: answer}, in order

        what: a key of MESSAGES; number: the round, or which test. A hospital that fails is asked
        again. Raises UserError, naming everyone that failed, where the policy does not go on.
        """
        record = None if state is None else pack(state._asdict())
        asked = {}
        for centre in centres:
            asked[centre] = Asked(self.policy.attempts, time.monotonic() + self.policy.patience)
        answers = {}
        problems = {}

        while asked:
            self._send(what, asked, record, number)
            for centre, reply in self._replies(asked):
                answer, problem = self._look_at(what, centre, asked[centre], reply)
                if problem:
                    self._failed(centre, problem, asked, problems)
                else:
                    answers[centre] = answer
                    del asked[centre]

            for centre, turn in list(asked.items()):
                if time.monotonic() > turn.until:
                    waited = f"in {self.policy.patience:g} s"
                    missing = f"did not answer {waited}" if turn.message else "is not connected"
                    self._failed(centre, missing, asked, problems)
            if asked:
                time.sleep(self.policy.pause)

        if problems:
            self._without(problems, answers, number, all_of_them)
        return {centre: answers[centre] for centre in centres if centre in answers}

    def _send(
        self, what: str, asked: Mapping[str, Asked], record: ArrayRecord | None, number: int
    ) -> None:
        """Send the request to those that have not got it, as far as they are connected."""
        waiting = [centre for centre, turn in asked.items() if not turn.message]
        if not waiting:
            return

        # Who a node is says its key. What it says itself is only compared with that.
        nodes = {}
        for node in self.grid.get_nodes():
            if node.name in waiting and node.name in nodes:
                raise UserError(f"two nodes are registered as {node.name}: unregister one of them")
            nodes[node.name] = node.node_id

        for centre in waiting:
            if centre not in nodes:
                continue
            request = ConfigRecord(
                {
                    "centre": centre,
                    "config": settings(self.config),
                    "round": number,
                    "threads": self.policy.threads,
                }
            )
            content = RecordDict({"request": request})
            if record is not None:
                content["state"] = record
            message = Message(content, nodes[centre], what, ttl=self.policy.patience)
            [sent] = self.grid.push_messages([message]) or [None]
            asked[centre].message = sent or ""
            asked[centre].node = nodes[centre]

    def _replies(self, asked: Mapping[str, Asked]) -> Iterator[tuple[str, Message]]:
        """What has come: one reply a hospital, whatever their order, and none that is not due."""
        of_message = {turn.message: centre for centre, turn in asked.items() if turn.message}
        if not of_message:
            return
        for reply in self.grid.pull_messages(list(of_message)):
            centre = of_message.pop(reply.metadata.reply_to_message_id, None)
            if centre is not None:
                yield centre, reply

    def _failed(
        self, centre: str, problem: str, asked: dict[str, Asked], problems: dict[str, str]
    ) -> None:
        """Ask again, as long as the policy allows."""
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
        quorum = self.policy.quorum or len(self.config.clients) // 2 + 1
        if all_of_them:
            raise UserError(f"{told}; all are needed here; {processes.GO_ON}")
        if not self.policy.allow_missing:
            raise UserError(f"round {number}: {told}; {processes.GO_ON}, or with --allow-missing")
        if len(answers) < quorum:
            raise UserError(
                f"round {number}: {told}; {len(answers)} reported, and --quorum is {quorum}; "
                f"{processes.GO_ON}"
            )
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
        """A reply's content, checked. Raises Refusal"""
        if reply.has_error():
            raise Refusal(f"failed (Flower's error {reply.error.code})")
        if reply.metadata.src_node_id != turn.node:
            raise Refusal("was answered for by another node")
        content = reply.content
        if "problem" in content:
            raise Refusal(read_problem(content["problem"]))

        found = {"about": self._read_about(centre, content)}
        tasks = MESSAGES[what]
        try:
            if "validate" in tasks:
                found.update(self._read_tallies(centre, content, ["tally"], "validation"))
            if "test" in tasks:
                names = self.method.STATISTICS
                found["tallies"] = self._read_tallies(centre, content, names, "test")
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
            if not set(about) >= IDENTITY:
                raise Refusal("sent an answer that lacks something")
            counts = [about[name] for name in COUNTS]
            if not all(isinstance(count, int) and count >= 0 for count in counts):
                raise Refusal("announced numbers of images that are none")
            return about

        for name, value in known.items():
            if about.get(name) != value:
                raise Refusal(f"has changed since the run began: {name} was {value}")
        return about

    def _read_tallies(
        self, centre: str, content: RecordDict, names: Sequence[str], part: str
    ) -> dict[str, Tensor]:
        """Sums and counts, of as many images as were announced for this part of the data."""
        empty = torch.zeros(len(metrics.MEASURES), 2, dtype=torch.float64)
        tallies = unpack(content["tally"], dict.fromkeys(names, empty), "its tally")
        images = getattr(self.federation.facts[centre], part)
        for tally in tallies.values():
            if not tally.isfinite().all():
                raise Refusal("sent a tally that is not finite")
            counted = tally[list(metrics.MEASURES).index("dice"), 1].item()
            if counted != images or (tally < 0).any():
                raise Refusal(f"counted other images than the {images} that it announced")
        return tallies

    def _read_update(self, centre: str, content: RecordDict) -> Any:
        """An update, finite, of the announced number of steps and images."""
        state = self.flat.state()
        expected = {"vector": state.parameters, "buffers": state.buffers}
        expected["counters"] = state.counters
        tensors = unpack(content["update"], expected, "its update")
        numbers = dict(content["log"])

        terms = {}
        for name in list(numbers):
            if name.startswith("term "):
                terms[name.removeprefix("term ")] = numbers.pop(name)
        log = self.method.ClientLog(client=centre, terms=terms, **numbers)

        finite = all(math.isfinite(value) for value in (*numbers.values(), *terms.values()))
        if not (finite and tensors["vector"].isfinite().all()):
            raise Refusal("sent a loss or update that is not finite")
        if not tensors["buffers"].isfinite().all():
            raise Refusal("sent buffers that are not finite")

        steps = self.method.client_steps(self.config, self.federation.facts)[centre]
        images = self.federation.facts[centre].train
        if (log.images, log.steps) != (images, steps):
            raise Refusal(f"trained on other than the {images} images, {steps} steps announced")
        return self.method.Update(client=centre, log=log, **tensors)


def read_problem(record: Any) -> str:
    """What a hospital says that it could not do, in one line."""
    return " ".join(str(dict(record).get("sentence", NEUTRAL)).split())[:200]


def hospitals(
    grid: Grid, policy: Policy, method: Any
) -> Callable[[Any], contextlib.AbstractContextManager[HospitalClients]]:
    """What opens the clients of a run in hospitals, as fedgs.run wants it."""

    @contextlib.contextmanager
    def open_hospitals(config: Any) -> Iterator[HospitalClients]:
        hardware.prepare_torch()
        device = hardware.choose_device(config.device)
        flat = method.FlatNetwork(method.build_network(config).to(device))
        yield HospitalClients(grid, config, policy, flat, method)

    return open_hospitals
