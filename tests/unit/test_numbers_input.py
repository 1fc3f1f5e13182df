"""The input of `ringoexp send`: text and binary integers, and integers of the command line."""

import io
import os
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ringolib.client.numbers_input import (
    READ_BYTES,
    BadInput,
    Input,
    binary_integers,
    parse_numbers,
    text_integers,
)


def pieces(data: bytes, size: int = READ_BYTES) -> Iterator[bytes]:
    """Yield `data` in pieces of this size."""
    pipe = io.BytesIO(data)
    return iter(lambda: pipe.read(size), b"")


def integers(data: bytes, size: int = READ_BYTES) -> list[int]:
    return [value for block in text_integers(pieces(data, size)) for value in block]


@pytest.mark.parametrize("given", ["%05000d" % 7, "+%060000d" % 7, "-%05000d" % 7, "%05000d" % 0])
def test_leading_zeros_do_not_count(given: str) -> None:
    given = f"1\n{given}\r\n {given} \n2"
    assert integers(given.encode()) == [int(line.replace("0" * 4000, "")) for line in given.split("\n")]


@pytest.mark.parametrize("step", [1, 1000, READ_BYTES])
@pytest.mark.parametrize("character", [b"x", b"7", b"0", b" "])
@pytest.mark.parametrize("end", [b"", b"7\n9\n"])
def test_line_over_the_limit_is_refused_however_it_arrives(character: bytes, end: bytes, step: int) -> None:
    blocks, values = text_integers(pieces(b"1\n\n2\n" + character * 70_000 + end, step)), []
    with pytest.raises(
        BadInput, match=r"^line 4 is longer than 65536 bytes: '.*' \(.*one integer a line; --binary reads"
    ):
        for block in blocks:
            values += block
    assert values == [1, 2]


@pytest.mark.parametrize("step", [1, 2, 3, 100])
@pytest.mark.parametrize("end", ["", "\n", "\r\n2\r\n"])
def test_byte_order_mark_of_utf8_is_skipped(step: int, end: str) -> None:
    assert integers(f"\ufeff1{end}".encode(), step) == [1, *([2] if "2" in end else [])]


@pytest.mark.parametrize("step", [1, 100])
def test_byte_order_mark_is_accepted_at_the_start_only(step: int) -> None:
    assert integers(b"\xef\xbb\xbf\n1\n", step) == [1]
    assert integers(b"\xef\xbb\xbf", step) == []
    with pytest.raises(BadInput, match="^line 2 is not a whole number"):
        integers(b"1\n\xef\xbb\xbf2\n", step)


@pytest.mark.parametrize("step", [1, 100])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("text", ["1", "-1\n2\n", "12\r\n34\r\n"])
def test_utf16_is_named(text: str, mark: str, encoding: str, step: int) -> None:
    if encoding == "utf-32":
        mark = ""  # the codec writes one
    with pytest.raises(BadInput, match="UTF-16 text: convert it to UTF-8"):
        integers((mark + text).encode(encoding), step)


def test_bytes_with_a_nul_hint_at_binary() -> None:
    with pytest.raises(BadInput, match=r"^line 1 is not .* \(it has a NUL: --binary reads integers of 8 bytes each\)$"):
        integers(b"\0\0\0\0\0\0\0\x07")


@pytest.mark.parametrize("step", [1, 7, 8, 9, 100])
def test_binary_integers_are_decoded_however_they_arrive(step: int) -> None:
    data = b"".join(value.to_bytes(8, "big", signed=True) for value in (5, -5, 2**62))
    assert [value for block in binary_integers(pieces(data, step)) for value in block] == [5, -5, 2**62]


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (["42", "-7"], [42, -7]),
        (["+1"], [1]),
        (["-0"], [0]),
        (["0" * 5000 + "1"], [1]),
        ([str(2**63 - 1), str(-(2**63))], [2**63 - 1, -(2**63)]),
        ([], None),
        (["-"], None),
        (["17"], None),  # a file
        (["nowhere"], None),
        (["4.5"], None),
    ],
)
def test_arguments_are_integers_unless_a_file_has_that_name(
    items: list[str], expected: list[int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("17").write_text("1\n")
    given = parse_numbers(items)
    assert (given if given is None else list(given)) == expected


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["17", "18"], "'17' is a file, and there are other arguments"),
        (["18", "17"], "'17' is a file, and there are other arguments"),
        (["1", "-"], "'-' is a file"),
        (["1", "x"], "'x' is neither a file nor a whole number of 64 bits"),
        (["1", "1_0"], "'1_0' is neither"),
        ([str(2**63)], "is neither a file nor a whole number"),
        ([str(-(2**63) - 1)], "is neither a file nor a whole number"),
        (["1", "\udcff"], "is neither a file nor a whole number"),
        (["1", ""], "is neither a file nor a whole number"),
    ],
)
def test_other_arguments_are_refused(
    items: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("17").write_text("1\n")
    with pytest.raises(BadInput, match=message):
        parse_numbers(items)


@pytest.mark.parametrize("skip", [0, 1, 99_999, 100_000, 100_001])
def test_skip_leaves_out_the_first_integers(skip: int, tmp_path: Path) -> None:
    (tmp_path / "numbers").write_text("".join(f"{n}\n" for n in range(100_000)))
    with ExitStack() as stack:
        source, values = Input(str(tmp_path / "numbers"), None, stack, False, skip), array("q")
        try:
            for block in source.blocks():
                values += block
        except BadInput as error:
            assert skip > 100_000 and "it has 100000 integers, fewer than --skip 100001 leaves out" in str(error)
        else:
            assert skip <= 100_000
        assert list(values) == list(range(skip, 100_000))
        assert (source.read, source.skipped) == (len(values), min(skip, 100_000))


def test_share_of_a_file_grows_to_one(tmp_path: Path) -> None:
    (tmp_path / "numbers").write_text("".join(f"{n:07}\n" for n in range(100_000)))
    with ExitStack() as stack:
        source, shares = Input(str(tmp_path / "numbers"), None, stack, False, 0), []
        for _ in source.blocks():
            shares.append(source.share)
    assert shares == sorted(shares) and 0 < (shares[0] or 0) < 0.2 and source.share == 1.0


def test_share_of_a_pipe_is_unknown_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    with open(read_end) as stdin, ExitStack() as stack:
        monkeypatch.setattr("sys.stdin", stdin)
        source = Input("-", None, stack, False, 0)
        os.write(write_end, b"1\n")
        blocks = source.blocks()
        assert list(next(blocks)) == [1] and source.share is None
        os.close(write_end)
        assert not any(blocks) and source.share == 1.0


def test_share_of_redirected_input_counts_from_its_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numbers").write_text("1\n2\n")
    with open(tmp_path / "numbers") as stdin, ExitStack() as stack:
        os.lseek(stdin.fileno(), 2, os.SEEK_SET)
        monkeypatch.setattr("sys.stdin", stdin)
        source = Input("-", None, stack, False, 0)
        blocks = source.blocks()
        assert list(next(blocks)) == [2] and source.share == 1.0
