"""What is wrong with a machine, and what would make it better: pure functions of the facts."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_plasticity.launch.doctor.facts import DriverGpu, Facts, Interface, Network, Torch
from megatron_plasticity.launch.doctor.kernels import UNFUSED, attention_kernels
from megatron_plasticity.launch.doctor.software import NOT_FOR_TRAINING, ONLY_FOR_METRICS

MOST_TIPS = 8

GB = 10**9
GIB = 2**30
_BYTES_PER_PARAMETER = 12
"""Of a checkpoint: weights and two moments in fp32."""
_LEAST_DISK = GB // 4
_DISK_WANTED = {"cpu": 2 * GB, "cuda": _BYTES_PER_PARAMETER * 4 * GB}
"""Room for the quickstart's runs; for one checkpoint of the 4B model."""
_SHARED_MEMORY_WANTED = GIB
"""Docker gives 64 MiB unless it is told otherwise; NCCL's buffers take some 10 MiB per pair of GPUs."""
_HOST_MEMORY_PER_GPU = 16 * GIB
"""Before DeepSpeed takes over, each process holds its stage of the model in fp32: 16 GB of the 4B model (docs/memory.md)."""
_OPEN_FILES_WANTED = 4096
# Of a GPU: less is the driver's own, a desktop's, or what this very examination takes there.
_USED_SHARE, _USED_MIB = 0.03, 1024
_CUDNN_WANTED = 91500
_OFF = ("", "0", "false", "off", "no")
# Variables that were set to find an error and stay forgotten: what each costs.
_DEBUGGING = {
    "CUDA_LAUNCH_BLOCKING": "every kernel waits for the one before it",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "every tensor is allocated by the driver",
    "NCCL_P2P_DISABLE": "GPUs exchange data through the host's memory",
    "NCCL_SHM_DISABLE": "processes of one machine talk over the network",
    "NCCL_IB_DISABLE": "nodes talk over TCP instead of InfiniBand",
}
# Variables that change what is computed.
_CHANGE_RESULTS = {
    "NVIDIA_TF32_OVERRIDE": "fp32 matrix products are rounded otherwise than the config says",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "fp32 matrix products are rounded to TF32",
}


def problems(facts: Facts) -> list[str]:
    """What keeps training from working here, or from being what it says; each with what to do."""
    return list(_problems(facts))


def _problems(facts: Facts) -> Iterator[str]:
    software, torch, kernels = facts.software, facts.torch, facts.kernels
    if software is not None:
        if not software.python_fits:
            yield (
                f"Python {software.python} is outside {software.python_specifier}: make an environment with a Python that fits "
                "(`make environment PYTHON=python3.12`)"
            )
        dispensable = {*ONLY_FOR_METRICS, *NOT_FOR_TRAINING}
        unfit = [
            f"{needed.name} {needed.installed or 'is missing'} (declared: {needed.specifier or 'any'})"
            for needed in software.requirements
            if needed.extra is None and not needed.fits and (needed.installed or needed.name not in dispensable)
        ]
        if unfit:
            yield f"packages outside the declared versions: {'; '.join(unfit)}. `pip install -e .` in the checkout mends this"
    else:
        yield (
            f"the installation could not be examined: {facts.undetermined.get('software', 'nobody asked')}. `pip install -e .` "
            "in the checkout mends this"
        )
    if torch is None:
        yield f"torch does not work: {facts.undetermined.get('torch', 'it was not asked')}. Reinstall it: docs/install.md"
    elif not torch.cuda_available:
        yield from _unusable_gpus(facts, torch)
        if not torch.gloo:
            yield "torch was built without gloo, by which processes on CPUs talk: install a build from PyPI or pytorch.org"
    else:
        if torch.nccl is None:
            yield (
                "torch was built without NCCL, by which processes on GPUs talk: install a build from PyPI or pytorch.org "
                "(device=cpu works meanwhile)"
            )
        for gpu in torch.gpus:
            if not _built_for(gpu.capability, torch.architectures):
                yield (
                    f"GPU {gpu.index}, {gpu.name}: torch {torch.version} has no kernels for compute capability "
                    f"{_dotted(gpu.capability)} (it has {', '.join(torch.architectures)}); install a build for it, or hide the "
                    "GPU by CUDA_VISIBLE_DEVICES"
                )
    if kernels is not None and kernels.attention_problem is not None:
        yield (
            f"attention does not run on {kernels.device}: {kernels.attention_problem}. "
            "`nvidia-smi` shows whether the GPU is taken or in a bad state"
        )
    if torch is not None and kernels is None:
        yield f"the kernels that training uses could not be tried: {facts.undetermined.get('kernels', 'they were not asked')}"
    for disk in facts.disks or ():
        if disk.purpose == "temporary" and not disk.writable:
            yield f"{disk.path}: temporary files cannot be written there: set TMPDIR to a folder where they can"
        if disk.free < _LEAST_DISK:
            yield f"{disk.path} ({disk.purpose}): {shown_size(disk.free)} free: make room, or work elsewhere (`output=…`, TMPDIR)"
    if "ops" in facts.undetermined:
        yield f"DeepSpeed is not usable: {facts.undetermined['ops']}. `pip install -e .` in the checkout brings it"


def _unusable_gpus(facts: Facts, torch: Torch) -> Iterator[str]:
    """GPUs that the person may count on, and torch cannot use though it was built for them."""
    if torch.cuda is None or facts.nvidia is None or not facts.nvidia.pci_devices or _hides_all(facts):
        return
    driver = f"driver {facts.nvidia.driver}" if facts.nvidia.driver else f"the driver does not answer ({facts.nvidia.problem})"
    yield (
        f"the GPUs of this machine cannot be used: {torch.cuda_problem} ({driver}, torch for CUDA {torch.cuda}). Update or "
        "restart the driver, or install a torch that was built for an older CUDA (docs/install.md); device=cpu works meanwhile"
    )


def _hides_all(facts: Facts) -> bool:
    return facts.variable("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")


def _built_for(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Whether torch has kernels for a GPU: machine code of the same major version and no later minor one, or PTX, which the
    driver compiles for any later GPU (CUDA programming guide, "binary compatibility")."""
    if not architectures:
        return True
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = number.rstrip("af")
        if not digits.isdigit():
            continue
        version = (int(digits[:-1]), int(digits[-1]))
        if version <= capability and (kind == "compute" or version[0] == capability[0]):
            return True
    return False


def tips(facts: Facts) -> list[str]:
    """At most `MOST_TIPS` sentences, what changes most first."""
    weighted = [*_tips_on_gpus(facts), *_tips_on_the_host(facts), *_tips_on_several_nodes(facts), *_tips_on_parts(facts)]
    weighted += _tips_on_variables(facts)
    weighted.sort(key=lambda tip: -tip[0])
    return [text for _, text in weighted[:MOST_TIPS]]


Tip = tuple[int, str]
"""How much it changes, from 100 for "an order of magnitude" down, and what to do."""


def _tips_on_gpus(facts: Facts) -> Iterator[Tip]:
    torch, nvidia, kernels = facts.torch, facts.nvidia, facts.kernels
    if torch is not None and torch.cuda is None and nvidia is not None and nvidia.pci_devices:
        yield (
            100,
            f"This machine has an NVIDIA GPU, and torch {torch.version} is the build for CPUs: `make distclean environment "
            'PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cu130"` installs one for CUDA 13.',
        )
    if torch is None or not torch.gpus:
        return
    if nvidia is not None:
        yield from _tips_on_driver_gpus(nvidia.gpus, nvidia.links, len(torch.gpus))
    without_bf16 = [gpu.name for gpu in torch.gpus if not gpu.bf16]
    if without_bf16:
        yield (90, f"{without_bf16[0]} has no bf16: set engine.precision=fp32, as bf16 would be emulated, slowly.")
    if len({(gpu.name, gpu.memory) for gpu in torch.gpus}) > 1:
        yield (60, "The GPUs differ, and the slowest sets the pace: choose equal ones by CUDA_VISIBLE_DEVICES.")
    if kernels is None or not kernels.attention:
        return
    names, major = attention_kernels(kernels), torch.gpus[0].capability[0]
    if UNFUSED in names:
        yield (88, f"Attention has no fused kernel for {names[UNFUSED]}: scores take memory of context length squared.")
    elif major == 9 and "cuDNN" not in names and "flash-attention-3" not in names:
        why = f"torch does not choose it, with cuDNN {torch.cudnn}"
        if torch.cudnn is not None and torch.cudnn < _CUDNN_WANTED:
            why += f", which is older than {_CUDNN_WANTED}"
        if facts.variable("LD_LIBRARY_PATH"):
            why += "; LD_LIBRARY_PATH may lead to another cuDNN than torch's, so unset it"
        yield (85, f"On Hopper cuDNN attention is 1.2 to 1.7 times as fast as {', '.join(names)}, and is not used: {why}.")
    elif major in (8, 9) and not kernels.flash_packages:
        yield (
            8,
            f"Nothing to install for attention: {', '.join(names)} loses little or nothing against the flash-attn packages.",
        )
    for package in kernels.flash_packages:
        if package.problem is not None:
            yield (
                55,
                f"{package.name} is installed and does not load ({package.problem}): uninstall it, or build it for torch "
                f"{torch.version} (docs/install.md).",
            )


def _tips_on_driver_gpus(gpus: tuple[DriverGpu, ...], links: tuple[str, ...], visible: int) -> Iterator[Tip]:
    taken = [gpu for gpu in gpus if is_taken(gpu)]
    free = [gpu for gpu in gpus if not is_taken(gpu)]
    if taken:
        held = ", ".join(f"GPU {gpu.index} {gpu.used_mib / 1024:.0f} of {gpu.memory_mib / 1024:.0f} GiB" for gpu in taken)
        choice = f"; CUDA_VISIBLE_DEVICES={','.join(str(gpu.index) for gpu in free)} leaves them alone" if free else ""
        yield (80, f"Other processes hold memory: {held}{choice}.")
    if any(gpu.mig for gpu in gpus):
        yield (75, "MIG is on: a process sees one slice, and slices cannot train together, so run one process per slice.")
    if any(gpu.exclusive for gpu in gpus):
        yield (50, "A GPU's compute mode is not Default: `nvidia-smi -c 0` lets several processes use it, as a study may.")
    if len(gpus) > visible and not any(gpu.mig for gpu in gpus):
        yield (30, f"Of {len(gpus)} GPUs torch sees {visible}: CUDA_VISIBLE_DEVICES decides which.")
    if links and not any(link.startswith("NV") for link in links):
        yield (45, "There is no NVLink between the GPUs: prefer data and pipeline parallelism, and keep parallel.tensor=1.")


def is_taken(gpu: DriverGpu) -> bool:
    """Whether processes hold memory of a GPU that a run would miss."""
    return gpu.used_mib > max(_USED_MIB, _USED_SHARE * gpu.memory_mib)


def _tips_on_the_host(facts: Facts) -> Iterator[Tip]:
    torch, gpus = facts.torch, len(facts.torch.gpus) if facts.torch else 0
    if facts.processor is not None and torch is not None:
        cores = facts.processor.cores
        if torch.threads > cores:
            yield (
                95,
                f"torch would start {torch.threads} threads on {cores} usable cores, and they would wait for one another: "
                f"`export OMP_NUM_THREADS={cores}`.",
            )
        elif not gpus and cores > 1 and facts.variable("OMP_NUM_THREADS") is None:
            yield (
                12,
                f"Several ranks by `deepspeed` on this machine: set OMP_NUM_THREADS to {cores} divided by their number, else "
                f"each starts {torch.threads} threads. (A study does so by itself.)",
            )
    if facts.shared_memory is not None:
        shared = facts.shared_memory
        if gpus > 1 and shared.free < _SHARED_MEMORY_WANTED:
            yield (
                78,
                f"/dev/shm has {shown_size(shared.free)} free, and NCCL needs it between GPUs: `docker run --shm-size=8g` or "
                "`--ipc=host`.",
            )
        if shared.leaked_files:
            yield (
                58,
                f"DeepSpeed's shared-memory op has left {shown_size(shared.leaked_bytes)} in /dev/shm (our runs do not "
                "use it): `rm /dev/shm/deepspeed_allreduce_buffer*` when no job runs.",
            )
    for disk in facts.disks or ():
        if disk.purpose == "temporary":
            continue
        if not disk.writable:
            yield (65, f"{disk.path} cannot be written to: say where runs go by `output=FOLDER`.")
        elif _LEAST_DISK <= disk.free < _DISK_WANTED["cuda" if gpus else "cpu"]:
            parameters = disk.free / _BYTES_PER_PARAMETER / GB
            yield (
                65,
                f"{shown_size(disk.free)} are free in {disk.path}: less than one checkpoint of more than {parameters:.2g}B "
                "parameters (12 bytes each). Say by `output=FOLDER` where there is more.",
            )
    if gpus and facts.memory is not None and facts.memory.usable < gpus * _HOST_MEMORY_PER_GPU:
        yield (
            48,
            f"{shown_size(facts.memory.usable)} of host memory for {gpus} GPUs: at the start each process holds its stage of the "
            "model in fp32, 16 GB of the 4B model; parallel.pipeline or parallel.tensor divide that.",
        )
    if facts.limits is not None and gpus > 1:
        soft, hard = facts.limits.open_files, facts.limits.open_files_hard
        if soft is not None and soft < _OPEN_FILES_WANTED:
            raise_to = 65536 if hard is None else min(hard, 65536)
            how = f"`ulimit -n {raise_to}`" if raise_to > soft else "ask for more in /etc/security/limits.conf"
            yield (40, f"{soft} files may be open at a time, few for {gpus} ranks and their connections: {how}.")


def _tips_on_several_nodes(facts: Facts) -> Iterator[Tip]:
    network = facts.network
    if network is None or facts.torch is None or not facts.torch.gpus:
        return
    chosen = nccl_interfaces(network)
    if facts.variable("NCCL_SOCKET_IFNAME") is None and len(chosen) > 1:
        yield (
            46,
            f"Over several nodes NCCL would use {', '.join(chosen)}: name the one that reaches the others, such as "
            f"`export NCCL_SOCKET_IFNAME={chosen[0]} GLOO_SOCKET_IFNAME={chosen[0]}`.",
        )
    elif facts.variable("GLOO_SOCKET_IFNAME") is None and gloo_interface(network) in (None, "lo") and chosen != ["lo"]:
        yield (
            38,
            f"Over several nodes gloo would not find its way (the name {network.host} leads to "
            f"{network.host_address or 'no address'}): `export GLOO_SOCKET_IFNAME={(chosen or ['eth0'])[0]}`.",
        )
    active = [port for port in network.infiniband if port.state == "ACTIVE"]
    if network.infiniband and not active:
        yield (62, f"No port of {network.infiniband[0].device} is active: nodes would talk over TCP (`ibstat` says more).")
    if active and facts.limits is not None and facts.limits.locked_memory is not None:
        yield (
            63,
            f"{shown_size(facts.limits.locked_memory)} may be locked in memory, and InfiniBand needs it unlimited: "
            "`ulimit -l unlimited`, or `docker run --ulimit memlock=-1`.",
        )


def _tips_on_parts(facts: Facts) -> Iterator[Tip]:
    if facts.parts is not None and facts.parts.foreign_apex is not None:
        yield (
            52,
            "The package `apex` that is installed is an unrelated one: `pip uninstall apex`. NVIDIA's is built from source "
            "(docs/install.md), and nothing needs it.",
        )
    if facts.tracking is not None and facts.tracking.problem is not None:
        yield (
            54,
            f"MLflow at {facts.tracking.uri} does not answer as it should ({facts.tracking.problem}): runs go on without it, and "
            "`megatron-plasticity mlflow sync FOLDER` completes it later.",
        )
    if facts.sandbox is not None and facts.sandbox.problem is not None:
        yield (
            42,
            f"Programs that a model writes cannot be run, so the tasks that judge by running them cannot be evaluated here: "
            f"{facts.sandbox.problem}.",
        )
    if facts.prepared is not None and facts.prepared.damaged:
        yield (56, f"Damaged data: {', '.join(facts.prepared.damaged)}. Delete it, and prepare it again.")
    if facts.software is not None:
        unfit = [needed for needed in facts.software.requirements if needed.extra is not None and needed.installed]
        unfit = [needed for needed in unfit if not needed.fits]
        if unfit:
            named = ", ".join(f"{needed.name} {needed.installed} (declared: {needed.specifier})" for needed in unfit)
            yield (44, f"Optional packages are outside the declared versions: {named}: `pip install -e '.[{unfit[0].extra}]'`.")
        missing = {needed.name for needed in facts.software.requirements if needed.extra == "eval" and not needed.installed}
        missing |= {needed.name for needed in facts.software.requirements if needed.extra is None and not needed.installed}
        if costs := [f"{name} ({cost})" for name, cost in NOT_FOR_TRAINING.items() if name in missing]:
            yield (46, f"Training works without what is not installed: {'; '.join(costs)}. `pip install -e .` brings it.")
        if absent := [name for name in ONLY_FOR_METRICS if name in missing]:
            lack = "runs do not record how busy the machine and its GPUs are"
            yield (22, f"Without {', '.join(absent)} {lack}: `pip install {' '.join(absent)}`.")
        if "math-verify" in missing:
            yield (25, "Without math-verify mathematics is graded by its text alone: `pip install -e '.[eval]'`.")
    if facts.parts is not None and facts.parts.hub_offline:
        yield (24, "HF_HUB_OFFLINE is set: models, tokenizers and data sets come from the cache, or not at all.")


def _tips_on_variables(facts: Facts) -> Iterator[Tip]:
    has_gpus = facts.torch is not None and bool(facts.torch.gpus)
    has_infiniband = facts.network is not None and bool(facts.network.infiniband)
    for name, cost in _DEBUGGING.items():
        value = facts.variable(name)
        if value is not None and value.lower() not in _OFF and has_gpus and (has_infiniband or name != "NCCL_IB_DISABLE"):
            yield (82, f"{name}={value} is set, and {cost}: `unset {name}`.")
    for name, effect in _CHANGE_RESULTS.items():
        if (value := facts.variable(name)) is not None and has_gpus:
            yield (70, f"{name}={value} is set: {effect}. `unset {name}`.")
    if (facts.variable("TORCH_DISTRIBUTED_DEBUG") or "").upper() == "DETAIL":
        yield (60, "TORCH_DISTRIBUTED_DEBUG=DETAIL checks every collective, which slows each step: `unset` it.")
    if _hides_all(facts) and facts.nvidia is not None and facts.nvidia.pci_devices:
        yield (86, "CUDA_VISIBLE_DEVICES hides every GPU of this machine: `unset CUDA_VISIBLE_DEVICES` to train on them.")


def nccl_interfaces(network: Network) -> list[str]:
    """Those that NCCL takes where NCCL_SOCKET_IFNAME is not set: all whose names begin with ib; if there are none, all but lo and
    docker; else docker; else lo (NCCL's documentation of the variable)."""
    usable = [interface.name for interface in network.interfaces if interface.up and interface.address]
    kinds = (
        [name for name in usable if name.startswith("ib")],
        [name for name in usable if not name.startswith(("lo", "docker"))],
        [name for name in usable if name.startswith("docker")],
        usable,
    )
    return next((names for names in kinds if names), [])


def gloo_interface(network: Network) -> str | None:
    """The one that gloo takes where GLOO_SOCKET_IFNAME is not set: that of the address which the host's name resolves to."""

    def matches(interface: Interface) -> bool:
        return interface.address == network.host_address

    if network.host_address is None:
        return None
    if network.host_address.startswith("127."):
        return "lo"
    return next((interface.name for interface in network.interfaces if matches(interface)), None)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def shown_size(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"
