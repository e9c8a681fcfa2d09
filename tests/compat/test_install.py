"""pykernels.compat.install: whose module an import finds, and that all is as before afterwards."""

from __future__ import annotations

import importlib
import sys
import types

import pytest

from pykernels import compat


def modules_of(package: str) -> dict[str, object]:
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] == package}


@pytest.fixture(autouse=True)
def nothing_stays_installed():
    before = {package: modules_of(package) for package in compat.PACKAGES}
    yield
    assert {package: modules_of(package) for package in compat.PACKAGES} == before


@pytest.fixture
def original(tmp_path, monkeypatch):
    """An installed flash_attn with a submodule that we don't have, not imported yet."""
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text("from .flash_attn_interface import flash_attn_func\n")
    (package / "flash_attn_interface.py").write_text("def flash_attn_func(): return 'original'\n")
    (package / "bert_padding.py").write_text("")
    (package / "ops.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield
    for name in modules_of("flash_attn"):
        del sys.modules[name]


@pytest.mark.parametrize("package", compat.PACKAGES)
def test_every_name_is_found_where_the_original_has_it(package):
    ours = importlib.import_module(f"pykernels.compat.{package}")
    with compat.install(package) as handle:
        assert handle.installed == (package,) and handle.left_alone == ()
        assert importlib.util.find_spec(package) is not None  # how libraries ask whether it is there
        for name, contents in ours.MODULES.items():
            module = importlib.import_module(name)
            assert module.__all__ == list(contents)
            for item in contents:
                assert getattr(module, item) is getattr(ours, item)
        assert sys.modules[package].__version__ == ours.VERSION
        assert {name for contents in ours.MODULES.values() for name in contents} == set(ours.__all__)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(package)


def test_imports_as_people_write_them():
    with compat.install("flash_attn", "fla"):
        import fla.ops.retention
        from fla.ops import chunk_gla
        from fla.ops.rwkv6.chunk import chunk_rwkv6  # noqa: F401
        from flash_attn import flash_attn_func
        from flash_attn.bert_padding import unpad_input  # noqa: F401

        assert fla.ops.retention.chunk_retention.__module__ == "pykernels.compat.fla"
        assert (
            chunk_gla.__module__ == "pykernels.compat.fla"
            and flash_attn_func.__module__ == "pykernels.compat.flash_attn"
        )
        with pytest.raises(ModuleNotFoundError, match="flash_attn.layers"):
            importlib.import_module("flash_attn.layers.rotary")
        with pytest.raises(ImportError, match="chunk_delta_rule"):
            exec("from fla.ops import chunk_delta_rule")


def test_until_uninstall():
    handle = compat.install("fla")
    again = compat.install("fla")
    assert again.installed == () and importlib.import_module("fla.ops.gla")
    again.uninstall()  # what another call installed stays
    assert "fla" in sys.modules
    handle.uninstall()
    assert "fla" not in sys.modules
    handle.uninstall()
    compat.install("fla")
    compat.uninstall("fla")
    assert "fla" not in sys.modules
    compat.install("fla", "flash_attn")
    handle.uninstall()  # has nothing left to undo
    assert {"fla", "flash_attn"} <= set(sys.modules)
    compat.uninstall()
    assert not {"fla", "flash_attn"} & set(sys.modules)


def test_an_installed_original_is_left_alone(original):
    with compat.install("flash_attn", "fla") as handle:
        assert handle.installed == ("fla",) and handle.left_alone == ("flash_attn",)
        assert importlib.import_module("flash_attn").flash_attn_func() == "original"
    with compat.install("flash_attn") as handle:  # imported by now
        assert handle.left_alone == ("flash_attn",)
    assert importlib.import_module("flash_attn").flash_attn_func() == "original"


@pytest.mark.parametrize("imported", (False, True))
def test_shadow_takes_the_name_and_gives_it_back(original, imported):
    if imported:
        importlib.import_module("flash_attn.ops")
    before = modules_of("flash_attn")
    with compat.install("flash_attn", shadow=True):
        module = importlib.import_module("flash_attn")
        assert module.flash_attn_func.__module__ == "pykernels.compat.flash_attn"
        assert not hasattr(module, "ops")
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("flash_attn.ops")
    assert modules_of("flash_attn") == before
    assert importlib.import_module("flash_attn").flash_attn_func() == "original"


def test_bad_arguments():
    for call, error, words in (
        (lambda: compat.install(), ValueError, "at least one"),
        (lambda: compat.install("flash-attn"), ValueError, "got 'flash-attn'"),
        (lambda: compat.install(types), TypeError, "must be names"),
        (lambda: compat.install("fla", shadow=1), TypeError, "shadow must be True or False"),
        (lambda: compat.uninstall("fla"), ValueError, "got 'fla', which is not"),
        (lambda: compat.uninstall("xformers"), ValueError, "got 'xformers'"),
    ):
        with pytest.raises(error, match=words):
            call()
