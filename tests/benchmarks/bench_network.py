"""One patch through a network on the CPU: PyTorch in its variants, medseg's accelerated network,
OpenVINO if installed.

python tests/benchmarks/bench_network.py [--network small|wide|nnunet|brain] [--rounds 5]
    [--only NAME ...]

The variants take turns; the median and the least seconds are printed with the rate (the operations
of direct convolution over the median) and the greatest error against float64 on a smaller patch, in
standard deviations of the logits. The peak is that of a product of 2048 x 2048 matrices with packed
weights in oneDNN. Freed memory is kept, as the command line does. `small` and `wide` are medseg's
U-Net with 16 to 256 and 32 to 320 features, `nnunet` is PlainConvUNet of
dynamic-network-architectures, if installed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

from medseg.machine import keep_memory

keep_memory()  # as the command line does, before torch is loaded

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils import mkldnn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from medseg.inference.backends.accelerate import accelerate  # noqa: E402
from medseg.models.folder import load_checkpoint  # noqa: E402
from medseg.networks.unet import UNet  # noqa: E402

CHANNELS_LAST = torch.channels_last_3d


def build(name: str) -> tuple[nn.Module, tuple[int, ...], tuple[int, ...]]:
    """A network, the patch to time and the one to check."""
    if name == "brain":
        return load_checkpoint("brain").network(), (80, 96, 80), (48, 48, 48)
    if name == "small":
        return UNet(1, 25, features=(16, 32, 64, 128, 256)), (96, 96, 96), (48, 64, 48)
    if name == "wide":
        return UNet(1, 25, features=(32, 64, 128, 256, 320)), (128, 128, 128), (48, 48, 64)
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    widths, strides = [32, 64, 128, 256, 320, 320], [1, 2, 2, 2, 2, 2]
    network = PlainConvUNet(
        1, 6, widths, nn.Conv3d, 3, strides, 2, 25, 2, conv_bias=True, norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )  # fmt: skip
    return network, (128, 128, 128), (64, 64, 64)


def variants(network: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """What to compare, by name; each takes and returns float32."""
    last = copy.deepcopy(network).to(memory_format=CHANNELS_LAST)
    half = copy.deepcopy(network).to(torch.bfloat16, memory_format=CHANNELS_LAST)
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "torch fp32": network,
        "torch fp32 channels-last": lambda x: last(x.contiguous(memory_format=CHANNELS_LAST)),
        "torch bf16 channels-last": (
            lambda x: half(x.to(torch.bfloat16, memory_format=CHANNELS_LAST)).float()
        ),
        "medseg fp32": accelerate(network),
        "medseg bf16": halved(accelerate(network)),
    }
    if find_spec("openvino"):
        import openvino

        for precision in ("f32", "bf16"):
            compiled: dict[tuple[int, ...], openvino.CompiledModel] = {}

            def run(x: Tensor, precision: str = precision, compiled: dict = compiled) -> Tensor:
                shape = tuple(x.shape)
                if shape not in compiled:
                    model = openvino.convert_model(
                        network, example_input=torch.zeros(1, x.shape[1], 64, 64, 64)
                    )
                    model.reshape(shape)
                    compiled[shape] = openvino.Core().compile_model(
                        model, "CPU", {"INFERENCE_PRECISION_HINT": precision}
                    )
                return torch.from_numpy(compiled[shape](x.numpy())[0])

            found[f"openvino {precision}"] = run
    return found


def halved(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network under autocast, as the torch backend runs it."""

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return network(x).float()

    return run


def peak(dtype: torch.dtype) -> float:
    """The best of 10 rates of a packed matrix product, in GF/s."""
    size = 2048
    linear = mkldnn.to_mkldnn(nn.Linear(size, size, bias=False).eval(), dtype)
    x = torch.randn(size, size).to(dtype).to_mkldnn()
    return 2 * size**3 / min(timed(linear, x)[0] for _ in range(10)) / 1e9


def timed(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, Tensor]:
    """Seconds and result."""
    begun = time.perf_counter()
    result = function(x)
    return time.perf_counter() - begun, result


def main() -> None:
    """Print a line for each variant."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", default="small", choices=["small", "wide", "nnunet", "brain"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        network, patch, small = build(options.network)
        network.eval()
        x, probe = torch.randn(1, 1, *patch), torch.randn(1, 1, *small)
        with FlopCounterMode(display=False) as counter:
            # Computes nothing, takes no memory.
            copy.deepcopy(network).to("meta")(torch.empty(x.shape, device="meta"))
        giga = counter.get_total_flops() / 1e9
        peaks = f"fp32 {peak(torch.float32):.0f}, bf16 {peak(torch.bfloat16):.0f} GF/s"
        print(
            f"{options.network}, {patch}, {giga:.0f} GF, {torch.get_num_threads()} threads, peak"
            f" {peaks}"
        )
        reference = copy.deepcopy(network).double()(probe.double())
        compared = {
            name: run
            for name, run in variants(network).items()
            if not options.only or name in options.only
        }
        errors, seconds = {}, {name: [] for name in compared}
        for name, run in compared.items():
            errors[name] = float((run(probe).double() - reference).abs().max() / reference.std())
            run(x)
        for _ in range(options.rounds):
            for name, run in compared.items():
                seconds[name].append(timed(run, x)[0])
        for name, values in seconds.items():
            median = statistics.median(values)
            rate = f"{giga / median:6.0f} GF/s"
            print(
                f"{name:26} {median:7.3f} s (least {min(values):.3f})  {rate}  error"
                f" {errors[name]:.1e}"
            )


if __name__ == "__main__":
    main()
