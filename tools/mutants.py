"""Plants small faults in the code, one at a time, and tells which of them no test notices.

    python -m tools.mutants                               # in all of FILES: takes hours
    python -m tools.mutants metrics.py support/files.py
    python -m tools.mutants --changed main                # in lines changed since a revision
    python -m tools.mutants --sample 300                  # 300 of them, the same ones every time
    python -m tools.mutants --quick metrics.py            # which do the quick tests notice?
    python -m tools.mutants --report                      # what is known by now, without any test

A mutant is the code with one such fault. Those tests that run its line are run on it, the fastest
first, until one fails. All of this happens in a copy of the repository; build/mutants keeps what
was found, so that an interrupted run goes on. docs/testing.md says how to read the report.
"""

import argparse
import contextlib
import functools
import gc
import hashlib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import coverage
import pytest
from tqdm import tqdm

from support.errors import UserError, readable_errors
from support.files import write_text
from support.options import new_parser
from tools.faults import Mutant, mutants_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILES = [
    *("fedgs.py", "data.py", "metrics.py", "models.py"),
    *("support/runs.py", "support/checkpoints.py", "support/files.py", "support/processes.py"),
    *("support/volumes.py", "support/tables.py", "support/options.py"),
    *("tools/predict.py", "tools/evaluate.py", "tools/compare.py", "tools/experiment.py"),
]
ROOT = Path(__file__).parent.parent
EQUIVALENT = "tests/equivalent_mutants.toml"

# Tests run in forks of this process, which has these already: that saves five seconds a mutant.
SLOW_IMPORTS = ("torch", "scipy.stats", "matplotlib.pyplot", "nibabel", "PIL.Image", "hypothesis")

# A test that takes this much longer than it did has no end.
MORE_SECONDS = 30
TIMES_LONGER = 5

# Exit codes.
PASSED = (0, 5)  # 5: under these names there are no tests any more
TOO_LONG = -signal.SIGALRM

TEST = "MUTANTS_TEST"  # names a test to the processes that it starts
COVERAGE = f"""
[run]
source = .
omit = tests/*
data_file = build/coverage
parallel = true
context = ${{{TEST}-}}
core = ctrace
patch = _exit
sigterm = true
"""


# -------------------------------------------------------------------------- tests, run on a copy


class Copy:
    """A copy of the repository in which code may be broken, and how tests are run on it."""

    def __init__(self, root: Path, folder: Path):
        self.root = root
        self.folder = folder / "copy"
        unwanted = shutil.ignore_patterns(".*", "build", "runs", "datasets", "__pycache__")
        shutil.copytree(root, self.folder, ignore=unwanted)
        (self.folder / "build").mkdir()
        if (root / "datasets").exists():
            (self.folder / "datasets").symlink_to(root / "datasets")

        # For the processes that tests start, too. More threads than one would not survive a fork.
        os.environ.setdefault("FEDGS_SHARED", str(root.parent / "shared"))
        os.environ.update(
            PYTHONPATH=str(self.folder), OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"
        )
        for name in SLOW_IMPORTS:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        gc.freeze()  # a fork then shares all this for good

    def run(self, plugin: Callable[[], object], *arguments: str) -> int:
        """Run tests in a fork. -> pytest's exit code, or minus the signal that ended it"""
        pid = os.fork()
        if pid == 0:
            self._run_here(plugin, arguments)
        try:
            _, status = os.waitpid(pid, 0)
        finally:
            # What the tests have started; after Ctrl-C the tests themselves.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(status)

    def _run_here(self, plugin: Callable[[], object], arguments: Sequence[str]) -> NoReturn:
        code = 1
        try:
            os.setsid()
            os.chdir(self.folder)
            with open("build/output.txt", "w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)

            # From here on every module of the project is the copy's.
            sys.path.insert(0, str(self.folder))
            for name, module in list(sys.modules.items()):
                file = getattr(module, "__file__", None) or ""
                if name != "__main__" and Path(file).is_relative_to(self.root):
                    del sys.modules[name]

            quiet = ["-q", "--tb=line", "-p", "no:cacheprovider", "-o", "addopts="]
            where = f"--basetemp={self.folder / 'build' / 'tests'}"
            code = pytest.main([*quiet, where, *arguments], plugins=[plugin()])
            sys.stdout.flush()
        finally:
            os._exit(code)

    def output(self) -> str:
        return (self.folder / "build" / "output.txt").read_text(errors="replace")


# ------------------------------------------------------------------ which tests run which line


def processor_seconds() -> float:
    """What this process has used, and those it waited for. Other work on the machine adds none."""
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + others.ru_utime + others.ru_stime


class Recorder:
    """A plugin of pytest that notes which test runs which line, and how long it takes."""

    def __init__(self):
        Path("build/coveragerc").write_text(COVERAGE)
        os.environ["COVERAGE_PROCESS_START"] = str(Path("build/coveragerc").resolve())
        self.coverage = coverage.Coverage(config_file="build/coveragerc")
        self.coverage.start()
        self.seconds = Counter()  # of tests, and of fixtures that several tests share
        self.users = defaultdict(list)  # fixture -> tests that use it
        self.failed = set()
        self.start = processor_seconds()

    def enter(self, context: str) -> str:
        """What runs from here on runs for this test or fixture. -> for which it ran until now"""
        outer = os.environ.get(TEST, "")
        now = processor_seconds()
        self.seconds[outer] += now - self.start
        self.start = now
        os.environ[TEST] = context
        self.coverage.switch_context(context)
        return outer

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        for name in item.fixturenames:
            self.users[f"fixture {name}"].append(item.nodeid)
        self.enter(item.nodeid)
        result = yield
        self.enter("")
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef) -> Any:
        if fixturedef.scope == "function":
            return (yield)
        outer = self.enter(f"fixture {fixturedef.argname}")
        try:
            return (yield)
        finally:
            self.enter(outer)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_unconfigure(self) -> None:
        """Write what was found."""
        self.coverage.stop()
        self.coverage.save()
        self.coverage.combine()
        found = self.coverage.get_data()
        lines = {}
        for file in FILES:
            of_file = found.contexts_by_lineno(str(Path(file).resolve()))
            lines[file] = {line: self.tests(contexts) for line, contexts in of_file.items()}

        # Run alone, a test has to wait for its fixtures.
        for fixture, tests in self.users.items():
            for test in tests:
                self.seconds[test] += self.seconds[fixture]
        record = {"seconds": self.seconds, "lines": lines, "failed": sorted(self.failed)}
        write_text(Path("build/tests.json"), json.dumps(record))

    def tests(self, contexts: Sequence[str]) -> list[str]:
        """The tests of a line; "" among them where it runs when its module is imported."""
        found = set()
        for context in contexts:
            found.update(self.users.get(context, [context]))
        return sorted(found - self.failed)


def measure(copy: Copy, kept: Path, quick: bool) -> dict:
    """{"seconds": {test: …}, "lines": {file: {line: tests}}, …}, measured if code has changed."""
    selection = ["-m", "not slow"] if quick else []
    digest = hashlib.sha256(str(selection).encode())
    for path in sorted(copy.folder.rglob("*.py")):
        digest.update(path.read_bytes())
    code = digest.hexdigest()

    path = kept / "tests.json"
    record = json.loads(path.read_text()) if path.exists() else {"code": None}
    if record["code"] != code:
        print(
            "running the tests, to see which of them run which line: this takes a while", flush=True
        )
        copy.run(Recorder, *selection)
        record = json.loads((copy.folder / "build" / "tests.json").read_text())
        record["code"] = code
        write_text(path, json.dumps(record))
    if record["failed"]:
        print("left out, since they fail without any mutant: " + ", ".join(record["failed"]))
    return record


# ----------------------------------------------------------------------------- one mutant at a time


def write_bytecode(wanted: bool) -> None:
    """Whether Python keeps what it has compiled, here and in processes that start from here."""
    sys.dont_write_bytecode = not wanted
    os.environ["PYTHONDONTWRITEBYTECODE"] = "" if wanted else "1"


class Chosen:
    """A plugin of pytest that runs certain tests, the fastest first, and ends what hangs."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds = seconds
        write_bytecode(False)  # a mutant's may have the size and the second of another one's

    def time(self, item: pytest.Item) -> float:
        return self.seconds[item.nodeid]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((x for x in items if x.nodeid in self.seconds), key=self.time)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        # Nothing handles this signal: it ends the process, wherever that is.
        signal.alarm(round(MORE_SECONDS + TIMES_LONGER * self.time(item)))


def tests_of(mutant: Mutant, record: dict, budget: float) -> list[dict[str, float]]:
    """The tests that might notice a mutant, {name: seconds}: those of its own module, the others.

    They are the fastest of each, and as many as fill the budget of seconds.
    """
    lines = record["lines"][mutant.file]
    found = set()
    for line in mutant.statement:
        found.update(lines.get(str(line), ()))

    # What runs when a module is imported may matter to whatever the module does.
    if "" in found:
        found.update(*lines.values())
        found.remove("")

    # Most faults are noticed where they should be.
    own_file = f"tests/test_{Path(mutant.file).stem}.py"
    own, others = {}, {}
    for test in sorted(found, key=record["seconds"].get):
        group = own if test.startswith(own_file) else others
        group[test] = record["seconds"][test]

    groups = []
    for group in (own, others):
        chosen = {}
        for test, seconds in group.items():
            if budget > 0:
                chosen[test] = seconds
                budget -= seconds
        if chosen:
            groups.append(chosen)
    return groups


def try_one(mutant: Mutant, copy: Copy, record: dict, budget: float) -> tuple[bool, str]:
    """-> whether a test fails on this mutant, which one"""
    path = copy.folder / mutant.file
    original = path.read_bytes()
    for tests in tests_of(mutant, record, budget):
        path.write_bytes(mutant.content)
        os.utime(path, (0, 0))  # Python may have compiled a file of this size and second
        try:
            code = run_tests(tests, copy)
        finally:
            path.write_bytes(original)

        # On a busy machine, tests of good code may not end in time either.
        if code == TOO_LONG and run_tests(tests, copy) == TOO_LONG:
            return False, "too slow a machine"
        if code not in PASSED:
            failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", copy.output(), re.MULTILINE)
            return True, failed[-1] if failed else f"exit code {code}"
    return False, ""


def run_tests(tests: dict[str, float], copy: Copy) -> int:
    """Run tests, {name: seconds}, until one fails. -> as Copy.run"""
    files = {test.partition("::")[0] for test in tests}
    return copy.run(functools.partial(Chosen, tests), "-x", *sorted(files))


# ------------------------------------------------------------------------------ choice and report


def changed_lines(root: Path, revision: str, file: str) -> set[int]:
    """Numbers of a file's lines that are new since a revision. Raises UserError for no revision."""
    command = ["git", "-C", str(root), "diff", "-U0", revision, "--", file]
    difference = subprocess.run(command, text=True, capture_output=True)
    if difference.returncode:
        raise UserError(f"--changed {revision}: {difference.stderr.strip()}")
    lines = set()
    for first, count in re.findall(r"^@@ .*\+(\d+)(?:,(\d+))? @@", difference.stdout, re.MULTILINE):
        lines.update(range(int(first), int(first) + int(count or 1)))
    return lines


def choose(root: Path, options: argparse.Namespace) -> list[Mutant]:
    """The mutants that the options ask for. Raises UserError for a file that is none of FILES."""
    mutants = []
    for file in options.files:
        if file not in FILES:
            raise UserError(f"{file} is none of these: {', '.join(FILES)}")
        found = mutants_of(file, (root / file).read_bytes())
        if options.changed:
            changed = changed_lines(root, options.changed, file)
            found = [mutant for mutant in found if changed.intersection(mutant.statement)]
        mutants += found

    if options.sample and options.sample < len(mutants):
        chosen = random.Random(0).sample(range(len(mutants)), options.sample)
        mutants = [mutants[i] for i in sorted(chosen)]
    return mutants


def try_all(
    mutants: list[Mutant],
    copy: Copy,
    kept: Path,
    results: dict[tuple, dict],
    options: argparse.Namespace,
) -> None:
    """Try each mutant that is not known yet, and add what is found to results and to its file."""
    budget = options.seconds
    record = measure(copy, kept, options.quick)
    write_bytecode(True)
    copy.run(object, "--collect-only")  # compiles the tests, once for all

    with (kept / "results.jsonl").open("a") as file:
        for mutant in tqdm(mutants, unit="mutant", disable=None):
            # Other tests, or more of them, may notice what these did not.
            known = results.get(mutant.key, {"code": None})
            same_tests = known["code"] == record["code"] and known["budget"] >= budget
            if known.get("noticed") or same_tests:
                continue

            start = time.monotonic()
            noticed, by = try_one(mutant, copy, record, budget)
            seconds = round(time.monotonic() - start, 2)
            found = {"noticed": noticed, "by": by, "seconds": seconds}
            found.update(code=record["code"], budget=budget)
            results[mutant.key] = found
            file.write(json.dumps({"mutant": mutant.key, **found}) + "\n")
            file.flush()


def read_results(kept: Path) -> dict[tuple, dict]:
    """{Mutant.key: whether it was noticed, and by what}"""
    path = kept / "results.jsonl"
    results = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        found = json.loads(line)
        results[tuple(found.pop("mutant"))] = found
    return results


def report(mutants: list[Mutant], results: dict[tuple, dict], equivalent: list[dict]) -> str:
    """Every mutant that no test noticed, but for those known to be equivalent; numbers by file."""
    entries = {(e["file"], e["function"], e["before"], e["after"]) for e in equivalent}
    numbers = defaultdict(Counter)
    lines = []
    for mutant in mutants:
        if mutant.key not in results:
            outcome = "not tried"
        elif results[mutant.key]["noticed"]:
            outcome = "noticed"
        elif mutant.key[:4] in entries:
            outcome = "equivalent"
        else:
            outcome = "not noticed"
            lines.append(f"{mutant.file}:{mutant.line} {mutant.function}")
            lines += [f"  - {mutant.before}", f"  + {mutant.after}"]
        numbers[mutant.file][outcome] += 1

    for file, function, before, after in sorted(entries - {mutant.key[:4] for mutant in mutants}):
        if file in numbers:
            lines.append(f"{EQUIVALENT} has what is no mutant: {function}: {before} -> {after}")

    outcomes = ("noticed", "equivalent", "not noticed", "not tried")
    lines += ["", f"{'':<24}" + "".join(f"{outcome:>13}" for outcome in outcomes)]
    for file, found in numbers.items():
        lines.append(f"{file:<24}" + "".join(f"{found[outcome]:>13}" for outcome in outcomes))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ command line


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__, "python -m tools.mutants")
    parser.set_defaults(files=FILES, changed=None, sample=None, seconds=30.0)
    parser.set_defaults(quick=False, report=False)
    parser.add_argument("files", nargs="*", metavar="FILE", help="files to plant in; default: all")
    parser.add_argument("--changed", metavar="REVISION", help="only what changed since then")
    parser.add_argument("--sample", type=int, metavar="N", help="only so many, drawn at random")
    parser.add_argument("--seconds", type=float, metavar="S", help="of tests a mutant; default: 30")
    parser.add_argument("--quick", action="store_true", help="only with tests that are not slow")
    parser.add_argument("--report", action="store_true", help="only tell what was found before")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, root: Path = ROOT) -> None:
    """The command line. Exits with 1 where a mutant was not noticed."""
    with readable_errors("tools.mutants", interrupted="the same command goes on"):
        options = parse(arguments)
        mutants = choose(root, options)
        kept = root / "build" / "mutants"
        kept.mkdir(parents=True, exist_ok=True)
        results = read_results(kept)
        if not options.report:
            with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
                try_all(mutants, Copy(root, Path(folder)), kept, results, options)

        path = root / EQUIVALENT
        equivalent = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        print(report(mutants, results, equivalent.get("equivalent", [])))


if __name__ == "__main__":
    main()
