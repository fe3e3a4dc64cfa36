"""Grey images in the format of docs/data.md, and what is refused of them, in words."""

import re

import numpy as np
import pytest

from fastkit._command import Refusal
from fastkit.recipes._images import digits, load


def save(folder, **changes):
    generator = np.random.default_rng(0)
    made = {
        "x_train": generator.integers(0, 256, (6, 4, 5), dtype=np.uint8),
        "y_train": np.array([0, 1, 2, 0, 1, 2], np.uint8),
        "x_test": generator.integers(0, 256, (2, 4, 5), dtype=np.uint8),
        "y_test": np.array([2, 0]),
    }
    np.savez(folder / "small.npz", **{k: v for k, v in (made | changes).items() if v is not None})
    return folder


def test_bytes_are_scaled_and_floats_are_taken_as_they_are(tmp_path):
    images = load(save(tmp_path))
    assert (images.name, images.classes) == ("small", 3)
    assert images.train.x.dtype == np.float32 and images.train.y.dtype == images.test.y.dtype == np.int64
    stored = np.load(tmp_path / "small.npz")
    np.testing.assert_array_equal(images.test.x, stored["x_test"].astype(np.float32) / 255)
    np.testing.assert_array_equal(images.train.y, stored["y_train"])
    scaled = {key: stored[key].astype(np.float32) / 255 for key in ("x_train", "x_test")}
    stored.close()
    save(tmp_path, **scaled)
    assert load(tmp_path).facts() == images.facts()  # the hash is of what was read
    assert images.facts()["size"] == [4, 5]


def test_digits_are_divided_as_is_said():
    pytest.importorskip("sklearn")
    images = digits()
    assert images.train.x.shape == (1257, 8, 8) and images.test.x.shape == (540, 8, 8)
    assert (images.train.x.min(), images.train.x.max()) == (0, 1)
    assert np.bincount(images.test.y).min() >= 52


X = np.zeros((6, 4, 5), np.float32)


@pytest.mark.parametrize("changes, message", [
    ({"y_test": None}, "must have the keys x_train, y_train, x_test, y_test, got a file without y_test"),
    ({"x_train": np.array([{}])}, "must be an .npz of plain arrays, got one that cannot be read"),
    ({"x_train": np.zeros((6, 4, 5, 3), np.uint8)}, "x_train must be grey images, of shape (images, height,"
     " width), one at least and of 2 x 2 at least, got uint8 of shape (6, 4, 5, 3)"),
    ({"x_test": np.zeros((0, 4, 5), np.uint8)}, "x_test must be grey images"),
    ({"x_train": np.zeros((6, 1, 5), np.uint8)}, "got uint8 of shape (6, 1, 5)"),
    ({"x_test": np.zeros((2, 5, 4), np.uint8)}, "train and test must have images of one size, got (4, 5) and"
     " (5, 4)"),
    ({"x_train": X.astype(int)}, "x_train must be uint8, or floats from 0 to 1, got int64 of shape"),
    ({"x_train": X + 1.5}, "x_train must be uint8, or floats from 0 to 1, got 1.5 to 1.5; divide by the"),
    ({"x_train": X * np.nan}, "x_train must be uint8, or floats from 0 to 1, got nan to nan"),
    ({"y_train": np.zeros(5, int)}, "y_train must be integers of shape (6,), one for each image of x_train,"
     " got int64 of shape (5,)"),
    ({"y_train": np.zeros(6)}, "y_train must be integers of shape (6,)"),
    ({"y_train": np.array([0, 1, 2, 0, 1, -1])}, "y_train must be classes from 0 on, got -1"),
    ({"y_train": np.array([0, 1, 3, 0, 1, 10**12])}, "y_train must have two classes at least, numbered from 0"
     " on without gaps, got 0, 1, 3, 1000000000000"),
    ({"y_train": np.zeros(6, int)}, "y_train must have two classes at least, numbered from 0 on without gaps,"
     " got 0"),
    ({"y_train": np.array([0, 1, 1, 0, 1, 0])}, "y_test must have classes of y_train, 0 to 1, got 2"),
])  # fmt: skip
def test_what_is_not_as_described_is_refused(tmp_path, changes, message):
    save(tmp_path, **changes)
    with pytest.raises(Refusal, match=re.escape(message)) as refusal:
        load(tmp_path)
    assert str(refusal.value).startswith(str(tmp_path / "small.npz"))


def test_a_folder_with_one_archive_is_needed(tmp_path):
    with pytest.raises(Refusal, match="--data must be a folder, got nothing there"):
        load(tmp_path / "no")
    with pytest.raises(Refusal, match=re.escape("--data must hold one .npz of images, got none in")):
        load(tmp_path)
    save(tmp_path)
    with pytest.raises(Refusal, match="--data must be a folder, got a file"):
        load(tmp_path / "small.npz")
    (tmp_path / "other.npz").write_bytes(b"")
    with pytest.raises(Refusal, match=re.escape("got other.npz, small.npz in")):
        load(tmp_path)
    (tmp_path / "small.npz").unlink()
    with pytest.raises(Refusal, match="not a zip archive"):
        load(tmp_path)
