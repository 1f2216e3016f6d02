from __future__ import annotations

from refwg.boundary import Endpoint, LocalAddress


def test_an_endpoint_without_source_is_otherwise_the_same() -> None:
    endpoint = Endpoint(b"\x0a\0\0\1", 7, 3, LocalAddress(b"\x0a\0\0\2", 5))
    assert endpoint.without_source() == Endpoint(b"\x0a\0\0\1", 7, 3)


def test_endpoints_that_differ_in_source_differ() -> None:
    endpoint = Endpoint(b"\x0a\0\0\1", 7)
    assert endpoint != Endpoint(b"\x0a\0\0\1", 7, 0, LocalAddress(b"\x0a\0\0\2"))
