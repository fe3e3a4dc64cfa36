"""Text of word vectors: the number next to each decimal one, lines as they are, and what is refused."""

import gzip
import math
import re
import struct
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastkit import _native
from fastkit.methods.word_translation import load_vectors, save_vectors, vector_text
from fastkit.methods.word_translation.vector_lines import (
    format_in_python,
    format_rows,
    parse_in_python,
    parse_lines,
)

pytestmark = pytest.mark.native

needs_library = pytest.mark.skipif(_native.REASON is not None, reason="the library is not built")


@pytest.fixture(params=["library", "python"])
def parser(request, monkeypatch):
    """With the library, and as where there is none."""
    if request.param == "library":
        if _native.REASON is not None:
            pytest.skip(_native.REASON)
    else:
        monkeypatch.setattr(_native, "REASON", "the library is missing")
        monkeypatch.setattr(_native, "_warned", True)
    return request.param


def write(folder, text, name="some.vec"):
    path = folder / name
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def parsed(text, columns, rows=100):
    table = torch.zeros(rows, columns)
    found = parse_lines(bytearray(text), 0, len(text), table)
    return found.tolist(), table[: len(found)]


# Numbers


def bits_of(value):
    return struct.unpack("<I", struct.pack("<f", value))[0]


def nearest_float32(text):
    """Its bits, by exact arithmetic: the greatest float that is not above, or the one behind it."""
    exact = abs(Fraction(text))

    def value(bits):  # of 0 to inf, which stands for 2^128
        exponent, fraction = bits >> 23, bits & 0x7FFFFF
        if exponent == 0:
            return Fraction(fraction) / 2**149
        return (Fraction(fraction) + 2**23) * Fraction(2) ** (exponent - 150)

    low, high = 0, 0xFF << 23
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if value(middle) <= exact else (low, middle)
    below, above = exact - value(low), value(low + 1) - exact
    bits = low if below < above or (below == above and low % 2 == 0) else low + 1
    return bits | (text.startswith("-") << 31)


TWICE_ROUNDED = [
    "7.038531e-26",
    "-7.038531e-26",
    "1.00000017881393432617187499",
    "1.00000017881393432617187501",
]
HARD = [
    *TWICE_ROUNDED,
    "16777217", "16777219", "16777217.000000000000000000001", "0.1", ".5", "5.", "-0", "+3", "00012",
    "1e-45", "7e-46", "7.1e-46", "7.006492321624085e-46", "7.0064923216240854e-46",
    "1.1754942807573642e-38", "1.17549435e-38", "1e-39", "3.4028235e38", "3.4028235677973366e38",
    "3.4028235677973367e38", "1e39", "1E+2", "9007199254740993", "9007199254740992e22", "1e22", "1e-22",
    "1e23", "1234567890123456789", "12345678901234567890", "0.00000000000000000000012345",
    "123456789012345678901234567890", "1.5e-0005", "0." + "0" * 60 + "1e45", "1" + "0" * 60 + "e-50",
    "4.35", "8388608.5", "8388609.5", "33554434", "33554438",
]  # fmt: skip


def midpoint(bits):
    """Halfway between a float and the next."""
    ends = [struct.unpack("<f", struct.pack("<I", b))[0] for b in (bits, bits + 1)]
    return (Fraction(ends[0]) + Fraction(ends[1])) / 2


def beside(number, places):
    """The decimal number with so many places that is next to it, and those on either side."""
    whole = round(number * Fraction(10) ** places)
    return [f"{whole + step}e{-places}" for step in (-1, 0, 1)]


def test_numbers_are_rounded_once(parser):
    generator = np.random.default_rng(0)
    texts = list(HARD)
    for digits in (1, 4, 7, 8, 9, 12, 17, 19, 25):
        for _ in range(20):
            whole = "".join(map(str, generator.integers(0, 10, digits)))
            point = int(generator.integers(0, digits + 1))
            texts.append(f"{'-' if generator.random() < 0.5 else ''}{whole[:point]}.{whole[point:]}")
            texts.append(f"{whole}e{generator.integers(-60, 35)}")
    for bits in generator.integers(0, 0x7F7FFFFF, 40):
        texts += beside(midpoint(int(bits)), 400)
    # Short ones, of numbers of common size, some of which have a midpoint as their double
    for bits in generator.integers(0x38000000, 0x58000000, 150):
        middle = midpoint(int(bits))
        texts.append(repr(float(middle)))
        whole_digits = len(str(int(middle)))
        for digits in (16, 17, 18, 19):
            texts += beside(middle, digits - whole_digits)
    _, rows = parsed(f"w {' '.join(texts)}".encode(), len(texts))
    found = rows[0].numpy().view(np.uint32).tolist()
    wrong = [
        (text, f"{bits:08x}")
        for text, bits in zip(texts, found, strict=True)
        if bits != nearest_float32(text)
    ]
    assert wrong == []


def test_some_of_these_numbers_need_it():
    for text in TWICE_ROUNDED[:2]:
        assert bits_of(np.float32(float(text))) != nearest_float32(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e400", math.inf), ("-1" + "0" * 400, -math.inf), ("1e99999999999999999999", math.inf),
        ("1" + "0" * 400 + "e-300", math.inf), ("1" + "0" * 400 + "e-400", 1.0),
        ("0." + "0" * 400 + "1e401", 1.0), ("0." + "0" * 400 + "1e300", 0.0), ("1e-400", 0.0),
        ("1e-99999999999999999999", 0.0), ("0e99999999999999999999", 0.0),
        ("inf", math.inf), ("-Infinity", -math.inf), ("+INF", math.inf), ("nan", math.nan),
        ("-NaN", math.nan),
    ],
)  # fmt: skip
def test_what_is_beyond_float32(parser, text, expected):
    [line], rows = parsed(f"w {text}".encode(), 1)
    torch.testing.assert_close(rows, torch.tensor([[expected]]), rtol=0, atol=0, equal_nan=True)
    assert line[4] == (-1 if expected == 0 else 0 if expected == 1 else 1)


NO_NUMBERS = [
    "x", "1_0", "1,5", "0x10", "1e", "1e+", "e5", ".", "-", "+-1", "--1", "1.2.3", "infx", "in", "nan(1)",
    "\u0661", "1\v2", "1\r2", "1f", "1e5.0", "\0", "1\0", "\uff11", ".e1", "1.2.", "1.23456789a",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_is_no_number(parser, text):
    """Among numbers, and at the end, where fewer bytes follow: the row is NaN, the fault is there."""
    [line, last], rows = parsed(f"w 1 {text} 3\nw 1 2 {text}".encode(), 3)
    assert rows.isnan().all()
    assert (line[4], last[4]) == (2, 3)


# Lines


def test_lines_end_and_words_end(parser):
    text = b"a 1 2\r\n\nb\t3 \t 4  \nc 5\nd 6 7 8\n 9 10\n\r\ne 0 -0.0\nf\xc2\xa0g\r 1 2\n\xff 1 2"
    found, rows = parsed(text, 2)
    words = [text[begin:word_end] for begin, word_end, *_ in found]
    assert words == [b"a", b"", b"b", b"c", b"d", b"", b"", b"e", b"f\xc2\xa0g\r", b"\xff"]
    assert [text[begin:end] for begin, _, end, *_ in found] == [
        line.removesuffix(b"\r") for line in text.split(b"\n")
    ]
    assert [line[3] for line in found] == [2, 0, 2, 1, 3, 2, 0, 2, 2, 2]
    assert [line[4] for line in found] == [0, 0, 0, 0, 0, 0, 0, -1, 0, 0]
    good = torch.tensor([0, 2, 5, 7, 8, 9])
    assert rows[good].tolist() == [[1, 2], [3, 4], [9, 10], [0, 0], [1, 2], [1, 2]]
    assert rows[[1, 3, 4, 6]].isnan().all()


def test_what_is_behind_the_text_is_not_read(parser):
    table = torch.zeros(1, 1)
    for end in range(4, 12):
        parse_lines(bytearray(b"w 1.1111111111111111"), 0, end, table)
        assert table.item() == np.float32("1." + "1" * (end - 4))


def test_no_more_lines_than_rows(parser):
    text = b"a 1\nb 2\nc 3\n"
    assert [len(parsed(text, 1, rows)[0]) for rows in (0, 1, 2, 3, 4)] == [0, 1, 2, 3, 3]


@needs_library
def test_no_text():
    rows = torch.zeros(4, 2)
    assert torch.ops.fastkit.parse_vectors_(torch.zeros(0, dtype=torch.uint8), rows).shape == (0, 5)
    text, lengths = torch.ops.fastkit.format_vectors(rows[:0])
    assert (text.shape, lengths.shape) == ((0, 32), (0,))


ALPHABET = [
    b"1",
    b"0",
    b"23",
    b".",
    b"-",
    b"+",
    b"e",
    b" ",
    b" ",
    b"\t",
    b"\n",
    b"\r",
    b"w",
    b"nan",
    b"\xc3",
    b"\0",
]


@needs_library
def test_the_library_and_python_agree_on_any_bytes():
    generator = np.random.default_rng(1)
    for size in generator.integers(1, 60, 600):
        text = b"".join(ALPHABET[i] for i in generator.integers(0, len(ALPHABET), size))
        columns = int(generator.integers(1, 4))
        found, rows = parsed(text, columns)
        table = torch.zeros(100, columns)
        assert parse_in_python(text, table).tolist() == found
        torch.testing.assert_close(rows, table[: len(found)], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(rows.signbit() & ~rows.isnan(), table[: len(found)].signbit() & ~rows.isnan())


@needs_library
def test_threads_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(400, 50, generator=generator)
    text = b"".join(b"w %b\n" % row for row in format_rows(table))
    assert len(text) > 4 * 32768  # enough for some threads
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(parsed(text, 50, 400)[1], table)
    finally:
        torch.set_num_threads(before)


@needs_library
def test_raw_ops_check_what_memory_needs():
    text, rows = torch.zeros(8, dtype=torch.uint8), torch.zeros(4, 2)
    parse, form = torch.ops.fastkit.parse_vectors_, torch.ops.fastkit.format_vectors
    for wrong in (text[None], text.float(), torch.zeros(8, 2, dtype=torch.uint8)[:, 0]):
        with pytest.raises(RuntimeError, match="text must be on the CPU, dense, uint8"):
            parse(wrong, rows)
    for wrong in (rows[0], rows.double(), rows.t()):
        with pytest.raises(RuntimeError, match="vectors must be on the CPU, dense, float32"):
            parse(text, wrong)
        with pytest.raises(RuntimeError, match="vectors must be on the CPU, dense, float32"):
            form(wrong)


# Numbers that are written


def test_written_numbers_are_the_shortest_that_are_read_back(parser):
    generator = np.random.default_rng(2)
    bits = np.concatenate([
        generator.integers(0, 0x7F800000, 500), generator.integers(0x3C000000, 0x3F800000, 500),
        [0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x15AE43FD, 0x15AE43FE, 0x4B800000, 0x3DCCCCCD],
    ]).astype(np.uint32)  # fmt: skip
    bits[::2] |= np.uint32(1 << 31)
    values = bits.view(np.float32)
    table = torch.from_numpy(values.copy())[None]
    [text] = format_rows(table)
    _, rows = parsed(b"w " + text, len(values))
    assert torch.equal(rows.view(torch.int32), table.view(torch.int32))
    digits = [len(re.sub(rb"e.*|\D", b"", field).strip(b"0")) for field in text.split(b" ")]
    shortest = [
        len(re.sub(r"e.*|\D", "", np.format_float_scientific(v, unique=True)).strip("0")) for v in values
    ]
    # A whole number below 10^15 may be written with all its digits.
    assert all(a == b or abs(v) >= 2**24 for a, b, v in zip(digits, shortest, values, strict=True))


@needs_library
def test_the_library_and_python_write_the_same_numbers():
    table = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    numbers = [
        [list(map(float, row.split())) for row in write(table)] for write in (format_rows, format_in_python)
    ]
    assert numbers[0] == numbers[1]


# Files


def test_header_or_none(tmp_path, parser):
    body = "the 1 2 3\nof 4 5 6\n"
    plain = load_vectors(write(tmp_path, body))
    with_header = load_vectors(write(tmp_path, "2 3\n" + body))
    packed = load_vectors(write(tmp_path, "2 3\n" + body, "some.vec.gz"))
    with_mark = load_vectors(write(tmp_path, b"\xef\xbb\xbf2\t3 \r\n" + body.encode(), "some.TXT"))
    for found in (plain, with_header, packed, with_mark):
        assert found.words == ["the", "of"]
        assert found.vectors.tolist() == [[1, 2, 3], [4, 5, 6]]
        assert found.vectors.dtype == torch.float32
        assert not any(found.dropped.values())


def test_a_table_of_one_column_is_no_header(tmp_path):
    path = write(tmp_path, "1999 3\n2000 4\n")
    assert load_vectors(path).words == ["1999", "2000"]
    path = write(tmp_path, "2 1\n1999 3\n2000 4\n")
    assert load_vectors(path).words == ["1999", "2000"]
    assert load_vectors(path, header=False).words == ["2", "1999", "2000"]
    path = write(tmp_path, "5 2\n\n7 1 2\n")
    with pytest.warns(
        RuntimeWarning, match="has 5 vectors as its first line says, but only 1 lines: it may be cut"
    ):
        assert load_vectors(path).words == ["7"]
    with pytest.raises(
        ValueError, match=r"some\.vec must begin with a line of two whole numbers, got 'the 1 2'"
    ):
        load_vectors(write(tmp_path, "the 1 2\n"), header=True)


def test_words_hold_all_but_ascii_blanks(tmp_path, parser):
    words = ["a\u00a0b", "\u0085", "\u2028", "c\x0bd", "\x1c", "1.5", "\ufeff", "e\x00", "日本", "\u3000"]
    path = write(tmp_path, "".join(f"{word} {i}.5 1\n" for i, word in enumerate(words)))
    found = load_vectors(path)
    assert found.words == words
    assert found.vectors[:, 0].tolist() == [i + 0.5 for i in range(len(words))]


BAD_LINES = {
    "of 1": "line 3 must have 2 numbers behind its word as line 1 says, got 1 fields behind 'of'",
    "of 1 2 3": "line 3 must have 2 numbers behind its word as line 1 says, got 3 fields behind 'of'",
    "of": "line 3 must have 2 numbers behind its word as line 1 says, got 0 fields behind 'of'",
    "of 1 2x": "line 3 must have numbers behind its word, got '2x', the field 2 behind 'of'",
    "of nan 1,5": "line 3 must have numbers behind its word, got '1,5', the field 2 behind 'of'",
    " 1 2": "line 3 must begin with a word, got a blank before '1'",
    b"o\xff 1 2": r"line 3 must have a word in UTF-8, got 'o\\xff'",
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_bad_lines(tmp_path, parser, bad):
    raw = bad if isinstance(bad, bytes) else bad.encode()
    path = write(tmp_path, b"3 2\nthe 1 2\n" + raw + b"\nto 3 4\n")
    message = re.escape(BAD_LINES[bad])
    with pytest.raises(
        ValueError, match=rf"load_vectors: .*some\.vec {message}; mend it, or pass bad_lines='skip'"
    ):
        load_vectors(path)
    with pytest.warns(RuntimeWarning, match=f"has 1 bad lines, which were skipped; {message}"):
        found = load_vectors(path, bad_lines="skip")
    assert (found.words, found.vectors.tolist()) == (["the", "to"], [[1, 2], [3, 4]])
    assert found.dropped["bad_lines"] == 1


def test_bytes_that_are_not_utf_8(tmp_path):
    path = write(tmp_path, b"o\xff 1 2\n\xfe 3 4\nto 5 6\n")
    with pytest.warns(
        RuntimeWarning, match=r"has 1 bad lines.* line 2 must have a word in UTF-8, got '\\\\xfe'"
    ):
        assert load_vectors(path, errors="ignore", bad_lines="skip").words == ["o", "to"]
    assert load_vectors(path, errors="replace").words == ["o\ufffd", "\ufffd", "to"]


def test_lines_are_counted_where_they_are_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(vector_text, "_BLOCK", 64)
    body = "\n".join(f"word{i} {i} {i + 1}" if i % 5 else "" for i in range(1, 200))
    path = write(tmp_path, f"{body}\nlast 1\n")
    with pytest.raises(
        ValueError, match=r"line 200 must have 2 numbers behind its word, got 1 fields behind 'last'"
    ):
        load_vectors(path)
    path = write(tmp_path, f"{body}\nlast 1 2")
    found = load_vectors(path)
    assert found.words == [f"word{i}" for i in range(1, 200) if i % 5] + ["last"]
    assert found.vectors[:-1, 0].tolist() == [i for i in range(1, 200) if i % 5]


def test_header_that_does_not_fit(tmp_path):
    with pytest.warns(
        RuntimeWarning, match="has 1 vectors as its first line says, but more lines, which were read"
    ):
        assert len(load_vectors(write(tmp_path, "1 2\nthe 1 2\nof 3 4\n"))) == 2
    with pytest.raises(ValueError, match="line 2 must have 3 numbers behind its word as line 1 says, got 2"):
        load_vectors(write(tmp_path, "2 3\nthe 1 2\nof 3 4\n"))
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match=r"at least one vector, got none"):
        raise_after_warning(write(tmp_path, "2 3\nthe 1 2\nof 3 4\n"))
    for columns in (0, 10**12):
        with pytest.raises(ValueError, match=rf"must have 1 to \d+ numbers a line, got {columns} in line 1"):
            load_vectors(write(tmp_path, f"2 {columns}\nthe 1 2\n"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(load_vectors(write(tmp_path, f"{10**17} 2\nthe 1 2\n"))) == 1


def raise_after_warning(path):
    warnings.warn("none of ours", RuntimeWarning, stacklevel=1)
    load_vectors(path, bad_lines="skip")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have vectors, got an empty file"),
        ("\n \n\n", "must have vectors, got none in 3 lines"),
        ("5 3\n", "must have vectors, got none in 1 lines"),
        ("the\nof 1 2\n", "line 1 must have numbers behind its word 'the', got none"),
    ],
)
def test_files_without_vectors(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_vectors(write(tmp_path, text))


def test_a_gzip_that_breaks_off(tmp_path):
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "some.vec.gz"
    save_vectors(path, [f"w{i}" for i in range(500)], torch.randn(500, 30, generator=generator))
    whole = path.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:-3], whole[:100] + b"\0" * 50 + whole[150:], b"the 1 2\n"):
        path.write_bytes(part)
        with pytest.raises(ValueError, match="must be a whole gzip file, got one that cannot be unpacked"):
            load_vectors(path)


def test_max_words_ends_the_reading(tmp_path, parser, monkeypatch):
    """What is behind the last word that is wanted is not looked at, be it bad, or not there."""
    text = b"The 1 2\nthe 3 4\nof 0 0\n\nto 5 6\nbad 1\n"
    path = write(tmp_path, text)
    options = {"lowercase": True, "zeros": "drop"}
    found = load_vectors(path, max_words=2, **options)
    assert (found.words, found.vectors.tolist()) == (["the", "to"], [[1, 2], [5, 6]])
    assert found.dropped == {"duplicates": 0, "lowercased": 1, "zeros": 1, "bad_lines": 0}
    with pytest.raises(ValueError, match="line 6"):
        load_vectors(path, max_words=3, **options)
    monkeypatch.setattr(vector_text, "_BLOCK", 1 << 14)
    packed = gzip.compress(text + b"".join(b"w%d 1 2\n" % i for i in range(10_000)), 1)
    path = tmp_path / "some.vec.gz"
    path.write_bytes(packed[: len(packed) // 2])
    assert load_vectors(path, max_words=2, **options).words == ["the", "to"]


def test_a_table_grows_as_it_must(tmp_path, monkeypatch):
    """Lines that become shorter, and a gzip without header, whose lines nobody has counted."""
    monkeypatch.setattr(vector_text, "_BLOCK", 256)
    body = "".join(f"{'w' * 60}{i} 1 {i}\n" for i in range(10)) + "".join(f"{i} 1 {i}\n" for i in range(3000))
    for name in ("some.vec", "some.vec.gz"):
        found = load_vectors(write(tmp_path, body, name))
        assert found.vectors[:, 1].tolist() == [*range(10), *range(3000)]
        assert found.vectors.untyped_storage().nbytes() <= found.vectors.nbytes * 8 / 7


def test_a_line_that_is_longer_than_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(vector_text, "_BLOCK", 16)
    path = write(tmp_path, "the " + "1.25 " * 100 + "\nof " + "2 " * 100 + "\n")
    assert load_vectors(path).vectors.mean(1).tolist() == [1.25, 2]
    monkeypatch.setattr(vector_text, "_LONGEST_LINE", 64)
    with pytest.raises(ValueError, match="must have lines of at most 64 bytes, got a longer one"):
        load_vectors(path)


def test_no_bytes_bring_it_down(tmp_path):
    """Vectors or a ValueError, and nothing else; text, and what only has its name."""
    generator = np.random.default_rng(3)
    outcomes = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(200):
            pick = generator.integers(0, len(ALPHABET), generator.integers(1, 40))
            text = b"".join(ALPHABET[k] for k in pick) if i % 2 else generator.bytes(len(pick))
            name = ["a.vec", "a.vec.gz", "a.npz", "a.npy"][i % 4 if i % 8 < 2 else 0]
            path = tmp_path / name
            path.write_bytes(text)
            for bad_lines in ("error", "skip"):
                try:
                    found = load_vectors(path, bad_lines=bad_lines, zeros="keep", errors="replace")
                    assert found.words is not None and len(found.words) == len(found) > 0
                    assert found.vectors.isfinite().all()
                    outcomes.add("vectors")
                except ValueError as error:
                    assert str(error).startswith(f"load_vectors: {path} ")
                    outcomes.add("refusal")
    assert outcomes == {"vectors", "refusal"}


def test_without_the_library_there_is_one_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(_native, "REASON", "the library is missing; rebuild it")
    monkeypatch.setattr(_native, "_warned", False)
    path = write(tmp_path, "the 1 2\n")
    with pytest.warns(
        RuntimeWarning, match="slow reference implementations: the library is missing; rebuild it"
    ):
        assert load_vectors(path)["the"].tolist() == [1, 2]
    assert load_vectors(path)["the"].tolist() == [1, 2]
