"""The child that runs one untrusted program: walls first, the program, its tests, then a word that both ended.

A script of its own, started as `python -I -S -B sandbox_child.py RESULT TOKEN` by sandbox.py, with nothing of this
project imported. Standard input brings one JSON object: program, tests, seconds, memory, walls.

The walls, from the inside out:

- *seccomp*: a list of the system calls that computing needs; every other one fails with EPERM. So no socket, no new
  process, no program started, no file opened for writing (EACCES), none removed or renamed, no signal sent to anybody.
- *namespaces*, where the kernel grants them: no network device, and none of the capabilities of a root user.
- *limits* of processor time, address space, open files, file size and core dumps.

Files that the user may read can be read. Success is told by writing back a token that is fetched only when the tests
have ended, so leaving early, by whatever exit, is a failure. A program that is built to attack the interpreter it runs
in could still find that token: then a container or a virtual machine is the wall to use.
"""

import builtins
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import types

_X86 = (
    0xC000003E,
    {
        "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8,
        "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
        "rt_sigreturn": 15, "ioctl": 16, "pread64": 17, "readv": 19, "writev": 20, "access": 21, "select": 23,
        "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32, "dup2": 33, "pause": 34, "nanosleep": 35,
        "getitimer": 36, "alarm": 37, "setitimer": 38, "getpid": 39, "clone": 56, "exit": 60, "uname": 63,
        "fcntl": 72, "getcwd": 79, "readlink": 89, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98,
        "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110,
        "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204, "getdents64": 217,
        "set_tid_address": 218, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229,
        "clock_nanosleep": 230, "exit_group": 231, "openat": 257, "newfstatat": 262, "readlinkat": 267,
        "faccessat": 269, "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "dup3": 292, "pipe2": 293,
        "prlimit64": 302, "getcpu": 309, "getrandom": 318, "membarrier": 324, "statx": 332, "rseq": 334,
        "clone3": 435, "close_range": 436, "faccessat2": 439,
    },
)  # fmt: skip
_ARM = (
    0xC00000B7,
    {
        "getcwd": 17, "dup": 23, "dup3": 24, "fcntl": 25, "ioctl": 29, "faccessat": 48, "openat": 56, "close": 57,
        "pipe2": 59, "getdents64": 61, "lseek": 62, "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67,
        "pselect6": 72, "ppoll": 73, "readlinkat": 78, "newfstatat": 79, "fstat": 80, "exit": 93, "exit_group": 94,
        "set_tid_address": 96, "futex": 98, "set_robust_list": 99, "nanosleep": 101, "getitimer": 102,
        "setitimer": 103, "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123,
        "sched_yield": 124, "restart_syscall": 128, "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135,
        "rt_sigreturn": 139, "times": 153, "uname": 160, "getrlimit": 163, "getrusage": 165, "getcpu": 168,
        "gettimeofday": 169, "getpid": 172, "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176,
        "getegid": 177, "gettid": 178, "sysinfo": 179, "brk": 214, "munmap": 215, "mremap": 216, "clone": 220,
        "mmap": 222, "mprotect": 226, "madvise": 233, "prlimit64": 261, "getrandom": 278, "membarrier": 283,
        "statx": 291, "rseq": 293, "clone3": 435, "close_range": 436, "faccessat2": 439,
    },
)  # fmt: skip
MACHINES = {"x86_64": _X86, "aarch64": _ARM}

_EPERM, _EACCES, _ENOTTY, _ENOSYS = 1, 13, 25, 38
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_THREAD = 0x00010000
_TERMINAL_QUESTIONS = (0x5401, 0x5413, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONBIO, FIONCLEX, FIOCLEX
_DESCRIPTOR_COMMANDS = (0, 1, 2, 3, 4, 1030)  # duplicate, close-on-exec, status flags; none that names a process

_NO_NEW_PRIVILEGES, _SECCOMP, _PARENT_DEATH = 38, 22, 1
_NAMESPACES = 0x10000000 | 0x40000000 | 0x08000000 | 0x04000000  # user, network, IPC, host name


def _filter(audit_arch: int, numbers: dict[str, int]) -> bytes:
    """The program in classic BPF (Linux, Documentation/userspace-api/seccomp_filter.rst): allowed calls, then EPERM."""
    code: list[tuple[int, int, int, int]] = []

    def answer(value: int) -> None:
        code.append((_RETURN, 0, 0, value))

    def load(at: int) -> None:
        code.append((_LOAD, 0, 0, at))

    def argument(number: int, high: bool = False) -> int:
        return _ARGUMENTS + 8 * number + 4 * high

    def only_with(name: str, number: int, values: tuple[int, ...], otherwise: int) -> None:
        code.append((_EQUAL, 0, 2 + 2 * len(values), numbers[name]))
        load(argument(number))
        for value in values:
            code.append((_EQUAL, 0, 1, value))
            answer(_ALLOW)
        answer(_ERRNO | otherwise)

    def by_bits(name: str, number: int, bits: int, with_bits: int, without: int) -> None:
        code.append((_EQUAL, 0, 4, numbers[name]))
        load(argument(number))
        code.append((_ANY_BIT, 0, 1, bits))
        answer(with_bits)
        answer(without)

    load(_ARCH)
    code.append((_EQUAL, 1, 0, audit_arch))
    answer(_KILL)
    load(_NUMBER)
    special = {"open", "openat", "clone", "clone3", "prlimit64", "ioctl", "fcntl"}
    for name, number in numbers.items():
        if name not in special:
            code.append((_EQUAL, 0, 1, number))
            answer(_ALLOW)
    by_bits("openat", 2, _WRITING, _ERRNO | _EACCES, _ALLOW)
    if "open" in numbers:
        by_bits("open", 1, _WRITING, _ERRNO | _EACCES, _ALLOW)
    by_bits("clone", 0, _THREAD, _ALLOW, _ERRNO | _EPERM)
    code.append((_EQUAL, 0, 1, numbers["clone3"]))
    answer(_ERRNO | _ENOSYS)  # its flags lie in memory, where a filter cannot look: the C library then takes clone
    only_with("ioctl", 1, _TERMINAL_QUESTIONS, _ENOTTY)
    only_with("fcntl", 1, _DESCRIPTOR_COMMANDS, _EPERM)
    # limits may be read, never set: the pointer to the new ones must be null, in both its halves
    code.append((_EQUAL, 0, 5, numbers["prlimit64"]))
    load(argument(2))
    code.append((_EQUAL, 0, 3, 0))
    load(argument(2, high=True))
    code.append((_EQUAL, 0, 1, 0))
    answer(_ALLOW)
    answer(_ERRNO | _EPERM)  # and every call that is not in the list
    return b"".join(struct.pack("=HBBI", *step) for step in code)


def _raise_walls(request: dict[str, object]) -> list[str]:
    """Limits, namespaces and the filter. Gives the names of the walls that stand. Raises OSError without the filter."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PARENT_DEATH, signal.SIGKILL, 0, 0, 0)
    seconds, memory = int(str(request["seconds"])), int(str(request["memory"]))
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value + (limit == resource.RLIMIT_CPU)))
    walls = ["limits"]
    if "namespaces" in str(request["walls"]) and libc.unshare(_NAMESPACES) == 0:
        walls.append("namespaces")
    machine = MACHINES.get(platform.machine())
    if "seccomp" not in str(request["walls"]) or machine is None:
        raise OSError(f"no system call filter for {platform.machine()}")
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS is refused")
    steps = _filter(*machine)
    buffer = ctypes.create_string_buffer(steps, len(steps))
    program = struct.pack("HxxxxxxP", len(steps) // 8, ctypes.addressof(buffer))
    if libc.prctl(_SECCOMP, 2, ctypes.create_string_buffer(program, len(program)), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the kernel refuses a system call filter")
    return [*walls, "seccomp"]


def _run(program: str, tests: str) -> str:
    """What went wrong, or nothing. The program and its tests are compiled apart: an open quote cannot eat the tests."""
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    execute, translate = builtins.exec, builtins.compile
    try:
        execute(translate(program, "program", "exec"), module.__dict__)
        execute(translate(tests, "tests", "exec"), module.__dict__)
    except BaseException as error:
        try:
            return f"{type(error).__name__}: {error}"[:200].rstrip(": ")
        except BaseException:
            return "an error that cannot be shown"
    return ""


def main(result: int, token: int) -> None:
    """Runs what standard input says and answers on `result`."""
    read, write, leave = os.read, os.write, os._exit
    request = json.loads(sys.stdin.buffer.read())
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    try:
        walls = _raise_walls(request)
    except OSError as error:
        write(result, json.dumps({"refused": str(error)}).encode())
        leave(3)
    if request.get("report"):
        write(result, json.dumps({"walls": walls}).encode())
        leave(0)
    wrong = _run(request["program"], request["tests"])
    if wrong:
        write(result, json.dumps({"error": wrong}).encode())
        leave(1)
    write(result, read(token, 64))
    leave(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
