"""The mutation run: which faults it plants, and that it tells what a test notices and what not."""

import os
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT

from tools.faults import mutants_of

# ------------------------------------------------------------------------------------------ faults


def planted(text):
    """The lines that mutants of a piece of code have in place of its own."""
    return [mutant.after for mutant in mutants_of("a.py", text.encode())]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = a < b", ["x = a <= b"]),
        ("x = (a) == (b)", ["x = (a) != (b)"]),
        ("x = a is not b", ["x = a is b"]),
        ("x = a * (b - c)", ["x = a / (b - c)", "x = a * (b + c)"]),
        ("x = not a", ["x = a"]),
        ("x = ~(a | b)", ["x = (a | b)", "x = ~(a & b)"]),
        ("x = a and b", ["x = a or b", "x = True and b", "x = a and True"]),
        ("x = a or b", ["x = a and b", "x = False or b", "x = a or False"]),
        ("x = 7", ["x = 8", "x = 6"]),
        ("x = 0.5, 0.0", ["x = 1.0, 0.0", "x = 0.5, 1.0"]),
        ("x = True", ["x = False"]),
        ("x = a if b else c", ["x = a if True else c", "x = a if False else c"]),
        ("x = a[b:c]", ["x = a[:c]", "x = a[b:]"]),
        ("x = {'a': b, **c}", ["x = {**{}, **c}"]),
        ("x = ['a', b]", ["x = [*(), b]"]),
        ("x = [a for a in b if c]", ["x = [a for a in b if True]"]),
        ("x = min(a)", ["x = max(a)"]),
        ("x = min(a, b)", ["x = max(a, b)", "x = min(a, *())"]),
        ("x = sorted(a)", ["x = (a)"]),
        ("x = f(a, b=c)", ["x = f(a, **{})"]),
        ("x = f(a, b)", ["x = f(a, *())", "x = f(b, a)"]),
        ("x = f(a, a)", ["x = f(a, *())"]),
        ("x = (a + b).f()", ["x = (a + b)", "x = (a - b).f()"]),
        ("x = f(x)", ["pass"]),
        ("f()", ["pass"]),
        ("a.f()", ["a"]),
        ("a.b = c", ["pass"]),
        ("a[b] += c", ["pass"]),
        ("raise E(a)", ["pass"]),
        ("import m\nm.f()", ["pass"]),
        ("for a in b: continue", ["for a in b: pass", "for a in b: break"]),
        ("def f(): return a", ["def f(): return None"]),
        ("@d\ndef f(): pass", ["@(lambda f: f)"]),
        ("try: pass\nexcept (A, B): pass", ["except (*(), B): pass", "except (A, *()): pass"]),
    ],
)
def test_what_is_planted(text, expected):
    assert Counter(planted(text)) == Counter(expected)


@pytest.mark.parametrize(
    "text",
    [
        '"""Text."""',
        "x: Literal[1] = a",
        "def f(a: Literal[1]) -> Literal[2]: pass",
        "x = f'{a + 1}'",
        "x = zip(a, strict=True)",
        "x = isinstance(a, b)",
        "if __name__ == '__main__': main()",
    ],
)
def test_texts_and_annotations_are_left_alone(text):
    assert planted(text) == []


def test_a_mutant_says_where_it_is():
    text = "class A:\n    def f(self):\n        return g(\n            1,\n        )\n"
    first, *_, last = mutants_of("a.py", text.encode())
    assert (first.function, first.line, first.after) == ("A.f", 3, "return None")
    assert (last.function, last.line, last.before, last.after) == ("A.f", 4, "1,", "0,")
    assert list(last.statement) == [3, 4, 5]
    assert last.content.decode() == text.replace("1", "0")


def test_an_edit_elsewhere_changes_no_key():
    text = "def f():\n    a(1)\n    b()\n    b()\n"
    before = [mutant.key for mutant in mutants_of("a.py", text.encode())]
    after = [mutant.key for mutant in mutants_of("a.py", f"# Ä\nx = y\n{text}".encode())]
    assert before == after
    assert len(set(before)) == len(before)


# ------------------------------------------------------------------------------------- a whole run

CODE = """
def clip(x):
    if x > 9:
        return 9
    return x

def empty(items):
    while items:
        items.pop()
    return items

def untested():
    return 5
"""
TESTS = """
import subprocess, sys
import pytest, tiny

@pytest.fixture(scope="module")
def clipped():
    return tiny.clip(12)

def test_the_fixture(clipped):
    pass

def test_what_is_clipped(clipped):
    assert clipped == 9

def test_what_is_not():
    assert tiny.clip(3) == 3

def test_another_process():
    code = "import tiny; sys.exit(tiny.empty([1]) != [])"
    assert subprocess.run([sys.executable, "-c", f"import sys; {code}"]).returncode == 0

def test_that_fails():
    assert tiny.clip(3) == 4
"""
EQUIVALENT = """
[[equivalent]]
file = "tiny.py"
function = "clip"
before = "if x > 9:"
after = "if x >= 9:"
reason = "both are 9"

[[equivalent]]
file = "tiny.py"
function = "clip"
before = "if x > 7:"
after = "if x >= 7:"
reason = "that was long ago"
"""
PROGRAM = """
import sys
from pathlib import Path
from tools import mutants
mutants.FILES = ["tiny.py"]
mutants.SLOW_IMPORTS = ()
mutants.MORE_SECONDS = 5
mutants.main(sys.argv[2:], Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A repository of one module and its tests."""
    root = tmp_path_factory.mktemp("mutants") / "tiny"
    (root / "tests").mkdir(parents=True)
    (root / "tiny.py").write_text(CODE)
    (root / "tests" / "test_tiny.py").write_text(TESTS)
    (root / "tests" / "equivalent_mutants.toml").write_text(EQUIVALENT)
    git(root, "init", "--quiet")
    git(root, "add", ".")
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    git(root, *identity, "commit", "--quiet", "--message", "All")
    return root


def git(root, *arguments):
    subprocess.run(["git", "-C", str(root), *arguments], check=True)


def run(root, *arguments):
    """-> what the mutation run prints, and its table of numbers by file"""
    pytest.importorskip("coverage")
    variables = {"PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": "-p no:hypothesispytest"}
    command = [sys.executable, "-c", PROGRAM, str(root), *arguments]
    done = subprocess.run(command, env=os.environ | variables, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stdout.splitlines()[-1].split()


@pytest.mark.slow
def test_what_no_test_notices_is_told(tiny):
    lines, numbers = run(tiny)
    told = [line for line in lines if line.startswith("  + ")]
    assert told == ["  + if x > 10:", "  + if x > 8:", "  + return 6", "  + return 4"]
    assert lines[lines.index("  + if x > 10:") - 2 :][:2] == ["tiny.py:3 clip", "  - if x > 9:"]

    # Those of `empty` are noticed in another process: it ends badly, or not at all.
    assert numbers == ["tiny.py", *("7", "1", "4", "0")]
    assert any("fail without any mutant: tests/test_tiny.py::test_that_fails" in x for x in lines)
    assert any("has what is no mutant: clip: if x > 7:" in line for line in lines)
    assert (tiny / "tiny.py").read_text() == CODE


@pytest.mark.slow
def test_only_what_is_not_known_is_tried(tiny):
    """What was not noticed is not known for good: more seconds may be more tests."""
    _, numbers = run(tiny)
    results = tiny / "build" / "mutants" / "results.jsonl"
    before = results.read_text()

    # As after an interruption.
    results.write_text("".join(before.splitlines(keepends=True)[:-2]))
    _, fewer = run(tiny, "--report")
    assert fewer == ["tiny.py", *("7", "1", "2", "2")]
    assert run(tiny)[1] == numbers
    assert len(results.read_text().splitlines()) == len(before.splitlines())

    assert run(tiny, "--seconds", "60")[1] == numbers
    assert len(results.read_text().splitlines()) == len(before.splitlines()) + 5


@pytest.mark.slow
def test_fewer_of_them(tiny):
    _, numbers = run(tiny, "--report", "--sample", "5")
    assert sum(map(int, numbers[1:])) == 5

    (tiny / "tiny.py").write_text(CODE.replace("return 5", "return 7"))
    _, numbers = run(tiny, "--report", "--changed", "HEAD")
    (tiny / "tiny.py").write_text(CODE)
    assert numbers == ["tiny.py", *("0", "0", "0", "2")]
