"""Style as a test: sizes, names, docstrings, dead modules, and who may touch time, chance and the terminal."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MODULE_LINES_MAX = 500
FUNCTION_LINES_MAX = 50
FUNCTION_LINES_HARD_MAX = 70
MODULE_SENTENCES_MAX = 3

# "module:function" -> why it reads better in one piece. Up to the hard maximum, and only while it is needed.
LONG_FUNCTIONS: dict[str, str] = {}
# These three carry the theory of the whole: the error tree, the lifecycle, the walk of the data.
ESSAYS = {"batchrunner.errors", "batchrunner.lifecycle", "batchrunner.pipeline"}
# Real clocks and real chance live behind the ports; the simulator is a server of its own.
REAL_TIME = re.compile(r"batchrunner\.(clock|simulate)(\..*)?")
ENTRY_POINTS = re.compile(r"batchrunner(\.__main__|\.cli|\.store\.migrations\..*)?")
EDGES = re.compile(
    r"(clock|tuning|durable|session_locks|simulate|store|blobs|upstream\w*|poster|client|processes|child|supervisor|app"
    r"|hosting|serving|working|queue_pages|api|delivering|webhook_client|dashboard|cli)?|__main__"
)

TIME_AND_CHANCE = re.compile(
    r"time\.(time|time_ns|monotonic|monotonic_ns|perf_counter|perf_counter_ns|clock_gettime|sleep)"
    r"|datetime\.(datetime|date)\.(now|utcnow|today)"
    r"|random\.\w+"
    r"|asyncio\.sleep"
)
IMPURE = {"aiohttp", "boto3", "botocore", "sqlalchemy", "sqlite3", "click", "os"}
VAGUE_MODULES = {"common", "constants", "helpers", "managers", "misc", "types", "utils"}
VAGUE_WORDS = {"data", "helper", "info", "manager", "util"}
# asyncio.Protocol calls its methods by these names.
GIVEN_NAMES = {"data_received"}
LOG_METHODS = {"debug", "info", "warning", "error", "exception", "critical", "log"}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One parsed source file."""

    path: Path
    name: str
    text: str
    tree: ast.Module

    def at(self, node: ast.stmt | ast.expr | ast.ExceptHandler) -> str:
        """Name a place the way an editor opens it."""
        return f"{self.path.relative_to(ROOT)}:{node.lineno}"


@cache
def modules(folder: str) -> tuple[Module, ...]:
    """Parse every module below a folder of the repository, in path order."""
    return tuple(parse(path) for path in sorted((ROOT / folder).rglob("*.py")))


def parse(path: Path) -> Module:
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    text = path.read_text(encoding="utf-8")
    return Module(path=path, name=name, text=text, tree=ast.parse(text))


def functions(module: Module) -> Iterator[tuple[str, Function]]:
    """Give every function with its dotted name, methods and nested ones too."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield f"{prefix}{child.name}", child
            yield from walk(child, f"{prefix}{child.name}." if isinstance(child, Definition) else prefix)

    yield from walk(module.tree, "")


def body_lines(function: Function) -> int:
    """Count lines from the first statement after the docstring to the last."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body:
        return 0
    return (function.end_lineno or 0) - body[0].lineno + 1


def imports(module: Module) -> Iterator[tuple[str, str, ast.stmt]]:
    """Give (local name, dotted origin, statement) of every import, wherever it stands."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.partition(".")[0]
                yield local, alias.name if alias.asname else local, node
                if not alias.asname and local != alias.name:
                    yield "", alias.name, node
        elif isinstance(node, ast.ImportFrom):
            base = origin(module, node)
            for alias in node.names:
                yield alias.asname or alias.name, f"{base}.{alias.name}", node


def origin(module: Module, node: ast.ImportFrom) -> str:
    """Give the absolute name of the module that a `from` statement reads."""
    if not node.level:
        return node.module or ""
    is_package = module.path.name == "__init__.py"
    package = module.name.split(".")
    package = package[: len(package) - node.level + (1 if is_package else 0)]
    return ".".join([*package, node.module] if node.module else package)


def uses(module: Module, pattern: re.Pattern[str]) -> Iterator[tuple[str, ast.expr]]:
    """Find every name or attribute whose dotted origin matches, however it was imported."""
    known = {local: dotted for local, dotted, _ in imports(module) if local}
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Name | ast.Attribute):
            continue
        dotted = dotted_name(node, known)
        if dotted and pattern.fullmatch(dotted):
            yield dotted, node


def dotted_name(node: ast.expr, known: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute) and (base := dotted_name(node.value, known)):
        return f"{base}.{node.attr}"
    return None


def top_level_name(module: Module) -> str:
    """Give the word by which DESIGN's layers know a module: `store` for `batchrunner.store.tables`."""
    return module.name.partition(".")[2].partition(".")[0]


def documented_elsewhere(node: Definition) -> bool:
    """An overload, a setter or an override is a variation of something that has its docstring."""
    decorators = {ast.unparse(each).rpartition(".")[2] for each in node.decorator_list}
    return bool(decorators & {"overload", "setter", "override"})


def public_definitions(tree: ast.Module) -> Iterator[Definition]:
    """Give functions and classes of a module, and the methods and inner classes of its public classes."""
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node
            members = node.body if isinstance(node, ast.ClassDef) else []
            yield from (each for each in members if isinstance(each, Definition) and not each.name.startswith("_"))


def test_modules_are_at_most_500_lines() -> None:
    too_long = {
        module.name: lines
        for folder in ("batchrunner", "bench")
        for module in modules(folder)
        if (lines := len(module.text.splitlines())) > MODULE_LINES_MAX
    }

    assert too_long == {}


def test_functions_are_at_most_50_lines() -> None:
    lengths = {
        f"{module.name}:{name}": body_lines(function)
        for module in modules("batchrunner")
        for name, function in functions(module)
    }
    too_long = {
        place: length
        for place, length in lengths.items()
        if length > (FUNCTION_LINES_HARD_MAX if place in LONG_FUNCTIONS else FUNCTION_LINES_MAX)
    }
    excused_for_nothing = [place for place in LONG_FUNCTIONS if lengths.get(place, 0) <= FUNCTION_LINES_MAX]

    assert too_long == {}
    assert excused_for_nothing == []


def test_modules_say_in_a_few_sentences_what_they_hold() -> None:
    wrong = []
    for module in modules("batchrunner"):
        docstring = ast.get_docstring(module.tree) or ""
        sentences = len(re.findall(r"[.!?](?=\s|$)", docstring))
        if not docstring or (sentences > MODULE_SENTENCES_MAX and module.name not in ESSAYS):
            wrong.append(f"{module.name}: {sentences} sentences")

    assert wrong == []


def test_public_names_have_docstrings() -> None:
    bare = [
        f"{module.at(node)} {node.name}"
        for module in modules("batchrunner")
        for node in public_definitions(module.tree)
        if not ast.get_docstring(node) and not documented_elsewhere(node)
    ]

    assert bare == []


def strings(module: Module) -> set[str]:
    """Collect every string constant."""
    values = (node.value for node in ast.walk(module.tree) if isinstance(node, ast.Constant))
    return {value for value in values if isinstance(value, str)}


def test_every_module_is_imported_by_another() -> None:
    """Lazy loading counts: a string that is a module's full name or, in a package, the name of one of its modules."""
    known = {module.name for module in modules("batchrunner")}
    if "batchrunner.cli.run" not in known:
        pytest.skip("no command yet that ties the modules together")
    wanted: set[str] = set()
    for module in modules("batchrunner"):
        named = {dotted for _, dotted, _ in imports(module)}
        named |= {dotted.rpartition(".")[0] for dotted in named}
        texts = strings(module)
        named |= texts | {f"{module.name}.{text}" for text in texts if module.path.name == "__init__.py"}
        wanted |= named - {module.name}
    packages = {name.rpartition(".")[0] for name in wanted}

    dead = sorted(name for name in known - wanted - packages if not ENTRY_POINTS.fullmatch(name))

    assert dead == []


def test_time_and_chance_come_through_the_ports() -> None:
    direct = [
        f"{module.at(node)} {dotted}"
        for module in modules("batchrunner")
        if not REAL_TIME.fullmatch(module.name)
        for dotted, node in uses(module, TIME_AND_CHANCE)
        if not (dotted == "asyncio.sleep" and is_zero_sleep(module, node))
    ]

    assert direct == []


def is_zero_sleep(module: Module, function: ast.expr) -> bool:
    """`sleep(0)` hands the loop over and takes no time."""
    return any(
        isinstance(node, ast.Call)
        and node.func is function
        and len(node.args) == 1
        and isinstance(node.args[0], ast.Constant)
        and node.args[0].value == 0
        for node in ast.walk(module.tree)
    )


def test_tests_do_not_sleep() -> None:
    """Tests await events, and so do the scripts that they run in processes of their own."""
    sleeps = [
        f"{module.at(node)} {dotted}"
        for module in modules("tests")
        for dotted, node in uses(module, re.compile(r"time\.sleep|asyncio\.sleep"))
        if not is_zero_sleep(module, node)
    ]
    scripts = [(module.name, text) for module in modules("tests") for text in strings(module)]
    scripts += [(path.name, path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("*.mjs")]
    sleeps += [name for name, text in scripts if re.search(r"\bsleep\((?!0\))|\bsetTimeout\(", text)]

    assert sleeps == []


def test_only_the_command_line_prints() -> None:
    prints = [
        module.at(node)
        for module in modules("batchrunner")
        if top_level_name(module) != "cli"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]

    assert prints == []


def test_broad_excepts_log_or_raise() -> None:
    swallowed = [
        module.at(handler)
        for module in modules("batchrunner")
        for handler in ast.walk(module.tree)
        if isinstance(handler, ast.ExceptHandler) and is_broad(handler) and not logs_or_raises(handler, module)
    ]

    assert swallowed == []


def is_broad(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(kind, ast.Name) and kind.id in {"Exception", "BaseException"} for kind in kinds)


def called_name(call: ast.Call) -> str:
    """Give the last word of what is called: `_fail` for `self._fail(...)`."""
    return ast.unparse(call.func).rpartition(".")[2]


def logs_or_raises(node: ast.AST, module: Module) -> bool:
    """By itself, through a future that is awaited elsewhere, or in the function of this module that gets the error."""
    local = {function.name: function for _, function in functions(module)}
    for each in ast.walk(node):
        if isinstance(each, ast.Raise):
            return True
        if not isinstance(each, ast.Call):
            continue
        name = called_name(each)
        is_logged = name in LOG_METHODS and "log" in ast.unparse(each.func)
        if is_logged or name == "set_exception":
            return True
        is_handed = isinstance(node, ast.ExceptHandler) and any(
            isinstance(argument, ast.Name) and argument.id == node.name for argument in each.args
        )
        if is_handed and name in local and logs_or_raises(local[name], module):
            return True
    return False


def test_core_is_pure() -> None:
    impure = [
        f"{module.at(node)} {dotted}"
        for module in modules("batchrunner")
        if not EDGES.fullmatch(top_level_name(module))
        for _, dotted, node in imports(module)
        if dotted.partition(".")[0] in IMPURE
    ]

    assert impure == []


def test_names_mean_something() -> None:
    vague = [
        module.name
        for module in modules("batchrunner")
        if is_vague(module.name.rpartition(".")[2]) or VAGUE_MODULES & set(module.name.split("."))
    ]
    vague += [
        f"{module.at(node)} {node.name}"
        for module in modules("batchrunner")
        for node in ast.walk(module.tree)
        if isinstance(node, Definition) and node.name not in GIVEN_NAMES and is_vague(node.name)
    ]

    assert vague == []


def is_vague(name: str) -> bool:
    """Split snake_case and CamelCase into words and look for one that says nothing."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_")
    return bool(VAGUE_WORDS & set(words))


def test_dataclasses_have_slots() -> None:
    loose = [
        f"{module.at(node)} {node.name}"
        for module in modules("batchrunner")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
        for decorator in node.decorator_list
        if ast.unparse(decorator).startswith(("dataclass", "dataclasses.dataclass"))
        and "slots=True" not in ast.unparse(decorator)
    ]

    assert loose == []


@pytest.mark.parametrize("folder", ["batchrunner", "tests", "bench", "sample_inputs"])
def test_nothing_is_left_for_later(folder: str) -> None:
    promise = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"]) + r")\b")

    left = [
        f"{module.path.relative_to(ROOT)}:{number}"
        for module in modules(folder)
        for number, line in enumerate(module.text.splitlines(), start=1)
        if promise.search(line)
    ]

    assert left == []
