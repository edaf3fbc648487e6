"""What `doctor` knows about a machine. Sizes are in bytes, unless a name says otherwise; None is "not there", or "no limit"."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

FORMAT = 1
"""Version of the JSON: raised when a key is renamed or changes its meaning."""


@dataclass(frozen=True)
class Requirement:
    """A package that our pyproject.toml declares."""

    name: str
    specifier: str
    """Versions that are declared to work, such as `>=0.19.8,<0.20`."""
    installed: str | None
    fits: bool
    extra: str | None = None
    """The extra that it belongs to; None for one that is always needed."""


@dataclass(frozen=True)
class Software:
    python: str
    python_specifier: str
    python_fits: bool
    executable: str
    project: str
    location: str
    """Folder from which the package is imported."""
    commit: str | None
    """Of the checkout that the package lies in."""
    changed: bool
    """Whether tracked files differ from that commit."""
    requirements: tuple[Requirement, ...]


@dataclass(frozen=True)
class Program:
    """A command on PATH, or a package that is there or is not."""

    name: str
    found: str | None
    """Its version, or its path where a version says nothing."""


@dataclass(frozen=True)
class Compilers:
    cxx: str | None
    """First line of what the C++ compiler says about itself; it is the one that torch's extensions are built with."""
    nvcc: str | None
    cuda_home: str | None
    ninja: str | None


@dataclass(frozen=True)
class Processor:
    name: str
    logical: int
    usable: int
    """Cores that this process may run on."""
    quota: float | None
    """Cores' worth of time that the control group allows."""

    @property
    def cores(self) -> int:
        """Cores that are of use."""
        return max(1, min(self.usable, int(self.quota) if self.quota else self.usable))


@dataclass(frozen=True)
class Memory:
    total: int
    available: int
    limit: int | None
    """What the control group allows."""
    limit_used: int | None

    @property
    def usable(self) -> int:
        return min(self.total, self.limit or self.total)


@dataclass(frozen=True)
class Disk:
    purpose: str
    path: str
    total: int
    free: int
    writable: bool


@dataclass(frozen=True)
class SharedMemory:
    total: int
    free: int
    leaked_files: int
    """Files that DeepSpeed's shared-memory op has left behind."""
    leaked_bytes: int


@dataclass(frozen=True)
class Limits:
    open_files: int | None
    open_files_hard: int | None
    locked_memory: int | None


@dataclass(frozen=True)
class Interface:
    name: str
    address: str | None
    """IPv4."""
    up: bool


@dataclass(frozen=True)
class InfinibandPort:
    device: str
    port: int
    state: str
    rate: str


@dataclass(frozen=True)
class Network:
    host: str
    host_address: str | None
    """What the host's name resolves to, which is the address that gloo takes."""
    interfaces: tuple[Interface, ...]
    infiniband: tuple[InfinibandPort, ...]


@dataclass(frozen=True)
class DriverGpu:
    """A GPU as the driver sees it, whatever CUDA_VISIBLE_DEVICES says."""

    index: int
    name: str
    memory_mib: int
    used_mib: int
    mig: bool
    exclusive: bool
    """Whether only one process may use it at a time, or none."""


@dataclass(frozen=True)
class Nvidia:
    pci_devices: int
    """NVIDIA display controllers on the PCI bus, and device files of the driver where a container hides the bus."""
    driver: str | None
    problem: str | None
    """Why nvidia-smi says nothing; None where it does, or where there is no device."""
    gpus: tuple[DriverGpu, ...]
    links: tuple[str, ...]
    """The kinds of connection between pairs of GPUs: NV18, PIX, PXB, PHB, NODE, SYS."""


@dataclass(frozen=True)
class TorchGpu:
    """A GPU as torch sees it."""

    index: int
    name: str
    capability: tuple[int, int]
    memory: int
    bf16: bool


@dataclass(frozen=True)
class Torch:
    version: str
    cuda: str | None
    """CUDA version that it was built for; None for a CPU build."""
    cudnn: int | None
    """As 91500 for 9.15.0."""
    nccl: str | None
    gloo: bool
    threads: int
    cuda_available: bool
    cuda_problem: str | None
    """What torch says about CUDA that it cannot use."""
    gpus: tuple[TorchGpu, ...]
    architectures: tuple[str, ...]
    """Those that its kernels were built for, such as `sm_90`."""
    import_seconds: float


@dataclass(frozen=True)
class AttentionKernel:
    """What `models/attention.py` ran when it was asked to attend."""

    head_dim: int
    grouped: bool
    """Whether query heads share key/value heads."""
    backend: str
    """As `resolved_backend` names it."""
    operations: tuple[str, ...]
    """The fused attention kernels of torch that ran; none where it was composed of others."""


@dataclass(frozen=True)
class FlashPackage:
    """A package of attention kernels that is installed."""

    name: str
    version: str | None
    problem: str | None
    """Why it cannot be imported."""
    head_dims: tuple[int, ...]
    """For which `models/attention.py` chooses it on this device."""


@dataclass(frozen=True)
class Kernels:
    device: str
    """Device that was asked: `cuda:0`, or `cpu`."""
    precision: str
    attention: tuple[AttentionKernel, ...]
    attention_problem: str | None
    """Why attention does not run on the device."""
    flash_packages: tuple[FlashPackage, ...]
    norm_fused: bool
    optimizer_fused: bool
    """Whether AdamW is asked to update all weights in few kernels."""
    apex: str | None
    """Version of NVIDIA apex."""
    apex_problem: str | None
    """Why the optimizer cannot be apex's."""


@dataclass(frozen=True)
class CompiledOps:
    """DeepSpeed's operations in C++ and CUDA, which are built ahead or at first use."""

    prebuilt: tuple[str, ...]
    not_built: tuple[str, ...]
    folder: str
    """Where those that are built at first use go."""
    in_folder: tuple[str, ...]


@dataclass(frozen=True)
class Parts:
    """What only some studies need."""

    packages: tuple[Program, ...]
    commands: tuple[Program, ...]
    foreign_apex: str | None
    """Version of a package called apex that is not NVIDIA's."""
    hub_cache: str
    hub_offline: bool


@dataclass(frozen=True)
class Sandbox:
    problem: str | None
    """Why generated programs cannot be confined here; None where they can."""


@dataclass(frozen=True)
class Tracking:
    uri: str | None
    """MLFLOW_TRACKING_URI without credentials; None if it is not set."""
    problem: str | None


@dataclass(frozen=True)
class Prepared:
    """Data that is ready in the default folders."""

    corpora: tuple[str, ...]
    tasks: tuple[str, ...]
    damaged: tuple[str, ...]


@dataclass(frozen=True)
class Environment:
    shown: dict[str, str]
    """Variables that matter, with values that can be shown."""
    hidden: tuple[str, ...]
    """Names of those that are set and whose values are nobody's business."""


@dataclass(frozen=True)
class Facts:
    """A section is None if it could not be determined; `undetermined` says why."""

    software: Software | None = None
    compilers: Compilers | None = None
    processor: Processor | None = None
    memory: Memory | None = None
    disks: tuple[Disk, ...] | None = None
    shared_memory: SharedMemory | None = None
    limits: Limits | None = None
    network: Network | None = None
    nvidia: Nvidia | None = None
    torch: Torch | None = None
    kernels: Kernels | None = None
    ops: CompiledOps | None = None
    parts: Parts | None = None
    sandbox: Sandbox | None = None
    tracking: Tracking | None = None
    prepared: Prepared | None = None
    environment: Environment | None = None
    undetermined: dict[str, str] = dataclasses.field(default_factory=dict)

    def variable(self, name: str) -> str | None:
        """Value of an environment variable that is shown; None if it is not set."""
        return None if self.environment is None else self.environment.shown.get(name)


SECTIONS = tuple(field.name for field in dataclasses.fields(Facts) if field.name != "undetermined")
