"""Several processes, one run: when one of them dies, the others end too, and say why."""

import os
import select
import socket
import sys
import time
from threading import Event, Thread

import lightning as L


class RankWatch(L.Callback):
    """Ends this process soon after another one of the run has died, wherever this one stands.

    A collective operation notices a dead rank at once (gloo) or when the process group's timeout is over (NCCL), but
    a rank may be a long way from the next one, in a validation say. So rank 0 holds a connection to each of the
    others: the system closes it with the process, whatever ended that.
    """

    GRACE = 30.0
    """Seconds in which a rank that already ends by an error of its own may say so."""

    def __init__(self) -> None:
        self._links: dict[socket.socket, int] = {}  # and the rank at the other end
        self._stop, self._ending = Event(), Event()

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Connect, where there are several ranks, and begin watching."""
        if trainer.world_size == 1 or self._links:
            return
        if trainer.global_rank == 0:
            both = socket.has_dualstack_ipv6()
            with socket.create_server(
                ("", 0), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
            ) as server:
                server.settimeout(self.GRACE)
                trainer.strategy.broadcast(server.getsockname()[1])
                while len(self._links) < trainer.world_size - 1:
                    link, _ = server.accept()
                    link.settimeout(self.GRACE)
                    self._links[link] = int.from_bytes(link.recv(4), "big")
        else:
            port = trainer.strategy.broadcast(0)
            # Lightning has set the address of rank 0 when the ranks first met.
            link = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=self.GRACE)
            link.sendall(trainer.global_rank.to_bytes(4, "big"))
            self._links[link] = 0
        for link in self._links:
            link.settimeout(None)
            link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_KEEPIDLE"):  # a machine that is gone closes nothing: it is asked, and given 30 s
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15)
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        self._stop.clear()
        Thread(target=self._watch, daemon=True).start()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Let this rank's own words come first."""
        self._ending.set()

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Stop watching, all ranks before any of them closes a connection."""
        if self._links:
            self._stop.set()
            trainer.strategy.barrier("RankWatch")
            for link in self._links:
                link.close()
            self._links = {}

    def _watch(self) -> None:
        links = self._links
        try:
            link = select.select(list(links), [], [])[0][0]  # nothing is ever sent: it was closed, or lost
        except (OSError, ValueError):  # closed here
            return
        if self._stop.is_set():
            return
        if self._ending.is_set():
            time.sleep(self.GRACE)
        print(
            f"error: rank {links[link]} of this run has died or ended, so this one ends too; see what it said, and "
            "start the run again from its last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # the main thread may stand where no exception reaches it
