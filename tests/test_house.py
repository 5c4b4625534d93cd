"""The rules of the house: what may be loaded when, one list of names, pages and pins that match the code."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import stallscope
import stallscope_telemetry
from stallscope_telemetry.names import ATTRIBUTES

ROOT = Path(__file__).parent.parent
HEAVY = {"dash", "numpy", "opentelemetry", "pandas", "plotly", "pyarrow", "torch"}
BROUGHT_BY_THE_ENGINE = {"vllm"}  # a hook imports the engine that it is loaded by
UNITS = {"", "ns", "s", "tokens", "blocks", "requests", "records", "MHz", "W", "°C", "bytes"}


def loaded_by(code: str) -> set[str]:
    """Top-level modules that one line of code loads in a fresh interpreter; it may end by raising SystemExit."""
    script = f"""
import json, sys
before = set(sys.modules)
try:
    {code}
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps(sorted(set(sys.modules) - before)), file=sys.stderr)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return {name.partition(".")[0] for name in json.loads(run.stderr.splitlines()[-1])}


def imports_in(path: Path) -> set[str]:
    """Top-level names of others' libraries that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return {name for name in names if name not in sys.stdlib_module_names and not name.startswith("stallscope")}


def project(pyproject: str) -> dict[str, Any]:
    """The ``project`` table of a ``pyproject.toml``."""
    return tomllib.loads((ROOT / pyproject).read_text(encoding="utf-8"))["project"]


def requirements(pyproject: str, without: str = "") -> list[Requirement]:
    """What a distribution depends on, its extras included but for ``without``, our own distributions left out."""
    table = project(pyproject)
    extras = [group for name, group in table["optional-dependencies"].items() if name != without]
    listed = [Requirement(text) for text in sum(extras, table["dependencies"])]
    return [requirement for requirement in listed if not requirement.name.startswith("stallscope")]


def test_help_loads_no_heavy_library() -> None:
    assert not loaded_by("sys.argv = ['stallscope', '--help']; from stallscope.cli import main; main()") & HEAVY


@pytest.mark.parametrize("module", ["stallscope", "stallscope.errors", "stallscope_telemetry.spans"])
def test_light_modules_load_no_heavy_library(module: str) -> None:
    assert not loaded_by(f"import {module}") & HEAVY


def test_scheduler_and_engine_loop_are_plain_python() -> None:
    loaded = loaded_by("import stallscope_engine.engine, stallscope_engine.scheduler")
    assert loaded - set(sys.stdlib_module_names) == {"stallscope_engine", "stallscope_telemetry"}


def test_no_module_of_stallscope_needs_pytorch_or_dash_to_be_imported() -> None:
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "stallscope").rglob("*.py")]
    modules = [".".join(file.parts).removesuffix(".__init__") for file in files if file.name != "__main__"]
    assert not loaded_by(f"import {', '.join(modules)}") & {"dash", "torch", "transformers"}


@pytest.mark.parametrize(
    ("pyproject", "folders"),
    [
        ("pyproject.toml", ["stallscope", "engine/stallscope_engine", "dashboards/stallscope_dash"]),
        ("telemetry/pyproject.toml", ["telemetry/stallscope_telemetry"]),
    ],
)
def test_packages_import_only_what_they_declare(pyproject: str, folders: list[str]) -> None:
    declared = {canonicalize_name(requirement.name) for requirement in requirements(pyproject, without="dev")}
    imported = set().union(*(imports_in(path) for folder in folders for path in (ROOT / folder).rglob("*.py")))
    providers = packages_distributions()
    undeclared = {name for name in imported if not declared & set(map(canonicalize_name, providers.get(name, [name])))}
    assert undeclared - BROUGHT_BY_THE_ENGINE == set()


def test_attribute_names_are_unique_and_dotted() -> None:
    names = [attribute.name for attribute in ATTRIBUTES]
    assert len(names) == len(set(names))
    assert [name for name in names if not re.fullmatch(r"[a-z_]+(\.[a-z0-9_]+)+", name)] == []


def test_attributes_have_a_meaning_and_a_unit_of_the_contract() -> None:
    assert [attribute.name for attribute in ATTRIBUTES if not attribute.about or attribute.unit not in UNITS] == []


def test_pages_made_from_code_are_up_to_date() -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]
    stale = [name for name, page in pages.items() if (ROOT / "docs" / name).read_text(encoding="utf-8") != page()]
    assert stale == [], "run `make docs`"


def test_every_dependency_is_pinned_to_a_version_it_allows() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    for requirement in requirements("pyproject.toml") + requirements("telemetry/pyproject.toml"):
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier


def test_both_distributions_are_of_one_version() -> None:
    versions = {project("pyproject.toml")["version"], project("telemetry/pyproject.toml")["version"]}
    assert versions == {stallscope.__version__} == {stallscope_telemetry.__version__}
