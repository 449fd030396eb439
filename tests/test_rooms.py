# SPDX-License-Identifier: Apache-2.0
"""Keeps the house in order: every operator in every room, budgets, arrows between packages, and paths that exist."""

import ast
import inspect
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import hourllava_ext
from hourllava_ext import reference
from hourllava_ext.gpu import triton_kernels

ROOT = Path(__file__).resolve().parents[1]
# Room: the suffix of the files that belong to one operator each. A room counts from the day its folder exists.
ROOMS = {
    "csrc/ops": ".cpp",
    "csrc/cpu": ".cpp",
    "csrc/cuda": ".cu",
    "hourllava_ext/ops": ".py",
    "hourllava_ext/triton": ".py",
    "tests/ops": ".py",
    "benchmarks/ops": ".py",
}
# Files of a room that several operators share; headers have a suffix of their own.
SHARED = {"__init__", "conftest", "arguments", "common"}
# Its speed is that of tensor cores: Triton's kernel serves every GPU until one in CUDA has been run and beats it.
WITHOUT_CUDA = {"paged_attention"}
SOURCE_FOLDERS = ("csrc", "hourllava_ext", "python", "benchmarks", "tests")
CPP_SUFFIXES = {".cpp", ".h", ".cu", ".cuh"}

# Who may import whom, lowest floor first: a module imports only from lower floors and from its own package.
FLOORS = [
    {"memory", "video"},
    {"model"},
    {"data"},
    {"serve", "train", "evaluate", "modules"},
    {"cli"},
    {"demo", "__main__"},
]
SHARED_BY_ALL = {"errors"}


def sources(*suffixes: str) -> list[Path]:
    """Every source file of the project with one of these suffixes."""
    found = [p for folder in SOURCE_FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
    return sorted(found + [p for p in ROOT.iterdir() if p.suffix in suffixes])


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def schema_names() -> set[str]:
    """Names of the operators registered in the namespace, without overloads."""
    registered = torch._C._dispatch_get_all_op_names()
    return {n.split("::")[1].split(".")[0] for n in registered if n.startswith("hourllava_ext::")}


def stem(operator: str) -> str:
    """The word that names the operator in every room: no `_backward`, no in-place underscore."""
    return operator.removesuffix("_backward").rstrip("_")


OPERATORS = sorted({stem(n) for n in schema_names()})


def stems_in(room: str) -> set[str]:
    """The operators that have a file in this room; suffixes such as `_sm90` and `_backward` belong to the operator."""
    files = [p for p in (ROOT / room).iterdir() if p.suffix == ROOMS[room] and p.stem not in SHARED]
    return {stem(re.sub(r"_sm\d+$", "", p.stem.removeprefix("test_"))) for p in files}


def test_exports_are_the_schemas() -> None:
    assert {stem(n) for n in hourllava_ext.__all__} == set(OPERATORS)


@pytest.mark.parametrize("room", [r for r in ROOMS if (ROOT / r).is_dir()])
def test_every_operator_is_in_the_room(room: str) -> None:
    assert stems_in(room) == set(OPERATORS) - (WITHOUT_CUDA if room == "csrc/cuda" else set())


@pytest.mark.skipif(find_spec("triton") is None, reason="NO TRITON: its room is NOT CHECKED; pip install triton")
def test_triton_serves_every_schema() -> None:
    """Each registered operator, backward ones too, has a Triton function with the arguments of its schema."""
    kernels = triton_kernels()
    assert set(kernels) == schema_names()
    for operator, kernel in kernels.items():
        schema = getattr(torch.ops.hourllava_ext, operator).default._schema
        given = [(p.name, p.default) for p in inspect.signature(kernel).parameters.values()]
        wanted = [
            (a.name, a.default_value if a.has_default_value() else inspect.Parameter.empty) for a in schema.arguments
        ]
        assert given == wanted, operator


@pytest.mark.parametrize("operator", sorted(hourllava_ext.__all__))
def test_signature_is_the_reference_s(operator: str) -> None:
    public = inspect.signature(getattr(hourllava_ext, operator), eval_str=True)
    assert public == inspect.signature(getattr(reference, operator), eval_str=True)


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_is_tested_as_promised(operator: str) -> None:
    test = (ROOT / "tests/ops" / f"test_{operator}.py").read_text()
    public = (ROOT / "hourllava_ext/ops" / f"{operator}.py").read_text()
    promised = ["opcheck(", "fullgraph", "pytest.raises(", f"reference.{operator}"]
    if "register_autograd" in public:
        promised.append("gradcheck(")
    assert [p for p in promised if p not in test] == []


def test_kernels_header_declares_every_operator() -> None:
    header = (ROOT / "csrc/kernels.h").read_text()
    assert [o for o in OPERATORS if not re.search(rf"\b{o}(_\w+)?\(", header)] == []


def test_kernels_know_no_torch() -> None:
    files = [p for p in sources(*CPP_SUFFIXES) if name(p).startswith(("csrc/cpu/", "csrc/cuda/", "csrc/kernels.h"))]
    torch_name = re.compile(r"#\s*include\s*[<\"](torch|ATen|c10)\b|\b(torch|at|c10)::")
    assert files
    assert [name(p) for p in files if torch_name.search(p.read_text())] == []


def test_one_switch_in_the_environment() -> None:
    # `patch_environment` takes back what accelerate leaves there by itself.
    reads = re.compile(r"(?<!patch_)environ|getenv|\$ENV\{")
    found = []
    for path in sources(".py", ".txt", ".toml", *CPP_SUFFIXES):
        if path == Path(__file__).resolve():
            continue
        # The tests' two: whether a skip for want of a GPU is a failure, and Triton's own, which it asks on import.
        allowed = r"HOURLLAVA_EXT_CUDA" if name(path) == "setup.py" else r"FAIL_WITHOUT_CUDA|TRITON_INTERPRET"
        ours = name(path) == "setup.py" or name(path).startswith("tests/")
        lines = [line for line in path.read_text().splitlines() if reads.search(line)]
        found += [f"{name(path)}: {line.strip()}" for line in lines if not ours or not re.search(allowed, line)]
    assert found == []


def test_files_are_short() -> None:
    def budget(path: Path) -> int:
        if path.suffix == ".py":
            return 400
        return 700 if "attention" in path.stem else 500

    lengths = {path: len(path.read_text().splitlines()) for path in sources(".py", *CPP_SUFFIXES)}
    assert {name(p): n for p, n in lengths.items() if n > budget(p)} == {}


def python_functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in sources(".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name(path)}:{node.name}", node


def cpp_functions() -> Iterator[tuple[str, int]]:
    """Blocks that open and close in the first column, as clang-format leaves every function, with their line counts."""
    for path in sources(*CPP_SUFFIXES):
        start, title = 0, ""
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.match(r"[A-Za-z_]", line):
                title = line
            if line.endswith("{") and not re.match(r"(inline )?namespace|extern", line) and not start:
                start = number
            elif line.startswith("}") and start:
                if not re.match(r"struct|class|enum|union", title):
                    yield f"{name(path)}:{start}", number - start + 1
                start = 0


def test_functions_are_short() -> None:
    lengths = [(where, (node.end_lineno or node.lineno) - node.lineno + 1) for where, node in python_functions()]
    assert [f"{where}: {n} lines" for where, n in [*lengths, *cpp_functions()] if n > 60] == []


def test_functions_take_few_parameters() -> None:
    def count(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        given = [a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
        return len([a for a in given if a not in ("self", "cls")])

    # A function may mirror the schema of a backward operator, which takes all it needs.
    exempt = re.compile(r"_\w+|\w+_backward")
    public = [(where, count(node)) for where, node in python_functions() if not exempt.fullmatch(node.name)]
    assert [f"{where}: {n} parameters" for where, n in public if n > 10] == []


def test_init_files_only_export() -> None:
    def exports(node: ast.stmt) -> bool:
        # A module's `__getattr__` exports late, from a table of names; `if TYPE_CHECKING` is that table for mypy.
        if isinstance(node, ast.If):
            return ast.unparse(node.test) == "TYPE_CHECKING" and all(map(exports, node.body))
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        late = isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
        return docstring or late or isinstance(node, ast.Import | ast.ImportFrom | ast.Assign)

    files = [p for p in sources(".py") if p.name == "__init__.py"]
    assert [name(p) for p in files if not all(map(exports, ast.parse(p.read_text()).body))] == []


def imported_modules(path: Path, module: str) -> Iterator[str]:
    """Absolute names of the modules that a file imports anywhere, relative imports resolved against ``module``."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            # `from hourllava import video` names a package, too.
            names = [f"hourllava.{alias.name}" for alias in node.names]
            yield from names if target == "hourllava" else [target]


def floor(package: str) -> int:
    """0 for the lowest floor; a package that stands on none counts as below all, and nothing of ours is below it."""
    return next((number for number, names in enumerate(FLOORS) if package in names), -1)


def test_imports_point_down() -> None:
    wrong = []
    for path in sorted((ROOT / "python/hourllava").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT / "python").with_suffix("").parts).removesuffix(".__init__")
        if module == "hourllava":
            continue
        own = module.split(".")[1]
        for target in imported_modules(path, module):
            if not target.startswith("hourllava.") or target.split(".")[1] in {own, *SHARED_BY_ALL}:
                continue
            if floor(own) <= floor(target.split(".")[1]):
                wrong.append(f"{module} imports {target}")
    assert wrong == []


def test_kernel_library_stands_alone() -> None:
    upward = re.compile(r"^\s*(from|import) hourllava\b(?!_ext)", re.MULTILINE)
    assert [name(p) for p in (ROOT / "hourllava_ext").rglob("*.py") if upward.search(p.read_text())] == []


def test_reference_is_for_tests() -> None:
    reads = re.compile(r"hourllava_ext(\.| import .*\b)reference\b")
    assert [name(p) for p in (ROOT / "python/hourllava").rglob("*.py") if reads.search(p.read_text())] == []


def mentioned_paths(text: str) -> set[str]:
    """Repository paths in a document: what lies below a source folder, and bare file names."""
    below_folder = re.findall(rf"(?<![\w/.-])((?:{'|'.join(SOURCE_FOLDERS)}|\.ci)/[\w./<>-]*)", text)
    bare = re.findall(r"`([\w.-]+\.(?:py|toml|md|txt|yaml|cpp|h))`", text)
    spelled = {path.rstrip(".") for path in [*below_folder, *bare]}
    return {path.replace("<op>", operator) for path in spelled for operator in OPERATORS}


DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("python/*/*/README.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_paths_in_documents_exist(document: Path) -> None:
    text = document.read_text()
    assert sorted(p for p in mentioned_paths(text) if not (ROOT / p).exists()) == []
    linked = [t for t in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in t]
    assert sorted(t for t in linked if not (document.parent / t).exists()) == []


def test_documents_are_found() -> None:
    assert {"README.md", "CONTRIBUTING.md", "benchmarks/README.md"} <= {name(p) for p in DOCUMENTS}
    assert len(DOCUMENTS) >= 7
