"""The hosted CI names what there is: targets, groups, files; the forms ask for a report."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.places import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:  # the fast tests run on 3.10
    tomllib = pytest.importorskip("tomli")

HOSTING = ROOT / ".github"
WORKFLOWS = sorted((HOSTING / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def jobs(workflow: Path) -> dict[str, Any]:
    return yaml.safe_load(workflow.read_text())["jobs"]  # type: ignore[no-any-return]


def commands(workflow: Path) -> list[str]:
    return [
        step["run"] for job in jobs(workflow).values() for step in job["steps"] if "run" in step
    ]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_each_command_names_what_there_is(workflow: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    groups = PROJECT["dependency-groups"]
    for command in commands(workflow):
        for target in re.findall(r"\bmake ([a-z-]+)", command):
            assert target in targets
        for group in re.findall(r"--group ([\w-]+)", command):
            assert group in groups
        for file in re.findall(r"-r (\S+)", command):
            assert (ROOT / file).exists()
        for module in re.findall(r"-m (buildtools\.\w+)", command):
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists()
    for job in jobs(workflow).values():
        for target in job.get("strategy", {}).get("matrix", {}).get("target", []):
            assert target in targets


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_no_job_may_do_more_than_it_needs(workflow: Path) -> None:
    assert yaml.safe_load(workflow.read_text())["permissions"] == {"contents": "read"}
    for name, job in jobs(workflow).items():
        assert job.get("timeout-minutes", 0) or name == "publish"
        assert job.get("permissions", {}) == ({"id-token": "write"} if name == "publish" else {})
        # What comes from outside reaches a shell as a variable, never as text of the script.
        assert not [step for step in job["steps"] if "${{" in step.get("run", "")]


def test_every_python_that_is_claimed_is_tested() -> None:
    cases = jobs(HOSTING / "workflows" / "ci.yml")["tests"]["strategy"]["matrix"]["include"]
    name = "Programming Language :: Python :: "
    claimed = [
        text.removeprefix(name)
        for text in PROJECT["project"]["classifiers"]
        if re.fullmatch(name + r"3\.\d+", text)
    ]
    assert [case["python"] for case in cases] == claimed
    assert PROJECT["project"]["requires-python"] == f">={claimed[0]}"
    # The oldest torch that is allowed, with the oldest Python.
    (oldest,) = (d for d in PROJECT["project"]["dependencies"] if d.startswith("torch"))
    assert cases[0]["torch"] == oldest.replace(">=", "==") + ".*"


def test_the_issue_forms_ask_for_the_report() -> None:
    forms = [
        yaml.safe_load(path.read_text()) for path in (HOSTING / "ISSUE_TEMPLATE").glob("*.yml")
    ]
    asked = [
        field["attributes"]["label"]
        for form in forms
        for field in form.get("body", [])
        if "python -m disalign_ops" in field["attributes"]["label"]
    ]
    assert len(asked) == 2
    for form in forms:
        names = [field["id"] for field in form.get("body", [])]
        assert len(names) == len(set(names))
