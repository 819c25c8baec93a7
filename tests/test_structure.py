"""The shape of the code: how long files and functions may be, and what may import what."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sorted_llama import modeling_sorted_llama as model


ROOT = Path(__file__).parent.parent
PACKAGES = ["modeling_sorted_llama", "trainer", "hub_card", "examples"]  # each imports itself and those before it
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
TREES = {path: ast.parse(path.read_text()) for path in FILES}

MAX_FILE_LINES = 520
MAX_FUNCTION_LINES = 60  # without the docstring
MAX_BRANCHES = 15  # with those of the functions inside
LOOPS = (ast.For, ast.AsyncFor, ast.While, ast.comprehension)
BRANCHES = (ast.If, ast.IfExp, ast.BoolOp, ast.ExceptHandler, *LOOPS)

# Names of functions, as "folder/file.py function", and why each may be longer
EXCEPTIONS: dict[str, str] = {}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def function_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Every module that a file imports, by its whole name, with what it takes from it."""
    package = f"sorted_llama.{path.parent.relative_to(ROOT)}".replace("/", ".")
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = f"{package}.{node.module or ''}".rstrip(".") if node.level else node.module
            yield module, [alias.name for alias in node.names]


def imported_files(path: Path) -> set[Path]:
    """The project's files among what a file imports."""
    places = []
    for module, names in imports(path):
        if module == "sorted_llama":  # its public names are the packages, the model's and the trainer's
            of_names = ["modeling_sorted_llama" if name in model.__all__ else "trainer" for name in names]
            packages = [name if name in PACKAGES else package for name, package in zip(names, of_names, strict=True)]
            places += [ROOT / package for package in packages]
        elif module.startswith("sorted_llama."):
            place = ROOT.joinpath(*module.split(".")[1:])
            places += [place, *(place / name for name in names)]
        else:  # an example imports the one beside it by its bare name
            places.append(path.with_name(module))
    return {file for place in places for file in (Path(f"{place}.py"), place / "__init__.py")} & TREES.keys()


def test_no_file_is_longer_than_one_can_keep_in_mind():
    lines = {name_of(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > MAX_FILE_LINES} == {}


def test_no_function_is_too_long_or_branches_too_often():
    over = {}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines, branches = function_lines(node), sum(isinstance(child, BRANCHES) for child in ast.walk(node))
                if lines > MAX_FUNCTION_LINES or branches > MAX_BRANCHES:
                    over[f"{name_of(path)} {node.name}"] = f"{lines} lines, {branches} branches"
    assert over.keys() == EXCEPTIONS.keys(), over


def test_imports_point_one_way():
    """Examples use the Hub's page, which uses the trainer, which uses the model; never the other way round."""
    against = {
        f"{name_of(path)} imports {name_of(imported)}"
        for path in FILES
        for imported in imported_files(path)
        if PACKAGES.index(imported.relative_to(ROOT).parts[0]) > PACKAGES.index(path.relative_to(ROOT).parts[0])
    }
    assert against == set()


def test_no_modules_import_each_other_in_a_circle():
    graph = {name_of(path): {name_of(imported) for imported in imported_files(path)} for path in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


def test_private_names_of_other_libraries_are_imported_in_compat_alone():
    private = {
        f"{name_of(path)}: {module} {' '.join(names)}"
        for path in FILES
        for module, names in imports(path)
        if not module.startswith(("sorted_llama", "_", ".")) and path.stem != "compat_sorted_llama"
        if any(part.startswith("_") and not part.endswith("__") for part in [*module.split("."), *names])
    }
    assert private == set()


def installed_with(requirements: list[str], seen: set[str]) -> set[str]:
    """The distributions that `pip install` of these brings along."""
    for requirement in map(Requirement, requirements):
        name = canonicalize_name(requirement.name)
        extras = requirement.extras or {""}
        if f"{name}{sorted(extras)}" in seen:
            continue
        seen |= {name, f"{name}{sorted(extras)}"}
        try:
            needed = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:  # of another platform
            continue
        asked = [r for r in needed if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras)]
        installed_with([str(r).split(";")[0] for r in asked], seen)
    return seen


def test_make_install_brings_what_the_demo_imports():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["train"], *extras["demo"]]
    brought = installed_with([text for text in asked if not text.startswith("sorted-llama[")], set())
    files, found = [ROOT / "examples/demo.py"], set()
    while files:
        file = files.pop()
        if file not in found:
            found.add(file)
            files += imported_files(file)
    modules = {module.split(".")[0] for file in found for module, _ in imports(file)}
    modules -= sys.stdlib_module_names | {"sorted_llama"} | {file.stem for file in found}
    owners = packages_distributions()
    missing = {m for m in modules if not {canonicalize_name(name) for name in owners[m]} & brought}
    assert missing == {"openai"}  # for `judge` alone
