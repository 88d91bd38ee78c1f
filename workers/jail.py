"""The jail that the compute process closes around itself before it opens an upload.

Three layers, each useful without the others, none needing a privilege:

* **landlock**: its own scratch can be read and written, the interpreter, libraries and project source can be read,
  nothing else opens; no TCP, no signals to processes outside.
* **seccomp**: no sockets, no exec, no new processes (threads are fine), no tracing, namespaces, mounts, keys, bpf,
  io_uring; no chmod, chown or utime, which Landlock does not see.
* **rlimits**: memory, file size, open files, no core dump.

There is no way out again: `enter` is one-way for the process. Landlock binds the calling thread and what it starts, so
it must run while the process has one thread: before torch or numpy are imported.
"""

import contextlib
import ctypes
import errno
import os
import struct
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["JailUnavailable", "available", "enter"]


class JailUnavailable(RuntimeError):
    """A layer is required that this machine does not have."""


# Landlock: include/uapi/linux/landlock.h. The numbers are the same on every architecture.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE = 1 << 4, 1 << 5
MAKE_DIR, MAKE_REG, MAKE_SYM = 1 << 7, 1 << 8, 1 << 12
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
FS_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
"""Every file right that an ABI version knows, and so denies unless granted; 5 and later are alike."""
TCP_RIGHTS, SCOPES = 0b11, 0b11
"""bind and connect (ABI 4); abstract unix sockets and signals (ABI 6)."""

READ = READ_FILE | READ_DIR
OWN = READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SYM | REFER | TRUNCATE
ON_FILES = READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_DEV
"""The rights that a rule on a plain file may name."""

SYSTEM = (
    "/usr",
    "/lib",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/ssl/openssl.cnf",
    "/proc/self",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/sys/vm/overcommit_memory",
    "/sys/devices/system",
    "/sys/fs/cgroup",
    "/sys/bus/pci",
)
"""Read: libraries, and what torch and OpenMP ask about the machine."""
DEVICES = {"/dev/null": READ_FILE | WRITE_FILE, "/dev/zero": READ_FILE, "/dev/urandom": READ_FILE}
GPU_SYSTEM = ("/proc/driver/nvidia", "/proc/devices", "/proc/modules", "/sys/module", "/sys/devices")

DENIED = (
    "socket socketpair bind connect listen accept accept4 sendto sendmsg sendmmsg recvfrom recvmsg recvmmsg "
    "execve execveat fork vfork ptrace process_vm_readv process_vm_writev process_madvise kcmp pidfd_open pidfd_getfd "
    "pidfd_send_signal tkill rt_sigqueueinfo rt_tgsigqueueinfo "
    "unshare setns mount umount2 pivot_root chroot move_mount open_tree fsopen fsconfig fsmount fspick "
    "mount_setattr "
    "bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register keyctl add_key request_key "
    "init_module finit_module delete_module kexec_load kexec_file_load reboot swapon swapoff acct quotactl quotactl_fd "
    "open_by_handle_at name_to_handle_at fanotify_init lookup_dcookie syslog sethostname setdomainname vhangup "
    "settimeofday clock_settime clock_adjtime adjtimex iopl ioperm modify_ldt personality "
    "setuid setgid setreuid setregid setresuid setresgid setgroups setfsuid setfsgid capset "
    "shmget msgget semget mq_open memfd_secret "
    "chmod fchmod fchmodat chown fchown lchown fchownat setxattr lsetxattr fsetxattr "
    "removexattr lremovexattr fremovexattr utime utimes futimesat utimensat truncate "
)
FCHMODAT2 = 452
"""By number: younger than many installations of libseccomp."""
YOUNGEST, BEYOND = 462, 700
"""Calls numbered after ``mseal`` had not been reviewed when this was written: answered "not implemented"."""
CLONE_THREAD = 0x10000
CLONE_NEW = (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000, 0x00000080)
"""mount, cgroup, uts, ipc, user, pid, network and time namespaces."""
TERMINAL_INPUT = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX: typing into the operator's terminal."""

OPEN_FILES = 1024
FILE_BYTES = 64 << 30
MAPPED_ROOM = 256 << 30
"""Address space beside private memory: uploads are mapped from files, not copied."""


def available() -> dict[str, bool]:
    """Which layers this kernel and installation have: ``landlock``, ``seccomp``, ``rlimits``."""
    return {"landlock": _landlock_version() >= 1, "seccomp": _has_seccomp(), "rlimits": os.name == "posix"}


def layers(mode: str) -> dict[str, bool]:
    """Which layers hold under a ``TENFOLD_JAIL`` of ``mode``: those available, or none when it is off."""
    return {name: there and mode != "off" for name, there in available().items()}


def enter(scratch: Path, *, memory_bytes: int | None, require: bool, readable: Iterable[Path] = ()) -> dict[str, bool]:
    """Close the jail around this process, for good; returns the layers that hold.

    ``scratch``: the one folder it may change; ``HOME``, ``TMPDIR`` and caches move there. ``memory_bytes``: limit of
    private memory; None with CUDA, whose address space has no use for one. ``readable``: further files or folders to
    read. Raises JailUnavailable when ``require`` and a layer is missing (nothing has been applied then), RuntimeError
    when the process has more than one thread.
    """
    layers = available()
    missing = [name for name, there in layers.items() if not there]
    if require and missing:
        raise JailUnavailable(
            f"this machine lacks {', '.join(missing)}, so an upload cannot be opened safely; use Linux 5.13 or later "
            "with Landlock and install libseccomp2, or set TENFOLD_JAIL=best_effort if you trust every upload."
        )
    if layers["landlock"] and (threads := _thread_count()) > 1:
        raise RuntimeError(f"the jail must be entered by a process of one thread, this has {threads}: enter earlier.")
    scratch = scratch.resolve(strict=True)
    _move_home(scratch)
    if layers["rlimits"]:
        _limit(memory_bytes)
    if layers["landlock"]:
        _restrict_files(_rules(scratch, readable))
    if layers["seccomp"]:
        _drop_capabilities()
        _filter_calls()
    return layers


def _move_home(scratch: Path) -> None:
    """Libraries that cache in the home or temporary folder find them in scratch."""
    temporary = scratch / "tmp"
    temporary.mkdir(exist_ok=True)
    os.environ.update(
        HOME=str(scratch),
        TMPDIR=str(temporary),
        XDG_CACHE_HOME=str(temporary),
        TORCHINDUCTOR_CACHE_DIR=str(temporary),
        USER="tenfold",  # getpass would read /etc/passwd
    )
    tempfile.tempdir = None


def _thread_count() -> int:
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208


# ---------------------------------------------------------------------------------------------------------- rlimits


def _limit(memory_bytes: int | None) -> None:
    """Private memory is bounded by RLIMIT_DATA, so that mapped files do not count; RLIMIT_AS bounds the rest."""
    import resource

    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: OPEN_FILES, resource.RLIMIT_FSIZE: FILE_BYTES}
    if memory_bytes is not None:
        limits[resource.RLIMIT_DATA] = memory_bytes
        limits[resource.RLIMIT_AS] = memory_bytes + MAPPED_ROOM
    for kind, wanted in limits.items():
        _, hard = resource.getrlimit(kind)
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (limit, limit))


# --------------------------------------------------------------------------------------------------------- landlock


def _landlock_version() -> int:
    """The kernel's Landlock ABI; 0 where there is none or it is switched off."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(int(_libc().syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))), 0)


def _rules(scratch: Path, readable: Iterable[Path]) -> Iterator[tuple[Path, int]]:
    """Every path that may be opened, with its rights beneath."""
    yield scratch, OWN
    prefixes = {Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix)}
    for path in (*prefixes, *readable, *map(Path, SYSTEM)):
        yield path, READ
    for entry in map(Path, sys.path):
        if not any(entry.resolve().is_relative_to(prefix) for prefix in prefixes):
            yield from _import_rules(entry)
    for name, rights in DEVICES.items():
        yield Path(name), rights
    gpus = sorted(Path("/dev").glob("nvidia*"))
    for path in gpus:
        yield path, READ | WRITE_FILE | IOCTL_DEV
    if gpus:
        yield Path("/proc/self"), READ | WRITE_FILE  # the driver names its threads through /proc, and fails without
        for path in map(Path, GPU_SYSTEM):
            yield path, READ


def _import_rules(entry: Path) -> Iterator[tuple[Path, int]]:
    """A folder on ``sys.path`` outside the interpreter (an editable install, a checkout): its packages and modules
    can be read, its other content, the service's own data perhaps, only listed."""
    if not os.access(entry, os.R_OK):
        return
    if not entry.is_dir():
        yield entry, READ
        return
    yield entry, READ_DIR
    for path in entry.iterdir():
        # os.access, because asking pathlib about a file in a folder that is closed to us raises
        package = os.access(path / "__init__.py", os.R_OK) or path.suffix in (".dist-info", ".libs")
        if package or path.suffix in (".py", ".so", ".pth"):
            yield path, READ


def _restrict_files(rules: Iterable[tuple[Path, int]]) -> None:
    version = _landlock_version()
    handled = FS_RIGHTS[min(version, 5)]
    attributes = struct.pack("=QQQ", handled, TCP_RIGHTS if version >= 4 else 0, SCOPES if version >= 6 else 0)
    ruleset = _call(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    try:
        for path, rights in rules:
            _allow(ruleset, path, rights & handled)
        _no_new_privileges()
        _call(RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: Path, rights: int) -> None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not path.is_dir():
                rights &= ON_FILES
            rule = struct.pack("=Qi", rights, handle)
            _call(ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0))
        finally:
            os.close(handle)


def _no_new_privileges() -> None:
    if _libc().prctl(38, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS) failed")


def _call(number: int, *arguments: object) -> int:
    result = int(_libc().syscall(number, *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"system call {number}: {os.strerror(code)}")
    return result


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


# ---------------------------------------------------------------------------------------------------------- seccomp


def _has_seccomp() -> bool:
    if not sys.platform.startswith("linux") or _libc().prctl(21, 0, 0, 0, 0) < 0:  # PR_GET_SECCOMP
        return False
    try:
        import pyseccomp  # noqa: F401
    except (ImportError, OSError, RuntimeError):  # the wheel is pure Python; libseccomp.so.2 may be missing
        return False
    return True


def _drop_capabilities() -> None:
    """A root process keeps its user but none of its powers (capset, version 3, all zero)."""
    header, nothing = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    if _libc().capset(header, nothing) != 0:
        raise OSError(ctypes.get_errno(), "capset failed")


def _filter_calls() -> None:
    import pyseccomp as seccomp

    filter = seccomp.SyscallFilter(seccomp.ALLOW)
    refuse = seccomp.ERRNO(errno.EPERM)
    for name in DENIED.split():
        if seccomp.resolve_syscall(seccomp.Arch.NATIVE, name) != -1:  # libseccomp may be older than the call
            filter.add_rule(refuse, name)
    filter.add_rule(refuse, FCHMODAT2)
    # clone3 hides its flags in memory; "not implemented" makes the C library use clone
    for number in ("clone3", *range(YOUNGEST + 1, BEYOND)):
        filter.add_rule(seccomp.ERRNO(errno.ENOSYS), number)
    filter.add_rule(refuse, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, CLONE_THREAD, 0))
    for flag in CLONE_NEW:
        filter.add_rule(refuse, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, flag, flag))
    for name in ("kill", "tgkill"):  # abort() signals itself
        filter.add_rule(refuse, name, seccomp.Arg(0, seccomp.NE, os.getpid()))
    filter.add_rule(refuse, "prlimit64", seccomp.Arg(0, seccomp.NE, 0))
    for request in TERMINAL_INPUT:
        filter.add_rule(refuse, "ioctl", seccomp.Arg(1, seccomp.MASKED_EQ, 0xFFFFFFFF, request))
    filter.load()
