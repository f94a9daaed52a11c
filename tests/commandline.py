"""What the tests of the command line share."""

import os
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner, Result

import vqcodec
from vqcodec import cli

ROOT = Path(vqcodec.__file__).parents[1]


def run(*arguments: str, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(cli.main, arguments, input=stdin)


def fails(ran: Result, status: int, *lines: str) -> None:
    """Nothing on stdout, and exactly these lines on stderr."""
    assert (ran.exit_code, ran.stdout, ran.stderr.splitlines()) == (status, "", list(lines))


def tree(folder: str = ".") -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def process(*arguments: str, **options: object) -> subprocess.Popen:
    """A Python process that finds the package, with pipes on all sides unless the options say otherwise."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *arguments], **{"env": environment} | pipes | options)


def redirected(redirections: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """The program in a process with redirections of a shell, ">&-" for example, and environment variables."""
    command = ["sh", "-c", f'exec "$0" -m vqcodec "$@" {redirections}', sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
