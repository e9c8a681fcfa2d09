"""Other packages' functions, with their signatures, on this package's ops.

    from pykernels.compat.flash_attn import flash_attn_func      one function, under its own name
    pykernels.compat.install("flash_attn", "fla")                `import flash_attn` finds ours where there is none
    pykernels.compat.transformers.enable()                       attn_implementation="pykernels" in Transformers

A function here takes the same arguments in the same order, with the same defaults, layouts and return values as the
original, on CPUs too. What our ops cannot do raises an error that names the argument; nothing is ignored silently.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import sys
import types

__all__ = ["PACKAGES", "install", "uninstall"]

PACKAGES = ("causal_conv1d", "fla", "flash_attn", "flashfftconv", "mamba_ssm", "torchscale")

# A package installed by us -> the modules that it took the names of.
_replaced: dict[str, dict[str, types.ModuleType]] = {}


def _check_names(packages: tuple[object, ...]) -> None:
    for package in packages:
        if not isinstance(package, str):
            raise TypeError(f"packages must be names, got {package!r}")
        if package not in PACKAGES:
            raise ValueError(f"packages must be among {', '.join(PACKAGES)}, got {package!r}")


def _is_present(package: str) -> bool:
    """Whether the original can be imported."""
    if package in sys.modules:
        return True
    return importlib.util.find_spec(package) is not None


def _modules_of(package: str) -> dict[str, types.ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] == package}


def _build(package: str) -> dict[str, types.ModuleType]:
    """The modules that stand in for the package's, each holding the names its original has."""
    ours = importlib.import_module(f"{__name__}.{package}")
    modules: dict[str, types.ModuleType] = {}
    for name, contents in ours.MODULES.items():
        module = types.ModuleType(name, f"Stands in for {name}, by pykernels.")
        is_package = any(other.startswith(name + ".") for other in ours.MODULES)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin=ours.__name__, is_package=is_package)
        if is_package:
            module.__path__ = []  # so that a submodule we don't have raises ModuleNotFoundError
        module.__package__ = name if is_package else name.rpartition(".")[0]
        if name == package:
            module.__version__ = ours.VERSION
        module.__all__ = list(contents)
        for item in contents:
            setattr(module, item, getattr(ours, item))
        modules[name] = module
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent in modules:
            setattr(modules[parent], child, module)
    return modules


class install(contextlib.AbstractContextManager):
    """Makes our functions importable under the names of packages that are not installed.

    After `install("flash_attn")`, `from flash_attn import flash_attn_func` gives ours, from every module of the
    original that holds something we have. Holds until `uninstall`, or for a `with` block.

    Args:
        packages: names out of `PACKAGES`.
        shadow: take the name of a package that is installed, too. By default such a package is left alone.

    Attributes:
        installed: the packages whose names are ours through this call.
        left_alone: those whose original is there.

    Raises:
        TypeError, ValueError: not a name, or none of `PACKAGES`.
    """

    def __init__(self, *packages: str, shadow: bool = False) -> None:
        if not packages:
            raise ValueError(f"packages must name at least one of {', '.join(PACKAGES)}, got none")
        _check_names(packages)
        if not isinstance(shadow, bool):
            raise TypeError(f"shadow must be True or False, got {shadow!r}")
        self.installed: tuple[str, ...] = ()
        self.left_alone: tuple[str, ...] = ()
        for package in dict.fromkeys(packages):
            if package in _replaced:  # already ours; who installed it undoes it
                continue
            if not shadow and _is_present(package):
                self.left_alone += (package,)
                continue
            ours = _build(package)
            before = _modules_of(package)
            for name in before:
                del sys.modules[name]
            sys.modules.update(ours)
            _replaced[package] = before
            self.installed += (package,)

    def uninstall(self) -> None:
        """Undoes this call."""
        if ours := [package for package in self.installed if package in _replaced]:
            uninstall(*ours)
        self.installed = ()

    def __exit__(self, *exc_info) -> None:
        self.uninstall()


def uninstall(*packages: str) -> None:
    """Undoes `install` for the named packages, or for all: what was imported before under these names is there again.

    A package that is not installed by us raises ValueError. Functions that were imported meanwhile keep working.
    """
    _check_names(packages)
    for package in packages:
        if package not in _replaced:
            raise ValueError(f"packages must be installed by pykernels.compat.install, got {package!r}, which is not")
    for package in packages or tuple(_replaced):
        for name in _modules_of(package):
            del sys.modules[name]
        sys.modules.update(_replaced.pop(package))
