"""The alternatives we measure ourselves against: one small entry each, in a file per op.

`missing` says why a peer can't run a case here; the report shows that reason. `variants` gives the ways it can be
called, each with inputs in the layout it likes best, made before the clock starts; the fastest is timed.
"""

from __future__ import annotations

from ..kit import Peer
from . import causal_conv1d, fft_conv, flash_attention, linear_attention, selective_scan

PEERS: list[Peer] = [
    *flash_attention.PEERS, *linear_attention.PEERS, *causal_conv1d.PEERS, *selective_scan.PEERS, *fft_conv.PEERS,
]


def for_op(op: str) -> list[Peer]:
    return [peer for peer in PEERS if peer.op == op]
