"""Running a program that a language model wrote, with limits on its time, memory, processes, files and network.

What holds on Linux with namespaces (as root with CAP_SYS_ADMIN, or where users may create user namespaces):

- The program sees its own root: the Python installation and the system's libraries, read-only, and one writable
  folder of 64 MiB in memory. It can neither read, change nor delete another file of the machine.
- It has a network namespace without any interface, whatever calls it makes and whatever processes it starts.
- It has a PID namespace: it cannot see or signal a process outside, and all that it started ends with it. There are
  at most 32 processes and threads of it at once.
- It has no capabilities and cannot get any. Its standard input is empty, its output is dropped, its environment holds
  HOME and TMPDIR only, and it imports the standard library only.
- It has passed if it handed over a random token, which the runner gives away after the last statement of the tests.
  Ending early, printing anything or replacing functions of Python yields no token.

What does not hold: this is no defence against a flaw of the kernel; limits of memory are per process; and the program
shares an interpreter with its tests, so that one written against this very file can search its own memory for the
token, and a function can return an object that claims to equal everything. Run hostile models in a virtual machine.

With `allow_network=True` a machine without namespaces runs the program under resource limits only. Then it can do
whatever the user may do: read and delete files, connect, and signal processes; what leaves its process group is sought
and ended, but not a fork bomb that does so.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa_peft.errors import UserError

_CHILD = Path(__file__).with_name("sandbox_child.py")
_TOKEN_BYTES = 64
_MAX_RESULT_BYTES = 4096
TIMEOUT_S = 10.0
MEMORY_MIB = 1024
_MIN_MEMORY_MIB = 64
# Starting an interpreter and ending a sandbox takes tens of milliseconds; this long means that it hangs.
_GRACE_S = 60.0
_REASONS = ("failed", "out of memory", "error: ")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: the program and its tests ran to their end.
        reason: "passed", "failed" (an assertion), "timed out", "out of memory", or "error: " and a short text.
    """

    passed: bool
    reason: str


def require_permission(execute_code: bool) -> None:
    """Refuse to run what a model wrote unless the user asked for it.

    Raises:
        UserError: `execute_code` is false; the message explains the flag.
    """
    if not execute_code:
        raise UserError(
            "execute_code=False: to score code, the programs that the model writes are run on this machine. They run "
            "in a sandbox without network, with limits on time and memory, but no sandbox is perfect. Pass "
            "--execute-code (execute_code=True) to allow it, best inside a container or a virtual machine."
        )


def run_program(
    program: str,
    *,
    tests: str = "",
    timeout_s: float = TIMEOUT_S,
    memory_mib: int = MEMORY_MIB,
    allow_network: bool = False,
) -> Outcome:
    """Run Python source in a sandbox (see the module's documentation) and say how it ended.

    Args:
        program: source that the model wrote; it may hold its tests.
        tests: source that runs afterwards in the same module. It is compiled apart, so that an open quote of the
            program cannot swallow it.
        timeout_s: seconds of wall-clock time after the start of the interpreter.
        memory_mib: address space of each process, in MiB.
        allow_network: also run where this machine cannot isolate the program, under resource limits only.

    Returns:
        The outcome; whatever the program does, it is no exception.

    Raises:
        UserError: a setting is out of range, or the program cannot be isolated and `allow_network` is false.
    """
    check_sandbox(timeout_s=timeout_s, memory_mib=memory_mib, allow_network=allow_network)
    isolate = isolation_problem() is None
    return _run(program, tests, timeout_s=timeout_s, memory_mib=memory_mib, isolate=isolate)


def check_sandbox(*, timeout_s: float, memory_mib: int, allow_network: bool) -> None:
    """Raise the `UserError` that `run_program` would raise with these settings: for checks before long work."""
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s <= 86400:
        raise UserError(f"timeout_s={timeout_s!r} must be a number of seconds above 0 and at most 86400.")
    if isinstance(memory_mib, bool) or not isinstance(memory_mib, int) or not _MIN_MEMORY_MIB <= memory_mib <= 2**30:
        raise UserError(f"memory_mib={memory_mib!r} must be a whole number of MiB, at least {_MIN_MEMORY_MIB}.")
    if sys.platform != "linux":
        raise UserError(f"Programs can be run on Linux only, and this is {sys.platform}; use a container or machine.")
    problem = isolation_problem()
    if problem is not None and not allow_network:
        raise UserError(
            f"allow_network=False: this machine cannot cut the programs off from network and files ({problem}). "
            f"Run as root with CAP_SYS_ADMIN, or allow user namespaces (Linux 5.12 or newer; for Docker, "
            f"--privileged), or pass allow_network=True to run them with no more than limits on time and memory."
        )


@functools.cache
def isolation_problem() -> str | None:
    """Why this machine cannot isolate a program, or None if it can; tried once per process."""
    try:
        outcome = _run("", "", timeout_s=_GRACE_S, memory_mib=1024, isolate=True)
    except UserError as error:
        return str(error)
    return None if outcome.passed else outcome.reason


def _run(program: str, tests: str, *, timeout_s: float, memory_mib: int, isolate: bool) -> Outcome:
    token = secrets.token_hex(_TOKEN_BYTES // 2).encode()
    with tempfile.TemporaryDirectory(prefix="moa-code-", ignore_cleanup_errors=True) as folder:
        token_read, token_write = os.pipe()
        result_read, result_write = os.pipe()
        request = {
            "program": program,
            "tests": tests,
            "timeout_s": timeout_s,
            "memory_mib": memory_mib,
            "isolate": isolate,
            "folder": folder,
            "token_fd": token_read,
            "result_fd": result_write,
        }
        try:
            os.write(token_write, token)
            report = _report_of_child(request, timeout_s=timeout_s + _GRACE_S)
            # What escaped from a group without isolation may still hold the other end open.
            os.set_blocking(result_read, False)
            os.close(result_write)
            result_write = -1
            try:
                result = os.read(result_read, _MAX_RESULT_BYTES)
            except BlockingIOError:
                result = b""
        finally:
            for end in (token_read, token_write, result_read, result_write):
                if end >= 0:
                    os.close(end)
    return _outcome(report, result, token)


def _report_of_child(request: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
    # An interpreter may need the library path to start; the program itself does not get it.
    environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(_CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=(request["token_fd"], request["result_fd"]),
        start_new_session=True,
        env=environment,
    ) as process:
        try:
            output, errors = process.communicate(json.dumps(request).encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return {"timed_out": True}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    try:
        return json.loads(output)
    except ValueError:
        last_line = errors.decode(errors="replace").strip().rpartition("\n")[2]
        return {"crashed": last_line or f"it ended with status {process.returncode}"}


def _outcome(report: dict[str, Any], result: bytes, token: bytes) -> Outcome:
    if "refused" in report:
        raise UserError(report["refused"])
    if "crashed" in report:
        return Outcome(passed=False, reason=f"error: the sandbox did not answer: {report['crashed']}")
    if report["timed_out"]:
        return Outcome(passed=False, reason="timed out")
    if secrets.compare_digest(result, token):
        return Outcome(passed=True, reason="passed")
    reason = " ".join(result.decode(errors="replace").split())
    if reason.startswith(_REASONS):
        return Outcome(passed=False, reason=reason)
    if reason:
        return Outcome(passed=False, reason="error: the program wrote to the result of the sandbox")
    status = report["status"]
    ended_by = {128 + number: number.name for number in signal.Signals}.get(status)
    if ended_by is not None:
        return Outcome(passed=False, reason=f"error: ended by {ended_by}")
    return Outcome(passed=False, reason=f"error: exited with status {status} before the end of the tests")
