"""The small faults that tools/mutants.py plants: what a tired colleague might have written instead.

Each is an edit of a few bytes, so that all around it stays as it is. `*()` and `**{}` stand where
an argument, or an item of a list or a dictionary, was forgotten. Texts for people, docstrings and
type annotations have no faults here.
"""

import ast
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from operator import attrgetter
from typing import NamedTuple

SWAPPED = {  # operator -> what is written instead
    **{
        "<": "<=",
        "<=": "<",
        ">": ">=",
        ">=": ">",
        "==": "!=",
        "!=": "==",
        "and": "or",
        "or": "and",
    },
    **{"is": "is not", "is not": "is", "in": "not in", "not in": "in", "+": "-", "-": "+"},
    **{"*": "/", "/": "*", "//": "/", "%": "//", "**": "*", "&": "|", "|": "&", ">>": "<<"},
}
SWAPPED_CALLS = {"min": "max", "max": "min", "any": "all", "all": "any"}
UNWRAPPED_CALLS = {"sorted", "reversed", "list", "tuple", "set", "int", "float", "abs", "round"}

# What only checks, only explains, or makes a difference on other machines only.
ARGUMENTS_LEFT_ALONE = {"strict", "encoding", "help"}
CALLS_LEFT_ALONE = {"print", "isinstance", "UserError"}
FIELDS_LEFT_ALONE = {"annotation", "returns", "decorator_list"}


class Edit(NamedTuple):
    """A piece of a file, in bytes, and what takes its place."""

    start: int
    end: int
    text: str


class Mutant(NamedTuple):
    """A file with one fault. An edit elsewhere in the file changes its lines and nothing else."""

    file: str
    function: str
    before: str  # the lines that change
    after: str
    number: int  # counts mutants that are equal in all of the above
    line: int
    statement: range  # lines of the statement that the fault is in
    content: bytes  # of the whole file

    @property
    def key(self) -> tuple:
        return self[:5]


def mutants_of(file: str, content: bytes) -> list[Mutant]:
    """Every mutant of a Python file, in the order of its lines."""
    source = Source(content)
    found = {}
    seen = Counter()
    for function, statement, edit in source.edits(ast.parse(content), "module", range(0)):
        changed = content[: edit.start] + edit.text.encode() + content[edit.end :]
        if changed in found or changed == content:  # f(a, a), the other way round
            continue

        # The lines that the edit touches.
        first = content.count(b"\n", 0, edit.start)
        last = content.count(b"\n", 0, edit.end) + 1
        start, end = source.starts[first], source.starts[last]
        before = one_line(content[start:end])
        after = one_line(changed[start : end + len(changed) - len(content)])

        what = (file, function, before, after)
        found[changed] = Mutant(*what, seen[what], first + 1, statement, changed)
        seen[what] += 1
    return sorted(found.values(), key=attrgetter("line"))


def one_line(text: bytes) -> str:
    return " ".join(text.decode().split())


def names_in(node: ast.AST) -> set[str]:
    return {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}


class Source:
    """A file's text, and the edits that plant faults in it."""

    def __init__(self, content: bytes):
        self.content = content
        self.imported = set()
        self.starts = [0]
        for line in content.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def start(self, node: ast.AST) -> int:
        return self.starts[node.lineno - 1] + node.col_offset

    def end(self, node: ast.AST) -> int:
        return self.starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, start: int, end: int) -> str:
        return self.content[start:end].decode()

    def replaced(self, node: ast.AST, text: str) -> Edit:
        return Edit(self.start(node), self.end(node), text)

    def swapped(self, left: ast.AST, right: ast.AST) -> Iterator[Edit]:
        """Another operator between two operands, if there is one that might be taken for it."""
        start, end = self.end(left), self.start(right)
        between = self.text(start, end)
        operator = " ".join(re.sub("[()]", " ", between).split())
        if operator in SWAPPED:
            yield Edit(start, end, between.replace(operator, SWAPPED[operator], 1))

    def edits(
        self, node: ast.AST, function: str, statement: range
    ) -> Iterator[tuple[str, range, Edit]]:
        """Every fault in a node and below it, with the function and the statement it is in."""
        if is_left_alone(node):
            return
        if isinstance(node, ast.Import | ast.ImportFrom):
            self.imported |= {x.asname or x.name.partition(".")[0] for x in node.names}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            function = node.name if function == "module" else f"{function}.{node.name}"
        if isinstance(node, ast.stmt | ast.ExceptHandler):
            # What has a body is its first lines only.
            body = getattr(node, "body", [])
            end = max(node.lineno + 1, body[0].lineno) if body else node.end_lineno + 1
            statement = range(node.lineno, end)

        for edit in self.faults(node):
            yield function, statement, edit
        for name, value in ast.iter_fields(node):
            below = value if isinstance(value, list) else [value]
            for child in below:
                if isinstance(child, ast.AST) and name not in FIELDS_LEFT_ALONE:
                    yield from self.edits(child, function, statement)

    # ----------------------------------------------------------------------------- kinds of faults

    def faults(self, node: ast.AST) -> Iterator[Edit]:
        """What might be wrong with this node, those below it apart."""
        match node:
            # Values that are off by one, or by a factor.
            case ast.Constant(value=bool(value)):
                yield self.replaced(node, str(not value))
            case ast.Constant(value=int(value)):
                yield self.replaced(node, str(value + 1))
                yield self.replaced(node, str(value - 1))
            case ast.Constant(value=float(value)):
                yield self.replaced(node, str(2 * value or 1.0))

            # Another operator, or none.
            case ast.Compare(left=left, comparators=[right]) | ast.BinOp(left=left, right=right):
                yield from self.swapped(left, right)
            case ast.UnaryOp(operand=operand):
                start, end = self.start(node), self.start(operand)
                yield Edit(start, end, re.sub(r"^(not|[~+-])\s*", "", self.text(start, end)))
            case ast.BoolOp(op=operator, values=values):
                neutral = "True" if isinstance(operator, ast.And) else "False"
                for left, right in itertools.pairwise(values):
                    yield from self.swapped(left, right)
                for value in values:
                    yield self.replaced(value, neutral)

            # Conditions that do not matter.
            case ast.If(test=test) | ast.IfExp(test=test):
                yield self.replaced(test, "True")
                yield self.replaced(test, "False")
            case ast.comprehension(ifs=conditions):
                for condition in conditions:
                    yield self.replaced(condition, "True")

            # Bounds and items that were forgotten.
            case ast.Slice(lower=lower, upper=upper):
                for bound in (lower, upper):
                    if bound is not None:
                        yield self.replaced(bound, "")
            case ast.Dict(keys=keys, values=values):
                for key, value in zip(keys, values, strict=True):
                    if key is not None:
                        yield Edit(self.start(key), self.end(value), "**{}")
            case ast.List(elts=items) | ast.Set(elts=items) | ast.Tuple(elts=items):
                for item in items:
                    if isinstance(item, ast.Constant) and isinstance(item.value, str):
                        yield self.replaced(item, "*()")
            case ast.ExceptHandler(type=ast.Tuple(elts=kinds)):
                for kind in kinds:
                    yield self.replaced(kind, "*()")

            case ast.Call():
                yield from self.faults_of_call(node)
            case ast.stmt():
                yield from self.faults_of_statement(node)

    def faults_of_call(self, node: ast.Call) -> Iterator[Edit]:
        """Another function or none at all; arguments that are forgotten or swapped."""
        arguments = node.args
        match node.func:
            case ast.Name(id=name) if name in SWAPPED_CALLS:
                yield self.replaced(node.func, SWAPPED_CALLS[name])
            case ast.Name(id=name) if name in UNWRAPPED_CALLS and len(arguments) == 1:
                inner = self.text(self.start(arguments[0]), self.end(arguments[0]))
                yield self.replaced(node, f"({inner})")
            case ast.Attribute(value=owner) if not self.is_imported(owner):
                # x.f(…) -> x; a bracket that closes behind x stays.
                start, end = self.end(owner), self.end(node)
                yield Edit(start, end, self.text(start, end).partition(".")[0])

        for keyword in node.keywords:
            if not is_left_alone(keyword):
                yield self.replaced(keyword, "**{}")

        # The last of several positional arguments may have a default.
        if len(arguments) > 1:
            yield self.replaced(arguments[-1], "*()")
        if isinstance(node.func, ast.Name) and node.func.id in ("min", "max"):
            return  # of which the order does not matter
        for one, other in itertools.pairwise(arguments):
            first, middle, last = self.end(one), self.start(other), self.end(other)
            swapped = self.text(middle, last) + self.text(first, middle)
            yield Edit(self.start(one), last, swapped + self.text(self.start(one), first))

    def faults_of_statement(self, node: ast.stmt) -> Iterator[Edit]:
        """A statement that was forgotten, or leaves a loop or a function in another way."""
        match node:
            # A method's call is left out by x.f() -> x already, see faults_of_call.
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=x))) if not self.is_imported(x):
                pass
            case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Return(value=None):
                yield self.replaced(node, "pass")

            # What changes something that was there before.
            case ast.AugAssign() | ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
                yield self.replaced(node, "pass")
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name in names_in(value):
                yield self.replaced(node, "pass")

            # Ways out.
            case ast.Return(value=value) if not isinstance(value, ast.Constant):
                yield self.replaced(node, "return None")
            case ast.Continue() | ast.Break():
                yield self.replaced(node, "pass")
                yield self.replaced(node, "break" if isinstance(node, ast.Continue) else "continue")

            case ast.FunctionDef(decorator_list=decorators):
                for decorator in decorators:
                    yield self.replaced(decorator, "(lambda f: f)")

    def is_imported(self, node: ast.AST) -> bool:
        """Whether this is a module or what comes from one, and no value that the code made."""
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and node.id in self.imported


def is_left_alone(node: ast.AST) -> bool:
    """Texts, and what nothing can go wrong with."""
    match node:
        case ast.JoinedStr():
            return True
        case ast.Call(func=ast.Name(id=name)):
            return name in CALLS_LEFT_ALONE
        case ast.keyword(arg=name):
            return name in ARGUMENTS_LEFT_ALONE
        case ast.If(test=ast.Compare(left=ast.Name(id="__name__"))):
            return True
    return False
