"""The documents: links lead somewhere, Python blocks compile, two pages run, commands parse, the reference is new."""

import re
import runpy
import shlex
from pathlib import Path
from types import CodeType

import pytest

from moe_compiler.cli.parser import COMMANDS, build_parser
from moe_compiler.kernels.cpu_compile import set_compile_threshold

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def program(page: Path) -> CodeType:
    """The Python blocks of a page as one program, whose lines have the numbers that they have in the page."""
    inside, lines = False, []
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = line == "```python" if fence else inside
    return compile("\n".join(lines), str(page), "exec")


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
    exec(program(ROOT / "docs" / "layouts.md"), {})


def test_the_page_on_transformers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    set_compile_threshold(1 << 60)  # kernels as plain PyTorch calls
    try:
        exec(program(ROOT / "docs" / "transformers.md"), {})
    finally:
        set_compile_threshold(None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_can_be_typed(page: Path) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        if line.startswith("moe-compiler "):
            arguments = shlex.split(line, comments=True)[1:]
            assert build_parser(arguments).parse_args(arguments).command == arguments[0]


def test_every_command_is_described() -> None:
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert not [name for name in COMMANDS if f"\nmoe-compiler {name}" not in text]


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
