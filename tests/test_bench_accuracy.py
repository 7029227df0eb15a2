"""The accuracy bench: its intervals, windows, files, tables and targets on made-up rows, and one run on a tiny model."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_benches import bench

from moe_compiler.evaluate import perplexity

WINDOW = 16
NAMES = ("a", "b")


class Words:
    """A tokenizer whose tokens are the numbers in a text."""

    eos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def rows_module() -> ModuleType:
    return bench("accuracy_rows")


def row(name: str, suite: str = "allocation", add: float = 0.0, windows: int = 20, **fields: Any) -> Any:
    """A row whose loss on both domains is `add` more than the original's, with a little noise."""
    generator = torch.Generator().manual_seed(len(name))
    scored = windows and (WINDOW - 1) / 100
    noise = 1e-3 * torch.randn(windows, generator=generator, dtype=torch.float64)
    losses = torch.arange(windows, dtype=torch.float64) + 40
    given = {"seen": ("a",), "new": ("b",), "window": WINDOW, "code_bits": 3.0, "effective_bits": 3.1} | fields
    nll = {one: tuple((losses + scored * add + (name != "original") * noise).tolist()) for one in NAMES}
    return rows_module().Row(suite=suite, name=name, model="m", tool="t", nll=nll, **given)


LOSSES = st.lists(st.floats(-5, 50), min_size=1, max_size=12)


@settings(deadline=None, max_examples=25)
@given(first=LOSSES, second=LOSSES, seed=st.integers(0, 3))
def test_intervals_hold_the_mean(first: list[float], second: list[float], seed: int) -> None:
    loss = bench("accuracy_statistics").loss
    candidate, original = {"a": first, "b": second}, {"a": second[:1] * len(first), "b": [1.0] * len(second)}
    found = loss(candidate, original, NAMES, WINDOW, seed)
    assert found.low - 1e-9 <= found.mean <= found.high + 1e-9
    expected = [
        100 * sum(x - y for x, y in zip(candidate[d], original[d], strict=True)) / len(candidate[d]) / (WINDOW - 1)
        for d in NAMES
    ]
    assert found.mean == pytest.approx(sum(expected) / 2)
    same = loss(candidate, candidate, NAMES, WINDOW, seed)
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    assert found == loss(candidate, original, NAMES, WINDOW, seed)


def test_intervals_are_those_of_the_normal_approximation() -> None:
    generator = torch.Generator().manual_seed(1)
    losses = torch.randn(400, generator=generator, dtype=torch.float64)
    found = bench("accuracy_statistics").loss({"a": losses.tolist()}, {"a": [0.0] * 400}, ["a"], 101)
    assert found.half_width == pytest.approx(1.96 * float(losses.std()) / 20, rel=0.1)


@settings(deadline=None, max_examples=20)
@given(length=st.integers(1, 60), window=st.integers(2, 20), limit=st.integers(1, 60))
def test_windows_are_spread_over_the_text(length: int, window: int, limit: int) -> None:
    load_windows = bench("accuracy_windows").load_windows
    text = " ".join(map(str, range(length)))
    if min(length, limit) < window:
        with pytest.raises(ValueError, match=f"at least one window of {window} tokens, but has {length} tokens"):
            load_windows(Words(), text, window, limit)
        return
    windows = load_windows(Words(), text, window, limit)
    whole = length // window
    assert len(windows) == min(whole, limit // window)
    starts = [int(one[0]) for one in windows]
    assert all(one.tolist() == list(range(start, start + window)) for one, start in zip(windows, starts, strict=True))
    steps = [(b - a) // window for a, b in zip(starts, [*starts[1:], whole * window], strict=True)]
    assert all(step in (whole // len(windows), -(-whole // len(windows))) for step in steps)


def test_window_losses_are_those_of_the_perplexity() -> None:
    windows_module, model = bench("accuracy_windows"), tiny.olmoe(num_hidden_layers=1)
    windows = list(tiny.tokens(5, WINDOW))
    losses = windows_module.window_losses(model, windows, tokens_per_batch=2 * WINDOW)
    assert losses.shape == (5,)
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, torch.cat([windows_module.window_losses(model, [one]) for one in windows]))
    mean = float(losses.sum()) / (5 * (WINDOW - 1))
    assert torch.tensor(mean).exp().item() == pytest.approx(perplexity(model, windows), rel=1e-5)
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite in 5 windows"):
        windows_module.window_losses(model, windows)


def test_rows_survive_the_file(tmp_path: Path) -> None:
    module, path = rows_module(), tmp_path / "folder" / "rows.csv"
    file = module.RowFile(path, NAMES, environment={"torch": "2"})
    original = row("original", size_bytes=7, compile_s=1.5, settings={"widths": [2, 4], "level": "gptq-3"})
    after = row("x", add=1, adapted=True, recovered=0.5, note='a "note", with commas\nand lines')
    for one in (original, after, replace(row("y"), status="failed: reasons", nll={}, code_bits=None)):
        file.append(one)
    found = module.read_rows(path)
    assert [(one.key, one.status) for one in found] == [(one.key, one.status) for one in file.rows]
    for read, written in zip(found, file.rows, strict=True):
        assert {d: pytest.approx(v, abs=1e-4) for d, v in written.nll.items()} == dict(read.nll)
        assert replace(read, nll={}) == replace(written, nll={})
    text = path.read_text()
    assert "loss_new_high,perplexity a,perplexity b,nll a,nll b,torch\n" in text
    kept = module.RowFile(path, NAMES, resume=True, environment={"torch": "2"})
    assert path.read_text() == text
    assert [kept.has("allocation", name) for name in "xyz"] == [True, False, False]
    assert kept.original.perplexity("a") == pytest.approx(original.perplexity("a"), rel=1e-4)
    module.RowFile(path, NAMES, environment={"torch": "2"})
    assert module.read_rows(path) == []


def test_a_cut_line_is_measured_again(tmp_path: Path) -> None:
    module, path = rows_module(), tmp_path / "rows.csv"
    file = module.RowFile(path, NAMES)
    for name in ("original", "x", "y"):
        file.append(row(name))
    whole = path.read_text()
    for cut in (1, 30, 400):
        path.write_text(whole[:-cut])
        kept = module.RowFile(path, NAMES, resume=True)
        assert [one.name for one in kept.rows] == ["original", "x"]
        kept.append(row("y"))
        assert path.read_text() == whole
        assert list(tmp_path.iterdir()) == [path]


def test_rows_of_other_windows_are_refused(tmp_path: Path) -> None:
    module, path = rows_module(), tmp_path / "rows.csv"
    file = module.RowFile(path, NAMES)
    file.append(row("original"))
    with pytest.raises(ValueError, match=r"'x' must be measured as the original model was.*'a': 19"):
        file.append(row("x", windows=19))
    with pytest.raises(ValueError, match="`window`, but 'x' has 8 tokens, 'original' 16"):
        row("x", window=8).loss(file.original, "new")
    with pytest.raises(ValueError, match="same windows of 'a', at least one, but have 19 and 20"):
        row("x", windows=19).loss(file.original, "seen")
    with pytest.raises(ValueError, match="`candidate` must have losses on 'c', but has them on a, b"):
        row("x").loss_on(file.original, ["c"])
    with pytest.raises(ValueError, match=r"`domains` must name at least one domain"):
        row("x").loss_on(file.original, [])
    with pytest.raises(ValueError, match=r"cannot be resumed, its columns are others: it has .*nll b"):
        module.RowFile(path, ("a",), resume=True)
    path.write_text("suite,name\n")
    with pytest.raises(ValueError, match="must be a file of accuracy rows, but lacks the columns model, tool"):
        module.read_rows(path)


def measured() -> list[Any]:
    """Rows such as a full run leaves."""
    return [
        row("original", "original"),
        row("GPTQ-3", "quantizers", 0.8, bits_source="formula", effective_bits=3.19),
        row("GPTQ-2", "quantizers", 4.0, bits_source="formula", effective_bits=2.19),
        row("dynamo @ gptq-3", add=0.7),
        row("pooled @ gptq-3", add=0.9),
        row("budget @ gptq-3", add=0.4),
        row("budget, insured @ gptq-3", add=0.5),
        row("budget, insured @ gptq-3, adapted", add=0.2, adapted=True, adapt_s=1.0),
        row("budget, insured @ gptq-3-0.3", add=0.9),
        row("lowrank, memory, pool 1 %, lowrank", "rules", 0.2, recovered=0.7, adapted=True),
        row("lowrank, memory, pool 4 %, lowrank", "rules", 0.2, recovered=0.9, adapted=True),
        replace(row("random @ gptq-3"), status="out of memory", nll={}),
    ]


def test_targets_compare_on_the_same_windows() -> None:
    rows = measured()
    verdicts = bench("accuracy_targets").judge(rows, ("quantizers", "GPTQ-3"), rows[0])
    found = {one.text: one for one in verdicts}
    assert found["budget, insured @ gptq-3: seen, at most 0.5 of GPTQ-3"].missed
    assert found["budget, insured @ gptq-3: seen, at most 0.5 of GPTQ-3"].difference == "0.62 times"
    assert found["budget, insured @ gptq-3: new, at most 1.3 of GPTQ-3"].verdict == "reached"
    assert found["budget, insured @ gptq-3: new, adapted, at most 0.5 of GPTQ-3"].ours == "0.20 ± 0.00"
    assert found["budget, insured @ gptq-3: new, adapted, at most 0.5 of GPTQ-3"].verdict == "reached"
    assert found["budget, insured @ gptq-3-0.3: seen, at most 0.7 of GPTQ-3"].missed
    assert found["budget, insured @ gptq-3-0.3: new, adapted, at most 0.8 of GPTQ-3"].verdict == "not measured"
    assert found["dynamo @ gptq-3: seen, at most GPTQ-3"].difference == "-0.10 ± 0.00"
    assert found["dynamo: seen, at most random"].verdict == "not measured"
    assert found["dynamo: seen, at most pooled"].verdict == "reached"
    assert found["insurance: new, at most without"].missed
    assert found["half of the 95 % interval of a loss, at most 0.1"].verdict == "reached"
    shares = [one.verdict for one in verdicts if "share of the gap" in one.text]
    assert shares == ["reached", "missed"]
    same = replace(rows[1], suite="allocation", name="dynamo @ gptq-3")
    (even,) = (
        one.verdict
        for one in bench("accuracy_targets").judge([*rows, same], ("quantizers", "GPTQ-3"), rows[0])
        if one.text.startswith("dynamo @")
    )
    assert even == "reached, within the noise"


def test_the_table_shows_before_and_after_beside_each_other() -> None:
    rows, targets = measured(), bench("accuracy_targets")
    verdicts = targets.judge(rows, ("quantizers", "GPTQ-3"), rows[0])
    text = bench("accuracy_report").report(rows, rows[0], verdicts, "Few tokens.")
    allocation = text.partition("## allocation")[2].partition("##")[0]
    (line,) = (one for one in allocation.splitlines() if "insured @ gptq-3," in one)
    cells = [cell.strip() for cell in line.split("|")][1:-1]
    assert cells == [
        "budget, insured @ gptq-3, adapted", "3.00", "3.100", "0.20 ± 0.00", "0.50 ± 0.00", "0.20 ± 0.00", "1.00",
    ]  # fmt: skip
    assert "| GPTQ-3 |" in text
    assert "3.190*" in text
    assert "| allocation: random @ gptq-3 | out of memory |" in text
    assert f"{rows[0].perplexity('a'):.3f}" in text
    assert all(one.text in text for one in verdicts)


def test_peers_are_compared_on_common_windows(tmp_path: Path) -> None:
    peers, module, path = bench("accuracy_peers"), rows_module(), tmp_path / "peers.csv"
    assert peers.read_peers(None) == []
    file = module.RowFile(path, NAMES)
    file.append(row("original", "peers"))
    file.append(row("gptqmodel-3", "peers", 0.6, effective_bits=3.15))
    read = peers.read_peers(path)
    assert peers.find_reference(read, "gptqmodel-3").effective_bits == 3.15
    assert peers.find_reference([], "GPTQ-3") is None
    with pytest.raises(ValueError, match="`reference` must be one of gptqmodel-3, but is 'GPTQ-3'"):
        peers.find_reference(read, "GPTQ-3")
    whole = row("original")
    half = replace(whole, nll={name: losses[::2] for name, losses in whole.nll.items()})
    for original in (whole, half):
        (found,) = peers.comparable(read, original)
        assert found.loss(original, "seen").mean == pytest.approx(0.6, abs=0.02)
    shifted = replace(whole, nll={name: losses[1::2] for name, losses in whole.nll.items()})
    (found,) = peers.comparable(read, shifted)
    assert (found.status[:35], found.nll) == ("measured on other windows of a: the", {})
    (found,) = peers.comparable(read, row("original", windows=25))
    assert found.status == "measured on 20 windows of a, here there are 25"
    (found,) = peers.comparable(read, row("original", add=10))
    assert found.status == "measured on other windows of a: the original model's loss differs"
    (found,) = peers.comparable(read, row("original", window=8))
    assert "in windows of 16 tokens, here they have 8" in found.status
    module.RowFile(path, NAMES)
    with pytest.raises(ValueError, match="`peers` must have a row of the original model"):
        peers.read_peers(path)


def test_levels_are_effective_bits() -> None:
    target_of = bench("accuracy_suites").target_of
    assert target_of("gptq-3", 0.3, 128) == 3.1875
    assert target_of("gptq-3-0.3", 0.3, 64) == pytest.approx(3.075)
    assert target_of("codes=2.5", 0.3, 128) == 2.8
    assert target_of("3.05", 0.3, 128) == 3.05
    for wrong in ("gptq", "gptq-3x", "", "three"):
        with pytest.raises(ValueError, match="a level must be like gptq-3"):
            target_of(wrong, 0.3, 128)


def test_every_case_is_a_configuration() -> None:
    from moe_compiler import CompileConfig

    suites = bench("accuracy_suites")
    cases = suites.build_cases(suites.SUITES, NAMES)
    assert cases[0] == suites.ORIGINAL
    assert len({case.key for case in cases}) == len(cases)
    for case in cases:
        CompileConfig().with_overrides(**{"master": "memory", **case.overrides})
    names = [name for case in cases for name in case.row_names()]
    assert sum(name.endswith(", adapted") for name in names) == 23
    rules = [case for case in cases if case.suite == "rules" and case.rules]
    assert [rule for case in rules for rule in case.rules] == ["cluster", "restore", "compensate", "lowrank"] * 4
    with pytest.raises(ValueError, match=r"`suite` must be some of .* or all, but is speed"):
        suites.build_cases(["speed"], NAMES)


def domain_folder(folder: Path) -> Path:
    """Texts of numbers for `Words`; each domain has its part of the vocabulary."""
    for number, name in enumerate(("low", "high", "mixed")):
        for seed, kind in enumerate(("calib", "eval")):
            ids = tiny.tokens(1, 160, 7 * number + seed, *((1, 48), (48, 96), (1, 96))[number])[0]
            (folder / f"{name}.{kind}.txt").write_text(" ".join(map(str, ids.tolist())))
    return folder


def test_domains_are_found(tmp_path: Path) -> None:
    data, folder = bench("accuracy_data"), domain_folder(tmp_path)
    (folder / "half.calib.txt").touch()
    sources = data.find_domains([str(folder), f"extra={folder}/low.calib.txt,wikitext2"])
    assert list(sources) == ["high", "low", "mixed", "extra"]
    assert sources["extra"].evaluation == "wikitext2"
    assert data.choose_domains(sources, ["low"], None) == (("low",), ("high", "mixed", "extra"))
    assert data.choose_domains(sources, ["low"], ["mixed"]) == (("low",), ("mixed",))
    embedded = data.find_domains(["embedded"])
    assert embedded["docs"].evaluation == "embedded:docs:evaluation"
    options = {"window": 16, "calibration_tokens": 64, "adapt_tokens": 32, "evaluation_tokens": 160}
    texts = data.read_domains(sources, ["low"], ["mixed"], Words(), **options)
    assert [len(texts.calibration["mixed"]), len(texts.adaptation["mixed"]), len(texts.evaluation["low"])] == [4, 2, 10]
    assert "on 64 tokens of each seen domain (low), adapted to 32 of each new one (mixed)" in texts.describe(16)
    for wrong, message in (
        (["low=a"], "`domains` must be folders or NAME=CALIBRATION,EVALUATION, but one is 'low=a'"),
        ([str(tmp_path / "none")], "`domains` must be a folder with files NAME.calib.txt"),
        ([str(folder), "low=a,b"], "`domains` must name each domain once, but 'low' occurs twice"),
    ):
        with pytest.raises(ValueError, match=message):
            data.find_domains(wrong)
    with pytest.raises(ValueError, match="`seen` must name some of high, low, mixed, extra, but names news"):
        data.choose_domains(sources, ["news"], None)
    with pytest.raises(ValueError, match="none that is new, but names low"):
        data.choose_domains(sources, ["low"], ["low"])
    with pytest.raises(
        ValueError, match="`dtype` must be auto or a floating-point type such as bfloat16, but is 'int8'"
    ):
        data.load_original("embedded", "int8", torch.device("cpu"))


def test_overrides_are_fields_of_the_configuration() -> None:
    overrides_of = bench("bench_accuracy").overrides_of
    assert overrides_of(["pool_fraction=0.02", "widths=[2, 4]", "quantizer=hqq", "target_bits=null"], 32) == {
        "pool_fraction": 0.02, "widths": [2, 4], "quantizer": "hqq", "target_bits": None,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"`set` must be like pool_fraction=0.02, but is 'hqq'"):
        overrides_of(["hqq"], 32)
    with pytest.raises(ValueError, match="`sequence_length` must be at most `tokens_per_batch`, but 32 > 16"):
        overrides_of(["tokens_per_batch=16"], 32)
    with pytest.raises(TypeError, match="`colour` is not an option"):
        overrides_of(["colour=red"], 32)
    options = SimpleNamespace(suite=("rules",), only=["nothing*"])
    with pytest.raises(ValueError, match=r"`only` must match some of original, .*, but is \['nothing\*'\]"):
        bench("bench_accuracy").chosen_cases(options, NAMES, ("gptq-3",))


def test_widths_are_quantized_anew_as_compiling_does() -> None:
    from moe_compiler import dynamo_compile

    config = {"target_bits": 3.4, "pool_fraction": 0.0, "master": "memory", "progress": False}
    compiled = dynamo_compile(tiny.olmoe(num_hidden_layers=1), tiny.datasets(), **config)
    datasets = {name: list(ids) for name, ids in tiny.datasets().items()}
    report, original = compiled.moe_report, tiny.olmoe(num_hidden_layers=1)
    redone = bench("accuracy_redone").quantize_at_widths(original, datasets, report.plan, report.config)
    ids = tiny.tokens(2, 16, 3)
    with torch.no_grad():
        expected, found = (model(input_ids=ids).logits for model in (compiled, redone))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert not torch.equal(original(input_ids=ids).logits, found)


def test_a_run_measures_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = bench("bench_accuracy")
    monkeypatch.setattr(module, "load_original", lambda *_: (tiny.olmoe(num_hidden_layers=1, num_experts=4), Words()))
    path, table, plot = tmp_path / "out" / "rows.csv", tmp_path / "table.md", tmp_path / "plot.png"
    arguments = [
        "--domains", str(domain_folder(tmp_path)), "--seen", "low,high", "--window", "32", "--tokens", "160",
        "--adapt-tokens", "96", "--eval-tokens", "160", "--device", "cpu", "--csv", str(path), "--table", str(table),
        "--set", "tokens_per_batch=64", "--suite", "rules,allocation",
    ]  # fmt: skip
    some = ["--only", "dynamo @ gptq-3", "redone", "channels, memory, pool 4 %"]
    assert module.main([*arguments, *some, "--plot", str(plot)]) == 0
    rows = {one.key: one for one in rows_module().read_rows(path)}
    assert list(rows) == [
        ("original", "original"),
        ("rules", "redone"),
        ("rules", "channels, memory, pool 4 %"),
        ("rules", "channels, memory, pool 4 %, restore"),
        ("rules", "channels, memory, pool 4 %, compensate"),
        ("allocation", "dynamo @ gptq-3"),
        ("allocation", "dynamo @ gptq-3, adapted"),
    ]
    assert {one.status for one in rows.values()} == {"ok"}
    before, after = (rows["rules", f"channels, memory, pool 4 %{end}"] for end in ("", ", restore"))
    assert before.nll["low"] == after.nll["low"]
    assert before.nll["mixed"] != after.nll["mixed"]
    assert (before.adapt_tokens, after.adapt_tokens, after.settings["pool_fraction"]) == (0, 96, 0.04)
    assert rows["rules", "redone"].code_bits == before.code_bits == 2.5
    assert rows["allocation", "dynamo @ gptq-3"].effective_bits <= 3.1875
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "## Targets" in table.read_text()
    text = path.read_text()
    printed = capsys.readouterr().out
    assert "evaluated on 160 held-out tokens of each" in printed
    assert "reached" in printed or "missed" in printed

    monkeypatch.setattr(bench("accuracy_run").Workbench, "_measure", lambda *_: pytest.fail("measured again"))
    assert module.main([*arguments, *some, "--resume"]) == 0
    assert path.read_text() == text


def test_resuming_with_other_options_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = bench("bench_accuracy")
    monkeypatch.setattr(module, "load_original", lambda *_: (tiny.olmoe(num_hidden_layers=1, num_experts=4), Words()))
    arguments = [
        "--domains", str(domain_folder(tmp_path)), "--seen", "low", "--window", "32", "--tokens", "64",
        "--adapt-tokens", "32", "--eval-tokens", "64", "--device", "cpu", "--csv", str(tmp_path / "rows.csv"),
        "--suite", "quantizers", "--only", "RTN-4",
    ]  # fmt: skip
    assert module.main(arguments) == 0
    with pytest.raises(ValueError, match=r"cannot be resumed, `settings` of its row 'RTN-4' is .*group_size"):
        module.main([*arguments, "--resume", "--set", "group_size=64"])
    more = [*arguments, "--resume", "--tokens", "96"]
    with pytest.raises(ValueError, match=r"`calibration_tokens` of its row 'RTN-4' is 64 and would be 96 now"):
        module.main(more)
    failing = [*arguments[:-1], "single dataset", "dynamo on low alone", "--suite", "single", "--set", "widths=[8]"]
    assert module.main(failing) == 1
    rows = rows_module().read_rows(tmp_path / "rows.csv")
    assert rows[0].status == "ok"
    assert "`target_bits` must be at least" in rows[1].status
    json.dumps([dict(one.settings) for one in rows])


def test_the_plot_joins_rows_that_differ_in_bits_only() -> None:
    names = ("gptqmodel-3", "gptqmodel-2", "gptqmodel-mixed", "auto-round", "hqq")
    rows = [row(name, "peers", effective_bits=3.0) for name in names]
    found = {one.name: len(one.rows) for one in bench("accuracy_plot").series_of(rows)}
    assert found == {"gptqmodel": 2, "gptqmodel-mixed": 1, "auto-round": 1, "hqq": 1}
