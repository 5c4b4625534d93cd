"""A scenario file to frozen data: traffic, what goes wrong in it, and the engine, all checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_type_hints

from stallscope.errors import UsageError
from stallscope.nodes import Node, read_yaml, suggest
from stallscope.workloads.draws import Choice, Draw, Literal, Lognormal, Uniform, read_column
from stallscope_engine.config import EngineConfig
from stallscope_engine.executors.virtual import MODEL_PROFILES

SCENARIOS = Path(__file__).parent / "scenarios"
DEFAULT_VARIANT = "cpu"  # the file as it stands
MOST_CLIENTS = 10_000  # of one tenant; beyond it a number is a slip of the pen
MOST_CPU_PROMPT_TOKENS = 15_000  # a larger prompt takes a CPU too long to be a story
VERDICTS = (
    "healthy",
    "noisy_neighbor",
    "self_inflicted",
    "overload",
    "engine_stall",
    "cold_cache",
    "outside_engine",
    "insufficient_data",
)
_MERGE_DEPTH = 2  # a variant merges down to a tenant's keys; draws and arrivals are replaced whole


@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent arrivals; the rate is drawn once a run."""

    per_s: Draw


@dataclass(frozen=True, slots=True)
class Every:
    """Arrivals at a fixed interval from the start of the stretch on; the interval is drawn once a run."""

    interval_s: Draw


@dataclass(frozen=True, slots=True)
class Recorded:
    """Arrivals taken from a file, in seconds after its first."""

    times_s: tuple[float, ...]


Arrivals = Poisson | Every | Recorded


@dataclass(frozen=True, slots=True)
class Lengths:
    """What each request of some traffic asks for."""

    prompt_tokens: Draw
    output_tokens: Draw
    priority: int = 0
    max_tokens: Draw | None = None  # the limit asked for, where the answer ends before it; None: it is output_tokens
    shared_prefix_tokens: int = 0  # of each prompt, where it has as many, that others of the tenant begin with too
    shared_prefixes: int = 1  # such beginnings of the tenant, each request's as likely


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """Clients who think, ask, wait for the answer, and think again.

    A request that takes longer than ``timeout_s`` is given up; without a timeout clients wait. One that was given up,
    refused or cut off is sent again, at most ``retries`` times. With ``context_tokens``, a client's next prompt is the
    last one, its answer, and its own new tokens, until that would be more than so many: then a new conversation begins.
    """

    clients: int
    think_s: Draw
    timeout_s: float | None = None
    retries: int = 0
    context_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """Usual traffic of one tenant over the whole run."""

    name: str
    arrivals: Arrivals | ClosedLoop
    lengths: Lengths


@dataclass(frozen=True, slots=True)
class AddedRequests:
    """Injection: ``count`` requests at each time."""

    tenant: str
    at_s: tuple[Draw, ...]
    count: Draw
    lengths: Lengths


@dataclass(frozen=True, slots=True)
class AddedTraffic:
    """Injection: requests at a rate, over a stretch. ``others`` act like the tenant, each with requests of its own."""

    tenant: str
    from_s: Draw
    to_s: Draw
    arrivals: Arrivals
    lengths: Lengths
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Growth:
    """Injection: over a stretch a tenant, and ``others`` with it, sends ``factor`` times its usual requests.

    The usual ones stay as they are; more of the same kind come between them.
    """

    tenant: str
    from_s: Draw
    to_s: Draw
    factor: Draw
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """Injection: over a stretch a tenant's usual traffic is replaced in what is given here."""

    tenant: str
    from_s: Draw
    to_s: Draw
    arrivals: Arrivals | None
    prompt_tokens: Draw | None
    output_tokens: Draw | None


@dataclass(frozen=True, slots=True)
class EnginePause:
    """Injection: the engine's host stands still."""

    at_s: Draw
    for_s: Draw


@dataclass(frozen=True, slots=True)
class SlowStep:
    """Injection: over a stretch the host holds every n-th step up before its dispatch, for ``by_s``."""

    from_s: Draw
    to_s: Draw
    every: Draw
    by_s: Draw


@dataclass(frozen=True, slots=True)
class Throttle:
    """Injection: over a stretch the device's clocks drop, and what it does takes ``factor`` times as long."""

    from_s: Draw
    to_s: Draw
    factor: Draw


@dataclass(frozen=True, slots=True)
class SlowClient:
    """Injection: over a stretch a tenant's clients take ``delay_s`` to read an answer that is ready."""

    tenant: str
    from_s: Draw
    to_s: Draw
    delay_s: Draw


@dataclass(frozen=True, slots=True)
class TelemetryHang:
    """Injection: over a stretch the collector takes no telemetry, and does not say so."""

    from_s: Draw
    to_s: Draw


@dataclass(frozen=True, slots=True)
class TelemetryDrop:
    """Injection: this share of step spans is lost on its way."""

    share: Draw


@dataclass(frozen=True, slots=True)
class TelemetrySample:
    """Injection: only this share of request spans is kept."""

    share: Draw


@dataclass(frozen=True, slots=True)
class TelemetryAggregate:
    """Injection: step spans say how many, and not who."""


EngineFault = EnginePause | SlowStep | Throttle
TelemetryFault = TelemetryHang | TelemetryDrop | TelemetrySample | TelemetryAggregate
Fault = EngineFault | SlowClient | TelemetryFault
Traffic = AddedRequests | AddedTraffic | Growth | Change
Injection = Traffic | Fault


@dataclass(frozen=True, slots=True)
class Expect:
    """The right answer, for tests and StallBench; no analyzer sees it."""

    verdict: str
    culprits: tuple[str, ...]
    mechanism: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scenario:
    """One variant of a scenario file. Times are seconds from the start of the run."""

    name: str
    about: str
    duration_s: float
    seed: int
    engine: EngineConfig
    tenants: tuple[Tenant, ...]
    inject: tuple[Injection, ...]
    expect: Expect | None


def scenario_names() -> list[str]:
    """Names of the scenarios that come with the package."""
    return sorted(path.stem for path in SCENARIOS.glob("*.yaml"))


def load_scenario(source: str | Path, variant: str = DEFAULT_VARIANT) -> Scenario:
    """The scenario of that name, or in that file, in one of its variants; the other variants are checked as well.

    Raises UsageError, in one line with file and key, for whatever is not as the format says.
    """
    variants = load_variants(source)
    if variant not in variants:
        raise UsageError(f"{_find(source)}: no variant {variant!r}; {suggest(variant, variants)}")
    return variants[variant]


def load_variants(source: str | Path) -> dict[str, Scenario]:
    """All variants of a scenario by name, the file as it stands first. Raises UsageError as ``load_scenario`` does."""
    path = _find(source)
    document = read_yaml(path)
    root = Node(str(path), "", document)
    scenarios = {DEFAULT_VARIANT: _parse(root, path.parent)}
    variants = root.mapping().get("variants")
    for name, node in variants.named().items() if variants else ():
        if "variants" in node.mapping():
            raise node.error("a variant has no variants of its own")
        merged = _merge(document, node.value, _MERGE_DEPTH)
        scenarios[name] = _parse(Node(f"{path} (variant {name})", "", merged), path.parent)
    return scenarios


def _find(source: str | Path) -> Path:
    if source in scenario_names():
        return SCENARIOS / f"{source}.yaml"
    path = Path(source)
    if not path.is_file():
        raise UsageError(f"no scenario {str(source)!r}: not a file, nor one of {', '.join(scenario_names())}")
    return path


def _merge(base: object, change: object, depth: int) -> object:
    if not isinstance(base, dict) or not isinstance(change, dict) or depth < 0:
        return change
    merged = {key: value for key, value in base.items() if key != "variants"}
    return merged | {
        key: _merge(base[key], value, depth - 1) if key in base else value for key, value in change.items()
    }


# --- the format ---------------------------------------------------------------------------------------------


def _parse(root: Node, folder: Path) -> Scenario:
    known = ("name", "about", "duration_s", "seed", "engine", "tenants", "inject", "expect", "variants", "scale_tokens")
    keys = root.mapping(known)
    root.need("name", "duration_s", "tenants")
    scale = keys["scale_tokens"].positive() if "scale_tokens" in keys else 1.0
    engine = _engine(keys["engine"]) if "engine" in keys else EngineConfig()
    reader = _TrafficReader(engine, keys["duration_s"].positive(), scale, folder)
    tenants = {name: reader.tenant(name, node) for name, node in keys["tenants"].named().items()}
    if not tenants:
        raise keys["tenants"].error("name at least one tenant")
    inject = tuple(reader.injection(node, tenants) for node in keys["inject"].items()) if "inject" in keys else ()
    named = [*tenants, *(name for entry in inject if isinstance(entry, Traffic) for name in tenants_of(entry))]
    return Scenario(
        name=keys["name"].check_name(keys["name"].text()),
        about=keys["about"].text() if "about" in keys else "",
        duration_s=reader.duration_s,
        seed=keys["seed"].integer(least=0) if "seed" in keys else 0,
        engine=engine,
        tenants=tuple(tenants.values()),
        inject=inject,
        expect=_expect(keys["expect"], named) if "expect" in keys else None,
    )


def tenants_of(injection: Traffic) -> tuple[str, ...]:
    """Who sends what is injected."""
    others = injection.others if isinstance(injection, AddedTraffic | Growth) else ()
    return (injection.tenant, *others)


def _engine(node: Node) -> EngineConfig:
    types = get_type_hints(EngineConfig)
    settings: dict[str, str | bool | int | float] = {}
    for key, value in node.mapping(types).items():
        if types[key] is bool:
            settings[key] = value.flag()
        elif types[key] is int:
            settings[key] = value.integer()
        elif types[key] is float:
            settings[key] = value.number()
        else:
            settings[key] = value.text()
    try:
        return replace(EngineConfig(), **settings)  # type: ignore[arg-type]
    except ValueError as error:
        raise node.error(str(error)) from None


def _expect(node: Node, named: Collection[str]) -> Expect:
    keys = node.mapping(("verdict", "culprits", "mechanism"))
    node.need("verdict")
    verdict = keys["verdict"].text()
    if verdict not in VERDICTS:
        raise keys["verdict"].error(f"unknown verdict {verdict!r}; {suggest(verdict, VERDICTS)}")
    culprits = keys["culprits"].items() if "culprits" in keys else []
    for culprit in culprits:
        if culprit.text() not in named:
            raise culprit.error(f"no tenant {culprit.text()!r}; {suggest(culprit.text(), named)}")
    mechanism = keys["mechanism"].items() if "mechanism" in keys else []
    return Expect(verdict, tuple(node.text() for node in culprits), tuple(node.text() for node in mechanism))


_LENGTH_KEYS = (
    "prompt_tokens",
    "output_tokens",
    "max_tokens",
    "priority",
    "shared_prefix_tokens",
    "shared_prefixes",
)
_CLOSED_LOOP_KEYS = ("clients", "think_s", "timeout_s", "retries", "context_tokens")
_ARRIVAL_KEYS = ("poisson_per_s", "every_s", "trace", "column", "scale")
_INJECT_KEYS = {
    "requests": ("tenant", "at_s", "count", *_LENGTH_KEYS),
    "traffic": ("tenant", "tenants", "from_s", "to_s", *_ARRIVAL_KEYS, *_LENGTH_KEYS),
    "growth": ("tenant", "tenants", "from_s", "to_s", "grow"),
    "change": ("tenant", "from_s", "to_s", "arrivals", "prompt_tokens", "output_tokens"),
    "pause": ("engine", "at_s", "for_s"),
    "slow_step": ("engine", "from_s", "to_s", "every", "by_s"),
    "throttle": ("engine", "from_s", "to_s", "factor"),
    "slow_client": ("frontend", "tenant", "from_s", "to_s", "delay_s"),
    "hang": ("telemetry", "from_s", "to_s"),
    "drop": ("telemetry", "share"),
    "sample": ("telemetry", "share"),
    "aggregate": ("telemetry",),
}
_FAULTS = {
    where: [kind for kind, keys in _INJECT_KEYS.items() if keys[0] == where]
    for where in ("engine", "frontend", "telemetry")
}
_EVERYONE = "all"  # as the tenants of a growth
_MOST_FACTOR = 1000  # what is slower than that has stopped


def _longest_answer(lengths: Lengths) -> Draw:
    """What a request may need beside its prompt: its limit, where that is more than its answer."""
    limits = [draw for draw in (lengths.output_tokens, lengths.max_tokens) if draw is not None]
    return max(limits, key=lambda draw: draw.bounds[1])


@dataclass(frozen=True, slots=True)
class _TrafficReader:
    """Reads tenants and injections, and refuses requests that the engine could never run."""

    engine: EngineConfig
    duration_s: float
    scale_tokens: float
    folder: Path

    def tenant(self, name: str, node: Node) -> Tenant:
        keys = node.mapping(("arrivals", "closed_loop", *_LENGTH_KEYS))
        if ("arrivals" in keys) == ("closed_loop" in keys):
            raise node.error("give either arrivals or closed_loop")
        lengths = self._lengths(node, keys)
        if "closed_loop" in keys:
            if "shared_prefix_tokens" in keys:
                raise keys["shared_prefix_tokens"].error("goes with arrivals; give a closed loop context_tokens")
            return Tenant(name, self._closed_loop(keys["closed_loop"], lengths), lengths)
        return Tenant(name, self._arrivals(keys["arrivals"], keys["arrivals"].mapping(_ARRIVAL_KEYS)), lengths)

    def _closed_loop(self, node: Node, lengths: Lengths) -> ClosedLoop:
        keys = node.mapping(_CLOSED_LOOP_KEYS)
        node.need("clients", "think_s")
        if (clients := keys["clients"].integer(least=1)) > MOST_CLIENTS:
            raise keys["clients"].error(f"must be at most {MOST_CLIENTS}, not {clients}")
        return ClosedLoop(
            clients,
            self._draw(keys["think_s"], 0),
            keys["timeout_s"].positive() if "timeout_s" in keys else None,
            keys["retries"].integer(least=0) if "retries" in keys else 0,
            self._context(keys["context_tokens"], lengths) if "context_tokens" in keys else None,
        )

    def _context(self, node: Node, lengths: Lengths) -> int:
        context = round(node.integer(least=1) * self.scale_tokens)
        longest = round(lengths.prompt_tokens.bounds[1])
        if context < longest:
            raise node.error(f"{context} tokens are less than a prompt of up to {longest}")
        self._check_cpu(node, context)
        self._check_fit(node, Literal(context), _longest_answer(lengths))
        return context

    def injection(self, node: Node, tenants: Mapping[str, Tenant]) -> Injection:
        keys = node.mapping(dict.fromkeys(key for keys in _INJECT_KEYS.values() for key in keys))
        kind = self._kind(node, keys)
        for key in keys:
            if key not in _INJECT_KEYS[kind]:
                raise keys[key].error(f"does not go with the rest: {kind} has {', '.join(_INJECT_KEYS[kind])}")
        if not keys.keys().isdisjoint(_FAULTS):
            return self._fault(kind, node, keys, tenants)
        tenant, *others = self._who(node, keys, tenants)
        if kind == "requests":
            return self._added_requests(tenant, node, keys)
        from_s, to_s = self._stretch(node, keys)
        if kind == "growth":
            return Growth(tenant, from_s, to_s, self._draw(keys["grow"], 1, _MOST_FACTOR), tuple(others))
        if kind == "traffic":
            arrivals = self._arrivals(node, {key: keys[key] for key in _ARRIVAL_KEYS if key in keys})
            return AddedTraffic(tenant, from_s, to_s, arrivals, self._lengths(node, keys), tuple(others))
        return self._change(self._usual(keys["tenant"], tenants), from_s, to_s, node, keys)

    def _who(self, node: Node, keys: Mapping[str, Node], tenants: Mapping[str, Tenant]) -> list[str]:
        """The tenants that an injection of traffic names, one at least; those that grow have usual traffic."""
        if ("tenant" in keys) == ("tenants" in keys):
            raise node.error("give either tenant or tenants")
        grows = "grow" in keys
        if grows and "tenants" in keys and keys["tenants"].value == _EVERYONE:
            return [name for name, tenant in tenants.items() if isinstance(tenant.arrivals, Poisson)]
        named = [keys["tenant"]] if "tenant" in keys else keys["tenants"].items()
        for one in named:
            name = one.check_name(one.text())
            if name in tenants and isinstance(tenants[name].arrivals, ClosedLoop):
                raise one.error(f"{name} is a closed loop, which goes its own way; name another tenant")
            if grows and not isinstance(self._usual(one, tenants).arrivals, Poisson):
                raise one.error(f"{name} can grow only where its arrivals are poisson_per_s")
        names = list(dict.fromkeys(one.text() for one in named))
        if len(names) < max(len(named), 1):
            raise keys["tenants"].error("name each tenant once" if names else "name at least one tenant")
        return names

    @staticmethod
    def _usual(node: Node, tenants: Mapping[str, Tenant]) -> Tenant:
        if node.text() not in tenants:
            raise node.error(f"a change needs a tenant of the usual traffic; {suggest(node.text(), tenants)}")
        return tenants[node.text()]

    def _kind(self, node: Node, keys: Mapping[str, Node]) -> str:
        for where, kinds in _FAULTS.items():
            if where in keys:
                kind = keys[where].text()
                if kind not in kinds:
                    raise keys[where].error(f"no fault {kind!r}; {suggest(kind, kinds)}")
                return kind
        if "tenants" not in keys:
            node.need("tenant")
        if "grow" in keys:
            return "growth"
        if "at_s" in keys:
            return "requests"
        if "tenants" in keys:
            return "traffic"
        return "change" if keys.keys().isdisjoint(_ARRIVAL_KEYS) else "traffic"

    def _fault(self, kind: str, node: Node, keys: Mapping[str, Node], tenants: Mapping[str, Tenant]) -> Fault:
        if kind == "pause":
            return EnginePause(self._time(node, keys, "at_s"), self._time(node, keys, "for_s"))
        if kind == "aggregate":
            return TelemetryAggregate()
        if kind in ("drop", "sample"):
            node.need("share")
            share = self._draw(keys["share"], 0, 1)
            return TelemetryDrop(share) if kind == "drop" else TelemetrySample(share)
        from_s, to_s = self._stretch(node, keys)
        if kind == "hang":
            return TelemetryHang(from_s, to_s)
        if kind == "slow_client":
            node.need("tenant", "delay_s")
            tenant = self._usual(keys["tenant"], tenants)
            return SlowClient(tenant.name, from_s, to_s, self._time(node, keys, "delay_s"))
        if kind == "throttle":
            node.need("factor")
            return Throttle(from_s, to_s, self._draw(keys["factor"], 1, _MOST_FACTOR))
        node.need("every")
        return SlowStep(from_s, to_s, self._draw(keys["every"], 1), self._time(node, keys, "by_s"))

    def _added_requests(self, tenant: str, node: Node, keys: Mapping[str, Node]) -> AddedRequests:
        at = keys["at_s"]
        times = at.items() if isinstance(at.value, list) else [at]
        if not times:
            raise at.error("give at least one time")
        return AddedRequests(
            tenant,
            tuple(self._draw(time, 0, self.duration_s) for time in times),
            self._draw(keys["count"], 1, 10_000) if "count" in keys else Literal(1),
            self._lengths(node, keys),
        )

    def _change(self, tenant: Tenant, from_s: Draw, to_s: Draw, node: Node, keys: Mapping[str, Node]) -> Change:
        if keys.keys().isdisjoint(("arrivals", "prompt_tokens", "output_tokens")):
            raise node.error("changes nothing; give arrivals, prompt_tokens or output_tokens")
        arrivals = keys.get("arrivals")
        prompt = self._prompt(keys["prompt_tokens"]) if "prompt_tokens" in keys else None
        output = self._draw(keys["output_tokens"], 1) if "output_tokens" in keys else None
        lengths = replace(tenant.lengths, output_tokens=output) if output else tenant.lengths
        self._check_fit(node, prompt or lengths.prompt_tokens, _longest_answer(lengths))
        return Change(
            tenant.name,
            from_s,
            to_s,
            self._arrivals(arrivals, arrivals.mapping(_ARRIVAL_KEYS)) if arrivals else None,
            prompt,
            output,
        )

    def _stretch(self, node: Node, keys: Mapping[str, Node]) -> tuple[Draw, Draw]:
        from_s, to_s = self._time(node, keys, "from_s"), self._time(node, keys, "to_s")
        if from_s.bounds[1] >= to_s.bounds[0]:
            raise node.error("from_s must come before to_s")
        return from_s, to_s

    def _time(self, node: Node, keys: Mapping[str, Node], key: str) -> Draw:
        node.need(key)
        return self._draw(keys[key], 0, self.duration_s)

    def _arrivals(self, node: Node, keys: Mapping[str, Node]) -> Arrivals:
        kinds = [key for key in ("poisson_per_s", "every_s", "trace") if key in keys]
        if len(kinds) != 1:
            raise node.error("give one of poisson_per_s, every_s, trace")
        if kinds == ["trace"]:
            times = self._column(node, keys)
            return Recorded(tuple(sorted(time - min(times) for time in times)))
        if extra := [key for key in ("column", "scale") if key in keys]:
            raise keys[extra[0]].error("goes with trace only")
        if kinds == ["poisson_per_s"]:
            return Poisson(self._draw(keys["poisson_per_s"], 0, 10_000))
        return Every(self._draw(keys["every_s"], 1e-4, 1e9))

    def _lengths(self, node: Node, keys: Mapping[str, Node]) -> Lengths:
        node.need("prompt_tokens", "output_tokens")
        lengths = Lengths(
            self._prompt(keys["prompt_tokens"]),
            self._draw(keys["output_tokens"], 1),
            keys["priority"].integer() if "priority" in keys else 0,
            self._draw(keys["max_tokens"], 1) if "max_tokens" in keys else None,
            round(keys["shared_prefix_tokens"].integer(least=0) * self.scale_tokens)
            if "shared_prefix_tokens" in keys
            else 0,
            keys["shared_prefixes"].integer(least=1) if "shared_prefixes" in keys else 1,
        )
        self._check_fit(node, lengths.prompt_tokens, _longest_answer(lengths))
        return lengths

    def _prompt(self, node: Node) -> Draw:
        draw = self._draw(node, 1).scaled(self.scale_tokens)
        self._check_cpu(node, round(draw.bounds[1]))
        return draw

    def _check_cpu(self, node: Node, most: int) -> None:
        if most > MOST_CPU_PROMPT_TOKENS and MODEL_PROFILES.get(self.engine.model) == "cpu-tiny":
            raise node.error(
                f"up to {most} tokens, but {self.engine.model} runs on a CPU: at most {MOST_CPU_PROMPT_TOKENS}"
            )

    def _check_fit(self, node: Node, prompt: Draw, output: Draw) -> None:
        """The scheduler's own conditions (``Scheduler.add``), for the longest request that these draws can give."""
        most = round(prompt.bounds[1]) + round(output.bounds[1])
        capacity = self.engine.kv_blocks * self.engine.block_size
        if most > capacity:
            raise node.error(f"up to {most} tokens do not fit the KV cache of {capacity}; raise engine.kv_blocks")
        if not self.engine.chunked_prefill and most > self.engine.max_num_batched_tokens:
            raise node.error(
                f"up to {most} tokens exceed engine.max_num_batched_tokens={self.engine.max_num_batched_tokens}; "
                "raise it or turn chunked_prefill on"
            )

    def _draw(self, node: Node, least: float, most: float = math.inf) -> Draw:
        draw = self._draw_of_any_size(node)
        low, high = draw.bounds
        if low < least or high > most:
            limits = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
            raise node.error(f"must be {limits}, not {low:g}" + (f" to {high:g}" if high != low else ""))
        return draw

    def _draw_of_any_size(self, node: Node) -> Draw:
        if not isinstance(node.value, dict):
            return Literal(node.number())
        keys = node.mapping(("uniform", "choice", "lognormal", "trace", "column", "scale"))
        if "trace" in keys and keys.keys() <= {"trace", "column", "scale"}:
            return Choice(self._column(node, keys))
        if len(keys) != 1:
            raise node.error("give a number, or one of uniform, choice, lognormal, trace")
        ((kind, value),) = keys.items()
        if kind == "uniform":
            ends = [end.number() for end in value.items()]
            if len(ends) != 2 or ends[0] > ends[1]:
                raise value.error("must be [low, high]")
            return Uniform(*ends)
        if kind == "choice":
            values = tuple(item.number() for item in value.items())
            if not values:
                raise value.error("give at least one number")
            return Choice(values)
        if kind != "lognormal":
            raise value.error("goes with trace only")
        shape = value.mapping(("median", "sigma"))
        value.need("median", "sigma")
        return Lognormal(self._median(shape["median"]), shape["sigma"].positive())

    def _median(self, node: Node) -> float | Uniform:
        if not isinstance(node.value, dict):
            return node.positive()
        drawn = self._draw(node, 1e-9)
        if not isinstance(drawn, Uniform):
            raise node.error("must be a number, or drawn once a run: {uniform: [low, high]}")
        return drawn

    def _column(self, node: Node, keys: Mapping[str, Node]) -> tuple[float, ...]:
        node.need("column")
        scale = keys["scale"].positive() if "scale" in keys else 1.0
        return tuple(value * scale for value in read_column(self.folder / keys["trace"].text(), keys["column"].text()))
