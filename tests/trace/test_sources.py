"""What names a trace: files, folders, globs, standard input, URLs are the same tables; what can't be read is said."""

import gzip
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import zstandard

from stallscope.errors import UsageError
from stallscope.trace import Trace, read_trace
from tests.trace.recording import read, steady, write


@cache
def lines() -> tuple[bytes, ...]:
    return tuple(steady(5, output=9).lines())


def whole() -> Trace:
    return read(list(lines()))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The recording in three files, in three folders, with something else beside them."""
    parts = {"a": bytes, "b": gzip.compress, "c": zstandard.compress}
    for number, (name, compress) in enumerate(parts.items()):
        (tmp_path / name).mkdir()
        text = b"\n".join(lines()[number::3])
        (tmp_path / name / f"part.otlp.jsonl{('', '.gz', '.zst')[number]}").write_bytes(compress(text))
        (tmp_path / name / "notes.txt").write_text("not a trace")
    return tmp_path


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(files: Path) -> Iterator[str]:
    """A real server of these files."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(files)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("pattern", ["", "*", "?/part*", "[abc]", "**/*.otlp.jsonl*"])
def test_a_folder_or_a_glob_is_all_its_files(pattern: str, files: Path) -> None:
    trace = read_trace(files / pattern)
    assert (trace.tables, trace.findings) == (whole().tables, ())


def test_a_file_url_is_that_file(files: Path) -> None:
    write(files / "all.otlp.jsonl", lines())
    assert read_trace(f"file://{files}/all.otlp.jsonl").tables == whole().tables


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
def test_standard_input_is_read_as_it_comes(compress: type[bytes], tmp_path: Path) -> None:
    write(tmp_path / "t.otlp.jsonl", lines())
    script = "from stallscope.trace import read_trace; t = read_trace('-'); print(t.steps.num_rows, t.source)"
    data = compress((tmp_path / "t.otlp.jsonl").read_bytes())
    done = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, check=True)
    assert done.stdout.decode().split() == [str(whole().steps.num_rows), "stdin"]


def test_a_pipe_is_read_as_it_comes(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(b"\n".join(lines())))
    writer.start()
    assert read_trace(pipe).tables == whole().tables
    writer.join()


@pytest.mark.parametrize("name", ["memory://run", "memory://run/*/part*", "memory:/run"])
def test_a_store_is_read_through_fsspec(name: str, files: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    store.put(str(files), "/run", recursive=True)
    try:
        trace = read_trace(name)
        assert (trace.tables, trace.findings) == (whole().tables, ())
        assert read_trace("memory://run/b/part.otlp.jsonl.gz").steps.num_rows > 0
    finally:
        store.rm("/run", recursive=True)


def test_a_web_address_is_read(site: str, files: Path) -> None:
    (files / "all.otlp.jsonl.zst").write_bytes(zstandard.compress(b"\n".join(lines())))
    trace = read_trace(Path(f"{site}/all.otlp.jsonl.zst"))  # as the command line has it
    assert trace.tables == whole().tables
    assert trace.source == f"{site}/all.otlp.jsonl.zst"


def test_one_that_can_not_be_read_among_many_is_named_and_the_rest_is_used(files: Path) -> None:
    (files / "gone.otlp.jsonl").symlink_to(files / "nowhere")
    trace = read_trace(files / "*")
    assert trace.tables == whole().tables
    finding, told = trace.findings
    assert (finding.kind, finding.count) == ("unreadable_file", 1)
    assert (told.kind, told.count, told.where) == ("bad_files", 1, str(files))
    assert "the other 3 are read" in told.text
    assert finding.where.endswith("gone.otlp.jsonl")


def test_what_can_not_be_read_is_one_line_of_advice(site: str, files: Path) -> None:
    pytest.importorskip("fsspec")
    (files / "empty").mkdir()
    (files / "gone.jsonl").symlink_to(files / "nowhere")
    said = {
        f"{files}/x*": "no file matches",
        f"{files}/nothing": "no such file or folder",
        f"{files}/empty": "no trace file in this folder",
        f"{files}/gone.json*": "cannot be read",
        f"{site}/nothing.jsonl": "404",
        f"{site}/": "no OTLP in it",
        "http://127.0.0.1:1/t.jsonl": "cannot be read",
        "http://user:secret@127.0.0.1:1/t.jsonl": "http://127.0.0.1:1/t.jsonl",
        "memory://nothing": "no such file or folder",
        "memory://nothing/*": "no file matches",
        "abc://bucket/x": "nothing reads abc://",
    }
    for name, message in said.items():
        with pytest.raises(UsageError) as error:
            read_trace(name)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
        assert "secret" not in str(error.value)


def test_a_store_without_its_library_names_it(tmp_path: Path) -> None:
    """As where it is not installed."""
    (tmp_path / "s3fs.py").write_text("raise ImportError('no')")
    script = (
        "from stallscope.trace import read_trace; from stallscope.errors import UsageError\n"
        "try: read_trace('s3://bucket/run')\n"
        "except UsageError as error: print(error)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, env=environment)
    assert b"s3://bucket/run" in done.stdout
    assert b"s3fs" in done.stdout
    (tmp_path / "fsspec.py").write_text("raise ImportError('no')")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, env=environment)
    assert b"pip install 'stallscope[remote]'" in done.stdout
