"""LPIPS, a perceptual distance, with features from a local file instead of a download.

Zhang et al. 2018, "The unreasonable effectiveness of deep features as a perceptual metric", in its authors' package.
"""

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vqcodec.errors import WeightsError
from vqcodec.models.layers import channels_last
from vqcodec.torchvision_compat import import_torchvision


def lpips(network: str, features: Path) -> nn.Module:
    """LPIPS 0.1 as a module: two batches of pictures (B, 3, H, W) in -1..1, at least 64 pixels a side -> (B, 1, 1, 1).

    Args:
        network: "alex" (AlexNet) or "squeeze" (SqueezeNet 1.1).
        features: a safetensors file with the network's convolution weights under torchvision's names.

    Raises:
        ImportError: lpips or torchvision is not installed.
        WeightsError: `features` cannot be read or belongs to another network.
    """
    import_torchvision()
    package = importlib.import_module("lpips")  # untyped
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses deprecated arguments of torchvision
        module: nn.Module = package.LPIPS(net=network, pnet_rand=True, verbose=False)
    body = module.get_submodule("net")
    try:
        tensors = load_file(features)
        # "slice2.3.weight" in the package is "features.3.weight" in torchvision.
        body.load_state_dict({name: tensors["features." + name.partition(".")[2]] for name in body.state_dict()})
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"cannot read features {features}: {error}") from None
    except (KeyError, RuntimeError):
        raise WeightsError(f"{features} does not hold the features of LPIPS's network {network!r}") from None
    return module.requires_grad_(False).eval()


def distance(network: str, features: Path, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS as a function of pixels: two batches of pictures (B, 3, H, W) in 0..255 -> (B,).

    Args and Raises: as `lpips`.
    """
    module = channels_last(lpips(network, features), device)

    def measure(a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            distances: Tensor = module(a.float() / 127.5 - 1, b.float() / 127.5 - 1)
        return distances.flatten()

    return measure
