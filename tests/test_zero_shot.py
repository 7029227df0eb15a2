"""Scores equal those computed by hand from log-likelihoods; the model, the tokenizer and the random state stay."""

import json
import logging
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compiled import OPTIONS
from task_files import CB, HUB, write_all
from tiny import datasets, olmoe
from torch import Tensor

from moe_compiler import zero_shot, zero_shot_evaluation
from moe_compiler.api import dynamo_compile
from moe_compiler.embedded import load_model
from moe_compiler.tasks import FORMATS
from moe_compiler.tasks.harness import load_tasks, read_documents
from moe_compiler.zero_shot_result import Metric, TaskScore, ZeroShotResult

Model = tuple[Any, Any]


@pytest.fixture(scope="module")
def embedded() -> Model:
    return load_model()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    write_all(root, train=True)
    return root


def log_likelihood(model: Any, tokenizer: Any, prompt: str, choice: str) -> float:
    """Of `choice` after `prompt`, in a forward pass of its own."""
    ids = tokenizer(prompt + choice, return_tensors="pt").input_ids
    start = tokenizer(prompt, return_tensors="pt").input_ids.shape[1]
    with torch.no_grad():
        logits: Tensor = model(ids).logits[0].double().log_softmax(-1)
    return sum(float(logits[place - 1, ids[0, place]]) for place in range(start, ids.shape[1]))


def prompts(task: str, row: dict[str, Any]) -> tuple[str, list[str], int]:
    """Prompt, choices and the right one, as lm-eval's documentation of the tasks gives them."""
    if task.startswith("arc"):
        return f"Question: {row['question']}\nAnswer:", row["choices"]["text"], "ABCD".index(row["answerKey"])
    if task == "piqa":
        return f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"]
    if task == "rte":
        text = f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?\nAnswer:"
        return text, ["True", "False"], row["label"]
    if task == "copa":
        text = f"{row['premise'][:-1]} {'because' if row['question'] == 'cause' else 'therefore'}"
        return text, [row[name][0].lower() + row[name][1:] for name in ("choice1", "choice2")], row["label"]
    text = f"{row['premise']}\nQuestion: {row['hypothesis']}. True, False, or Neither?\nAnswer:"
    return text, ["True", "False", "Neither"], row["label"]


def test_scores_are_those_computed_by_hand(embedded: Model, data: Path) -> None:
    found = zero_shot(*embedded, data=data, progress=False)
    assert set(found.tasks) == set(FORMATS)
    for task, score in found.tasks.items():
        hits, hits_norm = [], []
        for row in HUB[task]:
            prompt, choices, right = prompts(task, row)
            scores = [log_likelihood(*embedded, prompt, f" {choice}") for choice in choices]
            hits.append(int(np.argmax(scores)) == right)
            norm = [value / len(choice) for value, choice in zip(scores, choices, strict=True)]
            hits_norm.append(int(np.argmax(norm)) == right)
        assert score.metrics["acc"].value == np.mean(hits), task
        assert score.metrics["acc"].stderr == pytest.approx(np.std(hits, ddof=1) / 8**0.5), task
        if "acc_norm" in score.metrics:
            assert score.metrics["acc_norm"].value == np.mean(hits_norm), task
        assert (score.documents, score.available) == (8, 8)
        assert str(data / task) in score.source
    assert list(found.tasks["cb"].metrics) == ["acc", "f1"]
    assert list(found.tasks["piqa"].metrics) == ["acc", "acc_norm"]
    assert found.mean_accuracy == pytest.approx(np.mean([score.metrics["acc"].value for score in found.tasks.values()]))


class Recorder:
    """Progress that keeps what it is told, and can do something as it starts."""

    def __init__(self, start: Any = None) -> None:
        self.total = self.done = 0
        self.start = start

    @contextmanager
    def task(self, description: str, total: int, unit: str = "") -> Iterator[Any]:
        self.total += total
        if self.start:
            self.start()
        yield self.advance

    def advance(self, count: int = 1) -> None:
        self.done += count


def test_progress_counts_choices_and_nothing_else_is_printed(
    embedded: Model, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder()
    level = logging.getLogger("lm_eval").level
    zero_shot(*embedded, ["cb", "copa"], data=data, limit=2, progress=recorder)
    assert recorder.total == recorder.done == 2 * 3 + 2 * 2
    zero_shot(*embedded, ["copa"], data=data, limit=2)  # no bar either where there is no terminal
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("lm_eval").level == level


def test_the_seed_draws_the_documents(embedded: Model, data: Path) -> None:
    def scored(**options: Any) -> TaskScore:
        return zero_shot(*embedded, ["rte"], data={"rte": data / "rte"}, progress=False, **options).tasks["rte"]

    with pytest.MonkeyPatch.context() as patch:
        drawn: list[list[int]] = []
        original = zero_shot_evaluation._samples

        def samples(*arguments: Any) -> Any:
            found = original(*arguments)
            drawn.append(list(found["rte"]))
            return found

        patch.setattr(zero_shot_evaluation, "_samples", samples)
        scores = [scored(limit=3, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] == sorted(drawn[0]) != drawn[2]
    assert all((score.documents, score.available) == (3, 8) for score in scores)
    rows = [HUB["rte"][number] for number in drawn[2]]
    hits = []
    for row in rows:
        prompt, choices, right = prompts("rte", row)
        hits.append(int(np.argmax([log_likelihood(*embedded, prompt, f" {c}") for c in choices])) == right)
    assert scores[2].metrics["acc"].value == pytest.approx(np.mean(hits))
    assert scored(limit=1000) == scored()


def test_few_shot_examples_come_from_the_training_set(embedded: Model, data: Path, tmp_path: Path) -> None:
    tasks = load_tasks(["cb"], read_documents(["cb"], data), 2, 0)
    context = tasks["cb"].fewshot_context(HUB["cb"][0], 2)
    examples = context.split("\n\n")
    known = [f"{prompts('cb', row)[0]} {prompts('cb', row)[1][row['label']]}" for row in CB[4:]]
    assert len(examples) == 3
    assert set(examples[:2]) < set(known)
    assert examples[2] == prompts("cb", CB[0])[0]
    assert zero_shot(*embedded, ["cb"], data=data, num_fewshot=2, limit=2, progress=False).num_fewshot == 2
    write_all(tmp_path)
    with pytest.raises(ValueError, match="`num_fewshot` must be 0 where there is no training set, as for 'cb', but is"):
        zero_shot(*embedded, ["cb"], data=tmp_path, num_fewshot=2)


def test_a_compiled_model_is_scored_and_left_as_it_was(embedded: Model, data: Path) -> None:
    tokenizer = embedded[1]
    model = dynamo_compile(olmoe(vocab_size=len(tokenizer)), datasets(), **OPTIONS).train()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if "histogram" not in name}
    special, states = dict(tokenizer.special_tokens_map), (torch.get_rng_state(), np.random.get_state()[1].copy())
    random.seed(3)

    def change() -> None:
        with pytest.raises(RuntimeError):
            model.runtime.revert()

    score = zero_shot(model, tokenizer, ["copa"], data=data, progress=Recorder(change)).tasks["copa"]
    assert score.documents == 8
    assert random.random() == random.Random(3).random()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert tokenizer.special_tokens_map == special
    assert model.training
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in tensors.items())
    model.runtime.revert()
    hits = []
    for row in HUB["copa"]:
        prompt, choices, right = prompts("copa", row)
        hits.append(
            int(np.argmax([log_likelihood(model.eval(), tokenizer, prompt, f" {c}") for c in choices])) == right
        )
    assert score.metrics["acc"].value == np.mean(hits)


def test_nan_is_no_answer(embedded: Model, data: Path) -> None:
    model = olmoe(vocab_size=len(embedded[1])).train()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"the log-likelihood of .* is NaN: the model has no accuracy"):
        zero_shot(model, embedded[1], ["copa"], data=data, progress=False)
    assert model.training


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tasks": "rte"}, TypeError, "`tasks` must be a sequence of names, but is the string 'rte'"),
        ({"tasks": []}, ValueError, r"`tasks` must name tasks, each once, but is \[\]"),
        ({"tasks": ["rte", "rte"]}, ValueError, r"`tasks` must name tasks, each once, but is \['rte', 'rte'\]"),
        ({"limit": 0}, ValueError, "`limit` must be at least 1, but is 0"),
        ({"num_fewshot": -1}, ValueError, "`num_fewshot` must be at least 0, but is -1"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1, but is 0"),
        ({"tokenizer": print}, TypeError, "`tokenizer` must be a tokenizer of transformers, but is a builtin_function"),
        ({"data": "./nowhere"}, FileNotFoundError, "`data` must be an existing folder, but there is no nowhere"),
    ],
)
def test_bad_arguments(embedded: Model, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        zero_shot(**({"model": embedded[0], "tokenizer": embedded[1]} | options))


def test_without_the_library(embedded: Model, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RuntimeError, match=r"needs the library lm-eval, .*: pip install 'moe-compiler\[eval\]'"):
        zero_shot(*embedded, ["rte"], data=data)


def test_the_result_as_a_table_and_as_json() -> None:
    found = ZeroShotResult(
        tasks={
            "cb": TaskScore({"acc": Metric(0.5, 0.25), "f1": Metric(0.125)}, 56, 56, "1.0", "hub aps/super_glue, cb"),
            "rte": TaskScore({"acc": Metric(0.75, 0.1)}, 5, 277, "1.0", "rte/dev.tsv"),
        },
        num_fewshot=0,
        limit=5,
        seed=0,
        lm_eval="0.4.13",
    )
    table = "\n".join(
        [
            "task  documents  acc              f1",
            "─" * 40,
            "cb    56         0.5000 ± 0.2500  0.1250",
            "rte   5 of 277   0.7500 ± 0.1000",
            "",
            "mean acc 0.6250; zero-shot, seed 0, lm-eval 0.4.13",
            "cb: hub aps/super_glue, cb",
            "rte: rte/dev.tsv",
        ]
    )
    assert str(found) == table
    loaded = json.loads(json.dumps(found.to_dict()))
    assert loaded["tasks"]["cb"]["metrics"]["acc"] == {"value": 0.5, "stderr": 0.25}
    assert loaded["mean_accuracy"] == 0.625
