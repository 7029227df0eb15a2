"""Published files of the zero-shot tasks become the same documents and requests as the hub's data sets."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
from task_files import ARC, FILES, HUB, PIQA, RTE, write_all, write_jsonl, write_labels_beside, write_parquet

from moe_compiler.tasks import FORMATS, find_folder, load_local
from moe_compiler.tasks.harness import check_tasks, lm_eval, load_tasks, read_documents

CLASSES = {"piqa": ["0", "1"], "rte": ["entailment", "not_entailment"], "copa": ["choice1", "choice2"]}
CLASSES["cb"] = ["entailment", "contradiction", "neutral"]
HUB_NAMES = {
    ("allenai/ai2_arc", "ARC-Challenge"): "arc_challenge",
    ("allenai/ai2_arc", "ARC-Easy"): "arc_easy",
    ("aps/super_glue", "cb"): "cb",
    ("aps/super_glue", "copa"): "copa",
    ("baber/piqa", None): "piqa",
    ("nyu-mll/glue", "rte"): "rte",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's data sets, with its label classes, where lm-eval loads them."""

    def load(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
        task = HUB_NAMES[path, name]
        rows = datasets.Dataset.from_list(list(HUB[task]))
        if task in CLASSES:
            rows = rows.cast_column("label", datasets.ClassLabel(names=CLASSES[task]))
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))

    monkeypatch.setattr(datasets, "load_dataset", load)


def requests(task: Any) -> list[Any]:
    """What lm-eval asks the model, and what it makes of a made-up answer."""
    asked = []
    for document in task.eval_docs:
        instances = task.construct_requests(document, task.doc_to_text(document), metadata=(task.task_name, 0, 1))
        answers = [(-float(len(instance.args[1]) * 7 % 5), False) for instance in instances]
        asked.append(([instance.args for instance in instances], task.process_results(document, answers)))
    return asked


@pytest.mark.usefixtures("hub")
def test_local_files_ask_what_the_hub_does(tmp_path: Path) -> None:
    write_all(tmp_path)
    local = load_tasks(list(FORMATS), read_documents(list(FORMATS), tmp_path), 0, 0)
    remote = load_tasks(list(FORMATS), {}, 0, 0)
    assert local.keys() == remote.keys() == FORMATS.keys()
    for name, task in local.items():
        assert requests(task) == requests(remote[name]), name
        assert len(requests(task)) == 8
        assert task.aggregation().keys() == remote[name].aggregation().keys()
        assert task.VERSION == remote[name].VERSION


@pytest.mark.parametrize(("task", "place", "write"), FILES, ids=[f"{task}-{Path(p).name}" for task, p, _ in FILES])
def test_every_format_has_the_same_documents(tmp_path: Path, task: str, place: str, write: Any) -> None:
    path = tmp_path / "some data" / place
    path.parent.mkdir(parents=True)
    write(path, HUB[task])
    found = load_local(task, find_folder(task, tmp_path))
    wanted = [{name: row[name] for name in found.evaluated[0]} for row in HUB[task]]
    assert found.evaluated == wanted
    assert found.files == (path,)
    assert not found.train
    assert load_local(task, path).evaluated == wanted


def test_splits(tmp_path: Path) -> None:
    write_all(tmp_path, train=True)
    for task in FORMATS:
        found = load_local(task, tmp_path / task)
        assert len(found.evaluated) == 8, task
        assert found.train == found.evaluated[4:], task
    assert len(load_local("copa", tmp_path / "copa" / "dev.xml").evaluated) == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dev.jsonl", '{"goal": 1', "`data` must hold readable files, but .*dev.jsonl is not: Expecting"),
        ("test.xml", "<a><b></a>", "`data` must hold readable files, but .*test.xml is not: mismatched tag"),
        ("dev.jsonl", '{"goal": "g"}', "row 0 of .*dev.jsonl must have a column 'sol1', but has goal"),
        (
            "dev.jsonl",
            json.dumps(PIQA[0]) + '\n{"goal": "g", "sol1": "a", "sol2": "b"}',
            r"row 1 of .* must have a column 'label', but has goal, sol1, sol2 \(labels .* in dev-labels.lst beside it",
        ),
        ("dev.jsonl", json.dumps(PIQA[0] | {"label": -1}), "row 0 of .*must have a valid label: -1 is none of 0, 1"),
    ],
    ids=["json", "xml", "column", "label", "no label"],
)
def test_bad_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_local("piqa", tmp_path)


def test_empty_files_and_those_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "dev.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"`data` must have at least one document, but there is none in .*dev\.jsonl"):
        load_local("piqa", tmp_path)
    (tmp_path / "dev.txt").write_text("goal")
    with pytest.raises(ValueError, match=r"must be files of the kinds \.jsonl, .*, but is .*dev\.txt"):
        load_local("piqa", tmp_path / "dev.txt")


def test_labels_must_be_as_many_as_rows_and_answers_among_the_choices(tmp_path: Path) -> None:
    write_labels_beside(tmp_path / "dev.jsonl", PIQA)
    (tmp_path / "dev-labels.lst").write_text("0\n1\n")
    with pytest.raises(ValueError, match=r"dev-labels\.lst must have a label for each row of .*, 8, but has 2"):
        load_local("piqa", tmp_path)
    write_jsonl(tmp_path / "test.jsonl", [ARC[0] | {"answerKey": "E"}])
    with pytest.raises(ValueError, match=r"row 0 of .* must have a valid label: 'E' is none of A, B, C"):
        load_local("arc_easy", tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`data` must be an existing folder, but there is no .*nowhere"):
        find_folder("rte", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"must have a folder 'rte' .* as `data=\{'rte': path\}`"):
        find_folder("rte", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"`data` must be existing files or folders, but there is no .*nowhere"):
        load_local("rte", tmp_path / "nowhere")
    write_parquet(tmp_path / "test.parquet", RTE)
    with pytest.raises(FileNotFoundError, match=r"split 'validation' for 'rte' .* has the files: test\.parquet"):
        load_local("rte", tmp_path)
    with pytest.raises(ValueError, match=r"`data` must be of the tasks arc_challenge, .* but is of 'mmlu'"):
        load_local("mmlu", tmp_path)
    with pytest.raises(ValueError, match="`data` must be of the tasks rte, piqa, but is of 'cb'"):
        read_documents(["rte", "piqa"], {"cb": tmp_path})


def test_without_a_hub_it_says_what_to_do() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"`tasks` has 'piqa', whose documents are neither .* local files as `d"
    ):
        load_tasks(["piqa"], {}, 0, 0)


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A harness that knows only ARC, since reading all of its tasks takes long."""
    module = lm_eval(".tasks")
    folder = Path(module.__file__).parent / "arc"
    monkeypatch.setattr(module, "TaskManager", partial(module.TaskManager, include_path=folder, include_defaults=False))


def test_names_are_checked_before_anything_takes_long() -> None:
    check_tasks(["arc_easy", "ai2_arc", "mmlu", "super-glue-lm-eval-v1"])  # tasks, a tag, a group
    with pytest.raises(ValueError, match="must be tasks of lm-eval, but there is no 'piqqa'; near: piqa"):
        check_tasks(["piqa", "piqqa"])
    with pytest.raises(ValueError, match=r"there is no 'Zzzzzzzzzzzzzzzzz'$"):
        check_tasks(["Zzzzzzzzzzzzzzzzz"])


@pytest.mark.usefixtures("few_tasks")
def test_an_unknown_task() -> None:
    with pytest.raises(ValueError, match=re.escape("there is no 'arc_hard'; near: arc_easy")):
        load_tasks(["arc_hard"], {}, 0, 0)


@pytest.mark.usefixtures("few_tasks", "hub")
def test_a_tag_stands_for_its_tasks() -> None:
    assert list(load_tasks(["ai2_arc"], {}, 0, 0)) == ["arc_challenge", "arc_easy"]
