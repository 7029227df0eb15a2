"""Documents of the zero-shot tasks as the hub has them, and files of them as their publishers write them."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import datasets

Rows = Sequence[dict[str, Any]]

WORDS = ["ants dig", "bees fly", "cats sleep all day", "dogs bark", "eels swim", "foxes hide at night"]
ARC = [
    {
        "id": f"arc{n}",
        "question": f"What do {WORDS[n % 6]}?",
        "choices": {"text": [WORDS[(n + k) % 6] for k in range(3 + n % 2)], "label": list("ABCD"[: 3 + n % 2])},
        "answerKey": "ABCD"[n % 3],
    }
    for n in range(8)
]
PIQA = [
    {"goal": f"{WORDS[n % 6]}?", "sol1": WORDS[(n + 1) % 6], "sol2": f"{WORDS[n % 6]} & more", "label": n // 2 % 2}
    for n in range(8)
]
RTE = [
    {"sentence1": f"{WORDS[n % 6]} < now.", "sentence2": f'"{WORDS[(n * n) % 6]}".', "label": n // 3 % 2, "idx": n}
    for n in range(8)
]
COPA = [
    {
        "premise": f"The {WORDS[n % 6]}.",
        "choice1": f"It {WORDS[(n + 1) % 6]}.",
        "choice2": f"Many {WORDS[(n + 2) % 6]}.",
        "question": ("cause", "effect")[n % 2],
        "idx": n,
        "label": n // 2 % 2,
    }
    for n in range(8)
]
CB = [{"premise": f"{WORDS[n % 6]}.", "hypothesis": WORDS[n // 2], "idx": n, "label": n % 3} for n in range(8)]
HUB: dict[str, Rows] = {"arc_challenge": ARC, "arc_easy": ARC[::-1], "cb": CB, "copa": COPA, "piqa": PIQA, "rte": RTE}
"""By task, rows with the columns of the data set on the hub."""


def write_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, rows: Rows) -> None:
    datasets.Dataset.from_list(list(rows)).to_parquet(path)


def write_ai2(path: Path, rows: Rows) -> None:
    def nested(row: dict[str, Any]) -> dict[str, Any]:
        choices = row["choices"]
        pairs = zip(choices["text"], choices["label"], strict=True)
        stem = {"stem": row["question"], "choices": [{"text": text, "label": label} for text, label in pairs]}
        return {"id": row["id"], "question": stem, "answerKey": row["answerKey"]}

    write_jsonl(path, [nested(row) for row in rows])


def write_labels_beside(path: Path, rows: Rows) -> None:
    write_jsonl(path, [{name: value for name, value in row.items() if name != "label"} for row in rows])
    path.with_name(f"{path.stem}-labels.lst").write_text("".join(f"{row['label']}\n" for row in rows))


def write_rte_xml(attribute: str, names: tuple[str, str]) -> Callable[[Path, Rows], None]:
    def write(path: Path, rows: Rows) -> None:
        pairs = "".join(
            f'<pair id="{n}" {attribute}="{names[row["label"]]}" task="IE">\n\t<t>{escape(row["sentence1"])}</t>\n'
            f"\t<h>\n{escape(row['sentence2'])}</h></pair>\n"
            for n, row in enumerate(rows)
        )
        head = '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE entailment-corpus SYSTEM "rte.dtd">\n'
        path.write_text(f"{head}<entailment-corpus>\n{pairs}</entailment-corpus>\n")

    return write


def write_rte_superglue(path: Path, rows: Rows) -> None:
    names = ("entailment", "not_entailment")
    write_jsonl(
        path,
        [{"premise": r["sentence1"], "hypothesis": r["sentence2"], "label": names[r["label"]]} for r in rows],
    )


def write_glue_tsv(path: Path, rows: Rows) -> None:
    with path.open("w", newline="") as file:
        file.write("index\tsentence1\tsentence2\tlabel\n")
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n")
        for row in rows:
            label = ("entailment", "not_entailment")[row["label"]]
            writer.writerow((row["idx"], row["sentence1"], row["sentence2"], label))


def write_copa_xml(path: Path, rows: Rows) -> None:
    items = "".join(
        f'<item id="{n}" asks-for={quoteattr(row["question"])} most-plausible-alternative="{row["label"] + 1}">\n'
        f"<p>{row['premise']}</p><a1>{row['choice1']}</a1><a2>{row['choice2']}</a2></item>\n"
        for n, row in enumerate(rows)
    )
    path.write_text(f'<?xml version="1.0"?>\n<copa-corpus version="1.0">\n{items}</copa-corpus>')


def write_cb(path: Path, rows: Rows) -> None:
    names = ("entailment", "contradiction", "neutral")
    write_jsonl(path, [row | {"label": names[row["label"]]} for row in rows])


FILES: list[tuple[str, str, Callable[[Path, Rows], None]]] = [
    ("arc_challenge", "ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-Test.jsonl", write_ai2),
    ("arc_challenge", "ai2_arc/ARC-Challenge/test-00000-of-00001.parquet", write_parquet),
    ("arc_easy", "arc_easy/test.jsonl", write_jsonl),
    ("piqa", "piqa/dev.jsonl", write_labels_beside),
    ("piqa", "physics/piqa/valid.jsonl", write_jsonl),
    ("piqa", "PIQA/plain_text/validation/0000.parquet", write_parquet),
    ("rte", "rte/rte1_test.xml", write_rte_xml("value", ("TRUE", "FALSE"))),
    ("rte", "rte/RTE3-TEST-GOLD.xml", write_rte_xml("entailment", ("YES", "NO"))),
    ("rte", "glue/RTE/dev.tsv", write_glue_tsv),
    ("rte", "SuperGLUE/RTE/val.jsonl", write_rte_superglue),
    ("rte", "glue/rte/validation-00000-of-00001.parquet", write_parquet),
    ("copa", "COPA/copa-test.xml", write_copa_xml),
    ("copa", "copa/val.jsonl", write_jsonl),
    ("cb", "CB/val.jsonl", write_cb),
    ("cb", "super_glue/cb/validation-00000-of-00001.parquet", write_parquet),
]
"""Task, a usual place of the split that is evaluated, and what writes the file."""


def write_all(root: Path, train: bool = False) -> None:
    """The first of `FILES` of each task, and a training set where it is wanted."""
    for task, place, write in FILES:
        if not (root / task).exists():
            (root / task).mkdir(parents=True)
            write(root / task / Path(place).name, HUB[task])
            if train:
                name = "dev.xml" if place.endswith(".xml") else f"train{Path(place).suffix}"
                write(root / task / name, HUB[task][4:])
