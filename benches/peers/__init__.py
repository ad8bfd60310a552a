"""Who is measured beside whom."""

from __future__ import annotations

from peers.beam import Served, Shared
from peers.files import FromPretrained, Joblib, SafetensorsAssigned, TorchLoad, TorchLoadMapped
from peers.inherited import Forked, SharedMemory
from peers.ours import OneCopy, Woken
from peers.peer import Peer
from peers.ray_store import RayStore

OURS = OneCopy()
PEERS: tuple[Peer, ...] = (
    RayStore(),
    Joblib(),
    TorchLoad(),
    TorchLoadMapped(),
    SafetensorsAssigned(),
    FromPretrained(),
    SharedMemory(),
    Shared(),
    Served(),
    Forked(),
    Woken(),
)
ALL: tuple[Peer, ...] = (OURS, *PEERS)
BY_NAME = {peer.name: peer for peer in ALL}
