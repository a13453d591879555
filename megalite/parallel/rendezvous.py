"""Where the processes of a run meet: a store of their own for every start of the run."""

from __future__ import annotations

import datetime
import os
import time
import uuid

import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from megalite.errors import UserError

POLL_S = 0.02
"""Between two looks of the first rank at who has come."""


def open_store(timeout_s: float) -> Store:
    """A connection to the store at MASTER_ADDR:MASTER_PORT, on its own socket.

    torchrun's agent serves it already; without one (Slurm, or a static rendezvous) rank 0 does.

    Raises:
        UserError: a variable is not set, or nothing answers there within `timeout_s`.
    """
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE={os.environ.get('WORLD_SIZE')} but {', '.join(missing)} not set: start with torchrun, or "
            "set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        )
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return TCPStore(
            host,
            port,
            is_master=not served and os.environ["RANK"] == "0",
            timeout=datetime.timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,  # the first rank opens two connections, but serves once
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise UserError(
            f"rank {os.environ['RANK']} found no store at MASTER_ADDR={host}, MASTER_PORT={port} within "
            f"{timeout_s:g} s ({_first_line(error)}): is the first rank running, and is the port open?"
        ) from error


def agree_on_name(store: Store, rank: int, world_size: int, timeout_s: float) -> str:
    """A name for this start of the run that all its ranks get and no earlier one had; all must call this.

    torchrun restarts a run against the same store, which still holds the addresses of the dead: without a name
    of its own a restarted run would connect to them. TORCHELASTIC_RESTART_COUNT will not do: each machine counts
    its own failures. So each rank leaves a fresh token under its number, the first answers every token it finds
    with the name, and stays until every rank has confirmed that name. Tokens of the dead are answered too, in vain.

    Raises:
        UserError: ranks are missing after `timeout_s`; names them.
    """
    deadline = time.monotonic() + timeout_s
    if rank:
        token = uuid.uuid4().hex
        store.set(f"join/{rank}", token)
        try:
            store.wait([f"name/{token}"], datetime.timedelta(seconds=timeout_s))
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise UserError(
                f"rank {rank} of {world_size} heard nothing from rank 0 within {timeout_s:g} s"
            ) from error
        name = store.get(f"name/{token}").decode()
        store.set(f"{name}/confirmed/{rank}", "1")
        return name
    name = uuid.uuid4().hex
    answered: dict[int, bytes] = {}
    waiting = set(range(1, world_size))
    while waiting:
        for other in sorted(waiting):
            if not store.check([f"join/{other}"]):
                continue
            found = store.get(f"join/{other}")
            if answered.get(other) != found:
                store.set(f"name/{found.decode()}", name)
                answered[other] = found
        waiting = {other for other in waiting if not store.check([f"{name}/confirmed/{other}"])}
        if waiting and time.monotonic() > deadline:
            listed = ", ".join(str(other) for other in sorted(waiting)[:16])
            raise UserError(
                f"{len(waiting)} of {world_size} ranks did not come within {timeout_s:g} s: {listed}"
            )
        time.sleep(POLL_S if waiting else 0.0)
    return name


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
