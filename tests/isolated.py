"""Tests that need an environment of their own from the start of the process, such as Triton's interpreter.

A test under `@isolated(NAME="value", ...)` runs in a child process: when the first one of a module and environment is
due, all of them that were selected run in one child, and each then reports what came of it there.
"""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

_CHILD = "PYKERNELS_TESTS_ISOLATED"  # set in a child: the environment is already the right one

_results: dict[tuple, dict[str, tuple[str, str]]] = {}


def isolated(**environment: str) -> Callable[[Callable], Callable]:
    def decorate(test: Callable) -> Callable:
        if _CHILD in os.environ:
            return test

        @functools.wraps(test)
        def report(request: pytest.FixtureRequest, **arguments: object) -> None:
            lost = "failure", "the child process did not report this test"
            outcome, text = _run(request, environment).get(request.node.name, lost)
            if outcome == "skipped":
                pytest.skip(text)
            if outcome != "passed":
                pytest.fail(text, pytrace=False)

        signature = inspect.signature(test)
        of_request = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        report.__signature__ = signature.replace(parameters=[*signature.parameters.values(), of_request])
        report.environment = environment
        return report

    return decorate


def _run(request: pytest.FixtureRequest, environment: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Runs the session's tests of this module and environment in a child, once. -> name: (outcome, text)"""
    key = request.path, *sorted(environment.items())
    if key not in _results:
        selected = [item.nodeid for item in request.session.items
                    if item.path == request.path and getattr(item.obj, "environment", None) == environment]
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            child = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *selected],
                cwd=request.config.rootpath, env={**os.environ, **environment, _CHILD: "1"},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if not report.exists():
                pytest.fail(f"the child process ended with {child.returncode}:\n{child.stdout[-5000:]}", pytrace=False)
            _results[key] = {case.get("name"): _outcome(case) for case in ElementTree.parse(report).iter("testcase")}
    return _results[key]


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for outcome in ("error", "failure", "skipped"):
        if (element := case.find(outcome)) is not None:
            message = element.get("message")
            return outcome, message if outcome == "skipped" else f"{message}\n{element.text or ''}"
    return "passed", ""
