"""The examples run on the embedded model with few tokens: one compiles and saves, the others load what it saved."""

import json
import runpy
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_compiler.embedded import load_text
from moe_compiler.kernels.cpu_compile import set_compile_threshold

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name: str) -> dict[str, Any]:
    """What the script `name` defines."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.fixture(scope="module", autouse=True)
def _without_a_compiler() -> Iterator[None]:
    """The kernels run as plain PyTorch calls: compiling them takes longer than all that the examples do here."""
    set_compile_threshold(1 << 60)
    yield
    set_compile_threshold(None)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the first example writes."""
    folder = tmp_path_factory.mktemp("examples") / "compiled"
    quick = ["--tokens", "256", "--strategy", "random", "--quantizer", "rtn"]
    example("quantize_and_generate")["main"]([*quick, "--output", str(folder)])
    return folder


def test_the_examples_say_what_to_type() -> None:
    for path in EXAMPLES.glob("*.py"):
        lines = path.read_text().splitlines()
        assert any(line.startswith(f"python examples/{path.name} ") for line in lines)


def test_quantize_and_generate(compiled: Path) -> None:
    saved = json.loads((compiled / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "moe_compiler"
    assert saved["quantizer"] == "rtn"


def test_inspect_graphs(compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("inspect_graphs")["main"](["--model", str(compiled)])
    printed = capsys.readouterr().out
    assert "1 x moe_compiler.packed_experts.default" in printed
    assert all(f"{stage}:" in printed for stage in ("captured", "observed", "lowered"))


def test_adapt_to_your_text(compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, profile = tmp_path / "text.txt", tmp_path / "yours.safetensors"
    text.write_text(load_text("records", "train", 4000))
    main = example("adapt_to_your_text")["main"]
    main(["--model", str(compiled), "--text", str(text), "--profile", str(profile), "--tokens", "256"])
    assert "adapted to 'yours' by rule 'lowrank'" in capsys.readouterr().out
    assert profile.is_file()
    text.write_text("short")
    with pytest.raises(SystemExit):
        main(["--model", str(compiled), "--text", str(text)])


Ask = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def server(compiled: Path) -> Iterator[tuple[Any, Ask]]:
    """The example's server on a free port, with a profile "records", and a client of it."""
    tokenizer = AutoTokenizer.from_pretrained(compiled)
    model = AutoModelForCausalLM.from_pretrained(compiled)
    model.runtime.adapt([load_text("records", "train", 1000)], name="records")
    with example("profile_server")["make_server"](model, tokenizer, 0) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()

        def ask(request: dict[str, Any]) -> dict[str, Any]:
            address = f"http://localhost:{running.server_port}"
            with urllib.request.urlopen(address, json.dumps(request).encode(), timeout=60) as reply:
                return json.loads(reply.read())  # type: ignore[no-any-return]

        yield model, ask
        running.shutdown()
        thread.join()


def test_the_server_switches_by_request(server: tuple[Any, Ask]) -> None:
    model, ask = server
    requests = [{"prompt": "def read(", "profile": name, "max_new_tokens": 4} for name in ("calibration", "records")]
    alone = [ask(request) for request in requests]
    assert [reply["profile"] for reply in alone] == ["calibration", "records"]
    assert model.runtime.active == "records"
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(ask, requests * 4))
    assert together == alone * 4


def test_the_server_says_what_is_wrong(server: tuple[Any, Ask]) -> None:
    _, ask = server
    for request, reason in (
        ({"prompt": "a", "profile": "unknown"}, "must be one of the profiles"),
        ({"text": "a"}, "unexpected keyword argument"),
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(request)
        assert caught.value.code == 400
        assert reason in json.loads(caught.value.read())["error"]
        caught.value.close()
