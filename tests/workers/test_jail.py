"""The jail is one-way, so every scenario runs in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from workers import jail

pytestmark = pytest.mark.skipif(
    not all(jail.available().values()), reason=f"this kernel lacks a layer of the jail: {jail.available()}"
)

ENTER = """
import errno, os, sys
from pathlib import Path
from workers import jail
scratch = Path(sys.argv[1])
layers = jail.enter(scratch, memory_bytes={memory}, require=True, readable={readable})
assert layers == {{"landlock": True, "seccomp": True, "rlimits": True}}, layers

def refused(call, *arguments, expect=(errno.EPERM, errno.EACCES)):
    try:
        call(*arguments)
    except OSError as error:
        assert error.errno in expect, error
    else:
        raise SystemExit(f"{{call.__name__}}{{arguments}} was allowed")
"""


def inside(scratch: Path, code: str, *, memory: int | None = None, readable: str = "()") -> str:
    """Run ``code`` in a jailed process; its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", ENTER.format(memory=memory, readable=readable) + code, str(scratch)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def test_scratch_can_be_written_read_renamed_and_removed(scratch: Path) -> None:
    inside(
        scratch,
        """
import tempfile
(scratch / "a").write_text("one")
(scratch / "folder").mkdir()
os.rename(scratch / "a", scratch / "folder" / "b")
assert (scratch / "folder" / "b").read_text() == "one"
with tempfile.TemporaryDirectory() as name:
    assert Path(name).is_relative_to(scratch.resolve())
(scratch / "kept").write_text("kept")
""",
    )
    assert (scratch / "kept").read_text() == "kept"


def test_files_outside_scratch_neither_open_nor_change(scratch: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s")
    secret.chmod(0o600)
    inside(
        scratch,
        f"""
secret = {str(secret)!r}
refused(open, secret)
refused(open, secret, "w")
refused(open, "/etc/passwd")
refused(os.listdir, {str(tmp_path)!r})
refused(os.rename, secret, scratch / "mine", expect=(errno.EPERM, errno.EACCES, errno.EXDEV))
refused(os.link, secret, scratch / "mine", expect=(errno.EPERM, errno.EACCES, errno.EXDEV))
refused(os.unlink, secret)
refused(os.truncate, secret, 0)
refused(os.chmod, secret, 0o777)
refused(os.utime, secret)
refused(os.mkdir, {str(tmp_path / "new")!r})
os.symlink(secret, scratch / "link")
refused(open, scratch / "link")
refused(open, f"/proc/{{os.getppid()}}/environ")
""",
    )
    assert secret.read_text() == "s"
    assert secret.stat().st_mode & 0o777 == 0o600


def test_a_named_file_can_be_read_but_not_written(scratch: Path, tmp_path: Path) -> None:
    upload = tmp_path / "upload"
    upload.write_text("data")
    inside(
        scratch,
        f'assert open({str(upload)!r}).read() == "data"\nrefused(open, {str(upload)!r}, "a")',
        readable=f"[Path({str(upload)!r})]",
    )


def test_there_is_no_network_program_or_process(scratch: Path) -> None:
    inside(
        scratch,
        """
import ctypes, signal, socket, subprocess
refused(socket.socket, socket.AF_INET)
refused(socket.socket, socket.AF_UNIX)
refused(socket.socketpair)
refused(os.execv, "/bin/true", ["true"])
refused(subprocess.run, [sys.executable, "-c", ""])
refused(os.fork)
refused(os.posix_spawn, "/bin/true", ["true"], {})
refused(os.kill, os.getppid(), signal.SIGKILL)
refused(os.kill, -1, 0)
os.kill(os.getpid(), 0)

libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)
refused(call, "unshare", 0x10000000)
refused(call, "ptrace", 16, os.getppid(), 0, 0)
refused(call, "mount", b"none", b"/tmp", b"tmpfs", 0, None)
refused(call, "setns", 0, 0)
refused(call, "syscall", 425, 4, None)                     # io_uring_setup
refused(call, "syscall", 434, os.getppid(), 0)             # pidfd_open
refused(call, "syscall", 469, 0, expect=(errno.ENOSYS,))   # younger than the filter
""",
    )


def test_it_holds_for_threads_and_leaves_no_capability(scratch: Path) -> None:
    inside(
        scratch,
        """
import threading
seen = []
def look():
    try:
        open("/etc/passwd")
    except PermissionError:
        seen.append("refused")
thread = threading.Thread(target=look)
thread.start()
thread.join()
assert seen == ["refused"]
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
assert status["NoNewPrivs"].strip() == "1" and status["Seccomp"].strip() == "2"
""",
    )


def test_memory_is_bounded_but_mapped_files_are_not_counted(scratch: Path) -> None:
    with (scratch / "large").open("wb") as file:
        file.truncate(3 << 30)  # sparse
    inside(
        scratch,
        """
import mmap, resource
try:
    bytearray(2 << 30)
except MemoryError:
    pass
else:
    raise SystemExit("memory is not bounded")
with open(scratch / "large", "rb") as file:
    assert mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)[-1] == 0
assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
""",
        memory=1 << 30,
    )


def test_torch_trains_exports_and_onnxruntime_runs(scratch: Path) -> None:
    output = inside(
        scratch,
        """
import warnings
warnings.simplefilter("ignore")
import numpy, onnxruntime, torch
from safetensors.torch import load_file, save_file
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True)
x, y = torch.randn(32, 3, 8, 8), torch.randint(5, (32,))
losses = []
for _ in range(5):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    optimizer.step()
    losses.append(float(loss))
assert losses[-1] < losses[0]
net.eval()
program = torch.export.export(net, (x[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
torch.export.save(program, scratch / "model.pt2")
again = torch.export.load(scratch / "model.pt2").module()(x)
save_file(net.state_dict(), scratch / "model.safetensors")
net.load_state_dict(load_file(scratch / "model.safetensors"))
torch.onnx.export(program, verbose=False).save(scratch / "model.onnx")
session = onnxruntime.InferenceSession(str(scratch / "model.onnx"))
(theirs,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
assert torch.equal(again, net(x)) and numpy.abs(theirs - again.detach().numpy()).max() < 1e-4
print("trained")
""",
        memory=8 << 30,
    )
    assert "trained" in output


def test_modules_of_the_project_and_of_the_environment_import_afterwards(scratch: Path) -> None:
    inside(
        scratch,
        """
import PIL.Image, optuna, pyarrow.parquet, scipy.linalg, tensorly, importlib.metadata
import search.data, search.spec, tenfold
importlib.metadata.version("torch")
root = Path(search.spec.__file__).parent.parent
refused(open, root / "pyproject.toml")
""",
    )


def test_every_kind_of_data_reads_inside(scratch: Path) -> None:
    inside(
        scratch,
        """
import io, tarfile
import numpy, pyarrow, pyarrow.parquet
from PIL import Image
from search.data import read_data
from search.spec import DataSpec

def picture(value):
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(out, "JPEG")
    return out.getvalue()

rows = {"image": [{"bytes": picture(i), "path": None} for i in range(40)], "label": [i % 2 for i in range(40)]}
pyarrow.parquet.write_table(pyarrow.table(rows), scratch / "parquet")
with tarfile.open(scratch / "images", "w:gz") as archive:
    for i in range(40):
        member = tarfile.TarInfo(f"class{i % 2}/{i}.jpg")
        member.size = len(picture(i))
        archive.addfile(member, io.BytesIO(picture(i)))
with open(scratch / "npz", "wb") as file:
    numpy.savez_compressed(file, x=numpy.ones((40, 3, 4, 4), numpy.uint8), y=numpy.arange(40) % 2)
for name in ("parquet", "images", "npz"):
    data = read_data(scratch / name, DataSpec(), scratch=scratch / "unpacked")
    assert data.info.format == name
    assert next(data.train.batches(8, shuffle=0, augment=True))[0][0].shape == (8, 3, 4, 4)
""",
        memory=4 << 30,
    )


def test_a_missing_layer_that_is_required_applies_nothing(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jail, "_landlock_version", lambda: 0)
    with pytest.raises(jail.JailUnavailable, match=r"lacks landlock.*TENFOLD_JAIL=best_effort"):
        jail.enter(scratch, memory_bytes=None, require=True)
    assert Path("/proc/self/status").read_text().count("Seccomp:\t0")
    assert not (scratch / "tmp").exists()


def test_without_require_the_layers_that_exist_still_hold(scratch: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import socket, sys\nfrom pathlib import Path\nfrom workers import jail\n"
            "jail._landlock_version = lambda: 0\n"
            "print(jail.enter(Path(sys.argv[1]), memory_bytes=None, require=False))\n"
            "open('/etc/passwd').close()\n"
            "try:\n    socket.socket()\nexcept PermissionError:\n    print('no sockets')\n",
            str(scratch),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines() == ["{'landlock': False, 'seccomp': True, 'rlimits': True}", "no sockets"]


def test_a_process_with_threads_is_turned_away(scratch: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, threading\nfrom pathlib import Path\nfrom workers import jail\n"
            "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
            "try:\n    jail.enter(Path(sys.argv[1]), memory_bytes=None, require=True)\n"
            "except RuntimeError as error:\n    print(error)\n",
            str(scratch),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "has 2: enter earlier" in done.stdout
