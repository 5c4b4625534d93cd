"""Waiting queues: the order in which a policy would admit, and who is at its head."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Protocol

from stallscope_engine.request import Request

NOBODY: frozenset[str] = frozenset()


class WaitingQueue(Protocol):
    """Requests that wait, iterated in the order of admission.

    ``head`` is the first whose account (``account_of``) is not in ``skip``; None where there is none.
    """

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Request]: ...
    def push(self, request: Request) -> None: ...
    def push_back(self, request: Request) -> None: ...
    def remove(self, request: Request) -> None: ...
    def head(self, skip: Collection[str] = NOBODY) -> Request | None: ...


def account_of(request: Request) -> str:
    """Whom a request's use is counted for; "" where nobody trustworthy said.

    A client may claim anything, another's name included, so a claimed tenant has no account of its own.
    """
    info = request.info
    return "" if info.tenant_source.startswith("claim") else info.tenant


def first_outside(requests: Iterable[Request], skip: Collection[str]) -> Request | None:
    """The first request whose account is not in ``skip``."""
    return next((request for request in requests if account_of(request) not in skip), None)


class ArrivalQueue(deque[Request]):
    """First come, first served. A preempted request that is pushed back stands before all others."""

    def push(self, request: Request) -> None:
        self.append(request)

    def push_back(self, request: Request) -> None:
        self.appendleft(request)

    def head(self, skip: Collection[str] = NOBODY) -> Request | None:
        if not skip:
            return self[0] if self else None
        return first_outside(self, skip)


class SortedQueue:
    """Ordered by a key that does not change while a request waits; ties go to who arrived first."""

    def __init__(self, key: Callable[[Request], int]) -> None:
        self._requests: list[Request] = []
        self._key = key

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def push(self, request: Request) -> None:
        insort(self._requests, request, key=self._place)

    def push_back(self, request: Request) -> None:
        self.push(request)

    def remove(self, request: Request) -> None:
        self._requests.remove(request)

    def head(self, skip: Collection[str] = NOBODY) -> Request | None:
        return first_outside(self._requests, skip)

    def _place(self, request: Request) -> tuple[int, int, int]:
        return self._key(request), request.info.arrival_ns, request.info.handle
