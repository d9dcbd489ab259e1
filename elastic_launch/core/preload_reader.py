"""Follow the statements of a program and of its own modules, for ``preload``."""

from __future__ import annotations

import _ast
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from elastic_launch.core.preload import SLOW, Import, Modules, Source

QUICK = frozenset(
    {"elastic_launch", "huggingface_hub", "joblib", "packaging", "safetensors", "tokenizers", "tqdm", "yaml"}
)
"""Packages that are as safe, but not worth a process of their own."""
PER_RANK = frozenset({"lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning", "torchmetrics"})
"""Packages that read a variable of their rank when they are imported."""
WITH_EFFECTS = frozenset({"antigravity", "distutils", "idlelib", "lib2to3", "readline", "rlcompleter", "site", "this"})
"""Modules of the standard library that do more than define something when they are imported."""

HARMLESS = frozenset(
    {
        *("bool", "dict", "float", "frozenset", "int", "isinstance", "len", "list", "range", "set", "str", "tuple"),
        *("collections.OrderedDict", "collections.defaultdict", "collections.deque", "collections.namedtuple"),
        *("dataclasses.field", "enum.auto", "functools.partial", "logging.getLogger", "re.compile", "time.time"),
        *(f"os.{name}" for name in ("cpu_count", "environ.get", "getcwd", "getenv", "getpid")),
        *(f"os.path.{name}" for name in ("abspath", "basename", "dirname", "exists", "expanduser", "isdir", "isfile")),
        *("os.path.join", "os.path.realpath", "pathlib.Path", "pathlib.PurePath"),
        *("typing.NamedTuple", "typing.NewType", "typing.ParamSpec", "typing.TypeVar", "typing.TypedDict"),
    }
)
"""Functions that only make a value, by full name."""
METHODS = frozenset(
    {"absolute", "encode", "endswith", "format", "join", "joinpath", "lower", "resolve", "rsplit", "split"}
    | {"startswith", "strip", "upper"}
)
"""Methods of texts and paths that only make a value."""
DECORATORS = frozenset(
    {"abc.abstractmethod", "classmethod", "contextlib.contextmanager", "dataclasses.dataclass", "functools.cache"}
    | {"functools.cached_property", "functools.lru_cache", "functools.wraps", "property", "staticmethod"}
    | {"torch.inference_mode", "torch.no_grad", "typing.final", "typing.overload"}
)
"""Decorators that change nothing but what they decorate."""

HOOKS = frozenset({"__class_getitem__", "__init_subclass__", "__mro_entries__", "__prepare__", "__set_name__"})
"""Functions that Python calls without a call in the source, when a class is defined or written with brackets."""

_NEXT_STATEMENT = re.compile(rb"^[^\s)\]}#]", re.MULTILINE)
_ONLY_AST = 0x400  # ast.PyCF_ONLY_AST, without importing ast, which takes longer than the rest of this
_CAUGHT = frozenset({"BaseException", "Exception", "ImportError", "ModuleNotFoundError"})
"""What an ``except`` names that catches the ImportError of a module that is missing."""


class _StopError(Exception):
    """A statement could make a difference."""


class _MissingError(Exception):
    """An import that will fail."""


def follow(
    program: Source, name: str, is_main: bool, last_line: int, modules: Modules, stdlib: Collection[str]
) -> tuple[list[Import], str]:
    """Follow a program's statements up to a line. Returns its imports, and why there are no more."""
    reader = _Reader(modules, stdlib)
    try:
        reader.read(program, name, is_main, last_line)
    except _StopError as stop:
        return reader.imports, str(stop)
    except _MissingError as missing:
        return reader.imports, f"there is no module {missing}"
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last one: too deeply nested
        return reader.imports, f"cannot be parsed: {error or type(error).__name__}"
    return reader.imports, ""


class _Reader:
    """Follows imports through the program's own modules."""

    def __init__(self, modules: Modules, stdlib: Collection[str]) -> None:
        self.modules = modules
        self.stdlib = stdlib
        self.imports: list[Import] = []
        self.loaded: dict[str, _Module | None] = {}
        """The modules that have been imported, by full name; None for those that are not the program's own."""

    def read(self, source: Source, name: str, is_main: bool = False, last_line: int | None = None) -> None:
        """Follow a file's statements, all of them or those up to a line.

        Raises:
            _StopError: one of them could make a difference.
        """
        self.loaded[name] = module = _Module(self, source, name, is_main)
        for parent in _parents(name):
            self.load(module, parent)
        module.last_line = last_line
        module.run(_parse(source, last_line).body)

    def load(self, module: _Module, name: str) -> bool:
        """Follow the import of one module, whose package has been imported. Returns whether it is the program's own."""
        if name not in self.loaded:
            if source := self.modules.own(name):
                self.read(source, name)
            elif not self.modules.exists(name):
                raise _MissingError(name)
            else:
                self.check(name.partition(".")[0], module)
                self.loaded[name] = None
        return self.loaded[name] is not None

    def check(self, package: str, module: _Module) -> None:
        """Check that importing an installed package makes no difference to later imports."""
        if package in PER_RANK:
            raise module.stop(f"{package} reads the worker's rank when it is imported")
        if package in WITH_EFFECTS or package not in SLOW | QUICK | set(self.stdlib):
            raise module.stop(f"{package} is not known to be safe")


class _Module:
    """Follows the statements of one file."""

    def __init__(self, reader: _Reader, source: Source, name: str, is_main: bool) -> None:
        self.reader = reader
        self.source = source
        self.name = name
        self.is_main = is_main
        self.line = 0
        self.last_line: int | None = None
        self.is_in_class = False
        self.bound: dict[str, str] = {}
        """Names of this file, with the full names of what imports have bound them to; empty: something else."""

    def stop(self, why: str = "") -> _StopError:
        """Return the exception that ends the search at the current statement."""
        lines = self.source.text.splitlines()
        text = lines[self.line - 1].strip().decode(errors="replace") if 0 < self.line <= len(lines) else ""
        why = why or f"{text[:60]}{'...' * (len(text) > 60)}: this could change what later imports do"
        return _StopError(f"{self.source.path}:{self.line}: {why}")

    def run(self, statements: Iterable[_ast.stmt]) -> None:
        """Follow statements in their order."""
        for statement in statements:
            if self.last_line is not None and statement.lineno > self.last_line:
                return
            self.line = statement.lineno
            _STATEMENTS.get(type(statement), _Module.unknown)(self, statement)

    # ---- statements

    def unknown(self, _: Any) -> None:
        """Stop: such statements may do anything."""
        raise self.stop()

    def nothing(self, _: Any) -> None:
        """Go on: it does nothing."""

    def import_(self, statement: Any) -> None:
        """``import a, b.c as d``."""
        for alias in statement.names:
            own = self.add(alias.name, ())
            bound = alias.name if alias.asname else alias.name.partition(".")[0]
            self.bound[alias.asname or bound] = "" if own else bound

    def import_from(self, statement: Any) -> None:
        """``from a.b import c as d, e``, also relative to this module."""
        base = statement.module or ""
        if statement.level:
            base = ".".join(filter(None, (self.package(statement.level), base)))
        names = tuple(alias.name for alias in statement.names)
        own = self.add(base, names)
        for alias in statement.names:
            self.bound[alias.asname or alias.name] = "" if own else f"{base}.{alias.name}"

    def package(self, level: int) -> str:
        """Return the package that a relative import with so many dots starts from."""
        parts = self.name.split(".") if self.source.is_package else self.name.split(".")[:-1]
        if len(parts) < level:
            raise self.stop()
        return ".".join(parts[: len(parts) - level + 1])

    def add(self, name: str, names: tuple[str, ...]) -> bool:
        """Follow the import of a module and of names from it. Returns whether it is the program's own."""
        line = self.line
        for module in (*_parents(name), name):
            is_own = self.reader.load(self, module)
            self.line = line
            if not is_own:  # what is in an installed package is its own affair
                self.reader.imports.append(Import(name, names))
                return False
        for each in names:
            full = f"{name}.{each}"
            loaded = self.reader.loaded[name]
            if loaded and each not in loaded.bound and self.reader.modules.exists(full):
                self.reader.load(self, full)
                self.line = line
        return True

    def function(self, statement: Any) -> None:
        """Check what of a function runs when it is defined, or without being called by name."""
        if statement.name in HOOKS or (statement.name == "__getattr__" and not self.is_in_class):
            raise self.stop()
        self.check_all(statement.args.defaults, statement.args.kw_defaults)
        if not self.has_lazy_annotations():
            arguments = statement.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            self.check_all([argument.annotation for argument in every if argument], [statement.returns])
        self.decorated(statement)

    def class_(self, statement: Any) -> None:
        """Check what of a class runs when it is defined, which is its whole body."""
        self.check_all(statement.bases, [keyword.value for keyword in statement.keywords])
        if any(self.full_name(base) == "type" for base in statement.bases):
            raise self.stop()  # its methods run when a class is defined
        self.is_in_class, was_in_class = True, self.is_in_class
        self.run(statement.body)
        self.is_in_class = was_in_class
        self.decorated(statement)

    def decorated(self, statement: Any) -> None:
        """Check a function's or class's decorators."""
        self.line = statement.lineno
        for decorator in statement.decorator_list:
            self.line = decorator.lineno
            function = decorator
            if type(decorator) is _ast.Call:
                self.check_all(decorator.args, [keyword.value for keyword in decorator.keywords])
                function = decorator.func
            is_property = type(function) is _ast.Attribute and function.attr in ("deleter", "getter", "setter")
            if not is_property and self.full_name(function) not in DECORATORS:
                raise self.stop()
        self.bound[statement.name] = ""

    def has_lazy_annotations(self) -> bool:
        """Return whether annotations are texts in this file."""
        return self.bound.get("annotations") == "__future__.annotations"

    def assign(self, statement: Any) -> None:
        """``a = b, c = value``: variables of the file only."""
        self.check(statement.value)
        for target in statement.targets:
            self.bind(target)

    def annotated(self, statement: Any) -> None:
        """``a: int = value``."""
        self.check_all([statement.value], [] if self.has_lazy_annotations() else [statement.annotation])
        self.bind(statement.target)

    def bind(self, target: Any) -> None:
        """Note that a variable of this file has a new value."""
        if type(target) in (_ast.Tuple, _ast.List):
            for each in target.elts:
                self.bind(each)
        elif type(target) is _ast.Starred:
            self.bind(target.value)
        elif type(target) is _ast.Name:
            self.bound[target.id] = ""
        else:
            raise self.stop()

    def expression(self, statement: Any) -> None:
        """A text between statements, for example."""
        self.check(statement.value)

    def if_(self, statement: Any) -> None:
        """Follow the branch that is taken, if that is certain."""
        test = statement.test
        if self.full_name(test) == "typing.TYPE_CHECKING":
            self.run(statement.orelse)
        elif type(test) is _ast.Compare and _is_name_of_main(test):
            self.run(statement.body if self.is_main else statement.orelse)
        else:
            raise self.stop()

    def try_(self, statement: Any) -> None:
        """Follow the body, and what follows if an import in it fails."""
        try:
            self.run(statement.body)
        except _MissingError:
            for handler in statement.handlers:
                kinds = handler.type.elts if type(handler.type) is _ast.Tuple else [handler.type]
                if any(kind is None or getattr(kind, "id", "") in _CAUGHT for kind in kinds):
                    self.run(handler.body)
                    break
            else:
                raise
        else:
            self.run(statement.orelse)
        self.run(statement.finalbody)

    # ---- expressions

    def full_name(self, node: Any) -> str:
        """Return the full name of what an expression names, as far as imports tell; empty if they do not."""
        if type(node) is _ast.Name:
            return self.bound.get(node.id, node.id)
        if type(node) is _ast.Attribute and (base := self.full_name(node.value)):
            return f"{base}.{node.attr}"
        return ""

    def check_all(self, *groups: Sequence[Any]) -> None:
        """Check expressions; None stands for one that is left out."""
        for group in groups:
            for node in group:
                if node is not None:
                    self.check(node)

    def check(self, node: Any) -> None:
        """Check that an expression only makes a value."""
        kind = type(node)
        if kind is _ast.Call:
            if not self.is_harmless(node.func):
                raise self.stop()
            self.check_all(node.args, [keyword.value for keyword in node.keywords])
        elif kind is _ast.Lambda:
            self.check_all(node.args.defaults, node.args.kw_defaults)
        elif kind not in _VALUES:
            raise self.stop()
        else:
            for field in _VALUES[kind]:
                value = getattr(node, field)
                self.check_all(value if isinstance(value, list) else [value])

    def is_harmless(self, function: Any) -> bool:
        """Return whether a function only makes a value."""
        if self.full_name(function) in HARMLESS:
            return True
        if type(function) is not _ast.Attribute or function.attr not in METHODS:
            return False
        owner = function.value
        while type(owner) is _ast.Attribute:  # Path(...).parent
            owner = owner.value
        if type(owner) not in (_ast.Constant, _ast.JoinedStr, _ast.Call):
            return False
        self.check(owner)
        return True


_STATEMENTS: dict[type[Any], Callable[[_Module, Any], None]] = {
    _ast.AnnAssign: _Module.annotated,
    _ast.Assign: _Module.assign,
    _ast.AsyncFunctionDef: _Module.function,
    _ast.ClassDef: _Module.class_,
    _ast.Expr: _Module.expression,
    _ast.FunctionDef: _Module.function,
    _ast.If: _Module.if_,
    _ast.Import: _Module.import_,
    _ast.ImportFrom: _Module.import_from,
    _ast.Pass: _Module.nothing,
    _ast.Try: _Module.try_,
}
"""What is done about each kind of statement. Any other kind ends the search."""

_VALUES: dict[type[Any], tuple[str, ...]] = {
    _ast.Attribute: ("value",),
    _ast.BinOp: ("left", "right"),
    _ast.BoolOp: ("values",),
    _ast.Compare: ("left", "comparators"),
    _ast.Constant: (),
    _ast.Dict: ("keys", "values"),
    _ast.FormattedValue: ("value",),
    _ast.IfExp: ("test", "body", "orelse"),
    _ast.JoinedStr: ("values",),
    _ast.List: ("elts",),
    _ast.Name: (),
    _ast.Set: ("elts",),
    _ast.Slice: ("lower", "upper", "step"),
    _ast.Starred: ("value",),
    _ast.Subscript: ("value", "slice"),
    _ast.Tuple: ("elts",),
    _ast.UnaryOp: ("operand",),
}
"""The kinds of expressions that only make a value if their parts do. (With values from calls that are not followed they
could do more, but these calls end the search.)"""


def _parse(source: Source, last_line: int | None) -> Any:
    """Parse a file, all of it or at least to the end of the statement in a line. Imports are often its first tenth.

    If the file cannot be divided there, because the next line that looks like a statement is within a text, for
    example, all of it is parsed.
    """
    if last_line is not None:
        lines = source.text.splitlines(keepends=True)
        end = sum(map(len, lines[:last_line]))
        if following := _NEXT_STATEMENT.search(source.text, end):
            try:
                return compile(source.text[: following.start()], source.path, "exec", _ONLY_AST, dont_inherit=True)
            except SyntaxError:
                pass
    return compile(source.text, source.path, "exec", _ONLY_AST, dont_inherit=True)


def _parents(name: str) -> list[str]:
    """Return the packages that a module is in, outermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _is_name_of_main(test: Any) -> bool:
    """Return whether an expression is ``__name__ == "__main__"``."""
    sides = [test.left, *test.comparators]
    return (
        [type(operator) for operator in test.ops] == [_ast.Eq]
        and {getattr(side, "id", "") for side in sides} == {"__name__", ""}
        and {getattr(side, "value", "") for side in sides} == {"__main__", ""}
    )
