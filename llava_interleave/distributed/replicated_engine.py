"""One engine in several processes that share a network (`model.parallel`): rank 0 is asked, and the others do what it does.

Every process has a whole engine, with the keys and values of its own heads. Before rank 0 changes it (a request, a step, an end)
it tells the others, who do the same in the same order; what tokens were chosen it tells as well, so that all engines stay alike.
What is told is pickled by torch.distributed, between processes that one torchrun has started on the same program.
"""

from __future__ import annotations

import atexit
import math
import os
import signal
import threading
import traceback
from typing import Any, NoReturn

from ..engine.engine import Engine
from ..engine.events import Event
from ..engine.kv_snapshot import KVSnapshot
from ..engine.prefix_cache import CacheKey
from ..engine.request import Request
from ..engine.sampler import Pick, SamplingParams, TokenConstraint
from ..engine.scheduler import SchedulerOutput
from ..errors import DataError
from ..prompt import Prompt
from .tensor_parallel import TensorParallelGroup


class ReplicatedEngine(Engine):
    """An `Engine` that is alike in all processes of a split network. Once `start` was called, only rank 0's is used.

    A step that fails in any process ends them all: who waits for a sum of all would wait for ever.
    """

    together: TensorParallelGroup

    def start(self, together: TensorParallelGroup) -> None:
        """On rank 0, be ready to be asked. The others follow it until it ends, and end then."""
        self.together, together.computing = together, False
        self._prefixes.total = -together.ranks.most(-self._prefixes.total)[
            0
        ]  # what all have memory for
        if together.ranks.rank:
            self._follow()
        atexit.register(self.close)

    def close(self) -> None:
        """Let the other processes end, and ask no more; done when this one ends."""
        atexit.unregister(self.close)
        self._tell()

    def add(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        salt: bytes = b"",
        guide: TokenConstraint | None = None,
        adapter: str | None = None,
    ) -> Request:
        request = super().add(prompt, sampling, salt=salt, guide=guide, adapter=adapter)
        self._introduce(request)
        return request

    def abort(self, request: Request) -> Event | None:
        event = super().abort(request)
        if event is not None:
            self._tell("end", request.id)
        return event

    def clear(self) -> None:
        super().clear()
        self._tell("clear")

    def save(self, keys: CacheKey) -> KVSnapshot | None:
        """Nothing: a process has the keys and values of its own heads only."""
        return None

    def restore(self, saved: KVSnapshot) -> CacheKey:
        raise DataError(
            f"keys and values are of whole networks, and here {self.together.ranks.count} processes share one"
        )

    def _open(self, request: Request) -> None:
        new = request not in self._streams
        super()._open(request)
        if new:
            self._introduce(request)

    def _advance(self, patience: float = math.inf) -> None:
        self._tell("step", patience, self._scheduler.pace)
        super()._advance(patience)

    def _run(self, plan: SchedulerOutput) -> list[list[Pick]]:
        try:
            with self.together.computes():
                picks = super()._run(plan)
            return self.together.ranks.told(picks)
        except BaseException:  # noqa: BLE001  whatever it was, this process cannot go on
            traceback.print_exc()
            os._exit(1)  # so that torchrun ends the others, who may wait for it

    def _introduce(self, request: Request) -> None:
        guided = request.guide is not None
        self._tell("request", request.id, request.prompt, request.sampling, request.salt, guided)

    def _tell(self, *order: Any) -> None:
        """Have the others do something; nothing: end."""
        if not self.together.ranks.rank:
            self.together.ranks.told(order)

    def _order(self) -> Any:
        try:
            return self.together.ranks.told()
        except RuntimeError:  # rank 0 has gone without a word
            raise SystemExit(1) from None

    def _follow(self) -> NoReturn:
        if threading.current_thread() is threading.main_thread():
            for number in (
                signal.SIGINT,
                signal.SIGTERM,
            ):  # rank 0 ends what is under way, then tells this one
                signal.signal(number, signal.SIG_IGN)
        requests: dict[int, Request] = {}
        while order := self._order():
            match order:
                case "request", number, prompt, sampling, salt, guided:
                    request = requests[number] = self.add(prompt, sampling, salt=salt)
                    if guided:  # by whom rank 0 knows, and the tokens come from there
                        request.plain, request.lookup = False, None
                case "step", patience, pace:
                    self._scheduler.pace = pace  # times differ between processes, plans must not
                    self.step(patience)
                    requests = {
                        number: r for number, r in requests.items() if r.finish_reason is None
                    }
                case "end", number:
                    self.abort(requests.pop(number))
                case _:
                    self.clear()
        raise SystemExit
