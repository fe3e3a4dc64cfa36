"""Files of word vectors: what is written is read, in every format; what is kept, and what is refused."""

import gzip
import json
import pickle
import re
import sys
import warnings

import numpy as np
import pytest
import torch

from fastkit.methods.word_translation import Vectors, load_vectors, save_vectors

pytestmark = pytest.mark.native

SUFFIXES = [".vec", ".txt", ".vec.gz", ".txt.gz", ".npz", ".npy", ".safetensors"]
WORDS = ["the", "The", "1.5", "\u00a0", "a\u0085b", "naïve", "日本語", "'\"\\", "e\x00d", "\ufefftop"]


@pytest.fixture(params=SUFFIXES)
def path(request, tmp_path):
    if request.param == ".safetensors":
        pytest.importorskip("safetensors")
    return tmp_path / f"some{request.param}"


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def table(words=WORDS, columns=7):
    return list(words), noise(len(words), columns)


def write_npz(folder, **entries):
    path = folder / "some.npz"
    np.savez(path, **entries)
    return path


def write(folder, text):
    path = folder / "some.vec"
    path.write_text(text, newline="")
    return path


def bits(tensor):
    return tensor.view(torch.int32)


# Written and read


def test_what_is_written_is_read(path):
    words, vectors = table()
    vectors[0] *= 1e-44  # subnormal
    vectors[1] = torch.finfo(torch.float32).max
    vectors[2] = torch.tensor(7.038531e-26)
    vectors[3] = -0.0
    vectors[3, 0] = 3
    save_vectors(path, words, vectors)
    found = load_vectors(path)
    assert found.words == words
    assert torch.equal(bits(found.vectors), bits(vectors))
    assert found.vectors.is_contiguous()
    assert sorted(file.name for file in path.parent.iterdir()) == (
        ["some.npy", "some.words.txt"] if path.suffix == ".npy" else [path.name]
    )
    first = load_vectors(path, max_words=4)
    assert (first.words, first.vectors.shape) == (words[:4], (4, 7))
    assert torch.equal(bits(first.vectors), bits(vectors[:4]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_strides_are_written_in_float32(path, dtype):
    vectors = noise(6, 5).to(dtype).t().requires_grad_()
    save_vectors(path, list("abcde"), vectors)
    assert torch.equal(load_vectors(path).vectors, vectors.detach().float())


def test_zeros_are_written(path):
    save_vectors(path, ["a", "b"], torch.tensor([[0.0, -0.0], [1.0, 2.0]]))
    found = load_vectors(path, zeros="keep")
    assert (found.words, found.vectors.tolist()) == (["a", "b"], [[0, 0], [1, 2]])
    assert found.vectors[0].signbit().tolist() == [False, True]


def test_equal_vectors_make_equal_files(tmp_path):
    """No time, no name of a file: a hash says whether two are the same."""
    for suffix in (".vec", ".vec.gz", ".npy"):
        files = [tmp_path / f"{name}{suffix}" for name in "ab"]
        for file in files:
            save_vectors(file, *table())
        assert files[0].read_bytes() == files[1].read_bytes()


def test_text_is_what_others_read(tmp_path):
    save_vectors(tmp_path / "some.vec", ["the", "of"], torch.tensor([[0.1, -2.0, 1e-7], [3.0, 0.25, 1e20]]))
    lines = (tmp_path / "some.vec").read_text().split("\n")
    assert lines[0] == "2 3" and lines[3] == ""
    assert [line.split(" ")[0] for line in lines[1:3]] == ["the", "of"]
    assert [[float(x) for x in line.split(" ")[1:]] for line in lines[1:3]] == [
        [0.1, -2, 1e-7],
        [3, 0.25, 1e20],
    ]


def test_many_rows(tmp_path):
    """More than are written, and converted, at a time."""
    words = [f"w{i}" for i in range(5000)]
    vectors = noise(5000, 300)
    for suffix in (".vec", ".npy"):
        save_vectors(tmp_path / f"some{suffix}", words, vectors)
        found = load_vectors(tmp_path / f"some{suffix}")
        assert found.words == words
        assert torch.equal(found.vectors, vectors)


def test_a_file_is_replaced_whole(path, monkeypatch):
    words, vectors = table()
    save_vectors(path, words, vectors)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        save_vectors(path, words, vectors + 1)
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.tmp"))


def test_words_that_are_not_its_own_do_not_stay(tmp_path):
    path = tmp_path / "some.npy"
    save_vectors(path, ["a", "b"], noise(2, 3))
    save_vectors(path, None, noise(2, 3))
    assert load_vectors(path).words is None
    (tmp_path / "some.txt").write_text("x\r\ny\n")
    save_vectors(path, None, noise(2, 3))
    assert load_vectors(path).words == ["x", "y"]
    save_vectors(path, ["a", "b"], noise(2, 3))
    assert load_vectors(path).words == ["a", "b"]
    assert (tmp_path / "some.txt").exists()


# Vectors


def test_words_are_looked_up():
    found = Vectors(["a", "b", "a"], torch.arange(6.0).reshape(3, 2))
    assert len(found) == 3
    assert "b" in found and "c" not in found
    assert (found.index("a"), found.index("b")) == (0, 1)
    assert found["b"].tolist() == [2, 3]
    assert repr(found) == "Vectors(3 words of 2 numbers)"
    with pytest.raises(KeyError, match="word must be one of 3, got 'c'"):
        found.index("c")
    with pytest.raises(ValueError, match="these have no words to look up"):
        Vectors(None, torch.zeros(1, 2)).index("a")
    with pytest.raises(ValueError, match="words must be as many as vectors, got 1 and 2"):
        Vectors(["a"], torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"vectors must have shape \(n, D\), got \(2,\)"):
        Vectors(["a", "b"], torch.zeros(2))


# What is kept


def test_the_first_of_equal_words(tmp_path):
    path = write(tmp_path, "a 1 1\nb 2 2\na 3 3\nA 4 4\na 5 5\nB 6 6\nc 7 7\n")
    with pytest.warns(
        RuntimeWarning, match=r"some\.vec has 2 \('a', 'a'\) words again, of which the first was kept"
    ):
        found = load_vectors(path)
    assert found.words == ["a", "b", "A", "B", "c"]
    assert found.vectors[:, 0].tolist() == [1, 2, 4, 6, 7]
    assert found.dropped == {"duplicates": 2, "lowercased": 0, "zeros": 0, "bad_lines": 0}
    with pytest.raises(
        ValueError, match=r"must have each word once, got 2 \('a', 'a'\) again; pass duplicates='fi"
    ):
        load_vectors(path, duplicates="error")


def test_words_that_lower_casing_makes_equal(tmp_path, recwarn):
    path = write(tmp_path, "The 1 1\nthe 2 2\nÄ 3 3\nä 4 4\nof 5 5\n")
    found = load_vectors(path, lowercase=True)
    assert (found.words, found.vectors[:, 0].tolist()) == (["the", "ä", "of"], [1, 3, 5])
    assert found.dropped["lowercased"] == 2
    assert not recwarn.list  # it is what was asked for
    assert load_vectors(path, duplicates="error").words == ["The", "the", "Ä", "ä", "of"]
    with pytest.raises(ValueError, match=r"got 2 \('the', 'ä'\) again because of lowercase=True"):
        load_vectors(path, lowercase=True, duplicates="error")


@pytest.mark.parametrize("suffix", [".vec", ".npz"])
def test_vectors_of_zeros(tmp_path, suffix):
    words, vectors = list("abcdefgh"), torch.ones(8, 2)
    vectors[1:7] = 0
    path = tmp_path / f"some{suffix}"
    save_vectors(path, words, vectors)
    with pytest.raises(
        ValueError, match=re.escape("for 6 ('b', 'c', 'd', 'e', 'f', ...) words; pass zeros='drop'")
    ):
        load_vectors(path)
    assert load_vectors(path, max_words=1).words == ["a"]
    found = load_vectors(path, zeros="drop")
    assert (found.words, found.vectors.tolist(), found.dropped["zeros"]) == (["a", "h"], [[1, 1], [1, 1]], 6)
    expected = vectors.clone()
    expected[1:7, 0] = 0.01
    found = load_vectors(path, zeros="eps")
    assert found.words == words
    assert torch.equal(found.vectors, expected)
    assert torch.equal(load_vectors(path, zeros="keep").vectors, vectors)


def test_a_word_whose_zeros_were_dropped_may_come_again(tmp_path):
    path = write(tmp_path, "a 0 0\nb 1 1\na 2 2\nb 0 0\n")
    with pytest.warns(RuntimeWarning, match=r"has 1 \('b'\) words again"):
        found = load_vectors(path, zeros="drop")
    assert (found.words, found.vectors.tolist()) == (["b", "a"], [[1, 1], [2, 2]])
    assert found.dropped == {"duplicates": 1, "lowercased": 0, "zeros": 1, "bad_lines": 0}


@pytest.mark.parametrize("suffix", [".vec", ".npz", ".npy"])
def test_numbers_that_are_not_finite(tmp_path, suffix):
    values = np.ones((9, 2))
    values[[1, 2, 3], 0], values[[4, 5, 7], 1] = np.nan, np.inf
    values[8, 0] = 1e39  # in float32
    path = tmp_path / f"some{suffix}"
    if suffix == ".vec":
        write(tmp_path, "".join(f"w{i} {a} {b}\n" for i, (a, b) in enumerate(values)))
    elif suffix == ".npz":
        write_npz(tmp_path, words=[f"w{i}" for i in range(9)], vectors=values)
    else:
        np.save(path, values)
    names = [f"row {i}" if suffix == ".npy" else f"w{i}" for i in (1, 2, 3, 4, 5)]
    found = f"7 ({', '.join(map(repr, names))}, ...) words"
    with pytest.raises(
        ValueError, match=re.escape(f"finite in float32, got NaN or inf for {found}; mend them")
    ):
        load_vectors(path)
    with pytest.warns(RuntimeWarning, match=re.escape(f"has NaN or inf for {found}, which were left out")):
        kept = load_vectors(path, bad_lines="skip")
    assert kept.vectors.tolist() == [[1, 1], [1, 1]]
    assert kept.words == (None if suffix == ".npy" else ["w0", "w6"])
    assert kept.dropped["bad_lines"] == 7


def test_nothing_is_left(tmp_path):
    with pytest.raises(ValueError, match=r"must have at least one vector, got none \(zeros: 2\)"):
        load_vectors(write(tmp_path, "a 0 0\nb 0 0\n"), zeros="drop")


# Arrays


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
def test_arrays_of_others(tmp_path, dtype):
    values = noise(40, 6).numpy().astype(dtype)
    words = np.array([f"wörd{i}" for i in range(40)])
    path = write_npz(tmp_path, words=words, vectors=np.asfortranarray(values), counts=np.arange(3))
    found = load_vectors(path)
    assert found.words == words.tolist()
    assert torch.equal(found.vectors, torch.from_numpy(values.astype(np.float32)))
    path = write_npz(tmp_path, words=np.char.encode(words, "utf-8"), vectors=values)
    assert load_vectors(path).words == words.tolist()
    path = write_npz(tmp_path, words=np.char.encode(words, "latin-1"), vectors=values)
    with pytest.raises(
        ValueError, match=r"must have words in UTF-8, got b'w\\xf6rd0' at word 0; pass errors="
    ):
        load_vectors(path)
    with pytest.warns(RuntimeWarning, match=r"has 1 \('wrd7'\) words again"):
        again = np.char.encode([*words[:8], "wörd7"], "latin-1")
        assert len(load_vectors(write_npz(tmp_path, words=again, vectors=values[:9]), errors="ignore")) == 8


def test_refused_arrays(tmp_path):
    words, values = np.array(["a", "b"]), np.ones((2, 3), np.float32)
    for entries, message in [
        ({"words": words}, "must have the arrays words and vectors, got a file without vectors"),
        ({"other": words}, "got a file without words, vectors"),
        ({"words": words[:1], "vectors": values}, "a word for each vector, got 1 words and 2 vectors"),
        ({"words": words, "vectors": values.astype(int)}, "floating vectors of shape (n, D), got int64 of"),
        ({"words": words, "vectors": values[0]}, "of shape (n, D), got float32 of shape (3,)"),
        ({"words": words, "vectors": values[:, :0]}, "got float32 of shape (2, 0)"),
        ({"words": words[None], "vectors": values}, "(n,) that are strings, got <U1 of shape (1, 2)"),
        ({"words": np.arange(2), "vectors": values}, "that are strings, got int64 of shape (2,)"),
        ({"words": words.astype(object), "vectors": values}, "an .npz of plain arrays, got one that cannot"),
        ({"words": words[:0], "vectors": values[:0]}, "must have at least one vector, got none"),
    ]:  # fmt: skip
        path = write_npz(tmp_path, **entries)
        with pytest.raises(ValueError, match=rf"load_vectors: .*some\.npz .*{re.escape(message)}"):
            load_vectors(path)


class Explosive:
    def __reduce__(self):
        return sys.exit, ("it was unpickled",)


def test_nothing_is_unpickled(tmp_path):
    boom = np.array([Explosive()], dtype=object)
    with pytest.raises(ValueError, match=r"cannot be read \(Object arrays cannot be loaded"):
        load_vectors(write_npz(tmp_path, words=boom, vectors=boom))
    path = tmp_path / "some.npy"
    np.save(path, boom, allow_pickle=True)
    with pytest.raises(ValueError, match=r"must be an \.npy of a plain array, got one that cannot be read"):
        load_vectors(path)
    for name in ("some.npy", "some.npz"):
        (tmp_path / name).write_bytes(pickle.dumps(Explosive()))
        with pytest.raises(ValueError, match="got one that cannot be read"):
            load_vectors(tmp_path / name)


def test_files_that_break_off(path):
    save_vectors(path, *table())
    whole = path.read_bytes()
    for length in range(0, len(whole), max(len(whole) // 25, 1)):
        path.write_bytes(whole[:length])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = load_vectors(path)
            except ValueError as error:
                assert re.match(rf"load_vectors: {path} (line \d+ )?must ", str(error))
            else:  # a text of whole lines, or one that ends in the last number
                assert path.suffixes[-1] in (".vec", ".txt")
                assert found.words == WORDS[: len(found)]


def test_words_beside_an_npy(tmp_path):
    path = tmp_path / "some.npy"
    np.save(path, np.ones((2, 3)))
    assert load_vectors(path).words is None
    assert load_vectors(path, words=["a", "b"]).words == ["a", "b"]
    (tmp_path / "other.txt").write_bytes("\ufeffä\u0085\r\nof the\n".encode())
    assert load_vectors(path, words=tmp_path / "other.txt").words == ["ä\u0085", "of the"]
    assert load_vectors(path, words=str(tmp_path / "other.txt"), max_words=1).words == ["ä\u0085"]
    with pytest.raises(ValueError, match="a word for each vector, got 3 words and 2 vectors"):
        load_vectors(path, words=["a", "b", "c"])
    with pytest.raises(
        FileNotFoundError, match="words must be a list or a file with a word a line, got none"
    ):
        load_vectors(path, words="none")
    (tmp_path / "other.txt").write_bytes(b"a\nb\xff\n")
    with pytest.raises(ValueError, match=r"words in UTF-8, got b'b\\xff' at line 2 of .*other\.txt"):
        load_vectors(path, words=tmp_path / "other.txt")


def test_safetensors_of_others(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "some.safetensors"

    def save(metadata=None, **tensors):
        safetensors.save_file(tensors, path, metadata)

    save(vectors=torch.ones(2, 3, dtype=torch.bfloat16), more=torch.ones(1))
    assert load_vectors(path).words is None
    assert load_vectors(path, words=["a", "b"])["b"].tolist() == [1, 1, 1]
    ours = {"format": "fastkit word vectors 1"}
    for metadata, tensors, message in [
        (None, {"more": torch.ones(1)}, "must have a tensor vectors, got ['more']"),
        (None, {"vectors": torch.ones(2)}, "floating vectors of shape (n, D), got F32 of shape (2,)"),
        (None, {"vectors": torch.ones(2, 2, dtype=torch.int32)}, "got I32 of shape (2, 2)"),
        ({"words": "[]"}, {"vectors": torch.ones(2, 2)}, "the format 'fastkit word vectors 1' in its"),
        ({**ours, "words": "["}, {"vectors": torch.ones(2, 2)}, "must have words in JSON in its metadata"),
        ({**ours, "words": "[" * 10**5}, {"vectors": torch.ones(2, 2)}, "must have words in JSON"),
        ({**ours, "words": "[1, 2]"}, {"vectors": torch.ones(2, 2)}, "must have a list of words"),
        ({**ours, "words": '["a"]'}, {"vectors": torch.ones(2, 2)}, "got 1 words and 2 vectors"),
    ]:  # fmt: skip
        save(metadata, **tensors)
        with pytest.raises(ValueError, match=re.escape(message)):
            load_vectors(path)
    save_vectors(path, ["a\nb", "c d"], noise(2, 2))
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["words"]) == load_vectors(path).words == ["a\nb", "c d"]
    save_vectors(path, None, noise(2, 2))
    assert load_vectors(path).words is None


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    path = tmp_path / "some.safetensors"
    for call in (lambda: save_vectors(path, *table()), lambda: load_vectors(path)):
        path.write_bytes(b"")
        with pytest.raises(
            ImportError, match=r'needs safetensors, which is not installed; pip install "fastkit\[hf'
        ):
            call()


# Refusals


def test_refused_paths(tmp_path):
    for op, call in [
        ("load_vectors", load_vectors),
        ("save_vectors", lambda path: save_vectors(path, ["a"], torch.ones(1, 1))),
    ]:
        with pytest.raises(
            ValueError, match=rf"{op}: path must end in one of \.vec, .*, got wiki\.bin; rename"
        ):
            call("wiki.bin")
        with pytest.raises(TypeError, match=f"{op}: path must be a string or a path, got int"):
            call(3)
        (tmp_path / "folder.vec").mkdir(exist_ok=True)
        with pytest.raises(
            IsADirectoryError, match=rf"{op}: path must be a file.*, got a folder: .*folder\.vec"
        ):
            call(tmp_path / "folder.vec")
        with pytest.raises(
            FileNotFoundError, match=rf"{op}: path must be a file.*, got .*: .*none/some\.vec"
        ):
            call(tmp_path / "none" / "some.vec")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_words": 0}, "max_words must be a positive integer or None, got 0"),
        ({"max_words": True}, "max_words must be a positive integer or None, got True"),
        ({"header": 1}, "header must be one of 'auto', True, False, got 1"),
        ({"lowercase": "yes"}, "lowercase must be one of True, False, got 'yes'"),
        ({"duplicates": "last"}, "duplicates must be one of 'first', 'error', got 'last'"),
        ({"zeros": None}, "zeros must be one of 'error', 'drop', 'eps', 'keep', got None"),
        ({"bad_lines": "ignore"}, "bad_lines must be one of 'error', 'skip', got 'ignore'"),
        (
            {"errors": "surrogateescape"},
            "errors must be one of 'strict', 'ignore', 'replace', got 'surrogateescape'",
        ),
        ({"words": ["a"]}, "words must be None for .vec, which has its own"),
    ],
)
def test_refused_options(tmp_path, option, message):
    with pytest.raises(ValueError, match=f"load_vectors: {re.escape(message)}"):
        load_vectors(write(tmp_path, "a 1 2\n"), **option)


IN_TEXT = r"words must have none of ' ', '\\t', '\\r', '\\n' in \.vec"


@pytest.mark.parametrize(
    ("suffix", "words", "error", "message"),
    [
        (".vec", ["a", ""], ValueError, "words must not be empty, got '' at 1"),
        (".vec", ["a", "a"], ValueError, "words must differ from each other, got 'a' at 1"),
        (".vec", ["a", "b c"], ValueError, f"{IN_TEXT}, got 'b c' at 1"),
        (".vec", ["a", "b\t"], ValueError, IN_TEXT),
        (".vec", ["a", "b\r"], ValueError, IN_TEXT),
        (".vec", ["\n", "b"], ValueError, f"{IN_TEXT}, got '\\\\n' at 0"),
        (
            ".npy",
            ["a", "b\nc"],
            ValueError,
            r"words must have none of '\\r', '\\n' in \.npy, got 'b\\nc' at 1",
        ),
        (".npz", ["a", "b\0"], ValueError, r"words must not end in NUL in \.npz, got 'b\\x00' at 1"),
        (".npz", ["a", "\ud800"], ValueError, r"words must be text that UTF-8 has, got '\\ud800' at 1"),
        (".vec", ["a"], ValueError, "words must be as many as vectors, got 1 and 2"),
        (".vec", ["a", 1], TypeError, "words must be strings, got int at 1"),
        (".vec", "ab", TypeError, "words must be a list of strings, got str"),
        (".npz", None, ValueError, r"words must be given for \.npz, got None"),
    ],
)
def test_refused_words(tmp_path, suffix, words, error, message):
    with pytest.raises(error, match=f"save_vectors: {message}"):
        save_vectors(tmp_path / f"some{suffix}", words, torch.ones(2, 2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("vectors", "error", "message"),
    [
        (np.ones((2, 2)), TypeError, "vectors must be a floating tensor, got ndarray"),
        (
            torch.ones(2, 2, dtype=torch.int64),
            TypeError,
            "vectors must be a floating tensor, got torch.int64",
        ),
        (torch.ones(2), ValueError, r"vectors must have shape \(n, D\) with n and D >= 1, got \(2,\)"),
        (torch.ones(0, 2), ValueError, r"n and D >= 1, got \(0, 2\)"),
        (
            torch.tensor([[1.0], [torch.nan]]),
            ValueError,
            "finite in float32, got 1 rows that are not, of .* is 1",
        ),
        (
            torch.tensor([[1e39], [1]], dtype=torch.float64),
            ValueError,
            "got 1 rows that are not, of which .* is 0",
        ),
    ],
)
def test_refused_vectors(tmp_path, vectors, error, message):
    with pytest.raises(error, match=f"save_vectors: .*{message}"):
        save_vectors(tmp_path / "some.vec", ["a", "b"], vectors)
    assert not list(tmp_path.iterdir())


def test_gzip_is_of_the_name(tmp_path):
    path = tmp_path / "some.VEC.GZ"
    save_vectors(path, *table())
    assert gzip.decompress(path.read_bytes()).startswith(b"10 7\nthe ")
    assert load_vectors(str(path)).words == WORDS
