"""The command line: every option's error message, and the registry."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import codmd
from codmd import cli, extras
from codmd.demo import command


def usage_error(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seed", "-1", "got '-1'; expected an integer from 0 to 2147483648"),
        ("--seed", "one", "got 'one'; expected an integer from 0"),
        ("--seeds", "0", "got '0'; expected an integer from 1 to 100"),
        ("--seeds", "1.5", "got '1.5'; expected an integer from 1"),
        ("--lambda", "-0.1", "got '-0.1'; expected a finite number >= 0"),
        ("--lambda", "nan", "got 'nan'; expected a finite number >= 0"),
        ("--temperature", "0", "got '0'; expected a finite number > 0"),
        ("--temperature", "inf", "got 'inf'; expected a finite number > 0"),
        ("--frame-weight", "-1", "got '-1'; expected a finite number >= 0"),
        ("--batch-weight", "much", "got 'much'; expected a finite number >= 0"),
        ("--steps", "0", "got '0'; expected an integer from 1 to 8"),
        ("--steps", "9", "got '9'; expected an integer from 1 to 8"),
        ("--updates", "0", "got '0'; expected an integer from 1 to 1000000"),
        ("--threads", "0", "got '0'; expected an integer from 1 to 1024"),
    ],
)
def test_a_bad_demo_option_is_refused_with_what_is_allowed(capsys, option, value, message):
    error = usage_error(capsys, "demo", f"{option}={value}")
    assert f"argument {option}: {message}" in error


@pytest.mark.parametrize("option", ["--quick", "--no-cache"])
def test_a_demo_switch_takes_no_value(capsys, option):
    assert f"argument {option}: ignored explicit argument 'yes'" in usage_error(capsys, "demo", f"{option}=yes")


def test_a_folder_with_other_files_is_refused_before_any_work(capsys, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"codmd demo: error: --out {tmp_path}: holds other files" in error
    assert "new, empty, or an earlier demo's" in error
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_file_as_output_folder_is_refused(capsys, tmp_path):
    (tmp_path / "out").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 1
    assert "is a file; give a folder" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_an_unwritable_place_is_refused(capsys, tmp_path):
    tmp_path.chmod(0o500)
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 1
    assert f"cannot write in {tmp_path}" in capsys.readouterr().err


def test_a_place_below_a_file_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "file" / "out")]) == 1
    assert f"cannot write in {tmp_path / 'file'}" in capsys.readouterr().err


REQUIRES = [
    "torch>=2.8",
    'matplotlib>=3.8; extra == "plot"',
    'not-there>=0.4; extra == "demo"',
    'nor_this>=0.4; extra == "demo"',
    'pytest>=8; extra == "demo"',
    'codmd[plot]; extra == "demo"',
    'absent; extra == "train"',
]


def test_all_missing_packages_of_an_extra_are_named_with_the_command_that_fits_the_clone(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(extras.metadata, "requires", lambda name: REQUIRES)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for module in ("codmd.demo.report", "codmd.demo.figures"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 1
    clone = Path(cli.__file__).resolve().parents[1]
    command = f"pip install -e {shlex.quote(f'{clone}[demo]')}"
    expected = f"not installed: matplotlib, nor_this, not-there; install them with: {command}\n"
    assert expected in capsys.readouterr().err
    assert extras.requirements("demo") == ["not-there", "nor_this", "pytest", "matplotlib"]


def test_an_installed_copy_is_told_the_name_of_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(extras, "__file__", str(tmp_path / "site-packages" / "codmd" / "extras.py"))
    assert extras.install_command("train") == "pip install 'codmd[train]'"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["train", "toy", "distill.wrong=1"], "distill.wrong: unknown; expected one of"),
        (["sample", "run", "--out", "videos"], "--prompts: not given"),
        (["inspect", "video.mp4", "--reference", "nowhere"], "--reference nowhere: no such folder"),
    ],
)
def test_the_configuration_is_checked_before_the_packages(capsys, monkeypatch, words, problem):
    for module in ("diffusers", "imageio", "codmd.distill.run.training", "codmd.inspect.report"):
        monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(words) == 1
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: command"),
        (["xyz"], "got 'xyz'; expected one of convert, compare, demo"),
        (["trian", "toy"], "did you mean train?"),
        (["demo", "--sede", "3"], "codmd demo: error: no such option: --sede; did you mean --seed?"),
        (["sample", "run", "--ot=videos"], "no such option: --ot; did you mean --out?"),
        (["train", "toy", "--xyz"], "no such option: --xyz\n"),
        (["guidance", "3", "--from", "self_forcin", "--to", "rcm"], "did you mean self_forcing?"),
    ],
)
def test_what_is_mistyped_is_answered_with_what_may_be_meant(capsys, words, message):
    assert message in usage_error(capsys, *words)


def test_an_abbreviated_option_is_still_taken(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--quic", "--hel"])
    assert ended.value.code == 0


@pytest.mark.parametrize("words", [["--help"], ["trian"], ["train", "--hlep"], ["guidance", "3", "--from", "x"]])
def test_help_and_typos_are_answered_without_torch(words, tmp_path):
    script = "import sys, codmd.cli\ntry: codmd.cli.main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == (0 if words == ["--help"] else 2), done.stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [("codmd tr", {"train "}), ("codmd demo --seed", {"--seed", "--seeds"}), ("codmd doctor --re", {"--report "})],
)
def test_the_shell_completes_commands_and_options(line, expected, tmp_path):
    out = tmp_path / "completions"
    environment = {
        **os.environ, "_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(out), "COMP_LINE": line,
        "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n",
    }  # fmt: skip
    subprocess.run([sys.executable, "-m", "codmd"], env=environment, capture_output=True)
    assert set(out.read_text().split("\n")) == expected


def test_help_names_every_registered_command(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


def test_doctor_says_which_backend_serves_the_cpu_and_that_no_gpu_is_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["doctor"]) == 0
    _, cpu, cuda, _ = capsys.readouterr().out.split("\n\n")
    assert cpu.startswith("cpu tensors")
    assert " runs\n" in cpu
    assert cuda.startswith("cuda tensors: no CUDA device is visible to torch, so nothing runs.")
    assert " runs\n" not in f"{cuda}\n"


def test_a_report_holds_what_an_issue_needs(capsys, monkeypatch):
    monkeypatch.setenv("CODMD_BACKEND", "reference")
    monkeypatch.setenv("SECRET_TOKEN", "not to be printed")
    assert cli.main(["doctor", "--report"]) == 0
    text = capsys.readouterr().out
    for part in (codmd.__version__, sys.version.split()[0], f"torch {torch.__version__}", "numpy ", "cpu tensors"):
        assert part in text
    assert "CODMD_BACKEND=reference" in text
    assert "not to be printed" not in text
    assert text.startswith("```\n")
    assert text.endswith("```\n")


def test_a_module_run_prints_the_version():
    from codmd import __version__

    done = subprocess.run([sys.executable, "-m", "codmd", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"codmd {__version__}\n"


def test_an_interrupt_ends_with_status_130_and_no_traceback(capsys, monkeypatch):
    monkeypatch.setattr(command, "run", lambda args: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "\ncodmd demo: interrupted\n"
