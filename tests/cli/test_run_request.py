"""What `run` refuses before it touches anything: files that it would write over, and places that are no places."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
import zstandard

from tests.cli.calling import Called, call, chat_line

NOWHERE = "http://127.0.0.1:9/v1"
needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_bytes(chat_line("a"))
    return tmp_path


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(*arguments: object, stdin: bytes = b"") -> Called:
    """Run a command that has to be refused with one line and a hint, and to change nothing."""
    before = everything(Path.cwd())

    called = call("run", *arguments, "-u", NOWHERE, stdin=stdin)

    assert called.code == 2, called.err
    assert "Traceback" not in called.err
    assert [line.partition(":")[0] for line in called.err.splitlines()] == ["error", "hint"]
    assert everything(Path.cwd()) == before
    return called


# -- files that would be written over ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [(), ("--fresh",)])
@pytest.mark.parametrize("way", ["relative", "absolute", "symlink", "hard link", "symlinked folder"])
@pytest.mark.parametrize("flag", ["-o", "--errors"])
def test_the_input_is_not_written_over(folder, way, flag, fresh):
    name = "in.jsonl"
    match way:
        case "absolute":
            name = str(folder / name)
        case "symlink":
            name = "link.jsonl"
            Path(name).symlink_to("in.jsonl")
        case "hard link":
            name = "link.jsonl"
            Path(name).hardlink_to("in.jsonl")
        case "symlinked folder":
            Path("here").symlink_to(folder)
            name = "here/in.jsonl"
    output = name if flag == "-o" else "out.jsonl"
    errors = ("--errors", name) if flag == "--errors" else ()

    called = refused("in.jsonl", "-o", output, *errors, *fresh)

    what = "OUTPUT" if flag == "-o" else "the errors file"
    assert f"error: {what} {name} is INPUT in.jsonl\n" in called.err
    assert f"Name another file with {flag}." in called.err


@pytest.mark.parametrize("errors", ["out.jsonl", "./out.jsonl", "here/out.jsonl"])
def test_output_and_errors_are_two_files(folder, errors):
    Path("here").symlink_to(folder)

    assert "is OUTPUT out.jsonl" in refused("in.jsonl", "-o", "out.jsonl", "--errors", errors).err


def test_the_errors_file_that_nobody_named_is_not_the_input():
    Path("in.jsonl").rename("out.errors.jsonl")

    called = refused("out.errors.jsonl", "-o", "out.jsonl")

    assert "the errors file out.errors.jsonl is INPUT out.errors.jsonl" in called.err


@pytest.mark.parametrize("name", ["run.json", "lock", "state.db", "state.db-wal", "blobs/input", "manifest.json", ""])
def test_files_of_the_run_folder_are_not_written_over(name):
    Path("state").mkdir()
    place = Path("state") / name if name else Path("folder")
    Path("folder").symlink_to("absent")
    state = "state" if name else "folder"

    called = refused("in.jsonl", "-o", "out.jsonl", "--errors", place, "--state", state)

    assert f"the errors file {place} belongs to the state folder {state}" in called.err


def test_the_input_is_not_set_aside_with_the_state_folder():
    Path("state").mkdir()
    Path("in.jsonl").rename("state/in.jsonl")

    called = refused("state/in.jsonl", "-o", "out.jsonl", "--state", "state", "--fresh")

    assert "INPUT state/in.jsonl is in the state folder state" in called.err


@pytest.mark.parametrize(
    ("source", "output", "errors"),
    [
        ("s3://box/in.jsonl", "s3://box/in.jsonl", "e.jsonl"),
        ("s3://box/in.jsonl", "out.jsonl", "s3://box/in.jsonl"),
        ("in.jsonl", "s3://box/out.jsonl", "s3://box/out.jsonl"),
        ("in.jsonl", "s3://box/out.jsonl", "s3://other/out.jsonl"),
        ("in.jsonl", "out.jsonl", "s3://box/out.jsonl"),
    ],
)
def test_objects_are_not_written_over_either(source, output, errors, monkeypatch):
    monkeypatch.setattr("batchrunner.cli.places.Places.require_source", lambda _: None)

    assert " is " in refused(source, "-o", output, "--errors", errors).err


# -- places ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [(), ("--fresh",)])
@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("place", "OUTPUT place is a folder"),
        (".", "OUTPUT . is a folder"),
        ("/", "OUTPUT / is a folder"),
        ("..", "OUTPUT .. is a folder"),
        ("", "OUTPUT . is a folder"),
        ("pipe", "OUTPUT pipe is a pipe"),
        ("/dev/null", "OUTPUT /dev/null is a device"),
        ("in.jsonl/out.jsonl", "Not a directory"),
        ("circle/out.jsonl", "Too many levels of symbolic links"),
        ("o" * 250, "File name too long"),
        ("o" * 300, "File name too long"),
        ("o\0o", "embedded null byte"),
    ],
)
def test_output_has_to_be_a_file(output, says, fresh):
    Path("place").mkdir()
    Path("circle").symlink_to("circle")
    os.mkfifo("pipe")

    assert says in refused("in.jsonl", "-o", output, *fresh).err


def test_a_folder_that_cannot_be_made_is_named():
    Path("taken").write_text("mine")

    called = refused("in.jsonl", "-o", "taken/deep/out.jsonl", "--state", "state")

    assert "OUTPUT taken/deep/out.jsonl: " in called.err


def test_folders_of_output_and_errors_are_made():
    where = ("-o", "new/out.jsonl", "--errors", "other/deep/errors.jsonl", "--state", "state")

    called = call("run", "in.jsonl", *where, "-u", NOWHERE, "--retry-failed")

    assert "this run has not finished yet" in called.err
    assert Path("new").is_dir()
    assert Path("other/deep").is_dir()


def test_the_state_folder_has_to_be_one():
    Path("out.jsonl.run").write_text("mine")

    assert "the state folder out.jsonl.run is a file" in refused("in.jsonl", "-o", "out.jsonl").err


def test_the_state_folder_has_to_be_made():
    called = refused("in.jsonl", "-o", "out.jsonl", "--state", "in.jsonl/state")

    assert "the state folder in.jsonl/state: Not a directory" in called.err


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("place", "INPUT place is a folder, not a file"),
        ("pipe", "INPUT pipe is a pipe, not a file"),
        ("/dev/zero", "INPUT /dev/zero is a device, not a file"),
        ("none.jsonl", "INPUT none.jsonl is not there"),
        ("in.jsonl/in.jsonl", "Not a directory"),
        ("circle", "Too many levels of symbolic links"),
        ("i" * 300, "File name too long"),
        ("i\0i", "embedded null byte"),
    ],
)
@pytest.mark.parametrize("output", ["out.jsonl", "-"])
def test_the_input_has_to_be_a_file(source, says, output):
    Path("place").mkdir()
    Path("circle").symlink_to("circle")
    os.mkfifo("pipe")

    assert says in refused(source, "-o", output).err


@needs_permissions
def test_an_input_without_permission_is_named():
    Path("in.jsonl").chmod(0)

    called = call("run", "in.jsonl", "-o", "out.jsonl", "-u", NOWHERE)

    assert (called.code, Path("out.jsonl.run").exists()) == (2, False)
    assert "error: INPUT in.jsonl cannot be read: Permission denied\n" in called.err


@needs_permissions
@pytest.mark.parametrize("state", [(), ("--state", "state")])
def test_a_folder_that_cannot_be_written_is_named(state):
    Path("closed").mkdir(mode=0o500)

    called = refused("in.jsonl", "-o", "closed/out.jsonl", *state)

    assert "OUTPUT closed/out.jsonl: nothing can be written into its folder" in called.err


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that is opened and not read is known on Linux")
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_an_input_that_breaks_off_is_named(suffix):
    Path(f"broken{suffix}").symlink_to("/proc/self/mem")

    called = call("run", f"broken{suffix}", "-o", "out.jsonl", "-u", NOWHERE)

    assert called.code == 2
    assert "Input/output error" in called.err
    assert "Traceback" not in called.err


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("is_late", [False, True], ids=["first frame", "second frame"])
def test_a_packed_input_that_is_cut_short_is_refused(suffix, is_late):
    pack = gzip.compress if suffix == ".gz" else zstandard.compress
    whole = pack(b"".join(chat_line(str(number)) for number in range(500)))
    Path(f"cut{suffix}").write_bytes((whole if is_late else b"") + whole[: len(whole) // 2])

    called = call("run", f"cut{suffix}", "-o", "out.jsonl", "-u", NOWHERE)

    assert called.code == 2
    assert f"cut{suffix} cannot be unpacked" in called.err
    assert f" -t cut{suffix}`" in called.err
    assert not Path("out.jsonl.run/run.json").exists()


def test_frames_of_a_packed_input_are_read_one_after_the_other():
    lines = [chat_line("a"), b"{broken\n"]
    Path("two.zst").write_bytes(b"".join(map(zstandard.compress, lines)))

    called = call("validate", "two.zst")

    assert "line 2" in called.out + called.err


def test_stdout_carries_lines_or_the_object():
    called = call("run", "in.jsonl", "-o", "-", "--json", "-u", NOWHERE)

    assert (called.code, called.json["error"]["code"]) == (2, "usage")
    assert "-o - and --json" in called.err
    assert not Path("in.jsonl.run").exists()
