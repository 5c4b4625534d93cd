"""Virtual time: an executor that computes nothing and lets the clock jump by what a batch would have cost.

The cost is a roofline, on purpose of another family than the additive model that diagnosis fits: who tests a method
against its own assumptions learns nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from operator import mul

from stallscope_engine.engine import StepResult, VirtualClock
from stallscope_engine.scheduler import Batch

_SLICE_NS = 10_000_000  # noise holds for a slice of virtual time
_SLICES_A_BLOCK = 1024  # and is drawn for a block of slices at once, since seeding a generator is slow
_NOISE_SIGMA = 0.05
_TAIL_SHARE = 0.01
_TAIL_ALPHA = 2.5
_TAIL_MOST = 8.0
_NOTHING = StepResult()


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step costs on one kind of hardware: max(compute, memory) + launch, each in ns.

    Compute: the linear layers see tokens in tiles of ``tile_tokens``; attention sees pairs of a query token and a
    key before it. Memory: the weights once a step, and the keys and values of every context. The roofline is that of
    Williams et al., CACM 52(4), 2009. ``host_*`` is what the host spends before it dispatches a batch.
    """

    tile_tokens: int
    token_ns: float
    pair_ns: float
    weights_ns: float
    kv_token_ns: float
    launch_ns: float
    host_ns: float
    host_request_ns: float

    def step_ns(self, batch: Batch) -> float:
        """Noiseless duration of ``batch`` from dispatch to outputs."""
        chunks, starts = batch.num_tokens, batch.starts
        tokens = batch.prefill_tokens + batch.decode_tokens
        before = sum(starts)
        if batch.prefill_tokens:
            pairs = sum(map(mul, chunks, starts)) + (sum(map(mul, chunks, chunks)) + tokens) // 2
        else:
            pairs = before + tokens
        tiles = -(-tokens // self.tile_tokens)
        compute_ns = tiles * self.tile_tokens * self.token_ns + pairs * self.pair_ns
        memory_ns = self.weights_ns + (before + tokens) * self.kv_token_ns
        return float(max(compute_ns, memory_ns) + self.launch_ns)

    def dispatch_ns(self, batch: Batch) -> float:
        """Host time before the dispatch of ``batch``."""
        return self.host_ns + len(batch.requests) * self.host_request_ns


PROFILES = {
    # tiny-llama on two CPU cores: a decode step takes 3 to 5 ms, 15,000 tokens of prompt about 1.1 s.
    "cpu-tiny": StepCost(
        tile_tokens=32,
        token_ns=30_000,
        pair_ns=6,
        weights_ns=2_300_000,
        kv_token_ns=200,
        launch_ns=400_000,
        host_ns=120_000,
        host_request_ns=4_000,
    ),
    # 8 billion parameters in 16 bits at 2 TB/s and 250 TFLOP/s: 8 ms alone, 28,000 tokens of prompt about 2.5 s.
    "gpu-8b": StepCost(
        tile_tokens=64,
        token_ns=65_000,
        pair_ns=1.75,
        weights_ns=7_300_000,
        kv_token_ns=65,
        launch_ns=500_000,
        host_ns=250_000,
        host_request_ns=6_000,
    ),
    # The same GPU with 1.2 billion parameters, in half as many layers.
    "gpu-1b": StepCost(
        tile_tokens=64,
        token_ns=10_000,
        pair_ns=0.44,
        weights_ns=1_200_000,
        kv_token_ns=16,
        launch_ns=250_000,
        host_ns=250_000,
        host_request_ns=6_000,
    ),
}
MODEL_PROFILES = {
    "tiny-llama": "cpu-tiny",
    "8b": "gpu-8b",
    "llama-8b": "gpu-8b",
    "qwen3-8b": "gpu-8b",
    "llama-1b": "gpu-1b",
}


def cost_for(model: str) -> StepCost:
    """The cost profile of a model. Raises ValueError, naming those there are, for one without."""
    if model not in MODEL_PROFILES:
        raise ValueError(f"no virtual hardware for model {model!r}; there is {', '.join(MODEL_PROFILES)}")
    return PROFILES[MODEL_PROFILES[model]]


class Noise:
    """Factors on a step's duration: lognormal with a Pareto tail, drawn by (seed, time) and nothing else.

    A run without some of the requests therefore meets the same noise at the same time.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._block = -1
        self._factors: list[float] = []

    def at(self, time_ns: int) -> float:
        """The factor for a step that is dispatched at ``time_ns``."""
        block, index = divmod(time_ns // _SLICE_NS, _SLICES_A_BLOCK)
        if block != self._block:
            self._block = block
            generator = random.Random(f"{self._seed}/{block}")
            self._factors = [self._draw(generator) for _ in range(_SLICES_A_BLOCK)]
        return self._factors[index]

    @staticmethod
    def _draw(generator: random.Random) -> float:
        factor = generator.lognormvariate(0, _NOISE_SIGMA)
        if generator.random() < _TAIL_SHARE:
            factor *= min(generator.paretovariate(_TAIL_ALPHA), _TAIL_MOST)
        return factor


class VirtualExecutor:
    """Lets ``clock`` pass by each batch's cost; appends no tokens, and no token ends a request."""

    def __init__(self, clock: VirtualClock, cost: StepCost, seed: int) -> None:
        self._clock = clock
        self._cost = cost
        self._noise = Noise(seed)

    def spend_host_time(self, batch: Batch) -> None:
        """The host's part of a step: the engine's ``before_dispatch``."""
        now_ns = self._clock.now_ns()
        self._clock.wait_until(now_ns + int(self._cost.dispatch_ns(batch) * self._noise.at(now_ns)))

    def execute(self, batch: Batch) -> StepResult:
        now_ns = self._clock.now_ns()
        self._clock.wait_until(now_ns + int(self._cost.step_ns(batch) * self._noise.at(now_ns)))
        return _NOTHING
