"""Runs StallBench: families and seeds to judged cases, in parallel processes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from stallscope.bench.answers import Answer, answer_of
from stallscope.bench.cache import Made, make
from stallscope.bench.cases import make_case
from stallscope.bench.degrade import degrade
from stallscope.bench.rivals import accuse
from stallscope.bench.scores import Judged, calibration_error
from stallscope.diagnosis import diagnose
from stallscope.trace import Trace, read_trace
from stallscope.workloads.replica import ExecutorName

Job = tuple[Path, int]  # scenario file, seed
Progress = Callable[[float], None]
Result = TypeVar("Result")
CRASHED = "crashed"  # as a verdict


def case_name(job: Job) -> str:
    """What a case is called where others may see it: the family's name would be half of the answer."""
    file, seed = job
    return blake2b(f"{file.stem}/{seed}".encode(), digest_size=5).hexdigest()


def judge(job: Job, folder: Path, executor: ExecutorName, fidelity: int = 3, kept: float = 1.0) -> Judged:
    """Makes a case, or finds it in the cache ``folder``, has its trace diagnosed as a user would, and compares.

    Below ``fidelity`` 3, what poorer telemetry leaves of the trace, with decoys, and spans of the share ``kept`` of its
    requests.
    """
    made = make(make_case(*job), folder, executor)
    truth = made.truth
    try:
        trace = read_trace(made.trace) if fidelity == 3 else _read_degraded(made, fidelity, kept)
        diagnosis = diagnose(trace)
    except Exception as error:  # whatever ends an analyzer is a wrong answer to one case, and not the end of the others
        return Judged(case_name(job), truth, Answer(f"{CRASHED}: {type(error).__name__}: {error}"), {})
    answer = answer_of(diagnosis, truth.start_ns)
    rivals = accuse(trace, diagnosis, truth.harm, truth.start_ns) if truth.culprits and truth.harm else {}
    return Judged(case_name(job), truth, answer, rivals, calibration_error(truth, made.pairs, answer))


def _read_degraded(made: Made, fidelity: int, kept: float) -> Trace:
    with TemporaryDirectory() as scratch:
        return read_trace(degrade(made.trace, fidelity, made.truth, Path(scratch) / "degraded.otlp.jsonl.zst", kept))


def judge_answer(job: Job, folder: Path, executor: ExecutorName, answers: Mapping[str, Answer]) -> Judged:
    """The same for what somebody else said of the case; nothing said is a wrong answer."""
    made = make(make_case(*job), folder, executor)
    return Judged(case_name(job), made.truth, answers.get(case_name(job), Answer("")), {})


def hand_out(job: Job, folder: Path, executor: ExecutorName, out: Path) -> Path:
    """Writes a case for others: its trace to ``out``/traces, and apart from it the truth to ``out``/truth."""
    made = make(make_case(*job), folder, executor)
    name = case_name(job)
    for kind in ("traces", "truth"):
        (out / kind).mkdir(parents=True, exist_ok=True)
    trace = out / "traces" / f"{name}.otlp.jsonl.zst"
    shutil.copyfile(made.trace, trace)
    (out / "truth" / f"{name}.json").write_text(made.truth.to_json() + "\n", encoding="utf-8")
    return trace


def run(
    work: Callable[[Job], Result], files: Iterable[Path], seeds: range, processes: int, progress: Progress
) -> list[Result]:
    """``work`` of each family and seed, in the order of both, whichever was done first."""
    jobs = [(file, seed) for seed in seeds for file in files]
    done: dict[Job, Result] = {}
    for job, result in _in_processes(work, jobs, processes):
        done[job] = result
        progress(len(done) / len(jobs))
    return [done[job] for job in sorted(jobs)]


def _in_processes(work: Callable[[Job], Result], jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, Result]]:
    if processes == 1:
        yield from ((job, work(job)) for job in jobs)
        return
    # A case is a job of one core: threads of libraries would only get in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(processes) as pool:
        waiting = {pool.submit(work, job): job for job in jobs}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
