"""Programs that try to cheat, to escape or to harm, each in the sandbox; and the refusal where it cannot be made."""

import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from moa_peft.code_evaluation import require_permission, run_program, sandbox
from moa_peft.errors import UserError

isolated = pytest.mark.skipif(
    sandbox.isolation_problem() is not None, reason=f"no namespaces here: {sandbox.isolation_problem()}"
)

CHEATS = {
    "sys.exit": ("import sys\nsys.exit(0)", "error: SystemExit: 0"),
    "SystemExit without a value": ("raise SystemExit", "error: SystemExit"),
    "os._exit": ("import os\nos._exit(0)", "error: exited with status 0 before the end of the tests"),
    "os._exit with a number that is no signal": ("import os\nos._exit(255)", "error: exited with status 255"),
    "closing all files": ("import os\nos.closerange(3, 64)", "error: exited with status 1"),
    "stopping the parent": (
        "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\nos.kill(os.getppid(), signal.SIGSEGV)",
        "failed",
    ),
    "text that is no text": ("x = '\udc80'", "error: UnicodeEncodeError"),
    "exit in the function": ("import os\ndef f(): os._exit(0)", "error: exited with status 0"),
    "forged mark": ("print('passed', 'OK', '1', flush=True)\nimport os\nos._exit(0)", "error: exited"),
    "killing itself": ("import os\nos.kill(os.getpid(), 9)", "error: ended by SIGKILL"),
    "killing the parent": ("import os\nos.kill(os.getppid(), 9)", "failed"),
    "killing the group": ("import os\nos.kill(0, 9)", "error: ended by SIGKILL"),
    "killing everything": ("import os\nos.kill(-1, 9)", "error: ProcessLookupError"),
    "interrupting the parent": ("import os\nfor n in (1, 2, 15, 19): os.kill(os.getppid(), n)", "failed"),
    "no exec": ("import builtins\nbuiltins.exec = lambda *a: None", "failed"),
    "no compile": ("import builtins\nbuiltins.compile = lambda *a, **k: 'pass'", "failed"),
    "other os.write": ("import os\nos.write = lambda fd, data: 1\nos._exit = lambda n: None", "error: exited"),
    "the runner's functions": (
        "import __main__, sys\n"
        "for name in dir(__main__):\n"
        "    if callable(getattr(__main__, name)) and name[1] != '_': setattr(__main__, name, lambda *a, **k: None)",
        "failed",
    ),
    "own check": ("check = lambda function: None", "failed"),
    "an error type of its own": (
        "import builtins\nbuiltins.AssertionError = type('A', (Exception,), {})",
        "error: AssertionError",
    ),
    "open quote": ("x = '''", "error: SyntaxError"),
    "garbage for all files": (
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'passed' * 11)\n    except OSError: pass",
        "error: the program wrote to the result of the sandbox",
    ),
    "searching the frames": (
        "import os, sys, gc\n"
        "frame, seen = sys._getframe(), []\n"
        "while frame:\n"
        "    seen += [*frame.f_locals.values(), *frame.f_globals.values(), *frame.f_code.co_consts]\n"
        "    seen += gc.get_referents(frame)\n"
        "    frame = frame.f_back\n"
        "for thing in gc.get_objects(): seen += gc.get_referents(thing)\n"
        "texts = {thing for thing in seen if isinstance(thing, bytes) and len(thing) == 64}\n"
        "for text in texts:\n"
        "    if set(text) <= set(b'0123456789abcdef'):\n"
        "        for fd in range(3, 64):\n"
        "            try: os.write(fd, text)\n"
        "            except OSError: pass\n"
        "os._exit(0)",
        "error: exited with status 0",
    ),
    "reading the token": (
        "import os\n"
        "for fd in range(3, 64):\n"
        "    try: os.set_blocking(fd, False); data = os.read(fd, 64)\n"
        "    except OSError: continue\n"
        "    for out in range(3, 64):\n"
        "        try: os.write(out, data)\n"
        "        except OSError: pass\n"
        "os._exit(0)",
        "error: exited with status 0",
    ),
    "input": ("input()", "error: EOFError"),
    "hostile error": (
        "class E(BaseException):\n    def __str__(self): import os; os._exit(0)\nraise E",
        "error: exited with status 0",
    ),
}


@isolated
@pytest.mark.parametrize(("program", "reason"), CHEATS.values(), ids=CHEATS)
def test_no_way_around_the_tests(program, reason):
    tests = "def check(function):\n    assert function() == 5\ncheck(globals().get('f'))" if "def f" in program else ""
    outcome = run_program(program, tests=tests or "def check(f): assert f == 5\ncheck(6)")
    assert not outcome.passed
    assert outcome.reason.startswith(reason)


@isolated
def test_an_honest_program_passes_and_a_wrong_one_fails():
    program = "from dataclasses import dataclass\nimport math, tempfile\n@dataclass\nclass P:\n    x: 'int'\n"
    program += "def f(n): print('passed'); tempfile.TemporaryFile(); return P(math.isqrt(n)).x\n"
    assert run_program(program, tests="assert f(17) == 4") == sandbox.Outcome(passed=True, reason="passed")
    assert run_program(program, tests="assert f(17) == 5") == sandbox.Outcome(passed=False, reason="failed")
    assert run_program(program + "assert f(17) == 4").passed
    assert run_program("f = 1", tests="f()").reason == "error: TypeError: 'int' object is not callable"
    assert run_program("__name__ == '__main__' and undefined").passed


ENDLESS = {
    "loop": "while True: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "loop that catches all": """
while True:
    try:
        while True: pass
    except BaseException: pass
""",
    "error text": "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
    "output": "import sys\nwhile True: sys.stdout.write('x' * 2**20); sys.stderr.write('x' * 2**20)",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "fork bomb of sessions": "import os\nwhile True:\n    try: os.fork() or os.setsid()\n    except OSError: pass",
}
HEAVY = {
    "threads": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(1000,)).start()",
        "error: RuntimeError",
    ),
    "processes": ("import os, time\nwhile True:\n    if os.fork() == 0: time.sleep(1000)", "error: BlockingIOError"),
    "one string": ("x = 'x' * 10**11", "out of memory"),
    "a list": ("x = []\nwhile True: x.append(bytearray(2**24))", "out of memory"),
    "a file": ("with open('x', 'wb') as f:\n    while True: f.write(bytes(2**20))", "error: OSError"),
    "files": ("x = bytes(2**24)\nfor n in range(9): open(f'{n}', 'wb').write(x)", "error: OSError"),
    "small files": ("for n in range(5000): open(f'{n}', 'w').close()", "error: OSError"),
    "open files": ("import os\nwhile True: os.dup(0)", "error: OSError"),
}


@isolated
@pytest.mark.parametrize("program", ENDLESS.values(), ids=ENDLESS)
def test_time_is_limited(program):
    assert run_program(program, timeout_s=0.5) == sandbox.Outcome(passed=False, reason="timed out")


@isolated
@pytest.mark.parametrize(("program", "reason"), HEAVY.values(), ids=HEAVY)
def test_memory_processes_and_files_are_limited(program, reason):
    outcome = run_program(program, timeout_s=30, memory_mib=512)
    assert not outcome.passed
    assert outcome.reason.startswith(reason)


@isolated
def test_no_file_of_the_machine_can_be_read_changed_or_deleted(tmp_path):
    victim = tmp_path / "victim.txt"
    victim.write_text("kept")
    program = f"""
import os, shutil
tried = [
    lambda: open({str(victim)!r}).read(),
    lambda: open({str(victim)!r}, "w"),
    lambda: os.remove({str(victim)!r}),
    lambda: shutil.rmtree({str(tmp_path)!r}),
    lambda: open({os.path.abspath(__file__)!r}).read(),
    lambda: open("/etc/passwd").read(),
    lambda: open("/proc/1/environ").read(),
    lambda: open("/usr/moa", "w"),
    lambda: open(os.__file__, "a"),
    lambda: os.chroot("/usr"),
    lambda: os.mknod("/sandbox/disk", 0o60600, os.makedev(8, 0)),
    lambda: os.mkdir("/new"),
]
done = []
for number, attempt in enumerate(tried):
    try: attempt()
    except OSError: continue
    done.append(number)
os.system("rm -rf " + {str(tmp_path)!r})
"""
    read_only = "assert all(os.statvfs(at).f_flag & os.ST_RDONLY for at in ('/', '/usr', os.__file__))"
    outcome = run_program(program, tests="assert done == []\n" + read_only)
    assert outcome.passed, outcome
    assert victim.read_text() == "kept"


@isolated
def test_the_environment_and_the_folder_are_its_own(monkeypatch):
    monkeypatch.setenv("MY_SECRET", "s3cret")
    before = set(Path(tempfile.gettempdir()).glob("moa-code-*"))
    program = "import os\nopen('left', 'w').write('x')\nseen = dict(os.environ)"
    tests = "assert set(seen) == {'HOME', 'TMPDIR'} and os.getcwd() == seen['HOME'] and os.listdir() == ['left']"
    for _ in range(2):
        assert run_program(program, tests=tests).passed
    assert set(Path(tempfile.gettempdir()).glob("moa-code-*")) <= before


@isolated
@pytest.mark.parametrize("way", ["python", "ctypes", "child"])
def test_there_is_no_network(way):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        server.settimeout(0)
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"
        low_level = f"""
import ctypes, struct
libc = ctypes.CDLL(None)
fd = libc.socket(2, 1, 0)
address = struct.pack("=H", 2) + struct.pack(">H", {port}) + bytes([127, 0, 0, 1]) + bytes(8)
assert libc.connect(fd, address, 16) == 0
"""
        child = f"""
import os
pid = os.fork()
if pid == 0:
    os.setsid()
    {connect.replace(chr(10), "; ")}
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
"""
        outcome = run_program({"python": connect, "ctypes": low_level, "child": child}[way], timeout_s=5)
        assert not outcome.passed
        assert outcome.reason.startswith(("failed", "error: OSError", "error: exited"))
        with pytest.raises(BlockingIOError):
            server.accept()


@isolated
def test_nothing_is_left_running():
    program = """
import os, time
for _ in range(5):
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        time.sleep(1000)
"""
    before = _sandbox_processes()
    assert run_program(program).passed
    assert _sandbox_processes() <= before


def _sandbox_processes() -> set[str]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"sandbox_child.py" in (folder / "cmdline").read_bytes():
                found.add(folder.name)
        except OSError:
            continue
    return found


@isolated
def test_threads_may_run_programs_at_the_same_time():
    outcomes: dict[int, str] = {}

    def run(number: int) -> None:
        outcomes[number] = run_program(f"x = {number}", tests=f"assert x % 2 == 0, {number}").reason

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcomes[number] for number in range(6)] == ["passed", "failed"] * 3


@pytest.fixture
def no_namespaces(monkeypatch):
    monkeypatch.setattr(sandbox, "isolation_problem", lambda: "unshare: Operation not permitted")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_without_namespaces_it_refuses_unless_told_otherwise(no_namespaces):
    with pytest.raises(UserError, match="allow_network=False.*unshare: Operation not permitted"):
        run_program("x = 1")
    assert run_program("x = 1", tests="assert x == 1", allow_network=True).passed
    assert run_program("x = 1", tests="assert x == 2", allow_network=True).reason == "failed"


WITHOUT_NAMESPACES = {
    "endless loop": ("while True: pass", "timed out"),
    "exit": ("import os\nos._exit(0)", "error: exited"),
    "killing the group": ("import os\nos.kill(0, 9)", "error: ended by SIGKILL"),
    "killing the guard": (
        "import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(1000)",
        "error: the sandbox did not answer",
    ),
    "huge string": ("x = 'x' * 10**11", "out of memory"),
    "children that leave the group": (
        "import os, time\nfor _ in range(3):\n    if os.fork() == 0: os.setsid(); time.sleep(1000)\nassert 0",
        "failed",
    ),
}


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
@pytest.mark.parametrize(("program", "reason"), WITHOUT_NAMESPACES.values(), ids=WITHOUT_NAMESPACES)
def test_limits_hold_without_namespaces(no_namespaces, program, reason):
    before = _sandbox_processes()
    outcome = run_program(program, timeout_s=0.5, allow_network=True)
    assert not outcome.passed
    assert outcome.reason.startswith(reason)
    while _sandbox_processes() - before:  # a killed guard cannot wait until the kernel has ended its program
        time.sleep(0.01)


@pytest.mark.parametrize(
    "setting",
    [{"timeout_s": 0}, {"timeout_s": -1.0}, {"timeout_s": float("nan")}, {"timeout_s": "1"}, {"memory_mib": 1}],
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(UserError, match=f"{next(iter(setting))}="):
        run_program("x = 1", **setting)


def test_permission_is_needed():
    require_permission(True)
    with pytest.raises(UserError, match="--execute-code"):
        require_permission(False)
