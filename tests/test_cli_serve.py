"""`moe-compiler serve` answers OpenAI's own client: whole and streamed, with the profile in the pools, and with errors."""

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, BadRequestError, OpenAI, UnprocessableEntityError
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_compiler.cli import main, serve

PROMPT = "order,"
PROFILES = ("calibration", "Our records")
NEW_TOKENS = 12


def run(*arguments: Any) -> None:
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the compiled embedded model with a profile for records."""
    path = tmp_path_factory.mktemp("serve") / "compiled"
    quick = [
        "--quantizer",
        "rtn",
        "--strategy",
        "uniform",
        "--uniform-bits",
        2,
        "--target-bits",
        "none",
        "--pool-fraction",
        "0.05",
    ]
    size = ["--tokens", 512, "--sequence-length", 128, "--router-tokens", 0]
    run("compile", "embedded", "--data", "docs=embedded:docs", *quick, *size, "-o", path)
    run("adapt", path, "--data", "embedded:records", "--name", PROFILES[1], "--tokens", 512)
    (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return path


@pytest.fixture(scope="module")
def wanted(folder: Path) -> dict[str, str]:
    """By profile, what the model writes after the prompt."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    texts = {}
    for name in PROFILES:
        model.runtime.switch(name)
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        texts[name] = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert texts[PROFILES[0]] != texts[PROFILES[1]]
    return texts


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[OpenAI, Any]]:
    """A client of a running server, and the served model's run time."""
    started: list[Any] = []

    class Watched(serve.PreparedServer):
        def start_server(self) -> None:
            started.append(self)
            super().start_server()

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "PreparedServer", Watched)
        thread = threading.Thread(target=run, args=["serve", folder, "--port", port, "--device", "cpu", *options])
        thread.start()
        while thread.is_alive() and not (started and started[0].server.started):
            time.sleep(0.05)
    assert started
    (loaded,) = started[0]._model_manager.loaded_models.values()
    try:
        with OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0) as client:
            yield client, loaded.model.runtime
    finally:
        started[0].server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[tuple[OpenAI, Any]]:
    with serving(folder, "--profile", PROFILES[1], "--on-drift", "report") as running:
        yield running


def test_completions_whole_and_streamed(server: tuple[OpenAI, Any], folder: Path, wanted: dict[str, str]) -> None:
    client, runtime = server
    assert runtime.active == PROFILES[1]
    assert [one.id for one in client.models.list()] == [str(folder)]
    whole = client.completions.create(model=str(folder), prompt=PROMPT, max_tokens=NEW_TOKENS)
    assert whole.choices[0].text == wanted[PROFILES[1]]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == NEW_TOKENS
    stream = client.completions.create(model=str(folder), prompt=PROMPT, max_tokens=NEW_TOKENS, stream=True)
    parts = [chunk.choices[0].text for chunk in stream if chunk.choices and chunk.choices[0].text]
    assert len(parts) > 1
    assert "".join(parts) == wanted[PROFILES[1]]


def test_chat_whole_and_streamed(server: tuple[OpenAI, Any], folder: Path, wanted: dict[str, str]) -> None:
    client, _ = server
    asked: dict[str, Any] = {"model": str(folder), "messages": [{"role": "user", "content": PROMPT}]}
    whole = client.chat.completions.create(**asked, max_tokens=NEW_TOKENS)
    assert whole.choices[0].message.content == wanted[PROFILES[1]]
    parts = [
        chunk.choices[0].delta.content
        for chunk in client.chat.completions.create(**asked, max_tokens=NEW_TOKENS, stream=True)
        if chunk.choices and chunk.choices[0].delta.content
    ]
    assert len(parts) > 1
    assert "".join(parts) == wanted[PROFILES[1]]


def test_a_switch_between_requests_changes_the_answers(
    server: tuple[OpenAI, Any], folder: Path, wanted: dict[str, str]
) -> None:
    client, runtime = server
    for name in (*PROFILES, *PROFILES[1:]):
        runtime.switch(name)
        answer = client.completions.create(model=str(folder), prompt=PROMPT, max_tokens=NEW_TOKENS)
        assert answer.choices[0].text == wanted[name]


def refusal(ask: Callable[[], object], kind: type[APIStatusError]) -> str:
    """What the server says to a request that it refuses in that way."""
    with pytest.raises(kind) as caught:
        ask()
    return str(caught.value.body["detail"])  # type: ignore[index]


def test_bad_requests_are_answered_with_the_reason(server: tuple[OpenAI, Any], folder: Path) -> None:
    create, model = server[0].completions.create, str(folder)
    assert "requested 'another'" in refusal(lambda: create(model="another", prompt=PROMPT), BadRequestError)
    assert "must be a string" in refusal(lambda: create(model=model, prompt=[PROMPT]), BadRequestError)
    unknown = {"colour": "red"}
    detail = refusal(lambda: create(model=model, prompt=PROMPT, extra_body=unknown), UnprocessableEntityError)
    assert "Unexpected fields in the request: {'colour'}" in detail
    again = create(model=model, prompt=PROMPT, max_tokens=1)
    assert again.usage is not None
    assert again.usage.completion_tokens == 1


def test_a_chat_without_a_template_is_refused(folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "plain"))
    (path / "chat_template.jinja").unlink()
    with serving(path) as (client, _):
        messages: Any = [{"role": "user", "content": PROMPT}]
        ask = partial(client.chat.completions.create, model=str(path), messages=messages)
        assert "no chat template: use /v1/completions" in refusal(ask, BadRequestError)
        assert client.completions.create(model=str(path), prompt=PROMPT, max_tokens=2).choices[0].text


def test_a_drift_guard_without_profiles_is_refused(capsys: Any) -> None:
    assert main(["serve", "embedded", "--on-drift", "switch", "--device", "cpu"]) == 1
    assert "`--on-drift` must be left out where the model was not compiled" in capsys.readouterr().err


def test_an_unknown_profile_ends_the_server(folder: Path, capsys: Any) -> None:
    assert main(["serve", str(folder), "--profile", "nobody", "--device", "cpu"]) == 1
    assert "must be one of the profiles 'calibration', 'Our records', but is 'nobody'" in capsys.readouterr().err


def test_it_says_what_to_install(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(serve, "is_serve_available", lambda: False)
    assert main(["serve", "embedded"]) == 1
    assert "pip install 'moe-compiler[serve]'" in capsys.readouterr().err
