"""Starting kernels on a GPU, where stand-ins play CuPy and the device; and compiling with NVRTC."""

import contextlib
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sharpscope.kernels import _cupy, _nvrtc
from sharpscope.kernels._launch import Source
from sharpscope.kernels._nvrtc import CudaUnavailable

PAIR = np.dtype([("value", np.float32), ("n", np.int32)])


class OnCuda(torch.Tensor):
    """A CPU tensor that claims to be on a CUDA device."""

    index = 0
    device = property(lambda self: torch.device("cuda", self.index))


def on_cuda(tensor, index=0):
    claimed = tensor.as_subclass(OnCuda)
    claimed.index = index
    return claimed


class FakeGpu:
    """Records what reaches CuPy; `stream` is torch's current one, by its address."""

    def __init__(self):
        self.loaded, self.launches, self.guards, self.compiled = [], [], [], []
        self.stream, self.current, self.most_shared = 7, None, {}
        self.capability = (9, 0)
        self.cuda = SimpleNamespace(
            Stream=SimpleNamespace(from_external=lambda outer: SimpleNamespace(ptr=outer.__cuda_stream__()[1])),
            runtime=SimpleNamespace(driverGetVersion=lambda: 13010, runtimeGetVersion=lambda: 13020),
        )

    def RawModule(self, *, path):
        self.loaded.append((path, self.current))
        return SimpleNamespace(get_function=lambda name: FakeKernel(self, name))

    @contextlib.contextmanager
    def guard(self, device):
        self.guards.append(device)
        before, self.current = self.current, device.index
        yield
        self.current = before


class FakeKernel:
    def __init__(self, gpu, name):
        self.__dict__.update(gpu=gpu, name=name)

    def __setattr__(self, name, value):
        assert name == "max_dynamic_shared_size_bytes"
        self.gpu.most_shared[self.name] = value

    def __call__(self, grid, block, args, *, shared_mem, stream):
        self.gpu.launches.append(
            SimpleNamespace(
                name=self.name,
                grid=grid,
                block=block,
                args=args,
                shared=shared_mem,
                stream=stream.ptr,
                device=self.gpu.current,
            )
        )


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    fake = FakeGpu()
    monkeypatch.setenv("SHARPSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_cupy, "_cupy", lambda: fake)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", fake.guard)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=fake.stream))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: fake.capability)
    monkeypatch.setattr(_nvrtc, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(_nvrtc, "supported_archs", lambda: (80, 86, 90, 100, 120))

    def compile_cubin(source, arch):
        fake.compiled.append((source, arch))
        return b"machine code", ""

    monkeypatch.setattr(_nvrtc, "compile_cubin", compile_cubin)
    forget()
    yield fake
    forget()


def forget():
    for cached in (_cupy._function, _cupy._module, _cupy._known_reason):
        cached.cache_clear()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "program.cu"
    path.write_text('extern "C" __global__ void go(float* x) { x[0] = VALUE; }\n')
    return Source((str(path),), (("VALUE", "1.0f"),))


def test_arguments_arrive_as_pointers_and_scalars_of_their_width(gpu, source):
    x, half = on_cuda(torch.zeros(4)), on_cuda(torch.zeros(3, dtype=torch.bfloat16), 0)
    pair = np.array([(1.5, 3)], PAIR)
    _cupy.launcher().launch(
        source, "go", 5, 128, [x, None, np.int32(-2), np.float32(0.1), half, pair], shared_bytes=1024
    )
    (launch,) = gpu.launches
    assert (launch.name, launch.grid, launch.block, launch.shared, launch.device) == ("go", (5,), (128,), 1024, 0)
    assert [type(a) for a in launch.args] == [np.uint64, np.uint64, np.int32, np.float32, np.uint64, np.ndarray]
    assert [int(launch.args[i]) for i in (0, 1, 2, 4)] == [x.data_ptr(), 0, -2, half.data_ptr()]
    assert launch.args[3] == np.float32(0.1)
    assert launch.args[5] is pair
    assert gpu.most_shared == {}


def test_the_stream_is_looked_up_at_every_launch(gpu, source):
    x = on_cuda(torch.zeros(4))
    for stream in (7, 0, 9):
        gpu.stream = stream
        _cupy.launcher().launch(source, "go", 1, 32, [x])
    assert [launch.stream for launch in gpu.launches] == [7, 0, 9]


def test_streams_of_cupy_13(gpu, source):
    gpu.cuda.Stream = SimpleNamespace()
    gpu.cuda.ExternalStream = lambda ptr, index: SimpleNamespace(ptr=(ptr, index))
    _cupy.launcher().launch(source, "go", 1, 32, [on_cuda(torch.zeros(4), 1)])
    assert gpu.launches[0].stream == (7, 1)


def test_much_shared_memory_is_asked_for(gpu, source):
    x = on_cuda(torch.zeros(4))
    _cupy.launcher().launch(source, "go", 1, 32, [x], shared_bytes=48 * 1024)
    assert gpu.most_shared == {}
    _cupy.launcher().launch(source, "go", 1, 32, [x], shared_bytes=48 * 1024 + 4)
    assert gpu.most_shared == {"go": 48 * 1024 + 4}


def test_compiled_once_for_each_architecture_and_loaded_once_for_each_device(gpu, source):
    for index in (0, 1, 0, 1):
        _cupy.launcher().launch(source, "go", 1, 32, [on_cuda(torch.zeros(4), index)])
    assert gpu.compiled == [(source, "sm_90")]
    assert [device for _, device in gpu.loaded] == [0, 1]
    assert [launch.device for launch in gpu.launches] == [0, 1, 0, 1]
    forget()  # another process finds the file
    _cupy.launcher().launch(source, "go", 1, 32, [on_cuda(torch.zeros(4))])
    assert len(gpu.compiled) == 1
    gpu.capability = (8, 9)  # not among those that NVRTC knows: 8.6 runs there
    forget()
    _cupy.launcher().launch(source, "go", 1, 32, [on_cuda(torch.zeros(4))])
    _cupy.launcher().launch(Source(source.files, (("VALUE", "2.0f"),)), "go", 1, 32, [on_cuda(torch.zeros(4))])
    assert [arch for _, arch in gpu.compiled] == ["sm_90", "sm_86", "sm_86"]
    assert len({path for path, _ in gpu.loaded}) == 3


def test_the_cached_file_depends_on_text_options_and_compiler(gpu, source, monkeypatch):
    paths = {_cupy.cubin(source, "sm_90")}
    monkeypatch.setattr(_nvrtc, "nvrtc_version", lambda: (13, 1))
    paths.add(_cupy.cubin(source, "sm_90"))
    monkeypatch.setattr(_nvrtc, "OPTIONS", (*_nvrtc.OPTIONS, "--other"))
    paths.add(_cupy.cubin(source, "sm_90"))
    with open(source.files[0], "a") as file:
        file.write("// changed\n")
    paths.add(_cupy.cubin(source, "sm_90"))
    assert len(paths) == 4
    assert all(path.read_bytes() == b"machine code" for path in paths)
    folder = paths.pop().parent
    assert sorted(folder.iterdir()) == sorted(folder.glob("*.cubin"))  # nothing half-made is left


def test_a_folder_that_cannot_be_written_is_passed_over(gpu, source, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SHARPSCOPE_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(_cupy.tempfile, "gettempdir", lambda: str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    assert _cupy.cubin(source, "sm_90").parent.parent == tmp_path / "other"
    monkeypatch.setattr(_cupy.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    with pytest.raises(CudaUnavailable, match="kept nowhere .*SHARPSCOPE_CACHE"):
        _cupy.cubin(source, "sm_90")


def test_a_folder_that_others_may_write_is_not_trusted(gpu, source, monkeypatch, tmp_path):
    """What lies there under the right name is not loaded."""
    good = _cupy.cubin(source, "sm_90")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SHARPSCOPE_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(_cupy.tempfile, "gettempdir", lambda: str(tmp_path))
    shared = tmp_path / f"sharpscope-{os.getuid()}"
    shared.mkdir()
    (shared / good.name).write_bytes(b"planted")
    shared.chmod(0o777)
    with pytest.raises(CudaUnavailable, match="others may write into .*SHARPSCOPE_CACHE"):
        _cupy.cubin(source, "sm_90")
    shared.chmod(0o700)
    assert _cupy.cubin(source, "sm_90") == shared / good.name


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ([torch.zeros(2)], ValueError, "must be on one CUDA device, but there is cpu"),
        ([np.int32(1)], ValueError, "there is no tensor"),
        ([on_cuda(torch.zeros(2)), torch.zeros(2)], ValueError, "there is cpu, cuda:0"),
        ([on_cuda(torch.zeros(2)), on_cuda(torch.zeros(2), 1)], ValueError, "there is cuda:0, cuda:1"),
        ([on_cuda(torch.zeros(4))[::2]], ValueError, "argument 0 is not contiguous"),
        ([on_cuda(torch.zeros(2)), 3], TypeError, "argument 1 is int"),
        ([on_cuda(torch.zeros(2)), 3.0], TypeError, "argument 1 is float"),
        ([on_cuda(torch.zeros(2)), np.zeros(1)], TypeError, "argument 1 is ndarray"),
        ([on_cuda(torch.zeros(2)), np.zeros(2, PAIR)], TypeError, "argument 1 is ndarray"),
    ],
)
def test_wrong_arguments_are_refused(gpu, source, args, error, message):
    with pytest.raises(error, match=f"go: .*{message}"):
        _cupy.launcher().launch(source, "go", 1, 32, args)
    assert gpu.launches == []


@pytest.mark.parametrize(("grid", "block"), [(0, 32), (1, 0), (-1, 32), (2**31, 32), (1, 1025)])
def test_launches_that_no_gpu_takes_are_refused(gpu, source, grid, block):
    with pytest.raises(ValueError, match=f"go: {grid} blocks of {block} threads; .* 1 to 2147483647 .* 1 to 1024"):
        _cupy.launcher().launch(source, "go", grid, block, [on_cuda(torch.zeros(2))])
    assert gpu.launches == []


def test_the_largest_launch_is_made(gpu, source):
    _cupy.launcher().launch(source, "go", 2**31 - 1, 1024, [on_cuda(torch.zeros(2))])
    assert (gpu.launches[0].grid, gpu.launches[0].block) == ((2**31 - 1,), (1024,))


def test_available_on_a_working_machine(gpu):
    assert _cupy.why_unavailable() is None


def break_torch(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)


def break_device(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def break_nvrtc(gpu, monkeypatch):
    def missing():
        raise CudaUnavailable("no NVRTC; install it")

    monkeypatch.setattr(_nvrtc, "nvrtc_version", missing)


def break_capability(gpu, monkeypatch):
    gpu.capability = (7, 5)
    monkeypatch.setattr(_nvrtc, "supported_archs", lambda: (70, 75, 80, 86, 90))


def break_architecture(gpu, monkeypatch):
    gpu.capability = (11, 0)


def break_driver(gpu, monkeypatch):
    gpu.cuda.runtime.driverGetVersion = lambda: 12080


def break_driver_badly(gpu, monkeypatch):
    gpu.cuda.runtime.driverGetVersion = lambda: 11040


def break_everything(gpu, monkeypatch):
    def explode(device=None):
        raise OSError("libcuda.so.1: file too short")

    monkeypatch.setattr(torch.cuda, "get_device_capability", explode)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (break_torch, "built without CUDA; install a CUDA build"),
        (break_device, "torch finds no CUDA device .* driver for CUDA 13.0 or newer"),
        (break_nvrtc, "no NVRTC; install it"),
        (break_capability, "the GPU has compute capability 7.5, but the kernels are made for 8.0 and newer; take"),
        (break_architecture, "no code for compute capability 11.0, only for 8.0, 8.6, 9.0, 10.0, 12.0; take"),
        (break_driver, r"driver knows CUDA 12.8, .* CUDA 13; update the driver, or install 'sharpscope\[cuda12\]'"),
        (break_driver_badly, r"driver knows CUDA 11.4, .* CUDA 13; update the driver$"),
        (break_everything, "CUDA cannot be used: OSError: libcuda.so.1: file too short"),
    ],
)
def test_what_is_missing_is_said(gpu, monkeypatch, broken, reason):
    broken(gpu, monkeypatch)
    text = _cupy.why_unavailable()
    with pytest.raises(CudaUnavailable, match=reason) as error:
        _cupy.launcher()
    assert str(error.value) == text


def test_without_cupy(monkeypatch, source):
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(CudaUnavailable, match=r"CuPy cannot be imported .*pip install 'sharpscope\[cuda13\]'"):
        _nvrtc.compile_cubin(source, "sm_90")


def test_without_nvrtc(monkeypatch, source):
    def missing():
        raise RuntimeError("CuPy failed to load libnvrtc.so.13\nmore")

    monkeypatch.setattr(_nvrtc, "_nvrtc", lambda: SimpleNamespace(getVersion=missing))
    with pytest.raises(CudaUnavailable, match=r"no NVRTC library \(CuPy failed to load libnvrtc.so.13\); pip install"):
        _nvrtc.compile_ptx(source, "sm_90")


@pytest.fixture
def nvrtc():
    try:
        _nvrtc.nvrtc_version()
    except CudaUnavailable as error:
        pytest.skip(str(error))


def test_compiled_without_a_gpu(nvrtc, source):
    image, log = _nvrtc.compile_cubin(source, "sm_90")
    assert image.startswith(b"\x7fELF")
    assert b"go" in image
    assert "Compiling entry function 'go' for 'sm_90'" in log
    # The table of program headers is the end of the image, of which CuPy loses the last byte.
    table, size, count = (int.from_bytes(image[at : at + width], "little") for at, width in ((32, 8), (54, 2), (56, 2)))
    assert 0 < table + size * count <= len(image)
    assert ".entry go(" in _nvrtc.compile_ptx(source, "sm_90")
    assert ".target sm_90" in _nvrtc.compile_ptx(source, "sm_90")


def test_a_wrong_program_is_named_with_its_line(nvrtc, source):
    with pytest.raises(_nvrtc.CompilationError, match=r"program\.cu\(1\): error: identifier \"VALUE\" is undefined"):
        _nvrtc.compile_cubin(Source(source.files), "sm_90")
    with pytest.raises(_nvrtc.CompilationError, match="INVALID_OPTION"):
        _nvrtc.compile_cubin(source, "sm_33")
