"""The command line: every option's error message, and the registry."""

import os
import signal
import subprocess
import sys

import pytest

from codmd import cli
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


def test_a_missing_package_is_named_with_the_command_that_installs_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for module in ("codmd.demo.report", "codmd.demo.figures"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 1
    assert "needs the package matplotlib; install it with: pip install 'codmd[demo]'" in capsys.readouterr().err


def test_no_command_and_an_unknown_one_are_refused(capsys):
    assert "required: command" in usage_error(capsys)
    assert "invalid choice: 'distil'" in usage_error(capsys, "distil")


def test_help_names_every_registered_command(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


def test_doctor_says_which_backend_serves_the_cpu(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "cpu tensors" in text
    assert "runs" in text


def test_a_module_run_prints_the_version():
    from codmd import __version__

    done = subprocess.run([sys.executable, "-m", "codmd", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"codmd {__version__}\n"


def test_an_interrupt_ends_with_status_130_and_no_traceback(capsys, monkeypatch):
    monkeypatch.setattr(command, "run", lambda args: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "\ncodmd demo: interrupted\n"
