"""Series in the formats of docs/data.md, and what is refused of them, in words."""

import contextlib
import re

import numpy as np
import pytest

from fastkit._command import Refusal
from fastkit.recipes._series import Part, load, standardised

HEADER = """# a comment
@problemName Two
@timeStamps false
@missing false
@univariate {univariate}
@equalLength false
@classLabel true up Down
@data
"""


def arrays(**changes):
    generator = np.random.default_rng(0)
    made = {
        "x_train": generator.normal(size=(4, 2, 5)).astype(np.float32),
        "len_train": np.array([5, 3, 5, 4]),
        "y_train": np.array([0, 1, 0, 1]),
        "x_test": generator.normal(size=(2, 2, 7)),
        "len_test": np.array([7, 1]),
        "y_test": np.array([1, 0]),
        "classes": np.array(["up", "down"]),
    }
    return made | changes


def save(folder, **changes):
    np.savez(folder / "two.npz", **arrays(**changes))
    return folder


def save_ts(folder, train, test, *, header=HEADER, univariate="true"):
    for part, lines in (("TRAIN", train), ("TEST", test)):
        text = header.format(univariate=univariate) + "\n".join(lines) + "\n"
        (folder / f"Two_{part}.ts").write_text(text)
    return folder


# What is read


def test_npz(tmp_path):
    x_train = arrays()["x_train"]
    x_train[1, :, 3:] = np.nan  # behind the end
    series = load(save(tmp_path, x_train=x_train))
    assert series.name == "two" and series.classes == ["up", "down"]
    assert series.train.x.dtype == series.test.x.dtype == np.float32
    assert series.train.x.shape == (4, 2, 5) and series.test.x.shape == (2, 2, 7)
    np.testing.assert_array_equal(series.train.x[1, :, 3:], 0)
    np.testing.assert_array_equal(series.train.x[1, :, :3], x_train[1, :, :3])
    np.testing.assert_array_equal(series.train.lengths, [5, 3, 5, 4])
    np.testing.assert_array_equal(series.test.y, [1, 0])


def test_padding_that_no_series_needs_is_cut_off(tmp_path):
    assert load(save(tmp_path, len_train=np.array([2, 3, 1, 3]))).train.x.shape == (4, 2, 3)


def test_ts(tmp_path):
    save_ts(tmp_path, ["1,2.5,-3e0:up", "", "# said in between", " 4 , 5 : Down "], ["6:up"])
    series = load(tmp_path)
    assert series.name == "Two" and series.classes == ["up", "Down"]
    np.testing.assert_array_equal(series.train.x, [[[1, 2.5, -3]], [[4, 5, 0]]])
    np.testing.assert_array_equal(series.train.lengths, [3, 2])
    np.testing.assert_array_equal(series.train.y, [0, 1])
    np.testing.assert_array_equal(series.test.x, [[[6]]])


def test_ts_of_several_channels(tmp_path):
    save_ts(tmp_path, ["1,2:3,4:up", "5:6:Down"], ["7:8:up"], univariate="false")
    np.testing.assert_array_equal(load(tmp_path).train.x, [[[1, 2], [3, 4]], [[5, 0], [6, 0]]])


def test_both_formats_of_one_set_have_one_hash(tmp_path):
    """The hash is of what is trained on, not of a file."""
    for name in ("ts", "npz"):
        (tmp_path / name).mkdir()
    save_ts(tmp_path / "ts", ["1,2:up", "4,5:Down"], ["6,7:up"])
    one, length = np.array([0]), np.array([2])
    parts = {
        "x_train": np.array([[[1, 2]], [[4, 5]]]), "len_train": np.array([2, 2]), "y_train": np.array([0, 1]),
        "x_test": np.array([[[6, 7]]]), "len_test": length, "y_test": one, "classes": ["up", "Down"],
    }  # fmt: skip
    np.savez(tmp_path / "npz" / "Two.npz", **parts)
    assert load(tmp_path / "ts").facts() == load(tmp_path / "npz").facts()
    parts["x_test"] = np.array([[[6, 8]]])
    facts = load(tmp_path / "ts").facts()
    np.savez(tmp_path / "npz" / "Two.npz", **parts)
    assert (
        load(tmp_path / "npz").facts()
        == facts | {"sha256": load(tmp_path / "npz").facts()["sha256"]}
        != facts
    )
    assert (facts["name"], facts["train"], facts["test"], facts["longest"]) == ("Two", 2, 1, 2)


def test_standardised_is_by_series_and_channel_over_its_length():
    x = np.array([[[1, 3, 0, 0], [1e6, 1e6 + 1, 0, 0]], [[5, 5, 5, 0], [0.1, 0.1, 0.1, 0]]], np.float32)
    part = standardised(Part(x, np.array([2, 3]), np.array([0, 0])))
    np.testing.assert_allclose(part.x, [[[-1, 1, 0, 0], [-1, 1, 0, 0]], [[0] * 4, [0] * 4]], atol=1e-6)
    assert part.x.dtype == np.float32


# What is refused


def refused(folder, message):
    with pytest.raises(Refusal, match=re.escape(message)):
        load(folder)


def test_folders(tmp_path):
    refused(
        tmp_path / "no", f"--data must be a folder, got nothing there: {tmp_path / 'no'}; give the folder"
    )
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "--data must be a folder, got a file")
    refused(tmp_path, f"--data must hold one .npz or one NAME_TRAIN.ts, got neither in {tmp_path}")
    for name in ("a.npz", "b.npz"):
        (tmp_path / name).touch()
    refused(tmp_path, f"got a.npz, b.npz in {tmp_path}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.zeros((4, 5))}, "x_train must be numbers of shape (series, channels, time), got"),
        ({"x_test": np.array([[["a"]]])}, "x_test must be numbers of shape (series, channels, time), got <U"),
        ({"len_train": np.array([5, 3])}, "len_train must be integers of shape (4,), one for each series of"),
        ({"y_test": np.array([0.0, 1.0])}, "y_test must be integers of shape (2,), one for each series of"),
        ({"len_train": np.array([5, 3, 0, 4])}, "train part: lengths must be 1 to 5, got 0 to 5"),
        ({"len_test": np.array([8, 1])}, "test part: lengths must be 1 to 7, got 1 to 8"),
        ({"y_train": np.array([0, 1, 2, 1])}, "train part: labels must be 0 to 1, got 0 to 2"),
        ({"y_train": np.array([0, 0, 0, 0])}, "must be in the train part, got down in the test part alone"),
        ({"x_train": np.full((4, 2, 5), np.nan)}, "train part: values must be finite in float32, got NaN"),
        ({"x_test": np.full((2, 2, 7), 1e300)}, "test part: values must be finite in float32, got NaN"),
        ({"x_test": np.zeros((2, 3, 7))}, "train and test must have the same channels, got 2 and 3"),
        ({"x_test": np.zeros((0, 2, 7)), "len_test": np.zeros(0, int), "y_test": np.zeros(0, int)},
         "test part must have series, got none"),
        ({"classes": np.zeros((2, 2))}, "classes must be a list of names, got float64 of shape (2, 2)"),
        ({"classes": np.array(["up", None], object)}, "must be an .npz of plain arrays, got one that"),
    ],
)  # fmt: skip
def test_npz_contents(tmp_path, changes, message):
    refused(save(tmp_path, **changes), message)


def test_npz_without_a_key(tmp_path):
    made = arrays()
    del made["len_test"], made["classes"]
    np.savez(tmp_path / "two.npz", **made)
    refused(tmp_path, "y_test, classes, got a file without len_test, classes")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00"])
def test_npz_that_is_none(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    refused(tmp_path, "x.npz must be an .npz of plain arrays, got one that cannot be read")


def test_npz_cut_or_changed_anywhere(tmp_path):
    """A damaged file is refused, or reads as something whole: no other exception."""
    content = (save(tmp_path) / "two.npz").read_bytes()
    generator = np.random.default_rng(0)
    for place in generator.integers(0, len(content), 150):
        for damaged in (content[:place], content[:place] + b"\xff\xff" + content[place + 2 :]):
            (tmp_path / "two.npz").write_bytes(damaged)
            with contextlib.suppress(Refusal):
                load(tmp_path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1,?,3:up"], "Two_TRAIN.ts, line 9 must have numbers with commas between, got: could not convert"),
        (["1,?,3:up"], "; fill the gaps, or leave that series out"),
        (["1,2:sideways"], "line 9 must end with one of the classes up Down, got 'sideways'"),
        (["1,2"], "line 9 must end with one of the classes up Down, got '1,2'"),
        (["up"], "line 9 must have 1 channels, got 0"),
        (["1:up", "1:2:up"], "line 10 must have 1 channels, got 2"),
        (["1,2:1:up"], "line 9: the channels of a series must have one length, got several"),
        (["1,nan:up"], "train part: values must be finite in float32, got NaN"),
        (["1,1e99:up"], "train part: values must be finite in float32, got NaN or infinity"),
        (
            ["1,2:up"],
            "must be in the train part, got Down in the test part alone",
        ),
        ([], "Two_TRAIN.ts must have series after @data, got none"),
    ],
)
def test_ts_contents(tmp_path, lines, message):
    refused(save_ts(tmp_path, lines, ["1:Down"]), message)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("@timeStamps true\n", "@timeStamps must be false, got true; leave the times out"),
        ("@classLabel false\n@data\n", "must have @classLabel true with the classes, and then @data, got no"),
        ("@classLabel true up\n", "Two_TRAIN.ts, line 2 must be a tag, or come after @data, got '1:up'"),
        ("", "Two_TRAIN.ts, line 1 must be a tag, or come after @data, got '1:up'"),
    ],
)
def test_ts_headers(tmp_path, header, message):
    refused(save_ts(tmp_path, ["1:up"], ["1:up"], header=header), message)


def test_ts_pairs(tmp_path):
    save_ts(tmp_path, ["1:up"], ["1:up"])
    path = tmp_path / "Two_TEST.ts"
    path.write_text("@classLabel true Down up\n@data\n1:up\n")
    refused(tmp_path, "@classLabel must be that of Two_TRAIN.ts, up Down, got Down up")
    path.write_bytes(b"\xff\xfe")
    refused(tmp_path, "Two_TEST.ts must be a text in UTF-8, got one that cannot be read")
    path.unlink()
    refused(tmp_path, "--data must hold Two_TEST.ts beside Two_TRAIN.ts, got")
