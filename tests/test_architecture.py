"""The layout of the package, read from its syntax trees: imports only point down."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "dpsgd"
FILES = sorted(PACKAGE.rglob("*.py"))
FOUNDATIONS = {"errors", "rng", "trees"}
LAYERS = {
    **dict.fromkeys([*FOUNDATIONS, "config", "kernels"], 0),
    **dict.fromkeys(["data", "models", "privacy"], 1),
    **dict.fromkeys(["clipping", "declared", "optim", "parallel"], 2),
    **dict.fromkeys(["evaluate", "checkpoint", "report"], 3),
    **dict.fromkeys(["features", "passes", "run", "sweep", "weights"], 4),
    **dict.fromkeys(["planning", "persistence", "non_private", "train"], 5),
    **dict.fromkeys(["feeding", "gradient_engine", "resumption"], 6),
    "assembly": 7,
    "audit": 8,
    "cli": 9,
    "__init__": 10,  # what the package offers: may name anything below
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(tree: ast.AST) -> set[str]:
    """Absolute names of all imported modules, wherever the import stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found.add(module)
            if module == "dpsgd":
                found |= {f"dpsgd.{alias.name}" for alias in node.names}
    return found


def imported_rooms(tree: ast.AST) -> set[str]:
    parts = [name.split(".") for name in imported_modules(tree)]
    return {part[1] for part in parts if part[0] == "dpsgd" and len(part) > 1}


def may_import(room: str, other: str) -> bool:
    if room == other:
        return room not in FOUNDATIONS
    if other in FOUNDATIONS:
        return room not in FOUNDATIONS
    return LAYERS[other] < LAYERS[room]


def functions(tree: ast.AST) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def body_lines(function: Function) -> int:
    """Lines of a function from `def` to its end, without its docstring."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        assert docstring.end_lineno is not None
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def is_stub(function: Function) -> bool:
    """Whether a function does nothing, unless it is abstract or torch asks for it."""
    if function.name == "setup_context":  # of autograd.Function, which needs one
        return False
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return all(isinstance(node, ast.Pass) for node in body) and not any(
        "abstractmethod" in ast.unparse(item) for item in function.decorator_list
    )


def public_definitions(tree: ast.Module) -> list[ast.AST]:
    """The module, and every public class and function outside of functions."""
    found: list[ast.AST] = [tree]
    for node in tree.body:
        if isinstance(node, ast.If):  # kernels are defined where triton is present
            continue
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            found.append(node)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found += [
                item
                for item in node.body
                if isinstance(item, Function) and not item.name.startswith("_")
            ]
    return found


@pytest.fixture(params=FILES, ids=name_of)
def path(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


@pytest.fixture
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def test_the_package_was_found() -> None:
    assert {"train.py", "rng.py"} <= {name_of(path) for path in FILES}
    assert {room_of(path) for path in FILES} == {*LAYERS}


def test_imports_only_point_down(path: Path, tree: ast.Module) -> None:
    room = room_of(path)
    wrong = {other for other in imported_rooms(tree) if not may_import(room, other)}

    assert not wrong, f"{room} imports {wrong}"


def test_the_readme_lists_every_room_above_those_that_it_imports() -> None:
    tree = (PACKAGE.parent / "README.md").read_text().partition("```text\ndpsgd/\n")[2]
    names = re.findall(r"^  ([a-z_]+)(?:/|\.py) ", tree.partition("```")[0], re.M)
    depths = [-1 if name in FOUNDATIONS else LAYERS[name] for name in names]

    assert {*names} == {*LAYERS} - {"__init__"}
    assert len(names) == len({*names})
    assert depths == sorted(depths, reverse=True)


def test_imports_are_absolute(tree: ast.Module) -> None:
    assert not {name for name in imported_modules(tree) if name.startswith(".")}


@pytest.mark.parametrize(
    ("room", "other", "allowed"),
    [
        ("train", "clipping", True),
        ("train", "report", True),  # its own test forbids it
        ("clipping", "train", False),
        ("clipping", "optim", False),
        ("models", "data", False),
        ("config", "errors", True),
        ("config", "kernels", False),
        ("rng", "errors", False),
        ("data", "data", True),
    ],
)
def test_the_rule_itself(room: str, other: str, allowed: bool) -> None:
    assert may_import(room, other) is allowed


def test_privacy_imports_no_torch() -> None:
    for path in (PACKAGE / "privacy").glob("*.py"):
        names = imported_modules(ast.parse(path.read_text()))
        assert not {name for name in names if name.split(".")[0] == "torch"}, path
        assert "trees" not in imported_rooms(ast.parse(path.read_text())), path


def test_train_does_not_import_the_report() -> None:
    tree = ast.parse((PACKAGE / "train.py").read_text())

    assert "report" not in imported_rooms(tree)


def test_no_file_is_a_drawer_for_odds_and_ends(path: Path) -> None:
    words = set(re.split(r"[/_.]", name_of(path)))

    assert not words & {"util", "utils", "common", "misc", "helpers"}


def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("folder", ["benchmarks", "bin", "examples", "tests"])
def test_files_around_the_package_are_short(folder: str) -> None:
    lengths = {
        path.name: len(path.read_text().splitlines())
        for path in (PACKAGE.parent / folder).rglob("*.py")
    }

    assert lengths
    assert not [name for name in lengths if lengths[name] > MAX_FILE_LINES]


def test_functions_are_short(tree: ast.Module) -> None:
    long = {
        node.name: body_lines(node)
        for node in functions(tree)
        if body_lines(node) > MAX_FUNCTION_LINES
    }

    assert not long


def test_public_definitions_have_docstrings(path: Path, tree: ast.Module) -> None:
    if not path.read_text():
        assert path.name == "__init__.py"
        return
    missing = [
        getattr(node, "name", "module")
        for node in public_definitions(tree)
        if not ast.get_docstring(node)  # type: ignore[arg-type]
    ]

    assert not missing


def test_no_exception_is_caught_blindly(tree: ast.Module) -> None:
    handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]

    assert not [node.lineno for node in handlers if node.type is None]
    assert not [
        node.lineno
        for node in handlers
        if all(isinstance(item, ast.Pass) for item in node.body)
    ]


def test_no_stubs(tree: ast.Module) -> None:
    assert not [node.name for node in functions(tree) if is_stub(node)]
    asserts = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert not [node.lineno for node in asserts if ast.unparse(node.test) == "False"]
    assert "NotImplementedError" not in ast.unparse(tree)


def test_source_is_ascii(path: Path) -> None:
    assert path.read_text().isascii()
