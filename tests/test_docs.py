"""The documentation beside the code: names, messages, links and figures that must agree.

`make docs` builds the pages and fails on a warning: broken links, missing snippets, parameters that
a docstring names and the function does not have.
"""

import pathlib
import re

import pytest

import deepalign_kernels as dak

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
CODE = [
    path
    for pattern in (
        *("deepalign_kernels/**/*.py", "benchmarks/**/*.py", "benchmarks/*.sh", "setup.py"),
        *("csrc/**/*.*", ".ci/*", "Makefile", "tests/**/*.py"),
    )
    for path in ROOT.glob(pattern)
    if path.is_file() and path != pathlib.Path(__file__)
]


def test_every_environment_variable_is_documented():
    name = re.compile(r"\bDEEPALIGN_[A-Z_]*[A-Z]\b")
    used = {found for path in CODE for found in name.findall(path.read_text())}
    assert used == set(name.findall((DOCS / "environment.md").read_text()))


def test_messages_of_the_troubleshooting_page_are_the_codes_own():
    """Each `message` in a heading, in parts where it says "...", stands in the code's strings."""
    source = "".join(path.read_text() for path in (ROOT / "deepalign_kernels").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings that go on in the next line
    headings = re.findall(r"^### (.*)", (DOCS / "troubleshooting.md").read_text(), re.M)
    quoted = [part for line in headings for part in re.findall(r"`([^`]* [^`]*)`", line)]
    assert len(quoted) > 20
    for message in quoted:
        for part in filter(None, re.split(r"\s*\.\.\.\s*|'[a-z]+'|FILE:LINE|_\w+\.so", message)):
            assert part.strip(" ,") in source, message


def test_every_public_name_has_its_place_in_the_reference():
    pytest.importorskip("trl", reason="of the room `trl`")
    text = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    listed = set(re.findall(r"^::: deepalign_kernels\.(\S+)", text, re.M))
    listed = {re.sub(r"^(\w+)\..*\.", r"\1.", name) for name in listed}  # room.file.Name too
    assert set(dak.data.__all__) <= set(dak.train.__all__)
    rooms = {n: getattr(dak, n) for n in dak._LAZY if n not in ("data", "toyworld")}
    wanted = {f"{room}.{name}" for room, it in rooms.items() for name in it.__all__}
    wanted |= {*dak.__all__, *dak.ops.__all__}
    assert wanted <= listed, wanted - listed


def test_the_policy_of_versions_names_every_room():
    text = (DOCS / "develop" / "versioning.md").read_text()
    assert all(f"`{room}`" in text for room in dak._LAZY if room != "toyworld")
    assert "`deepalign`" in text


def test_every_extra_is_in_the_table_of_the_page_on_installing():
    project = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    extras = set(re.findall(r"^([a-z]+) = ", project.split("\n[")[0], re.M))
    table = re.findall(r"^\| `([a-z]+)` \|", (DOCS / "install.md").read_text(), re.M)
    assert set(table) == extras and len(extras) > 4


def test_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 180
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), target
        headings = re.findall(r"^#+ (.*)", (ROOT / path).read_text(), re.M) if anchor else []
        slugs = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
        assert not anchor or anchor in slugs, target


@pytest.mark.slow
def test_figures_are_those_of_the_results():
    from benchmarks.studies import page

    assert page.main(check=True) == 0, "run `python -m benchmarks page`"
