"""The documents: links lead somewhere, Python blocks compile, those of layouts.md run, the reference is up to date."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The fragments by which the headings of a page are linked to."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, fragment = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (fragment and fragment not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_compile(page: Path) -> None:
    for number, block in enumerate(python_blocks(page), 1):
        compile(block, f"{page.name}, block {number}", "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    folders = "kernels|passes|runtime|moe_compiler|benches|examples|tests|docs"
    named = re.findall(rf"`((?:{folders})/[\w/]+\.(?:py|cpp|sh|md|json))`", page.read_text(encoding="utf-8"))
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_layouts_are_as_described() -> None:
    page = ROOT / "docs" / "layouts.md"
    exec(compile("\n".join(python_blocks(page)), str(page), "exec"), {})


def test_every_option_is_described() -> None:
    from moe_compiler.config import CompileConfig

    text = (ROOT / "docs" / "choosing-bits-and-rules.md").read_text(encoding="utf-8")
    assert not [name for name in CompileConfig.__dataclass_fields__ if f"`{name}`" not in text]


def test_the_reference_is_up_to_date() -> None:
    generated = runpy.run_path(str(ROOT / "docs" / "generate_reference.py"))["reference"]()
    written = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert written == generated, "run: python docs/generate_reference.py"


def test_environments_that_cannot_be_made_are_rows_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(ROOT / "benches" / "environments.py"))
    assert script["main"](["--python", "no-such-python", "--torch", "2.11", "--transformers", "5.17"]) == 0
    printed = capsys.readouterr().out
    assert "| no-such-python | 2.11 | 5.17 | not installed: [Errno 2] No such file" in printed
    assert script["HEAD"] in (ROOT / "docs" / "environments.md").read_text(encoding="utf-8")
