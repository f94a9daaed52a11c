"""LPIPS, a perceptual distance, with features from a local file instead of a download.

Zhang et al. 2018, "The unreasonable effectiveness of deep features as a perceptual metric", in its authors' package.
"""

import importlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vqcodec.errors import WeightsError
from vqcodec.models.layers import channels_last
from vqcodec.torchvision_compat import import_torchvision

NETWORKS = {11: "alex", 3: "squeeze"}  # AlexNet and SqueezeNet 1.1, by the side of their first kernels


def lpips(features: Path, expected: str | None = None) -> nn.Module:
    """LPIPS 0.1 as a module: two batches of pictures (B, 3, H, W) in -1..1, at least 64 pixels a side -> (B, 1, 1, 1).

    Args:
        features: a safetensors file with the convolution weights of AlexNet or SqueezeNet 1.1, by torchvision's names.
        expected: the network that they must be of, as in NETWORKS; None for either.

    Raises:
        ImportError: lpips or torchvision is not installed.
        WeightsError: `features` cannot be read or belongs to another network.
    """
    import_torchvision()
    package = importlib.import_module("lpips")  # untyped
    try:
        tensors = load_file(features)
        network = NETWORKS[tensors["features.0.weight"].shape[-1]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it uses deprecated arguments of torchvision
            module: nn.Module = package.LPIPS(net=network, pnet_rand=True, verbose=False)
        body = module.get_submodule("net")
        # "slice2.3.weight" in the package is "features.3.weight" in torchvision.
        body.load_state_dict({name: tensors["features." + name.partition(".")[2]] for name in body.state_dict()})
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"cannot read features {features}: {error}") from None
    except (LookupError, RuntimeError):
        raise WeightsError(f"{features} does not hold the features of a network of LPIPS") from None
    if expected not in (None, network):
        raise WeightsError(f"{features} holds the features of LPIPS's network {network!r}, not of {expected!r}")
    return module.requires_grad_(False).eval()


def distance(
    features: Sequence[Path], device: torch.device, expected: str | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS as a function of pixels, the mean over networks: two batches of pictures (B, 3, H, W) in 0..255 -> (B,).

    Where gradients are wanted under autocast it runs in bfloat16, else in float32.

    Args:
        features: of each network. device: of the pictures. expected: see `lpips`, also for errors.
    """
    modules = [channels_last(lpips(path, expected), device) for path in features]

    def measure(a: Tensor, b: Tensor) -> Tensor:
        rough = torch.is_grad_enabled() and torch.is_autocast_enabled(device.type)
        with torch.autocast(device.type, torch.bfloat16, enabled=rough):
            a, b = (x.float() / 127.5 - 1 for x in (a, b))
            return torch.stack([module(a, b).flatten() for module in modules]).mean(0)

    return measure
