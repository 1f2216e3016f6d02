from __future__ import annotations

from refwg.boundary import Endpoint, LocalAddress


def test_endpoint_without_source_keeps_its_other_fields() -> None:
    endpoint = Endpoint(b"\x0a\0\0\1", 7, 3, LocalAddress(b"\x0a\0\0\2", 5))
    assert endpoint.without_source() == Endpoint(b"\x0a\0\0\1", 7, 3)


def test_endpoints_with_different_source_are_not_equal() -> None:
    endpoint = Endpoint(b"\x0a\0\0\1", 7)
    assert endpoint != Endpoint(b"\x0a\0\0\1", 7, 0, LocalAddress(b"\x0a\0\0\2"))
