"""What the installed vLLM is asked, once, and what becomes of the answer."""

import contextlib
import json
import os
import sys
from pathlib import Path

import psutil
import pytest

from tests.agent.engine.engines import FAKE_VLLM
from tests.support.programs import alive, eventually
from xim_agent.engine import capabilities
from xim_agent.engine.capabilities import FILE_NAME, engine_facts, remembered
from xim_agent.planning.engine_facts import EngineFacts

HELP = "  --max-model-len MAX_MODEL_LEN\\n      -1 or 'auto'\\n  --uds UDS"


def program(folder: Path, *lines: str, interpreter: str = sys.executable) -> str:
    """A script that stands where vLLM's would."""
    file = folder / "vllm"
    file.write_text("\n".join((f"#!{interpreter}", *lines)), encoding="utf-8")
    file.chmod(0o755)
    return str(file)


def asked(executable: str, folder: Path) -> EngineFacts:
    return engine_facts(executable, folder, dict(os.environ))


def counting(folder: Path, **answers: str) -> list[str]:
    """Python that writes down every question and answers by its last word; fails at any other."""
    return [
        "import sys",
        f"open({str(folder / 'asked')!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10))",
        f"answers = {json.dumps(answers)}",
        "sys.exit(2) if sys.argv[-1] not in answers else print(answers[sys.argv[-1]].replace('\\\\n', chr(10)))",
    ]


def questions(folder: Path) -> list[str]:
    return (folder / "asked").read_text(encoding="utf-8").splitlines()


def test_flags_are_asked_once_until_the_program_changes(tmp_path: Path) -> None:
    executable = program(tmp_path, *counting(tmp_path, **{"--help=all": HELP, "--version": "vllm 0.32.0"}))
    assert remembered(executable, tmp_path) is None
    found = asked(executable, tmp_path)
    assert found.flags == frozenset({"--max-model-len", "--uds"})
    assert found.fits_context
    assert asked(executable, tmp_path) == remembered(executable, tmp_path) == found
    assert questions(tmp_path) == ["--version", "serve --help=all"]

    program(tmp_path, *counting(tmp_path, **{"--help=all": HELP, "--version": "0.33.0"}))
    os.utime(executable, ns=(1, 1))
    assert remembered(executable, tmp_path) is None
    assert asked(executable, tmp_path).version == "0.33.0"
    assert len(json.loads((tmp_path / FILE_NAME).read_text(encoding="utf-8"))["programs"]) == 1


def test_several_programs_are_remembered_side_by_side(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        asked(program(folder, *counting(folder, **{"--help=all": HELP, "--version": name})), tmp_path)
    assert len(json.loads((tmp_path / FILE_NAME).read_text(encoding="utf-8"))["programs"]) == 2


def test_an_older_vllm_is_asked_for_its_whole_help(tmp_path: Path) -> None:
    executable = program(tmp_path, *counting(tmp_path, **{"--help": HELP, "--version": "0.9.1"}))
    assert "--uds" in (asked(executable, tmp_path).flags or ())
    assert questions(tmp_path)[1:] == ["serve --help=all", "serve --help"]


def test_a_vllm_that_does_not_answer_stops_nothing_and_is_asked_again(tmp_path: Path) -> None:
    executable = program(tmp_path, "raise SystemExit(1)")
    assert asked(executable, tmp_path).flags is None
    assert not (tmp_path / FILE_NAME).exists()
    assert asked(str(tmp_path / "nowhere"), tmp_path) == EngineFacts()


def test_version_and_packages_come_from_the_pythons_own_records(tmp_path: Path) -> None:
    site = tmp_path / "site"
    for package in ("lmcache", "arctic_inference"):
        (site / package).mkdir(parents=True)
        (site / package / "__init__.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    (site / "vllm-0.31.0+rocm.dist-info").mkdir()
    (site / "vllm-0.31.0+rocm.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm\nVersion: 0.31.0+rocm\n", encoding="utf-8"
    )
    executable = program(tmp_path, *counting(tmp_path, **{"--help=all": HELP}))
    found = engine_facts(executable, tmp_path, {**os.environ, "PYTHONPATH": str(site)})
    assert found.version == "0.31.0+rocm"
    assert found.packages == frozenset({"lmcache", "arctic_inference"})
    assert questions(tmp_path) == ["serve --help=all"]


def test_a_program_that_is_no_python_script_is_asked_for_its_version(tmp_path: Path) -> None:
    found = asked(str(FAKE_VLLM), tmp_path)
    assert found.version == "0.32.0"
    assert found.packages is None
    assert found.has("--kv-offloading-size")


def test_a_python_that_does_not_start_leaves_the_rest_to_the_program(tmp_path: Path) -> None:
    executable = program(tmp_path, interpreter="/nowhere/python3")
    assert asked(executable, tmp_path) == EngineFacts()


@pytest.mark.parametrize("content", ["", "[]", '{"form": 0}', '{"form": 1}', '{"form": 1, "programs": []}'])
def test_a_file_that_cannot_be_read_is_written_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE_NAME).write_text(content, encoding="utf-8")
    executable = program(tmp_path, *counting(tmp_path, **{"--help=all": HELP, "--version": "1.0"}))
    found = asked(executable, tmp_path)
    assert remembered(executable, tmp_path) == found


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    executable = program(tmp_path, *counting(tmp_path, **{"--help=all": HELP, "--version": "1.0"}))
    assert asked(executable, tmp_path / "file").version == "1.0"


def never_answering(folder: Path) -> str:
    """A script whose child holds its output; it writes down the child's pid."""
    return program(folder, "sleep 1000 &", f"echo $! >> {folder}/pids", "wait", interpreter="/bin/sh")


def children(folder: Path) -> list[psutil.Process]:
    file = folder / "pids"
    found = []
    for pid in file.read_text(encoding="utf-8").split() if file.exists() else ():
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(int(pid)))
    return found


async def test_what_takes_too_long_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed script's child still holds its output, for ever perhaps."""
    monkeypatch.setattr(capabilities, "HELP_TIMEOUT_S", 0.2)
    assert asked(never_answering(tmp_path), tmp_path) == EngineFacts()
    await eventually(lambda: not alive(children(tmp_path)), what="the children end")


async def test_a_question_that_is_given_up_is_killed_and_the_next_is_not_asked(tmp_path: Path) -> None:
    executable = never_answering(tmp_path)
    found = engine_facts(executable, tmp_path, dict(os.environ), lambda: bool(children(tmp_path)))
    assert found == EngineFacts()
    assert len((tmp_path / "pids").read_text(encoding="utf-8").split()) == 1
    await eventually(lambda: not alive(children(tmp_path)), what="the child ends")
