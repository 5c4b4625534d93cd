"""Who sent which request, by the logs of the gateway that checked the keys: a trace in, a trace with its tenants out.

Stands between ``read`` and all analysis. A gateway knows the key, a client can claim anything: what the log says counts
more than what the engine was told, and where they differ that is a finding. Requests that the log doesn't know keep
tenant and source.

The columns that are known by name are those of gateways' own formats:

- LiteLLM: ``SpendLogsPayload`` (litellm/proxy/_types.py) and ``StandardLoggingPayload`` with its metadata
  (litellm/types/utils.py, https://docs.litellm.ai/docs/proxy/logging_spec). Its ``end_user`` is a claim and not taken.
- Kong: the serializer of its logging plugins (kong/pdk/log.lua): ``request.id``, ``request.headers``, ``consumer``.
  Apache APISIX writes ``request.headers`` and ``consumer.username``, too.
- Envoy: fields are named in its configuration; request ids are ``x-request-id`` in Envoy Gateway's default,
  ``request_id`` in Istio's and ``x_request_id`` in Contour's. None names a tenant, unless the operator adds one.
- nginx: ``$request_id`` and ``$remote_user``, under these names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stallscope.errors import UsageError
from stallscope.trace.findings import Finding, Findings
from stallscope.trace.foreign import ForeignTable, read_foreign, tidy
from stallscope.trace.model import Trace
from stallscope.trace.references import Ints, request_rows
from stallscope.trace.reserved import UNKNOWN, tenant_column
from stallscope.trace.tables import same, with_columns

# A row may be known by several ids: all count, the request's in the engine as the gateway's own.
REQUEST_COLUMNS = (
    "x-request-id",
    "request_id",
    "request.headers.x-request-id",
    "request.id",
    "response_id",
    "response.id",
    "litellm_call_id",
    "call_id",
    "id",
)
TRACE_COLUMNS = ("traceparent", "trace_id", "traceid", "request.headers.traceparent")
# In this order: who pays before who calls. The first one that a row has counts.
TENANT_COLUMNS = (
    "tenant",
    "tenant_id",
    "x-tenant",
    "x-tenant-id",
    "team_alias",
    "metadata.user_api_key_team_alias",
    "user_api_key_team_alias",
    "team_id",
    "metadata.user_api_key_team_id",
    "api_key_alias",
    "key_alias",
    "metadata.user_api_key_alias",
    "user_api_key_alias",
    "consumer.username",
    "consumer.custom_id",
    "consumer.id",
    "x-consumer-username",
    "user",
    "remote_user",
)
MOST_CHARACTERS = 256  # of a tenant's name
SOURCE, CLAIM = "gateway:", "claim"  # how sources of tenants begin: a log's, and a mere claim's

_UNKNOWN, _CONFLICT = -1, -2  # in place of a tenant's number
_OPTIONS = re.compile(r":(?=(?:request|trace|tenant)=)")
_OPTION = re.compile(r",(?=(?:request|trace|tenant)=)")
_TRACEPARENT = r"^[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}.*"

# What an engine makes of the header X-Request-Id. vLLM 0.32 writes the kind of the request before it ("chatcmpl-ID",
# "cmpl-ID") and behind it the number of the prompt ("cmpl-ID-0"), then 8 random hex digits where it is not a span's;
# before all that, the number of the answer ("1_cmpl-ID-0-1a2b3c4d"). Answers have the id with its kind, so logs may.
# Where an id is there twice, reading a trace adds " #2".
_ADDED = ((r" #\d+$", ""), (r"^\d+_((?:chatcmpl|cmpl)-)", r"\1"))
_PERHAPS_ADDED = ((r"-[0-9a-f]{8}$", ""), (r"^(cmpl-.+)-\d+$", r"\1"))  # or the end of the id itself
_KIND = r"^(?:chatcmpl|cmpl|generate-tokens)-"


@dataclass(frozen=True, slots=True)
class _LogFile:
    """A log to read, and the columns that the user named, by role."""

    path: Path
    columns: dict[str, str]

    @staticmethod
    def named(text: str) -> _LogFile:
        """From ``FILE`` or ``FILE:request=COLUMN,trace=COLUMN,tenant=COLUMN``, of which any may be left out."""
        path, *options = _OPTIONS.split(text, maxsplit=1)
        pairs = [one.partition("=") for one in _OPTION.split(options[0])] if options else []
        for role, _, column in pairs:
            if not column:
                raise UsageError(f"--tenants {text}: {role}= names no column; write {role}=COLUMN, or leave it out")
        return _LogFile(Path(path), {role: column for role, _, column in pairs})


@dataclass(frozen=True, slots=True)
class _Known:
    """Tenants by key: ``tenant`` is a number, or ``_CONFLICT`` where a key's rows name several; ``file`` the log's."""

    keys: pa.Array
    tenant: Ints
    file: Ints

    @staticmethod
    def of(rows: pa.Table) -> _Known:
        """From rows of key, tenant and file (numbers), in which a key may be several times."""
        found = rows.group_by("key").aggregate([("tenant", "min"), ("tenant", "max"), ("file", "min")])
        low, high, file = (found[name].to_numpy() for name in ("tenant_min", "tenant_max", "file_min"))
        return _Known(found["key"].combine_chunks(), np.where(low == high, low, _CONFLICT), file)

    def find(self, keys: pa.Array) -> tuple[Ints, Ints]:
        """Tenant and file of each key; -1 where there is none."""
        row = pc.index_in(keys, value_set=self.keys).fill_null(-1).to_numpy(zero_copy_only=False)
        return np.append(self.tenant, _UNKNOWN)[row], np.append(self.file, -1)[row]


@dataclass(frozen=True, slots=True)
class TenantLogs:
    """Who sent which request, as gateways' logs say.

    ``names``: of tenants, by number. ``files``: the logs, by number. ``looked_in``: the columns that were read, for
    people. ``findings``: what could not be read.
    """

    names: pa.Array
    files: tuple[Path, ...]
    looked_in: str
    findings: tuple[Finding, ...]
    by_request: _Known
    by_trace: _Known
    by_kindless: _Known  # request ids without what an engine writes before them

    def find(self, requests: pa.Table) -> tuple[Ints, Ints]:
        """Tenant and file of each row with ``request`` and ``trace_id``: a number, -1 where the logs don't know it, -2
        where they name several.

        By the request id as it is, else the trace id, else what the engine has made of the log's id.
        """
        requests = requests.select(["request", "trace_id"])
        tenant, file = self.by_request.find(_plain(requests["request"]))
        doubtful = tenant == _CONFLICT
        for find in (self._find_by_trace, self._find_made):
            still = np.flatnonzero(tenant < 0)
            found, in_file = find(requests.take(still))
            doubtful[still] |= found == _CONFLICT
            tenant[still] = found
            file[still] = in_file
        return np.where((tenant < 0) & doubtful, _CONFLICT, tenant), file

    def _find_by_trace(self, requests: pa.Table) -> tuple[Ints, Ints]:
        return self.by_trace.find(_plain(requests["trace_id"]))

    def _find_made(self, requests: pa.Table) -> tuple[Ints, Ints]:
        """By all ids that an engine may have made this one of; where these are of several tenants, of none."""
        form = _plain(requests["request"])
        for pattern, kept in _ADDED:
            form = pc.replace_substring_regex(form, pattern, kept)
        forms = [form]
        for pattern, kept in _PERHAPS_ADDED:
            forms += [pc.replace_substring_regex(form, pattern, kept) for form in forms]
        tenant, file = (np.full(requests.num_rows, _UNKNOWN) for _ in range(2))
        for form in forms:
            found, in_file = self.by_kindless.find(pc.replace_substring_regex(form, _KIND, ""))
            first = tenant == _UNKNOWN
            differs = ~first & (found != _UNKNOWN) & (found != tenant)
            file = np.where(first, in_file, file)
            tenant = np.where(differs, _CONFLICT, np.where(first, found, tenant))
        return tenant, file


def log_paths(logs: Sequence[str]) -> list[Path]:
    """The files of what ``read_tenant_logs`` is given."""
    return [_LogFile.named(log).path for log in logs]


def with_tenants(trace: Trace, logs: TenantLogs) -> Trace:
    """The trace with the tenants that the logs know, in all its tables; the source of these is ``gateway:LOG``.

    Findings say how many requests the logs don't know, how many they name several tenants for, and how many claimed
    what is not so. Raises UsageError where they know none: then it is another log, or another column.
    """
    requests = trace.requests
    number, file = logs.find(requests)
    known = number >= 0
    if not known.any():
        raise _nothing_known(trace, logs)
    before, source = (_plain(requests[name]) for name in ("tenant", "tenant_source"))
    told = _names_at(logs.names, number)
    tenant = pc.coalesce(told, before)
    sources = pa.array([f"{SOURCE}{path.name}" for path in logs.files], pa.string())
    changed = {"tenant": tenant, "tenant_source": pc.coalesce(_names_at(sources, np.where(known, file, -1)), source)}
    tables = dict(trace.tables)
    tables["requests"] = with_columns(requests, changed)
    for table, column, named in _FOLLOWERS:
        rows = tables[table]
        if rows.num_rows:
            now = _names_at(tenant, request_rows(tables, table, column))
            tables[table] = with_columns(rows, {named: pc.coalesce(now, _plain(rows[named]))})
    if trace.clients.num_rows:
        tables["clients"] = _clients_of_none(tables, logs)
    findings = Findings((*trace.findings, *logs.findings))
    _say(findings, logs, requests, number, told)
    return replace(trace, tables=tables, findings=findings.all())


# --- reading logs -------------------------------------------------------------------------------------------------


def read_tenant_logs(logs: Sequence[str]) -> TenantLogs:
    """Gateways' logs, each as ``FILE`` or ``FILE:request=COLUMN,trace=COLUMN,tenant=COLUMN`` (any may be left out).

    Raises UsageError where one can't be read, or has no column that names requests, or none that names tenants.
    """
    findings = Findings()
    files = [_LogFile.named(log) for log in logs]
    read = [_read_log(file, number, findings) for number, file in enumerate(files)]
    rows = pa.concat_tables([one for one, _ in read])
    names = pc.unique(rows["tenant"])
    at = rows.schema.get_field_index("tenant")
    rows = rows.set_column(at, "tenant", pc.index_in(rows["tenant"], value_set=names).cast(pa.int64()))
    by_request = rows.filter(pc.equal(rows["role"], "request"))
    kindless = pc.replace_substring_regex(by_request["key"], _KIND, "")
    return TenantLogs(
        names=names,
        files=tuple(file.path for file in files),
        looked_in="; ".join(dict.fromkeys(columns for _, columns in read)),
        findings=findings.all(),
        by_request=_Known.of(by_request),
        by_trace=_Known.of(rows.filter(pc.equal(rows["role"], "trace"))),
        by_kindless=_Known.of(by_request.set_column(by_request.schema.get_field_index("key"), "key", kindless)),
    )


def _read_log(file: _LogFile, number: int, findings: Findings) -> tuple[pa.Table, str]:
    """Rows of role (request or trace), key, tenant and file, and the columns they are from, for people."""
    wanted = {"request": REQUEST_COLUMNS, "trace": TRACE_COLUMNS, "tenant": TENANT_COLUMNS}
    if file.columns.keys() & {"request", "trace"}:
        wanted |= {"request": (), "trace": ()}
    wanted |= {role: (column,) for role, column in file.columns.items()}
    table = read_foreign(file.path, [name for names in wanted.values() for name in names], findings)
    found = {role: [name for name in names if name in table.columns] for role, names in wanted.items()}
    for role, column in file.columns.items():
        if not found[role]:
            raise _no_column(file.path, table, f"no column {column!r} with anything in it")
    if not found["request"] + found["trace"]:
        raise _no_column(file.path, table, "no column that names requests")
    if not found["tenant"]:
        raise _no_column(file.path, table, "no column that names tenants")
    tenant = pc.coalesce(*(tenant_names(table.columns[name]) for name in found["tenant"]))
    keys = [("request", tidy(table.columns[name])) for name in found["request"]]
    keys += [("trace", trace_ids(table.columns[name])) for name in found["trace"]]
    nameless = pc.is_null(pc.coalesce(*(key for _, key in keys)))
    missing = pc.sum(pc.or_(nameless, pc.is_null(tenant))).as_py()
    text = "rows of the gateway's log that name no request or no tenant"
    findings.add("gateway_row", str(file.path), "", text, missing)
    rows = pa.concat_tables([_rows(role, key, tenant, number) for role, key in keys])
    rows = rows.filter(pc.and_(pc.is_valid(rows["key"]), pc.is_valid(rows["tenant"])))
    if not rows.num_rows:
        raise _no_column(file.path, table, "no row that names a request and its tenant")
    return rows, f"{', '.join(found['request'] + found['trace'])} to {', '.join(found['tenant'])}"


def _rows(role: str, key: pa.ChunkedArray, tenant: pa.ChunkedArray, file: int) -> pa.Table:
    return pa.table(
        {"role": same(role, len(key)), "key": key, "tenant": tenant, "file": pa.repeat(pa.scalar(file), len(key))}
    )


def tenant_names(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.utf8_slice_codeunits(tenant_column(tidy(column)), 0, MOST_CHARACTERS)


def trace_ids(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The id of a ``traceparent``, or one that stands alone; the id of zeros is none."""
    text = pc.utf8_lower(tidy(column))
    found = pc.replace_substring_regex(text, _TRACEPARENT, r"\1")
    sound = pc.and_(pc.match_substring_regex(found, "^[0-9a-f]{32}$"), pc.not_equal(found, "0" * 32))
    return pc.if_else(sound, found, pa.scalar(None, pa.string()))


def _no_column(path: Path, table: ForeignTable, problem: str) -> UsageError:
    has = ", ".join(map(repr, table.names))
    return UsageError(f"{path}: {problem}; it has {has}: say --tenants {path}:request=COLUMN,tenant=COLUMN")


# --- tables -------------------------------------------------------------------------------------------------------

# Tables whose rows have the tenant of a request, the column that names the request, and the one of the tenant.
_FOLLOWERS = (
    ("residency", "request", "tenant"),
    ("evictions", "owner_request", "owner_tenant"),
    ("clients", "request", "tenant"),
)


def _clients_of_none(tables: Mapping[str, pa.Table], logs: TenantLogs) -> pa.Table:
    """The clients, where a log knows the tenant of those that reached no engine."""
    clients = tables["clients"]
    number, _ = logs.find(clients)
    seen = request_rows(tables, "clients", "request") >= 0
    told = _names_at(logs.names, np.where(seen, _UNKNOWN, number))
    return with_columns(clients, {"tenant": pc.coalesce(told, _plain(clients["tenant"]))})


def _names_at(names: pa.Array, positions: Ints) -> pa.Array:
    """The names at these positions, null where they are negative."""
    return names.take(pa.array(positions, mask=positions < 0))


def _plain(column: pa.ChunkedArray) -> pa.Array:
    plain = column.cast(pa.string()).combine_chunks()
    return plain.combine_chunks() if isinstance(plain, pa.ChunkedArray) else plain


# --- what is said of it -------------------------------------------------------------------------------------------


def _say(findings: Findings, logs: TenantLogs, requests: pa.Table, number: Ints, told: pa.Array) -> None:
    """Counts what the logs don't know or contradict. Texts name nobody: a report to one tenant shows them, too."""
    before, source = (_plain(requests[name]) for name in ("tenant", "tenant_source"))
    claimed = pc.and_(pc.not_equal(before, UNKNOWN), pc.starts_with(pc.fill_null(source, CLAIM), CLAIM))
    differs = pc.fill_null(pc.and_(claimed, pc.not_equal(before, told)), False)
    others = pc.is_in(before, value_set=logs.names)
    unknown, several = number == _UNKNOWN, number == _CONFLICT
    share = f"{np.count_nonzero(number >= 0) / len(number):.0%}"
    kept = "these keep tenant and source"
    for kind, rows, text in (
        ("tenant_unmapped", unknown, f"requests not in the gateway's log ({share} are, by {logs.looked_in}); {kept}"),
        ("tenant_conflict", several, f"requests with several tenants in the gateway's log; {kept}"),
        ("claimed_another", _mask(pc.and_(differs, others)), "claims of another tenant's name; the gateway's counts"),
        ("claimed_unknown", _mask(pc.and_(differs, pc.invert(others))), "claims of names that no gateway knows"),
    ):
        positions = np.flatnonzero(rows)
        if len(positions):
            first = requests["request"][int(positions[0])].as_py()
            findings.add(kind, _paths(logs), f" request {first}", text, len(positions))


def _nothing_known(trace: Trace, logs: TenantLogs) -> UsageError:
    theirs = [*logs.by_request.keys[:1].to_pylist(), *logs.by_trace.keys[:1].to_pylist()]
    ours = [*trace.requests["request"][:1].to_pylist(), *trace.requests["trace_id"][:1].to_pylist()]
    return UsageError(
        f"{_paths(logs)}: none of the {trace.requests.num_rows:,} requests of {trace.source} is in it (by "
        f"{logs.looked_in}): it has {_quoted(theirs)}, the trace {_quoted(ours)}; "
        "give the log of this time, or say --tenants FILE:request=COLUMN,tenant=COLUMN"
    )


def _paths(logs: TenantLogs) -> str:
    return ", ".join(map(str, logs.files))


def _quoted(ids: Sequence[str | None]) -> str:
    return " and ".join(repr(one) for one in ids if one) or "none"


def _mask(array: pa.Array) -> npt.NDArray[np.bool_]:
    return np.asarray(array.to_numpy(zero_copy_only=False), dtype=np.bool_)
