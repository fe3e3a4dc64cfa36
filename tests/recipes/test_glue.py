"""Tables of sentences: GLUE's eight forms and plain ones are read, and what is not as said is refused."""

import gzip
import re

import numpy as np
import pytest

from fastkit._command import Refusal
from fastkit.recipes._glue import METRICS, generated, load

pytest.importorskip("sklearn")


def written(folder, name, lines, *, gz=False):
    folder.mkdir(parents=True, exist_ok=True)
    data = "".join("\t".join(line) + "\n" for line in lines).encode()
    path = folder / f"{name}.tsv{'.gz' if gz else ''}"
    path.write_bytes(gzip.compress(data) if gz else data)
    return path


def rows(texts, labels, n=4):
    """n rows of a task, its labels in turn; ``texts`` and a label make a row's fields."""
    return [texts(i, labels[i % len(labels)]) for i in range(n)]


STSB = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2"]
MNLI = [
    "index",
    "promptID",
    "pairID",
    "genre",
    "parse 1",
    "parse 2",
    "parse 3",
    "parse 4",
    "sentence1",
    "sentence2",
]
MRPC = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]

# As GLUE's own archive has them: header, a row, labels; the unlabelled test part's header and row.
FORMS = {
    "CoLA": (None, lambda i, y: ["gj04", y, "" if y == "1" else "*", f"s {i}"], "01",
             ["index", "sentence"], ["0", "s"]),
    "SST-2": (["sentence", "label"], lambda i, y: [f"s {i}", y], "10", ["index", "sentence"], ["0", "s"]),
    "MRPC": (["\ufeffQuality", *MRPC[1:]], lambda i, y: [y, "7", "8", f"s {i}", f"t {i}"], "10",
             ["index", *MRPC[1:]], ["0", "7", "8", "s", "t"]),
    "STS-B": ([*STSB, "score"], lambda i, y: [str(i), "g", "f", "2012", "1", "a", "b", f"s {i}", f"t {i}", y],
              ["5.000", "0.25", "3.8"], STSB, ["0", "g", "f", "2012", "1", "a", "b", "s", "t"]),
    "QQP": (["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
            lambda i, y: [str(i), "1", "2", f"s {i}", f"t {i}", y], "01",
            ["id", "question1", "question2"], ["0", "s", "t"]),
    "MNLI": ([*MNLI, "label1", "gold_label"],
             lambda i, y: [str(i), *"pqgabcd", f"s {i}", f"t {i}", y, y],
             ["neutral", "entailment", "contradiction"], MNLI, ["0", *"pqgabcd", "s", "t"]),
    "QNLI": (["index", "question", "sentence", "label"], lambda i, y: [str(i), f"s {i}", f"t {i}", y],
             ["entailment", "not_entailment"], ["index", "question", "sentence"], ["0", "s", "t"]),
    "RTE": (["index", "sentence1", "sentence2", "label"], lambda i, y: [str(i), f"s {i}", f"t {i}", y],
            ["not_entailment", "entailment"], ["index", "sentence1", "sentence2"], ["0", "s", "t"]),
}  # fmt: skip


def glue(folder, name):
    header, row, labels, test_header, test_row = FORMS[name]
    head = [header] if header else []
    matched = ("_matched", "_mismatched") if name == "MNLI" else ("",)
    written(folder, "train", head + rows(row, labels, 6))
    for suffix in matched:
        written(folder, f"dev{suffix}", head + rows(row, labels, 5))
        written(folder, f"test{suffix}", [test_header, test_row])
    return folder


@pytest.mark.parametrize("name", FORMS)
def test_glue_as_its_archive_has_it(tmp_path, name):
    task = load(glue(tmp_path / name, name))
    assert task.kind == name.lower().replace("-", "")
    single = name in ("CoLA", "SST-2")
    assert task.train.first == [f"s {i}" for i in range(6)]
    assert task.train.second == (None if single else [f"t {i}" for i in range(6)])
    assert list(task.held_out) == (["dev_matched", "dev_mismatched"] if name == "MNLI" else ["dev"])
    assert all(len(part.y) == 5 for part in task.held_out.values())
    labels = [FORMS[name][2][i % len(FORMS[name][2])] for i in range(6)]
    if name == "STS-B":
        assert task.classes == [] and task.train.y.dtype == np.float32
        np.testing.assert_array_equal(task.train.y, np.float32([5, 0.25, 3.8] * 2))
    else:
        assert [task.classes[y] for y in task.train.y] == labels
        assert task.classes == sorted(set(labels))
    facts = task.facts()
    assert facts["train"] == 6 and facts["task"] == task.kind and len(facts["sha256"]) == 64


@pytest.mark.parametrize(
    "folder, kind",
    [
        ("glue_cola", "cola"),
        ("mine", "classification"),
        ("glue_rte", "rte"),
        ("sst2", "sst2"),
        ("GLUE-SST-2", "sst2"),
    ],
)
def test_a_plain_table_is_of_the_task_that_its_folder_names(tmp_path, folder, kind):
    for part in ("train", "dev"):
        written(tmp_path / folder, part, [["sentence", "label"], ["a", "0"], ["b", "1"]], gz=True)
    assert load(tmp_path / folder).kind == kind
    assert load(tmp_path / folder, kind="mrpc").kind == "mrpc"


@pytest.mark.parametrize("name", ["MRPC", "QQP", "MNLI", "QNLI", "CoLA"])
def test_columns_tell_the_task_where_the_folder_does_not(tmp_path, name):
    task = load(glue(tmp_path / "data", name))
    assert task.kind == ("classification" if name == "CoLA" else name.lower())


def test_pairs_with_two_targets(tmp_path):
    lines = [
        ["sentence1", "sentence2", "label", "relatedness"],
        ["a", "b", "2", "3.6"],
        ["c", "d", "10", "5"],
    ]
    for part in ("train", "test"):
        written(tmp_path / "sick", part, lines)
    task = load(tmp_path / "sick")
    assert task.kind == "classification" and task.classes == ["2", "10"] and list(task.held_out) == ["test"]
    task = load(tmp_path / "sick", target="relatedness")
    assert task.kind == "regression" and task.train.y.tolist() == pytest.approx([3.6, 5])


def test_sentences_may_hold_what_str_takes_for_line_breaks(tmp_path):
    lines = [["sentence", "label"], ['a\x85b\u2028c\x0bd "e', "0"], ["f", "1"]]
    for part in ("train", "dev"):
        written(tmp_path, part, lines)
    assert load(tmp_path).train.first == ['a\x85b\u2028c\x0bd "e', "f"]
    text = (tmp_path / "train.tsv").read_text(encoding="utf8")
    (tmp_path / "train.tsv").write_bytes(text.replace("\n", "\r\n").encode())
    assert load(tmp_path).train.first == ['a\x85b\u2028c\x0bd "e', "f"]


def test_lines_that_are_left_out_are_counted(tmp_path):
    header, row, labels, *_ = FORMS["QQP"]
    written(tmp_path, "train", [header, *rows(row, labels, 200), ["torn"]])
    written(tmp_path, "dev", [header, *rows(row, [*labels, "-"], 6)])
    task = load(tmp_path)
    assert len(task.train.y) == 200 and len(task.held_out["dev"].y) == 4
    assert task.facts()["left_out"] == 3


@pytest.mark.parametrize("unknown", ["-1", "-1.0"])  # of classes, and as a regression may have it
def test_a_test_part_of_unknown_labels_is_no_test_part(tmp_path, unknown):
    for part in ("train", "dev"):
        written(tmp_path, part, TABLE)
    written(tmp_path, "test", [TABLE[0], ["a", unknown], ["b", unknown]])
    for kind in ("classification", "regression"):
        assert list(load(tmp_path, kind=kind).held_out) == ["dev"]
    written(tmp_path, "test", [TABLE[0], ["a", unknown], ["b", "0"]])
    assert list(load(tmp_path, kind="regression").held_out) == ["dev", "test"]


def test_the_hash_is_of_all_that_is_read(tmp_path):
    def hashed(*changes):
        table = [["sentence", "label"], ["a", "0"], ["b", "1"]]
        for line, field, value in changes:
            table[line][field] = value
        written(tmp_path, "train", table)
        return load(tmp_path).facts()["sha256"]

    written(tmp_path, "dev", [["sentence", "label"], ["a", "0"]])
    hashes = [hashed(), hashed((1, 0, "c")), hashed((1, 1, "1"), (2, 1, "0")), hashed()]
    assert len(set(hashes)) == 3 and hashes[0] == hashes[3]


# Metrics


def test_metrics_are_the_tasks_own():
    y = np.array([0, 0, 1, 1, 1, 0])
    logits = np.eye(2, dtype=np.float32)[[0, 1, 1, 1, 0, 0]]  # 4 of 6; 2 of 3 found, 1 false
    assert METRICS["sst2"](y, logits) == {"accuracy": pytest.approx(4 / 6)}
    assert METRICS["mrpc"](y, logits) == {"accuracy": pytest.approx(4 / 6), "f1": pytest.approx(2 / 3)}
    assert METRICS["qqp"] is METRICS["mrpc"]
    assert METRICS["cola"](y, logits) == {"matthews": pytest.approx((2 * 2 - 1) / 9)}
    scores = np.float32([1, 2, 3, 4])
    found = METRICS["stsb"](scores, np.exp(scores)[:, None])
    assert found["spearman"] == pytest.approx(1) and 0.9 < found["pearson"] < 0.95
    for task in ("mnli", "qnli", "rte", "classification"):
        assert METRICS[task] is METRICS["sst2"]


def test_a_constant_answer_has_figures_without_a_warning():
    constant = np.zeros((4, 2), dtype=np.float32)
    y = np.array([0, 1, 1, 0])
    assert METRICS["cola"](y, constant) == {"matthews": 0}
    assert METRICS["mrpc"](y, constant) == {"accuracy": 0.5, "f1": 0}
    assert np.isnan(list(METRICS["stsb"](np.float32(y), constant[:, :1]).values())).all()


def test_the_generated_task_is_always_the_same():
    task = generated()
    assert task.facts() == generated().facts()
    assert task.facts()["sha256"] == "79cf5f53bc289251e2939d7e90e30b766c7887692b98844f6eb160bb43f20bc8"
    assert {len(part.y) for part in (task.train, *task.held_out.values())} == {4000, 500, 1000}
    assert 0.45 < task.train.y.mean() < 0.55


# Refusals


def refused(folder, message, **options):
    with pytest.raises(Refusal, match=f"^{re.escape(message)}"):
        load(folder, **options)


TABLE = [["sentence", "label"], ["a", "0"], ["b", "1"]]


def test_what_is_not_there_is_refused(tmp_path):
    refused(tmp_path / "no", f"--data must be a folder, got nothing there: {tmp_path / 'no'}; give")
    refused(tmp_path, f"--data must hold train.tsv or train.tsv.gz, got neither in {tmp_path}")
    written(tmp_path, "train", TABLE)
    refused(tmp_path / "train.tsv", "--data must be a folder, got a file")
    refused(tmp_path, f"--data must hold a labelled dev or test part, got train alone in {tmp_path}")
    written(tmp_path, "dev", TABLE)
    written(tmp_path, "dev", TABLE, gz=True)
    refused(tmp_path, "--data must hold one file a part, got dev.tsv and dev.tsv.gz")


CUT_OFF = gzip.compress(b"sentence\tlabel\n" * 99, mtime=0)[:-9]


@pytest.mark.parametrize("data", [b"\x1f\x8b no more", b"", CUT_OFF], ids=["header", "empty", "cut off"])
def test_an_archive_that_cannot_be_read_is_refused(tmp_path, data):
    (tmp_path / "train.tsv.gz").write_bytes(data)
    with pytest.raises(Refusal, match=r"train\.tsv\.gz must (be a table in UTF-8|have a header)"):
        load(tmp_path)
    (tmp_path / "train.tsv.gz").unlink()
    (tmp_path / "train.tsv").write_bytes(b"sentence\tlabel\n\xff\t1\n")
    refused(tmp_path, f"{tmp_path / 'train.tsv'} must be a table in UTF-8, got one that cannot be read")


@pytest.mark.parametrize(
    "part, table, options, message",
    [
        ("train", [["text", "label"], ["a", "0"]], {},
         " must have a header with sentence, or sentence1 and sentence2, or GLUE's names"
         " for them, got text, label"),
        ("train", [["sentence", "class"], ["a", "0"]], {},
         " must have a column of labels, gold_label or is_duplicate or quality or label or score,"
         " got sentence, class"),
        ("train", TABLE, {"target": "mood"}, " must have a column of labels, mood, got sentence, label"),
        ("train", [*TABLE, ["c"]], {}, ", line 4 must have 2 fields as the header has, got 1; a sentence"),
        ("train", [TABLE[0], ["c", "-"]], {}, " must have lines with a label, got none"),
        ("train", [TABLE[0], ["c", "1"]], {}, " must have at least 2 labels, got 1"),
        ("train", [*TABLE, ["c", "2"]], {"kind": "sst2"}, " must have 2 labels, got 0, 1, 2"),
        ("train", [TABLE[0], ["a", "yes"], ["b", "no"]], {"kind": "mrpc"},
         " must have the labels 0 and 1 for mrpc, whose F1 is that of 1, got no, yes; rename them, or take"
         " --task classification"),
        ("train", [TABLE[0], ["a", "1"], ["b", "2"]], {"kind": "qqp"},
         " must have the labels 0 and 1 for qqp, whose F1 is that of 1, got 1, 2; rename"),
        ("train", [TABLE[0], *([str(i)] * 2 for i in range(1001))], {},
         " must have at most 1000 labels, got 1001; for"),
        ("dev", [*TABLE, ["c", "x"]], {}, ", line 4 must have a label of the train part, 0, 1, got 'x'"),
        ("train", [*TABLE, ["c", "x"]], {"kind": "regression"},
         ", line 4 must have a number as label, got 'x'"),
        ("dev", [*TABLE, ["c", "inf"]], {"kind": "stsb"}, ", line 4 must have a number as label, got 'inf'"),
        ("dev", [["sentence1", "sentence2", "label"], ["a", "b", "0"]], {},
         " must have sentences or pairs of them as train.tsv has"),
    ],
)  # fmt: skip
def test_a_table_that_is_not_as_said_is_refused(tmp_path, part, table, options, message):
    for name in ("train", "dev"):
        written(tmp_path, name, TABLE)
    path = written(tmp_path, part, table)
    refused(tmp_path, f"{path}{message}", **options)
