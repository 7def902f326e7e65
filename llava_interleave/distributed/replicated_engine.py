"""Tensor-parallel engine: rank 0 broadcasts every call (add, step, abort, clear) and the chosen
tokens; the other ranks replay them.

Every rank has a whole engine with the KV cache of its own heads (`distributed.tensor_parallel`),
and all engines stay identical. The calls are pickled by torch.distributed, between processes that
one torchrun started on the same program."""

from __future__ import annotations

import atexit
import math
import os
import secrets
import signal
import threading
import traceback
from dataclasses import replace
from typing import Any, NoReturn

from ..engine.engine import Engine
from ..engine.kv_snapshot import KVSnapshot
from ..engine.prefix_cache import CacheKey
from ..engine.request import Event, Request
from ..engine.sampler import Pick, TokenConstraint
from ..engine.scheduler import SchedulerOutput
from ..errors import DataError
from ..options import SamplingParams
from ..prompt import Prompt
from .tensor_parallel import TensorParallelGroup


class ReplicatedEngine(Engine):
    """An `Engine` that is identical on all ranks of a sharded network. After `start`, only rank 0's
    is called.

    A step that fails on any rank ends all of them: a rank that waits in a collective would wait for
    ever."""

    tp_group: TensorParallelGroup

    def start(self, tp_group: TensorParallelGroup) -> None:
        """On rank 0, return at once. The other ranks replay rank 0's calls until it ends, and exit
        then."""
        self.tp_group, tp_group.in_lockstep = tp_group, False
        group = tp_group.process_group
        smallest = -group.all_reduce_max(-self._prefix_cache.total)[0]
        self._prefix_cache.total = smallest  # the KV memory that every rank has
        if (graphs := self._runner.graphs) is not None:  # captured on every rank, or on none
            failed = graphs.unavailable is not None
            if group.all_reduce_max(failed)[0] and not failed:
                graphs.drop("capturing failed on another rank")
        if group.rank:
            self._replay()
        atexit.register(self.close)

    def close(self) -> None:
        """End the other ranks, and broadcast no more; done at exit as well."""
        atexit.unregister(self.close)
        self._broadcast()

    def add(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        salt: bytes = b"",
        constraint: TokenConstraint | None = None,
        adapter: str | None = None,
        prefill_only: bool = False,
        client: str = "",
        weight: float = 1.0,
    ) -> Request:
        sampling = sampling or SamplingParams()
        if sampling.seed is None:  # all ranks draw the same numbers, also for a step ahead
            sampling = replace(sampling, seed=secrets.randbits(31))
        request = super().add(
            prompt,
            sampling,
            salt=salt,
            constraint=constraint,
            adapter=adapter,
            prefill_only=prefill_only,
            client=client,
            weight=weight,
        )
        self._broadcast_add(request)
        return request

    def abort(self, request: Request) -> Event | None:
        event = super().abort(request)
        if event is not None:
            self._broadcast("abort", request.id)
        return event

    def clear(self) -> None:
        super().clear()
        self._broadcast("clear")

    def save(self, key: CacheKey) -> KVSnapshot | None:
        """None: a rank has the KV cache of its own heads only."""
        return None

    def restore(self, snapshot: KVSnapshot) -> CacheKey:
        raise DataError(
            "a saved KV cache holds all heads, and cannot be restored under tensor parallelism "
            f"(world size {self.tp_group.process_group.world_size})"
        )

    def step(self, prefill_time_budget: float = math.inf) -> list[Event]:
        self._broadcast("step", prefill_time_budget, self._scheduler.step_times)
        return super().step(prefill_time_budget)

    def _run(self, output: SchedulerOutput) -> list[list[Pick]]:
        try:
            with self.tp_group.lockstep():
                picks = super()._run(output)
            return self.tp_group.process_group.broadcast(picks)
        except BaseException:  # noqa: BLE001  whatever it was, this rank cannot go on
            traceback.print_exc()
            os._exit(1)  # torchrun then ends the other ranks, which may wait for this one

    def _broadcast_add(self, request: Request) -> None:
        call = (request.prompt, request.sampling, request.encoder_salt)
        flags = (request.constraint is not None, request.prefill_only)
        self._broadcast("add", request.id, *call, *flags, request.client, request.weight)

    def _broadcast(self, *call: Any) -> None:
        """Have the other ranks do a call; without arguments: exit."""
        if not self.tp_group.process_group.rank:
            self.tp_group.process_group.broadcast(call)

    def _receive(self) -> Any:
        try:
            return self.tp_group.process_group.broadcast()
        except RuntimeError:  # rank 0 ended without closing
            raise SystemExit(1) from None

    def _replay(self) -> NoReturn:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # rank 0 finishes the running requests, then ends this rank
                signal.signal(number, signal.SIG_IGN)
        requests: dict[int, Request] = {}
        while call := self._receive():
            match call:
                case "add", number, prompt, sampling, salt, constrained, prefill_only, *client:
                    request = self.add(
                        prompt,
                        sampling,
                        salt=salt,
                        prefill_only=prefill_only,
                        client=client[0],
                        weight=client[1],
                    )
                    requests[number] = request
                    if constrained:  # rank 0 has the constraint; its tokens are broadcast
                        request.constrained = True
                        request.argmax_only, request.drafter = False, None
                case "step", prefill_time_budget, step_times:
                    self._scheduler.step_times = (
                        step_times  # times differ between ranks, plans must not
                    )
                    self.step(prefill_time_budget)
                    requests = {
                        number: r for number, r in requests.items() if r.finish_reason is None
                    }
                case "abort", number:
                    self.abort(requests.pop(number))
                case _:
                    self.clear()
        raise SystemExit
