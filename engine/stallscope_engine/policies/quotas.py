"""Quotas of a tenant, beside whatever policy: how much of the KV cache and of a step it may take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from stallscope_engine.config import EngineConfig
from stallscope_engine.policies.queues import account_of
from stallscope_engine.request import Request


class TenantQuotas:
    """Shares of one replica that no tenant may exceed.

    KV blocks are looked at when a request is admitted: with its input, its tenant stays within the share; what runs
    may grow beyond it, for taking blocks back would cost more than it saves. Prompt tokens of a step are cut to the
    share; decodes are exempt. A tenant that is a mere claim has no quota: anybody could use up another's.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.kv_blocks = max(1, int(config.tenant_kv_share * config.kv_blocks))
        self.step_tokens = max(1, int(config.tenant_token_share * config.max_num_batched_tokens))
        self._spent: Counter[str] = Counter()  # prompt tokens of this step

    @staticmethod
    def of(config: EngineConfig) -> TenantQuotas | None:
        """Quotas where the configuration sets any."""
        return TenantQuotas(config) if min(config.tenant_kv_share, config.tenant_token_share) < 1 else None

    def begin_step(self) -> None:
        self._spent.clear()

    def tokens_left(self, request: Request) -> int | None:
        """Prompt tokens that its tenant may still take in this step; None where it has no quota."""
        account = account_of(request)
        return self.step_tokens - self._spent[account] if account else None

    def spend(self, request: Request, tokens: int) -> None:
        self._spent[account_of(request)] += tokens

    def blocks_over(self, request: Request, needs_blocks: int, running: Iterable[Request]) -> int:
        """Blocks by which admitting ``request``, which takes ``needs_blocks``, would exceed its tenant's share."""
        account = account_of(request)
        if not account:
            return 0
        held = sum(len(other.blocks) for other in running if account_of(other) == account)
        return held + needs_blocks - self.kv_blocks
