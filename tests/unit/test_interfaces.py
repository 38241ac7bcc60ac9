"""Which network interface an address is on, and that NCCL is told so while it makes its connections."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace

import psutil
import pytest
import torch.distributed as dist

from slipstream.weights.transports import interfaces
from slipstream.weights.transports.interfaces import VARIABLE, interface_of, nccl_on


@pytest.fixture(autouse=True)
def not_chosen(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def machine_with(monkeypatch, **interfaces_):
    found = {name: [SimpleNamespace(address=a) for a in addresses] for name, addresses in interfaces_.items()}
    monkeypatch.setattr(interfaces, "net_if_addrs", lambda: found)


def test_every_address_of_this_machine_has_its_interface():
    ours = psutil.net_if_addrs()
    assert interface_of("127.0.0.1") == next(
        n for n, found in ours.items() if "127.0.0.1" in {a.address for a in found}
    )
    for name, addresses in ours.items():
        for found in addresses:
            if found.family == socket.AF_INET:
                assert interface_of(found.address) == name


def test_addresses_are_compared_as_such(monkeypatch):
    machine_with(monkeypatch, lo=["127.0.0.1", "::1", "00:00:00:00:00:00"], ib0=["fe80::1%ib0", "10.0.0.7"])
    assert interface_of("::1") == interface_of("0:0:0:0:0:0:0:1") == "lo"
    assert interface_of("127.0.1.1") == "lo"  # the whole network is the loopback's, whatever is listed
    assert interface_of("10.0.0.7") == interface_of("fe80::1%ib0") == interface_of("::ffff:10.0.0.7") == "ib0"
    assert interface_of("10.0.0.70") is None


def test_nccl_is_told_while_it_connects(monkeypatch):
    machine_with(monkeypatch, lo=["127.0.0.1"], eth0=["10.0.0.7"])
    for address, told in (("127.0.0.1", "=lo"), ("10.0.0.7", "=eth0"), ("10.0.0.8", None)):
        with nccl_on(address):
            assert os.environ.get(VARIABLE) == told
        assert VARIABLE not in os.environ


def test_what_the_user_has_chosen_stays(monkeypatch):
    monkeypatch.setenv(VARIABLE, "ib")
    with nccl_on("127.0.0.1"):
        assert os.environ[VARIABLE] == "ib"
    assert os.environ[VARIABLE] == "ib"


def test_a_trainer_of_several_ranks_keeps_its_interface(monkeypatch):
    """NCCL asks once a process, and the other ranks may be on other machines."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with nccl_on("127.0.0.1"):
        assert VARIABLE not in os.environ
