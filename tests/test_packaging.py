"""Licences of what is installed with medseg, its bill of materials, and recipes for others."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from making.places import ROOT
from medseg.packages import __version__

PLACE = ROOT / "docs" / "packaging"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
#: What conda-forge calls packages of PyPI.
CONDA = {"torch": "pytorch", "isal": "python-isal", "matplotlib": "matplotlib-base"}


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("licences", PLACE / "licences.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_that_is_required_is_permissive_but_for_what_the_page_says(program: ModuleType):
    packages = program.installed(program.requirements())
    assert {"numpy", "torch", "numba", "llvmlite", "connected-components-3d"} <= packages.keys()
    others = {
        name: program.licence_of(one)
        for name, one in packages.items()
        if not program.parts(program.licence_of(one)) <= program.PERMISSIVE
        and not program.OF_GPUS.fullmatch(name)
    }
    assert others == {"connected-components-3d": "LGPL-3.0-or-later"}
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| ([a-z0-9-]+) \|", page, re.MULTILINE)) - {"package"}
    direct = {program.canonicalize_name(one.name) for one in program.requirements()} - {"psutil"}
    assert direct <= named  # what these need in turn differs between systems and versions
    assert "**connected-components-3d** is under the LGPL" in page


def test_the_bill_of_materials_names_each_package_once(program: ModuleType, tmp_path: Path):
    packages = program.installed(program.requirements())
    bill = json.loads(json.dumps(program.sbom(packages)))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    own = bill["metadata"]["component"]
    assert (own["name"], own["version"]) == ("medseg", __version__)
    refs = [one["bom-ref"] for one in bill["components"]]
    assert len(refs) == len(set(refs)) == len(packages)
    assert all(re.fullmatch(r"pkg:pypi/[a-z0-9-]+@\S+", ref) for ref in refs)
    known = {"medseg", *refs}
    for row in bill["dependencies"]:
        assert {row["ref"], *row["dependsOn"]} <= known
    assert sum(len(one["licenses"]) for one in bill["components"]) == len(packages)


def test_the_recipe_for_conda_requires_what_the_project_requires():
    recipe = yaml.safe_load((PLACE / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["package"] == {"name": "medseg", "version": __version__}
    run = [one for one in recipe["requirements"]["run"] if isinstance(one, str)]
    (elsewhere,) = [one for one in recipe["requirements"]["run"] if isinstance(one, dict)]
    assert elsewhere["if"] == "not linux"
    wanted = [f"python {PROJECT['requires-python']}"]
    for line in PROJECT["dependencies"]:
        name, bounds = re.fullmatch(r"([\w-]+)(\S*?)(?:;.*)?", line.replace(" ", "")).groups()  # type: ignore[union-attr]
        wanted.append(f"{CONDA.get(name, name)} {bounds}")
    assert sorted([*run, elsewhere["then"]]) == sorted(wanted)
    assert recipe["about"]["license"] == PROJECT["license"]
    assert recipe["about"]["license_file"] == PROJECT["license-files"]
    (script,) = recipe["build"]["python"]["entry_points"]
    assert script == f"medseg = {PROJECT['scripts']['medseg']}"


def test_the_image_is_built_by_commands_that_are_there():
    lines = (PLACE / "Dockerfile").read_text(encoding="utf-8").splitlines()
    (install,) = [line for line in lines if "pip install" in line]
    (extras,) = re.findall(r'"\.\[(.*)\]"', install)
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    assert (ROOT / "constraints.txt").is_file() and "-c constraints.txt" in install
    (build,) = [line for line in lines if "-m medseg." in line]
    module, *options = build.partition("-m ")[2].split()
    assert importlib.util.find_spec(module) is not None and options == ["--all"]
    version = re.findall(r"^FROM python:(3\.\d+)-slim", "\n".join(lines), re.MULTILINE)
    assert set(version) <= {one.rpartition(" ")[2] for one in PROJECT["classifiers"]}
