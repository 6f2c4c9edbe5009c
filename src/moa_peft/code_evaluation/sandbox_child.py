"""The confined side of `sandbox.py`: a script of its own, run by a fresh interpreter and never imported.

It imports the standard library only. Three processes, each the parent of the next:

    guard    enters the namespaces, keeps the time, and reports on its standard output
    init     the first process of the PID namespace: when it ends, the kernel ends everything in it
    program  limits itself, then runs the program

Without isolation there is no init, and the guard ends the process group of the program and what was orphaned.
"""

import ctypes
import json
import math
import os
import resource
import signal
import sys
import types
from typing import Any, NoReturn

_TOKEN_BYTES = 64
_REASON_CHARS = 200
_MAX_PROCESSES = 32
_MAX_OPEN_FILES = 64
_MAX_FILE_BYTES = 64 * 2**20
_EXIT_BY_SIGNAL = 128

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 442, -100, 0x8000, 0x1, 0x2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_CAPABILITY_VERSION_3 = 0x20080522

_WORK = "/sandbox"
_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/nix/store")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Read the request of the caller, run the program, write one JSON object on how it ended."""
    request = json.load(sys.stdin)
    isolate, folder = request["isolate"], request["folder"]
    _die_with_parent()
    _be_first_out_of_memory()
    null = os.open(os.devnull, os.O_RDWR)
    if isolate:
        try:
            _enter_namespaces(folder)
        except OSError as error:
            _report(refused=f"{error.filename}: {error.strerror}")
            return
    else:
        _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")
    # Here and not in init: there, every sandbox's process number is 1.
    uid, gid = _own_id("uid_map"), _own_id("gid_map")
    child = os.fork()
    if child == 0:
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        if isolate:
            _become_init(request, uid=uid, gid=gid)
        _die_with_parent()
        _become_program(request, folder=folder)
    os.close(request["result_fd"])
    status, timed_out = _wait(child, timeout_s=request["timeout_s"], is_group=not isolate)
    if not isolate:
        _end_orphans()
    _report(timed_out=timed_out or status == _EXIT_BY_SIGNAL + signal.SIGXCPU, status=status)


def _report(**facts: Any) -> None:
    json.dump(facts, sys.stdout)
    sys.stdout.flush()


def _wait(child: int, *, timeout_s: float, is_group: bool) -> tuple[int, bool]:
    timed_out = False

    def end(*_: object) -> None:
        nonlocal timed_out
        timed_out = True
        os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    if is_group:
        # The group is ended before its leader is reaped: until then its number cannot belong to anybody else.
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return _exit_code(status), timed_out


def _end_orphans() -> None:
    """Kill what the program left behind in other process groups; they became children of this subreaper."""
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children") as listing:
            for child in listing.read().split():
                os.kill(int(child), signal.SIGKILL)
        try:
            os.wait()
        except ChildProcessError:
            return


def _exit_code(status: int) -> int:
    return _EXIT_BY_SIGNAL + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


# Isolation (Linux)


def _enter_namespaces(folder: str) -> None:
    """New user (where not root), mount, PID, network, IPC and host name namespaces, with a root of their own.

    `folder` becomes a root that holds the Python installation and the system's libraries, read-only, a few devices,
    and one small writable file system in memory. There is no /proc, no socket and no other file of the machine.
    """
    spaces = _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS
    uid, gid = os.geteuid(), os.getegid()
    if uid != 0:
        spaces |= _CLONE_NEWUSER
    _check(_libc.unshare(spaces), "unshare")
    if uid != 0:
        for name, content in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(content)
    _mount(None, "/", flags=_MS_REC | _MS_PRIVATE)
    _mount("tmpfs", folder, flags=_MS_NOSUID | _MS_NODEV, options="size=1m,mode=0755")
    for path in _visible_paths():
        target = folder + path
        if os.path.islink(path) and path in _SYSTEM:
            os.symlink(os.readlink(path), target)
        elif os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
            _mount(path, target, flags=_MS_BIND | _MS_REC)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
            _mount(path, target, flags=_MS_BIND)
    os.mkdir(folder + _WORK)
    if not os.path.exists(f"{folder}/tmp"):
        os.symlink(_WORK, f"{folder}/tmp")
    read_only = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    path = ctypes.c_char_p(os.fsencode(folder))
    size = ctypes.c_size_t(ctypes.sizeof(read_only))
    _check(_libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, path, _AT_RECURSIVE, read_only, size), "mount_setattr")
    _mount(
        "tmpfs",
        folder + _WORK,
        flags=_MS_NOSUID | _MS_NODEV,
        options=f"size={_MAX_FILE_BYTES},nr_inodes=4096,mode=0777",
    )
    os.chdir(folder)


def _visible_paths() -> list[str]:
    wanted = [*_SYSTEM, *_DEVICES, *sys.path, sys.base_prefix, sys.base_exec_prefix]
    chosen: list[str] = []
    for path in sorted({os.path.abspath(path) for path in wanted if os.path.exists(path)}):
        if not any(path.startswith(f"{above}/") for above in chosen):
            chosen.append(path)
    return chosen


def _become_init(request: dict[str, Any], *, uid: int, gid: int) -> NoReturn:
    os.chroot(".")
    _give_up_privileges(uid, gid)
    _die_with_parent()
    program = os.fork()
    if program == 0:
        _become_program(request, folder=_WORK)
    os.close(request["result_fd"])
    os.close(request["token_fd"])
    while True:
        ended, status = os.wait()
        if ended == program:
            os._exit(_exit_code(status))


def _own_id(table: str) -> int:
    """A user or group id for this sandbox alone: one near the end of the ids that exist here, by process number."""
    with open(f"/proc/self/{table}") as rows:
        first, _, count = map(int, rows.read().splitlines()[-1].split())
    return first + count - 1 - os.getpid() % max(count // 2, 1)


def _give_up_privileges(uid: int, gid: int) -> None:
    """No capabilities and no way to get any. Root takes other ids, because it is exempt from limits on processes."""
    capability = 0
    while _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    # No process of the program may trace this one or read its memory.
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")


# The program


def _become_program(request: dict[str, Any], *, folder: str) -> NoReturn:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(HOME=folder, TMPDIR=folder)
    sys.argv = [""]
    limits = {
        resource.RLIMIT_AS: request["memory_mib"] * 2**20,
        resource.RLIMIT_CPU: math.ceil(request["timeout_s"]) + 1,
        resource.RLIMIT_FSIZE: _MAX_FILE_BYTES,
        resource.RLIMIT_NOFILE: _MAX_OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    if request["isolate"]:
        limits[resource.RLIMIT_NPROC] = _MAX_PROCESSES
    for kind, wanted in limits.items():
        _, hard = resource.getrlimit(kind)
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (limit, limit))
    _run(request["program"], request["tests"], token_fd=request["token_fd"], result_fd=request["result_fd"])


def _run(program: str, tests: str, *, token_fd: int, result_fd: int) -> NoReturn:
    """Execute the program and then its tests in one module; hand the token on only if both came to their end."""
    module = types.ModuleType("solution")
    sys.modules[module.__name__] = module
    scope = module.__dict__
    try:
        program_code = compile(program, "<program>", "exec", dont_inherit=True)
        tests_code = compile(tests, "<tests>", "exec", dont_inherit=True)
        # Operands are evaluated from left to right and wait on the interpreter's stack. So the program, which runs
        # last of all operands (it takes the place of the argument None), finds neither the token nor what is called
        # after it in any variable, frame or module, and replacing os.write or exec comes too late.
        write, fd, token, _ = (
            os.write,
            result_fd,
            os.read(token_fd, _TOKEN_BYTES),
            exec(tests_code, scope, exec(program_code, scope)),
        )
        write(fd, token)
        os._exit(0)
    except MemoryError:
        os.write(result_fd, b"out of memory")
    except AssertionError:
        os.write(result_fd, b"failed")
    except BaseException as error:
        reason = f"error: {type(error).__name__}: {error}"[:_REASON_CHARS].rstrip(": ")
        os.write(result_fd, reason.encode(errors="replace"))
    os._exit(1)


# System calls


def _die_with_parent() -> None:
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def _be_first_out_of_memory() -> None:
    with open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")


def _mount(source: str | None, target: str, *, flags: int, options: str = "") -> None:
    kind = b"tmpfs" if source == "tmpfs" else None
    origin = None if source is None else os.fsencode(source)
    result = _libc.mount(origin, os.fsencode(target), kind, ctypes.c_ulong(flags), options.encode() or None)
    _check(result, f"mount {target}")


def _check(result: int, call: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), call)


if __name__ == "__main__":
    main()
