"""The reader understands an answer however its bytes are cut, keeps when they came, and says what is not HTTP."""

from __future__ import annotations

import pytest

from potluck.measure.http_client import BadResponse, ResponseReader

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"6;x=1\r\n0\r\n\r\nb\r\nC\r\nhello world!\r\n0\r\n\r\n"
BODY = b"0\r\n\r\nbhello world!"


def read(*pieces: bytes) -> ResponseReader:
    reader = ResponseReader()
    for now_s, piece in enumerate(pieces):
        reader.feed(piece, float(now_s))
    return reader


@pytest.mark.parametrize("at", range(1, len(CHUNKED)))
def test_a_chunked_answer_cut_anywhere(at: int) -> None:
    reader = read(CHUNKED[:at], CHUNKED[at:])
    assert (reader.status, bytes(reader.body), reader.is_done) == (200, BODY, True)
    assert reader.marks[-1][0] == len(BODY)


def test_byte_by_byte_each_byte_has_its_arrival() -> None:
    reader = read(*(CHUNKED[at : at + 1] for at in range(len(CHUNKED))))
    assert bytes(reader.body) == BODY
    begin = CHUNKED.index(b"hello")
    assert reader.marks[7] == (8, float(begin + 1))


def test_a_length_and_an_end_of_connection() -> None:
    reader = read(HEAD + b"Content-Length: 5\r\n\r\nhel", b"lo and more")
    assert (bytes(reader.body), reader.is_done) == (b"hello", True)
    reader = read(b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"\r\nhel", b"lo")
    assert not reader.is_done
    reader.end()
    assert (bytes(reader.body), reader.is_done) == (b"hello", True)


def test_a_chunked_answer_that_ends_early_is_not_whole() -> None:
    reader = read(CHUNKED[:-5])
    reader.end()
    assert not reader.is_done


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 two hundred\r\n\r\n",
        HEAD + b"Content-Length: many\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x" * 2**17,
    ],
)
def test_what_is_not_http(data: bytes) -> None:
    with pytest.raises(BadResponse):
        read(data)
