"""The command line itself: what can be typed, what errors look like, and how options follow the configuration."""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest

from moe_compiler import __version__
from moe_compiler.cli import main
from moe_compiler.cli.config_options import add_config_options, field_helps, read_config
from moe_compiler.cli.models import device_of, load
from moe_compiler.cli.names import has_held_out_split, model_path, texts_of
from moe_compiler.cli.options import ADD_OPTIONS, named_source, positive, rule
from moe_compiler.cli.parser import COMMANDS, UsageError, build_parser
from moe_compiler.config import CompileConfig
from moe_compiler.embedded import MODEL_FOLDER, load_samples
from moe_compiler.runtime.rules import RULES


def exit_code(*arguments: str) -> Any:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


def test_version(capsys: Any) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"moe-compiler {__version__}\n"


def test_help_lists_every_command(capsys: Any) -> None:
    assert exit_code("--help") == 0
    text = capsys.readouterr().out
    assert all(f"\n    {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_that_parses(name: str, capsys: Any) -> None:
    assert exit_code(name, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    example = COMMANDS[name].example
    assert f"example: {example}" in text
    program, *arguments = shlex.split(example)
    assert program == "moe-compiler"
    assert build_parser(arguments).parse_args(arguments).command == name


def test_help_comes_without_torch() -> None:
    quick = [name for name in COMMANDS if name != "compile"]  # whose options are the fields of a class
    code = (
        "import sys\nfrom moe_compiler.cli.parser import build_parser\n"
        f"for name in {quick}:\n    build_parser([name, '--help']).format_help()\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["fly"], "invalid choice: 'fly'"),
        ([], "the following arguments are required: COMMAND"),
        (["compile", "embedded"], "the following arguments are required: --data, -o/--output"),
        (["compile", "embedded", "--data", "docs", "-o", "x"], "must be NAME=SOURCE, as docs=embedded:docs"),
        (["eval", "embedded", "--tokens", "none"], "must be a number of at least 1, but is 'none'"),
        (["generate", "embedded"], "one of the arguments --prompt --prompt-file is required"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], text: str, capsys: Any) -> None:
    assert exit_code(*arguments) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["eval", "embedded"], "`--data` or `--tasks` must say what to measure on"),
        (["eval", "a", "b", "c", "--data", "x=y"], "`MODEL` must be given once or twice, but is a, b, c"),
        (["eval", "embedded", "--data", "x=y", "--window", "1"], "`--window` must be at least 2"),
        (["eval", "embedded", "--data", "x=y", "--dtype", "int8"], "`--dtype` must be auto or a floating-point type"),
        (["eval", "embedded", "--data", "x=y", "--device", "toaster"], "`--device` must be a device as cpu or cuda:0"),
        (["generate", "embedded", "--prompt", "x", "--temperature", "-1"], "`--temperature` must not be negative"),
        (["report", "embedded"], "`--output` must be given, since the model 'embedded' is no folder"),
        (["bench", "compiled", "--new-tokens", "1"], "`--new-tokens` must be at least 2, but is 1"),
    ],
)
def test_options_that_contradict_are_exit_code_2_in_one_line(arguments: list[str], text: str, capsys: Any) -> None:
    assert main(arguments) == 2
    assert_one_line(capsys.readouterr().err, text)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["demo", "--seen", "poetry"], "`seen` must be some, not all, of code, docs"),
        (["inspect", "embedded"], "`DIR` must be a model that `moe-compiler compile` saved"),
        (["generate", "nobody/nothing", "--prompt", "x"], "nobody/nothing"),
        (["generate", "embedded", "--prompt-file", "/nowhere.txt"], "No such file or directory: '/nowhere.txt'"),
        (["generate", "embedded", "--prompt", ""], "`--prompt` must have at least one token"),
        (["generate", "embedded", "--prompt", "x", "--profile", "y"], "`--profile` must be left out"),
        (["report", "embedded", "-o", "/nowhere/x.html"], "`--output` must lie in a folder that exists"),
        (
            ["adapt", "embedded", "--data", "x", "--name", "y"],
            "`DIR` must be the folder of a saved model to keep a prof",
        ),
        (
            ["generate", "embedded", "--prompt", "x", "--chat"],
            "`--chat` needs a tokenizer with a chat template, but that",
        ),
        (["eval", "nobody/nothing", "--tasks", "piqa,rte2"], "there is no 'rte2'; near: rte"),
        (
            ["eval", "nobody/nothing", "--tasks", "rte", "--task-data", "no"],
            "`data` must be an existing folder, but there",
        ),
        (["eval", "embedded", "--data", "x=embedded:poetry"], "`domain` must be one of code, docs"),
        (["eval", "embedded", "--data", "x=./no.txt"], "no.txt"),
    ],
)
def test_errors_are_exit_code_1_in_one_line(arguments: list[str], text: str, capsys: Any) -> None:
    assert main(arguments) == 1
    assert_one_line(capsys.readouterr().err, text)


def assert_one_line(error: str, text: str) -> None:
    assert error.startswith("moe-compiler: ")
    assert error.count("\n") == 1
    assert text in error


@pytest.mark.parametrize("place", [0, 1])
def test_debug_raises_the_error(place: int) -> None:
    arguments = ["demo", "--seen", "poetry"]
    with pytest.raises(ValueError, match="but is poetry"):
        main([*arguments[:place], "--debug", *arguments[place:]])


@pytest.fixture
def failing(monkeypatch: Any) -> Iterator[Any]:
    """Lets the demo fail with any error."""

    def fail_with(error: BaseException) -> None:
        def run_demo(**_: Any) -> None:
            raise error

        monkeypatch.setattr("moe_compiler.demo.run_demo", run_demo)

    return fail_with


def test_an_interruption_is_exit_code_130(failing: Any, capsys: Any) -> None:
    failing(KeyboardInterrupt())
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "moe-compiler: interrupted\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("two\n  lines"), "two lines"),
        (KeyError("key"), "KeyError: 'key' (--debug shows where)"),
        (RuntimeError(), "RuntimeError (--debug shows where)"),
    ],
)
def test_what_is_said_of_an_error(error: Exception, line: str, failing: Any, capsys: Any) -> None:
    failing(error)
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == f"moe-compiler: {line}\n"


def parsed_config(*arguments: str) -> CompileConfig:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_config_options(parser)
    return read_config(parser.parse_args(arguments))


def test_every_field_of_the_configuration_is_an_option_with_its_text() -> None:
    helps = field_helps()
    assert list(helps) == [field.name for field in fields(CompileConfig)]
    parser = argparse.ArgumentParser()
    add_config_options(parser)
    text = " ".join(parser.format_help().split())
    for name, documentation in helps.items():
        assert f"--{name.replace('_', '-')}" in text
        assert documentation.split()[0] in text
    assert parsed_config() == CompileConfig()


def test_options_are_read_by_the_types_of_the_fields() -> None:
    config = parsed_config(
        "--strategy", "moqa", "--target-bits", "none", "--widths", "2,4", "--seed", "3", "--pool-fraction", "0.02"
    )
    assert config == CompileConfig(strategy="moqa", target_bits=None, widths=(2, 4), seed=3, pool_fraction=0.02)
    with pytest.raises(argparse.ArgumentError, match="invalid"):
        parsed_config("--seed", "none")


def test_options_go_before_the_file(tmp_path: Any) -> None:
    file = tmp_path / "config.json"
    file.write_text(CompileConfig(strategy="random", target_bits=3.5).to_json())
    assert parsed_config("--config", str(file), "--target-bits", "4") == CompileConfig(
        strategy="random", target_bits=4.0
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "`--config` must be a JSON file"),
        ("[1]", "`--config` must hold"),
        (json.dumps({"color": 1}), "`color` is not an option"),
        (json.dumps({"strategy": "luck"}), "`strategy` must be one of"),
    ],
)
def test_bad_configurations_are_refused(text: str, message: str, tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        parsed_config("--config", str(tmp_path / "config.json"))


def test_a_missing_configuration_is_an_error() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        parsed_config("--config", "nowhere.json")


def test_names_of_models_and_texts(tmp_path: Any) -> None:
    assert model_path("embedded") == str(MODEL_FOLDER)
    assert model_path("a/b") == "a/b"
    assert named_source("a=b=c") == ("a", "b=c")
    train, held_out = (texts_of("embedded:records", tokens=100, held_out=held) for held in (False, True))
    assert train == load_samples("records", "train", 800)
    assert held_out == load_samples("records", "evaluation", 800) != train
    assert texts_of("embedded:records:evaluation", tokens=100) == held_out
    assert has_held_out_split("embedded:docs")
    assert not has_held_out_split("embedded:docs:train")
    assert not has_held_out_split("docs")
    (tmp_path / "notes.txt").write_text("one text")
    assert texts_of(str(tmp_path / "notes.txt"), tokens=100) == ["one text"]


@pytest.mark.parametrize("text", ["=x", "x=", "x"])
def test_a_source_needs_a_name(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be NAME=SOURCE"):
        named_source(text)


def test_rules_are_those_of_adapt() -> None:
    assert [rule(name) for name in RULES] == list(RULES)
    with pytest.raises(argparse.ArgumentTypeError, match=r"must be one of restore, .*, but is 'luck'"):
        rule("luck")
    parser = argparse.ArgumentParser()
    ADD_OPTIONS["adapt"](parser)
    assert all(name in parser.format_help() for name in RULES)


@pytest.mark.parametrize("text", ["0", "-1", "x", ""])
def test_counts_are_positive(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be a number of at least 1"):
        positive(text)


def test_the_device_and_dtype_are_those_named() -> None:
    assert device_of("cpu") == "cpu"
    model, tokenizer = load("embedded", argparse.Namespace(dtype="float32", device="cpu"))
    assert str(model.dtype) == "torch.float32"
    assert not model.training
    assert tokenizer("x")["input_ids"]
