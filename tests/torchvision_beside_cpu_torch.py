"""A pytest plugin that lets a CUDA-built torchvision be imported beside a CPU torch: timm imports it, and nothing else.

torchvision registers fake kernels for two operators of its compiled library, which cannot be loaded without CUDA;
declaring the operators first is enough. Development only.
"""

import torch

if torch.version.cuda is None:
    LIBRARY = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
