"""The command that builds the real data: out of git repositories, and of a network of our own."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from benchmarks.real import building, data
from benchmarks.real.__main__ import main
from benchmarks.real.building import reading
from benchmarks.real.building.reading import Gone, Reader, Unreachable
from benchmarks.real.building.sources import COMMITS, File

NAME, PATH = "own/tiny", "some/ä b.txt"
CLOSED = "http://127.0.0.1:9"  # nothing answers there


def git(place, *arguments):
    ours = ["-c", "user.name=a", "-c", "user.email=a@b"]
    ran = subprocess.run(["git", "-C", place, *ours, *arguments], check=True, capture_output=True)
    return ran.stdout.decode().strip()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Two files of which one is made of the other's repository; returns that repository."""
    place = tmp_path / "repositories" / "own+tiny"
    (place / "some").mkdir(parents=True)
    git(place, "init", "-q")
    (place / "some" / "ä b.txt").write_text("one\ntwo\n", encoding="utf-8")
    (place / "three").write_text("three")
    (place / "large").write_text("not asked for")
    git(place, "add", ".")
    git(place, "commit", "-q", "-m", "x")
    monkeypatch.setitem(COMMITS, NAME, git(place, "rev-parse", "HEAD"))
    (place / "some" / "ä b.txt").write_text("newer\n")  # what is checked out does not count
    monkeypatch.setattr(
        building, "FILES", {"a.txt": file("ONE\nTWO\n"), "b.txt": file("ONE\nTWO\n")}
    )
    monkeypatch.setenv("LOKI_REAL_DATA", str(tmp_path / "data"))
    return place


def file(content, path=PATH):
    def recipe(texts):
        (text,) = texts.values()
        return text.upper()

    return File(hashlib.sha256(content.encode()).hexdigest(), recipe, ((NAME, path),))


def names(folder):
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["benchmarks.real", "data", *map(str, options)])
    main()


def test_the_command_builds_what_is_missing(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b.txt").write_text("ONE\nTWO\n")
    run(monkeypatch, "--repositories", tiny.parent)
    told = capsys.readouterr().out
    assert "a.txt: built\n" in told and "b.txt: there already\n" in told
    assert "2 files, with the bytes that the results were measured with" in told
    assert names(tmp_path / "data") == ["a.txt", "b.txt"]
    assert (tmp_path / "data" / "a.txt").read_bytes() == b"ONE\nTWO\n"
    shutil.rmtree(tiny)  # nothing is read any more
    run(monkeypatch, "--repositories", tiny.parent)
    assert "a.txt: there already" in capsys.readouterr().out


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("layout", ["own+tiny", "own/tiny"])
def test_repositories_in_either_layout(tiny, tmp_path, monkeypatch, bare, layout):
    place = tmp_path / "others" / layout
    place.parent.mkdir(parents=True)
    git(tmp_path, "clone", "-q", *(["--bare"] if bare else []), tiny, place)
    monkeypatch.setenv("GIT_DIR", str(tmp_path))  # as in a hook of another repository
    assert Reader(tmp_path / "others").texts(((NAME, PATH),)) == {PATH: "one\ntwo\n"}


def test_a_repository_that_lacks_something_is_told(tiny, tmp_path, monkeypatch):
    reader = Reader(tiny.parent)
    with pytest.raises(Gone, match=r"own/tiny@\w{12}:nothing.txt: git finds no such file in"):
        reader.texts(((NAME, "nothing.txt"),))
    monkeypatch.setitem(COMMITS, NAME, "0" * 40)
    with pytest.raises(Gone, match="own/tiny@000000000000:some"):
        reader.texts(((NAME, PATH),))
    with pytest.raises(Gone, match=r"own\+tiny' nor .*clone https://github.com/own/tiny"):
        Reader(tmp_path).texts(((NAME, PATH),))


def test_a_folder_inside_of_another_repository_is_none(tiny):
    (tiny / "own+tiny").mkdir()  # git would answer with the repository above it
    with pytest.raises(Gone, match="not a git repository"):
        Reader(tiny).texts(((NAME, PATH),))


def test_a_source_that_is_gone_costs_only_its_file(tiny, tmp_path, monkeypatch, capsys):
    building.FILES["a.txt"] = file("ONE\nTWO\n", "gone.txt")
    with pytest.raises(SystemExit, match=r"a\.txt: own/tiny@\w{12}:gone\.txt") as ended:
        run(monkeypatch, "--repositories", tiny.parent)
    assert "b.txt" not in str(ended.value)
    assert names(tmp_path / "data") == ["b.txt"]
    assert "measured with" not in capsys.readouterr().out


def test_other_bytes_are_not_kept_and_not_overwritten(tiny, tmp_path, monkeypatch):
    building.FILES["a.txt"] = file("something else")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b.txt").write_text("my own")
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--repositories", tiny.parent)
    of_a, of_b = str(ended.value).strip().split("\n")
    assert of_a.startswith("a.txt: what was made of own/tiny@")
    assert hashlib.sha256(b"ONE\nTWO\n").hexdigest() in of_a
    assert hashlib.sha256(b"something else").hexdigest() in of_a
    assert "b.txt' has the SHA-256" in of_b and "remove it to have it built" in of_b
    assert names(tmp_path / "data") == ["b.txt"]
    assert (tmp_path / "data" / "b.txt").read_text() == "my own"


def test_a_source_in_another_shape_is_told(tiny, tmp_path):
    def recipe(texts):
        raise KeyError("question")

    building.FILES["a.txt"] = File("", recipe, ((NAME, PATH),))
    (wrong,) = building.build(tmp_path / "data", Reader(tiny.parent))
    assert wrong.startswith("a.txt: own/tiny@") and "KeyError('question')" in wrong


@pytest.mark.parametrize(
    "what, place, told", [("data", "no", "no such folder"), ("bases", "", "only `data` reads")]
)
def test_repositories_that_cannot_be_read_are_refused(
    tmp_path, monkeypatch, capsys, what, place, told
):
    monkeypatch.setattr(sys, "argv", ["x", what, "--repositories", str(tmp_path / place)])
    with pytest.raises(SystemExit):
        main()
    assert f"--repositories {tmp_path / place}: {told}" in capsys.readouterr().err


# The network.


@pytest.fixture
def host(tiny, tmp_path):
    """A host with the repository; the protocol is that of GitHub, files are asked for by name."""
    place = tmp_path / "host" / "own" / "tiny"
    git(tmp_path, "clone", "-q", "--bare", tiny, place)
    for allowed in ("allowFilter", "allowAnySHA1InWant"):
        git(place, "config", f"uploadpack.{allowed}", "true")
    return f"file://{tmp_path}/host"


def test_files_come_out_of_the_network(host, tiny, tmp_path):
    building.FILES["b.txt"] = file("THREE", "three")
    reader = Reader(host=host)
    assert building.build(tmp_path / "data", reader) == []
    assert (tmp_path / "data" / "a.txt").read_text() == "ONE\nTWO\n"
    assert (tmp_path / "data" / "b.txt").read_text() == "THREE"
    (fetched,) = Path(reader._fetched.name).iterdir()
    had = git(fetched, "cat-file", "--batch-all-objects", "--batch-check")
    assert had.count(" blob ") == 2  # not what else is in the commit
    reader = Reader(host="file:///nowhere")
    assert building.build(tmp_path / "data", reader) == []  # nothing is asked for again


def test_the_files_of_a_repository_are_one_request(host, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_TRACE", str(tmp_path / "trace"))
    found = Reader(host=host).texts(((NAME, PATH), (NAME, "three"), (NAME, "large")))
    assert list(found) == [PATH, "three", "large"]
    ran = (tmp_path / "trace").read_text()
    assert ran.count("built-in: git fetch ") == 2  # first its folders


def test_a_commit_or_a_file_that_the_host_lacks_is_told(host, tmp_path, monkeypatch):
    building.FILES["a.txt"] = file("ONE\nTWO\n", "gone.txt")
    (wrong,) = building.build(tmp_path / "data", Reader(host=host))
    assert re.match(r"a\.txt: own/tiny@\w{12}:gone\.txt: git finds no such file", wrong)
    assert names(tmp_path / "data") == ["b.txt"]
    monkeypatch.setitem(COMMITS, NAME, "0" * 39 + "1")
    with pytest.raises(Gone, match=f"own/tiny@0{{12}}:three: {host}/own/tiny does not have it"):
        Reader(host=host).texts(((NAME, "three"),))


@pytest.fixture
def answers(monkeypatch):
    """A host that answers with the statuses that it is given, and with 404 behind them."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked += 1
            self.send_error(server.statuses.pop(0) if server.statuses else 404)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.statuses = 0, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(reading, "_WAITS", (0, 0))
    yield server
    server.shutdown()
    server.server_close()


def test_a_repository_that_is_gone_costs_only_its_files(answers, tiny, tmp_path, monkeypatch):
    wrong = building.build(tmp_path / "data", Reader(host=answers.url))
    assert [w[:15] for w in wrong] == ["a.txt: own/tiny", "b.txt: own/tiny"]
    assert all(f"{answers.url}/own/tiny does not have it" in w for w in wrong)


def test_a_busy_host_is_asked_again(answers, tiny):
    answers.statuses = [503, 429]
    with pytest.raises(Gone):  # and not Unreachable: the third answer counts
        Reader(host=answers.url).texts(((NAME, "three"),))
    assert answers.asked == 3
    answers.statuses = [429] * 4
    with pytest.raises(Unreachable, match="does not answer.*429"):
        Reader(host=answers.url).texts(((NAME, "three"),))


def test_without_a_network_the_way_out_is_told(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "HOST", CLOSED)
    monkeypatch.setattr(reading, "_WAITS", (0, 0))
    building.FILES["c.txt"] = building.FILES["a.txt"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("ONE\nTWO\n")
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch)
    told = str(ended.value).strip()
    assert told.startswith("b.txt: own/tiny@") and f"{CLOSED}/own/tiny does not answer" in told
    assert "2 of 3 files are missing" in told and "--repositories FOLDER" in told
    assert told.count("own/tiny@") == 1  # the others are not tried
    assert names(tmp_path / "data") == ["a.txt"]


def test_without_git_it_is_asked_for(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    (wrong,) = building.build(tmp_path / "data", Reader(tiny.parent))
    assert wrong.startswith("a.txt: git reads the public files, and it is not installed")


# Where the data lies.


def test_the_folder_that_is_read(tmp_path, monkeypatch):
    beside = tmp_path / "beside"
    monkeypatch.setattr(data, "_BESIDE", beside)
    monkeypatch.setenv("LOKI_BASES", str(tmp_path / "bases"))
    monkeypatch.delenv("LOKI_REAL_DATA", raising=False)
    ours = tmp_path / "bases" / "data"
    assert data.folder() == ours == data.built()
    beside.mkdir()
    assert data.folder() == beside and data.built() == ours
    ours.mkdir(parents=True)
    assert data.folder() == ours == data.Data().folder
    monkeypatch.setenv("LOKI_REAL_DATA", str(tmp_path / "mine"))
    assert data.folder() == tmp_path / "mine" == data.built()
    assert data.Data(beside).folder == beside
