"""Who may know whom, and what the package shows to its users."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import pykernels

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pykernels"
OPS = sorted(path.parent.name for path in (PACKAGE / "ops").glob("*/__init__.py"))
# A thin layer over another op (retention) has no definition or registration of its own.
DEFINED = [op for op in OPS if op != "retention"]
CSRC = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu"))


def _imports(file: Path) -> list[tuple[str, tuple[str, ...], bool]]:
    """[(absolute module, names taken from it, at the top level?)] of a file of the package."""
    tree, result = ast.parse(file.read_text()), []
    package = ["pykernels", *file.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            result += [(alias.name, (), node in tree.body) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            result.append(
                (
                    ".".join([*base, *(node.module or "").split(".")]).strip("."),
                    tuple(alias.name for alias in node.names),
                    node in tree.body,
                )
            )
    return result


def _modules(file: Path) -> set[str]:
    """Every module that a file may be importing: `from a import b` counts as a and as a.b."""
    return {
        name
        for module, names, _ in _imports(file)
        for name in (module, *(f"{module}.{name}" for name in names))
    }


def test_the_ops_are_found():
    assert "flash_attention" in OPS


@pytest.mark.parametrize("op", DEFINED)
def test_a_reference_imports_nothing_but_torch(op):
    assert {module.split(".")[0] for module, _, _ in _imports(PACKAGE / "ops" / op / "reference.py")} <= {
        "torch",
        "__future__",
        "math",
    }


@pytest.mark.parametrize("op", DEFINED)
def test_only_the_second_derivative_and_the_reference_backend_know_a_reference(op):
    knowing = {
        file.name
        for file in (PACKAGE / "ops" / op).glob("*.py")
        if f"pykernels.ops.{op}.reference" in _modules(file)
    }
    assert knowing <= {"__init__.py", "registration.py"}
    # In registration, only inside the class whose backward is the second derivative.
    tree = ast.parse((PACKAGE / "ops" / op / "registration.py").read_text())
    for node in tree.body:
        uses = {
            name.value.id
            for name in ast.walk(node)
            if isinstance(name, ast.Attribute) and isinstance(name.value, ast.Name)
        }
        assert "reference" not in uses or isinstance(node, ast.ClassDef) and node.name == "_Backward", (
            ast.unparse(node)[:200]
        )


@pytest.mark.parametrize("op", OPS)
def test_an_op_takes_nothing_of_another_but_its_public_functions(op):
    for file in (PACKAGE / "ops" / op).glob("*.py"):
        for module, names, _ in _imports(file):
            other = re.match(r"pykernels\.ops\.(\w+)(.*)", module)
            if module == "pykernels.ops":
                assert not set(names) - {op}, f"{file}: from pykernels.ops import {names}"
            elif other and other[1] != op:
                public = __import__(module, fromlist=["__all__"]).__all__
                assert not other[2] and set(names) <= set(public), f"{file}: from {module} import {names}"


@pytest.mark.parametrize("op", OPS)
def test_triton_is_imported_only_when_it_runs(op):
    for file in (PACKAGE / "ops" / op).glob("*.py"):
        if file.name != "triton.py":
            at_import = {
                name
                for module, names, top in _imports(file)
                if top
                for name in (module, *(f"{module}.{n}" for n in names))
            }
            assert not {name for name in at_import if re.search(r"\btriton\b", name)}, file


@pytest.mark.parametrize("folder", ("nn", "compat"))
def test_layers_for_users_take_only_public_functions(folder):
    public = {f"pykernels.{name}" for name in pykernels.__all__}
    for file in (PACKAGE / folder).rglob("*.py"):
        inside = {(module, names) for module, names, _ in _imports(file) if module.split(".")[0] == "pykernels"}
        for module, names in inside:
            if module.startswith(f"pykernels.{folder}"):
                continue
            taken = {f"{module}.{name}" for name in names} if names else {module}
            of_ops = re.fullmatch(r"pykernels\.ops\.(\w+)", module)
            if of_ops:
                allowed = set(__import__(module, fromlist=["__all__"]).__all__) - {"OP", "DECODE_OP"}
                assert set(names) <= allowed, f"{file}: from {module} import {names}"
            else:
                assert taken <= public, f"{file}: {taken - public}"


def test_nothing_shipped_imports_what_users_may_lack():
    allowed = {"torch", "triton", "pykernels"}
    optional = {"transformers"} if (PACKAGE / "compat").exists() else set()
    import sys

    for file in PACKAGE.rglob("*.py"):
        for module, _, _ in _imports(file):
            top = module.split(".")[0]
            assert top in allowed | optional | set(sys.stdlib_module_names), f"{file} imports {module}"


def _includes(file: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', file.read_text(), re.MULTILINE)


def test_only_the_bindings_see_torch():
    assert any(
        "torch/csrc/stable" in name for file in CSRC if "csrc/torch" in str(file) for name in _includes(file)
    )
    for file in CSRC:
        if file.relative_to(ROOT / "csrc").parts[0] != "torch":
            text = file.read_text()
            assert not [
                name for name in _includes(file) if re.match(r"(torch|ATen|c10|pybind11|Python)\b", name)
            ], file
            assert not re.search(r"\b(at|c10|torch)::", re.sub(r"//.*", "", text)), file


def test_native_layers():
    """csrc/torch -> csrc/include <- csrc/{cpu,cuda} -> csrc/common, and nothing else."""
    allowed = {
        "torch": {"torch", "include"},
        "include": {"include", "common"},
        "cpu": {"cpu", "include", "common"},
        "cuda": {"cuda", "include", "common"},
        "common": {"common"},
    }
    for file in CSRC:
        layer = file.relative_to(ROOT / "csrc").parts[0]
        for name in _includes(file):
            target = (file.parent / name).resolve()
            if target.is_relative_to(ROOT / "csrc") and target.exists():
                other = target.relative_to(ROOT / "csrc").parts[0]
                # The bindings may also take the element types that the params structs are made of.
                assert other in allowed[layer] or (layer, target.name) == ("torch", "dtype.h"), (
                    f"{file} includes {name}"
                )


def test_cpu_kernels_use_no_standard_containers():
    """Their inline functions would be shared across instruction sets: the linker keeps one, maybe the wrong one."""
    for file in CSRC:
        if file.relative_to(ROOT / "csrc").parts[0] in ("cpu", "common"):
            if file.name in ("dispatch.cpp", "scratch.cpp"):
                continue  # compiled once, for the baseline
            c_headers = {
                "cstdint",
                "cstddef",
                "cstring",
                "cmath",
                "climits",
                "cfloat",
                "type_traits",
                "utility",
                "limits",
            }
            standard = {
                name for name in _includes(file) if "/" not in name and not name.endswith((".h", ".cuh"))
            }
            assert standard <= c_headers, f"{file} includes {standard - c_headers}"


def test_no_line_is_longer_than_120_columns():
    folders = ("bench", "csrc", "examples", "pykernels", "tests")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*")
             if file.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")]
    assert len(files) > 200
    long = [f"{file}:{number}" for file in (*files, ROOT / "setup.py")
            for number, line in enumerate(file.read_text().splitlines(), 1) if len(line) > 120]
    assert not long, long


# ---- What users see ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in pykernels.__all__ if not name.startswith("__")])
def test_public_names_are_documented(name):
    documentation = inspect.getdoc(getattr(pykernels, name))
    assert documentation and documentation[0].isupper() and documentation.splitlines()[0].endswith("."), name


FUNCTIONS = [
    getattr(pykernels, name)
    for name in pykernels.__all__
    if inspect.isfunction(getattr(pykernels, name))
    and inspect.getmodule(getattr(pykernels, name)).__name__.startswith("pykernels.ops.")
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_docstrings_name_every_argument_and_say_what_comes_back_and_what_is_raised(function):
    documentation = inspect.getdoc(function)
    for section in ("Args:", "Returns:", "Raises:"):
        assert f"\n{section}" in documentation, section
    arguments = documentation.split("\nArgs:")[1].split("\nReturns:")[0]
    for name in inspect.signature(function).parameters:
        assert re.search(rf"^ {{4}}[\w, ]*\b{name}\b[\w, ]*:", arguments, re.MULTILINE), (
            f"{name} is not described"
        )
    assert "BackendUnavailable" in documentation.split("\nRaises:")[1]


def test_the_public_names_are_what_the_module_shows():
    assert list(pykernels.__all__) == sorted(pykernels.__all__)
    assert all(hasattr(pykernels, name) for name in pykernels.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", pykernels.__version__)
