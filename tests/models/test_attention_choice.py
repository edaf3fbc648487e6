"""What a run is told about its attention kernels, on made-up GPUs; torch's answers are its own where there is a CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend

from megatron_plasticity.config.training import EngineConfig
from megatron_plasticity.errors import UserError
from megatron_plasticity.models import attention, attention_choice
from megatron_plasticity.models.attention_choice import AttentionChoice, choose_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def engine(name: str = "auto", precision: str = "bf16") -> EngineConfig:
    return EngineConfig.model_validate({"attention": name, "precision": precision})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("auto", AttentionChoice("sdpa", "fused kernel for CPUs (sdpa)")),
        ("sdpa", AttentionChoice("sdpa", "fused kernel for CPUs (sdpa)")),
        ("sdpa-flash", AttentionChoice("sdpa-flash", "fused kernel for CPUs (sdpa-flash)")),
        ("sdpa-math", AttentionChoice("sdpa-math", "math kernel of torch (sdpa-math)")),
        ("eager", AttentionChoice("eager", "eager")),
    ],
)
def test_on_a_cpu(make_config, name: str, expected: AttentionChoice, precision: str) -> None:
    assert choose_attention(engine(name, precision), make_config(), 1, CPU) == expected


def test_with_tensor_ranks_torch_is_asked_about_the_heads_of_one(make_config, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(
        torch, "_fused_sdp_choice", lambda q, k, v, *_, **__: asked.append((q.shape[1], k.shape[1], v.shape[1])) or 1
    )
    choose_attention(engine(), make_config(query_heads=8, kv_heads=2, head_dim=8, hidden_size=64), 4, CPU)
    assert asked == [(2, 1, 1)]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "flash-attention-3",
            "flash-attention-3 runs on CUDA, and the device is cpu; use engine.attention: auto",
        ),
        ("sdpa-cudnn", "engine.attention: sdpa-cudnn does not fit cpu, bf16, head dimension"),
        ("sdpa-efficient", "engine.attention: sdpa-efficient does not fit cpu"),
    ],
)
def test_one_that_does_not_fit_is_refused(make_config, name: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        choose_attention(engine(name), make_config(), 1, CPU)
    assert says in str(error.value)


@pytest.fixture
def gpu(monkeypatch) -> Callable[..., None]:
    """Makes a GPU of this capability without FlashAttention packages, on which torch's kernels fit as `kernels` says, the first
    enabled one first; tensors are made on the CPU."""

    def make(capability: int, kernels: list[SDPBackend], grouped: tuple[SDPBackend, ...] = tuple(SDPBackend.__members__.values()),
             cudnn: int = 92000) -> None:  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (capability, 0))
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
        monkeypatch.setattr(attention, "_loaded", {p.name: "is not installed" for p in attention.FLASH_PACKAGES})
        flags = {
            SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
            SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
            SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
            SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
        }

        def choice(query, key, value, mask, dropout, causal, *, enable_gqa):
            assert (mask, dropout, causal) == (None, 0.0, True)
            assert query.requires_grad
            assert enable_gqa == (query.shape[1] != key.shape[1])
            for kernel in kernels:
                if flags[kernel]() and (not enable_gqa or kernel in grouped):
                    return kernel.value
            warnings.warn("cuDNN attention kernel not used because:", stacklevel=1)
            warnings.warn("head dimensions of this kind. (Triggered internally at sdp_utils.cpp:1.)", stacklevel=1)
            raise RuntimeError("No available kernel. Aborting execution.")

        def refuse(params, debug):
            assert debug
            warnings.warn(f"Expected fewer than {params.query.shape[1]} heads.", stacklevel=1)
            return False

        monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
        monkeypatch.setattr(attention_choice, "can_use_flash_attention", refuse)
        monkeypatch.setattr(attention_choice, "can_use_cudnn_attention", refuse)
        real = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, device, dtype: real(*size, dtype=dtype))

    return make


CUDNN, FLASH, EFFICIENT, MATH = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


def test_on_hopper_torch_takes_cudnn_and_nothing_is_slow(gpu, make_config) -> None:
    gpu(9, [CUDNN, FLASH, EFFICIENT, MATH])
    assert choose_attention(engine(), make_config(), 1, CUDA) == AttentionChoice("sdpa", "cuDNN (sdpa)", None)
    assert choose_attention(engine("sdpa-flash"), make_config(), 1, CUDA).kernel == "FlashAttention-2 of torch (sdpa-flash)"


def test_a_cudnn_that_computes_wrong_gradients_is_never_taken(gpu, make_config) -> None:
    gpu(9, [CUDNN, FLASH, EFFICIENT, MATH], cudnn=91500)
    choice = choose_attention(engine(), make_config(), 1, CUDA)
    assert (choice.backend, choice.kernel) == ("sdpa-flash", "FlashAttention-2 of torch (sdpa)")
    assert choice.slow is not None
    assert "needs cuDNN 9.15.1 or later" in choice.slow
    assert "91500" in choice.slow
    assert "LD_LIBRARY_PATH" in choice.slow
    with pytest.raises(UserError, match=r"engine.attention: sdpa-cudnn needs cuDNN 9\.15\.1"):
        choose_attention(engine("sdpa-cudnn"), make_config(), 1, CUDA)


def test_without_it_the_next_kernel_that_fits_is_taken(gpu, make_config) -> None:
    gpu(9, [CUDNN, EFFICIENT, MATH], cudnn=91500)
    assert choose_attention(engine(), make_config(), 1, CUDA).backend == "sdpa-efficient"


def test_an_older_flash_attention_can_be_asked_for_on_a_newer_gpu(gpu, make_config, monkeypatch) -> None:
    gpu(9, [CUDNN])
    monkeypatch.setitem(attention._loaded, "flash-attention-2", lambda *_, **__: None)
    assert choose_attention(engine("flash-attention-2"), make_config(), 1, CUDA).kernel == "flash-attention-2"
    assert choose_attention(engine(), make_config(), 1, CUDA).backend == "sdpa"


@pytest.mark.parametrize(
    ("capability", "kernels", "precision", "kernel", "slow"),
    [
        (8, [FLASH, EFFICIENT, MATH], "bf16", "FlashAttention-2 of torch", None),
        (
            8,
            [EFFICIENT, MATH],
            "bf16",
            "memory-efficient kernel of torch",
            "than FlashAttention: Expected fewer than 4 heads.",
        ),
        (8, [EFFICIENT, MATH], "fp32", "memory-efficient kernel of torch", None),  # there is no faster one for fp32
        (7, [EFFICIENT, MATH], "bf16", "memory-efficient kernel of torch", None),
        (
            9,
            [FLASH, MATH],
            "bf16",
            "FlashAttention-2 of torch",
            "slower on this GPU than cuDNN's: Expected fewer",
        ),
        (9, [MATH], "bf16", "math kernel of torch", "writes all scores to memory: Expected fewer than 4 heads. A head dimension"),
        (9, [MATH], "fp32", "math kernel of torch", "engine.precision: bf16 has faster kernels"),
    ],
)
def test_a_slow_kernel_is_noticed(gpu, make_config, capability, kernels, precision: str, kernel: str, slow: str | None) -> None:
    gpu(capability, kernels)
    choice = choose_attention(engine(precision=precision), make_config(query_heads=4), 1, CUDA)
    assert (choice.backend, choice.kernel) == ("sdpa", f"{kernel} (sdpa)")
    assert (choice.slow is None) == (slow is None)
    assert slow is None or slow in str(choice.slow)


def test_grouped_heads_are_repeated_where_that_gives_a_fused_kernel(gpu, make_config) -> None:
    gpu(9, [EFFICIENT, MATH], grouped=(MATH,))
    choice = choose_attention(engine(precision="fp32"), make_config(query_heads=4, kv_heads=2), 1, CUDA)
    assert choice == AttentionChoice("sdpa-efficient", "memory-efficient kernel of torch (sdpa)", None)


def test_a_forced_kernel_that_torch_refuses_is_refused_with_its_reasons(gpu, make_config) -> None:
    gpu(9, [FLASH, MATH])
    with pytest.raises(UserError) as error:
        choose_attention(engine("sdpa-efficient"), make_config(), 1, CUDA)
    assert "(head dimensions of this kind); use engine.attention: auto" in str(error.value)
    assert "because" not in str(error.value)


def test_a_flash_package_that_fits_is_the_choice(gpu, make_config, monkeypatch) -> None:
    gpu(9, [CUDNN, MATH])
    monkeypatch.setattr(attention, "_loaded", {"flash-attention-3": lambda: None, "flash-attention-4": "is not installed"})
    model = make_config()
    assert choose_attention(engine(), model, 1, CUDA) == AttentionChoice("flash-attention-3", "flash-attention-3")
    assert choose_attention(engine("flash-attention-3"), model, 1, CUDA).backend == "flash-attention-3"
    with pytest.raises(UserError, match=r"flash-attention-4 .*; use engine\.attention: auto"):
        choose_attention(engine("flash-attention-4"), model, 1, CUDA)
