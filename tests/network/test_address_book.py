"""Where peers may be dialled: what is remembered, in which order, and for how long."""

from __future__ import annotations

from random import Random

from aci_p2p.network.libp2p import address_book
from aci_p2p.network.libp2p.address_book import STALE_FAILURES, AddressBook
from aci_p2p.network.libp2p.addresses import TcpAddress
from aci_p2p.network.limits import MAX_ADDRESSES_PER_PEER, MAX_KNOWN_PEERS
from aci_p2p.protocol.identity import NodeId
from tests.network.driver import STRANGER, make_key

PEER = STRANGER
OWN = make_key(1).node_id


def at(number: int) -> TcpAddress:
    return TcpAddress("ip4", f"192.0.2.{number}", 4001)


def many(first: int) -> list[TcpAddress]:
    """As many addresses as are kept of one peer."""
    return [at(first + number) for number in range(MAX_ADDRESSES_PER_PEER)]


def open_book() -> AddressBook:
    return AddressBook(OWN, Random(1))  # noqa: S311


def fail(book: AddressBook, address: TcpAddress, times: int = STALE_FAILURES) -> None:
    for _ in range(times):
        book.failed(PEER, address, 0.0)


def test_what_a_peer_says_replaces_what_it_and_others_have_said() -> None:
    book = open_book()
    book.learn(PEER, [at(9)], hearsay=True)
    book.learn(PEER, [at(1), at(2)])
    assert book.known(PEER) == (at(1), at(2))
    book.learn(PEER, [at(3), at(2)])
    assert book.known(PEER) == (at(3), at(2))


def test_where_a_peer_was_found_stays() -> None:
    book = open_book()
    book.learn(PEER, [at(1), at(2)])
    book.prefer(PEER, at(2))
    assert book.known(PEER) == (at(2), at(1))
    for number in range(10, 30):
        book.learn(PEER, [at(number)])
        assert book.known(PEER) == (at(number), at(2))
    fail(book, at(2), STALE_FAILURES - 1)
    book.learn(PEER, [at(3)])
    assert book.known(PEER) == (at(3), at(2))
    fail(book, at(2), 1)
    book.learn(PEER, [at(4)])
    assert book.known(PEER) == (at(4),)


def test_hearsay_displaces_nothing_that_may_work() -> None:
    book = open_book()
    told = many(1)
    book.learn(PEER, told)
    book.learn(PEER, many(100), hearsay=True)
    assert book.known(PEER) == tuple(told)
    fail(book, told[0])
    book.learn(PEER, many(100), hearsay=True)
    assert book.known(PEER) == (*told[1:], at(100))


def test_where_a_peer_was_not_found_is_forgotten_when_it_is_found_elsewhere() -> None:
    book = open_book()
    book.learn(PEER, [at(1), at(2), at(3)])
    fail(book, at(1))
    fail(book, at(2), STALE_FAILURES - 1)
    assert book.known(PEER) == (at(1), at(2), at(3))
    book.connected(PEER)
    assert book.known(PEER) == book.due(PEER, 0.0) == (at(2), at(3))


def test_all_is_kept_while_nothing_works() -> None:
    """Our own line may be down."""
    book = open_book()
    book.learn(PEER, [at(1), at(2)])
    for address in (at(1), at(2)):
        fail(book, address, 100)
    assert book.known(PEER) == (at(1), at(2))
    # It has dialled us.
    book.connected(PEER)
    assert book.known(PEER) == book.due(PEER, 0.0) == (at(1), at(2))


def test_what_cannot_be_dialled_is_not_remembered() -> None:
    book = open_book()
    unusable = [TcpAddress("ip4", "192.0.2.3", 0), TcpAddress("ip4", "192.0.2.4", 1, OWN)]
    book.learn(PEER, [at(1)])
    book.learn(PEER, unusable)
    book.prefer(PEER, unusable[0])
    assert book.known(PEER) == (at(1),)
    book.learn(OWN, [at(1)])
    book.prefer(OWN, at(1))
    assert book.known(OWN) == ()


def test_the_oldest_peers_are_forgotten() -> None:
    book = open_book()
    book.prefer(PEER, at(1))
    book.learn(PEER, [at(2)])
    fail(book, at(2))
    for number in range(MAX_KNOWN_PEERS):
        book.learn(NodeId(number.to_bytes(32)), [at(1)])
    assert book.known(PEER) == ()
    assert len(book._addresses) == MAX_KNOWN_PEERS
    assert not book._proven
    assert not book._failures


def test_back_off_grows_and_ends_with_a_connection() -> None:
    book = open_book()
    there, elsewhere = at(1), at(2)
    book.learn(PEER, [there, elsewhere])
    waits: list[float] = []
    for times in range(1, 13):
        book.failed(PEER, there, 0.0)
        assert book.due(PEER, 0.0) == (elsewhere,)
        longest = min(address_book.BACK_OFF_SECONDS * 2 ** (times - 1), address_book.MAX_BACK_OFF_SECONDS)
        assert book.due(PEER, longest / 2 - 0.01) == (elsewhere,)
        assert book.due(PEER, longest) == (there, elsewhere)
        waits.append(next(tenth / 10 for tenth in range(10_000) if len(book.due(PEER, tenth / 10)) == 2))
    assert len(set(waits)) == len(waits)
    book.learn(PEER, [there])
    book.connected(PEER)
    assert book.due(PEER, 0.0) == (there,)
    book.failed(PEER, at(3), 0.0)
    assert book.due(PEER, 0.0) == (there,)


def test_failures_of_addresses_that_are_gone_are_forgotten() -> None:
    book = open_book()
    for number in range(100):
        address = TcpAddress("ip4", "192.0.2.1", number + 1)
        book.learn(PEER, [address])
        book.failed(PEER, address, 0.0)
    assert len(book._failures[PEER]) <= MAX_ADDRESSES_PER_PEER
