"""Every name of the telemetry contract, with type, unit and meaning. Nothing else spells them.

Attributes are what OpenTelemetry allows: integers, strings, and flat arrays of either. A field of the step's
composition is left out when it is empty, so that a quiet step is small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SCOPE = "stallscope"
STEP_SPAN = "engine.step"
REQUEST_SPAN = "llm_request"
GPU_SPAN = "gpu.sample"
CLIENT_SPAN = "llm_client"

Type = Literal["int", "str", "bool", "float", "int[]", "str[]"]
On = Literal["resource", "step", "request", "client", "gpu", "converted"]


@dataclass(frozen=True, slots=True)
class Attribute:
    """One attribute: where it stands (``on``), its name, type, unit ("" where it has none) and meaning."""

    on: On
    name: str
    type: Type
    unit: str
    about: str


ATTRIBUTES: list[Attribute] = []


def _declare(on: On, name: str, kind: Type, unit: str, about: str) -> str:
    ATTRIBUTES.append(Attribute(on, name, kind, unit, about))
    return name


# Resource: all that a replay needs. OpenTelemetry's own names first.
SERVICE_NAME = _declare("resource", "service.name", "str", "", "what serves, e.g. stallscope-engine")
REPLICA = _declare("resource", "service.instance.id", "str", "", "the replica")
GROUP = _declare("resource", "stallscope.group", "str", "", "replicas that serve the same model together")
RANK = _declare("resource", "stallscope.rank", "int", "", "rank within the replica")
ROLE = _declare("resource", "stallscope.role", "str", "", "prefill, decode or both")
MODEL = _declare("resource", "gen_ai.request.model", "str", "", "the model served")
ENGINE = _declare("resource", "stallscope.engine.name", "str", "", "engine: stallscope, vllm, ...")
ENGINE_VERSION = _declare("resource", "stallscope.engine.version", "str", "", "version of the engine")
EXECUTOR = _declare("resource", "stallscope.engine.executor", "str", "", "what ran the batches: torch or virtual")
POLICY = _declare("resource", "stallscope.scheduler.policy", "str", "", "scheduling policy: fcfs, ...")
PREEMPTION = _declare(
    "resource", "stallscope.scheduler.preemption", "str", "", "who loses its blocks: latest or least_work"
)
LONG_PREFILL_THRESHOLD = _declare(
    "resource",
    "stallscope.scheduler.long_prefill_token_threshold",
    "int",
    "tokens",
    "most prompt tokens of one request in a step; 0: no limit of its own",
)
TENANT_KV_SHARE = _declare(
    "resource", "stallscope.scheduler.tenant_kv_share", "float", "", "share of the KV blocks one tenant may hold"
)
TENANT_TOKEN_SHARE = _declare(
    "resource",
    "stallscope.scheduler.tenant_token_share",
    "float",
    "",
    "share of a step's token budget one tenant's prompts may take",
)
BLOCK_SIZE = _declare("resource", "stallscope.kv.block_size", "int", "tokens", "tokens a KV block holds")
KV_TOTAL = _declare("resource", "stallscope.kv.total_blocks", "int", "blocks", "KV blocks there are")
MAX_NUM_SEQS = _declare("resource", "stallscope.scheduler.max_num_seqs", "int", "requests", "slots of a batch")
MAX_NUM_BATCHED_TOKENS = _declare(
    "resource", "stallscope.scheduler.max_num_batched_tokens", "int", "tokens", "token budget of a step"
)
CHUNKED_PREFILL = _declare(
    "resource", "stallscope.scheduler.chunked_prefill", "bool", "", "prompts may be split over steps"
)
WATERMARK = _declare(
    "resource", "stallscope.scheduler.watermark", "float", "", "share of blocks kept free at admission"
)
PREFIX_CACHING = _declare("resource", "stallscope.kv.prefix_caching", "bool", "", "prefix caching is on")
ASYNC_SCHEDULING = _declare(
    "resource", "stallscope.scheduler.async", "bool", "", "a step may be scheduled before the last one is done"
)
TENSOR_PARALLEL = _declare("resource", "stallscope.tp_size", "int", "", "tensor-parallel ranks")
PIPELINE_PARALLEL = _declare("resource", "stallscope.pp_size", "int", "", "pipeline-parallel ranks")
DATA_PARALLEL = _declare("resource", "stallscope.dp_size", "int", "", "data-parallel ranks")

# Step span: it starts when the scheduler began and ends when the outputs were ready.
STEP = _declare("step", "stallscope.step", "int", "", "index of the step; a gap shows lost spans")
DISPATCH_DELAY = _declare(
    "step", "stallscope.step.dispatch_delay", "int", "ns", "from the span's start to the dispatch of the batch"
)
IDLE = _declare("step", "stallscope.step.idle", "int", "ns", "before the span's start: time without any request")
SCHED = _declare("step", "stallscope.step.sched", "int", "ns", "time the scheduler took")
DEVICE = _declare("step", "stallscope.step.device", "int", "ns", "time on the device; absent where not measured")
PREFILL_TOKENS = _declare("step", "stallscope.step.prefill_tokens", "int", "tokens", "prefill tokens in the batch")
DECODE_TOKENS = _declare("step", "stallscope.step.decode_tokens", "int", "tokens", "decode tokens in the batch")
BATCH_SIZE = _declare("step", "stallscope.step.batch_size", "int", "requests", "requests in the batch")
RUNNING = _declare("step", "stallscope.step.running", "int", "requests", "requests that hold a slot")
WAITING = _declare("step", "stallscope.step.waiting", "int", "requests", "requests that wait, after admission")
KV_USED = _declare("step", "stallscope.kv.used", "int", "blocks", "KV blocks held by requests, after admission")
KV_CACHED = _declare("step", "stallscope.kv.cached", "int", "blocks", "free blocks that hold a reusable prefix")
DROPPED = _declare(
    "step", "stallscope.dropped", "int", "records", "step and request records dropped so far by a full queue"
)
KEYFRAME = _declare(
    "step",
    "stallscope.keyframe",
    "bool",
    "",
    "the request.* arrays hold everybody, not only who joined; false: who is in the batches is not known from here to "
    "the next keyframe",
)
R_HANDLE = _declare("step", "stallscope.request.handle", "int[]", "", "handle of each request that joined")
R_ID = _declare("step", "stallscope.request.id", "str[]", "", "request id")
R_TRACE = _declare("step", "stallscope.request.trace_id", "str[]", "", "trace id of the caller (hex, or empty)")
R_TENANT = _declare("step", "stallscope.request.tenant", "str[]", "", "tenant, empty where unknown")
R_SOURCE = _declare("step", "stallscope.request.tenant_source", "str[]", "", "who said so")
R_PRIORITY = _declare("step", "stallscope.request.priority", "int[]", "", "priority; absent when all are 0")
R_AGE = _declare("step", "stallscope.request.age", "int[]", "ns", "from the arrival to the span's start")
R_PROMPT = _declare("step", "stallscope.request.prompt_tokens", "int[]", "tokens", "prompt length")
R_MAX = _declare("step", "stallscope.request.max_tokens", "int[]", "tokens", "most output tokens allowed")
R_CACHED = _declare(
    "step", "stallscope.request.cached_tokens", "int[]", "tokens", "from the prefix cache; absent when all are 0"
)
R_COMPUTED = _declare(
    "step",
    "stallscope.request.computed_tokens",
    "int[]",
    "tokens",
    "in the KV cache before this step; absent when all are 0",
)
R_OUTPUT = _declare(
    "step", "stallscope.request.output_tokens", "int[]", "tokens", "output so far; absent when all are 0"
)
R_BLOCKS = _declare(
    "step", "stallscope.request.blocks", "int[]", "blocks", "KV blocks held in this step; absent when all are 0"
)
R_STATE = _declare(
    "step", "stallscope.request.state", "int[]", "", "RequestState: 0 waits, 1 runs, 2 preempted; absent when all 0"
)
R_SESSION = _declare("step", "stallscope.request.session", "str[]", "", "session; absent when none has one")
R_PREDECESSOR = _declare(
    "step", "stallscope.request.predecessor", "str[]", "", "request id it follows; absent when none has one"
)
R_RETRY_OF = _declare(
    "step", "stallscope.request.retry_of", "str[]", "", "request id it repeats; absent when none has one"
)
R_WAITS = _declare(
    "step", "stallscope.request.wait", "int[]", "", "keyframe only: triples as in stallscope.wait, of all who wait"
)
CACHED = _declare(
    "step", "stallscope.cached", "int[]", "tokens", "pairs: handle, tokens found in the prefix cache at its admission"
)
CHUNKS = _declare("step", "stallscope.prefill", "int[]", "tokens", "pairs: handle, prefill tokens")
DECODES = _declare(
    "step", "stallscope.decode", "int[]", "tokens", "pairs: handle, tokens, of who takes none or several"
)
WAITS = _declare("step", "stallscope.wait", "int[]", "", "triples: handle, WaitReason, amount lacking; changes only")
PREEMPTED = _declare("step", "stallscope.preempted", "int[]", "", "pairs: handle, handle of who took the blocks")
EVICTED = _declare(
    "step",
    "stallscope.evicted",
    "int[]",
    "blocks",
    "triples: handle whose admission or growth took cached blocks, handle of their last holder, blocks",
)
LEFT = _declare("step", "stallscope.left", "int[]", "", "pairs: handle, FinishReason")

# Request span: from arrival to the last token. What vLLM emits keeps its names.
REQUEST_ID = _declare("request", "gen_ai.request.id", "str", "", "request id")
USAGE_PROMPT = _declare("request", "gen_ai.usage.prompt_tokens", "int", "tokens", "prompt tokens")
USAGE_COMPLETION = _declare("request", "gen_ai.usage.completion_tokens", "int", "tokens", "output tokens")
REQUEST_MAX_TOKENS = _declare("request", "gen_ai.request.max_tokens", "int", "tokens", "most output tokens allowed")
LATENCY_QUEUE = _declare("request", "gen_ai.latency.time_in_queue", "float", "s", "arrival to first scheduled")
LATENCY_TTFT = _declare("request", "gen_ai.latency.time_to_first_token", "float", "s", "arrival to first output token")
LATENCY_E2E = _declare("request", "gen_ai.latency.e2e", "float", "s", "arrival to last output token")
HANDLE = _declare("request", "stallscope.handle", "int", "", "small integer that step spans use")
TENANT = _declare("request", "stallscope.tenant", "str", "", "tenant, absent where unknown")
TENANT_SOURCE = _declare("request", "stallscope.tenant.source", "str", "", "who said so")
PRIORITY = _declare("request", "stallscope.priority", "int", "", "priority; absent when 0")
CACHED_TOKENS = _declare("request", "stallscope.cached_tokens", "int", "tokens", "prompt tokens from the cache")
PREFIX = _declare(
    "request",
    "stallscope.prefix",
    "int",
    "",
    "number of the group of the replica's prompts that begin with the same block; absent where unknown",
)
PREEMPTIONS = _declare("request", "stallscope.preemptions", "int", "", "times it lost its blocks")
FINISH_REASON = _declare("request", "stallscope.finish_reason", "str", "", "stop, length, abort, timeout or error")
SESSION = _declare("request", "stallscope.session", "str", "", "session, where known")
PREDECESSOR = _declare("request", "stallscope.predecessor", "str", "", "request id it follows, where known")
RETRY_OF = _declare("request", "stallscope.retry_of", "str", "", "request id it repeats, where known")
QUEUED = _declare("request", "stallscope.queued", "int", "ns", "arrival to the first scheduling pass that saw it")
SCHEDULED = _declare("request", "stallscope.scheduled", "int", "ns", "arrival to admission into a batch")
DELIVERED = _declare("request", "stallscope.delivered", "int", "ns", "last token ready to it left the server")
TOKEN_TIMES = _declare(
    "request",
    "stallscope.token_times",
    "str",
    "ns",
    "comma-separated: arrival to the first token, then each gap to the next",
)

# Client span: from the sending to the last token received, the parent of the server's request span. What both know has
# one name: of the above it carries id, tenant, priority, session, predecessor, retry_of, usage, max_tokens and
# token_times, the last from the sending on.
CLIENT_STATUS = _declare(
    "client",
    "stallscope.client.status",
    "str",
    "",
    "ok, rejected (429), http_CODE, timeout, disconnected, unreachable, error (sent in the stream) or abandoned",
)
CLIENT_LATE = _declare(
    "client", "stallscope.client.late", "int", "ns", "how late the driver itself sent it; absent when 0"
)
HTTP_STATUS = _declare("client", "http.response.status_code", "int", "", "status of the answer; absent without one")

# GPU sample: a span without length at the time of the sample. A value that can't be read is left out.
GPU_DEVICE = _declare("gpu", "stallscope.gpu.device", "str", "", "UUID of the GPU or MIG instance")
GPU_UTILIZATION = _declare(
    "gpu", "stallscope.gpu.utilization", "float", "", "share of the driver's last sample period in which a kernel ran"
)
GPU_SM_CLOCK = _declare("gpu", "stallscope.gpu.sm_clock", "int", "MHz", "clock of the multiprocessors")
GPU_MEM_CLOCK = _declare("gpu", "stallscope.gpu.mem_clock", "int", "MHz", "clock of the memory")
GPU_POWER = _declare("gpu", "stallscope.gpu.power", "float", "W", "power drawn")
GPU_TEMPERATURE = _declare("gpu", "stallscope.gpu.temperature", "int", "°C", "temperature of the chip")
GPU_MEMORY_USED = _declare("gpu", "stallscope.gpu.memory_used", "int", "bytes", "memory in use")
GPU_THROTTLE = _declare(
    "gpu", "stallscope.gpu.throttle", "str", "", "why clocks are below their most, joined by |; empty: they aren't"
)

# What spans say besides where they are written from tables (``stallscope convert``). There is a request span for every
# request then, which leaves out what is not known, and nothing else.
STATE = _declare(
    "converted",
    "stallscope.state",
    "str",
    "",
    "of a request, which it is there for: finished, open or lost; where it did not end, its span ends when it was last "
    "known to get on",
)
GAPS = _declare(
    "converted",
    "stallscope.gaps",
    "str",
    "ns",
    "of a request, comma-separated triples: arrival to the start of a gap between tokens, its length, how many were so "
    "long on average; token_times has the first token only",
)
ADAPTER = _declare("converted", "stallscope.adapter", "str", "", "of a request, the adapter it asked for")
UNTRACED = _declare(
    "converted", "stallscope.untraced", "bool", "", "of a request or client: the trace id is not known, and made up"
)
SINCE = _declare(
    "converted", "stallscope.since", "int", "ns", "of a resource: from when on the replica had this configuration"
)
