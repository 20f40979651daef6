"""SPIFFE IDs: one spelling, one meaning."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ...project import errors, identity

ROLES = [role.value for role in identity.Role]


@pytest.mark.parametrize("role", ROLES)
def test_every_role_is_read_and_written_the_same(role: str) -> None:
    for uri in (
        f"spiffe://orders.test/production/orders/{role}",
        f"spiffe://orders.test/production/orders/{role}/eu-1.a_b",
    ):
        parsed = identity.Identity.parse(uri)
        assert str(parsed) == uri
        assert parsed.role == role
        assert parsed.audience == "spiffe://orders.test/production/orders"


def test_the_account_is_the_name_where_there_is_one() -> None:
    assert identity.Identity.parse("spiffe://a/b/c/client").account == "client"
    assert identity.Identity.parse("spiffe://a/b/c/client/billing").account == "billing"


@pytest.mark.parametrize("name", ROLES)
def test_a_name_cannot_be_a_roles_and_so_take_its_account(name: str) -> None:
    with pytest.raises(errors.InvalidIdentity):
        identity.Identity.parse(f"spiffe://orders.test/production/orders/client/{name}")


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "orders.test/production/orders/client",
        "https://orders.test/production/orders/client",
        "SPIFFE://orders.test/production/orders/client",
        "spiffe://Orders.test/production/orders/client",
        "spiffe://orders.test/Production/orders/client",
        "spiffe://orders.test/production/orders",
        "spiffe://orders.test/production/orders/",
        "spiffe://orders.test/production/orders/client/",
        "spiffe://orders.test/production/orders/client/a/b",
        "spiffe://orders.test/production/orders/root",
        "spiffe://orders.test/production/orders/Client",
        "spiffe://orders.test//orders/client",
        "spiffe://orders.test/./orders/client",
        "spiffe://orders.test/../orders/client",
        "spiffe://orders.test/production/orders/client/..",
        "spiffe://orders.test/production/orders/cl%69ent",
        "spiffe://orders.test/production/orders/client?x=1",
        "spiffe://orders.test/production/orders/client#x",
        "spiffe://user@orders.test/production/orders/client",
        "spiffe://orders.test:443/production/orders/client",
        "spiffe://orders.test/production/orders/client\n",
        " spiffe://orders.test/production/orders/client",
        "spiffe://orders.test/production/orders/cl\u0456ent",
        "spiffe://orders.test/production/\u0661/client",
        "spiffe://orders.test/production/" + "a" * 64 + "/client",
        "spiffe://" + "a" * 255 + "/production/orders/client",
    ],
)
def test_another_spelling_is_refused(uri: str) -> None:
    with pytest.raises(errors.InvalidIdentity) as caught:
        identity.Identity.parse(uri)
    assert uri not in str(caught.value) or not uri


@given(
    st.lists(
        st.sampled_from(["a", "b1", "client", "worker", ".", "-", "..", "", "A", "%61", "\u00e9", "\n"]), max_size=6
    )
)
def test_what_is_accepted_has_exactly_one_spelling(segments: list[str]) -> None:
    uri = "spiffe://" + "/".join(segments)
    try:
        parsed = identity.Identity.parse(uri)
    except errors.InvalidIdentity:
        return
    assert str(parsed) == uri


@given(
    st.builds(
        identity.Identity,
        st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,20}[a-z0-9])?", fullmatch=True),
        st.from_regex(r"[a-z0-9]{1,20}", fullmatch=True),
        st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,20}[a-z0-9])?", fullmatch=True),
        st.sampled_from(identity.Role),
        st.none() | st.from_regex(r"[a-z0-9]{1,20}", fullmatch=True).filter(lambda name: name not in ROLES),
    )
)
def test_every_identity_survives_its_text(written: identity.Identity) -> None:
    assert identity.Identity.parse(str(written)) == written
